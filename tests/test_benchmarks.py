"""Benchmarks: nothing wrong is timed, nothing is left out without a reason, and pages say what was measured."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import gpu_check, peers, ranks, registry, runner, scaling, step, tune, tune_wide, workloads
from benchmarks.measure import RESULTS, Limits, peak_extra_bytes, read_csv
from benchmarks.peers import PEERS
from benchmarks.registry import Loss, Peer
from benchmarks.workloads import Case, Problem
from eqco_loss.ops.triton import tables
from eqco_loss.ops.triton.tables import TileSize

SMALL = {
    "M1": Case("M1", 6, 40, 16),
    "R": Case("R", 5, 37, 12),
    "M2": Case("M2", 6, 40, 16),
    "T1": Case("T1", 6, 40, 16),
    "S1": Case("S1", 9, 8, 16),
    "C1": Case("C1", 9, 8, 16),
    "S2": Case("S2", 7, 12, 16),
    "P1": Case("P1", 9, 4, 16),
}
KERNELS = "no CPU path: its kernels are Triton's"
NO_CPU = {
    "cut-cross-entropy": KERNELS,
    "liger-kernel": KERNELS,
    "inf-cl": KERNELS,
    "memeff InfoNCE": KERNELS,
    "memeff CLIP": KERNELS,
    "eqco_loss, triton": KERNELS,
    "eqco_loss, wide": KERNELS,
    "eqco_loss, make_graphed_callables": "no CPU path: it is a CUDA graph",
}


def answer(one: Peer, case: Case, limit: float = 60.0) -> runner.Way | str:
    problem = Problem(case, "cpu")
    return runner.ready(one, problem, [x.detach() for x in problem.truth()], limit)


@pytest.mark.parametrize(
    ("one", "workload"),
    [
        pytest.param(one, w, id=f"{one.name}-{w}", marks=[pytest.mark.slow] if "torch_compile" in one.name else [])
        for one in PEERS
        for w in one.workloads
        if "torch.compile" not in one.name
    ],
)
def test_every_way_is_right_or_says_why(one: Peer, workload: str) -> None:
    got = answer(one, SMALL[workload])
    if one.name in NO_CPU:
        assert got == NO_CPU[one.name]
    elif one.name.endswith("CrossBatchMemory"):
        assert got == "another loss: its memory has the batch's own keys among the negatives"
    else:
        assert not isinstance(got, str), got
        assert got.error < 1e-5


@pytest.mark.parametrize("workload", ["M1", "S1", "S2", "P1", "T1"])
def test_the_truth_is_the_definition(workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row it is what it is at once."""
    problem = Problem(SMALL[workload], "cpu")
    whole = problem.truth()
    monkeypatch.setattr(workloads, "CHUNK", 1)
    for a, b in zip(whole, problem.truth(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_columns_are_the_same_problem() -> None:
    rows, columns = (Problem(dataclasses.replace(SMALL["M1"], layout=layout), "cpu") for layout in ("rows", "columns"))
    assert rows.queue is not None
    assert columns.queue is not None
    assert torch.equal(rows.queue, columns.queue)
    assert columns.queue.stride() == (1, 40)
    for one in PEERS:
        silent = one.name in NO_CPU or "compile" in one.name or "CrossBatch" in one.name
        if one.wanted(columns.case) and not silent:
            assert not isinstance(answer(one, columns.case), str)


def failing(problem: Problem) -> Loss:
    raise torch.OutOfMemoryError("no memory")


def wrong(problem: Problem) -> Loss:
    return lambda: 1.01 * peers.eager_batch(problem)()


def without_negatives(problem: Problem) -> Loss:
    """Right in value; its gradient is the positive's alone."""

    def loss() -> Tensor:
        q, k = F.normalize(problem.query.float()), F.normalize(problem.key.float())
        logits = q @ k.T / workloads.T
        return F.softplus(logits.detach().fill_diagonal_(-torch.inf).logsumexp(1).detach() - logits.diagonal()).mean()

    return loss


def missing(problem: Problem) -> Loss:
    return registry.load("nobody")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (failing, "out of memory"),
        (wrong, "wrong: relative error 1.0e-02, over 2e-05"),
        (missing, "nobody is not installed (No module named 'nobody_at_all'): pip install -e \".[benchmarks]\""),
        (
            lambda problem: lambda: torch.ones(2) @ torch.ones(3),
            "fails: RuntimeError: inconsistent tensor size, expected",
        ),
    ],
)
def test_what_cannot_be_timed_is_a_row(prepare: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PACKAGES, "nobody", ("nobody", "nobody_at_all"))
    broken = Peer("broken", ("S1",), prepare)
    ours = next(one for one in PEERS if one.name == "eqco_loss" and "S1" in one.workloads)
    eager = next(one for one in PEERS if one.name == "eager cross entropy" and "S1" in one.workloads)
    rows = runner.run(SMALL["S1"], [eager, broken, ours], "cpu", 1, 60.0, Limits(1e9, 1e9))
    assert [row["status"] for row in rows][::2] == ["timed", "timed"]
    assert rows[1]["status"].startswith(expected)
    assert rows[1]["ms"] == ""
    assert float(rows[0]["times_faster"]) == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "amp"])
def test_negatives_without_a_gradient_are_found_out(dtype: str) -> None:
    """At the size that is timed, where each of many negatives pulls little."""
    for case in (Case("S1", 1024, 1023, 128, dtype), Case("S1", 64, 63, 128, dtype)):
        assert "wrong: relative error" in str(answer(Peer("positives", ("S1",), without_negatives), case))


@pytest.mark.parametrize("cut", [0.3, 0.8, 0.99])
def test_a_cut_csv_is_found_before_anything_runs(cut: float, tmp_path: Path) -> None:
    text = (RESULTS / "cpu.csv").read_text()
    (tmp_path / "cut.csv").write_text(text[: int(cut * len(text))].rsplit(",", 2)[0])
    (tmp_path / "folder.csv").mkdir()
    for name, message in (("cut.csv", "is cut, or has other columns"), ("folder.csv", "cannot be written")):
        with pytest.raises(SystemExit, match=message):
            command.main(command.Args(quick=True, out=tmp_path / name))


def test_too_slow_and_too_large_are_rows() -> None:
    eager = next(one for one in PEERS if one.name == "eager cross entropy" and "S1" in one.workloads)
    assert "too slow: a step took" in str(answer(eager, SMALL["S1"], limit=0.0))
    huge = dataclasses.replace(eager, logits=1e15)
    assert "GB, over four fifths of" in str(answer(huge, SMALL["S1"]))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts of the matrix, one after the other, in one CSV; a second time, its rows are replaced."""
    monkeypatch.setattr(command, "quick_cases", lambda dtypes: [SMALL["P1"], SMALL["T1"]])
    monkeypatch.setattr(runner, "limits", lambda device, dtype, size: Limits(1e9, 1e9))  # the real ones take seconds
    args = command.Args(quick=True, peers=("eager dual",), out=tmp_path / "out.csv", rounds=1)
    for part in (("T1",), ("P1",), ("P1",)):
        command.main(dataclasses.replace(args, workloads=part))
    rows = read_csv(tmp_path / "out.csv")
    assert [(r["workload"], r["peer"]) for r in rows] == [
        ("T1", "eager dual temperature"),
        ("T1", "eqco_loss"),
        ("P1", "eager masked"),
        ("P1", "eqco_loss"),
    ]
    assert all(r["status"] == "timed" and float(r["ms"]) > 0 and r["commit"] and r["torch"] for r in rows)
    assert "SiMo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workloads": ("M7",)}, "workloads: unknown M7; known: M1, R, M2, T1, S1, C1, S2, P1"),
        ({"peers": ("nccl",)}, "peers: unknown nccl; known: eager MoCo, "),
        ({"dtypes": ("int8",)}, "dtypes: unknown int8; known: float32, high, bfloat16, float16, amp"),
        ({"rounds": 0}, "rounds: expected more than 0, got 0"),
        ({"deadline": 0.0}, "deadline: expected more than 0, got 0.0"),
        ({"quick": True, "workloads": ()}, "there is no such case in float32"),
        ({"device": "cuda"}, "device: torch sees no GPU. Leave --device out"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message.replace("(", r"\(")):
        command.main(command.Args(**change))


def test_bad_input_of_the_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for run, message in (
        (lambda: step.main(step.Args(models=("vgg",))), "models: unknown vgg; known: resnet18, resnet50"),
        (lambda: step.main(step.Args(batch_size=1)), "batch_size: expected 2 or more, got 1"),
        (lambda: scaling.main(scaling.Args(deadline=-1.0)), "deadline: expected more than 0, got -1.0"),
        (lambda: scaling.main(scaling.Args(largest_k=1, largest_n=1, largest_d=1)), "largest_k, largest_n, largest_d"),
        (
            lambda: gpu_check.main(gpu_check.Args(skip=("all",))),
            "skip: unknown all; known: tests, cases, step, ways",
        ),
        (lambda: gpu_check.main(gpu_check.Args(workloads=("M7",))), "workloads: unknown M7; known: M1, R"),
        (lambda: gpu_check.main(gpu_check.Args()), "torch sees no GPU"),
    ):
        with pytest.raises(SystemExit, match=message):
            run()


def test_every_workload_has_its_baseline_and_ours() -> None:
    for name, kind in workloads.WORKLOADS.items():
        names = [one.name for one in PEERS if name in one.workloads]
        assert kind.baseline in names
        assert "eqco_loss" in names
        assert len(names) == len(set(names))


def test_memory_is_counted() -> None:
    x = torch.ones(100_000)
    assert 8e5 <= peak_extra_bytes(lambda: (x + 1) + 1, "cpu") < 8.1e5


# ------------------------------------------------------------------------------------------------------------- ranks


def test_ranks_moved_what_the_arithmetic_says() -> None:
    """To the byte where collectives were counted; on the wire, headers and a quiet machine allowed, to 3 %."""
    peaks: dict[tuple[str, int], float] = {}
    for row in read_csv(RESULTS / "ranks.csv"):
        count, n, d, form = int(row["ranks"]), int(row["n"]), int(row["d"]), row["form"]
        assert form in ranks.FORMS
        expected = ranks.traffic(count, n, d, form)
        assert (int(row["gathered_bytes"]), int(row["reduced_bytes"])) == (expected.gathered, expected.reduced)
        if count > 1:
            assert int(row["agreed_bytes"]) == expected.agreed
            assert int(row["wire_bytes_all_ranks"]) == pytest.approx(count * expected.sent(count), rel=0.03)
        peaks[form, count] = 1e6 * float(row["peak_extra_mb"])
    for form, copies in (("keys detached", 2), ("both gradients", 3)):
        rows, tile = 2 * n * d * 4, 2 * n * n * 4  # of the two ranks that 4 have more than 2
        assert peaks[form, 4] - peaks[form, 2] <= 1.01 * (copies * rows + tile)


def test_two_ranks_move_what_the_arithmetic_says() -> None:
    found = ranks.measured(2, 8, 4, "both gradients")
    assert {name: found[name] for name in ("gathered", "reduced", "agreed")} == ranks.traffic(
        2, 8, 4, "both gradients"
    )._asdict()


# ------------------------------------------------------------------------------------------------------------- tiles


def test_candidates_of_the_tables_are_checked_and_timed() -> None:
    """In the interpreter: every pass, by three tiles; one that is wrong is found out."""
    pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch on Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = tune.passes("float16", 16, device, m=4, k=90, n=6)
    assert tuple(every) == tune.PASSES
    some: list[TileSize | None] = [None, TileSize(32, 32, 4, 2), TileSize(64, 16, 4, 1)]
    for one in every.values():
        found = tune.tried(one, some, (1.0, 2.0), "float16")
        assert [callable(step) for _, _, step in found] == [True] * 6, found
    step = found[0][2]
    assert callable(step)
    assert tune.timed({3: step}, 2, device)[3][0].median > 0
    forward = every["M1 forward"]

    def wrong(tile: TileSize | None) -> tuple[Tensor, ...]:
        return forward(tile) if tile is None else tuple(2 * x for x in forward(tile))

    assert "differs by" in str(tune.tried(wrong, some[:2], (1.0,), "float16")[1][2])


@pytest.mark.parametrize("dtype", ["amp", "bfloat16"])
def test_candidates_of_the_wide_engine_are_checked_and_timed(dtype: str) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch on Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = tune_wide.passes(tune_wide.Problem(dtype, 16, 20, device))
    assert tuple(every) == tune_wide.PASSES
    for name, one in every.items():
        assert None in tune_wide.candidates(name)
        some = tune_wide.Rows(64, 4) if name == "wide rows" else tune_wide.Candidate(32, 32, 16, 4, 1, 2)
        found = tune.tried(one, [None, some], (1.0,), dtype)
        assert [callable(step) for _, _, step in found] == [True] * 2, found


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        tune.main(tune.Args())
    with pytest.raises(SystemExit, match="known: M1 forward"):
        tune.main(tune.Args(passes=("M7",)))
    with pytest.raises(SystemExit, match="multiply halves"):
        tune.main(tune.Args(passes=("wide weights",), dtype="float32"))
    with pytest.raises(SystemExit, match="for the wide passes"):
        tune.main(tune.Args(dtype="amp"))


def test_the_tiles_of_a_dtype() -> None:
    half, whole = tune.tiles("bfloat16"), tune.tiles("float32")
    assert half[0] is None
    assert set(half) < set(whole)
    assert tables.forward_tile(torch.bfloat16, 128, 256, 90, plain=True) in half
    assert tables.keys_tile(torch.bfloat16, 128, 4096, 90) in half
