"""The operators in plain torch, any device, float32 or float64 arithmetic, without ever holding N x K numbers.

Work goes tile by tile: a tile is a block of rows against a block of keys of at most ``TILE_ELEMENTS`` similarities, and the log-sum-exp is carried
from tile to tile with a running maximum. Where nothing is left out, the CPU's own flash attention with value = key is the same pass, fused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

TILE_ELEMENTS = 2**21  # similarities per tile: 8 MB in float32
_MINIMUM = -1e30  # where a running maximum starts: -inf would make inf - inf on a tile with nothing in it


class Pairs(NamedTuple):
    """Which (query i, key j) pairs are negatives; see ``eqco_loss.ops``."""

    query_ids: Tensor | None = None  # (N,)
    key_ids: Tensor | None = None  # (K,) or (N, K)
    valid_count: Tensor | None = None  # ()
    index: Tensor | None = None  # (N, C)
    band: Sequence[int] = ()  # offset, width, modulus


class Stat(IntEnum):
    """Rows of the ``stats`` output of ``row_losses``."""

    LSE = 0
    WEIGHT = 1  # -d loss / d gap
    POSITIVE = 2  # s(q, k)
    COUNT = 3  # K_i
    LOG_WEIGHT = 4  # of the dual temperature; 0 for EqCo
    TEMPERATURE_GRADIENT = 5
    INTRA_LOSS = 6  # softplus(log(alpha / K_i) - gap(t)): what estimates the mutual information
    RANK = 7  # negatives more similar than the positive (need_statistics)
    NEGATIVE = 8  # mean similarity of the negatives (need_statistics)


# ------------------------------------------------------------------------------------------------------------------- operators


def row_losses(
    query: Tensor,  # (N, D)
    positive: Tensor,  # (N, D)
    keys: Tensor,  # (K, D) or (N, K, D)
    pairs: Pairs,
    temperature: float | Tensor,
    inter_temperature: float | None,
    alpha: float | None,
    normalize: bool,
    normalize_keys: bool,
    need_query_gradient: bool,
    need_positive_gradient: bool,
    need_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        dtype = compute_dtype(query)
        q, q_norm = _unit(query, normalize, dtype)
        p, p_norm = _unit(positive, normalize, dtype)
        s = (q * p).sum(1)  # (N,)
        ratio = None if inter_temperature is None else temperature / inter_temperature
        state = _attend(q / temperature, keys, pairs, normalize_keys, need_query_gradient, ratio, s / temperature if need_statistics else None)
        _check_count(state.count, keys.device)

        shift = 0.0 if alpha is None else torch.log(alpha / state.count)  # (N,)
        gap = s / temperature - state.lse - shift
        intra_loss = torch.logaddexp(torch.zeros_like(gap), -gap)
        if inter_temperature is None:
            loss, weight, log_weight = intra_loss, torch.sigmoid(-gap), torch.zeros_like(gap)
        else:
            inter_gap = s / inter_temperature - state.inter_lse - shift
            weight = torch.sigmoid(-inter_gap)  # = W * sigmoid(-gap): the vanishing factor cancels
            loss = weight * _softplus_over_sigmoid(gap)
            log_weight = -torch.logaddexp(torch.zeros_like(gap), inter_gap) + torch.logaddexp(torch.zeros_like(gap), gap)

        stats = torch.zeros(len(Stat), len(query), dtype=q.dtype, device=q.device)
        stats[Stat.LSE], stats[Stat.WEIGHT], stats[Stat.POSITIVE], stats[Stat.COUNT] = state.lse, weight, s, state.count
        stats[Stat.LOG_WEIGHT], stats[Stat.INTRA_LOSS] = log_weight, intra_loss
        if need_statistics:
            stats[Stat.RANK], stats[Stat.NEGATIVE] = state.rank, state.similarity_sum * temperature / state.count
        query_gradient = positive_gradient = query.new_empty((0,), dtype=q.dtype)
        if need_query_gradient:
            query_gradient = (state.mean_key - p) * (weight / temperature)[:, None]
            stats[Stat.TEMPERATURE_GRADIENT] = weight * (s - (q * state.mean_key).sum(1)) / temperature**2
            query_gradient = _through_unit(query_gradient, q, q_norm)
        if need_positive_gradient:
            positive_gradient = _through_unit(q * (-weight / temperature)[:, None], p, p_norm)
    return loss, query_gradient, positive_gradient, stats


def negatives_logsumexp(
    query: Tensor, keys: Tensor, pairs: Pairs, temperature: float | Tensor, need_query_gradient: bool
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        q = query.to(compute_dtype(query))
        state = _attend(q / temperature, keys, pairs, False, need_query_gradient, None, None)
        _check_count(state.count, keys.device)
    return state.lse, state.mean_key if need_query_gradient else q.new_empty((0,))


def keys_gradient(
    query: Tensor,
    keys: Tensor,
    row_weight: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    pairs: Pairs,
    temperature: float | Tensor,
    normalize: bool,
    normalize_keys: bool,
) -> Tensor:
    """Gradient of sum_i row_weight_i lse_i: dk_j = sum_i row_weight_i / t softmax_ij q_i, in one more pass, in keys' dtype."""
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        logits = _unit(query, normalize, compute_dtype(query))[0] / temperature  # (N, D)
        weighted = logits * row_weight[:, None]
        out = torch.zeros(keys.shape, dtype=logits.dtype, device=keys.device)
        scratch = _Scratch(logits)
        for rows, block in _blocks(logits, keys, pairs, normalize_keys):
            for tile in block:
                p = tile.logits(logits[rows], scratch).sub_(lse[rows, None]).exp_()  # softmax (R, C)
                tile.add_transposed(out, p, weighted[rows])
        if normalize_keys:
            flat, raw = out.view(-1, out.shape[-1]), keys.reshape(-1, keys.shape[-1])
            step = max(1, TILE_ELEMENTS // flat.shape[1])
            for start in range(0, len(flat), step):
                part = slice(start, start + step)
                flat[part] = _through_unit(flat[part], *_unit(raw[part], True, out.dtype))
    return out.to(keys.dtype)


# ------------------------------------------------------------------------------------------- plain formulas, for double backward


def dense_row_losses(
    query: Tensor,
    positive: Tensor,
    keys: Tensor,
    pairs: Pairs,
    temperature: float | Tensor,
    inter_temperature: float | None,
    alpha: float | None,
    normalize: bool,
    normalize_keys: bool,
) -> Tensor:
    """``row_losses`` as autograd sees its definition, N x K in memory."""
    dtype = compute_dtype(query)
    q, p, k = _unit(query, normalize, dtype)[0], _unit(positive, normalize, dtype)[0], _unit(keys, normalize_keys, dtype)[0]
    s = (q * p).sum(1)
    similarity, count = _dense_similarity(q, k, pairs)
    shift = 0.0 if alpha is None else torch.log(alpha / count.to(s.dtype))
    gap = s / temperature - torch.logsumexp(similarity / temperature, 1) - shift
    if inter_temperature is None:
        return softplus(-gap)
    inter_gap = s / inter_temperature - torch.logsumexp(similarity / inter_temperature, 1) - shift
    detached, inter_detached = gap.detach(), inter_gap.detach()
    # weight.detach() * softplus(-gap). Far out the weight overflows as softplus vanishes: there their product is slope * exp(gap.detach() - gap).
    slope = torch.sigmoid(-inter_detached)
    far = detached > 30.0
    near = torch.where(far, 0.0, gap)
    weight = torch.exp(softplus(near.detach()) - softplus(torch.where(far, 0.0, inter_detached)))
    return torch.where(far, slope * torch.exp(detached - gap), weight * softplus(-near))


def dense_logsumexp(query: Tensor, keys: Tensor, pairs: Pairs, temperature: float | Tensor) -> Tensor:
    dtype = compute_dtype(query)
    return torch.logsumexp(_dense_similarity(query.to(dtype), keys.to(dtype), pairs)[0] / temperature, 1)


def _dense_similarity(q: Tensor, k: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    similarity = torch.einsum("nd,nkd->nk", q, k) if k.dim() == 3 else q @ k.T
    drop = torch.zeros_like(similarity, dtype=torch.bool)
    columns = torch.arange(similarity.shape[1], device=q.device)
    if pairs.band:
        offset, width, modulus = pairs.band
        rows = torch.arange(len(q), device=q.device)
        drop |= (columns - rows[:, None] - offset - 1) % modulus >= width
    if pairs.index is not None:
        drop |= torch.ones_like(drop).scatter_(1, pairs.index, False)
    if pairs.valid_count is not None:
        drop |= columns >= pairs.valid_count
    if pairs.query_ids is not None and pairs.key_ids is not None:
        drop |= pairs.query_ids[:, None] == pairs.key_ids
    return similarity.masked_fill(drop, -math.inf), (~drop).sum(1)


# ---------------------------------------------------------------------------------------------------------------- the one pass


class _State(NamedTuple):
    lse: Tensor  # (N,)
    count: Tensor  # (N,)
    mean_key: Tensor  # (N, D): sum_j softmax_ij n_j
    inter_lse: Tensor  # (N,)
    rank: Tensor  # (N,)
    similarity_sum: Tensor  # (N,), in units of the logits


def _attend(
    logits: Tensor,  # (N, D): query / t
    keys: Tensor,
    pairs: Pairs,
    normalize_keys: bool,
    need_mean_key: bool,
    ratio: float | Tensor | None,  # t / T: the second temperature's logits over the first's
    positive_logit: Tensor | None,  # (N,): count what is above it
) -> _State:
    if positive_logit is None and _flash_serves(logits, keys, pairs, normalize_keys):
        return _attend_flash(logits, keys, pairs, ratio)
    n, d = logits.shape
    maximum = logits.new_full((n,), _MINIMUM)
    total, count, inter_total, rank, similarity_sum = (logits.new_zeros(n) for _ in range(5))
    inter_maximum = logits.new_full((n,), _MINIMUM)
    mean_key = logits.new_zeros((n, d) if need_mean_key else (0,))
    scratch, inter_scratch = _Scratch(logits), _Scratch(logits)
    for rows, block in _blocks(logits, keys, pairs, normalize_keys):
        for tile in block:
            x = tile.logits(logits[rows], scratch)  # (R, C), -inf where left out
            count[rows] += tile.count(x)
            if positive_logit is not None:
                rank[rows] += (x > positive_logit[rows, None]).sum(1)
                similarity_sum[rows] += x.masked_fill(x == -math.inf, 0.0).sum(1)
            if ratio is not None:
                y = torch.mul(x, ratio, out=inter_scratch(*x.shape))
                _fold(y, inter_maximum, inter_total, rows)
            old = _fold(x, maximum, total, rows)
            if need_mean_key:
                mean_key[rows] *= old[:, None]
                tile.add_weighted(mean_key[rows], x)
    if need_mean_key:
        mean_key /= total[:, None]
    none = total == 0  # no negatives at all: the row is NaN, never 0
    lse = (maximum + total.log()).masked_fill(none, math.nan)
    return _State(lse, count, mean_key, inter_maximum + inter_total.log(), rank, similarity_sum)


def _fold(x: Tensor, maximum: Tensor, total: Tensor, rows: slice) -> Tensor:
    """Turn logits into exp(x - new maximum), in place; move the running maximum and sum; return what earlier sums shrink by."""
    new = torch.maximum(maximum[rows], x.amax(1))
    old = (maximum[rows] - new).exp_()
    x.sub_(new[:, None]).exp_()
    total[rows] = total[rows] * old + x.sum(1)
    maximum[rows] = new
    return old


def _check_count(count: Tensor, device: torch.device) -> None:
    if device.type == "cpu" and bool((count == 0).any()):
        row = int((count == 0).nonzero()[0])
        raise ValueError(
            f"query {row} has no negatives left (effective K = 0): expected at least one key that is stored and whose id differs from its own. "
            "Leave query_ids/negative_ids out, make the ids finer, or give more negatives."
        )


# ----------------------------------------------------------------------------------------------------------------------- tiles


class _Scratch:
    """One buffer for every tile of a pass: fresh memory for each costs more in page faults than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.buffer = like, like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        if self.buffer.numel() < math.prod(shape):
            self.buffer = self.like.new_empty(math.prod(shape))
        return self.buffer[: math.prod(shape)].view(shape)


class _Tile(NamedTuple):
    keys: Tensor  # (C, D) or (R, C, D), ready to multiply
    place: Any  # where keys stand in the whole: an index into its first dimension, or (rows, columns) for a key set per row
    drop: Tensor | None = None  # (R, C) bool, or broadcastable to it: True where a pair is left out
    diagonals: tuple[int, ...] = ()

    def logits(self, rows: Tensor, scratch: _Scratch) -> Tensor:
        if self.keys.dim() == 3:
            r, c, _ = self.keys.shape
            x = scratch(r, c)
            torch.bmm(self.keys, rows[:, :, None], out=x[:, :, None])
        else:
            x = torch.mm(rows, self.keys.T, out=scratch(len(rows), len(self.keys)))
        for diagonal in self.diagonals:
            x.diagonal(diagonal).fill_(-math.inf)
        return x if self.drop is None else x.masked_fill_(self.drop, -math.inf)

    def count(self, x: Tensor) -> Tensor:
        if self.drop is not None:
            out = (~self.drop).expand(x.shape).sum(1)
        else:
            out = torch.full((len(x),), x.shape[1], dtype=torch.int64, device=x.device)
        for diagonal in self.diagonals:
            out[max(0, -diagonal) : x.shape[1] - diagonal] -= 1  # the rows that this diagonal crosses
        return out

    def add_weighted(self, out: Tensor, weight: Tensor) -> None:
        """out (R, D) += weight (R, C) @ keys"""
        if self.keys.dim() == 3:
            out += torch.bmm(weight[:, None, :], self.keys)[:, 0]
        else:
            out.addmm_(weight, self.keys)

    def add_transposed(self, out: Tensor, weight: Tensor, rows: Tensor) -> None:
        """out[place] += weight.T (C, R) @ rows (R, D)"""
        if self.keys.dim() == 2 and isinstance(self.place, slice):
            out[self.place].addmm_(weight.T, rows)
        elif self.keys.dim() == 2:
            out.index_add_(0, self.place, weight.T @ rows)
        elif isinstance(self.place, Tensor):
            out.index_add_(0, self.place.reshape(-1), (weight[:, :, None] * rows[:, None, :]).flatten(0, 1))
        else:
            out[self.place] += weight[:, :, None] * rows[:, None, :]


def _blocks(logits: Tensor, keys: Tensor, pairs: Pairs, normalize: bool) -> Iterator[tuple[slice, Iterator[_Tile]]]:
    """Blocks of rows, each with the tiles that together hold its negatives."""

    def ready(part: Tensor) -> Tensor:
        return _unit(part, normalize, logits.dtype)[0]

    n, d = logits.shape
    if keys.dim() == 3:  # every row its own keys
        k = keys.shape[1]
        step, width = _split(n, k, TILE_ELEMENTS // d, 1)
        for rows in _slices(n, step):
            yield rows, (_Tile(ready(keys[rows, columns]), (rows, columns), _drop_by_id(pairs, rows, columns)) for columns in _slices(k, width))
        return
    k = len(keys)
    cpu = keys.device.type == "cpu"
    if pairs.index is not None and cpu and pairs.index.shape[1] * 8 < k:  # few of many: fetch them
        c = pairs.index.shape[1]
        step, width = _split(n, c, TILE_ELEMENTS // d, 1)
        for rows in _slices(n, step):
            picked = (pairs.index[rows, columns] for columns in _slices(c, width))
            yield rows, (_Tile(ready(keys[j]), j, _drop_by_id(pairs, rows, j)) for j in picked)
        return
    if pairs.band and cpu and pairs.band[1] + _band_step(pairs) < pairs.band[2]:  # a narrow band: only its columns
        yield from _band_blocks(n, keys, pairs, ready)
        return
    if pairs.valid_count is not None and cpu:
        k = min(k, int(pairs.valid_count))
        pairs = pairs._replace(valid_count=None)
    step, width = _split(n, k, TILE_ELEMENTS, 256)
    whole = ready(keys) if width >= k else None  # every block of rows meets the same tile: prepare it once
    for rows in _slices(n, step):
        tiles = (_shared_tile(ready(keys[columns]) if whole is None else whole[columns], pairs, rows, columns) for columns in _slices(k, width))
        yield rows, tiles


def _shared_tile(keys: Tensor, pairs: Pairs, rows: slice, columns: slice) -> _Tile:
    """A tile of keys that all rows share, with everything left out that ``pairs`` names."""
    drop = _drop_by_id(pairs, rows, columns)
    diagonals: list[int] = []
    if pairs.band:
        offset, width, modulus = pairs.band
        if width == modulus - 1:  # only the row's own place, once in every modulus columns
            first = (rows.start + offset) % modulus - columns.start
            while first > -(rows.stop - rows.start):
                first -= modulus
            diagonals = [x for x in range(first, len(keys), modulus) if x > -(rows.stop - rows.start)]
        else:
            place = torch.arange(columns.start, columns.stop, device=keys.device, dtype=torch.int32)
            row = torch.arange(rows.start, rows.stop, device=keys.device, dtype=torch.int32)[:, None]
            drop = _either(drop, (place - row - (offset + 1)) % modulus >= width)
    if pairs.index is not None:
        local, c = pairs.index[rows] - columns.start, len(keys)
        absent = torch.ones((len(local), c + 1), dtype=torch.bool, device=keys.device)  # one column more takes what falls outside the tile
        absent.scatter_(1, torch.where((local >= 0) & (local < c), local, c), False)
        drop = _either(drop, absent[:, :c])
    if pairs.valid_count is not None:
        drop = _either(drop, torch.arange(columns.start, columns.stop, device=keys.device)[None] >= pairs.valid_count)
    return _Tile(keys, columns, drop, tuple(diagonals))


def _band_blocks(n: int, keys: Tensor, pairs: Pairs, ready: Callable[[Tensor], Tensor]) -> Iterator[tuple[slice, Iterator[_Tile]]]:
    offset, width, modulus = pairs.band
    views = len(keys) // modulus
    step = max(1, min(_band_step(pairs), TILE_ELEMENTS // (views * (_band_step(pairs) + width))))
    view_start = torch.arange(views, device=keys.device)[:, None] * modulus
    for rows in _slices(n, step):
        r = rows.stop - rows.start
        span = r + width - 1
        local = torch.arange(span, device=keys.device)
        j = (view_start + (rows.start + offset + 1 + local) % modulus).reshape(-1)  # (views * span,)
        outside = torch.ones((r, span), dtype=torch.bool, device=keys.device)
        outside = (outside.triu().tril(width - 1) ^ True).repeat(1, views)
        yield rows, iter([_Tile(ready(keys[j]), j, _either(_drop_by_id(pairs, rows, j), outside))])


def _band_step(pairs: Pairs) -> int:
    """Rows per tile of a band: each tile computes rows - 1 columns more than a row needs."""
    return max(128, pairs.band[1] // 2)


def _drop_by_id(pairs: Pairs, rows: slice, columns: Any) -> Tensor | None:
    if pairs.query_ids is None or pairs.key_ids is None:
        return None
    key_ids = pairs.key_ids[columns] if pairs.key_ids.dim() == 1 else pairs.key_ids[rows, columns]
    return pairs.query_ids[rows, None] == key_ids


def _either(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a | b


def _split(n: int, k: int, elements: int, rows: int) -> tuple[int, int]:
    """Block sizes (rows, columns) of at most ``elements``: all the keys where they fit beside that many rows, tiles where not."""
    rows = min(n, rows)
    columns = max(1, min(k, elements // rows))
    return max(1, min(n, elements // columns)), columns


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


# ---------------------------------------------------------------------------------------- flash attention on CPU, value = key


def _flash_serves(logits: Tensor, keys: Tensor, pairs: Pairs, normalize_keys: bool) -> bool:
    return (
        keys.device.type == "cpu"
        and keys.dim() == 2
        and not normalize_keys
        and keys.dtype == logits.dtype
        and keys.is_contiguous()
        and (pairs.query_ids is None or pairs.key_ids is None)
        and pairs.index is None
        and not pairs.band
        and len(keys) > 0
        and (pairs.valid_count is None or int(pairs.valid_count) > 0)
        and flash_works()
    )


def _attend_flash(logits: Tensor, keys: Tensor, pairs: Pairs, ratio: float | Tensor | None) -> _State:
    n = len(logits)
    keys = keys if pairs.valid_count is None else keys[: int(pairs.valid_count)]
    mean_key, lse = _flash(logits, keys)
    inter_lse = lse if ratio is None else _flash(logits * ratio, keys)[1]
    empty = logits.new_empty(0)
    return _State(lse, logits.new_full((n,), len(keys)), mean_key, inter_lse, empty, empty)


def _flash(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted mean of the keys (N, D) and log-sum-exp (N,)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(logits[None, None], keys[None, None], keys[None, None], scale=1.0)
    return out[0, 0], lse[0, 0]


@functools.cache
def flash_works() -> bool:
    """Whether torch's private operator is there and still returns (mean, log-sum-exp)."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 8, generator=generator), torch.randn(37, 8, generator=generator)
    try:
        mean, lse = _flash(q, k)
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
        return False
    expected = torch.softmax(q @ k.T, 1) @ k
    return (
        mean.shape == expected.shape
        and lse.shape == (3,)
        and torch.allclose(mean, expected, atol=1e-5)
        and torch.allclose(lse, torch.logsumexp(q @ k.T, 1), atol=1e-5)
    )


# ----------------------------------------------------------------------------------------------------------------- small pieces


def compute_dtype(query: Tensor) -> torch.dtype:
    """What the arithmetic runs in: float32, or float64 where the query is that."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _unit(x: Tensor, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows of unit length in ``dtype``, and the lengths they had. eps is a length whose inverse the input's own dtype can hold."""
    eps = torch.finfo(torch.float16).tiny if x.dtype == torch.float16 else 1e-12
    x = x.to(dtype)
    if not normalize:
        return x, None
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)
    return x / norm, norm


def _through_unit(gradient: Tensor, unit: Tensor, norm: Tensor | None) -> Tensor:
    """From the gradient of the unit vector to that of the raw one."""
    if norm is None:
        return gradient
    return (gradient - unit * (unit * gradient).sum(-1, keepdim=True)) / norm


def _softplus_over_sigmoid(x: Tensor) -> Tensor:
    """softplus(-x) / sigmoid(-x), without the overflow of either: 1 + exp(-x)/2 - ... as x grows, -x as it falls."""
    e = torch.exp(-x.abs())
    at_positive = torch.where(e < 1e-10, 1.0 + 0.5 * e, torch.log1p(e) / e.clamp_min(1e-30) * (1.0 + e))
    at_negative = torch.nn.functional.relu(-x) * (1.0 + e) + torch.log1p(e) * (1.0 + e)
    return torch.where(x < 0, at_negative, at_positive)
