"""The operators by Triton kernels: the same functions of tensors as ``torch_backend``, and what they cannot serve."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tiles import Pairs
from .torch_backend import Stat, norm_eps

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_D, LARGEST_K = 512, 2**24
OLDEST_TRITON = (3, 3)
LITTLE_SHARED_MEMORY = (86, 89, 120, 121)  # 99 KB a block: no room for more than one stage of everything
_CONVERSIONS = 16  # more blocks of rows than these do not convert the keys each for itself: a copy costs less
_COLUMNS_AT_ONCE = 1024  # up to so many, a block of rows finishes on its own


class Config(NamedTuple):
    """A kernel's tile: rows resident and rows streamed, warps, stages of the pipeline."""

    resident: int
    streamed: int
    warps: int
    stages: int


# ------------------------------------------------------------------------------------------------------ what is served


@functools.cache
def kernels() -> ModuleType:
    """The only import of Triton."""
    from . import triton_kernels

    return triton_kernels


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors, as TRITON_INTERPRET=1 asks at the first use."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


def refusal(query: Tensor, *keys: Tensor | None) -> str | None:
    """Why this backend cannot serve these tensors; None if it can."""
    refused: str | None = _refusal_of(query.device.type, query.device.index)
    if refused is not None:
        return refused
    for x in (query, *keys):
        if x is not None and x.dtype not in DTYPES:
            return f"{str(x.dtype).removeprefix('torch.')}: the kernels take float16, bfloat16 and float32"
        if x is not None and x.shape[-2] > LARGEST_K:
            return f"K = {x.shape[-2]}: the kernels take up to 2^24"
    if query.shape[1] > LARGEST_D:
        return f"D = {query.shape[1]}: the kernels take up to {LARGEST_D}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _refusal_of(device: str, index: int | None) -> str | None:
    """The same of a device."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch on Linux)"
    if device == "cpu":
        reason = "CPU tensors (TRITON_INTERPRET=1 runs the kernels on them, in Triton's interpreter, to test)"
        return None if interpreted() else reason
    if device != "cuda":
        return f"{device} tensors: the kernels are for CUDA"
    if torch.version.hip is not None:
        return "ROCm: the kernels are made for NVIDIA"
    major, minor = _capability(index)
    if major < 8:
        return f"compute capability {major}.{minor}: the kernels need 8.0 (Ampere) or newer"
    version: str = kernels().triton.__version__
    old = tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON
    return f"Triton {version}: the kernels need 3.3, that of torch 2.7, or newer" if old else None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def dot_dtype(query: Tensor, keys: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """What is multiplied: autocast's dtype, or the one that holds both."""
    return torch.promote_types(query.dtype, keys.dtype) if autocast is None else autocast


# ------------------------------------------------------------------------------------------------------- static tables


def forward_config(dtype: torch.dtype, block_d: int, n: int, arch: int, plain: bool) -> Config:
    """Tile of ``attend`` for many keys: rows of the query are resident, keys streamed.

    ``plain``: one softmax and its gradient, which leaves registers for more keys.
    """
    rows = max(16, _power_of_two(n))
    if precision(dtype) == "tf32x3":
        if block_d <= 64:
            return Config(min(rows, 64), 32, 4, 2)
        if block_d <= 128:
            return {9: Config(min(rows, 64), 16, 4, 1), 10: Config(min(rows, 64), 32, 8, 1)}.get(
                arch // 10, Config(min(rows, 32), 16, 4, 1)
            )
        return Config(16, 16 if block_d > 256 else 32, 8, 1)
    if precision(dtype) == "tf32":
        if block_d <= 128:
            return Config(min(rows, 64), 32, 4, 2)
        return Config(min(rows, 32), 32, 8, 1) if block_d <= 256 else Config(16, 16, 8, 1)
    narrow = arch // 10 not in (9, 10)  # a warp multiplies on its own: all in registers
    warps = 8 if rows >= 128 else 4  # a warp, or on sm_90 four, has 16 or 64 whole rows
    if block_d <= 128:
        wide = plain and arch // 10 == 9
        return Config(min(rows, 128), 128 if wide else 32 if narrow else 64, warps, 2 if wide else 3)
    if block_d <= 256:
        if narrow:
            return Config(min(rows, 64), 32, 4 if plain or rows < 64 else 8, 2)
        return Config(min(rows, 128), 64 if rows >= 128 and (plain or arch // 10 == 9) else 32, warps, 2)
    return Config(min(rows, 32), 32, 8, 1) if arch in LITTLE_SHARED_MEMORY else Config(min(rows, 64), 32, 8, 2)


def small_config(dtype: torch.dtype, block_d: int) -> Config:
    """Tile of ``attend`` where a block of rows meets few keys and finishes on its own."""
    if block_d > 256:
        return Config(16, 16 if dtype == torch.float32 else 32, 8, 1)
    return Config(16, 32 if block_d > 128 else 64, 4, 2)


def keys_config(dtype: torch.dtype, block_d: int, k: int, arch: int, both: bool = False) -> Config:
    """Tile of ``keys_gradient``, or of ``both_roles``: keys are resident, rows of the query streamed."""
    if dtype == torch.float32:
        return forward_config(dtype, block_d, k, arch, False)
    keys = max(16, _power_of_two(k))
    if block_d <= 128:
        return Config(min(keys, 64), 64, 4, 3)
    if block_d <= 256:
        return Config(min(keys, 64), 32, 8 if both and keys >= 64 else 4, 2)
    return Config(min(keys, 32), 32, 8, 2)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied, as torch.set_float32_matmul_precision says: "highest" in three products of tf32."""
    if dtype != torch.float32:
        return "ieee"
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # newer torch: knows of the older setting too
    if chosen is None:
        chosen = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32x3" if chosen in ("ieee", "none") else "tf32"


# ---------------------------------------------------------------------------------------------------------- operators


class _Set(NamedTuple):
    """One set of negatives as the kernels take it."""

    keys: Tensor
    pairs: Pairs
    normalize: bool
    config: Config
    columns: int  # per view
    views: int
    chunk: int
    splits: int  # of all views

    @property
    def own(self) -> bool:
        return self.keys.dim() == 3 or self.pairs.picked is not None


def row_losses(
    query: Tensor,  # (N, D)
    positive: Tensor,  # (N, D)
    keys: Tensor,  # (K, D) or (N, K, D)
    extra_keys: Tensor | None,
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
    need_statistics: bool,
    share: float = 1.0,
    autocast: torch.dtype | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d = query.shape
    asked = need_query_gradient, need_query_gradient and inter_temperature is None and not need_statistics
    sets = [_set(query, keys, pairs, normalize_keys, autocast, config, *asked)]
    if extra_keys is not None:
        sets.append(_set(query, extra_keys, extra_pairs, normalize_extra, autocast, config, *asked))
    new = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    loss, stats = new(n), new(len(Stat), n)
    query_gradient = new((n, d) if need_query_gradient else (0,))
    positive_gradient = new((n, d) if need_positive_gradient else (0,))
    options = {
        "LEARNED": isinstance(temperature, Tensor),
        "NORMALIZE": normalize,
        "ALPHA": alpha is not None,
        "DUAL": inter_temperature is not None,
        "QUERY_GRADIENT": need_query_gradient,
        "POSITIVE_GRADIENT": need_positive_gradient,
        "STATISTICS": need_statistics,
    }
    # Of integers, Triton would compile kernels of their own.
    numbers = (float(inter_temperature or 1.0), float(alpha or 1.0), share)
    out = (loss, query_gradient, positive_gradient, stats)
    finish = len(sets) == 1 and sets[0].splits == 1 and (sets[0].own or sets[0].config.resident * d <= 8192)
    _attend(query, positive, sets, temperature, numbers, out, autocast, options, finish)
    return loss, query_gradient, positive_gradient, stats


def negatives_logsumexp(
    query: Tensor,
    keys: Tensor,
    pairs: Pairs,
    temperature: float | Tensor,
    need_query_gradient: bool,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    n, d = query.shape
    new = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    lse, mean_key = new(n), new((n, d) if need_query_gradient else (0,))
    options = dict.fromkeys(("NORMALIZE", "ALPHA", "DUAL", "POSITIVE_GRADIENT", "STATISTICS"), False)
    options |= {"LEARNED": isinstance(temperature, Tensor), "QUERY_GRADIENT": need_query_gradient}
    sets = [_set(query, keys, pairs, False, autocast, None, need_query_gradient, need_query_gradient)]
    out = (lse, mean_key, mean_key, lse)
    _attend(query, query, sets, temperature, (1.0, 1.0, 1.0), out, autocast, options, None)
    return lse, mean_key


def logsumexp_keys_gradient(
    query: Tensor,
    keys: Tensor,
    grad: Tensor,  # (N,)
    weight: Tensor,  # (N,)
    lse: Tensor,
    pairs: Pairs,
    temperature: float | Tensor,
    normalize: bool,
    normalize_keys: bool,
    share: float = 1.0,
    autocast: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """Gradient of share * sum_i grad_i weight_i lse_i with respect to the raw keys, in their shape and dtype."""
    (n, d), device = query.shape, query.device
    block_d = _block_d(d)
    dtype = dot_dtype(query, keys, autocast)
    own = keys.dim() == 3 or pairs.picked is not None
    wanted = query.dtype if own else dtype
    per_row, prepared = _row_weights(query, grad, weight, lse, temperature, normalize, share, wanted)
    out = torch.empty(keys.shape, dtype=keys.dtype, device=device)
    query_ids, key_ids, ids, ids_strides = _ids(pairs, query)
    common = (per_row, query_ids, key_ids, *ids_strides)
    eps = norm_eps(keys.dtype)
    if keys.dim() == 3:
        k, block = keys.shape[1], 32
        kernels().keys_gradient_own[(n * _blocks(k, block),)](
            query, *query.stride(), keys, *keys.stride(), *common, out, n, k, _blocks(k, block), eps,
            D=d, BLOCK_KEYS=block, BLOCK_D=block_d, IDS=ids != 0, NORM=normalize_keys, enable_fp_fusion=True,
        )  # fmt: skip
    elif pairs.picked is not None:
        by_key, order = torch.sort(pairs.picked.flatten(), stable=True)
        starts = torch.searchsorted(by_key, torch.arange(len(keys) + 1, device=device))
        kernels().keys_gradient_picked[(len(keys),)](
            query, *query.stride(), keys, *keys.stride(), per_row, order, starts, *common[1:], out,
            n, len(keys), pairs.picked.shape[1], eps,
            D=d, BLOCK_ROWS=32, BLOCK_D=block_d, IDS=ids != 0, NORM=normalize_keys, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        offset, width, modulus = pairs.band or (0, 0, 1)
        per_view = modulus if pairs.band else len(keys)
        tile = config or keys_config(dtype, block_d, per_view, _arch(query))
        if _arch(query) in LITTLE_SHARED_MEMORY or ids == 2:
            tile = tile._replace(stages=1)
        band = 0
        if pairs.band:
            band = 1 if n == modulus or width + tile.resident < n else 2
        blocks_per_view = _blocks(per_view, tile.resident)
        blocks = blocks_per_view * (len(keys) // per_view)
        columns = _blocks(width + tile.resident - 1 if band == 1 else n, tile.streamed)
        per_split, splits = _keys_splits(columns, blocks, tile, query)
        whole = splits == 1 and not normalize_keys  # the unit vectors' own gradient needs registers that are not there
        parts = out if whole else torch.empty((splits, *keys.shape), dtype=torch.float32, device=device)
        kernels().keys_gradient[(blocks, splits)](
            prepared, *prepared.stride(), keys, *keys.stride(), per_row, _largest(per_row, dtype),
            *common[1:], *_count(pairs, query), parts,
            n, len(keys), offset, width, modulus, blocks_per_view, per_split * tile.streamed, eps,
            D=d, BLOCK_KEYS=tile.resident, BLOCK_ROWS=tile.streamed, BLOCK_D=block_d, BAND=band, WHOLE=n == modulus,
            SMALL=modulus < tile.streamed, IDS=ids, NORM=normalize_keys, COUNTED=pairs.valid_count is not None,
            PRESCALE=dtype == torch.float16, PRECISION=precision(dtype), STAGES=tile.stages, WIDE=_wide(prepared),
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if not whole:
            _merge_splits(parts, keys, out, splits, normalize_keys)
    return out


def both_roles_gradient(
    z: Tensor,  # (2M, D): rows i and i + M are one image's views
    grad: Tensor,  # (2M,)
    weight: Tensor,
    lse: Tensor,
    similarity: Tensor,  # (2M,), to the positive
    across: bool,
    temperature: float | Tensor,
    normalize: bool,
    share: float = 1.0,
    autocast: torch.dtype | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of share * sum_i grad_i loss_i in both directions, every role of every row in one pass; and for t."""
    n, d = z.shape
    dtype = z.dtype if autocast is None else autocast
    per_row, prepared = _row_weights(z, grad, weight, lse, temperature, normalize, share, dtype)
    tile = config or keys_config(dtype, _block_d(d), n, _arch(z), True)
    if _arch(z) in LITTLE_SHARED_MEMORY:
        tile = tile._replace(stages=1)
    out, (number, tensor) = torch.empty((n, d), dtype=z.dtype, device=z.device), _temperature(temperature, z)
    learned = isinstance(temperature, Tensor)
    blocks = 2 * _blocks(n // 2, tile.resident) if across else _blocks(n, tile.resident)
    columns = (1 if across else 2) * _blocks(n // 2 + tile.resident - 2, tile.streamed)
    per_split, splits = _keys_splits(columns, blocks, tile, z)
    parts = out if splits == 1 else torch.empty((splits, n, d), dtype=torch.float32, device=z.device)
    along = torch.empty((splits, n) if learned else (0,), dtype=torch.float32, device=z.device)
    kernels().both_roles[(blocks, splits)](
        prepared, *prepared.stride(), z, *z.stride(), per_row, _largest(per_row, dtype), tensor, parts, along,
        n, n // 2, per_split * tile.streamed, number, norm_eps(z.dtype),
        D=d, BLOCK_ROWS=tile.resident, BLOCK_KEYS=tile.streamed, BLOCK_D=_block_d(d), ACROSS=across,
        NORMALIZE=normalize, LEARNED=learned, ONE_EXP=normalize and not learned and temperature >= 0.05,
        SMALL=n // 2 < tile.streamed,
        PRESCALE=dtype == torch.float16, PRECISION=precision(dtype), STAGES=tile.stages, WIDE=_wide(prepared),
        WHOLE_GRADIENT=splits == 1, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _merge_splits(parts, z, out, splits, normalize)
    if not learned:
        return out, along
    of_positives = (grad * weight * similarity).sum() * (share / temperature)
    return out, ((of_positives - along.sum() / 2) / temperature).to(torch.float32)


def _keys_splits(columns: int, blocks: int, tile: Config, x: Tensor) -> tuple[int, int]:
    """Tiles per split, and splits."""
    per_split = _blocks(columns, min(8, _wave(tile, blocks, x)))
    return per_split, _blocks(columns, per_split)


def _wave(tile: Config, blocks: int, x: Tensor) -> int:
    """How many splits of so many blocks give every multiprocessor eight warps."""
    return max(1, 8 * _parallel(x) // (tile.warps * blocks))


def _merge_splits(parts: Tensor, keys: Tensor, out: Tensor, splits: int, normalize: bool) -> None:
    kernels().merge_keys_gradient[(_blocks(len(keys), 8),)](
        parts, keys, *keys.stride(), out, len(keys), splits, norm_eps(keys.dtype),
        D=keys.shape[1], BLOCK_D=_block_d(keys.shape[1]), BLOCK=8, NORM=normalize, enable_fp_fusion=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ launches


def _row_weights(
    query: Tensor,
    grad: Tensor,
    weight: Tensor,
    lse: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    share: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What a backward kernel needs of each row, (5, N), and the rows in ``dtype``: the same, or unit ones rounded."""
    n, d = query.shape
    convert = query.dtype != dtype
    per_row = torch.empty((5, n), dtype=torch.float32, device=query.device)
    prepared = torch.empty((n, d), dtype=dtype, device=query.device) if convert else query
    number, tensor = _temperature(temperature, query)
    kernels().row_weights[(_blocks(n, 16),)](
        query, *query.stride(), grad, grad.stride(0), weight.contiguous(), lse.contiguous(), tensor, per_row, prepared,
        n, number, share, norm_eps(query.dtype),
        D=d, BLOCK_D=_block_d(d), BLOCK=16, NORMALIZE=normalize, LEARNED=isinstance(temperature, Tensor),
        CONVERT=convert, enable_fp_fusion=True,
    )  # fmt: skip
    return per_row, prepared


def _largest(per_row: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the rows' weights, what float16 is scaled by; of no use to other dtypes."""
    return per_row[2].abs().amax() if dtype == torch.float16 else per_row


def _set(
    query: Tensor,
    keys: Tensor,
    pairs: Pairs,
    normalize: bool,
    autocast: torch.dtype | None,
    config: Config | None,
    gradient: bool,
    plain: bool,
) -> _Set:
    n, d = query.shape
    if keys.dim() == 3 or pairs.picked is not None:
        columns = keys.shape[1] if pairs.picked is None else pairs.picked.shape[1]
        return _Set(keys, pairs, normalize, Config(1, 32 if d <= 256 else 16, 4, 1), columns, 1, columns, 1)
    dtype = dot_dtype(query, keys, autocast)
    views = len(keys) // pairs.band[2] if pairs.band else 1
    width = pairs.band[1] if pairs.band else len(keys)
    ids = pairs.query_ids is not None and pairs.key_ids is not None
    small = views == 1 and width <= _COLUMNS_AT_ONCE and n * width <= 2**18
    plain = plain and not ids and not (normalize and (dtype == torch.float16 or _arch(query) >= 100))
    turned = keys.dtype != dtype and keys.stride(1) != 1  # it takes registers to turn a tile around
    plain = plain and not turned
    tile = config or (
        small_config(dtype, _block_d(d)) if small else forward_config(dtype, _block_d(d), n, _arch(query), plain)
    )
    if _arch(query) in LITTLE_SHARED_MEMORY or (ids and pairs.key_ids is not None and pairs.key_ids.dim() == 2):
        tile = tile._replace(stages=1)
    few_registers = _arch(query) < 90 or _arch(query) in LITTLE_SHARED_MEMORY
    if turned and config is None and few_registers and tile.resident > 64:
        tile = tile._replace(resident=64, warps=4)
    columns = width + (tile.resident - 1 if pairs.band else 0)
    wanted = _wave(tile, _blocks(n, tile.resident) * views, query) * (1 if gradient else 2)  # (N, D) of each, or (N,)
    per_split = _blocks(_blocks(columns, tile.streamed), 1 if small else wanted)
    chunk = max(per_split, 1 if small else 2) * tile.streamed
    return _Set(keys, pairs, normalize, tile, columns, views, chunk, views * _blocks(columns, chunk))


def _attend(
    query: Tensor,
    positive: Tensor,
    sets: list[_Set],
    temperature: float | Tensor,
    numbers: tuple[float, float, float],  # inter temperature, alpha, share
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    autocast: torch.dtype | None,
    options: dict[str, bool],
    finish: bool | None,  # None: log-sum-exp only
) -> None:
    (n, d), device = query.shape, query.device
    splits = sum(one.splits for one in sets)
    parts, outs = query, query
    if not finish:
        parts = torch.empty((7, splits, n), dtype=torch.float32, device=device)
        outs = torch.empty((splits, n, d) if options["QUERY_GRADIENT"] else (0,), dtype=torch.float32, device=device)
    number, tensor = _temperature(temperature, query)
    rows = (query, *query.stride(), positive, *positive.stride())
    epsilons = (norm_eps(query.dtype), norm_eps(positive.dtype))
    shape = {"D": d, "BLOCK_D": _block_d(d)}
    first = 0
    for one in sets:
        keys, pairs, tile = one.keys, one.pairs, one.config
        query_ids, key_ids, ids, ids_strides = _ids(pairs, query)
        end = (tensor, parts, outs, *out)
        eps = norm_eps(keys.dtype)
        if one.own:
            picked = query if pairs.picked is None else pairs.picked
            strides = keys.stride() if pairs.picked is None else (0, *keys.stride())
            kernels().attend_own[(n, 1)](
                *rows, keys, *strides, picked, *picked.stride(), query_ids, key_ids, *ids_strides, *end,
                n, one.columns, first, splits, number, *numbers, *epsilons, eps,
                BLOCK_KEYS=tile.streamed, PICKED=pairs.picked is not None, IDS=ids != 0, NORM=int(one.normalize),
                FINISH=bool(finish), num_warps=tile.warps, enable_fp_fusion=True, **shape, **options,
            )  # fmt: skip
        else:
            dtype, row_blocks = dot_dtype(query, keys, autocast), _blocks(n, tile.resident)
            norm, inverse = int(one.normalize) * (2 if tile.resident == 16 else 1), query
            if keys.dtype != dtype and (row_blocks > _CONVERSIONS or d > 256):  # or both would not fit a tile's memory
                converted = torch.empty(keys.shape, dtype=dtype, device=device)
                kernels().converted_rows[(_blocks(len(keys), 16),)](
                    keys, *keys.stride(), converted, len(keys), eps,
                    BLOCK=16, NORM=norm != 0, enable_fp_fusion=True, **shape,
                )  # fmt: skip
                keys, norm = converted, 0
            elif norm == 1:
                inverse = torch.empty(len(keys), dtype=torch.float32, device=device)
                kernels().inverse_norms[(_blocks(len(keys), 16),)](
                    keys, *keys.stride(), inverse, len(keys), eps, BLOCK=16, enable_fp_fusion=True, **shape
                )
            lowest = min(number, numbers[0]) if options["DUAL"] else number
            bounded = options["NORMALIZE"] and not options["LEARNED"] and lowest >= _lowest_bounded(dtype, norm)
            offset, width, modulus = pairs.band or (0, 0, 1)
            kernels().attend[(row_blocks, one.splits)](
                *rows, keys, *keys.stride(), inverse, query_ids, key_ids, *ids_strides, *_count(pairs, query), *end,
                n, len(keys), offset, width, modulus, one.chunk, one.splits // one.views, first, splits,
                number, *numbers, *epsilons, eps,
                BLOCK_ROWS=tile.resident, BLOCK_KEYS=tile.streamed, DOT=_triton_dtype(dtype),
                PRECISION=precision(dtype), STAGES=tile.stages, BAND=bool(pairs.band), SMALL=modulus < tile.streamed,
                IDS=ids, NORM=norm, BOUNDED=bounded, COUNTED=pairs.valid_count is not None, FINISH=bool(finish),
                WIDE=_wide(keys),
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True, **shape, **options,
            )  # fmt: skip
        first += one.splits
    if not finish:
        kernels().combine[(n,)](
            *rows, tensor, parts, outs, *out, n, splits, number, *numbers, *epsilons,
            BLOCK_SPLITS=_power_of_two(splits), CHUNK=min(_power_of_two(splits), 4096 // _block_d(d)),
            LOSS=finish is not None, num_warps=8, enable_fp_fusion=True, **shape, **options,
        )  # fmt: skip


def _lowest_bounded(dtype: torch.dtype, norm: int) -> float:
    """The lowest temperature at which 2 ** logit of unit rows, a logit being at most log2(e) / t, needs no maximum.

    float32 and bfloat16 hold 2 ** -126 to 2 ** 127, which 0.03 leaves room for the inverse norm of any raw key; float16
    holds 2 ** -14 to 2 ** 16, which does not.
    """
    return 0.03 if dtype != torch.float16 else 0.1 if norm == 0 else math.inf


def _ids(pairs: Pairs, unused: Tensor) -> tuple[Tensor, Tensor, int, tuple[int, int]]:
    """Query ids, key ids, 0 (none), 1 (K,) or 2 (N, K), and the strides of the key ids."""
    if pairs.query_ids is None or pairs.key_ids is None:
        return unused, unused, 0, (0, 0)
    query_ids, key_ids = pairs.query_ids.contiguous(), pairs.key_ids
    if query_ids.dtype != key_ids.dtype:  # Triton would compare int8's -1 as 255
        query_ids, key_ids = query_ids.long(), key_ids.long()
    if key_ids.dim() == 1:
        return query_ids, key_ids, 1, (0, key_ids.stride(0))
    return query_ids, key_ids, 2, (key_ids.stride(0), key_ids.stride(1))


def _count(pairs: Pairs, unused: Tensor) -> tuple[Tensor]:
    return (unused if pairs.valid_count is None else pairs.valid_count,)


def _temperature(temperature: float | Tensor, unused: Tensor) -> tuple[float, Tensor]:
    return (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, unused)


def _triton_dtype(dtype: torch.dtype) -> Any:
    tl = kernels().tl
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def _wide(x: Tensor) -> bool:
    """Whether offsets into it need 64 bits."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31


def _parallel(x: Tensor) -> int:
    return _multiprocessors(x.device.index) if x.device.type == "cuda" else 4


def _arch(x: Tensor) -> int:
    major, minor = _capability(x.device.index) if x.device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _block_d(d: int) -> int:
    return max(16, _power_of_two(d))


def _power_of_two(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
