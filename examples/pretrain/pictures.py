"""One image file, whatever depth it is stored in, as 8-bit RGB."""

from pathlib import Path

import numpy as np
from PIL import Image

BITS_PER_SAMPLE = 258  # TIFF's tag


class DataError(ValueError):
    """The data cannot be used; the message says why, and what to do."""


def read_image(path: Path) -> Image.Image:
    """RGB. Raises DataError where the file cannot be decoded, or holds numbers whose range nobody knows."""
    try:
        with Image.open(path) as image:
            image.load()
            return eight_bits(image, path).convert("RGB")
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a broken file makes PIL raise whatever its reader stumbles over
        raise DataError(f"data_dir: {path} cannot be decoded ({error}). Replace it by a whole copy.") from None


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
            f"data_dir: {path} holds {numbers}, and which of them are black and white is not known. Convert it to gray "
            "of 8 or 16 bits, for example by Image.fromarray((255 * (x - low) / (high - low)).clip(0, 255).astype("
            "'uint8')), with the same low and high for all images."
        )
    return 255
