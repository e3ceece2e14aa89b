"""What the backbone's features are worth: weighted kNN while training, a linear probe at the end."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Data
from .encoders import Encoder


class Ranks(Protocol):
    """Of Lightning's Fabric, what an evaluation by several processes needs."""

    @property
    def global_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, data: Any) -> Any: ...


@torch.no_grad()
def extract(encoder: Encoder, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Features (M, width) in float32 and labels (M,), with the running statistics of batch norm."""
    device, training = next(encoder.parameters()).device, encoder.training
    encoder.eval()
    features, labels = zip(*((encoder.features(x.to(device)).float(), y.to(device)) for x, y in batches), strict=True)
    encoder.train(training)
    return torch.cat(features), torch.cat(labels)


def features_of(
    encoder: Encoder, data: Data, split: str, placement: int, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """Features and labels of a whole split, on every rank; each computes its part."""
    if ranks is None or ranks.world_size == 1:
        return extract(encoder, data.labelled(split, placement))
    features, labels = extract(encoder, data.labelled(split, placement, ranks.global_rank, ranks.world_size))
    sizes = ranks.all_gather(torch.tensor(len(labels), device=labels.device)).tolist()
    missing = max(sizes) - len(labels)  # collectives want equal shapes
    everyone = ranks.all_gather(F.pad(features, (0, 0, 0, missing))), ranks.all_gather(F.pad(labels, (0, missing)))
    features, labels = (torch.cat([x[:n] for x, n in zip(rows, sizes, strict=True)]) for rows in everyone)
    return features, labels


def knn_accuracy(encoder: Encoder, data: Data, k: int, temperature: float = 0.1, ranks: Ranks | None = None) -> float:
    """Per cent right when the k nearest training images vote with weight exp(cosine / temperature)."""
    right = total = 0
    for placement in range(data.placements):
        bank, bank_labels = features_of(encoder, data, "train", placement, ranks)
        features, labels = features_of(encoder, data, "test", placement, ranks)
        bank, features = F.normalize(bank), F.normalize(features)
        for rows, truth in zip(torch.split(features, 1024), torch.split(labels, 1024), strict=True):
            similarity, nearest = (rows @ bank.T).topk(min(k, len(bank)))
            votes = rows.new_zeros(len(rows), data.classes)
            votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
            right += int((votes.argmax(1) == truth).sum())
        total += len(labels)
    return 100 * right / total


def linear_probe(encoder: Encoder, data: Data, ranks: Ranks | None = None) -> float:
    """Per cent right of a logistic regression (scikit-learn) on frozen, standardised features of every placement."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    sets = {}
    for split in ("train", "test"):
        parts = [features_of(encoder, data, split, placement, ranks) for placement in range(data.placements)]
        sets[split] = tuple(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(*sets["train"])
    return 100 * float(probe.score(*sets["test"]))
