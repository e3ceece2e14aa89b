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

from .kernels import INTER_TOTAL, MAXIMUM, TOTAL, WEIGHTED
from .pointwise import MINIMUM as _MINIMUM
from .pointwise import Plane

MINIMUM = tl.constexpr(_MINIMUM)
BLOCK, BLOCK_D = 128, 64  # rows and columns of a tile, and features of a step
LAUNCH = {"num_warps": 8, "num_stages": 3}
PARTS = 2**24  # bytes that the tiles' statistics may take
USED = tuple(int(plane) for plane in (Plane.MAXIMUM, Plane.TOTAL, Plane.INTER_TOTAL, Plane.WEIGHTED))  # of them
PART_MAXIMUM, PART_TOTAL, PART_INTER, PART_WEIGHTED = (tl.constexpr(place) for place in range(len(USED)))


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def tile_of_logits(
    views, stride, row_scale, key_scale, row, row_stop, column, column_stop, half, d,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Logits (BLOCK, BLOCK) of the rows from ``row`` on and the columns from ``column`` on, -inf for no pair.

    No pair are places beyond the ends, a row and itself, and the two rows of one image, which are ``half`` apart.
    """
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    at_rows = views + tl.minimum(rows, row_stop - 1).to(tl.int64)[:, None] * stride  # beyond the last row, that row
    at_columns = views + tl.minimum(columns, column_stop - 1).to(tl.int64)[:, None] * stride
    x = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, d, BLOCK_D):
        feature = first + tl.arange(0, BLOCK_D)
        if EVEN:
            a, b = tl.load(at_rows + feature[None, :]), tl.load(at_columns + feature[None, :])
        else:
            inside = (feature < d)[None, :]
            a = tl.load(at_rows + feature[None, :], mask=inside, other=0.0)
            b = tl.load(at_columns + feature[None, :], mask=inside, other=0.0)
        x = tl.dot(a, tl.trans(b), acc=x)
    in_rows, in_columns = rows < row_stop, columns < column_stop
    x = x * tl.load(row_scale + rows, mask=in_rows, other=0.0)[:, None]
    x = x * tl.load(key_scale + columns, mask=in_columns, other=0.0)[None, :]
    apart = rows[:, None] - columns[None, :]
    keep = in_rows[:, None] & in_columns[None, :] & (apart != 0) & (apart != half) & (apart != -half)
    return tl.where(keep, x, float("-inf"))


@triton.jit
def store_statistics(
    parts, plane, at, inside, x, ratio, AXIS: tl.constexpr, WEIGH: tl.constexpr, EMPTY: tl.constexpr
):  # fmt: skip
    """What one tile adds to the states of its rows (AXIS = 1) or columns (AXIS = 0); EMPTY: nothing."""
    maximum = tl.full(at.shape, MINIMUM, tl.float32)
    total = tl.zeros(at.shape, tl.float32)
    inter, weighted = total, total
    if not EMPTY:
        maximum = tl.maximum(tl.max(x, AXIS), MINIMUM)  # NaN is no maximum, and is summed
        lower = x - tl.expand_dims(maximum, AXIS)
        weight = tl.exp2(lower)
        total = tl.sum(weight, AXIS)
        if WEIGH:
            weighted = tl.sum(weight * tl.maximum(lower, -2000.0), AXIS)  # where weight is 0, and 0 * -inf is NaN
        if ratio is not None:
            inter = tl.sum(tl.exp2(lower * tl.load(ratio)), AXIS)
    tl.store(parts + PART_MAXIMUM * plane + at, maximum, mask=inside)
    tl.store(parts + PART_TOTAL * plane + at, total, mask=inside)
    if ratio is not None:
        tl.store(parts + PART_INTER * plane + at, inter, mask=inside)
    if WEIGH:
        tl.store(parts + PART_WEIGHTED * plane + at, weighted, mask=inside)


@triton.jit
def statistics_kernel(
    views, stride, row_scale, key_scale, of_rows, rows_plane, of_columns, columns_plane, ratio,
    row_start, row_stop, column_start, column_stop, half, d,
    TRIANGLE: tl.constexpr, WEIGH: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile's share of the states: ``of_rows`` (planes, tiles of columns, rows), ``of_columns`` the same turned.

    TRIANGLE: rows and columns are the same ones, and a tile on one side of the diagonal serves both.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    row, column = row_start + i * BLOCK, column_start + j * BLOCK
    place = tl.arange(0, BLOCK)
    rows, columns = row_stop - row_start, column_stop - column_start
    at_rows, at_columns = j.to(tl.int64) * rows + i * BLOCK + place, i.to(tl.int64) * columns + j * BLOCK + place
    in_rows, in_columns = i * BLOCK + place < rows, j * BLOCK + place < columns
    if TRIANGLE and column < row:
        store_statistics(of_rows, rows_plane, at_rows, in_rows, 0.0, ratio, 1, WEIGH, True)
        store_statistics(of_columns, columns_plane, at_columns, in_columns, 0.0, ratio, 0, WEIGH, True)
    else:
        x = tile_of_logits(
            views, stride, row_scale, key_scale, row, row_stop, column, column_stop, half, d, BLOCK, BLOCK_D, EVEN
        )
        store_statistics(of_rows, rows_plane, at_rows, in_rows, x, ratio, 1, WEIGH, False)
        if TRIANGLE and column == row:
            store_statistics(of_columns, columns_plane, at_columns, in_columns, x, ratio, 0, WEIGH, True)
        else:
            store_statistics(of_columns, columns_plane, at_columns, in_columns, x, ratio, 0, WEIGH, False)


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
    views, stride, row_scale, key_scale, base, pull, row_factor, out, out_stride,
    row_start, row_stop, column_start, column_stop, half, d,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out_ij = (pull_i 2 ** (x_ij - base_i) + pull_j 2 ** (x_ij - base_j)) row_factor_i key_scale_j."""
    row, column = row_start + tl.program_id(0) * BLOCK, column_start + tl.program_id(1) * BLOCK
    x = tile_of_logits(
        views, stride, row_scale, key_scale, row, row_stop, column, column_stop, half, d, BLOCK, BLOCK_D, EVEN
    )
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    in_rows, in_columns = rows < row_stop, columns < column_stop
    weight = tl.exp2(x - tl.load(base + rows, mask=in_rows, other=0.0)[:, None])
    weight *= tl.load(pull + rows, mask=in_rows, other=0.0)[:, None]
    of_key = tl.exp2(x - tl.load(base + columns, mask=in_columns, other=0.0)[None, :])
    weight += of_key * tl.load(pull + columns, mask=in_columns, other=0.0)[None, :]
    weight *= tl.load(row_factor + rows, mask=in_rows, other=0.0)[:, None]
    weight *= tl.load(key_scale + columns, mask=in_columns, other=0.0)[None, :]
    at = out + (rows - row_start).to(tl.int64)[:, None] * out_stride + (columns - column_start)[None, :]
    tl.store(at, weight.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


# ------------------------------------------------------------------------------------------------------------ launches


def statistics(views, logit_scale, state, seek, across):
    """``views`` are ``chunks.Rows`` (2M, D) in half precision; fills the state of all rows."""
    x, n = _rows(views.multiplied), len(views.multiplied)
    anchors, first_key = (n // 2, n // 2) if across else (n, 0)
    step = max(BLOCK, PARTS * BLOCK // (2 * 4 * len(USED) * (n - first_key)) // BLOCK * BLOCK)
    for start in range(0, anchors, step):
        stop, column = min(start + step, anchors), first_key if across else start
        rows, columns = stop - start, n - column
        grid = triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK)
        of_rows = torch.empty((len(USED), grid[1], rows), dtype=torch.float32, device=x.device)
        of_columns = torch.empty((len(USED), grid[0], columns), dtype=torch.float32, device=x.device)
        statistics_kernel[grid](
            x, x.stride(0), logit_scale, views.scale, of_rows, of_rows.stride(0), of_columns, of_columns.stride(0),
            seek.ratio, start, stop, column, n, n // 2, x.shape[1],
            TRIANGLE=not across, WEIGH=seek.weighted, **_tile(x), **LAUNCH,
        )  # fmt: skip
        _fold_parts(of_rows, state[:, start:stop], seek)
        _fold_parts(of_columns, state[:, column:], seek)


def _fold_parts(parts, state, seek):
    n = parts.shape[2]
    fold_parts_kernel[(triton.cdiv(n, 32),)](
        parts, parts.stride(0), parts.shape[1], state, state.stride(0), seek.ratio, n,
        WEIGH=seek.weighted, BLOCK_TILES=32, BLOCK_ROWS=32, num_warps=4,
    )  # fmt: skip


def weights(views, logit_scale, anchors, some, columns, out):
    """The weights of some rows and columns, ``out`` (R, C), for both of whose roles ``anchors`` has bases and pulls."""
    x = _rows(views.multiplied)
    weights_kernel[(triton.cdiv(out.shape[0], BLOCK), triton.cdiv(out.shape[1], BLOCK))](
        x, x.stride(0), logit_scale, views.scale, anchors.base, anchors.pull, views.scale, out, out.stride(0),
        some.start, some.stop, columns.start, columns.stop, len(x) // 2, x.shape[1],
        **_tile(x), **LAUNCH,
    )  # fmt: skip


def _rows(x):
    """With features that lie side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(x):
    return {"BLOCK": BLOCK, "BLOCK_D": BLOCK_D, "EVEN": x.shape[1] % BLOCK_D == 0}
