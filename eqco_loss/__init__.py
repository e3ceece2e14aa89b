"""Contrastive losses that do not depend on how many negatives you can afford, exact and in one pass over them."""

from .losses import DualTempInfoNCE, EqCoLoss
from .momentum import momentum_update
from .queue import MomentumQueue

__version__ = "0.2.0"
__all__ = ["DualTempInfoNCE", "EqCoLoss", "MomentumQueue", "momentum_update"]
