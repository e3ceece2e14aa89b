"""python -m benchmarks: loss throughput and memory, side by side in one run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, otherwise writes its own log
import torch
import tyro

from .measure import interleave, peak_extra_bytes, provenance, write_csv
from .workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"


@dataclass
class Args:
    """Time each workload's variants in turn, forward and backward, after each has agreed with float64."""

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    """Which ones: M1 (MoCo's queue), S1 (in-batch, both gradients)."""
    rounds: int = 15
    """Rounds after the warm-up; each variant runs once a round, medians are reported."""
    threads: int | None = None
    """Threads for torch; default: torch's own choice."""
    out: Path = RESULTS / "cpu.csv"
    """Where the rows go."""


MAX_ERROR = 2e-5  # relative, of loss and gradients in float32: a variant that is further from float64 is not timed


def main(args: Args) -> None:
    unknown = [name for name in args.workloads if name not in WORKLOADS]
    if unknown:
        raise SystemExit(f"unknown workload {', '.join(unknown)}; known: {', '.join(WORKLOADS)}")
    if args.rounds < 1:
        raise SystemExit(f"--rounds: expected at least 1, got {args.rounds}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    origin = provenance()
    print(f"{origin['device']}; torch {origin['torch']}; commit {origin['commit']}; float32, forward + backward")
    rows: list[dict[str, str]] = []
    for name in args.workloads:
        workload = WORKLOADS[name]()
        errors = {variant: workload.error(variant) for variant in workload.variants}
        wrong = {variant: error for variant, error in errors.items() if not error <= MAX_ERROR}
        if wrong:
            raise SystemExit(f"{name}: not timed, since these disagree with float64: {wrong}")
        steps = {variant: partial(workload.step, variant) for variant in workload.variants}
        memory = {variant: peak_extra_bytes(step) for variant, step in steps.items()}
        timings = interleave(steps, args.rounds, name)
        base = timings[workload.baseline].median
        print(f"\n{workload.name}: {workload.size}, {args.rounds} rounds")
        print(f"{'':48}{'ms':>9}{'min-max':>17}{'x faster':>10}{'peak extra MB':>15}{'error':>10}")
        for variant, timing in timings.items():
            span = f"{timing.low * 1e3:.0f}-{timing.high * 1e3:.0f}"
            ratio, megabytes = base / timing.median, memory[variant] / 1e6
            print(
                f"{variant:48}{timing.median * 1e3:9.1f}{span:>17}{ratio:10.2f}{megabytes:15.2f}{errors[variant]:10.1e}"
            )
            rows.append(
                {
                    "workload": workload.name,
                    "size": workload.size,
                    "variant": variant,
                    "median_ms": f"{timing.median * 1e3:.2f}",
                    "min_ms": f"{timing.low * 1e3:.2f}",
                    "max_ms": f"{timing.high * 1e3:.2f}",
                    "times_faster_than_baseline": f"{ratio:.3f}",
                    "peak_extra_mb": f"{megabytes:.3f}",
                    "relative_error": f"{errors[variant]:.2e}",
                    "rounds": str(args.rounds),
                    **origin,
                }
            )
    write_csv(args.out, rows)
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=Args.__doc__))
