"""The whole flow on one page: check -> which negatives -> row losses (one pass) -> reduction.

With q the queries (N, D), k their positives (N, D) and n the negatives, all of unit length, s(a, b) = a . b:

    lse_i(t) = log sum_{j in negatives(i)} exp(s(q_i, n_j) / t)
    gap_i(t) = s(q_i, k_i) / t - lse_i(t)
    EqCo:              L_i = softplus(log(alpha / K_i) - gap_i)
    dual temperature:  L_i = exp(softplus(gap_i(t)) - softplus(gap_i(T))).detach() * softplus(-gap_i(t))

The modules in ``losses.py`` make one call here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _validate as check
from . import ops
from .ops import Pairs, Stat
from .queue import MomentumQueue

__all__ = ["LossMetrics", "cosine_momentum", "dual_temp_infonce", "eqco_loss", "negatives_logsumexp"]

Negatives = Tensor | MomentumQueue | None  # (K, D) shared, (N, K, D) per query, a queue, or the batch's other keys


class LossMetrics(NamedTuple):
    """The loss, and what to log beside it: 0-dim, detached means over the rows."""

    loss: Tensor  #: what the criterion returns; the only one with a gradient
    top1_accuracy: Tensor  #: share of queries whose positive no negative exceeds (without the margin, as MoCo logs)
    positive_similarity: Tensor  #: s(q, k), between -1 and 1
    negative_similarity: Tensor  #: mean s(q, n) over each query's negatives
    effective_k: Tensor  #: K_i, the negatives that are left after exclusions
    mi_estimate: (
        Tensor  #: log(1 + alpha) - L in nats (EqCo, Theorem 1); a lower bound of the mutual information for alpha <= K
    )
    gradient_norm_bound: Tensor  #: (2 / t)(1 - p_i), above the norm of dL_i/dq_i for unit q_i (EqCo, Theorem 2)
    mean_log_weight: Tensor  #: log of the dual-temperature weight; 0 for EqCo


class Settings(NamedTuple):
    """What a loss is, apart from its tensors."""

    temperature: float | Tensor
    inter_temperature: float | None  # None: EqCo
    alpha: float | None
    num_negatives: int | None
    sampling: str
    normalize: bool
    reduction: str
    backend: str


def eqco_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    *,
    temperature: float | Tensor = 0.2,
    alpha: float | None = 65536,
    num_negatives: int | None = None,
    sampling: str = "rolled",
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE independent of the number of negatives: :class:`eqco_loss.EqCoLoss` as a function.

    Source: EqCo (Zhu et al. 2020), equations 1 and 5.

    Args:
        query, positive_key, negative_keys, query_ids, negative_ids: as in a call of :class:`eqco_loss.EqCoLoss`.
        temperature, alpha, num_negatives, sampling, normalize, reduction, backend: as in its constructor.

    Shape:
        query, positive_key (N, D); negative_keys (K, D), (N, K, D), a MomentumQueue or None. Returns (), or (N,) with
        ``reduction="none"``.

    Raises:
        ValueError, TypeError: as :class:`eqco_loss.EqCoLoss`.

    Example:
        >>> import torch
        >>> from eqco_loss.functional import eqco_loss
        >>> loss = eqco_loss(torch.randn(8, 16), torch.randn(8, 16), num_negatives=4, alpha=256)
    """
    settings = Settings(temperature, None, alpha, num_negatives, sampling, normalize, reduction, backend)
    check.settings(settings)
    return compute_loss(settings, query, positive_key, negative_keys, query_ids, negative_ids)


def dual_temp_infonce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    *,
    temperature: float | Tensor = 0.1,
    inter_temperature: float = 1.0,
    alpha: float | None = None,
    num_negatives: int | None = None,
    sampling: str = "rolled",
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE with two temperatures: :class:`eqco_loss.DualTempInfoNCE` as a function.

    Source: Dual Temperature Helps Contrastive Learning Without Many Negative Samples (Zhang et al. 2022).

    Args:
        query, positive_key, negative_keys, query_ids, negative_ids: as in a call of :class:`eqco_loss.DualTempInfoNCE`.
        temperature, inter_temperature, alpha, num_negatives, sampling, normalize, reduction, backend: as in its
            constructor.

    Shape:
        query, positive_key (N, D); negative_keys (K, D), (N, K, D), a MomentumQueue or None. Returns (), or (N,) with
        ``reduction="none"``.

    Raises:
        ValueError, TypeError: as :class:`eqco_loss.DualTempInfoNCE`.

    Example:
        >>> import torch
        >>> from eqco_loss.functional import dual_temp_infonce
        >>> loss = dual_temp_infonce(torch.randn(8, 16), torch.randn(8, 16), temperature=0.1, inter_temperature=1.0)
    """
    check.inter_temperature(inter_temperature)
    settings = Settings(temperature, inter_temperature, alpha, num_negatives, sampling, normalize, reduction, backend)
    check.settings(settings)
    return compute_loss(settings, query, positive_key, negative_keys, query_ids, negative_ids)


def compute_loss(
    settings: Settings,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
) -> Tensor:
    """The reduced loss."""
    loss, _ = row_losses(settings, query, positive_key, negative_keys, query_ids, negative_ids)
    return _reduce(loss, settings.reduction)


def compute_metrics(
    settings: Settings,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
) -> LossMetrics:
    """The reduced loss and what to log beside it."""
    loss, stats = row_losses(
        settings, query, positive_key, negative_keys, query_ids, negative_ids, need_statistics=True
    )
    alpha = stats[Stat.COUNT] if settings.alpha is None else settings.alpha
    t = settings.temperature.detach() if isinstance(settings.temperature, Tensor) else settings.temperature
    correct = (stats[Stat.RANK] == 0).to(stats.dtype) + 0 * stats[Stat.LSE]  # NaN where the row is
    return LossMetrics(
        loss=_reduce(loss, settings.reduction),
        top1_accuracy=correct.mean(),
        positive_similarity=stats[Stat.POSITIVE].mean(),
        negative_similarity=stats[Stat.NEGATIVE].mean(),
        effective_k=stats[Stat.COUNT].mean(),
        mi_estimate=(torch.log1p(torch.as_tensor(alpha, dtype=stats.dtype)) - stats[Stat.INTRA_LOSS]).mean(),
        gradient_norm_bound=(2 / t * stats[Stat.WEIGHT]).mean(),
        mean_log_weight=stats[Stat.LOG_WEIGHT].mean(),
    )


def row_losses(
    settings: Settings,
    query: Tensor,  # (N, D)
    positive_key: Tensor,  # (N, D)
    negative_keys: Negatives,
    query_ids: Tensor | None,  # (N,)
    negative_ids: Tensor | None,  # (K,) or (N, K)
    need_statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss per row (N,) and the rows of ``Stat`` (detached)."""
    check.temperature(settings.temperature)
    check.embeddings(query, positive_key, None if isinstance(negative_keys, MomentumQueue) else negative_keys)
    keys, normalize_keys, pairs = _select_negatives(
        settings, query, positive_key, negative_keys, query_ids, negative_ids
    )
    learned = settings.temperature if isinstance(settings.temperature, Tensor) else None
    grad = torch.is_grad_enabled()
    loss, *_, stats = ops.row_losses(
        query,
        positive_key,
        keys,
        learned,
        *pairs,
        1.0 if learned is not None else float(settings.temperature),
        settings.inter_temperature,
        settings.alpha,
        settings.normalize,
        normalize_keys,
        grad and (query.requires_grad or (learned is not None and learned.requires_grad)),
        grad and positive_key.requires_grad,
        # Rows of a mean or a sum weigh the same in backward, so the same pass can give the keys' gradient. On a GPU
        # finding that out would wait for the device.
        grad and keys.requires_grad and settings.reduction != "none" and keys.device.type == "cpu",
        need_statistics,
    )
    return loss, stats


def _select_negatives(
    settings: Settings,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
) -> tuple[Tensor, bool, Pairs]:
    """The keys, whether they still need normalising, and which pairs of query and key are negatives."""
    n = len(query)
    if isinstance(negative_keys, MomentumQueue):
        check.num_negatives_with_keys(settings.num_negatives)
        check.queue(negative_keys, query)
        slot_ids = negative_keys.slot_ids
        check.ids(query, query_ids, negative_ids, source="queue without ids" if slot_ids is None else "queue")
        key_ids = None if query_ids is None else slot_ids
        return negative_keys.contents, False, Pairs(query_ids, key_ids, negative_keys.count, None, [])
    if negative_keys is not None:
        check.num_negatives_with_keys(settings.num_negatives)
        k = negative_keys.shape[-2]
        check.ids(query, query_ids, negative_ids, source="tensor", shapes=((k,), (n, k)))
        return negative_keys, settings.normalize, Pairs(query_ids, negative_ids, None, None, [])
    check.in_batch(query)
    check.ids(query, query_ids, negative_ids, source="batch")
    k = n - 1 if settings.num_negatives is None else min(settings.num_negatives, n - 1)
    if settings.sampling == "random" and k < n - 1:
        return (
            positive_key,
            settings.normalize,
            Pairs(query_ids, query_ids, None, random_negatives(n, k, query.device), []),
        )
    return positive_key, settings.normalize, Pairs(query_ids, query_ids, None, None, [0, k, n])


def random_negatives(n: int, k: int, device: torch.device) -> Tensor:
    """(n, k) indices: for each of n rows, k of the other n - 1, uniformly, without replacement, independent by row."""
    others = n - 1
    if k * k < others:  # Floyd's sampling: k steps over all rows at once
        picked = torch.empty((n, k), dtype=torch.int64, device=device)
        uniform = torch.rand((n, k), dtype=torch.float64, device=device)
        for step in range(k):
            last = others - k + step
            candidate = (uniform[:, step] * (last + 1)).long()
            taken = (picked[:, :step] == candidate[:, None]).any(1)
            picked[:, step] = torch.where(taken, last, candidate)
    else:  # the k largest of others' random numbers, some rows at a time
        rows = max(1, 2**20 // others)
        parts = [
            torch.rand((min(rows, n - start), others), device=device).topk(k, 1).indices for start in range(0, n, rows)
        ]
        picked = torch.cat(parts)
    return picked + (picked >= torch.arange(n, device=device)[:, None])  # step over the row's own place


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def negatives_logsumexp(
    query: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    r"""``log sum_j exp(query_i . key_j / temperature)`` per row, without the N x K matrix, for a loss of your own.

    One pass over the keys gives the value and the query's gradient, the softmax-weighted mean of the keys; a second, in
    backward, the keys' gradient where they need one. Nothing is normalised.

    Args:
        temperature: a number > 0, or a 0-dim tensor, which may require a gradient.
        query_ids, key_ids: integers; a pair of equal ids is left out of the sum.

    Shape:
        query (N, D); keys (K, D) or (N, K, D); query_ids (N,); key_ids (K,) or (N, K). Returns (N,), float32 for half
        inputs.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or ids that do not fit; a row that ids leave without a key (on
            CPU; NaN elsewhere).

    Source: the ``lse_i`` of every contrastive loss here, for example EqCo (Zhu et al. 2020), equation 1.

    Example:
        >>> import torch
        >>> from eqco_loss.functional import negatives_logsumexp
        >>> q, n = torch.randn(4, 8), torch.randn(100, 8)
        >>> torch.allclose(negatives_logsumexp(q, n), torch.logsumexp(q @ n.T, 1), atol=1e-5)
        True
    """
    check.temperature(temperature)
    check.logsumexp_inputs(query, keys, query_ids, key_ids)
    learned = temperature if isinstance(temperature, Tensor) else None
    need_mean_key = torch.is_grad_enabled() and (query.requires_grad or (learned is not None and learned.requires_grad))
    number = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    lse: Tensor = ops.negatives_logsumexp(
        query, keys, learned, query_ids, key_ids, None, None, [], number, need_mean_key
    )[0]
    return lse


def chosen_backend(settings: Settings, query: Tensor, negative_keys: Negatives = None) -> tuple[str, str]:
    """The backend that serves this call, and why."""
    if query.device.type == "cpu":
        return "torch", "CPU tensors: torch's flash attention where nothing is left out, tiles elsewhere"
    return "torch", f"{query.device.type} tensors: tiles in plain torch"


def cosine_momentum(step: int, total_steps: int, base: float = 0.996, final: float = 1.0) -> float:
    """Key-encoder momentum that rises from ``base`` to ``final`` along half a cosine.

    Source: BYOL (Grill et al. 2020), section 3.1: ``1 - (1 - base) (cos(pi step / total_steps) + 1) / 2``.

    Args:
        step: 0 to ``total_steps``. Steps beyond stay at ``final``.
        total_steps: >= 1.
        base, final: momenta between 0 and 1.

    Shape:
        Numbers in, a number out.

    Raises:
        ValueError: a negative step, ``total_steps`` < 1, momenta outside [0, 1].

    Example:
        >>> from eqco_loss.functional import cosine_momentum
        >>> cosine_momentum(0, 100), cosine_momentum(100, 100)
        (0.996, 1.0)
    """
    check.cosine_momentum(step, total_steps, base, final)
    return final - (final - base) * (math.cos(math.pi * min(step, total_steps) / total_steps) + 1) / 2
