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
