"""EqCo's claim on scikit-learn's digits: with K = 4 negatives a query, mimicking alpha = 256 beats InfoNCE.

    python examples/papers/compare_negatives.py  # about nine minutes on two CPU cores

Six runs of train_simo.py (two losses, three seeds), two at a time; compare.csv and compare.png are what they give. Run
the same command again to resume: a finished run only prints its result.
"""

import csv
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

SCRIPT = Path(__file__).parents[1] / "train_simo.py"


@dataclass(frozen=True)
class Args:
    num_negatives: int = 4  # K
    alpha: float = 256  # how many negatives EqCo mimics
    epochs: int = 40
    seeds: int = 3  # runs of each kind
    jobs: int = 2  # runs at a time, one thread each
    limit: int | None = None  # use no more than so many images
    run_dir: Path = Path("runs/compare-negatives")


@dataclass(frozen=True)
class Job:
    loss: str
    seed: int
    directory: Path
    command: tuple[str, ...]

    def rows(self) -> list[tuple[int, float]]:
        """(epoch, kNN) so far."""
        path = self.directory / "metrics.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [(int(row["epoch"]), float(row["knn"] or "nan")) for row in csv.DictReader(file)]


def main(args: Args) -> None:
    for name in ("jobs", "seeds", "epochs", "num_negatives"):
        if getattr(args, name) < 1:
            raise SystemExit(f"error: {name}: expected 1 or more, got {getattr(args, name)}.")
    jobs = make_jobs(args)
    print(
        f"{len(jobs)} runs of {args.epochs} epochs, {args.jobs} at a time: K = {args.num_negatives}, {args.run_dir}",
        flush=True,
    )
    run_all(jobs, args)
    curves = {(job.loss, job.seed): [(epoch, knn) for epoch, knn in job.rows() if knn == knn] for job in jobs}
    write_csv(args.run_dir / "compare.csv", curves)
    draw(args.run_dir / "compare.png", curves, args)
    for loss in dict.fromkeys(job.loss for job in jobs):
        final = [curves[loss, seed][-1][1] for seed in range(args.seeds)]
        spread = f" +- {statistics.stdev(final):.1f}" if len(final) > 1 else ""
        seeds = ", ".join(f"{knn:.1f}" for knn in final)
        print(f"K = {args.num_negatives}, {loss:24s} kNN {statistics.mean(final):.1f}{spread} %  ({seeds})")
    print(f"Results are in {args.run_dir}")


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def make_jobs(args: Args) -> list[Job]:
    jobs = []
    for seed in range(args.seeds):
        for loss, flag in ((f"EqCo, alpha = {args.alpha:g}", "--eqco"), ("InfoNCE", "--no-eqco")):
            directory = args.run_dir / f"{loss.split(',')[0].lower()}-seed{seed}"
            command = [sys.executable, str(SCRIPT), flag, f"--seed={seed}", f"--run-dir={directory}"]
            command += [f"--num-negatives={args.num_negatives}", f"--alpha={args.alpha:g}", f"--epochs={args.epochs}"]
            command += ["--knn-every=10", "--device=cpu", *([f"--limit={args.limit}"] if args.limit else [])]
            jobs.append(Job(loss, seed, directory, tuple(command)))
    return jobs


def run_all(jobs: list[Job], args: Args) -> None:
    """Each job in a process of its own with one thread; what it prints goes to log.txt beside its metrics."""
    signal.signal(signal.SIGTERM, interrupt)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    waiting, running = list(jobs), dict[Job, "subprocess.Popen[bytes]"]()
    with tqdm(total=len(jobs) * args.epochs, unit="epoch", disable=not sys.stderr.isatty()) as bar:
        told = 0
        try:
            while waiting or running:
                while waiting and len(running) < args.jobs:
                    job = waiting.pop(0)
                    job.directory.mkdir(parents=True, exist_ok=True)
                    with (job.directory / "log.txt").open("ab") as log:
                        running[job] = subprocess.Popen(job.command, stdout=log, stderr=log, env=environment)
                time.sleep(0.5)
                bar.n = sum(max(0, len(job.rows()) - 1) for job in jobs)
                bar.refresh()
                if bar.disable and bar.n >= told + len(jobs) * args.epochs / 10:  # a log file gets ten lines
                    told = bar.n
                    print(f"{told} of {len(jobs) * args.epochs} epochs", flush=True)
                for job, process in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        last = (job.directory / "log.txt").read_text().rstrip().splitlines()[-1:]
                        if process.returncode:
                            raise SystemExit(f"error: {job.loss}, seed {job.seed} failed; see {job.directory}/log.txt")
                        done = len(jobs) - len(waiting) - len(running)
                        bar.write(f"{done} of {len(jobs)}: {job.loss}, seed {job.seed}: {''.join(last)}")
                        sys.stdout.flush()
        except KeyboardInterrupt:
            print("stopped. The same command goes on from the checkpoints", file=sys.stderr)
            raise SystemExit(130) from None
        finally:  # Ctrl-C, SIGTERM, or one that failed
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def write_csv(path: Path, curves: dict[tuple[str, int], list[tuple[int, float]]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["loss", "seed", "epoch", "knn"])
        writer.writerows((*run, *point) for run, points in curves.items() for point in points)


def draw(path: Path, curves: dict[tuple[str, int], list[tuple[int, float]]], args: Args) -> None:
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for loss in dict.fromkeys(loss for loss, _ in curves):
        runs = [points for (name, _), points in curves.items() if name == loss]
        epochs = [epoch for epoch, _ in runs[0]]
        values = [[knn for _, knn in at_epoch] for at_epoch in zip(*runs, strict=True)]  # (epochs, seeds)
        (line,) = axes.plot(epochs, [statistics.mean(knn) for knn in values], marker="o", label=loss)
        axes.fill_between(
            epochs, [min(knn) for knn in values], [max(knn) for knn in values], alpha=0.2, color=line.get_color()
        )
    title = f"SiMo on digits, K = {args.num_negatives}, {args.seeds} seeds (mean and range)"
    axes.set(xlabel="epoch", ylabel="kNN, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
