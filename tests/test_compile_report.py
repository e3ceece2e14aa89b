"""What is reported without a GPU: commands of their own process, where Triton compiles instead of interpreting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compile_report import Args, Built, Loop, main, matrix
from benchmarks.workloads import WORKLOADS

pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch on Linux")
ROOT = Path(__file__).parents[1]


def command(module: str, *words: str) -> list[list[str]]:
    """The lines that it prints, as words."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_a_kernel_and_its_main_loop() -> None:
    lines = command("benchmarks.compile_report", "--targets", "90", "--match", "small batch", "--processes", "1")
    rows = [line for line in lines if line and line[0] == "sm_90"]
    assert [row[1] for row in rows] == ["attend"]
    assert any("MMA" in word for word in rows[0])


@pytest.mark.slow  # .ci/run compiles every kernel
def test_a_case_of_the_matrix() -> None:
    """Forward and backward of a whole step, on tensors that hold no memory."""
    words = "--matrix", "--targets", "90", "--match", "S1 bfloat16 N=256 K=255 D=128", "--processes", "1"
    lines = command("benchmarks.compile_report", *words)
    kernels = [line[1] for line in lines if line and line[0] == "sm_90"]
    assert kernels == ["attend", "keys_gradient", "merge_splits"]


def test_the_matrix_has_every_workload() -> None:
    assert {case.name.split()[0] for case in matrix()} == set(WORKLOADS)


@pytest.mark.parametrize(
    ("spilled", "inside", "waits", "matrix", "dtype", "d", "fails"),
    [
        (0, 0, 1, "HGMMA", "bf16", 128, False),
        (8, 0, 1, "HGMMA", "bf16", 128, False),  # outside of the loop: printed, and allowed
        (8, 2, 1, "HGMMA", "bf16", 128, True),
        (8, 2, 1, "HGMMA", "fp16", 256, True),
        (8, 2, 1, "HGMMA", "bf16", 512, False),
        (8, 2, 1, "HGMMA", "fp32", 128, True),
        (8, 2, 1, "HGMMA", "fp32", 256, False),
        (0, 0, 12, "HGMMA", "bf16", 128, True),  # as many waits as products
        (0, 0, 1, "HMMA", "bf16", 128, True),  # older than sm_90's own
    ],
)
def test_what_fails(spilled: int, inside: int, waits: int, matrix: str, dtype: str, d: int, fails: bool) -> None:
    loop = Loop(f"{matrix}.64x64x16.F32.BF16", 12, waits, 100, [1, 1, 1, 1, inside, 1])
    assert Built(90, "attend", "queue", dtype, d, 128, spilled, 1024, 1.0, loop, 0.1, resident=64).fails is fails


@pytest.mark.parametrize(("target", "kilobytes", "fails"), [(86, 99, False), (86, 100, True), (90, 128, False)])
def test_what_does_not_fit_fails(target: int, kilobytes: int, fails: bool) -> None:
    assert Built(target, "attend", "queue", "fp32", 512, 128, 0, 1024 * kilobytes, 1.0, None, 0.1, 64).fails is fails


def test_host_time() -> None:
    """A row for each workload, warm and cold, and which kernels a step of ours would launch."""
    rows = {
        " ".join(line[:2]) if line[1] == "cold" else line[0]: line
        for line in command("benchmarks.host", "--rounds", "1")[1:]
    }
    workloads = ["M1", "S1", "S2", "P1", "C1"]
    assert list(rows) == [*workloads, *(f"{name} cold" for name in workloads)]
    assert all(float(figure) > 0 for name, row in rows.items() for figure in row[len(name.split()) :][:5])
    assert rows["M1"][6:] == ["attend,", "combine,", "multiply_rows"]
    assert rows["S1"][6:] == ["prepare_rows,", "attend,", "combine,", "keys_gradient,", "merge_splits"]
    assert rows["P1"][6:] == ["attend,", "multiply_rows"]
    forward = ["prepare_kernel,", "statistics_kernel,", "finish_views_kernel,"]
    assert rows["C1"][6:] == [*forward, "view_weights_kernel,", "through_views_kernel"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (Args(targets=(91,)), "unknown 91; known: 80, 86, 90, 100, 120"),
        (Args(targets=()), "expected one target"),
        (Args(match="nothing of the kind"), "one case"),
        (Args(processes=0), "one process"),
    ],
)
def test_bad_input(args: Args, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(args)


def test_the_launcher_runs_what_triton_would() -> None:
    lines = command("tests.launches")
    assert int(lines[0][0]) > 50
    assert int(lines[1][0]) > 10
    assert int(lines[2][0]) > 5
    assert lines[3][0] == "8"
