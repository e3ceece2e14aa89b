"""Rows of all ranks, with the gradient back to the rank that owns them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Gather = Union[bool, "ProcessGroup"]  # False, True for the default group, or a group


class Ranks(NamedTuple):
    """Who takes part in a loss, and with how many rows each."""

    group: ProcessGroup | None
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


def check_gather(gather: Any) -> None:
    if not isinstance(gather, bool) and not (dist.is_available() and isinstance(gather, dist.ProcessGroup)):
        raise TypeError(
            f"gather: expected False, True or a torch.distributed.ProcessGroup, got {gather!r}. "
            "True gathers over the default group."
        )


def world(gather: Gather) -> tuple[ProcessGroup | None, int, int]:
    """(group, rank, world size)."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"gather: expected an initialised process group, got {gather!r} without one. Launch with torchrun and call "
            "torch.distributed.init_process_group first, or use gather=False."
        )
    group = None if isinstance(gather, bool) else gather
    return group, dist.get_rank(group), dist.get_world_size(group)


def cannot_wait(x: Tensor) -> bool:
    """Whether the host may not ask the device: in a traced or captured graph, which requires equal ranks."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def equal_ranks(gather: Gather, x: Tensor) -> Ranks:
    """Ranks that all have as many rows as this one."""
    group, rank, size = world(gather)
    return Ranks(group, rank, (x.shape[0],) * size)


def exchange(values: list[int], device: torch.device, group: ProcessGroup | None, size: int) -> list[list[int]]:
    """Every rank's values, in rank order. Waits for the device."""
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    out = torch.empty(size * len(values), dtype=torch.int64, device=device)
    _gather_into(out, mine, group)
    rows: list[list[int]] = out.view(size, len(values)).tolist()
    return rows


def fail_together(wrong: Exception | None, failed: list[int]) -> None:
    """What is wrong on some ranks is an error on all: each raises its own, the others name them."""
    if wrong is not None:
        raise wrong
    if failed:
        raise ValueError(
            f"gather: expected every rank to pass its own checks, got an error on rank {', '.join(map(str, failed))}. "
            "Its message is the one to mend."
        )


def _gather_into(out: Tensor, x: Tensor, group: ProcessGroup | None) -> None:
    """Of equal shapes, by the name that this torch wants it called."""
    newer = getattr(dist, "all_gather_single", None)
    (dist.all_gather_into_tensor if newer is None else newer)(out, x, group=group)


def _all_gather(x: Tensor, ranks: Ranks) -> Tensor:
    longest = max(ranks.sizes)
    if len(x) < longest:  # collectives want equal shapes
        x = torch.cat([x, x.new_zeros((longest - len(x), *x.shape[1:]))])
    out = x.new_empty((len(ranks.sizes) * longest, *x.shape[1:]))
    _gather_into(out, x.contiguous(), ranks.group)
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
