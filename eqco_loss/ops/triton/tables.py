"""The kernels' tiles, and the names of the planes in which they hand numbers to each other. Nothing here needs Triton.

A tile's size is how many rows a program keeps, how many it streams, its warps, and the stages of its pipeline, written
``64 x 128/4/2`` in comments. Each line says what it was chosen by: *measured* on an H200
(``python -m benchmarks.tune``), or by its *loop*, which ``python -m benchmarks.compile_report`` reads from the machine
code: no spill and no wait a product inside. The cases that were measured have the names of ``benchmarks/workloads.py``:
M1 is a queue, M2 a queue with ids, S1 the batch's other keys, and S2 both views of a batch. A time is one launch's.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

LITTLE_SHARED_MEMORY = (86, 89, 120, 121)  # 99 KB a block, which leaves no room for a second stage of everything
GRANULE = 64  # of queries and of keys, for which one bit tells whether ids are to be compared
BITS = 4  # of these in a word
# A unit row is multiplied by this before it is cut into two float16 numbers; the lower one would else lose bits, as
# subnormal numbers do.
PIECE_SCALE = 64.0


class Part(IntEnum):
    """The planes of ``parts`` (len(Part), splits, N): what one split of the keys saw of each row."""

    MAXIMUM = 0
    TOTAL = 1
    COUNT = 2
    INTER_MAXIMUM = 3
    INTER_TOTAL = 4
    RANK = 5
    LOGIT_SUM = 6


class TileSize(NamedTuple):
    resident: int  # rows that a program keeps
    streamed: int  # rows of a step of its loop
    warps: int
    stages: int  # of the loop's pipeline


def forward_tile(
    dtype: torch.dtype,
    block_d: int,
    n: int,
    arch: int,
    *,
    plain: bool,
    converts: bool = False,
    turned: bool = False,
    by_pair: bool = False,
    marks: bool = False,
    count: int = 3,
) -> TileSize:
    """The tile of ``attend`` for many keys, which are streamed.

    ``plain``: one softmax and its gradient, which leaves registers for more keys. ``converts``: keys of another dtype,
    which the kernel converts; ``turned``: these lie column by column, and turning a tile around takes registers;
    ``by_pair``: each pair is compared by ids or a mask; ``marks``: by ids, in tiles that ``ids.mark_alike`` marks;
    ``count``: of float32's pieces.
    """
    plain = plain and not turned
    rows, major = max(16, power_of_two(n)), arch // 10
    if dtype == torch.float32:
        return _tile_of_pieces(count, block_d, rows, major)
    narrow = major not in (9, 10)  # a warp multiplies on its own, with everything in registers
    warps = 8 if rows >= 128 else 4  # a warp has 16 whole rows, or on sm_90 four have 64
    if block_d <= 128:
        if major == 9 and marks:
            return TileSize(min(rows, 64), 64, 4, 3)  # measured: M2 57.3 us, 64 x 128/4/2 61.8, 64 x 64/4/2 63.4
        if major == 9 and not converts:
            # measured: M1 31, S1 43, S2 61 us; 128 x 128/8/2 40, 52, 69. Two temperatures and metrics by their loops:
            # 8.8 and 12.5 instructions a pair; 128 x 64/8/3 9.9 and 13.2. Ids measured, with all other launches of a
            # forward pass: M2 50.8 us by two stages, 55.9 by three.
            return TileSize(min(rows, 64), 128, 4, 2 if by_pair else 3)
        if major == 9 and plain:
            return TileSize(min(rows, 128), 128, warps, 3)  # measured: M1 of float32 keys 44.1 us; by two stages 51.5
        few_registers = turned and (narrow or arch in LITTLE_SHARED_MEMORY)
        resident = 64 if few_registers else min(rows, 128)
        return TileSize(min(rows, resident), 32 if narrow else 64, 4 if few_registers else warps, 3)  # by its loop
    if block_d <= 256:
        if narrow:
            return TileSize(min(rows, 64), 32, 4 if plain or rows < 64 else 8, 2)  # by its loop
        if major == 9 and rows >= 128 and not converts:
            return TileSize(128, 64, 8, 3)  # measured: S1 51.8 us; by two stages 55.5, 64 x 64/4/2 53.8
        return TileSize(min(rows, 128), 64 if rows >= 128 and (plain or major == 9) else 32, warps, 2)  # by its loop
    if arch in LITTLE_SHARED_MEMORY:
        return TileSize(min(rows, 32), 32, 8, 1)  # by its loop
    return TileSize(min(rows, 64), 32, 8, 2)  # by its loop


def _tile_of_pieces(count: int, block_d: int, rows: int, major: int) -> TileSize:
    """The tile where float32 is multiplied in pieces, by its loop.

    None spills inside up to D = 128, and on sm_90 hardly up to D = 256.
    """
    if block_d > 256:
        return TileSize(16, 16, 4, 1)
    if block_d > 128:
        if major == 9:
            return TileSize(min(rows, 64), 32 if count == 2 else 16, 4, 2)
        return TileSize(min(rows, 32), 32, 4, 1) if count == 2 else TileSize(16, 32, 8, 1)
    if block_d <= 64:
        return TileSize(min(rows, 64), 64 if count == 2 or major == 9 else 32, 4, 2)
    if major == 10:
        return TileSize(min(rows, 128), 32, 8 if rows >= 128 else 4, 2 if count == 2 else 1)
    if major == 9:
        return TileSize(min(rows, 64), 64 if count == 2 else 32, 4, 2)
    return TileSize(min(rows, 64 if count == 2 else 32), 32, 4, 2)


def small_tile(dtype: torch.dtype, block_d: int) -> TileSize:
    """The tile of ``attend`` where a block of rows meets few keys and finishes on its own."""
    if block_d > 256:
        return TileSize(16, 16 if dtype == torch.float32 else 32, 8, 1)  # by its loop
    return TileSize(16, 32 if block_d > 128 else 64, 4, 2)  # by its loop


def keys_tile(dtype: torch.dtype, block_d: int, k: int, arch: int, count: int = 3, marks: bool = False) -> TileSize:
    """The tile of ``keys_gradient``, where keys are resident and rows of the query streamed.

    ``marks``: only some tiles compare ids.
    """
    if dtype == torch.float32:
        return forward_tile(dtype, block_d, k, arch, plain=False, count=count)
    keys = max(16, power_of_two(k))
    if block_d <= 128:
        if arch // 10 == 9 and marks:
            return TileSize(min(keys, 64), 64, 4, 3)  # by its loop; 64 x 128/4/2 waits for each product
        if arch // 10 == 9:
            return TileSize(min(keys, 64), 128, 4, 2)  # measured: S1 35 us; 64 x 64/4/3 39
        return TileSize(min(keys, 64), 64, 4, 3)  # by its loop
    if block_d <= 256 and arch // 10 == 9:
        return TileSize(min(keys, 128), 64, 8 if keys >= 128 else 4, 3)  # measured: S1 51.8 us; by two stages 53.8
    return TileSize(min(keys, 64), 32, 4, 2) if block_d <= 256 else TileSize(min(keys, 32), 32, 8, 2)  # by their loops


def symmetric_tile(dtype: torch.dtype, block_d: int, n: int, arch: int) -> TileSize:
    """The tile of ``symmetric_rows``, whose rows are resident and streamed."""
    rows = max(16, power_of_two(n))
    if dtype != torch.float32 and arch // 10 == 9 and block_d <= 128:
        return TileSize(min(rows, 64), 128, 4, 2)  # measured: S2 84 us; 64 x 64/4/3 101. Spills outside its loop.
    if dtype != torch.float32 and arch // 10 == 9 and 128 < block_d <= 256:
        return TileSize(min(rows, 128), 64, 8 if rows >= 128 else 4, 2)  # by its loop: 12.1 a pair; 64 x 32/8/2 25.9
    if dtype != torch.float32 and 128 < block_d <= 256:
        return TileSize(min(rows, 64), 32, 8 if rows >= 64 else 4, 2)  # by its loop
    if dtype != torch.float32 and arch // 10 == 9 and block_d <= 512:
        return TileSize(min(rows, 64), 64, 8, 2)  # by its loop: HGMMA, where 32 resident rows are HMMA
    return keys_tile(dtype, block_d, n, arch, count=2)


def combine_tile(splits: int, block_d: int, gradient: bool) -> tuple[int, int]:
    """Rows a program of ``combine`` and splits that it loads at once, with four warps.

    Measured: M1 (66 splits) 5.8 us by one row and all splits, 12.4 with eight warps; S1 (4 splits) 15.0 by eight
    rows, 85 by one; S2 (without a gradient) 3.2 by eight rows, 25.5 by one.
    """
    at_once = min(power_of_two(splits), max(1, 2**14 // block_d))
    return (max(1, min(8, 2**12 // (at_once * block_d))) if gradient else 8), at_once


def pieces(dtype: torch.dtype, unit: bool) -> int:
    """Of how many halves the factors of a product are the sum, which are in ``dtype``; see ``parts.cut``.

    float32 takes two of float16 (three products) where all rows are unit ones, and three of bfloat16 (six products)
    for raw rows. Both are as exact as float32 itself, so torch.set_float32_matmul_precision changes nothing: TF32,
    which Triton cuts off instead of rounding, would have 10 bits.
    """
    return 1 if dtype != torch.float32 else 2 if unit else 3


def power_of_two(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()
