"""What a run can do besides training: go on to more epochs, log, tell of itself; features of other images."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv  # type: ignore[import-untyped]
from PIL import Image
from torch import Tensor, nn

from .scripts import EXAMPLES, make_images, rows

sys.path.insert(0, str(EXAMPLES))
sys.path.insert(0, str(EXAMPLES / "after"))

import export_backbone  # isort: skip
import extract_features  # isort: skip
import train_moco  # isort: skip
import train_simclr  # isort: skip
from pretrain import arguments, loggers  # isort: skip
from pretrain.card import exported  # isort: skip
from pretrain.encoders import FORMER_HEADS, Encoder, make_encoder  # isort: skip
from pretrain.run import Run  # isort: skip
from pretrain.schedule import learning_rate  # isort: skip


def moco_args(folder: Path, **more: Any) -> train_moco.Args:
    small: dict[str, Any] = {"limit": 64, "batch_size": 16, "queue_size": 40, "splits": 2, "knn_every": 1}
    return train_moco.Args(**{**small, "norm": "split", "device": "cpu", "run_dir": folder, "epochs": 2, **more})


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("short") / "run"
    train_moco.main(moco_args(folder))
    return folder


# ------------------------------------------------------------------------------------------------------- more epochs


def test_more_epochs_follow_the_schedule_of_a_run_of_so_many(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in short.iterdir()}
    args = moco_args(tmp_path / "longer", epochs=4, resume_from=short)
    train_moco.main(args)
    assert f"resumed after epoch 2 of {short}/checkpoint.pt" in capsys.readouterr().out
    table = rows(tmp_path / "longer")
    assert table[:3] == rows(short)  # what the first run measured is the beginning of this one's curves
    assert [row["epoch"] for row in table] == ["0", "1", "2", "3", "4"]
    for epoch in (3, 4):
        share = learning_rate("simo", 4 * epoch - 1, 4, 4, args.warmup_epochs, args.warmup_from)
        assert float(table[epoch]["lr"]) == pytest.approx(args.base_lr * 16 / 256 * share)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (short, tmp_path / "longer")]
    assert states[1]["state"]["progress"]["step"] == 16
    assert states[1]["fixed"]["resume_from"] == str(short)
    assert {path.name: path.read_bytes() for path in short.iterdir()} == before
    with pytest.raises(SystemExit, match=r"^0$"):
        train_moco.main(args)
    assert "longer is finished. kNN" in capsys.readouterr().out


def test_more_epochs_at_the_same_rate_are_one_longer_run(tmp_path: Path) -> None:
    """With a schedule whose rate has not fallen in the first epoch, this epoch and three more are bit for bit four."""
    flat: dict[str, Any] = {"schedule": "cosine-by-epoch", "probe": False, "knn_every": 2}
    train_moco.main(moco_args(tmp_path / "whole", epochs=4, **flat))
    train_moco.main(moco_args(tmp_path / "start", epochs=1, **flat))
    train_moco.main(moco_args(tmp_path / "rest", epochs=4, resume_from=tmp_path / "start" / "checkpoint.pt", **flat))
    whole, rest = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"] for name in ("whole", "rest")
    )
    for module in ("encoder", "key_encoder", "queue"):
        for name, value in whole[module].items():
            assert torch.equal(value, rest[module][name]), f"{module}.{name}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 2}, r"resume_from: .*checkpoint\.pt stands at epoch 2, and --epochs 2 leaves nothing to train"),
        (
            {"temperature": 0.5},
            r"was made with other arguments:\n.*\n  temperature  0\.1    0\.5\n"
            r"Give the saved values to go on from it, or leave --resume-from out to start a new run\.$",
        ),
        ({"queue_size": 41}, r"queue_size  40     41"),
    ],
    ids=["epochs", "temperature", "queue"],
)
def test_what_more_epochs_cannot_go_on_from(short: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    args = replace(moco_args(tmp_path / "run", epochs=4, resume_from=short), **change)
    with pytest.raises(SystemExit, match=message):
        train_moco.main(args)
    assert not (tmp_path / "run").exists()  # where others would take it for a run


def test_more_epochs_have_a_directory_of_their_own(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_moco.main(replace(moco_args(short, epochs=3, resume_from=short, probe=False), run_dir=None))
    assert [path.name for path in Path("runs").iterdir()] == ["moco-digits-v2-k40-seed0-epochs3"]


def test_a_checkpoint_to_go_on_from_that_is_not_there(short: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"resume_from: .*nowhere is not there\. Give the checkpoint\.pt of a run"):
        train_moco.main(moco_args(tmp_path / "run", epochs=4, resume_from=tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=rf"--resume-from {short}/checkpoint\.pt with another --run-dir goes on"):
        train_moco.main(moco_args(short, epochs=4))


def test_an_older_run_is_one_of_a_constant_key_momentum(tmp_path: Path) -> None:
    """Its checkpoint does not say so, and another one is another run."""
    older = Run(tmp_path, ("epoch",), {"seed": 0}, {})
    older.rows = [{"epoch": 0}]
    older.save(1, {"weight": torch.ones(3)})
    del older  # and its lock
    same = Run(tmp_path, ("epoch",), {"seed": 0, "key_momentum_schedule": "constant", "resume_from": None}, {})
    assert same.resume() is not None
    del same
    with pytest.raises(SystemExit, match=r"key_momentum_schedule  constant  cosine"):
        Run(tmp_path, ("epoch",), {"seed": 0, "key_momentum_schedule": "cosine"}, {}).resume()


# ------------------------------------------------------------------------------------------------------------ loggers


@pytest.mark.parametrize(
    ("name", "package", "missing"),
    [("tensorboard", "tensorboard", "tensorboard"), ("wandb", "wandb", "wandb"), ("wandb", "lightning", "lightning")],
)
def test_a_logger_that_is_not_installed_names_the_extra(
    name: Any, package: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda asked: None if asked == package else object())
    with pytest.raises(
        SystemExit, match=rf"error: logger: {name} needs {missing}, not .*pip install -e '\.\[{name}\]'"
    ):
        arguments.check(train_simclr.Args(logger=name))


def test_a_logger_gets_what_the_csv_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[int, dict[str, float]]] = []
    ended: list[str] = []

    class Logger:
        def __init__(self, root_dir: Path, name: str, version: str, purge_step: int) -> None:
            assert (root_dir, name, version, purge_step) == (tmp_path / "run", "tensorboard", "", 1)

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            got.append((step, metrics))

        def save(self) -> None:
            pass

        def finalize(self, status: str) -> None:
            ended.append(status)

    monkeypatch.setattr(loggers, "find_spec", lambda asked: object())
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard.TensorBoardLogger", Logger)
    train_moco.main(moco_args(tmp_path / "run", logger="tensorboard", probe=False))
    assert [step for step, _ in got] == [1, 2]
    assert ended == ["success"]
    for (_, metrics), row in zip(got, rows(tmp_path / "run")[1:], strict=True):
        for name in ("loss", "top1", "knn", "lr"):
            assert metrics[name] == float(row[name])


def test_tensorboard_itself(tmp_path: Path) -> None:
    """Its file holds the values, where it is installed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        EventAccumulator,
    )

    train_moco.main(moco_args(tmp_path / "run", logger="tensorboard", probe=False))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")[1:]]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_wandb_goes_on_under_one_id_and_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which is no part of the tests' environment."""

    class Error(Exception):
        pass

    class WandbLogger:
        def __init__(self, project: str, name: str, save_dir: Path, id: str) -> None:
            assert (project, name, save_dir) == ("eqco_loss", tmp_path.name, tmp_path)
            self.id = id

        def log_hyperparams(self, arguments: dict[str, Any]) -> None:
            if not arguments:
                raise Error("No API key configured.")

    package, integration = ModuleType("wandb"), ModuleType("wandb.integration.lightning.fabric")
    vars(package)["errors"], vars(integration)["WandbLogger"] = SimpleNamespace(Error=Error), WandbLogger
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setitem(sys.modules, integration.__name__, integration)
    first, resumed = (loggers.open_logger("wandb", tmp_path, epoch, {"seed": 0}).id for epoch in (1, 5))
    assert first == resumed == (tmp_path / "wandb-id.txt").read_text()
    with pytest.raises(SystemExit, match=r"logger: wandb cannot start .No API key configured\..*WANDB_MODE=offline"):
        loggers.open_logger("wandb", tmp_path, 1, {})


# -------------------------------------------------------------------------------------------------------- model card


def test_a_finished_run_has_a_model_card(short: Path) -> None:
    card, config = (short / "model_card.md").read_text(), json.loads((short / "config.json").read_text())
    result = torch.load(short / "checkpoint.pt", weights_only=True)["result"]
    assert f"\n{config['command']}\n" in card
    assert "A small encoder, trained by moco for 2 epochs without labels." in card
    for name in ("knn_untrained", "knn", "linear_probe"):
        assert f" | {result[name]:.1f} |\n" in card
    assert "| images | 64 train and 64 test images |" in card
    assert f"| device | {config['device']} ({config['device_name']}), 1 process(es), 32-true |" in card
    assert config["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert f"| torch | {config['versions']['torch']} |" in card
    assert "![curves over the epochs](curves.png)" in card
    assert (short / "curves.png").exists()
    assert "None" not in card
    scripts = [line.split()[1] for line in card.splitlines() if line.startswith("python examples/")]
    assert len(scripts) == 2  # the export knows no small encoder
    assert all((EXAMPLES.parent / script).exists() for script in scripts)


@pytest.mark.parametrize(
    ("spec", "flags"),
    [
        ({"arch": "resnet50", "image_size": 224, "channels": 3}, "--out backbone.pth"),
        ({"arch": "resnet18", "image_size": 32, "channels": 3, "norm": "batch"}, "--small-stem --out backbone.pth"),
        ({"arch": "resnet50x2", "image_size": 224, "channels": 3}, ""),
        ({"arch": "resnet18", "image_size": 32, "channels": 1}, ""),
        ({"arch": "resnet18", "image_size": 32, "channels": 3, "norm": "group"}, ""),
    ],
)
def test_the_card_exports_what_can_be_exported(spec: dict[str, Any], flags: str) -> None:
    assert exported(spec) == ([flags] if flags else [])
    args = export_backbone.Args(Path(), Path(), small_stem="--small-stem" in flags)
    if flags:
        export_backbone.check(args, spec)
    else:
        with pytest.raises(SystemExit, match=r"checkpoint: its network|format: torchvision has no"):
            export_backbone.check(args, spec)


# -------------------------------------------------------------------------------------------- a device without room


def test_a_device_without_room_names_the_flags_that_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Encoder, images: Tensor) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity.")

    monkeypatch.setattr(Encoder, "forward", full)
    with pytest.raises(SystemExit) as error:
        train_moco.main(moco_args(tmp_path / "run", knn=False))
    message = str(error.value)
    assert message.startswith("error: device: it has no room for this run (CUDA out of memory. Tried to allocate 2.00")
    for flag in ("--batch-size", "--accumulate", "--precision bf16-mixed", "--knn-device cpu"):
        assert flag in message
    assert "\n" not in message


# ------------------------------------------------------------------------------------------------ features to a file


def saved_encoder(folder: Path, **spec: Any) -> tuple[Path, Encoder]:
    how = {"arch": "small", "channels": 3, "image_size": 32, "dim": 8, **spec}
    torch.manual_seed(1)
    encoder = make_encoder(**how, head=FORMER_HEADS["simo"])
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    content = {"encoder_spec": {**how, "head": "simo"}, "data": {}, "state": {"encoder": encoder.state_dict()}}
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt", encoder.eval()


def expected_features(encoder: Encoder, path: Path) -> Tensor:
    """Of an image that is resized to 32 pixels, cropped in the middle, and normalised as for ImageNet."""
    with Image.open(path) as image:
        pixels = tv.pil_to_tensor(tv.center_crop(tv.resize(image.convert("RGB"), [32]), [32])) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        return encoder.features(((pixels - mean[:, None, None]) / std[:, None, None])[None])[0]


def test_features_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, encoder = saved_encoder(tmp_path)
    for seed, name in enumerate(("cat", "dog")):
        make_images(tmp_path / "images" / name, 3, seed)
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"no image")
    args = extract_features.Args(checkpoint, tmp_path / "images", batch_size=2, workers=0, device="cpu")
    extract_features.main(args)
    output = capsys.readouterr().out
    assert "cat/0.png cannot be decoded and is left out." in output
    assert "features.npz: 5 images, 128 features each, 2 classes" in output
    with np.load(tmp_path / "features.npz") as found:
        assert found["names"].tolist() == ["cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]
        assert found["labels"].tolist() == [0, 0, 1, 1, 1]
        assert found["classes"].tolist() == ["cat", "dog"]
        assert found["features"].dtype == np.float32
        for name, row in zip(found["names"], found["features"], strict=True):
            expected = expected_features(encoder, tmp_path / "images" / str(name))
            torch.testing.assert_close(torch.from_numpy(row), expected, rtol=1e-4, atol=1e-5)


def test_features_of_images_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = saved_encoder(tmp_path)
    make_images(tmp_path / "images", 3, 0)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    out = tmp_path / "new" / "features.npz"
    extract_features.main(extract_features.Args(checkpoint, tmp_path / "images", out, workers=0, device="cpu"))
    with np.load(out) as found:
        assert found["names"].tolist() == ["0.png", "1.png", "2.png"]
        assert found["labels"].tolist() == [-1, -1, -1]
        assert found["classes"].tolist() == []
        assert found["features"].shape == (3, 128)
    assert "3 images, 128 features each, 0 classes" in capsys.readouterr().out


def test_features_of_bad_input(short: Path, tmp_path: Path) -> None:
    checkpoint, _ = saved_encoder(tmp_path)
    make_images(tmp_path / "splits" / "train" / "cat", 2, 0)
    make_images(tmp_path / "splits" / "test" / "cat", 2, 1)
    make_images(tmp_path / "plain", 2, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "0.png").write_bytes(b"x")
    for given, images, message in (
        (checkpoint, "nowhere", r"images: .*nowhere is not there\. Give a folder"),
        (checkpoint, "empty", r"images: .*empty holds no image, and no folder of images"),
        (checkpoint, "splits", r"images: .*splits holds several splits\. Give one of them: .*train"),
        (checkpoint, "broken", r"images: none of the 1 images in .*broken can be decoded"),
        (short, "plain", r"checkpoint: its network takes 1 channel"),
        (tmp_path / "gone.pt", "plain", r"gone\.pt is not there\. Give a checkpoint"),
    ):
        with pytest.raises(SystemExit, match=message):
            extract_features.main(extract_features.Args(given, tmp_path / images, workers=0, device="cpu"))
    with pytest.raises(SystemExit, match="batch_size: expected 1 or more, got 0"):
        extract_features.main(extract_features.Args(checkpoint, tmp_path / "plain", batch_size=0))
