"""What only a GPU can show of the training scripts: augmentation compiled, batches ahead, steps that do not wait.

python -m pytest tests/test_cuda_training.py
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_simo
from pretrain import training
from pretrain.augment import RECIPES, OnDevice

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", RECIPES)
def test_compiled_augmentation(name: str) -> None:
    """The views of a CPU, in at most ten kernels."""
    images = torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(0, 1000, 2)
    expected = OnDevice(RECIPES[name], 32)(images, seed=1, epoch=2, samples=rows, rows=rows)
    compiled, (images, rows) = OnDevice(RECIPES[name], 32, compiled=True), (images.cuda(), rows.cuda())
    views = compiled(images, seed=1, epoch=2, samples=rows, rows=rows)
    for ours, theirs in zip(views, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled(images, seed=1, epoch=2, samples=rows, rows=rows)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert 0 < len(kernels) <= 10, kernels


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_waits(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third step of an epoch on; the first ones compile, and copy what an epoch needs."""
    for index in range(96):
        path = tmp_path / "images" / ("test" if index % 4 == 0 else "train") / "ab"[index // 4 % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (2 * index, 0, 0)).save(path)
    real = training.Training.batches

    def batches(self: training.Training[Any]) -> Iterator[training.Batch]:
        inner = real(self)
        for step, batch in enumerate(inner):
            torch.cuda.set_sync_debug_mode("error" if step in range(2, self.steps - 1) else "default")
            yield batch
        assert self.done == self.steps > 4

    monkeypatch.setattr(training.Training, "batches", batches)
    words: dict[str, Any] = {"batch_size": 8, "epochs": 1, "arch": "small", "optimizer": "sgd", "probe": False}
    words |= {"augment": "device", "workers": 0, "dataset": "imagefolder", "data_dir": tmp_path / "images"}
    try:
        args = train_simo.Args(**words, num_negatives=4, compile=compiled, device="cuda", run_dir=tmp_path / "run")
        train_simo.main(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
