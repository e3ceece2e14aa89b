"""SimMoCo (Zhang et al. 2022): MoCo without its queue; dual temperature makes a batch's negatives enough.

    python examples/train_simmoco.py                           # scikit-learn's digits, on a laptop's CPU
    python examples/train_simmoco.py --dataset cifar100        # the paper's, one GPU: linear probe 54.11 %
    python examples/train_simmoco.py --dataset cifar100 --plus # both directions, for twice the time

Run the same command again to resume. Everything a run writes is in its run directory. The defaults below are those for
the digits; each data set has its own: add --dataset or --data-dir before --help to see them.
"""

import copy
import sys
from dataclasses import dataclass

from pretrain.arguments import IMAGENET, SIMCO, SMALLER, Common, KeyMomentumSchedule, parse, ranks
from pretrain.choices import Head
from pretrain.console import enough_memory


@dataclass(frozen=True)
class Args(Common):
    # Method
    key_momentum: float = 0.9  # of the key encoder's moving average
    key_momentum_schedule: KeyMomentumSchedule = "constant"  # cosine: rises to 1 over the run (BYOL, MoCo v3)
    temperature: float = 0.1  # t, within a row: which negatives matter
    inter_temperature: float = 1.0  # T, across rows: how much each query matters
    alpha: float | None = None  # an extension: EqCo's, how many negatives to mimic. None, the paper: K
    plus: bool = False  # SimMoCo+: the mean of both directions


SMALL = Args(**SIMCO, key_momentum=0.99)
LARGE = Args(**{**IMAGENET, "schedule": "cosine", "warmup_epochs": 10, "warmup_from": 0.1}, key_momentum=0.99)
DEFAULTS = {"digits": Args(), "cifar10": SMALL, "cifar100": SMALL, "stl10": SMALL, "imagefolder": LARGE}

HEAD = Head(hidden="outputs")


@enough_memory(SMALLER)
def main(args: Args) -> None:
    # Here, so that --help need not wait for torch
    import torch
    from pretrain.optimizers import make_optimizer
    from pretrain.run import clear_errors
    from pretrain.statistics import mean_of
    from pretrain.training import Training

    from eqco_loss import DualTempInfoNCE, momentum_update

    with clear_errors():
        criterion = DualTempInfoNCE(args.temperature, args.inter_temperature, alpha=args.alpha, gather=ranks() > 1)
    label = f"t{args.temperature:g}-{args.inter_temperature:g}" + "-plus" * args.plus
    training = Training("simmoco", args, label)
    encoder = training.encoder(HEAD)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    k = args.batch_size // args.accumulate - 1
    loss = f"K = {k}, alpha = {args.alpha or k:g}, t = {args.temperature:g}, T = {args.inter_temperature:g}"
    optimizer = make_optimizer(args, encoder, fused=training.fused)
    model = training.start(encoder, optimizer, criterion, loss, key_encoder=key_encoder)

    for batch in training.batches():
        if batch.first:
            momentum = training.key_momentum(args.key_momentum, args.key_momentum_schedule)
            momentum_update(encoder, key_encoder, momentum)
        with torch.no_grad(), training.autocast():
            keys = key_encoder(batch.key_view).float()  # (N, D), detached
        queries = model(batch.query_view)
        embeddings: tuple[torch.Tensor, ...] = (queries,)
        with training.loss_timer():
            metrics = criterion.with_metrics(queries, keys)  # the negatives: the other rows of keys
        if args.plus:
            with torch.no_grad(), training.autocast():
                keys = key_encoder(batch.query_view).float()
            swapped = model(batch.key_view)
            metrics = mean_of(metrics, criterion.with_metrics(swapped, keys))
            embeddings += (swapped,)
        training.step(metrics, *embeddings)


if __name__ == "__main__":
    main(parse(sys.argv[1:], DEFAULTS, __doc__))
