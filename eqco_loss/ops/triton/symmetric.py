"""The gradient of both directions between two views in one pass, where every row is an anchor, a positive and a key."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from ..shared_kernels import (
    LOG2E,
    ROW_BASE,
    ROW_BOUNDED_PULL,
    ROW_INVERSE,
    ROW_PULL,
    ROW_SCALE,
    ROW_STORED_PULL,
    ROW_TOTAL,
    read_temperature,
)
from .parts import add_product, inverse_norm, load_pieces, load_rows, product, store_rows, through_unit, wrapped


@triton.jit(do_not_specialize=["n", "m", "per_split"])
def symmetric_rows(
    views, stride_piece, stride_n, stride_d, raw_views, raw_stride_n, raw_stride_d, weights, largest,
    grad, temperature_tensor, out, along, n, m, per_split, temperature, eps,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    ACROSS: tl.constexpr, ONE_EXP: tl.constexpr, SHORT_BAND: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
    FAR: tl.constexpr, WHOLE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """A block of rows z (2M, D) against one split of the others.

    For unit rows the gradient is grad times sum_j (a_i P_ij + a_j P_ji) z_j - (a_i + a_p) z_p: p the row's other view,
    a its PULL * TOTAL, P the softmax over both views or, ACROSS, the other one. ``along`` (splits, 2M), where it is
    given, gets the product of the sum with z_i, of which a learned temperature's gradient is made. ``views``
    (PIECES, 2M, D) is in the dtype of the products, ``raw_views`` what was given. ``out`` gets the gradient, or,
    without WHOLE_GRADIENT, (splits, 2M, D) shares of it for ``merge_splits``. ONE_EXP: 2 ** (logit - largest possible
    logit) serves both softmaxes.
    """
    t = read_temperature(temperature, temperature_tensor)
    block, split = tl.program_id(0), tl.program_id(1)
    anchors, own_start = n, 0
    if ACROSS:  # a block's rows are of one view
        per_view_blocks = tl.cdiv(m, BLOCK_ROWS)
        anchors, own_start, block = m, block // per_view_blocks * m, block % per_view_blocks
    place_in_view = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = place_in_view < anchors
    plane_size = n.to(tl.int64)
    rows = own_start + tl.minimum(place_in_view, anchors - 1)  # beyond the last row, that row
    q, q_low, q_rest = load_pieces(views, stride_piece, rows, stride_n, stride_d, n, D, BLOCK_D, True, PIECES)
    half: tl.constexpr = q.dtype == tl.float16
    scale, base = tl.load(weights + ROW_SCALE * plane_size + rows), tl.load(weights + ROW_BASE * plane_size + rows)
    inverse = tl.load(weights + ROW_INVERSE * plane_size + rows)
    prescale = 1.0
    if half:  # float16 would lose what is small
        most = tl.load(largest)
        prescale = 2048.0 / tl.where(most > 1e-30, most, 1.0)
    highest = LOG2E / t  # no logit is larger: with ONE_EXP no power of two leaves float32
    pulls = weights + (ROW_BOUNDED_PULL if ONE_EXP else ROW_STORED_PULL) * plane_size
    a = tl.load(pulls + rows) / inverse * prescale
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    width = m - 1
    per_view = tl.cdiv(BLOCK_ROWS - 1 + width, BLOCK_KEYS) * BLOCK_KEYS
    first = block * BLOCK_ROWS + 1
    lo, hi = split * per_split, tl.minimum((split + 1) * per_split, (1 if ACROSS else 2) * per_view)
    start = (first + lo % per_view) % m
    for visited in tl.range(lo, hi, BLOCK_KEYS, num_stages=STAGES):
        second = visited >= per_view
        c = visited - tl.where(second, per_view, 0)
        start = tl.where(c == 0, first % m, start)
        place = wrapped(start + tl.arange(0, BLOCK_KEYS), m, SHORT_BAND)
        place += m - own_start if ACROSS else tl.where(second, m, 0)
        start = wrapped(start + BLOCK_KEYS, m, SHORT_BAND)
        k, k_low, k_rest = load_pieces(views, stride_piece, place, stride_n, stride_d, n, D, BLOCK_D, FAR, PIECES)
        key_pull = tl.load(pulls + place) * prescale
        key_inverse = tl.load(weights + ROW_INVERSE * plane_size + place)
        logits = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
        logits = product(q, q_low, q_rest, tl.trans(k), tl.trans(k_low), tl.trans(k_rest), logits, False, PIECES)
        logits = logits * scale[:, None] * key_inverse[None, :]
        if ONE_EXP:
            x = tl.exp2(logits - highest) * (a[:, None] * key_inverse[None, :] + key_pull[None, :])
        else:
            key_base = tl.load(weights + ROW_BASE * plane_size + place)
            x = tl.exp2(logits - base[:, None]) * (a[:, None] * key_inverse[None, :])
            x += tl.exp2(logits - key_base[None, :]) * key_pull[None, :]
        if c < BLOCK_ROWS - 1 or c + BLOCK_KEYS > width:
            ahead = c + tl.arange(0, BLOCK_KEYS)[None, :] - tl.arange(0, BLOCK_ROWS)[:, None]
            x = tl.where((ahead >= 0) & (ahead < width), x, 0.0)
        if half:  # of rows that are only padding
            x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        acc = add_product(acc, x, k, k_low, k_rest, PIECES)
    acc = acc / prescale
    if along is not None:
        z = q.to(tl.float32)
        if PIECES >= 2:
            z += q_low.to(tl.float32)
        if PIECES == 3:
            z += q_rest.to(tl.float32)
        tl.store(along + split.to(tl.int64) * n + rows, tl.sum(z * acc, 1) * inverse, mask=valid)
    if split == 0:
        other = tl.where(rows < m, rows + m, rows - m)
        length = tl.load(weights + ROW_PULL * plane_size + rows) * tl.load(weights + ROW_TOTAL * plane_size + rows)
        length += tl.load(weights + ROW_PULL * plane_size + other) * tl.load(weights + ROW_TOTAL * plane_size + other)
        partner = load_rows(raw_views, other, raw_stride_n, raw_stride_d, n, D, BLOCK_D, False, True).to(tl.float32)
        acc -= (length * inverse_norm(partner))[:, None] * partner
    acc = acc * tl.load(grad).to(tl.float32)
    if WHOLE_GRADIENT:
        raw = load_rows(raw_views, rows, raw_stride_n, raw_stride_d, n, D, BLOCK_D, False, True)
        acc = through_unit(acc, raw, eps, False)
    at = out + (split.to(tl.int64) * n + own_start) * D
    store_rows(at, place_in_view, anchors, acc, D, BLOCK_D)
