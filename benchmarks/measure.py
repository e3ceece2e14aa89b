"""How a figure comes about: interleaved rounds, medians, and the bytes torch's allocator was asked for."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm


class Timing(NamedTuple):
    """Seconds over the rounds."""

    median: float
    low: float
    high: float


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, label: str) -> dict[str, Timing]:
    """Time every variant once a round, in turn: all of them meet the same machine. One round first to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in tqdm(range(rounds + 1), desc=label, leave=False):
        for name, step in variants.items():
            start = time.perf_counter()
            step()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def peak_extra_bytes(step: Callable[[], object]) -> int:
    """The most that torch's CPU allocator held at once in ``step``, beyond what was there: temporaries and results."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
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


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    """All rows, which have the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def provenance() -> dict[str, str]:
    """What every row carries."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    processor = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    return {
        "device": f"{processor}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
