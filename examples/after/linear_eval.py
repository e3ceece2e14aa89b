"""The papers' linear probe: a linear classifier on the frozen backbone's features, top-1 and top-5 on the test images.

    python examples/after/linear_eval.py runs/simo-digits-k16-alpha256-seed0
    python examples/after/linear_eval.py checkpoint.pt --protocol moco --data-dir DIR
    torchrun --nproc-per-node 8 examples/after/linear_eval.py RUN_DIR --protocol simo

moco: SGD, learning rate 30, 100 epochs, a tenth of it from epoch 60, and again from 80. simo: the same in 90 epochs.
simco: learning rate 0.3, 100 epochs of a cosine; its authors train theirs beside the encoder (--online-probe).
Each is for a batch of 256 and grows with it; momentum 0.9, no weight decay, the backbone in eval mode. Training images
are random crops (0.08 to 1 of the area) and flips, test images centre crops; digits are placed anew in each epoch.

Run the same command again to resume. linear_eval.csv, .json and .pt are written beside the checkpoint.
"""

import csv
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

import torch
import torch.nn.functional as F
import tyro
from lightning_fabric import Fabric
from pretrain.arguments import ranks
from pretrain.augment import OnDevice, Recipe, per_image
from pretrain.checkpoint import CheckpointError, checkpoint_file, restore_encoder
from pretrain.console import enough_memory, fail, print_any_name
from pretrain.data import (
    Data,
    DataError,
    Decoded,
    EpochBatches,
    ImageData,
    PlacedDigits,
    Share,
    TwoViews,
    open_data,
    sample_order,
    seed_of,
)
from pretrain.encoders import Encoder
from pretrain.evaluate import features_of
from pretrain.pictures import show
from pretrain.run import check_device, command, written_whole
from pretrain.schedule import set_learning_rate
from pretrain.startup import make_fabric
from torch import Tensor, nn
from tqdm import tqdm

DATASETS = ("digits", "cifar10", "cifar100", "stl10")  # any other name is that of a folder of images
CROP_AND_FLIP = Recipe((0.08, 1.0), (0.0, 0.0, 0.0, 0.0), jitter_p=0.0, gray_p=0.0)
COLUMNS = ("epoch", "loss", "lr", "top1", "top5")
WEIGHTS = 101  # what a seed is for, beside those of pretrain.data


class Protocol(NamedTuple):
    base_lr: float
    epochs: int
    drops: tuple[int, ...]  # epochs from which the rate is a tenth of the last; none: a cosine

    def learning_rate(self, epoch: int, epochs: int, peak: float) -> float:
        """The rate of one epoch of ``epochs``, the drops moved in proportion."""
        if not self.drops:
            return peak * (1 + math.cos(math.pi * epoch / epochs)) / 2
        passed: int = sum(epoch * self.epochs >= drop * epochs for drop in self.drops)
        return peak * 0.1**passed


PROTOCOLS = {"moco": Protocol(30, 100, (60, 80)), "simo": Protocol(30, 90, (60, 80)), "simco": Protocol(0.3, 100, ())}


BATCH = 256  # that learning rates are given for


@dataclass(frozen=True)
class Args:
    checkpoint: tyro.conf.Positional[Path]  # checkpoint.pt, or the run directory that holds it
    protocol: Literal["moco", "simo", "simco"] = "moco"
    epochs: int | None = None  # None: the protocol's; the drops move with it
    base_lr: float | None = None  # learning rate = base_lr x batch_size / 256. None: the protocol's
    batch_size: int | None = None  # of all processes together. None: 256, or of fewer images as many as there are
    cache_features: bool = False  # compute the features once, without augmentation: faster, and not the protocol
    data_dir: Path | None = None  # None: the run's
    limit: int | None = None  # use no more than so many training images, and test images. None: as the run
    augment: Literal["workers", "device"] = "workers"  # device: all images in its memory
    workers: int = min(8, os.cpu_count() or 1)  # processes that load images
    seed: int = 0  # of weights, order and augmentation
    out: Path | None = None  # directory of the results. None: the checkpoint's
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # of the backbone


@enough_memory("a smaller --batch-size, --precision bf16-mixed, or --augment workers if it is device")
def main(args: Args) -> None:
    print_any_name()
    check(args)
    check_device(args.device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    fabric = make_fabric(args.device, devices=local, num_nodes=ranks() // local, precision=args.precision)
    try:
        encoder, saved = restore_encoder(args.checkpoint)
        if args.limit is None:
            args = dataclasses.replace(args, limit=saved["fixed"]["limit"] if "fixed" in saved else None)
        data = data_of(args, saved["data"], fabric.device)
    except (CheckpointError, DataError) as error:
        fail(error)
    if args.batch_size is None:
        most = min(BATCH, len(train_labels(data)))
        args = dataclasses.replace(args, batch_size=most - most % fabric.world_size or fabric.world_size)
    check_data(args, data, encoder, saved["encoder_spec"], fabric)
    epochs, peak = args.epochs or PROTOCOLS[args.protocol].epochs, peak_rate(args)
    classifier = make_classifier(encoder.width, data.classes, args.seed)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.0, momentum=0.9, weight_decay=0.0)
    results = Results(args, data, encoder, fabric)
    results.resume(classifier, optimizer)
    if results.epoch == epochs:
        fabric.print(f"{results.path('csv')} is finished. {results.summary()}")
        return
    results.check_writable()
    model, fabric_optimizer = fabric.setup(classifier, optimizer)
    encoder.requires_grad_(False).to(fabric.device)
    fabric.print(header(args, data, fabric, epochs, peak, results), flush=True)

    with results.interruptible(), closing(data):
        test = list(test_features(encoder, data, fabric))  # nothing about them changes
        training = Training(args, data, encoder, fabric)
        quiet = not (fabric.is_global_zero and sys.stderr.isatty())
        bar = tqdm(total=epochs, initial=results.epoch, unit="epoch", disable=quiet)
        for epoch in range(results.epoch, epochs):
            rate = PROTOCOLS[args.protocol].learning_rate(epoch, epochs, peak)
            set_learning_rate(optimizer, rate)
            total = torch.zeros((), device=fabric.device)
            for features, labels in training.batches(epoch):  # (N, width), (N,)
                loss = F.cross_entropy(model(features).float(), labels)
                fabric_optimizer.zero_grad()
                fabric.backward(loss)
                fabric_optimizer.step()
                total += loss.detach()
            mean = summed(fabric, total / training.steps) / fabric.world_size
            if not math.isfinite(mean):
                fail(f"the loss of epoch {epoch + 1} is {mean}. Start again with a smaller --base-lr and --out.")
            top1, top5 = accuracy(classifier, test, fabric)
            row = {"epoch": epoch + 1, "loss": mean, "lr": rate, "top1": top1, "top5": top5}
            results.add(row, classifier, optimizer)
            for note in data.damage.news():
                fabric.print(f"note     {note}", flush=True)
            bar.update()
            bar.set_postfix_str(f"loss {mean:.3f} top-1 {top1:.2f} %")
            if bar.disable:
                fabric.print(f"epoch {epoch + 1}/{epochs}  loss {mean:.3f}  top-1 {top1:.2f} %  top-5 {top5:.2f} %")
        bar.close()
    results.write_json()
    fabric.print(f"{results.summary()} Results are in {results.path('csv')} and {results.path('json').name}")


def make_classifier(width: int, classes: int, seed: int) -> nn.Linear:
    classifier = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(seed_of(WEIGHTS, seed))
    nn.init.normal_(classifier.weight, std=0.01, generator=generator)
    nn.init.zeros_(classifier.bias)
    return classifier


def peak_rate(args: Args) -> float:
    base_lr = PROTOCOLS[args.protocol].base_lr if args.base_lr is None else args.base_lr
    return base_lr * (args.batch_size or BATCH) / BATCH


def summed(fabric: Fabric, value: Tensor) -> float:
    """Over the processes."""
    return float(fabric.all_reduce(value, reduce_op="sum"))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- checks


def check(args: Args) -> None:
    for name, least in {"epochs": 1, "batch_size": 1, "limit": 1, "workers": 0, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            fail(f"{name}: expected {least} or more, got {value}.")
    if args.base_lr is not None and not 0 < args.base_lr < math.inf:
        fail(f"base_lr: expected a number above 0, got {args.base_lr}.")


def data_of(args: Args, made_with: dict[str, Any], device: torch.device) -> Data:
    """The data the encoder was trained on, or those of --data-dir."""
    name, size = made_with["name"], made_with["image_size"]
    directory = args.data_dir or (made_with["data_dir"] and Path(made_with["data_dir"]))
    if name == "digits" and directory is None:
        return PlacedDigits(args.seed, device, args.limit)
    return open_data(
        name if name in DATASETS and name != "digits" else "imagefolder",
        directory,
        seed=args.seed,
        device=device,
        image_size=size,
        limit=args.limit,
        workers=args.workers,
        augment=args.augment,
    )


def check_data(args: Args, data: Data, encoder: Encoder, spec: dict[str, Any], fabric: Fabric) -> None:
    assert args.batch_size is not None
    if data.channels != spec["channels"]:
        fail(f"data_dir: {data.name} has {data.channels} channels, and the encoder takes {spec['channels']}.")
    images = len(train_labels(data))
    if args.batch_size > images:
        fail(
            f"batch_size: expected at most the number of training images, {images}, got {args.batch_size}. Give "
            f"--batch-size {images} or less."
        )
    if args.batch_size % fabric.world_size:
        fail(
            f"batch_size: {args.batch_size} cannot be shared by {fabric.world_size} processes. Give --batch-size "
            f"{math.ceil(args.batch_size / fabric.world_size) * fabric.world_size}, or other --nproc-per-node."
        )


def train_labels(data: Data) -> Tensor:
    if isinstance(data, PlacedDigits):
        return data.labels["train"]
    assert isinstance(data, ImageData)
    return torch.tensor(data.splits["train"].labels)


# ---------------------------------------------------------------------------------------------- features


class Training:
    """This process's batches of features and labels. An incomplete last batch is left out."""

    def __init__(self, args: Args, data: Data, encoder: Encoder, fabric: Fabric) -> None:
        assert args.batch_size is not None
        self.args, self.data, self.encoder, self.fabric = args, data, encoder, fabric
        self.labels = train_labels(data)
        self.share = Share(args.batch_size, 1, fabric.global_rank, fabric.world_size)
        self.steps = len(self.labels) // args.batch_size  # of an epoch
        self.cached: list[Tensor] = []  # of each placement, (M, width)
        self.decoded: Decoded | None = None
        if args.cache_features:
            with torch.no_grad(), fabric.autocast():
                found = [features_of(encoder, data, "train", placement) for placement in range(data.placements)]
            self.cached, self.labels = [features for features, _ in found], found[0][1].cpu()
            self.steps = len(self.labels) // args.batch_size  # fewer where an image is damaged
            if not self.steps:
                raise DataError(
                    f"batch_size: {len(self.labels)} training images can be decoded. Give a --batch-size up to it."
                )
        elif isinstance(data, ImageData):
            if args.augment == "device":
                self.decoded = data.decode("train", fabric.device)
            else:
                self.sampler = EpochBatches(args.seed, len(self.labels), self.share)
                views = OneView(data.splits["train"], args.seed, per_image(CROP_AND_FLIP, data.image_size))
                self.loader = data.loader(views, persistent_workers=args.workers > 0, batch_sampler=self.sampler)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self.cached:
            features = self.cached[epoch % len(self.cached)]
            for rows in self.rows(epoch):
                yield features[rows.to(features.device)], self.fabric.to_device(self.labels[rows])
            return
        for images, labels in self.images(epoch):
            yield frozen_features(self.encoder, images, self.fabric), self.fabric.to_device(labels)

    def rows(self, epoch: int) -> Tensor:
        """(steps, N / processes), the training images' numbers."""
        return self.share.of(sample_order(self.args.seed, epoch, len(self.labels)))

    def images(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.data, PlacedDigits):
            placed = self.data.view(epoch, 0)
            for rows in self.rows(epoch):
                yield placed[rows.to(placed.device)], self.labels[rows]
        elif self.decoded is not None:
            augment = OnDevice(CROP_AND_FLIP, self.data.image_size, views=1)
            for rows in self.rows(epoch):
                samples = rows.to(self.decoded.pixels.device)
                (view,) = augment(self.decoded.pixels[samples], seed=self.args.seed, epoch=epoch, samples=samples)
                yield view, self.labels[self.decoded.shown[samples].cpu()]
        else:
            assert isinstance(self.data, ImageData)
            self.sampler.epoch = epoch
            for view, asked, shown in self.data.load(self.loader):
                self.data.found_damaged("train", asked[asked != shown])
                yield view, self.labels[shown]


class OneView(TwoViews):
    """A random crop, perhaps mirrored, the number of the sample, and whose image it is."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:  # type: ignore[override]
        epoch, sample = key
        image, shown = show(self.pictures, sample)
        return self.view(image, epoch, sample, 0), sample, shown


@torch.no_grad()
def frozen_features(encoder: Encoder, images: Tensor, fabric: Fabric) -> Tensor:
    with fabric.autocast():
        return encoder.features(fabric.to_device(images)).float()


def test_features(encoder: Encoder, data: Data, fabric: Fabric) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part, of every placement."""
    for placement in range(data.placements):
        for images, labels in data.labelled("test", placement, fabric.global_rank, fabric.world_size):
            yield frozen_features(encoder, images, fabric), fabric.to_device(labels)


@torch.no_grad()
def accuracy(classifier: nn.Linear, test: list[tuple[Tensor, Tensor]], fabric: Fabric) -> tuple[float, float]:
    """Top-1 and top-5, in per cent."""
    counts = torch.zeros(3, device=fabric.device)  # right among one, among five, in all
    for rows, labels in test:
        guesses = classifier(rows).topk(min(5, classifier.out_features)).indices  # (M, 5)
        hits = guesses == labels[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), torch.tensor(len(labels), device=counts.device)])
    one, five, every = (summed(fabric, count) for count in counts)
    return 100 * one / every, 100 * five / every


# ---------------------------------------------------------------------------------------------- results


class Results:
    """linear_eval.csv and .json for people, .pt to resume from; each written whole, by the first process."""

    def __init__(self, args: Args, data: Data, encoder: Encoder, fabric: Fabric) -> None:
        file = checkpoint_file(args.checkpoint)
        self.directory, self.fabric, self.rows = args.out or file.parent, fabric, list[dict[str, float]]()
        self.fixed = {"data": data.fingerprint, "weights": digest(encoder), **dataclasses.asdict(args)}
        for free in ("checkpoint", "data_dir", "out", "workers", "device"):
            del self.fixed[free]
        self.json = {"checkpoint": str(file), "command": command(), "arguments": self.fixed}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"out: {self.directory} cannot be made ({error.strerror}). Give another --out.")

    def check_writable(self) -> None:
        """Before the first epoch, and not after it."""
        try:
            if self.fabric.is_global_zero:
                TemporaryFile(dir=self.directory).close()
        except OSError as error:
            fail(f"out: {self.directory} cannot be written ({error.strerror}). Give another --out.")

    @property
    def epoch(self) -> int:
        return len(self.rows)

    def path(self, suffix: str) -> Path:
        return self.directory / f"linear_eval.{suffix}"

    def summary(self) -> str:
        return f"Linear probe: top-1 {self.rows[-1]['top1']:.2f} %, top-5 {self.rows[-1]['top5']:.2f} %."

    def resume(self, classifier: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        path = self.path("pt")
        if not path.exists():
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            fixed, self.rows = saved["fixed"], saved["rows"]
            states = saved["classifier"], saved["optimizer"]
        except Exception as error:  # whatever a damaged file makes of the reader
            reason = (str(error).splitlines() or [""])[0][:120]
            fail(f"{path} cannot be read ({type(error).__name__}: {reason}). Delete it to start over, or give --out.")
        differing = [name for name in fixed | self.fixed if fixed.get(name) != self.fixed.get(name)]
        if differing:
            lines = [f"  {name}: saved {fixed.get(name)}, given {self.fixed.get(name)}" for name in differing]
            fail("\n".join([f"{path} was made with other arguments:", *lines, "Give another --out, or delete it."]))
        classifier.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])

    def add(self, row: dict[str, float], classifier: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        self.rows.append(row)
        state = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}
        text = StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        if self.fabric.is_global_zero:
            self.write("pt", {"fixed": self.fixed, "rows": self.rows, **state})
            self.write("csv", text.getvalue())

    def write_json(self) -> None:
        if self.fabric.is_global_zero:
            last, best = self.rows[-1], max(row["top1"] for row in self.rows)
            content = {"top1": last["top1"], "top5": last["top5"], "best_top1": best, **self.json}
            self.write("json", json.dumps(content, indent=2) + "\n")

    def write(self, suffix: str, content: str | dict[str, Any]) -> None:
        path = self.path(suffix)
        try:
            with written_whole(path) as file:
                file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            kept = "The previous one is whole." if path.exists() else "There was none before."
            fail(f"{path}: cannot be written ({(str(error).splitlines() or [''])[0]}). {kept}")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            print(f"\nstopped after {self.epoch} epochs. Continue with\n  {command()}", file=sys.stderr)
            raise SystemExit(130) from None
        except DataError as error:
            fail(str(error).splitlines()[-1].split("DataError: ")[-1])  # without the traceback of a worker


def digest(encoder: Encoder) -> str:
    """Of all weights and statistics: a probe belongs to them."""
    found = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def header(args: Args, data: Data, fabric: Fabric, epochs: int, peak: float, results: Results) -> str:
    if args.cache_features:
        how = f"computed once without augmentation ({data.placements} placement(s)): not the papers' protocol"
    else:
        how = "of fresh placements" if data.name == "digits" else "of random crops and flips"
    lines = [
        f"command  {command()}",
        f"device   {fabric.device}, {args.precision}, {fabric.world_size} process(es)",
        f"data     {data.name}: {data.fingerprint}; {data.image_size} px"
        + (f"\nnote     {data.note}" if data.note else ""),
        f"probe    {args.protocol}: SGD, learning rate {peak:g}, batch {args.batch_size}, {epochs} epochs",
        f"features {how}",
        f"results  {results.path('csv')}" + (f", resumed after epoch {results.epoch}" if results.epoch else ""),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
