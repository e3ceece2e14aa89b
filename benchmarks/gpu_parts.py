"""The parts of ``benchmarks.gpu_check`` that are no cases: kernels' own times, and engines and tiles in comparison."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eqco_loss import EqCoLoss
from eqco_loss.ops.backends import BACKENDS
from eqco_loss.ops.triton.tables import TileSize

from . import tune_wide
from .history import CASE
from .measure import (
    Row,
    Step,
    captured,
    interleave_both,
    interleave_gpu,
    profiling,
    provenance,
    relative_error,
    set_precision,
    write_csv,
)
from .peers import PEERS
from .runner import free, lost, reason_of, step_of
from .workloads import Case, Problem

Leave = Callable[[str], object]  # is told what there was no time for
STEPS = 10  # that the profiler sees
HOST_ROUNDS = 9
SIZES = ((4096, 128), (4096, 256), (4096, 512), (4096, 1024), (1024, 512), (16384, 512))  # N and D, by worth


def kernels(chosen: list[Case], until: float, out: Path, leave: Leave) -> None:
    """The time of each of our kernels in one step of each case goes to kernels.csv."""
    rows: list[Row] = []
    origin = provenance("cuda")
    for place, case in enumerate(chosen):
        if time.monotonic() > until:
            leave(f"{len(chosen) - place} of {len(chosen)} cases")
            return
        of = dict(zip(CASE, map(str, (case.workload, case.n, case.k, case.d, case.layout, case.dtype)), strict=True))
        try:
            found = kernels_of(case)
            status = "timed"
        except Exception as failure:
            if lost("cuda"):
                raise
            found, status = [("", "", "")], reason_of(failure)
            free("cuda")
        rows += [
            {**of, "kernel": name, "us": us, "launches": launches, "status": status, **origin}
            for name, us, launches in found
        ]
        line = "; ".join(f"{name[:40]} {us}" for name, us, _ in found[:9]) if status == "timed" else status
        print(f"{case.workload} {case.dtype} {case.size}: {line}", flush=True)
        write_csv(out / "kernels.csv", rows)


def kernels_of(case: Case) -> list[tuple[str, str, str]]:
    """Each kernel of a step of ours has its name, its microseconds and its launches; the longest comes first."""
    set_precision(case.dtype)
    problem = Problem(case, "cuda")
    ours = next(one for one in PEERS if one.name == "eqco_loss" and one.wanted(case))
    step = partial(step_of, problem, ours.prepare(problem))
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profiling(torch.profiler.ProfilerActivity.CUDA) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if getattr(e, "self_device_time_total", 0) > 0]
    times = sorted(((e.self_device_time_total / STEPS, e.key, e.count / STEPS) for e in events), reverse=True)
    return [(name, f"{us:.1f}", f"{launches:g}") for us, name, launches in times]


def engines(until: float, out: Path, leave: Leave) -> None:
    """The fused kernels are compared with the wide engine, size by size, in engines.csv."""
    rows: list[Row] = []
    origin = provenance("cuda")
    work = [(n, d, symmetric) for n, d in SIZES for symmetric in (True, False)]
    for place, (n, d, symmetric) in enumerate(work):
        if time.monotonic() > until:
            leave(", ".join(f"N={n} D={d} {'both' if both else 'one'}" for n, d, both in work[place:]))
            return
        try:
            found = compared(n, d, symmetric)
        except Exception as failure:
            if lost("cuda"):
                raise
            print(f"    engines N={n} D={d}: {reason_of(failure.__cause__ or failure)}", flush=True)
            free("cuda")
            continue
        for row in found:
            print("    engine " + "  ".join(row.values()), flush=True)
        rows += [row | origin for row in found]
        if rows:
            write_csv(out / "engines.csv", rows)


def compared(n: int, d: int, symmetric: bool) -> list[Row]:
    """Each engine that serves this size has a row; one that fails says so where its error would be."""
    query, key = (torch.randn(n, d, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    exact = [x.detach().double().requires_grad_() for x in (query, key)]
    truth = gradients_of(EqCoLoss(symmetric=symmetric, backend="torch"), *exact) if n <= 4096 else None
    graphs: dict[str, Step] = {}
    steps: dict[str, Step] = {}
    errors: dict[str, str] = {}
    for name in BACKENDS:
        if name == "torch":
            continue
        step = partial(gradients_of, criterion(symmetric, name), query, key)
        try:
            got = step()
            errors[name] = "" if truth is None else f"{relative_error(got, truth):.1e}"
            graphs[name] = captured(step).replay
            steps[name] = step
        except ValueError as refusal:  # it does not serve such rows
            print(f"    {name} N={n} D={d}: {str(refusal)[:150]}", flush=True)
            errors.pop(name, None)
        except Exception as failure:
            if lost("cuda"):
                raise
            errors[name] = reason_of(failure)
    gpu = interleave_gpu(graphs, 20)
    host = interleave_both(steps, HOST_ROUNDS, "engines", "cuda")
    found = []
    for name, error in errors.items():
        row = {"engine": name, "n": str(n), "d": str(d), "symmetric": str(symmetric), "error": error}
        row |= dict.fromkeys(("us", "warm_us", "host_ms"), "")
        if name in gpu:
            cold, warm = gpu[name]
            row |= {"us": f"{1e6 * cold.median:.4g}", "warm_us": f"{1e6 * warm.median:.4g}"}
            row["host_ms"] = f"{1e3 * host[name].host.median:.3g}"
        found.append(row)
    return found


def criterion(symmetric: bool, backend: Any) -> torch.nn.Module:
    return EqCoLoss(symmetric=symmetric, backend=backend)


def gradients_of(criterion: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(criterion(query, key), (query, key)))


# Each pass has the table's tile (None) and a few that differ from it in rows, warps or stages, because there is no time
# here for all that ``python -m benchmarks.tune`` tries.
FEW: dict[str, list[Any]] = {
    "M1 forward": [None, TileSize(64, 128, 4, 2), TileSize(128, 128, 8, 2), TileSize(64, 64, 4, 3)],
    "S1 forward": [None, TileSize(64, 128, 4, 2), TileSize(128, 128, 8, 2), TileSize(64, 64, 4, 3)],
    "wide statistics": [
        None,
        tune_wide.Candidate(128, 128, 64, 4, 4, 16),
        tune_wide.Candidate(128, 128, 64, 8, 3, 16),
        tune_wide.Candidate(128, 256, 64, 8, 3, 16),
    ],
    "wide weights": [
        None,
        tune_wide.Candidate(128, 128, 64, 4, 4, 16),
        tune_wide.Candidate(128, 128, 64, 8, 3, 16),
        tune_wide.Candidate(128, 256, 64, 8, 3, 16),
    ],
    "S1 keys' gradient": [None, TileSize(64, 128, 4, 3), TileSize(64, 64, 4, 3)],
}
WIDE = tune_wide.Problem("amp", 512, 4096, "cuda")
FUSED = "bfloat16", 128  # dtype and D


def tiles(until: float, out: Path, leave: Leave) -> None:
    """The tables' tiles are compared with a few others, of M1, of S1 and of the wide engine, in tiles.csv."""
    from . import tune  # which needs Triton

    rows: list[Row] = []
    origin = provenance("cuda")
    for place, (name, candidates) in enumerate(FEW.items()):
        if time.monotonic() > until:
            leave(", ".join(list(FEW)[place:]))
            return
        dtype, d = (WIDE.dtype, WIDE.d) if name in tune_wide.PASSES else FUSED
        set_precision(dtype)
        one = tune_wide.passes(WIDE)[name] if name in tune_wide.PASSES else tune.passes(dtype, d, "cuda")[name]
        rows += [row | origin for row in tune.compared(name, one, candidates, (1.0,), dtype, d, 20)]
        write_csv(out / "tiles.csv", rows)
