"""torch.func over a loss: vmap is call by call, also compiled; what an operator cannot serve is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eqco_loss import DualTempInfoNCE, EqCoLoss, functional
from tests.cases import LOSSES


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's: one call after the other
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"num_negatives": 2}], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_backward_of_vmap_is_call_by_call(loss: str, kind: dict[str, Any], reduction: Any) -> None:
    criterion = (EqCoLoss if loss == "eqco" else DualTempInfoNCE)(reduction=reduction, **kind)
    query, key = (torch.randn(3, 6, 4, requires_grad=True) for _ in range(2))
    mapped = torch.autograd.grad(torch.func.vmap(criterion)(query, key).sum(), [query, key])
    values = [criterion(q, k).sum() for q, k in zip(query, key, strict=True)]
    expected = torch.autograd.grad(torch.stack(values).sum(), [query, key])
    for got, gradient in zip(mapped, expected, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_draws_negatives_for_each_call() -> None:
    query, key = torch.randn(1, 40, 4).expand(2, 40, 4), torch.randn(1, 40, 4).expand(2, 40, 4)
    for k in (3, 20):  # both ways to draw
        draw = EqCoLoss(num_negatives=k, sampling="random")
        first, second = torch.func.vmap(draw, randomness="different")(query, key)
        assert first != second


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own jvp uses it
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jvp])
def test_other_transforms_of_torch_func_name_the_way_out(transform: Callable[..., Any]) -> None:
    query, key = torch.randn(4, 3), torch.randn(4, 3)

    def loss(q: Tensor) -> Any:
        return EqCoLoss()(q, key)

    def mapped(q: Tensor) -> Any:
        return torch.func.vmap(loss)(q[None]).sum()

    for function in (loss, mapped):
        with pytest.raises(NotImplementedError, match=r"Use torch\.autograd\.grad"):
            transform(function, (query,), (query,)) if transform is torch.func.jvp else transform(function)(query)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_is_an_error_in_a_compiled_function(fresh_compiler: None) -> None:
    """Where the operator's tangent would be 0 without a word."""
    query, key, tangent = torch.randn(3, 4, 3)

    def loss(q: Tensor) -> Tensor:
        return EqCoLoss()(q, key)

    def lse(q: Tensor) -> Tensor:
        return functional.negatives_logsumexp(q, key).sum()

    def dual(q: Tensor) -> Any:
        with torch.autograd.forward_ad.dual_level():
            return loss(torch.autograd.forward_ad.make_dual(q, tangent))

    functions: list[Callable[..., Any]] = [
        lambda q: torch.func.jvp(loss, (q,), (tangent,)),
        lambda q: torch.func.jvp(lse, (q,), (tangent,)),
        lambda q: torch.func.jacfwd(loss)(q),
        dual,
    ]
    for function in functions:
        with pytest.raises(NotImplementedError, match="expected reverse-mode differentiation"):
            torch.compile(function, backend="aot_eager")(query)
    inside = torch.compile(loss, backend="aot_eager")
    inside(query)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="got forward mode"):
        inside(torch.autograd.forward_ad.make_dual(query, tangent))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"num_negatives": 2}, {"lse": True}], ids=str)
def test_compiled_vmap_is_call_by_call(kind: dict[str, Any], fresh_compiler: None) -> None:
    """A compiler does not say whether what vmap hides requires a gradient."""
    query, key = torch.randn(3, 6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return functional.negatives_logsumexp(q, k).sum() if kind.get("lse") else EqCoLoss(**kind)(q, k)

    def mapped(q: Tensor, k: Tensor) -> Tensor:
        return torch.func.vmap(loss, in_dims=(0, None))(q, k)

    got = torch.compile(mapped, backend="aot_eager", fullgraph=True)(query, key)
    expected = torch.stack([loss(q, key) for q in query])
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(x.sum(), [query, key]) for x in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_temperatures() -> None:
    query, key = torch.randn(2, 6, 4)
    temperatures = torch.tensor([0.1, 0.2], requires_grad=True)

    def loss(t: Tensor) -> Tensor:
        return functional.eqco_loss(query, key, temperature=t)

    mapped, one_by_one = torch.func.vmap(loss)(temperatures), torch.stack([loss(t) for t in temperatures])
    torch.testing.assert_close(mapped, one_by_one)
    gradients = [torch.autograd.grad(x.sum(), temperatures)[0] for x in (mapped, one_by_one)]
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's: one call after the other
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_vmap_is_call_by_call(loss: str, symmetric: bool) -> None:
    """Of the loss, and of its backward (is_grads_batched)."""
    criterion = EqCoLoss(symmetric=symmetric) if loss == "eqco" else functional.dual_temp_infonce
    query, key = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    expected = torch.stack([criterion(q, k) for q, k in zip(query, key, strict=True)])
    torch.testing.assert_close(torch.func.vmap(criterion)(query, key), expected)
    q, k = query[0].requires_grad_(), key[0].requires_grad_()
    value = criterion(q, k)
    weights = torch.tensor([1.0, -2.0, 0.5])
    for one in (q, k):
        (batched,) = torch.autograd.grad(value, one, weights, retain_graph=True, is_grads_batched=True)
        (single,) = torch.autograd.grad(value, one, retain_graph=True)
        torch.testing.assert_close(batched, weights[:, None, None] * single)
