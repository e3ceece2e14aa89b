"""Both directions between two views in plain torch: every similarity is computed once, and serves both of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import gap, square
from .blocks import TILE_ELEMENTS, Scratch, Tile, mutual_tiles, through_unit, unit_rows
from .calls import (
    LOG2E,
    MINIMUM,
    Row,
    SymmetricGradient,
    SymmetricGradients,
    SymmetricLosses,
    SymmetricOutputs,
    compute_dtype,
    loss_of,
    plainly,
    rounded_log_sum,
    temperature_of,
)
from .running import Running, fold, small
from .scaled import times_or_itself


@plainly
def symmetric_losses(call: SymmetricLosses) -> SymmetricOutputs:
    """Where all pairs are one tile, the gradient comes out of the same pass, and is what is kept."""
    if square.serves_both(call) and _in_forward(call, True):
        return square.symmetric_losses(call)
    t, kept = temperature_of(call), call.views
    unit, norm = unit_rows(kept, True, compute_dtype(kept))
    m, scale, rows = len(call.first), LOG2E / t, unit.new_zeros((len(Row), len(unit)))
    ratios = [1.0] if call.inter_temperature is None else [t / call.inter_temperature, 1.0]
    passes = [_Pass(ratio, small(scale * ratio, unit.dtype), unit) for ratio in ratios]
    intra, scratch, copy, only = passes[-1], Scratch(unit), Scratch(unit), None
    for some, tile, own in mutual_tiles(unit, call.across):
        x = tile.logits(unit[some] * scale, scratch)  # (R, C)
        for one in passes:
            one.fold(x, some, None if own else tile.place, copy, in_place=one is intra)
        only = some, tile, own, x
    s = (unit[:m] * unit[m:]).sum(1)
    s = torch.cat([s, s])
    seen = [gap.Seen(s * (scale * one.ratio) - one.maximum, one.total) for one in passes]
    values = gap.values(loss_of(call), seen[-1], seen[0], call.negatives, call.alpha)
    rows[Row.BASE], rows[Row.TOTAL] = rounded_log_sum(intra.maximum, intra.total)
    rows[Row.PULL], rows[Row.POSITIVE] = values.weight * (call.share_factor / t) / rows[Row.TOTAL], s
    if only is not None and call.need_gradient and _in_forward(call, intra.small):
        (some, tile, own, x), weight = only, rows[Row.PULL] / rows[Row.BASE].exp2()  # and kept is written anew
        _add(kept, x.mul_(weight[some, None] + weight[tile.place]), unit, some, tile, own, first=True)
        of_rows = _finished(kept, unit, norm, rows, rows[Row.PULL], t, call.learned_temperature is not None)
        if of_rows is not None:
            rows[Row.TEMPERATURE_GRADIENT] = of_rows
    return SymmetricOutputs(values.loss.sum() * call.share_factor, rows, kept)


@plainly
def symmetric_gradient(call: SymmetricGradient) -> SymmetricGradients:
    """Gradient of rows that are anchors, positives and negatives.

    With P the softmax, a = grad * weight * share / t and p a row's other view, it is for unit rows
    ``sum_j (a_i P_ij + a_j P_ji) z_j - (a_i + a_p) z_p``.
    """
    t, rows, dtype, learned = temperature_of(call), call.rows, call.first.dtype, call.learned_temperature is not None
    is_small = small(LOG2E / t, compute_dtype(call.first))
    if _in_forward(call, is_small):
        of_rows = rows[Row.TEMPERATURE_GRADIENT]
        of_temperature = of_rows.sum() * call.grad if learned else None
        return SymmetricGradients(times_or_itself(call.kept, call.grad, dtype), of_temperature)
    unit, norm = unit_rows(call.kept, True, compute_dtype(call.first))
    pull, base, out = rows[Row.PULL] * call.grad, rows[Row.BASE], torch.zeros_like(unit)
    weight, scratch, other = pull / base.exp2(), Scratch(unit), Scratch(unit)
    for some, tile, own in mutual_tiles(unit, call.across):
        x = tile.logits(unit[some] * (LOG2E / t), scratch)  # (R, C)
        if is_small:
            y = torch.add(weight[some, None], weight[tile.place], out=other(*x.shape)).mul_(x.exp2_())
        else:
            y = torch.sub(x, base[some, None], out=other(*x.shape)).exp2_().mul_(pull[some, None])
            y += x.sub_(base[tile.place]).exp2_().mul_(pull[tile.place])
        _add(out, y, unit, some, tile, own)
    found = _finished(out, unit, norm, rows, pull, t, learned)
    return SymmetricGradients(out.to(dtype), None if found is None else found.sum())


class _Pass:
    """Every row's log-sum-exp under way at one of the temperatures, whose logits are ``ratio`` times the first's."""

    def __init__(self, ratio: float | Tensor, is_small: bool, unit: Tensor) -> None:
        self.ratio, self.small = ratio, is_small
        self.maximum = unit.new_full((len(unit),), 0.0 if is_small else MINIMUM)
        self.total = torch.zeros_like(self.maximum)

    def fold(self, x: Tensor, rows: slice, columns: slice | None, copy: Scratch, in_place: bool) -> None:
        """A tile's logits, (R, C), into its rows, and into its columns where it is not the rows' own."""
        if self.small:
            y = (x if in_place else torch.mul(x, self.ratio, out=copy(*x.shape))).exp2_()
            self.total[rows] += y.sum(1)
            if columns is not None:
                self.total[columns] += y.sum(0)
            return
        if columns is not None:
            self._fold(torch.mul(x, self.ratio, out=copy(*x.shape)).T, columns)
        self._fold(x if in_place else torch.mul(x, self.ratio, out=copy(*x.shape)), rows)

    def _fold(self, x: Tensor, rows: slice) -> None:
        before = Running(self.maximum[rows], self.total[rows])
        self.maximum[rows], self.total[rows] = fold(before, x, False)[0]


def _in_forward(call: SymmetricLosses | SymmetricGradient, is_small: bool) -> bool:
    """Whether forward gives the gradient, in the views' dtype: one tile holds all exponentials."""
    anchors = len(call.first) * (1 if call.across else 2)
    return is_small and anchors**2 <= TILE_ELEMENTS and call.first.dtype == compute_dtype(call.first)


def _add(out: Tensor, weight: Tensor, unit: Tensor, rows: slice, tile: Tile, own: bool, *, first: bool = False) -> None:
    """Adds to ``out`` what a tile's pairs, weighted by (R, C), give to both of their rows; ``first`` overwrites it."""
    beta = 0 if first else 1
    out[rows].addmm_(weight, tile.keys, beta=beta)
    if not own:
        out[tile.place].addmm_(weight.T, unit[rows], beta=beta)


def _finished(
    out: Tensor, unit: Tensor, norm: Tensor | None, rows: Tensor, pull: Tensor, t: float | Tensor, learned: bool
) -> Tensor | None:
    """Adds the positives to sums over pairs, ``out``, and goes from unit rows to raw ones, in place.

    Returns the derivative of each row's loss by t, if that is learned.
    """
    m, a, of_temperature = len(out) // 2, pull * rows[Row.TOTAL], None
    if learned:  # every pair's similarity is in the product twice, once a role
        of_temperature = (a * rows[Row.POSITIVE] - (unit * out).sum(1) / 2) / t
    both = (a[:m] + a[m:])[:, None]
    out[:m].addcmul_(unit[m:], both, value=-1)
    out[m:].addcmul_(unit[:m], both, value=-1)
    through_unit(out, unit, norm)
    return of_temperature
