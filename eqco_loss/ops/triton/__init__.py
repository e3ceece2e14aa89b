"""The operators by Triton kernels, and what they cannot serve. Importing this does not import Triton."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..scaled import GIVES_KEYS_GRADIENT, keeps
from .arguments import capability, interpreted, kernels, unit_dtype
from .backward import keys_gradient, symmetric_gradient, symmetric_losses, times
from .launch import logsumexp, row_losses
from .tables import LITTLE_SHARED_MEMORY

__all__ = [
    "GIVES_KEYS_GRADIENT",
    "keeps",
    "keys_gradient",
    "logsumexp",
    "refusal",
    "row_losses",
    "symmetric_gradient",
    "symmetric_losses",
    "times",
    "unit_dtype",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_D, LARGEST_K = 512, 2**24
OLDEST_TRITON = (3, 4)


def refusal(query: Tensor, *keys: Tensor | None) -> str | None:
    """Why this backend cannot serve these tensors; None if it can."""
    refused: str | None = _refusal_of(query.device.type, query.device.index)
    if refused is not None:
        return refused
    for x in (query, *keys):
        if x is not None and x.dtype not in DTYPES:
            return f"{str(x.dtype).removeprefix('torch.')}: the kernels take float16, bfloat16 and float32"
        if x is not None and x.shape[-2] > LARGEST_K:
            return f"{'N' if x is query else 'K'} = {x.shape[-2]}: the kernels take up to 2^24"
    d = query.shape[1]
    if d > LARGEST_D:
        return f"D = {d}: the kernels take up to {LARGEST_D}"
    if d > 256 and query.is_cuda and not torch.is_autocast_enabled("cuda"):
        whole = any(x is not None and x.dtype == torch.float32 for x in (query, *keys))
        if whole and _has_little_shared_memory(query.device.index):
            return f"D = {d} in float32: with 99 KB of shared memory the kernels take up to 256"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_little_shared_memory(index: int | None) -> bool:
    major, minor = capability(index)
    return 10 * major + minor in LITTLE_SHARED_MEMORY


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _refusal_of(device: str, index: int | None) -> str | None:
    """Why this backend cannot serve a device."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch on Linux)"
    if device == "cpu":
        reason = "CPU tensors (TRITON_INTERPRET=1 runs the kernels on them, in Triton's interpreter, to test)"
        return None if interpreted() else reason
    if device != "cuda":
        return f"{device} tensors: the kernels are for CUDA"
    if torch.version.hip is not None:
        return "ROCm: the kernels are made for NVIDIA"
    major, minor = capability(index)
    if major < 8:
        return f"compute capability {major}.{minor}: the kernels need 8.0 (Ampere) or newer"
    version = kernels().version
    old = tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON
    return f"Triton {version}: the kernels need 3.4, that of torch 2.8, or newer" if old else None
