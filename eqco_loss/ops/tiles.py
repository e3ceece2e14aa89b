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

from . import flash, gap, square
from .blocks import NORMALISED_AT_ONCE, Ready, Scratch, Tile, blocks, through_unit, unit_rows
from .calls import (
    LN2,
    LOG2E,
    MINIMUM,
    TIE,
    KeysGradient,
    KeysGradients,
    LogSumExp,
    LogSumExpOutputs,
    Metric,
    Row,
    RowLosses,
    RowOutputs,
    checked_maxima,
    compute_dtype,
    loss_of,
    plainly,
    rounded_log_sum,
    slices,
    temperature_of,
)
from .definition import cleaned
from .mutual import symmetric_gradient as symmetric_gradient
from .mutual import symmetric_losses as symmetric_losses
from .running import Running, first, fold, merged, small
from .scaled import keeps as keeps
from .scaled import times_or_itself, with_others
from .scaled import unit_dtype as unit_dtype

# ---------------------------------------------------------------------------------------------------------- row losses


GIVES_KEYS_GRADIENT = True  # of a reduced loss, whose gradient backward multiplies by one number
times = times_or_itself


@plainly
def row_losses(call: RowLosses) -> RowOutputs:
    if square.serves(call):
        return square.row_losses(call)
    t, dtype, share = temperature_of(call), compute_dtype(call.query), call.share_factor
    learned = call.learned_temperature is not None
    q, q_norm = unit_rows(call.query, call.normalize, dtype)
    p, p_norm = unit_rows(call.positive, call.normalize, dtype)
    (n, d), scale = q.shape, LOG2E / t
    similarity = (q * p).sum(1)
    positive_logit = similarity * scale
    losses: list[Tensor] = []
    give_keys = call.need_keys_gradient and call.reduced
    together = give_keys and call.need_positive_gradient and call.positive is call.first.keys
    query_gradient = q.new_empty((n, d)) if call.need_query_gradient else None
    positive_gradient = q.new_empty((n, d)) if call.need_positive_gradient and not together else None
    keys_gradient_ = q.new_empty(call.first.keys.shape) if give_keys else None
    row_stats, metrics = q.new_zeros((len(Row), n)), q.new_empty((len(Metric), n)) if call.need_metrics else None
    ready = Ready(call.first, dtype, call.positive, p if call.normalize == call.first.normalize else None)
    wanted = _Wanted(
        mean_key=call.need_query_gradient,
        again=call.need_keys_gradient and not call.normalize,
        inter_ratio=None if call.inter_temperature is None else t / call.inter_temperature,
        positive_logit=positive_logit - TIE * positive_logit.abs() if call.need_metrics else None,
        rows=64 if give_keys else 256,
        unit=call.normalize,
    )
    passes = _attend(q, scale, ready, wanted)
    if call.second is not None:
        passes = _merged(passes, _whole([seen for _, seen, _ in _attend(q, scale, Ready(call.second, dtype), wanted)]))
    fused = False  # whether the keys' gradient came out of the same pass
    for rows, seen, only in passes:
        mine, its, s = q[rows], p[rows], similarity[rows]
        maximum = _maximum(seen, rows.start, call.may_raise)
        values = _values(positive_logit[rows], maximum, seen, call)
        base, rest = rounded_log_sum(maximum, seen.total)
        losses.append(values.loss.sum() if call.reduced else values.loss)
        factor = values.weight * (share / t)  # the derivative of the row's share by the similarity of its negatives
        stats = [base, rest, factor / rest, s]  # as Row has them
        if query_gradient is not None:
            gradient = torch.div(seen.weighted, seen.total[:, None], out=query_gradient[rows]).sub_(its)
            if call.normalize or learned:
                # By how much the row is more like its negatives' mean than like its positive.
                excess = (mine * gradient).sum(1)
                if learned:
                    stats.append(excess * -factor / t)
                if call.normalize:
                    gradient.addcmul_(mine, excess[:, None], value=-1)
            gradient *= _per_length(factor, q_norm, rows)
        row_stats[: len(stats), rows] = torch.stack(stats)
        if positive_gradient is not None:
            pull = _per_length(factor, p_norm, rows)
            gradient = torch.mul(mine, -pull, out=positive_gradient[rows])
            if call.normalize:
                gradient.addcmul_(its, pull * s[:, None])
        if keys_gradient_ is not None and only is not None:
            weight = factor / seen.total if seen.shrink is None else factor / seen.total * seen.shrink
            only.tile.add_transposed(keys_gradient_, only.exponentials, mine * weight[:, None], not fused)
            fused = True
        if metrics is not None:
            _write_metrics(metrics[:, rows], values, seen, scale)
    loss = (functools.reduce(torch.add, losses) if call.reduced else torch.cat(losses)) * share
    if keys_gradient_ is not None:
        base, pull = row_stats[Row.BASE], row_stats[Row.PULL]
        if not fused:
            _add_keys_gradient(keys_gradient_.zero_(), q, ready, base, pull, scale, call.normalize)
        if together:
            keys_gradient_.addcmul_(q, (pull * row_stats[Row.TOTAL])[:, None], value=-1)
        if ready.knows(call.first.keys):
            through_unit(keys_gradient_, p, p_norm)
        else:
            _keys_through_unit(keys_gradient_, ready)
    return RowOutputs(loss, query_gradient, positive_gradient, keys_gradient_, row_stats, metrics)


@plainly
def keys_gradient(call: KeysGradient) -> KeysGradients:
    dtype = compute_dtype(call.query)
    q = unit_rows(call.query, call.normalize, dtype)[0]
    pull = call.rows[Row.PULL] * call.grad
    ready, scale = Ready(call.first, dtype), LOG2E / temperature_of(call)
    gradient = q.new_zeros(call.first.keys.shape)
    _add_keys_gradient(gradient, q, ready, call.rows[Row.BASE], pull, scale, call.normalize)
    _keys_through_unit(gradient, ready)
    return with_others(call, gradient.to(call.first.keys.dtype))


@plainly
def logsumexp(call: LogSumExp) -> LogSumExpOutputs:
    t = temperature_of(call)
    q = call.query.to(compute_dtype(call.query))
    n = len(q)
    mean_key, rows = q.new_empty(q.shape) if call.need_query_gradient else None, q.new_zeros((len(Row), n))
    # Unit rows are not asked for, so a softmax that backward computes again needs its maximum and sum.
    wanted = _Wanted(mean_key=call.need_query_gradient, again=True)
    for some, seen, _ in _attend(q, LOG2E / t, Ready(call.first, q.dtype), wanted):
        maximum = _maximum(seen, some.start, True)
        rows[Row.BASE, some], rows[Row.TOTAL, some] = rounded_log_sum(maximum, seen.total)
        if mean_key is not None:
            torch.div(seen.weighted, seen.total[:, None], out=mean_key[some])
    rows[Row.PULL] = 1 / (rows[Row.TOTAL] * t)
    return LogSumExpOutputs((rows[Row.BASE] + rows[Row.TOTAL].log2()) * LN2, mean_key, rows)


def _values(positive_logit: Tensor, maximum: Tensor, seen: _Seen, call: RowLosses) -> gap.Values:
    """From the logits of the positives, (R,), and what the pass saw of the negatives."""
    intra, inter = gap.Seen(positive_logit - maximum, seen.total), None
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


# ------------------------------------------------------------------------------------------------------- the one pass


class _Wanted(NamedTuple):
    """What a pass is to find out beside the log-sum-exp."""

    mean_key: bool
    unit: bool = False  # whether queries have unit length
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
    weighted: Tensor  # (R, D): sum_j 2 ** (x_ij - maximum_i) n_j
    inter: Running | None
    rank: Tensor  # (R,)
    logit_sum: Tensor  # (R,)
    shrink: Tensor | None = None  # (R,): what the tile's exponentials are multiplied by to be under ``maximum``


class _Only(NamedTuple):
    """The one tile of a block that has no other."""

    tile: Tile
    exponentials: Tensor  # (R, C): 2 ** (logit - this set's maximum), until the next block overwrites it


_Passed = tuple[slice, _Seen, _Only | None]


def _attend(q: Tensor, scale: float | Tensor, ready: Ready, wanted: _Wanted) -> Iterator[_Passed]:
    known, of_unit, ratio = (
        ready.keys.pairs.negatives(ready.keys.keys),
        wanted.unit and ready.unit_length,
        wanted.inter_ratio,
    )
    is_small = of_unit and small(scale, q.dtype)
    inter_is_small = of_unit and ratio is not None and small(scale * ratio, q.dtype)
    one_product = is_small and inter_is_small  # for both temperatures, of which flash needs two each
    if wanted.positive_logit is None and not wanted.again and not one_product and flash.serves(ready):
        parts = (_seen_by_flash(q * scale, keys, wanted) for keys in flash.parts(ready))
        yield slice(0, len(q)), functools.reduce(_both, parts), None
        return
    scratch, inter_scratch = Scratch(q), Scratch(q)
    for block in blocks(q, ready, wanted.rows):
        may_be_empty = not known or not block.single  # a tile, for some row
        mine = q[block.rows] * scale
        r, d = mine.shape
        unseen = mine.new_zeros(r)
        count, rank, logit_sum, tile, x = unseen, unseen, unseen, None, mine
        weighted = mine.new_empty((r, d) if wanted.mean_key else (0,))
        running, inter = Running(unseen if is_small else unseen + MINIMUM, unseen), None
        for place, tile in enumerate(block.tiles):
            x = tile.logits(mine, scratch)  # (R, C)
            if known is None:
                count = count + tile.negatives(r)
            if wanted.positive_logit is not None:
                rank = rank + (x > wanted.positive_logit[block.rows, None]).sum(1)
                logit_sum = logit_sum + x.masked_fill(x == -math.inf, 0.0).sum(1)
            if ratio is not None:
                y = torch.mul(x, ratio, out=inter_scratch(*x.shape))
                inter = fold(inter, y, inter_is_small)[0] if inter else first(y, inter_is_small, may_be_empty)
            if place == 0:
                running = first(x, is_small, may_be_empty)
            else:
                running, shrink = fold(running, x, is_small)
                if wanted.mean_key and shrink is not None:
                    weighted *= shrink[:, None]
            if wanted.mean_key:
                tile.add_weighted(weighted, x, place == 0)
        only = _Only(tile, x) if block.single and tile is not None else None
        negatives = count if known is None else count + known
        yield block.rows, _Seen(*running, negatives, known, weighted, inter, rank, logit_sum), only


def _seen_by_flash(logits: Tensor, keys: Tensor, wanted: _Wanted) -> _Seen:
    mean_key, base = flash.attend(logits, keys)
    one, unseen = torch.ones_like(base), torch.zeros_like(base)
    inter = None
    if wanted.inter_ratio is not None:
        inter = Running(flash.attend(logits * wanted.inter_ratio, keys)[1], one)
    return _Seen(base, one, unseen + len(keys), len(keys), mean_key, inter, unseen, unseen)


def _whole(parts: list[_Seen]) -> _Seen:
    """All rows of a pass."""
    if len(parts) == 1:
        return parts[0]
    fields: dict[str, Any] = {}
    for name in _Seen._fields:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Running):
            fields[name] = Running(*map(torch.cat, zip(*values, strict=True)))
        else:
            fields[name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
    return _Seen(**fields)


def _merged(passes: Iterator[_Passed], extra: _Seen) -> Iterator[_Passed]:
    """The same rows with the negatives of both sets."""
    for rows, seen, only in passes:
        inter = None if extra.inter is None else Running(extra.inter.maximum[rows], extra.inter.total[rows])
        some: list[Any] = [field[rows] if isinstance(field, Tensor) else field for field in extra]
        yield rows, _both(seen, _Seen(*some)._replace(inter=inter)), only


def _both(seen: _Seen, other: _Seen) -> _Seen:
    """What one pass over both sets of negatives would have seen."""
    together, shrink, other_shrink = merged(Running(seen.maximum, seen.total), Running(other.maximum, other.total))
    weighted, inter = seen.weighted, None
    if len(weighted):
        weighted = weighted * shrink[:, None] + other.weighted * other_shrink[:, None]
    if seen.inter is not None and other.inter is not None:
        inter = merged(seen.inter, other.inter)[0]
    return _Seen(
        *together,
        seen.negatives + other.negatives,
        None if seen.known is None or other.known is None else seen.known + other.known,
        weighted,
        inter,
        seen.rank + other.rank,
        seen.logit_sum + other.logit_sum,
        shrink,
    )


def _maximum(seen: _Seen, first: int, may_raise: bool) -> Tensor:
    return seen.maximum if seen.known else checked_maxima(seen.maximum, seen.negatives, may_raise, first)


# -------------------------------------------------------------------------------------------------- what passes share


def _add_keys_gradient(
    out: Tensor, q: Tensor, ready: Ready, base: Tensor, pull: Tensor, scale: float | Tensor, of_unit: bool
) -> None:
    """Of the keys as they are multiplied, in the dtype of the arithmetic, by one more pass."""
    scratch = Scratch(q)
    is_small = of_unit and ready.unit_length and small(scale, q.dtype)
    pull = pull / base.exp2() if is_small else pull
    for block in blocks(q, ready):
        mine = q[block.rows]
        logits, pulled = mine * scale, mine * pull[block.rows, None]
        for tile in block.tiles:
            x = tile.logits(logits, scratch)  # (R, C)
            x = x if is_small else x.sub_(base[block.rows, None])
            tile.add_transposed(out, x.exp2_(), pulled)


def _per_length(factor: Tensor, norm: Tensor | None, rows: slice) -> Tensor:
    """factor (R,) over the raw rows' lengths, (R, 1)."""
    return factor[:, None] if norm is None else factor[:, None] / norm[rows]


def _keys_through_unit(gradient: Tensor, ready: Ready) -> None:
    """From the gradient of unit keys to that of the raw ones, in place, some at a time."""
    if ready.keys.normalize:
        keys: Tensor = ready.keys.keys
        gradient, keys = gradient.view(-1, gradient.shape[-1]), keys.reshape(-1, keys.shape[-1])
        for some in slices(len(keys), NORMALISED_AT_ONCE):
            part = cleaned(keys[some])[0] if ready.clean else keys[some]
            through_unit(gradient[some], *unit_rows(part, True, gradient.dtype))
