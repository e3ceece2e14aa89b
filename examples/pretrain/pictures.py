"""Images one by one: whatever depth they are stored in, as 8-bit RGB; and what to do about one that is damaged."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageOps

from .console import legible as legible

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags, and a value of the second
DAMAGED = 0.1  # share of images above which there is something wrong with the folder
STAND_INS = 10  # images in a row that are tried before it is called an error

Sample = tuple[Path, int]  # a file and its label

warnings.filterwarnings("ignore", module="PIL")  # each worker would warn of the same files again


class DataError(ValueError):
    """The data cannot be used; the message says why, and what to do."""


class DamagedImageError(DataError):
    """One image cannot be decoded."""


class NoImageError(DamagedImageError):
    """Not even the beginning of the file is an image's."""


# ---------------------------------------------------------------------------------------------- many images


class Pictures(Protocol):
    """Images to open one by one; ``views`` are trained on, ``train`` and ``test`` have the labels of the evaluation."""

    labels: list[int]

    def open(self, sample: int) -> Image.Image: ...

    def name(self, sample: int) -> str: ...


class Files:
    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.labels = samples, [label for _, label in samples]

    def open(self, sample: int) -> Image.Image:
        return read_image(self.samples[sample][0])

    def name(self, sample: int) -> str:
        return legible(self.samples[sample][0])


class Arrays:
    """Images in memory; ``damages`` has what was wrong with those that could not be decoded."""

    def __init__(
        self,
        pixels: "np.ndarray[Any, np.dtype[np.uint8]]",
        labels: list[int],
        damages: dict[int, DamagedImageError] | None = None,
    ) -> None:
        self.pixels, self.labels, self.damages = pixels, labels, damages or {}  # (M, H, W, 3)

    def open(self, sample: int) -> Image.Image:
        if sample in self.damages:
            raise self.damages[sample]
        return Image.fromarray(self.pixels[sample])

    def name(self, sample: int) -> str:
        return f"image {sample}"


class Shown(NamedTuple):
    image: Image.Image
    sample: int  # whose image it is: another's, where the one that was asked for is damaged


def show(pictures: Pictures, sample: int) -> Shown:
    """The image of a sample, or in its stead the next one that can be decoded, so that a damaged file ends no run.

    Which one that is depends on the files alone: neither workers nor a resumed run can make it another.
    """
    for ahead in range(STAND_INS):
        other = (sample + ahead) % len(pictures.labels)
        try:
            return Shown(pictures.open(other), other)
        except DamagedImageError as error:
            reason = error
    raise DataError(f"{reason} The {STAND_INS - 1} images before it cannot be decoded either: is the disk still there?")


class Damage:
    """Which of the images turned out to be damaged when they were used, so that each is told once in a run."""

    def __init__(self, images: int) -> None:
        self.images, self.found, self.told = images, set[str](), set[str]()

    def add(self, names: Iterable[str]) -> None:
        self.found.update(names)
        self._check(self.found)

    def news(self) -> list[str]:
        """A line for each image that any rank found since the last call; every rank has to call it."""
        of_ranks: list[Any] = [self.found]
        if dist.is_available() and dist.is_initialized():
            of_ranks = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, self.found)
        every = set[str]().union(*of_ranks)
        self._check(every)
        new = sorted(every - self.told)
        self.told |= every
        return [f"{name} cannot be decoded: training takes another image, and the evaluation none." for name in new]

    def _check(self, found: set[str]) -> None:
        if len(found) > max(1, DAMAGED * self.images):
            raise DataError(
                f"data_dir: {len(found)} of {self.images} images cannot be decoded, the first is {min(found)}. More "
                f"than {DAMAGED:.0%} is no accident: replace them by whole copies."
            )


# ---------------------------------------------------------------------------------------------- one file


def read_image(path: Path) -> Image.Image:
    """RGB. A file that cannot be decoded is a DamagedImageError, one of numbers of an unknown range a DataError."""
    kind: type[DamagedImageError] = NoImageError
    try:
        with Image.open(path) as image:
            brightest(image, path)
            kind = DamagedImageError
            image.load()
            return ImageOps.exif_transpose(eight_bits(image, path)).convert("RGB")
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a broken file makes PIL raise whatever its reader stumbles over
        reason = f"data_dir: {legible(path)} cannot be decoded ({legible(error)})"
        raise kind(f"{reason}. Replace it by a whole copy.") from None


def has_header(path: Path) -> bool:
    """Whether the file begins as an image does. A truncated one is found when it is used.

    Raises DataError of an image that could be decoded and yet not be used.
    """
    try:
        with Image.open(path) as image:
            brightest(image, path)
            return True
    except (DataError, MemoryError):
        raise
    except Exception:  # as in read_image
        return False


def eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """As it is, or gray of more than 8 bits scaled so that the greatest number its file can hold becomes 255."""
    top = brightest(image, path)
    if top == 255:
        return image
    pixels = np.asarray(image).astype(np.int64)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which PIL heeds up to 8 bits
        pixels = top - pixels
    return Image.fromarray(((pixels * 255 + top // 2) // top).clip(0, 255).astype(np.uint8))


def brightest(image: Image.Image, path: Path) -> int:
    """The greatest number that a pixel's channel can hold. PIL's own conversion would cut off all above 255."""
    if image.mode.startswith("I;16"):  # PNG, JPEG 2000; a TIFF of 12 bits says so
        tags = getattr(image, "tag_v2", {})
        return int(2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # which have no more than 16 bits
        return 65535
    if image.mode in ("I", "F"):
        numbers = "32-bit floats" if image.mode == "F" else "signed or 32-bit integers"
        raise DataError(
            f"data_dir: {legible(path)} holds {numbers}, and which of them are black and white is not known. Convert "
            "it to gray of 8 or 16 bits, for example by Image.fromarray((255 * (x - low) / (high - low)).clip(0, 255)."
            "astype('uint8')), with the same low and high for all images."
        )
    return 255
