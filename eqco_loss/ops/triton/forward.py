"""The pass over the keys: log-sum-exp and mean key in one, split over the chip, and the splits put together.

A program of ``attend`` visits columns c for its block of rows. Column c is key c, or, in a band, the place
``(own place of the block's first row + 1 + c) % modulus`` of one view, so that the block's row r has the columns
``r <= c < r + width``, and a comparison is needed only near the ends.

Half-precision tiles are multiplied as they are stored, and the product by a factor, 1 / norm, in float32, because a
unit vector rounded to half would cost more exactness than everything else.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, SIM300

import triton
import triton.language as tl

from ..shared_kernels import LOG2E, MINIMUM, add_up, read_temperature
from .ids import alike, may_be_alike
from .parts import (
    CENTRE,
    PART_COUNT,
    PART_INTER_MAXIMUM,
    PART_INTER_TOTAL,
    PART_LOGIT_SUM,
    PART_MAXIMUM,
    PART_RANK,
    PART_TOTAL,
    PIECE_SCALE,
    add_product,
    cut,
    finish,
    finish_logsumexp,
    finite_rows,
    fold,
    inverse_norm,
    kept,
    load_pieces,
    load_rows,
    partners,
    product,
    store_parts,
    store_pieces,
    tie_broken,
    wrapped,
)


@triton.jit(do_not_specialize=["count"])
def prepare_rows(
    x, stride_row, stride_d, out, factor, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, POWER: tl.constexpr, CLEAN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Rows in the dtype of the products, ``out`` (PIECES, count, D), and what their products are to be multiplied by.

    With POWER rows are multiplied by a power of two near 1 / norm, which rounds nothing, where the norm itself might
    not fit float16; else, with NORMALIZE and an ``out``, by 1 / norm. With CLEAN, rows that are not finite become
    zeros, and their factor NaN.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = load_rows(x, rows, stride_row, stride_d, count, D, BLOCK_D, True, True).to(tl.float32)
    finite = finite_rows(values)
    if CLEAN:
        values = tl.where(finite[:, None], values, 0.0)
    left = tl.full([BLOCK], 1.0, tl.float32)
    if NORMALIZE:
        left = inverse_norm(values)
    if out is not None:
        if POWER:
            power = tl.exp2(tl.floor(tl.log2(left)))
            values = values * power[:, None]
            left = left / power
        else:
            values = values * left[:, None]
            left = tl.full([BLOCK], 1.0, tl.float32)
        if PIECES == 2:
            values = values * PIECE_SCALE
        store_pieces(out, rows, count, values, D, BLOCK_D, PIECES)
    if factor is not None:
        if CLEAN:
            left = tl.where(finite, left, float("nan"))
        tl.store(factor + rows, left, mask=rows < count)


# ---------------------------------------------------------------------------------------------------------- shared keys


@triton.jit
def visit(
    maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,  # what has been seen, per row
    q, q_low, q_rest, row_scale, positive_logit, row_ids, rows, row,
    keys, stride_piece, stride_k, stride_d, key_factor, query_ids, key_ids, ids_stride_n, ids_stride_k,
    mask, mask_stride_n, mask_stride_k, marks, first, modulus, width, limit, lo, hi, ratio, n, view,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPARE: tl.constexpr,  # "none", "tail" (columns beyond limit), "ends" (of a band) or "pairs" (any)
    BAND: tl.constexpr, SHORT_BAND: tl.constexpr, IDS: tl.constexpr, MASKED: tl.constexpr,
    FACTOR: tl.constexpr, CLEAN: tl.constexpr,
    BOUNDED: tl.constexpr, LOSS: tl.constexpr, QUERY_GRADIENT: tl.constexpr, METRICS: tl.constexpr,
    PIECES: tl.constexpr, IN_PIECES: tl.constexpr, STAGES: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Columns lo .. hi, by whole tiles. FACTOR: 1 / norm is "none", "loaded" from key_factor, or computed "here".

    IN_PIECES: ``keys`` are PIECES matrices, whose sum the keys are. Where ``marks`` are given, ids
    are compared only in tiles that these mark; ``view`` is the place of the first key among those of all views.
    """
    start = lo
    if BAND:
        start = (first + lo) % modulus
    for c in tl.range(lo, hi, BLOCK_KEYS, num_stages=STAGES):
        column = c + tl.arange(0, BLOCK_KEYS)
        place = column
        if BAND:
            place = wrapped(start + tl.arange(0, BLOCK_KEYS), modulus, SHORT_BAND)
            start = wrapped(start + BLOCK_KEYS, modulus, SHORT_BAND)
        elif COMPARE != "none":  # beyond the last key, that key is loaded again: a mask of the load takes registers
            place = tl.minimum(column, limit - 1)
        if COMPARE == "ends" or marks is not None:
            rare = False  # whether some pair of this tile may have to be left out
            if COMPARE == "ends":
                rare = c < BLOCK_ROWS - 1 or c + BLOCK_KEYS > width
            if marks is not None:
                from_key = c
                if BAND:
                    from_key = (first + c) % modulus
                    rare = rare or from_key + BLOCK_KEYS > modulus
                rare = rare or may_be_alike(
                    marks, n, row, tl.minimum(row + BLOCK_ROWS, n) - 1,
                    view + from_key, view + tl.minimum(from_key + BLOCK_KEYS, limit) - 1,
                    BLOCK_ROWS, BLOCK_KEYS,
                )  # fmt: skip
        k, k_low, k_rest = load_pieces(
            keys, stride_piece, place, stride_k, stride_d, limit, D, BLOCK_D, FAR, PIECES if IN_PIECES else 1
        )
        raw: tl.constexpr = IN_PIECES or (PIECES == 1 and k.dtype == q.dtype)
        if FACTOR == "loaded":
            factor = tl.load(key_factor + place)
        if FACTOR == "here":
            factor = inverse_norm(k)
        if not raw:
            if FACTOR != "none":
                k = k.to(tl.float32) * factor[:, None]
            if PIECES == 1:
                k = k.to(q.dtype)
            if PIECES == 2:
                k = k.to(tl.float32) * PIECE_SCALE
            k, k_low, k_rest = cut(k, PIECES)
        s = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)  # logits once multiplied by row_scale
        s = product(q, q_low, q_rest, tl.trans(k), tl.trans(k_low), tl.trans(k_rest), s, False, PIECES)
        if raw and FACTOR != "none":
            s = s * factor[None, :]
        if COMPARE == "tail":
            s = tl.where((column < limit)[None, :], s, float("-inf"))
        if COMPARE == "pairs":
            keep = (column < limit)[None, :] & (rows >= 0)[:, None]
            if BAND:
                ahead = column[None, :] - tl.arange(0, BLOCK_ROWS)[:, None]
                keep = (ahead >= 0) & (ahead < width)
            keep = kept(
                keep, rows.to(tl.int64)[:, None], place.to(tl.int64)[None, :], row_ids[:, None],
                key_ids, ids_stride_n, ids_stride_k, mask, mask_stride_n, mask_stride_k,
                (rows < n)[:, None], (place >= 0)[None, :], IDS, MASKED,
            )  # fmt: skip
            s = tl.where(keep, s, float("-inf"))
            count += tl.sum(tl.where(s == float("-inf"), 0.0, 1.0), 1)  # counted in s, whose layout keep has not
        if (COMPARE == "ends" or marks is not None) and rare:
            if COMPARE == "ends":
                ahead = column[None, :] - tl.arange(0, BLOCK_ROWS)[:, None]
                s = tl.where((ahead >= 0) & (ahead < width), s, float("-inf"))
            if marks is not None:
                gone = alike(query_ids, tl.minimum(rows, n - 1), key_ids, place.to(tl.int64) * ids_stride_k)
                count -= tl.sum((gone & (s != float("-inf"))).to(tl.int32), 1).to(tl.float32)
                s = tl.where(gone, float("-inf"), s)
        if METRICS:
            logits = s * row_scale[:, None]
            logit_sum += tl.sum(tl.where(logits == float("-inf"), 0.0, logits), 1)
            rank += tl.sum((logits > positive_logit[:, None]).to(tl.float32), 1)
        if LOSS == "dual":
            _, inter_maximum, inter_total, _ = fold(s, row_scale * ratio, inter_maximum, inter_total, BOUNDED)
        x, maximum, total, shrink = fold(s, row_scale, maximum, total, BOUNDED)
        if QUERY_GRADIENT:
            if raw and FACTOR != "none":
                if CLEAN:  # a key that is not finite has a NaN factor, and rows that do not meet it must not
                    factor = tl.where(factor == factor, factor, 0.0)
                x = x * factor[None, :]
            if not BOUNDED:
                mean_key = mean_key * shrink[:, None]
            mean_key = add_product(mean_key, x, k, k_low, k_rest, PIECES)
    if COMPARE == "ends":  # columns r .. r + width - 1 are row r's
        r = tl.arange(0, BLOCK_ROWS)
        count += tl.maximum(tl.minimum(hi, r + width) - tl.maximum(lo, r), 0).to(tl.float32)
    return maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum


@triton.jit(
    do_not_specialize=[
        "n", "half", "k", "offset", "width", "modulus", "per_split", "splits_per_view", "first_split", "splits"
    ]
)  # fmt: skip
def attend(
    query, query_stride_n, query_stride_d, positive, positive_stride_n, positive_stride_d,
    keys, stride_piece, stride_k, stride_d, key_factor, query_ids, key_ids, ids_stride_n, ids_stride_k,
    mask, mask_stride_n, mask_stride_k, marks, key_count, temperature_tensor,
    parts, outs, loss, scratch, query_gradient, positive_gradient, out_rows, metrics,
    n, half, k, offset, width, modulus, per_split, splits_per_view, first_split, splits,
    temperature, inter_t, alpha, share, query_eps, positive_eps,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PIECES: tl.constexpr, IN_PIECES: tl.constexpr, STAGES: tl.constexpr,
    BAND: tl.constexpr, SHORT_BAND: tl.constexpr, IDS: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr, FACTOR: tl.constexpr, CLEAN: tl.constexpr, BOUNDED: tl.constexpr,
    ALPHA: tl.constexpr, LOSS: tl.constexpr, QUERY_GRADIENT: tl.constexpr, METRICS: tl.constexpr,
    FINISH: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """A block of rows against one split of the columns; with FINISH (one split) to the end."""
    t = read_temperature(temperature, temperature_tensor)
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    raw_q = load_rows(query, rows, query_stride_n, query_stride_d, n, D, BLOCK_D, True, True)
    scale = LOG2E / t
    row_scale = tl.full([BLOCK_ROWS], 1.0, tl.float32) * scale
    positive_logit = row_scale
    inverse = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if NORMALIZE:
        inverse = inverse_norm(raw_q)
    if FINISH or METRICS:
        of = partners(rows, half)
        p = load_rows(positive, of, positive_stride_n, positive_stride_d, n, D, BLOCK_D, True, True)
    if METRICS:
        s = tl.sum(raw_q.to(tl.float32) * p.to(tl.float32), 1) * inverse
        if NORMALIZE:
            s = s * inverse_norm(p)
        positive_logit = tie_broken(s * scale)
    SAME: tl.constexpr = raw_q.dtype == DOT
    FLOAT: tl.constexpr = DOT == tl.float32
    if SAME and not FLOAT:  # of the comparisons themselves, Triton 3.3 makes no condition
        q = raw_q
        row_scale = row_scale * inverse
    else:
        q = (raw_q.to(tl.float32) * inverse[:, None]).to(DOT)
    if PIECES == 2:
        q, row_scale = q * PIECE_SCALE, row_scale / (PIECE_SCALE * PIECE_SCALE)
    q, q_low, q_rest = cut(q, PIECES)
    row_ids = rows
    if IDS != 0 and marks is None:
        row_ids = tl.load(query_ids + rows, mask=rows < n, other=0)
    floor: tl.constexpr = CENTRE if BOUNDED else MINIMUM
    maximum, inter_maximum = tl.full([BLOCK_ROWS], floor, tl.float32), tl.full([BLOCK_ROWS], floor, tl.float32)
    total, inter_total = tl.zeros([BLOCK_ROWS], tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    count, rank = tl.zeros([BLOCK_ROWS], tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    logit_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    mean_key = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)

    limit = k
    if key_count is not None:
        limit = tl.minimum(k, tl.load(key_count).to(tl.int32))
    columns, first, view = limit, 0, 0
    if BAND:
        columns = BLOCK_ROWS - 1 + width
        first, view = offset + block * BLOCK_ROWS + 1, split // splits_per_view * modulus
        keys = keys + view.to(tl.int64) * stride_k
        if FACTOR == "loaded":
            key_factor = key_factor + view
        if IDS != 0:
            key_ids = key_ids + view.to(tl.int64) * ids_stride_k
    lo = split % splits_per_view * per_split
    hi = tl.maximum(lo, tl.minimum(lo + per_split, columns))
    ratio = t / inter_t
    PAIRS: tl.constexpr = (IDS != 0 and marks is None) or MASKED != 0
    COMPARE: tl.constexpr = "pairs" if PAIRS else "ends" if BAND else "tail"
    middle = hi
    if COMPARE == "tail":
        middle = hi - hi % BLOCK_KEYS  # lo is whole tiles
    for rest in tl.static_range(2 if COMPARE == "tail" else 1):  # no comparison in the loop that takes the time
        maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum = visit(
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
            q, q_low, q_rest, row_scale, positive_logit, row_ids, rows, block * BLOCK_ROWS,
            keys, stride_piece, stride_k, stride_d, key_factor, query_ids, key_ids, ids_stride_n, ids_stride_k,
            mask, mask_stride_n, mask_stride_k, marks,
            first, modulus, width, limit, middle if rest else lo, hi if rest else middle, ratio, n, view,
            D, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D, "none" if COMPARE == "tail" and not rest else COMPARE, BAND, SHORT_BAND,
            IDS, MASKED, FACTOR, CLEAN, BOUNDED, LOSS, QUERY_GRADIENT, METRICS, PIECES, IN_PIECES,
            1 if rest else STAGES, FAR,
        )  # fmt: skip
    if COMPARE == "tail":
        count += hi - lo
    if PIECES == 2:
        mean_key = mean_key / PIECE_SCALE
    if FINISH:
        losses = finish(
            raw_q, p, rows,
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
            query_gradient, positive_gradient, out_rows, metrics,
            n, t, inter_t, alpha, share, query_eps, positive_eps, D, BLOCK_D, NORMALIZE, ALPHA, LOSS,
        )  # fmt: skip
        tl.store(loss + rows, losses, mask=rows < n)
    else:
        if scratch is not None:  # for the count of combine's programs
            tl.store(scratch, 0.0)
        store_parts(
            parts, outs, first_split + split, splits, rows, n,
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum, D, BLOCK_D, LOSS, METRICS,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- the splits together


@triton.jit
def load_part(parts, plane: tl.constexpr, split, splits, rows, n, other):
    """Some splits of a plane of ``parts``, (S, R)."""
    at = parts + (plane * splits.to(tl.int64) + split.to(tl.int64)[:, None]) * n + rows[None, :]
    return tl.load(at, mask=(split < splits)[:, None] & (rows < n)[None, :], other=other)


@triton.jit
def load_one(parts, plane: tl.constexpr, one: tl.constexpr, splits, rows, n, other):
    """One split of a plane of ``parts``, (R,); ``other`` where there is no such split."""
    at = parts + (plane * splits.to(tl.int64) + one) * n + rows
    return tl.load(at, mask=rows < tl.where(one < splits, n, 0), other=other)


@triton.jit
def load_outs(outs, split, splits, rows, n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Some splits of ``outs``, (S, R, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)
    at = outs + (split.to(tl.int64)[:, None, None] * n + rows[None, :, None]) * D + d[None, None, :]
    inside = (split < splits)[:, None, None] & (rows < n)[None, :, None] & (d < D)[None, None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["n", "half", "splits"])
def combine(
    query, query_stride_n, query_stride_d, positive, positive_stride_n, positive_stride_d, temperature_tensor,
    parts, outs, loss, scratch, query_gradient, positive_gradient, out_rows, metrics,
    n, half, splits, temperature, inter_t, alpha, share, query_eps, positive_eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr, FEW: tl.constexpr, NORMALIZE: tl.constexpr, ALPHA: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """Some rows: their splits in a fixed order, then loss and gradients; without a LOSS, log-sum-exp and mean key.

    What can be is loaded before the first sum, which threads wait for.
    """
    t = read_temperature(temperature, temperature_tensor)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    q = load_rows(query, rows, query_stride_n, query_stride_d, n, D, BLOCK_D, True, True)
    p = q
    if LOSS != "none":
        of = partners(rows, half)
        p = load_rows(positive, of, positive_stride_n, positive_stride_d, n, D, BLOCK_D, True, True)
    zero = tl.zeros([BLOCK_ROWS], tl.float32)
    inter_maximum, inter_total, rank, logit_sum, total, count = zero, zero, zero, zero, zero, zero
    mean_key = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    if FEW:  # one after the other, so that each thread has all that it needs
        maximum = zero + MINIMUM
        inter_maximum = maximum
        for one in tl.static_range(BLOCK_SPLITS):  # one with nothing in it has MINIMUM
            maximum = tl.maximum(maximum, load_one(parts, PART_MAXIMUM, one, splits, rows, n, MINIMUM))
            if LOSS == "dual":
                inter = load_one(parts, PART_INTER_MAXIMUM, one, splits, rows, n, MINIMUM)
                inter_maximum = tl.maximum(inter_maximum, inter)
        for one in tl.static_range(BLOCK_SPLITS):
            weight = tl.exp2(load_one(parts, PART_MAXIMUM, one, splits, rows, n, MINIMUM) - maximum)
            total += load_one(parts, PART_TOTAL, one, splits, rows, n, 0.0) * weight
            count += load_one(parts, PART_COUNT, one, splits, rows, n, 0.0)
            if LOSS == "dual":
                inter = load_one(parts, PART_INTER_MAXIMUM, one, splits, rows, n, MINIMUM)
                inter_total += load_one(parts, PART_INTER_TOTAL, one, splits, rows, n, 0.0) * tl.exp2(
                    inter - inter_maximum
                )
            if metrics is not None:
                rank += load_one(parts, PART_RANK, one, splits, rows, n, 0.0)
                logit_sum += load_one(parts, PART_LOGIT_SUM, one, splits, rows, n, 0.0)
            if outs is not None:
                place = tl.where(one < splits, rows, n)
                out = outs + tl.cast(one, tl.int64) * n * D
                mean_key += load_rows(out, place, D, 1, n, D, BLOCK_D, True, True) * weight[:, None]
    else:
        split, some = tl.arange(0, BLOCK_SPLITS), tl.arange(0, AT_ONCE)
        maxima = load_part(parts, PART_MAXIMUM, split, splits, rows, n, MINIMUM)
        totals = load_part(parts, PART_TOTAL, split, splits, rows, n, 0.0)
        counts = load_part(parts, PART_COUNT, split, splits, rows, n, 0.0)
        if outs is not None:
            out = load_outs(outs, some, splits, rows, n, D, BLOCK_D)
            out_maxima = load_part(parts, PART_MAXIMUM, some, splits, rows, n, MINIMUM)
        if LOSS == "dual":
            inter_maxima = load_part(parts, PART_INTER_MAXIMUM, split, splits, rows, n, MINIMUM)
            inter_totals = load_part(parts, PART_INTER_TOTAL, split, splits, rows, n, 0.0)
            inter_maximum = tl.max(inter_maxima, 0)
            inter_total = tl.sum(inter_totals * tl.exp2(inter_maxima - inter_maximum[None, :]), 0)
        if metrics is not None:
            rank = tl.sum(load_part(parts, PART_RANK, split, splits, rows, n, 0.0), 0)
            logit_sum = tl.sum(load_part(parts, PART_LOGIT_SUM, split, splits, rows, n, 0.0), 0)
        maximum = tl.max(maxima, 0)
        total = tl.sum(totals * tl.exp2(maxima - maximum[None, :]), 0)
        count = tl.sum(counts, 0)
        if outs is not None:
            mean_key = tl.sum(out * tl.exp2(out_maxima - maximum[None, :])[:, :, None], 0)
            for start in range(AT_ONCE, splits, AT_ONCE):
                out = load_outs(outs, start + some, splits, rows, n, D, BLOCK_D)
                out_maxima = load_part(parts, PART_MAXIMUM, start + some, splits, rows, n, MINIMUM)
                mean_key += tl.sum(out * tl.exp2(out_maxima - maximum[None, :])[:, :, None], 0)
    if LOSS != "none":
        losses = finish(
            q, p, rows,
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
            query_gradient, positive_gradient, out_rows, metrics,
            n, t, inter_t, alpha, share, query_eps, positive_eps, D, BLOCK_D, NORMALIZE, ALPHA, LOSS,
        )  # fmt: skip
        if scratch is None:
            tl.store(loss + rows, losses, mask=rows < n)
        else:
            add_up(tl.sum(tl.where(rows < n, losses, 0.0), 0), scratch, loss)
    else:
        finish_logsumexp(rows, maximum, total, mean_key, loss, query_gradient, out_rows, n, t, D, BLOCK_D)
