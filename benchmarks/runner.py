"""One case, all its ways: a gate each, then all in turn, and a row each."""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, otherwise writes its own log
import torch
from torch import Tensor
from tqdm import tqdm

from .console import show
from .history import says_nothing
from .measure import (
    CALL,
    REPLAY,
    BrokenWayError,
    HostAndWall,
    Limits,
    Row,
    Step,
    Timing,
    available_bytes,
    blamed,
    captured,
    interleave,
    interleave_both,
    interleave_gpu,
    kernels_launched,
    limits,
    no_graph_because,
    peak_extra_bytes,
    provenance,
    read_csv,
    relative_error,
    set_precision,
    wall_clock,
    write_csv,
)
from .peers import PEERS
from .registry import Peer, UnavailableError
from .workloads import DTYPES, WORKLOADS, Case, Problem

# Relative, of loss and gradients, in the norm: who is further from float64 is not timed. Packages that sum in bfloat16
# are off by 2 to 3 %; without the negatives' gradient it would be 60 %.
MAX_ERROR = {"float32": 2e-5, "high": 5e-3, "bfloat16": 5e-2, "float16": 2e-2, "amp": 5e-2}
CASE = ("workload", "n", "k", "d", "layout", "dtype", "peer", "version", "status")
WORK = ("operations", "bytes")  # of the matrix products, and of inputs and gradients, that nobody can do without
MANY, QUICK = 50, 1.0  # steps that are over at once are measured in up to so many rounds, as fit into so many seconds
LEAST = 3  # rounds that a median is worth, where fewer were not asked for
FIGURES = (
    "forward_ms",
    "ms",  # forward and backward, wall-clock, median
    "min_ms",
    "max_ms",
    "host_ms",  # of it, until Python is free again; a GPU's step only
    "times_faster",
    "graph_us",  # the GPU's own time in a CUDA graph, L2 flushed before
    "graph_warm_us",
    "times_faster_graph",
    "no_graph",  # why there is none
    "peak_extra_mb",
    "kernels",
    "relative_error",
    "rounds",
    "limit_share",  # the least that the machine's limits allow, over the time
    "limit_operations",  # a second: the most that products, or a way, reached in this run
    "limit_bytes",
)
Wants = Callable[[Case, Peer], bool]


def is_first(case: Case, one: Peer) -> bool:
    """Ours and what it stands against."""
    return one.name in ("eqco_loss", "torch.compile", WORKLOADS[case.workload].baseline)


class Plan(NamedTuple):
    """What a run is given."""

    device: str
    rounds: int  # at least
    step_limit: float  # seconds
    out: Path
    deadline: float | None = None  # seconds for everything


def run_all(chosen: list[Case], wants: Wants, plan: Plan) -> None:
    """Case by case into the CSV; what it has of other cases stays."""
    end = None if plan.deadline is None else time.monotonic() + plan.deadline
    origin = provenance(plan.device)
    check_out(plan.out, (*CASE, *FIGURES, *WORK, *origin))
    print(f"{origin['device']}; torch {origin['torch']}, triton {origin['triton']}; commit {origin['commit']}")
    queue = [
        (case, wanted)
        for part in parts(plan.deadline is not None)
        for case in chosen
        if (wanted := [one for one in PEERS if one.wanted(case) and wants(case, one) and part(case, one)])
    ]
    most: dict[object, float] = {}
    started, done = time.monotonic(), 0
    try:
        for case, wanted in tqdm(queue, desc="cases", unit="case", disable=not sys.stderr.isatty()):
            now = time.monotonic()
            if end is not None and now + (now - started) / max(done, 1) > end:
                left = len({case for case, _ in queue[done:]})
                print(f"\nno time for all ways of {left} cases: what is finished is written", flush=True)
                break
            rows = attempt(case, wanted, plan, most, end)
            done += 1
            if rows:
                show(case, rows)
                add_rows(plan.out, [{**row, **origin} for row in rows])
    except LostDeviceError as lost:
        print(f"error: the GPU is lost: {lost}. What was finished before is in {plan.out}.", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"\nstopped. What is finished is in {plan.out}", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"\nwritten to {plan.out}" if plan.out.exists() else "\nnothing was measured, and no file is written")


def parts(by_worth: bool) -> list[Wants]:
    """All ways of a case at once; or those that matter most of all cases, then ours otherwise, then the others'."""
    if not by_worth:
        return [lambda case, one: True]
    return [
        is_first,
        lambda case, one: not is_first(case, one) and one.name.startswith("eqco_loss"),
        lambda case, one: not is_first(case, one) and not one.name.startswith("eqco_loss"),
    ]


def attempt(
    case: Case, wanted: list[Peer], plan: Plan, most: dict[object, float], end: float | None = None
) -> list[Row]:
    """The rows of the wanted; the baseline runs with them, for the ratio. A case that does not fit is rows too.

    ``most`` is what the run reached so far: operations by dtype, and bytes, on a CPU by how many were copied, since its
    caches serve few of them faster.
    """
    copies = "a GPU's memory" if plan.device == "cuda" else case.bytes
    baseline = WORKLOADS[case.workload].baseline
    extra = [] if any(one.name == baseline for one in wanted) else [one for one in PEERS if one.name == baseline]
    ways = [one for one in extra if one.wanted(case)] + wanted
    try:
        machine = limits(plan.device, case.dtype, case.bytes)
        most[case.dtype] = max(machine.operations, most.get(case.dtype, 0.0))
        most[copies] = max(machine.bytes, most.get(copies, 0.0))
        machine = Limits(most[case.dtype], most[copies])
        rows = run(case, ways, plan.device, plan.rounds, plan.step_limit, machine, end)
    except (RuntimeError, MemoryError) as failure:
        reason = reason_of(failure)
        if lost(plan.device):
            raise LostDeviceError(f"{case.workload} {case.size} {reason}") from failure
        free(plan.device)
        rows = [row_of(case, one, f"the case as a whole: {reason}") for one in ways]
    for row in rows:
        for key, column in ((case.dtype, "limit_operations"), (copies, "limit_bytes")):
            most[key] = max(float(row[column] or 0), most.get(key, 0.0))
    return [row for row in rows if row["peer"] not in {one.name for one in extra}]


class LostDeviceError(Exception):
    """After an illegal access, say, the GPU serves this process no more."""


def lost(device: str) -> bool:
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def add_rows(out: Path, rows: list[Row]) -> None:
    """Beside what the file has; a row of the same case, way and device replaces the one before, if it says as much."""

    def key(row: Row) -> tuple[object, ...]:
        return place(row), row["peer"], row["device"]

    new = {key(row): row for row in rows}
    old = read_csv(out) if out.exists() else []
    for row in old:
        if key(row) in new and says_nothing(new[key(row)]) and not says_nothing(row):
            del new[key(row)]
    old = [row for row in old if key(row) not in new]
    write_csv(out, sorted([*old, *new.values()], key=place))  # of a case the newest last, for a tree without git


def check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: device: torch sees no GPU. Leave --device out, or give --device cpu.")


def check_out(out: Path, columns: tuple[str, ...]) -> None:
    """Before any time is spent: it can be written, and what it has is of these columns and whole."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a"):
            pass
        rows = read_csv(out)
        if not out.stat().st_size:
            out.unlink()
        for row in rows:
            place(row)
    except OSError as error:
        raise SystemExit(f"error: out: {out} cannot be written ({error.strerror}). Give another --out.") from None
    except (KeyError, TypeError, ValueError):
        rows = [{}]
    if any(tuple(row) != columns or None in row.values() for row in rows):
        raise SystemExit(
            f"error: out: {out} is cut, or has other columns than {', '.join(columns)}. Remove it, or give another."
        )


def place(row: Row) -> tuple[int, ...]:
    """Of its case in the matrix."""
    sizes = [int(row[name]) for name in ("n", "k", "d")]
    columns = row["layout"] == "columns"
    return list(WORKLOADS).index(row["workload"]), DTYPES.index(row["dtype"]), *sizes, int(columns)


class Way(NamedTuple):
    """A peer that is ready and right."""

    forward: Callable[[], Tensor]
    step: Callable[[], list[Tensor]]  # loss and gradients
    error: float
    seconds: float  # of a step after the first
    replays: bool  # it is CUDA graphs already


class Measured(NamedTuple):
    """What a way took."""

    error: float
    forward: Timing
    both: HostAndWall
    peak_bytes: int | None  # None: a CUDA graph's own memory, which was taken before
    rounds: int
    kernels: int | None
    graph: tuple[Timing, Timing] | None  # L2 flushed before, and not
    no_graph: str

    @property
    def seconds(self) -> float:
        """The GPU's own where it is known."""
        return self.graph[0].median if self.graph else self.both.wall.median


def run(
    case: Case,
    wanted: list[Peer],
    device: str,
    rounds: int,
    step_limit: float,
    machine: Limits,
    end: float | None = None,
) -> list[Row]:
    """The rows of a case; of a way that had not begun at the ``end``, none.

    What cannot be measured before the ``end`` is a row that says so: a way that would take the time of all others, or
    the case. Plain code is never left out alone, since the others' ratios are over it.
    """
    set_precision(case.dtype)
    torch._dynamo.reset()  # every case its own programs, none made general by another's shapes
    problem = Problem(case, device)
    truth = [x.detach() for x in problem.truth()]
    ways: dict[str, Way] = {}
    refused: dict[str, str] = {}
    baseline = WORKLOADS[case.workload].baseline
    for one in tqdm(wanted, desc=f"{case.workload}: checking", leave=False, disable=not sys.stderr.isatty()):
        if no_time(ways, rounds, device, end):
            break
        answer = ready(one, problem, truth, step_limit, end)
        if one.name != baseline and not isinstance(answer, str):
            answer = no_time({one.name: answer}, rounds, device, end) or answer
        if isinstance(answer, str):
            refused[one.name] = answer
            if lost(device):
                raise LostDeviceError(f"{case.workload} {case.size}, {one.name}: {answer}")
        else:
            ways[one.name] = answer
    truth = [x.cpu() for x in truth]
    free(device)
    measured: dict[str, Measured] = {}
    while ways and not measured:
        if reason := no_time(ways, rounds, device, end):
            refused |= dict.fromkeys(ways, reason)
            break
        try:
            measured = measure(
                ways,
                device,
                max(1, rounds_of(ways, rounds, device, end)),
                lambda got: wrong(relative_error(got, truth), case.dtype),
            )
        except BrokenWayError as broken:
            refused[broken.name] = reason_of(broken.__cause__ or broken)
            del ways[broken.name]
            if lost(device):
                raise LostDeviceError(f"{case.workload} {case.size}, {broken.name}: {refused[broken.name]}") from broken
            free(device)
    for way in measured.values():
        machine = machine.reached(case.operations, case.bytes, way.seconds)
    base = measured.get(baseline)
    return [
        row_of(case, one, "timed", figures(measured[one.name], base, case, machine), one.version)
        if one.name in measured
        else row_of(case, one, refused[one.name])
        for one in wanted
        if one.name in measured or one.name in refused
    ]


def rounds_of(ways: dict[str, Way], rounds: int, device: str, end: float | None) -> int:
    """As many as were asked for, more of quick steps, and none that would end after the ``end``."""
    total = sum(way.seconds for way in ways.values()) or 1e-9  # before the first is checked
    rounds = max(rounds, min(MANY, int(QUICK / total)))
    if end is None:
        return rounds
    a_round, apart = (4, 6) if device == "cuda" else (2, 1)  # steps: forward, both, a graph twice; memory and capture
    return min(rounds, int((end - time.monotonic() - apart * total) / (a_round * total)))


def no_time(ways: dict[str, Way], rounds: int, device: str, end: float | None) -> str:
    """Why the ways cannot be measured before the ``end``; nothing if they can."""
    if end is None or rounds_of(ways, rounds, device, end) >= min(LEAST, rounds):
        return ""
    step = sum(way.seconds for way in ways.values())
    return f"no time: a step took {step:.2g} s, and {max(0.0, end - time.monotonic()):.2g} s were left for all rounds"


def row_of(case: Case, one: Peer, status: str, known: Row | None = None, version: str = "") -> Row:
    of = case.workload, case.n, case.k, case.d, case.layout, case.dtype, one.name, version, status
    row = dict(zip(CASE, map(str, of), strict=True)) | dict.fromkeys(FIGURES, "") | (known or {})
    return row | dict(zip(WORK, (f"{case.operations:.3g}", f"{case.bytes:.3g}"), strict=True))


def measure(
    ways: dict[str, Way], device: str, rounds: int, refusal: Callable[[list[Tensor]], str]
) -> dict[str, Measured]:
    """All in turn; a graph whose outputs meet a ``refusal`` is not timed."""
    steps = {name: way.step for name, way in ways.items()}
    forwards = interleave({name: way.forward for name, way in ways.items()}, rounds, "forward", device)
    both = interleave_both(steps, rounds, "forward and backward", device)
    memory: dict[str, int] = {}
    for name, way in ways.items():
        if not way.replays:
            with blamed(name):
                memory[name] = peak_extra_bytes(way.step, device)
    kernels: dict[str, int] = {}
    graphs: dict[str, tuple[Timing, Timing]] = {}
    no_graph: dict[str, str] = {}
    if device == "cuda":
        recorded: dict[str, Step] = {}
        for name, way in sorted(ways.items(), key=lambda item: item[0] != "eqco_loss"):  # ours first
            if not way.replays:
                try:
                    recorded[name] = right_graph(way.step, refusal).replay
                except Exception as failure:  # the host waits for it, its pool does not fit, a package refuses a stream
                    torch.cuda.synchronize()
                    no_graph[name] = no_graph_because(failure)
        replaying = {name: way.step for name, way in ways.items() if way.replays}
        for calls, cycles in ((recorded, REPLAY), (replaying, CALL)):
            try:
                graphs |= interleave_gpu(calls, rounds, cycles)
            except RuntimeError as failure:  # what flushes L2 has no room: wall-clock is measured all the same
                torch.cuda.synchronize()
                no_graph |= dict.fromkeys(calls, f"no GPU time: {reason_of(failure)}")
            recorded.clear()
        for name, step in steps.items():  # last: a profiler may stay attached
            with blamed(name):
                kernels[name] = kernels_launched(step)
    return {
        name: Measured(
            error=way.error,
            forward=forwards[name],
            both=both[name],
            peak_bytes=memory.get(name),
            rounds=rounds,
            kernels=kernels.get(name),
            graph=graphs.get(name),
            no_graph=no_graph.get(name, ""),
        )
        for name, way in ways.items()
    }


def right_graph(step: Callable[[], list[Tensor]], refusal: Callable[[list[Tensor]], str]) -> torch.cuda.CUDAGraph:
    """The step as a graph, after a replay whose outputs were not refused."""
    outputs: list[Tensor] = []

    def kept() -> None:
        outputs[:] = [x.detach() for x in step()]  # with its history a warm-up would reach into the capture

    graph = captured(kept)
    graph.replay()
    if reason := refusal(outputs):
        raise RuntimeError(reason)
    return graph


def wrong(error: float, dtype: str) -> str:
    """Why a way or its graph is not timed; nothing if it is right."""
    most = MAX_ERROR[dtype]
    return f"wrong: relative error {error:.1e}, over {most:.0e}" if error > most else ""


def figures(way: Measured, base: Measured | None, case: Case, machine: Limits) -> Row:
    """The columns of FIGURES that are known."""
    wall = way.both.wall
    row = {
        "forward_ms": f"{1e3 * way.forward.median:.4g}",
        "ms": f"{1e3 * wall.median:.4g}",
        "min_ms": f"{1e3 * wall.low:.4g}",
        "max_ms": f"{1e3 * wall.high:.4g}",
        "no_graph": way.no_graph,
        "relative_error": f"{way.error:.1e}",
        "rounds": str(way.rounds),
        "limit_share": f"{machine.seconds(case.operations, case.bytes) / way.seconds:.3f}",
        "limit_operations": f"{machine.operations:.4g}",
        "limit_bytes": f"{machine.bytes:.4g}",
    }
    if way.peak_bytes is not None:
        row["peak_extra_mb"] = f"{way.peak_bytes / 1e6:.2f}"
    if base is not None:
        row["times_faster"] = f"{base.both.wall.median / wall.median:.3f}"
    if way.kernels is not None:
        row |= {"kernels": str(way.kernels), "host_ms": f"{1e3 * way.both.host.median:.4g}"}
    if way.graph is not None:
        cold, warm = way.graph
        row |= {"graph_us": f"{1e6 * cold.median:.4g}", "graph_warm_us": f"{1e6 * warm.median:.4g}"}
        if base is not None and base.graph is not None:
            row["times_faster_graph"] = f"{base.graph[0].median / cold.median:.3f}"
    return row


def ready(one: Peer, problem: Problem, truth: list[Tensor], step_limit: float, end: float | None = None) -> Way | str:
    """Prepared, warmed up and right, or the reason why it is not timed."""
    case, device = problem.case, problem.device.type
    free(device)  # what the one before it left
    problem = problem.with_own_leaves() if device == "cuda" else problem
    needed, available = one.bytes(problem), available_bytes(device)
    if needed > 0.8 * available:
        return f"needs about {needed / 1e9:.0f} GB, over four fifths of the {available / 1e9:.0f} that are free"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages' own
            loss = one.prepare(problem)
            forward = partial(forward_of, problem, loss)
            step = partial(step_of, problem, loss)
            got = step()
            if end is not None and time.monotonic() > end:
                return "no time: its first step ended too late"
            for _ in range(2 if one.replays else 0):  # torch.compile warms up, records, and only then replays
                got = step()
            error = relative_error([x.detach() for x in got], truth)
            seconds = wall_clock(step, device)
    except UnavailableError as reason:
        return str(reason)
    except Exception as failure:
        return reason_of(failure)
    if refusal := wrong(error, case.dtype):
        return refusal
    if seconds > step_limit:
        return f"too slow: a step took {seconds:.1f} s, over {step_limit:g}"
    return Way(forward, step, error, seconds, one.replays)


def reason_of(failure: BaseException) -> str:
    """What a row says of it."""
    memory = isinstance(failure, torch.OutOfMemoryError | MemoryError)
    if memory or (isinstance(failure, RuntimeError) and "can't allocate memory" in str(failure)):
        return "out of memory"
    first = (str(failure).strip().splitlines() or ["no text"])[0]
    return f"fails: {type(failure).__name__}: {first[:120]}"


def forward_of(problem: Problem, loss: Callable[[], Tensor]) -> Tensor:
    with torch.autocast(problem.device.type, torch.bfloat16, enabled=problem.case.dtype == "amp"):
        return loss()


def step_of(problem: Problem, loss: Callable[[], Tensor]) -> list[Tensor]:
    value = forward_of(problem, loss)
    return [value, *torch.autograd.grad(value, problem.leaves, problem.scale)]


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
