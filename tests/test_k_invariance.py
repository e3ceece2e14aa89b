"""What EqCo is for: with alpha given, K does not matter, in expectation and on the sphere of many dimensions.

D = 128, t = 0.2, positives at similarity 0.8, random unit negatives drawn per query. Samples are large enough for a
standard error well under the tolerance, and the seed is fixed.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from eqco_loss import EqCoLoss

PAIRS = 2**17  # similarities per size of K: fewer queries for more negatives
SIZES = (16, 64, 256, 1024, 4096)


class Means(NamedTuple):
    loss: float
    gradient: float


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def means(k: int, alpha: float | None, *, d: int = 128, repeats: int = 1, t: float = 0.2) -> Means:
    """Mean loss and mean norm of a query's gradient over PAIRS / K queries, each with its own K negatives."""
    losses, norms = [], []
    for repeat in range(repeats):
        g = torch.Generator().manual_seed(repeat)
        n = PAIRS // k
        query = unit(torch.randn(n, d, generator=g))
        side = torch.randn(n, d, generator=g)
        side = unit(side - (side * query).sum(1, keepdim=True) * query)
        positive = 0.8 * query + 0.6 * side
        negatives = unit(torch.randn(n, k, d, generator=g))
        query.requires_grad_()
        # The rows are unit already: without normalisation the gradient is that of Theorem 2, in the query's role.
        loss = EqCoLoss(t, alpha=alpha, normalize=False, reduction="none")(query, positive, negatives)
        (gradient,) = torch.autograd.grad(loss.sum(), query)
        losses.append(loss.detach())
        norms.append(gradient.norm(dim=1))
    return Means(torch.cat(losses).mean().item(), torch.cat(norms).mean().item())


@pytest.fixture(scope="module")
def eqco() -> dict[int, Means]:
    return {k: means(k, 4096.0) for k in SIZES}


@pytest.fixture(scope="module")
def infonce() -> dict[int, Means]:
    return {k: means(k, None) for k in SIZES}


@pytest.mark.parametrize("k", SIZES)
def test_eqco_does_not_depend_on_k(k: int, eqco: dict[int, Means]) -> None:
    assert eqco[k].loss == pytest.approx(eqco[4096].loss, rel=0.01)
    assert eqco[k].gradient == pytest.approx(eqco[4096].gradient, rel=0.06)


@pytest.mark.parametrize("alpha", [256.0, 65536.0])
def test_whatever_alpha(alpha: float) -> None:
    few, many = means(16, alpha), means(4096, alpha)
    assert few.loss == pytest.approx(many.loss, rel=0.01)
    assert few.gradient == pytest.approx(many.gradient, rel=0.06)


def test_a_low_temperature_takes_more_negatives() -> None:
    """Few of them then count: at t = 0.07 sixteen are 4 % off, 64 within 1 %."""
    many = means(4096, 65536.0, t=0.07, repeats=4).loss
    assert means(16, 65536.0, t=0.07).loss / many == pytest.approx(0.962, abs=0.01)
    assert means(64, 65536.0, t=0.07).loss == pytest.approx(many, rel=0.01)


def test_infonce_does(infonce: dict[int, Means], eqco: dict[int, Means]) -> None:
    """InfoNCE's gradient at K = 16 is below a third of the one at 4096; where alpha = K the two losses are one."""
    assert infonce[16].gradient < infonce[4096].gradient / 3
    assert infonce[4096].loss == pytest.approx(eqco[4096].loss, rel=1e-5)
    values = [infonce[k].loss for k in SIZES]
    assert values == sorted(values)


def test_it_is_false_in_eight_dimensions() -> None:
    """A fact and no bug: log of a mean of few heavy-tailed terms is biased. At D = 8 the gradient is off by a fifth."""
    few, many = means(16, 4096.0, d=8, repeats=2), means(4096, 4096.0, d=8, repeats=8)
    assert few.gradient / many.gradient - 1 == pytest.approx(0.21, abs=0.03)
