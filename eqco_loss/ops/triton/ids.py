"""Pairs of equal ids, of which most tiles of queries and keys have none: a look at all of them, before the pass.

``code_ids`` gives each id a code, the first query that has it, so that a pass compares 32 bits whatever an id is, and
tells in which tiles a pass has to compare at all. All of it is in one array, ``coded``: the codes of the k keys, those
of the n queries, and then words, for each GRANULE of keys a bit for each GRANULE of queries.
"""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from .tables import BITS as _BITS
from .tables import GRANULE as _GRANULE

GRANULE = tl.constexpr(_GRANULE)
BITS = tl.constexpr(_BITS)
NONE = tl.constexpr(2**30)  # the code of a key whose id no query has


@triton.jit(do_not_specialize=["n", "k"])
def code_ids(query_ids, key_ids, stride_k, coded, n, k):
    """A program for each GRANULE of keys, and then for each of queries."""
    blocks, block = tl.cdiv(k, GRANULE), tl.program_id(0)
    of_keys = block < blocks
    place = tl.where(of_keys, block, block - blocks) * GRANULE + tl.arange(0, GRANULE)
    if of_keys:
        ids = tl.load(key_ids + tl.minimum(place, k - 1).to(tl.int64) * stride_k)
    else:
        ids = tl.load(query_ids + tl.minimum(place, n - 1))
    codes = tl.full([GRANULE, GRANULE], NONE, tl.int32)
    for base in range(0, n, BITS * GRANULE):
        found, bit = tl.zeros([GRANULE, GRANULE], tl.int32), 1
        for start in tl.range(base, tl.minimum(base + BITS * GRANULE, n), GRANULE, loop_unroll_factor=2):
            rows = tl.minimum(start + tl.arange(0, GRANULE), n - 1)
            equal = tl.load(query_ids + rows)[:, None] == ids[None, :]
            codes = tl.minimum(codes, tl.where(equal, rows[:, None], NONE))
            found = found | tl.where(equal, bit, 0)
            bit = bit * 2
        if of_keys:
            word = tl.reduce(tl.reduce(found, 1, either), 0, either)
            tl.store(coded + k + n + block * words_of(n) + base // (BITS * GRANULE), word)
    at = tl.where(of_keys, 0, k) + place
    tl.store(coded + at, tl.min(codes, 0), mask=place < tl.where(of_keys, k, n))


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def words_of(n):
    """How many words tell of one GRANULE of keys."""
    return tl.cdiv(n, BITS * GRANULE)


@triton.jit
def may_be_alike(coded, n, k, row, last_row, key, last_key, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Whether pairs of equal ids may be among the rows row .. last_row and the keys key .. last_key.

    ROWS and KEYS: of how many GRANULEs these may be.
    """
    found = 0
    for i in tl.static_range(KEYS):
        words = coded + k + n + tl.minimum(key // GRANULE + i, last_key // GRANULE) * words_of(n)
        for j in tl.static_range(ROWS):
            granule = tl.minimum(row // GRANULE + j, last_row // GRANULE)
            found = found | (tl.load(words + granule // BITS) >> granule % BITS)
    return found & 1 != 0
