"""The example scripts as processes that can be killed, and what they leave behind."""

import csv
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # this and others only so that the server below has them
import matplotlib.pyplot  # noqa: F401
import sklearn.datasets  # type: ignore[import-untyped]
import sklearn.linear_model  # type: ignore[import-untyped]
import sklearn.pipeline  # type: ignore[import-untyped]  # noqa: F401
import torch
from PIL import Image
from torch import Tensor

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import pretrain.training  # noqa: E402, F401
from pretrain.clock import TIMED  # noqa: E402


def child(
    script: str, words: list[str], log: Path, cwd: Path | None, environment: dict[str, str], die: tuple[str, int] | None
) -> None:
    """Run a script as `python script words`; die = (name, n): SIGKILL itself instead of the n-th call of os.name."""
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a process that nothing started so
    if die is not None:
        name, when = die
        real, calls = getattr(os, name), itertools.count(1)

        def deadly(*arguments: Any) -> Any:
            if next(calls) == when:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(os, name, deadly)
    sys.argv = [script, *words]  # runpy puts the path in the first place
    sys.path.insert(0, str((EXAMPLES / script).parent))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def forks() -> ForkServerContext:
    """Processes of a server that has imported everything once: 0.1 s instead of 6 each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Script:
    """Starts a script."""

    def __init__(self, folder: Path, script: str = "train_simo.py", cwd: Path | None = None) -> None:
        self.script, self.folder, self.log, self.cwd = script, folder, folder / "log.txt", cwd
        self.context = forks()

    def start(
        self, *words: object, die: tuple[str, int] | None = None, rank: int = 0, ranks: int = 1, port: int = 0
    ) -> ForkServerProcess:
        """With ``ranks``, as torchrun would start this one of them."""
        environment: dict[str, object] = {}
        if ranks > 1:
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "test"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = self.log if rank == 0 else self.folder / f"log{rank}.txt"
        variables = {name: str(value) for name, value in environment.items()}
        arguments = (self.script, [str(w) for w in words], log, self.cwd, variables, die)
        process = self.context.Process(target=child, args=arguments)
        process.start()
        return process

    def run(self, *words: object, code: int = 0, die: tuple[str, int] | None = None) -> str:
        process = self.start(*words, die=die)
        process.join(100)
        output = self.log.read_text()
        assert process.exitcode == code, output
        return output

    def run_ranks(self, ranks: int, *words: object) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [self.start(*words, rank=rank, ranks=ranks, port=port) for rank in range(ranks)]
        for process in processes:
            process.join(100)
            process.kill()
        output = self.log.read_text()
        assert [process.exitcode for process in processes] == [0] * ranks, output
        return output


class Started:
    """What the grids' ``subprocess.Popen`` is for, from the server."""

    def __init__(self, words: list[str], log: Path, environment: dict[str, str]) -> None:
        script = Script(log.parent, str(Path(words[1]).relative_to(EXAMPLES)), cwd=Path.cwd())
        self.process = script.start(*words[2:])

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> None:
        self.process.join(60)


def picture_width(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.size[0]


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{path}/{key}").items()}
    if isinstance(tree, list):
        return {k: v for key, value in enumerate(tree) for k, v in leaves(value, f"{path}/{key}").items()}
    return {path: tree}


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit, but for the clock."""
    first, second = (leaves(torch.load(d / "checkpoint.pt", weights_only=True)) for d in (one, other))
    first, second = ({k: v for k, v in x.items() if k.split("/")[-1] not in TIMED} for x in (first, second))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name
    assert rows(one) == rows(other)


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def make_images(folder: Path, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = torch.randint(0, 256, (40, 36, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
