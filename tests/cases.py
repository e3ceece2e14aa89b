"""Inputs of every kind, the package's answer, plain eager's answer and the oracle's, side by side."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue
from tests import oracle
from tests.tolerance import assert_as_exact_as_eager

Negatives = Tensor | MomentumQueue | None
Criterion = EqCoLoss | DualTempInfoNCE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the kernels; on CPU they are interpreted
LOSSES = ("eqco", "dual")
MODES = ("in_batch", "rolled", "shared", "per_query", "queue")
MODES_AND_IDS = [  # (mode, ids): only a tensor of negatives can have ids per query
    (mode, ids)
    for mode in MODES
    for ids in ("none", "flat", "matrix")
    if ids != "matrix" or mode in ("shared", "per_query")
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """N = n, K = k, D = d; `ids`: none, flat (K,), or matrix (N, K)."""

    loss: str = "eqco"
    mode: str = "shared"
    n: int = 7
    k: int = 11
    d: int = 5
    dtype: torch.dtype = torch.float32
    temperature: float = 0.2
    inter_temperature: float = 1.0
    alpha: float | None = 256.0
    normalize: bool = True
    ids: str = "none"
    seed: int = 0
    backend: str = "auto"

    def but(self, **changes: object) -> "Case":
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sample:
    query: Tensor  # (N, D)
    positive: Tensor  # (N, D)
    negatives: Negatives
    query_ids: Tensor | None = None  # (N,)
    negative_ids: Tensor | None = None  # (K,) or (N, K)

    def ids(self) -> dict[str, Tensor | None]:
        return {"query_ids": self.query_ids, "negative_ids": self.negative_ids}


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype, near_unit: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (oracle.unit(values) if near_unit else values).to(dtype)


def make(case: Case) -> Sample:
    g = torch.Generator().manual_seed(case.seed)
    near_unit = not case.normalize
    query = draw(g, case.n, case.d, dtype=case.dtype, near_unit=near_unit)
    noise = draw(g, case.n, case.d, dtype=torch.float64)
    positive = (query.double() + 0.7 * query.double().norm(dim=-1, keepdim=True) * noise / case.d**0.5).to(case.dtype)
    if near_unit:
        positive = oracle.unit(positive.double()).to(case.dtype)

    # Negatives' ids are never all alike, so that no row is left without a negative.
    query_ids = torch.arange(case.n) // 2 if case.ids != "none" else None
    negative_ids = None
    negatives: Negatives = None
    if case.mode == "shared":
        negatives = draw(g, case.k, case.d, dtype=case.dtype, near_unit=near_unit)
    elif case.mode == "per_query":
        negatives = draw(g, case.n, case.k, case.d, dtype=case.dtype, near_unit=near_unit)
    elif case.mode == "queue":
        negatives = MomentumQueue(case.k, case.d, dtype=case.dtype, store_ids=case.ids != "none")
        filled = case.k - 2 if case.seed % 2 else case.k + 3  # half full, or wrapped
        for size in (filled // 2, filled - filled // 2):
            negatives.enqueue(
                draw(g, size, case.d, dtype=case.dtype), torch.arange(size) % 5 if case.ids != "none" else None
            )
    if case.ids == "flat" and case.mode in ("shared", "per_query"):
        negative_ids = torch.arange(case.k) % 5
    elif case.ids == "matrix" and case.mode in ("shared", "per_query"):
        negative_ids = (torch.arange(case.k) + torch.arange(case.n)[:, None]) % 5
    return Sample(query, positive, negatives, query_ids, negative_ids)


def criterion(
    case: Case,
    *,
    temperature: Tensor | None = None,
    reduction: str = "mean",
    num_negatives: int | None = None,
    sampling: str = "rolled",
) -> Criterion:
    t = case.temperature if temperature is None else temperature
    shared: dict[str, Any] = {
        "num_negatives": case.k if case.mode == "rolled" else num_negatives,
        "sampling": sampling,
        "normalize": case.normalize,
        "reduction": reduction,
        "backend": case.backend,
    }
    if case.loss == "eqco":
        return EqCoLoss(t, alpha=case.alpha, **shared)
    return DualTempInfoNCE(t, case.inter_temperature, alpha=case.alpha, **shared)


def places(case: Case, sample: Sample) -> oracle.Places:
    """Which keys of the pool are whose negatives, ids included."""
    pool = pool_of(sample)
    if case.mode == "in_batch":
        found = oracle.in_batch_places(case.n)
    elif case.mode == "rolled":
        found = oracle.rolled_places(case.n, case.k)
    else:
        assert pool is not None
        found = oracle.all_places(case.n, pool.shape[-2])
    if sample.query_ids is None:
        return found
    if pool is None:
        key_ids = sample.query_ids
    elif isinstance(sample.negatives, MomentumQueue):
        stored = sample.negatives.ids
        assert stored is not None
        key_ids = stored
    else:
        assert sample.negative_ids is not None
        key_ids = sample.negative_ids
    return oracle.without_equal_ids(found, sample.query_ids, key_ids)


def pool_of(sample: Sample) -> Tensor | None:
    return sample.negatives.keys if isinstance(sample.negatives, MomentumQueue) else sample.negatives


def eager(
    query: Tensor,
    positive: Tensor,
    pool: Tensor | None,
    negatives: oracle.Places,
    *,
    temperature: float | Tensor,
    alpha: float | None,
    inter_temperature: float | None = None,
    normalize: bool = True,
    pool_is_unit: bool = False,
) -> Tensor:
    """What a careful person writes: the whole matrix of logits, float32 after the product for half inputs. (N,)"""
    if normalize:
        query, positive = F.normalize(query, dim=-1), F.normalize(positive, dim=-1)
        if pool is not None and not pool_is_unit:
            pool = F.normalize(pool, dim=-1)
    keys = positive if pool is None else pool
    similarity = query @ keys.T if keys.ndim == 2 else torch.bmm(keys, query[:, :, None]).squeeze(-1)  # (N, K)
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    similarity = similarity.to(statistics)
    to_positive = torch.linalg.vecdot(query, positive).to(statistics)
    keep = torch.zeros_like(similarity, dtype=torch.bool)
    for i, row in enumerate(negatives):
        keep[i, row] = True
    count = keep.sum(1).to(statistics)
    margin = torch.zeros_like(count) if alpha is None else math.log(alpha) - count.log()

    def shifted_gap(t: float | Tensor) -> Tensor:
        logits = (similarity / t).masked_fill(~keep, -math.inf)
        return torch.sub(to_positive / t, torch.logsumexp(logits, 1)) - margin

    gap = shifted_gap(temperature)
    if inter_temperature is None:
        return oracle.softplus(-gap)
    gap_inter = shifted_gap(inter_temperature)
    return (oracle.softplus(gap) - oracle.softplus(gap_inter)).exp().detach() * oracle.softplus(-gap)


@dataclass(frozen=True)
class Answer:
    """A loss and the gradients of everything that asked for one."""

    loss: Tensor
    gradients: dict[str, Tensor]


def answer(function: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor]) -> Answer:
    """Fresh leaves, one call, one backward; a loss of shape (N,) is weighted row by row so that no row can hide."""
    fresh = {
        name: leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, leaf in leaves.items()
    }
    loss = function(fresh)
    weight = torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=loss.device) if loss.ndim else 1.0
    gradients = torch.autograd.grad((loss * weight).sum(), list(fresh.values()))
    return Answer(loss.detach().cpu(), {name: x.cpu() for name, x in zip(fresh, gradients, strict=True)})


def leaves_of(sample: Sample, *, temperature: Tensor | None = None) -> dict[str, Tensor]:
    leaves = {"query": sample.query, "positive": sample.positive}
    if isinstance(sample.negatives, Tensor):
        leaves["negatives"] = sample.negatives
    if temperature is not None:
        leaves["temperature"] = temperature
    return leaves


def ours(
    case: Case,
    sample: Sample,
    *,
    reduction: str = "none",
    learn_temperature: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Answer:
    """`layout` gives each tensor other strides and the same values."""

    def call(leaf: dict[str, Tensor]) -> Tensor:
        negatives = layout(leaf["negatives"]) if "negatives" in leaf else sample.negatives
        loss: Tensor = criterion(case, temperature=leaf.get("temperature"), reduction=reduction)(
            layout(leaf["query"]), layout(leaf["positive"]), negatives, **sample.ids()
        )
        return loss

    temperature = temperature_leaf(case).to(sample.query.device) if learn_temperature else None
    return answer(call, leaves_of(sample, temperature=temperature))


def temperature_leaf(case: Case) -> Tensor:
    return torch.tensor(case.temperature, dtype=torch.float64 if case.dtype == torch.float64 else torch.float32)


def exact_rows(case: Case, sample: Sample, leaf: dict[str, Tensor] | None = None) -> oracle.Rows:
    leaf = leaf or {name: value.double() for name, value in leaves_of(sample).items()}
    stored = pool_of(sample)
    pool = leaf.get("negatives", None if stored is None else stored.double())
    return oracle.rows(
        leaf["query"],
        leaf["positive"],
        pool,
        places(case, sample),
        temperature=leaf.get("temperature", case.temperature),
        alpha=case.alpha,
        inter_temperature=case.inter_temperature if case.loss == "dual" else None,
        normalize=case.normalize,
        pool_is_unit=isinstance(sample.negatives, MomentumQueue),
    )


def truth(case: Case, sample: Sample, *, reduction: str = "none", learn_temperature: bool = False) -> Answer:
    leaves = leaves_of(sample, temperature=temperature_leaf(case) if learn_temperature else None)
    return answer(
        lambda leaf: oracle.reduce(exact_rows(case, sample, leaf).loss, reduction),
        {name: value.double() for name, value in leaves.items()},
    )


def plain(case: Case, sample: Sample, *, reduction: str = "none", learn_temperature: bool = False) -> Answer:
    def call(leaf: dict[str, Tensor]) -> Tensor:
        loss = eager(
            leaf["query"],
            leaf["positive"],
            leaf.get("negatives", pool_of(sample)),
            places(case, sample),
            temperature=leaf.get("temperature", case.temperature),
            alpha=case.alpha,
            inter_temperature=case.inter_temperature if case.loss == "dual" else None,
            normalize=case.normalize,
            pool_is_unit=isinstance(sample.negatives, MomentumQueue),
        )
        return oracle.reduce(loss, reduction)

    return answer(call, leaves_of(sample, temperature=temperature_leaf(case) if learn_temperature else None))


def assert_answers(case: Case, ours: Answer, eager: Answer, truth: Answer, *, scale: float = 0.0) -> None:
    """Loss and every gradient, by the one tolerance; `scale`: what gradients that cancel are made of."""
    smallest = min(case.temperature, case.inter_temperature) if case.loss == "dual" else case.temperature
    assert_as_exact_as_eager(ours.loss, eager.loss, truth.loss, "loss", temperature=smallest)
    assert set(ours.gradients) == set(truth.gradients)
    for name, gradient in ours.gradients.items():
        assert_as_exact_as_eager(
            gradient,
            eager.gradients[name],
            truth.gradients[name],
            f"gradient of {name}",
            temperature=smallest,
            scale=scale,
        )


def assert_right(
    case: Case,
    sample: Sample | None = None,
    *,
    reduction: str = "none",
    learn_temperature: bool = False,
    cancelling: bool = False,
) -> None:
    """The package against the oracle: loss and every gradient, judged by plain eager's own error.

    `cancelling`: keys and queries coincide, so that gradients are differences of equal terms, each as large as the
    bound of their row.
    """
    sample = make(case) if sample is None else sample
    scale = 0.0
    if cancelling:
        tensors = [leaf.double() for leaf in leaves_of(sample).values()]
        shortest = min(t.norm(dim=-1).min().item() for t in tensors) if case.normalize else 1.0
        scale = exact_rows(case, sample).gradient_norm_bound.max().item() / shortest
    assert_answers(
        case,
        ours(case, sample, reduction=reduction, learn_temperature=learn_temperature),
        plain(case, sample, reduction=reduction, learn_temperature=learn_temperature),
        truth(case, sample, reduction=reduction, learn_temperature=learn_temperature),
        scale=scale,
    )
