"""The runs that a grid asks for: their arguments, their directories, and the commands that start them."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import train_moco
import train_simclr
import train_simo
from pretrain.arguments import Common

from .grids import DEFAULTS, NAMES, Dataset, Grid, Setting

EXAMPLES = Path(__file__).parents[2]
RESULTS = EXAMPLES / "results" / "sweep"  # what the pages cite
TRY = ("seeds", "epochs", "probe_epochs", "limit", "arch")  # arguments that make a grid another than the pages'
Row = dict[str, Any]


@dataclass(frozen=True)
class Args:
    # digits-k, alpha, batch, momentum, norm, cifar10-small, -quick, -long, -k, cifar100-quick, -dual
    grid: str = "digits-k"
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
    # Of the CSV, the table and the figure. None: examples/results/sweep; tries in --run-dir where --seeds, --epochs,
    # --probe-epochs, --limit or --arch is given
    out: Path | None = None


def results_of(args: Args) -> Path:
    """The folder of the CSV, the table and the figure. A try must not take the place of what the pages cite."""
    tried = any(getattr(args, name) is not None for name in TRY)
    return args.out or (args.run_dir / "tries" if tried else RESULTS)


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
    changes |= {"arch": args.arch or changes.get("arch", own.arch)}
    run_args = replace(own, **changes)
    job = Job(setting.method, run_args, Path(), ())
    varied = [f"{name}{value}" for name, value in job.key.items() if value and name not in ("method", "dataset")]
    directory = args.run_dir / dataset / "-".join([setting.method, *varied])
    job = job._replace(directory=directory, args=replace(run_args, run_dir=directory))
    if dataset == "digits" or run_args.online_probe or not args.linear_eval:
        return job
    probe = [sys.executable, str(EXAMPLES / "after" / "linear_eval.py"), str(directory), f"--device={args.device}"]
    probe += ["--protocol=moco", "--augment=device", f"--precision={run_args.precision}"]
    probe += [f"--epochs={args.probe_epochs}"] if args.probe_epochs else []
    probe += [f"--limit={args.limit}", f"--batch-size={min(256, args.limit)}"] if args.limit else []
    return job._replace(probe=tuple(probe))


def words_of(job: Job) -> list[str]:
    """The command: what differs from the training script's defaults for the data set."""
    own = DEFAULTS[job.method][job.args.dataset]
    words = [sys.executable, str(EXAMPLES / f"train_{job.method}.py"), f"--dataset={job.args.dataset}"]
    for one in fields(job.args):
        value, name = getattr(job.args, one.name), one.name.replace("_", "-")
        if one.name == "dataset" or value == getattr(own, one.name):
            continue
        words.append(("--" if value else "--no-") + name if isinstance(value, bool) else f"--{name}={value}")
    return words


def text(value: Any) -> str:
    """As it is in the CSV."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
