"""Grids of runs and the gradient norm, in a tiny form."""

import csv
import json
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]

from eqco_loss import EqCoLoss, MomentumQueue

from .scripts import EXAMPLES, Started, make_images

sys.path.insert(0, str(EXAMPLES))
sys.path.insert(0, str(EXAMPLES / "papers"))

import gradient_norm
import results_page
import sweep
import train_moco
import train_simo
from pretrain import arguments
from pretrain.norms import shuffled
from pretrain.run import write_rows
from sweeps import pool
from sweeps.grids import DEFAULTS, GRIDS, NAMES, Grid, Setting
from sweeps.jobs import RESULTS, Args, Job, jobs_of, results_of, words_of


def refuse(*arguments: Any, **more: Any) -> None:
    raise AssertionError("nothing is to be run")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def all_jobs(args: Args) -> list[Job]:
    return [job for jobs in jobs_of(args, GRIDS[args.grid]).values() for job in jobs]


# ---------------------------------------------------------------------------------------------- the grids


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dataset", [None, "digits", "cifar10"])
def test_a_command_gives_the_arguments_of_its_run(grid: str, dataset: Any) -> None:
    own = GRIDS[grid].dataset
    if "-" in grid and dataset == "digits" != own:
        pytest.skip("a grid of CIFAR's")
    jobs = all_jobs(Args(grid=grid, dataset=dataset, data_dir=None if (dataset or own) == "digits" else Path("d")))
    for job in jobs:
        words = words_of(job)
        assert Path(words[1]).name == f"train_{job.method}.py"
        defaults = train_moco.defaults(None) if job.method == "moco" else DEFAULTS[job.method]
        assert arguments.parse(words[2:], defaults, None) == job.args
        arguments.check(job.args)
    by_directory = {job.directory: job.args for job in jobs}
    assert all(by_directory[job.directory] == job.args for job in jobs)  # no two runs share a directory
    assert len(by_directory) == len({tuple(job.key.values()) for job in jobs})


def test_the_grids_are_the_papers() -> None:
    digits = all_jobs(Args(grid="digits-k"))
    assert len(digits) == 30
    assert {(job.key["k"], job.key["alpha"], job.key["seed"]) for job in digits} == {
        (str(k), str(alpha), str(seed)) for k in (2, 4, 16, 64, 127) for alpha in (k, 256) for seed in range(3)
    }
    cifar = all_jobs(Args(grid="cifar10-k"))
    assert [sum(job.method == method for job in cifar) for method in ("simo", "moco")] == [8, 10]
    assert len({job.directory for job in cifar}) == 17  # at K = 4096 EqCo that mimics 4096 is InfoNCE
    dual = all_jobs(Args(grid="cifar100-dual"))
    assert [(job.method, job.args.batch_size) for job in dual[:4]] == [
        ("simco", 256), ("simmoco", 256), ("moco", 256), ("simco", 64),
    ]  # fmt: skip
    assert {(job.args.epochs, job.args.arch, job.args.recipe) for job in dual} == {(200, "resnet18", "simco")}
    assert all(job.args.online_probe and not job.probe for job in dual)
    settings = GRIDS["cifar100-dual"].settings("cifar100")
    assert [s.paper for s in settings if s.x == 256] == [58.35, 54.11, 53.28]
    papers = {grid: [s.paper for s in GRIDS[grid].settings("digits")] for grid in ("alpha", "momentum", "norm")}
    assert papers["alpha"] == [68.0, 68.1, 68.1, 68.4, 68.5, 67.0, 67.1, 67.6, 67.3, 67.5, 62.0, 65.3]
    assert (papers["momentum"], papers["norm"]) == ([62.1, 64.4], [58.8, 64.4])


def test_the_quick_grids_are_of_minutes() -> None:
    quick = all_jobs(Args(grid="cifar10-quick"))
    assert {(job.key["k"], job.key["alpha"]) for job in quick} == {
        (str(k), str(alpha)) for k in (4, 16, 255) for alpha in (k, 256)
    }
    assert len(quick) == 6
    alike = {(job.method, job.args.dataset, job.args.epochs, job.args.seed) for job in quick}
    assert alike == {("simo", "cifar10", 40, 0)}
    small = all_jobs(Args(grid="cifar10-small"))
    assert {(job.key["k"], job.key["alpha"], job.args.arch, job.args.epochs) for job in small} == {
        ("4", alpha, "small", 10) for alpha in ("4", "256")
    }
    assert [job.args.seed for job in small] == [0, 1, 2] * 2
    dual = all_jobs(Args(grid="cifar100-quick"))
    assert [job.method for job in dual] == ["simco", "simmoco", "moco"]
    assert {(job.args.dataset, job.args.batch_size, job.args.epochs) for job in dual} == {("cifar100", 256, 40)}
    assert all(job.args.online_probe for job in dual)
    (long,) = all_jobs(Args(grid="cifar10-long"))
    assert isinstance(long.args, train_simo.Args)
    assert (long.method, long.args.dataset, long.args.epochs, long.args.symmetric) == ("simo", "cifar10", 200, True)


# ---------------------------------------------------------------------------------------------- running them


def test_a_grid_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places: dict[str, Any] = {"run_dir": tmp_path / "runs", "out": tmp_path / "out"}
    args = Args(grid="norm", epochs=1, seeds=1, limit=128, device="cpu", **places)
    found = tmp_path / "out" / "norm.csv"
    calls = 0

    def stop_at_the_second(*words: Any, **more: Any) -> Started:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return Started(*words, **more)

    monkeypatch.setattr(pool, "started", stop_at_the_second)
    with pytest.raises(SystemExit) as stop:
        sweep.main(args)
    assert stop.value.code == 130
    first = rows(found)
    assert len(first) == 1
    assert "[1/2] SiMo, k 16, alpha 256" in capsys.readouterr().out

    monkeypatch.setattr(pool, "started", Started)
    sweep.main(args)
    output = capsys.readouterr().out
    assert "1 runs done, 1 to do" in output
    assert "[2/2]" in output
    table = rows(found)
    assert table[0] == first[0]
    assert [row["norm"] for row in table] == ["split", "batch"]
    for row, job in zip(table, all_jobs(args), strict=True):
        metrics = rows(job.directory / "metrics.csv")
        assert float(row["knn"]) == pytest.approx(float(metrics[-1]["knn"]), abs=1e-3)
        assert float(row["train_seconds"]) == pytest.approx(float(metrics[-1]["seconds"]), abs=0.06)
        assert 0 < float(row["probe"]) <= 100
        assert "torch" in row["versions"]
        assert row["device"].endswith("threads")
    assert table[0]["knn"] != "" != table[1]["knn"]

    monkeypatch.setattr(pool, "started", refuse)
    sweep.main(args)
    assert "2 runs done, 0 to do" in capsys.readouterr().out
    found.unlink()  # the run directories tell it again
    sweep.main(args)
    assert rows(found) == table
    for directory in (tmp_path / "runs").rglob("row.json"):
        directory.unlink()
    sweep.main(replace(args, draw_only=True, run_dir=tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()
    assert (tmp_path / "out" / "norm.png").read_bytes().startswith(b"\x89PNG")


def test_a_try_leaves_the_published_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CSV, table and figure once took their place."""
    published = {path.name: path.read_bytes() for path in RESULTS.iterdir()}
    monkeypatch.setattr(pool, "started", Started)
    sweep.main(Args(grid="momentum", seeds=1, epochs=1, limit=128, device="cpu", run_dir=tmp_path))
    assert sorted(path.name for path in (tmp_path / "tries").iterdir()) == [
        "momentum.csv", "momentum.md", "momentum.png",
    ]  # fmt: skip
    assert {path.name: path.read_bytes() for path in RESULTS.iterdir()} == published
    assert results_of(Args()) == results_of(Args(dataset="cifar10", jobs=2, time_limit=3)) == RESULTS
    tries: tuple[dict[str, Any], ...] = ({"seeds": 1}, {"epochs": 1}, {"limit": 9}, {"arch": "small"})
    assert all(results_of(Args(**how)) == Path("runs/sweep/tries") for how in (*tries, {"probe_epochs": 1}))
    assert results_of(Args(epochs=1, out=tmp_path)) == tmp_path


@pytest.mark.parametrize(("norm", "mixed"), [("split", True), ("batch", False)])
def test_the_keys_of_simo_are_mixed_for_shuffling_bn(
    norm: Any, mixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table 7 is of a key that sees other rows' statistics than its query."""
    orders = []

    def recorded(encode: torch.nn.Module, views: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        orders.append(generator.initial_seed())
        return shuffled(encode, views, generator)

    monkeypatch.setattr("pretrain.norms.shuffled", recorded)
    train_simo.main(
        train_simo.Args(norm=norm, limit=128, epochs=2, probe=False, device="cpu", workers=0, run_dir=tmp_path)
    )
    assert len(set(orders)) == len(orders) == (2 if mixed else 0)  # one a step


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, name in enumerate(["cat", "dog"]):
        make_images(folder / "train" / name, 9, i)
        make_images(folder / "test" / name, 3, 10 + i)
    return folder


@pytest.mark.slow
def test_the_papers_probes(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dual temperature's learns with the run; MoCo's follows it."""
    moco = Setting("moco", "MoCo v2", 8, {"batch_size": 8, "splits": 2, "queue_size": 16}, 53.28)
    simco = Setting("simco", "SimCo", 8, {"batch_size": 8}, 58.35)
    grid = Grid("tiny", lambda dataset: [moco, simco], "cifar100", "N", 1, 1, False, "CIFAR-100")
    monkeypatch.setitem(GRIDS, "tiny", grid)
    monkeypatch.setattr(pool, "started", Started)
    places: dict[str, Any] = {"data_dir": images, "run_dir": tmp_path / "runs", "out": tmp_path / "out"}
    args = Args(grid="tiny", arch="small", limit=16, device="cpu", probe_epochs=1, **places)
    sweep.main(args)
    first, second = rows(tmp_path / "out" / "tiny.csv")
    online = rows(all_jobs(args)[1].directory / "metrics.csv")[-1]["online_probe"]
    assert first["probe"] == ""
    assert float(second["probe"]) == pytest.approx(float(online), abs=1e-3)
    args = replace(args, linear_eval=True)  # it is run now, and nothing is trained again
    sweep.main(args)
    found = {row["method"]: row for row in rows(tmp_path / "out" / "tiny.csv")}
    probe = json.loads((all_jobs(args)[0].directory / "linear_eval.json").read_text())
    assert float(found["moco"]["probe"]) == pytest.approx(probe["top1"], abs=1e-3)
    assert (probe["arguments"]["protocol"], probe["arguments"]["augment"]) == ("moco", "device")
    assert found["simco"] == second
    table = (tmp_path / "out" / "tiny.md").read_text()
    assert f"| MoCo v2 | 8 | 1 | {float(first['knn']):.1f} | {probe['top1']:.1f} | 53.28 |" in table


class Endless:
    """A process that only ends when it is told to."""

    ended = 0

    def __init__(self, words: list[str], log: Path, environment: dict[str, str]) -> None:
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.returncode = -15
        Endless.ended += 1

    def wait(self) -> None:
        assert self.returncode == -15


def test_the_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = Args(grid="norm", time_limit=0.01, jobs=2, run_dir=tmp_path / "runs", out=tmp_path / "out")
    jobs = all_jobs(args)
    monkeypatch.setattr(pool, "started", Endless)
    begun = time.monotonic()
    assert list(pool.Pool(args, []).finished(jobs)) == []  # none is done: nobody knows how long one takes
    assert time.monotonic() - begun < 10
    assert Endless.ended == 2
    assert "0.01 minutes are over" in capsys.readouterr().out
    assert all(pool.spent(job) > 0.5 for job in jobs[:2])  # what they took is not forgotten

    monkeypatch.setattr(pool, "started", refuse)
    waiting = pool.Pool(replace(args, time_limit=1), [120.0, 130.0])
    assert list(waiting.finished(jobs)) == []
    assert "no time for another run of 125 s" in capsys.readouterr().out
    pool.spend(jobs[0], 100)
    assert not waiting.too_late(jobs[0])  # the rest of it fits
    assert waiting.eta(4) == "4 left, about 4 min"


@pytest.mark.slow
def test_a_run_that_the_limit_stopped_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its checkpoint, and ends as one that was never stopped."""

    class Stopped(Started):
        """The limit is over when it has a checkpoint."""

        def poll(self) -> int | None:
            if next((tmp_path / "runs").rglob("checkpoint.pt"), None) is not None:
                monkeypatch.setattr(time, "monotonic", lambda: real() + 3600)
            return super().poll()

    real = time.monotonic
    setting = Setting("simo", "SiMo", 4, {"batch_size": 4, "num_negatives": 2})
    monkeypatch.setitem(GRIDS, "tiny", Grid("tiny", lambda dataset: [setting], "cifar10", "K", 1, 30))
    places: dict[str, Any] = {"run_dir": tmp_path / "runs", "out": tmp_path / "out"}
    args = Args(grid="tiny", data_dir=images, arch="small", device="cpu", **places)
    monkeypatch.setattr(pool, "started", Stopped)
    sweep.main(replace(args, time_limit=30))
    assert re.search(r"30 minutes are over\nNot all runs are done\. Continue with\n  ", capsys.readouterr().out)
    (job,) = all_jobs(args)
    assert 0 < torch.load(job.directory / "checkpoint.pt", weights_only=True)["epoch"] < 30
    monkeypatch.setattr(time, "monotonic", real)
    monkeypatch.setattr(pool, "started", Started)
    sweep.main(args)
    sweep.main(replace(args, run_dir=tmp_path / "whole", out=tmp_path / "whole"))
    (whole,) = all_jobs(replace(args, run_dir=tmp_path / "whole"))
    tables = [rows(directory / "metrics.csv") for directory in (job.directory, whole.directory)]
    found = [[(row["loss"], row["knn"]) for row in table] for table in tables]
    assert len(found[0]) == 31
    assert found[0] == found[1]


def test_a_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Endless):
        def __init__(self, words: list[str], log: Path, environment: dict[str, str]) -> None:
            self.returncode = 1
            log.write_text("starting\nerror: the loss of epoch 1 is nan.\n")

    monkeypatch.setattr(pool, "started", Failing)
    with pytest.raises(SystemExit, match=r"seed 0 failed: error: the loss of epoch 1 is nan\.\nSee .*log\.txt"):
        sweep.main(Args(grid="norm", run_dir=tmp_path / "runs", out=tmp_path / "out"))


# ---------------------------------------------------------------------------------------------- errors and drawing


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **more: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(pool, "started", refuse)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    places: dict[str, Any] = {"run_dir": tmp_path / "runs", "out": tmp_path / "out", "device": "cpu"}
    with pytest.raises(SystemExit, match=r"grid: expected one of digits-k, cifar10-k, cifar10-quick, .*got k\."):
        sweep.main(Args(grid="k", **places))
    with pytest.raises(SystemExit, match="jobs: expected more than 0, got 0"):
        sweep.main(Args(jobs=0, **places))
    with pytest.raises(SystemExit, match=r"does not hold cifar10, and it cannot be downloaded.*Give --data-dir"):
        sweep.main(Args(grid="cifar10-k", data_dir=tmp_path, **places))
    with pytest.raises(SystemExit, match="limit: expected at least 128 training images for a batch, got 64"):
        sweep.main(Args(limit=64, **places))
    with pytest.raises(SystemExit, match=r"digits-k\.csv has no run of this grid yet"):
        sweep.main(Args(draw_only=True, **places))
    (tmp_path / "out" / "digits-k.csv").write_text("method,knn\nsimo,much\n")
    with pytest.raises(SystemExit, match=r"digits-k\.csv cannot be read .ValueError"):
        sweep.main(Args(draw_only=True, **places))


@pytest.mark.parametrize("grid", GRIDS)
def test_drawn_from_the_csv(grid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = Args(grid=grid, seeds=2, draw_only=True, out=tmp_path)
    table = []
    for job in {job.directory: job for job in all_jobs(args)}.values():
        k, alpha = float(job.key["k"]), float(job.key["alpha"])
        knn = 80 - (2 * math.log2(4096 / k) if k == alpha else 0) + job.args.seed
        more = {"train_seconds": "9.0", "wall_seconds": "10.0", "device": "1 threads", "versions": "", "commit": ""}
        table.append({**job.key, "knn": f"{knn:.3f}", "probe": f"{knn + 5:.3f}", **more})
    write_rows(tmp_path / f"{grid}.csv", table)
    sweep.main(args)
    output = capsys.readouterr().out
    text = (tmp_path / f"{grid}.md").read_text()
    assert (tmp_path / f"{grid}.png").read_bytes().startswith(b"\x89PNG")
    assert text.split("\n\n`")[0] in output
    assert text.endswith(f"`python examples/papers/sweep.py --grid {grid} --seeds 2`\n")  # and no machine's paths
    settings = GRIDS[grid].settings(GRIDS[grid].dataset)
    assert sum(line.startswith(tuple(f"| {name} |" for name in NAMES.values())) for line in text.splitlines()) == len(
        settings
    )
    papers = [s.paper for s in settings if s.paper is not None]
    assert [float(value) for value in re.findall(r"\| ([\d.]+) \|$", text, re.MULTILINE)] == papers
    if grid == "digits-k":
        assert "| SiMo | 16 | EqCo, alpha = 256 | 2 | 80.5 ± 0.7 | 85.5 ± 0.7 | 68.1 |" in text
        assert "SiMo, EqCo, alpha = 256: against K = 127, K = 2 +0.0, K = 16 +0.0 points of kNN." in text
        assert "SiMo, InfoNCE: against K = 127, K = 2 -12.0, K = 16 -6.0 points of kNN." in text


# ---------------------------------------------------------------------------------------------- the gradient norm


def definition(queries: torch.Tensor, keys: torch.Tensor, negatives: list[torch.Tensor], t: float, a: float) -> Any:
    """Mean of |dL_i/dq_i| and of (2 / t)(1 - p_i), of one row after the other."""
    norms, bounds = [], []
    for query, key, others in zip(queries.double(), keys.double(), negatives, strict=True):
        q = (query / query.norm()).requires_grad_()
        k, n = key / key.norm(), F.normalize(others.double(), dim=1)
        loss = torch.log(1 + a / len(n) * torch.exp((n @ q - k @ q) / t).sum())
        norms.append(torch.autograd.grad(loss, q)[0].norm())
        bounds.append(2 / t * (1 - torch.exp(-loss.detach())))
    return float(torch.stack(norms).mean()), float(torch.stack(bounds).mean())


@pytest.mark.parametrize("alpha", [None, 256.0])
@pytest.mark.parametrize("queued", [False, True])
def test_the_gradient_norm_is_by_the_definition(alpha: float | None, queued: bool) -> None:
    queries, keys = 3 * torch.randn(9, 16), 2 * torch.randn(9, 16)
    queue = None
    negatives = [torch.stack([keys[(i + j) % 9] for j in range(1, 5)]) for i in range(9)]
    criterion = EqCoLoss(0.2, alpha=alpha, num_negatives=None if queued else 4)
    if queued:
        queue = MomentumQueue(4, 16)
        queue.enqueue(torch.randn(6, 16))
        negatives = [queue.keys] * 9
    found = float(gradient_norm.gradient_norm(criterion, queries.requires_grad_(), keys, queue))
    norm, bound = definition(queries.detach(), keys, negatives, 0.2, alpha or 4)
    assert found == pytest.approx(norm, rel=1e-5)
    assert found <= bound
    metrics = criterion.with_metrics(queries, keys, queue)
    assert float(metrics.gradient_norm_bound) == pytest.approx(bound, rel=1e-5)
    assert queries.grad is None


def test_gradient_norms_go_on_where_they_stopped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny: dict[str, Any] = {"epochs": 1, "every": 1, "batch_size": 16, "limit": 64, "negatives": (2, 8)}
    args = gradient_norm.Args(**tiny, device="cpu", out=tmp_path / "whole")
    gradient_norm.main(args)
    whole = rows(tmp_path / "whole" / "gradient_norm.csv")
    assert [(row["k"], row["alpha"], row["step"]) for row in whole[:5]] == [("2", "2.0", str(i)) for i in range(4)] + [
        ("2", "256.0", "0")
    ]
    assert len(whole) == 4 * 4
    assert all(0 < float(row["gradient_norm"]) <= float(row["bound"]) for row in whole)
    first = {row["alpha"]: float(row["gradient_norm"]) for row in whole if row["step"] == "0" and row["k"] == "2"}
    assert first["256.0"] > first["2.0"]  # from the same weights on the same views

    real, calls = gradient_norm.train, 0

    def stop_at_the_third(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(gradient_norm, "train", stop_at_the_third)
    stopped = gradient_norm.Args(**tiny, device="cpu", out=tmp_path / "stopped")
    with pytest.raises(SystemExit) as stop:
        gradient_norm.main(stopped)
    assert stop.value.code == 130
    monkeypatch.undo()
    capsys.readouterr()
    gradient_norm.main(stopped)
    assert "2 trainings done, 2 to do" in capsys.readouterr().out
    assert rows(tmp_path / "stopped" / "gradient_norm.csv") == whole
    assert (tmp_path / "stopped" / "gradient_norm.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"was made with epochs 1\. Give the same, or another --out"):
        gradient_norm.main(replace(stopped, epochs=2))


def test_gradient_norms_with_a_queue(images: Path, tmp_path: Path) -> None:
    queue: dict[str, Any] = {"dataset": "cifar10", "data_dir": images, "arch": "small", "negatives": (4, 32)}
    gradient_norm.main(
        gradient_norm.Args(**queue, alpha=32, epochs=1, every=1, batch_size=16, device="cpu", out=tmp_path)
    )
    found = rows(tmp_path / "gradient_norm.csv")
    assert [(row["k"], row["alpha"]) for row in found] == [("4", "4.0"), ("4", "32"), ("32", "32.0")]
    assert all(0 < float(row["gradient_norm"]) <= float(row["bound"]) for row in found)


def test_gradient_norms_of_bad_input(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="negatives: expected 1 to batch_size - 1 = 127, got 128"):
        gradient_norm.main(gradient_norm.Args(negatives=(128,), device="cpu", out=tmp_path))
    with pytest.raises(SystemExit, match="every: expected 1 or more, got 0"):
        gradient_norm.main(gradient_norm.Args(every=0, device="cpu", out=tmp_path))


# ---------------------------------------------------------------------------------------------- the page of results


def test_the_page_of_results_is_of_the_committed_files() -> None:
    """Every grid has its place. Run `python examples/papers/results_page.py` where this fails."""
    assert results_page.EXPECTED.keys() == GRIDS.keys()
    written = (EXAMPLES.parent / "docs" / "results.md").read_text()
    assert written == results_page.page(EXAMPLES / "results" / "sweep")
    for name in GRIDS:
        assert f"`python examples/papers/sweep.py --grid {name}`" in written


def test_a_grid_that_was_run_has_its_table_on_the_page(tmp_path: Path) -> None:
    empty = results_page.page(tmp_path)
    assert empty.count("Not run yet.") == len(GRIDS)
    table = "| norm | kNN |\n| --- | --- |\n| split | 1.0 |"
    (tmp_path / "norm.md").write_text(f"Table 7, digits\n\n{table}\n\n`command`\n")
    page = results_page.page(tmp_path)
    assert page.count("Not run yet.") == len(GRIDS) - 1
    figure = "![Table 7: shuffling BN (split) and SyncBN (batch)](../examples/results/sweep/norm.png)"
    assert f"{table}\n\n{figure}" in page
