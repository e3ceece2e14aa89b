"""Every script of examples/dropin beside the real package: two trainings of ten steps, equal at every step."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tyro

from eqco_loss import EqCoLoss

FOLDER = Path(__file__).parents[1] / "examples" / "dropin"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
STEPS = 10

# Lightning uses a torch function that is on its way out, and has advice for machines with more than this asks for.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]


def load(script: str) -> ModuleType:
    """In this process: each of these packages takes seconds to import."""
    spec = importlib.util.spec_from_file_location(f"dropin_{script}", FOLDER / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def largest_difference(script: ModuleType) -> float:
    losses: list[tuple[float, float]] = tyro.cli(script.main, args=["--steps", str(STEPS)])
    assert len(losses) == STEPS
    assert len({old for old, _ in losses}) == STEPS  # it trains
    return max(abs(new - old) for old, new in losses)


def test_the_folder() -> None:
    assert SCRIPTS == ["lightly_moco", "lightly_simclr", "lightning_module", "moco", "plain_pytorch"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_equal_to_the_original_at_every_step(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert largest_difference(load(script)) <= 1e-6
    assert sum(line.startswith("step") for line in capsys.readouterr().out.splitlines()) == STEPS


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_alpha_is_another_loss(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail."""
    module = load(script)

    def other(alpha: None, **settings: Any) -> EqCoLoss:
        return EqCoLoss(alpha=65536, **settings)

    monkeypatch.setattr(module, "EqCoLoss", other)
    assert largest_difference(module) > 0.1
