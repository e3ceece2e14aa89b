"""Rows of all ranks, with the gradient back to the rank that owns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING or dist.is_available():  # not only for checkers: a command line reads the hints when it runs
    from torch.distributed import ProcessGroup
else:

    class ProcessGroup:
        """Stands in where torch was built without ``torch.distributed``; nothing is one."""


Gather = bool | ProcessGroup  # False, True for the default group, or a group


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
        """``x``, which all ranks hold alike; its gradient on every rank is the mean of all ranks' gradients.

        That is what DDP makes of an encoder's gradient. Where DDP averages this one again, it averages equal numbers.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _MeanGradient.apply(x, self)
            return out
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, without a gradient."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total


class SavedGroup:
    """What a file holds in place of a process group, which lives and dies with its process."""

    def __repr__(self) -> str:
        return "a process group that was saved to a file"


class _Carried(NamedTuple):
    """A group on its way from a module to a copy, which is given the same one, or to a file, which is not."""

    group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> _Carried:
        return self

    def __reduce__(self) -> tuple[type[SavedGroup], tuple[()]]:
        return SavedGroup, ()


class HoldsGroup(nn.Module):
    """A module whose ``gather`` may be a process group: a copy uses the same group, and a file leaves it out."""

    gather: Gather

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state if isinstance(self.gather, bool) else state | {"gather": _Carried(self.gather)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        carried = state.get("gather")
        if isinstance(carried, _Carried):
            state = state | {"gather": carried.group}
        super().__setstate__(state)  # type: ignore[no-untyped-call]


def check_gather(gather: Any) -> None:
    if isinstance(gather, SavedGroup):
        raise TypeError(
            f"gather: expected False, True or a torch.distributed.ProcessGroup, got {gather!r}, which no file can "
            "hold. Set it after loading: module.gather = group."
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


def checked_together(
    facts: Callable[[], Sequence[int | Tensor]], count: int, gather: Gather, device: torch.device
) -> tuple[Ranks, list[list[int]]]:
    """Who takes part, and every rank's ``facts``, at most ``count`` numbers of which the first is how many rows it has.

    What ``facts`` raises on one rank is an error on all: that rank raises its own, the others name it, and none is left
    waiting.
    """
    group, rank, size = world(gather)
    wrong: Exception | None = None
    mine: Sequence[int | Tensor] = [-1]
    try:
        mine = facts()
    except Exception as error:
        wrong = error
    everyone = _exchange([*mine, *[0] * (count - len(mine))], device, group, size)
    if wrong is not None:
        raise wrong
    failed = [r for r, (rows, *_) in enumerate(everyone) if rows < 0]
    if failed:
        raise ValueError(
            f"gather: expected every rank to pass its own checks, got an error on rank {', '.join(map(str, failed))}. "
            "Its message is the one to mend."
        )
    return Ranks(group, rank, tuple(rows for rows, *_ in everyone)), everyone


def _exchange(
    values: Sequence[int | Tensor], device: torch.device, group: ProcessGroup | None, size: int
) -> list[list[int]]:
    """Every rank's values, in rank order. Waits for the device once, however many of the values are tensors on it."""
    mine = torch.tensor([0 if isinstance(x, Tensor) else x for x in values], dtype=torch.int64, device=device)
    for place, x in enumerate(values):
        if isinstance(x, Tensor):
            mine[place] = x
    out = torch.empty(size * len(values), dtype=torch.int64, device=device)
    _gather_into(out, mine, group)
    rows: list[list[int]] = out.view(size, len(values)).tolist()
    return rows


def _gather_into(out: Tensor, x: Tensor, group: ProcessGroup | None) -> None:
    """Gathers tensors of equal shapes into ``out``, by the name that this torch has for it."""
    newer = getattr(dist, "all_gather_single", None)
    (dist.all_gather_into_tensor if newer is None else newer)(out, x, group=group)


def joined(rows: list[Tensor]) -> Tensor:
    """Rows one after the other, out of autocast's sight, whose torch.cat refuses the half dtype that is not its own."""
    device = rows[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return torch.cat(rows)
    with torch.autocast(device, enabled=False):
        return torch.cat(rows)


def _all_gather(x: Tensor, ranks: Ranks) -> Tensor:
    longest = max(ranks.sizes)
    if len(x) < longest:  # collectives want equal shapes
        x = joined([x, x.new_zeros((longest - len(x), *x.shape[1:]))])
    out = x.new_empty((len(ranks.sizes) * longest, *x.shape[1:]))
    _gather_into(out, x.contiguous(), ranks.group)
    if min(ranks.sizes) == longest:
        return out
    return joined([out[r * longest : r * longest + size] for r, size in enumerate(ranks.sizes)])


def _check_once() -> None:
    """A second derivative would lack what other ranks' rows add to it; autograd prunes a marker that only raises."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "gather: expected a gradient that is not differentiated again, got create_graph=True. Leave create_graph "
            "out, or differentiate twice with gather=False."
        )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _all_gather(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _check_once()
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _check_once()
        ranks: Ranks = ctx.ranks
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)  # a sum of halves would be rounded
        dist.all_reduce(total, group=ranks.group)
        return (total / len(ranks.sizes)).to(grad.dtype), None
