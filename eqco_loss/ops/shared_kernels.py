"""What the kernels of both Triton backends share: the names of planes, lengths and the temperature, and ``gap`` for
kernels, which is what they do once their passes over the negatives are over.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from . import calls
from .calls import Metric, Row

LN2, LOG2E = tl.constexpr(calls.LN2), tl.constexpr(calls.LOG2E)
NORM_EPS, MINIMUM = tl.constexpr(calls.NORM_EPS), tl.constexpr(calls.MINIMUM)

ROW_BASE, ROW_TOTAL, ROW_PULL = (tl.constexpr(int(row)) for row in (Row.BASE, Row.TOTAL, Row.PULL))
ROW_POSITIVE, ROW_TEMPERATURE_GRADIENT = tl.constexpr(int(Row.POSITIVE)), tl.constexpr(int(Row.TEMPERATURE_GRADIENT))
ROW_INVERSE, ROW_SCALE, ROW_SHIFT = (tl.constexpr(int(row)) for row in (Row.INVERSE, Row.SCALE, Row.SHIFT))
ROW_STORED_PULL, ROW_BOUNDED_PULL = tl.constexpr(int(Row.STORED_PULL)), tl.constexpr(int(Row.BOUNDED_PULL))
METRIC_WEIGHT, METRIC_COUNT = tl.constexpr(int(Metric.WEIGHT)), tl.constexpr(int(Metric.COUNT))
METRIC_LOG_WEIGHT, METRIC_INTRA = tl.constexpr(int(Metric.LOG_WEIGHT)), tl.constexpr(int(Metric.INTRA_LOSS))
METRIC_RANK, METRIC_NEGATIVE = tl.constexpr(int(Metric.RANK)), tl.constexpr(int(Metric.NEGATIVE))


@triton.jit
def read_temperature(number, tensor):
    """t; NaN where it is learned and not positive."""
    t = number
    if tensor is not None:
        t = tl.load(tensor).to(tl.float32)
        t = tl.where(t > 0.0, t, float("nan"))
    return t


@triton.jit
def inverse_length(squares):
    """1 / length of rows whose squares add up to these."""
    return 1.0 / tl.maximum(tl.sqrt(squares), NORM_EPS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded_log_sum(maximum, total):
    """BASE and TOTAL, as ``calls.rounded_log_sum`` has them."""
    base = maximum + tl.log2(total)
    return base, total * tl.exp2(maximum - base)


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
    log1p_over_e = tl.where(u == 1.0, 1.0, tl.log(u) / tl.where(u == 1.0, 1.0, u - 1.0))
    negative = (tl.maximum(-x, 0.0) + log1p_over_e * e) * u
    return tl.where(x < 0, negative, tl.where(u == 1.0, 1.0 + 0.5 * e, log1p_over_e * u))


@triton.jit
def something(total):
    """``total``, NaN where nothing was added."""
    return tl.where(total == 0.0, float("nan"), total)


@triton.jit
def values(above, total, inter_above, inter_total, shift, LOSS: tl.constexpr):
    """Of a loss of ``calls.loss_of``: loss, intra_loss, weight and log_weight, (R,) each.

    These are its value, its value at the first temperature alone, -d loss / d gap, and the logarithm of the dual
    temperature's weight. ``above`` is the positive's logit less the maximum, whose difference is exact.
    """
    gap = (above - tl.log2(total)) * LN2 - shift
    intra_loss = softplus(-gap)
    weight, log_weight, loss = sigmoid(-gap), gap * 0.0, intra_loss
    if LOSS == "dual":
        inter_gap = (inter_above - tl.log2(inter_total)) * LN2 - shift
        weight = sigmoid(-inter_gap)  # = W * sigmoid(-gap), because the factor that vanishes cancels
        log_weight = softplus(gap) - softplus(inter_gap)
        loss = weight * softplus_over_sigmoid(gap)
    return loss, intra_loss, weight, log_weight


@triton.jit
def add_up(value, scratch, total):
    """``total`` (): the sum of all programs' values, in a fixed order, by the program that comes last.

    ``scratch`` (1 + programs,) counts at its first place, which must be 0, how many programs have left their values.
    """
    programs = tl.num_programs(0) * tl.num_programs(1)
    tl.store(scratch + 1 + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), value)
    before = tl.atomic_add(scratch, 1.0, sem="acq_rel", scope="gpu")
    if before == programs - 1:
        at = tl.arange(0, 1024)
        sums = tl.zeros([1024], tl.float32)
        for start in range(0, programs, 1024):
            one = start + at
            sums += tl.load(scratch + 1 + one, mask=one < programs, other=0.0, cache_modifier=".cg")  # not in L1
        tl.store(total, tl.sum(sums, 0))
