"""The mutual-information experiment, in a tiny form."""

import csv
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eqco_loss import EqCoLoss

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "papers"))

import mutual_information as mi
from mutual_information import Args, Cell

TINY: dict[str, Any] = {"quick": True, "steps": 50, "batches": 5, "workers": 0}


def test_the_table_is_the_papers() -> None:
    assert len(mi.TABLE) == len(set(mi.TABLE)) == 40
    assert len({cell.trained for cell in mi.TABLE}) == 35
    assert {cell.alpha for cell in mi.TABLE if cell.loss == "eqco"} == {512}
    assert all(cell.alpha == cell.negatives for cell in mi.TABLE if cell.loss == "infonce")
    assert (Cell(10, "infonce", 64).paper, Cell(10, "eqco", 64).paper, Cell(4, "infonce", 256).paper) == (4.1, 6.1, 3.4)
    assert len(mi.QUICK) == 6
    assert max(cell.negatives for cell in mi.QUICK) == 128


@pytest.mark.parametrize("truth", [2, 10])
def test_the_pairs_have_the_information_they_should(truth: float) -> None:
    x, y = mi.pairs(truth, 200_000, "cpu")
    correlation = torch.corrcoef(torch.cat([x.T, y.T]))
    rho = math.sqrt(1 - math.exp(-truth / 10))
    assert correlation[:20, 20:].diag().mean().item() == pytest.approx(rho, abs=2e-3)
    off = correlation - torch.eye(40) - rho * (torch.eye(40).roll(20, 0))
    assert off.abs().max().item() < 0.015
    assert y.std().item() == pytest.approx(1, abs=5e-3)
    assert -10 * math.log(1 - rho**2) == pytest.approx(truth)


@pytest.mark.parametrize("loss", ["infonce", "eqco"])
def test_the_loss_is_equation_3(loss: str) -> None:
    """Of raw dot products, each query against all other keys of its batch."""
    cell = Cell(6, loss, 64)
    torch.manual_seed(1)
    networks = torch.nn.ModuleList(mi.mlp() for _ in range(2))
    criterion = EqCoLoss(temperature=1.0, alpha=cell.alpha, normalize=False)
    torch.manual_seed(2)
    ours = mi.loss_of(criterion, networks, cell, "cpu").detach()
    torch.manual_seed(2)
    x, y = mi.pairs(6, 65, "cpu")
    logits = (networks[0](x) @ networks[1](y).T).double()
    logits.diagonal().sub_(math.log(cell.alpha / 64))
    assert ours.item() == pytest.approx(F.cross_entropy(logits, torch.arange(65)).item(), rel=1e-5)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_it_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mi.main(Args(out=tmp_path / "whole", **TINY))
    output = capsys.readouterr().out
    assert "0 trainings done, 6 to do" in output
    estimates = {mi.cell_of(row): float(row["estimate"]) for row in rows(tmp_path / "whole" / "cells.csv")}
    assert set(estimates) == set(mi.QUICK)
    for k in (64, 128):  # already: EqCo finds more than InfoNCE's bound of log(1 + K) allows
        assert estimates[Cell(6, "infonce", k)] < math.log1p(k)
    assert estimates[Cell(6, "eqco", 64)] > estimates[Cell(6, "infonce", 64)] + 0.3
    for cell, estimate in estimates.items():
        assert f"{cell.truth:3}  {cell.loss:7} {cell.negatives:4}  {estimate:.2f}  {cell.paper:.1f}" in output
    near = sum(abs(estimate - cell.paper) <= 0.15 for cell, estimate in estimates.items())
    assert f"{near} of 6 within 0.15 of the paper" in output
    curves = rows(tmp_path / "whole" / "curves.csv")
    assert len(curves) == 6 * 50
    assert float(curves[49]["estimate"]) > float(curves[0]["estimate"])

    real, calls = mi.train, 0

    def stop_at_the_third(cell: Cell, args: Args) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(cell, args)

    monkeypatch.setattr(mi, "train", stop_at_the_third)
    with pytest.raises(SystemExit) as stop:
        mi.main(Args(out=tmp_path / "stopped", **TINY))
    assert stop.value.code == 130
    assert len(rows(tmp_path / "stopped" / "cells.csv")) == 2
    monkeypatch.undo()
    mi.main(Args(out=tmp_path / "stopped", **TINY))
    assert "2 trainings done, 4 to do" in capsys.readouterr().out
    for name in ("cells.csv", "curves.csv"):
        assert rows(tmp_path / "stopped" / name) == rows(tmp_path / "whole" / name)
    for name in ("table.png", "curves.png"):
        assert (tmp_path / "stopped" / name).read_bytes().startswith(b"\x89PNG")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="steps: expected 50 or more, got 10"):
        mi.main(Args(out=tmp_path, steps=10))
    (tmp_path / "cells.csv").write_text("truth,loss,negatives,estimate,steps,batches,seed\n6,eqco,64,4.9,5000,1000,0\n")
    where = re.escape(str(tmp_path / "cells.csv"))
    with pytest.raises(SystemExit, match=where + " was made with steps 5000, batches 1000, seed 0. Give the same"):
        mi.main(Args(out=tmp_path, **TINY))
    (tmp_path / "cells.csv").write_text("truth,loss,negatives,estimate\n6,eqco,64,much\n")
    with pytest.raises(SystemExit, match=where + " cannot be read .ValueError"):
        mi.main(Args(out=tmp_path, **TINY))
