"""The pointwise work between two products, one kernel each: ``pointwise.py`` says what they compute.

An absent tensor is None, which Triton compiles away. Statistics are float32.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from ..shared_kernels import (
    LN2,
    LOG2E,
    METRIC_COUNT,
    METRIC_INTRA,
    METRIC_LOG_WEIGHT,
    METRIC_NEGATIVE,
    METRIC_RANK,
    METRIC_WEIGHT,
    MINIMUM,
    ROW_BASE,
    ROW_BOUNDED_PULL,
    ROW_POSITIVE,
    ROW_PULL,
    ROW_TEMPERATURE_GRADIENT,
    ROW_TOTAL,
    inverse_length,
    read_temperature,
    rounded_log_sum,
    something,
    values,
)
from .pointwise import Plane

MAXIMUM, TOTAL = tl.constexpr(int(Plane.MAXIMUM)), tl.constexpr(int(Plane.TOTAL))
INTER_TOTAL, COUNT = tl.constexpr(int(Plane.INTER_TOTAL)), tl.constexpr(int(Plane.COUNT))
RANK, LOGIT_SUM = tl.constexpr(int(Plane.RANK)), tl.constexpr(int(Plane.LOGIT_SUM))
WEIGHTED = tl.constexpr(int(Plane.WEIGHTED))


# --------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def load_logits(
    x, x_stride_r, x_stride_c, row_scale, key_scale, key_scale_stride_r, key_scale_stride_c,
    query_ids, key_ids, ids_stride_r, ids_stride_c, mask, mask_stride_r, mask_stride_c, count,
    rows, columns, n, k, first_key, ahead, width, modulus, WRAP: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Logits of a block, its keys' scales, and which of its pairs stay."""
    in_rows, in_columns = rows < n, columns < k
    keep = in_rows[:, None] & in_columns[None, :]
    value = tl.load(x + rows[:, None] * x_stride_r + columns[None, :] * x_stride_c, mask=keep, other=0.0)
    if OWN:  # each row's keys are its own
        at = key_scale + rows[:, None] * key_scale_stride_r + columns[None, :] * key_scale_stride_c
        scale = tl.load(at, mask=keep, other=0.0)
    else:
        scale = tl.load(key_scale + columns * key_scale_stride_c, mask=in_columns, other=0.0)[None, :]
    logit = value * tl.load(row_scale + rows, mask=in_rows, other=0.0)[:, None] * scale
    if WRAP != 0:  # a band: by how far a key is ahead of the row's first, cyclic
        place = ahead + columns[None, :] - rows[:, None]
        if WRAP == 1:
            place = tl.where(place < 0, place + modulus, place)
            place = tl.where(place >= modulus, place - modulus, place)
        else:  # the caller has made it positive
            place = place % modulus
        keep = keep & (place < width)
    if count is not None:
        keep = keep & ((columns + first_key)[None, :] < tl.load(count))
    wide_rows, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
    if key_ids is not None:
        ids = tl.load(query_ids + wide_rows, mask=in_rows, other=0)
        at = key_ids + wide_rows[:, None] * ids_stride_r + wide_columns[None, :] * ids_stride_c
        keep = keep & (ids[:, None] != tl.load(at, mask=keep, other=0))
    if mask is not None:
        at = mask + wide_rows[:, None] * mask_stride_r + wide_columns[None, :] * mask_stride_c
        keep = keep & (tl.load(at, mask=keep, other=0) != 0)
    return logit, scale, keep


@triton.jit
def fold_kernel(
    x, x_stride_r, x_stride_c, row_scale, key_scale, key_scale_stride_r, key_scale_stride_c,
    query_ids, key_ids, ids_stride_r, ids_stride_c, mask, mask_stride_r, mask_stride_c, count,
    state, state_stride, weights, weights_stride, shrink, ratio, threshold,
    n, k, first_key, ahead, width, modulus,
    FIRST: tl.constexpr, WRAP: tl.constexpr, OWN: tl.constexpr, COUNT_PAIRS: tl.constexpr, WEIGH: tl.constexpr,
    TWICE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Some rows of a tile into their states.

    FIRST: there is nothing in these yet. Weights need the whole row's maximum. Where a row has several blocks, one
    visit of them all finds it first (TWICE); else the one visit follows the maximum.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < n
    old = tl.full((BLOCK_ROWS,), MINIMUM, tl.float32)
    if not FIRST:
        old = tl.load(state + MAXIMUM * state_stride + rows, mask=in_rows, other=0.0)
    new = old
    if TWICE:
        highest = tl.full((BLOCK_ROWS, BLOCK_KEYS), float("-inf"), tl.float32)
        for first in range(0, k, BLOCK_KEYS):
            columns = first + tl.arange(0, BLOCK_KEYS)
            logit, _, keep = load_logits(
                x, x_stride_r, x_stride_c, row_scale, key_scale, key_scale_stride_r, key_scale_stride_c,
                query_ids, key_ids, ids_stride_r, ids_stride_c, mask, mask_stride_r, mask_stride_c, count,
                rows, columns, n, k, first_key, ahead, width, modulus, WRAP, OWN,
            )  # fmt: skip
            highest = tl.maximum(highest, tl.where(keep, logit, float("-inf")))
        new = tl.maximum(old, tl.max(highest, 1))
    total = tl.zeros((BLOCK_ROWS, BLOCK_KEYS), tl.float32)
    inter_total, kept, rank, logit_sum, weighted = total, total, total, total, total
    if ratio is not None:
        to_inter = tl.load(ratio)
    if threshold is not None:
        above = tl.load(threshold + rows, mask=in_rows, other=0.0)[:, None]
    for first in range(0, k, BLOCK_KEYS):
        columns = first + tl.arange(0, BLOCK_KEYS)
        logit, scale, keep = load_logits(
            x, x_stride_r, x_stride_c, row_scale, key_scale, key_scale_stride_r, key_scale_stride_c,
            query_ids, key_ids, ids_stride_r, ids_stride_c, mask, mask_stride_r, mask_stride_c, count,
            rows, columns, n, k, first_key, ahead, width, modulus, WRAP, OWN,
        )  # fmt: skip
        if COUNT_PAIRS:
            kept += keep.to(tl.float32)
        if threshold is not None:
            rank += (keep & (logit > above)).to(tl.float32)
            logit_sum += tl.where(keep, logit, 0.0)
        logit = tl.where(keep, logit, float("-inf"))
        if not TWICE:
            higher = tl.maximum(new, tl.max(tl.maximum(logit, float("-inf")), 1))  # NaN is no maximum, and is summed
            fall = (new - higher)[:, None]
            new = higher
            if WEIGH:
                weighted = (weighted + fall * total) * tl.exp2(fall)
            if ratio is not None:
                inter_total = inter_total * tl.exp2(fall * to_inter)
            total = total * tl.exp2(fall)
        lower = logit - new[:, None]
        weight = tl.exp2(lower)
        total += weight
        if ratio is not None:
            inter_total += tl.exp2(lower * to_inter)
        if WEIGH:
            weighted += weight * tl.maximum(lower, -2000.0)  # where weight is 0, and 0 * -inf is NaN
        if weights is not None:
            at = weights + rows[:, None] * weights_stride + columns[None, :]
            value = tl.where(keep, weight * scale, 0.0)
            tl.store(at, value.to(weights.dtype.element_ty), mask=in_rows[:, None] & (columns < k)[None, :])
    smaller = tl.exp2(old - new)
    tl.store(shrink + rows, smaller, mask=in_rows)
    tl.store(state + MAXIMUM * state_stride + rows, new, mask=in_rows)
    if WEIGH:  # before TOTAL, of which it reads the old one
        at = state + WEIGHTED * state_stride + rows
        before = smaller * 0.0
        if not FIRST:
            before = tl.load(at, mask=in_rows, other=0.0)
            before += (old - new) * tl.load(state + TOTAL * state_stride + rows, mask=in_rows, other=0.0)
        tl.store(at, before * smaller + tl.sum(weighted, 1), mask=in_rows)
    add(state + TOTAL * state_stride + rows, smaller, tl.sum(total, 1), in_rows, FIRST)
    if ratio is not None:
        add(
            state + INTER_TOTAL * state_stride + rows,
            tl.exp2((old - new) * to_inter),
            tl.sum(inter_total, 1),
            in_rows,
            FIRST,
        )
    if COUNT_PAIRS:
        add(state + COUNT * state_stride + rows, 1.0, tl.sum(kept, 1), in_rows, FIRST)
    if threshold is not None:
        add(state + RANK * state_stride + rows, 1.0, tl.sum(rank, 1), in_rows, FIRST)
        add(state + LOGIT_SUM * state_stride + rows, 1.0, tl.sum(logit_sum, 1), in_rows, FIRST)


@triton.jit
def add(at, factor, value, inside, FIRST: tl.constexpr):
    """What lies at ``at``, times factor, plus value; FIRST: the value alone."""
    if not FIRST:
        value += tl.load(at, mask=inside, other=0.0) * factor
    tl.store(at, value, mask=inside)


@triton.jit
def weights_kernel(
    x, x_stride_r, x_stride_c, row_scale, key_scale, key_scale_stride_r, key_scale_stride_c,
    query_ids, key_ids, ids_stride_r, ids_stride_c, mask, mask_stride_r, mask_stride_c, count,
    base, factor, pull, key_base, key_pull, out, out_stride,
    n, k, first_key, ahead, width, modulus,
    WRAP: tl.constexpr, OWN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """A block of the weights, of the rows' role as anchors or, where key_base is given, of both roles."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    in_rows, in_columns = rows < n, columns < k
    logit, scale, keep = load_logits(
        x, x_stride_r, x_stride_c, row_scale, key_scale, key_scale_stride_r, key_scale_stride_c,
        query_ids, key_ids, ids_stride_r, ids_stride_c, mask, mask_stride_r, mask_stride_c, count,
        rows, columns, n, k, first_key, ahead, width, modulus, WRAP, OWN,
    )  # fmt: skip
    logit = tl.where(keep, logit, float("-inf"))
    weight = tl.exp2(logit - tl.load(base + rows, mask=in_rows, other=0.0)[:, None])
    if key_base is not None:
        of_key = tl.exp2(logit - tl.load(key_base + columns, mask=in_columns, other=0.0)[None, :])
        weight = weight * tl.load(pull + rows, mask=in_rows, other=0.0)[:, None]
        weight = (weight + of_key * tl.load(key_pull + columns, mask=in_columns, other=0.0)[None, :]) * scale
    weight = tl.where(keep, weight * tl.load(factor + rows, mask=in_rows, other=0.0)[:, None], 0.0)
    at = out + rows[:, None] * out_stride + columns[None, :]
    tl.store(at, weight.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def load_plane(state, stride, plane: tl.constexpr, rows, inside, other):
    return tl.load(state + plane * stride + rows, mask=inside, other=other)


@triton.jit
def finished(
    rows, inside, s, maximum, total, inter_total, weighted, count, t, inter_t, alpha, share, out, n,
    ALPHA: tl.constexpr, LOSS: tl.constexpr, LEARNED: tl.constexpr, BOUNDED_TOO: tl.constexpr,
):  # fmt: skip
    """From some rows' statistics to their losses, and to ``out``, (len(Row), n), what backward needs of them.

    BOUNDED_TOO: also PULL for powers of two that are less the largest possible logit instead of BASE.
    """
    shift = tl.zeros(s.shape, tl.float32)
    if ALPHA:
        shift = tl.log(alpha / tl.maximum(count, 1.0))  # of no negatives the maximum is NaN
    above = s * (LOG2E / t) - maximum
    loss, intra_loss, weight, log_weight = values(above, total, above * (t / inter_t), inter_total, shift, LOSS)
    pull = weight * (share / t)
    base, rest = rounded_log_sum(maximum, total)
    tl.store(out + ROW_BASE * n + rows, base, mask=inside)
    tl.store(out + ROW_TOTAL * n + rows, rest, mask=inside)
    tl.store(out + ROW_PULL * n + rows, pull / rest, mask=inside)
    if BOUNDED_TOO:
        below = tl.minimum(-(base - LOG2E / t), 120.0)  # more only where no such power of two is taken
        tl.store(out + ROW_BOUNDED_PULL * n + rows, pull / rest * tl.exp2(below), mask=inside)
    of_temperature = tl.zeros(s.shape, tl.float32)
    if LEARNED:
        of_temperature = pull * (above - weighted / total) * LN2
    tl.store(out + ROW_TEMPERATURE_GRADIENT * n + rows, of_temperature, mask=inside)
    return loss * share, pull, intra_loss, weight, log_weight


@triton.jit
def finish_kernel(
    similarity, state, state_stride, temperature, temperature_tensor, inter_t, known, alpha, share,
    losses, factor, of_sums, out, metrics, n,
    ALPHA: tl.constexpr, LOSS: tl.constexpr, KNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the positives' similarities and the states to losses, ``Row`` and ``Metric``."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    t = read_temperature(temperature, temperature_tensor)
    s = tl.load(similarity + rows, mask=inside, other=0.0)
    maximum = load_plane(state, state_stride, MAXIMUM, rows, inside, 0.0)
    total = something(load_plane(state, state_stride, TOTAL, rows, inside, 1.0))
    count = tl.zeros((BLOCK,), tl.float32) + known
    if not KNOWN:
        count = load_plane(state, state_stride, COUNT, rows, inside, 1.0)
    inter_total, weighted = total, total
    if LOSS == "dual":
        inter_total = something(load_plane(state, state_stride, INTER_TOTAL, rows, inside, 1.0))
    if temperature_tensor is not None:
        weighted = load_plane(state, state_stride, WEIGHTED, rows, inside, 0.0)
    loss, pull, intra_loss, weight, log_weight = finished(
        rows, inside, s, maximum, total, inter_total, weighted, count, t, inter_t, alpha, share, out, n,
        ALPHA, LOSS, temperature_tensor is not None, False,
    )  # fmt: skip
    tl.store(losses + rows, loss, mask=inside)
    tl.store(factor + rows, pull, mask=inside)
    tl.store(of_sums + rows, pull / total, mask=inside)
    tl.store(out + ROW_POSITIVE * n + rows, s, mask=inside)
    if metrics is not None:
        tl.store(metrics + METRIC_WEIGHT * n + rows, weight, mask=inside)
        tl.store(metrics + METRIC_COUNT * n + rows, count, mask=inside)
        tl.store(metrics + METRIC_LOG_WEIGHT * n + rows, log_weight, mask=inside)
        tl.store(metrics + METRIC_INTRA * n + rows, intra_loss, mask=inside)
        rank = load_plane(state, state_stride, RANK, rows, inside, 0.0)
        tl.store(metrics + METRIC_RANK * n + rows, rank, mask=inside)
        logit_sum = load_plane(state, state_stride, LOGIT_SUM, rows, inside, 0.0)
        of_negatives = logit_sum * (t * LN2) / tl.maximum(count, 1.0)
        tl.store(metrics + METRIC_NEGATIVE * n + rows, of_negatives, mask=inside)


@triton.jit
def measure_kernel(
    x, stride_r, stride_d, out, inverse, gradient_inverse, scale, n, d, eps,
    POWER: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows as ``chunks.prepare`` makes them: 1 / length, and, where ``out`` is given, what is multiplied."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at_rows = x + rows.to(tl.int64)[:, None] * stride_r
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        inside = (rows < n)[:, None] & (at < d)[None, :]
        value = tl.load(at_rows + at.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
        total += value * value
    squares = tl.sum(total, 1)
    length, by = tl.sqrt(squares), inverse_length(squares)
    tl.store(inverse + rows, by, mask=rows < n)
    of_gradient = 1.0 / tl.maximum(length, eps, propagate_nan=tl.PropagateNan.ALL)
    tl.store(gradient_inverse + rows, of_gradient, mask=rows < n)
    left = by
    if out is not None:
        factor, left = by, by * 0.0 + 1.0
        if POWER:
            least: tl.constexpr = 2.0**-24
            factor = tl.exp2(-tl.floor(tl.log2(tl.maximum(length, least, propagate_nan=tl.PropagateNan.ALL))))
            left = tl.minimum(by / factor, 1.0, propagate_nan=tl.PropagateNan.ALL)
        for first in range(0, d, BLOCK_D):
            at = first + tl.arange(0, BLOCK_D)
            inside = (rows < n)[:, None] & (at < d)[None, :]
            value = tl.load(at_rows + at.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
            value = (value * factor[:, None]).to(out.dtype.element_ty)
            tl.store(out + rows.to(tl.int64)[:, None] * d + at[None, :], value, mask=inside)
    tl.store(scale + rows, left, mask=rows < n)


@triton.jit
def dots_kernel(
    a, a_stride_r, a_stride_d, b, b_stride_r, b_stride_d, a_inverse, b_inverse, out, d,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, d, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        left = tl.load(a + row * a_stride_r + at.to(tl.int64) * a_stride_d, mask=at < d, other=0.0).to(tl.float32)
        right = tl.load(b + row * b_stride_r + at.to(tl.int64) * b_stride_d, mask=at < d, other=0.0).to(tl.float32)
        total += left * right
    tl.store(out + row, tl.sum(total, 0) * (tl.load(a_inverse + row) * tl.load(b_inverse + row)))


@triton.jit
def load_gradient(
    gradient, gradient_stride, factor, other, other_stride_r, other_stride_d, other_inverse, other_factor, row, at, d,
):  # fmt: skip
    """Some features of the gradient of a unit row."""
    value = tl.zeros(at.shape, tl.float32)
    if gradient is not None:
        of_sums = tl.load(gradient + row * gradient_stride + at, mask=at < d, other=0.0)
        value += of_sums if factor is None else of_sums * tl.load(factor + row)
    if other is not None:
        of_other = tl.load(other + row * other_stride_r + at.to(tl.int64) * other_stride_d, mask=at < d, other=0.0)
        value -= of_other.to(tl.float32) * (tl.load(other_factor + row) * tl.load(other_inverse + row))
    return value


@triton.jit
def through_unit_kernel(
    raw, raw_stride_r, raw_stride_d, inverse, gradient_inverse,
    gradient, gradient_stride, factor, other, other_stride_r, other_stride_d, other_inverse, other_factor,
    out, out_stride, d,
    NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row: one visit for the gradient's part along the unit row, one that takes it away."""
    row = tl.program_id(0).to(tl.int64)
    along = 0.0
    to_unit = tl.load(inverse + row)
    if NORMALIZE:
        total = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(0, d, BLOCK_D):
            at = first + tl.arange(0, BLOCK_D)
            value = load_gradient(
                gradient, gradient_stride, factor, other, other_stride_r, other_stride_d, other_inverse, other_factor,
                row, at, d,
            )  # fmt: skip
            unit = tl.load(raw + row * raw_stride_r + at.to(tl.int64) * raw_stride_d, mask=at < d, other=0.0)
            total += value * (unit.to(tl.float32) * to_unit)
        along = tl.sum(total, 0)
    length = tl.load(gradient_inverse + row)
    for first in range(0, d, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        value = load_gradient(
            gradient, gradient_stride, factor, other, other_stride_r, other_stride_d, other_inverse, other_factor,
            row, at, d,
        )  # fmt: skip
        if NORMALIZE:
            unit = tl.load(raw + row * raw_stride_r + at.to(tl.int64) * raw_stride_d, mask=at < d, other=0.0)
            value = (value - (unit.to(tl.float32) * to_unit) * along) * length
        tl.store(out + row * out_stride + at, value.to(out.dtype.element_ty), mask=at < d)
