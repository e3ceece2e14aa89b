"""Forward: from a call's record to launches of kernels."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls import KeySet, LogSumExp, LogSumExpOutputs, Metric, Row, RowLosses, RowOutputs, gradient_eps
from ..launcher import launch
from . import arguments
from .arguments import (
    blocks_of,
    dimensions,
    dims_of,
    dot_dtype,
    kernels,
    left_out,
    must_clean,
    needs_64_bits,
    padded,
    piece_dtype,
    strides_of,
    triton_dtype,
    unit_dtype,
)
from .tables import LITTLE_SHARED_MEMORY, Part, Tile, combine_tile, forward_tile, pieces, power_of_two, small_tile

_CONVERSIONS = 16  # more blocks of rows than these do not convert the keys each for itself: a copy costs less
_COLUMNS_AT_ONCE = 1024  # up to so many, a block of rows finishes on its own


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
        "BLOCK_D": padded(d),
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
        block, at_once = combine_tile(splits, padded(d), outs is not None)
        launch(
            kernels().forward.combine, (blocks_of(n, block),),
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
    dtype, arch = dot_dtype(query, keys, call.autocast), arguments.arch(query)
    views = len(keys) // pairs.band[2] if pairs.band else 1
    width = pairs.band[1] if pairs.band else len(keys)
    small = views == 1 and width <= _COLUMNS_AT_ONCE and n * width <= 2**18
    plain = options.query_gradient and options.inter_temperature is None and not options.metrics and not pairs.by_pair
    plain = plain and not (one.normalize and (dtype == torch.float16 or arch >= 100))
    converts = keys.dtype != dtype and blocks_of(n, 64) <= _CONVERSIONS
    if tile is None and small:
        tile = small_tile(dtype, padded(d))
    elif tile is None:
        turned = converts and keys.stride(1) != 1
        tile = forward_tile(
            dtype,
            padded(d),
            n,
            arch,
            plain=plain,
            converts=converts,
            turned=turned,
            count=pieces(dtype, options.normalize),
        )
    if arch in LITTLE_SHARED_MEMORY or dims_of(pairs.mask) == 2 or (pairs.by_ids and dims_of(pairs.key_ids) == 2):
        tile = tile._replace(stages=1)
    columns = width + (tile.resident - 1 if pairs.band else 0)
    waves = 1 if options.query_gradient else 2  # a split's share is (N, D) numbers, or only (N,)
    wanted = arguments.wave(tile, blocks_of(n, tile.resident) * views, query) * waves
    per_split = blocks_of(blocks_of(columns, tile.streamed), 1 if small else wanted)
    chunk = max(per_split, 1 if small else 2) * tile.streamed
    return _Visit(one, tile, columns, views, chunk, views * blocks_of(columns, chunk))


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
    launch(
        kernels().forward.attend_own, (call.query.shape[0], 1),
        *queries, keys, *strides, pairs.picked, *picked_strides, *left_out(pairs), call.learned_temperature, *answers,
        call.query.shape[0], half, visit.columns, *split, *numbers,
        BLOCK_KEYS=visit.tile.streamed, **dimensions(pairs), NORMALIZE_KEYS=visit.one.normalize,
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
    dtype, row_blocks = (
        dot_dtype(call.query, visit.one.keys, call.autocast),
        blocks_of(n, tile.resident),
    )
    count = pieces(dtype, options.normalize)
    keys, factor, how = _prepared(visit.one, dtype, count, row_blocks, tile)
    lowest = call.temperature if options.inter_temperature is None else min(call.temperature, options.inter_temperature)
    bounded = options.normalize and call.learned_temperature is None and lowest >= _lowest_bounded(dtype, how)
    bounded = bounded and count == 1  # float16's pieces hold no weights above 2 ** 16
    offset, width, modulus = pairs.band or (0, 0, 1)
    launch(
        kernels().forward.attend, (row_blocks, visit.splits),
        *queries, keys, *strides_of(keys), factor, *left_out(pairs), pairs.filled, call.learned_temperature, *answers,
        n, half, keys.shape[-2], offset, width, modulus, visit.chunk, visit.splits // visit.views, *split, *numbers,
        BLOCK_ROWS=tile.resident, BLOCK_KEYS=tile.streamed, DOT=triton_dtype(dtype), PIECES=count,
        IN_PIECES=keys.dim() == 3, STAGES=tile.stages, BAND=bool(pairs.band), SMALL=modulus < tile.streamed,
        **dimensions(pairs), FACTOR=how, CLEAN=must_clean(visit.one), BOUNDED=bounded, WIDE=needs_64_bits(keys),
        num_warps=tile.warps, num_stages=tile.stages,
        **constants,
    )  # fmt: skip


def _prepared(
    one: KeySet, dtype: torch.dtype, count: int, row_blocks: int, tile: Tile
) -> tuple[Tensor, Tensor | None, str]:
    """Shared keys as ``attend`` streams them, the factors of their products, and where those come from."""
    keys, clean, converts = one.keys, must_clean(one), one.keys.dtype != dtype
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
        out = torch.empty(shape, dtype=piece_dtype(dtype, count), device=device)
    unit = converts or dtype == torch.float32
    factor = None  # where the copy is of unit rows
    if clean or not (converted or (copy and count > 1)):
        factor = torch.empty(k, dtype=torch.float32, device=device)
    launch(
        kernels().forward.prepare_rows, (blocks_of(k, 16),),
        keys, *keys.stride(), out, factor, k, D=d, BLOCK_D=padded(d), BLOCK=16,
        NORMALIZE=one.normalize, POWER=not unit, CLEAN=clean, PIECES=count, enable_fp_fusion=True,
    )  # fmt: skip
    return (keys if out is None else out), factor, "none" if factor is None else "loaded"


def _lowest_bounded(dtype: torch.dtype, factor: str) -> float:
    """The lowest temperature at which 2 ** logit of unit rows, a logit being at most log2(e) / t, needs no maximum.

    float32 and bfloat16 hold 2 ** -126 to 2 ** 127, which 0.03 leaves room for the inverse norm of any raw key; float16
    holds 2 ** -14 to 2 ** 16, which does not.
    """
    return 0.03 if dtype != torch.float16 else 0.1 if factor == "none" else math.inf
