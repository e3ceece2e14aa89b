"""The linear probe: its protocols, what it trains on, that it resumes, and what it says to bad input."""

import csv
import json
import math
import multiprocessing
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from .ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "after"))

import linear_eval
from linear_eval import PROTOCOLS, Args
from pretrain.checkpoint import restore_encoder
from pretrain.data import PlacedDigits, sample_order
from pretrain.encoders import encoder_of

DIGITS = {"name": "digits", "data_dir": None, "image_size": 32, "channels": 1}
SHORT: dict[str, Any] = {"epochs": 3, "limit": 128, "batch_size": 64, "base_lr": 1.0, "workers": 0, "device": "cpu"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory: an untrained network whose batch norms have seen digits."""
    return make_run(tmp_path / "run", {"channels": 1}, DIGITS)


def make_run(folder: Path, spec: dict[str, Any], data: dict[str, Any]) -> Path:
    spec = {"arch": "small", "image_size": data["image_size"], "head": "simo", "dim": 8, **spec}
    encoder = encoder_of(spec)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
    images = torch.randn(64, 3, data["image_size"], data["image_size"])
    with torch.no_grad():
        encoder(images if spec["channels"] == 3 else PlacedDigits(0, torch.device("cpu")).view(0, 0)[:256])
    folder.mkdir(parents=True)
    content = {"encoder_spec": spec, "state": {"encoder": encoder.state_dict()}, "data": data}
    torch.save(content, folder / "checkpoint.pt")
    return folder


def table(folder: Path) -> list[dict[str, float]]:
    with (folder / "linear_eval.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_the_protocols() -> None:
    moco, simo, simco = (PROTOCOLS[name] for name in ("moco", "simo", "simco"))
    rates = [moco.learning_rate(epoch, 100, 30) for epoch in range(100)]
    assert rates == [30] * 60 + [pytest.approx(3)] * 20 + [pytest.approx(0.3)] * 20
    rates = [simo.learning_rate(epoch, 90, 30) for epoch in range(90)]
    assert rates == [30] * 60 + [pytest.approx(3)] * 20 + [pytest.approx(0.3)] * 10
    assert moco.learning_rate(5, 10, 30) == 30  # the drops move with the epochs
    assert moco.learning_rate(6, 10, 30) == pytest.approx(3)
    assert (simco.epochs, simco.learning_rate(0, 100, 0.3)) == (100, 0.3)
    assert simco.learning_rate(50, 100, 0.3) == pytest.approx(0.15)
    assert linear_eval.peak_rate(Args(Path(), batch_size=512)) == 60
    assert linear_eval.peak_rate(Args(Path(), "simco", batch_size=128)) == 0.15
    assert linear_eval.peak_rate(Args(Path(), base_lr=2, batch_size=64)) == 0.5


@pytest.mark.parametrize("cache_features", [False, True])
def test_a_probe_of_digits(run: Path, cache_features: bool, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "checkpoint.pt").read_bytes()
    linear_eval.main(Args(run, "simco", cache_features=cache_features, **SHORT))
    output, rows = capsys.readouterr().out, table(run)
    assert ("computed once without augmentation (5 placement(s)): not the papers' protocol" in output) == cache_features
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["top1"] < row["top5"] for row in rows)
    result = json.loads((run / "linear_eval.json").read_text())
    assert (result["top1"], result["top5"]) == (rows[-1]["top1"], rows[-1]["top5"])
    assert result["best_top1"] == max(row["top1"] for row in rows)
    assert f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %" in output
    assert (run / "checkpoint.pt").read_bytes() == before
    assert not list(run.glob("*.tmp"))


def test_the_classifier_is_the_plain_one(run: Path) -> None:
    """One epoch, against torch's own SGD on features of the frozen network in eval mode."""
    linear_eval.main(Args(run, **{**SHORT, "epochs": 1}))
    saved = torch.load(run / "linear_eval.pt", weights_only=True)
    encoder, _ = restore_encoder(run)
    digits = PlacedDigits(0, torch.device("cpu"), 128)
    classifier = linear_eval.make_classifier(128, 10, seed=0)
    assert classifier.weight.detach().std().item() == pytest.approx(0.01, rel=0.1)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.25, momentum=0.9)
    images = digits.view(0, 0)
    for rows in sample_order(0, 0, 128).view(2, 64):
        with torch.no_grad():
            features = encoder.features(images[rows])
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(features), digits.labels["train"][rows]).backward()
        optimizer.step()
    torch.testing.assert_close(saved["classifier"]["weight"], classifier.weight.detach())
    right = total = 0
    with torch.no_grad():
        for placement in range(5):
            for views, labels in digits.labelled("test", placement):
                right += int((classifier(encoder.features(views)).argmax(1) == labels).sum())
                total += len(labels)
    assert table(run)[0]["top1"] == pytest.approx(100 * right / total)


def test_it_resumes_bit_for_bit(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear_eval.main(Args(run, out=tmp_path / "whole", **SHORT))
    stopped, add = Args(run, out=tmp_path / "stopped", **SHORT), linear_eval.Results.add

    def stop_after_two(self: linear_eval.Results, *arguments: Any) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(linear_eval.Results, "add", stop_after_two)
    with pytest.raises(SystemExit) as stop:
        linear_eval.main(stopped)
    assert stop.value.code == 130
    assert len(table(tmp_path / "stopped")) == 2
    monkeypatch.undo()
    linear_eval.main(stopped)
    whole, again = (torch.load(tmp_path / name / "linear_eval.pt", weights_only=True) for name in ("whole", "stopped"))
    assert whole["rows"] == again["rows"]
    assert torch.equal(whole["classifier"]["weight"], again["classifier"]["weight"])
    assert (tmp_path / "whole" / "linear_eval.csv").read_bytes() == (
        tmp_path / "stopped" / "linear_eval.csv"
    ).read_bytes()


def test_a_finished_probe_is_not_trained_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linear_eval.main(Args(run, **SHORT))
    before = (run / "linear_eval.pt").read_bytes()
    capsys.readouterr()
    linear_eval.main(Args(run / "checkpoint.pt", **SHORT))
    assert "is finished. Linear probe: top-1" in capsys.readouterr().out
    assert (run / "linear_eval.pt").read_bytes() == before
    with pytest.raises(SystemExit, match=r"was made with other arguments:\n  epochs: saved 3, given 4\nGive another"):
        linear_eval.main(Args(run, **{**SHORT, "epochs": 4}))
    make_run(run / "other", {"channels": 1}, DIGITS)
    with pytest.raises(SystemExit, match=r"other arguments:\n  weights: saved [0-9a-f]+, given [0-9a-f]+\n"):
        linear_eval.main(Args(run / "other", out=run, **SHORT))
    (run / "linear_eval.pt").write_bytes(before[:1000])
    with pytest.raises(SystemExit, match=r"linear_eval\.pt cannot be read .*Delete it to start over"):
        linear_eval.main(Args(run, **SHORT))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and blue ones."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("test", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 128, (40, 40, 3), generator=generator, dtype=torch.uint8)
                pixels[:, :, channel] += 127
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("how", [{"workers": 0}, {"workers": 1}, {"augment": "device"}, {"cache_features": True}])
def test_a_folder_of_images(tmp_path: Path, images: Path, how: dict[str, Any]) -> None:
    data = {"name": images.name, "data_dir": str(images), "image_size": 32, "channels": 3}
    run = make_run(tmp_path / "run", {"channels": 3}, data)
    options = {**SHORT, "epochs": 6, "limit": None, "batch_size": 8, "base_lr": 10.0, **how}
    linear_eval.main(Args(run, **options))
    rows = table(run)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["top1"] >= 75
    assert rows[-1]["top5"] == 100  # two classes


@pytest.mark.parametrize("how", [{"workers": 1}, {"augment": "device"}, {"cache_features": True}])
def test_truncated_images(
    tmp_path: Path,
    images: Path,
    how: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another image stands in for a training image, with its own label; cached features, and tests, leave it out."""
    shutil.copytree(images, tmp_path / "images")
    truncated = [tmp_path / "images" / name for name in ("train/red/4.png", "test/blue/1.png")]
    for path in truncated:
        path.write_bytes(path.read_bytes()[:2000])
    data = {"name": "images", "data_dir": str(tmp_path / "images"), "image_size": 32, "channels": 3}
    run, seen = make_run(tmp_path / "run", {"channels": 3}, data), list[int]()
    batches = linear_eval.Training.batches

    def noting(self: linear_eval.Training, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for features, labels in batches(self, epoch):
            seen.extend(labels.tolist())
            yield features, labels

    monkeypatch.setattr(linear_eval.Training, "batches", noting)
    linear_eval.main(Args(run, **{**SHORT, "limit": None, "batch_size": 1, **how}))
    output = capsys.readouterr().out
    assert [output.count(f"note     {path} cannot be decoded") for path in truncated] == [1, 1], output
    blue, red = (16, 15) if "cache_features" in how else (17, 15)  # the image after red 4 is blue
    assert (seen.count(0), seen.count(1)) == (3 * blue, 3 * red)
    assert multiprocessing.active_children() == []


def probe_on_a_rank(rank: int, world: int, run: str, out: str) -> None:
    import os

    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_RUN_ID="test")
    linear_eval.main(Args(Path(run), out=Path(out), **{**SHORT, "limit": 129}))


@pytest.mark.slow
def test_two_ranks_are_one(run: Path, tmp_path: Path) -> None:
    one = {**SHORT, "limit": 129}  # an uneven share of test images
    linear_eval.main(Args(run, out=tmp_path / "one", **one))
    run_ranks(probe_on_a_rank, 2, str(run), str(tmp_path / "two"))
    for ours, theirs in zip(table(tmp_path / "two"), table(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"base_lr": math.nan}, "base_lr: expected a number above 0, got nan"),
        (
            {"batch_size": 129},
            r"batch_size: expected at most the number of training images, 128, got 129\. Give --batch-size 128 or less",
        ),
        ({"data_dir": Path("nowhere")}, "data_dir: nowhere is not there"),
        ({"base_lr": 1e38, "epochs": 5}, r"the loss of epoch \d is (nan|inf)\. Start again with a smaller --base-lr"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=f"error: {message}"):
        linear_eval.main(Args(run, **{**SHORT, **options}))


def test_a_directory_that_cannot_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before the first epoch; and what was not there before is not called whole."""

    def refused(*given: Any, **how: Any) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(linear_eval, "TemporaryFile", refused)
        patched.setattr(linear_eval.Training, "batches", refused)
        with pytest.raises(SystemExit, match=r"out: .*run cannot be written .*--out\.$"):
            linear_eval.main(Args(run, **SHORT))
    monkeypatch.setattr(linear_eval, "written_whole", refused)
    with pytest.raises(SystemExit, match=r"denied\)\. There was none before\.$"):
        linear_eval.main(Args(run, **{**SHORT, "epochs": 1}))


def test_fewer_images_than_a_batch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What nobody asked for is no error: the batch is then all there are."""
    options = {name: value for name, value in SHORT.items() if name != "batch_size"}
    linear_eval.main(Args(run, **{**options, "limit": 90}))
    assert "batch 90, 3 epochs" in capsys.readouterr().out


def test_data_of_another_kind(run: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"data_dir: {images.name} has 3 channels, and the encoder takes 1"):
        linear_eval.main(Args(run, data_dir=images, **SHORT))
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path / 'checkpoint.pt'} is not there. Give a checkpoint.pt")):
        linear_eval.main(Args(tmp_path, **SHORT))
    (tmp_path / "table.csv").write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(SystemExit, match=r"table\.csv is no checkpoint, or a damaged one\. Give a checkpoint\.pt of a"):
        linear_eval.main(Args(tmp_path / "table.csv", **SHORT))
