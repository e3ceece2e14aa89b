"""What the backbone's features are worth: weighted kNN while training, a logistic regression at the end."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .data import Data
from .encoders import Encoder
from .norms import gathered

AT_ONCE = 2**15  # features of the bank that a block of queries meets


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
    rank, ranks = position()
    features, labels = extract(encoder, data.labelled(split, placement, rank, ranks))
    return everyones(features, ranks), everyones(labels, ranks)


class Bank(NamedTuple):
    """Unit features (M, width) and labels (M,) of this rank's part of a split."""

    features: Tensor
    labels: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, encoder: Encoder, data: Data, split: str, placement: int, device: torch.device) -> "Bank":
        """Each batch goes where it stays, so that no second copy is held; in half precision where a GPU made it."""
        rank, ranks = position()
        own, training = next(encoder.parameters()).device, encoder.training
        most = -(-data.size(split) // ranks)
        dtype = torch.float16 if own.type == "cuda" else torch.float32
        features: Tensor | None = None
        labels, n = torch.empty(most, dtype=torch.int64, device=device), 0
        encoder.eval()
        for images, truth in data.labelled(split, placement, rank, ranks):
            rows = F.normalize(encoder.features(images.to(own)).float())
            if features is None:
                features = torch.empty((most, rows.shape[1]), dtype=dtype, device=device)
            features[n : n + len(rows)], labels[n : n + len(rows)] = rows, truth
            n += len(rows)
        encoder.train(training)
        if features is None:  # a rank without an image, which the others wait for
            features = torch.empty((0, encoder.width), dtype=dtype, device=device)
        return cls(features[:n], labels[:n])

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest cosines of each query and their labels, (Q, k), of a block of the bank at a time.

        Where there are fewer, the rest is -inf and label 0.
        """
        best = queries.new_full((len(queries), k), -math.inf, dtype=torch.float32)
        of_best = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
        for block, truth in zip(self.features.split(AT_ONCE), self.labels.split(AT_ONCE), strict=True):
            if block.device.type == "cpu":
                block = block.to(queries.dtype)
            found, place = (queries @ block.T).float().topk(min(k, len(block)))
            best, keep = torch.cat([best, found], 1).topk(k)
            of_best = torch.cat([of_best, truth[place]], 1).gather(1, keep)
        return best, of_best


@torch.no_grad()
def knn_accuracy(
    encoder: Encoder, data: Data, k: int, temperature: float = 0.1, device: torch.device | None = None
) -> float:
    """Per cent right when the k nearest training images vote with weight exp(cosine / temperature).

    Each rank keeps the features of its part of the training images, once, on ``device`` (None: the encoder's), and
    finds the nearest of them to all test images; the ranks' finds are then merged, which is what one bank would give.
    """
    device = device or next(encoder.parameters()).device
    hits = [knn_hits(encoder, data, placement, k, temperature, device) for placement in range(data.placements)]
    return 100 * sum(int(x.sum()) for x in hits) / sum(map(len, hits))


def knn_hits(encoder: Encoder, data: Data, placement: int, k: int, temperature: float, device: torch.device) -> Tensor:
    """(M,), which of the test images the kNN gets right. The banks of one placement are gone when it returns."""
    _, ranks = position()
    k, hits = min(k, data.size("train")), list[Tensor]()
    bank = Bank.of(encoder, data, "train", placement, device)
    test = Bank.of(encoder, data, "test", placement, device)
    features, labels = everyones(test.features, ranks), everyones(test.labels, ranks)
    for rows, truth in zip(features.split(1024), labels.split(1024), strict=True):
        queries = rows.float() if device.type == "cpu" else rows
        cosine, voters = bank.nearest(queries, k)
        if ranks > 1:
            found = (everyones(x, ranks, equal=True).unflatten(0, (ranks, -1)) for x in (cosine, voters))
            cosine, voters = (x.movedim(0, 1).flatten(1) for x in found)  # (Q, ranks * k)
            cosine, keep = cosine.topk(k)
            voters = voters.gather(1, keep)
        votes = cosine.new_zeros(len(rows), data.classes)
        votes.scatter_add_(1, voters, (cosine / temperature).exp())
        hits.append(votes.argmax(1) == truth)
    return torch.cat(hits)


def position() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def everyones(rows: Tensor, ranks: int, equal: bool = False) -> Tensor:
    """All ranks' rows, one after the other; ``equal``: every rank has as many."""
    if ranks == 1:
        return rows
    home = rows.device
    if dist.get_backend() == "nccl":  # which takes nothing of a CPU's
        rows = rows.cuda()
    if equal:
        return gathered(rows, ranks).to(home)
    sizes = gathered(torch.tensor([len(rows)], device=rows.device), ranks).tolist()
    missing = max(sizes) - len(rows)  # collectives want equal shapes
    padding = (0, 0) * (rows.dim() - 1) + (0, missing)
    keep = torch.cat([torch.arange(max(sizes)) < size for size in sizes]).to(rows.device)
    return gathered(F.pad(rows, padding), ranks)[keep].to(home)


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
