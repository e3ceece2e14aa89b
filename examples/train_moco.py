"""MoCo v1 and v2 (He et al. 2020; Chen et al. 2020): momentum contrast; the negatives are a queue of earlier keys.

    python examples/train_moco.py                              # scikit-learn's digits, on a laptop's CPU
    python examples/train_moco.py --dataset cifar10            # its authors' CIFAR variant with v2's head and views
    torchrun --nproc-per-node 8 examples/train_moco.py --data-dir DIR --version v1

Run the same command again to resume. Everything a run writes is in its run directory. The defaults below are those for
the digits and v2; each data set and version has its own: add --dataset, --data-dir or --version before --help.
"""

import copy
import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

from pretrain.arguments import CIFAR, IMAGENET, SMALLER, Common, KeyMomentumSchedule, given, parse, ranks
from pretrain.choices import Head, Norm
from pretrain.console import enough_memory


@dataclass(frozen=True)
class Args(Common):
    # Method
    version: Literal["v1", "v2"] = "v2"  # v2: an MLP head, blur, a cosine
    # Of the key encoder's moving average: slow, or the queue's stale keys give away the fresh one
    key_momentum: float = 0.99
    key_momentum_schedule: KeyMomentumSchedule = "constant"  # cosine: rises to 1 over the run (BYOL, MoCo v3)
    temperature: float = 0.1  # t
    queue_size: int = 512  # K
    queue_ids: bool = False  # keep the images' numbers, so that stale keys of an image never repel it
    alpha: float | None = None  # EqCo: how many negatives to mimic. None, the paper: K


DIGITS = Args(batch_size=64, norm="split", splits=2)
SMALL = Args(**CIFAR, norm="split", queue_size=4096)
NORM: Norm = "shuffle" if ranks() > 1 else "split"
LARGE = Args(**IMAGENET, norm=NORM, key_momentum=0.999, temperature=0.2, queue_size=65536)
DEFAULTS = {"digits": DIGITS, "cifar10": SMALL, "cifar100": SMALL, "stl10": SMALL, "imagefolder": LARGE}
HEADS = {"v1": Head(layers=1), "v2": Head()}


def defaults(version: str | None) -> dict[str, Args]:
    if version != "v1":
        return DEFAULTS
    first = {name: dataclasses.replace(args, version="v1", recipe="mocov1") for name, args in DEFAULTS.items()}
    first["imagefolder"] = dataclasses.replace(first["imagefolder"], schedule="drops", temperature=0.07)
    return first


@enough_memory(SMALLER)
def main(args: Args) -> None:
    # Here, so that --help need not wait for torch
    import torch
    from pretrain.norms import shuffled
    from pretrain.optimizers import make_optimizer
    from pretrain.run import clear_errors
    from pretrain.training import Batch, Training

    from eqco_loss import EqCoLoss, MomentumQueue, momentum_update

    with clear_errors():
        criterion = EqCoLoss(args.temperature, alpha=args.alpha, gather=ranks() > 1)
        queue = MomentumQueue(args.queue_size, args.dim, store_ids=args.queue_ids, gather=ranks() > 1)
    label = f"{args.version}-k{args.queue_size}" + (f"-alpha{args.alpha:g}" if args.alpha else "")
    training = Training("moco", args, label)
    if args.queue_size > training.data.train_size and not args.queue_ids:
        training.say(
            f"note     queue_size: {args.queue_size} keys of {training.data.train_size} images: stale keys of an image "
            "will be its own negatives. Give --queue-ids to leave those out, or a shorter queue."
        )
    encoder = training.encoder(HEADS[args.version])
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    alpha = f"{args.alpha:g}" if args.alpha else "K, also while the queue fills"
    loss = f"K = {args.queue_size}, alpha = {alpha}, t = {args.temperature:g}"
    model = training.start(
        encoder,
        make_optimizer(args, encoder, fused=training.fused),
        criterion,
        loss,
        key_encoder=key_encoder,
        queue=queue,
    )

    def encode_keys(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, D), and the numbers of their images where the queue keeps these."""
        with torch.no_grad(), training.autocast():
            keys: torch.Tensor = shuffled(key_encoder, batch.key_view, batch.shuffle).float()
        return keys, batch.ids if args.queue_ids else None

    if not queue.primed:  # the first batch must meet negatives, and not its own positives
        with training.run.interruptible():
            for batch in training.another_batch():
                queue.enqueue(*encode_keys(batch))
    for batch in training.batches():
        if batch.first:
            momentum = training.key_momentum(args.key_momentum, args.key_momentum_schedule)
            momentum_update(encoder, key_encoder, momentum)
        keys, ids = encode_keys(batch)
        queries = model(batch.query_view)
        with training.loss_timer():
            metrics = criterion.with_metrics(queries, keys, queue, query_ids=ids)
        training.step(metrics, queries)
        queue.enqueue(keys, ids)


if __name__ == "__main__":
    main(parse(sys.argv[1:], defaults(given(sys.argv[1:], "version")), __doc__))
