"""What backends answer alike: gradients times the gradient of the loss, by torch, and what is kept of two views."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import KeysGradient, KeysGradients, SymmetricLosses
from .observers import graph_is_kept

# Whether row_losses returns the keys' gradient of a reduced loss. Where it is one more pass, it is left to backward.
GIVES_KEYS_GRADIENT = False


def keeps(call: SymmetricLosses) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what forward keeps for the gradient of both directions."""
    m, d = call.first.shape
    return (2 * m, d), call.first.dtype


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients as forward leaves them, which backward multiplies by the loss's."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def times(unit: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a sum over rows, (N, D), times grad, () or (N,), rounded to ``dtype`` by the same kernel."""
    factor = grad if grad.dim() == 0 else grad[:, None]
    return torch.mul(unit, factor, out=torch.empty_like(unit, dtype=dtype))


def times_or_itself(unit: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """``times``, but itself where it is by one and for the last time, as a CPU can tell."""
    if grad.is_cpu and unit.dtype == dtype and grad.dim() == 0 and float(grad) == 1.0 and not graph_is_kept():
        return unit
    return times(unit, grad, dtype)


def with_others(call: KeysGradient, keys: Tensor) -> KeysGradients:
    """The keys' gradient beside what else a call wants multiplied."""
    if call.positive_gradient is not None:
        added = times(call.positive_gradient, call.grad, call.positive_gradient.dtype)
        keys = torch.add(keys, added, out=torch.empty_like(keys))
    if call.query_gradient is None:
        return KeysGradients(keys, None)
    return KeysGradients(keys, times(call.query_gradient, call.grad, call.query.dtype))
