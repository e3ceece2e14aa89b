"""Files as people have them: depths, damage, names and folders that a training script must take, or refuse by name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from . import scripts

from pretrain import data, pictures  # isort: skip

GRADIENT = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


def save_gradient(mode: str, path: Path) -> None:
    """All of the range of its mode, and row by row brighter."""
    if mode == "I;16B":
        Image.frombytes(mode, (64, 64), GRADIENT.astype(">u2").tobytes()).save(path)
    elif mode == "I;12":  # a TIFF of 12 bits, packed two pixels in three bytes
        low, high = (GRADIENT.astype(np.int64) >> 4).reshape(-1, 2).T
        packed = np.stack([low >> 4, (low & 15) << 4 | high >> 8, high & 255], 1).astype(np.uint8).tobytes()
        entries = [(256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1)]
        entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 64), (279, 4, 1, len(packed))]
        directory = b"".join(np.array([entry], "<u2,<u2,<u4,<u4").tobytes() for entry in entries)
        header = b"II*\0" + np.uint32(8 + len(packed)).tobytes()
        path.write_bytes(header + packed + np.uint16(len(entries)).tobytes() + directory + bytes(4))
    else:
        Image.fromarray(GRADIENT.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(path)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("I;16", "pgm"), ("I;12", "tif")]
)
def test_gray_of_more_than_8_bits_is_a_gradient(mode: str, suffix: str, tmp_path: Path) -> None:
    """PIL alone makes all but 255 of the 65,536 values white."""
    path = tmp_path / f"gradient.{suffix}"
    save_gradient(mode, path)
    assert pictures.has_header(path)
    image = pictures.read_image(path)
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(float)
    assert np.abs(pixels - GRADIENT[..., None] / 257).max() <= (0.51 if mode != "I;12" else 1)
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_a_png_of_mode_i_has_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So older versions of Pillow open it."""
    save_gradient("I;16", tmp_path / "gradient.png")
    with Image.open(tmp_path / "gradient.png") as image:
        image.load()
        older = image.convert("I")
    older.format = "PNG"
    pixels = np.asarray(pictures.eight_bits(older, tmp_path))
    assert np.abs(pixels - GRADIENT / 257).max() <= 0.51


@pytest.mark.parametrize(("mode", "kind"), [("I", "signed or 32-bit integers"), ("F", "32-bit floats")])
@pytest.mark.parametrize("find", [pictures.read_image, pictures.has_header])
def test_numbers_of_an_unknown_range_are_refused(
    mode: str, kind: str, find: Callable[[Path], object], tmp_path: Path
) -> None:
    """At once, because the header tells, and not as one of the unreadable images that are left out."""
    save_gradient(mode, tmp_path / "depth.tif")
    with pytest.raises(data.DataError, match=rf"depth\.tif holds {kind}.* Convert it to gray of 8 or 16 bits"):
        find(tmp_path / "depth.tif")


def test_a_folder_of_floats_is_an_error_before_training(tmp_path: Path) -> None:
    scripts.make_images(tmp_path / "cat", 20, 0)
    save_gradient("F", tmp_path / "cat" / "depth.tif")
    with pytest.raises(data.DataError, match=r"depth\.tif holds 32-bit floats"):
        data.open_data("imagefolder", tmp_path, seed=0, device=torch.device("cpu"))
