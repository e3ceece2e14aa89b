"""The operators in plain torch, any device, float32 or float64 arithmetic, without ever holding N x K similarities.

Work goes block of rows by block of rows, tile of keys by tile of keys (``blocks.py``), with a running maximum. Where no
pair is left out, the CPU's own flash attention is the same pass, fused (``flash.py``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import flash, gap
from .blocks import Ready, Scratch, Tile, blocks, mutual_tiles, slices, unit_rows
from .calls import (
    LN2,
    LOG2E,
    TIE,
    KeysGradient,
    KeysGradients,
    LogSumExp,
    LogSumExpOutputs,
    Metric,
    Row,
    RowLosses,
    RowOutputs,
    SymmetricGradient,
    SymmetricGradients,
    SymmetricLosses,
    SymmetricOutputs,
    compute_dtype,
    loss_of,
    no_negatives,
    plainly,
    rounded_log_sum,
    temperature_of,
)
from .definition import cleaned
from .scaled import keeps_views as keeps_views
from .scaled import times as times
from .scaled import with_others

_MINIMUM = -1e30  # where a running maximum starts: -inf would make inf - inf on a tile with nothing in it
_ROWS_AT_ONCE = 256  # of keys whose gradient passes through their normalisation

# ---------------------------------------------------------------------------------------------------------- row losses


def gives_keys_gradient(call: RowLosses) -> bool:
    """Whether row_losses returns the keys' gradient: backward multiplies it by one number if the loss is one."""
    return call.reduced


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients before backward multiplies them by the loss's."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@plainly
def row_losses(call: RowLosses) -> RowOutputs:
    t, dtype, ratio = temperature_of(call), compute_dtype(call.query), call.ratio
    learned = call.learned_temperature is not None
    q, q_norm = unit_rows(call.query, call.normalize, dtype)
    p, p_norm = unit_rows(call.positive, call.normalize, dtype)
    (n, d), scale = q.shape, LOG2E / t
    similarity = (q * p).sum(1)
    positive_logit = similarity * scale
    loss = q.new_zeros(()) if call.reduced else q.new_empty(n)
    query_gradient = q.new_empty((n, d) if call.need_query_gradient else (0,))
    positive_gradient = q.new_empty((n, d) if call.need_positive_gradient else (0,))
    give_keys = call.need_keys_gradient and gives_keys_gradient(call)
    keys_gradient_ = q.new_zeros(call.first.keys.shape if give_keys else (0,))
    row_stats, metrics = q.new_zeros((len(Row), n)), q.new_empty((len(Metric), n) if call.need_metrics else (0,))
    row_stats[Row.POSITIVE] = similarity
    ready = Ready(call.first, dtype, call.positive, p if call.normalize == call.first.normalize else None)
    wanted = _Wanted(
        mean_key=call.need_query_gradient,
        again=call.need_keys_gradient and not call.normalize,
        inter_ratio=None if call.inter_temperature is None else t / call.inter_temperature,
        positive_logit=positive_logit - TIE * positive_logit.abs() if call.need_metrics else None,
        rows=64 if give_keys else 256,
    )
    passes = _attend(q, scale, ready, wanted)
    if call.second is not None:
        passes = _merged(passes, _whole([seen for _, seen, _ in _attend(q, scale, Ready(call.second, dtype), wanted)]))
    fused = False  # whether the keys' gradient came out of the same pass
    for rows, seen, only in passes:
        mine, its, s = q[rows], p[rows], similarity[rows]
        maximum = _checked(seen, rows.start, call.may_raise)
        values = _values(positive_logit[rows], seen._replace(maximum=maximum), call)
        base, rest = rounded_log_sum(maximum, seen.total)
        if call.reduced:
            loss += values.loss.sum()
        else:
            torch.mul(values.loss, ratio, out=loss[rows])
        factor = values.weight * (ratio / t)  # the derivative of the row's share by the similarity of its negatives
        row_stats[Row.BASE, rows], row_stats[Row.TOTAL, rows] = base, rest
        torch.div(factor, rest, out=row_stats[Row.PULL, rows])
        if call.need_query_gradient:
            # By how much the row is more like its negatives' mean than like its positive.
            excess = (mine * seen.mean_key).sum(1).sub_(s) if call.normalize or learned else s
            if learned:
                row_stats[Row.TEMPERATURE_GRADIENT, rows] = excess * -factor / t
            toward = torch.addcmul(its, mine, excess[:, None]) if call.normalize else its
            out = query_gradient[rows]
            torch.sub(seen.mean_key, toward, out=out).mul_(_per_length(factor, q_norm, rows))
        if call.need_positive_gradient:
            pull = _per_length(factor, p_norm, rows)
            out = torch.mul(mine, -pull, out=positive_gradient[rows])
            if call.normalize:
                out.addcmul_(its, pull * s[:, None])
        if give_keys and only is not None:
            only.tile.add_transposed(keys_gradient_, only.exponentials, mine * (factor * seen.unit)[:, None])
            fused = True
        if call.need_metrics:
            _write_metrics(metrics[:, rows], values, seen, scale)
    if call.reduced:
        loss *= ratio
    if fused and ready.knows(call.first.keys) and p_norm is not None:
        for rows in slices(n, 4 * _ROWS_AT_ONCE):
            _through_unit(keys_gradient_[rows], p[rows], p_norm[rows])
    elif fused:
        _keys_through_unit(keys_gradient_, ready)
    elif give_keys:
        keys_gradient_ = _keys_gradient(q, ready, row_stats, row_stats[Row.PULL], scale)
    return RowOutputs(loss, query_gradient, positive_gradient, keys_gradient_, row_stats, metrics)


@plainly
def keys_gradient(call: KeysGradient) -> KeysGradients:
    dtype = compute_dtype(call.query)
    q = unit_rows(call.query, call.normalize, dtype)[0]
    pull = call.rows[Row.PULL] * call.grad
    gradient = _keys_gradient(q, Ready(call.first, dtype), call.rows, pull, LOG2E / temperature_of(call))
    return with_others(call, gradient.to(call.first.keys.dtype))


@plainly
def logsumexp(call: LogSumExp) -> LogSumExpOutputs:
    t = temperature_of(call)
    q = call.query.to(compute_dtype(call.query))
    n = len(q)
    mean_key, rows = q.new_empty(q.shape if call.need_query_gradient else (0,)), q.new_zeros((len(Row), n))
    # Unit rows are not asked for, so a softmax that backward computes again needs its maximum and sum.
    wanted = _Wanted(mean_key=call.need_query_gradient, again=True)
    for some, seen, _ in _attend(q, LOG2E / t, Ready(call.first, q.dtype), wanted):
        maximum = _checked(seen, some.start, True)
        rows[Row.BASE, some], rows[Row.TOTAL, some] = rounded_log_sum(maximum, seen.total)
        if call.need_query_gradient:
            mean_key[some] = seen.mean_key
    rows[Row.PULL] = 1 / (rows[Row.TOTAL] * t)
    return LogSumExpOutputs((rows[Row.BASE] + rows[Row.TOTAL].log2()) * LN2, mean_key, rows)


def _values(positive_logit: Tensor, seen: _Seen, call: RowLosses | SymmetricLosses) -> gap.Values:
    """From the logits of the positives, (R,), and what the pass saw of the negatives."""
    intra, inter = gap.Seen(positive_logit - seen.maximum, seen.total), None
    if call.inter_temperature is not None and seen.inter is not None:
        inter_logit = positive_logit * (temperature_of(call) / call.inter_temperature)
        inter = gap.Seen(inter_logit - seen.inter.maximum, seen.inter.total)
    return gap.values(loss_of(call), intra, inter, seen.known or seen.negatives, call.alpha)


def _write_metrics(out: Tensor, values: gap.Values, seen: _Seen, scale: float | Tensor) -> None:
    """The rows of ``Metric``, (len(Metric), R)."""
    out[Metric.WEIGHT], out[Metric.INTRA_LOSS] = values.weight, values.intra_loss
    out[Metric.COUNT], out[Metric.RANK] = seen.negatives, seen.rank
    out[Metric.LOG_WEIGHT] = 0.0 if values.log_weight is None else values.log_weight
    torch.div(seen.logit_sum, seen.negatives * scale, out=out[Metric.NEGATIVE])


# ----------------------------------------------------------------------------------- both directions between two views


@plainly
def symmetric_losses(call: SymmetricLosses) -> SymmetricOutputs:
    """Every similarity is computed once, and serves both of its rows."""
    t, views = temperature_of(call), call.views
    unit, n = unit_rows(views, True, compute_dtype(views))[0], len(views)
    rows = unit.new_zeros((len(Row), n))
    running = [_Running(unit.new_full((n,), _MINIMUM), unit.new_zeros(n))]
    ratios: list[float | Tensor] = [1.0]
    if call.inter_temperature is not None:
        running.insert(0, _Running(unit.new_full((n,), _MINIMUM), unit.new_zeros(n)))
        ratios.insert(0, t / call.inter_temperature)
    scratch, copy = Scratch(unit), Scratch(unit)
    for some, tile, own in mutual_tiles(unit, call.across):
        x = tile.logits(unit[some] * (LOG2E / t), scratch)  # (R, C)
        roles = [(some, False)] if own else [(some, False), (tile.place, True)]
        folds = [(*role, ratio, one) for role in roles for ratio, one in zip(ratios, running, strict=True)]
        for place, (which, turned, ratio, one) in enumerate(folds):
            y = x if place == len(folds) - 1 else torch.mul(x, ratio, out=copy(*x.shape))
            one.fold_part(y.T if turned else y, which)
    s = (unit * unit.roll(n // 2, 0)).sum(1)
    count = (n // 2 - 1) * (1 if call.across else 2)
    intra, inter = running[-1], running[0]
    seen = _Seen(intra.maximum, intra.total, s, count, s, inter, s, s, s)
    values = _values(s * (LOG2E / t), seen, call)
    rows[Row.BASE], rows[Row.TOTAL] = rounded_log_sum(intra.maximum, intra.total)
    rows[Row.PULL], rows[Row.POSITIVE] = values.weight * (call.ratio / t) / rows[Row.TOTAL], s
    return SymmetricOutputs(values.loss.sum() * call.ratio, rows, views)


@plainly
def symmetric_gradient(call: SymmetricGradient) -> SymmetricGradients:
    """Gradient of rows that are anchors, positives and negatives.

    With P the softmax, a = grad * weight * share / t and p a row's other view, it is for unit rows
    ``sum_j (a_i P_ij + a_j P_ji) z_j - (a_i + a_p) z_p``.
    """
    t, rows = temperature_of(call), call.rows
    unit, norm = unit_rows(call.views, True, compute_dtype(call.views))
    pull, base, half = rows[Row.PULL] * call.grad, rows[Row.BASE], len(unit) // 2
    out, scratch, other = torch.zeros_like(unit), Scratch(unit), Scratch(unit)
    for some, tile, own in mutual_tiles(unit, call.across):
        x = tile.logits(unit[some] * (LOG2E / t), scratch)  # (R, C)
        y = torch.sub(x, base[some, None], out=other(*x.shape)).exp2_().mul_(pull[some, None])
        y += x.sub_(base[tile.place]).exp2_().mul_(pull[tile.place])
        out[some].addmm_(y, tile.keys)
        if not own:
            out[tile.place].addmm_(y.T, unit[some])
    partner, a = unit.roll(half, 0), pull * rows[Row.TOTAL]
    of_temperature = out.new_empty(0)
    if call.learned_temperature is not None:  # every pair's similarity is in the product twice, once a role
        of_temperature = ((a * rows[Row.POSITIVE]).sum() - (unit * out).sum() / 2) / t
    out.addcmul_(partner, (a + a.roll(half))[:, None], value=-1)
    for some in slices(len(out), _ROWS_AT_ONCE):
        _through_unit(out[some], unit[some], None if norm is None else norm[some])
    return SymmetricGradients(out.to(call.views.dtype), of_temperature)


# ------------------------------------------------------------------------------------------------------- the one pass


class _Running(NamedTuple):
    """A log-sum-exp in base 2 under way: the maximum so far, and the sum of exponentials under it."""

    maximum: Tensor  # (R,)
    total: Tensor  # (R,)

    def fold(self, x: Tensor) -> tuple[_Running, Tensor]:
        """Logits (R, C) to 2 ** (x - new maximum), in place; return what is new, and what earlier sums shrink by."""
        new = torch.maximum(self.maximum, x.amax(1))
        total = x.sub_(new[:, None]).exp2_().sum(1)
        shrink = (self.maximum - new).exp2_()
        return _Running(new, total.addcmul_(self.total, shrink)), shrink

    def fold_part(self, x: Tensor, rows: slice) -> None:
        """The same into some rows of this one, in place."""
        part, _ = _Running(self.maximum[rows], self.total[rows]).fold(x)
        self.maximum[rows], self.total[rows] = part


def _folded(x: Tensor, may_be_empty: bool) -> _Running:
    """The first tile's fold."""
    maximum = x.amax(1)
    if may_be_empty:
        maximum.clamp_min_(_MINIMUM)
    return _Running(maximum, x.sub_(maximum[:, None]).exp2_().sum(1))


class _Wanted(NamedTuple):
    """What a pass is to find out beside the log-sum-exp."""

    mean_key: bool
    again: bool = False  # whether backward computes a softmax of unbounded logits again, which flash has no maximum for
    inter_ratio: float | Tensor | None = None  # t / T: the second temperature's logits over the first's
    positive_logit: Tensor | None = None  # (N,): count the logits above it
    rows: int = 256  # how many a tile should have at the least


class _Seen(NamedTuple):
    """What the pass saw of a block of R rows."""

    maximum: Tensor  # (R,)
    total: Tensor  # (R,)
    negatives: Tensor  # (R,): K_i
    known: int | None  # K_i, where the host knows it
    mean_key: Tensor  # (R, D): sum_j softmax_ij n_j
    inter: _Running | None
    rank: Tensor  # (R,)
    logit_sum: Tensor  # (R,)
    unit: Tensor  # (R,): exponentials times this are the softmax


class _Only(NamedTuple):
    """The one tile of a block that has no other."""

    tile: Tile
    exponentials: Tensor  # (R, C): 2 ** (logit - row maximum), until the next block overwrites it


_Passed = tuple[slice, _Seen, _Only | None]


def _attend(q: Tensor, scale: float | Tensor, ready: Ready, wanted: _Wanted) -> Iterator[_Passed]:
    if wanted.positive_logit is None and not wanted.again and flash.serves(ready):
        parts = (_seen_by_flash(q * scale, keys, wanted) for keys in flash.parts(ready))
        yield slice(0, len(q)), functools.reduce(_both, parts), None
        return
    scratch, inter_scratch = Scratch(q), Scratch(q)
    known = ready.keys.pairs.negatives(ready.keys.keys)
    for block in blocks(q, ready, wanted.rows):
        may_be_empty = not known or not block.single  # a tile, for some row
        mine = q[block.rows] * scale
        r, d = mine.shape
        unseen = mine.new_zeros(r)
        count, rank, logit_sum = unseen if known is None else unseen + known, unseen, unseen
        mean_key = mine.new_empty((r, d) if wanted.mean_key else (0,))
        running, inter, tile, x = _Running(unseen + _MINIMUM, unseen), None, None, mine
        for place, tile in enumerate(block.tiles):
            x = tile.logits(mine, scratch)  # (R, C)
            if known is None:
                count = count + tile.negatives(r)
            if wanted.positive_logit is not None:
                rank = rank + (x > wanted.positive_logit[block.rows, None]).sum(1)
                logit_sum = logit_sum + x.masked_fill(x == -math.inf, 0.0).sum(1)
            if wanted.inter_ratio is not None:
                y = torch.mul(x, wanted.inter_ratio, out=inter_scratch(*x.shape))
                inter = _folded(y, may_be_empty) if inter is None else inter.fold(y)[0]
            if place == 0:
                running = _folded(x, may_be_empty)
            else:
                running, shrink = running.fold(x)
                if wanted.mean_key:
                    mean_key *= shrink[:, None]
            if wanted.mean_key:
                tile.add_weighted(mean_key, x, place == 0)
        unit = 1 / running.total
        if not known:  # a second set may make up for a row that has nothing in this one
            unit = torch.where(count == 0, 0.0, unit)
        if wanted.mean_key:
            mean_key *= unit[:, None]
        only = _Only(tile, x) if block.single and tile is not None else None
        seen = _Seen(running.maximum, running.total, count, known, mean_key, inter, rank, logit_sum, unit)
        yield block.rows, seen, only


def _seen_by_flash(logits: Tensor, keys: Tensor, wanted: _Wanted) -> _Seen:
    mean_key, base = flash.attend(logits, keys)
    one, unseen = torch.ones_like(base), torch.zeros_like(base)
    inter = None
    if wanted.inter_ratio is not None:
        inter = _Running(flash.attend(logits * wanted.inter_ratio, keys)[1], one)
    return _Seen(base, one, torch.full_like(base, len(keys)), len(keys), mean_key, inter, unseen, unseen, one)


def _whole(parts: list[_Seen]) -> _Seen:
    """All rows of a pass."""
    if len(parts) == 1:
        return parts[0]
    fields: dict[str, Any] = {}
    for name in _Seen._fields:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], _Running):
            fields[name] = _Running(*map(torch.cat, zip(*values, strict=True)))
        else:
            fields[name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
    return _Seen(**fields)


def _merged(passes: Iterator[_Passed], extra: _Seen) -> Iterator[_Passed]:
    """The same rows with the negatives of both sets."""
    for rows, seen, only in passes:
        inter = None if extra.inter is None else _Running(extra.inter.maximum[rows], extra.inter.total[rows])
        some: list[Any] = [field[rows] if isinstance(field, Tensor) else field for field in extra]
        yield rows, _both(seen, _Seen(*some)._replace(inter=inter)), only


def _both(seen: _Seen, other: _Seen) -> _Seen:
    """What one pass over both sets of negatives would have seen."""
    merged, share, other_share = _sum(_Running(seen.maximum, seen.total), _Running(other.maximum, other.total))
    mean_key, inter = seen.mean_key, None
    if len(mean_key):
        mean_key = mean_key * share[:, None] + other.mean_key * other_share[:, None]
    if seen.inter is not None and other.inter is not None:
        inter = _sum(seen.inter, other.inter)[0]
    return _Seen(
        merged.maximum,
        merged.total,
        seen.negatives + other.negatives,
        None if seen.known is None or other.known is None else seen.known + other.known,
        mean_key,
        inter,
        seen.rank + other.rank,
        seen.logit_sum + other.logit_sum,
        seen.unit * share,
    )


def _sum(one: _Running, other: _Running) -> tuple[_Running, Tensor, Tensor]:
    """Of both, and the share that each has in it."""
    maximum = torch.maximum(one.maximum, other.maximum)
    totals = [x.total * (x.maximum - maximum).exp2() for x in (one, other)]
    total = totals[0] + totals[1]
    return _Running(maximum, total), totals[0] / total, totals[1] / total


def _checked(seen: _Seen, first: int, may_raise: bool) -> Tensor:
    """The maxima of rows that have a negative: else an error, or NaN on a device that cannot raise."""
    if seen.known:
        return seen.maximum
    empty = seen.negatives == 0
    if empty.is_cpu and may_raise:
        if bool(empty.any()):
            raise no_negatives(first + int(empty.nonzero()[0]))
        return seen.maximum
    return torch.where(empty, math.nan, seen.maximum)


# -------------------------------------------------------------------------------------------------------- small pieces


def _keys_gradient(q: Tensor, ready: Ready, rows: Tensor, pull: Tensor, scale: float | Tensor) -> Tensor:
    """The raw keys' gradient, in the dtype of the arithmetic, by one more pass; ``pull`` replaces that of ``rows``."""
    out, scratch, base = q.new_zeros(ready.keys.keys.shape), Scratch(q), rows[Row.BASE]
    for block in blocks(q, ready):
        mine = q[block.rows]
        logits, pulled = mine * scale, mine * pull[block.rows, None]
        for tile in block.tiles:
            x = tile.logits(logits, scratch).sub_(base[block.rows, None]).exp2_()  # (R, C)
            tile.add_transposed(out, x, pulled)
    _keys_through_unit(out, ready)
    return out


def _through_unit(gradient: Tensor, unit: Tensor, norm: Tensor | None) -> None:
    """From the gradient of unit vectors to that of the raw ones, in place."""
    if norm is not None:
        along = (unit * gradient).sum(-1, keepdim=True)
        gradient.addcmul_(unit, along, value=-1).div_(norm)


def _per_length(factor: Tensor, norm: Tensor | None, rows: slice) -> Tensor:
    """factor (R,) over the raw rows' lengths, (R, 1)."""
    return factor[:, None] if norm is None else factor[:, None] / norm[rows]


def _keys_through_unit(gradient: Tensor, ready: Ready) -> None:
    """From the gradient of unit keys to that of the raw ones, in place, some at a time."""
    if ready.keys.normalize:
        keys: Tensor = ready.keys.keys
        gradient, keys = gradient.view(-1, gradient.shape[-1]), keys.reshape(-1, keys.shape[-1])
        for some in slices(len(keys), _ROWS_AT_ONCE):
            part = cleaned(keys[some])[0] if ready.clean else keys[some]
            _through_unit(gradient[some], *unit_rows(part, True, gradient.dtype))
