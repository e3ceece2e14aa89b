"""Rows that meet other rows of their batch, so few that one product has all their logits: what tiles do, in half the
calls of torch.

A step of 64 or 256 rows spends as much time on its way to torch's kernels as in them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import TILE_ELEMENTS, are_few, is_narrow, through_unit, unit_rows
from .calls import (
    LOG2E,
    Pairs,
    Row,
    RowLosses,
    RowOutputs,
    SymmetricLosses,
    SymmetricOutputs,
    compute_dtype,
    loss_of,
    once_a_kind,
)
from .running import small


@once_a_kind
def serves(call: RowLosses) -> bool:
    """Whether the keys are the positives, of which both gradients are one tensor's, and no number leaves its dtype."""
    n, pairs = len(call.query), call.first.pairs
    by_band = pairs.band[::2] == [0, n] and not is_narrow(pairs, n * n)
    return (
        call.positive is call.first.keys
        and n * n <= TILE_ELEMENTS // 2  # beyond, a softmax that is not in place takes longer than a tile
        and (by_band or (pairs.picked is not None and not are_few(pairs.picked, n)))
        and not pairs.by_pair
        and call.second is None
        and call.normalize
        and call.reduced
        and not call.need_metrics
        and call.need_positive_gradient == call.need_keys_gradient
        and _in_range(call, call.query, _width(pairs))
    )


@once_a_kind
def serves_both(call: SymmetricLosses) -> bool:
    """The same of both directions, whose gradient is what is kept (``mutual``)."""
    m = len(call.first) * (1 if call.across else 2)
    return m * m <= TILE_ELEMENTS and _in_range(call, call.first, call.negatives)


def _width(pairs: Pairs) -> int:
    """How many negatives a query has."""
    return pairs.band[1] if pairs.picked is None else pairs.picked.shape[1]


def _in_range(call: RowLosses | SymmetricLosses, x: Tensor, count: int) -> bool:
    """Whether a row's loss is log(1 + c T / p) and these, of exponentials without a maximum, are far from overflow."""
    if loss_of(call) != "eqco" or call.learned_temperature is not None:
        return False
    dtype, bound = compute_dtype(x), LOG2E / call.temperature
    margin = (0.0 if call.alpha is None else abs(math.log2(call.alpha) - math.log2(count))) + math.log2(count)
    return small(bound, dtype) and 2 * bound + margin <= 0.9 * math.log2(torch.finfo(dtype).max)


def _margin_factor(call: RowLosses | SymmetricLosses, count: int) -> float:
    """c = alpha / K, by which EqCo's margin multiplies every negative's exponential."""
    return 1.0 if call.alpha is None else call.alpha / count


def row_losses(call: RowLosses) -> RowOutputs:
    """By the softmax over a row's positive, less log(c), and its negatives, which is the loss's derivative, too.

    A band is a view of the product with keys of which the first come again: row i's is one place further right. What
    is picked is gathered. The positives' gradient is in that of the keys, which they are.
    """
    dtype, n, t, picked = compute_dtype(call.query), len(call.query), call.temperature, call.first.pairs.picked
    (q, q_norm), (k, k_norm) = (unit_rows(x, True, dtype) for x in (call.query, call.positive))
    width = _width(call.first.pairs)
    whole, margin_factor, per_logit = width == n - 1, _margin_factor(call, width), call.share_factor / t
    keys = k if whole or picked is not None else torch.cat([k, k[:width]])
    x = q.new_empty((n, len(keys))).addmm_(q, keys.T, beta=0, alpha=1 / t)
    places = None
    if whole:
        near = x
    elif picked is None:
        near = x.as_strided((n, width + 1), (len(keys) + 1, 1))
    else:
        places = torch.cat([torch.arange(n, device=q.device)[:, None], picked], 1)
        near = x.gather(1, places)
    if margin_factor != 1.0:
        (near.diagonal() if whole else near[:, 0]).sub_(math.log(margin_factor))
    softmax = near.softmax(1)
    positive = softmax.diagonal() if whole else softmax[:, 0]
    of_positive = positive.clone()
    positive.zero_()
    total = softmax.sum(1)
    loss = torch.div(total, of_positive).log1p_().sum().mul_(call.share_factor)
    query_gradient, keys_gradient = None, None
    if call.need_query_gradient or call.need_keys_gradient:
        torch.neg(total, out=positive)
        if places is not None:
            x = x.zero_().scatter_(1, places, softmax)
        elif not whole:
            x.zero_()
            near.copy_(softmax)
        else:
            x = softmax
    if call.need_query_gradient:
        query_gradient = torch.empty_like(q).addmm_(x, keys, beta=0, alpha=per_logit)
        through_unit(query_gradient, q, q_norm)
    if call.need_keys_gradient:
        keys_gradient = torch.empty_like(k).addmm_(x[:, :n].T, q, beta=0, alpha=per_logit)
        if len(keys) > n:
            keys_gradient[:width].addmm_(x[:, n:].T, q, alpha=per_logit)
        through_unit(keys_gradient, k, k_norm)
    return RowOutputs(loss, query_gradient, None, keys_gradient, q.new_zeros((len(Row), n)), None)


def symmetric_losses(call: SymmetricLosses) -> SymmetricOutputs:
    """Both directions by one softmax, each of whose exponentials serves both rows of its pair.

    Let e be a negative's exponential, p the positive's, T the sum over the negatives, and c = alpha / K. A row's loss
    is log(1 + c T / p), its derivative by a negative's logit c e / (p + c T), and by the positive's -c T / (p + c T).
    """
    m, t, margin_factor, views = len(call.first), call.temperature, _margin_factor(call, call.negatives), call.views
    unit, norm = unit_rows(views, True, compute_dtype(views))
    rows, keys = (unit[:m], unit[m:]) if call.across else (unit, unit)
    x = unit.new_empty((len(rows), len(rows))).addmm_(rows, keys.T, beta=0, alpha=LOG2E / t).exp2_()
    if call.across:
        at_positive = x.diagonal()[None]  # (1, M)
    else:
        x.diagonal().zero_()
        at_positive = x.as_strided((2, m), (2 * m * m - m, 2 * m + 1), m)  # where the key is the row's other view
    positive = at_positive[0].clone()
    at_positive.zero_()
    total = torch.stack([x.sum(1), x.sum(0)]) if call.across else x.sum(1).view(2, m)
    odds = torch.div(total, positive)
    odds = odds if margin_factor == 1.0 else odds.mul_(margin_factor)
    pull = torch.add(positive, total, alpha=margin_factor).reciprocal_()
    if call.need_gradient:
        of_rows, of_keys = pull if call.across else (pull.view(-1),) * 2
        x.mul_(of_rows[:, None] + of_keys)
        at_positive.copy_(pull.mul_(total).sum(0).neg_())
        views, per_logit = torch.empty_like(unit), call.share_factor * margin_factor / t
        views[: len(rows)].addmm_(x, keys, beta=0, alpha=per_logit)
        if call.across:
            views[m:].addmm_(x.T, rows, beta=0, alpha=per_logit)
        through_unit(views, unit, norm)
    loss = odds.log1p_().sum().mul_(call.share_factor)
    return SymmetricOutputs(loss, unit.new_zeros((len(Row), 2 * m)), views)
