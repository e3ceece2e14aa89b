"""Folders of images: which is for training and which for testing, in names that need not be UTF-8."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .scripts import EXAMPLES, make_images

from pretrain import data, folder, run  # isort: skip


def make_split(root: Path, split: str, *classes: str, count: int = 3) -> None:
    for seed, name in enumerate(classes):
        make_images(root / split / name, count, seed)


def folders_of_test(root: Path) -> set[str]:
    """The folders that the test images lie in, below ``root``."""
    return {path.relative_to(root).parts[0] for path, _ in folder.find_images(root).test}


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN"])
@pytest.mark.parametrize("test", ["test", "val", "valid", "validation", "eval", "Valid", "VAL", "Test"])
def test_a_split_folder_by_any_of_its_names(train: str, test: str, tmp_path: Path) -> None:
    make_split(tmp_path, train, "cat", "dog", count=11)
    make_split(tmp_path, test, "cat", "dog")
    found = folder.find_images(tmp_path)
    assert (len(found.train), len(found.test), found.classes, found.note) == (22, 6, ["cat", "dog"], "")
    assert folders_of_test(tmp_path) == {test}
    for dataset in ("imagefolder", "cifar10"):
        opened = data.open_data(dataset, tmp_path, seed=0, device=torch.device("cpu"))
        assert (opened.train_size, opened.test_size) == (22, 6)


def test_of_two_test_folders_one_is_used_and_both_are_told(tmp_path: Path) -> None:
    make_split(tmp_path, "train", "cat", "dog")
    make_split(tmp_path, "val", "cat", "dog")
    make_images(tmp_path / "test", 3, 0)  # ImageNet's has no labels, and so no folders
    assert folders_of_test(tmp_path) == {"val"}
    assert folder.find_images(tmp_path).note == "val has the test images, test is not used"
    make_split(tmp_path / "test", "", "cat", "dog")
    assert folders_of_test(tmp_path) == {"test"}
    assert folder.find_images(tmp_path).note == "test has the test images, val is not used"


def test_a_held_out_tenth_is_told(tmp_path: Path) -> None:
    make_split(tmp_path / "classes", "", "cat", "dog", count=10)
    make_split(tmp_path / "split", "train", "cat", "dog", count=10)
    (tmp_path / "split" / "devkit").mkdir()
    (tmp_path / "split" / "train" / ".ipynb_checkpoints").mkdir()  # and a hidden folder is no class
    for name, lacking in (("classes", "train"), ("split", "test")):
        found = folder.find_images(tmp_path / name)
        assert (len(found.train), len(found.test), found.classes) == (18, 2, ["cat", "dog"])
        assert found.note == (
            f"every tenth image of each class is held out for the evaluation, as there is no {lacking} folder"
        )


def error_of(root: Path) -> str:
    with pytest.raises(data.DataError) as error:
        folder.find_images(root)
    return str(error.value)


EXPECTED = re.escape("Expected DIR/train/<class>/* and DIR/test/<class>/* (or val, valid, validation, eval, all in")


def test_layouts_that_are_not_understood(tmp_path: Path) -> None:
    """What was found, and what is expected."""
    make_split(tmp_path / "a", "training", "cat", "dog")
    make_split(tmp_path / "a", "testing", "cat", "dog")
    assert re.search(f"a has no train folder; found testing, training. {EXPECTED}", error_of(tmp_path / "a"))
    make_split(tmp_path / "b", "Valid", "cat", "dog")
    assert re.search(f"b has no train folder; found Valid. {EXPECTED}", error_of(tmp_path / "b"))
    make_split(tmp_path / "c", "train", "cat", "dog")
    make_split(tmp_path / "c", "held-out", "cat", "dog")
    assert re.search(f"c: found held-out beside train, with the same classes. {EXPECTED}", error_of(tmp_path / "c"))
    make_split(tmp_path / "d", "train", "cat", "dog")
    make_images(tmp_path / "d" / "val", 3, 0)
    assert re.search(f"d: val beside train has no class folders. {EXPECTED}", error_of(tmp_path / "d"))
    make_images(tmp_path / "e", 3, 0)
    assert re.search(f"e has no folders in it, and 3 files. {EXPECTED}", error_of(tmp_path / "e"))
    make_split(tmp_path / "f" / "imagenet", "Train", "cat", "dog")
    assert error_of(tmp_path / "f").endswith(
        f"f has no train folder, but {tmp_path}/f/imagenet has. Give --data-dir {tmp_path}/f/imagenet."
    )
    make_split(tmp_path / "g", "train", "cat", "dog")
    make_split(tmp_path / "g", "Train", "cat", "dog")
    if len(list((tmp_path / "g").iterdir())) == 2:  # not where upper and lower case are one
        assert error_of(tmp_path / "g").endswith("g has both Train and train. Leave one of them.")
    make_images(tmp_path / "h" / "train", 3, 0)
    assert re.search(f"h/train has no class folders. {EXPECTED}", error_of(tmp_path / "h"))


@pytest.mark.parametrize("split", ["train", "Val"])
def test_a_class_without_an_image_is_named(split: str, tmp_path: Path) -> None:
    for name in ("train", "Val"):
        make_split(tmp_path, name, "cat", *["dog"] * (name != split))
    (tmp_path / split / "dog").mkdir()
    (tmp_path / split / "dog" / "notes.txt").touch()
    assert re.search(
        rf"no image for {split} of the class dog: {tmp_path}/{split}/dog has none of \.jpg \.jpeg \.png .*\. "
        "Put images there, or delete the folder in each split",
        error_of(tmp_path),
    )


# ------------------------------------------------------------------------------------------------ names of any bytes


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Training, kNN, the linear probe and their notes and files, in folders and on images with such names."""
    root = tmp_path / os.fsdecode(b"caf\xe9")
    make_split(root, "train", os.fsdecode(b"th\xe9"), "tea", count=12)
    make_split(root, "valid", os.fsdecode(b"th\xe9"), "tea", count=3)
    os.rename(root / "train/tea/0.png", root / "train/tea" / os.fsdecode(b"caf\xe9.png"))
    truncated = root / "train/tea" / os.fsdecode(b"br\xfbl\xe9.png")
    os.rename(root / "train/tea/1.png", truncated)
    truncated.write_bytes(truncated.read_bytes()[:2000])
    (root / "train/tea" / os.fsdecode(b"\xe9t\xe9.png")).write_bytes(b"no image")
    directory = tmp_path / os.fsdecode(b"r\xe9sultat")
    words = [f"--data-dir={root}", "--arch=small", "--image-size=16", "--epochs=1", "--batch-size=8", "--workers=1"]

    def of(script: str, *words: str) -> str:
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(EXAMPLES / script), *words]
        done = subprocess.run(command, capture_output=True, timeout=100, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    output = of("train_simo.py", *words, f"--run-dir={directory}")
    assert (
        f"images cannot be read and are left out, the first is {tmp_path}/caf\\xe9/train/tea/\\xe9t\\xe9.png" in output
    )
    assert output.count(f"note     {tmp_path}/caf\\xe9/train/tea/br\\xfbl\\xe9.png cannot be decoded") == 1
    config = json.loads((directory / "config.json").read_text())
    assert config["arguments"]["data_dir"] == str(root)
    shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {config['command']}"], capture_output=True, check=True)
    assert shell.stdout.splitlines()[2] == os.fsencode(f"--data-dir={root}")
    assert "is finished" in of("train_simo.py", *words, f"--run-dir={directory}")
    assert "top-1" in of("linear_eval.py", str(directory), "--epochs=1", "--batch-size=8", "--workers=0")
    result = json.loads((directory / "linear_eval.json").read_text())
    assert result["checkpoint"] == str(directory / "checkpoint.pt")
    assert (directory / "metrics.csv").read_text().startswith("epoch,loss")
    assert "figure:" in of("plot_runs.py", str(directory), f"--out={directory / 'runs.png'}")


@pytest.mark.parametrize("name", [b"plain", b"two words", b"it's", b"caf\xe9's \\n.png", "caf\xe9".encode()])
def test_a_command_can_be_pasted(name: bytes) -> None:
    word = os.fsdecode(name)
    shell = subprocess.run(["bash", "-c", f"printf %s {run.quoted(word)}"], capture_output=True, check=True)
    assert shell.stdout == name
    assert run.quoted(word) == shlex.quote(word) or b"\xe9" in name
