"""One tolerance for the whole suite.

A result is right when its error against the float64 truth (of the inputs as rounded) is at most CONSTANT times the error of plain
eager PyTorch in the same dtype against the same truth. Eager can be exact by luck, so there is a floor: FLOOR roundings of the
arithmetic, as a similarity divided by the temperature magnifies them, and one of the dtype that the result comes back in. Nothing is ever
loosened per test.
"""

import torch
from torch import Tensor

CONSTANT = 3.0
FLOOR = 4.0


def error(result: Tensor, truth: Tensor) -> float:
    assert result.shape == truth.shape, (result.shape, truth.shape)
    assert bool(truth.isfinite().all()), "the truth itself is not finite"
    if not bool(result.isfinite().all()):
        return float("inf")
    return (result.double() - truth).abs().max().item() if truth.numel() else 0.0


def allowed_error(eager: Tensor, truth: Tensor, dtype: torch.dtype, *, temperature: float = 1.0, scale: float = 0.0) -> float:
    """What a result of `dtype` may be off by.

    `temperature` is the smallest that divides a similarity; `scale` the size of what cancels, where the truth is a difference that may vanish.
    """
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    returned = torch.finfo(dtype)
    relative = FLOOR * torch.finfo(arithmetic).eps * max(1.0, 1 / temperature) + returned.eps
    floor = relative * max(scale, truth.abs().max().item()) + returned.eps * returned.smallest_normal
    return CONSTANT * error(eager, truth) + floor


def assert_as_exact_as_eager(
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    what: str = "result",
    *,
    temperature: float = 1.0,
    scale: float = 0.0,
) -> None:
    """All three of one shape; `truth` float64."""
    assert truth.dtype == torch.float64
    got, allowed = error(ours, truth), allowed_error(eager, truth, ours.dtype, temperature=temperature, scale=scale)
    assert got <= allowed, f"{what}: error {got:.3e}, allowed {allowed:.3e} (eager's own error {error(eager, truth):.3e})"
