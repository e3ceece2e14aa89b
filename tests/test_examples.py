"""The example scripts, run short: what they write, that they resume bit for bit, what they say to bad input."""

import csv
import errno
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .scripts import EXAMPLES, Script, assert_same_run, make_images, picture_width, rows, wait_for

import train_simo  # isort: skip
from pretrain import arguments, augment, data, encoders, evaluate, pictures, schedule  # isort: skip
from pretrain.run import Run  # isort: skip

SHORT = ["--epochs=3", "--limit=128", "--batch-size=64", "--knn-every=2"]


@pytest.fixture
def simo(tmp_path: Path) -> Script:
    return Script(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    Script(folder).run(*SHORT, f"--run-dir={folder / 'run'}")
    return folder / "run"


def test_a_finished_run(whole: Path, simo: Script) -> None:
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoint.previous.pt",
        "checkpoint.pt",
        "config.json",
        "curves.png",
        "lock",
        "metrics.csv",
        "model_card.md",
    ]
    table = rows(whole)
    assert [row["epoch"] for row in table] == ["0", "1", "2", "3"]
    assert [bool(row["knn"]) for row in table] == [True, False, True, True]
    assert all(math.isfinite(float(row["loss"])) and float(row["feature_std"]) > 0.5 for row in table[1:])
    config = json.loads((whole / "config.json").read_text())
    assert "examples/train_simo.py --epochs=3 --limit=128" in config["command"]
    assert config["arguments"]["num_negatives"] == 16
    assert {"python", "torch", "eqco_loss"} <= config["versions"].keys()
    assert picture_width(whole / "curves.png") > 500

    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    output = simo.run(*SHORT, f"--run-dir={whole}")
    assert "is finished. kNN" in output
    assert "logistic regression" in output
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_run_that_ends_in_its_warm_up_says_so(simo: Script, tmp_path: Path) -> None:
    words = ["--limit=32", "--batch-size=16", "--no-knn", "--no-probe"]
    note = "note     epochs: the learning rate rises for 2 epochs, and this run has 1. It tries the command"
    output = simo.run(*words, "--epochs=1", f"--run-dir={tmp_path / 'one'}")
    assert note in output
    assert "steps    2 an epoch, 1 epoch\n" in output
    assert "trained by simo for 1 epoch without labels" in (tmp_path / "one" / "model_card.md").read_text()
    output = simo.run(*words, "--epochs=1", "--warmup-epochs=0.5", f"--run-dir={tmp_path / 'at-once'}")
    assert "learning rate rises" not in output


@pytest.mark.slow
def test_killed_around_every_file(whole: Path, simo: Script, tmp_path: Path) -> None:
    words = [*SHORT, f"--run-dir={tmp_path / 'run'}"]
    simo.run(*words, die=("fsync", 2), code=-signal.SIGKILL)  # the first checkpoint is half written
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    simo.run(*words, die=("replace", 3), code=-signal.SIGKILL)  # it is there, metrics.csv is not
    assert not (tmp_path / "run" / "metrics.csv").exists()
    simo.run(*words, die=("replace", 3), code=-signal.SIGKILL)  # the second has not replaced it
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1"]
    simo.run(*words, die=("replace", 4), code=-signal.SIGKILL)  # the first has made room for it
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    output = simo.run(*words, die=("replace", 5), code=-signal.SIGKILL)  # all of the second epoch but its curves
    assert "checkpoint.pt is missing. Going on from checkpoint.previous.pt." in output
    simo.run(*words, die=("replace", 7), code=-signal.SIGKILL)  # all but the result
    assert "resumed after epoch 3" in simo.run(*words)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow  # test_pipelines.py kills a run of SiMo at random moments, too
def test_killed_at_any_moment(whole: Path, simo: Script, tmp_path: Path) -> None:
    words, moments, kills = [*SHORT, f"--run-dir={tmp_path / 'run'}"], random.Random(0), 0
    for latest in (2.5, 1.5, 0.9, 0.5):  # a fast machine is done before it has been killed twice: again, and earlier
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        kills = 0
        for _ in range(12):
            process = simo.start(*words)
            process.join(moments.uniform(0.2, latest))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        if kills > 1:
            break
    assert kills > 1
    simo.run(*words)
    assert_same_run(whole, tmp_path / "run")


def test_ctrl_c_says_how_to_continue(whole: Path, simo: Script, tmp_path: Path) -> None:
    words = [*SHORT, f"--run-dir={tmp_path / 'run'}"]
    process = simo.start(*words)
    wait_for(lambda: (tmp_path / "run" / "checkpoint.pt").exists())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    output = simo.log.read_text()
    assert process.exitcode == 130, output
    assert "is whole. Continue with\n  python " in output
    assert not list((tmp_path / "run").glob("*.tmp"))
    simo.run(*words)
    assert_same_run(whole, tmp_path / "run")


def test_two_processes_cannot_share_a_directory(simo: Script, tmp_path: Path) -> None:
    words = [*SHORT, "--epochs=1000", f"--run-dir={tmp_path / 'run'}"]  # the first is still training when it is killed
    first = simo.start(*words)
    wait_for(lambda: (tmp_path / "run" / "config.json").exists())
    output = simo.run(*words, code=1)
    first.kill()
    first.join()
    assert "run_dir: another process is training in" in output


def test_other_arguments_are_an_error_that_lists_them(whole: Path, simo: Script) -> None:
    before = (whole / "checkpoint.pt").read_bytes()
    output = simo.run("--epochs=4", "--limit=100", "--batch-size=64", "--no-eqco", f"--run-dir={whole}", code=1)
    assert "was made with other arguments" in output
    listed = [line.split() for line in output.splitlines() if line.startswith("  ")]
    assert ["argument", "saved", "given"] in listed
    assert ["epochs", "3", "4"] in listed
    assert ["eqco", "True", "False"] in listed
    assert ["limit", "128", "100"] in listed
    assert ["knn_every", "2", "20"] in listed
    assert not any(line[0] in {"temperature", "seed", "batch_size", "run_dir", "workers"} for line in listed)
    assert "another --run-dir" in output
    assert (whole / "checkpoint.pt").read_bytes() == before


def flipped(path: Path) -> bytes:
    """The checkpoint with one byte in the midst of its largest tensor changed."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    return bytes(content)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "other"])
def test_a_damaged_checkpoint_is_an_error(simo: Script, whole: Path, tmp_path: Path, damage: str) -> None:
    good = (whole / "checkpoint.pt").read_bytes()
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    if damage == "other":
        torch.save({"epoch": 3}, path)
    else:
        path.write_bytes(
            {
                "cut": good[: len(good) // 2],
                "empty": b"",
                "text": b"not a checkpoint",
                "flipped": flipped(whole / "checkpoint.pt"),
            }[damage]
        )
    output = simo.run(*SHORT, f"--run-dir={path.parent}", code=1)
    assert f"{path} cannot be read" in output
    assert "Delete it to start over" in output
    assert "Traceback" not in output


def test_mixed_precision(simo: Script, tmp_path: Path) -> None:
    output = simo.run(*SHORT, "--epochs=1", "--precision=bf16-mixed", f"--run-dir={tmp_path / 'run'}")
    assert "cpu (1 threads), bf16-mixed; loss by torch" in output
    assert math.isfinite(float(rows(tmp_path / "run")[1]["loss"]))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = Run(tmp_path, ("epoch",), {"seed": 0}, {})
    run.rows = [{"epoch": 0}, {"epoch": 1}]
    run.save(1, {"weight": torch.ones(3)})

    def full(descriptor: int) -> NoReturn:
        raise error

    monkeypatch.setattr(os, "fsync", full)
    run.rows.append({"epoch": 2})
    with pytest.raises(SystemExit, match=r"checkpoint\.pt.*The checkpoint of epoch 1 is whole\. Make room"):
        run.save(2, {"weight": torch.zeros(3)})
    monkeypatch.undo()
    del run
    again = Run(tmp_path, ("epoch",), {"seed": 0}, {})
    state = again.resume()
    assert state is not None
    assert again.epoch == 1
    assert torch.equal(state["weight"], torch.ones(3))
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_wrong_with_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(SystemExit, match=r"run_dir: expected \S+checkpoint\.pt to be a file, got a directory\. Move"):
        Run(tmp_path, (), {}, {})

    def without_locks(*given: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", without_locks)
    with pytest.raises(SystemExit, match=r"run_dir: \S+ cannot be locked \(No locks available\)\. Give a --run-dir"):
        Run(tmp_path / "other", (), {}, {})


def test_one_image_of_each_class_is_told(tmp_path: Path) -> None:
    for seed, name in enumerate(("cat", "dog")):
        make_images(tmp_path / name, 1, seed)
    with pytest.raises(data.DataError, match=r"expected two images or more of a class in \S+, got one of each, which"):
        data.open_data("imagefolder", tmp_path, seed=0, device=torch.device("cpu"))


def test_ctrl_c_while_a_checkpoint_is_written_is_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch.save makes a RuntimeError of it, which was once told as a full disk."""
    run = Run(tmp_path, ("epoch",), {"seed": 0}, {})
    run.rows = [{"epoch": 0}, {"epoch": 1}]
    run.save(1, {"weight": torch.ones(3)})
    before = (tmp_path / "checkpoint.pt").read_bytes()

    class Interrupted(io.BytesIO):
        def write(self, content: Any) -> int:
            if self.tell() > 500:
                raise KeyboardInterrupt
            return super().write(content)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, Interrupted()))
    with pytest.raises(SystemExit) as stop, run.interruptible():
        run.save(2, {"weight": torch.zeros(3)})
    assert stop.value.code == 130
    assert "stopped. The checkpoint of epoch 1 is whole. Continue with" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------- a folder of images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for seed, (split, name) in enumerate(itertools.product(("train", "test"), ("cat", "dog"))):
        make_images(root / split / name, 6 if split == "train" else 3, seed)
    (root / "train" / "cat" / "broken.png").write_bytes(b"not an image")
    return root


def test_a_folder_of_images(simo: Script, images: Path, tmp_path: Path) -> None:
    words = [f"--data-dir={images}", "--arch=resnet18", "--image-size=16", "--batch-size=4"]
    output = simo.run(*words, "--workers=0", "--epochs=1", f"--run-dir={tmp_path / 'resnet18'}")
    assert "12 train and 6 test images" in output
    assert "16 px, resnet18" in output
    assert "note     1 of 19 images cannot be read and are left out, the first is" in output
    assert "K = 3, alpha = 256" in output


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(simo: Script, images: Path, tmp_path: Path) -> None:
    words = [f"--data-dir={images}", "--arch=small", "--image-size=16", "--epochs=2", "--batch-size=4"]
    simo.run(*words, "--workers=0", f"--run-dir={tmp_path / 'whole'}")
    simo.run(*words, "--workers=1", f"--run-dir={tmp_path / 'run'}", die=("replace", 4), code=-signal.SIGKILL)
    simo.run(*words, "--workers=2", f"--run-dir={tmp_path / 'run'}")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def parse(words: list[str]) -> train_simo.Args:
    return arguments.parse(words, train_simo.DEFAULTS, None)


def folder_error(root: Path) -> str:
    with pytest.raises(SystemExit) as error:
        train_simo.main(parse([f"--data-dir={root}", "--workers=0", "--device=cpu"]))
    return str(error.value)


def test_bad_folders(images: Path, tmp_path: Path) -> None:
    assert (
        folder_error(tmp_path / "nowhere")
        == f"error: data_dir: {tmp_path}/nowhere is not there. Give a folder of images."
    )
    (tmp_path / "file").touch()
    assert "file is a file. Give a folder of images." in folder_error(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "expected images as train/<class>/* and test/<class>/*, or <class>/*" in folder_error(tmp_path / "empty")
    make_images(tmp_path / "half" / "cat", 3, 0)
    (tmp_path / "half" / "dog").mkdir()
    assert "dog" in folder_error(tmp_path / "half")
    make_images(tmp_path / "differ" / "train" / "cat", 3, 0)
    make_images(tmp_path / "differ" / "test" / "dog", 3, 0)
    assert "train and test differ in their classes (cat, dog)" in folder_error(tmp_path / "differ")
    (tmp_path / "unreadable" / "cat").mkdir(parents=True)
    for name in ("1.png", "2.png"):
        (tmp_path / "unreadable" / "cat" / name).write_bytes(b"x")
    assert "no readable train image (2 of 2 images cannot be read and are left out, the first is" in folder_error(
        tmp_path / "unreadable"
    )
    assert "batch_size: expected at most the number of training images, 12, got 256" in folder_error(images)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    make_images(tmp_path / "cat", 1, 0)
    path = tmp_path / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(pictures.DamagedImageError, match=r"0\.png cannot be decoded"):
        pictures.read_image(path)


def open_folder(root: Path, seed: int = 0, image_size: int | None = None, limit: int | None = None) -> data.ImageData:
    cpu = torch.device("cpu")
    folder = data.open_data("imagefolder", root, seed=seed, device=cpu, image_size=image_size, limit=limit)
    assert isinstance(folder, data.ImageData)
    return folder


def files(folder: data.ImageData, split: str) -> list[pictures.Sample]:
    found = folder.splits[split]
    assert isinstance(found, pictures.Files)
    return found.samples


def test_classes_without_splits_hold_out_every_tenth(tmp_path: Path) -> None:
    make_images(tmp_path / "cat", 11, 0)
    make_images(tmp_path / "dog", 3, 1)
    folder = open_folder(tmp_path)
    assert (folder.train_size, folder.test_size, folder.image_size) == (12, 2, 36)
    test = files(folder, "test")
    assert {path.name for path, label in test if label == 0} == {"8.png"}  # 0, 1, 10, 2, ..., 9
    assert {path.name for path, label in test if label == 1} == {"2.png"}
    limited = open_folder(tmp_path, limit=4)
    assert sorted(label for _, label in files(limited, "train")) == [0, 0, 1, 1]
    assert folder.fingerprint != limited.fingerprint


# ----------------------------------------------------------------------------------- views, order, schedule, evaluation


def test_views_of_an_image_are_a_pure_function(images: Path) -> None:
    folder, transform = open_folder(images, seed=3, image_size=16), augment.per_image(augment.RECIPES["mocov2"], 16)
    trained = pictures.Files(files(folder, "train"))
    views = data.TwoViews(trained, 3, transform)
    pair = views[(5, 2)]
    first = pair.first, pair.second
    assert pair.asked == pair.shown == 2
    torch.manual_seed(1)
    views[(0, 0)]
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, views[(5, 2)][:2], strict=True))
    assert torch.equal(state, torch.get_rng_state())  # and leaves the default generator alone
    others = [first[1], views[(6, 2)][0], views[(5, 3)][0], data.TwoViews(trained, 4, transform)[(5, 2)][0]]
    assert not any(torch.equal(first[0], other) for other in others)
    order = data.sample_order(3, 7, 12).tolist()
    batches = list(folder.batches(7, data.Share(5)))
    assert len(batches) == 2
    expected = torch.stack([views[(7, sample)][0] for sample in order[:5]])
    assert torch.equal(batches[0].views[0], expected)
    assert batches[0].samples.tolist() == order[:5]


def test_views_and_order_of_digits_are_pure_functions() -> None:
    one, two = (data.PlacedDigits(seed=1, device=torch.device("cpu"), limit=64) for _ in range(2))
    torch.manual_seed(5)
    later = list(one.batches(3, data.Share(30)))
    list(two.batches(0, data.Share(30)))
    for a, b in zip(later, two.batches(3, data.Share(30)), strict=True):
        assert torch.equal(a.views[0], b.views[0])
        assert torch.equal(a.views[1], b.views[1])
        assert not torch.equal(a.views[0], a.views[1])
    order = data.sample_order(1, 3, 64)
    assert sorted(order.tolist()) == list(range(64))
    assert torch.equal(later[0].views[1], one.view(3, 1)[order[:30]])
    others = {tuple(data.sample_order(seed, epoch, 64).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(others) == 9


class Pixels(encoders.Encoder):
    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), 1024, nn.Identity())

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_the_placed_digits_are_as_hard_as_documented() -> None:
    digits = data.PlacedDigits(seed=0, device=torch.device("cpu"))
    assert (digits.train_size, digits.test_size) == (1500, 297)
    knn = evaluate.knn_accuracy(Pixels(), digits, k=20)
    assert 52 <= knn <= 58


def test_knn_is_the_weighted_vote() -> None:
    digits = data.PlacedDigits(seed=0, device=torch.device("cpu"), limit=20)
    encoder, right = Pixels(), 0
    for placement in range(5):
        (bank, labels), (test, truth) = (
            evaluate.extract(encoder, digits.labelled(split, placement)) for split in ("train", "test")
        )
        for feature, label in zip(test, truth, strict=True):
            similarity = F.cosine_similarity(bank, feature[None])
            votes = torch.zeros(10)
            for i in similarity.argsort(descending=True)[:7]:
                votes[labels[i]] += (similarity[i] / 0.1).exp()
            right += int(votes.argmax() == label)
    assert evaluate.knn_accuracy(encoder, digits, k=7) == pytest.approx(100 * right / 100)


class Living(TorchDispatchMode):
    """The most bytes that tensors made under it hold at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak, self.known = 0, 0, WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def freed(self, size: int) -> None:
        self.now -= size


class ManyImages(data.PlacedDigits):
    """8,000 noisy ones of ten classes, a few pixels each, that a wide encoder makes a large bank of."""

    def __init__(self, placements: int) -> None:
        super().__init__(seed=0, device=torch.device("cpu"), limit=2)
        generator = torch.Generator().manual_seed(0)
        self.placements, self.train_size, self.test_size = placements, 8000, 400
        means = torch.randn(10, 8, generator=generator)
        for split, size in (("train", 8000), ("test", 400)):
            self.labels[split] = torch.randint(10, (size,), generator=generator)
            self.images[split] = means[self.labels[split]] + 2 * torch.randn(size, 8, generator=generator)

    def labelled(self, split: str, placement: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images[split].split(256), self.labels[split].split(256), strict=True)


class Wide(encoders.Encoder):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 2048), 2048, nn.Identity())

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(images)
        return features


@pytest.mark.parametrize("placements", [1, 2])
def test_knn_holds_one_bank(placements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that it needs besides, 1.2 of them, and the answer is that of one product of everything.

    What a block takes does not grow with the bank, so a small bank needs small blocks.
    """
    monkeypatch.setattr(evaluate, "AT_ONCE", 512)
    torch.manual_seed(0)
    many, encoder = ManyImages(placements), Wide()
    with Living() as living:
        found = evaluate.knn_accuracy(encoder, many, k=20)
    bank = 8000 * 2048 * 4
    assert 1 <= living.peak / bank <= 1.2
    train, test = (F.normalize(encoder.features(many.images[split]).detach()) for split in ("train", "test"))
    cosine, nearest = (test @ train.T).topk(20)
    votes = torch.zeros(400, 10).scatter_add_(1, many.labels["train"][nearest], (cosine / 0.1).exp())
    assert found == pytest.approx(100 * (votes.argmax(1) == many.labels["test"]).float().mean().item())
    assert 15 < found < 95


def test_a_run_without_knn(simo: Script, tmp_path: Path) -> None:
    output = simo.run("--no-knn", "--no-probe", "--epochs=1", "--limit=300", f"--run-dir={tmp_path / 'run'}")
    assert "kNN" not in output
    assert "Nothing was measured. Results are in" in output
    assert [row["knn"] for row in rows(tmp_path / "run")] == ["", ""]


def test_other_epochs_are_another_run(simo: Script, tmp_path: Path) -> None:
    words = ["--no-knn", "--no-probe", "--limit=300", f"--run-dir={tmp_path / 'run'}"]
    simo.run(*words, "--epochs=1")
    output = simo.run(*words, "--epochs=2", code=1)
    assert "--epochs decides the learning rate of every step, so that other epochs are another run." in output


def test_a_directory_is_named_by_the_k_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the run makes its directory
    train_simo.main(parse(["--no-knn", "--no-probe", "--limit=64", "--epochs=1", "--batch-size=8", "--device=cpu"]))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["simo-digits-k7-alpha256-seed0"]


@pytest.mark.parametrize("words", [pytest.param([], marks=pytest.mark.slow), ["--no-knn"]], ids=" ".join)
def test_a_run_of_before_there_was_a_choice_of_knn(simo: Script, tmp_path: Path, words: list[str]) -> None:
    """Its checkpoint does not know the argument, and it goes on all the same, with a kNN or without."""
    short = [*SHORT, "--no-probe", f"--run-dir={tmp_path / 'run'}"]
    simo.run(*short, die=("replace", 6), code=-signal.SIGKILL)
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    assert not {"knn", "knn_device"} & saved["fixed"].keys()
    output = simo.run(*short, *words)
    assert "resumed after epoch" in output
    untrained = f"kNN {saved['rows'][0]['knn']:.1f} % untrained"
    assert (f"\n{untrained}. Results" if words else f"\n{untrained}, ") in output


def test_a_run_without_knn_can_be_given_one(simo: Script, tmp_path: Path) -> None:
    short = [*SHORT, "--no-probe", f"--run-dir={tmp_path / 'run'}"]
    simo.run(*short, "--no-knn", die=("replace", 6), code=-signal.SIGKILL)
    assert re.search(r"\nkNN \d+\.\d % trained\. Results", simo.run(*short))


def test_learning_rates() -> None:
    simo = [schedule.learning_rate("simo", step, 10, 20, 2, 0.001) for step in range(201)]
    assert simo[0] == pytest.approx(1 / 1000)
    assert max(simo) == simo[20] == pytest.approx((1 + math.cos(math.pi / 10)) / 2)
    assert simo[100] == pytest.approx(0.5)
    assert simo[200] == pytest.approx(0, abs=1e-12)
    assert schedule.learning_rate("simo", 0, 10, 20, 0, 0.001) == pytest.approx(1)
    simco = [schedule.learning_rate("cosine", step, 10, 200, 10, 0.1) for step in range(2001)]
    assert simco[0] == pytest.approx(0.1)  # 0.003 of 0.03
    assert simco[100] == max(simco) == 1
    assert simco[1050] == pytest.approx(0.5)
    assert simco[2000] == pytest.approx(0, abs=1e-12)
    mocov2 = [schedule.learning_rate("cosine-by-epoch", step, 10, 200, 10, 0.1) for step in range(2000)]
    assert set(mocov2[:10]) == {1}
    assert set(mocov2[1000:1010]) == {mocov2[1000]}
    assert mocov2[1000] == pytest.approx(0.5)
    mocov1 = [schedule.learning_rate("drops", step, 10, 200, 10, 0.1) for step in (0, 1199, 1200, 1599, 1600, 1999)]
    assert mocov1 == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_resnet_stems_and_the_head() -> None:
    how: dict[str, Any] = {"channels": 3, "head": train_simo.HEAD, "dim": 128, "zero_init_residual": True}
    small = encoders.make_encoder("resnet18", image_size=32, **how)
    assert small.features(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert small.backbone.get_parameter("conv1.weight").shape == (64, 3, 3, 3)
    large = encoders.make_encoder("resnet18", image_size=64, **how)
    assert large.backbone.get_parameter("conv1.weight").shape == (64, 3, 7, 7)
    assert [name for name, _ in small.head.named_parameters() if name.endswith("bias")] == ["1.bias", "4.bias"]
    assert small.head.get_parameter("0.weight").std().item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-negatives=0"], "num_negatives"),
        (["--alpha=0"], "alpha"),
        (["--temperature=-1"], "temperature"),
        (["--batch-size=1"], "batch_size: expected 2 or more, got 1"),
        (["--batch-size=2000"], "batch_size: expected at most the number of training images, 1500, got 2000"),
        (["--accumulate=0"], "accumulate: expected 1 or more, got 0"),
        (["--epochs=0"], "epochs: expected 1 or more, got 0"),
        (["--limit=0"], "limit: expected 2 or more, got 0"),
        (["--key-momentum=1.5"], "key_momentum"),
        (["--base-lr=nan"], "base_lr"),
        (["--weight-decay=-1"], "weight_decay"),
        (["--seed=-1"], "seed: expected 0 or more, got -1"),
        (["--image-size=64"], "image_size: the digits are 32 x 32"),
        (["--device=cuda"], "device"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_numbers(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if words == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        train_simo.main(parse(words if words[0].startswith("--device") else [*words, "--device=cpu"]))
    assert not list(tmp_path.iterdir())  # nothing was written


def test_defaults_follow_the_data() -> None:
    assert parse([]) == train_simo.Args()
    folder = parse(["--data-dir", "somewhere", "--alpha", "65536"])
    assert (folder.dataset, folder.arch, folder.optimizer, folder.alpha) == ("imagefolder", "resnet50", "sgd", 65536)
    assert parse(["--dataset=cifar10", "--data-dir", "somewhere"]).arch == "resnet18"


@pytest.mark.slow
def test_compare_negatives(tmp_path: Path) -> None:
    """As a person calls it, each run a process of its own."""
    command = [
        sys.executable,
        str(EXAMPLES / "papers" / "compare_negatives.py"),
        "--seeds=1",
        "--epochs=1",
        "--limit=130",
    ]
    done = subprocess.run([*command, f"--run-dir={tmp_path}"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 runs of 1 epochs, ")  # also without a terminal
    assert "1 of 2: " in done.stdout
    assert "K = 4, EqCo, alpha = 256" in done.stdout
    assert "K = 4, InfoNCE" in done.stdout
    with (tmp_path / "compare.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["loss"], row["epoch"]) for row in table] == [
        ("EqCo, alpha = 256", "0"),
        ("EqCo, alpha = 256", "1"),
        ("InfoNCE", "0"),
        ("InfoNCE", "1"),
    ]
    assert picture_width(tmp_path / "compare.png") > 500
    config = json.loads((tmp_path / "infonce-seed0" / "config.json").read_text())
    assert config["arguments"]["eqco"] is False
