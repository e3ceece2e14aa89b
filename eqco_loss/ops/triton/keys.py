"""The keys' gradient: dL/dn_j = sum_i grad_i PULL_i 2 ** (x_ij - BASE_i) q_i, one more pass, seen from the keys."""

# mypy: ignore-errors
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from ..shared_kernels import ROW_BASE, ROW_PULL, ROW_SCALE, ROW_SHIFT, ROW_STORED_PULL, ROW_TOTAL, read_temperature
from .ids import alike, may_be_alike
from .parts import (
    PIECE_SCALE,
    add_product,
    cut,
    finite_rows,
    inverse_norm,
    kept,
    load_pieces,
    load_rows,
    product,
    store_pieces,
    store_rows,
    store_weights,
    through_unit,
    wrapped,
)


@triton.jit(do_not_specialize=["n"])
def row_weights(
    query, stride_n, stride_d, grad, grad_stride, rows_in, temperature_tensor, out, prepared, n, temperature,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, POWER: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """What a row brings to backward, ``out`` (len(Row), n), from ``rows_in``, which forward left.

    Where each row has a gradient of its own, ``grad``, PULL is multiplied by it. Where ``prepared`` is given, it gets
    the rows in the dtype of the products: unit ones, or with POWER multiplied by a power of two near 1 / norm, which
    rounds nothing; ``out`` is then of the prepared rows.
    """
    t = read_temperature(temperature, temperature_tensor)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < n
    inverse = tl.full([BLOCK], 1.0, tl.float32)
    if NORMALIZE or prepared is not None:
        q = load_rows(query, rows, stride_n, stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
        if NORMALIZE:
            inverse = inverse_norm(q)
        if prepared is not None:
            factor = inverse
            if POWER:
                factor = tl.exp2(tl.floor(tl.log2(inverse)))
            if PIECES == 2:
                factor = inverse * PIECE_SCALE
            store_pieces(prepared, rows, n, q * factor[:, None], D, BLOCK_D, PIECES)
            inverse = inverse / factor
    plane_size = n.to(tl.int64)
    base = tl.load(rows_in + ROW_BASE * plane_size + rows, mask=valid, other=0.0)
    total = tl.load(rows_in + ROW_TOTAL * plane_size + rows, mask=valid, other=0.0)
    pull = tl.load(rows_in + ROW_PULL * plane_size + rows, mask=valid, other=0.0)
    if grad is not None:
        pull *= tl.load(grad + rows.to(tl.int64) * grad_stride, mask=valid, other=0.0).to(tl.float32)
    store_weights(out, rows, n, base, total, pull, inverse, t)


# ---------------------------------------------------------------------------------------------------------- shared keys


@triton.jit
def collect(
    acc, k, k_low, k_rest, key_inverse, key_row, keys_at,
    query, stride_piece, stride_n, stride_d, weights, prescale,
    query_ids, key_ids, ids_stride_n, ids_stride_k, mask, mask_stride_n, mask_stride_k, marks,
    n, first, modulus, width, offset, key_limit, lo, hi, key,
    D: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPARE: tl.constexpr, BAND: tl.constexpr, SHORT_BAND: tl.constexpr, IDS: tl.constexpr, MASKED: tl.constexpr,
    FACTOR: tl.constexpr, FOLDED: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
    FAR: tl.constexpr,
):  # fmt: skip
    """acc (C, D) += sum over the rows lo .. hi of weight * softmax * query.

    FACTOR: keys are still to be divided by their norms. FOLDED: SHIFT stands for BASE and STORED_PULL. ``marks``:
    see ``forward.visit``.
    """
    plane_size = n.to(tl.int64)
    start = lo
    if BAND == "cyclic":
        start = (first + lo) % modulus
    for c in tl.range(lo, hi, BLOCK_ROWS, num_stages=STAGES):
        column = c + tl.arange(0, BLOCK_ROWS)
        row = column
        if BAND == "cyclic":
            row = wrapped(start + tl.arange(0, BLOCK_ROWS), modulus, SHORT_BAND)
            start = wrapped(start + BLOCK_ROWS, modulus, SHORT_BAND)
        present = row < n
        if COMPARE != "ends":  # beyond the last row, that row is loaded again: a mask of the load takes registers
            row = tl.minimum(row, n - 1)
        if COMPARE == "ends" or marks is not None:
            rare = False  # whether some pair of this tile may have to be left out
            if COMPARE == "ends":
                rare = c < BLOCK_KEYS - 1 or c + BLOCK_ROWS > width
            if marks is not None:
                from_row = c
                if BAND == "cyclic":
                    from_row = (first + c) % modulus
                    rare = rare or from_row + BLOCK_ROWS > modulus
                rare = rare or may_be_alike(
                    marks, n, from_row, tl.minimum(from_row + BLOCK_ROWS, n) - 1,
                    key, tl.minimum(key + BLOCK_KEYS, key_limit) - 1,
                    BLOCK_ROWS, BLOCK_KEYS,
                )  # fmt: skip
        q, q_low, q_rest = load_pieces(query, stride_piece, row, stride_n, stride_d, n, D, BLOCK_D, FAR, PIECES)
        scale = tl.load(weights + ROW_SCALE * plane_size + row)
        if PIECES == 2:
            scale = scale / PIECE_SCALE
        s = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], tl.float32)
        s = product(k, k_low, k_rest, tl.trans(q), tl.trans(q_low), tl.trans(q_rest), s, True, PIECES)
        if FACTOR:
            s = s * key_inverse[:, None]
        if FOLDED:
            shift = tl.load(weights + ROW_SHIFT * plane_size + row) + tl.log2(prescale)
            if COMPARE == "tail":
                shift = tl.where(present, shift, float("-inf"))
            x = tl.exp2(s * scale[None, :] + shift[None, :])
        else:
            base = tl.load(weights + ROW_BASE * plane_size + row)
            pull = tl.load(weights + ROW_STORED_PULL * plane_size + row) * prescale
            if COMPARE == "tail":
                pull = tl.where(present, pull, 0.0)
            x = tl.exp2(s * scale[None, :] - base[None, :]) * pull[None, :]
        if COMPARE == "pairs":
            keep = present[None, :] & (key_row >= 0)[:, None]
            if BAND == "cyclic":
                ahead = column[None, :] - tl.arange(0, BLOCK_KEYS)[:, None]
                keep = keep & (ahead >= 0) & (ahead < width)
            if BAND == "any":
                behind = key_row[:, None] - ((row + offset) % modulus)[None, :] - 1
                behind = tl.where(behind < 0, behind + modulus, behind)
                keep = keep & (behind < width)
            row_ids = row
            if IDS != 0:
                row_ids = tl.load(query_ids + row)
            keep = kept(
                keep, row.to(tl.int64)[None, :], keys_at.to(tl.int64)[:, None], row_ids[None, :],
                key_ids, ids_stride_n, ids_stride_k, mask, mask_stride_n, mask_stride_k,
                (row >= 0)[None, :], (keys_at < key_limit)[:, None], IDS, MASKED,
            )  # fmt: skip
            x = tl.where(keep, x, 0.0)
        if (COMPARE == "ends" or marks is not None) and rare:
            if COMPARE == "ends":
                ahead = column[None, :] - tl.arange(0, BLOCK_KEYS)[:, None]
                x = tl.where((ahead >= 0) & (ahead < width), x, 0.0)
            if marks is not None:
                at = tl.minimum(keys_at, key_limit - 1).to(tl.int64) * ids_stride_k
                x = tl.where(alike(key_ids, at, query_ids, row), 0.0, x)
        if k.dtype == tl.float16:  # of rows and keys that are only padding
            x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        acc = add_product(acc, x, q, q_low, q_rest, PIECES)
    return acc


@triton.jit(do_not_specialize=["n", "k", "offset", "width", "modulus", "blocks_per_view", "per_split"])
def keys_gradient(
    query, stride_piece, stride_n, stride_d, keys, stride_k, key_stride_d, weights, largest, grad, query_ids, key_ids,
    ids_stride_n, ids_stride_k, mask, mask_stride_n, mask_stride_k, marks, key_count, out,
    n, k, offset, width, modulus, blocks_per_view, per_split,
    D: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    BAND: tl.constexpr, WHOLE: tl.constexpr, SHORT_BAND: tl.constexpr, IDS: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE_KEYS: tl.constexpr, CLEAN: tl.constexpr, FOLDED: tl.constexpr, PIECES: tl.constexpr,
    STAGES: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """A block of keys against one split of the rows; ``query`` (PIECES, n, D) is in the dtype of the products.

    ``grad``, where it is given, is the gradient of the loss, which is one number. ``out`` (splits, k, D) gets the
    shares of ``merge_splits``; without NORMALIZE_KEYS, of one split, it is the gradient. BAND: "" for none, "cyclic"
    where places are visited in order, "any" where every row is compared.
    """
    block, view_start, limit = tl.program_id(0), 0, k
    if BAND != "":
        view_start, block, limit = block // blocks_per_view * modulus, block % blocks_per_view, modulus
    start = block * BLOCK_KEYS
    key_row = start + tl.arange(0, BLOCK_KEYS)
    base = keys + tl.cast(view_start, tl.int64) * stride_k
    clamped = tl.minimum(key_row, limit - 1)  # beyond the last key, that key: zeros would overflow float16
    raw_k = load_rows(base, clamped, stride_k, key_stride_d, limit, D, BLOCK_D, False, True)
    if CLEAN:
        raw_k = tl.where(finite_rows(raw_k)[:, None], raw_k, 0.0)
    dot: tl.constexpr = query.dtype.element_ty
    raw: tl.constexpr = raw_k.dtype == dot and PIECES == 1
    half: tl.constexpr = dot == tl.float16
    inverse = tl.full([BLOCK_KEYS], 1.0, tl.float32)
    if NORMALIZE_KEYS:
        inverse = inverse_norm(raw_k)
    k_tile = raw_k
    if not raw:
        k_tile = raw_k.to(tl.float32) * inverse[:, None]
    if PIECES == 1:
        k_tile = k_tile.to(dot)
    if PIECES == 2:
        k_tile = k_tile * PIECE_SCALE
    k_tile, k_low, k_rest = cut(k_tile, PIECES)
    prescale = tl.full([], 1.0, tl.float32)
    if half:  # float16 would lose what is small, and be infinite where it is large
        most = tl.load(largest)
        prescale = 4096.0 / tl.where(most > 1e-30, most, 1.0)
    acc = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    PAIRS: tl.constexpr = (IDS != 0 and marks is None) or MASKED != 0
    COMPARE: tl.constexpr = (
        "ends" if BAND == "cyclic" and WHOLE and not PAIRS else "pairs" if BAND != "" or PAIRS else "tail"
    )
    columns, first = n, 0
    if BAND == "cyclic":
        columns, first = width + BLOCK_KEYS - 1, start - width - offset + 2 * modulus
    lo = tl.program_id(1) * per_split
    hi = tl.maximum(lo, tl.minimum(lo + per_split, columns))
    acc = collect(
        acc, k_tile, k_low, k_rest, inverse, key_row, view_start + key_row,
        query, stride_piece, stride_n, stride_d, weights, prescale,
        query_ids, key_ids, ids_stride_n, ids_stride_k, mask, mask_stride_n, mask_stride_k, marks,
        n, first, modulus, width, offset, k, lo, hi, view_start + start,
        D, BLOCK_KEYS, BLOCK_ROWS, BLOCK_D, COMPARE, BAND, SHORT_BAND, IDS, MASKED, NORMALIZE_KEYS and raw, FOLDED,
        PIECES, STAGES, FAR,
    )  # fmt: skip
    if half:
        acc = acc / prescale
    if grad is not None:
        acc = acc * tl.load(grad).to(tl.float32)
    if key_count is not None:
        acc = tl.where((key_row < tl.load(key_count))[:, None], acc, 0.0)
    at = out + (tl.program_id(1).to(tl.int64) * k + view_start) * D
    store_rows(at, key_row, limit, acc, D, BLOCK_D)


@triton.jit(do_not_specialize=["k", "n", "splits"])
def merge_splits(
    parts, rows_in, stride_k, stride_d, out, positive_gradient, query_gradient, query_out, grad, grad_stride,
    k, n, splits, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr, NORMALIZE: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """The splits' shares (splits, k, D) in a fixed order, through the normalisation of the raw rows.

    ``positive_gradient`` (k, D), where it is given, is added times ``grad``. ``query_gradient`` (n, D), where it is
    given, is multiplied by ``grad`` in programs of its own, after those of the keys.
    """
    blocks = tl.cdiv(k, BLOCK)
    if tl.program_id(0) < blocks:
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        inside = (rows < k)[:, None] & (d < D)[None, :]
        acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        at = rows.to(tl.int64)[:, None] * D + d[None, :]
        for split in tl.static_range(BLOCK_SPLITS):
            present = inside & (split < splits)
            acc += tl.load(parts + tl.cast(split, tl.int64) * k * D + at, mask=present, other=0.0)
        added = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        if positive_gradient is not None:
            added = multiplied(positive_gradient, rows, k, grad, grad_stride, D, BLOCK_D)
        if NORMALIZE:
            raw = load_rows(rows_in, rows, stride_k, stride_d, k, D, BLOCK_D, True, True)
            acc = through_unit(acc, raw, eps, CLEAN)
        acc += added
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    elif query_gradient is not None:
        rows = (tl.program_id(0) - blocks) * BLOCK + tl.arange(0, BLOCK)
        store_rows(query_out, rows, n, multiplied(query_gradient, rows, n, grad, grad_stride, D, BLOCK_D), D, BLOCK_D)


@triton.jit
def multiplied(unit, rows, n, grad, grad_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a contiguous (n, D), in float32, times the gradient of the loss, of which a row's stride may be 0."""
    factor = tl.load(grad + rows.to(tl.int64) * grad_stride, mask=rows < n, other=0.0).to(tl.float32)
    return load_rows(unit, rows, D, 1, n, D, BLOCK_D, True, True).to(tl.float32) * factor[:, None]


@triton.jit(do_not_specialize=["n"])
def multiply_rows(
    unit, out, grad, grad_stride, n, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out`` = ``unit`` times ``grad``, both (n, D)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store_rows(out, rows, n, multiplied(unit, rows, n, grad, grad_stride, D, BLOCK_D), D, BLOCK_D)
