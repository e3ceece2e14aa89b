"""The papers' figures and tables: a grid of runs, what they give in one CSV, and ours beside the papers'.

    python examples/sweep.py --grid digits-k --jobs 2                    # Figures 3 and 4 on digits, two CPU cores
    python examples/sweep.py --grid cifar10-k --data-dir DIR             # the same on CIFAR-10, one GPU
    python examples/sweep.py --grid cifar100-dual --data-dir DIR         # the dual-temperature paper's table, one GPU
    python examples/sweep.py --grid cifar10-k --draw-only                # from the CSV alone

alpha (Tables 3 and 4, Figure 3 (b)), batch (Table 1), momentum (Table 6) and norm (Table 7) run on digits, or with
--dataset on CIFAR. Each run is a training script in a directory of its own, and a row of the CSV once it is done. Run
the same command again to go on: what the CSV has is skipped, and a run that was stopped goes on from its checkpoint.
"""

import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple, NoReturn

import torch
import train_moco
import train_simclr
import train_simco
import train_simmoco
import train_simo
import tyro
from pretrain.arguments import Common, check
from pretrain.data import open_data
from pretrain.run import check_device, clear_errors, command, commit, fail, read_rows, write_rows, written_whole

HERE = Path(__file__).parent
DEFAULTS: dict[str, dict[str, Any]] = {
    "simo": train_simo.DEFAULTS,
    "moco": train_moco.DEFAULTS,
    "simclr": train_simclr.DEFAULTS,
    "simco": train_simco.DEFAULTS,
    "simmoco": train_simmoco.DEFAULTS,
}
NAMES = {"simo": "SiMo", "moco": "MoCo v2", "simclr": "SimCLR", "simco": "SimCo", "simmoco": "SimMoCo"}
ALPHAS = (256, 1024, 4096, 16384, 65536)
# What the papers report (top-1 of a linear probe, %): EqCo's of ImageNet and ResNet-50, Zhang et al.'s of CIFAR-100.
TABLE_1 = {256: 67.5, 512: 67.5, 1024: 67.4}
TABLE_3 = dict(zip(ALPHAS, (68.0, 68.1, 68.1, 68.4, 68.5), strict=True))
TABLE_4 = dict(zip(ALPHAS, (67.0, 67.1, 67.6, 67.3, 67.5), strict=True))
FIGURE_3B = {256: 62.0, 4096: 65.3}  # SimCLR, by alpha
TABLE_6 = {False: 62.1, True: 64.4}  # without a momentum encoder and with one
TABLE_7 = {"split": 58.8, "batch": 64.4}  # shuffling BN and SyncBN, as one process has them
DUAL = {
    "simco": {64: 58.04, 128: 58.29, 256: 58.35, 512: 57.08, 1024: 55.34},
    "simmoco": {64: 54.02, 128: 54.93, 256: 54.11, 512: 52.45, 1024: 49.70},
    "moco": {64: 52.58, 128: 54.40, 256: 53.28, 512: 51.47, 1024: 48.90},
}

Row = dict[str, Any]
Dataset = Literal["digits", "cifar10", "cifar100"]


@dataclass(frozen=True)
class Args:
    grid: str = "digits-k"  # digits-k, cifar10-k, cifar100-dual, alpha, batch, momentum or norm
    dataset: Dataset | None = None  # None: the grid's own
    data_dir: Path | None = None  # torchvision's files, or DIR/{train,test}/<class>/*. None: data/
    seeds: int | None = None  # runs of each setting. None: the grid's own number
    epochs: int | None = None  # of each run. None: the grid's own
    jobs: int = 1  # runs at a time; with more than one, a thread each
    time_limit: float | None = None  # minutes from now; no run is started that would not finish, and none goes on
    draw_only: bool = False  # draw from the CSV and run nothing
    linear_eval: bool = False  # MoCo's probe after each run; not on digits, nor where one learns with the run
    probe_epochs: int | None = None  # of that probe. None: its protocol's
    limit: int | None = None  # use no more than so many images: for a try
    arch: Literal["small", "resnet18"] | None = None  # None: the training script's
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: Path = Path("runs/sweep")  # of the runs themselves, with their checkpoints
    out: Path = field(default=HERE / "results" / "sweep")  # of the CSV, the table and the figure


class Setting(NamedTuple):
    """What is varied: where it is in the figure, the training script's arguments, and the paper's value."""

    method: str
    line: str  # of the figure
    x: float | str
    changes: dict[str, Any]  # to the script's defaults
    paper: float | None = None


class Grid(NamedTuple):
    title: str
    settings: Callable[[str], list[Setting]]  # of a data set
    dataset: Dataset
    axis: str
    seeds: int = 1
    epochs: int | None = None  # None: the training script's
    panels: bool = True  # a panel for each method, or one for all
    paper_on: str = "ImageNet"  # what the paper's values are of


class Job(NamedTuple):
    """One run: a setting and a seed."""

    method: str
    args: Common
    directory: Path
    probe: tuple[str, ...]  # the command of the linear probe, if there is to be one

    @property
    def key(self) -> Row:
        """What tells it from all others in the CSV."""
        args = self.args
        k, alpha = negatives_of(self.method, args)
        varied = {"k": k, "alpha": alpha, "key_momentum": getattr(args, "key_momentum", None)}
        names = ("batch_size", "norm", "recipe", "arch", "epochs", "limit", "seed")
        key = {
            "method": self.method,
            "dataset": args.dataset,
            **varied,
            **{name: getattr(args, name) for name in names},
        }
        return {name: text(value) for name, value in key.items()}

    @property
    def name(self) -> str:
        parts = [NAMES[self.method], *(f"{name} {self.key[name]}" for name in ("k", "alpha", "batch_size"))]
        return ", ".join([*parts, f"momentum {self.key['key_momentum'] or 'none'}", f"norm {self.key['norm']}"]) + (
            f", seed {self.args.seed}"
        )


# ---------------------------------------------------------------------------------------------- the grids


def by_negatives(dataset: str) -> list[Setting]:
    """Few and many negatives, with and without EqCo."""
    alpha, small = (256, (2, 4, 16, 64, 127)) if dataset == "digits" else (256, (4, 16, 64, 255))
    settings = []
    for k in small:
        paper = 68.1 if k == 16 else None
        settings.append(Setting("simo", f"EqCo, alpha = {alpha}", k, {"num_negatives": k, "alpha": alpha}, paper))
        settings.append(Setting("simo", "InfoNCE", k, {"num_negatives": k, "eqco": False}))
    for k in (16, 64, 256, 1024, 4096) if dataset != "digits" else ():
        own = None if k == 4096 else 4096.0  # the same run
        settings.append(Setting("moco", "EqCo, alpha = 4096", k, {"queue_size": k, "alpha": own}))
        settings.append(Setting("moco", "InfoNCE", k, {"queue_size": k, "alpha": None}))
    return settings


def by_alpha(dataset: str) -> list[Setting]:
    most = 127 if dataset == "digits" else 255
    simo = [Setting("simo", "ours", a, {"num_negatives": most, "alpha": a}, TABLE_3[a]) for a in ALPHAS]
    moco = [Setting("moco", "ours", a, {"queue_size": 256, "alpha": float(a)}, TABLE_4[a]) for a in ALPHAS]
    simclr = [Setting("simclr", "ours", a, {"alpha": float(a)}, paper) for a, paper in FIGURE_3B.items()]
    return simo + moco + simclr


def by_batch(dataset: str) -> list[Setting]:
    """The learning rate follows N; the paper's N, or an eighth of it where there are 1,500 images."""
    factor = 8 if dataset == "digits" else 1
    return [Setting("moco", "ours", n // factor, {"batch_size": n // factor}, paper) for n, paper in TABLE_1.items()]


def by_momentum(dataset: str) -> list[Setting]:
    own = DEFAULTS["simo"][dataset].key_momentum
    return [
        Setting("simo", "ours", f"{m:g}", {"key_momentum": m}, paper)
        for m, paper in zip((0.0, own), TABLE_6.values(), strict=True)
    ]


def by_norm(dataset: str) -> list[Setting]:
    """On one device shuffling BN is that over parts of a batch, and SyncBN is batch norm."""
    return [Setting("simo", "ours", norm, {"norm": norm}, paper) for norm, paper in TABLE_7.items()]


def by_batch_dual(dataset: str) -> list[Setting]:
    sizes = (256, 64, 128, 512, 1024)  # the paper's own first
    same = {"recipe": "simco", "online_probe": True}  # the same views and probe for all three
    return [Setting(m, NAMES[m], n, {"batch_size": n, **same}, DUAL[m][n]) for n in sizes for m in DUAL]


GRIDS = {
    "digits-k": Grid("Figures 3 and 4: the number of negatives", by_negatives, "digits", "K", seeds=3, epochs=40),
    "cifar10-k": Grid("Figures 3 and 4: the number of negatives", by_negatives, "cifar10", "K", epochs=100),
    "cifar100-dual": Grid(
        "Dual temperature: the batch size", by_batch_dual, "cifar100", "N", 1, 200, False, "CIFAR-100"
    ),
    "alpha": Grid("Tables 3 and 4, Figure 3 (b): alpha", by_alpha, "digits", "alpha", seeds=3, epochs=40),
    "batch": Grid("Table 1: queries of a batch", by_batch, "digits", "N", seeds=3, epochs=40),
    "momentum": Grid("Table 6: the key encoder's momentum", by_momentum, "digits", "momentum", seeds=3, epochs=40),
    "norm": Grid("Table 7: shuffling BN (split) and SyncBN (batch)", by_norm, "digits", "norm", seeds=3, epochs=40),
}


def negatives_of(method: str, args: Common) -> tuple[int, float]:
    """K, and how many the loss mimics."""
    if isinstance(args, train_moco.Args):
        return args.queue_size, float(args.alpha or args.queue_size)
    if isinstance(args, train_simclr.Args):
        k = 2 * args.batch_size - 2
        return k, float(args.alpha if args.eqco else k)
    k = args.batch_size - 1
    if isinstance(args, train_simo.Args):
        k = min(k, args.num_negatives)
        return k, float(args.alpha if args.eqco else k)
    return k, float(k)


def jobs_of(args: Args, grid: Grid) -> dict[int, list[Job]]:
    """Of each setting, its runs over the seeds. Two settings may share a run: with alpha = K, EqCo is InfoNCE."""
    dataset = args.dataset or grid.dataset
    return {
        number: [job_of(args, grid, dataset, setting, seed) for seed in range(args.seeds or grid.seeds)]
        for number, setting in enumerate(grid.settings(dataset))
    }


def job_of(args: Args, grid: Grid, dataset: Dataset, setting: Setting, seed: int) -> Job:
    own = DEFAULTS[setting.method][dataset]
    gpu = args.device != "cpu" and torch.cuda.is_available()
    changes = dict(setting.changes)
    changes |= {"dataset": dataset, "data_dir": args.data_dir, "seed": seed, "limit": args.limit, "device": args.device}
    changes |= {} if dataset == "digits" else {"augment": "device", "precision": "bf16-mixed" if gpu else "32-true"}
    changes |= {"epochs": args.epochs or (grid.epochs if dataset == grid.dataset else None) or own.epochs}
    changes |= {"arch": args.arch or own.arch}
    run_args = replace(own, **changes)
    job = Job(setting.method, run_args, Path(), ())
    varied = [f"{name}{value}" for name, value in job.key.items() if value and name not in ("method", "dataset")]
    directory = args.run_dir / dataset / "-".join([setting.method, *varied])
    job = job._replace(directory=directory, args=replace(run_args, run_dir=directory))
    if dataset == "digits" or run_args.online_probe or not args.linear_eval:
        return job
    probe = [sys.executable, str(HERE / "linear_eval.py"), str(directory), f"--device={args.device}"]
    probe += ["--protocol=moco", "--augment=device", f"--precision={run_args.precision}"]
    probe += [f"--epochs={args.probe_epochs}"] if args.probe_epochs else []
    probe += [f"--limit={args.limit}", f"--batch-size={min(256, args.limit)}"] if args.limit else []
    return job._replace(probe=tuple(probe))


# ---------------------------------------------------------------------------------------------- running them


def main(args: Args) -> None:
    check_args(args)
    grid = GRIDS[args.grid]
    table = jobs_of(args, grid)
    path = args.out / f"{args.grid}{'' if args.dataset in (None, grid.dataset) else '-' + str(args.dataset)}.csv"
    rows = read(path)
    if not args.draw_only:
        every = sorted((job for jobs in table.values() for job in jobs), key=lambda job: job.args.seed)
        jobs = {tuple(job.key.values()): job for job in every}
        complete = run_missing(args, list(jobs.values()), rows, path)
    show(args, grid, table, rows, path)
    if not args.draw_only and not complete:
        print(f"Not all runs are done. Continue with\n  {command()}")


def check_args(args: Args) -> None:
    if args.grid not in GRIDS:
        fail(f"grid: expected one of {', '.join(GRIDS)}, got {args.grid}.")
    for name in ("seeds", "epochs", "probe_epochs", "jobs", "time_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            fail(f"{name}: expected more than 0, got {value}.")
    check_device(args.device)
    for directory in (args.out, *(() if args.draw_only else (args.run_dir,))):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            name = "out" if directory == args.out else "run_dir"
            fail(f"{name}: {directory} cannot be made ({error.strerror}). Give another --{name.replace('_', '-')}.")


def check_jobs(jobs: list[Job]) -> None:
    """Arguments and data, before the first run."""
    for job in jobs:
        check(job.args)
    first = jobs[0].args
    with clear_errors():
        data = open_data(first.dataset, first.data_dir, seed=0, device=torch.device("cpu"), limit=first.limit)
    most = max(job.args.batch_size for job in jobs)
    if most > data.train_size:
        fail(f"limit: expected at least {most} training images for a batch, got {data.train_size}. Give a larger one.")


def run_missing(args: Args, jobs: list[Job], rows: list[Row], path: Path) -> bool:
    """Run what has no row yet and add its row; whether all are done."""
    for job in jobs:
        if row_of(job, rows) is None and (job.directory / "row.json").exists():
            add_row(job, json.loads((job.directory / "row.json").read_text()), rows, path)
    missing = [job for job in jobs if row_of(job, rows) is None]
    print(
        f"command  {command()}\nresults  {path}: {len(jobs) - len(missing)} runs done, {len(missing)} to do", flush=True
    )
    if not missing:
        return True
    check_jobs(missing)
    before = [float(row["wall_seconds"]) for job in jobs if (row := row_of(job, rows))]
    pool = Pool(args, before)
    try:
        with closing(pool.finished(missing)) as finished:  # which ends what still runs
            for job, row in finished:
                add_row(job, row, rows, path)
                left = sum(row_of(other, rows) is None for other in jobs)
                probe = f", probe {float(row['probe']):.1f} %" if row["probe"] else ""
                line = f"{job.name}: kNN {float(row['knn']):.1f} %{probe}, {float(row['wall_seconds']):.0f} s"
                print(f"[{len(jobs) - left}/{len(jobs)}] {line}; {pool.eta(left)}", flush=True)
    except KeyboardInterrupt:
        print(f"\nstopped. Finished runs are in {path}. Continue with\n  {command()}", file=sys.stderr)
        raise SystemExit(130) from None
    return all(row_of(job, rows) is not None for job in jobs)


def add_row(job: Job, row: Row, rows: list[Row], path: Path) -> None:
    """In the place of one of the same run, which had no probe."""
    rows[:] = [other for other in rows if any(other.get(name) != value for name, value in job.key.items())] + [row]
    write_rows(path, rows)


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


def words_of(job: Job) -> list[str]:
    """The command: what differs from the training script's defaults for the data set."""
    own = DEFAULTS[job.method][job.args.dataset]
    words = [sys.executable, str(HERE / f"train_{job.method}.py"), f"--dataset={job.args.dataset}"]
    for one in fields(job.args):
        value, name = getattr(job.args, one.name), one.name.replace("_", "-")
        if one.name == "dataset" or value == getattr(own, one.name):
            continue
        words.append(("--" if value else "--no-") + name if isinstance(value, bool) else f"--{name}={value}")
    return words


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


# ---------------------------------------------------------------------------------------------- table and figure


def text(value: Any) -> str:
    """As it is in the CSV."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    return read_rows(path, lambda row: (float(row["knn"]), float(row["probe"] or "nan"), float(row["wall_seconds"])))


def row_of(job: Job, rows: list[Row]) -> Row | None:
    """Its row; one without the probe that is asked for does not count."""
    wanted = job.key
    return next(
        (r for r in rows if all(r.get(name) == wanted[name] for name in wanted) and (r["probe"] or not job.probe)), None
    )


class Point(NamedTuple):
    setting: Setting
    knn: list[float]  # of each seed
    probe: list[float]


def points_of(grid: Grid, dataset: str, table: dict[int, list[Job]], rows: list[Row]) -> list[Point]:
    points = []
    for number, setting in enumerate(grid.settings(dataset)):
        found = [row for job in table[number] if (row := row_of(job, rows))]
        if found:
            probes = [float(row["probe"]) for row in found if row["probe"]]
            points.append(Point(setting, [float(row["knn"]) for row in found], probes))
    return points


def show(args: Args, grid: Grid, table: dict[int, list[Job]], rows: list[Row], path: Path) -> None:
    dataset = args.dataset or grid.dataset
    points = points_of(grid, dataset, table, rows)
    if not points:
        fail(f"{path} has no run of this grid yet. Run the command without --draw-only, with the arguments it had.")
    lines = [f"{grid.title}, {dataset}", "", *table_lines(grid, points), *verdicts(points)]
    print("\n".join(lines))
    with written_whole(path.with_suffix(".md")) as file:
        file.write("\n".join([*lines, "", f"`{short_command(args)}`", ""]).encode())
    draw(path.with_suffix(".png"), grid, dataset, points)
    print(f"Results are in {path}, {path.with_suffix('.md').name} and {path.with_suffix('.png').name}")


def short_command(args: Args) -> str:
    """What decides the results, without the machine's own paths."""
    given = {
        "dataset": args.dataset,
        "seeds": args.seeds,
        "epochs": args.epochs,
        "limit": args.limit,
        "arch": args.arch,
    }
    words = [f"--{name} {value}" for name, value in given.items() if value is not None]
    return " ".join(["python examples/sweep.py --grid", args.grid, *words])


def table_lines(grid: Grid, points: list[Point]) -> list[str]:
    head = ["method", grid.axis, "loss" if grid.axis == "K" else "", "seeds", "kNN, %", "linear probe, %"]
    head.append(f"paper, {grid.paper_on}, %")
    body = [
        [
            NAMES[setting.method],
            str(setting.x),
            setting.line if grid.axis == "K" else "",
            str(len(knn)),
            spread(knn),
            spread(probe),
            "" if setting.paper is None else str(setting.paper),
        ]
        for setting, knn, probe in points
    ]
    keep = [column for column in range(len(head)) if any(row[column] for row in body)]
    rows = [[row[column] for column in keep] for row in [head, *body]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(keep), *lines[1:]]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def verdicts(points: list[Point]) -> list[str]:
    """What EqCo claims of K, in points of kNN, where there are runs to tell."""
    lines = []
    for method in dict.fromkeys(point.setting.method for point in points):
        for line in sorted({p.setting.line for p in points if p.setting.line.startswith(("EqCo", "InfoNCE"))}):
            of_k = {p.setting.x: statistics.mean(p.knn) for p in points if p.setting[:2] == (method, line)}
            if len(of_k) > 1:
                least, most = min(of_k), max(of_k)
                gaps = [f"K = {k} {of_k[k] - of_k[most]:+.1f}" for k in dict.fromkeys((least, 16)) if k in of_k]
                lines.append(f"{NAMES[method]}, {line}: against K = {most}, {', '.join(gaps)} points of kNN.")
    return ["", *lines] if lines else []


def draw(path: Path, grid: Grid, dataset: str, points: list[Point]) -> None:
    """kNN above and the probe below; crosses are the paper's, where they are of the same data."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    methods = list(dict.fromkeys(point.setting.method for point in points)) if grid.panels else [""]
    measures = ["knn", *(["probe"] if any(point.probe for point in points) else [])]
    figure = Figure(figsize=(1.5 + 4 * len(methods), 3.2 * len(measures) + 0.4), layout="constrained")
    same_data = dataset == grid.paper_on.lower().replace("-", "")
    for panels, measure in zip(figure.subplots(len(measures), len(methods), squeeze=False), measures, strict=True):
        for axes, method in zip(panels, methods, strict=True):
            mine = [point for point in points if method in ("", point.setting.method)]
            draw_panel(axes, mine, measure, same_data and measure == "probe")
            axes.set(xlabel=grid.axis, ylabel="kNN, %" if measure == "knn" else "linear probe, %")
            axes.set_title(NAMES[method] if method else "")
            axes.grid(alpha=0.3)
            if len({point.setting.line for point in mine}) > 1:
                axes.legend(fontsize="small")
    figure.suptitle(f"{grid.title}, {dataset}")
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_panel(axes: Any, points: list[Point], measure: str, papers: bool) -> None:
    numbers = all(isinstance(point.setting.x, int) for point in points)
    ticks = list(dict.fromkeys(point.setting.x for point in points))
    ticks = sorted(ticks, key=float) if numbers else ticks
    place = {x: math.log2(float(x)) if numbers else i for i, x in enumerate(ticks)}
    for number, line in enumerate(dict.fromkeys(point.setting.line for point in points)):
        mine = [p for p in points if p.setting.line == line and (p.knn if measure == "knn" else p.probe)]
        mine.sort(key=lambda point: place[point.setting.x])
        values = [point.knn if measure == "knn" else point.probe for point in mine]
        at = [place[point.setting.x] for point in mine]
        means = [statistics.mean(found) for found in values]
        deviations = [statistics.stdev(found) if len(found) > 1 else 0.0 for found in values]
        axes.errorbar(at, means, deviations, fmt="o-", color=f"C{number}", capsize=3, markersize=4, label=line)
        if papers:
            axes.plot(at, [p.setting.paper for p in mine], "x--", color=f"C{number}", alpha=0.6, label=f"{line}, paper")
    axes.set_xticks(list(place.values()), [str(x) for x in ticks])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
