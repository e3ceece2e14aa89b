"""A training step: nothing in it waits for the device, and what a GPU does differently gives the same weights."""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "measure"))

import profile_step
import train_moco
import train_simo
from pretrain import optimizers, prefetch, training
from pretrain.arguments import Common, parse
from pretrain.data import Views
from pretrain.training import Training

SMALL: dict[str, Any] = {"epochs": 1, "limit": 64, "batch_size": 16, "probe": False, "knn": False, "device": "cpu"}


class NoWaiting(TorchDispatchMode):
    """Raises where the value of a tensor goes to Python, for which a GPU's host would wait."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.split(".")[0] in self.WAITING:
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimisers as on a GPU; a CPU has them, too."""
    for module, name in ((optimizers, "make_optimizer"), (training, "OnlineProbe")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real, **how: real(*args, **{**how, "fused": True}))


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From the second batch of an epoch to its last nothing waits; returns a list that counts these batches."""
    real, seen = Training.batches, list[int]()

    def batches(self: Training[Any]) -> Iterator[training.Batch]:
        inner, mode = real(self), NoWaiting()  # type: ignore[no-untyped-call,unused-ignore]
        yield next(inner)
        with mode:
            for _ in range(self.steps - 1):
                yield next(inner)
                seen.append(1)
        yield from inner

    monkeypatch.setattr(Training, "batches", batches)
    return seen


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_step_waits_for_the_device(optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused(monkeypatch)
    seen = watched(monkeypatch)
    args = train_simo.Args(**SMALL, optimizer=optimizer, online_probe=True, run_dir=tmp_path / "run")
    train_simo.main(args)
    assert len(seen) == 3


def test_the_watch_finds_a_step_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of an optimiser that is not fused asks whether it may."""
    watched(monkeypatch)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense.* waits for the device"):
        train_simo.main(train_simo.Args(**SMALL, run_dir=tmp_path / "run"))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_fused_step_is_skipped_as_another_is(kind: Any) -> None:
    """The first and a later one; weights and momentum are those of one that is not fused."""
    found = []
    for is_fused in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        optimizer = optimizers.make_optimizer(Common(optimizer=kind), layer, fused=is_fused)
        optimizers.start_momentum(optimizer)
        assert optimizers.is_fused(optimizer) == is_fused
        for step in range(5):
            skip = step in (0, 3)
            optimizer.param_groups[0]["lr"] = 0.1
            for parameter in layer.parameters():
                parameter.grad = torch.full_like(parameter, float("nan") if skip else 1.0 + step)
            optimizers.step_unless(torch.tensor(skip), optimizer, optimizer)
        assert not hasattr(optimizer, "found_inf")
        found.append(
            [
                *layer.parameters(),
                *(
                    optimizer.state[layer.weight][x]
                    for x in ("momentum_buffer", "exp_avg")
                    if x in optimizer.state[layer.weight]
                ),
            ]
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_checkpoint_does_not_choose_how_steps_are_made() -> None:
    layer = nn.Linear(2, 2)
    plain, fast = (optimizers.make_optimizer(Common(optimizer="sgd"), layer, fused=x) for x in (False, True))
    optimizers.load(fast, plain.state_dict())
    assert optimizers.is_fused(fast)
    optimizers.load(plain, fast.state_dict())
    assert not optimizers.is_fused(plain)


def test_statistics_are_mended() -> None:
    layer = nn.BatchNorm1d(3)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    statistics = optimizers.Statistics([layer])
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    statistics.mend()
    assert layer.running_mean.tolist() == [1, 2, 3]
    layer.running_mean.copy_(torch.tensor([4.0, float("nan"), float("inf")]))
    layer.running_var[0] = float("nan")
    statistics.mend()
    assert layer.running_mean.tolist() == [4, 2, 3]
    assert layer.running_var.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--compile"], True),
        (["--no-compile"], False),
        (["--compile", "--seed=1"], True),
        (["--seed=1", "--no-compile"], False),
        (["--compile", "False"], False),
        (["--compile", "None"], None),
    ],
)
def test_whether_to_compile(words: list[str], expected: bool | None) -> None:
    assert parse(words, train_moco.DEFAULTS, None).compile is expected


def test_a_cpu_compiles_nothing_unless_it_is_asked(tmp_path: Path) -> None:
    """And cuDNN's choice stays fixed, as a CPU's runs resume exactly."""
    run = Training("moco", train_moco.Args(**SMALL, run_dir=tmp_path / "run"), "")
    assert run.compile is False
    assert run.run.fixed["compile"] is False
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_batches_ahead_are_the_batches() -> None:
    class Fabric:
        device = torch.device("cpu")

        def to_device(self, batch: Any) -> Any:
            return batch

    views: list[Any] = [Views((torch.ones(2), torch.ones(2)), torch.tensor([i])) for i in range(3)]
    found: list[Tensor] = [batch.samples for batch in prefetch.ahead(iter(views), Fabric())]  # type: ignore[arg-type]
    assert [int(x) for x in found] == [0, 1, 2]


@pytest.mark.parametrize("method", ["simo", "moco", "simclr", "simco", "simmoco"])
def test_help_does_not_wait_for_torch(method: str) -> None:
    script = Path(training.__file__).parents[1] / f"train_{method}.py"
    code = f"""
import runpy, sys
sys.argv = ["train_{method}.py", "--help"]
sys.path.insert(0, {str(script.parent)!r})
try:
    runpy.run_path({str(script)!r}, run_name="__main__")
finally:
    slow = sorted({{"torch", "torchvision", "lightning_fabric", "numpy", "sklearn", "eqco_loss"}} & set(sys.modules))
    print("imported:", *slow)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--base-lr" in done.stdout
    assert done.stdout.endswith("imported:\n")


def test_the_profile_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every phase of MoCo's step takes time, and the parts on the host are no longer than the whole."""
    folder = tmp_path / "images"
    for split, label, name in itertools.product(("train", "test"), "ab", range(16)):
        path = folder / split / label / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (16 * name, 0, 0)).save(path)
    words = [f"--data-dir={folder}", "--augment=device", "--arch=small", "--batch-size=8", "--queue-size=16"]
    words += ["--norm=batch", "--device=cpu", "--workers=0"]
    trace = tmp_path / "trace.json"
    profile_step.main(["--warmup=1", "--steps=2", f"--trace={trace}", "moco", *words])
    printed = capsys.readouterr().out
    found = {name: float(ms) for name, ms in re.findall(r"^([a-z ]+?) +(\d+\.\d+) +\d+%$", printed, re.MULTILINE)}
    whole = found.pop("whole step")
    assert set(found) == set(profile_step.PHASES)
    assert all(0 < ms < whole for ms in found.values()), printed
    assert found["augmentation"] < found["data"]
    assert trace.stat().st_size > 0
