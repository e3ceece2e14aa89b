"""Exported backbones, loaded into the real models; and figures of several runs."""

import csv
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "after"))

import export_backbone
import plot_runs
from pretrain.encoders import Encoder, encoder_of

Spec = dict[str, Any]


def trained(folder: Path, **spec: Any) -> Encoder:
    """A checkpoint whose every number is of its own; the encoder in eval mode."""
    spec = {"arch": "resnet18", "channels": 3, "image_size": 64, "head": "simo", "dim": 8, **spec}
    encoder = encoder_of(spec)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor += 7
            elif "running_var" in name or tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
            elif "running_mean" in name:
                tensor.normal_()
    data = {"name": "images", "data_dir": "images", "image_size": spec["image_size"], "channels": spec["channels"]}
    torch.save(
        {"encoder_spec": spec, "state": {"encoder": encoder.state_dict()}, "data": data}, folder / "checkpoint.pt"
    )
    return encoder.eval()


def export(folder: Path, name: str = "out.pth", **options: Any) -> Path:
    options = {"verify": True, **options}
    export_backbone.main(export_backbone.Args(checkpoint=folder, out=folder / name, **options))
    return folder / name


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """In the memory format of the libraries' models."""
    encoder.backbone.to(memory_format=torch.contiguous_format)
    found: Tensor = encoder.backbone(images)
    return found


@pytest.mark.parametrize("norm", ["batch", "sync", "split"])
def test_torchvision(tmp_path: Path, norm: str, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, path = trained(tmp_path, norm=norm), export(tmp_path)
    model, images = torchvision.models.resnet18().eval(), torch.randn(2, 3, 64, 64)
    keys = model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert keys.unexpected_keys == []
    model.fc = nn.Identity()
    assert torch.equal(model(images), features(encoder, images))
    assert "feature maps of torchvision's Faster R-CNN (resnet18, FPN) are bit-identical" in capsys.readouterr().out


def test_faster_rcnn(tmp_path: Path) -> None:
    encoder, path = trained(tmp_path, arch="resnet50"), export(tmp_path)
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64
    ).eval()
    detector.backbone.body.load_state_dict(torch.load(path, weights_only=True))
    images = torch.rand(1, 3, 64, 64)
    levels = detector.backbone.body(images)
    assert torch.equal(torch.nn.functional.adaptive_avg_pool2d(levels["3"], 1).flatten(1), features(encoder, images))
    assert [level.shape[1] for level in levels.values()] == [256, 512, 1024, 2048]
    assert len(detector(list(images))) == 1


def test_timm(tmp_path: Path) -> None:
    encoder, path = trained(tmp_path), export(tmp_path, format="timm")
    model, images = timm.create_model("resnet18", num_classes=0).eval(), torch.randn(2, 3, 64, 64)
    model.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(model(images), features(encoder, images))


def detectron2_names(depth: int) -> set[str]:
    """Of detectron2.modeling.backbone.resnet: stem, res2 to res5, their blocks' convolutions, each with its norm."""
    blocks, bottleneck = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}[depth], depth >= 50
    convolutions = ["stem.conv1"]
    for stage, count in enumerate(blocks, start=2):
        for block in range(count):
            convolutions += [f"res{stage}.{block}.conv{i}" for i in range(1, 4 if bottleneck else 3)]
        if bottleneck or stage > 2:  # where the channels change
            convolutions.append(f"res{stage}.0.shortcut")
    parts = ["weight", *(f"norm.{p}" for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))]
    return {f"{convolution}.{part}" for convolution in convolutions for part in parts}


@pytest.mark.parametrize(("arch", "name"), [("resnet18", "out.pkl"), ("resnet50", "out.pkl"), ("resnet18", "out.pth")])
def test_detectron2(tmp_path: Path, arch: str, name: str) -> None:
    encoder, path = trained(tmp_path, arch=arch), export(tmp_path, name, format="detectron2")
    content = pickle.loads(path.read_bytes()) if path.suffix == ".pkl" else torch.load(path, weights_only=True)
    assert content["__author__"]
    assert content["matching_heuristics"] is True
    model = content["model"]
    assert model.keys() == detectron2_names(int(arch[6:]))
    kind = np.ndarray if path.suffix == ".pkl" else Tensor
    assert all(isinstance(value, kind) for value in model.values())
    weights = encoder.backbone.state_dict()
    for ours, theirs in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.1.conv2.weight": "layer1.1.conv2.weight",
        "res5.0.conv2.norm.bias": "layer4.0.bn2.bias",
        "res4.0.shortcut.weight": "layer3.0.downsample.0.weight",
        "res3.0.shortcut.norm.running_var": "layer2.0.downsample.1.running_var",
    }.items():
        assert torch.equal(torch.as_tensor(model[ours]), weights[theirs])


@pytest.mark.parametrize("format", ["torchvision", "timm", "detectron2"])
def test_verify_finds_an_altered_file(tmp_path: Path, format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path)
    whole = export_backbone.backbone_state
    altered: list[bool] = []

    def once_altered(encoder: Encoder) -> dict[str, Tensor]:
        state = whole(encoder)
        if not altered:  # the one that is written
            altered.append(True)
            state["layer3.0.bn1.weight"] = state["layer3.0.bn1.weight"] + 1e-3
        return state

    monkeypatch.setattr(export_backbone, "backbone_state", once_altered)
    with pytest.raises(SystemExit, match=r"out.pth: it is not what was exported .layer3.0.bn1.weight"):
        export(tmp_path, format=format)


@pytest.mark.parametrize("what", ["real_model", "faster_rcnn_body"])
def test_verify_finds_another_model(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose second stage ends in another function."""
    trained(tmp_path)
    make = getattr(export_backbone, what)

    def other(*arguments: str) -> nn.Module:
        model: nn.Module = make(*arguments)
        model.get_submodule("layer2.1").relu = nn.LeakyReLU(1e-3)
        return model

    monkeypatch.setattr(export_backbone, what, other)
    message = "the features of torchvision's resnet18 differ" if what == "real_model" else "level 1 of Faster R-CNN"
    with pytest.raises(SystemExit, match=message):
        export(tmp_path)


def test_a_small_stem_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = trained(tmp_path, image_size=32)
    with pytest.raises(SystemExit, match=r"3 x 3 stem without max-pool, for images of 32 px.*Give --small-stem"):
        export(tmp_path)
    with pytest.raises(SystemExit, match="detectron2's ResNet has a 7 x 7 stem"):
        export(tmp_path, format="detectron2", small_stem=True)
    assert not (tmp_path / "out.pth").exists()
    for format in ("torchvision", "timm"):
        path = export(tmp_path, format=format, small_stem=True)
        assert f"features of {format}'s resnet18 are bit-identical" in capsys.readouterr().out
    model, images = torchvision.models.resnet18().eval(), torch.randn(2, 3, 32, 32)
    model.conv1, model.maxpool, model.fc = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    model.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(model(images), features(encoder, images))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"arch": "small"}, "its network is 'small'"),
        ({"norm": "group"}, "GroupNorm, and these layouts are for batch norm"),
        ({"channels": 1}, "takes 1 channels, and these layouts 3"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, spec: Spec, message: str) -> None:
    trained(tmp_path, **spec)
    with pytest.raises(SystemExit, match=message):
        export(tmp_path)
    assert not (tmp_path / "out.pth").exists()


def test_wide_networks_are_detectron2s() -> None:
    spec = {"arch": "resnet50x2", "image_size": 224, "channels": 3}
    for format in ("torchvision", "timm"):
        with pytest.raises(SystemExit, match=f"format: {format} has no resnet50x2"):
            export_backbone.check(export_backbone.Args(Path("a"), Path("b"), format=format), spec)
    args = export_backbone.Args(Path("a"), Path("b"), format="detectron2")
    export_backbone.check(args, spec)
    settings = "WIDTH_PER_GROUP 128, STEM_OUT_CHANNELS 128, RES2_OUT_CHANNELS 512"
    assert settings in export_backbone.how_to_load(args, "resnet50x2")


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path / 'checkpoint.pt'} is not there")):
        export(tmp_path)
    trained(tmp_path)
    assert export(tmp_path, "new/folder/out.pth").exists()
    (tmp_path / "file").touch()
    with pytest.raises(
        SystemExit, match=r"out: \S+file/out\.pth cannot be written \(File exists\)\. Give another --out"
    ):
        export(tmp_path, "file/out.pth")


# ------------------------------------------------------------------------------------------------ several runs


def a_run(folder: Path, seed: int, knn: list[float], **arguments: Any) -> Path:
    folder.mkdir(parents=True)
    arguments = {"seed": seed, "run_dir": str(folder), "num_negatives": 16, **arguments}
    (folder / "config.json").write_text(json.dumps({"arguments": arguments}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "loss", "top1", "feature_std", "knn", "lr"])
        writer.writerow([0, "", "", "", 20.0, ""])
        writer.writerows([epoch, 5 - epoch, 10 * epoch, 0.9, value, 0.1] for epoch, value in enumerate(knn, start=1))
    return folder


def test_a_figure_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [a_run(tmp_path / f"a{seed}", seed, [30.0, 40.0 + seed], eqco=True) for seed in range(3)]
    runs += [a_run(tmp_path / f"b{seed}", seed, [25.0, 30.0 + seed], eqco=False) for seed in range(2)]
    for name in ("runs.png", "runs.svg"):
        plot_runs.main(plot_runs.Args(tuple(runs), tmp_path / "figures" / name))
    plot_runs.main(plot_runs.Args(tuple(runs)))
    assert (tmp_path / "runs.png").is_file()  # beside the runs, wherever the command is given
    plot_runs.main(plot_runs.Args((*runs, tmp_path / "runs.png")))  # which a shell's * then finds
    output = capsys.readouterr().out
    assert "eqco True: 3 run(s), kNN 41.0 % (40.0 to 42.0)" in output
    assert "eqco False: 2 run(s), kNN 30.5 % (30.0 to 31.0)" in output
    assert (tmp_path / "figures" / "runs.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figures" / "runs.svg").read_text()


def test_what_is_no_run_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """runs/* finds a grid's folder, a run in its first kNN, and results of other scripts: it once ended there."""
    for name in ("gradient-norm-digits", "sweep"):
        (tmp_path / name).mkdir()
    (tmp_path / "gradient-norm-digits" / "config.json").write_text("{}")
    (tmp_path / "gradient-norm-digits" / "metrics.csv").write_text("k,norm\n4,1.2\n")
    a_run(tmp_path / "started", 1, [])
    (tmp_path / "started" / "metrics.csv").write_text("epoch,loss\n")
    a_run(tmp_path / "whole", 0, [30.0])
    plot_runs.main(plot_runs.Args(tuple(sorted(tmp_path.iterdir()))))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note     ")]
    assert [Path(note.split()[1]).parent.name for note in notes] == ["gradient-norm-digits", "started", "sweep"]
    assert notes[1:] == [
        f"note     {tmp_path}/started/metrics.csv has no epoch yet: passed over.",
        f"note     {tmp_path}/sweep/config.json is not there: passed over.",
    ]
    assert (tmp_path / "runs.png").is_file()


def test_a_band_is_over_the_epochs_that_all_have() -> None:
    curves: list[plot_runs.Curve] = [{0: 1.0, 1: 2.0, 2: 6.0}, {0: 3.0, 2: 2.0, 3: 9.0}]
    assert plot_runs.band(curves) == [(0, 2.0, 1.0, 3.0), (2, 4.0, 2.0, 6.0)]


def test_groups_share_all_but_the_seed(tmp_path: Path) -> None:
    records = [
        plot_runs.read(a_run(tmp_path / name, seed, [30.0], **arguments))
        for name, seed, arguments in (
            ("a", 0, {"alpha": 256, "workers": 2}),
            ("b", 0, {"alpha": 16}),
            ("c", 1, {"alpha": 256, "workers": 4}),
        )
    ]
    groups = plot_runs.grouped(records)
    assert [[record.directory.name for record in group] for group in groups] == [["a", "c"], ["b"]]
    assert plot_runs.legend([group[0].arguments for group in groups]) == ["alpha 256", "alpha 16"]


def test_runs_that_cannot_be_plotted(tmp_path: Path) -> None:
    def refused(message: str, *runs: Path, out: str = "out.png") -> None:
        with pytest.raises(SystemExit, match=message):
            plot_runs.main(plot_runs.Args(runs, tmp_path / out))
        assert not (tmp_path / out).exists()

    good = a_run(tmp_path / "good", 0, [30.0])
    refused("expected one run directory or more, got none")
    refused(r"nothing is not there\. Give directories", tmp_path / "nothing", good)
    refused("are the same run", good, a_run(tmp_path / "copy", 0, [31.0]))
    refused("out: .txt is no picture", good, out="out.txt")
    (good / "metrics.csv").write_text("epoch,loss\n")
    refused(r"metrics\.csv has no epoch yet", good)
    (good / "metrics.csv").write_text("epoch,loss\n1,many\n")
    refused(r"metrics\.csv cannot be read .ValueError", good)
    (good / "config.json").write_text("{")
    refused(r"config\.json or metrics\.csv cannot be read .JSONDecodeError", good)
    (good / "metrics.csv").unlink()
    refused(r"metrics\.csv is not there", good)
