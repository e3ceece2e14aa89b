"""Pairs of equal ids, of which most tiles of queries and keys have none: a look at all of them, before the pass.

``mark_alike`` tells in which tiles a pass has to compare ids: ``marks`` has a word for each GRANULE of keys and BITS
GRANULEs of queries, with a bit for each of these.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from .tables import BITS as _BITS
from .tables import GRANULE as _GRANULE

GRANULE = tl.constexpr(_GRANULE)
BITS = tl.constexpr(_BITS)


@triton.jit(do_not_specialize=["n", "k"])
def mark_alike(query_ids, key_ids, stride_k, marks, n, k):
    """One word. Places beyond the last query or key are that one again, of which no bit is asked for."""
    keys = tl.minimum(tl.program_id(0) * GRANULE + tl.arange(0, GRANULE), k - 1)
    ids = tl.load(key_ids + keys.to(tl.int64) * stride_k)
    first = tl.program_id(1) * BITS * GRANULE
    found, bit = tl.zeros([GRANULE, GRANULE], tl.int32), 1
    for granule in tl.static_range(BITS):
        rows = tl.minimum(first + granule * GRANULE + tl.arange(0, GRANULE), n - 1)
        found = found | tl.where(tl.load(query_ids + rows)[:, None] == ids[None, :], bit, 0)
        bit = bit * 2
    word = tl.reduce(tl.reduce(found, 1, either), 0, either)
    tl.store(marks + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), word)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def may_be_alike(marks, n, row, last_row, key, last_key, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Whether pairs of equal ids may be among the rows row .. last_row, at most ROWS, and the keys key .. last_key."""
    found = 0
    for i in tl.static_range((KEYS + GRANULE - 2) // GRANULE + 1):  # as many GRANULEs as they may begin and end in
        words = marks + tl.minimum(key // GRANULE + i, last_key // GRANULE) * tl.cdiv(n, BITS * GRANULE)
        for j in tl.static_range((ROWS + GRANULE - 2) // GRANULE + 1):
            granule = tl.minimum(row // GRANULE + j, last_row // GRANULE)
            found = found | (tl.load(words + granule // BITS) >> granule % BITS)
    return found & 1 != 0


@triton.jit
def alike(row_ids, row_at, key_ids, key_at):
    """Which pairs have equal ids, (R, C). ``row_at`` and ``key_at``: places in the ids of rows and keys.

    Ids of 64 bits are compared by halves, which takes fewer registers. The address of all ids is cast, and not a tile's
    addresses, because Triton would go on to believe that those follow each other.
    """
    if row_ids.dtype.element_ty == tl.int64:
        rows, keys = row_ids.to(tl.pointer_type(tl.int32)), key_ids.to(tl.pointer_type(tl.int32))
        low = tl.load(rows + 2 * row_at)[:, None] == tl.load(keys + 2 * key_at)[None, :]
        return low & (tl.load(rows + 2 * row_at + 1)[:, None] == tl.load(keys + 2 * key_at + 1)[None, :])
    else:
        return tl.load(row_ids + row_at)[:, None] == tl.load(key_ids + key_at)[None, :]
