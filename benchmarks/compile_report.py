"""Builds the kernels of the static tables for GPUs that need not be there, and prints what ptxas made of them.

    python -m benchmarks.compile_report                     # sm_80, sm_90 and sm_100
    python -m benchmarks.compile_report --targets 90 --match attend

It calls the launchers themselves with tensors that hold no memory, so a kernel here is the kernel of a run. Exit status
1 if a half-precision kernel with D <= 256 spills.
"""

import contextlib
import io
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import tyro
from torch import Tensor

from eqco_loss.ops import Pairs, triton_backend

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT = {"fp32": torch.float32, "fp32-high": torch.float32}
DTYPES = {**HALF, **FLOAT}
COLUMNS = ("target", "kernel", "case", "dtype", "D", "registers", "spilled bytes", "shared KB", "seconds")


@dataclass(frozen=True)
class Args:
    targets: tuple[int, ...] = (80, 90, 100)  # compute capability x 10
    match: str = ""  # only kernels and cases whose name holds this
    processes: int = 2  # that compile side by side


class Case(NamedTuple):
    """One call of a launcher."""

    name: str
    dtype: str
    d: int
    launch: Callable[[torch.dtype, int], object]


class Built(NamedTuple):
    target: int
    kernel: str
    case: str
    dtype: str
    d: int
    registers: int
    spilled: int
    shared: int
    seconds: float

    @property
    def fails(self) -> bool:
        return self.spilled > 0 and self.dtype in HALF and self.d <= 256


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(
    n: int,
    k: int,
    *,
    band: bool = False,
    dual: bool = False,
    ids: bool = False,
    metrics: bool = False,
    own: bool = False,
) -> Callable[[torch.dtype, int], object]:
    def launch(dtype: torch.dtype, d: int) -> object:
        q = empty(n, d, dtype=dtype)
        keys = empty(n, k, d, dtype=dtype) if own else empty(k, d, dtype=dtype)
        query_ids, key_ids = (empty(x, dtype=torch.int64) if ids else None for x in (n, k))
        pairs = Pairs(query_ids, key_ids, None, None, [0, k - 1, k] if band else [])
        inter, flags = 1.0 if dual else None, (band, False, True, band, metrics)
        return triton_backend.row_losses(q, q, keys, None, pairs, Pairs(), 0.2, inter, 65536.0, True, *flags)

    return launch


def backward(n: int, k: int, *, band: bool = False, own: bool = False) -> Callable[[torch.dtype, int], object]:
    def launch(dtype: torch.dtype, d: int) -> object:
        q, row = empty(n, d, dtype=dtype), empty(n)
        keys = empty(n, k, d, dtype=dtype) if own else empty(k, d, dtype=dtype)
        pairs = Pairs(None, None, None, None, [0, k - 1, k] if band else [])
        return triton_backend.logsumexp_keys_gradient(q, keys, row, row, row, pairs, 0.2, True, True)

    return launch


def picked(dtype: torch.dtype, d: int) -> object:
    q, row = empty(256, d, dtype=dtype), empty(256)
    pairs = Pairs(picked=empty(256, 16, dtype=torch.int64))
    triton_backend.row_losses(q, q, q, None, pairs, Pairs(), 0.2, None, 256.0, True, True, False, True, True, False)
    return triton_backend.logsumexp_keys_gradient(q, q, row, row, row, pairs, 0.2, True, True)


def both_roles(dtype: torch.dtype, d: int) -> object:
    z, row = empty(8192, d, dtype=dtype), empty(8192)
    return triton_backend.both_roles_gradient(z, row, row, row, 0.2, True)


QUEUE, BATCH = (256, 65536), (4096, 4096)
CASES = [
    *(Case("queue", dtype, 128, forward(*QUEUE)) for dtype in DTYPES),
    Case("queue", "bf16", 256, forward(*QUEUE)),
    Case("queue", "bf16", 512, forward(*QUEUE)),
    Case("queue, two temperatures", "bf16", 128, forward(*QUEUE, dual=True)),
    Case("queue, ids", "bf16", 128, forward(*QUEUE, ids=True)),
    Case("queue, metrics", "bf16", 128, forward(*QUEUE, metrics=True)),
    Case("batch", "bf16", 128, forward(*BATCH, band=True)),
    Case("small batch", "bf16", 128, forward(256, 256, band=True)),
    Case("own keys", "bf16", 128, forward(256, 16, own=True)),
    *(Case("batch, keys' gradient", dtype, 128, backward(*BATCH, band=True)) for dtype in DTYPES),
    Case("batch, keys' gradient", "bf16", 256, backward(*BATCH, band=True)),
    Case("NT-Xent, gradient", "bf16", 128, both_roles),
    Case("own keys' gradient", "bf16", 128, backward(256, 16, own=True)),
    Case("picked", "bf16", 128, picked),
]


class NoGpu:
    """What Triton asks a driver before it compiles."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return self.target  # Triton keeps what it has built by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)


@contextlib.contextmanager
def compiling(target: int, built: Callable[[str, str, int, float], None]) -> Iterator[None]:
    """Launches compile for ``target`` and go no further; ``built`` gets kernel, ptxas's report, shared memory, time."""
    import triton
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        report, start = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(report):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        text = report.getvalue()
        if text:  # else this very kernel has been built before
            built(self.fn.__name__, text, kernel.metadata.shared, time.perf_counter() - start)
        return kernel

    triton.runtime.driver.set_active(NoGpu(target))
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    with (
        mock.patch.object(triton_backend, "_arch", return_value=target),
        mock.patch.object(triton_backend, "_parallel", return_value=132),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield


def build(work: tuple[int, int]) -> list[Built]:
    """All kernels of one case for one target."""
    target, index = work
    case, rows = CASES[index], []

    def built(kernel: str, log: str, shared: int, seconds: float) -> None:
        registers = int(re.findall(r"Used (\d+) registers", log)[-1])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
        rows.append(Built(target, kernel, case.name, case.dtype, case.d, registers, spilled, shared, seconds))

    torch.set_float32_matmul_precision("high" if case.dtype == "fp32-high" else "highest")
    with compiling(target, built):
        case.launch(DTYPES[case.dtype], case.d)
    return rows


def main(args: Args) -> int:
    start = time.perf_counter()
    work = [(target, index) for target in args.targets for index, case in enumerate(CASES) if args.match in case.name]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        seen, failures = set(), []
        print("  ".join(COLUMNS), flush=True)
        for rows in pool.imap(build, work):
            for row in rows:
                if row.kernel in ("attend", "keys_gradient", "both_roles") or (row.target, row.kernel) not in seen:
                    note = "  <- SPILLS" if row.fails else "  (spills)" if row.spilled else ""
                    print(
                        f"sm_{row.target:<4} {row.kernel:22} {row.case:26} {row.dtype:10} {row.d:4} {row.registers:4} "
                        f"{row.spilled:6} {row.shared / 1024:6.1f} {row.seconds:5.1f}{note}",
                        flush=True,
                    )
                seen.add((row.target, row.kernel))
                failures += [row] if row.fails else []
    print(f"{len(failures)} half-precision kernels with D <= 256 spill; {time.perf_counter() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
