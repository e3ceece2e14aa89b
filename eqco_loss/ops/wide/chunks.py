"""Chunks of rows and of keys, their products, and the passes over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..calls import NORM_EPS, KeySet, Pairs, compute_dtype, gradient_eps, slices
from . import pointwise
from .pointwise import Raw, Seek, Tile

WORKSPACE = 2**25  # bytes that the similarities and weights of a chunk may take: they stay in the L2 of an H100
ROWS_OF_PRODUCTS = 512  # of a chunk, which an efficient product needs at the least
ROWS_OF_WEIGHTS = 4096  # the same where no similarity is stored: square chunks add to the gradients the fewest times


# ---------------------------------------------------------------------------------------------------------- the passes


class Passes:
    """Chunks of queries, each against all keys of one or two sets."""

    def __init__(
        self, query: Rows, sets: list[KeySet], scale: float | Tensor, products: torch.dtype, like: Tensor
    ) -> None:
        n, negatives = len(query.scale), [one.pairs.negatives(one.keys) for one in sets]
        self.known = None if None in negatives else sum(x for x in negatives if x is not None)  # K_i
        self.query, self.products, self.like = query, products, like
        self.sets = [one for one in sets if one.keys.shape[-2] > 0]
        self.logit_scale = query.scale * scale
        self.workspace = Workspace(like, products)
        self.keys = [self._prepared(one, one.keys) if one.keys.dim() == 2 else None for one in self.sets]
        repeated = not query.raw.normalize
        sizes = [chunk_size(n, one.keys.shape[-2], like, products, repeated) for one in self.sets]
        self.widths = [width for _, width in sizes]
        self.rows = slices(n, min([n, *(step for step, _ in sizes), *(own_rows(one.keys) for one in self.sets)]))

    def attend(self, some: slice, state: Tensor, seek: Seek, sums: Tensor | None) -> None:
        """All negatives of some queries into their state; to ``sums`` (R, D) of sum_j 2 ** (x_ij - MAXIMUM_i) n_j."""
        query, first = self.query.part(some), True
        for one, prepared, width in zip(self.sets, self.keys, self.widths, strict=True):
            k = one.keys.shape[-2]
            for columns in slices(k, k if prepared is None else width):
                keys = prepared.part(columns) if prepared else self._prepared(one, one.keys[some].flatten(0, 1))
                tile = self.workspace.tile(query, keys, self.logit_scale[some], one.pairs, some, columns)
                weights = None if sums is None else self.workspace.weights(tile.x)
                shrink = pointwise.fold(tile, state, seek, weights, first)
                if sums is not None and weights is not None:
                    if not first:
                        sums *= shrink[:, None]
                    _weighted_sum(weights, keys.multiplied, sums, add=not first)
                first = False
        if sums is not None and first:
            sums.zero_()

    def _prepared(self, one: KeySet, keys: Tensor) -> Rows:
        return prepare(keys, one.normalize, self.products, self.like, may_hold_anything(one))


class Workspace:
    """The memory of a tile's products and weights, the same for every tile."""

    def __init__(self, like: Tensor, products: torch.dtype) -> None:
        self.like, self.products = like, products
        self.buffers: dict[torch.dtype | None, Tensor] = {}

    def tile(self, query: Rows, keys: Rows, row_scale: Tensor, pairs: Pairs, rows: slice, columns: slice) -> Tile:
        """Queries (R, D) against keys (C, D), or against each query's own, (R * C, D)."""
        r, c = rows.stop - rows.start, columns.stop - columns.start
        x = self.matrix(None, r, c)
        if len(keys.multiplied) == c:
            product(query.multiplied, keys.multiplied.T, x)
        else:
            product(keys.multiplied.view(r, c, -1), query.multiplied[:, :, None], x[:, :, None])
        scale = keys.scale if len(keys.scale) == c else keys.scale.view(r, c)
        return Tile(x, row_scale, scale, _cut(pairs, rows, columns), rows.start, columns.start)

    def weights(self, x: Tensor) -> Tensor:
        return self.matrix(self.products, *x.shape)

    def matrix(self, weights: torch.dtype | None, r: int, c: int) -> Tensor:
        """(r, c), of ``weights`` or of products; its rows are 8 elements aligned, as a fast product asks."""
        stride = c + 7 & -8
        buffer = self.buffers.get(weights)
        if buffer is None or buffer.numel() < r * stride:
            self.buffers[weights] = buffer = self.like.new_empty(r * stride, dtype=weights or self.like.dtype)
        return buffer[: r * stride].view(r, stride)[:, :c]


def _cut(pairs: Pairs, rows: slice, columns: slice) -> Pairs:
    """The pairs of some rows and keys, those that were picked as a mask."""

    def cut(x: Tensor | None) -> Tensor | None:
        return x if x is None else x[columns] if x.dim() == 1 else x[rows, columns]

    ids = None if pairs.query_ids is None else pairs.query_ids[rows]
    mask, c = cut(pairs.mask), columns.stop - columns.start
    if pairs.picked is not None:
        place = pairs.picked[rows] - columns.start
        inside = torch.where((place >= 0) & (place < c), place, c)  # the last column takes what is elsewhere
        keep = torch.zeros((len(place), c + 1), dtype=torch.bool, device=place.device).scatter_(1, inside, True)[:, :c]
        mask = keep if mask is None else keep & mask
    return Pairs(ids, cut(pairs.key_ids), mask, pairs.filled, None, pairs.band)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """a @ b, of matrices or of batches of them, into ``out`` or added to it, in its dtype and without rounding."""
    batch, half = a.dim() == 3, a.dtype != out.dtype
    if half and not (a.is_cuda and multiplies_to_float32(a.dtype, a.device.index)):
        a, b, half = a.to(out.dtype), b.to(out.dtype), False
    if not half:
        (out.baddbmm_ if batch else out.addmm_)(a, b, beta=int(add))
    elif not add:
        (torch.bmm if batch else torch.mm)(a, b, out.dtype, out=out)
    elif batch or not _adds_in_float32(a.device.index):
        out += (torch.bmm if batch else torch.mm)(a, b, out.dtype)
    else:
        torch.addmm(out, a, b, out.dtype, out=out)


def multiplies_to_float32(dtype: torch.dtype, index: int | None) -> bool:
    """Whether a device's products of halves come out in float32: torch refuses that to some GPUs and settings."""
    if dtype == torch.bfloat16:
        return _capability(index) >= (8, 0)
    return not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)  # which may change at any time


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _adds_in_float32(index: int | None) -> bool:
    """Whether addmm adds a product of half matrices to a float32 one: torch 2.8 wants that to be half as well."""
    like = torch.zeros((1, 1), device=f"cuda:{index}")
    half = like.bfloat16()
    try:
        torch.addmm(like, half, half, like.dtype, out=like)
    except RuntimeError:
        return False
    return True


def _weighted_sum(weights: Tensor, keys: Tensor, out: Tensor, add: bool) -> None:
    """out_i = sum_j weights_ij keys_j, where keys are (C, D) or, each query's own, (R * C, D)."""
    r, c = weights.shape
    if len(keys) == c:
        product(weights, keys, out, add)
    else:
        product(weights[:, None], keys.view(r, c, -1), out[:, None], add)


# ------------------------------------------------------------------------------------------------- rows and their scale


class Rows(NamedTuple):
    """Rows as they lie, and as they are multiplied: ``multiplied * scale`` are the unit rows, or the raw ones."""

    raw: Raw  # with zeros for a row that is not finite and may be left out
    multiplied: Tensor  # (L, D), in the products' dtype
    scale: Tensor  # (L,); NaN for a row that is not finite and may be left out

    def part(self, some: slice) -> Rows:
        return Rows(self.raw.part(some), self.multiplied[some], self.scale[some])


def prepare(x: Tensor, normalize: bool, products: torch.dtype, like: Tensor, clean: bool = False) -> Rows:
    """``clean``: a row that is not finite becomes zeros, because 0 * NaN is NaN, and its scale tells who meets it."""
    if like.dtype == torch.float32 and x.dtype == torch.float64:
        x = x.to(like.dtype)
    finite = None
    if clean:
        lowest, highest = x.aminmax(dim=1)
        finite = lowest.isfinite() & highest.isfinite()
        x = torch.where(finite[:, None], x, 0.0)
    measured = pointwise.measured(x, products, like) if normalize else None
    if not normalize:
        multiplied, scale = x.to(products), like.new_ones(len(x))
        inverse = gradient_inverse = scale
    elif measured is not None:
        multiplied, inverse, gradient_inverse, scale = measured
    else:
        norm = torch.linalg.vector_norm(x, dim=1, dtype=like.dtype)
        inverse, gradient_inverse = 1 / norm.clamp_min(NORM_EPS), 1 / norm.clamp_min(gradient_eps(x.dtype))
        if products != x.dtype:
            multiplied = torch.mul(x, inverse[:, None], out=torch.empty_like(x, dtype=products))
            scale = torch.ones_like(inverse)
        elif products != torch.float16:
            multiplied, scale = x, inverse
        else:  # the weights hold the scale, which float16 can if it is about 1: a power of two costs no accuracy
            power = norm.clamp_min(2.0**-24).log2().floor().neg().exp2()
            multiplied = torch.mul(x, power[:, None], out=torch.empty_like(x))
            scale = (inverse / power).clamp_max(1.0)  # more than 1 only for rows of zeros
    if finite is not None:
        scale = torch.where(finite, scale, math.nan)
    return Rows(Raw(x, inverse, gradient_inverse, normalize), multiplied, scale)


def may_hold_anything(one: KeySet) -> bool:
    """Whether a key may be NaN or infinite and yet left out."""
    return one.pairs.by_pair and not one.trusted


def product_dtype(autocast: torch.dtype | None, query: Tensor, *keys: Tensor) -> torch.dtype:
    """What is multiplied: autocast's dtype, or the one that holds all; float64 stays itself."""
    if query.dtype == torch.float64:
        return torch.float64
    if autocast is not None:
        return autocast
    widest = functools.reduce(torch.promote_types, (x.dtype for x in keys), query.dtype)
    return torch.float32 if widest == torch.float64 else widest


def fitting(pull: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows' weights that float16 can hold, and what they must be multiplied by, (); None where any dtype does."""
    if products != torch.float16:
        return pull, None
    largest = pull.abs().amax()
    largest = torch.where(largest > 0, largest, 1.0)
    return pull / largest, largest


def chunk_size(
    n: int, k: int, like: Tensor, products: torch.dtype, repeated: bool = False, stored: bool = True
) -> tuple[int, int]:
    """How many rows and how many keys a chunk has.

    ``repeated``: the number of rows depends on n alone, so that forward and backward, which do not see the same sets
    of keys, multiply matrices of the same shapes. A BLAS library sums in another order for another shape, and a large
    logit that backward rounds otherwise than forward did gives a wrong softmax. Unit rows have no large logits.
    ``stored``: the similarities are; else only weights.
    """
    pairs = WORKSPACE // (pointwise.bytes_a_pair(like, products) if stored else products.itemsize)
    width = max(128, pairs // min(n, ROWS_OF_PRODUCTS if stored else ROWS_OF_WEIGHTS))
    width = _equal(k, width)
    return _equal(n, ROWS_OF_PRODUCTS if repeated else max(1, pairs // width)), width


def _equal(length: int, most: int) -> int:
    """The length of equal chunks that have at most ``most``, in whole tiles of a product where these are smaller."""
    if most >= length:
        return length
    most = most & -128 if most > 128 else most
    even = -(-length // -(-length // most))
    return min(most, even + 127 & -128)


def own_rows(keys: Tensor) -> int:
    """How many queries a chunk has that have keys (N, K, D) of their own."""
    return max(1, WORKSPACE // (3 * 4 * keys[0].numel())) if keys.dim() == 3 else len(keys)


def met_once(n: int, across: bool, step_and_width: tuple[int, int]) -> Iterator[tuple[slice, Iterator[slice]]]:
    """Chunks of rows, and of the keys that each of them meets, such that every pair of rows comes once.

    Where both views' rows are keys, a row's keys begin with its own chunk, which has both of (i, j) and (j, i).
    """
    anchors, (step, width) = n // 2 if across else n, step_and_width
    for first in range(0, anchors, max(1, n // 2)):  # no chunk has rows of both views
        for some in slices(first + n // 2, step, first):
            yield some, slices(n, width, anchors if across else some.start)


def shared_with(rows: slice, columns: slice) -> int:
    """How many of the keys, the first ones, are among the rows."""
    found: int = max(0, min(rows.stop, columns.stop) - columns.start)
    return found


def arithmetic(query: Tensor) -> Tensor:
    """An empty tensor of the arithmetic's dtype and device, which others are made like."""
    return query.new_empty(0, dtype=compute_dtype(query))
