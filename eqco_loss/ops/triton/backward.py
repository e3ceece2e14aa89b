"""Backward, and both directions between two views: from a call's record to launches of kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..calls import (
    KeySet,
    KeysGradient,
    KeysGradients,
    Pairs,
    Row,
    RowLosses,
    RowOutputs,
    SymmetricGradient,
    SymmetricGradients,
    SymmetricLosses,
    SymmetricOutputs,
    gradient_eps,
    once_a_kind,
    plainly,
)
from ..launcher import Launch, bind, launch
from ..scaled import with_others
from . import arguments
from .arguments import (
    Device,
    KeyFacts,
    blocks_of,
    dot_dtype,
    facts,
    kernels,
    left_out,
    marked,
    needs_64_bits,
    padded,
    piece_dtype,
    strides_of,
)
from .launch import row_losses
from .tables import TileSize, keys_tile, pieces, power_of_two, symmetric_tile

# ------------------------------------------------------------------------------------------------------ keys' gradient


class _KeysPlan(NamedTuple):
    """How the gradient of shared keys is computed."""

    blocks: int  # of keys
    splits: int  # of the rows
    sizes: tuple[int, ...]  # the kernel's integers: the band's three, blocks per view, rows of a split
    whole: bool  # whether the kernel stores the gradient, and no shares of it
    marks: bool  # whether ids are compared only in tiles that ``ids.mark_alike`` marks
    launch: Launch
    merge: Launch  # of the splits


def keys_gradient(call: KeysGradient, tile: TileSize | None = None) -> KeysGradients:
    """``tile`` is for tests and benchmarks; None takes the table's."""
    if call.first.keys.numel() == 0:
        return with_others(call, torch.empty_like(call.first.keys))
    if call.first.own:
        return with_others(call, _own_keys_gradient(call))
    return _shared_keys_gradient(call, tile)


def times(unit: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a sum over rows, (N, D), times grad, () or (N,)."""
    n, d = unit.shape
    out = torch.empty(n, d, dtype=dtype, device=unit.device)
    kind = 0 if grad.dim() else (n, unit.dtype, dtype, grad.dtype, unit.device)
    _multiply(d).again(kind, (blocks_of(n, 8),), unit, out, grad, grad.stride(0) if grad.dim() else 0, n)
    return out


@functools.lru_cache(maxsize=1024)
def _multiply(d: int) -> Launch:
    return bind(kernels().keys.multiply_rows, {"D": d, "BLOCK_D": padded(d), "BLOCK": 8})


def _shared_keys_gradient(call: KeysGradient, tile: TileSize | None) -> KeysGradients:
    query, (n, d), one = call.query, call.query.shape, call.first
    keys, pairs, device = one.keys, one.pairs, call.query.device
    dtype = dot_dtype(query.dtype, keys.dtype, call.autocast)
    weights, prepared = _row_weights(call, call.normalize, dtype, True)
    out = torch.empty(*keys.shape, dtype=keys.dtype, device=device)
    plan = _keys_planned(call, dtype, needs_64_bits(prepared), tile)
    left = left_out(pairs)
    marks = marked(left, n, len(keys)) if plan.marks else None
    whole = plan.whole and call.query_gradient is None and call.positive_gradient is None
    parts = out if whole else torch.empty(plan.splits, *keys.shape, dtype=torch.float32, device=device)
    plan.launch.again(
        *(_kind(call), (plan.blocks, plan.splits)),
        prepared, *strides_of(prepared), keys, *keys.stride(), weights, _largest(weights, prepared.dtype),
        None if call.grad.dim() else call.grad, *left, marks, pairs.filled, parts,
        n, keys.shape[0], *plan.sizes,
    )  # fmt: skip
    of_query = None if call.query_gradient is None else torch.empty(n, d, dtype=query.dtype, device=device)
    if not whole:
        others = call.positive_gradient, call.query_gradient, of_query, call.grad
        _merge_splits(_kind(call), plan.merge, parts, keys, out, *others)
    return KeysGradients(out, of_query)


def _kind(call: KeysGradient | SymmetricGradient) -> int:
    """The kind of launches that read the loss's gradient; 0, none, where that is a vector, whose stride may change."""
    return 0 if call.grad.dim() else call.kind


def _own_keys_gradient(call: KeysGradient) -> Tensor:
    query, (n, d), one = call.query, call.query.shape, call.first
    keys, pairs, device, found = one.keys, one.pairs, call.query.device, facts(call.first)
    out, eps = torch.empty(keys.shape, dtype=keys.dtype, device=device), gradient_eps(keys.dtype)
    # Each query multiplies its own keys one by one, not as a matrix: it is prepared as it lies, without pieces.
    weights, prepared = _row_weights(call, call.normalize, query.dtype, False)
    grad = None if call.grad.dim() else call.grad
    rows = (prepared, *prepared.stride(), keys, *keys.stride(), weights, grad)
    options = {"D": d, "BLOCK_D": padded(d), "IDS": found.ids, "MASKED": found.masked, "NORMALIZE_KEYS": one.normalize}
    if pairs.picked is None:
        k, block = keys.shape[1], 32
        launch(
            kernels().own.keys_gradient_own, (n * blocks_of(k, block),),
            *rows, *left_out(pairs), out, n, k, blocks_of(k, block), eps,
            BLOCK_KEYS=block, enable_fp_fusion=True, **options,
        )  # fmt: skip
        return out
    by_key, order = torch.sort(pairs.picked.flatten(), stable=True)
    starts = torch.searchsorted(by_key, torch.arange(len(keys) + 1, device=device))
    launch(
        kernels().own.keys_gradient_picked, (len(keys),),
        *rows, order, starts, *left_out(pairs), out, n, len(keys), pairs.picked.shape[1], eps,
        BLOCK_ROWS=32, CLEAN=found.clean, enable_fp_fusion=True, **options,
    )  # fmt: skip
    return out


@once_a_kind
def _keys_planned(call: KeysGradient, dtype: torch.dtype, wide: bool, tile: TileSize | None) -> _KeysPlan:
    of, scalar = facts(call.first), call.grad.dim() == 0
    return _keys_plan(len(call.query), of, dtype, call.normalize, scalar, wide, tile, arguments.device(call.query))


@functools.lru_cache(maxsize=1024)
def _keys_plan(
    n: int,
    one: KeyFacts,
    dtype: torch.dtype,  # of the products
    normalize: bool,
    scalar: bool,  # whether the loss's gradient is one number
    wide: bool,  # whether offsets into the rows need 64 bits
    tile: TileSize | None,
    device: Device,
) -> _KeysPlan:
    (k, d), count = one.shape, pieces(dtype, normalize)
    offset, width, modulus = one.band or (0, 0, 1)
    per_view = modulus if one.band else k
    marks = one.ids == 1 and not one.masked and (not one.band or n == modulus)
    tile = device.fitting(tile or keys_tile(dtype, padded(d), per_view, device.arch, count, marks), one)
    band = ""
    if one.band:
        band = "cyclic" if n == modulus or width + tile.resident < n else "any"
    blocks_per_view = blocks_of(per_view, tile.resident)
    blocks = blocks_per_view * (k // per_view)
    columns = blocks_of(width + tile.resident - 1 if band == "cyclic" else n, tile.streamed)
    per_split, splits = _splits(columns, device.wave(tile, blocks))
    constants = {
        "D": d,
        "BLOCK_D": padded(d),
        "BLOCK_KEYS": tile.resident,
        "BLOCK_ROWS": tile.streamed,
        "BAND": band,
        "WHOLE": n == modulus,
        "SHORT_BAND": modulus < tile.streamed,
        "IDS": one.ids,
        "MASKED": one.masked,
        "NORMALIZE_KEYS": one.normalize,
        "CLEAN": one.clean,
        "FOLDED": normalize and dtype != torch.float32 and scalar,
        "PIECES": count,
        "STAGES": tile.stages,
        "FAR": wide,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    whole = splits == 1 and not one.normalize  # the normalisation's gradient needs registers that are not there
    sizes = offset, width, modulus, blocks_per_view, per_split * tile.streamed
    merge = _merge(d, splits, one.normalize, one.clean)
    return _KeysPlan(blocks, splits, sizes, whole, marks, bind(kernels().keys.keys_gradient, constants), merge)


def _splits(columns: int, wave: int) -> tuple[int, int]:
    """Tiles per split, and splits."""
    per_split = blocks_of(columns, min(8, wave))
    return per_split, blocks_of(columns, per_split)


def _row_weights(
    call: KeysGradient | SymmetricGradient, normalize: bool, dtype: torch.dtype, multiplied: bool
) -> tuple[Tensor, Tensor]:
    """``weights`` (len(Row), N), and the rows as kernels stream them: the same, unit ones, or scaled ones."""
    x = call.query if isinstance(call, KeysGradient) else call.kept
    rows, grad = call.rows.contiguous(), call.grad
    scaled = multiplied and normalize and dtype == torch.float16 and x.dtype == dtype
    (n, d), count = x.shape, pieces(dtype, normalize) if multiplied else 1
    if count == 1 and not scaled and x.dtype == dtype and grad.dim() == 0:
        return rows, x
    weights = torch.empty_like(rows)
    prepared = None
    if count > 1:
        prepared = torch.empty((count, n, d), dtype=piece_dtype(dtype, count), device=x.device)
    elif scaled or x.dtype != dtype:
        prepared = torch.empty((n, d), dtype=dtype, device=x.device)
    _weigh(d, normalize, scaled, count).again(
        *(_kind(call), (blocks_of(n, 16),)),
        x, *x.stride(), *(grad, grad.stride(0)) if grad.dim() else (None, 0), rows, call.learned_temperature, weights,
        prepared, n, float(call.temperature),
    )  # fmt: skip
    return weights, x if prepared is None else prepared


@functools.lru_cache(maxsize=1024)
def _weigh(d: int, normalize: bool, power: bool, count: int) -> Launch:
    constants = {"D": d, "BLOCK_D": padded(d), "BLOCK": 16, "NORMALIZE": normalize, "POWER": power, "PIECES": count}
    return bind(kernels().keys.row_weights, constants | {"enable_fp_fusion": True})


def _largest(weights: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The largest weight of a row, which float16 is scaled by."""
    return weights[Row.STORED_PULL].abs().amax() if dtype == torch.float16 else None


def _merge(d: int, splits: int, normalize: bool, clean: bool) -> Launch:
    constants = {"D": d, "BLOCK_D": padded(d), "BLOCK": 8, "BLOCK_SPLITS": power_of_two(splits)}
    constants |= {"NORMALIZE": normalize, "CLEAN": clean, "enable_fp_fusion": True}
    return bind(kernels().keys.merge_splits, constants)


def _merge_splits(
    kind: int,
    merge: Launch,
    parts: Tensor,
    raw: Tensor,
    out: Tensor,
    positive_gradient: Tensor | None = None,
    query_gradient: Tensor | None = None,
    of_query: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    n = 0 if query_gradient is None else len(query_gradient)
    stride = grad.stride(0) if grad is not None and grad.dim() else 0
    merge.again(
        *(kind, (blocks_of(len(raw), 8) + blocks_of(n, 8),)),
        parts, raw, *raw.stride(), out, positive_gradient, query_gradient, of_query, grad, stride,
        len(raw), n, len(parts), gradient_eps(raw.dtype),
    )  # fmt: skip


# ----------------------------------------------------------------------------------- both directions between two views


@plainly  # or torch.cat would refuse the half dtype that is not autocast's
def symmetric_losses(call: SymmetricLosses, tile: TileSize | None = None) -> SymmetricOutputs:
    """Both directions' losses; their gradients are ``symmetric_gradient``'s."""

    m, views = len(call.first), call.views

    def outputs(query: Tensor, positive: Tensor, keys: Tensor, kind: int, half: int = 0) -> RowOutputs:
        one = KeySet(keys, Pairs(band=[0, m - 1, m]), normalize=True)
        return row_losses(
            RowLosses(
                query=query,
                positive=positive,
                first=one,
                second=None,
                temperature=call.temperature,
                learned_temperature=call.learned_temperature,
                inter_temperature=call.inter_temperature,
                alpha=call.alpha,
                normalize=True,
                share=call.share,
                reduced=True,
                may_raise=False,
                need_query_gradient=False,
                need_positive_gradient=False,
                need_keys_gradient=False,
                need_metrics=False,
                autocast=call.autocast,
                backend=call.backend,
                kind=kind,
            ),
            tile,
            half,
        )

    if not call.across:
        out = outputs(views, views, views, call.kind, m)
        return SymmetricOutputs(out.loss, out.rows, views)
    there = outputs(call.first, call.second, call.second, call.kind)
    back = outputs(call.second, call.first, call.first, -call.kind)  # views may lie differently: a kind of its own
    return SymmetricOutputs(there.loss + back.loss, torch.cat([there.rows, back.rows], 1), views)


class _SymmetricPlan(NamedTuple):
    """How the gradient of both directions is computed."""

    blocks: int  # of rows
    splits: int  # of the rows that a block meets
    per_split: int  # how many of them a split has
    launch: Launch
    merge: Launch  # of the splits


def symmetric_gradient(call: SymmetricGradient, tile: TileSize | None = None) -> SymmetricGradients:
    views, (n, d), t = call.kept, call.kept.shape, call.learned_temperature
    dtype = views.dtype if call.autocast is None else call.autocast
    weights, prepared = _row_weights(call, True, dtype, True)
    one_exp, wide = t is None and call.temperature >= 0.05, needs_64_bits(prepared)
    plan = _symmetric_plan(n, d, dtype, call.across, one_exp, wide, tile, arguments.device(views))
    new, splits = functools.partial(torch.empty, dtype=torch.float32, device=views.device), plan.splits
    out = new(n, d, dtype=views.dtype)
    parts = out if splits == 1 else new(splits, n, d)
    along = None if t is None else new(splits, n)
    plan.launch.again(
        *(call.kind, (plan.blocks, splits)),
        prepared, *strides_of(prepared), views, *views.stride(), weights, _largest(weights, prepared.dtype),
        call.grad, t, parts, along, n, n // 2, plan.per_split, float(call.temperature), gradient_eps(views.dtype),
    )  # fmt: skip
    if splits > 1:
        _merge_splits(call.kind, plan.merge, parts, views, out)
    if t is None or along is None:
        return SymmetricGradients(out, None)
    of_positives = (weights[Row.PULL] * weights[Row.TOTAL] * call.rows[Row.POSITIVE]).sum()
    return SymmetricGradients(out, ((of_positives - along.sum() / 2) * (call.grad / t)).to(torch.float32))


@functools.lru_cache(maxsize=1024)
def _symmetric_plan(
    n: int,
    d: int,
    dtype: torch.dtype,  # of the products
    across: bool,
    one_exp: bool,
    wide: bool,  # whether offsets into the rows need 64 bits
    tile: TileSize | None,
    device: Device,
) -> _SymmetricPlan:
    tile = device.fitting(tile or symmetric_tile(dtype, padded(d), n, device.arch))
    blocks = 2 * blocks_of(n // 2, tile.resident) if across else blocks_of(n, tile.resident)
    columns = (1 if across else 2) * blocks_of(n // 2 + tile.resident - 2, tile.streamed)
    per_split, splits = _splits(columns, device.wave(tile, blocks))
    constants = {
        "D": d,
        "BLOCK_ROWS": tile.resident,
        "BLOCK_KEYS": tile.streamed,
        "BLOCK_D": padded(d),
        "ACROSS": across,
        "ONE_EXP": one_exp,
        "SHORT_BAND": n // 2 < tile.streamed,
        "PIECES": pieces(dtype, True),
        "STAGES": tile.stages,
        "FAR": wide,
        "WHOLE_GRADIENT": splits == 1,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    bound = bind(kernels().symmetric.symmetric_rows, constants)
    return _SymmetricPlan(blocks, splits, per_split * tile.streamed, bound, _merge(d, splits, True, False))
