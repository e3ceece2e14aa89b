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

from . import _agree, negatives, ops, repeats
from . import _validate as check
from ._names import explains_names
from .distributed import Gather, Ranks
from .negatives import Direction
from .ops import Metric, Row, RowLosses
from .settings import Backend, InBatch, Inputs, Negatives, Reduction, Sampling, Settings

__all__ = ["LossMetrics", "cosine_momentum", "dual_temp_infonce", "eqco_loss", "negatives_logsumexp"]


class LossMetrics(NamedTuple):
    """The loss, and what to log beside it: 0-dim, detached means over the rows.

    Attributes:
        loss: what the criterion returns; the only one with a gradient.
        top1_accuracy: share of queries whose positive is more similar than every negative, by more than rounding
            (1e-5), and without the margin, as MoCo logs: 0 for embeddings that have collapsed to one point.
        top5_accuracy: share for which fewer than five negatives are as similar as the positive.
        positive_similarity: s(q, k), between -1 and 1.
        negative_similarity: mean s(q, n) over each query's negatives.
        effective_k: K_i, the negatives that are left after exclusions.
        mi_estimate: log(1 + alpha) - L in nats (EqCo, Theorem 1); a lower bound of the mutual information for
            alpha <= K.
        gradient_norm_bound: (2 / t)(1 - p_i), above the norm of dL_i/dq_i for unit q_i (EqCo, Theorem 2).
        mean_log_weight: log of the dual-temperature weight; 0 for EqCo.
    """

    loss: Tensor
    top1_accuracy: Tensor
    top5_accuracy: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    effective_k: Tensor
    mi_estimate: Tensor
    gradient_norm_bound: Tensor
    mean_log_weight: Tensor


@explains_names
def eqco_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    *,
    temperature: float | Tensor = 0.2,
    alpha: float | None = 65536,
    in_batch: InBatch | None = None,
    num_negatives: int | None = None,
    sampling: Sampling = "rolled",
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    negative_mask: Tensor | None = None,
    normalize: bool = True,
    gather: Gather = False,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """InfoNCE independent of the number of negatives: ``eqco_loss.EqCoLoss`` as a function.

    Source: EqCo (Zhu et al. 2020), equations 1 and 5.

    Args:
        query, positive_key, negative_keys, query_ids, negative_ids, negative_mask: as in a call of
            ``eqco_loss.EqCoLoss``.
        temperature, alpha, in_batch, num_negatives, sampling, symmetric, normalize, gather, reduction, backend: as in
            its constructor.

    Shape:
        query, positive_key (N, D); negative_keys (K, D), (N, K, D), a MomentumQueue or None. Returns (), or (N,) with
        ``reduction="none"``.

    Raises:
        ValueError, TypeError: as ``eqco_loss.EqCoLoss``.

    Examples:
        >>> import torch
        >>> from eqco_loss.functional import eqco_loss
        >>> loss = eqco_loss(torch.randn(8, 16), torch.randn(8, 16), num_negatives=4, alpha=256)
    """
    settings = Settings(
        temperature, None, alpha, in_batch, num_negatives, sampling, symmetric, normalize, gather, reduction, backend
    )
    inputs = Inputs(query, positive_key, negative_keys, query_ids, negative_ids, negative_mask)
    return compute_loss(settings, inputs)


@explains_names
def dual_temp_infonce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    *,
    temperature: float | Tensor = 0.1,
    inter_temperature: float = 1.0,
    alpha: float | None = None,
    in_batch: InBatch | None = None,
    num_negatives: int | None = None,
    sampling: Sampling = "rolled",
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    negative_mask: Tensor | None = None,
    normalize: bool = True,
    gather: Gather = False,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """InfoNCE with two temperatures: ``eqco_loss.DualTempInfoNCE`` as a function.

    Source: Dual Temperature Helps Contrastive Learning Without Many Negative Samples (Zhang et al. 2022).

    Args:
        query, positive_key, negative_keys, query_ids, negative_ids, negative_mask: as in a call of
            ``eqco_loss.DualTempInfoNCE``.
        temperature, inter_temperature, alpha: as in its constructor.
        in_batch, num_negatives, sampling, symmetric, normalize, gather, reduction, backend: as in its constructor.

    Shape:
        query, positive_key (N, D); negative_keys (K, D), (N, K, D), a MomentumQueue or None. Returns (), or (N,) with
        ``reduction="none"``.

    Raises:
        ValueError, TypeError: as ``eqco_loss.DualTempInfoNCE``.

    Examples:
        >>> import torch
        >>> from eqco_loss.functional import dual_temp_infonce
        >>> loss = dual_temp_infonce(torch.randn(8, 16), torch.randn(8, 16), temperature=0.1, inter_temperature=1.0)
    """
    check.inter_temperature(inter_temperature)
    settings = Settings(
        temperature,
        inter_temperature,
        alpha,
        in_batch,
        num_negatives,
        sampling,
        symmetric,
        normalize,
        gather,
        reduction,
        backend,
    )
    inputs = Inputs(query, positive_key, negative_keys, query_ids, negative_ids, negative_mask)
    return compute_loss(settings, inputs)


def compute_loss(settings: Settings, inputs: Inputs) -> Tensor:
    """The reduced loss."""
    kind = repeats.kind(settings, inputs)
    losses = repeats.losses(kind, settings, inputs)
    if losses is None:
        ranks = _agree.inputs(settings, inputs)
        asked: list[ops.Asked] = []
        if ranks is None and _symmetric_serves(settings, inputs):
            asked.append(ops.Asked(ops.symmetric_losses, _symmetric_call(settings, inputs)))
        else:
            asked += [ops.Asked(ops.row_losses, call) for call in _row_calls(settings, inputs, ranks)]
        losses = [operator(call).loss for operator, call in asked]
        repeats.keep(kind, settings, inputs, asked)
    return _sum(losses)


def compute_metrics(settings: Settings, inputs: Inputs) -> LossMetrics:
    """The reduced loss and what to log beside it."""
    ranks = _agree.inputs(settings, inputs)
    outputs = [ops.row_losses(call) for call in _row_calls(settings, inputs, ranks, need_metrics=True)]
    # (len(Metric), N), or of both directions 2N
    metrics = torch.cat([out.metrics for out in outputs if out.metrics is not None], 1)
    positive = torch.cat([out.rows[Row.POSITIVE] for out in outputs])
    base = torch.cat([out.rows[Row.BASE] for out in outputs])
    count = metrics[Metric.COUNT]
    alpha = count if settings.alpha is None else torch.full_like(count, float(settings.alpha))
    t = settings.temperature
    t = t.detach().to(count.dtype) if isinstance(t, Tensor) else float(t)
    rank = metrics[Metric.RANK] + 0 * (base + positive)  # a row whose logits are NaN has no rank
    rows = torch.stack(
        [
            torch.where(rank.isnan(), rank, (rank < 1).to(rank.dtype)),
            torch.where(rank.isnan(), rank, (rank < 5).to(rank.dtype)),
            positive,
            metrics[Metric.NEGATIVE],
            count,
            torch.log1p(alpha) - metrics[Metric.INTRA_LOSS],
            2 / t * metrics[Metric.WEIGHT],
            metrics[Metric.LOG_WEIGHT],
        ]
    )
    means = rows.mean(1) if ranks is None else ranks.sum(rows.sum(1)) / (ranks.total * len(outputs))
    return LossMetrics(_sum([out.loss for out in outputs]), *means.unbind())


def _row_calls(
    settings: Settings, inputs: Inputs, ranks: Ranks | None, *, need_metrics: bool = False
) -> list[RowLosses]:
    """What each direction asks for: its loss with the gradients, by one pass over its negatives."""
    grad, share = torch.is_grad_enabled(), _share(settings, inputs, ranks)
    learned = settings.temperature if isinstance(settings.temperature, Tensor) else None
    if learned is not None and ranks is not None:
        learned = ranks.shared(learned)

    def call(one: Direction) -> RowLosses:
        others = [one.first.keys, None if one.second is None else one.second.keys]
        return RowLosses(
            query=one.query,
            positive=one.positive,
            first=one.first,
            second=one.second,
            temperature=1.0 if isinstance(settings.temperature, Tensor) else float(settings.temperature),
            learned_temperature=learned,
            inter_temperature=None if settings.inter_temperature is None else float(settings.inter_temperature),
            alpha=None if settings.alpha is None else float(settings.alpha),
            normalize=settings.normalize,
            share=share,
            reduced=settings.reduction != "none",
            may_raise=settings.gather is False,  # or the other ranks would wait
            need_query_gradient=grad and (ops.requires_grad(one.query) or ops.requires_grad(learned)),
            need_positive_gradient=grad and ops.requires_grad(one.positive),
            need_keys_gradient=grad and ops.requires_grad(one.first.keys),
            need_metrics=need_metrics,
            autocast=_autocast_dtype(one.query.device),
            backend=ops.choose(settings.backend, one.query, *others)[0],
        )

    return [call(one) for one in negatives.directions(settings, inputs, ranks)]


def _symmetric_serves(settings: Settings, inputs: Inputs) -> bool:
    """Whether one pass over the pairs of rows can give the gradients of both directions to both sides."""
    if not settings.symmetric or settings.num_negatives is not None or settings.reduction == "none":
        return False
    if not settings.normalize or inputs.query_ids is not None or settings.gather is not False:
        return False
    query, key = inputs.query, inputs.positive_key
    return not torch.is_grad_enabled() or ops.requires_grad(query) == ops.requires_grad(key)


def _symmetric_call(settings: Settings, inputs: Inputs) -> ops.SymmetricLosses:
    first, second = inputs.query, inputs.positive_key
    if first.dtype != second.dtype:
        dtype = torch.promote_types(first.dtype, second.dtype)
        first, second = first.to(dtype), second.to(dtype)
    return ops.SymmetricLosses(
        first=first,
        second=second,
        across=negatives.batch_kind(settings, inputs) == "keys",
        temperature=1.0 if isinstance(settings.temperature, Tensor) else float(settings.temperature),
        learned_temperature=settings.temperature if isinstance(settings.temperature, Tensor) else None,
        inter_temperature=None if settings.inter_temperature is None else float(settings.inter_temperature),
        alpha=None if settings.alpha is None else float(settings.alpha),
        share=_share(settings, inputs, None),
        need_gradient=torch.is_grad_enabled()
        and any(ops.requires_grad(x) for x in (first, settings.temperature) if isinstance(x, Tensor)),
        autocast=_autocast_dtype(first.device),
        backend=ops.choose(settings.backend, first, second)[0],
    )


def _share(settings: Settings, inputs: Inputs, ranks: Ranks | None) -> list[int]:
    """What a row's loss is multiplied by, [numerator, denominator]; DDP's mean of the gradients is then the global one.

    The operator multiplies by it, because a mean of its own would be two more kernels on a GPU.
    """
    directions = 2 if settings.symmetric else 1
    if settings.reduction == "none" or (settings.reduction == "sum" and ranks is None):
        return [1, directions]
    if ranks is None:
        return [1, directions * inputs.query.shape[0]]
    return [len(ranks.sizes), directions * (ranks.total if settings.reduction == "mean" else 1)]


def _sum(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else losses[0] + losses[1]


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


@explains_names
def negatives_logsumexp(
    query: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    r"""``log sum_j exp(query_i . key_j / temperature)`` per row, without the N x K matrix, for a loss of your own.

    One pass over the keys gives the value and the query's gradient, the softmax-weighted mean of the keys; a second, in
    backward, the keys' gradient where they need one. Nothing is normalised.

    Args:
        temperature: a number > 0, or a 0-dim tensor, which may require a gradient.
        query_ids, key_ids: integers; a pair of equal ids is left out of the sum.
        key_mask: bool; a pair that is False is left out of the sum. What is left out may hold anything, NaN too.

    Shape:
        query (N, D); keys (K, D) or (N, K, D); query_ids (N,); key_ids and key_mask (K,) or (N, K). Returns (N,),
        float32 for half inputs.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or ids that do not fit; a row that ids leave without a key (on
            CPU; NaN elsewhere).

    Source: the ``lse_i`` of every contrastive loss here, for example EqCo (Zhu et al. 2020), equation 1.

    Examples:
        >>> import torch
        >>> from eqco_loss.functional import negatives_logsumexp
        >>> q, n = torch.randn(4, 8), torch.randn(100, 8)
        >>> torch.allclose(negatives_logsumexp(q, n), torch.logsumexp(q @ n.T, 1), atol=1e-5)
        True
    """
    check.reverse_mode()
    check.temperature(temperature)
    check.logsumexp_inputs(query, keys, query_ids=query_ids, key_ids=key_ids, key_mask=key_mask)
    check.temperature_device(temperature, query)
    learned = temperature if isinstance(temperature, Tensor) else None
    return ops.logsumexp(
        ops.LogSumExp(
            query=query,
            first=ops.KeySet(keys, ops.Pairs(query_ids=query_ids, key_ids=key_ids, mask=key_mask), normalize=False),
            temperature=1.0 if isinstance(temperature, Tensor) else float(temperature),
            learned_temperature=learned,
            need_query_gradient=torch.is_grad_enabled() and (ops.requires_grad(query) or ops.requires_grad(learned)),
            autocast=_autocast_dtype(query.device),
            backend=ops.choose("auto", query, keys)[0],
        )
    ).lse


def chosen_backend(settings: Settings, inputs: Inputs) -> tuple[str, str]:
    """The backend that serves this call, and why."""
    check.settings_and_embeddings(settings, inputs)
    given = negatives.given_set(settings, inputs)
    batch = None if negatives.batch_kind(settings, inputs) is None else inputs.positive_key
    return ops.choose(settings.backend, inputs.query, batch, None if given is None else given.keys)


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

    Examples:
        >>> from eqco_loss.functional import cosine_momentum
        >>> cosine_momentum(0, 100), cosine_momentum(100, 100)
        (0.996, 1.0)
    """
    check.cosine_momentum(step, total_steps, base, final)
    base, final, done = float(base), float(final), min(float(step) / float(total_steps), 1.0)  # NumPy's may be narrow
    return final - (final - base) * (math.cos(math.pi * done) + 1) / 2
