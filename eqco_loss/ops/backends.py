"""The engines, and the table that chooses one of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import tiles, triton, wide

# Each is a module with row_losses, symmetric_losses, symmetric_gradient, logsumexp and keys_gradient, which take and
# return the records of ``calls``, and with GIVES_KEYS_GRADIENT, keeps, unit_dtype, times and, but for torch's, refusal.
BACKENDS: dict[str, Any] = {"torch": tiles, "triton": triton, "wide": wide}


WIDE_ABOVE = 256  # features from which on "auto" prefers products of whole matrices to the fused kernels


def choose(requested: str, query: Tensor, *keys: Tensor | None) -> tuple[str, str]:
    """The backend that serves these tensors, and why."""
    if requested == "torch":
        return "torch", "asked for by name"
    if requested != "auto":
        refused = BACKENDS[requested].refusal(query, *keys)
        if refused is None:
            return requested, "asked for by name"
        raise ValueError(
            f"backend: expected tensors that {requested!r} serves, got {refused}. Give backend='auto', which takes "
            f"{choose('auto', query, *keys)[0]!r} for these."
        )
    if query.is_cpu:
        return "torch", "CPU tensors: torch's flash attention where nothing is left out, tiles elsewhere"
    refused, d = triton.refusal(query, *keys), query.shape[1]
    # Measured on an H200 with N = 4096, both directions: D = 128 108 us and wide 139, D = 256 187 and 163, D = 512 416
    # and 210; one direction: D = 256 123 and 338, D = 512 434 and 379.
    if refused is None and d <= WIDE_ABOVE:
        return "triton", "fused kernels"
    if query.is_cuda and wide.refusal(query, *keys) is None:
        return "wide", f"products of whole matrices, because of {refused or f'D = {d}'}"
    return ("triton", "fused kernels") if refused is None else ("torch", refused)
