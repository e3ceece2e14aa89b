"""Learning rate: linear warm-up times a cosine, per iteration (SiMo)."""

import math

from torch.optim import Optimizer


def learning_rate(step: int, steps_per_epoch: int, epochs: int, warmup_epochs: float, peak: float) -> float:
    """The rate of one step: from ``peak / 1000`` up in ``warmup_epochs``, times half a cosine that ends at 0."""
    warm = min(1.0, step / (warmup_epochs * steps_per_epoch)) if warmup_epochs > 0 else 1.0
    cosine = (1 + math.cos(math.pi * step / (epochs * steps_per_epoch))) / 2
    return peak * (0.001 + 0.999 * warm) * cosine


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
