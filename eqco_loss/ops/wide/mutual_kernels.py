"""Products of two views' rows that are never stored: each tile ends in what its rows and its keys need of it.

Every row is an anchor and a key. ``statistics_kernel`` makes of a tile the statistics that each of its rows needs and,
in their role as anchors, each of its keys, and ``view_weights_kernel`` writes the numbers that the gradient's two
products are made of, in half precision. Between them the similarities are multiplied a second time, which costs less
than to write and read them. A logit is a product times the scales of its two rows, which without ``scale`` are unit
ones.

FORM says how powers of two stay in float32. BOUNDED: no logit of unit rows passes log2(e) / t, which is little enough
to stand for the maximum of all of them, and one power of two serves both roles. FOLLOWED: a maximum is sought. EITHER:
a learned temperature decides, which the host does not know.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from ..shared_kernels import LOG2E, MINIMUM, ROW_BASE, ROW_BOUNDED_PULL, ROW_PULL, read_temperature

_LEAST = 0.05  # temperature whose logits of unit rows, at most 29 in base 2, need no maximum
LEAST = tl.constexpr(_LEAST)
PART_TOTAL, PART_MAXIMUM, PART_WEIGHTED, PART_INTER = (tl.constexpr(place) for place in range(4))  # planes of parts
_FOLLOWED, _BOUNDED, _EITHER = range(3)
FOLLOWED, BOUNDED, EITHER = tl.constexpr(_FOLLOWED), tl.constexpr(_BOUNDED), tl.constexpr(_EITHER)


@triton.jit
def tile_of(program, tiles_of_rows, tiles_of_keys, GROUP: tl.constexpr):
    """Which tile a program has: GROUP rows of tiles, then the next ones, so that programs which run at the same time
    meet few rows and few keys, which the L2 holds.
    """
    first = program // (GROUP * tiles_of_keys) * GROUP
    size = tl.minimum(tiles_of_rows - first, GROUP)
    within = program % (GROUP * tiles_of_keys)
    return first + within % size, within // size


@triton.jit
def multiplied(
    views, stride, row, row_stop, key, key_stop, steps,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of the rows from ``row`` on with the keys from ``key`` on, twice (BLOCK_ROWS, BLOCK_KEYS // 2).

    What comes after the products takes numbers for each key, and the registers hold those of half the keys.
    """
    rows, keys = row + tl.arange(0, BLOCK_ROWS), key + tl.arange(0, BLOCK_KEYS)
    at_rows = views + tl.minimum(rows, row_stop - 1).to(tl.int64)[:, None] * stride  # beyond the last row, that row
    at_keys = views + tl.minimum(keys, key_stop - 1).to(tl.int64)[:, None] * stride
    x = tl.zeros((BLOCK_ROWS, BLOCK_KEYS), tl.float32)
    for step in range(0, steps):
        feature = step * BLOCK_D + tl.arange(0, BLOCK_D)
        a = tl.load(at_rows + feature[None, :], cache_modifier=".ca")
        b = tl.load(at_keys + feature[None, :])
        x = tl.dot(a, tl.trans(b), acc=x)
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_ROWS, 2, BLOCK_KEYS // 2)), (0, 2, 1)))


@triton.jit
def lower_than(
    x, highest, scale, row, row_stop, key, key_stop, half, LESS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Products (BLOCK_ROWS, KEYS) to logits, which LESS are less the highest possible one; -inf for no pair.

    No pair are places beyond the ends, a row and itself, and the two rows of one image, which are ``half`` apart. Of
    these the row comes first, as chunks are cut, but on a tile of the diagonal.
    """
    rows, keys = row + tl.arange(0, BLOCK_ROWS), key + tl.arange(0, KEYS)
    in_rows, in_keys = rows < row_stop, keys < key_stop
    if scale is not None:
        x = x * (tl.load(scale + rows, mask=in_rows, other=0.0) * highest)[:, None]
        x = x * tl.load(scale + keys, mask=in_keys, other=0.0)[None, :]
    else:
        x = x * highest
    if LESS:
        x = x - highest
    ahead = row - key
    near = (ahead < KEYS) & (ahead > -BLOCK_ROWS)
    near = near | ((ahead + half < KEYS) & (ahead + half > -BLOCK_ROWS))
    if near | (row + BLOCK_ROWS > row_stop) | (key + KEYS > key_stop):
        apart = rows[:, None] - keys[None, :]
        keep = in_rows[:, None] & in_keys[None, :]
        x = tl.where(keep & (apart != 0) & (apart != half) & (apart != -half), x, float("-inf"))
    return x


@triton.jit
def is_bounded(temperature_tensor, inter_t, DUAL: tl.constexpr):
    """Whether 2 ** (logit - largest logit) stays in float32."""
    bounded = tl.load(temperature_tensor).to(tl.float32) >= LEAST
    if DUAL:
        bounded = bounded & (inter_t >= LEAST)
    return bounded


@triton.jit
def store_statistics(
    parts, plane_size, at, inside, total, maximum, weighted, inter,
    FOLLOW: tl.constexpr, WEIGH: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    tl.store(parts + PART_TOTAL * plane_size + at, total, mask=inside)
    if FOLLOW:
        tl.store(parts + PART_MAXIMUM * plane_size + at, maximum, mask=inside)
    if WEIGH:
        tl.store(parts + PART_WEIGHTED * plane_size + at, weighted, mask=inside)
    if DUAL:
        tl.store(parts + PART_INTER * plane_size + at, inter, mask=inside)


@triton.jit
def statistics_of(
    left, right, highest, to_inter, scale, row, row_stop, key, key_stop, half,
    parts, plane_size, at_rows, key_parts, key_plane_size, at_keys, keys_of_their_own,
    FOLLOW: tl.constexpr, STORE_MAXIMUM: tl.constexpr, WEIGH: tl.constexpr, DUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Both halves of a tile: sums along the keys, which go on from half to half, and along the rows."""
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted, inter = total, total
    maximum = total + (MINIMUM if FOLLOW else highest)
    for right_half in tl.static_range(2):
        first = key + right_half * KEYS
        x = lower_than(
            right if right_half else left, highest, scale, row, row_stop, first, key_stop, half, not FOLLOW,
            BLOCK_ROWS, KEYS,
        )  # fmt: skip
        lower = x
        if FOLLOW:
            new = tl.maximum(maximum, tl.max(x, 1))  # NaN is no maximum, and is summed
            fall = maximum - new
            maximum, lower = new, x - new[:, None]
            if WEIGH:
                weighted = (weighted + fall * total) * tl.exp2(fall)
            if DUAL:
                inter = inter * tl.exp2(fall * to_inter)
            total = total * tl.exp2(fall)
        weight = tl.exp2(lower)
        total += tl.sum(weight, 1)
        if WEIGH:
            weighted += tl.sum(weight * tl.maximum(lower, -2000.0), 1)  # where weight is 0, and 0 * -inf is NaN
        if DUAL:
            inter += tl.sum(tl.exp2(lower * to_inter), 1)
        key_maximum = tl.zeros((KEYS,), tl.float32) + highest
        if FOLLOW:
            key_maximum = tl.maximum(tl.max(x, 0), MINIMUM)
            lower = x - key_maximum[None, :]
            weight = tl.exp2(lower)
        key_total = tl.sum(weight, 0)
        key_weighted, key_inter = key_total, key_total
        if WEIGH:
            key_weighted = tl.sum(weight * tl.maximum(lower, -2000.0), 0)
        if DUAL:
            key_inter = tl.sum(tl.exp2(lower * to_inter), 0)
        beside = right_half * KEYS + tl.arange(0, KEYS)
        store_statistics(
            key_parts, key_plane_size, at_keys + beside, keys_of_their_own & (key + beside < key_stop), key_total,
            key_maximum, key_weighted, key_inter, STORE_MAXIMUM, WEIGH, DUAL,
        )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_ROWS)
    store_statistics(
        parts, plane_size, at_rows + tl.arange(0, BLOCK_ROWS), rows < row_stop, total, maximum, weighted, inter,
        STORE_MAXIMUM, WEIGH, DUAL,
    )  # fmt: skip


@triton.jit
def statistics_kernel(
    views, stride, scale, parts, of_keys, temperature, temperature_tensor, inter_t,
    row_start, row_stop, key_start, key_stop, apart, half, steps,
    TRIANGLE: tl.constexpr, FORM: tl.constexpr, WEIGH: tl.constexpr, DUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile's part of its rows' and its keys' statistics.

    ``parts`` is (planes, tiles of keys, rows), and from ``of_keys`` on (planes, tiles of rows, keys from ``apart`` on).
    TRIANGLE: the first keys are the rows, and a tile on one side of the diagonal serves both sides; its keys before
    ``apart`` have their parts among those of the rows, at the place of the tile that is not visited.
    """
    tiles_of_rows = tl.cdiv(row_stop - row_start, BLOCK_ROWS)
    tiles_of_keys = tl.cdiv(key_stop - key_start, BLOCK_KEYS)
    i, j = tile_of(tl.program_id(0), tiles_of_rows, tiles_of_keys, GROUP)
    row, key = row_start + i * BLOCK_ROWS, key_start + j * BLOCK_KEYS
    if TRIANGLE:  # noqa: SIM102  # which is known when the kernel is compiled
        if key < row:  # the tile that is this one turned around
            return  # has done this one's work
    rows, keys = row_stop - row_start, key_stop - apart
    plane_size = rows * tiles_of_keys
    at_rows = j * rows + i * BLOCK_ROWS
    key_plane_size, key_parts, at_keys = keys * tiles_of_rows, parts + of_keys, i * keys + key - apart
    keys_of_their_own = key < key_stop
    if TRIANGLE:
        keys_of_their_own = key != row
        if key < apart:
            key_plane_size, key_parts, at_keys = plane_size, parts, i * rows + key - row_start
    left, right = multiplied(views, stride, row, row_stop, key, key_stop, steps, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D)
    highest = LOG2E / read_temperature(temperature, temperature_tensor)  # which no logit of unit rows passes
    to_inter = LOG2E / highest / inter_t
    follow: tl.constexpr = FORM == FOLLOWED
    follows = follow
    if FORM == EITHER:
        follows = not is_bounded(temperature_tensor, inter_t, DUAL)
    if follows:
        statistics_of(
            left, right, highest, to_inter, scale, row, row_stop, key, key_stop, half,
            parts, plane_size, at_rows, key_parts, key_plane_size, at_keys, keys_of_their_own,
            True, True, WEIGH, DUAL, BLOCK_ROWS, BLOCK_KEYS // 2,
        )  # fmt: skip
    else:
        statistics_of(
            left, right, highest, to_inter, scale, row, row_stop, key, key_stop, half,
            parts, plane_size, at_rows, key_parts, key_plane_size, at_keys, keys_of_their_own,
            False, FORM == EITHER, WEIGH, DUAL, BLOCK_ROWS, BLOCK_KEYS // 2,
        )  # fmt: skip


@triton.jit
def store_weights(
    left, right, highest, scale, base, pull, row, row_stop, key, key_stop, half, factor, at_rows, FOLLOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Both halves of a tile, to ``at_rows`` (BLOCK_ROWS, 1), where the first key's weights lie."""
    rows = row + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < row_stop
    if FOLLOW:
        row_base = tl.load(base + rows, mask=in_rows, other=0.0)
    row_pull = tl.load(pull + rows, mask=in_rows, other=0.0) * factor
    row_length = row_pull * 0.0
    if scale is not None:
        row_length = tl.load(scale + rows, mask=in_rows, other=0.0)
        row_pull *= row_length
    for right_half in tl.static_range(2):
        first = key + right_half * KEYS
        keys = first + tl.arange(0, KEYS)
        in_keys = keys < key_stop
        x = lower_than(
            right if right_half else left, highest, scale, row, row_stop, first, key_stop, half, not FOLLOW,
            BLOCK_ROWS, KEYS,
        )  # fmt: skip
        key_pull = tl.load(pull + keys, mask=in_keys, other=0.0) * factor
        if scale is not None:
            key_length = tl.load(scale + keys, mask=in_keys, other=0.0)
            key_pull *= key_length
            of_row, of_key = row_pull[:, None] * key_length[None, :], row_length[:, None] * key_pull[None, :]
        else:
            of_row, of_key = row_pull[:, None], key_pull[None, :]
        if FOLLOW:
            key_base = tl.load(base + keys, mask=in_keys, other=0.0)
            weight = tl.exp2(x - row_base[:, None]) * of_row + tl.exp2(x - key_base[None, :]) * of_key
        else:
            weight = tl.exp2(x) * (of_row + of_key)
        at = at_rows + (keys - key)[None, :]
        tl.store(at, weight.to(at.dtype.element_ty), mask=in_rows[:, None] & in_keys[None, :])


@triton.jit
def view_weights_kernel(
    views, stride, scale, rows, plane_size, grad, out, out_stride, temperature, temperature_tensor,
    row_start, row_stop, key_start, key_stop, half, steps,
    FORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out_ij = (pull_i 2 ** (x_ij - base_i) + pull_j 2 ** (x_ij - base_j)) scale_i scale_j.

    Bases and pulls are those of ``rows`` (len(Row), 2M), these times ``grad``.
    """
    tiles_of_rows = tl.cdiv(row_stop - row_start, BLOCK_ROWS)
    tiles_of_keys = tl.cdiv(key_stop - key_start, BLOCK_KEYS)
    i, j = tile_of(tl.program_id(0), tiles_of_rows, tiles_of_keys, GROUP)
    row, key = row_start + i * BLOCK_ROWS, key_start + j * BLOCK_KEYS
    left, right = multiplied(views, stride, row, row_stop, key, key_stop, steps, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D)
    highest = LOG2E / read_temperature(temperature, temperature_tensor)  # which no logit of unit rows passes
    factor = tl.load(grad).to(tl.float32)
    places = i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at_rows = out + places[:, None] * out_stride + j * BLOCK_KEYS  # aligned, whatever the first key is
    follow: tl.constexpr = FORM == FOLLOWED
    follows = follow
    if FORM == EITHER:
        follows = not is_bounded(temperature_tensor, 1.0, False)
    if follows:
        store_weights(
            left, right, highest, scale, rows + ROW_BASE * plane_size, rows + ROW_PULL * plane_size,
            row, row_stop, key, key_stop, half, factor, at_rows, True, BLOCK_ROWS, BLOCK_KEYS // 2,
        )  # fmt: skip
    else:
        store_weights(
            left, right, highest, scale, None, rows + ROW_BOUNDED_PULL * plane_size,
            row, row_stop, key, key_stop, half, factor, at_rows, False, BLOCK_ROWS, BLOCK_KEYS // 2,
        )  # fmt: skip
