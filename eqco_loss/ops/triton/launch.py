"""Forward: from a call's record to launches of kernels.

What to launch depends on shapes, dtypes and settings alone. It is worked out once for each of their combinations, as a
plan, because in eager code the GPU would wait for Python to do so at every step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls import (
    KeySet,
    LogSumExp,
    LogSumExpOutputs,
    Metric,
    Row,
    RowLosses,
    RowOutputs,
    gradient_eps,
    loss_of,
    once_a_kind,
)
from ..launcher import Launch, bind
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
    padded,
    piece_dtype,
    strides_of,
    triton_dtype,
    unit_dtype,
)
from .tables import Part, TileSize, combine_tile, forward_tile, pieces, power_of_two, small_tile

_CONVERSIONS = 16  # more blocks of rows than these do not convert the keys each for itself: a copy costs less
_COLUMNS_AT_ONCE = 1024  # up to so many, a block of rows finishes on its own
WARM = (0.1, 0.03)  # temperatures from which on a softmax may need no running maximum, see ``_lowest_bounded``


class _Options(NamedTuple):
    """What a pass over the keys is asked for, beside its tensors."""

    loss: str  # of ``calls.loss_of``, or "none" for log-sum-exps only
    normalize: bool
    query_gradient: bool
    metrics: bool
    warm: float  # the largest of ``WARM`` that no temperature is below
    alpha: bool
    autocast: torch.dtype | None


class _Prepared(NamedTuple):
    """How keys that are not streamed as they lie are prepared."""

    shape: tuple[int, ...] | None  # of a copy; None where the keys themselves are streamed
    dtype: torch.dtype  # of the copy
    factor: bool  # whether products are to be multiplied by a factor for each key
    launch: Launch  # of ``prepare_rows``


class _Visit(NamedTuple):
    """How one set of keys is visited."""

    kernel: Any
    splits: int  # of all views
    rows: int  # blocks of rows
    # The kernel's integers. Of shared keys: offset, width and modulus of a band, columns of a split, splits per view;
    # of own keys: how many each query has.
    sizes: tuple[int, ...]
    constants: dict[str, Any]  # all but FINISH, which is known once all sets are planned
    prepared: _Prepared | None
    marks: bool  # whether ids are compared only in tiles that ``ids.mark_alike`` marks


class _Plan(NamedTuple):
    visits: list[tuple[_Visit, Launch]]
    splits: int  # of all sets
    finish: bool  # whether a single launch gives the answer
    combine: Launch  # which puts splits together
    programs: int  # of that launch


class _Job(NamedTuple):
    """What a call wants of the kernels, beside its tensors."""

    plan: _Plan
    floats: tuple[float, ...]  # the kernels' numbers: of integers, Triton would compile kernels of their own
    query_gradient: bool
    reduced: bool  # whether the losses are added up: by ``combine``, or by torch where a single launch gives them


def row_losses(call: RowLosses, tile: TileSize | None = None, half: int = 0) -> RowOutputs:
    """``half``: rows i and i + half are each other's positives, and ``positive`` is the query.

    ``tile`` is for tests and benchmarks; None takes the table's.
    """
    (n, d), device = call.query.shape, call.query.device
    new = functools.partial(torch.empty, dtype=torch.float32, device=device)
    rows = new(len(Row), n)
    query_gradient = new(n, d, dtype=unit_dtype(call.query.dtype)) if call.need_query_gradient else None
    positive_gradient = new(n, d, dtype=unit_dtype(call.positive.dtype)) if call.need_positive_gradient else None
    metrics = new(len(Metric), n) if call.need_metrics else None
    outputs = query_gradient, positive_gradient, rows, metrics
    loss = _attend(call, call.sets, _job(call, tile), half, call.positive, outputs)
    return RowOutputs(loss, query_gradient, positive_gradient, None, rows, metrics)


@once_a_kind
def _job(call: RowLosses, tile: TileSize | None) -> _Job:
    options = _Options(
        loss=loss_of(call),
        normalize=call.normalize,
        query_gradient=call.need_query_gradient,
        metrics=call.need_metrics,
        warm=_warm(call),
        alpha=call.alpha is not None,
        autocast=call.autocast,
    )
    numbers = float(call.inter_temperature or 1.0), float(call.alpha or 1.0), call.share_factor
    return _planned(call, call.sets, options, tile, call.positive, numbers, call.reduced)


def logsumexp(call: LogSumExp) -> LogSumExpOutputs:
    (n, d), new = call.query.shape, functools.partial(torch.empty, dtype=torch.float32, device=call.query.device)
    rows, mean_key = new(len(Row), n), new(n, d) if call.need_query_gradient else None
    options = _Options(
        loss="none",
        normalize=False,
        query_gradient=call.need_query_gradient,
        metrics=False,
        warm=0.0,
        alpha=False,
        autocast=call.autocast,
    )
    job = _planned(call, [call.first], options, None, call.query, (1.0, 1.0, 1.0))
    lse = _attend(call, [call.first], job, 0, call.query, (mean_key, None, rows, None))
    return LogSumExpOutputs(lse, mean_key, rows)


def _planned(
    call: RowLosses | LogSumExp,
    sets: list[KeySet],
    options: _Options,
    tile: TileSize | None,
    positive: Tensor,
    numbers: tuple[float, ...],
    reduced: bool = False,
) -> _Job:
    query, device = call.query, arguments.device(call.query)
    plan = _plan(*query.shape, query.dtype, options, tile, tuple(map(facts, sets)), device)
    floats = (float(call.temperature), *numbers, gradient_eps(query.dtype), gradient_eps(positive.dtype))
    return _Job(plan, floats, options.query_gradient, reduced)


def _attend(
    call: RowLosses | LogSumExp,
    sets: list[KeySet],
    job: _Job,
    half: int,
    positive: Tensor,
    outputs: tuple[Tensor | None, ...],
) -> Tensor:
    """The losses, their sum, or the log-sum-exps."""
    query, (n, d), t, plan, floats = call.query, call.query.shape, call.learned_temperature, job.plan, job.floats
    new = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    parts, outs, scratch = None, None, None
    added = job.reduced and not plan.finish  # by ``combine``
    loss = new(() if added else (n,))
    if added:
        scratch = new(1 + plan.programs)
    if not plan.finish:
        parts = new(len(Part), plan.splits, n)
        if job.query_gradient:
            outs = new(plan.splits, n, d)
    queries = (query, *query.stride(), positive, *positive.stride())
    answers = (parts, outs, loss, scratch, *outputs)
    first_split, of_call = 0, call.kind if isinstance(call, RowLosses) else 0
    for one, (visit, attend) in zip(sets, plan.visits, strict=True):
        kind = of_call and (of_call, first_split)  # of each set's own launches
        keys, factor = (one.keys, None) if visit.prepared is None else _prepare(one.keys, visit.prepared, kind)
        split, left = (first_split, plan.splits), left_out(one.pairs)
        if one.own:
            picked = one.pairs.picked
            strides = (*keys.stride(), None, 0, 0) if picked is None else (0, *keys.stride(), picked, *picked.stride())
            attend.again(kind, (n, 1), *queries, keys, *strides, *left, t, *answers, n, *visit.sizes, *split, *floats)
        else:
            marks = marked(left, n, keys.shape[-2]) if visit.marks else None
            attend.again(
                *(kind, (visit.rows, visit.splits)),
                *queries, keys, *strides_of(keys), factor, *left, marks, one.pairs.filled, t, *answers,
                n, half, keys.shape[-2], *visit.sizes, *split, *floats,
            )  # fmt: skip
        first_split += visit.splits
    if not plan.finish:
        plan.combine.again(of_call, (plan.programs,), *queries, t, *answers, n, half, plan.splits, *floats)
    return loss.sum() if job.reduced and not added else loss


def _prepare(keys: Tensor, how: _Prepared, kind: Hashable) -> tuple[Tensor, Tensor | None]:
    """Shared keys as they are streamed, and the factors of their products."""
    out = None if how.shape is None else torch.empty(*how.shape, dtype=how.dtype, device=keys.device)
    factor = torch.empty(keys.shape[0], dtype=torch.float32, device=keys.device) if how.factor else None
    how.launch.again(kind, (blocks_of(keys.shape[0], 16),), keys, *keys.stride(), out, factor, keys.shape[0])
    return (keys if out is None else out), factor


# ------------------------------------------------------------------------------------------------------ what to launch


@functools.lru_cache(maxsize=1024)
def _plan(
    n: int,
    d: int,
    dtype: torch.dtype,  # of the query
    options: _Options,
    tile: TileSize | None,
    sets: tuple[KeyFacts, ...],
    device: Device,
) -> _Plan:
    common = {
        "D": d,
        "BLOCK_D": padded(d),
        "NORMALIZE": options.normalize,
        "ALPHA": options.alpha,
        "LOSS": options.loss,
        "enable_fp_fusion": True,
    }
    more = common | {"QUERY_GRADIENT": options.query_gradient, "METRICS": options.metrics}
    visits, resident = [], 1
    for one in sets:
        if one.own:
            visits.append(_own_keys(n, d, one, more))
        else:
            visit, resident = _shared_keys(n, d, dtype, options, tile, one, device, more)
            visits.append(visit)
    splits = sum(visit.splits for visit in visits)
    finish = options.loss != "none" and len(visits) == 1 and splits == 1 and (sets[0].own or resident * d <= 8192)
    bound = [(visit, bind(visit.kernel, visit.constants | {"FINISH": finish})) for visit in visits]
    block, at_once = combine_tile(splits, padded(d), options.query_gradient)
    combine = {
        "BLOCK_ROWS": block,
        "BLOCK_SPLITS": power_of_two(splits),
        "AT_ONCE": at_once,
        "FEW": splits <= 8,
        "num_warps": 4,
    }
    return _Plan(bound, splits, finish, bind(kernels().forward.combine, combine | common), blocks_of(n, block))


def _own_keys(n: int, d: int, one: KeyFacts, common: dict[str, Any]) -> _Visit:
    constants = {
        "BLOCK_KEYS": 32 if d <= 256 else 16,
        "IDS": one.ids,
        "MASKED": one.masked,
        "NORMALIZE_KEYS": one.normalize,
        "num_warps": 4,
    }
    return _Visit(kernels().own.attend_own, 1, n, (one.columns,), constants | common, None, False)


def _shared_keys(
    n: int,
    d: int,
    query_dtype: torch.dtype,
    options: _Options,
    tile: TileSize | None,
    one: KeyFacts,
    device: Device,
    common: dict[str, Any],
) -> tuple[_Visit, int]:
    """How shared keys are visited, and how many rows a program keeps."""
    arch, dtype = device.arch, dot_dtype(query_dtype, one.dtype, options.autocast)
    (k, _), count = one.shape, pieces(dtype, options.normalize)
    offset, width, modulus = one.band or (0, k, 1)
    views = k // modulus if one.band else 1
    by_pair = bool(one.ids or one.masked)
    marks = one.ids == 1 and not one.masked
    small = views == 1 and width <= _COLUMNS_AT_ONCE and n * width <= 2**18
    if tile is None and small:
        tile, marks = small_tile(dtype, padded(d)), False  # a look at all ids first costs more
    elif tile is None:
        plain = options.query_gradient and options.loss != "dual" and not options.metrics and not by_pair
        plain = plain and not (one.normalize and (dtype == torch.float16 or arch >= 100))
        converts = one.dtype != dtype and blocks_of(n, 64) <= _CONVERSIONS
        turned = converts and one.strides[1] != 1
        tile = forward_tile(
            *(dtype, padded(d), n, arch),
            plain=plain,
            converts=converts,
            turned=turned,
            by_pair=by_pair,
            marks=marks,
            count=count,
        )
    tile = device.fitting(tile, one)
    rows = blocks_of(n, tile.resident)
    columns = width + (tile.resident - 1 if one.band else 0)
    waves = 1 if options.query_gradient else 2  # a split's share is (N, D) numbers, or only (N,)
    wanted = 1 if small else device.wave(tile, rows * views) * waves
    per_split = max(blocks_of(blocks_of(columns, tile.streamed), wanted), 1 if small else 2) * tile.streamed
    splits_per_view = blocks_of(columns, per_split)
    prepared, how = _prepared(one, dtype, count, rows, tile)
    bounded = options.normalize and options.warm >= _lowest_bounded(dtype, how)
    constants = {
        "BLOCK_ROWS": tile.resident,
        "BLOCK_KEYS": tile.streamed,
        "DOT": triton_dtype(dtype),
        "PIECES": count,
        "IN_PIECES": prepared is not None and prepared.shape is not None and count > 1,
        "STAGES": tile.stages,
        "BAND": bool(one.band),
        "SHORT_BAND": modulus < tile.streamed,
        "IDS": one.ids,
        "MASKED": one.masked,
        "FACTOR": how,
        "CLEAN": one.clean,
        "BOUNDED": bounded and count == 1,  # float16's pieces hold no weights above 2 ** 16
        "FAR": one.wide if prepared is None or prepared.shape is None else math.prod(prepared.shape) > 2**31,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    sizes = offset, width if one.band else 0, modulus, per_split, splits_per_view
    visit = _Visit(
        kernels().forward.attend, views * splits_per_view, rows, sizes, constants | common, prepared, marks
    )  # fmt: skip
    return visit, tile.resident


def _prepared(
    one: KeyFacts, dtype: torch.dtype, count: int, row_blocks: int, tile: TileSize
) -> tuple[_Prepared | None, str]:
    """How shared keys are prepared, and where the factors of their products come from."""
    converts, (k, d) = one.dtype != dtype, one.shape
    scaled = one.normalize and not converts and dtype == torch.float16  # 1 / norm might not fit float16
    converted = converts and (row_blocks > _CONVERSIONS or d > 256 or one.clean)
    few = tile.resident == 16 and (row_blocks <= 4 or k <= _COLUMNS_AT_ONCE)  # which cut the keys each for itself
    copy = one.clean or scaled or converted or (count > 1 and not few)
    if not copy and not one.normalize:
        return None, "none"
    if not copy and tile.resident == 16:
        return None, "here"
    shape = ((k, d) if count == 1 else (count, k, d)) if copy else None
    # A copy of unit rows needs no factor.
    factor = one.clean or not (converted or (copy and count > 1))
    constants = {
        "D": d,
        "BLOCK_D": padded(d),
        "BLOCK": 16,
        "NORMALIZE": one.normalize,
        "POWER": not (converts or dtype == torch.float32),
        "CLEAN": one.clean,
        "PIECES": count,
        "enable_fp_fusion": True,
    }
    how = bind(kernels().forward.prepare_rows, constants)
    return _Prepared(shape, piece_dtype(dtype, count), factor, how), "loaded" if factor else "none"


def _lowest_bounded(dtype: torch.dtype, factor: str) -> float:
    """The lowest temperature at which 2 ** logit of unit rows, a logit being at most log2(e) / t, needs no maximum.

    float32 and bfloat16 hold 2 ** -126 to 2 ** 127, which 0.03 leaves room for the inverse norm of any raw key; float16
    holds 2 ** -14 to 2 ** 16, which does not.
    """
    return WARM[1] if dtype != torch.float16 else WARM[0] if factor == "none" else math.inf


def _warm(call: RowLosses) -> float:
    """The largest bound of ``WARM`` that both temperatures reach; 0 if none, where each softmax follows its maximum."""
    if call.learned_temperature is not None:  # of which the host knows nothing
        return 0.0
    lowest = min(call.temperature, call.inter_temperature or call.temperature)
    return next((bound for bound in WARM if lowest >= bound), 0.0)
