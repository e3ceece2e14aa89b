"""``benchmarks.gpu_check`` as far as a CPU can tell: what it runs and when, and what it says of what it did not run."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, gpu_tests, scaling, step
from benchmarks.measure import read_csv
from benchmarks.runner import Plan


def test_what_a_gpu_owes_comes_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part with the time that is left, one that fails stops no other, and the end comes before the deadline."""
    clock, ran = [0.0], []

    def part(name: str, seconds: float) -> Callable[..., int]:
        def spend(*arguments: Any) -> int:
            plans = [x.deadline for x in arguments if isinstance(x, Plan)] or [None]
            ran.append((name, plans[0]))
            clock[0] += seconds
            if name == "kernels":
                raise RuntimeError("broken")
            return 3

        return spend

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu_check, "check_device", lambda device: None)
    monkeypatch.setattr(gpu_check, "held", lambda: 0)
    for name, seconds in (("run_tests", 100.0), ("run_all", 150.0), ("kernels", 10.0), ("engines", 5.0)):
        monkeypatch.setattr(gpu_check, name, part(name, seconds))
    monkeypatch.setattr(step, "main", part("step", 15.0))
    monkeypatch.setattr(scaling, "main", part("scaling", 20.0))
    assert gpu_check.main(gpu_check.Args(out=tmp_path)) == 3
    names = ["run_tests", "run_all", "kernels", *["step"] * 4, "run_all", "scaling", "engines"]
    assert [name for name, _ in ran] == names
    assert [seconds for name, seconds in ran if name == "run_all"] == [200.0, 540.0 - 320.0 - 100.0]
    ran.clear()
    gpu_check.main(gpu_check.Args(out=tmp_path, skip=("tests", "kernels", "scaling"), deadline=230.0))
    assert [name for name, _ in ran] == ["run_all", *["step"] * 3, "engines"]  # nothing is left for other ways


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
    end = time.monotonic() + 10
    while running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not running(pid)


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
