"""How a figure comes about: interleaved rounds, medians, memory, kernels, and what the machine can do at best."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

Step = Callable[[], object]
Row = dict[str, str]
RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Seconds over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def interleave(steps: Mapping[str, Step], rounds: int, label: str, device: str = "cpu") -> dict[str, Timing]:
    """Wall-clock of every step once a round: all of them meet the same machine, and each other in every order."""
    return {name: both.wall for name, both in interleave_both(steps, rounds, label, device).items()}


class HostAndWall(NamedTuple):
    """Until the call returns, and until its work is done: one and the same on a CPU."""

    host: Timing
    wall: Timing


def interleave_both(steps: Mapping[str, Step], rounds: int, label: str, device: str = "cpu") -> dict[str, HostAndWall]:
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in tqdm(range(rounds), desc=label, leave=False, disable=not sys.stderr.isatty()):
        shuffle(order)  # or the same one would always follow the one that leaves the caches coldest
        for name in order:
            with blamed(name):
                seconds[name].append(host_and_wall(steps[name], device))
    return {name: HostAndWall(*(Timing.of(list(s)) for s in zip(*both, strict=True))) for name, both in seconds.items()}


def host_and_wall(step: Step, device: str) -> tuple[float, float]:
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    if device != "cuda":
        return host, host
    torch.cuda.synchronize()
    return host, time.perf_counter() - start


def wall_clock(step: Step, device: str) -> float:
    return host_and_wall(step, device)[1]


class BrokenWayError(Exception):
    """A way failed after it had been checked; the cause is the failure."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextlib.contextmanager
def blamed(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as failure:
        raise BrokenWayError(name) from failure


# --------------------------------------------------------------------------------------------------------------- CPU


@contextlib.contextmanager
def profiling(activity: torch.profiler.ProfilerActivity, memory: bool = False) -> Iterator[torch.profiler.profile]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11 says at each start what it would do with a schedule
        with torch.profiler.profile(activities=[activity], profile_memory=memory) as profile:
            yield profile


def peak_extra_bytes(step: Step, device: str) -> int:
    """The most that torch's allocator held at once in ``step``, beyond what was there: temporaries and results."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profiling(torch.profiler.ProfilerActivity.CPU, memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    if not changes:
        raise RuntimeError("the profiler recorded no allocation: peak memory cannot be told with this build of torch")
    held = peak = 0
    for event in sorted(changes, key=lambda e: float(e["ts"])):
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return peak


def available_bytes(device: str) -> float:
    """Memory that can still be had; infinite where the system does not tell."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    lines = [line for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    return 1024.0 * int(lines[0].split()[1]) if lines else float("inf")


# --------------------------------------------------------------------------------------------------------------- GPU


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """The step as a graph: what is left is the GPU's own time."""
    torch.cuda.empty_cache()  # a graph has a pool of its own
    stream: torch.cuda.Stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), no_waiting():
        for _ in range(3):
            step()
    current = torch.cuda.current_stream()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails may leave its own
    return graph


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """A step that waits for the device fails here: in a capture that would leave memory that nobody can free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode may not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


REPLAY, CALL = 500_000, 10_000_000  # cycles that the GPU sleeps until a replay, or a call from Python, is in its queue


def interleave_gpu(calls: Mapping[str, Step], rounds: int, cycles: int = REPLAY) -> dict[str, tuple[Timing, Timing]]:
    """GPU seconds of each call, in turn and each round in another order: with L2 flushed before, and without."""
    flush = torch.empty(128 * 2**20, dtype=torch.int8, device="cuda")
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            for warm in (False, True):
                if not warm:
                    flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(cycles)
                begin.record()
                with blamed(name):
                    calls[name]()
                end.record()
                torch.cuda.synchronize()
                seconds[name][warm].append(begin.elapsed_time(end) / 1e3)
    return {name: (Timing.of(cold), Timing.of(warm)) for name, (cold, warm) in seconds.items()}


NO_GRAPH = "no CUDA graph"  # where neither memory nor the host is the reason


def no_graph_because(failure: BaseException) -> str:
    """Why a step could not be captured, in a few words.

    The end of a capture fails, too, once the step in it has failed: what came before tells more.
    """
    chain: list[BaseException] = [failure]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    lines = [(str(one).strip().splitlines() or [type(one).__name__])[0] for one in chain]
    if any(isinstance(one, torch.OutOfMemoryError) for one in chain):
        return "no memory for its graph"
    if any("synchroniz" in line or "not permitted when stream is capturing" in line for line in lines):
        return "waits for the host"
    return f"{NO_GRAPH}: {'; before it: '.join(line[:80] for line in lines)}"


def kernels_launched(step: Step) -> int:
    """Kernels, copies and fills that the GPU ran."""
    with profiling(torch.profiler.ProfilerActivity.CUDA) as profile:
        step()
        torch.cuda.synchronize()
    events = profile.events() or []
    found = [e for e in events if e.device_type == torch.profiler.DeviceType.CUDA]
    return len([e for e in found if not e.is_user_annotation])


# ------------------------------------------------------------------------------------------------- the machine's limits


class Limits(NamedTuple):
    """The most that anything reached on this machine: matrix products, and memory."""

    operations: float  # a second
    bytes: float

    def seconds(self, operations: float, size: float) -> float:
        """The least that so much work can take."""
        return max(operations / self.operations, size / self.bytes)

    def reached(self, operations: float, size: float, seconds: float) -> Limits:
        """A way that was faster than products and copies shows what the machine can do."""
        return Limits(max(self.operations, operations / seconds), max(self.bytes, size / seconds))


def set_precision(dtype: str) -> None:
    """Of float32's products."""
    torch.set_float32_matmul_precision("high" if dtype == "high" else "highest")


SHAPES = {  # rows, columns, summed: a square, and what the workloads have
    "cuda": ((8192, 8192, 8192), (16384, 16384, 1024)),
    "cpu": ((2048, 2048, 2048), (512, 512, 512), (256, 16384, 128), (1024, 128, 4096)),
}


def limits(device: str, dtype: str, size: float) -> Limits:
    """The best of products, and of copies that move as many bytes: beyond the caches on a GPU, whose L2 is flushed.

    A GPU that was idle has a low clock, and another program may use it for a while: it is kept busy for a second before
    the first of a process, and its limits are measured anew each time.
    """
    if device == "cuda":
        keep_busy()
        most_products.cache_clear()
        most_bytes.cache_clear()
    return Limits(most_products(device, dtype), most_bytes(device, copied(device, size)))


@functools.cache
def keep_busy(seconds: float = 1.0) -> None:
    """Products on a GPU until its clock is that of a busy one."""
    a = torch.ones(4096, 4096, dtype=torch.bfloat16, device="cuda")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        a @ a
        torch.cuda.synchronize()


def copied(device: str, size: float) -> int:
    """How many bytes a copy moves: on a GPU more than its L2 holds, but no more than an eighth of what is free."""
    if device == "cuda":
        return int(min(2**31, available_bytes(device) / 8))
    return max(2**16, int(size))


@functools.cache
def most_products(device: str, dtype: str) -> float:
    """The best of several shapes, in every dtype that a way may convert to without losing accuracy.

    So float32 counts a GPU's bfloat16 products too, six for one (three for "high"), which is how float32 can be had
    from them; and a CPU's half precision counts float32, which many CPUs multiply faster.
    """
    set_precision(dtype)
    kind = {"high": "float32", "amp": "bfloat16"}.get(dtype, dtype)
    candidates = {kind: 1.0}
    if device == "cpu":
        candidates["float32"] = 1.0
    elif kind == "float32":
        candidates["bfloat16"] = 1 / 3 if dtype == "high" else 1 / 6
    return max(
        worth * products_a_second(device, getattr(torch, name), shape)
        for name, worth in candidates.items()
        for shape in SHAPES[device]
        if device == "cuda" or name == "float32" or max(shape) <= 512  # some CPUs take seconds for large half products
    )


@functools.cache
def most_bytes(device: str, size: int) -> float:
    """Read and written by a copy that moves ``size`` bytes together; on a CPU by one thread, too.

    Two threads meet at the end of every copy, and a busy machine may let one of them wait longer than the copy takes.
    """
    source = torch.zeros(size // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def rate() -> float:
        return size / best(lambda: target.copy_(source), device)

    threads = torch.get_num_threads()
    rates = [rate()]
    if device == "cpu" and threads > 1:
        torch.set_num_threads(1)
        rates.append(rate())
        torch.set_num_threads(threads)
    return max(rates)


def products_a_second(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    rows, columns, summed = shape
    a, b = (torch.randn(n, summed, device=device).to(dtype) for n in (rows, columns))
    return 2.0 * rows * columns * summed / best(lambda: a @ b.T, device)


def best(step: Step, device: str, least: int = 5, seconds: float = 0.025, longest: float = 1.0) -> float:
    """Of five or more, as many as fit; again, until that finds nothing better by a hundredth, or takes too long."""
    step()
    taken: list[float] = []
    while True:
        before, some = min(taken, default=math.inf), [wall_clock(step, device) for _ in range(least)]
        while sum(some) < seconds:
            some.append(wall_clock(step, device))
        taken += some
        if min(some) > 0.99 * before or sum(taken) > longest:
            return min(taken)


# ------------------------------------------------------------------------------------------------------------- records


def relative_error(got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest, in the norm, of loss and gradients. A NaN is infinitely wrong."""
    errors = [float((g.to(t.device).double() - t).norm() / t.norm()) for g, t in zip(got, truth, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def write_csv(path: Path, rows: list[Row]) -> None:
    """All rows, which have the same columns; a file that cannot be finished leaves the one before whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def provenance(device: str) -> Row:
    """What every row carries."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{names[0] if names else 'unknown CPU'}, {torch.get_num_threads()} threads, {capability}"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": os.environ.get("COMMIT") or _commit(),  # a copy has no git, or that of a folder it lies in
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    changed = _git("status", "--porcelain", "--", "eqco_loss", "benchmarks/*.py")
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent.parent
        )
    except OSError:
        return ""  # no git here
    return done.stdout.strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
