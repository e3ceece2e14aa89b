"""The engines, and the table that chooses one of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import tiles, triton, wide

# Each is a module with row_losses, symmetric_losses, symmetric_gradient, logsumexp and keys_gradient, which take and
# return the records of ``calls``, and with gives_keys_gradient, unit_dtype and refusal.
BACKENDS: dict[str, Any] = {"torch": tiles, "triton": triton, "wide": wide}

FUSED_D = 256  # the largest D whose gradients the fused kernels keep in registers: on an H200 CLIP at D = 512 took them
#                463 us, and torch.compile, whose products are the vendor's, 215
FUSED_ROWS = 1024  # with fewer queries, launches of whole products cost more than they save (an estimate)


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
    if refused is None and (query.shape[1] <= FUSED_D or query.shape[0] < FUSED_ROWS):
        return "triton", "fused kernels"
    if query.is_cuda and wide.refusal(query, *keys) is None:
        return "wide", refused or f"D = {query.shape[1]}, over {FUSED_D}: the vendor's products of whole matrices"
    return "torch", refused or "no other backend serves these tensors"
