"""Several runs at a time, each a process, until all are done or the time limit is over."""

import csv
import json
import math
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import torch
from pretrain.run import commit, fail, written_whole

from .jobs import Args, Job, Row, words_of


class Running(NamedTuple):
    job: Job
    process: "subprocess.Popen[bytes]"
    begun: float
    probing: bool


class Pool:
    """So many runs at a time, until the time limit. Whatever ends this also ends them, each with a checkpoint."""

    def __init__(self, args: Args, walls: list[float]) -> None:
        self.args, self.walls, self.running = args, walls, list[Running]()  # walls: seconds of each finished run
        self.deadline = math.inf if args.time_limit is None else time.monotonic() + 60 * args.time_limit
        self.environment = dict(os.environ)
        if args.jobs > 1:
            self.environment["OMP_NUM_THREADS"] = "1"

    def finished(self, jobs: list[Job]) -> Generator[tuple[Job, Row], None, None]:
        """Pairs of a job and its row, as they are done."""
        before = signal.signal(signal.SIGTERM, interrupt)
        waiting = list(jobs)
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.args.jobs:
                    if self.too_late(waiting[0]):
                        waiting.clear()
                    else:
                        self.start(waiting.pop(0))
                if time.monotonic() > self.deadline:
                    print(f"note     time_limit: {self.args.time_limit:g} minutes are over", flush=True)
                    return
                time.sleep(0.2)
                for running in [one for one in self.running if one.process.poll() is not None]:
                    self.end(running)
                    if running.job.probe and not running.probing:
                        self.start(running.job, probing=True)
                    else:
                        row = finished_row(running.job)
                        self.walls.append(float(row["wall_seconds"]))
                        yield running.job, row
        finally:  # the end, Ctrl-C, the limit, or a run that failed
            for running in self.running:
                running.process.terminate()
            for running in self.running:
                running.process.wait()
                spend(running.job, time.monotonic() - running.begun)
            signal.signal(signal.SIGTERM, before)

    def start(self, job: Job, probing: bool = False) -> None:
        job.directory.mkdir(parents=True, exist_ok=True)
        words = list(job.probe) if probing else words_of(job)
        process = started(words, job.directory / "log.txt", self.environment)
        self.running.append(Running(job, process, time.monotonic(), probing))

    def end(self, running: Running) -> None:
        self.running.remove(running)
        spend(running.job, time.monotonic() - running.begun)
        if running.process.returncode:
            log = running.job.directory / "log.txt"
            last = "".join(log.read_text(errors="replace").rstrip().splitlines()[-1:])
            fail(f"{running.job.name} failed: {last}\nSee {log}. Other runs are kept.")

    def too_late(self, job: Job) -> bool:
        """Whether the limit would stop it, by the mean of those that are done."""
        if not self.walls or time.monotonic() + statistics.mean(self.walls) - spent(job) <= self.deadline:
            return False
        print(f"note     time_limit: no time for another run of {statistics.mean(self.walls):.0f} s", flush=True)
        return True

    def eta(self, left: int) -> str:
        now = time.monotonic()
        begun = sum(min(now - one.begun, statistics.mean(self.walls)) for one in self.running)
        seconds = (left * statistics.mean(self.walls) - begun) / min(self.args.jobs, max(left, 1))
        return f"{left} left, about {max(0, seconds) / 60:.0f} min" if left else "all done"


def started(words: list[str], log: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=environment)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def spent(job: Job) -> float:
    """Seconds of all processes that have worked on it."""
    path = job.directory / "seconds.txt"
    return float(path.read_text()) if path.exists() else 0.0


def spend(job: Job, seconds: float) -> None:
    total = spent(job) + seconds
    with written_whole(job.directory / "seconds.txt") as file:
        file.write(f"{total:.1f}\n".encode())


def finished_row(job: Job) -> Row:
    """What the run directory tells, kept there as row.json."""
    directory = job.directory
    result = torch.load(directory / "checkpoint.pt", map_location="cpu", weights_only=True)["result"]
    config = json.loads((directory / "config.json").read_text())
    with (directory / "metrics.csv").open(newline="") as file:
        seconds = sum(float(row["seconds"] or 0) for row in csv.DictReader(file))
    probe = result.get("online_probe", result.get("linear_probe", ""))
    if job.probe:
        probe = json.loads((directory / "linear_eval.json").read_text())["top1"]
    device = torch.cuda.get_device_name() if config["device"].startswith("cuda") else f"{config['threads']} threads"
    row = {
        **job.key,
        "knn": f"{result['knn']:.3f}",
        "probe": f"{probe:.3f}" if probe != "" else "",
        "train_seconds": f"{seconds:.1f}",
        "wall_seconds": f"{spent(job):.1f}",
        "device": device,
        "precision": job.args.precision,
        "versions": "; ".join(f"{name} {version}" for name, version in config["versions"].items()),
        "commit": commit(),
    }
    with written_whole(directory / "row.json") as file:
        file.write(json.dumps(row, indent=2).encode() + b"\n")
    return row
