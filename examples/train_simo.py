"""SiMo (EqCo, Zhu et al. 2020): momentum contrast without a queue; a query's negatives are K other keys of its batch.

    python examples/train_simo.py                              # scikit-learn's digits, two minutes on two CPU cores
    python examples/train_simo.py --data-dir DIR               # DIR/train/<class>/*, DIR/test/<class>/*

Run the same command again to resume. Everything a run writes is in its run directory. The defaults below are those for
the digits; a folder of images has the paper's: add --data-dir DIR before --help to see them.
"""

import copy
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
import tyro
from lightning_fabric import Fabric
from pretrain.data import EPOCH, INIT, Data, DataError, ImageFolderData, PlacedDigits, seed_of
from pretrain.encoders import Encoder, simo_encoder
from pretrain.evaluate import knn_accuracy, linear_probe
from pretrain.run import Row, Run, command, fail, peak_memory_mb
from pretrain.schedule import learning_rate, set_learning_rate
from torch import Tensor
from tqdm import tqdm

from eqco_loss import EqCoLoss, momentum_update


@dataclass(frozen=True)
class Args:
    # Data
    data_dir: Path | None = None  # folder of images: train/<class>/* and test/<class>/*, or <class>/*. None: digits
    image_size: int | None = None  # side in pixels. None: 32 for digits, else that of the first image, at most 224
    limit: int | None = None  # use no more than so many training images, and test images
    workers: int = min(8, os.cpu_count() or 1)  # processes that load a folder's images

    # Encoder
    arch: Literal["small", "resnet18", "resnet34", "resnet50"] = "small"  # a ResNet under 64 px has CIFAR's stem
    dim: int = 64  # D, width of the embedding
    key_momentum: float = 0.9  # of the key encoder's moving average

    # Loss
    temperature: float = 0.2  # t
    alpha: float = 256  # how many negatives to mimic
    num_negatives: int = 16  # K, how many there are
    eqco: bool = True  # --no-eqco is InfoNCE: alpha = K

    # Optimisation
    epochs: int = 60  # passes over the training images
    warmup_epochs: float = 2  # from a thousandth of the learning rate, times a cosine
    batch_size: int = 128  # N
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd has momentum 0.9
    base_lr: float = 4e-3  # learning rate = base_lr x N / 256
    weight_decay: float = 0.01  # on every parameter

    # Evaluation
    knn_every: int = 20  # epochs from one kNN to the next
    knn_k: int = 20  # neighbours that vote

    # Run
    seed: int = 0  # of weights, order and views
    run_dir: Path | None = None  # None: runs/simo-<data>-k<K>-alpha<alpha>-seed<seed>
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # of the encoders; the loss is in float32


DIGITS = Args()
FOLDER = Args(  # the paper's, but for the network
    arch="resnet18",
    dim=128,
    key_momentum=0.999,
    epochs=200,
    warmup_epochs=10,
    batch_size=256,
    optimizer="sgd",
    base_lr=0.03,
    weight_decay=1e-4,
    knn_every=10,
    knn_k=200,
)
COLUMNS = ("epoch", "loss", "top1", "feature_std", "knn", "lr", "images_per_s", "seconds", "memory_mb")


def main(args: Args) -> None:
    started = time.perf_counter()
    check(args)
    try:
        fabric = Fabric(accelerator=args.device, devices=1, precision=args.precision)
    except RuntimeError as error:
        fail(f"device: {args.device} cannot be used ({error}). Leave --device out to take what there is.")
    fabric.launch()
    torch.backends.cudnn.deterministic = True  # a resumed run is the same run
    try:
        criterion = EqCoLoss(args.temperature, args.alpha if args.eqco else None, num_negatives=args.num_negatives)
        data = open_data(args, fabric.device)
    except ValueError as error:
        fail(error)
    steps = data.train_size // args.batch_size  # per epoch
    run = open_run(args, data, fabric)
    state = run.resume()
    if run.result is not None:
        print(f"{run.directory} is finished. {summary(run.result)}")
        return

    torch.manual_seed(seed_of(INIT, args.seed))
    encoder = simo_encoder(args.arch, data.channels, data.image_size, args.dim)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = make_optimizer(args, encoder)
    if state is not None:
        encoder.load_state_dict(state["encoder"])
        key_encoder.load_state_dict(state["key_encoder"])
        optimizer.load_state_dict(state["optimizer"])
    model, fabric_optimizer = fabric.setup(encoder, optimizer)
    fabric.to_device(key_encoder)
    print_header(args, data, fabric, criterion, run, steps)

    def save(epoch: int) -> None:
        run.save(
            epoch,
            {
                "encoder": encoder.state_dict(),
                "key_encoder": key_encoder.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )

    with run.interruptible():
        if run.epoch == 0:
            run.rows = [{"epoch": 0, "knn": knn_accuracy(encoder, data, args.knn_k)}]
            print(f"kNN {run.rows[0]['knn']:.1f} % before training", flush=True)
        total, done = args.epochs * steps, run.epoch * steps
        bar = tqdm(total=total, initial=done, unit="step", disable=not sys.stderr.isatty())
        for epoch in range(run.epoch, args.epochs):
            torch.manual_seed(seed_of(EPOCH, args.seed, epoch))  # for whatever draws from the default generator
            sums, epoch_start = torch.zeros(3, device=fabric.device), time.perf_counter()
            for step, (query_view, key_view) in enumerate(data.batches(epoch, args.batch_size), start=epoch * steps):
                peak = args.base_lr * args.batch_size / 256
                rate = learning_rate(step, steps, args.epochs, args.warmup_epochs, peak)
                set_learning_rate(optimizer, rate)

                momentum_update(encoder, key_encoder, args.key_momentum)
                with torch.no_grad(), fabric.autocast():
                    keys = key_encoder(fabric.to_device(key_view)).float()  # (N, D)
                queries = model(fabric.to_device(query_view))  # (N, D)
                metrics = criterion.with_metrics(queries, keys)  # the negatives: K other rows of keys

                fabric_optimizer.zero_grad()
                fabric.backward(metrics.loss)
                fabric_optimizer.step()

                sums += torch.stack([metrics.loss.detach(), metrics.top1_accuracy, feature_std(queries.detach())])
                bar.update()
            loss, top1, std = (sums / steps).tolist()
            if not math.isfinite(loss):
                fail(f"the loss of epoch {epoch + 1} is {loss}. Start a new run with a smaller --base-lr.")
            seconds = time.perf_counter() - epoch_start
            measure = epoch + 1 == args.epochs or (epoch + 1) % args.knn_every == 0
            run.rows.append(
                {
                    "epoch": epoch + 1,
                    "loss": loss,
                    "top1": 100 * top1,
                    "feature_std": std,
                    "knn": knn_accuracy(encoder, data, args.knn_k) if measure else None,
                    "lr": rate,
                    "images_per_s": round(steps * args.batch_size / seconds, 1),
                    "seconds": round(seconds, 3),
                    "memory_mb": peak_memory_mb(fabric.device),
                }
            )
            save(epoch + 1)
            if measure:
                run.draw_curves()
            print_epoch(run.rows[-1], args.epochs, bar)
        bar.close()

        run.result = {
            "knn_untrained": run.rows[0]["knn"],
            "knn": run.rows[-1]["knn"],
            "linear_probe": linear_probe(encoder, data),
        }
        save(args.epochs)
    print(f"{summary(run.result)} {time.perf_counter() - started:.0f} s. Results are in {run.directory}")


def feature_std(queries: Tensor) -> Tensor:
    """Standard deviation of the unit queries, in units of that of a spread-out batch: 1 is spread out, 0 collapsed."""
    spread: Tensor = F.normalize(queries).std(0).mean() * math.sqrt(queries.shape[1])
    return spread


def make_optimizer(args: Args, encoder: Encoder) -> torch.optim.Optimizer:
    if args.optimizer == "adamw":
        return torch.optim.AdamW(encoder.parameters(), weight_decay=args.weight_decay)
    return torch.optim.SGD(encoder.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay)


def check(args: Args) -> None:
    """Bad numbers, before anything is loaded. Temperature, alpha and K are the criterion's to check."""
    smallest = {"limit": 2, "image_size": 8, "batch_size": 2, "epochs": 1, "dim": 1, "knn_every": 1, "knn_k": 1}
    for name, least in {**smallest, "workers": 0, "seed": 0, "warmup_epochs": 0, "weight_decay": 0}.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            fail(f"{name}: expected {least} or more, got {value}.")
    if not 0 <= args.key_momentum <= 1:
        fail(f"key_momentum: expected a number from 0 (no momentum encoder) to 1, got {args.key_momentum}.")
    if not 0 < args.base_lr < math.inf:
        fail(f"base_lr: expected a number above 0, got {args.base_lr}.")
    if args.data_dir is None and args.image_size is not None:
        fail("image_size: the digits are 32 x 32. Leave it out, or give --data-dir.")


def open_data(args: Args, device: torch.device) -> Data:
    data: Data
    if args.data_dir is None:
        data = PlacedDigits(args.seed, device, args.limit)
    else:
        data = ImageFolderData(args.data_dir, args.seed, args.image_size, args.workers, args.limit)
    if args.batch_size > data.train_size:
        raise DataError(
            f"batch_size: expected at most the number of training images, {data.train_size}, got {args.batch_size}. "
            f"Give --batch-size {data.train_size} or less."
        )
    return data


def open_run(args: Args, data: Data, fabric: Fabric) -> Run:
    """The run directory. A resumed run must agree in all that can change a result."""
    loss = f"alpha{args.alpha:g}" if args.eqco else "infonce"
    directory = args.run_dir or Path("runs") / f"simo-{data.name}-k{args.num_negatives}-{loss}-seed{args.seed}"
    fixed = {"data": data.fingerprint, **dataclasses.asdict(args), "device": fabric.device.type}
    fixed["image_size"] = data.image_size
    free = {name: fixed.pop(name) for name in ("data_dir", "run_dir", "workers")}
    return Run(directory, COLUMNS, fixed, {name: value and str(value) for name, value in free.items()})


def print_header(args: Args, data: Data, fabric: Fabric, criterion: EqCoLoss, run: Run, steps: int) -> None:
    backend, reason = criterion.backend(*torch.zeros(2, args.batch_size, args.dim, device=fabric.device))
    k = min(args.num_negatives, args.batch_size - 1)
    device = torch.cuda.get_device_name() if fabric.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    run.write_config(device=str(fabric.device), threads=torch.get_num_threads(), loss_backend=[backend, reason])
    print(f"command  {command()}")
    print(f"device   {fabric.device} ({device}), {args.precision}; loss by {backend} ({reason})")
    print(f"data     {data.name}: {data.fingerprint}; {data.image_size} px, {args.arch}")
    if data.note:
        print(f"note     {data.note}")
    alpha = args.alpha if args.eqco else k
    print(f"loss     N = {args.batch_size}, K = {k}, alpha = {alpha:g}, t = {args.temperature:g}")
    print(f"steps    {steps} an epoch, {args.epochs} epochs")
    print(f"run      {run.directory}" + (f", resumed after epoch {run.epoch}" if run.epoch else ""), flush=True)


def print_epoch(row: Row, epochs: int, bar: "tqdm[NoReturn]") -> None:
    knn = "" if row["knn"] is None else f"  kNN {row['knn']:.1f} %"
    curves = f"loss {row['loss']:.3f}  top-1 {row['top1']:.1f} %  std {row['feature_std']:.2f}{knn}"
    line = f"epoch {row['epoch']}/{epochs}  {curves}  {row['images_per_s']:.0f} images/s  {row['memory_mb']:.0f} MB"
    if bar.disable:
        print(line, flush=True)
    else:
        bar.set_postfix_str(curves)
        if knn:
            bar.write(line)


def summary(result: Row) -> str:
    knn = f"kNN {result['knn_untrained']:.1f} % untrained, {result['knn']:.1f} % trained"
    return f"{knn}; linear probe {result['linear_probe']:.1f} %."


def parse(words: list[str]) -> Args:
    folder = any(word.replace("_", "-").startswith("--data-dir") for word in words)
    return tyro.cli(Args, args=words, description=__doc__, default=FOLDER if folder else DIGITS)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
