"""Queries that meet other keys of their batch, so few that one tile has them all: ``tiles`` in half the calls.

At N = 256 a step spends more time on its way to torch's kernels than in them.
"""

from __future__ import annotations

import math

import torch

from . import gap
from .blocks import TILE_ELEMENTS, is_narrow, through_unit, unit_rows
from .calls import LOG2E, Row, RowLosses, RowOutputs, compute_dtype, loss_of
from .running import small


def serves(call: RowLosses) -> bool:
    """Whether the keys are the positives, of which both gradients are one tensor's, and no logit needs a maximum."""
    n, pairs = len(call.query), call.first.pairs
    return (
        call.positive is call.first.keys
        and pairs.band[::2] == [0, n]
        and not is_narrow(pairs, n * n)
        and not pairs.by_pair
        and n * n <= TILE_ELEMENTS
        and call.second is None
        and loss_of(call) == "eqco"
        and call.learned_temperature is None
        and call.normalize
        and call.reduced
        and not call.need_metrics
        and call.need_positive_gradient == call.need_keys_gradient
        and small(LOG2E / call.temperature, compute_dtype(call.query))
    )


def row_losses(call: RowLosses) -> RowOutputs:
    """The positives' gradient comes with that of the keys, which they are."""
    dtype, n, t = compute_dtype(call.query), len(call.query), call.temperature
    (q, q_norm), (k, k_norm) = (unit_rows(x, True, dtype) for x in (call.query, call.positive))
    x = q.new_empty((n, n)).addmm_(q, k.T, beta=0, alpha=LOG2E / t)
    positive_logit, width = x.diagonal().clone(), call.first.pairs.band[1]
    if width == n - 1:
        x.diagonal().fill_(-math.inf)
        x.exp2_()
    else:  # a band, which has a second corner because it is cyclic
        x = x.exp2_().triu(1).tril_(width).add_(x.tril_(width - n))
    total = x.sum(1)
    values = gap.values("eqco", gap.Seen(positive_logit, total), None, width, call.alpha)
    factor = values.weight * (call.ratio / t)
    rows = q.new_zeros((len(Row), n))
    query_gradient, positive_gradient, keys_gradient, metrics = (q.new_empty(0) for _ in range(4))
    if call.need_query_gradient or call.need_keys_gradient:
        x *= (factor / total)[:, None]
        x.diagonal().copy_(-factor)  # x is now the derivative of the loss by the similarities
    if call.need_query_gradient:
        query_gradient = torch.mm(x, k)
        through_unit(query_gradient, q, q_norm)
    if call.need_keys_gradient:
        keys_gradient, positive_gradient = torch.mm(x.T, q), torch.zeros_like(q)
        through_unit(keys_gradient, k, k_norm)
    return RowOutputs(
        values.loss.sum().mul_(call.ratio), query_gradient, positive_gradient, keys_gradient, rows, metrics
    )
