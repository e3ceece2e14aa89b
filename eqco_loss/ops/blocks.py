"""The blocks of rows and tiles of keys in which plain torch visits pairs, so that few similarities exist at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import NORM_EPS, KeySet, Pairs, compute_dtype, either, gradient_eps, slices
from .definition import cleaned

TILE_ELEMENTS = 2**20  # similarities per tile: 4 MB in float32
NORMALISED_AT_ONCE = 256  # of a gradient that passes through the rows' normalisation
SMALL_ELEMENTS = 2**18  # similarities that one product gives sooner than several smaller ones
# Equal ids are searched for, which takes less than to compare all, where there are as many similarities and queries:
SEARCH_ELEMENTS = 2**20
SEARCH_ROWS = 64
MOST_ALIKE = 4  # for each query and key: with more pairs of equal ids, all ids are compared after all

Columns = Any  # which keys a tile has: a slice or an index (C,) or (R, C) of a set's first dimension


class Scratch:
    """One buffer for every tile of a pass: fresh memory for each costs more in page faults than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.buffer = like, like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        if self.buffer.numel() < math.prod(shape):
            self.buffer = self.like.new_empty(math.prod(shape))
        return self.buffer[: math.prod(shape)].view(shape)


def unit_rows(x: Tensor, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows in ``dtype``, of unit length if ``normalize``, and the lengths (..., 1) that a gradient is divided by."""
    eps = gradient_eps(x.dtype)
    x = x.to(dtype)
    if not normalize:
        return x, None
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(NORM_EPS)
    return x / norm, norm if eps == NORM_EPS else norm.clamp_min(eps)


def through_unit(gradient: Tensor, unit: Tensor, norm: Tensor | None) -> None:
    """From the gradient of unit vectors to that of the raw ones, in place, some rows at a time."""
    if norm is None:
        return
    if len(unit) > NORMALISED_AT_ONCE:
        for some in slices(len(unit), NORMALISED_AT_ONCE):
            through_unit(gradient[some], unit[some], norm[some])
    else:
        gradient.addcmul_(unit, (unit * gradient).sum(-1, keepdim=True), value=-1).div_(norm)


@dataclass(frozen=True)
class Ready:
    """Makes a set's raw keys what is multiplied: in the arithmetic's dtype, of unit length, without NaN."""

    keys: KeySet
    dtype: torch.dtype
    raw: Tensor | None = None  # the positives, which a batch's keys often are
    unit: Tensor | None = None  # and what they become

    @property
    def unit_length(self) -> bool:
        return self.keys.normalize or self.keys.trusted

    @property
    def clean(self) -> bool:
        return self.keys.pairs.by_pair and not self.keys.trusted

    def __call__(self, part: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Unit rows and their poison, if any (see ``definition.cleaned``). ``drop``: which of each query's own keys."""
        poison = None
        if self.knows(part) and self.unit is not None:
            return self.unit, None
        if drop is not None and self.clean:
            part = part.masked_fill(drop[..., None], 0.0)
        elif self.clean and not _surely_finite(part):
            part, poison = cleaned(part)
        return unit_rows(part, self.keys.normalize, self.dtype)[0], poison

    def knows(self, part: Tensor) -> bool:
        return self.raw is not None and not self.clean and _same_memory(part, self.raw)


def _surely_finite(x: Tensor) -> bool:
    """Where the device may be asked, by a sum of squares, which takes a fifth of the time of ``isfinite``."""
    return x.is_cpu and math.isfinite(float(torch.linalg.vector_norm(x, dtype=compute_dtype(x))))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


class Alike(NamedTuple):
    """Pairs of equal ids, but for the places that a band leaves out, in the order of the keys."""

    rows: Tensor  # (P,)
    columns: Tensor  # (P,)

    def within(self, rows: slice, columns: slice) -> Alike:
        """Those of a tile, by their places in it."""
        edges = self.columns.new_tensor([columns.start, columns.stop])
        first, last = torch.searchsorted(self.columns, edges).tolist()
        mine, its = self.rows[first:last] - rows.start, self.columns[first:last] - columns.start
        inside = (mine >= 0) & (mine < rows.stop - rows.start)
        return Alike(mine[inside], its[inside])


class Tile(NamedTuple):
    """A block of R rows against C keys."""

    keys: Tensor  # (C, D) or (R, C, D), ready to multiply
    place: Columns  # where the keys stand in their set; of a set per row: (rows, columns)
    drop: Tensor | None = None  # (R, C), bool: True where a pair is left out
    diagonals: tuple[int, ...] = ()  # diagonals of (R, C) to leave out besides; only without drop
    poison: Tensor | None = None  # (C,): NaN for a key that no query may meet, else 0
    few: Tensor | None = None  # the rows of ``drop`` that leave anything out, if these are few
    alike: Alike | None = None  # pairs that are left out besides; only without drop

    def logits(self, rows: Tensor, scratch: Scratch) -> Tensor:
        """rows (R, D) @ keys.T, -inf where left out; in ``scratch``."""
        if self.keys.dim() == 3:
            r, c, _ = self.keys.shape
            x = scratch(r, c)
            torch.bmm(self.keys, rows[:, :, None], out=x[:, :, None])
        else:
            x = torch.mm(rows, self.keys.T, out=scratch(len(rows), len(self.keys)))
        if self.poison is not None:
            x += self.poison
        for diagonal in self.diagonals:
            x.diagonal(diagonal).fill_(-math.inf)
        if self.alike is not None:
            x[self.alike] = -math.inf
        if self.drop is None:
            return x
        if self.few is None:
            return x.masked_fill_(self.drop, -math.inf)
        x[self.few] = x[self.few].masked_fill_(self.drop[self.few], -math.inf)
        return x

    def negatives(self, rows: int) -> Tensor:
        """How many of the tile's keys each of its rows meets, (R,), where only single pairs can tell."""
        if self.drop is not None and self.few is None:
            return self.keys.shape[-2] - self.drop.sum(1, dtype=torch.int32)  # int64, the default, takes twice as long
        columns = self.keys.shape[-2]
        count = torch.full((rows,), columns, dtype=torch.int64, device=self.keys.device)
        if self.alike is not None:
            count -= torch.bincount(self.alike.rows, minlength=rows)
            for diagonal in self.diagonals:
                count[max(0, -diagonal) : max(0, columns - diagonal)] -= 1
        if self.drop is not None and self.few is not None:
            count[self.few] -= self.drop[self.few].sum(1)
        return count

    def add_weighted(self, out: Tensor, weight: Tensor, first: bool) -> None:
        """out (R, D) += weight (R, C) @ keys; ``first``: ``out`` is written and not added to."""
        if self.keys.dim() == 3:
            out.unsqueeze(1).baddbmm_(weight[:, None, :], self.keys, beta=0 if first else 1)
        else:
            out.addmm_(weight, self.keys, beta=0 if first else 1)

    def add_transposed(self, out: Tensor, weight: Tensor, rows: Tensor, first: bool = False) -> None:
        """out[place] += weight.T (C, R) @ rows (R, D); ``first``: ``out`` is written and not added to."""
        part = out[self.place] if self.keys.dim() == 2 and isinstance(self.place, slice) else None
        if first and (part is None or len(part) < len(out)):
            out.zero_()
            first = False
        if part is not None:
            part.addmm_(weight.T, rows, beta=0 if first else 1)
        elif self.keys.dim() == 2:
            out.index_add_(0, self.place, weight.T @ rows)
        elif isinstance(self.place, Tensor):
            out.index_add_(0, self.place.flatten(), (weight[:, :, None] * rows[:, None, :]).flatten(0, 1))
        else:
            out[self.place] += weight[:, :, None] * rows[:, None, :]


class Block(NamedTuple):
    """Some rows and the tiles that together hold their negatives."""

    rows: slice
    tiles: Iterator[Tile]
    single: bool  # whether that is one tile; the same for every block of a pass


def blocks(
    queries: Tensor,  # (N, D)
    ready: Ready,
    row_hint: int = 256,  # rows that a tile should have at the least; fewer let more keys fit in one tile
) -> Iterator[Block]:
    """All rows once, each with all its negatives."""
    (n, d), (keys, pairs) = queries.shape, ready.keys[:2]
    cpu = keys.device.type == "cpu"
    if keys.dim() == 3:
        step, width = _split(n, keys.shape[1], TILE_ELEMENTS // d, 1)
        for rows in slices(n, step):
            parts = ((rows, columns) for columns in slices(keys.shape[1], width))
            yield Block(rows, (_own_tile(ready, keys[part], part, *part) for part in parts), width >= keys.shape[1])
    elif pairs.picked is not None and cpu and are_few(pairs.picked, len(keys)):
        c = pairs.picked.shape[1]
        step, width = _split(n, c, TILE_ELEMENTS // d, 1)
        for rows in slices(n, step):
            places = (pairs.picked[rows, columns] for columns in slices(c, width))
            yield Block(rows, (_own_tile(ready, keys[place], place, rows, place) for place in places), width >= c)
    elif pairs.band and cpu and is_narrow(pairs, n * len(keys)):  # only its columns
        yield from _band_blocks(n, ready)
    else:
        yield from _shared_blocks(n, ready, row_hint)


def _own_tile(ready: Ready, part: Tensor, place: Columns, rows: slice, columns: Columns) -> Tile:
    """A tile (R, C, D) of keys that are each query's own."""
    drop = _drop_by_pair(ready.keys.pairs, rows, columns)
    return Tile(ready(part, drop)[0], place, drop)


def _shared_blocks(n: int, ready: Ready, row_hint: int) -> Iterator[Block]:
    keys, pairs = ready.keys[:2]
    k = len(keys)
    if pairs.filled is not None and keys.device.type == "cpu":
        k = min(k, int(pairs.filled))
        pairs = pairs._replace(filled=None)
    alike = _alike(pairs, n, k) if keys.device.type == "cpu" else None
    if alike is not None:
        pairs = pairs._replace(query_ids=None, key_ids=None)
    step, width = _split(n, k, TILE_ELEMENTS, row_hint)
    whole = ready(keys[:k]) if width >= k else None  # every block of rows meets the same tile, which is prepared once
    for rows in slices(n, step):
        tiles = (
            _shared_tile(*(ready(keys[columns]) if whole is None else whole), pairs, rows, columns, alike)
            for columns in slices(k, width)
        )
        yield Block(rows, tiles, width >= k)


def mutual_tiles(z: Tensor, across: bool) -> Iterator[tuple[slice, Tile, bool]]:
    """All pairs of rows of z (2M, D) that are each other's negatives: rows, tile, and whether it is the rows' own.

    Rows i and i + M are one image's. ``across``: only rows of the other view are negatives. Each pair comes once, but
    for the rows' own tile, which has both of (i, j) and (j, i).
    """
    m = len(z) // 2
    pairs = Pairs(band=[0, m - 1, m])
    anchors = m if across else len(z)
    step, width = _split(anchors, anchors, TILE_ELEMENTS, 256)
    for rows in slices(anchors, step):
        if not across:
            yield rows, _shared_tile(z[rows], None, pairs, rows, rows), True
        for columns in slices(len(z), width, anchors if across else rows.stop):
            yield rows, _shared_tile(z[columns], None, pairs, rows, columns), False


def _shared_tile(
    keys: Tensor, poison: Tensor | None, pairs: Pairs, rows: slice, columns: slice, alike: Alike | None = None
) -> Tile:
    """A tile of keys that all rows share, with everything left out that ``pairs`` and ``alike`` name."""
    r, c = rows.stop - rows.start, len(keys)
    drop = _drop_by_pair(pairs, rows, columns)
    if pairs.picked is not None:
        local = pairs.picked[rows] - columns.start
        absent = torch.ones((r, c + 1), dtype=torch.bool, device=keys.device)  # the last column takes what is outside
        absent.scatter_(1, torch.where((local >= 0) & (local < c), local, c), False)
        drop = either(drop, absent[:, :c])
    if pairs.filled is not None:
        place = torch.arange(columns.start, columns.stop, device=keys.device)
        drop = either(drop, (place >= pairs.filled).expand(r, c))
    alike = None if alike is None else alike.within(rows, columns)
    if not pairs.band:
        return Tile(keys, columns, drop, (), poison, None if drop is None else _few_rows(drop), alike)
    offset, width, modulus = pairs.band
    if width < modulus - 1:
        ahead = torch.arange(columns.start - rows.stop + 1, columns.stop - rows.start, device=keys.device)
        outside = (ahead - (offset + 1)) % modulus >= width  # by how far the column is ahead of the row
        return Tile(keys, columns, either(drop, outside.unfold(0, c, 1).flip(0)), poison=poison)
    # Only the row's own place is left out, once in every modulus columns: that is a diagonal of the tile.
    first = (rows.start + offset - columns.start + r) % modulus - r
    diagonals = tuple(x for x in range(first, c, modulus) if x > -r)
    if drop is None:
        return Tile(keys, columns, None, diagonals, poison, alike=alike)
    for diagonal in diagonals:
        drop.diagonal(diagonal).fill_(True)
    return Tile(keys, columns, drop, poison=poison)


def _band_blocks(n: int, ready: Ready) -> Iterator[Block]:
    keys, pairs = ready.keys[:2]
    offset, width, modulus = pairs.band
    views = len(keys) // modulus
    step = max(1, min(_band_step(pairs), TILE_ELEMENTS // (views * (_band_step(pairs) + width))))
    view_start = torch.arange(views, device=keys.device)[:, None] * modulus
    for rows in slices(n, step):
        r = rows.stop - rows.start
        span = r + width - 1
        local = torch.arange(span, device=keys.device)
        place = (view_start + (rows.start + offset + 1 + local) % modulus).flatten()  # (views * span,)
        outside = ~torch.ones((r, span), dtype=torch.bool, device=keys.device).triu().tril(width - 1)
        drop = either(_drop_by_pair(pairs, rows, place), outside.repeat(1, views))
        unit, poison = ready(keys[place])
        yield Block(rows, iter([Tile(unit, place, drop, poison=poison)]), True)


def is_narrow(pairs: Pairs, similarities: int) -> bool:
    """Whether a band's own columns are worth several tiles instead of few with all of them."""
    return similarities > SMALL_ELEMENTS and pairs.band[1] + _band_step(pairs) < pairs.band[2]


def are_few(picked: Tensor, keys: int) -> bool:
    """Whether to fetch each query's picks takes less than a product with all keys: measured from 1024 to 4096 keys."""
    return picked.shape[1] * 64 < keys


def _band_step(pairs: Pairs) -> int:
    """Rows per tile of a band: each tile computes rows - 1 columns more than a row needs."""
    return max(128, pairs.band[1] // 2)


def _drop_by_pair(pairs: Pairs, rows: slice, columns: Columns) -> Tensor | None:
    """Which pairs ids and mask leave out, (R, C), or None where there are neither."""
    drop = None
    if pairs.query_ids is not None and pairs.key_ids is not None:
        drop = pairs.query_ids[rows, None] == _of_pairs(pairs.key_ids, rows, columns)
    if pairs.mask is not None:
        masked = ~_of_pairs(pairs.mask, rows, columns)
        drop = either(drop, masked.expand(rows.stop - rows.start, masked.shape[-1]))
    return drop


def _alike(pairs: Pairs, n: int, k: int) -> Alike | None:
    """Pairs of equal ids by a search, where it takes less than to compare all, and nothing else asks for single pairs.

    They are then so few that memory does not grow with N x K.
    """
    if pairs.query_ids is None or pairs.key_ids is None or pairs.key_ids.dim() == 2 or pairs.picked is not None:
        return None
    if pairs._replace(query_ids=None).by_pair or (pairs.band and pairs.band[1] < pairs.band[2] - 1):
        return None
    if n < SEARCH_ROWS or n * k < SEARCH_ELEMENTS:
        return None
    ids, order = pairs.query_ids.long().sort()
    values, times = ids.unique_consecutive(return_counts=True)
    most = MOST_ALIKE * (n + k)
    if n * k > most * len(values):  # too many, if keys have as many of each id as queries
        return None
    wanted = pairs.key_ids[:k].long().contiguous()
    at = torch.searchsorted(values, wanted).clamp_(max=len(values) - 1)
    columns = (values[at] == wanted).nonzero()[:, 0]
    at = at[columns]
    count = times[at]
    own = n * (k // pairs.band[2]) if pairs.band else 0
    if int(count.sum()) - own > most:
        return None
    before = (times.cumsum(0) - times)[at] - (count.cumsum(0) - count)
    columns = columns.repeat_interleave(count)
    rows = order[torch.arange(len(columns), device=order.device) + before.repeat_interleave(count)]
    if pairs.band:
        offset, _, modulus = pairs.band
        others = (rows + offset - columns) % modulus != 0
        rows, columns = rows[others], columns[others]
    return Alike(rows, columns)


def _few_rows(drop: Tensor) -> Tensor | None:
    """The rows of (R, C) with a True, if they are few. Eight pairs at a time are looked at, which is soon done."""
    if not drop.is_cpu or drop.shape[1] % 8 or drop.storage_offset() % 8 or not drop.is_contiguous():
        return None
    rows = drop.view(torch.int64).amax(1).nonzero()[:, 0]
    return rows if 4 * len(rows) < len(drop) else None


def _of_pairs(x: Tensor, rows: slice, columns: Columns) -> Tensor:
    """Part of ids or a mask, (K,) or (N, K), for some rows and columns: (C,) or (R, C)."""
    if x.dim() == 1:
        return x[columns]
    return x[rows].gather(1, columns) if isinstance(columns, Tensor) and columns.dim() == 2 else x[rows, columns]


def _split(n: int, k: int, elements: int, row_hint: int) -> tuple[int, int]:
    """Block sizes (rows, columns) of at most ``elements``: all the keys where they fit beside ``row_hint`` rows."""
    columns = max(1, min(k, elements // min(n, row_hint)))
    return max(1, min(n, elements // columns)), columns
