"""Products of two views' rows that are never stored: each tile ends in what its rows and its columns need of it.

Every row is an anchor and a key. ``statistics`` folds the logits of both roles into their states, and ``weights``
writes the numbers that the gradient's two products are made of, in half precision. Between them the similarities are
multiplied a second time, which costs less than to write and read them.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from ..calls import LOG2E as _LOG2E
from ..launcher import launch
from .kernels import INTER_TOTAL, MAXIMUM, TOTAL, WEIGHTED
from .pointwise import MINIMUM as _MINIMUM
from .pointwise import Plane

_LEAST = 0.05  # temperature whose logits of unit rows, at most 29 in base 2, need no maximum
MINIMUM, LOG2E, LEAST = tl.constexpr(_MINIMUM), tl.constexpr(_LOG2E), tl.constexpr(_LEAST)
BLOCK, BLOCK_D = 128, 64  # rows and columns of a tile, and features of a step
LAUNCH = {"num_warps": 4, "num_stages": 3}  # measured: N = 4096, D = 512: 70 and 57 us; with 8 warps 98 and 84
PARTS = 2**24  # bytes that the tiles' statistics may take
USED = tuple(int(plane) for plane in (Plane.MAXIMUM, Plane.TOTAL, Plane.INTER_TOTAL, Plane.WEIGHTED))  # of them
PART_MAXIMUM, PART_TOTAL, PART_INTER, PART_WEIGHTED = (tl.constexpr(place) for place in range(len(USED)))


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def multiplied(
    views, stride, row, row_stop, column, column_stop, d,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of the rows from ``row`` on with the columns from ``column`` on: two halves (BLOCK, BLOCK / 2).

    What comes after the products takes one number a column, and of half the columns the registers hold them.
    """
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    at_rows = views + tl.minimum(rows, row_stop - 1).to(tl.int64)[:, None] * stride  # beyond the last row, that row
    at_columns = views + tl.minimum(columns, column_stop - 1).to(tl.int64)[:, None] * stride
    x = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, d, BLOCK_D):
        feature = first + tl.arange(0, BLOCK_D)
        a, b = tl.load(at_rows + feature[None, :]), tl.load(at_columns + feature[None, :])
        x = tl.dot(a, tl.trans(b), acc=x)
    left, right = tl.split(tl.permute(tl.reshape(x, (BLOCK, 2, BLOCK // 2)), (0, 2, 1)))
    return left, right


@triton.jit
def logits_of(
    x, row_scale, key_scale, row, row_stop, column, column_stop, half, BLOCK: tl.constexpr
):  # fmt: skip
    """Products (BLOCK, BLOCK / 2) to logits, -inf for no pair.

    No pair are places beyond the ends, a row and itself, and the two rows of one image, which are ``half`` apart.
    """
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK // 2)
    in_rows, in_columns = rows < row_stop, columns < column_stop
    x = x * tl.load(row_scale + rows, mask=in_rows, other=0.0)[:, None]
    x = x * tl.load(key_scale + columns, mask=in_columns, other=0.0)[None, :]
    ahead = row - column
    some_left_out = (tl.abs(ahead) < BLOCK) | (tl.abs(tl.abs(ahead) - half) < BLOCK)
    if some_left_out | (row + BLOCK > row_stop) | (column + BLOCK // 2 > column_stop):
        apart = rows[:, None] - columns[None, :]
        keep = in_rows[:, None] & in_columns[None, :] & (apart != 0) & (apart != half) & (apart != -half)
        x = tl.where(keep, x, float("-inf"))
    return x


@triton.jit
def largest_logit(temperature, temperature_tensor):
    """log2(e) / t, which no logit of unit rows passes."""
    t = temperature
    if temperature_tensor is not None:
        t = tl.load(temperature_tensor).to(tl.float32)
    return LOG2E / t


@triton.jit
def is_bounded(temperature_tensor, ratio):
    """Whether 2 ** (logit - largest logit) stays in float32, for a learned temperature, which the host cannot tell."""
    t = tl.load(temperature_tensor).to(tl.float32)
    enough = t >= LEAST
    if ratio is not None:
        enough = enough & (t >= LEAST * tl.load(ratio))
    return enough


@triton.jit
def store_statistics(
    parts, plane, at, inside, maximum, weight, lower, ratio, AXIS: tl.constexpr, WEIGH: tl.constexpr
):  # fmt: skip
    """What half a tile adds to the states of its rows (AXIS = 1) or columns (AXIS = 0)."""
    tl.store(parts + PART_MAXIMUM * plane + at, maximum, mask=inside)
    tl.store(parts + PART_TOTAL * plane + at, tl.sum(weight, AXIS), mask=inside)
    if WEIGH:
        weighted = tl.sum(weight * tl.maximum(lower, -2000.0), AXIS)  # where weight is 0, and 0 * -inf is NaN
        tl.store(parts + PART_WEIGHTED * plane + at, weighted, mask=inside)
    if ratio is not None:
        inter = tl.sum(tl.exp2(lower * tl.load(ratio)), AXIS)
        tl.store(parts + PART_INTER * plane + at, inter, mask=inside)


@triton.jit
def statistics_kernel(
    views, stride, row_scale, key_scale, of_rows, rows_plane, of_columns, columns_plane,
    temperature, temperature_tensor, ratio, row_start, row_stop, column_start, column_stop, half, d,
    TRIANGLE: tl.constexpr, WEIGH: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile's share of the states: ``of_rows`` (planes, halves of tiles, rows), ``of_columns`` (planes, tiles,
    columns).

    TRIANGLE: rows and columns are the same ones, and a tile on one side of the diagonal serves both. BOUNDED: no
    maximum is sought, and one power of two serves both roles. A learned temperature has both forms launched, and one
    of them returns at once.
    """
    if temperature_tensor is not None:  # noqa: SIM102 - Triton evaluates both sides of an "and"
        if is_bounded(temperature_tensor, ratio) != BOUNDED:
            return
    i, j = tl.program_id(0), tl.program_id(1)
    row, column = row_start + i * BLOCK, column_start + j * BLOCK
    rows, columns = row_stop - row_start, column_stop - column_start
    place, beside = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK // 2)
    if TRIANGLE and column < row:  # the tile that is this one turned around has done this one's work
        return
    left, right = multiplied(views, stride, row, row_stop, column, column_stop, d, BLOCK, BLOCK_D)
    highest = largest_logit(temperature, temperature_tensor)
    for right_half in tl.static_range(2):
        at_rows = (2 * j + right_half).to(tl.int64) * rows + place
        at_columns = i.to(tl.int64) * columns + beside + right_half * (BLOCK // 2)
        in_rows, in_columns = place < rows, beside + right_half * (BLOCK // 2) < columns
        if TRIANGLE:  # on the diagonal the columns are the rows
            in_columns = in_columns & (column != row)
        x = logits_of(
            right if right_half else left, row_scale, key_scale, row, row_stop, column + right_half * (BLOCK // 2),
            column_stop, half, BLOCK,
        )  # fmt: skip
        if BOUNDED:
            lower = x - highest
            weight = tl.exp2(lower)
            store_statistics(of_rows, rows_plane, at_rows, in_rows, highest, weight, lower, ratio, 1, WEIGH)
            store_statistics(of_columns, columns_plane, at_columns, in_columns, highest, weight, lower, ratio, 0, WEIGH)
        else:
            maximum = tl.maximum(tl.max(x, 1), MINIMUM)  # NaN is no maximum, and is summed
            lower = x - maximum[:, None]
            store_statistics(of_rows, rows_plane, at_rows, in_rows, maximum, tl.exp2(lower), lower, ratio, 1, WEIGH)
            maximum = tl.maximum(tl.max(x, 0), MINIMUM)
            lower = x - maximum[None, :]
            weight = tl.exp2(lower)
            store_statistics(of_columns, columns_plane, at_columns, in_columns, maximum, weight, lower, ratio, 0, WEIGH)


@triton.jit
def fold_parts_kernel(
    parts, plane, tiles, state, state_stride, ratio, n,
    WEIGH: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The tiles' shares (planes, tiles, n), in a fixed order, into the states of n rows."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < n
    old = tl.load(state + MAXIMUM * state_stride + rows, mask=inside, other=MINIMUM)
    new = old
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        at, there = tile.to(tl.int64)[:, None] * n + rows[None, :], (tile < tiles)[:, None] & inside[None, :]
        new = tl.maximum(new, tl.max(tl.load(parts + PART_MAXIMUM * plane + at, mask=there, other=MINIMUM), 0))
    lower = old - new
    shrink = tl.exp2(lower)
    total = tl.load(state + TOTAL * state_stride + rows, mask=inside, other=0.0)
    weighted, inter = shrink, shrink
    if WEIGH:
        weighted = (tl.load(state + WEIGHTED * state_stride + rows, mask=inside, other=0.0) + lower * total) * shrink
    if ratio is not None:
        to_inter = tl.load(ratio)
        inter = tl.load(state + INTER_TOTAL * state_stride + rows, mask=inside, other=0.0) * tl.exp2(lower * to_inter)
    total = total * shrink
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        at, there = tile.to(tl.int64)[:, None] * n + rows[None, :], (tile < tiles)[:, None] & inside[None, :]
        maximum = tl.load(parts + PART_MAXIMUM * plane + at, mask=there, other=MINIMUM) - new[None, :]
        share = tl.load(parts + PART_TOTAL * plane + at, mask=there, other=0.0)
        weight = tl.exp2(maximum)
        total += tl.sum(share * weight, 0)
        if WEIGH:
            more = tl.load(parts + PART_WEIGHTED * plane + at, mask=there, other=0.0)
            weighted += tl.sum((more + maximum * share) * weight, 0)
        if ratio is not None:
            more = tl.load(parts + PART_INTER * plane + at, mask=there, other=0.0)
            inter += tl.sum(more * tl.exp2(maximum * to_inter), 0)
    tl.store(state + MAXIMUM * state_stride + rows, new, mask=inside)
    tl.store(state + TOTAL * state_stride + rows, total, mask=inside)
    if WEIGH:
        tl.store(state + WEIGHTED * state_stride + rows, weighted, mask=inside)
    if ratio is not None:
        tl.store(state + INTER_TOTAL * state_stride + rows, inter, mask=inside)


@triton.jit
def weights_kernel(
    views, stride, row_scale, key_scale, base, pull, out, out_stride, temperature, temperature_tensor,
    row_start, row_stop, column_start, column_stop, half, d,
    BOUNDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_ij = (pull_i 2 ** (x_ij - base_i) + pull_j 2 ** (x_ij - base_j)) key_scale_i key_scale_j.

    BOUNDED as above.
    """
    if temperature_tensor is not None:  # noqa: SIM102 - Triton evaluates both sides of an "and"
        if is_bounded(temperature_tensor, None) != BOUNDED:
            return
    row, column = row_start + tl.program_id(0) * BLOCK, column_start + tl.program_id(1) * BLOCK
    left, right = multiplied(views, stride, row, row_stop, column, column_stop, d, BLOCK, BLOCK_D)
    highest = largest_logit(temperature, temperature_tensor)
    rows = row + tl.arange(0, BLOCK)
    in_rows = rows < row_stop
    row_base = tl.load(base + rows, mask=in_rows, other=0.0)
    row_length = tl.load(key_scale + rows, mask=in_rows, other=0.0)
    row_pull = tl.load(pull + rows, mask=in_rows, other=0.0) * row_length
    if BOUNDED:
        row_pull *= tl.exp2(highest - row_base)
    for right_half in tl.static_range(2):
        first = column + right_half * (BLOCK // 2)
        columns = first + tl.arange(0, BLOCK // 2)
        in_columns = columns < column_stop
        x = logits_of(
            right if right_half else left, row_scale, key_scale, row, row_stop, first, column_stop, half, BLOCK
        )
        key_base = tl.load(base + columns, mask=in_columns, other=0.0)
        key_length = tl.load(key_scale + columns, mask=in_columns, other=0.0)
        key_pull = tl.load(pull + columns, mask=in_columns, other=0.0) * key_length
        if BOUNDED:
            key_pull *= tl.exp2(highest - key_base)
            weight = row_pull[:, None] * key_length[None, :] + key_pull[None, :] * row_length[:, None]
            weight *= tl.exp2(x - highest)
        else:
            weight = tl.exp2(x - row_base[:, None]) * (row_pull[:, None] * key_length[None, :])
            weight += tl.exp2(x - key_base[None, :]) * (key_pull[None, :] * row_length[:, None])
        at = out + (rows - row_start)[:, None] * out_stride + (columns - column_start)[None, :]
        tl.store(at, weight.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


# ------------------------------------------------------------------------------------------------------------ launches


def steps_of(x):
    """Rows (2M, D) in half precision whose features lie side by side and fill whole steps, with zeros at the end.

    A mask of the loads would make the loops spill.
    """
    missing = -x.shape[1] % BLOCK_D
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    return x if x.stride(1) == 1 else x.contiguous()


def statistics(x, scale, logit_scale, call, state, seek):
    """``x`` is of ``steps_of``, and ``scale`` of ``chunks.Rows``; fills the state of all rows."""
    n = len(x)
    across = call.across
    anchors, first_key = (n // 2, n // 2) if across else (n, 0)
    step = max(BLOCK, PARTS * BLOCK // (3 * 4 * len(USED) * (n - first_key)) // BLOCK * BLOCK)
    for start in range(0, anchors, step):
        stop, column = min(start + step, anchors), first_key if across else start
        rows, columns = stop - start, n - column
        grid = triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK)
        of_rows = torch.empty((len(USED), 2 * grid[1], rows), dtype=torch.float32, device=x.device)
        of_columns = torch.empty((len(USED), grid[0], columns), dtype=torch.float32, device=x.device)
        if not across:  # not every tile is visited
            for parts in (of_rows, of_columns):
                parts[PART_MAXIMUM.value].fill_(_MINIMUM)
                parts[PART_MAXIMUM.value + 1 :].zero_()
        for bounded in _forms(call.temperature, call.inter_temperature, call.learned_temperature):
            launch(
                statistics_kernel, grid,
                *(x, x.stride(0), logit_scale, scale),
                *(of_rows, of_rows.stride(0), of_columns, of_columns.stride(0)),
                *(float(call.temperature), call.learned_temperature, seek.ratio),
                *(start, stop, column, n, n // 2, x.shape[1]),
                TRIANGLE=not across, WEIGH=seek.weighted, BOUNDED=bounded, BLOCK=BLOCK, BLOCK_D=BLOCK_D, **LAUNCH,
            )  # fmt: skip
        _fold_parts(of_rows, state[:, start:stop], seek)
        _fold_parts(of_columns, state[:, column:], seek)


def _fold_parts(parts, state, seek):
    n = parts.shape[2]
    launch(
        fold_parts_kernel, (triton.cdiv(n, 32),),
        parts, parts.stride(0), parts.shape[1], state, state.stride(0), seek.ratio, n,
        WEIGH=seek.weighted, BLOCK_TILES=32, BLOCK_ROWS=32, num_warps=4,
    )  # fmt: skip


def weights(x, scale, logit_scale, call, anchors, some, columns, out):
    """The weights of some rows and columns, ``out`` (R, C), for both of whose roles ``anchors`` has bases and pulls."""
    for bounded in _forms(call.temperature, None, call.learned_temperature):
        launch(
            weights_kernel, (triton.cdiv(out.shape[0], BLOCK), triton.cdiv(out.shape[1], BLOCK)),
            *(x, x.stride(0), logit_scale, scale, anchors.base, anchors.pull, out, out.stride(0)),
            *(float(call.temperature), call.learned_temperature),
            *(some.start, some.stop, columns.start, columns.stop, len(x) // 2, x.shape[1]),
            BOUNDED=bounded, BLOCK=BLOCK, BLOCK_D=BLOCK_D, **LAUNCH,
        )  # fmt: skip


def _forms(temperature, inter_temperature, learned):
    """The kernels' forms to launch: bounded, not so, or both where only the GPU knows the temperature."""
    if learned is not None:
        return (True, False)
    return (min(temperature, inter_temperature or temperature) >= _LEAST,)
