"""Inputs that people really had, with the numbers that came out wrong."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eqco_loss import DualTempInfoNCE, EqCoLoss
from eqco_loss.functional import negatives_logsumexp
from tests.cases import DEVICE

Backend = Literal["torch", "triton", "wide"]
Loss = Callable[..., Tensor]
BACKENDS: tuple[Backend, ...] = ("torch", "triton", "wide")
TORCH: Backend = "torch"


def gradients(loss: Loss, leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    fresh = [x.to(DEVICE, dtype).clone().requires_grad_() for x in leaves]
    return list(torch.autograd.grad(loss(*fresh).sum(), fresh))


def assert_as_exact(ours: Loss, plain: Loss, leaves: list[Tensor], most: float) -> None:
    """Every gradient against float64 of plain torch."""
    got, truth = gradients(ours, leaves, torch.float32), gradients(plain, leaves, torch.float64)
    for place, (a, b) in enumerate(zip(got, truth, strict=True)):
        error = float((a.double() - b).norm() / b.norm().clamp_min(1e-300)) if bool(b.any()) else float(a.abs().max())
        assert error <= most, f"gradient {place}: {error:.1e}"


def of(criterion: EqCoLoss | DualTempInfoNCE) -> Loss:
    return lambda *inputs: criterion(*inputs)


# ------------------------------------------------------------------------- large logits of raw rows: 29 % were wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [100.0, 220.0])  # logits of 2e5 and of 1e6
def test_large_logits_of_shared_negatives(backend: Backend, size: float) -> None:
    q, k, n = (size * torch.randn(64, 32) for _ in range(3))
    ours, plain = (EqCoLoss(0.05, alpha=None, normalize=False, backend=name) for name in (backend, TORCH))
    assert_as_exact(of(ours), of(plain), [q, k, n], most=1e-5)
    dual, plain_dual = (DualTempInfoNCE(0.05, 0.1, normalize=False, backend=name) for name in (backend, TORCH))
    assert_as_exact(of(dual), of(plain_dual), [q, k, n], most=1e-5)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of a pair that is masked
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_in_a_batch_without_reduction(backend: Backend) -> None:
    q, k = (100 * torch.randn(64, 32) for _ in range(2))
    ours, plain = (
        EqCoLoss(0.05, alpha=None, normalize=False, reduction="none", backend=name) for name in (backend, TORCH)
    )
    assert_as_exact(of(ours), of(plain), [q, k], most=1e-5)


def test_large_logits_of_a_logsumexp() -> None:
    def loss(q: Tensor, n: Tensor) -> Tensor:
        return negatives_logsumexp(q, n, temperature=0.05)

    def plain(q: Tensor, n: Tensor) -> Tensor:
        return torch.logsumexp(q @ n.T / 0.05, 1)

    assert_as_exact(loss, plain, [100 * torch.randn(64, 32) for _ in range(2)], most=1e-5)


# ----------------------------------------------------------------------------- short rows in float16: 4.17 for 5.52


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_rows_in_half_precision(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    q = (1e-6 * torch.randn(64, 32, generator=generator)).half().to(DEVICE)
    k = torch.randn(64, 32, generator=generator).half().to(DEVICE)
    truth = EqCoLoss(backend="torch")(q.double(), k.double())
    loss = EqCoLoss(backend=backend)(q, k)
    assert abs(float(loss) - float(truth)) < 2e-3 * float(truth)


# --------------------------------------------------------------------- what is left out may hold NaN: gradients were


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["ids", "mask"])
def test_a_negative_that_is_left_out_is_not_there(backend: Backend, by: str) -> None:
    q, k, n = (torch.randn(6, 8).to(DEVICE) for _ in range(3))
    n[2] = torch.nan
    ids, key_ids = torch.full((6,), 7, device=DEVICE), torch.arange(6, device=DEVICE)
    key_ids[2] = 7
    stays = key_ids != 7
    more: dict[str, Tensor] = {"query_ids": ids, "negative_ids": key_ids} if by == "ids" else {"negative_mask": stays}
    leaves = [x.clone().requires_grad_() for x in (q, k, n)]
    loss = EqCoLoss(backend=backend)(*leaves, **more)
    got = torch.autograd.grad(loss, leaves)
    without = [x.clone().requires_grad_() for x in (q, k, n[stays])]
    expected = EqCoLoss(backend="torch")(*without)
    truth = torch.autograd.grad(expected, without)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close([got[0], got[1], got[2][stays]], list(truth))
    assert bool((got[2][~stays] == 0).all())


# ----------------------- so many ids that they are searched: a column of labels warned, a default device was an error


@pytest.mark.parametrize("classes", [2000, 3])
def test_ids_of_a_large_batch(classes: int) -> None:
    labels = torch.randint(classes, (1100, 2))
    ids, leaves = labels.to(DEVICE)[:, 0], [torch.randn(1100, 8) for _ in range(2)]

    def loss(q: Tensor, k: Tensor) -> Tensor:
        with torch.device("meta"):  # where tensors are made that do not say where
            return EqCoLoss(0.2, alpha=64)(q, k, query_ids=ids)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        s = F.normalize(q) @ F.normalize(k).T / 0.2
        alike = ids[:, None] == ids
        margin = math.log(64) - (~alike).sum(1).log()
        return F.softplus(margin + s.masked_fill(alike, -math.inf).logsumexp(1) - s.diagonal()).mean()

    assert_as_exact(loss, plain, leaves, most=1e-5)
