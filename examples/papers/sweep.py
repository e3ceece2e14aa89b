"""The papers' figures and tables: a grid of runs, what they give in one CSV, and ours beside the papers'.

    python examples/papers/sweep.py --grid digits-k --jobs 2               # Figures 3 and 4 on digits, two CPU cores
    python examples/papers/sweep.py --grid cifar10-small --jobs 2          # K = 4 on CIFAR-10, two CPU cores
    python examples/papers/sweep.py --grid cifar10-k --data-dir DIR        # the same on CIFAR-10, one GPU
    python examples/papers/sweep.py --grid cifar100-dual --data-dir DIR    # the dual-temperature paper's table, one GPU
    python examples/papers/sweep.py --grid cifar10-quick --time-limit 10   # Figure 4 in minutes of a GPU
    python examples/papers/sweep.py --grid cifar100-quick --time-limit 10  # SimCo, SimMoCo and MoCo v2 in 40 epochs
    python examples/papers/sweep.py --grid cifar10-long --time-limit 10    # SiMo for 200 epochs; again, until done
    python examples/papers/sweep.py --grid cifar10-k --draw-only           # from the CSV alone

alpha (Tables 3 and 4, Figure 3 (b)), batch (Table 1), momentum (Table 6) and norm (Table 7) run on digits, or with
--dataset on CIFAR. Each run is a training script in a directory of its own, and a row of the CSV once it is done. Run
the same command again to go on: what the CSV has is skipped, and a run that was stopped goes on from its checkpoint.
A try, with --seeds, --epochs, --limit or --arch, has results of its own in tries, in the --run-dir.
"""

import json
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

import torch
import tyro
from pretrain.arguments import check
from pretrain.data import open_data
from pretrain.run import check_device, clear_errors, command, fail, write_rows
from sweeps.grids import GRIDS
from sweeps.jobs import Args, Job, Row, jobs_of, results_of
from sweeps.pool import Pool
from sweeps.results import read, row_of, show


def main(args: Args) -> None:
    check_args(args)
    grid = GRIDS[args.grid]
    table = jobs_of(args, grid)
    path = (
        results_of(args) / f"{args.grid}{'' if args.dataset in (None, grid.dataset) else '-' + str(args.dataset)}.csv"
    )
    rows = read(path)
    if not args.draw_only:
        every = sorted((job for jobs in table.values() for job in jobs), key=lambda job: job.args.seed)
        jobs = {tuple(job.key.values()): job for job in every}
        complete = run_missing(args, list(jobs.values()), rows, path)
    if args.draw_only or any(row_of(job, rows) for jobs in table.values() for job in jobs):
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
    out = results_of(args)
    for directory in (out, *(() if args.draw_only else (args.run_dir,))):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            name = "out" if directory == out else "run_dir"
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


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
