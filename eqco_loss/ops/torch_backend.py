"""The operators in plain torch, any device, float32 or float64 arithmetic, without ever holding N x K similarities.

Work goes block of rows by block of rows, tile of keys by tile of keys (``tiles.py``), with a running maximum. Where
nothing is left out, the CPU's own flash attention with value = key is the same pass, fused. Inside, logits are in base
2: exp2 is the cheaper exponential.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .tiles import Pairs, Scratch, Tile, blocks, mutual_tiles, slices

_LOG2E = math.log2(math.e)
_LN2 = math.log(2.0)
_FLASH_ELEMENTS = 2**19  # of keys that flash attention cannot take as they lie: made ready so many at a time
_MINIMUM = -1e30  # where a running maximum starts: -inf would make inf - inf on a tile with nothing in it


class Stat(IntEnum):
    """Rows of the ``stats`` output of ``row_losses``."""

    LSE = 0
    WEIGHT = 1  # -d loss / d gap
    POSITIVE = 2  # s(q, k)
    COUNT = 3  # K_i
    LOG_WEIGHT = 4  # of the dual temperature; 0 for EqCo
    TEMPERATURE_GRADIENT = 5  # of the loss as returned
    INTRA_LOSS = 6  # softplus(log(alpha / K_i) - gap(t)): what estimates the mutual information
    RANK = 7  # negatives more similar than the positive (need_statistics)
    NEGATIVE = 8  # mean similarity of the negatives (need_statistics)


# ---------------------------------------------------------------------------------------------------------- operators


def row_losses(
    query: Tensor,  # (N, D)
    positive: Tensor,  # (N, D)
    keys: Tensor,  # (K, D) or (N, K, D)
    extra_keys: Tensor | None,  # a second set, (K', D) or (N, K', D)
    pairs: Pairs,
    extra_pairs: Pairs,
    temperature: float | Tensor,
    inter_temperature: float | None,
    alpha: float | None,
    normalize: bool,
    normalize_keys: bool,
    normalize_extra: bool,
    need_query_gradient: bool,
    need_positive_gradient: bool,
    need_keys_gradient: bool,
    need_statistics: bool,
    share: float = 1.0,  # of the loss and its gradients
    may_raise: bool = True,  # where a row has nothing left, on a CPU; else it is NaN
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        t, dtype = temperature, compute_dtype(query)
        q, q_norm = _unit(query, normalize, dtype)
        p, p_norm = _unit(positive, normalize, dtype)
        n, d = q.shape
        loss = q.new_empty(n)
        stats = q.new_zeros((len(Stat), n))
        query_gradient = q.new_empty((n, d) if need_query_gradient else (0,))
        positive_gradient = q.new_empty((n, d) if need_positive_gradient else (0,))
        keys_gradient = q.new_zeros(keys.shape if need_keys_gradient else (0,))
        fused = False  # whether keys_gradient came out of the same pass
        ratio = None if inter_temperature is None else t / inter_temperature
        positive_similarity = (q * p).sum(1)
        positive_logit = positive_similarity * (_LOG2E / t) if need_statistics else None
        ready = _Ready(normalize_keys, dtype, positive, p if normalize == normalize_keys else None)
        row_hint = 64 if need_keys_gradient else 256
        passes = _attend(q, _LOG2E / t, keys, pairs, ready, need_query_gradient, ratio, positive_logit, row_hint)
        if extra_keys is not None:
            ready = _Ready(normalize_extra, dtype)
            extra = _attend(q, _LOG2E / t, extra_keys, extra_pairs, ready, need_query_gradient, ratio, positive_logit)
            passes = _merged(passes, _whole([seen for _, seen, _ in extra]))
        nothing = q.new_zeros(n)
        for rows, seen, only in passes:
            mine, its, s = q[rows], p[rows], positive_similarity[rows]
            lse = _checked_lse(seen, rows.start, may_raise)
            count = seen.negatives if seen.known is None else seen.known
            row_loss, intra_loss, weight, log_weight = _values(
                s, lse, seen.inter_lse, count, t, inter_temperature, alpha
            )
            torch.mul(row_loss, share, out=loss[rows])
            factor = weight * (share / t)
            none = nothing[rows]
            rank, negative, of_temperature = none, none, none
            if need_statistics:
                rank, negative = seen.rank, seen.logit_sum * (t * _LN2) / seen.negatives
            if need_query_gradient:
                # By how much a row is more like its negatives' mean than like its positive.
                excess = (mine * seen.mean_key).sum(1).sub_(s) if normalize or isinstance(t, Tensor) else s
                if isinstance(t, Tensor):
                    of_temperature = excess * -factor / t
                toward = torch.addcmul(its, mine, excess[:, None]) if normalize else its
                pull = _per_length(factor, q_norm, rows)
                torch.sub(seen.mean_key, toward, out=query_gradient[rows]).mul_(pull)
            if need_positive_gradient:
                pull = _per_length(factor, p_norm, rows)
                out = torch.mul(mine, -pull, out=positive_gradient[rows])
                if normalize:
                    out.addcmul_(its, pull * s[:, None])
            if need_keys_gradient and only is not None:
                only.tile.add_transposed(keys_gradient, only.exponentials, mine * (factor * seen.unit)[:, None])
                fused = True
            columns = {
                Stat.LSE: lse,
                Stat.WEIGHT: weight,
                Stat.POSITIVE: s,
                Stat.COUNT: seen.negatives,
                Stat.LOG_WEIGHT: none if log_weight is None else log_weight,
                Stat.TEMPERATURE_GRADIENT: of_temperature,
                Stat.INTRA_LOSS: intra_loss,
                Stat.RANK: rank,
                Stat.NEGATIVE: negative,
            }
            torch.stack([columns[row] for row in Stat], out=stats[:, rows])
        if fused and ready.knows(keys) and p_norm is not None:
            for rows in slices(n, 1024):
                _through_unit(keys_gradient[rows], p[rows], p_norm, rows, keys_gradient[rows])
        elif fused:
            _keys_through_unit(keys_gradient, keys, normalize_keys)
        elif need_keys_gradient:
            keys_gradient = logsumexp_keys_gradient(
                q, keys, stats[Stat.WEIGHT] * share, stats[Stat.LSE], pairs, t, False, normalize_keys, dtype
            )
    return loss, query_gradient, positive_gradient, keys_gradient, stats


def _values(
    s: Tensor,  # (R,): s(q, k)
    lse: Tensor,  # (R,)
    inter_lse: Tensor,  # (R,)
    count: Tensor | int,  # K_i
    t: float | Tensor,
    inter_temperature: float | None,
    alpha: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the losses are made of, (R,) each: the loss, its intra part, -d loss / d gap, and the weight's logarithm."""
    shift: float | Tensor = 0.0
    if alpha is not None:
        shift = torch.log(alpha / count) if isinstance(count, Tensor) else math.log(alpha / count)
    gap = s / t - lse - shift
    zero, minus = torch.zeros_like(gap), -gap
    intra_loss = torch.logaddexp(zero, minus)
    if inter_temperature is None:
        return intra_loss, intra_loss, minus.sigmoid_(), None
    inter_gap = s / inter_temperature - inter_lse - shift
    weight = torch.sigmoid(-inter_gap)  # = W * sigmoid(-gap): the vanishing factor cancels
    log_weight = torch.logaddexp(zero, gap) - torch.logaddexp(zero, inter_gap)
    return weight * _softplus_over_sigmoid(gap), intra_loss, weight, log_weight


def negatives_logsumexp(
    query: Tensor, keys: Tensor, pairs: Pairs, temperature: float | Tensor, need_query_gradient: bool
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        q = query.to(compute_dtype(query))
        lse, mean_key = q.new_empty(len(q)), q.new_empty(q.shape if need_query_gradient else (0,))
        ready = _Ready(False, q.dtype)
        scale = _LOG2E / temperature
        for rows, seen, _ in _attend(q, scale, keys, pairs, ready, need_query_gradient, None, None):
            lse[rows] = _checked_lse(seen, rows.start, True)
            if need_query_gradient:
                mean_key[rows] = seen.mean_key
    return lse, mean_key


def logsumexp_keys_gradient(
    query: Tensor,
    keys: Tensor,
    row_weight: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    pairs: Pairs,
    temperature: float | Tensor,
    normalize: bool,
    normalize_keys: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of sum_i row_weight_i lse_i: dk_j = sum_i row_weight_i / t softmax_ij q_i, in one more pass."""
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        q = _unit(query, normalize, compute_dtype(query))[0]
        out = q.new_zeros(keys.shape)
        scratch = Scratch(q)
        for block in blocks(q, keys, pairs, _Ready(normalize_keys, q.dtype)):
            rows = block.rows
            logits, base = q[rows] * (_LOG2E / temperature), lse[rows, None] * _LOG2E
            weighted = q[rows] * (row_weight[rows] / temperature)[:, None]
            for tile in block.tiles:
                x = tile.logits(logits, scratch).sub_(base).exp2_()  # softmax (R, C)
                tile.add_transposed(out, x, weighted)
        _keys_through_unit(out, keys, normalize_keys)
    return out.to(dtype)


# ------------------------------------------------------------------------------- both roles of the rows of two views


def both_roles_losses(
    z: Tensor,  # (2M, D): rows i and i + M are one image's views
    pairs: Pairs,
    across: bool,  # only the other view's rows are negatives
    temperature: float | Tensor,
    inter_temperature: float | None,
    alpha: float | None,
    normalize: bool,
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss per row (2M,) of both directions, and ``stats``: every similarity is computed once, and serves both."""
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        unit, n = _unit(z, normalize, compute_dtype(z))[0], len(z)
        stats = unit.new_zeros((len(Stat), n))
        ratios = [1.0] if inter_temperature is None else [temperature / inter_temperature, 1.0]
        running = [(ratio, unit.new_full((n,), _MINIMUM), unit.new_zeros(n)) for ratio in ratios]
        scratch, copy = Scratch(unit), Scratch(unit)
        for rows, tile, own in mutual_tiles(unit, pairs, across):
            x = tile.logits(unit[rows] * (_LOG2E / temperature), scratch)  # (R, C)
            roles = [(rows, False)] if own else [(rows, False), (tile.place, True)]
            folds = [(*role, *one) for role in roles for one in running]
            for place, (some, turned, ratio, maximum, total) in enumerate(folds):
                y = x if place == len(folds) - 1 else torch.mul(x, ratio, out=copy(*x.shape))
                _fold(y.T if turned else y, maximum[some], total[some])
        lse, inter_lse = (_LN2 * (maximum + total.log2()) for _, maximum, total in (running[-1], running[0]))
        s = (unit * unit.roll(n // 2, 0)).sum(1)
        count = (n // 2 - 1) * (1 if across else 2)
        row_loss, intra_loss, weight, log_weight = _values(
            s, lse, inter_lse, count, temperature, inter_temperature, alpha
        )
        stats[Stat.LSE], stats[Stat.WEIGHT], stats[Stat.POSITIVE], stats[Stat.INTRA_LOSS] = lse, weight, s, intra_loss
        stats[Stat.COUNT] = count
        if log_weight is not None:
            stats[Stat.LOG_WEIGHT] = log_weight
    return row_loss * share, stats


def both_roles_gradient(
    z: Tensor,  # (2M, D)
    row_weight: Tensor,  # (2M,)
    lse: Tensor,  # (2M,)
    similarity: Tensor,  # (2M,), to the positive
    pairs: Pairs,
    across: bool,
    temperature: float | Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of sum_i row_weight_i (lse_i - s_i / t) for rows that are anchors, positives and negatives; and for t.

    With P the softmax, a = row_weight / t and p the other view: sum_j (a_i P_ij + a_j P_ji) z_j - (a_i + a_p) z_p.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        unit, norm = _unit(z, normalize, compute_dtype(z))
        a, base, half = row_weight / temperature, lse * _LOG2E, len(z) // 2
        out, scratch, other = torch.zeros_like(unit), Scratch(unit), Scratch(unit)
        for rows, tile, own in mutual_tiles(unit, pairs, across):
            x = tile.logits(unit[rows] * (_LOG2E / temperature), scratch)  # (R, C)
            y = torch.sub(x, base[rows, None], out=other(*x.shape)).exp2_().mul_(a[rows, None])
            y += x.sub_(base[tile.place]).exp2_().mul_(a[tile.place])
            out[rows].addmm_(y, tile.keys)
            if not own:
                out[tile.place].addmm_(y.T, unit[rows])
        partner = unit.roll(half, 0)
        # Every pair's similarity is in this product twice, once a role.
        temperature_gradient = ((a * similarity).sum() - (unit * out).sum() / 2) / temperature
        out.addcmul_(partner, (a + a.roll(half))[:, None], value=-1)
        for rows in slices(len(z), 256):
            _through_unit(out[rows], unit[rows], norm, rows, out[rows])
    return out.to(z.dtype), temperature_gradient.to(out.dtype)


# ---------------------------------------------------------------------------------- plain formulas, for double backward


def dense_row_losses(
    query: Tensor,
    positive: Tensor,
    keys: Tensor,
    extra_keys: Tensor | None,
    pairs: Pairs,
    extra_pairs: Pairs,
    temperature: float | Tensor,
    inter_temperature: float | None,
    alpha: float | None,
    normalize: bool,
    normalize_keys: bool,
    normalize_extra: bool,
) -> Tensor:
    """``row_losses`` as autograd sees its definition, N x K in memory."""
    dtype = compute_dtype(query)
    q, p = _unit(query, normalize, dtype)[0], _unit(positive, normalize, dtype)[0]
    s = (q * p).sum(1)
    similarity, drop = _dense_similarity(q, _unit(keys, normalize_keys, dtype)[0], pairs)
    if extra_keys is not None:
        more, more_drop = _dense_similarity(q, _unit(extra_keys, normalize_extra, dtype)[0], extra_pairs)
        similarity, drop = torch.cat([similarity, more], 1), torch.cat([drop, more_drop], 1)
    count = (~drop).sum(1)
    shift = 0.0 if alpha is None else torch.log(alpha / count.to(dtype))
    gap = s / temperature - _dense_lse(similarity, drop, temperature) - shift
    if inter_temperature is None:
        return softplus(-gap)
    inter_gap = (s / inter_temperature - _dense_lse(similarity, drop, inter_temperature) - shift).detach()
    # weight.detach() * softplus(-gap). Far out the weight overflows as softplus vanishes: there the product is tail.
    tail = torch.sigmoid(-inter_gap) * torch.exp(gap.detach() - gap)
    far = gap.detach() > 30.0
    near = torch.where(far, 0.0, gap)
    weight = torch.exp(softplus(near.detach()) - softplus(torch.where(far, 0.0, inter_gap)))
    return torch.where(far, tail, weight * softplus(-near))


def dense_logsumexp(query: Tensor, keys: Tensor, pairs: Pairs, temperature: float | Tensor) -> Tensor:
    """``negatives_logsumexp`` as autograd sees its definition, N x K in memory."""
    dtype = compute_dtype(query)
    return _dense_lse(*_dense_similarity(query.to(dtype), keys.to(dtype), pairs), temperature)


def _dense_lse(similarity: Tensor, drop: Tensor, temperature: float | Tensor) -> Tensor:
    # Scaled before masked: the other way round a learned temperature's gradient is -inf * 0.
    return torch.logsumexp((similarity / temperature).masked_fill(drop, -math.inf), 1)


def _dense_similarity(q: Tensor, k: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    similarity = torch.einsum("nd,nkd->nk", q, k) if k.dim() == 3 else q @ k.T
    drop = torch.zeros_like(similarity, dtype=torch.bool)
    columns = torch.arange(similarity.shape[1], device=q.device)
    if pairs.band:
        offset, width, modulus = pairs.band
        rows = torch.arange(len(q), device=q.device)
        drop |= (columns - rows[:, None] - offset - 1) % modulus >= width
    if pairs.picked is not None:
        drop |= torch.ones_like(drop).scatter_(1, pairs.picked, False)
    if pairs.valid_count is not None:
        drop |= columns >= pairs.valid_count
    if pairs.query_ids is not None and pairs.key_ids is not None:
        drop |= pairs.query_ids[:, None] == pairs.key_ids
    return similarity, drop


# ------------------------------------------------------------------------------------------------------- the one pass


@dataclass(frozen=True)
class _Ready:
    """Raw keys to what is multiplied: in the arithmetic's dtype, of unit length if ``normalize``."""

    normalize: bool
    dtype: torch.dtype
    raw: Tensor | None = None  # of this, the answer
    unit: Tensor | None = None  # is here already

    def __call__(self, part: Tensor) -> Tensor:
        if self.unit is not None and self.knows(part):
            return self.unit
        return _unit(part, self.normalize, self.dtype)[0]

    def knows(self, part: Tensor) -> bool:
        return self.unit is not None and self.raw is not None and _same_memory(part, self.raw)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


class _Seen(NamedTuple):
    """What the pass saw of a block of R rows."""

    lse: Tensor  # (R,)
    negatives: Tensor  # (R,): K_i
    known: int | None  # K_i, where the host knows it
    mean_key: Tensor  # (R, D): sum_j softmax_ij n_j
    inter_lse: Tensor  # (R,)
    rank: Tensor  # (R,)
    logit_sum: Tensor  # (R,)
    unit: Tensor  # (R,): exponentials times this are the softmax


class _Only(NamedTuple):
    """The one tile of a block that has no other."""

    tile: Tile
    exponentials: Tensor  # (R, C): 2 ** (logit - row maximum), until the next block overwrites it


_Passed = tuple[slice, _Seen, _Only | None]


def _attend(
    q: Tensor,  # (N, D)
    scale: float | Tensor,  # from similarities to logits in base 2
    keys: Tensor,
    pairs: Pairs,
    ready: _Ready,
    need_mean_key: bool,
    ratio: float | Tensor | None,  # t / T: the second temperature's logits over the first's
    positive_logit: Tensor | None,  # (N,): count what is above it
    row_hint: int = 256,
) -> Iterator[_Passed]:
    if positive_logit is None and _flash_serves(keys, pairs):
        yield slice(0, len(q)), _attend_flash(q * scale, keys, pairs, ready, ratio), None
        return
    scratch, inter_scratch = Scratch(q), Scratch(q)
    known = pairs.negatives(keys)
    for block in blocks(q, keys, pairs, ready, row_hint):
        mine = q[block.rows] * scale
        r, d = mine.shape
        count, unseen = mine.new_full((r,), known or 0), mine.new_zeros(r)
        running, inter, rank, logit_sum = _Running(unseen), _Running(unseen), unseen, unseen
        mean_key = mine.new_empty((r, d) if need_mean_key else (0,))
        tile, x = None, mine
        for place, tile in enumerate(block.tiles):
            x = tile.logits(mine, scratch)  # (R, C)
            if known is None:
                count += tile.negatives(r)
            if positive_logit is not None:
                rank = rank + (x > positive_logit[block.rows, None]).sum(1)
                logit_sum = logit_sum + x.masked_fill(x == -math.inf, 0.0).sum(1)
            if ratio is not None:
                inter.fold(torch.mul(x, ratio, out=inter_scratch(*x.shape)), place == 0)
            shrink = running.fold(x, place == 0)
            if need_mean_key and place > 0:
                mean_key *= shrink[:, None]
            if need_mean_key:
                tile.add_weighted(mean_key, x, place == 0)
        unit = 1 / running.total
        if not known:  # of nothing, which a second set may make up for
            unit = torch.where(count == 0, 0.0, unit)
        if need_mean_key:
            mean_key *= unit[:, None]
        lse = running.lse()
        inter_lse = lse if ratio is None else inter.lse()
        only = _Only(tile, x) if block.single and tile is not None else None
        yield block.rows, _Seen(lse, count, known, mean_key, inter_lse, rank, logit_sum, unit), only


def _fold(x: Tensor, maximum: Tensor, total: Tensor) -> None:
    """Logits (R, C) into a log-sum-exp under way, all three in place."""
    new = torch.maximum(maximum, x.amax(1))
    total.mul_(maximum.sub_(new).exp2_()).add_(x.sub_(new[:, None]).exp2_().sum(1))
    maximum.copy_(new)


class _Running:
    """A log-sum-exp in base 2 under way: the maximum so far, and the sum of exponentials under it."""

    def __init__(self, zero: Tensor) -> None:
        self.maximum, self.total = zero, zero  # (R,)

    def fold(self, x: Tensor, first: bool) -> Tensor:
        """Logits (R, C) to 2 ** (x - new maximum), in place; return what earlier sums shrink by."""
        new = x.amax(1).clamp_min_(_MINIMUM) if first else torch.maximum(self.maximum, x.amax(1))
        total = x.sub_(new[:, None]).exp2_().sum(1)
        shrink = self.total
        if not first:
            shrink = (self.maximum - new).exp2_()
            total += self.total * shrink
        self.maximum, self.total = new, total
        return shrink

    def lse(self) -> Tensor:
        return (self.maximum + self.total.log2()) * _LN2


def _whole(parts: list[_Seen]) -> _Seen:
    """All rows of a pass."""
    if len(parts) == 1:
        return parts[0]
    fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in _Seen._fields if name != "known"}
    return _Seen(known=parts[0].known, **fields)


def _merged(passes: Iterator[_Passed], extra: _Seen) -> Iterator[_Passed]:
    """The same rows with the negatives of both sets."""
    for rows, seen, only in passes:
        some: list[Any] = [field[rows] if isinstance(field, Tensor) else field for field in extra]
        yield rows, _both(seen, _Seen(*some)), only


def _both(seen: _Seen, other: _Seen) -> _Seen:
    """What one pass over both sets of negatives would have seen."""
    lse = torch.logaddexp(seen.lse, other.lse)
    share, other_share = torch.exp(seen.lse - lse), torch.exp(other.lse - lse)
    mean_key = seen.mean_key
    if len(mean_key):
        mean_key = mean_key * share[:, None] + other.mean_key * other_share[:, None]
    return _Seen(
        lse,
        seen.negatives + other.negatives,
        None if seen.known is None or other.known is None else seen.known + other.known,
        mean_key,
        torch.logaddexp(seen.inter_lse, other.inter_lse),
        seen.rank + other.rank,
        seen.logit_sum + other.logit_sum,
        seen.unit * share,
    )


def _checked_lse(seen: _Seen, first: int, may_raise: bool) -> Tensor:
    """The log-sum-exps of rows that have something to sum: else an error, or NaN on a device that cannot raise."""
    if seen.known:
        return seen.lse
    empty = seen.negatives == 0
    if empty.is_cpu and may_raise:
        if bool(empty.any()):
            raise ValueError(
                f"query {first + int(empty.nonzero()[0])} has no negatives left (effective K = 0): expected at least "
                "one key whose id differs from its own. Leave the ids out, make them finer, or give more negatives."
            )
        return seen.lse
    return torch.where(empty, math.nan, seen.lse)


# -------------------------------------------------------------------------------- flash attention on CPU, value = key


def _flash_serves(keys: Tensor, pairs: Pairs) -> bool:
    return (
        keys.device.type == "cpu"
        and keys.dim() == 2
        and (pairs.query_ids is None or pairs.key_ids is None)
        and pairs.picked is None
        and not pairs.band
        and (pairs.valid_count is None or int(pairs.valid_count) > 0)  # of no keys it kills the process
        and flash_works()
    )


def _attend_flash(logits: Tensor, keys: Tensor, pairs: Pairs, ready: _Ready, ratio: float | Tensor | None) -> _Seen:
    keys = keys if pairs.valid_count is None else keys[: int(pairs.valid_count)]
    as_they_lie = keys.is_contiguous() and keys.dtype == ready.dtype and not ready.normalize
    size = len(keys) if as_they_lie else max(1, _FLASH_ELEMENTS // keys.shape[1])
    seen = (_seen_by_flash(logits, ready(part).contiguous(), ratio) for part in torch.split(keys, max(1, size)))
    return functools.reduce(_both, seen)


def _seen_by_flash(logits: Tensor, keys: Tensor, ratio: float | Tensor | None) -> _Seen:
    mean_key, lse = _flash(logits, keys)
    inter_lse = lse if ratio is None else _flash(logits * ratio, keys)[1]
    count, unseen = torch.full_like(lse, len(keys)), torch.zeros_like(lse)
    return _Seen(lse, count, len(keys), mean_key, inter_lse, unseen, unseen, unseen)


def _flash(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted mean of the keys (N, D) and log-sum-exp (N,)."""
    q, k = logits.contiguous()[None, None], keys[None, None]  # of a transposed query it is silently wrong
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=_LN2)
    return out[0, 0], lse[0, 0]


@functools.cache
def flash_works() -> bool:
    """Whether torch's private operator is there and still returns (mean, log-sum-exp)."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 8, generator=generator, dtype=torch.float32, device="cpu") for n in (3, 37))
    logits = q @ k.T
    try:
        mean, lse = _flash(q * _LOG2E, k)
        torch.testing.assert_close(mean, torch.softmax(logits, 1) @ k)
        torch.testing.assert_close(lse, torch.logsumexp(logits, 1))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError, IndexError):
        return False
    return True


# -------------------------------------------------------------------------------------------------------- small pieces


def compute_dtype(query: Tensor) -> torch.dtype:
    """What the arithmetic runs in: float32, or float64 where the query is that."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def norm_eps(dtype: torch.dtype) -> float:
    """The least length a row is divided by."""
    return torch.finfo(torch.float16).tiny if dtype == torch.float16 else 1e-12


def _unit(x: Tensor, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows of unit length in ``dtype`` and their lengths, at least an eps the input's dtype can hold 1 / eps of."""
    eps = norm_eps(x.dtype)
    x = x.to(dtype)
    if not normalize:
        return x, None
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)
    return x / norm, norm


def _through_unit(
    gradient: Tensor, unit: Tensor, norm: Tensor | None, rows: slice = slice(None), out: Tensor | None = None
) -> Tensor:
    """From the gradient of unit vectors to that of the raw ones, in ``out`` where that is given."""
    if norm is None:
        return gradient if out is None else out.copy_(gradient)
    along = (unit * gradient).sum(-1, keepdim=True)
    return torch.div(torch.addcmul(gradient, unit, along, value=-1), norm[rows], out=out)


def _per_length(factor: Tensor, norm: Tensor | None, rows: slice) -> Tensor:
    """factor (R,) over the raw rows' lengths, (R, 1)."""
    return factor[:, None] if norm is None else factor[:, None] / norm[rows]


def _keys_through_unit(gradient: Tensor, keys: Tensor, normalize: bool) -> None:
    """From the gradient of unit keys to that of the raw ones, in place, some at a time."""
    if normalize:
        gradient, keys = gradient.view(-1, gradient.shape[-1]), keys.reshape(-1, keys.shape[-1])
        for part in slices(len(keys), 256):
            gradient[part] = _through_unit(gradient[part], *_unit(keys[part], True, gradient.dtype))


def _softplus_over_sigmoid(x: Tensor) -> Tensor:
    """softplus(-x) / sigmoid(-x) without the overflow of either: 1 + exp(-x)/2 as x grows, -x as it falls."""
    e = torch.exp(-x.abs())
    at_positive = torch.where(e < 1e-10, 1.0 + 0.5 * e, torch.log1p(e) / e.clamp_min(1e-30) * (1.0 + e))
    at_negative = (torch.relu(-x) + torch.log1p(e)) * (1.0 + e)
    return torch.where(x < 0, at_negative, at_positive)
