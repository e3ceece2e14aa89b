"""What the runs train on: scikit-learn's digits placed at random, CIFAR, STL-10, or a folder of images.

Sample order and augmentation are pure functions of (seed, epoch, sample, view): there is nothing to save, and a resumed
run sees what it would have seen.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from .augment import RECIPES, OnDevice, Recipe, per_image, to_normalised_tensor
from .decoding import decoded_files
from .decoding import outlive_signals as outlive_signals
from .folders import TRAIN, Once, Splits, image_files, subfolders
from .folders import broken_files as broken_files
from .pictures import Arrays, Damage, DamagedImageError, Files, Pictures, show
from .pictures import DataError as DataError

ORDER, VIEW, EVALUATION, INIT, STEP, SHUFFLE, DRAW = range(1, 8)  # what a seed is for
LONGEST = 8  # an image's long side by its short one, beyond which only the middle is looked at
NEVER = 2**31  # an epoch that no run reaches: its views and its order are nobody's


class Share(NamedTuple):
    """What a process computes of each batch: its rank's rows, in so many pieces one after another."""

    batch_size: int  # N, of all ranks and pieces
    pieces: int = 1
    rank: int = 0
    ranks: int = 1

    def of(self, order: Tensor, start: int = 0) -> Tensor:
        """Samples (steps x pieces, N / pieces / ranks) of an epoch, from batch ``start`` on."""
        steps = len(order) // self.batch_size
        rows = order[: steps * self.batch_size].view(steps, self.pieces, self.ranks, -1)
        return rows[start:, :, self.rank].flatten(0, 1)


class Views(NamedTuple):
    views: tuple[Tensor, Tensor]  # two of each image, (N, C, H, W)
    samples: Tensor  # (N,), the images' numbers


def part(size: int, rank: int, ranks: int) -> range:
    """This rank's consecutive rows; no rank has more than one row less than another."""
    return range(size * rank // ranks, size * (rank + 1) // ranks)


class Data(Protocol):
    name: str
    fingerprint: str  # the same for the same samples
    channels: int
    image_size: int
    classes: int
    train_size: int
    test_size: int
    placements: int  # how many versions of each image the evaluation averages over
    note: str  # what a person should know about it
    damage: Damage

    def batches(self, epoch: int, share: Share, start: int = 0) -> Iterator[Views]:
        """This rank's pieces of every shuffled batch from the ``start``-th on; an incomplete last one is left out."""

    def view_labels(self) -> Tensor:
        """(M,) by the numbers of the samples; -1 where an image has none."""

    def labelled(self, split: str, placement: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of "train" or "test" in order, with labels, for the evaluation, without damaged images."""

    def size(self, split: str) -> int:
        """How many images "train" or "test" has for the evaluation."""

    def close(self) -> None:
        """End whatever works for it; it can be used again."""


def seed_of(purpose: int, *numbers: int) -> int:
    """One well-mixed seed for a tuple of numbers."""
    mixed = np.random.SeedSequence((len(numbers), purpose, *numbers)).generate_state(1, np.uint64)
    return int(mixed[0]) >> 1


def generator_of(purpose: int, *numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(purpose, *numbers))


def sample_order(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator_of(ORDER, seed, epoch))


# ---------------------------------------------------------------------------------------------- digits placed at random


def place(digits: Tensor, generator: torch.Generator, size: int = 32) -> Tensor:
    """Each digit (M, 1, 8, 8) somewhere on a canvas (M, 1, size, size), turned, scaled, sheared, dimmed, with noise."""
    draw = torch.rand(len(digits), 6, generator=generator) * 2 - 1  # (M, 6), from -1 to 1
    noise = torch.randn(len(digits), 1, size, size, generator=generator)
    draw, noise = draw.to(digits.device), noise.to(digits.device)
    angle, scale, shear = math.radians(25) * draw[:, 0], 0.7 + 0.2 * draw[:, 1], 0.1 * draw[:, 2]
    shift = 1.3 * (1 - scale[:, None]) * draw[:, 3:5]  # a little beyond the edge, as a digit has a margin
    cos, sin = angle.cos(), angle.sin()
    # Canvas to digit: undo the shift, then rotation, shear and scale.
    matrix = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], 1).view(-1, 2, 2) / scale[:, None, None]
    theta = torch.cat([matrix, -matrix @ shift[:, :, None]], 2)  # (M, 2, 3)
    grid = F.affine_grid(theta, [len(digits), 1, size, size], align_corners=False)
    brightness = 1 + 0.2 * draw[:, 5]
    return F.grid_sample(digits, grid, align_corners=False) * brightness[:, None, None, None] + 0.1 * noise


class PlacedDigits:
    """scikit-learn's 1,797 handwritten digits (8 x 8), 1,500 to train and 297 to test. A view is a fresh placement."""

    name, channels, image_size, classes, placements, note = "digits", 1, 32, 10, 5, ""

    def __init__(self, seed: int, device: torch.device, limit: int | None = None) -> None:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]

        source = load_digits()
        shuffled = np.random.default_rng(0).permutation(len(source.images))  # one split for every seed
        self.images, self.labels = {}, {}
        for split, rows in (("train", shuffled[:1500][:limit]), ("test", shuffled[1500:][:limit])):
            self.images[split] = torch.tensor(source.images[rows, None] / 16, dtype=torch.float32, device=device)
            self.labels[split] = torch.tensor(source.target[rows])
        self.seed = seed
        self.train_size, self.test_size = len(self.labels["train"]), len(self.labels["test"])
        self.fingerprint = f"{self.train_size} train and {self.test_size} test images"
        self.damage = Damage(self.train_size + self.test_size)

    def size(self, split: str) -> int:
        return len(self.labels[split])

    def close(self) -> None:
        pass

    def view(self, epoch: int, view: int) -> Tensor:
        """Every training image as one epoch sees it."""
        return place(self.images["train"], generator_of(VIEW, self.seed, epoch, view), self.image_size)

    def batches(self, epoch: int, share: Share, start: int = 0) -> Iterator[Views]:
        first, second = self.view(epoch, 0), self.view(epoch, 1)
        for rows in share.of(sample_order(self.seed, epoch, self.train_size), start).to(first.device):
            yield Views((first[rows], second[rows]), rows)

    def view_labels(self) -> Tensor:
        return self.labels["train"]

    def labelled(self, split: str, placement: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        generator = generator_of(EVALUATION, placement, int(split == "test"))  # the same placements for every run
        placed, labels = place(self.images[split], generator, self.image_size), self.labels[split]
        mine = part(len(labels), rank, ranks)
        for rows in torch.split(torch.arange(mine.start, mine.stop), 256):
            yield placed[rows.to(placed.device)], labels[rows]


# ---------------------------------------------------------------------------------------------- images


class ImageData:
    """Pictures in workers' hands, or (``on_device``) all of them in the device's memory, augmented there."""

    channels, placements = 3, 1

    def __init__(
        self,
        name: str,
        splits: Splits,
        classes: int,
        seed: int,
        image_size: int | None,
        recipe: Recipe,
        workers: int,
        on_device: torch.device | None,
        note: str = "",
        fingerprint: str = "",
        compiled: bool = False,
    ) -> None:
        self.name, self.splits, self.classes, self.note = name, splits, classes, note
        self.seed, self.recipe, self.compiled = seed, recipe, compiled
        if image_size is None:  # that of the first image, from 32 to 224
            image_size = max(32, min(224, *show(splits["views"], 0).image.size))
        self.image_size, self.workers, self.device = image_size, workers, on_device
        self.train_size, self.test_size = len(splits["views"].labels), len(splits["test"].labels)
        self.fingerprint = f"{self.train_size} train and {self.test_size} test images" + fingerprint
        self.damage = Damage(self.train_size + self.test_size)
        self._loader: DataLoader[Pair] | None = None
        self._working = set[Any]()  # iterators that have workers
        self._decoded: dict[str, Decoded] = {}
        if on_device is not None:
            for split, pictures in splits.items():
                same = next(
                    (other for other in self._decoded if splits[other] is pictures), None
                )  # "views" and "train"
                self._decoded[split] = self._decoded[same] if same else self.decode(split, on_device)

    def batches(self, epoch: int, share: Share, start: int = 0) -> Iterator[Views]:
        if self.device is not None:
            augment = OnDevice(self.recipe, self.image_size, compiled=self.compiled)
            pixels, shown = self._decoded["views"]
            for rows in share.of(sample_order(self.seed, epoch, self.train_size), start).to(self.device):
                first, second = augment(pixels, seed=self.seed, epoch=epoch, samples=rows, rows=rows)
                yield Views((first, second), shown[rows])
            return
        if self._loader is None:  # one set of workers for the whole run
            views = TwoViews(self.splits["views"], self.seed, per_image(self.recipe, self.image_size))
            self._sampler = EpochBatches(self.seed, self.train_size, share)
            self._loader = self.loader(views, persistent_workers=self.workers > 0, batch_sampler=self._sampler)
        self._sampler.epoch, self._sampler.start = epoch, start
        for first, second, asked, shown in self.load(self._loader):
            self.found_damaged("views", asked[asked != shown])
            yield Views((first, second), shown)

    def view_labels(self) -> Tensor:
        return torch.tensor(self.splits["views"].labels)

    def labelled(self, split: str, placement: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        mine = part(len(self.splits[split].labels), rank, ranks)
        transform, labels = centre_crop(self.image_size), torch.tensor(self.splits[split].labels)
        if self.device is None:
            for images, samples, whole in self.load(
                self.loader(Subset(CentreCrops(self.splits[split], transform), mine), batch_size=256)
            ):
                self.found_damaged(split, samples[~whole])
                yield images[whole], labels[samples[whole]]
            return
        decoded = self._decoded[split]
        for rows in torch.split(torch.arange(mine.start, mine.stop), 1024):
            whole = rows[(decoded.shown[rows.to(self.device)].cpu() == rows)]
            yield transform(decoded.pixels[whole.to(self.device)]), labels[whole]

    def size(self, split: str) -> int:
        return len(self.splits[split].labels)

    def decode(self, split: str, device: torch.device) -> "Decoded":
        """All images of a split, in the device's memory."""
        decoded = Decoded.of(self.splits[split], device, self.workers)
        asked = torch.arange(len(decoded.shown), device=device)
        self.found_damaged(split, asked[asked != decoded.shown])
        return decoded

    def found_damaged(self, split: str, samples: Tensor) -> None:
        """These images turned out to be damaged."""
        self.damage.add(self.splits[split].name(sample) for sample in samples.tolist())

    def load(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """The loader's batches. What ends them before their end ends its workers, too."""
        iterator = iter(loader)
        self._working.add(iterator)
        try:
            yield from iterator
        except BaseException:
            self.close()
            raise
        if not loader.persistent_workers:
            self._working.remove(iterator)

    def close(self) -> None:
        """End all workers at once. Left alone, they are told so when Python ends, and take their time."""
        for iterator in self._working:
            end_workers(iterator)
        self._working.clear()
        self._loader = None

    def loader(self, dataset: Dataset[Any], **how: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # leaves the default generator alone
            worker_init_fn=outlive_signals,
            **how,
        )


def end_workers(iterator: Any) -> None:
    """Of a loader's iterator; torch has no public way to it. Workers of which one has died are ended alike."""
    if hasattr(iterator, "_shutdown_workers"):  # with 0 workers there are none
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()


class Decoded(NamedTuple):
    pixels: Tensor  # uint8 (M, 3, H, W)
    shown: Tensor  # (M,), whose pixels they are: another image's where one is damaged

    @classmethod
    def of(cls, pictures: Pictures, device: torch.device, workers: int) -> "Decoded":
        """All of them."""
        arrays = decoded_files(pictures.samples, workers) if isinstance(pictures, Files) else pictures
        assert isinstance(arrays, Arrays)
        shown = torch.arange(len(arrays.labels))
        for sample in arrays.damages:
            shown[sample] = show(arrays, sample).sample
        pixels = torch.from_numpy(arrays.pixels)[shown] if arrays.damages else torch.from_numpy(arrays.pixels)
        return cls(pixels.to(device).permute(0, 3, 1, 2).contiguous(), shown.to(device))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, sample), so that a worker needs no state to know which view to draw."""

    def __init__(self, seed: int, size: int, share: Share) -> None:
        self.seed, self.size, self.share, self.epoch, self.start = seed, size, share, 0, 0

    def __len__(self) -> int:
        return (self.size // self.share.batch_size - self.start) * self.share.pieces

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for rows in self.share.of(sample_order(self.seed, self.epoch, self.size), self.start).tolist():
            yield [(self.epoch, sample) for sample in rows]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor
    asked: int  # the number of the sample
    shown: int  # whose image it is


class TwoViews(Dataset[Pair]):
    """Two views of a sample, drawn per image."""

    def __init__(self, pictures: Pictures, seed: int, augment: Callable[[Image.Image], Tensor]) -> None:
        self.pictures, self.seed, self.augment = pictures, seed, augment

    def __len__(self) -> int:
        return len(self.pictures.labels)

    def __getitem__(self, key: tuple[int, int]) -> Pair:
        epoch, sample = key
        image, shown = show(self.pictures, sample)
        return Pair(self.view(image, epoch, sample, 0), self.view(image, epoch, sample, 1), sample, shown)

    def view(self, image: Image.Image, epoch: int, sample: int, view: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the default generator only
            torch.manual_seed(seed_of(VIEW, self.seed, epoch, sample, view))
            return self.augment(image)


class CentreCrops(Dataset[tuple[Tensor, int, bool]]):
    """The middle of a sample, its number, and whether it could be decoded; if not, the middle is black."""

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures.labels)

    def __getitem__(self, sample: int) -> tuple[Tensor, int, bool]:
        try:
            return self.transform(self.pictures.open(sample)), sample, True
        except DamagedImageError:
            return self.transform(Image.new("RGB", (1, 1))), sample, False


def centre_crop(image_size: int) -> Callable[[Any], Tensor]:
    """Of an image or a uint8 batch (M, 3, H, W): float32, normalised."""
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    margin = 1 if image_size < 64 else 256 / 224
    resize = v2.Resize(round(image_size * margin), antialias=True)
    crop = v2.CenterCrop(image_size)
    transform: Callable[[Any], Tensor] = v2.Compose([shortened, resize, crop, *to_normalised_tensor()])
    return transform


def shortened(image: Any) -> Any:
    """As it is; of one that is very long only the middle, because resized as a whole it would fill the memory."""
    from torchvision.transforms.v2 import functional as tv  # type: ignore[import-untyped]

    size = tv.get_size(image)  # height, width
    most, long = LONGEST * min(size), max(size)
    if long <= most:
        return image
    kept = most + (long - most) % 2  # around the same centre
    return tv.center_crop(image, [min(side, kept) for side in size])


# ---------------------------------------------------------------------------------------------- where images come from


def open_data(
    dataset: str,
    data_dir: Path | None,
    *,
    seed: int,
    device: torch.device,
    image_size: int | None = None,
    limit: int | None = None,
    workers: int = 0,
    recipe: str = "mocov2",
    augment: str = "workers",
    compiled: bool = False,
    once: Once = lambda work: work(),
) -> Data:
    """The data set by its name. A folder with train/<class>/* in it serves for cifar10, cifar100 and stl10, too.

    ``once`` does what one of several ranks is to do for all: downloads, and opening every file.
    """
    if dataset == "digits":
        return PlacedDigits(seed, device, limit)
    if dataset == "imagefolder" and data_dir is None:
        raise DataError("data_dir: imagefolder needs one. Give --data-dir DIR, with DIR/train/<class>/* in it.")
    root = Path("data") if data_dir is None else data_dir
    if dataset == "imagefolder" or any(path.name.lower() in TRAIN for path in subfolders(root)):
        splits, classes, note, digest = image_files(root, limit, once, workers if augment == "device" else None)
        name = root.resolve().name if dataset == "imagefolder" else dataset
    else:
        splits, classes = torchvision_arrays(dataset, root, limit, once)
        name, note, digest = dataset, "", ""
    on_device = device if augment == "device" else None
    return ImageData(
        name, splits, classes, seed, image_size, RECIPES[recipe], workers, on_device, note, digest, compiled
    )


def torchvision_arrays(dataset: str, root: Path, limit: int | None, once: Once) -> tuple[Splits, int]:
    """torchvision's CIFAR and STL-10, from files in ``root``; downloaded if they are not there."""
    from torchvision import datasets  # type: ignore[import-untyped]

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[dataset]
    stl10 = dataset == "stl10"  # its views are of the unlabelled images, too
    ways: dict[str, dict[str, Any]] = {
        "views": {"split": "train+unlabeled"} if stl10 else {"train": True},
        "train": {"split": "train"} if stl10 else {"train": True},
        "test": {"split": "test"} if stl10 else {"train": False},
    }
    try:
        once(lambda: [kind(root, download=True, **how) for how in ways.values()] and None)
        found = {split: kind(root, **how) for split, how in ways.items()}
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data_dir: {root} does not hold {dataset}, and it cannot be downloaded ({error}). Give --data-dir with "
            "torchvision's files, or with train/<class>/* and test/<class>/*."
        ) from None
    splits: Splits = {}
    for split, one in found.items():
        if split == "train" and not stl10:
            splits[split] = splits["views"]
            continue
        pixels = one.data.transpose(0, 2, 3, 1) if stl10 else one.data
        labels = one.labels if stl10 else one.targets
        splits[split] = Arrays(pixels[:limit], [int(label) for label in labels[:limit]])
    return splits, len(found["train"].classes)
