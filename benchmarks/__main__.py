"""Loss throughput and memory against everything a user would pick instead, side by side in one run.

    python -m benchmarks --quick                      # two minutes on two CPU cores
    python -m benchmarks                              # the whole matrix of this machine: a GPU's, where there is one
    python -m benchmarks --workloads M1 S1            # parts of it, one by one; the other rows of the CSV stay
    python -m benchmarks --deadline 180               # what matters most first, for so many seconds

Up to a deadline, every case has ours, the baseline and torch.compile first; then come our other ways, then the other
peers. What is finished is in the CSV, also when the rest is killed, and newer rows replace older ones of the same case,
way and device; but for want of time, memory or a package no row replaces one that was timed. In a copy without git, or
in a folder of another repository, the variable COMMIT names the commit.

Workloads: M1 (MoCo's queue), R (M1 at ragged sizes), M2 (the positive is one of the keys), T1 (dual temperature), S1
(in-batch), C1 (CLIP), S2 (NT-Xent), P1 (SiMo). Every way to the loss is checked against float64, value and gradients,
before it is timed; one that is wrong, cannot run here or takes too long is a row that says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from .measure import RESULTS
from .peers import PEERS
from .registry import Peer
from .runner import Plan, check_device, run_all
from .workloads import DTYPES, WORKLOADS, cases, quick_cases


@dataclass(frozen=True)
class Args:
    workloads: tuple[str, ...] = tuple(WORKLOADS)  # which ones
    peers: tuple[str, ...] = ()  # only these ways, by the beginning of their names; ours and the baseline always run
    # float32, high (TF32 products), bfloat16, float16, amp (float32 under autocast). None: all; on a CPU float32
    dtypes: tuple[str, ...] | None = None
    device: Literal["cpu", "cuda"] | None = None  # None: a GPU where there is one
    quick: bool = False  # smaller sizes, fewer rounds, and a CSV of its own
    rounds: int | None = (
        None  # at least; each way runs once a round, medians are reported. None: 7, on a GPU 15, quick 3
    )
    step_limit: float | None = None  # seconds a step may take to be timed. None: 5, quick 2
    deadline: float | None = None  # seconds for everything, cases and ways by worth. None: all, in the matrix's order
    threads: int | None = None  # of torch, on a CPU. None: torch's own choice
    out: Path | None = None  # None: benchmarks/results/{cpu,gpu,quick}.csv


def main(args: Args) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(args, device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    out = args.out or RESULTS / ("quick.csv" if args.quick else "gpu.csv" if device == "cuda" else "cpu.csv")
    rounds = args.rounds or (3 if args.quick else 15 if device == "cuda" else 7)
    step_limit = args.step_limit or (2.0 if args.quick else 5.0)
    dtypes = args.dtypes or (DTYPES if device == "cuda" else ("float32",))
    chosen = [
        case
        for case in (quick_cases(dtypes) if args.quick else cases(device, dtypes))
        if case.workload in args.workloads
    ]
    if not chosen:
        raise SystemExit(f"error: workloads, dtypes: there is no such case in {', '.join(dtypes)}.")
    plan = Plan(device=device, rounds=rounds, step_limit=step_limit, out=out, deadline=args.deadline)
    run_all(chosen, lambda case, one: wants(args, one), plan)


def check(args: Args, device: str) -> None:
    def among(name: str, given: tuple[str, ...], known: list[str], begins: bool = False) -> None:
        wrong = [one for one in given if not any(k == one or (begins and k.startswith(one)) for k in known)]
        if wrong:
            raise SystemExit(f"error: {name}: unknown {', '.join(wrong)}; known: {', '.join(known)}.")

    among("workloads", args.workloads, list(WORKLOADS))
    among("dtypes", args.dtypes or (), list(DTYPES))
    among("peers", args.peers, list(dict.fromkeys(one.name for one in PEERS)), begins=True)
    for name in ("rounds", "threads", "step_limit", "deadline"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise SystemExit(f"error: {name}: expected more than 0, got {value}.")
    check_device(device)


def wants(args: Args, one: Peer) -> bool:
    always = {"eqco_loss", *(kind.baseline for kind in WORKLOADS.values())}
    return not args.peers or one.name in always or one.name.startswith(args.peers)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
