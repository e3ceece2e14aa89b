"""Rows of all ranks, with the gradient back to the rank that owns them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Gather = bool | dist.ProcessGroup  # False, True for the default group, or a group


class Ranks(NamedTuple):
    """Who takes part in a loss, and with how many rows each."""

    group: dist.ProcessGroup | None
    rank: int
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Where this rank's rows start among all rows."""
        return sum(self.sizes[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks in rank order; in backward each rank gets the sum of what all ranks hold for its rows."""
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _GatherRows.apply(x, self)
            return out
        return _all_gather(x, self)

    def sum(self, x: Tensor) -> Tensor:
        """Of all ranks; no gradient."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total


def world(gather: Gather) -> tuple[dist.ProcessGroup | None, int, int]:
    """(group, rank, world size); a lone process is a world of one."""
    group = None if isinstance(gather, bool) else gather
    return group, dist.get_rank(group), dist.get_world_size(group)


def exchange(values: list[int], device: torch.device, group: dist.ProcessGroup | None, size: int) -> list[list[int]]:
    """Every rank's values, in rank order. Waits for the device."""
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    out = torch.empty(size * len(values), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(out, mine, group=group)
    rows: list[list[int]] = out.view(size, len(values)).tolist()
    return rows


def _all_gather(x: Tensor, ranks: Ranks) -> Tensor:
    longest = max(ranks.sizes)
    if len(x) < longest:  # collectives want equal shapes
        x = torch.cat([x, x.new_zeros((longest - len(x), *x.shape[1:]))])
    out = x.new_empty((len(ranks.sizes) * longest, *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=ranks.group)
    if min(ranks.sizes) == longest:
        return out
    return torch.cat([out[r * longest : r * longest + size] for r, size in enumerate(ranks.sizes)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _all_gather(x, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks: Ranks = ctx.ranks
        total = grad.clone(memory_format=torch.contiguous_format)  # not ours to reduce in place
        dist.all_reduce(total, group=ranks.group)
        return total[ranks.offset : ranks.offset + ranks.sizes[ranks.rank]], None
