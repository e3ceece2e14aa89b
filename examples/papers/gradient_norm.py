"""Figure 2 of EqCo's paper: the gradient norm over training with few and many negatives, without and with EqCo.

    python examples/papers/gradient_norm.py                                   # SiMo on digits, K from 4 to 127
    python examples/papers/gradient_norm.py --dataset cifar10 --data-dir DIR  # MoCo v2, a queue of 4 to 4096, one GPU

A short training for each K, from the same weights on the same views. Every few steps the norm of dL_i/dq_i, q_i the
query at unit length, is averaged over the batch, and so is Theorem 2's bound, (2 / t)(1 - p_i), drawn dashed.

Trainings are kept in gradient_norm.csv as they are done: run the same command again to go on. The figure is beside it.
"""

import copy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

import torch
import torch.nn.functional as F
import train_moco
import train_simo
import tyro
from lightning_fabric import Fabric
from pretrain.arguments import check
from pretrain.console import enough_memory, fail
from pretrain.data import INIT, NEVER, SHUFFLE, Data, Share, generator_of, open_data, seed_of
from pretrain.encoders import make_encoder
from pretrain.norms import check_norm, shuffled
from pretrain.optimizers import make_optimizer
from pretrain.run import clear_errors, command, read_rows, write_rows, written_whole
from pretrain.schedule import learning_rate, set_learning_rate
from pretrain.startup import launch
from torch import Tensor
from tqdm import tqdm

from eqco_loss import EqCoLoss, MomentumQueue, momentum_update

Row = dict[str, Any]
NEGATIVES = {"digits": (4, 16, 64, 127), "cifar10": (4, 16, 64, 256, 1024, 4096)}
ALPHA = {"digits": 256.0, "cifar10": 4096.0}


@dataclass(frozen=True)
class Args:
    dataset: Literal["digits", "cifar10"] = "digits"  # digits: SiMo; cifar10: MoCo v2, whose negatives are a queue
    data_dir: Path | None = None  # torchvision's files, or DIR/{train,test}/<class>/*
    negatives: tuple[int, ...] = ()  # K. None given: 4 16 64 127 on digits, 4 16 64 256 1024 4096 on CIFAR-10
    alpha: float | None = None  # how many negatives EqCo mimics. None: 256 on digits, 4096 on CIFAR-10
    epochs: int = 20  # of each training
    every: int = 5  # steps from one measurement to the next
    batch_size: int | None = None  # N. None: the training script's
    arch: Literal["small", "resnet18"] | None = None  # None: small for digits, resnet18 for CIFAR-10
    limit: int | None = None  # use no more than so many images
    seed: int = 0  # of weights, order and views
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None  # directory of the results. None: runs/gradient-norm-<dataset>


class Cell(NamedTuple):
    """One training. With alpha = K it is one without EqCo."""

    k: int
    alpha: float


Recipe = train_simo.Args | train_moco.Args


@enough_memory("a smaller --batch-size or --arch small")
def main(args: Args) -> None:
    args = resolved(args)
    recipe = recipe_of(args)
    check(recipe)
    fabric = launch(recipe)
    with clear_errors():
        data = open_training_data(recipe, fabric)
    for k in args.negatives:
        if args.dataset == "digits" and not 1 <= k < recipe.batch_size:
            fail(f"negatives: expected 1 to batch_size - 1 = {recipe.batch_size - 1}, got {k}. Give other --negatives.")
    assert args.out is not None
    with clear_errors():
        cells = cells_of(args)
        criteria = {
            cell: EqCoLoss(recipe.temperature, alpha=cell.alpha, **batch_negatives(args, cell)) for cell in cells
        }
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"out: {args.out} cannot be made ({error.strerror}). Give another --out.")
    path = args.out / "gradient_norm.csv"
    rows = read(path, args)
    missing = [cell for cell in cells if cell not in {cell_of(row) for row in rows}]
    print(
        f"command  {command()}\nresults  {args.out}: {len(cells) - len(missing)} trainings done, {len(missing)} to do"
    )
    begun = time.perf_counter()
    try:
        for cell in tqdm(missing, unit="run", disable=not sys.stderr.isatty()):
            rows += train(cell, criteria[cell], args, recipe, data, fabric)
            write_rows(path, rows)
            print(
                f"K = {cell.k}, alpha = {cell.alpha:g}: gradient norm {late_norm(rows, cell):.3f} at the end",
                flush=True,
            )
    except KeyboardInterrupt:
        print(f"\nstopped. Finished trainings are kept. Continue with\n  {command()}", file=sys.stderr)
        raise SystemExit(130) from None
    draw(args.out / "gradient_norm.png", rows, args)
    print(f"{time.perf_counter() - begun:.0f} s. Figure: {args.out / 'gradient_norm.png'}")


# ---------------------------------------------------------------------------------------------- what is trained


def resolved(args: Args) -> Args:
    """With the data set's own where nothing was given."""
    for name in ("epochs", "every"):
        if getattr(args, name) < 1:
            fail(f"{name}: expected 1 or more, got {getattr(args, name)}.")
    return replace(
        args,
        negatives=args.negatives or NEGATIVES[args.dataset],
        alpha=ALPHA[args.dataset] if args.alpha is None else args.alpha,
        out=args.out or Path(f"runs/gradient-norm-{args.dataset}"),
    )


def recipe_of(args: Args) -> Recipe:
    """The training script's defaults for this data set."""
    recipe: Recipe = train_simo.DEFAULTS["digits"]
    if args.dataset == "cifar10":
        gpu = args.device != "cpu" and torch.cuda.is_available()
        precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed" if gpu else "32-true"
        recipe = replace(train_moco.DEFAULTS["cifar10"], dataset="cifar10", augment="device", precision=precision)
    return replace(
        recipe,
        data_dir=args.data_dir,
        epochs=args.epochs,
        batch_size=args.batch_size or recipe.batch_size,
        arch=args.arch or recipe.arch,
        limit=args.limit,
        seed=args.seed,
        device=args.device,
    )


def open_training_data(recipe: Recipe, fabric: Fabric) -> Data:
    data = open_data(
        recipe.dataset,
        recipe.data_dir,
        seed=recipe.seed,
        device=fabric.device,
        limit=recipe.limit,
        recipe=recipe.recipe,
        augment=recipe.augment,
    )
    if recipe.batch_size > data.train_size:
        most = data.train_size
        raise ValueError(f"batch_size: expected at most {most} training images, got {recipe.batch_size}. Give less.")
    check_norm(recipe.norm, fabric.device, 1, recipe.batch_size, recipe.splits)
    return data


def cells_of(args: Args) -> list[Cell]:
    assert args.alpha is not None
    pairs = [Cell(k, alpha) for k in args.negatives for alpha in (float(k), args.alpha)]
    return list(dict.fromkeys(pairs))  # with K = alpha both are the same training


def batch_negatives(args: Args, cell: Cell) -> dict[str, Any]:
    return {"num_negatives": cell.k} if args.dataset == "digits" else {}


def train(cell: Cell, criterion: EqCoLoss, args: Args, recipe: Recipe, data: Data, fabric: Fabric) -> list[Row]:
    """SiMo, or MoCo v2 with a queue of K; what was measured on the way."""
    torch.manual_seed(seed_of(INIT, recipe.seed))
    shape: dict[str, Any] = {"channels": data.channels, "image_size": data.image_size, "dim": recipe.dim}
    digits = args.dataset == "digits"
    head = train_simo.HEAD if digits else train_moco.HEADS["v2"]
    encoder = make_encoder(
        recipe.arch, head=head, norm=recipe.norm, splits=recipe.splits, zero_init_residual=digits, **shape
    )
    key_encoder = copy.deepcopy(encoder).requires_grad_(False).to(fabric.device)
    queue = None if args.dataset == "digits" else MomentumQueue(cell.k, recipe.dim, device=fabric.device)
    plain_optimizer = make_optimizer(recipe, encoder)
    model, optimizer = fabric.setup(encoder, plain_optimizer)
    steps, rows = data.train_size // recipe.batch_size, list[Row]()
    peak = recipe.base_lr * recipe.batch_size / 256

    def encode_keys(view: Tensor, epoch: int, piece: int) -> Tensor:
        """(N, D)."""
        generator = generator_of(SHUFFLE, recipe.seed, epoch, piece)
        with torch.no_grad(), fabric.autocast():
            return shuffled(key_encoder, fabric.to_device(view), generator).float()

    if queue is not None:  # the first batch must meet negatives, and not its own positives
        for (_, key_view), _ in data.batches(NEVER, Share(recipe.batch_size), steps - 1):
            queue.enqueue(encode_keys(key_view, NEVER, 0))
    for epoch in range(recipe.epochs):
        for piece, ((query_view, key_view), _) in enumerate(data.batches(epoch, Share(recipe.batch_size))):
            step = epoch * steps + piece
            when = (step, steps, recipe.epochs, recipe.warmup_epochs, recipe.warmup_from)
            set_learning_rate(plain_optimizer, peak * learning_rate(recipe.schedule, *when))
            momentum_update(encoder, key_encoder, recipe.key_momentum)
            keys = encode_keys(key_view, epoch, piece)
            queries = model(fabric.to_device(query_view))
            metrics = criterion.with_metrics(queries, keys, queue)
            if step % args.every == 0:
                norm = gradient_norm(criterion, queries, keys, queue)
                measured = {"gradient_norm": norm, "bound": metrics.gradient_norm_bound, "loss": metrics.loss.detach()}
                found = {name: round(float(value), 6) for name, value in measured.items()}
                rows.append({**cell._asdict(), "step": step, **found, **made_with(args)})
            fabric.backward(metrics.loss)
            optimizer.step()
            optimizer.zero_grad()
            if queue is not None:
                queue.enqueue(keys)
    return rows


def gradient_norm(criterion: EqCoLoss, queries: Tensor, keys: Tensor, queue: MomentumQueue | None = None) -> Tensor:
    """The mean over the rows of |dL_i/dq_i|, by autograd, at queries and keys (N, D) of unit length."""
    settings = criterion.settings._replace(normalize=False, reduction="sum")._asdict()
    del settings["inter_temperature"]  # which EqCo has not
    unit = F.normalize(queries.detach().float(), dim=1).requires_grad_()
    loss = EqCoLoss(**settings)(unit, F.normalize(keys.float(), dim=1), queue)
    (gradient,) = torch.autograd.grad(loss, unit)  # row i is of L_i alone: the keys are detached
    mean: Tensor = gradient.norm(dim=1).mean()
    return mean


# ---------------------------------------------------------------------------------------------- file and figure


def made_with(args: Args) -> Row:
    names = ("dataset", "epochs", "every", "batch_size", "arch", "limit", "seed")
    return {name: getattr(args, name) for name in names}


def cell_of(row: Row) -> Cell:
    return Cell(int(row["k"]), float(row["alpha"]))


def read(path: Path, args: Args) -> list[Row]:
    wanted = {name: "" if value is None else str(value) for name, value in made_with(args).items()}

    def check_row(row: Row) -> None:
        cell_of(row), int(row["step"]), float(row["gradient_norm"]), float(row["bound"]), [row[name] for name in wanted]

    rows = read_rows(path, check_row)
    others = [{name: row[name] for name in wanted if row[name] != wanted[name]} for row in rows]
    if differing := next(filter(None, others), None):
        saved = ", ".join(f"{name} {value or 'not given'}" for name, value in differing.items())
        fail(f"{path} was made with {saved}. Give the same, or another --out.")
    return rows


def late_norm(rows: list[Row], cell: Cell) -> float:
    """Over the last quarter of a training."""
    norms = [float(row["gradient_norm"]) for row in rows if cell_of(row) == cell]
    last = norms[-max(1, len(norms) // 4) :]
    return sum(last) / len(last)


def draw(path: Path, rows: list[Row], args: Args) -> None:
    """Left without EqCo, right with it: a line for each K, and its bound dashed."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state
    from matplotlib.lines import Line2D

    assert args.alpha is not None
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, with_eqco in zip(panels, (False, True), strict=True):
        for number, k in enumerate(args.negatives):
            cell = Cell(k, args.alpha if with_eqco else float(k))
            mine = [row for row in rows if cell_of(row) == cell]
            steps = [int(row["step"]) for row in mine]
            axes.plot(steps, [float(row["gradient_norm"]) for row in mine], color=f"C{number}")
            axes.plot(steps, [float(row["bound"]) for row in mine], color=f"C{number}", linestyle="--", alpha=0.5)
        title = f"with EqCo, alpha = {args.alpha:g}" if with_eqco else "without EqCo"
        axes.set(xlabel="step", title=title)
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("gradient norm of the unit query")
    handles = [Line2D([], [], color=f"C{number}") for number in range(len(args.negatives))]
    handles.append(Line2D([], [], color="0.4", linestyle="--"))
    labels = [*(f"K = {k}" for k in args.negatives), "bound (Theorem 2)"]
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    method = "SiMo" if args.dataset == "digits" else "MoCo v2"
    figure.suptitle(f"{method} on {args.dataset}")
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
