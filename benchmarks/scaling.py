"""How time and memory grow with K and with N on one device.

    python -m benchmarks.scaling            # K = 2^4 to 2^22 against 256 queries, N = 2^6 to 2^14 in-batch

A way that would need more memory than is free, or too long, is a row that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from .measure import RESULTS
from .runner import check_device, run_all
from .workloads import Case

WAYS = ("eager", "torch.compile", "eqco_loss")


@dataclass(frozen=True)
class Args:
    largest_k: int = 2**22  # of the queue
    largest_n: int = 2**14  # of the batch
    device: Literal["cpu", "cuda"] | None = None  # None: a GPU where there is one
    dtype: Literal["float32", "high", "bfloat16", "float16", "amp"] | None = (
        None  # None: amp on a GPU, float32 on a CPU
    )
    rounds: int = 3  # at least; each way runs once a round; medians are reported
    step_limit: float = 30.0  # seconds a step may take to be timed
    out: Path | None = None  # None: benchmarks/results/scaling-{cpu,gpu}.csv


def main(args: Args) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    for name in ("rounds", "step_limit"):
        if not getattr(args, name) > 0:
            raise SystemExit(f"error: {name}: expected more than 0, got {getattr(args, name)}.")
    out = args.out or RESULTS / f"scaling-{'gpu' if device == 'cuda' else 'cpu'}.csv"
    dtype = args.dtype or ("amp" if device == "cuda" else "float32")
    queues = [Case("M1", 256, 2**power, dtype=dtype) for power in range(4, 31, 2) if 2**power <= args.largest_k]
    batches = [Case("S1", 2**p, 2**p - 1, dtype=dtype) for p in range(6, 17, 2) if 2**p <= args.largest_n]
    if not queues + batches:
        raise SystemExit("error: largest_k, largest_n: expected at least 16 or 64, got less of both.")
    run_all(queues + batches, lambda one: one.name.startswith(WAYS), device, args.rounds, args.step_limit, out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
