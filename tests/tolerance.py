"""One tolerance for the whole suite.

A result is right when its error against the float64 truth (of the inputs as rounded) is at most CONSTANT times the error of plain
eager PyTorch in the same dtype against the same truth, plus FLOOR roundings of the dtype it is returned in: eager can be
exact by luck. Nothing is ever loosened per test.
"""

import torch
from torch import Tensor

CONSTANT = 3.0
FLOOR = 2.0


def error(result: Tensor, truth: Tensor) -> float:
    assert result.shape == truth.shape, (result.shape, truth.shape)
    assert bool(truth.isfinite().all()), "the truth itself is not finite"
    if not bool(result.isfinite().all()):
        return float("inf")
    return (result.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_as_exact_as_eager(ours: Tensor, eager: Tensor, truth: Tensor, what: str = "result") -> None:
    """All three of one shape; `truth` float64."""
    assert truth.dtype == torch.float64
    dtype = torch.finfo(ours.dtype)
    floor = FLOOR * dtype.eps * (truth.abs().max().item() + dtype.smallest_normal)
    allowed = CONSTANT * error(eager, truth) + floor
    got = error(ours, truth)
    assert got <= allowed, f"{what}: error {got:.3e}, allowed {allowed:.3e} (eager's own error {error(eager, truth):.3e})"
