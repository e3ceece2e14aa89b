"""What the operators compute, in plain dense torch, with all N x K similarities in memory: read this first.

Autograd differentiates these functions as often as anybody wants, so they are also what ``create_graph=True`` runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .calls import NORM_EPS, KeySet, LogSumExp, Pairs, RowLosses, SymmetricLosses, compute_dtype, temperature_of


def row_losses(call: RowLosses) -> Tensor:
    """The loss, () or (N,)."""
    q, p = (unit(x, call.normalize, compute_dtype(call.query)) for x in (call.query, call.positive))
    sets = [similarities(q, one) for one in call.sets]
    similarity, drop = (torch.cat(parts, 1) for parts in zip(*sets, strict=True))
    loss = losses((q * p).sum(1), similarity, drop, temperature_of(call), call.inter_temperature, call.alpha)
    loss = loss * call.share_factor
    return loss.sum() if call.reduced else loss


def symmetric_losses(call: SymmetricLosses) -> Tensor:
    """The loss, ()."""
    first, second = (unit(x, True, compute_dtype(x)) for x in (call.first, call.second))
    m = len(first)
    total = first.new_zeros(())
    for anchors, others in ((first, second), (second, first)):
        keys = others if call.across else torch.cat([anchors, others])
        pairs = Pairs(band=[0, m - 1, m])
        similarity, drop = similarities(anchors, KeySet(keys, pairs, normalize=False))
        s = (anchors * others).sum(1)
        total = total + losses(s, similarity, drop, temperature_of(call), call.inter_temperature, call.alpha).sum()
    return total * call.share_factor


def logsumexp(call: LogSumExp) -> Tensor:
    """The log-sum-exp of each query, (N,)."""
    similarity, drop = similarities(call.query.to(compute_dtype(call.query)), call.first)
    return _logsumexp(similarity, drop, temperature_of(call))


def losses(
    s: Tensor,  # (N,): the similarity to the positive
    similarity: Tensor,  # (N, K)
    drop: Tensor,  # (N, K)
    temperature: float | Tensor,
    inter_temperature: float | None,
    alpha: float | None,
) -> Tensor:
    """EqCo's loss of each row, or with ``inter_temperature`` dual temperature's, (N,)."""
    count = (~drop).sum(1)
    shift = 0.0 if alpha is None else torch.log(alpha / count.to(s.dtype))
    gap = s / temperature - _logsumexp(similarity, drop, temperature) - shift
    if inter_temperature is None:
        return softplus(-gap)
    inter_gap = (s / inter_temperature - _logsumexp(similarity, drop, inter_temperature) - shift).detach()
    # The loss is weight.detach() * softplus(-gap). Far out the weight overflows as softplus vanishes, so that there
    # their product, ``tail``, is written out.
    tail = torch.sigmoid(-inter_gap) * torch.exp(gap.detach() - gap)
    far = gap.detach() > 30.0
    near = torch.where(far, 0.0, gap)
    weight = torch.exp(softplus(near.detach()) - softplus(torch.where(far, 0.0, inter_gap)))
    return torch.where(far, tail, weight * softplus(-near))


def similarities(q: Tensor, one: KeySet) -> tuple[Tensor, Tensor]:
    """The similarities of unit queries to a set's keys, (N, K), and which pairs are left out, (N, K)."""
    pairs, keys = one.pairs, one.keys
    poison = None
    if pairs.by_pair and not one.trusted:
        keys, poison = cleaned(keys)
    k = unit(keys, one.normalize, q.dtype)
    similarity = torch.einsum("nd,nkd->nk", q, k) if k.dim() == 3 else q @ k.T
    if poison is not None:
        similarity = similarity + poison
    drop = torch.zeros_like(similarity, dtype=torch.bool)
    columns = torch.arange(similarity.shape[1], device=q.device)
    if pairs.band:
        offset, width, modulus = pairs.band
        rows = torch.arange(len(q), device=q.device)
        drop |= (columns - rows[:, None] - offset - 1) % modulus >= width
    if pairs.picked is not None:
        drop |= torch.ones_like(drop).scatter_(1, pairs.picked, False)
    if pairs.filled is not None:
        drop |= columns >= pairs.filled
    if pairs.query_ids is not None and pairs.key_ids is not None:
        drop |= pairs.query_ids[:, None] == pairs.key_ids
    if pairs.mask is not None:
        drop |= ~pairs.mask
    return similarity, drop


def cleaned(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys whose non-finite rows are zeros, and what their similarities must be increased by: NaN, elsewhere 0.

    A pair that is left out may hold anything, but 0 * NaN is NaN: such a row must not enter a product. The queries that
    do meet it learn of it by the second tensor.
    """
    finite = keys.isfinite().all(-1)
    poison = torch.where(finite, 0.0, math.nan).to(compute_dtype(keys))
    return torch.where(finite[..., None], keys, 0.0), poison


def unit(x: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Rows in ``dtype``, of unit length if ``normalize``."""
    x = x.to(dtype)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_EPS) if normalize else x


def _logsumexp(similarity: Tensor, drop: Tensor, temperature: float | Tensor) -> Tensor:
    # Similarities are divided before they are masked, because a learned temperature's gradient would be -inf * 0.
    return torch.logsumexp((similarity / temperature).masked_fill(drop, -math.inf), 1)
