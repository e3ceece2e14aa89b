"""What the kernels share: loads, norms, the pairs that stay, and from what a pass saw to losses and gradients.

Logits are in base 2; sums and statistics are float32. A plane of an array has the name that ``calls`` or ``tables``
gives it. An absent tensor is None, which Triton compiles away.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from ..calls import TIE as _TIE
from ..shared_kernels import (
    LN2,
    LOG2E,
    METRIC_COUNT,
    METRIC_INTRA,
    METRIC_LOG_WEIGHT,
    METRIC_NEGATIVE,
    METRIC_RANK,
    METRIC_WEIGHT,
    ROW_BASE,
    ROW_BOUNDED_PULL,
    ROW_INVERSE,
    ROW_POSITIVE,
    ROW_PULL,
    ROW_SCALE,
    ROW_SHIFT,
    ROW_STORED_PULL,
    ROW_TEMPERATURE_GRADIENT,
    ROW_TOTAL,
    inverse_length,
    rounded_log_sum,
    something,
    values,
)
from .tables import PIECE_SCALE as _PIECE_SCALE
from .tables import Part

TIE, PIECE_SCALE = tl.constexpr(_TIE), tl.constexpr(_PIECE_SCALE)
# With BOUNDED no pass seeks a maximum of unit rows' logits. This stands for it, which puts their exponentials in the
# middle of what float16 holds.
CENTRE = tl.constexpr(-1.0)

PART_MAXIMUM, PART_TOTAL = tl.constexpr(int(Part.MAXIMUM)), tl.constexpr(int(Part.TOTAL))
PART_COUNT, PART_RANK = tl.constexpr(int(Part.COUNT)), tl.constexpr(int(Part.RANK))
PART_INTER_MAXIMUM, PART_INTER_TOTAL = tl.constexpr(int(Part.INTER_MAXIMUM)), tl.constexpr(int(Part.INTER_TOTAL))
PART_LOGIT_SUM = tl.constexpr(int(Part.LOGIT_SUM))


# ------------------------------------------------------------------------------------------------------ loads and norms


@triton.jit
def load_rows(
    x, rows, stride_row, stride_d, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    FAR: tl.constexpr,
):  # fmt: skip
    """Rows of x, (R, BLOCK_D), zeros beyond D and, if MASKED, from ``limit`` on. FAR: offsets need 64 bits."""
    d = tl.arange(0, BLOCK_D)
    if FAR:
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
def load_pieces(
    x, stride_piece, rows, stride_row, stride_d, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, FAR: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Rows (R, BLOCK_D) of each of the PIECES whose sum they are; a piece that is not there is the first again."""
    high = load_rows(x, rows, stride_row, stride_d, limit, D, BLOCK_D, False, FAR)
    low, rest = high, high
    if PIECES >= 2:
        low = load_rows(x + stride_piece, rows, stride_row, stride_d, limit, D, BLOCK_D, False, FAR)
    if PIECES == 3:
        third = x + 2 * tl.cast(stride_piece, tl.int64)  # 32 bits hold a stride of 2 ** 30, but not twice it
        rest = load_rows(third, rows, stride_row, stride_d, limit, D, BLOCK_D, False, FAR)
    return high, low, rest


@triton.jit
def cut(x, PIECES: tl.constexpr):
    """float32 as a sum of halves, which the matrix unit multiplies; one piece is x itself.

    Two pieces of float16 hold 22 bits of what lies between 2 ** -14 and 2 ** 16, as unit rows times PIECE_SCALE and
    weights do. Three pieces of bfloat16 hold all 24 bits of any float32 number.
    """
    high, low, rest = x, x, x
    if PIECES == 2:
        high = x.to(tl.float16)
        low = (x.to(tl.float32) - high.to(tl.float32)).to(tl.float16)
    if PIECES == 3:
        high = x.to(tl.bfloat16)
        left = x.to(tl.float32) - high.to(tl.float32)
        low = left.to(tl.bfloat16)
        rest = (left - low.to(tl.float32)).to(tl.bfloat16)
    return high, low, rest


@triton.jit
def product(a, a_low, a_rest, b, b_low, b_rest, acc, TURNED: tl.constexpr, PIECES: tl.constexpr):
    """acc + a @ b of matrices in pieces: of three pieces six products, of two three, the others being too small.

    TURNED: the operands were exchanged, and their products are added in the order of before. So forward and backward
    have the same similarities, bit by bit, which a softmax of large logits needs.
    """
    if PIECES == 3:
        if TURNED:
            acc = tl.dot(a, b_rest, acc=acc, input_precision="ieee")
        else:
            acc = tl.dot(a_rest, b, acc=acc, input_precision="ieee")
        acc = tl.dot(a_low, b_low, acc=acc, input_precision="ieee")
        if TURNED:
            acc = tl.dot(a_rest, b, acc=acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b_rest, acc=acc, input_precision="ieee")
    if PIECES >= 2:
        if TURNED:
            acc = tl.dot(a, b_low, acc=acc, input_precision="ieee")
            acc = tl.dot(a_low, b, acc=acc, input_precision="ieee")
        else:
            acc = tl.dot(a_low, b, acc=acc, input_precision="ieee")
            acc = tl.dot(a, b_low, acc=acc, input_precision="ieee")
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def partners(rows, half):
    """Where the rows' positives are: the same rows, or, with two views of ``half`` rows each, the other view's."""
    return tl.where(half > 0, tl.where(rows < half, rows + half, rows - half), rows)


@triton.jit
def store_rows(out, rows, n, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (R, BLOCK_D) into a contiguous (n, D), in its dtype."""
    d = tl.arange(0, BLOCK_D)
    at = out + rows.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=(rows < n)[:, None] & (d < D)[None, :])


@triton.jit
def add_product(acc, a, b, b_low, b_rest, PIECES: tl.constexpr):
    """acc + a @ b, where a (R, C) is not yet in pieces.

    A matrix unit cuts its sums off instead of rounding them. Over a whole pass that would be a bias of 1e-5, so that
    float32's products are summed tile by tile, and the tiles by an addition that rounds.
    """
    if PIECES == 1:
        a = a.to(b.dtype)
    high, low, rest = cut(a, PIECES)
    if PIECES == 1:
        return product(high, low, rest, b, b_low, b_rest, acc, False, PIECES)
    else:
        return acc + product(high, low, rest, b, b_low, b_rest, tl.zeros(acc.shape, tl.float32), False, PIECES)


@triton.jit
def store_pieces(out, rows, n, value, D: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """Rows (R, BLOCK_D), float32, into a contiguous (PIECES, n, D); a single piece is in the dtype of ``out``."""
    high, low, rest = cut(value, PIECES)
    plane_size = n.to(tl.int64) * D
    store_rows(out, rows, n, high, D, BLOCK_D)
    if PIECES >= 2:
        store_rows(out + plane_size, rows, n, low, D, BLOCK_D)
    if PIECES == 3:
        store_rows(out + 2 * plane_size, rows, n, rest, D, BLOCK_D)


@triton.jit
def store_plane(out, plane: tl.constexpr, rows, n, value):
    """One number a row into a plane of a contiguous (planes, n)."""
    tl.store(out + plane * n.to(tl.int64) + rows, value, mask=rows < n)


@triton.jit
def inverse_norm(x):
    """1 / length of each row of x (R, D), float32."""
    x = x.to(tl.float32)
    return inverse_length(tl.sum(x * x, 1))


@triton.jit
def gradient_inverse(inverse, eps):
    """1 / length as a gradient is multiplied by it: at most 1 / eps, so that it fits the input's dtype."""
    return tl.minimum(inverse, 1.0 / eps, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite_rows(x):
    """Which rows of x (R, D) hold neither NaN nor infinity."""
    zero = tl.sum(x.to(tl.float32) * 0.0, 1)
    return zero == 0.0


@triton.jit
def through_unit(gradient, raw, eps, CLEAN: tl.constexpr):
    """From the gradient of unit rows (R, D) to that of the raw ones. CLEAN: rows that are not finite count as 0."""
    raw = raw.to(tl.float32)
    if CLEAN:
        raw = tl.where(finite_rows(raw)[:, None], raw, 0.0)
    inverse = inverse_norm(raw)
    unit = raw * inverse[:, None]
    along = tl.sum(unit * gradient, 1)
    return (gradient - unit * along[:, None]) * gradient_inverse(inverse, eps)[:, None]


# ------------------------------------------------------------------------------------------------------ pairs that stay


@triton.jit
def kept(
    keep, row, key, row_ids, key_ids, ids_stride_n, ids_stride_k, mask, mask_stride_n, mask_stride_k, row_in, key_in,
    IDS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``keep`` without the pairs that ids or a mask leave out.

    row and key (int64) are broadcast against each other, and may be read where row_in and key_in say so. IDS and MASKED
    are the numbers of dimensions that the keys' ids and the mask have, 0 where there are none.
    """
    if IDS == 1:
        keep = keep & (row_ids != tl.load(key_ids + key * ids_stride_k, mask=key_in, other=0))
    if IDS == 2:
        at = key_ids + row * ids_stride_n + key * ids_stride_k
        keep = keep & (row_ids != tl.load(at, mask=row_in & key_in, other=0))
    if MASKED == 1:
        keep = keep & (tl.load(mask + key * mask_stride_k, mask=key_in, other=0) != 0)
    if MASKED == 2:
        at = mask + row * mask_stride_n + key * mask_stride_k
        keep = keep & (tl.load(at, mask=row_in & key_in, other=0) != 0)
    return keep


@triton.jit
def wrapped(place, modulus, SHORT_BAND: tl.constexpr):
    """place % modulus, where place - modulus is less than a tile. SHORT_BAND: so is modulus."""
    if SHORT_BAND:
        return place % modulus
    else:
        return tl.where(place >= modulus, place - modulus, place)


# ------------------------------------------------------------------------------------------------------- running sums


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
def tie_broken(positive_logit):
    """The logit from which on a negative counts as more similar than the positive: equal ones do."""
    return positive_logit - TIE * tl.abs(positive_logit)


# ----------------------------------------------------------------------------------- from what a pass saw to the answer


@triton.jit
def store_weights(out, rows, n, base, total, pull, inverse, t):
    """What a row, multiplied as it is stored, brings to backward; ``out`` (len(Row), n)."""
    stored_pull = pull * inverse
    store_plane(out, ROW_BASE, rows, n, base)
    store_plane(out, ROW_TOTAL, rows, n, total)
    store_plane(out, ROW_PULL, rows, n, pull)
    store_plane(out, ROW_INVERSE, rows, n, inverse)
    store_plane(out, ROW_SCALE, rows, n, inverse * (LOG2E / t))
    store_plane(out, ROW_STORED_PULL, rows, n, stored_pull)
    above = tl.minimum(base - LOG2E / t, 126.0)  # more only where raw rows have larger logits, and nobody asks for it
    store_plane(out, ROW_BOUNDED_PULL, rows, n, stored_pull / tl.exp2(above))
    size = tl.abs(stored_pull)
    shift = tl.where(size == 0.0, float("-inf"), tl.log2(tl.where(size == 0.0, 1.0, size)) - base)
    store_plane(out, ROW_SHIFT, rows, n, shift)


@triton.jit
def finish(
    q, p, rows,  # queries and positives (R, BLOCK_D), raw
    maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,  # what was seen of each row
    query_gradient, positive_gradient, out_rows, metrics,
    n, t, inter_t, alpha, share, query_eps, positive_eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, ALPHA: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """Losses (R,) of some rows; stores gradients and statistics. mean_key: the sum of exponentials times keys."""
    q, p = q.to(tl.float32), p.to(tl.float32)
    q_inverse = tl.full(rows.shape, 1.0, tl.float32)
    p_inverse = q_inverse
    if NORMALIZE:
        q_inverse, p_inverse = inverse_norm(q), inverse_norm(p)
        q, p = q * q_inverse[:, None], p * p_inverse[:, None]
    s = tl.sum(q * p, 1)
    zero = tl.zeros(rows.shape, tl.float32)
    shift = zero
    if ALPHA:
        shift = tl.log(alpha / tl.maximum(count, 1.0))
    total = something(total)
    inter_above = zero
    if LOSS == "dual":
        inter_above, inter_total = s * (LOG2E / inter_t) - inter_maximum, something(inter_total)
    row_loss, intra_loss, weight, log_weight = values(
        s * (LOG2E / t) - maximum, total, inter_above, inter_total, shift, LOSS
    )
    base, rest = rounded_log_sum(maximum, total)
    factor = weight * share / t
    store_weights(out_rows, rows, n, base, rest, factor / rest, q_inverse, t)
    store_plane(out_rows, ROW_POSITIVE, rows, n, s)
    temperature_gradient = zero
    if query_gradient is not None:
        mean_key = mean_key / total[:, None]
        change = (mean_key - p) * factor[:, None]
        if NORMALIZE:
            along = tl.sum(q * change, 1)
            change = (change - q * along[:, None]) * gradient_inverse(q_inverse, query_eps)[:, None]
        store_rows(query_gradient, rows, n, change, D, BLOCK_D)
        temperature_gradient = factor / t * (s - tl.sum(q * mean_key, 1))
    store_plane(out_rows, ROW_TEMPERATURE_GRADIENT, rows, n, temperature_gradient)
    if positive_gradient is not None:
        change = q * (-factor)[:, None]
        if NORMALIZE:
            along = tl.sum(p * change, 1)
            change = (change - p * along[:, None]) * gradient_inverse(p_inverse, positive_eps)[:, None]
        store_rows(positive_gradient, rows, n, change, D, BLOCK_D)
    if metrics is not None:
        store_plane(metrics, METRIC_WEIGHT, rows, n, weight)
        store_plane(metrics, METRIC_COUNT, rows, n, count)
        store_plane(metrics, METRIC_LOG_WEIGHT, rows, n, log_weight)
        store_plane(metrics, METRIC_INTRA, rows, n, intra_loss)
        store_plane(metrics, METRIC_RANK, rows, n, rank)
        store_plane(metrics, METRIC_NEGATIVE, rows, n, logit_sum * (t * LN2) / tl.maximum(count, 1.0))
    return row_loss * share


@triton.jit
def finish_logsumexp(
    rows, maximum, total, mean_key, lse, out_mean_key, out_rows, n, t, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The log-sum-exp in base e, the mean key, and what backward needs."""
    total = something(total)
    tl.store(lse + rows, (maximum + tl.log2(total)) * LN2, mask=rows < n)
    base, rest = rounded_log_sum(maximum, total)
    zero = tl.zeros(rows.shape, tl.float32)
    store_weights(out_rows, rows, n, base, rest, 1.0 / (t * rest), zero + 1.0, t)
    store_plane(out_rows, ROW_POSITIVE, rows, n, zero)
    store_plane(out_rows, ROW_TEMPERATURE_GRADIENT, rows, n, zero)
    if out_mean_key is not None:
        store_rows(out_mean_key, rows, n, mean_key / total[:, None], D, BLOCK_D)


@triton.jit
def store_parts(
    parts, outs, split, splits, rows, n, maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOSS: tl.constexpr, METRICS: tl.constexpr,
):  # fmt: skip
    """What one split saw: ``parts`` (len(Part), splits, n) and ``outs`` (splits, n, D)."""
    valid = rows < n
    plane_size = splits.to(tl.int64) * n
    at = parts + split.to(tl.int64) * n + rows
    tl.store(at + PART_MAXIMUM * plane_size, maximum, mask=valid)
    tl.store(at + PART_TOTAL * plane_size, total, mask=valid)
    tl.store(at + PART_COUNT * plane_size, count, mask=valid)
    if LOSS == "dual":
        tl.store(at + PART_INTER_MAXIMUM * plane_size, inter_maximum, mask=valid)
        tl.store(at + PART_INTER_TOTAL * plane_size, inter_total, mask=valid)
    if METRICS:
        tl.store(at + PART_RANK * plane_size, rank, mask=valid)
        tl.store(at + PART_LOGIT_SUM * plane_size, logit_sum, mask=valid)
    if outs is not None:
        store_rows(outs + split.to(tl.int64) * n * D, rows, n, mean_key, D, BLOCK_D)
