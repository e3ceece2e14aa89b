"""Which rows share normalisation statistics: all ranks, parts of a batch, shuffled rows, or none.

A query and its key in the same batch of a BatchNorm can be told apart from the negatives by the statistics they share
(MoCo, section 3.3). SyncBN, shuffling BN, split BN and GroupNorm are the known ways out.
"""

from typing import cast, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .choices import Norm as Norm


class SplitBatchNorm(_BatchNorm):
    """Batch norm over ``splits`` parts of the batch, part j being rows j, j + splits, ...; one running estimate.

    On one GPU this is what as many GPUs would do, each with its own statistics (MoCo's CIFAR code).
    """

    def __init__(self, num_features: int, splits: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.splits = splits

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (N, C, ...), got {tuple(input.shape)}.")

    def forward(self, input: Tensor) -> Tensor:  # (N, C, ...)
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        n, c = input.shape[:2]
        if n % self.splits:
            raise ValueError(f"splits: a batch of {n} cannot be split into {self.splits} equal parts. Give a divisor.")
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        mean, var = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        parts = input.reshape(n // self.splits, self.splits * c, *input.shape[2:])
        weight, bias = (x if x is None else x.repeat(self.splits) for x in (self.weight, self.bias))
        output = F.batch_norm(parts, mean, var, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(self.splits, c).mean(0))
        self.running_var.copy_(var.view(self.splits, c).mean(0))
        self.num_batches_tracked.add_(1)
        return output.reshape(input.shape)


def convert_norm(model: nn.Module, norm: Norm, splits: int = 8) -> None:
    """Replace every batch norm of the model, in place; weights and biases are kept."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm: expected one of {', '.join(get_args(Norm))}, got {norm!r}.")
    if norm == "split" and splits < 1:
        raise ValueError(f"splits: expected 1 or more, got {splits}.")
    if norm == "sync":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if norm in ("split", "group"):
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, _BatchNorm):
                    setattr(parent, name, _converted(child, norm, splits))


def _converted(old: _BatchNorm, norm: Norm, splits: int) -> nn.Module:
    new: SplitBatchNorm | nn.GroupNorm
    if norm == "split":
        new = SplitBatchNorm(old.num_features, splits, old.eps, cast(float, old.momentum))
    else:
        # A group of a few values of a vector would be normalised to its signs: vectors are one group.
        groups = 1 if isinstance(old, nn.BatchNorm1d) else groups_of(old.num_features)
        new = nn.GroupNorm(groups, old.num_features, old.eps)
    new.weight, new.bias = old.weight, old.bias
    return new


def groups_of(channels: int) -> int:
    """32, or the largest divisor of the channels below it."""
    return max(groups for groups in range(1, 33) if channels % groups == 0)


def check_norm(norm: Norm, device: torch.device, world_size: int, batch_size: int, splits: int = 8) -> None:
    """Raises ValueError where this norm cannot do what its name says; ``batch_size`` is that of one rank."""
    if norm == "sync" and (device.type != "cuda" or world_size == 1):
        where = f"{world_size} process{'es' * (world_size > 1)} on {device.type}"
        better = "batch, which is the same on one process" if world_size == 1 else "shuffle or group"
        raise ValueError(f"norm: sync needs several processes on CUDA, got {where}. Give --norm {better}.")
    if norm == "shuffle" and world_size == 1:
        raise ValueError("norm: shuffle needs several processes, got 1. Give --norm split, which is it for one.")
    if norm == "split" and (batch_size % splits or batch_size < 2 * splits):
        near = max(2, batch_size // splits) * splits
        raise ValueError(
            f"splits: a batch of {batch_size} on each process cannot be split into {splits} equal parts of 2 or more. "
            f"Give a --batch-size of which each gets {near}, or a --splits that divides {batch_size}."
        )


@torch.no_grad()
def shuffled(encode: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """``encode(images)`` where batch norm sees rows of all ranks, or of the whole batch, mixed: MoCo's shuffling BN.

    The permutation comes from a CPU generator, seeded alike on every rank by a function of the run's seed and the step.
    Every rank gives as many rows. One process permutes for a split batch norm only: for others it changes nothing.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1 and not any(isinstance(module, SplitBatchNorm) for module in encode.modules()):
        embeddings: Tensor = encode(images)
        return embeddings
    n = len(images)
    # From pinned memory, or the copy would wait for the device
    order = torch.randperm(n * world, generator=generator, pin_memory=images.is_cuda)
    order = order.to(images.device, non_blocking=True)
    rank = dist.get_rank() if world > 1 else 0
    mine = slice(rank * n, (rank + 1) * n)
    encoded = encode(gathered(images, world)[order[mine]])
    return gathered(encoded, world)[order.argsort()[mine]]


def gathered(rows: Tensor, world: int) -> Tensor:
    """The rows of all ranks, in rank order."""
    if world == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
