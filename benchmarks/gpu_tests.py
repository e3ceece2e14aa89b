"""The tests that need a GPU run in parallel processes, of which none stays, and what they showed is a row."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .measure import Row, provenance, write_csv

TESTS = (
    "tests/test_kernels.py",
    "tests/test_cuda.py",
    "tests/test_repeats.py",
    "tests/test_world.py",
    "tests/test_wide.py",
    "tests/test_pages.py",
    "tests/test_cuda_training.py",
)
STOPPED = 124  # the status of what took too long, as of the command timeout
LAST_WORDS = 15.0  # seconds that pytest has, once it is interrupted, to tell what had failed


def run_tests(processes: int, seconds: float, out: Path) -> int:
    """pytest's exit status is returned; what it told goes to tests.txt, and its counts are the row of tests-gpu.csv."""
    root = Path(__file__).parents[1]
    files = [name for name in TESTS if (root / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "--no-header", "-p", "no:cacheprovider"]
    command += ["-p", "xdist.plugin"]  # and no other, which might warn of this one
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with (out / "tests.txt").open("w") as log:
        status = interrupted([*command, *files], seconds, cwd=root, stdout=log, env=environment)
    lines = (out / "tests.txt").read_text().splitlines()
    wanted = [line for line in lines if re.match(r"FAILED|ERROR|\d+ (passed|failed)|=+ .*(passed|failed)", line)]
    print("\n".join(wanted[-30:] or lines[-5:]), flush=True)
    if status not in (0, 1):
        print(f"tests: status {status}, not all were run", flush=True)
    write_csv(out / "tests-gpu.csv", [counted(wanted[-1] if wanted else "", status) | provenance("cuda")])
    return status


def interrupted(command: list[str], seconds: float, **how: Any) -> int:
    """The command's exit status is returned, or 124 if it took longer, after pytest has told what had failed."""
    # A shell starts what it puts in the background with interrupts ignored, and what that starts ignores them, too.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=heed, **how)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        return STOPPED
    finally:  # a worker that outlives the leader would hold the GPU while others are timed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def counted(line: str, status: int) -> Row:
    """The counts are those of pytest's last line, and blank if it has none; all tests were run if status is 0 or 1."""
    found = {what: re.search(rf"(\d+) {what}", line) for what in ("passed", "failed", "skipped")}
    told = found["passed"] or found["failed"]
    return {"status": str(status)} | {what: match[1] if match else "0" if told else "" for what, match in found.items()}
