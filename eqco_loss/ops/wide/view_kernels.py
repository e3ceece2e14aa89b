"""What both directions between two views need before and after ``mutual_kernels``: both rows of an image at a time."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from ..shared_kernels import (
    LOG2E,
    MINIMUM,
    ROW_INVERSE,
    ROW_POSITIVE,
    ROW_PULL,
    ROW_TOTAL,
    add_up,
    inverse_length,
    read_temperature,
    something,
)
from .kernels import INTER_TOTAL, MAXIMUM, TOTAL, WEIGHTED, finished, load_plane
from .mutual_kernels import BOUNDED, PART_INTER, PART_MAXIMUM, PART_TOTAL, PART_WEIGHTED

_UNIT, _POWER, _COPY = range(3)  # what ROWS_AS may be
UNIT, POWER, COPY = tl.constexpr(_UNIT), tl.constexpr(_POWER), tl.constexpr(_COPY)


@triton.jit
def load_features(x, rows, stride_r, stride_d, at, inside, D: tl.constexpr):
    """Some features of some rows, (R, BLOCK_D), in float32."""
    where = x + rows.to(tl.int64)[:, None] * stride_r + at.to(tl.int64)[None, :] * stride_d
    return tl.load(where, mask=inside[:, None] & (at < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def power_of_two_for(inverse):
    """About 1 / length, and what is left of it: at most 1, more being only of rows of zeros."""
    most: tl.constexpr = 2.0**24
    power = tl.exp2(tl.ceil(tl.log2(tl.minimum(inverse, most, propagate_nan=tl.PropagateNan.ALL))))
    return power, tl.minimum(inverse / power, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def prepare_kernel(
    here, here_stride_r, here_stride_d, there, there_stride_r, there_stride_d, out, out_stride, scale, rows_out,
    scratch, half,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS_AS: tl.constexpr, MEASURE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of both rows of some images 1 / length and what is multiplied, ``out`` (2M, WIDTH), with zeros beyond D.

    That is the unit row (ROWS_AS = UNIT), the row times a power of two (POWER), of which the rest is ``scale``, or the
    row itself (COPY). ``rows_out`` (len(Row), 2M) gets INVERSE and, with MEASURE, POSITIVE; without, it has INVERSE.
    ``scratch`` is set to 0, for the count of ``finish_views_kernel``.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < half
    plane_size = 2 * half
    inverses = rows_out + ROW_INVERSE * plane_size + rows
    if MEASURE:
        left = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
        right, both = left, left
        for first in range(0, D, BLOCK_D):
            at = first + tl.arange(0, BLOCK_D)
            a = load_features(here, rows, here_stride_r, here_stride_d, at, inside, D)
            b = load_features(there, rows, there_stride_r, there_stride_d, at, inside, D)
            left += a * a
            right += b * b
            both += a * b
        by_left, by_right = inverse_length(tl.sum(left, 1)), inverse_length(tl.sum(right, 1))
        similarity = tl.sum(both, 1) * (by_left * by_right)
    else:
        by_left = tl.load(inverses, mask=inside, other=1.0)
        by_right = tl.load(inverses + half, mask=inside, other=1.0)
    of_left, of_right = by_left, by_right
    if ROWS_AS == POWER:
        of_left, rest_left = power_of_two_for(by_left)
        of_right, rest_right = power_of_two_for(by_right)
    for first in range(0, WIDTH, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        a = load_features(here, rows, here_stride_r, here_stride_d, at, inside, D)
        b = load_features(there, rows, there_stride_r, there_stride_d, at, inside, D)
        if ROWS_AS != COPY:
            a, b = a * of_left[:, None], b * of_right[:, None]
        stored = inside[:, None] & (at < WIDTH)[None, :]
        to = out + rows.to(tl.int64)[:, None] * out_stride + at[None, :]
        tl.store(to, a.to(out.dtype.element_ty), mask=stored)
        to = out + (rows + half).to(tl.int64)[:, None] * out_stride + at[None, :]
        tl.store(to, b.to(out.dtype.element_ty), mask=stored)
    if ROWS_AS == POWER:
        tl.store(scale + rows, rest_left, mask=inside)
        tl.store(scale + half + rows, rest_right, mask=inside)
    if MEASURE:
        tl.store(scratch, 0.0)
        tl.store(inverses, by_left, mask=inside)
        tl.store(inverses + half, by_right, mask=inside)
        tl.store(rows_out + ROW_POSITIVE * plane_size + rows, similarity, mask=inside)
        tl.store(rows_out + ROW_POSITIVE * plane_size + half + rows, similarity, mask=inside)


@triton.jit
def folded(
    parts, tiles, n, rows, inside, maximum, total, weighted, inter, to_inter,
    FORM: tl.constexpr, WEIGH: tl.constexpr, DUAL: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Some rows' statistics with those of ``parts`` (planes, tiles, n), in a fixed order. BOUNDED: of one maximum."""
    plane_size = tiles * n
    new = maximum
    if FORM != BOUNDED:
        for first in range(0, tiles, BLOCK_TILES):
            tile = first + tl.arange(0, BLOCK_TILES)
            at, there = tile[:, None] * n + rows[None, :], (tile < tiles)[:, None] & inside[None, :]
            new = tl.maximum(new, tl.max(tl.load(parts + PART_MAXIMUM * plane_size + at, mask=there, other=MINIMUM), 0))
        fall = maximum - new
        shrink = tl.exp2(fall)
        weighted = (weighted + fall * total) * shrink
        inter = inter * tl.exp2(fall * to_inter)
        total = total * shrink
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        at, there = tile[:, None] * n + rows[None, :], (tile < tiles)[:, None] & inside[None, :]
        share = tl.load(parts + PART_TOTAL * plane_size + at, mask=there, other=0.0)
        if WEIGH:
            of_weighted = tl.load(parts + PART_WEIGHTED * plane_size + at, mask=there, other=0.0)
        if DUAL:
            of_inter = tl.load(parts + PART_INTER * plane_size + at, mask=there, other=0.0)
        if FORM != BOUNDED:
            below = tl.load(parts + PART_MAXIMUM * plane_size + at, mask=there, other=MINIMUM) - new[None, :]
            if WEIGH:
                of_weighted = (of_weighted + below * share) * tl.exp2(below)
            if DUAL:
                of_inter = of_inter * tl.exp2(below * to_inter)
            share = share * tl.exp2(below)
        total += tl.sum(share, 0)
        if WEIGH:
            weighted += tl.sum(of_weighted, 0)
        if DUAL:
            inter += tl.sum(of_inter, 0)
    return new, total, weighted, inter


@triton.jit
def fold_parts_kernel(
    parts, tiles, n, state, state_stride, temperature, temperature_tensor, inter_t,
    FORM: tl.constexpr, WEIGH: tl.constexpr, DUAL: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """A chunk's parts into the states of n rows."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < n
    t = read_temperature(temperature, temperature_tensor)
    maximum = load_plane(state, state_stride, MAXIMUM, rows, inside, MINIMUM)
    if FORM == BOUNDED:
        maximum = maximum * 0.0 + LOG2E / t
    total = load_plane(state, state_stride, TOTAL, rows, inside, 0.0)
    weighted = load_plane(state, state_stride, WEIGHTED, rows, inside, 0.0)
    inter = load_plane(state, state_stride, INTER_TOTAL, rows, inside, 0.0)
    maximum, total, weighted, inter = folded(
        parts, tiles, n, rows, inside, maximum, total, weighted, inter, t / inter_t, FORM, WEIGH, DUAL, BLOCK_TILES
    )  # fmt: skip
    tl.store(state + MAXIMUM * state_stride + rows, maximum, mask=inside)
    tl.store(state + TOTAL * state_stride + rows, total, mask=inside)
    tl.store(state + WEIGHTED * state_stride + rows, weighted, mask=inside)
    tl.store(state + INTER_TOTAL * state_stride + rows, inter, mask=inside)


@triton.jit
def finish_views_kernel(
    parts, parts_of_rows, rows_end, of_keys, parts_of_keys, state, state_stride,
    temperature, temperature_tensor, inter_t, known, alpha, share, scratch, loss, out, n,
    FORM: tl.constexpr, WEIGH: tl.constexpr, ALPHA: tl.constexpr, LOSS: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows before ``rows_end`` and rows from there on, their parts or states, to ``out`` and the sum of all losses.

    ``parts`` is (planes, tiles, rows), first of those and then, from ``of_keys`` on, of these.
    """
    side = tl.program_id(1)
    start, count = tl.where(side == 1, rows_end, 0), tl.where(side == 1, n - rows_end, rows_end)
    tiles, offset = tl.where(side == 1, parts_of_keys, parts_of_rows), tl.where(side == 1, of_keys, 0)
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside, rows = place < count, start + place
    t = read_temperature(temperature, temperature_tensor)
    s = tl.load(out + ROW_POSITIVE * n + rows, mask=inside, other=0.0)
    if state is not None:
        maximum = load_plane(state, state_stride, MAXIMUM, rows, inside, 0.0)
        total = load_plane(state, state_stride, TOTAL, rows, inside, 1.0)
        weighted = load_plane(state, state_stride, WEIGHTED, rows, inside, 0.0)
        inter = load_plane(state, state_stride, INTER_TOTAL, rows, inside, 1.0)
    else:
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        maximum = total + (LOG2E / t if FORM == BOUNDED else MINIMUM)
        maximum, total, weighted, inter = folded(
            parts + offset, tiles, count, place, inside, maximum, total, total, total, t / inter_t,
            FORM, WEIGH, LOSS == "dual", BLOCK_TILES,
        )  # fmt: skip
    counts = total * 0.0 + known
    losses, _, _, _, _ = finished(
        rows, inside, s, maximum, something(total), something(inter), weighted, counts, t, inter_t, alpha, share,
        out, n, ALPHA, LOSS, WEIGH, True,
    )  # fmt: skip
    add_up(tl.sum(tl.where(inside, losses, 0.0), 0), scratch, loss)


@triton.jit
def unit_gradient(gradient, stride, places, at, inside, factor, other, pull, D: tl.constexpr):
    """Of some unit rows: their sum over negatives less the pull of their other view."""
    value = load_features(gradient, places, stride, 1, at, inside, D)
    return value * factor[:, None] - other * pull[:, None]


@triton.jit
def through_views_kernel(
    here, here_stride_r, here_stride_d, there, there_stride_r, there_stride_d, of_here, of_there, gradient_stride,
    out_here, out_there, out_stride, rows_in, scale, grad, largest, start, stop, half, least,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of both rows of some images, or of the one whose sum over negatives is given.

    ``of_here`` and ``of_there`` (stop - start, D) are ``scale_i / largest`` times those sums.
    """
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = start + places
    inside = rows < stop
    plane_size = 2 * half
    inverses = rows_in + ROW_INVERSE * plane_size + rows
    by_left = tl.load(inverses, mask=inside, other=1.0)
    by_right = tl.load(inverses + half, mask=inside, other=1.0)
    pulls, totals = rows_in + ROW_PULL * plane_size + rows, rows_in + ROW_TOTAL * plane_size + rows
    pull = tl.load(pulls, mask=inside, other=0.0) * tl.load(totals, mask=inside, other=0.0)
    pull += tl.load(pulls + half, mask=inside, other=0.0) * tl.load(totals + half, mask=inside, other=0.0)
    pull *= tl.load(grad).to(tl.float32)
    left_factor, right_factor = by_left * 0.0 + 1.0, by_right * 0.0 + 1.0
    if scale is not None:
        left_factor = 1.0 / tl.load(scale + rows, mask=inside, other=1.0)
        right_factor = 1.0 / tl.load(scale + half + rows, mask=inside, other=1.0)
    if largest is not None:
        left_factor *= tl.load(largest)
        right_factor *= tl.load(largest)
    left_along = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    right_along = left_along
    for first in range(0, D, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        a = load_features(here, rows, here_stride_r, here_stride_d, at, inside, D) * by_left[:, None]
        b = load_features(there, rows, there_stride_r, there_stride_d, at, inside, D) * by_right[:, None]
        if of_here is not None:
            left_along += a * unit_gradient(of_here, gradient_stride, places, at, inside, left_factor, b, pull, D)
        if of_there is not None:
            right_along += b * unit_gradient(of_there, gradient_stride, places, at, inside, right_factor, a, pull, D)
    left_sum, right_sum = tl.sum(left_along, 1), tl.sum(right_along, 1)
    by_left_bounded = tl.minimum(by_left, least, propagate_nan=tl.PropagateNan.ALL)  # so that gradients fit their dtype
    by_right_bounded = tl.minimum(by_right, least, propagate_nan=tl.PropagateNan.ALL)
    for first in range(0, D, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        stored = inside[:, None] & (at < D)[None, :]
        a = load_features(here, rows, here_stride_r, here_stride_d, at, inside, D) * by_left[:, None]
        b = load_features(there, rows, there_stride_r, there_stride_d, at, inside, D) * by_right[:, None]
        to = places.to(tl.int64)[:, None] * out_stride + at[None, :]
        if of_here is not None:
            value = unit_gradient(of_here, gradient_stride, places, at, inside, left_factor, b, pull, D)
            value = (value - a * left_sum[:, None]) * by_left_bounded[:, None]
        if of_there is not None:
            other = unit_gradient(of_there, gradient_stride, places, at, inside, right_factor, a, pull, D)
            other = (other - b * right_sum[:, None]) * by_right_bounded[:, None]
            tl.store(out_there + to, other.to(out_there.dtype.element_ty), mask=stored)
        if of_here is not None:
            tl.store(out_here + to, value.to(out_here.dtype.element_ty), mask=stored)
