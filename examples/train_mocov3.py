"""MoCo v3 (Chen et al. 2021): momentum contrast without a queue, both directions, and a prediction head on the queries.

    python examples/train_mocov3.py                            # scikit-learn's digits, on a laptop's CPU
    python examples/train_mocov3.py --dataset cifar10          # MoCo's CIFAR recipe with this loss, one GPU
    torchrun --nproc-per-node 8 examples/train_mocov3.py --data-dir DIR --precision bf16-mixed

The last is the paper's ResNet-50 recipe of 100 epochs, whose optimiser, LARS, is timm's: pip install timm. For 300
epochs its base_lr is 0.3. Its views are MoCo v2's here; the paper's are BYOL's, with solarised ones. The loss is the
mean of both directions; the authors' is 4 t times that, which AdamW does not heed, and LARS for no weight matrix.

Run the same command again to resume. Everything a run writes is in its run directory. The defaults below are those for
the digits; each data set has its own: add --dataset or --data-dir before --help to see them.
"""

import copy
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pretrain.arguments import CIFAR, IMAGENET, SMALLER, Common, KeyMomentumSchedule, parse, ranks
from pretrain.choices import Head
from pretrain.console import enough_memory, fail

if TYPE_CHECKING:
    import torch
    from torch import nn

LARS = "sgd has momentum 0.9; lars: the paper's for a ResNet, with momentum 0.9, timm's"
Optimizer = Annotated[Literal["adamw", "sgd", "lars"], tyro.conf.arg(help=LARS)]


@dataclass(frozen=True)
class Args(Common):
    # Method
    key_momentum: float = 0.9  # of the key encoder's moving average
    key_momentum_schedule: KeyMomentumSchedule = "cosine"  # cosine: rises to 1 over the run
    temperature: float = 0.2  # t
    alpha: float | None = None  # EqCo: how many negatives to mimic. None, the paper: K
    hidden: int = 256  # width inside of the projection and prediction heads
    optimizer: Optimizer = "adamw"  # type: ignore[assignment]  # which has one more than the others'


# A warm-up from 0, then half a cosine
SCHEDULE = {"schedule": "cosine", "warmup_epochs": 10, "warmup_from": 0.0, "norm": "sync" if ranks() > 1 else "batch"}
PAPER = {"optimizer": "lars", "base_lr": 0.6, "weight_decay": 1e-6, "batch_size": 4096, "epochs": 100}
SMALL = Args(**{**CIFAR, **SCHEDULE}, key_momentum=0.99, hidden=2048)
LARGE = Args(**{**IMAGENET, **SCHEDULE, **PAPER, "dim": 256}, key_momentum=0.99, temperature=1.0, hidden=4096)
DEFAULTS = {"digits": Args(), "cifar10": SMALL, "cifar100": SMALL, "stl10": SMALL, "imagefolder": LARGE}


@enough_memory(SMALLER)
def main(args: Args) -> None:
    # Here, so that --help need not wait for torch
    import torch
    from pretrain.encoders import perceptron
    from pretrain.norms import convert_norm
    from pretrain.run import clear_errors
    from pretrain.statistics import mean_of
    from pretrain.training import Training
    from torch import nn

    from eqco_loss import EqCoLoss, momentum_update

    if args.optimizer == "lars" and find_spec("timm") is None:
        fail("optimizer: lars is timm's, which is not installed. pip install -e '.[lars]', or give --optimizer adamw.")
    with clear_errors():
        criterion = EqCoLoss(args.temperature, alpha=args.alpha, gather=ranks() > 1)
    label = f"m{args.key_momentum:g}-t{args.temperature:g}" + (f"-alpha{args.alpha:g}" if args.alpha else "")
    training = Training("mocov3", args, label)
    encoder = training.encoder(Head(hidden=args.hidden, batch_norm=True, last_norm="plain"))
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    predictor = perceptron(Head(hidden=args.hidden, batch_norm=True), args.dim, args.dim)  # which the keys have not
    convert_norm(predictor, args.norm, args.splits)
    predicting = nn.Sequential(encoder, predictor)
    k = args.batch_size // args.accumulate - 1
    loss = f"K = {k}, alpha = {args.alpha or k:g}, t = {args.temperature:g}"
    modules = {"predictor": predictor, "key_encoder": key_encoder}
    optimizer = optimizer_of(args, predicting, fused=training.fused)
    model = training.start(encoder, optimizer, criterion, loss, model=predicting, **modules)

    for batch in training.batches():
        first, second = model(batch.query_view), model(batch.key_view)  # (N, D), predictions
        with torch.no_grad(), training.autocast():
            if batch.first:
                momentum = training.key_momentum(args.key_momentum, args.key_momentum_schedule)
                momentum_update(encoder, key_encoder, momentum)
            first_keys = key_encoder(batch.query_view).float()  # (N, D), detached
            second_keys = key_encoder(batch.key_view).float()
        with training.loss_timer():  # the negatives: the other rows of the keys
            forth = criterion.with_metrics(first, second_keys)
            metrics = mean_of(forth, criterion.with_metrics(second, first_keys))
        training.step(metrics, first, second)


def optimizer_of(args: Args, model: "nn.Module", *, fused: bool) -> "torch.optim.Optimizer":
    """LARS leaves biases and batch norm's weights as they are: without weight decay, and by plain SGD."""
    from pretrain.optimizers import make_optimizer

    if args.optimizer != "lars":
        return make_optimizer(args, model, fused=fused)
    import torch
    from timm.optim.lars import Lars

    matrices = [x for x in model.parameters() if x.ndim > 1]
    vectors = [x for x in model.parameters() if x.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = Lars(groups, lr=0.0, momentum=0.9)
    return optimizer


if __name__ == "__main__":
    main(parse(sys.argv[1:], DEFAULTS, __doc__))
