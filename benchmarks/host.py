"""What Python takes of an eager step: the kernels are a GPU's that need not be there, neither compiled nor launched.

    python -m benchmarks.host
    python -m benchmarks.host --compiled    # also beside torch.compile of plain code, which takes a minute to compile

Our step of M1, S1, S2, P1 and C1 beside the eager baseline's, on so few rows that torch's own arithmetic is over at
once; ours also with Triton's own launcher, which ``eqco_loss/ops/launcher.py`` goes past, and with checks and records
worked out at each call, which ``eqco_loss/repeats.py`` keeps. C1 is the wide engine's, under autocast, and a small
product stands for each of the vendor's library. In none is the driver's time to launch a kernel, of which the baseline
has more; torch.compile's program is a CPU's, whose kernels take no launcher of Triton's.

A step that follows itself finds all that Python needs in the processor's caches. In a training loop there are encoders
and an optimiser in between: the cold figures are of steps before which other work has filled these caches.
"""

from __future__ import annotations

import importlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor

from eqco_loss import repeats
from eqco_loss.ops import launcher, wide
from eqco_loss.ops.backends import WIDE_ABOVE
from eqco_loss.ops.triton import arguments
from eqco_loss.ops.wide import chunks, pointwise

from .compile_report import NoGpu
from .measure import Step, Timing
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


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "ours": nullcontext,
    "anew": partial(mock.patch.object, repeats, "kind", return_value=None),
    "Triton": partial(mock.patch.object, launcher, "DIRECT", False),
    "eager": nullcontext,
    "compiled": nullcontext,
}


@dataclass(frozen=True)
class Args:
    target: int = 90  # compute capability x 10
    rounds: int = 50  # of ten steps each, in turn; and twice as many of a cold step
    compiled: bool = False  # whether torch.compile of the baseline is a way, too


def main(args: Args) -> None:
    if args.rounds < 1:
        raise SystemExit(f"error: rounds: expected 1 or more, got {args.rounds}.")
    torch.set_num_threads(1)
    launches: list[str] = []
    with no_launches(args.target, launches):
        ours, kernels = {}, {}
        others: dict[str, dict[str, Step]] = {"eager": {}, **({"compiled": {}} if args.compiled else {})}
        for case in CASES:
            ours[case.workload] = step(case, "eqco_loss")
            for name, of in others.items():
                peer = WORKLOADS[case.workload].baseline if name == "eager" else "torch.compile"
                of[case.workload] = step(tiny(case), peer)
                of[case.workload]()
            launches.clear()
            ours[case.workload]()
            kernels[case.workload] = ", ".join(launches)
        steps = {name: others.get(name, ours) for name in WAYS if name != "compiled" or args.compiled}
        print(f"{'':6}{''.join(f'{title}, us'.rjust(13) for title in steps)}  times faster   kernels of ours")
        for name, warm in timed(steps, args.rounds, cold=False).items():
            print(f"{name:6}{figures(warm)}   {kernels[name]}")
        for name, cold in timed(steps, 2 * args.rounds, cold=True).items():
            print(f"{name + ' cold':8}{figures(cold)[2:]}")


def figures(of: dict[str, Timing]) -> str:
    times = "".join(f"{1e6 * timing.median:13.0f}" for timing in of.values())
    return f"{times}{of['eager'].median / of['ours'].median:14.2f}"


def tiny(case: Case) -> Case:
    return replace(case, n=4, k=6 if case.workload == "S2" else 3, d=4, dtype="float32")


def step(case: Case, name: str) -> Step:
    one: Peer = next(x for x in PEERS if x.name == name and case.workload in x.workloads)
    problem = Problem(case, "cpu")
    return partial(step_of, problem, one.prepare(problem))


def timed(steps: dict[str, dict[str, Step]], rounds: int, cold: bool) -> dict[str, dict[str, Timing]]:
    """Of each workload and way, in a random order: ten steps in a row, or one after other work."""
    order = [(way, case) for way, of in steps.items() for case in of]
    seconds: dict[tuple[str, str], list[float]] = {one: [] for one in order}
    numbers, objects = torch.zeros(2**24), [[str(n)] * 8 for n in range(2**15)]
    count = 1 if cold else 10
    for _ in range(rounds):
        random.shuffle(order)
        for way, case in order:
            one = steps[way][case]
            with WAYS[way]():
                one()
                if cold:  # more numbers and objects than the processor's caches hold
                    numbers.add_(1)
                    sum(map(len, objects))
                start = time.perf_counter()
                for _ in range(count):
                    one()
                seconds[way, case].append((time.perf_counter() - start) / count)
    return {case: {way: Timing.of(seconds[way, case]) for way in steps} for case in steps["ours"]}


@contextmanager
def no_launches(target: int, launches: list[str]) -> Iterator[None]:
    """CPU tensors go to the kernels, which are only named. Triton tells one from another before it compiles them."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler.compiler import CompiledKernel

    def add_stages(self: Any, stages: dict[str, Any], *_: object) -> None:
        def cubin(source: Any, metadata: dict[str, Any]) -> bytes:
            metadata.update(name=source.get_entry_func_name(), shared=0)
            return b""

        stages.update(ttir=lambda source, _: source, cubin=cubin)

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
        tempfile.TemporaryDirectory() as cache,  # Triton's own would give these kernels to who launches them
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        mock.patch.object(CUDABackend, "add_stages", add_stages),
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
