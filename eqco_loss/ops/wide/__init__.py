"""The operators by the vendor's products of whole matrices: for CUDA tensors of any D, in any dtype.

A chunk of rows meets a chunk of keys in three steps: one product gives the similarities, in float32 where its operands
are half (so that no logit is ever rounded to half); pointwise work makes logits, statistics and weights of them
(``pointwise.py``); and one more product, of the weights, which alone are rounded, sums the gradient. The chunks are
such that similarities and weights take at most ``WORKSPACE`` bytes, whatever N, K and D are.

Rows in half precision are multiplied as they lie and not as unit vectors, because rounding those would cost accuracy:
their inverse lengths scale logits and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..calls import (
    LN2,
    LOG2E,
    TIE,
    KeysGradient,
    KeysGradients,
    LogSumExp,
    LogSumExpOutputs,
    Metric,
    Pairs,
    Row,
    RowLosses,
    RowOutputs,
    SymmetricGradient,
    SymmetricGradients,
    SymmetricLosses,
    SymmetricOutputs,
    checked_maxima,
    once_a_kind,
    plainly,
    rounded_log_sum,
    slices,
    temperature_of,
)
from ..scaled import GIVES_KEYS_GRADIENT as GIVES_KEYS_GRADIENT
from ..scaled import keeps as kept_views
from ..scaled import times as times
from ..scaled import unit_dtype as unit_dtype
from ..scaled import with_others
from . import pointwise
from .chunks import (
    Passes,
    Workspace,
    arithmetic,
    chunk_size,
    fitting,
    may_hold_anything,
    met_once,
    own_rows,
    prepare,
    product,
    product_dtype,
    shared_with,
)
from .pointwise import Plane, Seek, Side, new_state


def refusal(query: Tensor, *keys: Tensor | None) -> str | None:
    """Why this backend cannot serve these tensors; None if it can."""
    if query.device.type not in ("cuda", "cpu"):
        return f"{query.device.type} tensors: the wide backend is for CUDA (and CPU, to test)"
    return None


def keeps(call: SymmetricLosses) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what forward keeps for the gradient of both directions."""
    products, mutual = _multiplied(call)
    return kept_views(call) if mutual is None else mutual.keeps(call, products)


# ---------------------------------------------------------------------------------------------------------- row losses


@plainly
def row_losses(call: RowLosses) -> RowOutputs:
    t, like, (n, d) = temperature_of(call), arithmetic(call.query), call.query.shape
    products = product_dtype(call.autocast, call.query, *(one.keys for one in call.sets))
    query = prepare(call.query, call.normalize, products, like)
    positive = prepare(call.positive, call.normalize, call.positive.dtype, like)
    passes, scale = Passes(query, call.sets, LOG2E / t, products, like), LOG2E / t
    known, learned = passes.known, call.learned_temperature is not None
    state = pointwise.first_state(n, like) if passes.sets else new_state(n, like)
    query_gradient = like.new_empty((n, d)) if call.need_query_gradient else None
    positive_gradient = like.new_empty((n, d)) if call.need_positive_gradient else None
    s = like.new_empty(n)
    pointwise.dots(query.raw, positive.raw, s)
    threshold = None
    if call.need_metrics:
        positive_logit = s * scale
        threshold = positive_logit - TIE * positive_logit.abs()
    seek = Seek(_to_inter(call, like), threshold, not known, learned)
    for some in passes.rows:
        passes.attend(some, state[:, some], seek.part(some), None if query_gradient is None else query_gradient[some])
    if not known:
        state[Plane.MAXIMUM] = checked_maxima(state[Plane.MAXIMUM], state[Plane.COUNT], call.may_raise)
    metrics = like.new_empty((len(Metric), n)) if call.need_metrics else None
    done = pointwise.finish(call, s, state, known, metrics)
    losses, rows = done.losses, done.rows
    if query_gradient is not None:
        pointwise.through_unit(query.raw, query_gradient, done.of_sums, positive.raw, done.factor, query_gradient)
    if positive_gradient is not None:
        pointwise.through_unit(positive.raw, None, None, query.raw, done.factor, positive_gradient)
    loss = losses.sum() if call.reduced else losses
    return RowOutputs(loss, query_gradient, positive_gradient, None, rows, metrics)


@plainly
def logsumexp(call: LogSumExp) -> LogSumExpOutputs:
    t, like = temperature_of(call), arithmetic(call.query)
    products = product_dtype(call.autocast, call.query, call.first.keys)
    passes = Passes(prepare(call.query, False, products, like), [call.first], LOG2E / t, products, like)
    mean_key = like.new_empty(call.query.shape) if call.need_query_gradient else None
    rows, n = like.new_zeros((len(Row), len(call.query))), len(call.query)
    state = pointwise.first_state(n, like) if passes.sets else new_state(n, like)
    for some in passes.rows:
        out = None if mean_key is None else mean_key[some]
        passes.attend(some, state[:, some], Seek(negatives=not passes.known), out)
        if out is not None and passes.sets:
            out /= state[Plane.TOTAL, some, None]
    maximum = state[Plane.MAXIMUM] if passes.known else checked_maxima(state[Plane.MAXIMUM], state[Plane.COUNT], True)
    rows[Row.BASE], rows[Row.TOTAL] = rounded_log_sum(maximum, state[Plane.TOTAL])
    rows[Row.PULL] = 1 / (t * rows[Row.TOTAL])
    return LogSumExpOutputs((maximum + state[Plane.TOTAL].log2()) * LN2, mean_key, rows)


@plainly
def keys_gradient(call: KeysGradient) -> KeysGradients:
    """Chunk of keys by chunk of keys, each with all rows, so that nothing but a chunk is summed in float32."""
    like, one = arithmetic(call.query), call.first
    products = product_dtype(call.autocast, call.query, one.keys)
    query = prepare(call.query, call.normalize, products, like)
    logit_scale = query.scale * (LOG2E / temperature_of(call))
    pull, largest = fitting(call.rows[Row.PULL] * call.grad, products)
    factor, base = pull * query.scale, call.rows[Row.BASE]
    out, workspace = torch.empty_like(one.keys, memory_format=torch.contiguous_format), Workspace(like, products)
    if out.numel() == 0:
        return with_others(call, out)
    if one.keys.dim() == 3:
        for some in slices(len(one.keys), own_rows(one.keys)):
            keys = prepare(one.keys[some].flatten(0, 1), one.normalize, products, like, may_hold_anything(one))
            tile = workspace.tile(query.part(some), keys, logit_scale[some], one.pairs, some, slice(0, out.shape[1]))
            weights = torch.empty_like(tile.x, memory_format=torch.contiguous_format)
            pointwise.weights(tile, base[some], factor[some], weights)
            gradient = weights[:, :, None] * query.multiplied[some, None].to(like.dtype)
            of_raw = out[some].flatten(0, 1)
            of_keys = None if largest is None else largest.repeat(len(of_raw))
            # A product has its factors' layout, which may be any.
            of_unit = gradient.flatten(0, 1).contiguous()
            pointwise.through_unit(keys.raw, of_unit, of_keys, None, None, of_raw)
        return with_others(call, out)
    keys = prepare(one.keys, one.normalize, products, like, may_hold_anything(one))
    if call.normalize:
        width, step = chunk_size(len(one.keys), len(call.query), like, products)
    else:
        step, width = chunk_size(len(call.query), len(one.keys), like, products, True)
    for columns in slices(len(one.keys), width):
        part = keys.part(columns)
        gradient = (like.new_empty if len(call.query) else like.new_zeros)(part.multiplied.shape)
        for some in slices(len(call.query), step):
            tile = workspace.tile(query.part(some), part, logit_scale[some], one.pairs, some, columns)
            weights = workspace.weights(tile.x)
            pointwise.weights(tile, base[some], factor[some], weights)
            product(weights.T, query.multiplied[some], gradient, add=some.start > 0)
        of_keys = None if largest is None else largest.repeat(len(gradient))
        pointwise.through_unit(part.raw, gradient, of_keys, None, None, out[columns])
    return with_others(call, out)


def _to_inter(call: RowLosses | SymmetricLosses, like: Tensor) -> Tensor | None:
    """t / T, from the first temperature's logits to the second's, ()."""
    if call.inter_temperature is None:
        return None
    ratio = temperature_of(call) / call.inter_temperature
    return ratio if isinstance(ratio, Tensor) else like.new_full((), ratio)


# ----------------------------------------------------------------------------------- both directions between two views


@plainly
def symmetric_losses(call: SymmetricLosses) -> SymmetricOutputs:
    """Every similarity is computed once, and serves both of its rows."""
    products, mutual = _multiplied(call)
    if mutual is not None:
        return mutual.symmetric_losses(call, products)  # type: ignore[no-any-return]
    t, both, like = temperature_of(call), call.views, arithmetic(call.first)
    n = len(both)
    views, half = prepare(both, True, products, like), n // 2
    others = Pairs(band=[0, half - 1, half])  # every row but the two of its own image
    logit_scale, workspace = views.scale * (LOG2E / t), Workspace(like, products)
    seek = Seek(_to_inter(call, like), weighted=call.learned_temperature is not None)
    state, s = new_state(n, like), like.new_empty(n)
    for some, several in _mutual(n, call.across, products, like):
        for columns in several:
            tile = workspace.tile(views.part(some), views.part(columns), logit_scale[some], others, some, columns)
            first = shared_with(some, columns)
            pointwise.fold_both(tile, first, state[:, some], state[:, columns.start + first : columns.stop], seek)
    pointwise.dots(views.raw.part(slice(0, half)), views.raw.part(slice(half, n)), s[:half])
    s[half:] = s[:half]
    done = pointwise.finish(call, s, state, call.negatives, None)
    return SymmetricOutputs(done.losses.sum(), done.rows, both)


@plainly
def symmetric_gradient(call: SymmetricGradient) -> SymmetricGradients:
    """Gradient of rows that are anchors, positives and negatives.

    With P the softmax, a = grad * weight * share / t and p a row's other view, it is for unit rows
    ``sum_j (a_i P_ij + a_j P_ji) z_j - (a_i + a_p) z_p``. Every tile's weights serve its rows, and turned its keys.
    """
    products, mutual = _multiplied(call)
    if mutual is not None:
        return mutual.symmetric_gradient(call, products)  # type: ignore[no-any-return]
    t, (n, d), like = temperature_of(call), call.kept.shape, arithmetic(call.first)
    views, half = prepare(call.kept, True, products, like), n // 2
    others = Pairs(band=[0, half - 1, half])  # every row but the two of its own image
    logit_scale, workspace = views.scale * (LOG2E / t), Workspace(like, products)
    all_pull = call.rows[Row.PULL] * call.grad
    pull, largest = fitting(all_pull, products)
    anchors, a = Side(call.rows[Row.BASE], pull), all_pull * call.rows[Row.TOTAL]
    out = torch.empty_like(call.kept, memory_format=torch.contiguous_format)
    first_key = half if call.across else 0
    new = like.new_empty if call.across else like.new_zeros
    sums = new((n - first_key, d))  # of the rows that are keys of other rows, while these are visited

    def finish(some: slice, gradient: Tensor) -> None:
        """From ``scale * sum_j (...) z_j`` of some rows to ``out``."""
        shift = half if some.start < half else -half
        partner = slice(some.start + shift, some.stop + shift)
        rest = views.raw.part(partner), a[some] + a[partner], out[some]
        factor = (1.0 if largest is None else largest) / views.scale[some]
        pointwise.through_unit(views.raw.part(some), gradient, factor, *rest)

    for some, several in _mutual(n, call.across, products, like):
        gradient = like.new_empty((some.stop - some.start, d)) if call.across else sums[some]
        for columns in several:
            first = shared_with(some, columns)
            tile = workspace.tile(views.part(some), views.part(columns), logit_scale[some], others, some, columns)
            weights = workspace.weights(tile.x)
            pointwise.weights_both(tile, anchors.part(some), anchors.part(columns), views.scale[some], weights)
            product(weights, views.multiplied[columns], gradient, add=not call.across or columns.start > first_key)
            if first < weights.shape[1]:
                of_keys = sums[columns.start + first - first_key : columns.stop - first_key]
                product(weights[:, first:].T, views.multiplied[some], of_keys, add=not call.across or some.start > 0)
        finish(some, gradient)
    if call.across:
        finish(slice(half, n), sums)
    of_temperature = None
    if call.learned_temperature is not None:
        of_temperature = call.rows[Row.TEMPERATURE_GRADIENT].sum() * call.grad
    return SymmetricGradients(out, of_temperature)


@once_a_kind
def _multiplied(call: SymmetricLosses | SymmetricGradient) -> tuple[torch.dtype, Any]:
    """The products' dtype, and ``wide/mutual.py`` where its kernels serve, or None."""
    products = product_dtype(call.autocast, call.first)
    return products, pointwise.mutual(products, arithmetic(call.first))


def _mutual(n: int, across: bool, products: torch.dtype, like: Tensor) -> Iterator[tuple[slice, Iterator[slice]]]:
    anchors = n // 2 if across else n
    return met_once(n, across, chunk_size(anchors, anchors, like, products))
