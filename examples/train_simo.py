"""SiMo (EqCo, Zhu et al. 2020): momentum contrast without a queue; a query's negatives are K other keys of its batch.

    python examples/train_simo.py                              # scikit-learn's digits, on a laptop's CPU
    python examples/train_simo.py --data-dir DIR               # DIR/train/<class>/*, DIR/test/<class>/*: as on ImageNet
    torchrun --nproc-per-node 8 examples/train_simo.py --data-dir DIR --alpha 65536

Run the same command again to resume. Everything a run writes is in its run directory. The defaults below are those for
the digits; each data set has its own: add --dataset or --data-dir before --help to see them.
"""

import copy
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pretrain.arguments import CIFAR, IMAGENET, SMALLER, Common, KeyMomentumSchedule, check, parse, ranks
from pretrain.choices import Head
from pretrain.console import enough_memory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Args(Common):
    # Method
    key_momentum: float = 0.9  # of the key encoder's moving average; 0: no momentum encoder
    key_momentum_schedule: KeyMomentumSchedule = "constant"  # cosine: rises to 1 over the run (BYOL, MoCo v3)
    temperature: float = 0.2  # t
    alpha: float = 256  # how many negatives to mimic
    num_negatives: int = 16  # K, how many there are
    # The next K keys, or a draw per query. shared, to reproduce the authors' code: one draw for all, of 2K keys at most
    sampling: Literal["rolled", "random", "shared"] = "rolled"
    eqco: bool = True  # --no-eqco is InfoNCE: alpha = K
    symmetric: bool = False  # the mean of both directions, for twice the time


RECIPE = {"schedule": "simo", "warmup_epochs": 10, "norm": "sync" if ranks() > 1 else "batch"}
SMALL = Args(**{**CIFAR, **RECIPE}, key_momentum=0.99)
LARGE = Args(**{**IMAGENET, **RECIPE}, key_momentum=0.999)
DEFAULTS = {"digits": Args(), "cifar10": SMALL, "cifar100": SMALL, "stl10": SMALL, "imagefolder": LARGE}

HEAD = Head(batch_norm=True, last_norm="affine", std=0.01)


@enough_memory(SMALLER)
def main(args: Args) -> None:
    # Here, so that --help need not wait for torch
    import torch
    from pretrain.norms import gathered, shuffled
    from pretrain.optimizers import make_optimizer
    from pretrain.run import clear_errors
    from pretrain.statistics import mean_of
    from pretrain.training import Training

    from eqco_loss import EqCoLoss, momentum_update

    with clear_errors():
        alpha = args.alpha if args.eqco else None  # None: as many as there are
        criterion = EqCoLoss(
            args.temperature,
            alpha=alpha,
            num_negatives=None if args.sampling == "shared" else args.num_negatives,  # shared ones are given to it
            sampling="rolled" if args.sampling == "shared" else args.sampling,
            gather=ranks() > 1,
        )
    check(args)
    k = min(args.num_negatives, args.batch_size // args.accumulate - 1)
    label = f"k{k}-" + (f"alpha{args.alpha:g}" if args.eqco else "infonce")
    training = Training("simo", args, label)
    encoder = training.encoder(HEAD, zero_init_residual=True)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    if k < args.num_negatives:
        training.say(f"note     num_negatives: a query meets {k} others in its batch, not {args.num_negatives}")
    loss = f"K = {k}, alpha = {alpha or k:g}, t = {args.temperature:g}"
    optimizer = make_optimizer(args, encoder, fused=training.fused)
    model = training.start(encoder, optimizer, criterion, loss, key_encoder=key_encoder)

    def encode_keys(views: torch.Tensor, shuffle: torch.Generator) -> torch.Tensor:
        """As the norm asks: MoCo's two must not show a query the statistics of its key."""
        mixed = args.norm in ("shuffle", "split")
        keys: torch.Tensor = shuffled(key_encoder, views, shuffle) if mixed else key_encoder(views)
        return keys

    def negatives_of(keys: torch.Tensor, draw: torch.Generator) -> torch.Tensor | None:
        """Shared ones, of all ranks' keys. None: K other rows of the keys, which the criterion takes itself."""
        if args.sampling != "shared":
            return None
        rows = torch.arange(len(keys), device=keys.device) + training.share.rank * len(keys)
        return shared_negatives(gathered(keys, ranks()), rows, k, draw)

    for batch in training.batches():
        if batch.first:
            momentum = training.key_momentum(args.key_momentum, args.key_momentum_schedule)
            momentum_update(encoder, key_encoder, momentum)
        with torch.no_grad(), training.autocast():
            keys = encode_keys(batch.key_view, batch.shuffle).float()  # (N, D)
        queries = model(batch.query_view)
        embeddings: tuple[torch.Tensor, ...] = (queries,)
        with training.loss_timer():
            metrics = criterion.with_metrics(queries, keys, negatives_of(keys, batch.draw))
        if args.symmetric:
            with torch.no_grad(), training.autocast():
                keys = encode_keys(batch.query_view, batch.shuffle).float()
            swapped = model(batch.key_view)
            metrics = mean_of(metrics, criterion.with_metrics(swapped, keys, negatives_of(keys, batch.draw)))
            embeddings += (swapped,)
        training.step(metrics, *embeddings)


def shared_negatives(keys: "torch.Tensor", rows: "torch.Tensor", k: int, draw: "torch.Generator") -> "torch.Tensor":
    """(rows, K, D) of the keys (N, D): one choice of K of N - 1 columns, of which row i leaves out its own, key i."""
    import torch

    columns = torch.randperm(len(keys) - 1, generator=draw)[:k].to(keys.device)  # (K,)
    return keys[columns + (columns >= rows[:, None])]


if __name__ == "__main__":
    main(parse(sys.argv[1:], DEFAULTS, __doc__))
