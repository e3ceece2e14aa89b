"""Rows of all ranks, with the gradient back to the rank that owns them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn
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

    def shared(self, x: Tensor) -> Tensor:
        """A parameter that every rank has a copy of; its gradient is the mean over ranks, as DDP makes the encoders'.

        Each rank's loss is scaled such that this mean is the gradient of the global loss. Inside DDP the mean is taken
        once more, of equal numbers, which changes nothing.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _MeanGradient.apply(x, self)
            return out
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Of all ranks; no gradient."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total


class LeftBehind:
    """Stands in a loaded module for the process group that it had where it was saved."""


class HoldsGroup(nn.Module):
    """A module with a ``gather``, which copies share and pickles leave behind if it is a group of this process."""

    gather: Gather

    def __deepcopy__(self, memo: dict[int, Any]) -> HoldsGroup:
        memo[id(self.gather)] = self.gather
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __copy__(self) -> HoldsGroup:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"gather": self.gather if isinstance(self.gather, bool) else LeftBehind()}


def check_gather(gather: Any) -> None:
    if isinstance(gather, LeftBehind):
        raise TypeError(
            "gather: expected a process group of this process, got one that loading has left behind, because groups "
            "cannot be saved. Set .gather to True or to a group."
        )
    if not isinstance(gather, bool) and not (dist.is_available() and isinstance(gather, dist.ProcessGroup)):
        raise TypeError(
            f"gather: expected False, True or a torch.distributed.ProcessGroup, got {gather!r}. "
            "True gathers over the default group."
        )


def world(gather: Gather) -> tuple[ProcessGroup | None, int, int]:
    """(group, rank, world size)."""
    check_gather(gather)
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


def exchange(
    values: list[int], device: torch.device, group: ProcessGroup | None, size: int, on_device: Tensor | None = None
) -> list[list[int]]:
    """Every rank's values in rank order, then the integer that is ``on_device``, else 0. Waits for the device."""
    mine = torch.tensor([*values, 0], dtype=torch.int64, device=device)
    if on_device is not None:
        mine[-1] = on_device
    out = torch.empty(size * len(mine), dtype=torch.int64, device=device)
    _gather_into(out, mine, group)
    rows: list[list[int]] = out.view(size, len(mine)).tolist()
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


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks: Ranks = ctx.ranks
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ranks.group)
        return total / len(ranks.sizes), None
