"""SiMo on CIFAR-10, ResNet-18, one GPU: 100 epochs against the clock, 200 epochs for accuracy.

    python examples/gpu_run.py                                # downloads CIFAR-10 to data/
    python examples/gpu_run.py --data-dir DIR                 # torchvision's files, or DIR/{train,test}/<class>/*
    python examples/gpu_run.py --data-dir DIR --epochs 1 2 --arch small --limit 100 --batch-size 32 --out out

Two runs of train_simo.py, one after the other. The targets are five minutes for the first and a kNN of 85 % for the
second, on an H200; the last line is a try on a CPU. Their metrics.csv and config.json, summary.csv and a figure go to
--out. Run the same command again to resume: a finished run only prints its result.
"""

import csv
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Args:
    data_dir: Path | None = None  # None: data/, where torchvision downloads to
    epochs: tuple[int, int] = (100, 200)  # of the fast run and of the accurate one
    arch: str = "resnet18"
    batch_size: int = 512  # N of the fast run; the accurate one has half
    limit: int | None = None  # use no more than so many images
    seed: int = 0
    run_dir: Path = Path("runs/gpu")  # of the runs themselves, with their checkpoints
    out: Path = field(default=HERE / "results" / "gpu")  # what is worth keeping


def main(args: Args) -> None:
    results = [run(args, "fast", args.epochs[0], []), run(args, "accurate", args.epochs[1], ["--symmetric"])]
    with (args.out / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
    draw(args.out)
    for result in results:
        print(", ".join(f"{name} {value}" for name, value in result.items()))
    print(f"Results are in {args.out}")


def run(args: Args, name: str, epochs: int, more: list[str]) -> dict[str, object]:
    """Train, or take the finished run; copy what is worth keeping."""
    batch = args.batch_size if name == "fast" else args.batch_size // 2
    directory, kept = args.run_dir / name, args.out / name
    command = [sys.executable, str(HERE / "train_simo.py"), "--dataset=cifar10", f"--arch={args.arch}"]
    command += [f"--epochs={epochs}", f"--batch-size={batch}", f"--seed={args.seed}", f"--run-dir={directory}"]
    # No blur on 32 pixels, and a rate that suits a schedule this short.
    command += ["--recipe=simco", "--augment=device", "--base-lr=0.06", "--temperature=0.1", "--num-negatives=128"]
    command += ["--precision=bf16-mixed", "--knn-every=20", *more]
    command += [f"--data-dir={args.data_dir}"] if args.data_dir else []
    command += [f"--limit={args.limit}"] if args.limit else []
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.terminate()),  # it saves and ends
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # which it gets too
    }
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code != 0:
        raise SystemExit(code)
    wall = time.perf_counter() - begun
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("metrics.csv", "config.json"):
        shutil.copyfile(directory / file, kept / file)
    rows = read(kept)
    training = sum(float(row["seconds"] or 0) for row in rows)
    return {
        "run": name,
        "epochs": epochs,
        "knn": round(float(rows[-1]["knn"]), 2),
        "minutes_training": round(training / 60, 2),
        "minutes_this_call": round(
            wall / 60, 2
        ),  # with start, kNN and checkpoints; little where it was finished before
        "images_per_s": max(float(row["images_per_s"] or 0) for row in rows),
    }


def read(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def draw(out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("fast", "accurate"):
        rows = read(out / name)
        measured = [row for row in rows if row["knn"]]
        left.plot([int(row["epoch"]) for row in measured], [float(row["knn"]) for row in measured], "o-", label=name)
        trained = [row for row in rows if row["loss"]]
        right.plot([int(row["epoch"]) for row in trained], [float(row["loss"]) for row in trained], label=name)
    left.set(xlabel="epoch", ylabel="kNN, %", title="SiMo on CIFAR-10, ResNet-18")
    right.set(xlabel="epoch", ylabel="loss")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out / "curves.png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
