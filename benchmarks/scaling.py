"""How time and memory grow with K, with N and with D on one device.

    python -m benchmarks.scaling            # K = 2^4 to 2^22 against 256 queries, N = 2^6 to 2^14 in-batch, D to 2^11

A way that would need more memory than is free, or too long, is a row that says so. The smallest and the largest sizes
come first and then those between, of all three in turn, so that a deadline leaves a coarser picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import torch
import tyro

from .measure import RESULTS
from .registry import Peer
from .runner import Plan, check_device, run_all
from .workloads import Case


@dataclass(frozen=True)
class Args:
    largest_k: int = 2**22  # of the queue
    largest_n: int = 2**14  # of the batch
    largest_d: int = 2**11  # of 1024 in-batch rows, 4096 on a GPU
    device: Literal["cpu", "cuda"] | None = None  # None: a GPU where there is one
    dtype: Literal["float32", "high", "bfloat16", "float16", "amp"] | None = (
        None  # None: amp on a GPU, float32 on a CPU
    )
    deadline: float | None = None  # seconds for everything. None: all
    rounds: int = 3  # at least; each way runs once a round; medians are reported
    step_limit: float = 30.0  # seconds a step may take to be timed
    out: Path | None = None  # None: benchmarks/results/scaling-{cpu,gpu}.csv


def main(args: Args) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    for name in ("rounds", "step_limit", "deadline"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise SystemExit(f"error: {name}: expected more than 0, got {value}.")
    out = args.out or RESULTS / f"scaling-{'gpu' if device == 'cuda' else 'cpu'}.csv"
    dtype = args.dtype or ("amp" if device == "cuda" else "float32")
    queues = [Case("M1", 256, 2**power, dtype=dtype) for power in range(4, 31, 2) if 2**power <= args.largest_k]
    batches = [Case("S1", 2**p, 2**p - 1, dtype=dtype) for p in range(6, 17, 2) if 2**p <= args.largest_n]
    n = 4096 if device == "cuda" else 1024
    widths = [Case("S1", n, n - 1, 2**p, dtype) for p in range(5, 14) if 2**p <= args.largest_d and p != 7]  # has been
    chosen = [
        case for some in zip_longest(*map(spread, (queues, batches, widths))) for case in some if case is not None
    ]
    if not chosen:
        raise SystemExit("error: largest_k, largest_n, largest_d: expected at least 16, 64 or 32, got less of all.")
    plan = Plan(device=device, rounds=args.rounds, step_limit=args.step_limit, out=out, deadline=args.deadline)
    run_all(chosen, wants, plan)


def spread(sizes: list[Case]) -> list[Case]:
    """Both ends, and then again and again what is in the middle of what is left between two."""
    found, gaps = [*sizes[:1], *sizes[1:][-1:]], [(0, len(sizes) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            found.append(sizes[middle])
            gaps += [(low, middle), (middle, high)]
    return found


def wants(case: Case, one: Peer) -> bool:
    return one.name in ("eqco_loss", "torch.compile") or one.name.startswith("eager")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
