"""Files as people have them: depths, damage, names and folders that a training script must take, or refuse by name."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
import torchvision.datasets  # type: ignore[import-untyped]
from PIL import Image
from torchvision.transforms import v2  # type: ignore[import-untyped]

from . import scripts

from pretrain import data, decoding, folders, pictures  # isort: skip
from pretrain.augment import RECIPES, per_image, to_normalised_tensor  # isort: skip
from pretrain.run import Run, quoted  # isort: skip

GRADIENT = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


def tiff(pixels: bytes, bits: int, white: int) -> bytes:
    """64 x 64 gray pixels of so many bits; PIL itself cannot write all that people have."""
    entries = [(256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, int(white > 0))]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 64), (279, 4, 1, len(pixels))]
    directory = b"".join(np.array([entry], "<u2,<u2,<u4,<u4").tobytes() for entry in entries)
    header = b"II*\0" + np.uint32(8 + len(pixels)).tobytes()
    return header + pixels + np.uint16(len(entries)).tobytes() + directory + bytes(4)


def save_gradient(mode: str, path: Path) -> None:
    """All of the range of its mode, and row by row brighter."""
    if mode == "I;16B":
        Image.frombytes(mode, (64, 64), GRADIENT.astype(">u2").tobytes()).save(path)
    elif mode == "I;12":  # a TIFF of 12 bits, packed two pixels in three bytes
        low, high = (GRADIENT.astype(np.int64) >> 4).reshape(-1, 2).T
        packed = np.stack([low >> 4, (low & 15) << 4 | high >> 8, high & 255], 1).astype(np.uint8).tobytes()
        path.write_bytes(tiff(packed, bits=12, white=255))
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


def test_a_tiff_whose_white_is_zero(tmp_path: Path) -> None:
    """PIL turns it round up to 8 bits, and not beyond."""
    for bits, dtype in ((8, np.uint8), (16, np.uint16)):
        path = tmp_path / f"{bits}.tif"
        scaled = (GRADIENT * ((2**bits - 1) / 65535)).round().astype(dtype)
        path.write_bytes(tiff(scaled.tobytes(), bits, white=0))
        pixels = np.asarray(pictures.read_image(path))
        assert (pixels[0, 0].tolist(), pixels[-1, -1].tolist()) == ([255] * 3, [0] * 3)


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


# ------------------------------------------------------------------------------------------------------ truncated ones


def truncate(path: Path) -> None:
    """The header is whole, so that nothing is wrong with it before its pixels are used."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """40 images, of which a training and a test image are truncated."""
    root = tmp_path / "images"
    for seed, (split, name) in enumerate(itertools.product(("train", "test"), ("cat", "dog"))):
        scripts.make_images(root / split / name, 16 if split == "train" else 4, seed)
    truncate(root / "train" / "cat" / "3.png")
    truncate(root / "test" / "dog" / "2.png")
    return root


def open_images(root: Path, augment: str = "workers", workers: int = 0) -> data.ImageData:
    cpu = torch.device("cpu")
    found = data.open_data("imagefolder", root, seed=0, device=cpu, augment=augment, workers=workers)
    assert isinstance(found, data.ImageData)
    return found


@pytest.mark.parametrize("augment", ["workers", "device"])
def test_another_image_stands_in_for_a_truncated_one(damaged: Path, augment: str) -> None:
    """With the label and the number of its own; the evaluation leaves the truncated one out."""
    found = open_images(damaged, augment)
    files = found.splits["views"]
    assert isinstance(files, pictures.Files | decoding.Decodings)
    (lost,) = (i for i, (path, _) in enumerate(files.samples) if path.parts[-2:] == ("cat", "3.png"))
    (batch,) = found.batches(5, data.Share(32))
    (plain,) = (view.samples for view in open_images(damaged, augment).batches(5, data.Share(32)))
    assert torch.equal(batch.samples, plain)
    assert sorted(batch.samples.tolist()) == sorted([*(i for i in range(32) if i != lost), lost + 1])
    images, labels = (torch.cat(x) for x in zip(*found.labelled("test", 0), strict=True))
    assert (len(images), sorted(labels.tolist())) == (7, [0] * 4 + [1] * 3)
    notes = [f"{damaged}/{name} cannot be decoded: " for name in ("test/dog/2.png", "train/cat/3.png")]
    assert [note[: len(start)] for note, start in zip(found.damage.news(), notes, strict=True)] == notes
    list(found.batches(6, data.Share(32)))
    assert found.damage.news() == []


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["workers", "device"])
def test_a_run_with_truncated_images_ends_and_resumes_bit_for_bit(damaged: Path, tmp_path: Path, augment: str) -> None:
    script = scripts.Script(tmp_path)
    words = [f"--data-dir={damaged}", "--arch=small", "--image-size=16", "--epochs=3", "--batch-size=8", "--no-probe"]
    words += ["--knn-every=1", f"--augment={augment}"]
    output = script.run(*words, "--workers=0", f"--run-dir={tmp_path / 'whole'}")
    for name in ("train/cat/3.png", "test/dog/2.png"):
        assert output.count(f"note     {damaged}/{name} cannot be decoded") == output.count(name) == 1, output
    assert "Traceback" not in output
    script.run(*words, "--workers=1", f"--run-dir={tmp_path / 'run'}", die=("replace", 4), code=-signal.SIGKILL)
    script.run(*words, "--workers=2", f"--run-dir={tmp_path / 'run'}")
    scripts.assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_two_ranks_tell_of_a_truncated_image_once(damaged: Path, tmp_path: Path) -> None:
    words = [f"--data-dir={damaged}", "--arch=small", "--image-size=16", "--epochs=3", "--batch-size=8", "--no-probe"]
    output = scripts.Script(tmp_path).run_ranks(
        2, *words, "--norm=group", "--workers=1", f"--run-dir={tmp_path / 'run'}"
    )
    for name in ("train/cat/3.png", "test/dog/2.png"):
        assert output.count(name) == 1, output


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_is_gone_ends_a_run_at_once(damaged: Path, tmp_path: Path, workers: int) -> None:
    """One line says so, and no worker is left for Python's end to wait for."""
    found, run = open_images(damaged, workers=workers), Run(tmp_path / "run", (), {}, {})
    files = found.splits["views"]
    assert isinstance(files, pictures.Files | decoding.Decodings)
    files.samples = [(path.with_suffix(".gone"), label) for path, label in files.samples]
    with (
        pytest.raises(SystemExit, match=r"error: data_dir: \S+\.gone cannot be decoded .* is the disk still there\?"),
        run.interruptible(),
    ):
        list(found.batches(0, data.Share(8)))
    assert multiprocessing.active_children() == []


def test_whatever_ends_a_run_ends_its_workers(damaged: Path) -> None:
    found = open_images(damaged, workers=2)
    views, tests = found.batches(0, data.Share(8)), found.labelled("test", 0)
    next(views)
    next(tests)
    assert len(multiprocessing.active_children()) >= 2
    found.close()
    assert multiprocessing.active_children() == []
    assert len(list(found.batches(0, data.Share(8)))) == 4


def test_more_than_a_tenth_of_truncated_images_is_an_error(damaged: Path) -> None:
    for name in ("5", "6", "7"):
        truncate(damaged / "train" / "dog" / f"{name}.png")
    found = open_images(damaged)
    list(found.labelled("train", 0))  # four of 40
    with pytest.raises(data.DataError, match=r"5 of 40 images cannot be decoded, .* More than 10% is no accident"):
        list(found.labelled("test", 0))


# ------------------------------------------------------------------------------------------------- names and folders


@pytest.mark.parametrize("held_out", ["valid", "Validation", "VAL", "eval", "Test"])
def test_a_split_folder_by_any_of_its_names(held_out: str, tmp_path: Path) -> None:
    """Once only test and val were known, and images were held out of train though others were there."""
    for seed, split in enumerate(("Train", held_out)):
        scripts.make_images(tmp_path / split / "cat", 12, seed)
    found = open_images(tmp_path)
    assert (found.train_size, found.test_size) == (12, 12)


def test_of_several_test_folders_the_first_with_classes(tmp_path: Path) -> None:
    """ImageNet's test images come without labels, and so without folders; those of val have both."""
    for seed, split in enumerate(("train/cat", "val/cat", "test")):
        scripts.make_images(tmp_path / split, 12 + seed, seed)
    assert open_images(tmp_path).test_size == 13
    scripts.make_images(tmp_path / "test" / "cat", 5, 0)
    assert open_images(tmp_path).test_size == 5


def test_a_hidden_folder_is_no_class(tmp_path: Path) -> None:
    for split in ("train", "test"):
        scripts.make_images(tmp_path / split / "cat", 12, 0)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert open_images(tmp_path).classes == 1


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    """Each image was there as often as the system follows such a link; links elsewhere are followed."""
    root = tmp_path / "images"
    for seed, name in enumerate(("a", "b")):
        scripts.make_images(root / name, 10, seed)
    scripts.make_images(tmp_path / "elsewhere" / "deep", 10, 2)
    (root / "a" / "loop").symlink_to(root)
    (root / "b" / "up").symlink_to(tmp_path)
    (root / "self").symlink_to(root)
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(root / "a")
    (root / "a" / "far").symlink_to(tmp_path / "elsewhere")
    samples, classes = folders.image_folder(root)
    assert classes == ["a", "b", "c"]
    # a: its own and those elsewhere; c: those, a's and nothing of a link back to it
    assert [sum(label == number for _, label in samples) for number in range(3)] == [20, 10, 20]
    assert len(set(samples)) == len(samples)


def test_splits_one_folder_deeper_are_an_error(tmp_path: Path) -> None:
    """They were one class, whose training images were also those of the test."""
    for split in ("Train", "val"):
        scripts.make_images(tmp_path / "imagenet" / split / "cat", 12, 0)
    with pytest.raises(data.DataError) as error:
        open_images(tmp_path)
    assert str(error.value).endswith(f"but {tmp_path}/imagenet in it has one. Give --data-dir {tmp_path}/imagenet.")


def test_a_test_folder_among_torchvisions_files_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``data/`` may hold other folders than those of the data set that is asked for."""
    for name in ("test", "cifar-10-batches-py"):
        (tmp_path / name).mkdir()
    asked = list[Path]()

    def offline(root: Path, **how: object) -> NoReturn:
        asked.append(root)
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(data.DataError, match="does not hold cifar10"):
        data.open_data("cifar10", tmp_path, seed=0, device=torch.device("cpu"))
    assert asked == [tmp_path]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "holdout"), "holds the folders holdout, train, and which of them"),
        (("valid", "images"), "holds the folders images, valid, and which of them"),
        (("train", "Train", "test"), "holds the folders Train, test, train, and which of them"),
    ],
)
def test_a_layout_that_is_not_clear_is_an_error(folders: tuple[str, ...], message: str, tmp_path: Path) -> None:
    for seed, folder in enumerate(folders):
        scripts.make_images(tmp_path / folder / "cat", 2, seed)
    with pytest.raises(data.DataError, match=message) as error:
        open_images(tmp_path)
    assert "Name them train and test, val, valid, validation or eval" in str(error.value)


def test_names_that_are_no_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run over them ends as any other, and whatever is said of such a file can be printed."""
    root = tmp_path / "images"
    scripts.make_images(root / "train" / "cat", 20, 0)
    scripts.make_images(root / "test" / "cat", 4, 1)
    for folder in (root / "train" / "cat", root / "test" / "cat"):
        for path in list(folder.iterdir()):
            path.rename(folder / os.fsdecode(b"caf\xe9" + path.name.encode()))
    (root / "train" / "cat" / os.fsdecode(b"\xe9.png")).write_bytes(b"no image")
    truncate(root / "train" / "cat" / os.fsdecode(b"caf\xe93.png"))
    words = ["--batch-size=8", "--epochs=1", "--image-size=16", "--arch=small", "--no-probe", "--workers=1"]
    output = scripts.Script(tmp_path).run(*words, f"--data-dir={root}", f"--run-dir={tmp_path / 'run'}")
    assert r"1 of 25 images cannot be read and are left out, the first is" in output
    assert r"train/cat/\xe9.png" in output
    assert r"caf\xe93.png cannot be decoded" in output


@pytest.mark.slow
def test_folders_whose_names_are_no_utf_8(tmp_path: Path) -> None:
    """Training, the linear probe and the figure, where standard output takes UTF-8 alone."""
    root, directory = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"r\xe9sultat")
    for seed, split in enumerate(("train", "valid")):
        for name in (b"th\xe9", b"tea"):
            scripts.make_images(root / split / os.fsdecode(name), 12, seed)

    def of(script: str, *words: str) -> str:
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(scripts.EXAMPLES / script), *words]
        done = subprocess.run(command, capture_output=True, timeout=100, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    words = [f"--data-dir={root}", "--arch=small", "--image-size=16", "--epochs=1", "--batch-size=8", "--workers=0"]
    assert "r\\udce9sultat" in of("train_simo.py", *words, f"--run-dir={directory}")
    config = json.loads((directory / "config.json").read_text())
    assert config["arguments"]["data_dir"] == str(root)
    assert "is finished" in of("train_simo.py", *words, f"--run-dir={directory}")
    assert "top-1" in of("after/linear_eval.py", str(directory), "--epochs=1", "--batch-size=8", "--workers=0")
    assert json.loads((directory / "linear_eval.json").read_text())["checkpoint"] == str(directory / "checkpoint.pt")
    assert "figure:" in of("after/plot_runs.py", str(directory))


@pytest.mark.parametrize("name", [b"plain", b"two words", b"it's", b"caf\xe9's \\n.png", "caf\xe9".encode()])
def test_a_command_can_be_pasted(name: bytes) -> None:
    pasted = quoted(os.fsdecode(name))
    assert pasted.isprintable()
    assert subprocess.run(["bash", "-c", f"printf %s {pasted}"], capture_output=True, check=True).stdout == name


def test_a_class_without_an_image_is_named_with_its_split(tmp_path: Path) -> None:
    scripts.make_images(tmp_path / "train" / "cat", 2, 0)
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(data.DataError, match=r"class folder .*/train/dog has none\. Put images into it, or remove it"):
        open_images(tmp_path)


def test_an_image_stands_upright(tmp_path: Path) -> None:
    """As its EXIF orientation says: 6 is a quarter turn."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(pictures.read_image(tmp_path / "turned.png"))
    assert upright.shape == (16, 8, 3)
    assert upright[:8].min() == 255
    assert upright[8:].max() == 0


@pytest.mark.parametrize("size", [(30000, 1), (1, 30001)])
def test_a_very_long_image_fills_no_memory(size: tuple[int, int]) -> None:
    """Its short side as long as the crop, it would have 6 GB."""
    assert data.centre_crop(224)(Image.new("RGB", size)).shape == (3, 224, 224)
    view = per_image(RECIPES["mocov2"], 224)(Image.new("RGB", size))
    assert view.shape == (3, 224, 224)


@pytest.mark.parametrize("size", [(20, 301), (300, 20), (160, 20), (40, 50)])
def test_the_middle_of_a_long_image_is_that_of_the_whole(size: tuple[int, int]) -> None:
    """Bit for bit where it is no more than eight times as long as it is wide."""
    slope = np.linspace(0, 255, max(size)).astype(np.uint8)
    pixels = np.broadcast_to(slope if size[0] > size[1] else slope[:, None], size[::-1])
    image = Image.fromarray(pixels).convert("RGB")
    whole = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32), *to_normalised_tensor()])(image)
    found = data.centre_crop(32)(image)
    torch.testing.assert_close(found, whole, rtol=0, atol=0 if max(size) <= 8 * min(size) else 2 / 255 / 0.2)


def test_the_first_image_decides_the_size_down_to_32(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for i in range(20):
        Image.new("RGB", (5, 9)).save(tmp_path / "cat" / f"{i}.png")
    assert open_images(tmp_path).image_size == 32


def test_each_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For augmentation on the device: to see whether it is an image, for the views, and for the evaluation."""
    folder = tmp_path / "images"
    for split, label, name in itertools.product(("train", "test"), "ab", range(12)):
        path = folder / split / label / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), name, np.uint8)).save(path)
    broken = folder / "train" / "a" / "3.png"
    broken.write_bytes(b"no image")
    opened: list[Path] = []
    real = pictures.read_image

    def read_image(path: Path) -> Image.Image:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(decoding, "read_image", read_image)
    monkeypatch.setattr(pictures, "read_image", read_image)
    monkeypatch.setattr(pictures, "has_header", lambda path: pytest.fail("a pass of its own"))
    found = data.open_data("imagefolder", folder, seed=0, device=torch.device("cpu"), augment="device")
    assert "1 of 48 images cannot be read" in found.note
    next(found.batches(0, data.Share(8)))
    assert sum(len(images) for split in ("train", "test") for images, _ in found.labelled(split, 0)) == 47
    assert sorted(opened) == sorted(folder.rglob("*.png"))


def test_processes_decode_the_same_as_this_one(tmp_path: Path) -> None:
    """More files than one process takes at once, of which one is truncated and one is no image."""
    samples = []
    for number in range(2 * decoding.AT_ONCE + 3):
        samples.append((tmp_path / f"{number}.png", number % 3))
        Image.fromarray(np.full((4, 5, 3), number % 256, np.uint8)).save(samples[-1][0])
    samples[7][0].write_bytes(b"no image")
    samples[300][0].write_bytes(samples[300][0].read_bytes()[:-30])
    here, there = (decoding.decoded_files(samples, workers) for workers in (0, 2))
    assert np.array_equal(here.pixels, there.pixels)
    assert here.labels == there.labels == [label for _, label in samples]
    assert here.no_images() == there.no_images() == {samples[7][0]}
    for found in (here, there):
        assert set(found.damages) == {7, 300}
        rest = found.without(found.no_images())
        assert set(rest.damages) == {299}
        assert rest.name(299) == str(samples[300][0])
        assert pictures.show(rest, 298).sample == 298
        assert np.asarray(pictures.show(rest, 299).image).tolist() == np.full((4, 5, 3), 301 % 256).tolist()
