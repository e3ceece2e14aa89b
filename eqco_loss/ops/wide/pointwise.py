"""What the wide backend does between two products: statistics of a tile's logits, and the weights that are multiplied.

Each is one kernel where Triton serves (``kernels.py``), and else a few of torch's own operations, in place.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gap
from ..calls import (
    LN2,
    LOG2E,
    MINIMUM,
    Metric,
    Pairs,
    Row,
    RowLosses,
    SymmetricLosses,
    either,
    loss_of,
    rounded_log_sum,
    slices,
    temperature_of,
)
from ..launcher import interpreted


class Plane(IntEnum):
    """The rows of a state, (len(Plane), R): what passes over the tiles have seen of each query so far."""

    MAXIMUM = 0  # of the logits
    TOTAL = 1  # the sum of 2 ** (logit - MAXIMUM)
    INTER_TOTAL = 2  # the sum of 2 ** (ratio * (logit - MAXIMUM)), for the dual temperature's second one
    COUNT = 3  # negatives
    RANK = 4  # logits above a threshold
    LOGIT_SUM = 5
    WEIGHTED = 6  # the sum of (logit - MAXIMUM) 2 ** (logit - MAXIMUM)


def new_state(n: int, like: Tensor) -> Tensor:
    state = like.new_zeros((len(Plane), n))
    state[Plane.MAXIMUM] = MINIMUM
    return state


def first_state(n: int, like: Tensor) -> Tensor:
    """A state whose first fold is told that it is: kernels write it without reading it."""
    return new_state(n, like) if _kernels(like) is None else like.new_empty((len(Plane), n))


class Tile(NamedTuple):
    """Products of R rows with C keys, and what makes logits of them. The functions below overwrite the products."""

    x: Tensor  # (R, C), float32 or float64
    row_scale: Tensor  # (R,): the logit is x times both scales
    key_scale: Tensor  # (C,), or (R, C) where each query has its own keys; NaN for a key that is not finite
    pairs: Pairs  # of these rows and keys; ``picked`` has become a mask
    row: int  # where the first row stands in its matrix
    key: int  # and the first key

    def left_out(self) -> Tensor | None:
        """True where a pair is left out, (R, C) or (1, C)."""
        pairs, drop = self.pairs, None
        rows, columns = (torch.arange(size, device=self.x.device, dtype=torch.int32) for size in self.x.shape)
        if pairs.band:
            offset, width, modulus = pairs.band
            ahead = columns + (self.key - offset - 1)  # by how far a key is ahead of its first possible place
            drop = (ahead - (rows + self.row)[:, None]).remainder_(modulus) >= width
        if pairs.filled is not None:
            drop = either(drop, columns[None] >= pairs.filled - self.key)
        if pairs.query_ids is not None and pairs.key_ids is not None:
            drop = either(drop, pairs.query_ids[:, None] == pairs.key_ids)
        if pairs.mask is not None:
            drop = either(drop, ~(pairs.mask if pairs.mask.dim() == 2 else pairs.mask[None]))
        return drop

    def logits(self) -> Tensor:
        """The logits, in place, those of left out pairs included."""
        return self.x.mul_(self.row_scale[:, None]).mul_(self.key_scale)


class Seek(NamedTuple):
    """What a fold finds out beside MAXIMUM and TOTAL."""

    ratio: Tensor | None = None  # (): of the second temperature's logits to the first's, for INTER_TOTAL
    threshold: Tensor | None = None  # (R,), for RANK and LOGIT_SUM
    negatives: bool = False  # for COUNT
    weighted: bool = False  # for WEIGHTED

    def part(self, some: slice) -> Seek:
        return self if self.threshold is None else self._replace(threshold=self.threshold[some])


class Side(NamedTuple):
    """What a gradient needs of the rows, or of the keys, of a tile in their role as anchors."""

    base: Tensor  # (R,), of Row.BASE
    pull: Tensor  # (R,), of Row.PULL

    def part(self, some: slice) -> Side:
        return Side(self.base[some], self.pull[some])


# ------------------------------------------------------------------------------------------------------- the functions


def fold(tile: Tile, state: Tensor, seek: Seek, weights: Tensor | None = None, first: bool = False) -> Tensor:
    """A tile's logits into the state of its rows; by how much sums under the old maximum shrink, (R,).

    ``first``: the state comes from ``first_state``, holds nothing yet and is not read.
    ``weights`` (R, C) gets 2 ** (logit - new maximum) times the key's scale, 0 where a pair is left out.
    """
    kernels = _kernels(tile.x)
    if kernels is not None:
        return kernels.fold(tile, state, seek, weights, first)  # type: ignore[no-any-return]
    drop = tile.left_out()
    x = tile.logits()
    if drop is not None:
        x.masked_fill_(drop, -math.inf)
    if seek.negatives:
        state[Plane.COUNT] += x.shape[1] if drop is None else (~drop).sum(1)
    if seek.threshold is not None:
        state[Plane.RANK] += (x > seek.threshold[:, None]).sum(1)
        state[Plane.LOGIT_SUM] += (x if drop is None else x.masked_fill(drop, 0.0)).sum(1)
    shrink = _fold(x, state, seek)
    if weights is not None:
        torch.mul(x, tile.key_scale.nan_to_num(0.0), out=weights)
    return shrink


def fold_both(tile: Tile, own: int, state: Tensor, key_state: Tensor, seek: Seek) -> None:
    """A tile's logits into the states of its rows and, in their role as anchors, of its keys.

    The first ``own`` keys are rows of the tile, too, and ``key_state`` is of the others.
    """
    kernels = _kernels(tile.x)
    if kernels is not None:
        kernels.fold_both(tile, own, state, key_state, seek)
        return
    drop = tile.left_out()
    x = tile.logits()
    if drop is not None:
        x.masked_fill_(drop, -math.inf)
    if own < x.shape[1]:
        _fold(x[:, own:].clone().T, key_state, seek)
    _fold(x, state, seek)


def weights(tile: Tile, base: Tensor, factor: Tensor, out: Tensor) -> None:
    """out (R, C) = factor_i 2 ** (logit_ij - base_i), 0 where a pair is left out."""
    kernels = _kernels(tile.x)
    if kernels is not None:
        kernels.weights(tile, base, factor, out)
        return
    drop = tile.left_out()
    torch.mul(tile.logits().sub_(base[:, None]).exp2_(), factor[:, None], out=out)
    if drop is not None:
        out.masked_fill_(drop, 0.0)


def weights_both(tile: Tile, row: Side, key: Side, row_factor: Tensor, out: Tensor) -> None:
    """The same for both roles: (pull_i 2 ** (x_ij - base_i) + pull_j 2 ** (x_ij - base_j)) row_factor_i key_scale_j."""
    kernels = _kernels(tile.x)
    if kernels is not None:
        kernels.weights_both(tile, row, key, row_factor, out)
        return
    drop = tile.left_out()
    x = tile.logits()
    y = (x - key.base).exp2_().mul_(key.pull)
    x.sub_(row.base[:, None]).exp2_().mul_(row.pull[:, None]).add_(y)
    torch.mul(x.mul_(tile.key_scale), row_factor[:, None], out=out)
    if drop is not None:
        out.masked_fill_(drop, 0.0)


def measured(x: Tensor, products: torch.dtype, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """What ``chunks.prepare`` makes of rows that are normalised, by one kernel; None where that does not serve."""
    kernels = _kernels(like)
    return None if kernels is None else kernels.measured(x, products)


def dots(a: Raw, b: Raw, out: Tensor) -> None:
    """out (R,): the products of unit rows, or of rows as they lie."""
    kernels = _kernels(out)
    if kernels is not None:
        kernels.dots(a, b, out)
        return
    for some in _some_rows(*a.rows.shape):
        torch.sum(a.rows[some].to(out.dtype) * b.rows[some].to(out.dtype), 1, out=out[some])
    out *= a.inverse * b.inverse


class Finished(NamedTuple):
    """What comes of the states, (N,) each but ``rows``."""

    losses: Tensor
    rows: Tensor  # (len(Row), N)
    factor: Tensor  # the derivative of a row's share by its negatives' similarities
    of_sums: Tensor  # the same over TOTAL: of a row's weighted sum of negatives


def finish(
    call: RowLosses | SymmetricLosses, similarity: Tensor, state: Tensor, known: int | None, metrics: Tensor | None
) -> Finished:
    """From the positives' similarities (N,) and the states to the losses; also into ``metrics`` (len(Metric), N)."""
    kernels = _kernels(similarity)
    if kernels is not None:
        return kernels.finish(call, similarity, state, known, metrics)  # type: ignore[no-any-return]
    t, count = temperature_of(call), known or state[Plane.COUNT]
    scale, maximum, total = LOG2E / t, state[Plane.MAXIMUM], state[Plane.TOTAL]
    intra, inter = gap.Seen(similarity * scale - maximum, total), None
    if call.inter_temperature is not None:
        inter = gap.Seen(intra.above * (t / call.inter_temperature), state[Plane.INTER_TOTAL])
    values = gap.values(loss_of(call), intra, inter, count, call.alpha)
    factor, rows = values.weight * (call.share_factor / t), similarity.new_zeros((len(Row), len(similarity)))
    rows[Row.BASE], rows[Row.TOTAL] = rounded_log_sum(maximum, total)
    rows[Row.PULL], rows[Row.POSITIVE] = factor / rows[Row.TOTAL], similarity
    if call.learned_temperature is not None:
        rows[Row.TEMPERATURE_GRADIENT] = factor * (intra.above - state[Plane.WEIGHTED] / total) * LN2
    if metrics is not None:
        metrics[Metric.WEIGHT], metrics[Metric.INTRA_LOSS] = values.weight, values.intra_loss
        metrics[Metric.LOG_WEIGHT] = 0.0 if values.log_weight is None else values.log_weight
        metrics[Metric.COUNT], metrics[Metric.RANK] = count, state[Plane.RANK]
        metrics[Metric.NEGATIVE] = state[Plane.LOGIT_SUM] / (count * scale)
    return Finished(values.loss * call.share_factor, rows, factor, factor / total)


class Raw(NamedTuple):
    """Rows as they lie, whose unit rows a loss was made of."""

    rows: Tensor  # (R, D)
    inverse: Tensor  # (R,): 1 / length; 1 where rows were taken as they lie
    gradient_inverse: Tensor  # (R,): the same for gradients, which must fit the rows' dtype
    normalize: bool

    def part(self, some: slice) -> Raw:
        return Raw(self.rows[some], self.inverse[some], self.gradient_inverse[some], self.normalize)


def through_unit(
    raw: Raw,
    gradient: Tensor | None,  # (R, D)
    factor: Tensor | None,  # (R,); None: 1
    other: Raw | None,
    other_factor: Tensor | None,  # (R,)
    out: Tensor,  # (R, D), which may be ``gradient``
) -> None:
    """The gradient of raw rows, from that of the unit rows: factor_i gradient_i less other_factor_i other_i, as unit
    rows.
    """
    kernels = _kernels(raw.inverse)
    if kernels is not None:
        kernels.through_unit(raw, gradient, factor, other, other_factor, out)
        return
    dtype = raw.inverse.dtype
    for some in _some_rows(*out.shape):
        g = torch.zeros_like(out[some], dtype=dtype)
        if gradient is not None:
            torch.mul(gradient[some], 1.0 if factor is None else factor[some, None], out=g)
        if other is not None and other_factor is not None:
            scale = (other_factor[some] * other.inverse[some])[:, None]
            g.addcmul_(other.rows[some].to(dtype), scale, value=-1)
        if raw.normalize:
            unit = raw.rows[some].to(dtype) * raw.inverse[some, None]
            g.addcmul_(unit, (unit * g).sum(1)[:, None], value=-1).mul_(raw.gradient_inverse[some, None])
        out[some] = g


# -------------------------------------------------------------------------------------------------------- small pieces


def _fold(x: Tensor, state: Tensor, seek: Seek) -> Tensor:
    """Logits (R, C) to 2 ** (x - new maximum), in place, and into the state; what old sums shrink by."""
    old = state[Plane.MAXIMUM]
    new = torch.maximum(old, x.amax(1))
    lower = old - new
    shrink = lower.exp2()
    x.sub_(new[:, None])
    if seek.ratio is not None:
        inter = (x * seek.ratio).exp2_().sum(1)
        state[Plane.INTER_TOTAL] = inter.addcmul_(state[Plane.INTER_TOTAL], (lower * seek.ratio).exp2_())
    if seek.weighted:
        weighted = (x.exp2() * x.clamp_min(-2000.0)).sum(1)  # 2 ** x is 0 there, and 0 * -inf is NaN
        before = state[Plane.WEIGHTED].addcmul(lower, state[Plane.TOTAL])
        state[Plane.WEIGHTED] = weighted.addcmul_(before, shrink)
    state[Plane.TOTAL] = x.exp2_().sum(1).addcmul_(state[Plane.TOTAL], shrink)
    state[Plane.MAXIMUM] = new
    return shrink


def _some_rows(n: int, d: int) -> Iterator[slice]:
    """Rows of D features, so many at a time that their copies are small."""
    return slices(n, max(1, 2**21 // d))


def _kernels(x: Tensor) -> Any:
    """The module of the kernels that serve x, or None."""
    if x.dtype != torch.float32 or not (x.is_cuda or interpreted()):
        return None
    return _module(x.device.index if x.is_cuda else None)


@functools.cache
def _module(index: int | None) -> Any:
    """The kernels for a CUDA device, or for Triton's interpreter where index is None."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return None
    if index is not None and torch.cuda.get_device_capability(index) < (8, 0):
        return None
    from . import launches

    return launches


def mutual(products: torch.dtype, like: Tensor) -> Any:
    """The module whose kernels multiply rows of two views and store no similarity, or None; they take halves."""
    if products not in (torch.float16, torch.bfloat16) or _kernels(like) is None:
        return None
    from . import mutual

    return mutual


def bytes_a_pair(x: Tensor, products: torch.dtype) -> int:
    """What the workspace holds of a pair: its logit, its weight and, without kernels, what torch's operations need."""
    if x.dtype != torch.float64 and _kernels(x.new_empty(0, dtype=torch.float32)) is not None:
        return 4 + products.itemsize
    return 5 * (8 if x.dtype == torch.float64 else 4)
