"""What the runs train on: scikit-learn's digits placed at random, or a folder of images.

Sample order and augmentation are pure functions of (seed, epoch, sample, view): there is nothing to save, and a resumed
run sees what it would have seen.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

ORDER, VIEW, EVALUATION, INIT, EPOCH = range(1, 6)  # what a seed is for


class DataError(ValueError):
    """The data cannot be used; the message says why, and what to do."""


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

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Two views (N, C, H, W) of each of N images, shuffled; an incomplete last batch is left out."""

    def labelled(self, split: str, placement: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of "train" or "test" in order, with labels, for the evaluation."""


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

    def view(self, epoch: int, view: int) -> Tensor:
        """Every training image as one epoch sees it."""
        return place(self.images["train"], generator_of(VIEW, self.seed, epoch, view), self.image_size)

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        first, second = self.view(epoch, 0), self.view(epoch, 1)
        order = sample_order(self.seed, epoch, self.train_size).to(first.device)
        for rows in torch.split(order, batch_size)[: self.train_size // batch_size]:
            yield first[rows], second[rows]

    def labelled(self, split: str, placement: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = generator_of(EVALUATION, placement, int(split == "test"))  # the same placements for every run
        placed = place(self.images[split], generator, self.image_size)
        yield from zip(torch.split(placed, 256), torch.split(self.labels[split], 256), strict=True)


# ---------------------------------------------------------------------------------------------- a folder of images

Sample = tuple[Path, int]


class ImageFolderData:
    """``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val``); or ``root/<class>/*``, every tenth to test."""

    channels, placements = 3, 1

    def __init__(self, root: Path, seed: int, image_size: int | None, workers: int, limit: int | None = None) -> None:
        train, test, class_names = find_images(root)
        asked = {"train": train[:limit], "test": test[:limit]}
        self.samples = {split: readable(samples) for split, samples in asked.items()}
        broken = [path for split in asked for path, _ in set(asked[split]) - set(self.samples[split])]
        every = sum(map(len, asked.values()))
        self.note = f"{len(broken)} of {every} images cannot be read, the first is {min(broken)}" if broken else ""
        for split, samples in self.samples.items():
            if not samples:
                raise DataError(f"data_dir: {root} has no readable {split} image ({self.note or 'too few in all'}).")
        if image_size is None:  # that of the first image, 224 at most
            with Image.open(self.samples["train"][0][0]) as image:
                image_size = min(224, *image.size)
        names = [f"{split}/{label}/{path.name}" for split in asked for path, label in self.samples[split]]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        self.name, self.seed, self.image_size, self.workers = root.resolve().name, seed, image_size, workers
        self.classes = len(class_names)
        self.train_size, self.test_size = len(self.samples["train"]), len(self.samples["test"])
        self.fingerprint = f"{self.train_size} train and {self.test_size} test images, {digest[:12]}"
        self._loader: DataLoader[tuple[Tensor, Tensor]] | None = None

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self._loader is None:  # one set of workers for the whole run
            views = TwoViews(self.samples["train"], self.seed, self.image_size)
            self._sampler = EpochBatches(self.seed, self.train_size, batch_size)
            self._loader = DataLoader(
                views,
                batch_sampler=self._sampler,
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # leaves the default generator alone
            )
        self._sampler.epoch = epoch
        yield from self._loader

    def labelled(self, split: str, placement: int) -> Iterator[tuple[Tensor, Tensor]]:
        images = CentreCrops(self.samples[split], self.image_size)
        yield from DataLoader(images, batch_size=256, num_workers=self.workers, generator=torch.Generator())


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, sample), so that a worker needs no state to know which view to draw."""

    def __init__(self, seed: int, size: int, batch_size: int) -> None:
        self.seed, self.size, self.batch_size, self.epoch = seed, size, batch_size, 0

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = sample_order(self.seed, self.epoch, self.size)
        for rows in torch.split(order, self.batch_size)[: len(self)]:
            yield [(self.epoch, sample) for sample in rows.tolist()]


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """MoCo v2's augmentation, drawn per image."""

    def __init__(self, samples: list[Sample], seed: int, image_size: int) -> None:
        from torchvision.transforms import v2  # type: ignore[import-untyped]

        self.samples, self.seed = samples, seed
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=(0.2, 1.0), antialias=True),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(max(3, image_size // 10 // 2 * 2 + 1), (0.1, 2.0))], p=0.5),
                v2.RandomHorizontalFlip(),
                *to_normalised_tensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, sample = key
        image = read_image(self.samples[sample][0])
        return self.view(image, epoch, sample, 0), self.view(image, epoch, sample, 1)

    def view(self, image: Image.Image, epoch: int, sample: int, view: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the default generator only
            torch.manual_seed(seed_of(VIEW, self.seed, epoch, sample, view))
            augmented: Tensor = self.augment(image)
        return augmented


class CentreCrops(Dataset[tuple[Tensor, int]]):
    def __init__(self, samples: list[Sample], image_size: int) -> None:
        from torchvision.transforms import v2

        margin = 1 if image_size < 64 else 256 / 224
        resize = v2.Resize(round(image_size * margin), antialias=True)
        self.samples = samples
        self.transform = v2.Compose([resize, v2.CenterCrop(image_size), *to_normalised_tensor()])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        path, label = self.samples[sample]
        return self.transform(read_image(path)), label


def to_normalised_tensor() -> list[torch.nn.Module]:
    from torchvision.transforms import v2

    statistics = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), statistics]


def read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # PIL's broken PNG is a SyntaxError
        raise DataError(f"data_dir: {path} cannot be decoded ({error}). Replace it by a whole copy.") from None


def find_images(root: Path) -> tuple[list[Sample], list[Sample], list[str]]:
    """Training samples, test samples, class names. Any prefix of either list is balanced over the classes."""
    if not root.is_dir():
        raise DataError(f"data_dir: {root} is {'a file' if root.exists() else 'not there'}. Give a folder of images.")
    if not (root / "train").is_dir():
        samples, classes = image_folder(root)
        return *hold_out(samples), classes
    samples, classes = image_folder(root / "train")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None:
        return *hold_out(samples), classes
    test, test_classes = image_folder(held_out)
    if test_classes != classes:
        differing = ", ".join(sorted(set(classes) ^ set(test_classes))[:5])
        raise DataError(f"data_dir: {root}: train and {held_out.name} differ in their classes ({differing}).")
    return samples, test, classes


def image_folder(folder: Path) -> tuple[list[Sample], list[str]]:
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:  # no class, or a class without an image
        layout = "train/<class>/* and test/<class>/*, or <class>/*"
        reason = str(error).split(" Supported")[0].rstrip(".")
        raise DataError(f"data_dir: expected images as {layout}; {reason}.") from None
    nth: dict[int, int] = defaultdict(int)
    order = []
    for path, label in found.samples:
        order.append((nth[label], label, Path(path)))
        nth[label] += 1
    return [(path, label) for _, label, path in sorted(order)], found.classes


def hold_out(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Every tenth image of each class is for testing, of smaller classes the last."""
    count: dict[int, int] = defaultdict(int)
    for _, label in samples:
        count[label] += 1
    seen: dict[int, int] = defaultdict(int)
    train, test = [], []
    for path, label in samples:
        seen[label] += 1
        if seen[label] % 10 == 0 or seen[label] == count[label] < 10:
            test.append((path, label))
        else:
            train.append((path, label))
    return train, test


def readable(samples: list[Sample]) -> list[Sample]:
    """Those whose header can be read. A truncated image is found when it is used."""

    def opens(sample: Sample) -> bool:
        try:
            with Image.open(sample[0]):
                return True
        except (OSError, SyntaxError):
            return False

    with ThreadPoolExecutor(16) as pool:
        return [sample for sample, good in zip(samples, pool.map(opens, samples), strict=True) if good]
