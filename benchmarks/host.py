"""What Python takes of an eager step: the kernels are compiled for a GPU that need not be there, and not launched.

    python -m benchmarks.host

Our step of M1, S1, S2, P1 and C1 beside the eager baseline's, on so few rows that torch's own arithmetic is over at
once; ours also with Triton's own launcher, which ``eqco_loss/ops/launcher.py`` goes past. C1 is the wide engine's,
under autocast, and a small product stands for each of the vendor's library. In none is the driver's time to launch a
kernel, of which the baseline has more.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor

from eqco_loss.ops import launcher, wide
from eqco_loss.ops.backends import WIDE_ABOVE
from eqco_loss.ops.triton import arguments
from eqco_loss.ops.wide import chunks, pointwise

from .compile_report import NoGpu
from .measure import Timing
from .peers import PEERS
from .registry import Peer
from .runner import step_of
from .workloads import WORKLOADS, Case, Problem

CASES = [  # as small as the kernels of the real sizes serve
    Case("M1", 4, 65536, 16, "bfloat16"),
    Case("S1", 600, 599, 16, "bfloat16"),
    Case("S2", 600, 1198, 16, "bfloat16"),
    Case("P1", 4, 3, 16, "bfloat16"),
    Case("C1", 16, 15, 512, "amp"),
]


@dataclass(frozen=True)
class Args:
    target: int = 90  # compute capability x 10
    rounds: int = 50  # of ten steps each, in turn


def main(args: Args) -> None:
    torch.set_num_threads(1)
    launches: list[str] = []
    with no_launches(args.target, launches):
        print(f"{'':4}{'ours, us':>12}{'Triton, us':>12}{'eager, us':>12}{'times faster':>14}   kernels of ours")
        for case in CASES:
            ours, eager = step(case, "eqco_loss"), step(tiny(case), WORKLOADS[case.workload].baseline)
            launches.clear()
            ours()
            kernels = list(launches)
            timings = interleaved([(ours, True), (ours, False), (eager, True)], args.rounds)
            ratio = timings[2].median / timings[0].median
            figures = "".join(f"{1e6 * timing.median:12.0f}" for timing in timings)
            print(f"{case.workload:4}{figures}{ratio:14.2f}   {', '.join(kernels)}")


def tiny(case: Case) -> Case:
    return replace(case, n=4, k=6 if case.workload == "S2" else 3, d=4, dtype="float32")


def step(case: Case, name: str) -> Callable[[], object]:
    one: Peer = next(x for x in PEERS if x.name == name and case.workload in x.workloads)
    problem = Problem(case, "cpu")
    return partial(step_of, problem, one.prepare(problem))


def interleaved(steps: list[tuple[Callable[[], object], bool]], rounds: int) -> list[Timing]:
    """Of each step, whose launches go directly to compiled kernels or not."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for place, (one, direct) in enumerate(steps):
            with mock.patch.object(launcher, "DIRECT", direct):
                start = time.perf_counter()
                for _ in range(10):
                    one()
                seconds[place].append((time.perf_counter() - start) / 10)
    return [Timing.of(x) for x in seconds]


@contextmanager
def no_launches(target: int, launches: list[str]) -> Iterator[None]:
    """CPU tensors go to the kernels, which are compiled and then only named."""
    import triton
    from triton.compiler.compiler import CompiledKernel

    def run(self: Any) -> Callable[..., None]:
        launches[:] = [*launches[-19:], self.metadata.name]
        return lambda *arguments: None

    def auto(requested: str, query: Tensor, *keys: Tensor | None) -> tuple[str, str]:
        return ("wide" if query.shape[1] > WIDE_ABOVE else "triton"), "as on a GPU"

    def kernels_of_wide(x: Tensor) -> Any:
        return importlib.import_module("eqco_loss.ops.wide.launches") if x.dtype == torch.float32 else None

    one = torch.zeros((1, 1))

    def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        torch.mm(one, one, out=one)

    nothing: dict[str, Any] = {
        "function": None,
        "launch_metadata": lambda *of: None,
        "_init_handles": lambda self: None,
        "__del__": lambda *of: None,
    }
    triton.runtime.driver.set_active(NoGpu(target))
    with (
        mock.patch.multiple(CompiledKernel, run=property(run), create=True, **nothing),
        mock.patch.multiple(arguments, arch=lambda x: target, parallel=lambda x: 132),
        mock.patch("eqco_loss.ops.triton._refusal_of", return_value=None),
        mock.patch("eqco_loss.ops.choose", auto),
        mock.patch.object(pointwise, "_kernels", kernels_of_wide),
        mock.patch.object(chunks, "product", product),
        mock.patch.object(wide, "product", product),
    ):
        yield


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
