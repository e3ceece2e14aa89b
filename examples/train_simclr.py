"""SimCLR (Chen et al. 2020) as in EqCo's paper: the negatives are all other embeddings of both views of the batch.

    python examples/train_simclr.py                            # scikit-learn's digits, on a laptop's CPU
    python examples/train_simclr.py --dataset cifar10          # one GPU
    torchrun --nproc-per-node 8 examples/train_simclr.py --data-dir DIR --alpha 4096

EqCo's paper also trains it in MoCo's setting: --temperature 0.2 --base-lr 0.03 --weight-decay 1e-4 --recipe mocov2.

Run the same command again to resume. Everything a run writes is in its run directory. The defaults below are those for
the digits; each data set has its own: add --dataset or --data-dir before --help to see them.
"""

import sys
from dataclasses import dataclass

from pretrain.arguments import CIFAR, IMAGENET, SMALLER, Common, parse, ranks
from pretrain.choices import Head
from pretrain.console import enough_memory


@dataclass(frozen=True)
class Args(Common):
    # Method
    temperature: float = 0.2  # t
    alpha: float = 256  # how many negatives to mimic
    eqco: bool = True  # --no-eqco is NT-Xent: alpha = K


NORM = "sync" if ranks() > 1 else "batch"
RECIPE = {"recipe": "simclr", "schedule": "cosine", "warmup_epochs": 10, "norm": NORM}
SMALL = Args(**{**CIFAR, **RECIPE})
LARGE = Args(**{**IMAGENET, **RECIPE, "temperature": 0.1, "base_lr": 0.3, "weight_decay": 1e-6})
DEFAULTS = {"digits": Args(), "cifar10": SMALL, "cifar100": SMALL, "stl10": SMALL, "imagefolder": LARGE}

HEAD = Head(batch_norm=True, last_norm="affine", std=0.01)


@enough_memory(SMALLER)
def main(args: Args) -> None:
    # Here, so that --help need not wait for torch
    import torch
    from pretrain.optimizers import make_optimizer
    from pretrain.run import clear_errors
    from pretrain.training import Training

    from eqco_loss import EqCoLoss

    with clear_errors():
        alpha = args.alpha if args.eqco else None  # None: as many as there are
        criterion = EqCoLoss(args.temperature, alpha=alpha, in_batch="views", symmetric=True, gather=ranks() > 1)
    training = Training("simclr", args, f"alpha{args.alpha:g}" if args.eqco else "ntxent")
    encoder = training.encoder(HEAD, zero_init_residual=True)
    k = 2 * (args.batch_size // args.accumulate) - 2
    loss = f"K = {k}, alpha = {alpha or k:g}, t = {args.temperature:g}"
    optimizer = make_optimizer(args, encoder, fused=training.fused)
    model = training.start(encoder, optimizer, criterion, loss)

    for batch in training.batches():
        both = model(torch.cat([batch.query_view, batch.key_view]))  # (2 N, D): one batch norm over both views
        first, second = both.chunk(2)
        with training.loss_timer():
            metrics = criterion.with_metrics(first, second)  # both directions, gradient to both
        training.step(metrics, both)


if __name__ == "__main__":
    main(parse(sys.argv[1:], DEFAULTS, __doc__))
