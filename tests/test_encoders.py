"""Encoders and their normalisation: sizes, heads, and which rows share statistics."""

import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_moco
import train_simco
import train_simmoco
import train_simo
from pretrain import encoders, norms
from pretrain.checkpoint import CheckpointError, restore_encoder
from pretrain.encoders import FORMER_HEADS, Arch, Head, encoder_of, make_encoder

MILLIONS = {"resnet18": 11.177, "resnet34": 21.285, "resnet50": 23.508, "resnet50x2": 93.907, "resnet50x4": 375.378}


@pytest.mark.parametrize("arch", MILLIONS)
def test_sizes(arch: Arch) -> None:
    """SiMo's paper: 94 and 375 million; the others are torchvision's."""
    with torch.device("meta"):
        encoder = make_encoder(arch, channels=3, image_size=224, head=Head(), dim=128)
    assert sum(p.numel() for p in encoder.backbone.parameters()) / 1e6 == pytest.approx(MILLIONS[arch], abs=1e-3)


@pytest.mark.parametrize("factor", [2, 4])
def test_every_convolution_is_wider(factor: int) -> None:
    with torch.device("meta"):
        plain, wide = (
            make_encoder(arch, channels=3, image_size=224, head=Head(), dim=128)
            for arch in get_args(Arch)
            if arch in ("resnet50", f"resnet50x{factor}")
        )
    shapes = {name: p.shape for name, p in plain.backbone.named_parameters()}
    for name, p in wide.backbone.named_parameters():
        inputs = 3 if name == "conv1.weight" else None
        narrow = shapes.pop(name)
        assert p.shape[0] == factor * narrow[0], name
        if p.ndim == 4:
            assert p.shape[1:] == (inputs or factor * narrow[1], *narrow[2:]), name
    assert not shapes
    assert wide.width == factor * 2048


def test_a_wide_network_runs() -> None:
    encoder = make_encoder("resnet50x2", channels=1, image_size=16, head=Head(layers=1), dim=16).eval()
    assert encoder(torch.zeros(1, 1, 16, 16)).shape == (1, 16)


@pytest.mark.parametrize(
    ("channels", "image_size", "stem", "stages"),
    [(3, 32, (64, 3, 3, 3), 4), (3, 63, (64, 3, 3, 3), 8), (3, 64, (64, 3, 7, 7), 2), (1, 64, (64, 1, 7, 7), 2)],
)
def test_stems(channels: int, image_size: int, stem: tuple[int, ...], stages: int) -> None:
    encoder = make_encoder("resnet18", channels=channels, image_size=image_size, head=Head(), dim=128)
    assert encoder.backbone.get_parameter("conv1.weight").shape == stem
    sizes: list[torch.Size] = []
    encoder.backbone.get_submodule("layer4").register_forward_hook(lambda *arguments: sizes.append(arguments[2].shape))
    assert encoder.features(torch.zeros(2, channels, image_size, image_size)).shape == (2, 512)
    assert sizes[0][2:] == (stages, stages)


def test_heads() -> None:
    def layers(head: Head) -> list[tuple[Any, ...]]:
        modules = make_encoder("small", channels=1, image_size=32, head=head, dim=64).head
        return [
            (type(m).__name__, *(() if m.weight is None else m.weight.shape), m.bias is not None)
            for m in modules.modules()
            if isinstance(m, nn.Linear | nn.BatchNorm1d)
        ]

    assert layers(train_moco.HEADS["v1"]) == [("Linear", 64, 128, True)]
    assert layers(train_moco.HEADS["v2"]) == [("Linear", 128, 128, True), ("Linear", 64, 128, True)]
    assert (
        layers(train_simco.HEAD) == layers(train_simmoco.HEAD) == [("Linear", 64, 128, True), ("Linear", 64, 64, True)]
    )
    assert layers(train_simo.HEAD) == [
        ("Linear", 128, 128, False),
        ("BatchNorm1d", 128, True),
        ("Linear", 64, 128, False),
        ("BatchNorm1d", 64, True),
    ]
    assert layers(Head(hidden=32, batch_norm=True, last_norm="plain")) == [  # MoCo v3's
        ("Linear", 32, 128, False),
        ("BatchNorm1d", 32, True),
        ("Linear", 64, 32, False),
        ("BatchNorm1d", False),
    ]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("mocov1", train_moco.HEADS["v1"]),
        ("mocov2", train_moco.HEADS["v2"]),
        ("simco", train_simco.HEAD),
        ("simo", train_simo.HEAD),
    ],
)
def test_former_checkpoints_have_the_methods_heads(name: str, head: Head) -> None:
    """By a name, and with it whether residual branches start at zero."""
    spec = {"arch": "resnet18", "channels": 3, "image_size": 32, "dim": 16}
    torch.manual_seed(5)
    former = encoder_of({**spec, "head": name})
    torch.manual_seed(5)
    now = encoder_of({**spec, "head": head._asdict(), "zero_init_residual": name == "simo"})
    assert former.state_dict().keys() == now.state_dict().keys()
    assert all(torch.equal(x, now.state_dict()[key]) for key, x in former.state_dict().items())


@pytest.mark.parametrize("zero", [False, True])
def test_residual_branches_start_at_zero_where_that_is_asked_for(zero: bool) -> None:
    encoder = make_encoder("resnet18", channels=3, image_size=32, head=Head(), dim=16, zero_init_residual=zero)
    last = encoder.backbone.get_parameter("layer4.1.bn2.weight")
    assert bool((last == 1 - zero).all())


def test_a_seed_gives_the_same_weights_whatever_the_norm() -> None:
    found = []
    for norm in get_args(norms.Norm):
        torch.manual_seed(3)
        encoder = make_encoder(
            "small",
            channels=1,
            image_size=32,
            head=Head(batch_norm=True, last_norm="plain"),
            dim=8,
            norm=norm,
            splits=2,
        )
        found.append([p.detach() for p in encoder.parameters()])
    assert len({len(weights) for weights in found}) == 1
    for weights in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], weights, strict=True))


def test_bad_choices() -> None:
    good: dict[str, Any] = {"arch": "small", "channels": 1, "image_size": 32, "head": Head(), "dim": 8}
    for name, value in (("arch", "resnet51"), ("norm", "layer")):
        with pytest.raises(ValueError, match=rf"{name}: expected one of .*, got '{value}'"):
            make_encoder(**{**good, name: value})
    with pytest.raises(ValueError, match=r"head: expected one of mocov1, .*, got 'simsiam'"):
        encoder_of({**good, "head": "simsiam"})
    with pytest.raises(ValueError, match="splits: expected 1 or more, got 0"):
        make_encoder(**good, norm="split", splits=0)


# ------------------------------------------------------------------------------------------------ who shares statistics


@pytest.mark.parametrize("shape", [(12, 5, 4, 3), (12, 5)])
def test_split_is_batch_norm_of_each_part(shape: tuple[int, ...]) -> None:
    splits, parts = 3, []
    split = norms.SplitBatchNorm(5, splits).double()
    nn.init.normal_(split.weight)
    nn.init.normal_(split.bias)
    for _ in range(splits):
        part = nn.BatchNorm1d(5) if len(shape) == 2 else nn.BatchNorm2d(5)
        part.load_state_dict(split.state_dict())
        parts.append(part.double())
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        direction = torch.randn(shape, dtype=torch.float64)
        expected = torch.zeros(shape, dtype=torch.float64)
        for j, part in enumerate(parts):
            expected[j::splits] = part(x[j::splits])
        (gradient,) = torch.autograd.grad((expected * direction).sum(), x)
        output = split(x)
        torch.testing.assert_close(output, expected)
        (ours,) = torch.autograd.grad((output * direction).sum(), x)
        torch.testing.assert_close(ours, gradient)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([part.get_buffer(name) for part in parts]).mean(0)
        torch.testing.assert_close(split.get_buffer(name), mean)
    assert split.num_batches_tracked is not None
    assert int(split.num_batches_tracked) == 2
    x = torch.randn(7, *shape[1:], dtype=torch.float64)  # evaluation knows no parts
    expected = F.batch_norm(x, split.running_mean, split.running_var, split.weight, split.bias)
    torch.testing.assert_close(split.eval()(x), expected)


def test_split_needs_a_batch_that_splits() -> None:
    with pytest.raises(ValueError, match="splits: a batch of 10 cannot be split into 4 equal parts"):
        norms.SplitBatchNorm(5, 4)(torch.zeros(10, 5))


def kinds(encoder: nn.Module) -> set[str]:
    return {type(module).__name__ for module in encoder.modules() if "Norm" in type(module).__name__}


def test_conversion() -> None:
    wanted = {
        "batch": {"BatchNorm1d", "BatchNorm2d"},
        "shuffle": {"BatchNorm1d", "BatchNorm2d"},
        "sync": {"SyncBatchNorm"},
        "split": {"SplitBatchNorm"},
        "group": {"GroupNorm"},
    }
    for norm in get_args(norms.Norm):
        encoder = make_encoder("resnet18", channels=3, image_size=32, head=FORMER_HEADS["simo"], dim=128, norm=norm)
        assert kinds(encoder) == wanted[norm]
        if norm == "group":  # rows share nothing
            first, rest = torch.randn(1, 3, 32, 32), torch.randn(3, 3, 32, 32)
            alone, beside = encoder(first), encoder(torch.cat([first, rest]))[:1]
            torch.testing.assert_close(alone, beside, atol=1e-4, rtol=1e-4)


def test_groups() -> None:
    assert [norms.groups_of(channels) for channels in (16, 24, 32, 48, 64, 100, 2048)] == [16, 24, 32, 24, 32, 25, 32]
    encoder = make_encoder("small", channels=1, image_size=32, head=FORMER_HEADS["simo"], dim=64, norm="group")
    groups = [m.num_groups for m in encoder.modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [16, 32, 32, 32, 32, 32, 1, 1]  # a group of two of a vector's features would keep only their order


def test_a_norm_that_cannot_do_what_it_says() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ValueError, match=r"norm: sync needs several processes on CUDA, got 2 processes on cpu\. Give"):
        norms.check_norm("sync", cpu, world_size=2, batch_size=8)
    with pytest.raises(ValueError, match=r"got 1 process on cuda.*--norm batch, which is the same"):
        norms.check_norm("sync", cuda, world_size=1, batch_size=8)
    with pytest.raises(ValueError, match=r"norm: shuffle needs several processes, got 1.*--norm split"):
        norms.check_norm("shuffle", cuda, world_size=1, batch_size=8)
    for batch_size, near in ((8, 16), (12, 16), (999, 992)):
        way = f"a batch of {batch_size} on each process cannot be split into 8 .* each gets {near}, or a --splits"
        with pytest.raises(ValueError, match=f"splits: {way}"):
            norms.check_norm("split", cpu, world_size=1, batch_size=batch_size)
    norms.check_norm("sync", cuda, world_size=2, batch_size=8)
    norms.check_norm("shuffle", cpu, world_size=2, batch_size=8)
    norms.check_norm("split", cpu, world_size=1, batch_size=16)
    norms.check_norm("batch", cpu, world_size=1, batch_size=1)
    norms.check_norm("group", cpu, world_size=1, batch_size=1)


# ------------------------------------------------------------------------------------------------ shuffling


class Rows(nn.Module):
    """Remembers the rows it saw, and answers with statistics that only their batch has."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.seen = norm, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x[:, 0].clone()
        output: Tensor = self.norm(x)
        return output


def numbered(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None] * torch.tensor([1.0, 10.0])


def test_one_process_permutes_for_a_split_norm_only() -> None:
    images = numbered(0, 12)
    plain = Rows(nn.BatchNorm1d(2))
    torch.testing.assert_close(norms.shuffled(plain, images, torch.Generator().manual_seed(1)), plain(images))
    assert plain.seen.tolist() == list(range(12))

    split = Rows(norms.SplitBatchNorm(2, 3))
    output = norms.shuffled(split, images, torch.Generator().manual_seed(1))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert split.seen.tolist() == order.tolist() != list(range(12))
    expected = torch.empty_like(images)
    for j in range(3):
        rows = order[j::3]
        expected[rows] = F.batch_norm(images[rows], None, None, training=True)
    torch.testing.assert_close(output, expected)
    assert not output.requires_grad


def shuffle_on_a_rank(rank: int, world: int) -> tuple[list[float], list[list[float]]]:
    encode = Rows(nn.BatchNorm1d(2))
    output = norms.shuffled(encode, numbered(6 * rank, 6), torch.Generator().manual_seed(5))
    return encode.seen.tolist(), output.tolist()


def test_ranks_exchange_rows_and_get_their_own_back() -> None:
    answers = run_ranks(shuffle_on_a_rank, 2)
    images, order = numbered(0, 12), torch.randperm(12, generator=torch.Generator().manual_seed(5))
    expected = torch.empty_like(images)
    for rank, (seen, _) in enumerate(answers):
        rows = order[6 * rank : 6 * rank + 6]
        assert seen == rows.tolist()
        assert {row < 6 for row in seen} == {True, False}  # of both ranks
        expected[rows] = F.batch_norm(images[rows], None, None, training=True)
    torch.testing.assert_close(torch.tensor([row for _, output in answers for row in output]), expected)


# ------------------------------------------------------------------------------------------------ checkpoints

SPEC: dict[str, Any] = {
    "arch": "small",
    "channels": 1,
    "image_size": 32,
    "head": "simo",
    "dim": 8,
    "norm": "split",
    "splits": 2,
}
DATA = {"name": "digits", "data_dir": None, "image_size": 32, "channels": 1}


def checkpoint(folder: Path, **changes: Any) -> tuple[Path, encoders.Encoder]:
    encoder = encoder_of({**SPEC, **changes.pop("spec", {})})
    content = {"encoder_spec": SPEC, "state": {"encoder": encoder.state_dict()}, "data": DATA, "epoch": 4, **changes}
    path = folder / "checkpoint.pt"
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path, encoder


def test_an_encoder_comes_back(tmp_path: Path) -> None:
    path, encoder = checkpoint(tmp_path)
    state = torch.get_rng_state()
    for given in (path, tmp_path):
        restored, saved = restore_encoder(given)
        assert not restored.training
        assert saved["data"] == DATA
        images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(restored(images), encoder.eval()(images))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_spec": None}, "has no encoder_spec"),
        ({"state": {"optimizer": {}}}, "has no encoder in its state"),
        ({"data": None, "state": None}, "has no state, data"),
        ({"encoder_spec": {**SPEC, "arch": "vit"}}, "its encoder_spec .* is none .arch: expected one of"),
        ({"encoder_spec": {"arch": "small"}}, "its encoder_spec .* is none"),
        ({"encoder_spec": {**SPEC, "dim": 9}}, "its weights do not fit .*size mismatch for head.3.weight"),
        ({"spec": {"norm": "group"}}, "its weights do not fit .*Missing key"),
    ],
)
def test_a_wrong_checkpoint(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, _ = checkpoint(tmp_path, **change)
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*" + message):
        restore_encoder(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "tensor", "gone"])
def test_a_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    path, _ = checkpoint(tmp_path)
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "tensor":
        torch.save(torch.ones(3), path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"weights"}[damage])
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + r".*Give a checkpoint\.pt of a training script"):
        restore_encoder(tmp_path)
