"""The proof that a GPU owes, in one command that fits ten minutes: tests, then figures in order of worth.

    python -m benchmarks.gpu_check                          # writes into benchmarks/results/gpu_check
    python -m benchmarks.gpu_check --deadline 300 --skip tests

First the tests that need a GPU, in parallel processes. Then, in one process, cases in order of worth, each with ours,
the baseline and torch.compile; our kernels' own times; the loss inside a training step; our other ways (compiled, in
CUDA graphs, by engine) and the other peers; how time grows; and the engines against each other. What is finished is
written after each case, so that a run that is stopped loses nothing. It ends with the goals met, missed, and not run.
``python -m benchmarks.report --add FOLDER`` takes what it wrote into the pages.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from eqco_loss import EqCoLoss
from eqco_loss.ops.backends import BACKENDS

from . import scaling, step
from .gpu_tests import run_tests
from .measure import (
    RESULTS,
    Row,
    Step,
    captured,
    interleave_gpu,
    profiling,
    provenance,
    read_csv,
    relative_error,
    wall_clock,
    write_csv,
)
from .peers import PEERS
from .runner import CASE, Plan, Wants, check_device, is_first, run_all, step_of
from .workloads import DTYPES, WORKLOADS, Case, Problem, cases


class Goal(NamedTuple):
    """A case and what it should take on an H200, in microseconds of a CUDA graph."""

    case: Case
    us: float | None = None


GOALS = [  # in order of worth
    Goal(Case("M1", 256, 65536, dtype="bfloat16"), 28),
    Goal(Case("S1", 4096, 4095, dtype="bfloat16"), 60),
    Goal(Case("C1", 4096, 4095, 512, "amp"), 140),
    Goal(Case("S2", 4096, 8190, dtype="bfloat16"), 135),
    Goal(Case("P1", 256, 16, dtype="amp"), 12),
    Goal(Case("M1", 256, 65536, dtype="amp"), 40),
    Goal(Case("C1", 4096, 4095, 1024, "amp"), 250),
    Goal(Case("S1", 4096, 4095, 256, "bfloat16"), 100),
    Goal(Case("M2", 256, 65536, dtype="bfloat16"), 60),
    Goal(Case("C1", 4096, 4095, 768, "amp")),
    Goal(Case("T1", 256, 65536, dtype="bfloat16"), 38),
    Goal(Case("M1", 1024, 65536, dtype="bfloat16"), 80),
    Goal(Case("S1", 4096, 4095, dtype="amp")),
    Goal(Case("C1", 32768, 32767, 768, "bfloat16"), 13000),
    Goal(Case("M1", 256, 65536), 180),
    Goal(Case("M1", 256, 65536, dtype="high"), 80),
    Goal(Case("S1", 16384, 16383, dtype="bfloat16"), 600),
    Goal(Case("S2", 32768, 65534, dtype="bfloat16"), 6500),
]


OTHERS = 2**28  # bytes of the GPU: less than any process holds
PARTS = ("tests", "cases", "kernels", "step", "ways", "scaling", "engines")


@dataclass(frozen=True)
class Args:
    deadline: float = 540.0  # seconds for everything
    tests: float = 150.0  # of them, at most, for the tests
    first: float = 200.0  # and for the first look at every case
    skip: tuple[str, ...] = ()  # of tests, cases, kernels, step, ways, scaling, engines
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    processes: int = 14  # for the tests
    rounds: int = 15
    out: Path | None = None  # None: $OUT, or benchmarks/results/gpu_check


def main(args: Args) -> int:
    check(args)
    check_device("cuda")
    end = time.monotonic() + args.deadline
    out = args.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS / "gpu_check")
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    goals = [goal.case for goal in GOALS if goal.case.workload in args.workloads]
    matrix = goals + [case for case in cases("cuda", DTYPES) if case.workload in args.workloads and case not in goals]
    if "tests" not in args.skip:
        before = held()
        failed = run_tests(args.processes, args.tests, out)
        wait_for_the_gpu(before)
    plan = Plan(device="cuda", rounds=args.rounds, step_limit=5.0, out=out / "gpu.csv")
    later = 0 if {"scaling", "engines"} <= set(args.skip) else 100  # seconds for what comes after the other ways
    for name, action in {
        "cases": lambda: ways(matrix, is_first, plan, min(args.first, left(end))),
        "kernels": lambda: kernels(goals, min(end, time.monotonic() + 30)),
        "step": lambda: steps(end, out),
        "ways": lambda: ways(goals, lambda case, one: not is_first(case, one), plan, left(end) - later),
        "scaling": lambda: scaling.main(scaling.Args(deadline=max(15, left(end) - 40), out=out / "scaling-gpu.csv")),
        "engines": lambda: engines(end, out),
    }.items():
        if name not in args.skip and left(end) > 15:
            print(f"\n{name}, {left(end):.0f} s left", flush=True)
            guarded(name, action)
    show(read_csv(plan.out) if plan.out.exists() else [])
    return failed


def check(args: Args) -> None:
    for name, given, known in (("skip", args.skip, PARTS), ("workloads", args.workloads, tuple(WORKLOADS))):
        wrong = [one for one in given if one not in known]
        if wrong:
            raise SystemExit(f"error: {name}: unknown {', '.join(wrong)}; known: {', '.join(known)}.")
    for name in ("deadline", "tests", "first", "processes", "rounds"):
        if not getattr(args, name) > 0:
            raise SystemExit(f"error: {name}: expected more than 0, got {getattr(args, name)}.")


def guarded(name: str, action: Callable[[], object]) -> None:
    """One broken part stops no other."""
    try:
        action()
    except (Exception, SystemExit):
        print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
        with contextlib.suppress(RuntimeError):  # of a GPU that is lost
            torch.cuda.empty_cache()


def left(end: float) -> float:
    return end - time.monotonic()


def steps(end: float, out: Path) -> None:
    """With encoders as they are, of which a small one waits for Python, and compiled, as training scripts have them."""
    for compiled in (False, True):
        for model in step.MODELS:
            if left(end) > 40:  # what one may take
                step.main(step.Args(models=(model,), compiled=compiled, out=out / "step-gpu.csv"))


def held() -> int:
    """Bytes of the GPU's memory, but for this process's tensors."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def wait_for_the_gpu(before: int, seconds: float = 10.0) -> None:
    """Until processes of the tests, which may end late, hold none of its memory and take none of its time."""
    end = time.monotonic() + seconds
    while held() > before + OTHERS and left(end) > 0:
        time.sleep(0.1)
    more = held() - before
    if more > OTHERS:
        print(
            f"another process holds {more / 1e9:.1f} GB of the GPU: what follows may be slower than it is", flush=True
        )


def ways(chosen: list[Case], wants: Wants, plan: Plan, seconds: float) -> None:
    if seconds > 15:  # what a case may take
        run_all(chosen, wants, plan._replace(deadline=seconds))


def kernels(chosen: list[Case], end: float) -> None:
    """Our kernels' own times in one step, by their names."""
    for case in chosen:
        if time.monotonic() > end:
            return
        problem = Problem(case, "cuda")
        ours = next(one for one in PEERS if one.name == "eqco_loss" and one.wanted(case))
        one_step = partial(step_of, problem, ours.prepare(problem))
        for _ in range(3):
            one_step()
        torch.cuda.synchronize()
        with profiling(torch.profiler.ProfilerActivity.CUDA) as profile:
            for _ in range(10):
                one_step()
            torch.cuda.synchronize()
        events = [e for e in profile.key_averages() if getattr(e, "self_device_time_total", 0) > 0]
        times = sorted(((e.self_device_time_total / 10, e.key) for e in events), reverse=True)
        line = "; ".join(f"{name[:40]} {us:.1f}" for us, name in times[:9])
        print(f"{case.workload} {case.dtype} {case.size}: {line}", flush=True)


def engines(end: float, out: Path) -> None:
    """The fused kernels against the wide engine, where both can serve."""
    rows: list[Row] = []
    origin = provenance("cuda")
    for n, d in ((4096, 128), (4096, 256), (4096, 512), (4096, 1024), (1024, 512), (16384, 512)):
        for symmetric in (True, False):
            if time.monotonic() > end - 10:
                return
            query, key = (torch.randn(n, d, device="cuda").bfloat16().requires_grad_() for _ in range(2))
            exact = [x.detach().double().requires_grad_() for x in (query, key)]
            truth = gradients_of(EqCoLoss(symmetric=symmetric, backend="torch"), *exact) if n <= 4096 else None
            graphs: dict[str, Step] = {}
            errors, steps = {}, {}
            for name in BACKENDS:
                if name == "torch":
                    continue
                call = steps[name] = partial(gradients_of, criterion(symmetric, name), query, key)
                try:
                    got = call()
                    errors[name] = "" if truth is None else f"{relative_error(got, truth):.1e}"
                    graphs[name] = captured(call).replay
                except Exception as failure:
                    print(f"    {name} N={n} D={d}: {type(failure).__name__}: {str(failure)[:150]}", flush=True)
            for name, (cold, warm) in interleave_gpu(graphs, 20).items():
                host = wall_clock(steps[name], "cuda")
                row = {"engine": name, "n": str(n), "d": str(d), "symmetric": str(symmetric), "error": errors[name]}
                row |= {"us": f"{1e6 * cold.median:.4g}", "warm_us": f"{1e6 * warm.median:.4g}"}
                rows.append(row | {"host_ms": f"{1e3 * host:.3g}"} | origin)
                print("    engine " + "  ".join(rows[-1][key] for key in rows[-1] if key not in origin), flush=True)
            write_csv(out / "engines.csv", rows)


def criterion(symmetric: bool, backend: Any) -> torch.nn.Module:
    return EqCoLoss(symmetric=symmetric, backend=backend)


def gradients_of(criterion: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(criterion(query, key), (query, key)))


def show(rows: list[Row]) -> None:
    """The goals: met, missed, not run."""
    found = {tuple(row[name] for name in CASE[:6]): row for row in rows if row["peer"] == "eqco_loss"}
    rivals = {tuple(row[name] for name in CASE[:6]): row for row in rows if row["peer"] == "torch.compile"}
    print(f"\n{'goal':44}{'wanted':>9}{'is':>9}   torch.compile")
    for case, us in GOALS:
        key = (case.workload, str(case.n), str(case.k), str(case.d), case.layout, case.dtype)
        ours, rival = found.get(key), rivals.get(key)
        measured = ours["graph_us"] if ours else ""
        verdict = "not run" if not measured else "" if us is None else "met" if float(measured) <= us else "missed"
        ratio = (
            f"{float(rival['graph_us']) / float(measured):.2f} x" if measured and rival and rival["graph_us"] else ""
        )
        wanted = "" if us is None else f"{us:g}"
        print(
            f"{case.workload} {case.dtype} {case.size:30}"[:44].ljust(44)
            + f"{wanted:>9}{measured:>9}   {ratio:8} {verdict}"
        )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
