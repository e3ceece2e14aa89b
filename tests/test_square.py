"""A small batch against itself: fewer calls of torch, the same numbers as tile by tile."""

from typing import Any
from unittest import mock

import pytest
import torch

from eqco_loss import EqCoLoss
from eqco_loss.ops import blocks, square
from tests.tolerance import assert_as_exact_as_eager
from tests.world import draw

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def step(
    n: int, dtype: torch.dtype, leaves: str, exactly: bool = False, **settings: Any
) -> tuple[list[torch.Tensor], bool]:
    """Loss and gradients of the leaves, in float64 if ``exactly``, and whether the short way was taken."""
    query, key = (draw(n, 19, seed=seed, dtype=dtype).cpu() for seed in (1, 2))
    query, key = (x.double() if exactly else x for x in (query, key))
    needed = [x.requires_grad_() for name, x in (("q", query), ("k", key)) if name in leaves]
    name = "symmetric_losses" if "symmetric" in settings else "row_losses"
    with mock.patch.object(square, name, wraps=getattr(square, name)) as taken:
        torch.manual_seed(3)  # the same random negatives
        loss = EqCoLoss(**settings)(query, key)
    gradients = torch.autograd.grad(loss, needed, torch.tensor(-1.7, dtype=loss.dtype)) if needed else []
    return [loss.detach(), *gradients], taken.called


def assert_is_what_tiles_give(dtype: torch.dtype, leaves: str, settings: dict[str, Any]) -> None:
    """Loss and gradients of the short way, as exact as those tile by tile."""
    serves = "serves_both" if "symmetric" in settings else "serves"
    for n in (2, 3, 50):
        got, short = step(n, dtype, leaves, **settings)
        assert short
        with mock.patch.object(square, serves, return_value=False):
            expected, short = step(n, dtype, leaves, **settings)
            truth, _ = step(n, dtype, leaves, exactly=True, **settings)
        assert not short
        for ours, by_tiles, exact in zip(got, expected, truth, strict=True):
            assert_as_exact_as_eager(ours, by_tiles, exact, temperature=0.2)


@pytest.mark.parametrize("leaves", ["qk", "q", "k", ""])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [None, 65536.0])
@pytest.mark.parametrize("sampling", ["rolled", "random"])
@pytest.mark.parametrize("negatives", [None, 1, 16])  # of 50 others; with few, all of them
def test_is_what_tiles_give(
    negatives: int | None, sampling: str, alpha: float | None, dtype: torch.dtype, leaves: str
) -> None:
    settings: dict[str, Any] = {"alpha": alpha, "num_negatives": negatives, "sampling": sampling}
    assert_is_what_tiles_give(dtype, leaves, settings)


@pytest.mark.parametrize("leaves", ["qk", ""])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("alpha", [None, 1.0, 65536.0])
@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_both_directions_are_what_tiles_give(
    in_batch: str, alpha: float | None, dtype: torch.dtype, leaves: str
) -> None:
    settings: dict[str, Any] = {"alpha": alpha, "in_batch": in_batch, "symmetric": True}
    assert_is_what_tiles_give(dtype, leaves, settings)


@pytest.mark.parametrize("alpha", [1e-30, 1e-20, 1e20, 1e34])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_margin_that_would_leave_float32_goes_tile_by_tile(symmetric: bool, alpha: float) -> None:
    settings: dict[str, Any] = {"alpha": alpha, **({"symmetric": True} if symmetric else {})}
    got, short = step(9, torch.float32, "qk", **settings)
    assert short is (alpha in (1e-20, 1e20))
    exact, short = step(9, torch.float64, "qk", exactly=True, **settings)
    assert short
    for ours, truth in zip(got, exact, strict=True):
        assert (ours.double() - truth).norm() <= 1e-5 * truth.norm()  # float32 rounds a margin of 80 by 4e-6


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"num_negatives": 3}], ids=str)
def test_the_gradient_of_one_is_multiplied_by_nothing_but_stays_ours_to_give_again(settings: dict[str, Any]) -> None:
    """A gradient that a hook changes in place must not be what the next backward of the same loss gives."""
    query, key = (draw(8, 19, seed=seed, dtype=torch.float32).cpu().requires_grad_() for seed in (1, 2))
    loss = EqCoLoss(**settings)(query, key)
    expected = torch.autograd.grad(loss, [query, key], retain_graph=True)
    for change in (torch.Tensor.zero_, torch.Tensor.neg_):
        for x in torch.autograd.grad(loss, [query, key], retain_graph=True):
            change(x)
    last = torch.autograd.grad(loss, [query, key])
    for first, again in zip(expected, last, strict=True):
        assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [query, key])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.02},
        {"temperature": 0.02, "symmetric": True},
        {"temperature": torch.tensor(0.2), "symmetric": True},
        {"reduction": "none"},
        {"num_negatives": 4, "sampling": "random", "temperature": 0.02},
        {"in_batch": "views"},
        {"normalize": False},
        {"temperature": torch.tensor(0.2)},
    ],
    ids=str,
)
def test_other_calls_go_tile_by_tile(settings: dict[str, Any]) -> None:
    query, key = (draw(9, 19, seed=seed, dtype=torch.float32).cpu().requires_grad_() for seed in (1, 2))
    with (
        mock.patch.object(square, "row_losses", wraps=square.row_losses) as taken,
        mock.patch.object(square, "symmetric_losses", wraps=square.symmetric_losses) as both_taken,
    ):
        EqCoLoss(**settings)(query, key)
    assert not taken.called
    assert not both_taken.called


def test_a_narrow_band_of_a_large_batch_goes_block_by_block() -> None:
    """One product of all rows with all keys would have 150 times the similarities that are asked for."""
    for n, expected in ((512, True), (600, False)):
        assert step(n, torch.float32, "qk", num_negatives=4)[1] is expected


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_few_picks_of_many_keys_are_fetched(dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"num_negatives": 4, "sampling": "random"}
    assert step(256, dtype, "qk", **settings)[1]
    fetched, short = step(257, dtype, "qk", **settings)
    assert not short
    with mock.patch.object(blocks, "are_few", return_value=False), mock.patch.object(square, "are_few") as few:
        shared, short = step(257, dtype, "qk", **settings)  # the mock is true, as any object
        assert few.called
        assert not short
        few.return_value = False
        in_one_product, short = step(257, dtype, "qk", **settings)
        assert short
    for a, *others in zip(fetched, shared, in_one_product, strict=True):
        for b in others:
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_a_gradient_of_the_keys_alone_is_whole() -> None:
    """The positives' part is in it, though the record has both."""
    both, _ = step(12, torch.float64, "qk")
    alone, _ = step(12, torch.float64, "k")
    torch.testing.assert_close(alone[1], both[2])


@pytest.mark.parametrize("sampling", ["rolled", "random"])
@pytest.mark.parametrize("negatives", [None, 5])
def test_a_gradient_has_memory_of_its_own(negatives: int | None, sampling: Any) -> None:
    query, key = (draw(16, 19, seed=seed, dtype=torch.float32).cpu().requires_grad_() for seed in (1, 2))
    loss = EqCoLoss(num_negatives=negatives, sampling=sampling)(query, key)
    for gradient in torch.autograd.grad(loss, [query, key]):
        assert not gradient._is_view()
        assert gradient.untyped_storage().nbytes() == 4 * gradient.numel()


@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("ids", [False, True])
def test_the_least_alpha_is_a_number(ids: bool, temperature: float) -> None:
    """alpha / K of a float64's least number would be 0, which has no logarithm."""
    query, key = (draw(9, 19, seed=seed, dtype=torch.float64).cpu() for seed in (1, 2))
    given = {"query_ids": torch.arange(9) // 2} if ids else {}
    loss = EqCoLoss(temperature=temperature, alpha=5e-324)(query, key, **given)
    assert float(loss) == pytest.approx(0.0, abs=1e-200)


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"symmetric": True, "in_batch": "views"}], ids=str)
def test_a_compiler_gets_no_answer_that_is_an_argument(settings: dict[str, Any], fresh_compiler: None) -> None:
    """A gradient that eager code hands on as it is would be an output that is an input."""
    query, key = (draw(8, 19, seed=seed, dtype=torch.float32).cpu().requires_grad_() for seed in (1, 2))
    criterion = EqCoLoss(**settings)
    expected = torch.autograd.grad(criterion(query, key), [query, key])
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        loss = compiled(query, key)
        for one, other in zip(torch.autograd.grad(loss, [query, key]), expected, strict=True):
            torch.testing.assert_close(one, other)
