"""A run of the benchmarks: what comes first, what a failure leaves, and the ways of a GPU as far as a CPU can tell."""

import dataclasses
import functools
import importlib.metadata
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import measure, pages, peers, runner, scaling, step, variants, workloads
from benchmarks.measure import Limits, Timing, read_csv
from benchmarks.peers import PEERS
from benchmarks.registry import Loss, Peer, UnavailableError
from benchmarks.runner import Plan
from benchmarks.workloads import Case, Problem

S1, C1 = Case("S1", 9, 8, 16), Case("C1", 9, 8, 16)
SMALL = [Case("M1", 6, 40, 16), Case("M2", 6, 40, 16), Case("T1", 6, 40, 16), S1, C1, Case("S2", 7, 12, 16)]
SMALL.append(Case("P1", 9, 4, 16))


def the(name: str, case: Case = S1) -> Peer:
    return next(one for one in PEERS if one.name == name and one.wanted(case))


ENDLESS = Limits(1e18, 1e18)


def run(*wanted: Peer, machine: Limits = ENDLESS, **options: Any) -> list[measure.Row]:
    return runner.run(S1, list(wanted), "cpu", 1, 60.0, machine, **options)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(runner, "limits", lambda device, dtype, size: ENDLESS)
    return Plan(device="cpu", rounds=1, step_limit=60.0, out=tmp_path / "out.csv")


# --------------------------------------------------------------------------------------------------- order and deadline


def test_cases_come_by_worth(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """First ours, plain code and torch.compile of every case; then ours otherwise; then the others."""
    ran: list[tuple[str, list[str]]] = []

    def record(case: Case, wanted: list[Peer], *of: Any) -> list[measure.Row]:
        ran.append((case.workload, [one.name for one in wanted]))
        return [runner.row_of(case, one, "out of memory") for one in wanted]

    monkeypatch.setattr(runner, "run", record)
    runner.run_all([S1, C1], lambda case, one: True, plan._replace(deadline=1e6))
    assert [workload for workload, _ in ran] == ["S1", "C1"] * 3
    assert set(ran[0][1]) == {"eqco_loss", "eager cross entropy", "torch.compile"}
    assert set(ran[1][1]) == {"eqco_loss", "eager CLIP", "torch.compile"}
    assert ran[2][1][0] == "eager cross entropy"  # again, for the ratio
    assert all(name.startswith("eqco_loss, ") for name in ran[2][1][1:])
    assert "info-nce-pytorch" in ran[4][1]
    rows = read_csv(plan.out)
    expected = sorted(one.name for case in (S1, C1) for one in PEERS if one.wanted(case))
    assert sorted(row["peer"] for row in rows) == expected  # each once


def test_a_deadline_keeps_what_is_finished(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case takes 40 of the clock's seconds; for the third there is no time."""
    clock = [0.0]

    def slow(case: Case, wanted: list[Peer], *of: Any) -> list[measure.Row]:
        clock[0] += 40
        return [runner.row_of(case, one, "out of memory") for one in wanted]

    monkeypatch.setattr(runner, "run", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    runner.run_all([S1, C1, SMALL[0]], lambda case, one: True, plan._replace(deadline=100.0))
    assert {row["workload"] for row in read_csv(plan.out)} == {"S1", "C1"}
    firsts = {"eqco_loss", "torch.compile", "eager cross entropy", "eager CLIP"}
    assert {row["peer"] for row in read_csv(plan.out)} == firsts
    assert "no time for all ways of 3 cases: what is finished is written" in capsys.readouterr().out


def test_a_run_without_a_row_says_that_there_is_no_file(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cases of which nothing is wanted are not counted."""
    monkeypatch.setattr(runner, "attempt", lambda *of: [])
    runner.run_all([S1, C1], lambda case, one: case is S1 and one.name == "eqco_loss", plan._replace(deadline=-1.0))
    assert "no time for all ways of 1 cases" in capsys.readouterr().out
    runner.run_all([S1], lambda case, one: True, plan)
    assert "nothing was measured, and no file is written" in capsys.readouterr().out
    assert not plan.out.exists()


class Clock:
    """A clock of its own for a run: a slow way takes no time of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.now)

    def slow(self, name: str, seconds: float, first: float = 0.0) -> Peer:
        """A way that takes so long, and its first call so much longer."""
        known = the(name)

        def prepare(problem: Problem) -> Loss:
            loss = known.prepare(problem)
            self.now += first

            def late() -> Tensor:
                self.now += seconds
                return loss()

            return late

        return dataclasses.replace(known, prepare=prepare)


def test_a_way_that_had_not_begun_at_the_end_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there time for the others then, which is what their rows say."""
    clock = Clock(monkeypatch)
    ways = [clock.slow(name, 0.1, first=1.0) for name in ("eager cross entropy", "eager masked", "eqco_loss")]
    rows = run(*ways, end=2.0)
    assert [(row["peer"], row["status"].split(":")[0]) for row in rows] == [
        ("eager cross entropy", "no time"),
        ("eager masked", "no time"),
    ]
    assert rows[1]["status"] == "no time: its first step ended too late"
    assert clock.now < 2.5


@pytest.mark.parametrize(("left", "rounds"), [(3.0, None), (6.0, 3), (12.0, 8), (1e6, 15)])
def test_rounds_are_what_the_time_left_allows(left: float, rounds: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways of 0.3 s and 15 rounds would take 18 s and more; three rounds are the least."""
    clock = Clock(monkeypatch)
    ways = [clock.slow(name, 0.3) for name in ("eager cross entropy", "eqco_loss")]
    rows = runner.run(S1, ways, "cpu", 15, 60.0, ENDLESS, left)
    assert clock.now <= left
    if rounds is None:
        expected = "no time: a step took 0.3 s, and 1.8 s were left for all rounds"
        assert [row["status"] for row in rows] == [expected] * 2
    else:
        assert [(row["status"], row["rounds"]) for row in rows] == [("timed", str(rounds))] * 2


def test_a_way_that_takes_the_time_of_all_others_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """But plain code never alone."""
    clock = Clock(monkeypatch)
    names = ("eager cross entropy", "eager masked", "eqco_loss")
    rows = run(*(clock.slow(name, 9.0 if name == "eager masked" else 0.1) for name in names), end=30.0)
    assert [row["status"].split(":")[0] for row in rows] == ["timed", "no time", "timed"]
    assert clock.now < 30
    clock.now = 0.0
    rows = run(*(clock.slow(name, 9.0 if name == "eager cross entropy" else 0.1) for name in names), end=30.0)
    assert [row["status"].split(":")[0] for row in rows] == ["no time"]


def test_the_matrix_has_what_it_should() -> None:
    found = workloads.cases("cuda", workloads.DTYPES)
    assert len(found) == len(set(found))
    for n in (4096, 32768):
        assert {case.d for case in found if case.workload == "C1" and case.n == n} >= {512, 768, 1024}
    assert {case.dtype for case in found if case.workload == "M1"} == set(workloads.DTYPES)
    wide = next(case for case in found if case.workload == "S1" and case.d == 256)
    assert {"eqco_loss, triton", "eqco_loss, wide"} <= {one.name for one in PEERS if one.wanted(wide)}
    assert not the("eqco_loss, wide", wide).wanted(S1)
    for case in (*found, *workloads.cases("cpu", ("float32",)), *workloads.quick_cases(("float32",))):
        assert case.workload in workloads.WORKLOADS


def test_each_way_can_have_leaves_of_its_own() -> None:
    for case in (workloads.Case("S1", 8, 7, 16), workloads.Case("M2", 8, 32, 16)):
        problem = Problem(case, "cpu")
        other = problem.with_own_leaves()
        (ours,) = (one for one in PEERS if one.name == "eqco_loss" and one.wanted(case))
        with torch.no_grad():
            problem.query.zero_()
        got, truth = runner.step_of(other, ours.prepare(other)), other.truth()
        torch.testing.assert_close([x.detach().double() for x in got], truth, atol=1e-6, rtol=1e-5)


def test_scaling_begins_with_both_ends() -> None:
    sizes = [workloads.Case("M1", 1, k) for k in range(7)]
    for count in range(8):
        assert sorted(case.k for case in scaling.spread(sizes[:count])) == list(range(count))
    assert [case.k for case in scaling.spread(sizes)][:3] == [0, 6, 3]


def test_scaling_is_in_k_n_and_d(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Case] = []
    monkeypatch.setattr(scaling, "run_all", lambda cases, wants, plan: found.extend(cases))
    scaling.main(scaling.Args(device="cpu", largest_k=2**8, largest_n=2**8, largest_d=2**8))
    assert len(found) == len(set(found))
    assert sorted(case.k for case in found if case.workload == "M1") == [16, 64, 256]
    assert sorted(case.n for case in found if case.workload == "S1" and case.d == 128) == [64, 256]
    assert sorted(case.d for case in found if case.workload == "S1" and case.d != 128) == [32, 64, 256]
    assert {one.name for one in PEERS if one.wanted(S1) and scaling.wants(S1, one)} == {
        "eqco_loss",
        "torch.compile",
        "eager cross entropy",
        "eager masked",
    }


# ------------------------------------------------------------------------------------------------------------- failures


def breaking(after: int) -> Callable[[Problem], Loss]:
    """Right, until its memory is gone."""

    def prepare(problem: Problem) -> Loss:
        loss, calls = peers.eager_batch(problem), iter(range(after))

        def limited() -> Tensor:
            if next(calls, None) is None:
                raise torch.OutOfMemoryError("no memory")
            return loss()

        return limited

    return prepare


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_memory_that_ends_at_any_time_is_a_row(after: int) -> None:
    rows = run(the("eager cross entropy"), Peer("broken", ("S1",), breaking(after)), the("eqco_loss"))
    assert [row["status"] for row in rows] == ["timed", "out of memory", "timed"]


def test_a_case_that_does_not_fit_is_rows(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one is measured."""
    real = Problem

    def too_large(case: Case, device: str) -> Problem:
        if case is S1:
            raise torch.OutOfMemoryError("no memory")
        return real(case, device)

    monkeypatch.setattr(runner, "Problem", too_large)
    runner.run_all([S1, C1], lambda case, one: one.name.startswith("eager") or one.name == "eqco_loss", plan)
    rows = {(row["workload"], row["peer"]): row["status"] for row in read_csv(plan.out)}
    assert rows["S1", "eqco_loss"] == "the case as a whole: out of memory"
    assert rows["C1", "eqco_loss"] == "timed"


def test_a_lost_gpu_ends_the_run(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was finished stays; nothing is written over it by failures that say nothing."""

    def record(case: Case, wanted: list[Peer], *of: Any) -> list[measure.Row]:
        if case is C1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [runner.row_of(case, one, "timed") | {"limit_share": "1"} for one in wanted]

    monkeypatch.setattr(runner, "run", record)
    monkeypatch.setattr(runner, "lost", lambda device: True)
    monkeypatch.setattr(runner, "show", lambda case, rows: None)
    with pytest.raises(SystemExit) as end:
        runner.run_all([S1, C1], lambda case, one: one.name == "eqco_loss", plan)
    assert end.value.code == 1
    assert "the GPU is lost: C1 N=9 K=8 D=16 fails: RuntimeError: CUDA error" in capsys.readouterr().err
    assert [row["workload"] for row in read_csv(plan.out)] == ["S1"]


def test_rows_of_another_device_stay(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    for device, status in (("one", "timed"), ("two", "timed"), ("one", "wrong")):
        runner.add_rows(out, [runner.row_of(S1, the("eqco_loss"), status) | {"device": device}])
    rows = [(row["device"], row["status"]) for row in read_csv(out)]
    assert rows == [("two", "timed"), ("one", "wrong")]  # the newest last


# ----------------------------------------------------------------------------------------------------- machine's limits


def test_nothing_is_above_the_limit() -> None:
    """Where products and copies were measured too low, the fastest way is the limit."""
    rows = run(the("eager cross entropy"), the("eager masked"), the("eqco_loss"), machine=Limits(1.0, 1.0))
    assert max(float(row["limit_share"]) for row in rows) == 1.0
    assert all(0 < float(row["limit_share"]) <= 1 for row in rows)
    fastest = max(rows, key=lambda row: float(row["limit_share"]))
    assert float(fastest["limit_operations"]) == pytest.approx(1e3 * S1.operations / float(fastest["ms"]), rel=1e-3)


def test_a_limit_that_was_reached_is_kept(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """For later cases, also after one that has no row: operations of the dtype, and bytes of copies as large."""
    given = []

    def record(
        case: Case, wanted: list[Peer], device: str, rounds: int, step_limit: float, machine: Limits, *of: Any
    ) -> Any:
        given.append((machine.operations, machine.bytes))
        known = {"limit_operations": "5e18", "limit_bytes": "3e18"} if case is S1 else {}
        return [runner.row_of(case, one, "out of memory", known) for one in wanted]

    monkeypatch.setattr(runner, "run", record)
    runner.run_all([S1, C1, SMALL[0]], lambda case, one: one.name == "eqco_loss", plan)
    assert given == [(1e18, 1e18), (5e18, 3e18), (5e18, 1e18)]  # C1's arrays are as large as S1's


def test_a_gpus_limits_are_measured_anew_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a second of work, for its clock; an eighth of a small or busy GPU's memory is copied."""
    busy: list[bool] = []
    sizes: list[int] = []

    @functools.cache
    def most_bytes(device: str, size: int) -> float:
        sizes.append(size)
        return 1.0

    monkeypatch.setattr(measure, "keep_busy", lambda: busy.append(True))
    monkeypatch.setattr(measure, "products_a_second", lambda device, dtype, shape: 1.0 + len(busy))
    monkeypatch.setattr(measure, "most_bytes", most_bytes)
    free = iter((1e11, 1e11, 8e8))
    monkeypatch.setattr(measure, "available_bytes", lambda device: next(free))
    assert [measure.limits("cuda", "bfloat16", 1.0).operations for _ in range(3)] == [2.0, 3.0, 4.0]
    assert sizes == [2**31, 2**31, 10**8]


def test_the_best_is_taken_until_nothing_better_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that rises: the first five are slow, the next half as slow, and then it is steady."""
    seconds = iter([4.0] * 5 + [2.0] * 5 + [1.0] * 10)
    monkeypatch.setattr(measure, "wall_clock", lambda step, device: next(seconds))
    assert measure.best(lambda: None, "cpu", longest=1e9) == 1.0
    assert next(seconds, None) is None
    seconds = iter([4.0] * 5 + [2.0])
    assert measure.best(lambda: None, "cpu", longest=10.0) == 4.0


def test_the_limit_counts_what_a_way_may_convert_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is slow in bfloat16, and a GPU whose float32 can be six products in bfloat16."""
    rates = {torch.float32: 60.0, torch.bfloat16: 6.0, torch.float16: 3.0}
    monkeypatch.setattr(measure, "products_a_second", lambda device, dtype, shape: rates[dtype])
    most = measure.most_products.__wrapped__
    assert [most("cpu", dtype) for dtype in ("float32", "bfloat16", "amp", "float16")] == [60.0] * 4
    rates[torch.bfloat16] = 900.0
    assert [most("cuda", dtype) for dtype in ("float32", "high", "bfloat16", "amp")] == [150.0, 300.0, 900.0, 900.0]
    assert most("cuda", "float16") == 3.0


def test_needed_products() -> None:
    """Of N x K x D multiply-adds: two, three where keys learn; half of a symmetric matrix of logits is enough."""
    for workload, products in (("M1", 2), ("P1", 2), ("S1", 3), ("C1", 3)):
        assert Case(workload, 10, 20, 30).operations == products * 2 * 10 * 20 * 30
    assert Case("S2", 10, 18, 30).operations == 1.5 * 2 * 20 * 18 * 30


def test_the_real_limits_are_numbers() -> None:
    found = measure.limits("cpu", "float32", 1e5)
    assert found.operations > 1e8
    assert found.bytes > 1e7


# ------------------------------------------------------------------------------------------------------- ways of a GPU


@pytest.mark.parametrize("name", ["memeff CLIP", "memeff InfoNCE"])
def test_a_missing_peer_prints_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "memeff", None)
    monkeypatch.setattr(peers, "gpu_only", lambda problem: None)
    case = C1 if "CLIP" in name else S1
    with pytest.raises(UnavailableError, match=r'memeff is not installed .*: pip install -e "\.\[benchmarks\]"'):
        the(name, case).prepare(Problem(case, "cpu"))


def test_memeff_is_asked_for_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit rows, the temperature, no mask of false negatives, and the gradient's textbook scale."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Package:
        def __getattr__(self, name: str) -> Any:
            return lambda temperature, **options: asked.append((name, options | {"temperature": temperature}))

    monkeypatch.setattr(peers, "load", lambda package: Package())
    monkeypatch.setattr(peers, "gpu_only", lambda problem: None)
    for name, case in (("memeff CLIP", C1), ("memeff InfoNCE", S1)):
        the(name, case).prepare(Problem(case, "cpu"))
    common = {"normalized_inputs": True, "stable": False, "temperature": workloads.T}
    assert asked == [("MemoryEfficientCLIPLoss", common), ("MemoryEfficientQwen3Loss", common | {"margin": 2.0})]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.workload)
def test_a_graphed_callable_computes_from_its_arguments(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what a graph's replay is given: tensors that the loss did not know when it was prepared."""
    monkeypatch.setattr(variants, "gpu_only", lambda problem, why: None)
    monkeypatch.setattr(
        torch.cuda, "make_graphed_callables", lambda function, samples: (function(*samples), function)[1]
    )
    problem = Problem(case, "cpu")
    answer = runner.ready(the("eqco_loss, make_graphed_callables", case), problem, problem.truth(), 60.0)
    assert not isinstance(answer, str), answer
    assert answer.error < 1e-5
    assert answer.replays


def test_ours_is_compiled_in_both_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[str | None, bool]] = []

    def record(loss: Loss, dynamic: bool, mode: str | None) -> Loss:
        modes.append((mode, dynamic))
        return loss

    monkeypatch.setattr(torch, "compile", record)
    monkeypatch.setattr(variants, "gpu_only", lambda problem, why: None)
    problem = Problem(S1, "cpu")
    for name in ("eqco_loss, torch.compile", "eqco_loss, torch.compile reduce-overhead"):
        answer = runner.ready(the(name), problem, problem.truth(), 60.0)
        assert not isinstance(answer, str), answer
        assert answer.error < 1e-5
    assert modes == [(None, False), ("reduce-overhead", False)]


def test_a_package_without_a_distribution_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be imported from a folder; its rows are as good."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert the("info-nce-pytorch").version == ""
    assert the("eqco_loss").version == ""


def test_a_replay_is_what_is_checked() -> None:
    """A way that is right until its third call, which is the first that replays what was recorded."""
    calls: list[bool] = []

    def prepare(problem: Problem) -> Loss:
        loss = peers.eager_batch(problem)

        def stale() -> Tensor:
            calls.append(True)
            return loss() if len(calls) < 3 else 1.5 * loss()

        return stale

    problem = Problem(S1, "cpu")
    for replays in (True, False):
        calls.clear()
        answer = runner.ready(Peer("stale", ("S1",), prepare, replays=replays), problem, problem.truth(), 60.0)
        assert isinstance(answer, str) == replays
        assert not replays or "wrong: relative error 5.0e-01" in str(answer)


def test_what_a_graph_writes_is_held_against_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one replay, by the same tolerance as the way itself."""
    off = [0.0]

    class Graph:
        def __init__(self, step: Callable[[], None]) -> None:
            step()

        def replay(self) -> None:
            written[0] += off[0]

    problem = Problem(S1, "cpu")
    truth, loss = problem.truth(), peers.eager_batch(problem)
    written = [x.detach() for x in runner.step_of(problem, loss)]
    monkeypatch.setattr(runner, "captured", Graph)

    def refusal(outputs: list[Tensor]) -> str:
        assert not outputs[0].requires_grad
        return runner.wrong(measure.relative_error(outputs, truth), "float32")

    assert isinstance(runner.right_graph(lambda: written, refusal), Graph)
    off[0] = 1e-3
    with pytest.raises(RuntimeError, match=r"wrong: relative error .*, over 2e-05"):
        runner.right_graph(lambda: written, refusal)


class Event:
    """Of a GPU whose clock is the number of calls."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **about: real(1, **about))
    for name, fake in (("Event", Event), ("_sleep", lambda cycles: None), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.usefixtures("fake_gpu")
def test_a_gpus_rounds_are_in_another_order_each() -> None:
    """Or the same call would always follow the one that leaves the clock lowest."""
    order: list[str] = []
    calls = {name: functools.partial(order.append, name) for name in "abcd"}
    found = measure.interleave_gpu(calls, 20)
    assert set(found) == set(calls)
    rounds = [tuple(order[start : start + 8 : 2]) for start in range(0, len(order), 8)]
    assert len(rounds) == 20
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 5


def test_a_flush_that_fails_leaves_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that has no room for what flushes L2."""

    def full(calls: dict[str, Any], rounds: int, cycles: int) -> None:
        raise torch.OutOfMemoryError("no memory")

    problem = Problem(S1, "cpu")
    loss = peers.eager_batch(problem)
    step = functools.partial(runner.step_of, problem, loss)
    for name, fake in (("interleave_gpu", full), ("kernels_launched", lambda call: 3)):
        monkeypatch.setattr(runner, name, fake)
    monkeypatch.setattr(runner, "right_graph", lambda step, refusal: torch.cuda.CUDAGraph.__new__(torch.cuda.CUDAGraph))
    monkeypatch.setattr(runner, "peak_extra_bytes", lambda call, device: 1000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ways = {name: runner.Way(loss, step, 0.0, 1.0, name == "graphs") for name in ("ours", "graphs")}
    found = runner.measure(ways, "cuda", 1, lambda outputs: "")
    assert {way.no_graph for way in found.values()} == {"no GPU time: out of memory"}
    assert all(way.graph is None and way.both.wall.median > 0 for way in found.values())


def test_the_variable_commit_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over that of a repository in which a copy happens to lie."""
    monkeypatch.setattr(measure, "_git", lambda *arguments: "abcdef0")
    monkeypatch.setenv("COMMIT", "1234567")
    assert measure.provenance("cpu")["commit"] == "1234567"
    monkeypatch.delenv("COMMIT")
    assert measure.provenance("cpu")["commit"] == "abcdef0+changes"
    monkeypatch.setattr(measure, "_git", lambda *arguments: "")
    assert measure.provenance("cpu")["commit"] == "unknown"


def test_what_broke_a_capture_is_told() -> None:
    """The error of the capture's end comes last and says little."""
    try:
        try:
            raise AssertionError("these tensors are of another stream\nand more")
        except AssertionError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
    except RuntimeError as failure:
        told = measure.no_graph_because(failure)
        failure.__context__ = torch.OutOfMemoryError("no memory")
        memory = measure.no_graph_because(failure)
    assert told == (
        "no CUDA graph: CUDA error: operation failed due to a previous error during capture; "
        "before it: these tensors are of another stream"
    )
    assert memory == "no memory for its graph"
    assert measure.no_graph_because(ValueError()) == "no CUDA graph: ValueError"


def test_why_there_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: one is captured, one waits for the host, one is too large, and one is graphs already."""
    failures: dict[str, Exception] = {
        "waits": RuntimeError("called a synchronizing CUDA operation"),
        "waits otherwise": RuntimeError("CUDA error: operation not permitted when stream is capturing"),
        "large": torch.OutOfMemoryError("no memory"),
        "other": RuntimeError("something\nelse"),
        "refuses": AssertionError("a check of a package's own"),
    }
    problem = Problem(S1, "cpu")
    loss = peers.eager_batch(problem)
    names = ("graph", *failures, "wrong", "replays")
    called: list[str] = []
    steps = {name: (lambda name=name: called.append(name) or [loss().clone()]) for name in names}  # type: ignore[func-returns-value]
    ways = {name: runner.Way(loss, steps[name], 0.0, 1.0, name == "replays") for name in names}

    class Graph:
        def replay(self) -> None:
            pass

    def captured(call: Callable[[], None]) -> Graph:
        call()
        if called[-1] in failures:
            raise failures[called[-1]]
        return Graph()

    def refusal(outputs: list[Tensor]) -> str:
        assert not outputs[0].requires_grad
        return "wrong: so much" if called[-1] == "wrong" else ""

    def gpu(calls: dict[str, Any], rounds: int, cycles: int = measure.REPLAY) -> dict[str, tuple[Timing, Timing]]:
        return {name: (Timing(2e-5, 2e-5, 2e-5),) * 2 for name in calls}

    for name, fake in (("captured", captured), ("interleave_gpu", gpu), ("kernels_launched", lambda call: 3)):
        monkeypatch.setattr(runner, name, fake)
    monkeypatch.setattr(runner, "peak_extra_bytes", lambda call, device: 1000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = runner.measure(ways, "cuda", 1, refusal)
    assert {name: way.no_graph for name, way in found.items()} == {
        "graph": "",
        "waits": "waits for the host",
        "waits otherwise": "waits for the host",
        "large": "no memory for its graph",
        "other": "no CUDA graph: something",
        "refuses": "no CUDA graph: a check of a package's own",
        "wrong": "no CUDA graph: wrong: so much",
        "replays": "",
    }
    assert {name for name, way in found.items() if way.graph} == {"graph", "replays"}
    assert {name for name, way in found.items() if way.peak_bytes is None} == {"replays"}
    row = runner.figures(found["waits"], found["graph"], S1, ENDLESS)
    assert row["no_graph"] == "waits for the host"
    assert float(row["host_ms"]) > 0
    assert "graph_us" not in row
    assert runner.figures(found["replays"], found["graph"], S1, ENDLESS)["times_faster_graph"] == "1.000"


def test_engines_refuse_by_name() -> None:
    case = Case("C1", 9, 8, 256)
    for name in ("triton", "wide"):
        peer = the(f"eqco_loss, {name}", case)
        with pytest.raises(UnavailableError, match="no CPU path"):
            peer.prepare(Problem(case, "cpu"))


# -------------------------------------------------------------------------------------------------- a training step


def test_the_loss_inside_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one model; the other's rows stay."""
    monkeypatch.setattr(step, "ALONE", ("eqco_loss",))
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    out = tmp_path / "step.csv"
    for models in (("resnet50",), ("resnet18",), ("resnet18",)):
        step.main(step.Args(models=models, batch_size=2, image_size=32, rounds=1, out=out))
    assert not compiled
    step.main(step.Args(models=("resnet18",), batch_size=2, image_size=32, rounds=1, compiled=True, out=out))
    assert len(compiled) == 2
    rows = read_csv(out)
    of_compiled = [row["what"] for row in rows if row["what"].endswith(step.COMPILED)]
    assert [what.removesuffix(step.COMPILED) for what in of_compiled] == [
        f"the whole step, {name}, K = 1" for name in ("a product for a loss", "eager masked", "eqco_loss")
    ]
    rows = [row for row in rows if row["what"] not in of_compiled]
    whats = ["the whole step, a product for a loss, K = 1", "the whole step, eager masked, K = 1"]
    whats += ["the whole step, eqco_loss, K = 1", "eager masked, alone, K = 1", "eqco_loss, alone, K = 1"]
    whats += ["eager MoCo, alone, K = 65536", "eqco_loss, alone, K = 65536"]
    for model in ("resnet50", "resnet18"):
        mine = {row["what"]: row for row in rows if row["model"] == model}
        assert sorted(mine) == sorted(whats)
        inside = mine["the whole step, eqco_loss, K = 1"]
        share = float(inside["host_ms"]) / float(inside["ms"])
        assert float(inside["share_of_step"]) == pytest.approx(share, rel=0.01)
        assert 0 < share < 1
    assert len(rows) == 2 * len(whats)


def test_a_step_of_either_loss_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain code for SiMo's loss and ours, in the same step from the same weights."""
    weights = []
    for name in ("eager masked", "eqco_loss"):
        one = step.SimoStep("resnet18", 4, 32, "cpu")
        one(step.criteria(4, 3, "cpu")[name])
        assert len(one.marks) == 4
        weights.append(torch.cat([x.detach().flatten() for x in one.encoder.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    assert (weights[0] - torch.cat([x.flatten() for x in one.key_encoder.parameters()])).abs().max() > 1e-6


def test_the_loss_of_a_step_is_under_autocast_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each loss comes after each other in some trial."""
    inside: list[bool] = []
    ran: list[str] = []

    class Autocast:
        def __init__(self, *of: Any, **how: Any) -> None: ...

        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *of: Any) -> None:
            inside.pop()

    one = step.SimoStep("resnet18", 2, 32, "cpu")
    monkeypatch.setattr(torch, "autocast", Autocast)

    def criterion(name: str) -> step.Criterion:
        def loss(query: Tensor, key: Tensor) -> Tensor:
            assert inside
            ran.append(name)
            return (query * key).sum()

        return loss

    one.compared({name: criterion(name) for name in "abc"}, 5)
    assert not inside
    trials = ["".join(ran[start : start + 3]) for start in range(0, len(ran), 3)]
    assert {"".join(sorted(trial)) for trial in trials} == {"abc"}
    assert len(set(trials)) > 2


def test_each_way_alone_has_a_time_of_the_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of its graph; and where it is one already, or cannot become one, around the call."""
    kinds: dict[str, int] = {}

    def captured(call: Any) -> Any:
        call()
        graphs.append(call)
        if len(graphs) == 1:
            raise RuntimeError("Cannot synchronize while capturing")
        return type("Graph", (), {"replay": staticmethod(call)})

    def gpu(calls: dict[str, Any], rounds: int, cycles: int) -> dict[str, tuple[Timing, Timing]]:
        kinds.update(dict.fromkeys(calls, cycles))
        return {name: (Timing(2e-5, 2e-5, 2e-5),) * 2 for name in calls}

    graphs: list[Any] = []
    ways = [the(name, Case("P1", 9, 4, 16)) for name in ("eager masked", "eqco_loss")]
    ways.append(replace(the("eqco_loss", Case("P1", 9, 4, 16)), name="eqco_loss, graphed", replays=True))
    monkeypatch.setattr(step, "PEERS", ways)
    monkeypatch.setattr(step, "ALONE", ("eqco_loss", "torch.compile", "eqco_loss, graphed"))
    monkeypatch.setattr(step, "Problem", lambda case, device: Problem(case, "cpu"))
    monkeypatch.setattr(step, "captured", captured)
    monkeypatch.setattr(step, "interleave_gpu", gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = step.alone(Case("P1", 9, 4, 16), "cuda", 1)
    assert {name: one.gpu for name, one in found.items()} == dict.fromkeys((one.name for one in ways), 2e-5)
    assert kinds == {"eager masked": measure.CALL, "eqco_loss": measure.REPLAY, "eqco_loss, graphed": measure.CALL}
    assert "eager masked, alone, K = 4: waits for the host" in capsys.readouterr().out


def test_a_step_that_does_not_fit_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of those of before; the next model runs, and pages can read the file."""
    real = step.measured

    def measured(model: str, *of: Any) -> list[measure.Row]:
        if model == "resnet50":
            raise torch.OutOfMemoryError("no memory")
        return real(model, *of)

    monkeypatch.setattr(step, "ALONE", ())
    monkeypatch.setattr(step, "measured", measured)
    out = tmp_path / "step-cpu.csv"
    step.main(step.Args(models=("resnet50", "resnet18"), batch_size=2, image_size=32, rounds=1, device="cpu", out=out))
    (row,) = (row for row in read_csv(out) if row["model"] == "resnet50")
    assert (row["what"], row["ms"], row["n"]) == ("the whole step, eqco_loss, K = 1", "", "2")
    assert any(row["model"] == "resnet18" for row in read_csv(out))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert "| out of memory |" in pages.in_a_step()
    assert "nan" not in pages.in_a_step()


def test_a_file_of_other_columns_ends_before_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "measured", lambda *of: pytest.fail("it was measured"))
    out = tmp_path / "step.csv"
    measure.write_csv(out, [{"model": "resnet18", "what": "something"}])
    with pytest.raises(SystemExit, match=r"step\.csv is cut, or has other columns than model, n, .*, date, rounds"):
        step.main(step.Args(device="cpu", out=out))
