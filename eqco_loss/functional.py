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
from .distributed import Gather, Ranks
from .ops import Pairs, Stat
from .queue import MomentumQueue

__all__ = ["LossMetrics", "cosine_momentum", "dual_temp_infonce", "eqco_loss", "negatives_logsumexp"]

Negatives = Tensor | MomentumQueue | None  # (K, D) shared, (N, K, D) per query, a queue, or the batch's other keys


class LossMetrics(NamedTuple):
    """The loss, and what to log beside it: 0-dim, detached means over the rows."""

    loss: Tensor  #: what the criterion returns; the only one with a gradient
    top1_accuracy: Tensor  #: share of queries whose positive no negative exceeds (without the margin, as MoCo logs)
    top5_accuracy: Tensor  #: share whose positive fewer than five negatives exceed
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
    in_batch: str | None
    num_negatives: int | None
    sampling: str
    symmetric: bool
    normalize: bool
    gather: Gather
    reduction: str
    backend: str


def eqco_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    *,
    temperature: float | Tensor = 0.2,
    alpha: float | None = 65536,
    in_batch: str | None = None,
    num_negatives: int | None = None,
    sampling: str = "rolled",
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    normalize: bool = True,
    gather: Gather = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE independent of the number of negatives: :class:`eqco_loss.EqCoLoss` as a function.

    Source: EqCo (Zhu et al. 2020), equations 1 and 5.

    Args:
        query, positive_key, negative_keys, query_ids, negative_ids: as in a call of :class:`eqco_loss.EqCoLoss`.
        temperature, alpha, in_batch, num_negatives, sampling, symmetric, normalize, gather, reduction, backend: as in
            its constructor.

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
    settings = Settings(
        temperature, None, alpha, in_batch, num_negatives, sampling, symmetric, normalize, gather, reduction, backend
    )
    return compute_loss(settings, query, positive_key, negative_keys, query_ids, negative_ids)


def dual_temp_infonce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    *,
    temperature: float | Tensor = 0.1,
    inter_temperature: float = 1.0,
    alpha: float | None = None,
    in_batch: str | None = None,
    num_negatives: int | None = None,
    sampling: str = "rolled",
    symmetric: bool = False,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    normalize: bool = True,
    gather: Gather = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE with two temperatures: :class:`eqco_loss.DualTempInfoNCE` as a function.

    Source: Dual Temperature Helps Contrastive Learning Without Many Negative Samples (Zhang et al. 2022).

    Args:
        query, positive_key, negative_keys, query_ids, negative_ids: as in a call of :class:`eqco_loss.DualTempInfoNCE`.
        temperature, inter_temperature, alpha, in_batch, num_negatives, sampling, symmetric, normalize, gather,
            reduction, backend: as in its constructor.

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
    passes, ranks = _passes(settings, query, positive_key, negative_keys, query_ids, negative_ids)
    share = _share(settings, passes, ranks)
    return _reduce([_row_losses(settings, one, share)[0] for one in passes], settings.reduction)


def compute_metrics(
    settings: Settings,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
) -> LossMetrics:
    """The reduced loss and what to log beside it."""
    passes, ranks = _passes(settings, query, positive_key, negative_keys, query_ids, negative_ids)
    share = _share(settings, passes, ranks)
    outputs = [_row_losses(settings, one, share, need_statistics=True) for one in passes]
    stats = torch.cat([stats for _, stats in outputs], 1)  # (len(Stat), N) or, of both directions, (len(Stat), 2N)
    alpha = stats[Stat.COUNT] if settings.alpha is None else torch.full_like(stats[Stat.COUNT], float(settings.alpha))
    t = settings.temperature
    t = t.detach().to(stats.dtype) if isinstance(t, Tensor) else float(t)
    rank = stats[Stat.RANK] + 0 * (stats[Stat.LSE] + stats[Stat.POSITIVE])  # NaN where the row is
    rows = torch.stack(
        [
            torch.where(rank.isnan(), rank, (rank < 1).to(rank.dtype)),
            torch.where(rank.isnan(), rank, (rank < 5).to(rank.dtype)),
            stats[Stat.POSITIVE],
            stats[Stat.NEGATIVE],
            stats[Stat.COUNT],
            torch.log1p(alpha) - stats[Stat.INTRA_LOSS],
            2 / t * stats[Stat.WEIGHT],
            stats[Stat.LOG_WEIGHT],
        ]
    )
    means = rows.mean(1) if ranks is None else ranks.sum(rows.sum(1)) / (ranks.total * len(passes))
    return LossMetrics(_reduce([loss for loss, _ in outputs], settings.reduction), *means.unbind())


class _Pass(NamedTuple):
    """One call of the operator: each query row against one set of keys, or two."""

    query: Tensor  # (N, D)
    positive: Tensor  # (N, D)
    keys: Tensor  # (K, D) or (N, K, D)
    normalize_keys: bool
    pairs: Pairs
    extra: _Given | None = None  # a second set
    both_roles: str = ""  # keys and positives are the query's rows, two views, and the gradient is all its


class _Given(NamedTuple):
    """The negatives that came as an argument."""

    keys: Tensor  # (K, D) or (N, K, D)
    normalize: bool
    ids: Tensor | None  # (K,) or (N, K)
    filled: Tensor | None  # (): how many of them are there, where only the device knows


def _row_losses(
    settings: Settings, one: _Pass, share: list[int], need_statistics: bool = False
) -> tuple[Tensor, Tensor]:
    """``share`` of the loss per row (N,), and the rows of ``Stat`` (detached)."""
    query, positive, keys, normalize_keys, pairs, extra, both_roles = one
    learned = settings.temperature if isinstance(settings.temperature, Tensor) else None
    grad = torch.is_grad_enabled()
    backend, _ = _backend(settings.backend, query, keys, None if extra is None else extra.keys)
    loss, *_, stats = ops.row_losses(
        query,
        positive,
        keys,
        None if extra is None else extra.keys,
        learned,
        *pairs,
        None if extra is None else extra.ids,
        None if extra is None else extra.filled,
        1.0 if isinstance(settings.temperature, Tensor) else float(settings.temperature),
        None if settings.inter_temperature is None else float(settings.inter_temperature),
        None if settings.alpha is None else float(settings.alpha),
        settings.normalize,
        normalize_keys,
        extra is not None and extra.normalize,
        settings.gather is False,  # or the other ranks would wait
        grad and not both_roles and (ops.requires_grad(query) or ops.requires_grad(learned)),
        grad and ops.requires_grad(positive),
        # Rows of a mean or a sum weigh the same in backward, so the same pass can give the keys' gradient. On a GPU
        # finding that out would wait for the device.
        grad
        and ops.requires_grad(keys)
        and settings.reduction != "none"
        and keys.device.type == "cpu"
        and backend == "torch",
        need_statistics,
        share,
        _autocast_dtype(query.device),
        backend,
        both_roles,
    )
    return loss, stats


def _passes(
    settings: Settings,
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
) -> tuple[list[_Pass], Ranks | None]:
    """Everything checked; which keys each query meets, one pass or (symmetric) two; and who else takes part."""
    ranks = None
    if settings.gather is False:
        check.call(settings, query, positive_key, negative_keys, query_ids, negative_ids)
    else:
        ranks = check.agree(settings, query, positive_key, negative_keys, query_ids, negative_ids)
    given = _given(settings, negative_keys, query_ids, negative_ids)
    in_batch = settings.in_batch or ("keys" if given is None else None)
    if in_batch is None and given is not None:
        every = Pairs(query_ids, given.ids, given.filled, None, [])
        return [_Pass(query, positive_key, given.keys, given.normalize, every)], ranks

    def everyone(x: Tensor) -> Tensor:
        return x if ranks is None else ranks.gather(x)

    views = 2 if in_batch == "views" else 1
    key_ids = None if query_ids is None else everyone(query_ids.to(torch.int64)).repeat(views)
    all_keys = everyone(positive_key)  # (N, D), of all ranks
    all_queries = everyone(query) if views == 2 or settings.symmetric else query
    both = torch.cat([all_queries, all_keys]) if views == 2 else all_keys
    offset, n = (0, query.shape[0]) if ranks is None else (ranks.offset, ranks.total)

    def pairs() -> Pairs:
        others = views * (n - 1)
        k = others if settings.num_negatives is None else min(settings.num_negatives, others)
        if settings.sampling == "random" and k < others:
            picked = random_negatives(query.shape[0], k, query.device, total=n, offset=offset, views=views)
            return Pairs(query_ids, key_ids, None, picked, [])
        return Pairs(query_ids, key_ids, None, None, [offset, k // views, n])

    alone = ranks is None and given is None and query_ids is None
    if alone and _in_both_roles(settings, query, positive_key):
        z = both if views == 2 else torch.cat([query, positive_key])
        return [_Pass(z, z.detach(), z.detach(), settings.normalize, pairs(), None, in_batch or "keys")], None
    passes = [_Pass(query, positive_key, both, settings.normalize, pairs(), given)]
    if settings.symmetric:
        other = both if views == 2 else all_queries
        passes.append(_Pass(positive_key, query, other, settings.normalize, pairs(), given))
    return passes, ranks


def _in_both_roles(settings: Settings, query: Tensor, positive_key: Tensor) -> bool:
    """Whether one pass over the pairs of rows can give the gradients of both directions to both sides."""
    if not settings.symmetric or settings.num_negatives is not None or settings.reduction == "none":
        return False
    if not settings.normalize:  # it takes the softmax from the log-sum-exp, which rounds large logits away
        return False
    return not torch.is_grad_enabled() or ops.requires_grad(query) == ops.requires_grad(positive_key)


def _given(
    settings: Settings, negative_keys: Negatives, query_ids: Tensor | None, negative_ids: Tensor | None
) -> _Given | None:
    if isinstance(negative_keys, MomentumQueue):
        ids = None if query_ids is None else negative_keys.slot_ids
        return _Given(negative_keys.contents, False, ids, negative_keys.count)
    if negative_keys is None:
        return None
    return _Given(negative_keys, settings.normalize, negative_ids, None)


def _share(settings: Settings, passes: list[_Pass], ranks: Ranks | None) -> list[int]:
    """What of a row's loss is added up, [numerator, denominator]; DDP's mean of the gradients is then the global one.

    The operator multiplies by it: a mean of its own would be two more kernels on a GPU.
    """
    rows = passes[0].query.shape[0] * len(passes)  # twice as many if symmetric, in one pass or in two
    directions = 2 if settings.symmetric else 1
    if settings.reduction == "none" or (settings.reduction == "sum" and ranks is None):
        return [1, directions]
    if ranks is None:
        return [1, rows]
    return [len(ranks.sizes), directions * (ranks.total if settings.reduction == "mean" else 1)]


def _reduce(rows: list[Tensor], reduction: str) -> Tensor:
    loss = rows[0] if len(rows) == 1 else rows[0] + rows[1]
    return loss if reduction == "none" else loss.sum()


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def random_negatives(
    rows: int, k: int, device: torch.device, *, total: int | None = None, offset: int = 0, views: int = 1
) -> Tensor:
    """(rows, k) indices: for each row k of the others, uniformly, without replacement, independent by row.

    Row i stands at place offset + i of ``total``, and there are ``views`` keys at each place: its own are not drawn.
    """
    total = rows if total is None else total
    others = views * (total - 1)

    def over_own(picked: Tensor, first: int) -> Tensor:
        """Of others, to places: each row steps over its own."""
        view, place = picked // (total - 1), picked % (total - 1)
        own = torch.arange(offset + first, offset + first + picked.shape[0], device=device)
        return place.add_(place >= own[:, None]).add_(view, alpha=total)

    if k * k < others:  # Floyd's sampling: k steps over all rows at once
        uniform = torch.rand((rows, k), dtype=torch.float64, device=device)
        picked = torch.empty_like(uniform, dtype=torch.int64)
        for step in range(k):
            last = others - k + step
            candidate = (uniform[:, step] * (last + 1)).long()
            taken = (picked[:, :step] == candidate[:, None]).any(1)
            picked[:, step] = torch.where(taken, last, candidate)
        return over_own(picked, 0)
    step = max(1, 2**20 // others)  # the k largest of others' random numbers, some rows at a time
    counts = {start: min(step, rows - start) for start in range(0, rows, step)}
    return torch.cat(
        [
            over_own(torch.rand((count, others), device=device).topk(k, 1).indices, start)
            for start, count in counts.items()
        ]
    )


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
    check.reverse_mode()
    check.temperature(temperature)
    check.logsumexp_inputs(query, keys, query_ids, key_ids)
    check.temperature_device(temperature, query)
    learned = temperature if isinstance(temperature, Tensor) else None
    need_mean_key = torch.is_grad_enabled() and (ops.requires_grad(query) or ops.requires_grad(learned))
    number = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    chosen = _autocast_dtype(query.device), _backend("auto", query, keys)[0]
    lse: Tensor = ops.negatives_logsumexp(
        query, keys, learned, query_ids, key_ids, None, None, [], number, need_mean_key, *chosen
    )[0]
    return lse


def chosen_backend(
    settings: Settings, query: Tensor, positive_key: Tensor | None = None, negative_keys: Negatives = None
) -> tuple[str, str]:
    """The backend that serves this call, and why."""
    check.settings(settings)
    given = _given(settings, negative_keys, None, None)
    keys = [positive_key if given is None or settings.in_batch else None, None if given is None else given.keys]
    return _backend(settings.backend, query, *keys)


def _backend(requested: str, query: Tensor, *keys: Tensor | None) -> tuple[str, str]:
    if requested == "torch":
        return "torch", "asked for by name"
    if requested == "auto" and query.is_cpu:
        return "torch", "CPU tensors: torch's flash attention where nothing is left out, tiles elsewhere"
    refused = ops.triton_refusal(query, *keys)
    if refused is None:
        return "triton", "fused kernels"
    if requested == "triton":
        raise ValueError(
            f"backend: expected tensors that 'triton' serves, got {refused}. Give backend='auto', which takes 'torch' "
            "for these."
        )
    return "torch", refused


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
