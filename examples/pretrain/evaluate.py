"""What the backbone's features are worth: weighted kNN while training, a linear probe at the end."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .data import Data
from .encoders import Encoder
from .norms import gathered


@torch.no_grad()
def extract(encoder: Encoder, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Features (M, width) in float32 and labels (M,), with the running statistics of batch norm."""
    device, training = next(encoder.parameters()).device, encoder.training
    encoder.eval()
    features, labels = zip(*((encoder.features(x.to(device)).float(), y.to(device)) for x, y in batches), strict=True)
    encoder.train(training)
    return torch.cat(features), torch.cat(labels)


def features_of(encoder: Encoder, data: Data, split: str, placement: int) -> tuple[Tensor, Tensor]:
    """Features and labels of a whole split, on every rank; each computes its part."""
    if not (dist.is_available() and dist.is_initialized()):
        return extract(encoder, data.labelled(split, placement))
    ranks = dist.get_world_size()
    features, labels = extract(encoder, data.labelled(split, placement, dist.get_rank(), ranks))
    sizes = gathered(torch.tensor([len(labels)], device=labels.device), ranks).tolist()
    missing = max(sizes) - len(labels)  # collectives want equal shapes
    everyone = gathered(F.pad(features, (0, 0, 0, missing)), ranks), gathered(F.pad(labels, (0, missing)), ranks)
    keep = torch.cat([torch.arange(max(sizes)) < size for size in sizes]).to(labels.device)
    features, labels = (rows[keep] for rows in everyone)
    return features, labels


def knn_accuracy(encoder: Encoder, data: Data, k: int, temperature: float = 0.1) -> float:
    """Per cent right when the k nearest training images vote with weight exp(cosine / temperature)."""
    right = total = 0
    for placement in range(data.placements):
        bank, bank_labels = features_of(encoder, data, "train", placement)
        features, labels = features_of(encoder, data, "test", placement)
        bank, features = F.normalize(bank), F.normalize(features)
        for rows, truth in zip(torch.split(features, 1024), torch.split(labels, 1024), strict=True):
            similarity, nearest = (rows @ bank.T).topk(min(k, len(bank)))
            votes = rows.new_zeros(len(rows), data.classes)
            votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
            right += int((votes.argmax(1) == truth).sum())
        total += len(labels)
    return 100 * right / total


def linear_probe(encoder: Encoder, data: Data) -> float:
    """Per cent right of a logistic regression (scikit-learn) on frozen, standardised features of every placement."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    sets = {}
    for split in ("train", "test"):
        parts = [features_of(encoder, data, split, placement) for placement in range(data.placements)]
        sets[split] = tuple(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(*sets["train"])
    return 100 * float(probe.score(*sets["test"]))
