"""What is told of embeddings, and the running statistics of batch norm, which one bad batch must not spoil."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eqco_loss.functional import LossMetrics


class Statistics:
    """Running statistics of batch norm, which one batch that is not finite would make NaN for ever."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        layers = [layer for module in modules for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self.running = [x for layer in layers for x in layer.buffers() if x.is_floating_point()]
        self.kept = [x.clone() for x in self.running]

    def keep(self) -> None:
        """After a step that was taken."""
        if self.running:
            torch._foreach_copy_(self.kept, self.running)

    def mend(self) -> None:
        """After one that was skipped: those that are not finite are as they were kept."""
        for now, before in zip(self.running, self.kept, strict=True):
            if not now.isfinite().all():
                now.copy_(before)


def feature_std(queries: Tensor) -> Tensor:
    """Standard deviation of the unit queries, in units of that of a spread-out batch: 1 is spread out, 0 collapsed."""
    spread: Tensor = F.normalize(queries).std(0).mean() * math.sqrt(queries.shape[1])
    return spread


def mean_of(first: LossMetrics, second: LossMetrics) -> LossMetrics:
    """Of both directions."""
    return LossMetrics(*((a + b) / 2 for a, b in zip(first, second, strict=True)))
