"""A linear classifier that learns beside the encoder, from features through which no gradient returns (SimCo)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Data
from .encoders import Encoder
from .evaluate import features_of
from .norms import gathered
from .optimizers import step_unless
from .schedule import set_learning_rate

BASE_LR = 0.3  # of the authors, for 256 queries


class OnlineProbe(nn.Linear):
    """It keeps the backbone's features of the forward that the method does anyway, so the encoder cannot tell.

    Every rank learns from the features of all, and so has the same classifier.
    """

    labels: Tensor  # (M,), of the training images

    def __init__(self, encoder: Encoder, data: Data, ranks: int, *, fused: bool = False) -> None:
        super().__init__(encoder.width, data.classes)
        self.register_buffer("labels", data.view_labels(), persistent=False)
        how: dict[str, Any] = {"fused": True} if fused else {}
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.0, momentum=0.9, **how)
        self.kept: list[Tensor] = []
        self.ranks = ranks
        encoder.backbone.register_forward_hook(torch.compiler.disable(self._keep))

    def _keep(self, backbone: nn.Module, images: object, features: Tensor) -> None:
        if backbone.training:
            self.kept.append(features.detach())

    def backward(self, ids: Tensor, pieces: int) -> None:
        """Of one of ``pieces`` of a batch: its first forward began with the views of the queries, images ``ids``."""
        features = gathered(self.kept[0][: len(ids)].float(), self.ranks)  # (N, width)
        labels = self.labels[gathered(ids, self.ranks)]
        self.kept.clear()
        loss = F.cross_entropy(self(features), labels, ignore_index=-1, reduction="sum")
        (loss / (labels >= 0).sum().clamp(min=1) / pieces).backward()

    def step(self, rate: float, *, skip: Tensor) -> None:
        """``skip`` what was gathered, because the features were not finite."""
        set_learning_rate(self.optimizer, rate)
        step_unless(skip, self.optimizer, self.optimizer)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def accuracy(self, encoder: Encoder, data: Data) -> float:
        """Per cent right of the test images, over all placements."""
        right = total = 0
        for placement in range(data.placements):
            features, labels = features_of(encoder, data, "test", placement)
            right += int((self(features).argmax(1) == labels).sum())
            total += len(labels)
        return 100 * right / total
