"""Several gloo ranks on this machine: start them, wait no longer than told, hand back what they return."""

import queue
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .scripts import forks

SECONDS = 150.0  # for a whole test


def run_ranks(work: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """``work(rank, world, *arguments)`` on every rank, in a process of its own; its results in rank order."""
    context = forks()
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=_rank, args=(work, rank, world, store, answers, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        found: dict[int, Any] = {}
        try:
            while len(found) < world:
                rank, error, result = answers.get(timeout=SECONDS)
                assert error is None, f"rank {rank} of {world}:\n{error}"
                found[rank] = result
        except queue.Empty:
            raise AssertionError(f"ranks {sorted(set(range(world)) - set(found))} hang after {SECONDS} s") from None
        finally:
            for process in ranks:
                process.join(timeout=10 if len(found) == world else 0)
                process.kill()
    return [found[rank] for rank in range(world)]


def _rank(
    work: Callable[..., Any], rank: int, world: int, store: str, answers: Any, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".torch.distributed.*deprecated")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        result = work(rank, world, *arguments)
        dist.barrier()
        answers.put((rank, None, result))
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))


ROWS = 40, 24  # of each of two ranks


def gathered(rank: int, world: int, device: str) -> float:
    """Two ranks that share a device against one process: the largest difference, in the norm, of loss and gradients."""
    from eqco_loss import EqCoLoss

    mine, everything = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1])), slice(None)
    worst = 0.0
    for d, in_batch, symmetric in (
        (64, "keys", False),
        (64, "keys", True),
        (64, "views", True),
        (64, None, False),
        (600, "keys", True),  # which another engine serves on a GPU
    ):
        generator = torch.Generator().manual_seed(0)
        query, key, queue = (torch.randn(n, d, generator=generator).to(device) for n in (sum(ROWS), sum(ROWS), 50))

        def found(
            part: slice,
            gather: bool,
            query: torch.Tensor = query,
            key: torch.Tensor = key,
            negatives: torch.Tensor | None = queue if in_batch is None else None,
            in_batch: Any = in_batch,
            symmetric: bool = symmetric,
        ) -> list[torch.Tensor]:
            leaves = [x[part].clone().requires_grad_() for x in (query, key)]
            criterion: Any = EqCoLoss(0.2, in_batch=in_batch, symmetric=symmetric, gather=gather)
            loss = criterion(*leaves, negatives)
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        loss, *gradients = found(mine, gather=True)
        dist.all_reduce(loss)
        truth, *exact = found(everything, gather=False)
        pairs = [(loss, truth), *((gradient, whole[mine]) for gradient, whole in zip(gradients, exact, strict=True))]
        worst = max([worst, *(float((a / world - b).norm() / b.norm()) for a, b in pairs)])
    return worst
