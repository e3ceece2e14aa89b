"""Both directions between two views in half precision, whose similarities are never stored: the launches of a step.

What to launch depends on shapes, dtypes and settings alone and is worked out once for each of their combinations,
because in eager code the GPU would wait for Python to do so at every step. Forward launches ``prepare_kernel``,
``statistics_kernel`` and ``finish_views_kernel``; backward ``prepare_kernel``, where what forward multiplied is not
kept, ``view_weights_kernel``, two products and ``through_views_kernel``; more of them only where a chunk does not hold
all.

Of ``Row`` forward also fills INVERSE, for backward's rows, and BOUNDED_PULL, which is here PULL for powers of two that
are less the largest possible logit.
"""

# mypy: ignore-errors

import functools
from typing import NamedTuple

import torch
import triton

from ..calls import Row, SymmetricGradients, SymmetricOutputs, gradient_eps, loss_of, once_a_kind
from ..launcher import Launch, bind
from . import chunks
from .mutual_kernels import _BOUNDED, _EITHER, _FOLLOWED, _LEAST, statistics_kernel, view_weights_kernel
from .pointwise import new_state
from .view_kernels import (
    _COPY,
    _POWER,
    _UNIT,
    finish_views_kernel,
    fold_parts_kernel,
    prepare_kernel,
    through_views_kernel,
)

# Limits and tiles are arguments of what is cached below, because tests and benchmarks change them.
STATISTICS_BYTES = 2**25  # that the tiles' statistics may take
BLOCK_ROWS = 32  # of the kernels that put statistics together


class TileSize(NamedTuple):
    """How a product of two views is cut."""

    rows: int
    keys: int
    features: int  # of a step
    warps: int
    stages: int
    group: int  # rows of tiles that programs which run at the same time share

    @property
    def constants(self):
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_KEYS": self.keys,
            "BLOCK_D": self.features,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class RowBlocks(NamedTuple):
    """How kernels of whole rows are cut."""

    elements: int  # of a view, for each program, if a row has not more of them
    warps: int

    def constants(self, d):
        block_d = min(2048, triton.next_power_of_2(d))
        return {"BLOCK_ROWS": max(1, self.elements // block_d), "BLOCK_D": block_d, "num_warps": self.warps}


# Measured under autocast, N = 4096, D = 512: a whole forward pass 56.3 us, with 8 warps 60.3, and with programs that
# stay for several tiles 59.2; a whole backward pass 114.9 us, with such programs 118.0.
STATISTICS = TileSize(128, 128, 64, 4, 3, 16)
SQUARE = TileSize(128, 128, 64, 4, 3, 16)  # of statistics where rows meet rows of their own view
WEIGHTS = TileSize(128, 128, 64, 4, 3, 16)
ROWS = RowBlocks(1024, 4)


def symmetric_losses(call, products):
    n = 2 * len(call.first)
    new = functools.partial(torch.empty, dtype=torch.float32, device=call.first.device)
    plan, (shape, dtype) = _statistics(call, products)
    rows, loss, scratch, parts = new((len(Row), n)), new(()), new(plan.scratch), new(plan.parts)
    x, scale = _prepared(call, products, rows, scratch)
    temperatures = float(call.temperature), call.learned_temperature, float(call.inter_temperature or 1.0)
    state, stride = None, 0
    if len(plan.chunks) > 1:
        state, stride = new_state(n, parts), n
    for chunk in plan.chunks:
        plan.statistics.again(
            *(call.kind if len(plan.chunks) == 1 else 0, chunk.grid),
            x, x.stride(0), scale, parts, chunk.of_keys, *temperatures, *chunk.places, n // 2, plan.feature_steps,
        )  # fmt: skip
        if state is not None:
            for part, tiles, of_rows in (
                (parts, chunk.tiles_of_keys, state[:, chunk.start : chunk.stop]),
                (parts[chunk.of_keys :], chunk.tiles_of_rows, state[:, chunk.apart :]),
            ):
                count = of_rows.shape[1]
                grid = (triton.cdiv(count, BLOCK_ROWS),)
                plan.fold(grid, part, tiles, count, of_rows, stride, *temperatures)
    one = plan.chunks[0]
    plan.finish.again(
        *(call.kind, plan.finish_grid),
        parts, one.tiles_of_keys, plan.rows_end, one.of_keys, one.tiles_of_rows, state, stride, *temperatures,
        plan.known, float(call.alpha or 1.0), call.share_factor, scratch, loss, rows, n,
    )  # fmt: skip
    return SymmetricOutputs(loss, rows, x if len(shape) == 2 else new(shape, dtype=dtype))


@once_a_kind
def _statistics(call, products):
    """The plan, and what is kept."""
    form = _form(call.temperature, call.inter_temperature, call.learned_temperature)
    weigh, tile = call.learned_temperature is not None, STATISTICS if call.across else SQUARE
    shape = 2 * len(call.first), _width(call.first)
    of_loss = loss_of(call), call.alpha is not None
    plan = _statistics_plan(*shape, call.across, form, weigh, *of_loss, tile, STATISTICS_BYTES)
    return plan, keeps(call, products)


def symmetric_gradient(call, products):
    """Backward of ``symmetric_losses``; ``symmetric_gradient`` of this folder has the formula."""
    (half, d), rows, device = call.first.shape, call.rows, call.first.device
    n, x, scale = 2 * half, call.kept, None
    if x.numel() == 0:
        x, scale = _prepared(call, products, rows, None)
    elif products == call.first.dtype:  # the views themselves
        # The views that forward kept: the caller may have changed those of the call since.
        call, scale = call._replace(first=x[:half], second=x[half:]), rows[Row.INVERSE]
    multiplied = x if x.shape[1] == d else x[:, :d]
    largest, factor = None, call.grad
    if products == torch.float16:  # which holds no weight above 65504 and loses small ones
        largest = (rows[Row.PULL] * call.grad).abs().amax()
        largest = torch.where(largest > 0, largest, 1.0)
        factor = call.grad / largest
    plan = _weights(call, products, x.shape[1])
    out = torch.empty((n, d), dtype=call.first.dtype, device=device)
    sums = torch.empty((n if plan.whole else half, d), dtype=torch.float32, device=device)
    first_key = 0 if plan.whole else half  # of the rows that have sums
    if not plan.whole:
        step = plan.chunks[0][0]
        gradients = torch.empty((step.stop - step.start, d), dtype=torch.float32, device=device)
    workspace = torch.empty(plan.workspace, dtype=products, device=device)
    for some, columns, grid, stride in plan.chunks:
        r, c = some.stop - some.start, columns.stop - columns.start
        weights = workspace[: r * stride].view(r, stride)[:, :c]  # rows aligned, as a fast product asks
        plan.weights.again(
            *(call.kind if len(plan.chunks) == 1 else 0, grid),
            x, x.stride(0), scale, rows, n, factor, weights, stride,
            float(call.temperature), call.learned_temperature,
            some.start, some.stop, columns.start, columns.stop, half, plan.feature_steps,
        )  # fmt: skip
        gradient = sums[some] if plan.whole else gradients[:r]
        first = (some.start == 0 or call.across) and columns.start == (half if call.across else some.start)
        chunks.product(weights, multiplied[columns], gradient, add=not first)
        own = chunks.shared_with(some, columns)
        if own < c:
            of_keys = sums[columns.start + own - first_key : columns.stop - first_key]
            chunks.product(weights[:, own:].T, multiplied[some], of_keys, add=some.start > 0)
        if not plan.whole and columns.stop == n:
            _through(call, products, gradient, None, out, (scale, largest), some)
    whole = sums[:half] if plan.whole else None
    kind = call.kind if plan.whole else 0
    _through(call, products, whole, sums[-half:], out, (scale, largest), slice(0, half), kind)
    of_temperature = None
    if call.learned_temperature is not None:
        of_temperature = rows[Row.TEMPERATURE_GRADIENT].sum() * call.grad
    return SymmetricGradients(out, of_temperature)


@once_a_kind
def _weights(call, products, width):
    form, n = _form(call.temperature, None, call.learned_temperature), 2 * len(call.first)
    anchors = n // 2 if call.across else n
    size = chunks.chunk_size(anchors, anchors, call.first, products, False, False)
    return _gradient_plan(n, width, call.across, products, form, WEIGHTS, size)


# ---------------------------------------------------------------------------------------------------------- small steps


def keeps(call, products):
    """Shape and dtype of what forward multiplied, if backward can multiply it, too, or else of nothing.

    Of float16's rows it would need the scales as well; of rows that are multiplied as they are, with zeros beyond D, a
    copy would not be less than the rows.
    """
    m, width, same = call.first.shape[0], _width(call.first), products == call.first.dtype
    fits = products != torch.float16 and call.first.shape[1] == width if same else call.need_gradient
    return (2 * m, width) if fits else (0,), products if fits else call.first.dtype


def _width(view):
    """D and zeros to whole steps of features: the loops' loads have no mask, which would make them spill."""
    d = view.shape[1]
    return d + -d % max(STATISTICS.features, SQUARE.features, WEIGHTS.features)


def _prepared(call, products, rows, scratch):
    """The rows that are multiplied, (2M, D) with zeros to whole steps of features, and their scale or None.

    With ``scratch`` it fills ``rows``, too.
    """
    here, there, (half, d) = call.first, call.second, call.first.shape
    plan = _rows_plan(half, d, _width(here), here.dtype, products, ROWS)
    out = torch.empty((2 * half, plan.width), dtype=products, device=here.device)
    scale, written = None, None
    if plan.rows_as == _POWER:
        scale = written = torch.empty(2 * half, dtype=torch.float32, device=here.device)
    elif plan.rows_as == _COPY:
        scale = rows[Row.INVERSE]
    plan.prepare[scratch is not None].again(
        *(call.kind, plan.prepare_grid),
        here, *here.stride(), there, *there.stride(), out, plan.width, written, rows, scratch, half,
    )  # fmt: skip
    return out, scale


def _through(call, products, of_here, of_there, out, given, some, kind=0):
    """Sums over negatives of some rows of a view, or of both views', to ``out`` (2M, D)."""
    here, there, (half, d), (scale, largest) = call.first, call.second, call.first.shape, given
    plan = _rows_plan(some.stop - some.start, d, d, here.dtype, products, ROWS)
    plan.through.again(
        *(kind, plan.through_grid),
        here, *here.stride(), there, *there.stride(), of_here, of_there, d,
        out[some], out[half + some.start :], d, call.rows, scale, call.grad, largest,
        some.start, some.stop, half, plan.least,
    )  # fmt: skip


def _form(temperature, inter_temperature, learned):
    """What FORM of ``mutual_kernels`` is for these temperatures."""
    if learned is not None:
        return _EITHER
    return _BOUNDED if min(temperature, inter_temperature or temperature) >= _LEAST else _FOLLOWED


# ------------------------------------------------------------------------------------------------------ what to launch


class _RowsPlan(NamedTuple):
    width: int  # of what is multiplied
    rows_as: int  # of ``prepare_kernel``
    least: float  # 1 / the least length that a gradient is divided by
    prepare_grid: tuple[int, ...]
    prepare: dict[bool, Launch]  # True: it measures the rows as well
    through_grid: tuple[int, ...]
    through: Launch


@functools.lru_cache(maxsize=1024)
def _rows_plan(count, d, width, dtype, products, how):
    rows_as = _UNIT if products != dtype else _POWER if products == torch.float16 else _COPY
    prepare, through = {"D": d, "WIDTH": width, "ROWS_AS": rows_as} | how.constants(width), {"D": d} | how.constants(d)
    return _RowsPlan(
        width=width,
        rows_as=rows_as,
        least=1.0 / gradient_eps(dtype),
        prepare_grid=(triton.cdiv(count, prepare["BLOCK_ROWS"]),),
        prepare={measure: bind(prepare_kernel, {"MEASURE": measure} | prepare) for measure in (False, True)},
        through_grid=(triton.cdiv(count, through["BLOCK_ROWS"]),),
        through=bind(through_views_kernel, through),
    )


class _Chunk(NamedTuple):
    """Rows whose tiles' statistics are held at the same time."""

    start: int
    stop: int
    apart: int  # from this key on keys have statistics apart from the rows'
    tiles_of_rows: int
    tiles_of_keys: int
    of_keys: int  # where these lie
    places: tuple[int, ...]  # the kernel's integers
    grid: tuple[int, ...]


class _StatisticsPlan(NamedTuple):
    chunks: list[_Chunk]
    parts: int  # numbers
    feature_steps: int
    rows_end: int  # rows before this one are those whose parts come first
    known: float  # negatives of each row
    statistics: Launch
    fold: Launch
    finish_grid: tuple[int, ...]
    scratch: int  # numbers
    finish: Launch


@functools.lru_cache(maxsize=1024)
def _statistics_plan(n, width, across, form, weigh, loss, alpha, tile, most_bytes):
    dual = loss == "dual"
    # Up to the last plane that is used; one between them may stay empty.
    planes = 4 if dual else 3 if weigh else 1 if form == _BOUNDED else 2
    anchors, first_key = (n // 2, n // 2) if across else (n, 0)
    of_a_row = 4 * planes * (triton.cdiv(n - first_key, tile.keys) + triton.cdiv(n - first_key, tile.rows))
    step = max(tile.rows, most_bytes // of_a_row // tile.rows * tile.rows)
    found, parts = [], 0
    for start in range(0, anchors, step):
        stop, key = min(start + step, anchors), first_key if across else start
        apart = key if across else stop
        tiles_of_rows, tiles_of_keys = triton.cdiv(stop - start, tile.rows), triton.cdiv(n - key, tile.keys)
        of_keys = planes * tiles_of_keys * (stop - start)
        parts = max(parts, of_keys + planes * tiles_of_rows * (n - apart))
        places = start, stop, key, n, apart
        grid = (tiles_of_rows * tiles_of_keys,)
        found.append(_Chunk(start, stop, apart, tiles_of_rows, tiles_of_keys, of_keys, places, grid))
    sides, blocks = 2 if across else 1, triton.cdiv(anchors, BLOCK_ROWS)
    common = {"FORM": form, "WEIGH": weigh, "BLOCK_TILES": 32, "BLOCK_ROWS": BLOCK_ROWS, "num_warps": 4}
    statistics = {"TRIANGLE": not across, "FORM": form, "WEIGH": weigh, "DUAL": dual}
    return _StatisticsPlan(
        chunks=found,
        parts=parts,
        feature_steps=width // tile.features,
        rows_end=anchors,
        known=max(1.0, (n // 2 - 1) * (1.0 if across else 2.0)),
        statistics=bind(statistics_kernel, statistics | tile.constants),
        fold=bind(fold_parts_kernel, common | {"DUAL": dual}),
        finish_grid=(blocks, sides),
        scratch=1 + blocks * sides,
        finish=bind(finish_views_kernel, common | {"ALPHA": alpha, "LOSS": loss}),
    )


class _GradientPlan(NamedTuple):
    chunks: list[tuple[slice, slice, tuple[int], int]]  # rows, keys, grid, and stride of the weights
    whole: bool  # whether the sums of all rows are held until the end, or those of a chunk's rows only until its end
    workspace: int  # weights
    feature_steps: int
    weights: Launch


@functools.lru_cache(maxsize=1024)
def _gradient_plan(n, width, across, products, form, tile, chunk_size):
    found = [(some, columns) for some, several in chunks.met_once(n, across, chunk_size) for columns in several]
    strides = [columns.stop - columns.start + 7 & -8 for _, columns in found]
    grids = [(triton.cdiv(r.stop - r.start, tile.rows) * triton.cdiv(c.stop - c.start, tile.keys),) for r, c in found]
    return _GradientPlan(
        chunks=[(*both, grid, stride) for both, grid, stride in zip(found, grids, strides, strict=True)],
        whole=not across or all(some == found[0][0] for some, _ in found),
        workspace=max((some.stop - some.start) * stride for (some, _), stride in zip(found, strides, strict=True)),
        feature_steps=width // tile.features,
        weights=bind(view_weights_kernel, {"FORM": form} | tile.constants),
    )
