"""The proof that a GPU owes, in one command that fits ten minutes: tests, then figures in order of worth.

    python -m benchmarks.gpu_check                          # writes into benchmarks/results/gpu_check
    python -m benchmarks.gpu_check --deadline 300 --skip tests

First the tests that need a GPU, in parallel processes. Then, in one process, cases in order of worth, each with ours,
the baseline and torch.compile; the loss inside a training step; our other ways (compiled, in CUDA graphs, by engine)
and the other peers; the engines against each other, and the kernels' tiles against a few others; training steps whose
encoders are compiled; how time grows; and our kernels' own times, last, as a profiler may stay attached.

Every part has seconds that no part before it may take, and what there was no time for is told with its command. What is
finished is written after each case, and the goals met, missed and not run after each part, into goals.txt. What still
runs a few seconds after the deadline is ended. The exit status is that of the tests, or 1 where a part fails or ours is
wrong somewhere. ``python -m benchmarks.report --add FOLDER`` takes what it wrote into the pages.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from . import scaling
from .goals import GOALS, Run, broken, table
from .gpu_parts import Leave, engines, kernels, tiles
from .gpu_tests import STOPPED, run_tests
from .measure import RESULTS, provenance
from .runner import CASE, FIGURES, WORK, Plan, Wants, check_device, check_out, is_first, lost, run_all
from .workloads import DTYPES, WORKLOADS, Case, cases

OTHERS = 2**28  # bytes of the GPU, which are fewer than any process that uses it holds
GRACE = 5.0  # seconds that a run may be late, because a part finishes what it has begun
STDERR = 2  # as a number, because sys.stderr may be a stand-in that has none
OVERRUN = 1.1  # cases are given less than their part has by this factor, because one that has begun is finished
EAGER_STEP, COMPILED_STEP, GROWTH = 20, 40, 20  # seconds that steps of one model, or scaling, need to show anything
PARTS = ("tests", "cases", "step", "ways", "engines", "tiles", "compiled", "scaling", "kernels")


@dataclass(frozen=True)
class Args:
    deadline: float = 540.0  # seconds for everything
    tests: float = 150.0  # of them, at most, for the tests
    first: float = 200.0  # and for the first look at every case
    skip: tuple[str, ...] = ()  # of tests, cases, step, ways, engines, tiles, compiled (steps), scaling, kernels
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    processes: int = 14  # for the tests
    rounds: int = 15
    out: Path | None = None  # None: $OUT, or benchmarks/results/gpu_check


class Part(NamedTuple):
    """Something to run, which is told when it should be over by the clock of ``time.monotonic``."""

    name: str
    least: float  # seconds that are kept for it
    most: float  # seconds that it may take where more are left
    run: Callable[[float], int | None]  # returns a status


class Account:
    """What a run showed and what it left out, which is told at the end and written after every part."""

    def __init__(self, run: Run, out: Path, again: Callable[[str], str]) -> None:
        self.run, self.out, self.again = run, out, again
        self.left_out: list[str] = []

    def leave(self, name: str, what: str = "", command: str = "") -> None:
        line = f"no time for {name}{f' ({what})' if what else ''}: {command or self.again(name)}"
        self.left_out.append(line)
        print(line, flush=True)

    def __str__(self) -> str:
        rows = self.run.rows()
        return "\n".join([table(rows, self.run.origin["device"]), *broken(rows), *self.left_out])

    def write(self) -> None:
        (self.out / "goals.txt").write_text(f"{self}\n")


def main(args: Args) -> int:
    end = time.monotonic() + args.deadline
    check(args)
    check_device("cuda")
    out = args.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS / "gpu_check")
    out.mkdir(parents=True, exist_ok=True)
    origin = provenance("cuda")
    for name in ("gpu.csv", "scaling-gpu.csv"):
        check_out(out / name, (*CASE, *FIGURES, *WORK, *origin))
    step = None if {"step", "compiled"} <= set(args.skip) else step_module()
    if step is not None:
        step.check_out(out / "step-gpu.csv", origin)
    anew = not {"cases", "ways"} <= set(args.skip)
    account = Account(Run.begin(out / "gpu.csv", origin, anew), out, lambda name: again(args, name))
    account.write()
    status = 0
    try:
        with ended_at(end + GRACE, account):
            for part, seconds in shared(chosen(args, out, step, account), end):
                if seconds < 1:
                    account.leave(part.name)
                    continue
                print(f"\n{part.name}, {seconds:.0f} s of {left(end):.0f}", flush=True)
                found = guarded(part, time.monotonic() + seconds)
                status = status or found
                account.write()
                if lost("cuda"):
                    print("error: the GPU is lost to this process, so nothing more is run", flush=True)
                    break
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
        status = 130
    account.write()
    print(f"\n{account}", flush=True)
    return status or int(bool(broken(account.run.rows())))


def check(args: Args) -> None:
    for name, given, known in (("skip", args.skip, PARTS), ("workloads", args.workloads, tuple(WORKLOADS))):
        wrong = [one for one in given if one not in known]
        if wrong:
            raise SystemExit(f"error: {name}: unknown {', '.join(wrong)}; known: {', '.join(known)}.")
    for name in ("deadline", "tests", "first", "processes", "rounds"):
        if not getattr(args, name) > 0:
            raise SystemExit(f"error: {name}: expected more than 0, got {getattr(args, name)}.")


def step_module() -> Any:
    """``benchmarks.step``, or None where torchvision, from which its encoders come, cannot be imported."""
    try:
        from . import step
    except (ImportError, RuntimeError) as failure:  # a RuntimeError is what one for another torch raises
        print(f'no training steps without torchvision ({failure}): pip install -e ".[benchmarks]"', flush=True)
        return None
    return step


def again(args: Args, name: str) -> str:
    """The command that runs one part alone."""
    others = " ".join(one for one in PARTS if one != name)
    return f"python -m benchmarks.gpu_check --skip {others}" + (f" --out {args.out}" if args.out else "")


# ---------------------------------------------------------------------------------------------------------------- time


def left(end: float) -> float:
    return end - time.monotonic()


def shared(parts: list[Part], end: float) -> Iterator[tuple[Part, float]]:
    """Each part gets, when its turn comes, the seconds that are left but for those that are kept for later parts.

    Where too little is left for that, this part and those after it get shares in proportion to what is kept for them.
    """
    for place, part in enumerate(parts):
        kept = sum(other.least for other in parts[place + 1 :])
        fair = left(end) * part.least / (part.least + kept) if part.least else 0.0
        yield part, min(part.most, max(left(end) - kept, fair))


@contextlib.contextmanager
def ended_at(end: float, account: Account) -> Iterator[None]:
    """The goals are told and the process is ended if anything still runs then, in Python, in C or on the GPU.

    Something in C that keeps the interpreter to itself is ended a little later, without a word on the goals, because
    no other thread can run beside it.
    """
    timer = threading.Timer(left(end), end_all, (account,))
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(left(end) + GRACE, exit=True, file=STDERR)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def end_all(account: Account) -> None:
    """This process and those that it started end now, because something hangs that nothing else would end."""
    try:
        print("\nerror: the deadline has passed, and this was still running:", flush=True)
        faulthandler.dump_traceback(file=STDERR)
        account.left_out.append("ended at the deadline")
        account.write()
        print(f"\n{account}", flush=True)
    finally:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(STOPPED)


def descendants(pid: int) -> Iterator[int]:
    """Linux tells the processes that this one started, and those that these started."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # of a process that has just ended
            for child in path.read_text().split():
                yield from descendants(int(child))
                yield int(child)


def guarded(part: Part, until: float) -> int:
    """A part that breaks has a status and stops no other; whoever interrupts one part means all of them."""
    try:
        return part.run(until) or 0
    except (Exception, SystemExit) as failure:
        if isinstance(failure, SystemExit) and failure.code == 130:
            raise KeyboardInterrupt from None
        print(f"{part.name} failed:\n{traceback.format_exc()}", flush=True)
        with contextlib.suppress(RuntimeError):  # of a GPU that is lost
            torch.cuda.empty_cache()
        return 1


# --------------------------------------------------------------------------------------------------------------- parts


def chosen(args: Args, out: Path, step: Any, account: Account) -> list[Part]:
    """The parts come in order of worth, but for the profiler's, which comes last because it may slow down others."""
    goals = [goal.case for goal in GOALS if goal.case.workload in args.workloads]
    matrix = goals + [case for case in cases("cuda", DTYPES) if case.workload in args.workloads and case not in goals]
    plan = Plan(device="cuda", rounds=args.rounds, step_limit=5.0, out=out / "gpu.csv")
    before = held()

    def tests(until: float) -> int:
        try:
            return run_tests(args.processes, left(until), out)
        finally:
            wait_for_the_gpu(before)

    def left_out(name: str) -> Leave:
        return lambda what: account.leave(name, what)

    def other_ways(case: Case, one: Any) -> bool:
        return not is_first(case, one)

    every = [
        Part("tests", 90, args.tests, tests),
        Part("cases", 100, args.first, lambda until: ways(matrix, is_first, plan, until)),
        Part("step", 50, 80, lambda until: steps(step, False, until, out, account)),
        Part("ways", 80, 150, lambda until: ways(goals, other_ways, plan, until)),
        Part("engines", 30, 60, lambda until: engines(until, out, left_out("engines"))),
        Part("tiles", 25, 60, lambda until: tiles(until, out, left_out("tiles"))),
        Part("compiled", 0, 120, lambda until: steps(step, True, until, out, account)),
        Part("scaling", 0, 120, lambda until: grow(until, out, account)),
        Part("kernels", 15, 30, lambda until: kernels(goals, until, out, left_out("kernels"))),
    ]
    without = set(args.skip) | (set() if step is not None else {"step", "compiled"})
    return [part for part in every if part.name not in without]


def held() -> int:
    """This is how many bytes of the GPU's memory are taken, but for this process's tensors."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def wait_for_the_gpu(before: int, seconds: float = 10.0) -> None:
    """Processes of the tests may end late, and what follows would share the GPU's time with them."""
    end = time.monotonic() + seconds
    while held() > before + OTHERS and left(end) > 0:
        time.sleep(0.1)
    more = held() - before
    if more > OTHERS:
        print(f"another process holds {more / 1e9:.1f} GB of the GPU, and may slow down what follows", flush=True)


def ways(chosen: list[Case], wants: Wants, plan: Plan, until: float) -> None:
    run_all(chosen, wants, plan._replace(deadline=left(until) / OVERRUN))


def grow(until: float, out: Path, account: Account) -> None:
    if left(until) < GROWTH:
        account.leave("scaling")
        return
    scaling.main(scaling.Args(deadline=left(until) / OVERRUN, out=out / "scaling-gpu.csv"))


def steps(step: Any, compiled: bool, until: float, out: Path, account: Account) -> None:
    """Encoders are as they are, of which a small one waits for Python, or compiled, as training scripts have them."""
    path = out / "step-gpu.csv"
    for model in step.MODELS:
        if left(until) >= (COMPILED_STEP if compiled else EAGER_STEP):
            step.main(step.Args(models=(model,), compiled=compiled, out=path))
        else:
            command = f"python -m benchmarks.step --models {model} {'--compiled ' if compiled else ''}--out {path}"
            account.leave("compiled" if compiled else "step", model, command)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
