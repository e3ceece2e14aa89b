"""The engines, and the table that chooses one of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import tiles, triton

# Each is a module with row_losses, symmetric_losses, symmetric_gradient, logsumexp and keys_gradient, which take and
# return the records of ``calls``, and gives_keys_gradient.
BACKENDS: dict[str, Any] = {"torch": tiles, "triton": triton}


def choose(requested: str, query: Tensor, *keys: Tensor | None) -> tuple[str, str]:
    """The backend that serves these tensors, and why."""
    if requested == "torch":
        return "torch", "asked for by name"
    if requested == "auto" and query.is_cpu:
        return "torch", "CPU tensors: torch's flash attention where nothing is left out, tiles elsewhere"
    refused = triton.refusal(query, *keys)
    if refused is None:
        return "triton", "fused kernels"
    if requested == "triton":
        raise ValueError(
            f"backend: expected tensors that 'triton' serves, got {refused}. Give backend='auto', which takes 'torch' "
            "for these."
        )
    return "torch", refused
