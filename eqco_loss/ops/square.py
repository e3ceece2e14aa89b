"""Rows that meet other rows of their batch, so few that one product has all their logits: what tiles do, in half the
calls of torch.

A step of 64 or 256 rows spends as much time on its way to torch's kernels as in them. Logits that are ``small`` need no
maximum. With e the exponentials, p the positive's, T their sum over the negatives and c = alpha / K, a row's loss is
log(1 + c T / p), its derivative by a negative's logit c e / (p + c T), and by the positive's -c T / (p + c T).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import TILE_ELEMENTS, is_narrow, through_unit, unit_rows
from .calls import LOG2E, Row, RowLosses, RowOutputs, SymmetricLosses, SymmetricOutputs, compute_dtype, loss_of
from .running import small


def serves(call: RowLosses) -> bool:
    """Whether the keys are the positives, of which both gradients are one tensor's, and no number leaves its dtype."""
    n, pairs = len(call.query), call.first.pairs
    return (
        call.positive is call.first.keys
        and pairs.band[::2] == [0, n]
        and not is_narrow(pairs, n * n)
        and not pairs.by_pair
        and n * n <= TILE_ELEMENTS
        and call.second is None
        and call.normalize
        and call.reduced
        and not call.need_metrics
        and call.need_positive_gradient == call.need_keys_gradient
        and _in_range(call, call.query, pairs.band[1])
    )


def serves_both(call: SymmetricLosses) -> bool:
    """The same of both directions, whose gradient is what is kept (``mutual``)."""
    m = len(call.first) * (1 if call.across else 2)
    return m * m <= TILE_ELEMENTS and _in_range(call, call.first, _negatives(call))


def _in_range(call: RowLosses | SymmetricLosses, x: Tensor, count: int) -> bool:
    """Whether every term of c T / p is far from the ends of the dtype's exponents."""
    if loss_of(call) != "eqco" or call.learned_temperature is not None:
        return False
    dtype, bound = compute_dtype(x), LOG2E / call.temperature
    margin = abs(math.log2(_ratio(call, count)))
    return small(bound, dtype) and 2 * bound + margin + math.log2(count) <= 0.9 * math.log2(torch.finfo(dtype).max)


def _negatives(call: SymmetricLosses) -> int:
    return (len(call.first) - 1) * (1 if call.across else 2)


def _ratio(call: RowLosses | SymmetricLosses, count: int) -> float:
    """c, by which the margin multiplies every negative's exponential."""
    return 1.0 if call.alpha is None else call.alpha / count


class _Weighed(NamedTuple):
    loss: Tensor  # (), the sum over all rows
    pull: Tensor  # 1 / (p + c T), in the shape of the totals
    of_positive: Tensor  # T / (p + c T)


def _weighed(positive: Tensor, total: Tensor, ratio: float) -> _Weighed:
    """``total`` (..., R), of which every row has the positives (R,)."""
    odds = torch.div(total, positive)
    if ratio != 1.0:
        odds *= ratio
    pull = torch.add(positive, total, alpha=ratio).reciprocal_()
    return _Weighed(odds.log1p_().sum(), pull, total.mul_(pull))


def row_losses(call: RowLosses) -> RowOutputs:
    """The positives' gradient is in that of the keys, which they are."""
    dtype, n, t, width = compute_dtype(call.query), len(call.query), call.temperature, call.first.pairs.band[1]
    (q, q_norm), (k, k_norm) = (unit_rows(x, True, dtype) for x in (call.query, call.positive))
    ratio = _ratio(call, width)
    x = q.new_empty((n, n)).addmm_(q, k.T, beta=0, alpha=LOG2E / t).exp2_()
    positive = x.diagonal().clone()
    if width == n - 1:
        x.diagonal().zero_()
    else:  # a band, which has a second corner because it is cyclic
        x = x.triu(1).tril_(width).add_(x.tril_(width - n))
    found = _weighed(positive, x.sum(1), ratio)
    if call.need_query_gradient or call.need_keys_gradient:
        x.mul_(found.pull[:, None])
        torch.neg(found.of_positive, out=x.diagonal())
    query_gradient, keys_gradient, share = None, None, call.ratio * ratio / t
    if call.need_query_gradient:
        query_gradient = torch.empty_like(q).addmm_(x, k, beta=0, alpha=share)
        through_unit(query_gradient, q, q_norm)
    if call.need_keys_gradient:
        keys_gradient = torch.empty_like(k).addmm_(x.T, q, beta=0, alpha=share)
        through_unit(keys_gradient, k, k_norm)
    return RowOutputs(
        found.loss.mul_(call.ratio), query_gradient, None, keys_gradient, q.new_zeros((len(Row), n)), None
    )


def symmetric_losses(call: SymmetricLosses) -> SymmetricOutputs:
    m, t, ratio, views = len(call.first), call.temperature, _ratio(call, _negatives(call)), call.views
    unit, norm = unit_rows(views, True, compute_dtype(views))
    rows, keys = (unit[:m], unit[m:]) if call.across else (unit, unit)
    x = unit.new_empty((len(rows), len(rows))).addmm_(rows, keys.T, beta=0, alpha=LOG2E / t).exp2_()
    if call.across:
        positive = x.diagonal()[None]  # (1, M)
    else:
        x.diagonal().zero_()
        positive = x.as_strided((2, m), (2 * m * m - m, 2 * m + 1), m)  # where the row is the other view's
    logits = positive[0].clone()
    positive.zero_()
    found = _weighed(logits, torch.stack([x.sum(1), x.sum(0)]) if call.across else x.sum(1).view(2, m), ratio)
    if call.need_gradient:
        of_rows, of_keys = found.pull if call.across else (found.pull.view(-1),) * 2
        x.mul_(of_rows[:, None] + of_keys)
        positive.copy_(found.of_positive.sum(0).neg_())
        views, share = torch.empty_like(unit), call.ratio * ratio / t
        views[: len(rows)].addmm_(x, keys, beta=0, alpha=share)
        if call.across:
            views[m:].addmm_(x.T, rows, beta=0, alpha=share)
        through_unit(views, unit, norm)
    return SymmetricOutputs(found.loss.mul_(call.ratio), unit.new_zeros((len(Row), 2 * m)), views)
