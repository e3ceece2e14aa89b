"""From a call's record to launches of kernels: shapes, strides, tiles and splits."""

from __future__ import annotations

import functools
import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls import (
    KeySet,
    KeysGradient,
    LogSumExp,
    LogSumExpOutputs,
    Metric,
    Pairs,
    Row,
    RowLosses,
    RowOutputs,
    SymmetricGradient,
    SymmetricGradients,
    SymmetricLosses,
    SymmetricOutputs,
    gradient_eps,
)
from .tables import (
    LITTLE_SHARED_MEMORY,
    Part,
    Tile,
    Weight,
    combine_tile,
    forward_tile,
    keys_tile,
    pieces,
    power_of_two,
    small_tile,
    symmetric_tile,
)

_CONVERSIONS = 16  # more blocks of rows than these do not convert the keys each for itself: a copy costs less
_COLUMNS_AT_ONCE = 1024  # up to so many, a block of rows finishes on its own


class Kernels(NamedTuple):
    """The kernels' modules, and Triton's language."""

    forward: ModuleType
    keys: ModuleType
    symmetric: ModuleType
    language: Any
    version: str


@functools.cache
def kernels() -> Kernels:
    """The only import of Triton."""
    import triton

    from . import forward, keys, symmetric

    return Kernels(forward, keys, symmetric, triton.language, triton.__version__)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors, as TRITON_INTERPRET=1 asks at the first use."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def dot_dtype(query: Tensor, keys: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """What is multiplied: autocast's dtype, or the one that holds both."""
    return torch.promote_types(query.dtype, keys.dtype) if autocast is None else autocast


# ------------------------------------------------------------------------------------------------------------- forward


class _Options(NamedTuple):
    """What a pass over the keys is asked for, beside its tensors."""

    normalize: bool
    query_gradient: bool
    metrics: bool
    inter_temperature: float | None
    alpha: float | None
    share: float


class _Visit(NamedTuple):
    """One set of keys, and how ``attend`` visits it."""

    one: KeySet
    tile: Tile
    columns: int  # per view
    views: int
    chunk: int  # columns of a split
    splits: int  # of all views


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients before backward multiplies them. bfloat16's are rounded once, as grad is mostly 1 or a power of two;
    float16's might not fit before a loss scale."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def row_losses(call: RowLosses, tile: Tile | None = None, half: int = 0) -> RowOutputs:
    """``half``: rows i and i + half are each other's positives, and ``positive`` is the query.

    ``tile`` is for tests and benchmarks; None takes the table's.
    """
    (n, d), new = call.query.shape, functools.partial(torch.empty, dtype=torch.float32, device=call.query.device)
    losses, rows = new(n), new(len(Row), n)
    query_gradient = new(n, d, dtype=unit_dtype(call.query.dtype)) if call.need_query_gradient else None
    positive_gradient = new(n, d, dtype=unit_dtype(call.positive.dtype)) if call.need_positive_gradient else None
    metrics = new(len(Metric), n) if call.need_metrics else None
    options = _Options(
        call.normalize, call.need_query_gradient, call.need_metrics, call.inter_temperature, call.alpha, call.ratio
    )
    _attend(call, options, tile, half, call.positive, losses, query_gradient, positive_gradient, rows, metrics)
    return RowOutputs(
        losses.sum() if call.reduced else losses,
        new(0) if query_gradient is None else query_gradient,
        new(0) if positive_gradient is None else positive_gradient,
        new(0),
        rows,
        new(0) if metrics is None else metrics,
    )


def logsumexp(call: LogSumExp) -> LogSumExpOutputs:
    (n, d), new = call.query.shape, functools.partial(torch.empty, dtype=torch.float32, device=call.query.device)
    lse, rows, mean_key = new(n), new(len(Row), n), new(n, d) if call.need_query_gradient else None
    options = _Options(False, call.need_query_gradient, False, None, None, 1.0)
    _attend(call, options, None, 0, None, lse, mean_key, None, rows, None)
    return LogSumExpOutputs(lse, new(0) if mean_key is None else mean_key, rows)


def _attend(
    call: RowLosses | LogSumExp,
    options: _Options,
    tile: Tile | None,
    half: int,
    positive: Tensor | None,  # None: log-sum-exps only
    loss: Tensor,
    query_gradient: Tensor | None,
    positive_gradient: Tensor | None,
    rows: Tensor,
    metrics: Tensor | None,
) -> None:
    query, (n, d), device = call.query, call.query.shape, call.query.device
    sets = call.sets if isinstance(call, RowLosses) else [call.first]
    visits = [_visit(call, options, one, tile) for one in sets]
    splits = sum(one.splits for one in visits)
    few = visits[0].one.own or visits[0].tile.resident * d <= 8192
    finish = positive is not None and len(visits) == 1 and splits == 1 and few
    parts, outs = None, None
    if not finish:
        parts = torch.empty((len(Part), splits, n), dtype=torch.float32, device=device)
        outs = torch.empty((splits, n, d), dtype=torch.float32, device=device) if options.query_gradient else None
    number = float(call.temperature)
    placed = query if positive is None else positive
    queries = (query, *query.stride(), placed, *placed.stride())
    answers = (parts, outs, loss, query_gradient, positive_gradient, rows, metrics)
    eps = gradient_eps(query.dtype), gradient_eps(placed.dtype)
    # Of an integer, Triton would compile a kernel of its own.
    numbers = (number, float(options.inter_temperature or 1.0), float(options.alpha or 1.0), options.share, *eps)
    common = {
        "D": d,
        "BLOCK_D": _block_d(d),
        "NORMALIZE": options.normalize,
        "ALPHA": options.alpha is not None,
        "DUAL": options.inter_temperature is not None,
        "enable_fp_fusion": True,
    }
    more = {"QUERY_GRADIENT": options.query_gradient, "METRICS": options.metrics, "FINISH": finish}
    first_split = 0
    for visit in visits:
        if visit.one.own:
            _launch_own(call, visit, queries, answers, (first_split, splits), numbers, common | more, half)
        else:
            _launch_shared(call, options, visit, queries, answers, (first_split, splits), numbers, common | more, half)
        first_split += visit.splits
    if not finish:
        block, at_once = combine_tile(splits, _block_d(d), outs is not None)
        kernels().forward.combine[(_blocks(n, block),)](
            *queries, call.learned_temperature, *answers, n, half, splits, *numbers,
            BLOCK_ROWS=block, BLOCK_SPLITS=power_of_two(splits), AT_ONCE=at_once, FEW=splits <= 8,
            LOSS=positive is not None,
            num_warps=4, **common,
        )  # fmt: skip


def _visit(call: RowLosses | LogSumExp, options: _Options, one: KeySet, tile: Tile | None) -> _Visit:
    query, (n, d), keys, pairs = call.query, call.query.shape, one.keys, one.pairs
    if one.own:
        columns = keys.shape[1] if pairs.picked is None else pairs.picked.shape[1]
        return _Visit(one, Tile(1, 32 if d <= 256 else 16, 4, 1), columns, 1, columns, 1)
    dtype, arch = dot_dtype(query, keys, call.autocast), _arch(query)
    views = len(keys) // pairs.band[2] if pairs.band else 1
    width = pairs.band[1] if pairs.band else len(keys)
    small = views == 1 and width <= _COLUMNS_AT_ONCE and n * width <= 2**18
    plain = options.query_gradient and options.inter_temperature is None and not options.metrics and not pairs.by_pair
    plain = plain and not (one.normalize and (dtype == torch.float16 or arch >= 100))
    converts = keys.dtype != dtype and _blocks(n, 64) <= _CONVERSIONS
    if tile is None and small:
        tile = small_tile(dtype, _block_d(d))
    elif tile is None:
        turned = converts and keys.stride(1) != 1
        tile = forward_tile(
            dtype,
            _block_d(d),
            n,
            arch,
            plain=plain,
            converts=converts,
            turned=turned,
            count=pieces(dtype, options.normalize),
        )
    if arch in LITTLE_SHARED_MEMORY or _dims(pairs.mask) == 2 or (pairs.by_ids and _dims(pairs.key_ids) == 2):
        tile = tile._replace(stages=1)
    columns = width + (tile.resident - 1 if pairs.band else 0)
    waves = 1 if options.query_gradient else 2  # a split's share is (N, D) numbers, or only (N,)
    wanted = _wave(tile, _blocks(n, tile.resident) * views, query) * waves
    per_split = _blocks(_blocks(columns, tile.streamed), 1 if small else wanted)
    chunk = max(per_split, 1 if small else 2) * tile.streamed
    return _Visit(one, tile, columns, views, chunk, views * _blocks(columns, chunk))


def _launch_own(
    call: RowLosses | LogSumExp,
    visit: _Visit,
    queries: tuple[Any, ...],
    answers: tuple[Any, ...],
    split: tuple[int, int],
    numbers: tuple[float, ...],
    options: dict[str, Any],
    half: int,
) -> None:
    keys, pairs = visit.one.keys, visit.one.pairs
    strides = keys.stride() if pairs.picked is None else (0, *keys.stride())
    picked_strides = (0, 0) if pairs.picked is None else pairs.picked.stride()
    kernels().forward.attend_own[(call.query.shape[0], 1)](
        *queries, keys, *strides, pairs.picked, *picked_strides, *_left_out(pairs), call.learned_temperature, *answers,
        call.query.shape[0], half, visit.columns, *split, *numbers,
        BLOCK_KEYS=visit.tile.streamed, **_dimensions(pairs), NORMALIZE_KEYS=visit.one.normalize,
        num_warps=visit.tile.warps, **options,
    )  # fmt: skip


def _launch_shared(
    call: RowLosses | LogSumExp,
    options: _Options,
    visit: _Visit,
    queries: tuple[Any, ...],
    answers: tuple[Any, ...],
    split: tuple[int, int],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
    half: int,
) -> None:
    n, pairs, tile = len(call.query), visit.one.pairs, visit.tile
    dtype, row_blocks = dot_dtype(call.query, visit.one.keys, call.autocast), _blocks(n, tile.resident)
    count = pieces(dtype, options.normalize)
    keys, factor, how = _prepared(visit.one, dtype, count, row_blocks, tile)
    lowest = call.temperature if options.inter_temperature is None else min(call.temperature, options.inter_temperature)
    bounded = options.normalize and call.learned_temperature is None and lowest >= _lowest_bounded(dtype, how)
    bounded = bounded and count == 1  # float16's pieces hold no weights above 2 ** 16
    offset, width, modulus = pairs.band or (0, 0, 1)
    kernels().forward.attend[(row_blocks, visit.splits)](
        *queries, keys, *_strides(keys), factor, *_left_out(pairs), pairs.filled, call.learned_temperature, *answers,
        n, half, keys.shape[-2], offset, width, modulus, visit.chunk, visit.splits // visit.views, *split, *numbers,
        BLOCK_ROWS=tile.resident, BLOCK_KEYS=tile.streamed, DOT=_triton_dtype(dtype), PIECES=count,
        IN_PIECES=keys.dim() == 3, STAGES=tile.stages, BAND=bool(pairs.band), SMALL=modulus < tile.streamed,
        **_dimensions(pairs), FACTOR=how, CLEAN=_clean(visit.one), BOUNDED=bounded, WIDE=_wide(keys),
        num_warps=tile.warps, num_stages=tile.stages,
        **constants,
    )  # fmt: skip


def _prepared(
    one: KeySet, dtype: torch.dtype, count: int, row_blocks: int, tile: Tile
) -> tuple[Tensor, Tensor | None, str]:
    """Shared keys as ``attend`` streams them, the factors of their products, and where those come from."""
    keys, clean, converts = one.keys, _clean(one), one.keys.dtype != dtype
    (k, d), device = keys.shape, keys.device
    scaled = one.normalize and not converts and dtype == torch.float16  # 1 / norm might not fit float16
    converted = converts and (row_blocks > _CONVERSIONS or d > 256 or clean)
    few = tile.resident == 16 and (row_blocks <= 4 or k <= _COLUMNS_AT_ONCE)  # which cut the keys each for itself
    copy = clean or scaled or converted or (count > 1 and not few)
    if not copy and not one.normalize:
        return keys, None, "none"
    if not copy and tile.resident == 16:
        return keys, None, "here"
    out = None
    if copy:
        shape = (k, d) if count == 1 else (count, k, d)
        out = torch.empty(shape, dtype=_piece_dtype(dtype, count), device=device)
    unit = converts or dtype == torch.float32
    factor = None  # where the copy is of unit rows
    if clean or not (converted or (copy and count > 1)):
        factor = torch.empty(k, dtype=torch.float32, device=device)
    kernels().forward.prepare_rows[(_blocks(k, 16),)](
        keys, *keys.stride(), out, factor, k, D=d, BLOCK_D=_block_d(d), BLOCK=16,
        NORMALIZE=one.normalize, POWER=not unit, CLEAN=clean, PIECES=count, enable_fp_fusion=True,
    )  # fmt: skip
    return (keys if out is None else out), factor, "none" if factor is None else "loaded"


def _lowest_bounded(dtype: torch.dtype, factor: str) -> float:
    """The lowest temperature at which 2 ** logit of unit rows, a logit being at most log2(e) / t, needs no maximum.

    float32 and bfloat16 hold 2 ** -126 to 2 ** 127, which 0.03 leaves room for the inverse norm of any raw key; float16
    holds 2 ** -14 to 2 ** 16, which does not.
    """
    return 0.03 if dtype != torch.float16 else 0.1 if factor == "none" else math.inf


# ------------------------------------------------------------------------------------------------------ keys' gradient


def keys_gradient(call: KeysGradient, tile: Tile | None = None) -> Tensor:
    """``tile`` is for tests and benchmarks; None takes the table's."""
    query, (n, d), one = call.query, call.query.shape, call.first
    keys, pairs, device, block_d = one.keys, one.pairs, call.query.device, _block_d(call.query.shape[1])
    dtype = dot_dtype(query, keys, call.autocast)
    weights, prepared = _row_weights(call, call.normalize, query.dtype if one.own else dtype, not one.own)
    out, eps = torch.empty(keys.shape, dtype=keys.dtype, device=device), gradient_eps(keys.dtype)
    options = {"D": d, "BLOCK_D": block_d, **_dimensions(pairs), "NORMALIZE_KEYS": one.normalize}
    strides = prepared.stride() if one.own else _strides(prepared)
    rows = (prepared, *strides, keys, *keys.stride(), weights)
    if keys.dim() == 3:
        k, block = keys.shape[1], 32
        kernels().keys.keys_gradient_own[(n * _blocks(k, block),)](
            *rows, *_left_out(pairs), out, n, k, _blocks(k, block), eps,
            BLOCK_KEYS=block, enable_fp_fusion=True, **options,
        )  # fmt: skip
        return out
    if pairs.picked is not None:
        by_key, order = torch.sort(pairs.picked.flatten(), stable=True)
        starts = torch.searchsorted(by_key, torch.arange(len(keys) + 1, device=device))
        kernels().keys.keys_gradient_picked[(len(keys),)](
            *rows, order, starts, *_left_out(pairs), out, n, len(keys), pairs.picked.shape[1], eps,
            BLOCK_ROWS=32, CLEAN=_clean(one), enable_fp_fusion=True, **options,
        )  # fmt: skip
        return out
    offset, width, modulus = pairs.band or (0, 0, 1)
    per_view = modulus if pairs.band else len(keys)
    count = pieces(dtype, call.normalize)
    tile = tile or keys_tile(dtype, block_d, per_view, _arch(query), count)
    if _arch(query) in LITTLE_SHARED_MEMORY or options["IDS"] == 2 or options["MASKED"] == 2:
        tile = tile._replace(stages=1)
    band = ""
    if pairs.band:
        band = "cyclic" if n == modulus or width + tile.resident < n else "any"
    blocks_per_view = _blocks(per_view, tile.resident)
    blocks = blocks_per_view * (len(keys) // per_view)
    columns = _blocks(width + tile.resident - 1 if band == "cyclic" else n, tile.streamed)
    per_split, splits = _keys_splits(columns, blocks, tile, query)
    whole = splits == 1 and not one.normalize  # the normalisation's gradient needs registers that are not there
    parts = out if whole else torch.empty((splits, *keys.shape), dtype=torch.float32, device=device)
    kernels().keys.keys_gradient[(blocks, splits)](
        *rows, _largest(weights, prepared.dtype), call.grad, *_left_out(pairs), pairs.filled, parts,
        n, len(keys), offset, width, modulus, blocks_per_view, per_split * tile.streamed,
        BLOCK_KEYS=tile.resident, BLOCK_ROWS=tile.streamed, BAND=band, WHOLE=n == modulus,
        SMALL=modulus < tile.streamed, CLEAN=_clean(one), PIECES=count, STAGES=tile.stages,
        FOLDED=call.normalize and dtype != torch.float32 and call.grad.dim() == 0, WIDE=_wide(prepared),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True, **options,
    )  # fmt: skip
    if not whole:
        _merge_splits(parts, keys, out, one.normalize, _clean(one))
    return out


def _row_weights(
    call: KeysGradient | SymmetricGradient, normalize: bool, dtype: torch.dtype, multiplied: bool
) -> tuple[Tensor, Tensor]:
    """``weights`` (len(Weight), N), and the rows as kernels stream them: the same, unit ones, or scaled ones."""
    x, rows, t = call[0], call.rows, call.learned_temperature
    scaled = multiplied and normalize and dtype == torch.float16 and x.dtype == dtype
    (n, d), count = x.shape, pieces(dtype, normalize) if multiplied else 1
    weights = torch.empty((len(Weight), n), dtype=torch.float32, device=x.device)
    prepared = None
    if count > 1:
        prepared = torch.empty((count, n, d), dtype=_piece_dtype(dtype, count), device=x.device)
    elif scaled or x.dtype != dtype:
        prepared = torch.empty((n, d), dtype=dtype, device=x.device)
    grad_stride = call.grad.stride(0) if call.grad.dim() else 0
    kernels().keys.row_weights[(_blocks(n, 16),)](
        x, *x.stride(), call.grad, grad_stride, rows.contiguous(), t, weights, prepared, n, float(call.temperature),
        D=d, BLOCK_D=_block_d(d), BLOCK=16, NORMALIZE=normalize, POWER=scaled, PIECES=count,
        enable_fp_fusion=True,
    )  # fmt: skip
    return weights, x if prepared is None else prepared


def _largest(weights: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The largest weight of a row, which float16 is scaled by."""
    return weights[Weight.PULL].abs().amax() if dtype == torch.float16 else None


def _keys_splits(columns: int, blocks: int, tile: Tile, x: Tensor) -> tuple[int, int]:
    """Tiles per split, and splits."""
    per_split = _blocks(columns, min(8, _wave(tile, blocks, x)))
    return per_split, _blocks(columns, per_split)


def _wave(tile: Tile, blocks: int, x: Tensor) -> int:
    """How many splits of so many blocks give every multiprocessor eight warps."""
    return max(1, 8 * _parallel(x) // (tile.warps * blocks))


def _merge_splits(parts: Tensor, raw: Tensor, out: Tensor, normalize: bool, clean: bool) -> None:
    kernels().keys.merge_splits[(_blocks(len(raw), 8),)](
        parts, raw, *raw.stride(), out, len(raw), len(parts), gradient_eps(raw.dtype),
        D=raw.shape[1], BLOCK_D=_block_d(raw.shape[1]), BLOCK=8, NORMALIZE=normalize, CLEAN=clean,
        enable_fp_fusion=True,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- both directions between two views


def symmetric_losses(call: SymmetricLosses, tile: Tile | None = None) -> SymmetricOutputs:
    """Both directions' losses; their gradients are ``symmetric_gradient``'s."""

    m = len(call.views) // 2

    def outputs(query: Tensor, positive: Tensor, keys: Tensor, half: int = 0) -> RowOutputs:
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
            ),
            tile,
            half,
        )

    if not call.across:
        out = outputs(call.views, call.views, call.views, m)
        return SymmetricOutputs(out.loss, out.rows)
    first, second = call.views.chunk(2)
    there, back = outputs(first, second, second), outputs(second, first, first)
    return SymmetricOutputs(there.loss + back.loss, torch.cat([there.rows, back.rows], 1))


def symmetric_gradient(call: SymmetricGradient, tile: Tile | None = None) -> SymmetricGradients:
    views, (n, d), t, across = call.views, call.views.shape, call.learned_temperature, call.across
    dtype, new = views.dtype if call.autocast is None else call.autocast, torch.empty
    weights, prepared = _row_weights(call, True, dtype, True)
    tile = tile or symmetric_tile(dtype, _block_d(d), n, _arch(views))
    if _arch(views) in LITTLE_SHARED_MEMORY:
        tile = tile._replace(stages=1)
    out = new((n, d), dtype=views.dtype, device=views.device)
    blocks = 2 * _blocks(n // 2, tile.resident) if across else _blocks(n, tile.resident)
    columns = (1 if across else 2) * _blocks(n // 2 + tile.resident - 2, tile.streamed)
    per_split, splits = _keys_splits(columns, blocks, tile, views)
    parts = out if splits == 1 else new((splits, n, d), dtype=torch.float32, device=views.device)
    along = None if t is None else new((splits, n), dtype=torch.float32, device=views.device)
    kernels().symmetric.symmetric_rows[(blocks, splits)](
        prepared, *_strides(prepared), views, *views.stride(), weights, _largest(weights, prepared.dtype),
        t, parts, along, n, n // 2, per_split * tile.streamed, float(call.temperature), gradient_eps(views.dtype),
        D=d, BLOCK_ROWS=tile.resident, BLOCK_KEYS=tile.streamed, BLOCK_D=_block_d(d), ACROSS=across,
        ONE_EXP=t is None and call.temperature >= 0.05, SMALL=n // 2 < tile.streamed, PIECES=pieces(dtype, True),
        STAGES=tile.stages, WIDE=_wide(prepared), WHOLE_GRADIENT=splits == 1,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _merge_splits(parts, views, out, True, False)
    if t is None or along is None:
        return SymmetricGradients(out, new(0, dtype=torch.float32, device=views.device))
    of_positives = (weights[Weight.POSITIVE] * call.rows[Row.POSITIVE]).sum()
    return SymmetricGradients(out, ((of_positives - along.sum() / 2) / t).to(torch.float32))


# ----------------------------------------------------------------------------------------------- arguments of launches


def _clean(one: KeySet) -> bool:
    """Whether keys that are left out may hold NaN, and so must not enter a product."""
    return one.pairs.by_pair and not one.trusted


def _left_out(pairs: Pairs) -> tuple[Any, ...]:
    """Query ids, key ids with their strides, and mask with its strides; None and zeros where there are none."""
    query_ids, key_ids, mask = pairs.query_ids, pairs.key_ids, pairs.mask
    if query_ids is None or key_ids is None:
        query_ids, key_ids = None, None
    elif query_ids.dtype != key_ids.dtype:  # Triton would compare int8's -1 as 255
        query_ids, key_ids = query_ids.long(), key_ids.long()
    if query_ids is not None:
        query_ids = query_ids.contiguous()
    mask = None if mask is None else mask.view(torch.uint8)
    return query_ids, key_ids, *_two_strides(key_ids), mask, *_two_strides(mask)


def _two_strides(x: Tensor | None) -> tuple[int, int]:
    """Of (N, K); of (K,) a row's is 0."""
    if x is None:
        return 0, 0
    return (0, x.stride(0)) if x.dim() == 1 else (x.stride(0), x.stride(1))


def _piece_dtype(dtype: torch.dtype, count: int) -> torch.dtype:
    return {1: dtype, 2: torch.float16, 3: torch.bfloat16}[count]


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of (PIECES, R, D); of (R, D) a piece's is 0."""
    return x.stride() if x.dim() == 3 else (0, *x.stride())


def _dimensions(pairs: Pairs) -> dict[str, int]:
    return {"IDS": _dims(pairs.key_ids) if pairs.by_ids else 0, "MASKED": _dims(pairs.mask)}


def _dims(x: Tensor | None) -> int:
    return 0 if x is None else x.dim()


def _triton_dtype(dtype: torch.dtype) -> Any:
    tl = kernels().language
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def _wide(x: Tensor) -> bool:
    """Whether offsets into it need 64 bits."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31


def _parallel(x: Tensor) -> int:
    return _multiprocessors(x.device.index) if x.device.type == "cuda" else 4


def _arch(x: Tensor) -> int:
    major, minor = capability(x.device.index) if x.device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _block_d(d: int) -> int:
    return max(16, power_of_two(d))


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
