"""One case, all its ways: a gate each, then all in turn, and a row each."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, otherwise writes its own log
import torch
from torch import Tensor
from tqdm import tqdm

from .measure import (
    Limits,
    Row,
    Timing,
    available_bytes,
    captured,
    interleave,
    interleave_graphs,
    kernels_launched,
    limits,
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
FIGURES = (
    "forward_ms",
    "ms",  # forward and backward, wall-clock, median
    "min_ms",
    "max_ms",
    "times_faster",
    "graph_us",  # the GPU's own time in a CUDA graph, L2 flushed before
    "graph_warm_us",
    "times_faster_graph",
    "peak_extra_mb",
    "kernels",
    "relative_error",
    "rounds",
    "limit_share",  # the least that the machine's limits allow, over the time
)


def run_all(
    chosen: list[Case], wants: Callable[[Peer], bool], device: str, rounds: int, step_limit: float, out: Path
) -> None:
    """Case by case into the CSV; what it has of other cases stays."""
    origin = provenance(device)
    check_out(out, (*CASE, *FIGURES, *WORK, *origin))
    print(f"{origin['device']}; torch {origin['torch']}, triton {origin['triton']}; commit {origin['commit']}")
    machine: dict[str, Limits] = {}
    try:
        for case in tqdm(chosen, desc="cases", unit="case", disable=not sys.stderr.isatty()):
            if case.dtype not in machine:
                machine[case.dtype] = limits(device, case.dtype)
            wanted = [one for one in PEERS if one.wanted(case) and wants(one)]
            rows = run(case, wanted, device, rounds, step_limit, machine[case.dtype])
            show(case, rows)
            new = {(place(row), row["peer"]): {**row, **origin} for row in rows}
            old = {(place(row), row["peer"]): row for row in (read_csv(out) if out.exists() else [])}
            write_csv(out, sorted((old | new).values(), key=place))
    except KeyboardInterrupt:
        print(f"\nstopped. What is finished is in {out}", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"\nwritten to {out}")


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


class Measured(NamedTuple):
    """What a way took."""

    error: float
    forward: Timing
    both: Timing
    peak_bytes: int
    rounds: int
    kernels: int | None
    graph: tuple[Timing, Timing] | None  # L2 flushed before, and not

    @property
    def seconds(self) -> float:
        """The GPU's own where it is known."""
        return self.graph[0].median if self.graph else self.both.median


def run(case: Case, wanted: list[Peer], device: str, rounds: int, step_limit: float, machine: Limits) -> list[Row]:
    """The rows of a case."""
    set_precision(case.dtype)
    torch._dynamo.reset()  # every case its own programs, none made general by another's shapes
    problem = Problem(case, device)
    truth = [x.detach() for x in problem.truth()]
    ways: dict[str, Way] = {}
    refused: dict[str, str] = {}
    for one in tqdm(wanted, desc=f"{case.workload}: checking", leave=False, disable=not sys.stderr.isatty()):
        answer = ready(one, problem, truth, step_limit)
        if isinstance(answer, str):
            refused[one.name] = answer
        else:
            ways[one.name] = answer
    del truth
    free(device)
    measured = measure(ways, device, rounds)
    least = machine.seconds(case.operations, case.bytes)
    base = measured.get(WORKLOADS[case.workload].baseline)
    rows = []
    for one in wanted:
        of = case.workload, case.n, case.k, case.d, case.layout, case.dtype, one.name
        version = one.version if one.name in measured else ""
        row = dict(zip(CASE, (*map(str, of), version, refused.get(one.name, "timed")), strict=True))
        row |= dict.fromkeys(FIGURES, "")
        if one.name in measured:
            row |= figures(measured[one.name], base, least)
        rows.append(row | dict(zip(WORK, (f"{case.operations:.3g}", f"{case.bytes:.3g}"), strict=True)))
    return rows


def measure(ways: dict[str, Way], device: str, rounds: int) -> dict[str, Measured]:
    """All in turn."""
    steps = {name: way.step for name, way in ways.items()}
    rounds = max(rounds, min(MANY, int(QUICK / sum(way.seconds for way in ways.values()))) if ways else 0)
    forwards = interleave({name: way.forward for name, way in ways.items()}, rounds, "forward", device)
    both = interleave(steps, rounds, "forward and backward", device)
    memory = {name: peak_extra_bytes(step, device) for name, step in steps.items()}
    kernels: dict[str, int] = {}
    graphs: dict[str, tuple[Timing, Timing]] = {}
    if device == "cuda":
        recorded = {}
        for name, step in sorted(steps.items(), key=lambda item: item[0] != "eqco_loss"):  # ours first
            try:
                recorded[name] = captured(step)
            except RuntimeError as failure:  # the host waits for it, or its pool does not fit beside the others'
                torch.cuda.synchronize()
                tqdm.write(f"{name}: no CUDA graph: {str(failure).splitlines()[0][:100]}")
        graphs = interleave_graphs(recorded, rounds)
        recorded.clear()
        kernels = {name: kernels_launched(step) for name, step in steps.items()}  # last: a profiler may stay attached
    return {
        name: Measured(way.error, forwards[name], both[name], memory[name], rounds, kernels.get(name), graphs.get(name))
        for name, way in ways.items()
    }


def figures(way: Measured, base: Measured | None, least: float) -> Row:
    """The columns of FIGURES that are known."""
    row = {
        "forward_ms": f"{1e3 * way.forward.median:.4g}",
        "ms": f"{1e3 * way.both.median:.4g}",
        "min_ms": f"{1e3 * way.both.low:.4g}",
        "max_ms": f"{1e3 * way.both.high:.4g}",
        "peak_extra_mb": f"{way.peak_bytes / 1e6:.2f}",
        "relative_error": f"{way.error:.1e}",
        "rounds": str(way.rounds),
        "limit_share": f"{least / way.seconds:.3f}",
    }
    if base is not None:
        row["times_faster"] = f"{base.both.median / way.both.median:.3f}"
    if way.kernels is not None:
        row["kernels"] = str(way.kernels)
    if way.graph is not None:
        cold, warm = way.graph
        row |= {"graph_us": f"{1e6 * cold.median:.4g}", "graph_warm_us": f"{1e6 * warm.median:.4g}"}
        if base is not None and base.graph is not None:
            row["times_faster_graph"] = f"{base.graph[0].median / cold.median:.3f}"
    return row


def ready(one: Peer, problem: Problem, truth: list[Tensor], step_limit: float) -> Way | str:
    """Prepared, warmed up and right, or the reason why it is not timed."""
    case, device = problem.case, problem.device.type
    free(device)  # what the one before it left
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
            error = relative_error([x.detach() for x in got], truth)
            seconds = wall_clock(step, device)
    except UnavailableError as reason:
        return str(reason)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as failure:
        if isinstance(failure, RuntimeError) and "can't allocate memory" in str(failure):
            return "out of memory"
        first = (str(failure).strip().splitlines() or ["no text"])[0]
        return f"fails: {type(failure).__name__}: {first[:120]}"
    if error > MAX_ERROR[case.dtype]:
        return f"wrong: relative error {error:.1e}, over {MAX_ERROR[case.dtype]:.0e}"
    if seconds > step_limit:
        return f"too slow: a step took {seconds:.1f} s, over {step_limit:g}"
    return Way(forward, step, error, seconds)


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


def show(case: Case, rows: list[Row]) -> None:
    tqdm.write(f"\n{case.workload} {case.dtype}: {WORKLOADS[case.workload].title}; {case.size}")
    graph = any(row["graph_us"] for row in rows)
    head = f"{'':42}{'fwd ms':>9}{'ms':>9}{'min-max':>17}{'x':>7}"
    head += f"{'graph us':>10}{'x':>7}{'kernels':>9}" if graph else ""
    tqdm.write(head + f"{'MB':>9}{'of limit':>10}{'error':>10}")
    for row in rows:
        if row["status"] != "timed":
            tqdm.write(f"{row['peer']:42}  {row['status']}")
            continue
        line = f"{row['peer']:42}{row['forward_ms']:>9}{row['ms']:>9}{row['min_ms'] + '-' + row['max_ms']:>17}"
        line += f"{shorter(row['times_faster']):>7}"
        if graph:
            line += f"{row['graph_us']:>10}{shorter(row['times_faster_graph']):>7}{row['kernels']:>9}"
        line += f"{row['peak_extra_mb']:>9}{percent(row['limit_share']):>10}{row['relative_error']:>10}"
        tqdm.write(line)


def shorter(ratio: str) -> str:
    return f"{float(ratio):.2f}" if ratio else ""


def percent(share: str) -> str:
    return f"{100 * float(share):.0f} %"
