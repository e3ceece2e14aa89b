"""Learning rates: a function of the step only, so that there is nothing to save."""

import math
from typing import TYPE_CHECKING

from .choices import Schedule as Schedule

if TYPE_CHECKING:  # what follows runs without torch, for which --help would wait
    from torch.optim import Optimizer


def warms_up(schedule: Schedule) -> bool:
    """Whether ``warmup_epochs`` counts."""
    return schedule in ("simo", "cosine")


def learning_rate(
    schedule: Schedule, step: int, steps_per_epoch: int, epochs: int, warmup_epochs: float, warmup_from: float
) -> float:
    """The rate of one step, as a share of the peak.

    simo: linear warm-up from ``warmup_from``, times half a cosine over the whole run (SiMo).
    cosine: the same warm-up, then half a cosine over the rest (SimCLR, SimCo).
    cosine-by-epoch: half a cosine, the same rate for a whole epoch (MoCo v2).
    drops: a tenth after 60 % of the epochs, a hundredth after 80 % (MoCo v1).
    """
    epoch, warmup = step / steps_per_epoch, warmup_epochs if warms_up(schedule) else 0.0
    warm = warmup_from + (1 - warmup_from) * min(1.0, epoch / warmup) if warmup > 0 else 1.0
    if schedule == "drops":
        return float(0.1 ** (int(epoch >= 0.6 * epochs) + int(epoch >= 0.8 * epochs)))
    if schedule == "cosine-by-epoch":
        done = (step // steps_per_epoch) / epochs
    elif schedule == "cosine":
        done = max(0.0, epoch - warmup) / max(epochs - warmup, 1e-9)
    else:
        done = epoch / epochs
    return warm * (1 + math.cos(math.pi * min(1.0, done))) / 2


def set_learning_rate(optimizer: "Optimizer", rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
