"""Keys of each query, which no product of matrices serves: its own, (N, K, D), or those that it has picked."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from ..shared_kernels import LOG2E, MINIMUM, ROW_BASE, ROW_SCALE, ROW_STORED_PULL, read_temperature
from .parts import (
    finish,
    finite_rows,
    fold,
    inverse_norm,
    kept,
    load_rows,
    store_parts,
    store_rows,
    through_unit,
    tie_broken,
)


@triton.jit(do_not_specialize=["n", "k", "first_split", "splits"])
def attend_own(
    query, query_stride_n, query_stride_d, positive, positive_stride_n, positive_stride_d,
    keys, stride_n, stride_k, stride_d, picked, picked_stride_n, picked_stride_c,
    query_ids, key_ids, ids_stride_n, ids_stride_k, mask, mask_stride_n, mask_stride_k, temperature_tensor,
    parts, outs, loss, scratch, query_gradient, positive_gradient, out_rows, metrics,
    n, k, first_split, splits, temperature, inter_t, alpha, share, query_eps, positive_eps,
    D: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, IDS: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr, NORMALIZE_KEYS: tl.constexpr, ALPHA: tl.constexpr, LOSS: tl.constexpr,
    QUERY_GRADIENT: tl.constexpr, METRICS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """One row against keys of its own, (N, K, D), or those that it has picked of shared ones, in float32."""
    t = read_temperature(temperature, temperature_tensor)
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    raw_q = load_rows(query, rows, query_stride_n, query_stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
    q = raw_q
    scale = LOG2E / t
    if NORMALIZE:
        q = q * inverse_norm(q)[:, None]
    positive_logit = tl.zeros([1], tl.float32)
    p = load_rows(positive, rows, positive_stride_n, positive_stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
    if METRICS:
        positive_logit = tl.sum(q * p, 1) * scale
        if NORMALIZE:
            positive_logit = positive_logit * inverse_norm(p)
        positive_logit = tie_broken(positive_logit)
    row_ids = row
    if IDS != 0:
        row_ids = tl.load(query_ids + row)
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
        if picked is not None:
            at = picked + row.to(tl.int64) * picked_stride_n + place * picked_stride_c
            place = tl.load(at, mask=keep, other=0)
        keep = kept(
            keep, row.to(tl.int64), place, row_ids, key_ids, ids_stride_n, ids_stride_k,
            mask, mask_stride_n, mask_stride_k, keep, keep, IDS, MASKED,
        )  # fmt: skip
        d = tl.arange(0, BLOCK_D)
        at = own_keys + place[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d
        x = tl.load(at, mask=keep[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if NORMALIZE_KEYS:
            x = x * inverse_norm(x)[:, None]
        s = (tl.sum(x * q, 1) * scale)[None, :]  # (1, C)
        s = tl.where(keep[None, :], s, float("-inf"))
        count += tl.sum(keep.to(tl.float32)[None, :], 1)
        if METRICS:
            logit_sum += tl.sum(tl.where(keep[None, :], s, 0.0), 1)
            rank += tl.sum((s > positive_logit[:, None]).to(tl.float32), 1)
        if LOSS == "dual":
            _, inter_maximum, inter_total, _ = fold(s, one * (t / inter_t), inter_maximum, inter_total, False)
        e, maximum, total, shrink = fold(s, one, maximum, total, False)
        if QUERY_GRADIENT:
            mean_key = mean_key * shrink[:, None] + tl.sum(tl.trans(e) * x, 0)[None, :]
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
            parts, outs, first_split + tl.program_id(1), splits, rows, n,
            maximum, total, mean_key, inter_maximum, inter_total, count, rank, logit_sum, D, BLOCK_D, LOSS, METRICS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "k", "blocks"])
def keys_gradient_own(
    query, stride_n, stride_d, keys, key_stride_n, key_stride_k, key_stride_d, weights, grad, query_ids, key_ids,
    ids_stride_n, ids_stride_k, mask, mask_stride_n, mask_stride_k, out, n, k, blocks, eps,
    D: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, IDS: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE_KEYS: tl.constexpr,
):  # fmt: skip
    """Some keys of one row's own, (N, K, D), which has so many blocks of them."""
    row = tl.program_id(0) // blocks
    rows = row + tl.arange(0, 1)
    column = tl.program_id(0) % blocks * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    plane_size = n.to(tl.int64)
    scale, base = tl.load(weights + ROW_SCALE * plane_size + row), tl.load(weights + ROW_BASE * plane_size + row)
    pull = tl.load(weights + ROW_STORED_PULL * plane_size + row)
    if grad is not None:
        pull *= tl.load(grad).to(tl.float32)
    row_ids = row
    if IDS != 0:
        row_ids = tl.load(query_ids + row)
    keep = column < k
    keep = kept(
        keep, row.to(tl.int64), column.to(tl.int64), row_ids, key_ids, ids_stride_n, ids_stride_k,
        mask, mask_stride_n, mask_stride_k, keep, keep, IDS, MASKED,
    )  # fmt: skip
    q = load_rows(query, rows, stride_n, stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
    d = tl.arange(0, BLOCK_D)
    at = keys + row.to(tl.int64) * key_stride_n
    at = at + column.to(tl.int64)[:, None] * key_stride_k + d.to(tl.int64)[None, :] * key_stride_d
    x = tl.load(at, mask=keep[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    unit = x
    if NORMALIZE_KEYS:
        unit = x * inverse_norm(x)[:, None]
    p = tl.exp2(tl.sum(unit * q, 1) * scale - base) * pull
    change = tl.where(keep, p, 0.0)[:, None] * q
    if NORMALIZE_KEYS:
        change = through_unit(change, x, eps, False)
    store_rows(out + row.to(tl.int64) * k * D, column, k, change, D, BLOCK_D)


@triton.jit(do_not_specialize=["n", "k", "picks"])
def keys_gradient_picked(
    query, stride_n, stride_d, keys, stride_k, key_stride_d, weights, grad, order, starts, query_ids, key_ids,
    ids_stride_n, ids_stride_k, mask, mask_stride_n, mask_stride_k, out, n, k, picks, eps,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, IDS: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE_KEYS: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """One key against the rows that picked it: ``order`` has the picks (row * picks + c) sorted by key."""
    key = tl.program_id(0)
    this = key + tl.arange(0, 1)
    x = load_rows(keys, this, stride_k, key_stride_d, k, D, BLOCK_D, True, True).to(tl.float32)
    if CLEAN:
        x = tl.where(finite_rows(x)[:, None], x, 0.0)
    unit = x
    if NORMALIZE_KEYS:
        unit = x * inverse_norm(x)[:, None]
    plane_size = n.to(tl.int64)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    last = tl.load(starts + key + 1)
    for c in range(tl.load(starts + key), last, BLOCK_ROWS):
        pick = c + tl.arange(0, BLOCK_ROWS)
        keep = pick < last
        row = tl.where(keep, tl.load(order + pick, mask=keep, other=0) // picks, n)
        q = load_rows(query, row, stride_n, stride_d, n, D, BLOCK_D, True, True).to(tl.float32)
        scale = tl.load(weights + ROW_SCALE * plane_size + row, mask=keep, other=0.0)
        base = tl.load(weights + ROW_BASE * plane_size + row, mask=keep, other=0.0)
        pull = tl.load(weights + ROW_STORED_PULL * plane_size + row, mask=keep, other=0.0)
        row_ids = row
        if IDS != 0:
            row_ids = tl.load(query_ids + row, mask=keep, other=0)
        keys_at = tl.full([BLOCK_ROWS], key, tl.int64)  # a pointer for each row, as the masks of loads have
        keep = kept(
            keep, row.to(tl.int64), keys_at, row_ids, key_ids, ids_stride_n, ids_stride_k,
            mask, mask_stride_n, mask_stride_k, keep, keep, IDS, MASKED,
        )  # fmt: skip
        p = tl.where(keep, tl.exp2(tl.sum(q * unit, 1) * scale - base) * pull, 0.0)
        acc += tl.sum(p[:, None] * q, 0)[None, :]
    if grad is not None:
        acc = acc * tl.load(grad).to(tl.float32)
    if NORMALIZE_KEYS:
        acc = through_unit(acc, x, eps, False)
    store_rows(out, this, k, acc, D, BLOCK_D)
