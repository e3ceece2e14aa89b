"""What ``pointwise.py`` does with torch's operations, by one kernel each: the launches of ``kernels.py``."""

# mypy: ignore-errors

import torch
import triton

from ..calls import Row, gradient_eps, loss_of
from ..launcher import launch
from .kernels import (
    dots_kernel,
    finish_kernel,
    fold_kernel,
    measure_kernel,
    through_unit_kernel,
    weights_kernel,
)
from .pointwise import Finished


def fold(tile, state, seek, weights, first):
    shrink = torch.empty(len(tile.x), dtype=torch.float32, device=tile.x.device)
    _launch_fold(tile, state, seek, weights, shrink, first)
    return shrink


def fold_both(tile, own, state, key_state, seek):
    shrink = torch.empty(max(tile.x.shape), dtype=torch.float32, device=tile.x.device)
    _launch_fold(tile, state, seek, None, shrink)
    if own < tile.x.shape[1]:  # the tile turned around, of pairs that look the same from both sides
        turned = tile._replace(
            x=tile.x[:, own:].T,
            row_scale=tile.key_scale[own:],
            key_scale=tile.row_scale,
            row=tile.key + own,
            key=tile.row,
        )
        _launch_fold(turned, key_state, seek, None, shrink)


def _launch_fold(tile, state, seek, weights, shrink, first=False):
    pairs, numbers, wrap = _arguments(tile)
    n, k = tile.x.shape
    if tile.x.stride(1) == 1:
        at_once = weights is not None and 2048 < k <= 4096  # so that one visit will do
        block_keys = 4096 if at_once else min(2048, triton.next_power_of_2(k))
        block_rows = max(1, min(triton.next_power_of_2(n), 2048 // block_keys))
    else:
        block_rows, block_keys = 32, 64
    stride = 0 if weights is None else between_rows(weights)
    launch(
        fold_kernel, (triton.cdiv(n, block_rows),),
        *pairs, state, state.stride(0), weights, stride, shrink, seek.ratio, seek.threshold, *numbers,
        FIRST=first, WRAP=wrap, OWN=tile.key_scale.dim() == 2, COUNT_PAIRS=seek.negatives, WEIGH=seek.weighted,
        TWICE=weights is not None and k > block_keys, BLOCK_ROWS=block_rows, BLOCK_KEYS=block_keys, num_warps=8,
    )  # fmt: skip


def weights(tile, base, factor, out):
    _launch_weights(tile, base, factor, None, None, None, out)


def weights_both(tile, row, key, row_factor, out):
    _launch_weights(tile, row.base, row_factor, row.pull, key.base, key.pull, out)


def _launch_weights(tile, base, factor, pull, key_base, key_pull, out):
    pairs, numbers, wrap = _arguments(tile)
    n, k = tile.x.shape
    launch(
        weights_kernel, (triton.cdiv(n, 8), triton.cdiv(k, 256)),
        *pairs, base, factor, pull, key_base, key_pull, out, between_rows(out), *numbers,
        WRAP=wrap, OWN=tile.key_scale.dim() == 2, BLOCK_ROWS=8, BLOCK_KEYS=256, num_warps=4,
    )  # fmt: skip


def finish(call, similarity, state, known, metrics):
    n, new = len(similarity), similarity.new_empty
    found = Finished(new(n), new(len(Row), n), new(n), new(n))
    launch(
        finish_kernel, (triton.cdiv(n, 128),),
        similarity, state, state.stride(0), float(call.temperature), call.learned_temperature,
        float(call.inter_temperature or 1.0), float(known or 1), float(call.alpha or 1.0), call.share_factor,
        found.losses, found.factor, found.of_sums, found.rows, metrics, n,
        ALPHA=call.alpha is not None, LOSS=loss_of(call), KNOWN=bool(known), BLOCK=128,
        num_warps=4,
    )  # fmt: skip
    return found


def measured(x, products):
    """Of rows (R, D): what is multiplied, (R, D), 1 / length, the same for gradients, and its scale, (R,) each."""
    n, d = x.shape
    new = torch.empty(3, n, dtype=torch.float32, device=x.device)
    as_they_lie = products == x.dtype != torch.float16
    out = None if as_they_lie else torch.empty((n, d), dtype=products, device=x.device)
    block_d = min(1024, triton.next_power_of_2(d))
    block_rows = max(1, 2048 // block_d)
    launch(
        measure_kernel, (triton.cdiv(n, block_rows),),
        x, *x.stride(), out, *new, n, d, float(gradient_eps(x.dtype)),
        POWER=products == x.dtype, BLOCK_ROWS=block_rows, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return (x if out is None else out), *new


def dots(a, b, out):
    n, d = a.rows.shape
    block, rows = min(2048, triton.next_power_of_2(d)), (a.rows, *a.rows.stride(), b.rows, *b.rows.stride())
    launch(dots_kernel, (n,), *rows, a.inverse, b.inverse, out, d, BLOCK_D=block, num_warps=4)


def through_unit(raw, gradient, factor, other, other_factor, out):
    n, d = raw.rows.shape
    launch(
        through_unit_kernel, (n,),
        *(raw.rows, *raw.rows.stride(), raw.inverse, raw.gradient_inverse),
        *(gradient, 0 if gradient is None else between_rows(gradient), factor),
        *((None, 0, 0, None) if other is None else (other.rows, *other.rows.stride(), other.inverse)),
        *(other_factor, out, between_rows(out), d),
        NORMALIZE=raw.normalize, BLOCK_D=min(2048, triton.next_power_of_2(d)), num_warps=4,
    )  # fmt: skip


def between_rows(x):
    """The stride of a matrix from row to row, for kernels that take a row's numbers to lie side by side."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"expected a matrix whose rows' numbers lie side by side, got strides {x.stride()}")
    return x.stride(0)


def _arguments(tile):
    """What ``load_logits`` needs of a tile: its tensors, its numbers, and how places wrap around a band."""
    pairs, (n, k) = tile.pairs, tile.x.shape
    query_ids, key_ids = (pairs.query_ids, pairs.key_ids) if pairs.by_ids else (None, None)
    if key_ids is not None:
        query_ids = query_ids.contiguous()
        if query_ids.dtype != key_ids.dtype:  # Triton would compare int8's -1 as 255
            query_ids, key_ids = query_ids.long(), key_ids.long()
    tensors = (
        *(tile.x, *tile.x.stride(), tile.row_scale, tile.key_scale, *_strides(tile.key_scale)),
        *(query_ids, key_ids, *_strides(key_ids), pairs.mask, *_strides(pairs.mask), pairs.filled),
    )
    if not pairs.band:
        return tensors, (n, k, tile.key, 0, 0, 1), 0
    offset, width, modulus = pairs.band
    wrap = 1 if max(n, k) <= modulus else 2
    ahead = (tile.key - tile.row - offset - 1) % modulus
    if wrap == 2:
        ahead += triton.cdiv(n, modulus) * modulus
    return tensors, (n, k, tile.key, ahead, width, modulus), wrap


def _strides(x):
    """Of (K,), which all rows share, or (N, K)."""
    return (0, 0) if x is None else (0, x.stride(0)) if x.dim() == 1 else x.stride()
