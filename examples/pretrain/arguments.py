"""What every script can be asked; a script adds its method's own, and the defaults of each data set."""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import tyro

from .choices import Arch, LoggerName, Norm, Recipe, Schedule
from .choices import KeyMomentumSchedule as KeyMomentumSchedule
from .console import fail, print_any_name
from .loggers import check_logger

Dataset = Literal["digits", "cifar10", "cifar100", "stl10", "imagefolder"]
# What may change when a run is resumed
FREE = ("data_dir", "run_dir", "workers", "logger", "save_minutes", "knn", "knn_device", "deterministic")

# What a person can do about a GPU without room. Fewer rows a piece are fewer negatives, where these are in the batch
SMALLER = (
    "--accumulate 2 or more (the same batch in pieces), a smaller --batch-size, --precision bf16-mixed, --augment "
    "workers if it is device, --knn-device cpu if it is the kNN, or a smaller --arch"
)


def ranks() -> int:
    """Processes of this run, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Common:
    # Data
    dataset: Dataset = "digits"  # imagefolder is meant where only --data-dir is given
    data_dir: Path | None = (
        None  # DIR/train/<class>/* and DIR/test/<class>/* or val, DIR/<class>/*, torchvision's files
    )
    image_size: int | None = None  # side in pixels. None: 32 for digits, else that of the first image, from 32 to 224
    limit: int | None = None  # use no more than so many training images, and test images
    recipe: Recipe = "mocov2"  # augmentation; digits are placed at random
    augment: Literal["workers", "device"] = "workers"  # device: images of one size, kept and augmented in its memory
    workers: int = min(8, os.cpu_count() or 1)  # processes of each rank that load images

    # Encoder
    arch: Arch = "small"  # a ResNet under 64 px has CIFAR's stem; x2 and x4 double and quadruple every convolution
    norm: Norm = "batch"  # sync: statistics of all ranks; shuffle, split: MoCo's, on several GPUs and on one
    splits: int = 8  # of the batch, for --norm split
    dim: int = 64  # D, width of the embedding

    # Optimisation
    epochs: int = 60  # passes over the training images
    schedule: Schedule = "simo"  # simo: warm-up times cosine; cosine: after warm-up; drops: at 60 and 80 %
    warmup_epochs: float = 2  # of linear warm-up (simo, cosine)
    warmup_from: float = 0.001  # share of the learning rate at which it starts
    batch_size: int = 128  # N, queries of one optimiser step, over all ranks and accumulated pieces
    accumulate: int = 1  # pieces a batch is computed in; in-batch negatives come from a query's own piece
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd has momentum 0.9
    base_lr: float = 4e-3  # learning rate = base_lr x N / 256, whatever K
    weight_decay: float = 0.01  # on every parameter

    # Evaluation
    knn_every: int = 20  # epochs from one kNN to the next
    knn: bool = True  # a kNN before training, every so many epochs, and at the end; --no-knn: none
    knn_k: int = 20  # neighbours that vote
    knn_device: Literal["training", "cpu"] = "training"  # where its features are kept: cpu if a GPU has no room
    online_probe: bool = False  # a linear classifier that learns beside the encoder and does not change it
    probe: bool = True  # a logistic regression on the features at the end; minutes where images are many

    # Run
    seed: int = 0  # of weights, order and views
    run_dir: Path | None = None  # None: a name in runs/ that tells the method, the data, the loss and the seed
    save_minutes: float = 15  # a checkpoint at least so often, besides that of every epoch
    # A checkpoint of a run of fewer epochs to go on from, in another run directory: the learning rate (and a key
    # momentum that is scheduled) is from there on that of a run that had --epochs from its beginning
    resume_from: Path | None = None
    logger: LoggerName = "none"  # who gets the metrics of each epoch besides metrics.csv
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"  # of the encoders; the loss is in float32
    compile: bool | None = None  # the encoders, and augmentation on a GPU. None: on CUDA; also --no-compile
    deterministic: bool = False  # cuDNN's deterministic algorithms on a GPU, not the fastest; a CPU's always are


Args = TypeVar("Args", bound=Common)

CIFAR: dict[str, Any] = {  # of MoCo's authors, without their head and views; other methods' differ in their own files
    "arch": "resnet18",
    "dim": 128,
    "epochs": 200,
    "warmup_epochs": 0,
    "schedule": "cosine-by-epoch",
    "batch_size": 512,
    "optimizer": "sgd",
    "base_lr": 0.03,
    "weight_decay": 5e-4,
    "knn_every": 10,
    "knn_k": 200,
    "probe": False,
}
SIMCO = {  # SimCo's and SimMoCo's, on CIFAR-100
    **CIFAR,
    "recipe": "simco",
    "online_probe": True,
    "schedule": "cosine",
    "warmup_epochs": 10,
    "warmup_from": 0.1,  # the paper's 0.003 at its batch of 256
    "batch_size": 256,
}
IMAGENET = {**CIFAR, "arch": "resnet50", "batch_size": 256, "weight_decay": 1e-4}


def given(words: list[str], name: str) -> str | None:
    """The value of ``--name`` among a command's words; the last counts."""
    value = None
    for word, following in zip(words, [*words[1:], ""], strict=False):  # no words, no pairs
        flag, equals, rest = word.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            value = rest if equals else following
    return value


def dataset_of(words: list[str]) -> str:
    """The data set that decides the defaults."""
    return given(words, "dataset") or ("digits" if given(words, "data-dir") is None else "imagefolder")


def parse(words: list[str], defaults: dict[str, Args], description: str | None) -> Args:
    """``defaults`` of each data set; the description is the script's docstring."""
    print_any_name()
    dataset = dataset_of(words)
    default = defaults["digits"]  # of an unknown one, which is tyro's to refuse
    if dataset in get_args(Dataset):
        default = dataclasses.replace(defaults[dataset], dataset=cast(Dataset, dataset))
    return tyro.cli(type(default), args=with_values(words), description=description, default=default)


def with_values(words: list[str]) -> list[str]:
    """``--compile`` and ``--no-compile`` as flags beside ``--compile None``, for which tyro wants a value."""
    following = [*words[1:], ""]
    given = {"--compile": ["--compile", "True"], "--no-compile": ["--compile", "False"]}
    return [
        each
        for word, after in zip(words, following[: len(words)], strict=True)
        for each in ([word] if after in ("True", "False", "None") else given.get(word, [word]))
    ]


def check(args: Common) -> None:
    """Bad numbers, before anything is loaded. A queue checks its own."""
    smallest = {"limit": 2, "image_size": 8, "batch_size": 2, "accumulate": 1, "epochs": 1, "dim": 1, "splits": 1}
    smallest |= {"knn_every": 1, "knn_k": 1, "workers": 0, "seed": 0, "warmup_epochs": 0, "weight_decay": 0}
    for name, least in {**smallest, "warmup_from": 0, "save_minutes": 0, "num_negatives": 1, "hidden": 1}.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value < math.inf:
            fail(f"{name}: expected {least} or more, got {value}.")
    for name, advice in {"alpha": " Leave it out, or give --no-eqco for InfoNCE.", "temperature": ""}.items():
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            fail(f"{name}: expected a finite number > 0, got {value}.{advice if hasattr(args, 'eqco') else ''}")
    key_momentum = getattr(args, "key_momentum", 0.0)
    if not 0 <= key_momentum <= 1:
        fail(f"key_momentum: expected a number from 0 (no momentum encoder) to 1, got {key_momentum}.")
    if not 0 < args.base_lr < math.inf:
        fail(f"base_lr: expected a number above 0, got {args.base_lr}.")
    if args.dataset == "digits" and args.image_size is not None:
        fail("image_size: the digits are 32 x 32. Leave it out, or give --data-dir.")
    if args.dataset == "digits" and args.data_dir is not None:
        fail("data_dir: the digits come with scikit-learn. Leave it out, or leave --dataset out.")
    if args.dataset == "digits" and args.augment != "workers":
        fail("augment: the digits are placed on the device as they are. Leave it out, or give --data-dir.")
    parts = ranks() * args.accumulate
    if args.batch_size % parts:
        fail(
            f"batch_size: expected a multiple of ranks x accumulate = {ranks()} x {args.accumulate}, got "
            f"{args.batch_size}. Give --batch-size {math.ceil(args.batch_size / parts) * parts}, or other "
            "--accumulate or --nproc-per-node."
        )
    if args.batch_size < 2 * parts:
        fail(
            f"batch_size: expected 2 or more for each rank and piece, {2 * parts} in all, got {args.batch_size}. "
            f"Give --batch-size {2 * parts} or more, or fewer ranks or pieces."
        )
    check_logger(args.logger)
