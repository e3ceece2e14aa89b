"""``benchmarks.gpu_check`` as far as a CPU can tell: what it runs and when, and what it says of what it did not run."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import goals, gpu_check, gpu_parts, gpu_tests, scaling, step, tune, tune_wide
from benchmarks.measure import RESULTS, Row, Timing, read_csv, write_csv
from benchmarks.peers import PEERS
from benchmarks.registry import Peer
from benchmarks.runner import Plan, add_rows, row_of
from benchmarks.workloads import Case
from eqco_loss import EqCoLoss
from tests.scripts import wait_for

GPU = {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "0000000", "date": "2026-01-02"}
OURS = next(one for one in PEERS if one.name == "eqco_loss")
RIVAL = next(one for one in PEERS if one.name == "torch.compile")
FIRST = goals.GOALS[0]


class Clock:
    """Parts take the seconds that they are said to, by a clock of their own; ``ran`` is what they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, costs: dict[str, Callable[[float], float]]) -> None:
        self.now, self.costs = 0.0, costs
        self.ran: list[str] = []
        self.given: dict[str, float] = {}
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        for name, fake in {
            "check_device": lambda device: None,
            "held": lambda: 0,
            "lost": lambda device: False,
        }.items():
            monkeypatch.setattr(gpu_check, name, fake)
        monkeypatch.setattr(gpu_check, "provenance", lambda device: GPU)
        monkeypatch.setattr(gpu_check, "run_tests", lambda processes, seconds, out: self.spend("tests", seconds))
        monkeypatch.setattr(gpu_check, "run_all", self.cases)
        monkeypatch.setattr(scaling, "main", lambda args: self.spend("scaling", args.deadline))
        monkeypatch.setattr(step, "main", lambda args: self.spend("compiled" if args.compiled else "step", 0.0))
        for name in ("engines", "tiles"):
            monkeypatch.setattr(gpu_check, name, partial(self.until, name))
        monkeypatch.setattr(gpu_check, "kernels", lambda goals, *rest: self.until("kernels", *rest))

    def spend(self, name: str, seconds: float) -> int:
        self.ran.append(name)
        self.given[name] = seconds
        self.now += self.costs[name](seconds)
        return 0

    def cases(self, chosen: Any, wants: Callable[..., bool], plan: Plan) -> None:
        assert plan.deadline is not None
        self.spend("cases" if wants(FIRST.case, OURS) else "ways", plan.deadline)

    def until(self, name: str, until: float, out: Path, leave: Any) -> None:
        self.spend(name, until - self.now)


SLOW = {  # as slow as each part may be: cases finish the one that they have begun
    "tests": lambda seconds: seconds + gpu_tests.LAST_WORDS,
    "cases": lambda seconds: min(seconds + 20, 1.1 * seconds),
    "ways": lambda seconds: min(seconds + 20, 1.1 * seconds),
    "step": lambda seconds: 25.0,
    "compiled": lambda seconds: 40.0,
    "engines": lambda seconds: min(seconds, 30.0),
    "tiles": lambda seconds: min(seconds, 30.0),
    "scaling": lambda seconds: 1.1 * seconds,
    "kernels": lambda seconds: min(seconds, 30.0),
}


@pytest.mark.parametrize("a_step", [10.0, 25.0, 35.0])
def test_slow_parts_leave_others_their_time(
    a_step: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts that seconds are kept for run, in order of worth, and the end comes before the deadline."""
    clock = Clock(monkeypatch, {**SLOW, "step": lambda seconds: a_step})
    assert gpu_check.main(gpu_check.Args(out=tmp_path)) == 0
    names = ["tests", "cases", "step", *(["step"] if a_step < 35 else []), "ways", "engines", "tiles"]
    assert [name for name in clock.ran if name not in ("compiled", "scaling")] == [*names, "kernels"]
    assert clock.given["tests"] == 150
    assert clock.given["ways"] >= 60
    assert clock.given["engines"] >= 30
    assert clock.now <= 540
    printed = capsys.readouterr().out
    for name in ("compiled", "scaling"):
        assert (name in clock.ran) != (f"no time for {name}" in printed)
    if a_step == 35:
        path = tmp_path / "step-gpu.csv"
        command = f"no time for step (resnet50): python -m benchmarks.step --models resnet50 --out {path}"
        assert command in printed
        assert command in (tmp_path / "goals.txt").read_text()


def test_quick_parts_leave_time_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    quick: dict[str, Callable[[float], float]] = {name: lambda seconds: 20.0 for name in SLOW}
    clock = Clock(monkeypatch, quick)
    assert gpu_check.main(gpu_check.Args(out=tmp_path)) == 0
    steps = ["step", "step"], ["compiled", "compiled"]
    assert clock.ran == ["tests", "cases", *steps[0], "ways", "engines", "tiles", *steps[1], "scaling", "kernels"]
    assert "no time for" not in capsys.readouterr().out


def test_a_short_deadline_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What is worth most gets most, and what is left out is told with the command that runs it alone."""
    clock = Clock(monkeypatch, SLOW)
    gpu_check.main(gpu_check.Args(out=tmp_path, skip=("tests", "scaling"), deadline=60.0))
    assert clock.ran[0] == "cases"
    assert clock.given["cases"] == pytest.approx(60 * 100 / 300 / 1.1)
    assert clock.now <= 65
    printed = capsys.readouterr().out
    assert "no time for step (resnet18): python -m benchmarks.step --models resnet18 --out" in printed
    gpu_check.main(gpu_check.Args(out=tmp_path, skip=("tests",), deadline=0.5))
    others = " ".join(name for name in gpu_check.PARTS if name != "cases")
    expected = f"no time for cases: python -m benchmarks.gpu_check --skip {others} --out {tmp_path}"
    assert expected in capsys.readouterr().out


def test_a_part_that_breaks_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """And the exit status tells, unless the tests' own does."""
    clock = Clock(monkeypatch, SLOW)

    def fail(*of: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(gpu_check, "engines", fail)
    assert gpu_check.main(gpu_check.Args(out=tmp_path)) == 1
    assert "RuntimeError: broken" in capsys.readouterr().out
    assert clock.ran[-1] == "kernels"
    monkeypatch.setattr(gpu_check, "run_tests", lambda *of: 3)
    assert gpu_check.main(gpu_check.Args(out=tmp_path)) == 3
    monkeypatch.setattr(gpu_check, "lost", lambda device: True)
    clock.ran.clear()
    gpu_check.main(gpu_check.Args(out=tmp_path, skip=("tests",)))
    assert clock.ran == ["cases"]
    assert "the GPU is lost" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(130)], ids=["here", "in cases"])
def test_whoever_stops_a_part_stops_all(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    clock = Clock(monkeypatch, SLOW)

    def stopped(*of: Any) -> None:
        raise stop

    monkeypatch.setattr(gpu_check, "run_all", stopped)
    assert gpu_check.main(gpu_check.Args(out=tmp_path)) == 130
    assert clock.ran == ["tests"]
    assert "18 not run" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpu.csv", "scaling-gpu.csv", "step-gpu.csv"])
def test_files_of_other_columns_are_found_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, SLOW)
    write_csv(tmp_path / name, [{"workload": "S1"}])
    with pytest.raises(SystemExit, match=f"{name} is cut, or has other columns than"):
        gpu_check.main(gpu_check.Args(out=tmp_path))
    assert not clock.ran


def test_without_torchvision_all_else_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = Clock(monkeypatch, SLOW)
    monkeypatch.delattr("benchmarks.step")
    monkeypatch.delitem(sys.modules, "benchmarks.step")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert gpu_check.main(gpu_check.Args(out=tmp_path)) == 0
    assert "no training steps without torchvision" in (printed := capsys.readouterr().out)
    assert 'pip install -e ".[benchmarks]"' in printed
    assert [name for name in clock.ran if name != "scaling"] == [
        "tests",
        "cases",
        "ways",
        "engines",
        "tiles",
        "kernels",
    ]


def ended(hang: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, whose cases hang in this way."""
    code = f"""
import ctypes, subprocess, sys, threading
from pathlib import Path
from benchmarks import gpu_check

{hang}

gpu_check.check_device = lambda device: None
gpu_check.held = lambda: 0
gpu_check.lost = lambda device: False
gpu_check.provenance = lambda device: {GPU!r}
gpu_check.run_all = hang
gpu_check.GRACE = 0.5
gpu_check.main(gpu_check.Args(deadline=2.0, skip=("tests", "step", "compiled"), out=Path({str(tmp_path)!r})))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_what_hangs_is_ended(tmp_path: Path) -> None:
    """With a child, neither of which heeds anything: the goals are told, and both are gone."""
    hang = """
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"

def hang(*of):
    print("child", subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
    while True:
        try:
            threading.Event().wait()
        except BaseException:
            pass
"""
    done = ended(hang, tmp_path)
    assert done.returncode == 124, done.stderr
    assert "the deadline has passed" in done.stdout
    assert "in hang" in done.stderr
    assert "18 not run" in done.stdout
    assert "18 not run" in (tmp_path / "goals.txt").read_text()
    (pid,) = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("child "))
    wait_for(lambda: not running(pid), 10)


def test_what_keeps_the_interpreter_to_itself_is_ended(tmp_path: Path) -> None:
    done = ended("def hang(*of): ctypes.PyDLL(None).sleep(60)", tmp_path)
    assert done.returncode == 1
    assert "in hang" in done.stderr
    assert "18 not run" in (tmp_path / "goals.txt").read_text()


# --------------------------------------------------------------------------------------------------------------- goals


def row(case: Case = FIRST.case, peer: Peer = OURS, status: str = "timed", **known: str) -> Row:
    return row_of(case, peer, status, known) | GPU


@pytest.mark.parametrize(
    ("ours", "told", "status"),
    [
        (row(graph_us="20"), "met", 0),
        (row(graph_us="30"), "missed", 0),
        (row(no_graph="waits for the host"), "waits for the host", 0),
        (row(), "no time of the GPU", 0),
        (row(status="wrong: relative error 3.6e-01, over 5e-02"), "wrong: relative error 3.6e-01, over 5e-02", 1),
        (row(status="fails: RuntimeError: no"), "fails: RuntimeError: no", 1),
        (row(status="out of memory"), "out of memory", 1),
        (row(status="the case as a whole: out of memory"), "the case as a whole: out of memory", 1),
        (row(graph_us="20") | {"device": "NVIDIA A100"}, "not run", 0),
        (row(graph_us="20") | {"commit": "1111111"}, "not run", 0),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_what_became_of_a_goal(
    before: bool, ours: Row, told: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A row of an earlier run says nothing, and a failure that comes again does."""
    Clock(monkeypatch, SLOW)
    rows = [ours, row(peer=RIVAL, graph_us="60")]
    path = tmp_path / "gpu.csv"
    if before:
        write_csv(path, [row(graph_us="1.5"), row(peer=RIVAL, graph_us="1.4")] if status == 0 else rows)
    monkeypatch.setattr(gpu_check, "run_all", lambda *of: add_rows(path, rows))
    assert gpu_check.main(gpu_check.Args(out=tmp_path, skip=tuple({*gpu_check.PARTS} - {"cases"}))) == status
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("M1 bfloat16 N=256"))
    assert line.endswith(told)
    assert bool(re.search(r"\d\.\d\d x", line)) == (told in ("met", "missed"))
    assert line in (tmp_path / "goals.txt").read_text()
    if before:
        gpu_check.main(gpu_check.Args(out=tmp_path, skip=gpu_check.PARTS))
        assert "18 not run" in capsys.readouterr().out  # nothing of before is of this run


def test_goals_are_those_of_one_gpu() -> None:
    text = goals.table([row(graph_us="20")], "NVIDIA A100")
    assert "The goals are those of an H200, and this is another GPU (NVIDIA A100)" in text
    assert not re.search(r"\b(met|missed)$", text.splitlines()[1])
    assert goals.table([row(graph_us="20")], "NVIDIA H200").endswith("1 met, 0 missed, 0 broken, 17 not run")


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("343 passed, 2 skipped in 61.02s", ("343", "0", "2")),
        ("1 failed, 342 passed in 61.02s (0:01:01)", ("342", "1", "0")),
        ("ERROR tests/test_cuda.py", ("", "", "")),
    ],
)
def test_a_gpus_tests_are_counted(line: str, expected: tuple[str, ...]) -> None:
    row = gpu_tests.counted(line, 1)
    assert tuple(row[name] for name in ("passed", "failed", "skipped")) == expected
    assert row["status"] == "1"


def test_tests_that_take_too_long_say_what_failed(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time\n\n\ndef test_wrong():\n    assert False\n\n\ndef test_slow():\n    time.sleep(60)\n"
    )
    log = tmp_path / "log.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rf", "-p", "no:cacheprovider", "test_slow.py"]
    with log.open("w") as out:
        assert gpu_tests.interrupted(command, 10, cwd=tmp_path, stdout=out) == 124
        assert gpu_tests.interrupted([sys.executable, "-c", "raise SystemExit(3)"], 30, stdout=out) == 3
    assert "FAILED test_slow.py::test_wrong" in log.read_text()


@pytest.mark.parametrize("ends", [False, True])
def test_no_process_of_the_tests_stays(ends: bool, tmp_path: Path) -> None:
    """Not even one that heeds no interrupt, and whether or not the one that started it ends in time."""
    child = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    parent = f"import os, subprocess, sys, time; one = subprocess.Popen([sys.executable, '-c', {child!r}], "
    parent += "stdout=subprocess.PIPE); one.stdout.readline(); print(one.pid, flush=True); "
    parent += "os._exit(3)" if ends else "time.sleep(60)"
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        assert gpu_tests.interrupted([sys.executable, "-c", parent], 5, stdout=out) == (3 if ends else 124)
    pid = int(log.read_text().split()[0])
    wait_for(lambda: not running(pid), 10)


def running(pid: int) -> bool:
    """A process that has ended may still be there for whoever adopts it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("told", "status", "expected"),
    [
        ("......\n!!! KeyboardInterrupt !!!\n6 passed in 22.64s\n", 124, "6 passed in 22.64s\ntests: status 124"),
        ("python: No module named pytest\n", 1, "No module named pytest"),
    ],
)
def test_what_became_of_the_tests_is_told(
    told: str, status: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def run(command: list[str], seconds: float, stdout: Any, **how: Any) -> int:
        stdout.write(told)
        return status

    monkeypatch.setattr(gpu_tests, "interrupted", run)
    monkeypatch.setattr(gpu_tests, "provenance", lambda device: {"device": "a GPU"})
    assert gpu_tests.run_tests(2, 1.0, tmp_path) == status
    assert expected in capsys.readouterr().out
    assert read_csv(tmp_path / "tests-gpu.csv")[0]["status"] == str(status)


def test_what_follows_waits_until_the_gpu_is_free(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock, after = [0.0], {"busy until": 3.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(gpu_check, "held", lambda: 5 * 10**9 if clock[0] < after["busy until"] else 10**9)
    gpu_check.wait_for_the_gpu(10**9)
    assert clock[0] == pytest.approx(3.0, abs=0.2)
    assert not capsys.readouterr().out
    after["busy until"] = 100.0
    gpu_check.wait_for_the_gpu(10**9)
    assert clock[0] == pytest.approx(13.0, abs=0.2)
    assert "another process holds 4.0 GB of the GPU" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- kernels, engines and tiles


@pytest.fixture
def parts_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would do is done by a CPU, or told."""

    def gpu(calls: dict[str, Any], rounds: int) -> dict[str, tuple[Timing, Timing]]:
        return {name: (Timing(2e-5, 2e-5, 2e-5), Timing(1e-5, 1e-5, 1e-5)) for name in calls}

    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda n, d, device: randn(n, d))
    monkeypatch.setattr(gpu_parts, "provenance", lambda device: GPU)
    monkeypatch.setattr(gpu_parts, "lost", lambda device: False)
    monkeypatch.setattr(gpu_parts, "free", lambda device: None)
    monkeypatch.setattr(gpu_parts, "captured", lambda call: type("Graph", (), {"replay": staticmethod(call)}))
    monkeypatch.setattr(gpu_parts, "interleave_gpu", gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_parts, "SIZES", ((8, 16), (8, 32)))


def test_kernels_are_written(parts_on_a_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every case in its own precision; one that fails is a row, and the next one runs."""
    precisions: dict[str, str] = {}
    chosen = [Case("M1", 8, 40, 16, dtype) for dtype in ("high", "bfloat16", "float32")]
    real = gpu_parts.kernels_of

    def kernels_of(case: Case) -> list[tuple[str, str, str]]:
        if case.dtype == "bfloat16":
            raise torch.OutOfMemoryError("no memory")
        with pytest.raises(RuntimeError, match="no GPU here"):
            real(case)
        precisions[case.dtype] = torch.get_float32_matmul_precision()
        return [("attend", "20.0", "1"), ("combine", "2.0", "1")]

    def no_problem(case: Case, device: str) -> None:
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(gpu_parts, "Problem", no_problem)
    monkeypatch.setattr(gpu_parts, "kernels_of", kernels_of)
    left: list[str] = []
    gpu_parts.kernels(chosen, time.monotonic() + 60, tmp_path, left.append)
    rows = read_csv(tmp_path / "kernels.csv")
    assert [(row["dtype"], row["kernel"], row["us"], row["status"]) for row in rows] == [
        ("high", "attend", "20.0", "timed"),
        ("high", "combine", "2.0", "timed"),
        ("bfloat16", "", "", "out of memory"),
        ("float32", "attend", "20.0", "timed"),
        ("float32", "combine", "2.0", "timed"),
    ]
    assert precisions == {"high": "high", "float32": "highest"}
    assert not left
    gpu_parts.kernels(chosen, time.monotonic() - 1, tmp_path, left.append)
    assert left == ["3 of 3 cases"]


def test_engines_are_compared(
    parts_on_a_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One that fails says so in its row, one that refuses has none, and a size at which all fail stops no other."""

    def criterion(symmetric: bool, backend: str) -> torch.nn.Module:
        def loss(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            if backend == "wide" and query.shape[1] == 16:
                raise RuntimeError("broken")
            if backend == "triton" and query.shape[1] == 32:
                raise ValueError("too many features")
            return EqCoLoss(symmetric=symmetric, backend="torch")(query, key)

        return loss  # type: ignore[return-value]

    monkeypatch.setattr(gpu_parts, "criterion", criterion)
    left: list[str] = []
    gpu_parts.engines(time.monotonic() + 60, tmp_path, left.append)
    rows = read_csv(tmp_path / "engines.csv")
    assert list(rows[0]) == list(read_csv(RESULTS / "engines.csv")[0])
    found = [(row["engine"], row["d"], row["us"], row["error"][:5]) for row in rows]
    broken = ("wide", "16", "", "fails")
    assert [one for one in found if one[3] == "fails"] == [broken, broken]
    assert [one[:3] for one in found if one != broken] == [("triton", "16", "20")] * 2 + [("wide", "32", "20")] * 2
    assert all(float(row["host_ms"]) > 0 for row in rows if row["us"])
    assert "triton N=8 D=32: too many features" in capsys.readouterr().out
    monkeypatch.setattr(gpu_parts, "compared", lambda *of: pytest.fail("no memory"))
    gpu_parts.engines(time.monotonic() - 1, tmp_path, left.append)
    assert left == ["N=8 D=16 both, N=8 D=16 one, N=8 D=32 both, N=8 D=32 one"]

    def no_memory(*of: Any) -> list[Row]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu_parts, "compared", no_memory)
    gpu_parts.engines(time.monotonic() + 60, tmp_path, left.append)
    assert "engines N=8 D=32: out of memory" in capsys.readouterr().out
    assert read_csv(tmp_path / "engines.csv") == rows


def test_tiles_are_compared(parts_on_a_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Those of the tables first; passes that do nothing stand for the kernels'."""
    step = {"by": lambda tile: (torch.ones(3),)}
    for module in (tune, tune_wide):
        monkeypatch.setattr(module, "passes", lambda *of: dict.fromkeys(gpu_parts.FEW, step["by"]))
    real = tune.timed
    monkeypatch.setattr(tune, "timed", lambda steps, rounds: real(steps, rounds, "cpu"))
    left: list[str] = []
    gpu_parts.tiles(time.monotonic() + 60, tmp_path, left.append)
    rows = read_csv(tmp_path / "tiles.csv")
    assert list(rows[0]) == ["pass", "dtype", "d", *tune.FIELDS, "waves", "status", "us", "warm_us", *GPU]
    assert {(row["pass"], row["status"]) for row in rows} == {(name, "timed") for name in gpu_parts.FEW}
    assert all(float(row["us"]) > 0 for row in rows)
    for name, candidates in gpu_parts.FEW.items():
        mine = [row for row in rows if row["pass"] == name]
        assert len(mine) == len(candidates) == len(set(candidates))
        assert "table" in (mine[0]["resident"], mine[0]["rows"])
        assert (mine[0]["dtype"], mine[0]["d"]) == (("amp", "512") if "wide" in name else ("bfloat16", "128"))
    gpu_parts.tiles(time.monotonic() - 1, tmp_path, left.append)
    assert left == [", ".join(gpu_parts.FEW)]


def test_tiles_that_are_compared_are_those_of_real_passes() -> None:
    assert set(gpu_parts.FEW) <= {*tune.PASSES, *tune_wide.PASSES}
    for name, candidates in gpu_parts.FEW.items():
        every = tune_wide.candidates(name) if name in tune_wide.PASSES else tune.tiles("bfloat16")
        assert set(candidates) <= set(every)


def test_a_wrong_graph_of_ours_is_broken() -> None:
    """Whose eager step is right, and has a time."""
    wrong = row(no_graph="no CUDA graph: wrong: relative error 1.0e-02, over 2e-05", graph_us="")
    assert [one.endswith("over 2e-05") for one in goals.broken([row(), wrong])] == [True]
