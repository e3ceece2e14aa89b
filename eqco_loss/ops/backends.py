"""The engines, and the table that chooses one of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import tiles, triton, wide

# Each is a module with row_losses, symmetric_losses, symmetric_gradient, logsumexp and keys_gradient, which take and
# return the records of ``calls``, and with gives_keys_gradient, unit_dtype and refusal.
BACKENDS: dict[str, Any] = {"torch": tiles, "triton": triton, "wide": wide}


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
    refused = triton.refusal(query, *keys)
    if (
        refused is None
    ):  # measured on an H200, CLIP with N = 4096: D = 128 108 against wide's 392 us, D = 512 416 and 475
        return "triton", "fused kernels"
    if query.is_cuda and wide.refusal(query, *keys) is None:  # D = 1024: 711 us, and plain torch 6,068
        return "wide", f"products of whole matrices, because of {refused}"
    return "torch", refused
