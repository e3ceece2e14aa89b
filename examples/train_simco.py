"""SimCo (Zhang et al. 2022): no queue, no momentum encoder; dual temperature makes a batch's negatives enough.

    python examples/train_simco.py                             # scikit-learn's digits, on a laptop's CPU
    python examples/train_simco.py --dataset cifar100          # the paper's, one GPU: linear probe 58.35 %
    torchrun --nproc-per-node 8 examples/train_simco.py --data-dir DIR

Run the same command again to resume. Everything a run writes is in its run directory. The defaults below are those for
the digits; each data set has its own: add --dataset or --data-dir before --help to see them.
"""

import sys
from dataclasses import dataclass

from pretrain.arguments import IMAGENET, SIMCO, SMALLER, Common, parse, ranks
from pretrain.choices import Head
from pretrain.console import enough_memory


@dataclass(frozen=True)
class Args(Common):
    # Method
    temperature: float = 0.1  # t, within a row: which negatives matter
    inter_temperature: float = 1.0  # T, across rows: how much each query matters
    alpha: float | None = None  # an extension: EqCo's, how many negatives to mimic. None, the paper: K


SMALL = Args(**SIMCO)
LARGE = Args(**{**IMAGENET, "schedule": "cosine", "warmup_epochs": 10, "warmup_from": 0.1})
DEFAULTS = {"digits": Args(), "cifar10": SMALL, "cifar100": SMALL, "stl10": SMALL, "imagefolder": LARGE}

HEAD = Head(hidden="outputs")


@enough_memory(SMALLER)
def main(args: Args) -> None:
    # Here, so that --help need not wait for torch
    from pretrain.optimizers import make_optimizer
    from pretrain.run import clear_errors
    from pretrain.training import Training

    from eqco_loss import DualTempInfoNCE

    with clear_errors():
        criterion = DualTempInfoNCE(
            args.temperature, args.inter_temperature, alpha=args.alpha, symmetric=True, gather=ranks() > 1
        )
    training = Training("simco", args, f"t{args.temperature:g}-{args.inter_temperature:g}")
    encoder = training.encoder(HEAD)
    k = args.batch_size // args.accumulate - 1
    loss = f"K = {k}, alpha = {args.alpha or k:g}, t = {args.temperature:g}, T = {args.inter_temperature:g}"
    optimizer = make_optimizer(args, encoder, fused=training.fused)
    model = training.start(encoder, optimizer, criterion, loss)

    for batch in training.batches():
        queries, keys = model(batch.query_view), model(batch.key_view)  # (N, D)
        with training.loss_timer():
            metrics = criterion.with_metrics(queries, keys)  # both directions, gradient to both
        training.step(metrics, queries, keys)


if __name__ == "__main__":
    main(parse(sys.argv[1:], DEFAULTS, __doc__))
