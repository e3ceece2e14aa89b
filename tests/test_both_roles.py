"""Both directions of a batch at once: every row is anchor, positive and negative, and each similarity serves twice."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck

from eqco_loss import DualTempInfoNCE, EqCoLoss
from tests import knobs
from tests.cases import DEVICE
from tests.test_operators import Memory, Seen


def criterion(loss: str, t: float | Tensor, in_batch: Any, symmetric: bool, **more: Any) -> EqCoLoss | DualTempInfoNCE:
    if loss == "dual":
        return DualTempInfoNCE(t, 0.9, in_batch=in_batch, symmetric=symmetric, backend="torch", **more)
    return EqCoLoss(t, alpha=40.0, in_batch=in_batch, symmetric=symmetric, backend="torch", **more)


def views(n: int, dtype: torch.dtype = torch.float64, d: int = 5) -> tuple[Tensor, Tensor]:
    query = torch.randn(n, d, dtype=dtype)
    return query.requires_grad_(), (query + torch.randn(n, d, dtype=dtype)).detach().requires_grad_()


@pytest.mark.parametrize("tile", [None, 10])
@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("in_batch", ["keys", "views"])
@pytest.mark.parametrize("loss", ["eqco", "dual"])
def test_is_the_mean_of_two_calls(loss: str, in_batch: Any, n: int, tile: int | None) -> None:
    """Value and gradients, also a learned temperature's, under a gradient that is not 1."""
    query, key = views(n)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    small: AbstractContextManager[None] = nullcontext() if tile is None else knobs.tiles(tile)
    with small, Seen() as seen:
        at_once = criterion(loss, t, in_batch, True)(query, key)
        got = torch.autograd.grad(at_once, (query, key, t), torch.tensor(-1.7, dtype=torch.float64))
    assert seen.names == ["symmetric_losses", "symmetric_gradient"]
    one = criterion(loss, t, in_batch, False)
    separate = (one(query, key) + one(key, query)) / 2
    expected = torch.autograd.grad(separate, (query, key, t), torch.tensor(-1.7, dtype=torch.float64))
    torch.testing.assert_close(at_once, separate, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_metrics_by_the_registered_operator(in_batch: Any, backend: Any) -> None:
    """Where a mode looks on, no output may be another's memory; the values are the same."""
    query, key = (x.detach().float().to(DEVICE).requires_grad_() for x in views(6))
    one = EqCoLoss(in_batch=in_batch, symmetric=True, backend=backend)
    straight = one.with_metrics(query, key)
    with Seen() as seen:
        dispatched = one.with_metrics(query, key)
    assert seen.names == ["row_losses", "row_losses"]
    torch.testing.assert_close(dispatched, straight, rtol=0.0, atol=0.0)
    torch.autograd.backward(straight.loss)
    assert query.grad is not None


@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_second_derivatives(in_batch: Any) -> None:
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(query: Tensor, key: Tensor, t: Tensor) -> Tensor:
        value: Tensor = criterion("eqco", t, in_batch, True)(query, key)
        return value

    assert gradgradcheck(loss, (*views(3, d=3), t))


@pytest.mark.parametrize("in_batch", ["keys", "views"])
@pytest.mark.parametrize("learns", ["query", "key", "temperature", "nothing"])
def test_whatever_learns(learns: str, in_batch: Any) -> None:
    """One side alone, the temperature alone, nothing: the same loss, and the gradient that was asked for."""
    query, key = views(6)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    whole = criterion("eqco", t, in_batch, True)(query, key)
    gradients = dict(zip(("query", "key", "temperature"), torch.autograd.grad(whole, (query, key, t)), strict=True))
    leaves = {"query": query, "key": key, "temperature": t}
    fixed = {name: leaf if name == learns else leaf.detach() for name, leaf in leaves.items()}
    loss = criterion("eqco", fixed["temperature"], in_batch, True)(fixed["query"], fixed["key"])
    torch.testing.assert_close(loss, whole, atol=1e-13, rtol=1e-13, check_stride=False)
    if learns != "nothing":
        (gradient,) = torch.autograd.grad(loss, leaves[learns])
        torch.testing.assert_close(gradient, gradients[learns], atol=1e-12, rtol=1e-12)


def test_views_of_two_dtypes() -> None:
    query, key = views(6, torch.float32)
    half = query.detach().bfloat16().requires_grad_()
    loss = criterion("eqco", 0.2, "keys", True)(half, key)
    exact = criterion("eqco", 0.2, "keys", True)(half.detach().float().requires_grad_(), key)
    assert torch.equal(loss, exact)
    gradients = torch.autograd.grad(loss, (half, key))
    assert [x.dtype for x in gradients] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_a_change_in_place_before_backward_raises(in_batch: Any) -> None:
    """Of what backward reads: the rows, and a learned temperature."""
    query, key = views(6)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = criterion("eqco", t, in_batch, True)(query, key)
    with torch.no_grad():
        t.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_never_n_by_n(in_batch: Any) -> None:
    n = 600
    query, key = views(n, torch.float32, d=4)
    one = criterion("dual", 0.2, in_batch, True)
    one(query, key).backward()
    with knobs.tiles(4096), Memory() as memory:
        one(query, key).backward()
    matrix = 4 * n * n
    assert memory.largest < matrix / 4, f"{memory.largest} bytes at once; N x N is {matrix}"
    assert memory.peak < matrix / 2, f"{memory.peak} bytes; N x N is {matrix}"


def test_far_apart_and_cold() -> None:
    """t = 0.01, as CLIP ends: no overflow, no NaN, as float64 has it."""
    query, key = views(40, torch.float32, d=8)
    loss = criterion("eqco", 0.01, "keys", True)(query, key)
    gradients = torch.autograd.grad(loss, (query, key))
    doubles = [x.detach().double().requires_grad_() for x in (query, key)]
    exact = criterion("eqco", 0.01, "keys", True)(*doubles)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=0.0)
    for got, expected in zip(gradients, torch.autograd.grad(exact, doubles), strict=True):
        assert float((got - expected).norm() / expected.norm()) <= 2e-5


def test_a_batch_with_ids_goes_one_direction_after_the_other() -> None:
    """Ids can leave rows without negatives, which only the other path looks for."""
    query, key = views(6)
    with Seen() as seen:
        EqCoLoss(symmetric=True)(query, key, query_ids=torch.arange(6)).backward()
    assert seen.names.count("row_losses") == 2
    assert "symmetric_gradient" not in seen.names


@pytest.mark.parametrize("in_batch", ["keys", "views"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_logits_without_a_bound(scale: float, in_batch: Any) -> None:
    """normalize=False: logits up to 1e9, whose log-sum-exp rounds by more than a softmax can bear."""
    query, key = (scale * x.detach().float() for x in views(9))
    leaves = [query.requires_grad_(), key.requires_grad_()]
    one = EqCoLoss(0.1, in_batch=in_batch, symmetric=True, normalize=False)
    got = torch.autograd.grad(one(*leaves), leaves)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    for a, b in zip(got, torch.autograd.grad(one(*doubles), doubles), strict=True):
        assert float((a - b).norm() / b.norm()) <= 2e-5


@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_each_view_has_a_gradient_of_its_own(in_batch: Any) -> None:
    """Who changes one in place, as GradCache does between steps, has not changed what autograd kept of the other."""
    query, key = views(6)
    of_query, of_key = torch.autograd.grad(EqCoLoss(symmetric=True, in_batch=in_batch)(query, key), (query, key))
    x = torch.ones_like(of_key, requires_grad=True)
    surrogate, expected = (x * of_key).sum(), of_key.clone()
    of_query.mul_(0.5)
    surrogate.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
