"""The kernels. Logits are in base 2; sums and statistics are float32; nothing of size N x K is written.

Columns. A program of ``attend`` visits columns c of its block of rows: column c is key c, or, in a band, place
``(own place of the block's first row + 1 + c) % modulus`` of one view, so that the block's row r has the columns
``r <= c < r + width``: a mask is needed only near the ends. ``keys_gradient`` is the same seen from the keys.

Norms. Half tiles are multiplied raw, and the product by 1 / norm in float32: rounding a unit vector to half would cost
more than everything else.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, SIM300

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CENTRE = tl.constexpr(-1.0)  # the fixed maximum of unit rows' logits: half of what float16 holds is on either side
MINIMUM = tl.constexpr(-1e30)  # where a running maximum starts: -inf would make inf - inf on a tile with nothing in it


# ------------------------------------------------------------------------------------------------------- small pieces


@triton.jit
def load_rows(
    x, rows, stride_row, stride_d, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of x, (R, BLOCK_D), zeros beyond D and, if MASKED, from ``limit`` on. WIDE: offsets need 64 bits."""
    d = tl.arange(0, BLOCK_D)
    if WIDE:
        at = x + rows.to(tl.int64)[:, None] * stride_row + d.to(tl.int64)[None, :] * stride_d
    else:
        at = x + rows.to(tl.int32)[:, None] * stride_row + d[None, :] * stride_d
    if MASKED:
        return tl.load(at, mask=(rows < limit)[:, None] & (d < D)[None, :], other=0.0)
    elif D != BLOCK_D:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def inverse_norm(x, eps):
    """1 / length of each row of x (R, D), float32."""
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), eps, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def logsumexp(maximum, total):
    """In base e; NaN where nothing was added."""
    return tl.where(total == 0.0, float("nan"), (maximum + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2)


@triton.jit
def softplus(x):
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def softplus_over_sigmoid(x):
    """softplus(-x) / sigmoid(-x) without the overflow of either."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    ratio = tl.where(u == 1.0, 1.0, tl.log(u) / tl.where(u == 1.0, 1.0, u - 1.0))  # log1p(e) / e
    return tl.where(x < 0, (tl.maximum(-x, 0.0) + ratio * e) * u, tl.where(u == 1.0, 1.0 + 0.5 * e, ratio * u))


@triton.jit
def store_row_stat(stats, which: tl.constexpr, rows, n, value):
    tl.store(stats + which * n.to(tl.int64) + rows, value, mask=rows < n)


@triton.jit
def finish(
    q,  # (R, BLOCK_D) float32, raw
    rows,  # (R,)
    positive,
    positive_stride_n,
    positive_stride_d,
    maximum,
    total,
    mean_key,  # (R, BLOCK_D): sum of exponentials times keys
    inter_maximum,
    inter_total,
    count,
    rank,
    logit_sum,
    loss,
    query_gradient,
    positive_gradient,
    stats,
    n,
    t,
    inter_t,
    alpha,
    share,
    query_eps,
    positive_eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALPHA: tl.constexpr,
    DUAL: tl.constexpr,
    QUERY_GRADIENT: tl.constexpr,
    POSITIVE_GRADIENT: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """From what the pass saw of some rows to their losses, unit gradients and statistics."""
    p = load_rows(positive, rows, positive_stride_n, positive_stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
    q_inverse = tl.full(rows.shape, 1.0, tl.float32)
    p_inverse = q_inverse
    if NORMALIZE:
        q_inverse, p_inverse = inverse_norm(q, query_eps), inverse_norm(p, positive_eps)
        q, p = q * q_inverse[:, None], p * p_inverse[:, None]
    s = tl.sum(q * p, 1)
    lse = logsumexp(maximum, total)
    zero = tl.zeros(rows.shape, tl.float32)
    shift = zero
    if ALPHA:
        shift = tl.log(alpha / tl.maximum(count, 1.0))
    gap = s / t - lse - shift
    intra_loss = softplus(-gap)
    weight, log_weight, row_loss = sigmoid(-gap), zero, intra_loss
    if DUAL:
        inter_lse = logsumexp(inter_maximum, inter_total)
        inter_gap = s / inter_t - inter_lse - shift
        weight = sigmoid(-inter_gap)  # = W * sigmoid(-gap): the vanishing factor cancels
        log_weight = softplus(gap) - softplus(inter_gap)
        row_loss = weight * softplus_over_sigmoid(gap)
    valid = rows < n
    tl.store(loss + rows, row_loss * share, mask=valid)
    store_row_stat(stats, 0, rows, n, lse)
    store_row_stat(stats, 1, rows, n, weight)
    store_row_stat(stats, 2, rows, n, s)
    store_row_stat(stats, 3, rows, n, count)
    store_row_stat(stats, 4, rows, n, log_weight)
    temperature_gradient = zero
    d = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * D + d[None, :]
    inside = valid[:, None] & (d < D)[None, :]
    factor = weight * share / t
    if QUERY_GRADIENT:
        mean_key = mean_key / tl.where(total == 0.0, float("nan"), total)[:, None]
        change = (mean_key - p) * factor[:, None]
        if NORMALIZE:
            change = (change - q * tl.sum(q * change, 1)[:, None]) * q_inverse[:, None]
        tl.store(query_gradient + at, change, mask=inside)
        temperature_gradient = factor / t * (s - tl.sum(q * mean_key, 1))
    if POSITIVE_GRADIENT:
        change = q * (-factor)[:, None]
        if NORMALIZE:
            change = (change - p * tl.sum(p * change, 1)[:, None]) * p_inverse[:, None]
        tl.store(positive_gradient + at, change, mask=inside)
    store_row_stat(stats, 5, rows, n, temperature_gradient)
    store_row_stat(stats, 6, rows, n, intra_loss)
    if STATISTICS:
        store_row_stat(stats, 7, rows, n, rank)
        store_row_stat(stats, 8, rows, n, logit_sum * (t * LN2) / count)
    else:
        store_row_stat(stats, 7, rows, n, zero)
        store_row_stat(stats, 8, rows, n, zero)


@triton.jit
def store_parts(
    parts, outs, split, splits, rows, n, maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERY_GRADIENT: tl.constexpr, DUAL: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """One split's share: ``parts`` (7, splits, N) and ``outs`` (splits, N, D)."""
    valid = rows < n
    plane = splits.to(tl.int64) * n
    at = parts + split.to(tl.int64) * n + rows
    tl.store(at, maximum, mask=valid)
    tl.store(at + plane, total, mask=valid)
    tl.store(at + 2 * plane, count, mask=valid)
    if DUAL:
        tl.store(at + 3 * plane, inter_maximum, mask=valid)
        tl.store(at + 4 * plane, inter_total, mask=valid)
    if STATISTICS:
        tl.store(at + 5 * plane, rank, mask=valid)
        tl.store(at + 6 * plane, logit_sum, mask=valid)
    if QUERY_GRADIENT:
        d = tl.arange(0, BLOCK_D)
        place = (split.to(tl.int64) * n + rows)[:, None] * D + d[None, :]
        tl.store(outs + place, mean_key, mask=valid[:, None] & (d < D)[None, :])


# --------------------------------------------------------------------------------------------- forward, shared keys


@triton.jit
def wrapped(place, modulus, SMALL: tl.constexpr):
    """place % modulus, where place - modulus is less than a tile. SMALL: so is modulus."""
    if SMALL:
        return place % modulus
    else:
        return tl.where(place >= modulus, place - modulus, place)


@triton.jit
def fold(s, scale, maximum, total, BOUNDED: tl.constexpr):
    """Logits s * scale (R, C) to 2 ** (logit - new maximum); new maximum and total; what old sums shrink by."""
    if BOUNDED:
        x = tl.exp2(s * scale[:, None] - maximum[:, None])
        return x, maximum, total + tl.sum(x, 1), 1.0
    else:
        new = tl.maximum(maximum, tl.max(s, 1) * scale)  # a positive scale: one fused multiply-add per element
        x = tl.exp2(s * scale[:, None] - new[:, None])
        shrink = tl.exp2(maximum - new)
        return x, new, total * shrink + tl.sum(x, 1), shrink


@triton.jit
def visit(
    maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,  # what has been seen, per row
    q, row_scale, positive_logit, query_ids, rows,
    keys, stride_k, stride_d, key_inverse, key_ids, ids_stride_n, ids_stride_k,
    first, modulus, width, limit, lo, hi, ratio, key_eps, n,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,  # what of s: "none", "tail" (beyond limit), "ends" (of a band), "pairs" (any)
    BAND: tl.constexpr, SMALL: tl.constexpr, IDS: tl.constexpr, NORM: tl.constexpr,
    BOUNDED: tl.constexpr, DUAL: tl.constexpr, QUERY_GRADIENT: tl.constexpr, STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Columns lo .. hi, by whole tiles."""
    start = lo
    if BAND:
        start = (first + lo) % modulus
    for c in tl.range(lo, hi, BLOCK_KEYS, num_stages=STAGES):
        column = c + tl.arange(0, BLOCK_KEYS)
        place = column
        if BAND:
            place = wrapped(start + tl.arange(0, BLOCK_KEYS), modulus, SMALL)
            start = wrapped(start + BLOCK_KEYS, modulus, SMALL)
        elif MASK != "none":  # a key there is instead of a mask: registers
            place = tl.minimum(column, limit - 1)
        k = load_rows(keys, place, stride_k, stride_d, limit, D, BLOCK_D, False, WIDE)
        raw: tl.constexpr = k.dtype == q.dtype
        if NORM == 1:
            inverse = tl.load(key_inverse + place)
        if NORM == 2:
            inverse = inverse_norm(k, key_eps)
        if not raw:
            if NORM != 0:
                k = k.to(tl.float32) * inverse[:, None]
            k = k.to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (R, C), logits once times row_scale
        if raw and NORM != 0:
            s = s * inverse[None, :]
        if MASK == "tail":
            s = tl.where((column < limit)[None, :], s, float("-inf"))
        if MASK == "pairs":
            keep = (column < limit)[None, :] & (rows >= 0)[:, None]
            if BAND:
                ahead = column[None, :] - tl.arange(0, BLOCK_ROWS)[:, None]
                keep = (ahead >= 0) & (ahead < width)
            if IDS == 1:
                ids = tl.load(key_ids + place.to(tl.int64) * ids_stride_k)
                keep = keep & (query_ids[:, None] != ids[None, :])
            if IDS == 2:
                at = key_ids + rows.to(tl.int64)[:, None] * ids_stride_n + place.to(tl.int64)[None, :] * ids_stride_k
                keep = keep & (query_ids[:, None] != tl.load(at, mask=(rows < n)[:, None], other=0))
            s = tl.where(keep, s, float("-inf"))
            count += tl.sum(tl.where(s == float("-inf"), 0.0, 1.0), 1)  # of s: keep has another layout
        if MASK == "ends" and (c < BLOCK_ROWS - 1 or c + BLOCK_KEYS > width):
            ahead = column[None, :] - tl.arange(0, BLOCK_ROWS)[:, None]
            s = tl.where((ahead >= 0) & (ahead < width), s, float("-inf"))
        if STATISTICS:
            logits = s * row_scale[:, None]
            logit_sum += tl.sum(tl.where(logits == float("-inf"), 0.0, logits), 1)
            rank += tl.sum((logits > positive_logit[:, None]).to(tl.float32), 1)
        if DUAL:
            _, inter_maximum, inter_total, _ = fold(s, row_scale * ratio, inter_maximum, inter_total, BOUNDED)
        x, maximum, total, shrink = fold(s, row_scale, maximum, total, BOUNDED)
        if QUERY_GRADIENT:
            if raw and NORM != 0:
                x = x * inverse[None, :]
            if not BOUNDED:
                mean_key = mean_key * shrink[:, None]
            mean_key = tl.dot(x.to(q.dtype), k, acc=mean_key, input_precision=PRECISION)
    if MASK == "ends":  # columns r .. r + width - 1 are row r's
        r = tl.arange(0, BLOCK_ROWS)
        count += tl.maximum(tl.minimum(hi, r + width) - tl.maximum(lo, r), 0).to(tl.float32)
    return maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum


@triton.jit(
    do_not_specialize=["n", "k", "offset", "width", "modulus", "chunk", "splits_per_view", "first_split", "splits"]
)
def attend(
    query, query_stride_n, query_stride_d, positive, positive_stride_n, positive_stride_d,
    keys, stride_k, stride_d, key_inverse, query_ids, key_ids, ids_stride_n, ids_stride_k,
    valid_count, temperature_tensor, parts, outs, loss, query_gradient, positive_gradient, stats,
    n, k, offset, width, modulus, chunk, splits_per_view, first_split, splits,
    temperature, inter_t, alpha, share, query_eps, positive_eps, key_eps,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr, SMALL: tl.constexpr,
    IDS: tl.constexpr, NORMALIZE: tl.constexpr, NORM: tl.constexpr, BOUNDED: tl.constexpr, COUNTED: tl.constexpr,
    LEARNED: tl.constexpr, ALPHA: tl.constexpr, DUAL: tl.constexpr, QUERY_GRADIENT: tl.constexpr,
    POSITIVE_GRADIENT: tl.constexpr, STATISTICS: tl.constexpr, FINISH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of rows against one split of the columns; with FINISH (one split) to the end."""
    t = tl.load(temperature_tensor).to(tl.float32) if LEARNED else temperature
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    raw_q = load_rows(query, rows, query_stride_n, query_stride_d, n, D, BLOCK_D, True, True)
    scale = LOG2E / t
    row_scale = tl.full([BLOCK_ROWS], 1.0, tl.float32) * scale
    positive_logit = row_scale
    inverse = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if NORMALIZE:
        inverse = inverse_norm(raw_q, query_eps)
    if STATISTICS:
        p = load_rows(positive, rows, positive_stride_n, positive_stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
        s = tl.sum(raw_q.to(tl.float32) * p, 1) * inverse
        if NORMALIZE:
            s = s * inverse_norm(p, positive_eps)
        positive_logit = s * scale
    SAME: tl.constexpr = raw_q.dtype == DOT
    FLOAT: tl.constexpr = DOT == tl.float32
    if SAME and not FLOAT:  # of the comparisons themselves, Triton 3.3 makes no condition
        q = raw_q
        row_scale = row_scale * inverse
    else:
        q = (raw_q.to(tl.float32) * inverse[:, None]).to(DOT)
    ids = rows
    if IDS != 0:
        ids = tl.load(query_ids + rows, mask=rows < n, other=0)
    floor: tl.constexpr = CENTRE if BOUNDED else MINIMUM
    maximum, inter_maximum = tl.full([BLOCK_ROWS], floor, tl.float32), tl.full([BLOCK_ROWS], floor, tl.float32)
    total, inter_total = tl.zeros([BLOCK_ROWS], tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    count, rank = tl.zeros([BLOCK_ROWS], tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    logit_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    mean_key = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)

    limit = k
    if COUNTED:
        limit = tl.minimum(k, tl.load(valid_count).to(tl.int32))
    columns, first = limit, 0
    if BAND:
        columns = BLOCK_ROWS - 1 + width
        first, view = offset + block * BLOCK_ROWS + 1, (split // splits_per_view * modulus).to(tl.int64)
        keys, key_inverse, key_ids = keys + view * stride_k, key_inverse + view, key_ids + view * ids_stride_k
    lo = split % splits_per_view * chunk
    hi = tl.maximum(lo, tl.minimum(lo + chunk, columns))
    ratio = t / inter_t
    MASK: tl.constexpr = "pairs" if IDS != 0 else "ends" if BAND else "tail"
    middle = hi
    if MASK == "tail":
        middle = hi - hi % BLOCK_KEYS  # lo is whole tiles
    for rest in tl.static_range(2 if MASK == "tail" else 1):  # no mask in the loop that takes the time
        maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum = visit(
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
            q, row_scale, positive_logit, ids, rows,
            keys, stride_k, stride_d, key_inverse, key_ids, ids_stride_n, ids_stride_k,
            first, modulus, width, limit, middle if rest else lo, hi if rest else middle, ratio, key_eps, n,
            D, BLOCK_ROWS, BLOCK_KEYS, BLOCK_D, "none" if MASK == "tail" and not rest else MASK, BAND, SMALL, IDS,
            NORM, BOUNDED, DUAL, QUERY_GRADIENT, STATISTICS, PRECISION, 1 if rest else STAGES, WIDE,
        )  # fmt: skip
    if MASK == "tail":
        count += hi - lo
    if FINISH:
        finish(
            raw_q.to(tl.float32), rows, positive, positive_stride_n, positive_stride_d,
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
            loss, query_gradient, positive_gradient, stats, n, t, inter_t, alpha, share, query_eps, positive_eps,
            D, BLOCK_D, NORMALIZE, ALPHA, DUAL, QUERY_GRADIENT, POSITIVE_GRADIENT, STATISTICS,
        )  # fmt: skip
    else:
        store_parts(
            parts, outs, first_split + split, splits, rows, n,
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
            D, BLOCK_D, QUERY_GRADIENT, DUAL, STATISTICS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def inverse_norms(
    x, stride_row, stride_d, out, count, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inverse = inverse_norm(load_rows(x, rows, stride_row, stride_d, count, D, BLOCK_D, True, True), eps)
    tl.store(out + rows, inverse, mask=rows < count)


@triton.jit(do_not_specialize=["count"])
def converted_rows(
    x, stride_row, stride_d, out, count, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Rows, of unit length with NORM, in the dtype of ``out`` (count, D)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = load_rows(x, rows, stride_row, stride_d, count, D, BLOCK_D, True, True).to(tl.float32)
    if NORM:
        values = values * inverse_norm(values, eps)[:, None]
    d = tl.arange(0, BLOCK_D)
    at = out + rows.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=(rows < count)[:, None] & (d < D)[None, :])


# ----------------------------------------------------------------------------------------- forward, keys of each query


@triton.jit(do_not_specialize=["n", "k", "first_split", "splits"])
def attend_own(
    query, query_stride_n, query_stride_d, positive, positive_stride_n, positive_stride_d,
    keys, stride_n, stride_k, stride_d, picked, picked_stride_n, picked_stride_c,
    query_ids, key_ids, ids_stride_n, ids_stride_k,
    temperature_tensor, parts, outs, loss, query_gradient, positive_gradient, stats,
    n, k, first_split, splits, temperature, inter_t, alpha, share, query_eps, positive_eps, key_eps,
    D: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, PICKED: tl.constexpr, IDS: tl.constexpr,
    NORMALIZE: tl.constexpr, NORM: tl.constexpr, LEARNED: tl.constexpr, ALPHA: tl.constexpr, DUAL: tl.constexpr,
    QUERY_GRADIENT: tl.constexpr, POSITIVE_GRADIENT: tl.constexpr, STATISTICS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """One row against keys of its own, (N, K, D), or those it has picked of shared ones, in float32."""
    t = tl.load(temperature_tensor).to(tl.float32) if LEARNED else temperature
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    raw_q = load_rows(query, rows, query_stride_n, query_stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
    q = raw_q
    scale = LOG2E / t
    if NORMALIZE:
        q = q * inverse_norm(q, query_eps)[:, None]
    positive_logit = tl.zeros([1], tl.float32)
    if STATISTICS:
        p = load_rows(positive, rows, positive_stride_n, positive_stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
        if NORMALIZE:
            p = p * inverse_norm(p, positive_eps)[:, None]
        positive_logit = tl.sum(q * p, 1) * scale
    if IDS:
        own = tl.load(query_ids + row)
    maximum, inter_maximum = tl.full([1], MINIMUM, tl.float32), tl.full([1], MINIMUM, tl.float32)
    total, inter_total = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    count, rank, logit_sum = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    mean_key = tl.zeros([1, BLOCK_D], tl.float32)
    one = tl.full([1], 1.0, tl.float32)
    own_keys = keys + row.to(tl.int64) * stride_n
    for c in range(0, k, BLOCK_KEYS):
        column = c + tl.arange(0, BLOCK_KEYS)
        keep = column < k
        place = column.to(tl.int64)
        if PICKED:
            at = picked + row.to(tl.int64) * picked_stride_n + place * picked_stride_c
            place = tl.load(at, mask=keep, other=0)
        d = tl.arange(0, BLOCK_D)
        at = own_keys + place[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
        x = tl.load(at, mask=keep[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if NORM != 0:
            x = x * inverse_norm(x, key_eps)[:, None]
        if IDS:
            ids = tl.load(key_ids + row.to(tl.int64) * ids_stride_n + place * ids_stride_k, mask=keep, other=0)
            keep = keep & (ids != own)
        s = (tl.sum(x * q, 1) * scale)[None, :]  # (1, C)
        s = tl.where(keep[None, :], s, float("-inf"))
        count += tl.sum(keep.to(tl.float32)[None, :], 1)
        if STATISTICS:
            logit_sum += tl.sum(tl.where(keep[None, :], s, 0.0), 1)
            rank += tl.sum((s > positive_logit[:, None]).to(tl.float32), 1)
        if DUAL:
            _, inter_maximum, inter_total, _ = fold(s, one * (t / inter_t), inter_maximum, inter_total, False)
        e, maximum, total, shrink = fold(s, one, maximum, total, False)
        if QUERY_GRADIENT:
            mean_key = mean_key * shrink[:, None] + tl.sum(tl.trans(e) * x, 0)[None, :]
    if FINISH:
        finish(
            raw_q, rows, positive, positive_stride_n, positive_stride_d,
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
            loss, query_gradient, positive_gradient, stats, n, t, inter_t, alpha, share, query_eps, positive_eps,
            D, BLOCK_D, NORMALIZE, ALPHA, DUAL, QUERY_GRADIENT, POSITIVE_GRADIENT, STATISTICS,
        )  # fmt: skip
    else:
        store_parts(
            parts, outs, first_split + tl.program_id(1), splits, rows, n,
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
            D, BLOCK_D, QUERY_GRADIENT, DUAL, STATISTICS,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- merge


@triton.jit(do_not_specialize=["n", "splits"])
def combine(
    query, query_stride_n, query_stride_d, positive, positive_stride_n, positive_stride_d,
    temperature_tensor, parts, outs, loss, query_gradient, positive_gradient, stats,
    n, splits, temperature, inter_t, alpha, share, query_eps, positive_eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    NORMALIZE: tl.constexpr, LEARNED: tl.constexpr, ALPHA: tl.constexpr, DUAL: tl.constexpr,
    QUERY_GRADIENT: tl.constexpr, POSITIVE_GRADIENT: tl.constexpr, STATISTICS: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """One row: its splits in a fixed order, then the loss and gradients; without LOSS, log-sum-exp and mean key."""
    t = tl.load(temperature_tensor).to(tl.float32) if LEARNED else temperature
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    split = tl.arange(0, BLOCK_SPLITS)
    here = split < splits
    plane = splits.to(tl.int64) * n
    at = parts + split.to(tl.int64) * n + row
    maxima = tl.load(at, mask=here, other=MINIMUM)
    totals = tl.load(at + plane, mask=here, other=0.0)
    count = tl.sum(tl.load(at + 2 * plane, mask=here, other=0.0)[None, :], 1)
    maximum = tl.max(maxima[None, :], 1)  # a split with nothing in it has MINIMUM
    total = tl.sum((totals * tl.exp2(maxima - tl.max(maxima, 0)))[None, :], 1)
    zero = tl.zeros([1], tl.float32)
    inter_maximum, inter_total, rank, logit_sum = zero, zero, zero, zero
    if DUAL:
        inter_maxima = tl.load(at + 3 * plane, mask=here, other=MINIMUM)
        inter_totals = tl.load(at + 4 * plane, mask=here, other=0.0)
        inter_maximum = tl.max(inter_maxima[None, :], 1)
        inter_total = tl.sum((inter_totals * tl.exp2(inter_maxima - tl.max(inter_maxima, 0)))[None, :], 1)
    if STATISTICS:
        rank = tl.sum(tl.load(at + 5 * plane, mask=here, other=0.0)[None, :], 1)
        logit_sum = tl.sum(tl.load(at + 6 * plane, mask=here, other=0.0)[None, :], 1)
    mean_key = tl.zeros([1, BLOCK_D], tl.float32)
    d = tl.arange(0, BLOCK_D)
    if QUERY_GRADIENT:
        for start in range(0, splits, CHUNK):
            some = start + tl.arange(0, CHUNK)
            inside = some < splits
            place = (some.to(tl.int64) * n + row)[:, None] * D + d[None, :]
            out = tl.load(outs + place, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            share_of = tl.load(parts + some.to(tl.int64) * n + row, mask=inside, other=MINIMUM)
            mean_key += tl.sum(out * tl.exp2(share_of - maximum)[:, None], 0)[None, :]
    if LOSS:
        q = load_rows(query, rows, query_stride_n, query_stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
        finish(
            q, rows, positive, positive_stride_n, positive_stride_d,
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
            loss, query_gradient, positive_gradient, stats, n, t, inter_t, alpha, share, query_eps, positive_eps,
            D, BLOCK_D, NORMALIZE, ALPHA, DUAL, QUERY_GRADIENT, POSITIVE_GRADIENT, STATISTICS,
        )  # fmt: skip
    else:
        tl.store(loss + rows, logsumexp(maximum, total))
        if QUERY_GRADIENT:
            out = mean_key / tl.where(total == 0.0, float("nan"), total)[:, None]
            tl.store(query_gradient + row.to(tl.int64) * D + d[None, :], out, mask=(d < D)[None, :])


# ------------------------------------------------------------------------------------------------------ keys' gradient


@triton.jit(do_not_specialize=["n"])
def row_weights(
    query, stride_n, stride_d, grad, grad_stride, weight, lse, temperature_tensor, out, converted,
    n, temperature, share, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, LEARNED: tl.constexpr,
    CONVERT: tl.constexpr,
):  # fmt: skip
    """What a row's softmax needs again, (5, N): logits' scale, log-sum-exp in base 2, weight * inverse norm, that norm,

    and that weight where 2 ** (logit - bound) stands for the softmax.
    With CONVERT also the unit rows in the dtype of the products, which are then not raw.
    """
    t = tl.load(temperature_tensor).to(tl.float32) if LEARNED else temperature
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < n
    inverse = tl.full([BLOCK], 1.0, tl.float32)
    if NORMALIZE or CONVERT:
        q = load_rows(query, rows, stride_n, stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
        if NORMALIZE:
            inverse = inverse_norm(q, eps)
        if CONVERT:
            d = tl.arange(0, BLOCK_D)
            at = converted + rows.to(tl.int64)[:, None] * D + d[None, :]
            q = q * inverse[:, None]
            tl.store(at, q.to(converted.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
            inverse = tl.full([BLOCK], 1.0, tl.float32)
    g = tl.load(grad + rows.to(tl.int64) * grad_stride, mask=valid, other=0.0).to(tl.float32)
    w = tl.load(weight + rows, mask=valid, other=0.0) * g * share / t
    plane = n.to(tl.int64)
    tl.store(out + rows, inverse * (LOG2E / t), mask=valid)
    base = tl.load(lse + rows, mask=valid, other=0.0) * LOG2E
    tl.store(out + plane + rows, base, mask=valid)
    tl.store(out + 2 * plane + rows, w * inverse, mask=valid)
    tl.store(out + 3 * plane + rows, inverse, mask=valid)
    tl.store(out + 4 * plane + rows, w * inverse / tl.exp2(base - LOG2E / t), mask=valid)


@triton.jit
def collect(
    acc, k, key_inverse, key_row, keys_at, query, stride_n, stride_d, per_row, prescale, query_ids, key_ids,
    ids_stride_n, ids_stride_k, n, first, modulus, width, offset, k_limit, lo, hi,
    D: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, BAND: tl.constexpr, SMALL: tl.constexpr, IDS: tl.constexpr, RAW_NORM: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc (C, D) += sum over the rows lo .. hi of weight * softmax * query."""
    plane = n.to(tl.int64)
    start = lo
    if BAND == 1:
        start = (first + lo) % modulus
    for c in tl.range(lo, hi, BLOCK_ROWS, num_stages=STAGES):
        column = c + tl.arange(0, BLOCK_ROWS)
        row = column
        if BAND == 1:  # by place, cyclic
            row = wrapped(start + tl.arange(0, BLOCK_ROWS), modulus, SMALL)
            start = wrapped(start + BLOCK_ROWS, modulus, SMALL)
        present = row < n
        if MASK != "ends":  # a row there is instead of a mask: registers
            row = tl.minimum(row, n - 1)
        q = load_rows(query, row, stride_n, stride_d, n, D, BLOCK_D, False, WIDE)
        scale, base = tl.load(per_row + row), tl.load(per_row + plane + row)
        weight = tl.load(per_row + 2 * plane + row) * prescale
        if MASK == "tail":
            weight = tl.where(present, weight, 0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (C, R)
        if RAW_NORM:
            s = s * key_inverse[:, None]
        x = tl.exp2(s * scale[None, :] - base[None, :]) * weight[None, :]
        if MASK == "pairs":
            keep = present[None, :] & (key_row >= 0)[:, None]
            if BAND == 1:
                ahead = column[None, :] - tl.arange(0, BLOCK_KEYS)[:, None]
                keep = keep & (ahead >= 0) & (ahead < width)
            if BAND == 2:
                behind = key_row[:, None] - ((row + offset) % modulus)[None, :] - 1
                behind = tl.where(behind < 0, behind + modulus, behind)
                keep = keep & (behind < width)
            if IDS != 0:
                own = tl.load(query_ids + row)
            if IDS == 1:
                ids = tl.load(key_ids + keys_at.to(tl.int64) * ids_stride_k, mask=keys_at < k_limit, other=0)
                keep = keep & (ids[:, None] != own[None, :])
            if IDS == 2:
                at = key_ids + row.to(tl.int64)[None, :] * ids_stride_n + keys_at.to(tl.int64)[:, None] * ids_stride_k
                ids = tl.load(at, mask=(keys_at < k_limit)[:, None], other=0)
                keep = keep & (ids != own[None, :])
            x = tl.where(keep, x, 0.0)
        if MASK == "ends" and (c < BLOCK_KEYS - 1 or c + BLOCK_ROWS > width):
            ahead = column[None, :] - tl.arange(0, BLOCK_KEYS)[:, None]
            x = tl.where((ahead >= 0) & (ahead < width), x, 0.0)
        if k.dtype == tl.float16:  # rows and keys that are padding
            x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        acc = tl.dot(x.to(k.dtype), q, acc=acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["n", "k", "offset", "width", "modulus", "blocks_per_view", "chunk"])
def keys_gradient(
    query, stride_n, stride_d, keys, stride_k, key_stride_d, per_row, largest, query_ids, key_ids,
    ids_stride_n, ids_stride_k, valid_count, out, n, k, offset, width, modulus, blocks_per_view, chunk, key_eps,
    D: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    BAND: tl.constexpr, WHOLE: tl.constexpr, SMALL: tl.constexpr, IDS: tl.constexpr, NORM: tl.constexpr,
    COUNTED: tl.constexpr, PRESCALE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A block of keys against one split of the rows; ``query`` is in the dtype of the products.

    ``out`` (splits, K, D) has the shares of ``merge_keys_gradient``; without NORM, of one split, it is the gradient.
    """
    block, view_start, limit = tl.program_id(0), 0, k
    if BAND != 0:
        view_start, block, limit = block // blocks_per_view * modulus, block % blocks_per_view, modulus
    start = block * BLOCK_KEYS
    key_row = start + tl.arange(0, BLOCK_KEYS)
    base = keys + tl.cast(view_start, tl.int64) * stride_k
    there = tl.minimum(key_row, limit - 1)  # a key there is instead of none: zeros would overflow float16
    raw_k = load_rows(base, there, stride_k, key_stride_d, limit, D, BLOCK_D, False, True)
    dot: tl.constexpr = query.dtype.element_ty
    raw: tl.constexpr = raw_k.dtype == dot
    inverse = tl.full([BLOCK_KEYS], 1.0, tl.float32)
    if NORM:
        inverse = inverse_norm(raw_k, key_eps)
    k_tile = raw_k
    if not raw:
        k_tile = (raw_k.to(tl.float32) * inverse[:, None]).to(dot)
    prescale = 1.0
    if PRESCALE:  # float16 would lose what is small
        most = tl.load(largest)
        prescale = 4096.0 / tl.where(most > 1e-30, most, 1.0)  # or it would be infinite
    acc = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    MASK: tl.constexpr = "ends" if (BAND == 1 and WHOLE) and IDS == 0 else "pairs" if BAND != 0 or IDS != 0 else "tail"
    columns, first = n, 0
    if BAND == 1:
        columns, first = width + BLOCK_KEYS - 1, start - width - offset + 2 * modulus
    lo = tl.program_id(1) * chunk
    hi = tl.maximum(lo, tl.minimum(lo + chunk, columns))
    acc = collect(
        acc, k_tile, inverse, key_row, view_start + key_row, query, stride_n, stride_d, per_row, prescale,
        query_ids, key_ids, ids_stride_n, ids_stride_k, n, first, modulus, width, offset, k, lo, hi,
        D, BLOCK_KEYS, BLOCK_ROWS, BLOCK_D, MASK, BAND, SMALL, IDS, NORM and raw, PRECISION, STAGES, WIDE,
    )  # fmt: skip
    if PRESCALE:
        acc = acc / prescale
    key = (view_start + key_row).to(tl.int64)
    key += tl.program_id(1).to(tl.int64) * k
    if COUNTED:
        acc = tl.where((key_row < tl.load(valid_count))[:, None], acc, 0.0)
    d = tl.arange(0, BLOCK_D)
    at = out + key[:, None] * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(key_row < limit)[:, None] & (d < D)[None, :])


@triton.jit
def through_unit(gradient, raw, eps):
    """From the gradient of unit rows (R, D) to that of the raw ones."""
    raw = raw.to(tl.float32)
    inverse = inverse_norm(raw, eps)[:, None]
    unit = raw * inverse
    return (gradient - unit * tl.sum(unit * gradient, 1)[:, None]) * inverse


@triton.jit(do_not_specialize=["k", "splits"])
def merge_keys_gradient(
    parts, keys, stride_k, key_stride_d, out, k, splits, key_eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The splits' shares in a fixed order."""
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (key < k)[:, None] & (d < D)[None, :]
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    at = key.to(tl.int64)[:, None] * D + d[None, :]
    for split in range(0, splits):
        acc += tl.load(parts + tl.cast(split, tl.int64) * k * D + at, mask=inside, other=0.0)
    if NORM:
        acc = through_unit(acc, load_rows(keys, key, stride_k, key_stride_d, k, D, BLOCK_D, True, True), key_eps)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "k", "blocks"])
def keys_gradient_own(
    query, stride_n, stride_d, keys, key_stride_n, key_stride_k, key_stride_d, per_row, query_ids, key_ids,
    ids_stride_n, ids_stride_k, out, n, k, blocks, key_eps,
    D: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, IDS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Some keys of one row's own, (N, K, D), which has so many blocks of them."""
    row = tl.program_id(0) // blocks
    rows = row + tl.arange(0, 1)
    column = tl.program_id(0) % blocks * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    keep = column < k
    plane = n.to(tl.int64)
    scale, base = tl.load(per_row + row), tl.load(per_row + plane + row)
    weight = tl.load(per_row + 2 * plane + row)
    q = load_rows(query, rows, stride_n, stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
    x = load_rows(
        keys + row.to(tl.int64) * key_stride_n, column, key_stride_k, key_stride_d, k, D, BLOCK_D, True, True
    ).to(tl.float32)  # fmt: skip
    inverse = tl.full([BLOCK_KEYS], 1.0, tl.float32)
    if NORM:
        inverse = inverse_norm(x, key_eps)
        x = x * inverse[:, None]
    p = tl.exp2(tl.sum(x * q, 1) * scale - base) * weight
    if IDS:
        at = key_ids + row.to(tl.int64) * ids_stride_n + column.to(tl.int64) * ids_stride_k
        keep = keep & (tl.load(at, mask=keep, other=0) != tl.load(query_ids + row))
    change = tl.where(keep, p, 0.0)[:, None] * q
    if NORM:
        change = (change - x * tl.sum(x * change, 1)[:, None]) * inverse[:, None]
    d = tl.arange(0, BLOCK_D)
    at = out + (row.to(tl.int64) * k + column.to(tl.int64))[:, None] * D + d[None, :]
    tl.store(at, change.to(out.dtype.element_ty), mask=(column < k)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["n", "k", "picks"])
def keys_gradient_picked(
    query, stride_n, stride_d, keys, stride_k, key_stride_d, per_row, order, starts, query_ids, key_ids,
    ids_stride_n, ids_stride_k, out, n, k, picks, key_eps,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, IDS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One key against the rows that picked it: ``order`` has the picks (row * picks + c) sorted by key."""
    key = tl.program_id(0)
    this = key + tl.arange(0, 1)
    x = load_rows(keys, this, stride_k, key_stride_d, k, D, BLOCK_D, True, True).to(tl.float32)
    inverse = tl.full([1], 1.0, tl.float32)
    if NORM:
        inverse = inverse_norm(x, key_eps)
        x = x * inverse[:, None]
    plane = n.to(tl.int64)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    last = tl.load(starts + key + 1)
    for c in range(tl.load(starts + key), last, BLOCK_ROWS):
        pick = c + tl.arange(0, BLOCK_ROWS)
        keep = pick < last
        row = tl.where(keep, tl.load(order + pick, mask=keep, other=0) // picks, n)
        q = load_rows(query, row, stride_n, stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
        scale = tl.load(per_row + row, mask=keep, other=0.0)
        base = tl.load(per_row + plane + row, mask=keep, other=0.0)
        weight = tl.load(per_row + 2 * plane + row, mask=keep, other=0.0)
        if IDS:
            at = key_ids + row.to(tl.int64) * ids_stride_n + key.to(tl.int64) * ids_stride_k
            keep = keep & (tl.load(at, mask=keep, other=0) != tl.load(query_ids + row, mask=keep, other=0))
        p = tl.where(keep, tl.exp2(tl.sum(q * x, 1) * scale - base) * weight, 0.0)
        acc += tl.sum(p[:, None] * q, 0)[None, :]
    if NORM:
        acc = (acc - x * tl.sum(x * acc, 1)[:, None]) * inverse[:, None]
    d = tl.arange(0, BLOCK_D)
    at = out + key.to(tl.int64) * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(d < D)[None, :])


# ----------------------------------------------------------------------------------------- both roles of the same rows


@triton.jit(do_not_specialize=["n", "modulus", "chunk"])
def both_roles(
    z, stride_n, stride_d, raw_z, raw_stride_n, raw_stride_d, per_row, largest, temperature_tensor, out, along,
    n, modulus, chunk, temperature, eps,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    ACROSS: tl.constexpr, NORMALIZE: tl.constexpr, LEARNED: tl.constexpr, ONE_EXP: tl.constexpr, SMALL: tl.constexpr,
    PRESCALE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    WHOLE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Both directions: the gradient of rows z (2M, D), as anchors, as positives and as keys, in one pass.

    sum_j (a_i P_ij + a_j P_ji) z_j - (a_i + a_p) z_p: p the row's other view, a = weight * grad / t, P the softmax over
    both views or, ACROSS, the other one. With LEARNED, ``along`` (splits, 2M) has the product of the sum with z_i.
    ``z`` is in the dtype of the products, ``raw_z`` what was given; modulus = M. ``out`` is the gradient, or,
    without WHOLE_GRADIENT, (splits, 2M, D) shares of it for ``merge_keys_gradient``.
    """
    t = tl.load(temperature_tensor).to(tl.float32) if LEARNED else temperature
    block, split = tl.program_id(0), tl.program_id(1)
    anchors, own_start = n, 0
    if ACROSS:  # a block's rows are of one view
        per_view_blocks = tl.cdiv(modulus, BLOCK_ROWS)
        anchors, own_start, block = modulus, block // per_view_blocks * modulus, block % per_view_blocks
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = rows < anchors
    plane = n.to(tl.int64)
    rows = own_start + tl.minimum(rows, anchors - 1)  # a row there is instead of none
    q = load_rows(z, rows, stride_n, stride_d, n, D, BLOCK_D, False, True)
    scale, base = tl.load(per_row + rows), tl.load(per_row + plane + rows)
    weighted, inverse = tl.load(per_row + 2 * plane + rows), tl.load(per_row + 3 * plane + rows)
    prescale = 1.0
    if PRESCALE:  # float16 would lose what is small
        most = tl.load(largest)
        prescale = 2048.0 / tl.where(most > 1e-30, most, 1.0)
    highest = LOG2E / t  # a logit's bound: with ONE_EXP no power of two leaves float32
    weights = per_row + (4 if ONE_EXP else 2) * plane
    a = tl.load(weights + rows) / inverse * prescale
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    width = modulus - 1
    per_view = tl.cdiv(BLOCK_ROWS - 1 + width, BLOCK_KEYS) * BLOCK_KEYS
    first = block * BLOCK_ROWS + 1
    lo, hi = split * chunk, tl.minimum((split + 1) * chunk, (1 if ACROSS else 2) * per_view)
    start = (first + lo % per_view) % modulus
    for visited in tl.range(lo, hi, BLOCK_KEYS, num_stages=STAGES):
        second = visited >= per_view
        c = visited - tl.where(second, per_view, 0)
        start = tl.where(c == 0, first % modulus, start)
        place = wrapped(start + tl.arange(0, BLOCK_KEYS), modulus, SMALL)
        place += modulus - own_start if ACROSS else tl.where(second, modulus, 0)
        start = wrapped(start + BLOCK_KEYS, modulus, SMALL)
        k = load_rows(z, place, stride_n, stride_d, n, D, BLOCK_D, False, WIDE)
        key_weighted = tl.load(weights + place) * prescale
        key_inverse = tl.load(per_row + 3 * plane + place)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[:, None] * key_inverse[None, :]
        if ONE_EXP:
            x = tl.exp2(logits - highest) * (a[:, None] * key_inverse[None, :] + key_weighted[None, :])
        else:
            key_base = tl.load(per_row + plane + place)
            x = tl.exp2(logits - base[:, None]) * (a[:, None] * key_inverse[None, :])
            x += tl.exp2(logits - key_base[None, :]) * key_weighted[None, :]
        if c < BLOCK_ROWS - 1 or c + BLOCK_KEYS > width:
            ahead = c + tl.arange(0, BLOCK_KEYS)[None, :] - tl.arange(0, BLOCK_ROWS)[:, None]
            x = tl.where((ahead >= 0) & (ahead < width), x, 0.0)
        if k.dtype == tl.float16:  # rows that are padding
            x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        acc = tl.dot(x.to(k.dtype), k, acc=acc, input_precision=PRECISION)
    acc = acc / prescale
    if LEARNED:
        tl.store(along + split.to(tl.int64) * n + rows, tl.sum(q.to(tl.float32) * acc, 1) * inverse, mask=valid)
    if split == 0:
        other = tl.where(rows < modulus, rows + modulus, rows - modulus)
        other_weighted, other_inverse = tl.load(per_row + 2 * plane + other), tl.load(per_row + 3 * plane + other)
        partner = load_rows(raw_z, other, raw_stride_n, raw_stride_d, n, D, BLOCK_D, False, True).to(tl.float32)
        length = weighted / inverse + other_weighted / other_inverse
        if NORMALIZE:
            length *= inverse_norm(partner, eps)
        acc -= length[:, None] * partner
    row = rows.to(tl.int64)
    if WHOLE_GRADIENT:
        if NORMALIZE:
            acc = through_unit(acc, load_rows(raw_z, rows, raw_stride_n, raw_stride_d, n, D, BLOCK_D, False, True), eps)
    else:
        row += split.to(tl.int64) * n
    d = tl.arange(0, BLOCK_D)
    at = out + row[:, None] * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
