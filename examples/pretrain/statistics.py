"""What is told of embeddings."""

import math

import torch.nn.functional as F
from torch import Tensor

from eqco_loss.functional import LossMetrics


def feature_std(queries: Tensor) -> Tensor:
    """Standard deviation of the unit queries, in units of that of a spread-out batch: 1 is spread out, 0 collapsed."""
    spread: Tensor = F.normalize(queries).std(0).mean() * math.sqrt(queries.shape[1])
    return spread


def mean_of(first: LossMetrics, second: LossMetrics) -> LossMetrics:
    """Of both directions."""
    return LossMetrics(*((a + b) / 2 for a, b in zip(first, second, strict=True)))
