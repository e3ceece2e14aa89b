"""Table 5 of EqCo's paper: how much mutual information InfoNCE and EqCo find, with 64 to 512 negatives.

    python examples/papers/mutual_information.py          # 40 cells, 35 trainings, two single-thread processes
    python examples/papers/mutual_information.py --quick  # six cells with K of 64 and 128

x ~ N(0, 1) in 20 dimensions, y = rho x + sqrt(1 - rho^2) noise: the truth is I = -10 log(1 - rho^2). Two networks,
20-256-ReLU-128, are trained on K + 1 pairs a step, a query's negatives being the other keys; temperature 1, no
normalisation. Then log(1 + alpha) - loss is averaged over fresh batches; alpha is K in InfoNCE, and 512 in EqCo.

Cells are kept in cells.csv as they are done: run the same command again to go on. curves.csv has the estimates over
training (the paper's Figure 1), and the figures are beside them.
"""

import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

import torch
import tyro
from pretrain.data import seed_of
from pretrain.run import check_device, command, fail, provenance, read_rows, write_rows, written_whole
from torch import Tensor, nn
from tqdm import tqdm

from eqco_loss import EqCoLoss

FEATURES, HIDDEN, WIDTH = 20, 256, 128
TRUTHS, NEGATIVES, ALPHA = (2, 4, 6, 8, 10), (64, 128, 256, 512), 512
PAPER = {  # of each truth, InfoNCE's and EqCo's estimates with 64, 128, 256 and 512 negatives
    2: ((1.7, 1.8, 1.9, 1.9), (1.9, 1.9, 1.9, 1.9)),
    4: ((2.9, 3.2, 3.4, 3.6), (3.8, 3.7, 3.6, 3.6)),
    6: ((3.6, 4.1, 4.5, 4.9), (5.1, 5.0, 4.9, 4.9)),
    8: ((3.9, 4.6, 5.1, 5.6), (5.8, 5.7, 5.7, 5.6)),
    10: ((4.1, 4.7, 5.4, 6.0), (6.1, 6.0, 6.0, 6.0)),
}
SEED = 201  # what a seed is for, beside those of pretrain.data
POINTS = 50  # of a curve

Row = dict[str, Any]


@dataclass(frozen=True)
class Args:
    quick: bool = False  # six cells with K of 64 and 128
    steps: int = 5000  # of training
    batches: int = 1000  # of the estimate
    workers: int = 2  # processes of one thread each; 0: this one
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    out: Path = Path("runs/mutual-information")  # directory of the results


class Cell(NamedTuple):
    truth: int  # I, nats
    loss: str  # infonce or eqco
    negatives: int  # K

    @property
    def alpha(self) -> int:
        return self.negatives if self.loss == "infonce" else ALPHA

    @property
    def paper(self) -> float:
        return PAPER[self.truth][self.loss == "eqco"][NEGATIVES.index(self.negatives)]

    @property
    def trained(self) -> "Cell":
        """With alpha = K both losses are the same run."""
        return self._replace(loss="eqco") if self.negatives == ALPHA else self


TABLE = [Cell(truth, loss, k) for truth in TRUTHS for loss in ("infonce", "eqco") for k in NEGATIVES]
QUICK = [cell for cell in TABLE if (cell.truth, cell.negatives) in {(6, 64), (6, 128), (10, 64)}]


def main(args: Args) -> None:
    for name, least in {"steps": POINTS, "batches": 2, "workers": 0, "seed": 0}.items():
        if getattr(args, name) < least:
            fail(f"{name}: expected {least} or more, got {getattr(args, name)}.")
    check_device(args.device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"out: {args.out} cannot be made ({error.strerror}). Give another --out.")
    cells = QUICK if args.quick else TABLE
    done, curves = read(args, "cells.csv"), read(args, "curves.csv")
    known = {cell_of(row) for row in done}
    missing = sorted(
        {cell.trained for cell in cells} - known, key=lambda cell: (-cell.negatives, cell)
    )  # the longest first
    print(f"command  {command()}\nresults  {args.out}: {len(known)} trainings done, {len(missing)} to do", flush=True)
    started = time.perf_counter()
    try:
        for row, points in tqdm(
            trained(args, missing), total=len(missing), unit="run", disable=not sys.stderr.isatty()
        ):
            done.append(row)
            curves += points
            write_rows(args.out / "curves.csv", curves)
            write_rows(args.out / "cells.csv", done)  # last: a cell that it has is whole
            if not sys.stderr.isatty():
                print(
                    " ".join(f"{name} {row[name]}" for name in ("truth", "loss", "negatives", "estimate")), flush=True
                )
    except KeyboardInterrupt:
        print(f"\nstopped. Finished trainings are kept. Continue with\n  {command()}", file=sys.stderr)
        raise SystemExit(130) from None
    estimates = {cell: float(row["estimate"]) for row in done for cell in cells if cell.trained == cell_of(row)}
    print(report(cells, estimates))
    draw_table(args.out / "table.png", estimates)
    draw_curves(args.out / "curves.png", curves)
    print(f"{time.perf_counter() - started:.0f} s. Figures: {args.out / 'table.png'}, {args.out / 'curves.png'}")


# ---------------------------------------------------------------------------------------------- the experiment


def train(cell: Cell, args: Args) -> tuple[Row, list[Row]]:
    """One training and its estimate: the cell's row, and its curve."""
    started = time.perf_counter()
    torch.manual_seed(seed_of(SEED, args.seed, *cell._replace(loss="")[::2], cell.alpha))
    criterion = EqCoLoss(temperature=1.0, alpha=cell.alpha, normalize=False)
    networks = nn.ModuleList(mlp() for _ in range(2)).to(args.device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=5e-4, fused=True)
    every, recent, points = args.steps // POINTS, torch.zeros((), device=args.device), []
    for step in range(1, args.steps + 1):
        loss = loss_of(criterion, networks, cell, args.device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent += loss.detach()
        if step % every == 0:
            point = {"step": step, "estimate": round(math.log1p(cell.alpha) - float(recent) / every, 4)}
            points.append({**cell._asdict(), **point, **made_with(args)})
            recent.zero_()
    with torch.no_grad():
        losses = torch.stack([loss_of(criterion, networks, cell, args.device) for _ in range(args.batches)])
    row = {
        **cell._asdict(),
        "alpha": cell.alpha,
        "estimate": round(math.log1p(cell.alpha) - float(losses.mean()), 4),
        "standard_error": round(float(losses.std()) / math.sqrt(args.batches), 5),
        "seconds": round(time.perf_counter() - started, 1),
        **made_with(args),
        **provenance(args.device),
    }
    return row, points


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))


def loss_of(criterion: EqCoLoss, networks: nn.ModuleList, cell: Cell, device: str) -> Tensor:
    x, y = pairs(cell.truth, cell.negatives + 1, device)
    loss: Tensor = criterion(networks[0](x), networks[1](y))
    return loss


def pairs(truth: float, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Two (count, 20) with ``truth`` nats of mutual information."""
    x, noise = torch.randn(2, count, FEATURES, device=device).unbind()
    rest = math.exp(-truth / FEATURES)  # sqrt(1 - rho^2)
    return x, math.sqrt(1 - rest**2) * x + rest * noise


def trained(args: Args, cells: list[Cell]) -> Iterator[tuple[Row, list[Row]]]:
    """As they are done."""
    if args.workers == 0 or args.device != "cpu":
        yield from (train(cell, args) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, start_worker) as pool:
        futures = [pool.submit(train, cell, args) for cell in cells]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:  # nobody waits for trainings that will not be kept
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback


# ---------------------------------------------------------------------------------------------- files


def made_with(args: Args) -> Row:
    return {"steps": args.steps, "batches": args.batches, "seed": args.seed}


def cell_of(row: Row) -> Cell:
    return Cell(int(row["truth"]), str(row["loss"]), int(row["negatives"]))


def read(args: Args, name: str) -> list[Row]:
    path, wanted = args.out / name, made_with(args)
    rows = read_rows(path, lambda row: (cell_of(row), float(row["estimate"]), [int(row[key]) for key in wanted]))
    others = [row for row in rows if any(int(row[key]) != value for key, value in wanted.items())]
    if others:
        saved = ", ".join(f"{key} {others[0][key]}" for key in wanted)
        count = len({cell_of(row) for row in rows})
        fail(f"{path} was made with {saved}. Give the same, or another --out. It has {count} trainings.")
    return rows


# ---------------------------------------------------------------------------------------------- table and figures


def report(cells: list[Cell], estimates: dict[Cell, float]) -> str:
    lines = ["  I  loss       K  ours  paper"]
    for cell in cells:
        lines.append(f"{cell.truth:3}  {cell.loss:7} {cell.negatives:4}  {estimates[cell]:.2f}  {cell.paper:.1f}")
    worst = max(cells, key=lambda cell: abs(estimates[cell] - cell.paper))
    near = sum(abs(estimates[cell] - cell.paper) <= 0.15 for cell in cells)
    gap, where = abs(estimates[worst] - worst.paper), f"I = {worst.truth}, {worst.loss}, K = {worst.negatives}"
    lines.append(f"{near} of {len(cells)} within 0.15 of the paper; the farthest, by {gap:.2f}, is {where}.")
    return "\n".join(lines)


def draw_table(path: Path, estimates: dict[Cell, float]) -> None:
    """Ours as lines, the paper's as crosses, the truth in grey."""
    truths = sorted({cell.truth for cell in estimates})
    figure, panels = canvas(len(truths))
    for axes, truth in zip(panels, truths, strict=True):
        axes.axhline(truth, color="0.7", label="truth")
        for number, loss in enumerate(("infonce", "eqco")):
            mine = sorted(cell for cell in estimates if (cell.truth, cell.loss) == (truth, loss))
            x = [cell.negatives for cell in mine]
            axes.plot(x, [estimates[cell] for cell in mine], f"C{number}-o", markersize=4, label=f"{loss}, ours")
            axes.plot(x, [cell.paper for cell in mine], f"C{number}x", markersize=9, label=f"{loss}, paper")
        axes.set_xscale("log", base=2)
        axes.set_xticks(NEGATIVES, [str(k) for k in NEGATIVES])
        axes.set(xlabel="K", title=f"I = {truth}")
    finish(figure, panels, path)


def draw_curves(path: Path, curves: list[Row]) -> None:
    """Each loss with its several K; the truth in grey."""
    truths = sorted({int(row["truth"]) for row in curves})
    figure, panels = canvas(len(truths))
    shades = {k: 0.3 + 0.23 * i for i, k in enumerate(NEGATIVES)}
    for axes, truth in zip(panels, truths, strict=True):
        axes.axhline(truth, color="0.7", label="truth")
        for cell in sorted({cell_of(row) for row in curves if int(row["truth"]) == truth}):
            points = [(int(row["step"]), float(row["estimate"])) for row in curves if cell_of(row) == cell]
            colour = "C0" if cell.loss == "infonce" else "C1"
            label = f"{'both' if cell.alpha == cell.negatives == ALPHA else cell.loss}, K = {cell.negatives}"
            axes.plot(*zip(*points, strict=True), color=colour, alpha=shades[cell.negatives], label=label)
        axes.set(xlabel="step", title=f"I = {truth}")
    finish(figure, panels, path)


def canvas(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(3 * count + 2, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def finish(figure: Any, panels: Iterable[Any], path: Path) -> None:
    names: dict[str, Any] = {}
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_ylim(0, None)
        names |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.supylabel("estimate, nats")
    figure.legend(names.values(), names.keys(), loc="outside right center", fontsize="small")
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started
    main(tyro.cli(Args, description=__doc__))
