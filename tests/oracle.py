"""The truth: float64, literal, one query at a time, from the formulas of the papers. Imports nothing from the package.

Letters: N queries, K negatives, D features; s(q, k) = q.k; t the temperature, T the inter temperature.

    lse_i(t) = log sum_j exp(s(q_i, n_j) / t)
    gap_i(t) = s(q_i, k_i) / t - lse_i(t)
    margin_i = log(alpha / K_i)

Gradients are autograd's, of these lines, with the weight of the dual temperature detached as its definition says.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Places = list[list[int]]  # for every query, where its negatives lie in the pool of keys


def in_batch_places(n: int) -> Places:
    """Every other row of the batch."""
    return [[j for j in range(n) if j != i] for i in range(n)]


def rolled_places(n: int, k: int) -> Places:
    """Query i takes keys i+1 .. i+K, cyclic; all the others where the batch has fewer than K."""
    return [[(i + step) % n for step in range(1, min(k, n - 1) + 1)] for i in range(n)]


def all_places(n: int, k: int) -> Places:
    """A set of K keys, all of them negatives of every query."""
    return [list(range(k)) for _ in range(n)]


def without_equal_ids(places: Places, query_ids: Tensor, key_ids: Tensor) -> Places:
    """A negative never repels a query with the same id. `key_ids` is (K,) or (N, K)."""
    kept: Places = []
    for i, row in enumerate(places):
        ids = key_ids.tolist() if key_ids.ndim == 1 else key_ids[i].tolist()
        kept.append([j for j in row if ids[j] != int(query_ids[i])])
    return kept


def unit(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); F.softplus is 2e-9 off beyond 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


@dataclass(frozen=True)
class Rows:
    """One number per query, each (N,) and float64."""

    loss: Tensor
    effective_k: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    top1_accuracy: Tensor
    top5_accuracy: Tensor
    mi_estimate: Tensor
    gradient_norm_bound: Tensor
    mean_log_weight: Tensor


def rows(
    query: Tensor,
    positive: Tensor,
    pool: Tensor | None,
    places: Places,
    *,
    temperature: float | Tensor,
    alpha: float | None,
    inter_temperature: float | None = None,
    normalize: bool = True,
    pool_is_unit: bool = False,
) -> Rows:
    """EqCo's rows, or the dual temperature's where `inter_temperature` is given.

    `pool` is where the negatives come from: None for the batch's own keys, (K, D), or (N, K, D). `pool_is_unit`: rows
    that nobody normalises again (a queue's).
    """
    assert query.dtype == torch.float64
    if normalize:
        query, positive = unit(query), unit(positive)
    if pool is None:
        pool = positive
    elif normalize and not pool_is_unit:
        pool = unit(pool)

    found: list[list[Tensor]] = []
    for i, row in enumerate(places):
        keys = pool[row] if pool.ndim == 2 else pool[i, row]  # (K_i, D)
        k = len(row)
        similarity_to_positive = (query[i] * positive[i]).sum()
        similarities = (keys * query[i]).sum(-1)  # (K_i,)
        mimicked = float(k) if alpha is None else float(alpha)
        margin = math.log(mimicked / k)

        gap = similarity_to_positive / temperature - torch.logsumexp(similarities / temperature, 0)
        eqco = softplus(margin - gap)
        if inter_temperature is None:
            loss, log_weight, decisive = eqco, torch.zeros_like(gap), gap - margin
        else:
            gap_inter = similarity_to_positive / inter_temperature - torch.logsumexp(
                similarities / inter_temperature, 0
            )
            shifted, shifted_inter = gap - margin, gap_inter - margin
            log_weight = (softplus(shifted) - softplus(shifted_inter)).detach()
            loss, decisive = log_weight.exp() * softplus(-shifted), shifted_inter

        better = bool((similarity_to_positive >= similarities).all())
        bound = 2.0 / temperature * torch.sigmoid(-decisive)
        found.append(
            [
                loss,
                gap.new_tensor(k),
                similarity_to_positive,
                similarities.mean(),
                gap.new_tensor(float(better)),
                gap.new_tensor(float((similarities > similarity_to_positive).sum() < 5)),
                math.log1p(mimicked) - eqco,
                bound,
                log_weight,
            ]
        )
    return Rows(*(torch.stack(column) for column in zip(*found, strict=True)))


def reduce(loss: Tensor, reduction: Any) -> Tensor:
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


def negatives_logsumexp(query: Tensor, pool: Tensor, places: Places, temperature: float | Tensor = 1.0) -> Tensor:
    """(N,): lse_i(t) of what it is given, nothing normalised."""
    out = []
    for i, row in enumerate(places):
        keys = pool[row] if pool.ndim == 2 else pool[i, row]
        out.append(torch.logsumexp((keys * query[i]).sum(-1) / temperature, 0))
    return torch.stack(out)
