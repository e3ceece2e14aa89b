"""What every launch needs to know: the kernels, the device, dtypes, and arguments as kernels take them."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls import KeySet, Pairs
from ..launcher import interpreted as interpreted
from ..launcher import launch, multiprocessors
from .tables import BITS, GRANULE, LITTLE_SHARED_MEMORY, TileSize, power_of_two


class Kernels(NamedTuple):
    """The kernels' modules, and Triton's language."""

    forward: ModuleType
    ids: ModuleType
    keys: ModuleType
    own: ModuleType
    symmetric: ModuleType
    language: Any
    version: str


@functools.cache
def kernels() -> Kernels:
    """The only import of Triton."""
    import triton

    from . import forward, ids, keys, own, symmetric

    return Kernels(forward, ids, keys, own, symmetric, triton.language, triton.__version__)


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def dot_dtype(query: torch.dtype, keys: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """What is multiplied: autocast's dtype, or the one that holds both."""
    return torch.promote_types(query, keys) if autocast is None else autocast


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients as forward leaves them, which backward multiplies.

    bfloat16's are rounded once, as grad is mostly 1 or a power of two; float16's might not fit before a loss scale.
    """
    return dtype if dtype == torch.bfloat16 else torch.float32


class KeyFacts(NamedTuple):
    """What of a set of keys decides how it is visited."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    band: tuple[int, ...]  # () for none
    picked: int  # for each query, 0 if none are
    ids: int  # dimensions of the keys' ids, 0 where there are none
    masked: int  # the same of the mask
    normalize: bool
    clean: bool  # whether keys that are left out may hold NaN, and so must not enter a product

    @property
    def own(self) -> bool:
        return len(self.shape) == 3 or self.picked > 0

    @property
    def columns(self) -> int:
        """How many keys each query has of its own."""
        return self.picked or self.shape[1]

    @property
    def wide(self) -> bool:
        return _span(self.shape, self.strides) >= 2**31


class Device(NamedTuple):
    """What of a device decides how a kernel is cut."""

    arch: int  # compute capability x 10
    multiprocessors: int
    warps: float = 8  # that a launch should give every multiprocessor; ``benchmarks.tune`` tries others

    def fitting(self, tile: TileSize, one: KeyFacts | None = None) -> TileSize:
        """The tile, without a pipeline where there is no room for one."""
        by_pair = one is not None and 2 in (one.ids, one.masked)
        return tile._replace(stages=1) if by_pair or self.arch in LITTLE_SHARED_MEMORY else tile

    def wave(self, tile: TileSize, blocks: int) -> int:
        """How many splits of so many blocks give every multiprocessor so many warps."""
        return max(1, int(self.warps * self.multiprocessors) // (tile.warps * blocks))


def device(x: Tensor) -> Device:
    return Device(arch(x), parallel(x))


def facts(one: KeySet) -> KeyFacts:
    pairs, keys = one.pairs, one.keys
    return KeyFacts(
        shape=keys.shape,
        strides=keys.stride(),
        dtype=keys.dtype,
        band=tuple(pairs.band),
        picked=0 if pairs.picked is None else pairs.picked.shape[1],
        ids=pairs.key_ids.dim() if pairs.query_ids is not None and pairs.key_ids is not None else 0,
        masked=0 if pairs.mask is None else pairs.mask.dim(),
        normalize=one.normalize,
        clean=pairs.by_pair and not one.trusted,
    )


def left_out(pairs: Pairs) -> tuple[Any, ...]:
    """Query ids, key ids with their strides, and mask with its strides; None and zeros where there are none."""
    query_ids, key_ids, mask = pairs.query_ids, pairs.key_ids, pairs.mask
    if not pairs.by_pair:
        return None, None, 0, 0, None, 0, 0
    if query_ids is None or key_ids is None:
        query_ids, key_ids = None, None
    elif query_ids.dtype != key_ids.dtype:  # Triton would compare int8's -1 as 255
        query_ids, key_ids = query_ids.long(), key_ids.long()
    if query_ids is not None:
        query_ids = query_ids.contiguous()
    mask = None if mask is None else mask.view(torch.uint8)
    return query_ids, key_ids, *_two_strides(key_ids), mask, *_two_strides(mask)


def marked(left: tuple[Any, ...], n: int, k: int) -> Tensor:
    """In which tiles a pass has to compare the ids of ``left_out``."""
    query_ids, key_ids, _, stride, *_ = left
    grid = blocks_of(k, GRANULE), blocks_of(n, BITS * GRANULE)
    marks = torch.empty(grid, dtype=torch.int32, device=query_ids.device)
    launch(kernels().ids.mark_alike, grid, query_ids, key_ids, stride, marks, n, k, num_warps=4)
    return marks


def _two_strides(x: Tensor | None) -> tuple[int, int]:
    """Both strides of an (N, K) tensor; of (K,), which all rows share, the first is 0."""
    if x is None:
        return 0, 0
    return (0, x.stride(0)) if x.dim() == 1 else (x.stride(0), x.stride(1))


def piece_dtype(dtype: torch.dtype, count: int) -> torch.dtype:
    return {1: dtype, 2: torch.float16, 3: torch.bfloat16}[count]


def strides_of(x: Tensor) -> tuple[int, ...]:
    """The three strides of (PIECES, R, D); of (R, D), a single piece, the first is 0."""
    return x.stride() if x.dim() == 3 else (0, *x.stride())


def triton_dtype(dtype: torch.dtype) -> Any:
    tl = kernels().language
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def needs_64_bits(x: Tensor) -> bool:
    """Whether offsets into it need 64 bits."""
    return _span(x.shape, x.stride()) >= 2**31


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def parallel(x: Tensor) -> int:
    return multiprocessors(x.device.index) if x.device.type == "cuda" else 4


def arch(x: Tensor) -> int:
    major, minor = capability(x.device.index) if x.device.type == "cuda" else (9, 0)
    return 10 * major + minor


def padded(d: int) -> int:
    return max(16, power_of_two(d))


def blocks_of(length: int, block: int) -> int:
    return -(-length // block)
