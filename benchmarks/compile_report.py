"""Builds the kernels of the static tables for GPUs that need not be there, and prints what ptxas made of them.

Of a main loop, from its machine code: the matrix instruction, times how often, and waits for it where there are any (as
many as products: ptxas has serialised them); instructions of a thread for a pair of a row and a key, and among them
ex2, float32 arithmetic and conversions, accesses to shared and to local memory (spills), and barriers of an iteration;
then the microseconds that all the case's pairs need at the least to be issued (4 a cycle), for ex2 (16 a cycle) and for
the products, at the multiprocessors and the clock of ``GPUS``. Masks of the ends, a branch, are not counted.

    python -m benchmarks.compile_report                     # sm_80, sm_90 and sm_100
    python -m benchmarks.compile_report --targets 90 --match queue
    python -m benchmarks.compile_report --matrix            # our step of every case that the benchmarks have on a GPU

It calls the launchers themselves with tensors that hold no memory, so a kernel here is the kernel of a run. What is
judged is the main loop: exit status 1 if a kernel needs more shared memory than its GPU has, or if one of half
precision with D <= 256, or of float32 in pieces with D <= 128, spills inside its loop, waits there for each product,
or, on sm_90, multiplies 64 rows or more by the older HMMA. A spill outside of the loop is printed and costs next to
nothing.
"""

import contextlib
import io
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import tyro
from torch import Tensor

from eqco_loss import functional
from eqco_loss.ops import Pairs, launcher, operator, triton, wide
from eqco_loss.ops.calls import Row
from eqco_loss.ops.triton import arguments

from . import records, workloads
from .peers import PEERS

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {**HALF, "fp32": torch.float32}
COLUMNS = ("target", "kernel", "case", "dtype", "D", "registers", "spilled bytes", "shared KB", "seconds")
LOOP = ("matrix", "waits", "a pair", "ex2", "fp32", "cvt", "smem", "local", "bar", "issue us", "ex2 us", "matrix us")
KINDS = (r"MUFU\.EX2", r"F(FMA|ADD|MUL|MNMX)", r"F2F", r"(LD|ST)S", r"(LD|ST)L", r"BAR\.")  # of LOOP, in its order
MATRIX = re.compile(r"[A-Z]+MMA")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ )? *([A-Z][\w.]*)([^;]*);")
GPUS = {  # multiprocessors, clock, half multiply-adds a cycle, shared memory a block can have
    80: (108, 1.41e9, 1024, 163),
    86: (84, 1.74e9, 512, 99),
    90: (132, 1.755e9, 2048, 227),
    100: (148, 1.85e9, 4096, 227),
    120: (170, 2.41e9, 256, 99),
}


@dataclass(frozen=True)
class Args:
    targets: tuple[int, ...] = (80, 90, 100)  # compute capability x 10
    match: str = ""  # only cases whose name holds this
    matrix: bool = False  # the cases of python -m benchmarks on a GPU, instead of one for each tile
    processes: int = 2  # that compile side by side


class Case(NamedTuple):
    """One call of a launcher."""

    name: str
    dtype: str
    d: int
    launch: Callable[[torch.dtype, int], object]
    pairs: int = 0  # of a row and a key
    products: int = 2  # of D multiply-adds, for each


class Loop(NamedTuple):
    """One iteration of a main loop."""

    matrix: str
    products: int
    waits: int
    instructions: int
    kinds: list[int]


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
    loop: Loop | None
    a_pair: float  # from a warp's instructions in one iteration to a thread's for one pair
    resident: int  # rows of a tile

    @property
    def serialised(self) -> bool:
        return self.loop is not None and self.loop.waits > 1 and self.loop.waits >= self.loop.products

    @property
    def too_big(self) -> bool:
        return self.shared > 1024 * GPUS[self.target][3]

    @property
    def spills_inside(self) -> bool:
        return self.loop is not None and self.loop.kinds[4] > 0

    @property
    def older(self) -> bool:
        """Whether it multiplies by an instruction that sm_90 has a faster one for, which needs 64 rows."""
        return self.target == 90 and self.resident >= 64 and self.loop is not None and self.loop.matrix[:4] == "HMMA"

    @property
    def fails(self) -> bool:
        slow = self.spills_inside or self.serialised or self.older
        judged = self.case.startswith("wide") or self.d <= (256 if self.dtype in HALF else 128)
        return (slow and judged) or self.too_big

    def figures(self, case: Case) -> str:
        if self.loop is None:
            return ""
        multiprocessors, clock, multiply_adds, _ = GPUS[self.target]
        pairs = case.pairs / multiprocessors / clock * 1e6  # microseconds, one a cycle
        each = [count * self.a_pair for count in (self.loop.instructions, *self.loop.kinds)]
        slower = 1 if self.dtype in HALF else 6 if "raw" in case.name else 3  # products of pieces
        bounds = pairs * each[0] / 32 / 4, pairs * each[1] / 16, pairs * case.products * self.d * slower / multiply_adds
        counts = "".join(f" {x:5.2f}" for x in each[:-1]) + f" {self.loop.kinds[-1]:3}"
        return (
            f"  {self.loop.products:3} x {self.loop.matrix:28} {self.loop.waits:3} {counts}"
            + "".join(f" {x:6.1f}" for x in bounds)
        )  # fmt: skip


def main_loop(cubin: bytes) -> Loop | None:
    """The first innermost loop with matrix instructions."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), when, name, rest) for at, when, name, rest in INSTRUCTION.findall(text)]

    def target(rest: str) -> int:
        found = re.findall(r"0x([0-9a-f]+)", rest)
        return int(found[-1], 16) if found else 0

    loops: list[tuple[int, int]] = []
    for before, (at, _, name, rest) in itertools.pairwise(code):
        back = name.startswith("BRA") and target(rest) < at and not before[2].startswith("BRA")  # else: has waited
        if back and any(MATRIX.match(x[2]) for x in code if target(rest) <= x[0] < at):
            loops.append((target(rest), at))
    inner = [x for x in loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    if not inner:
        return None
    path, skip = [], 0
    for at, when, name, rest in code:
        if not max(inner[0][0], skip) <= at <= inner[0][1]:
            continue
        path.append(name + rest)
        over = at < target(rest) <= inner[0][1] and name.startswith("BRA") and bool(when)
        if over and not any(MATRIX.match(x[2]) for x in code if at < x[0] < target(rest)):
            skip = target(rest)
    matrix = Counter(x.split()[0] for x in path if MATRIX.match(x))
    kinds = [sum(bool(re.match(kind, x)) and "RZ, [RZ]" not in x for x in path) for kind in KINDS]
    waits = sum(x.startswith("WARPGROUP.DEPBAR") for x in path)
    return Loop(matrix.most_common(1)[0][0], matrix.total(), waits, len(path), kinds)


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
    gradient: bool = True,
    autocast: bool = False,
    columns: bool = False,
    raw: bool = False,
) -> Callable[[torch.dtype, int], object]:
    def launch(dtype: torch.dtype, d: int) -> object:
        multiplied, dtype = (dtype, torch.float32) if autocast else (None, dtype)
        q = empty(n, d, dtype=dtype)
        keys = empty(n, k, d, dtype=dtype) if own else empty(k, d, dtype=dtype)
        keys = empty(d, k, dtype=dtype).T if columns else keys
        query_ids, key_ids = (empty(x, dtype=torch.int64) if ids else None for x in (n, k))
        pairs = Pairs(query_ids=query_ids, key_ids=key_ids, band=[0, k - 1, k] if band else [])
        return triton.row_losses(
            records.row_losses(
                q,
                q,
                keys,
                pairs,
                inter_temperature=1.0 if dual else None,
                normalize=not raw,
                normalize_keys=band,
                need_query_gradient=gradient,
                need_positive_gradient=band,
                need_metrics=metrics,
                autocast=multiplied,
            )
        )

    return launch


def backward(
    n: int, k: int, *, band: bool = False, own: bool = False, ids: bool = False
) -> Callable[[torch.dtype, int], object]:
    def launch(dtype: torch.dtype, d: int) -> object:
        q, rows = empty(n, d, dtype=dtype), empty(len(Row), n)
        keys = empty(n, k, d, dtype=dtype) if own else empty(k, d, dtype=dtype)
        query_ids, key_ids = (empty(x, dtype=torch.int64) if ids else None for x in (n, k))
        pairs = Pairs(query_ids=query_ids, key_ids=key_ids, band=[0, k - 1, k] if band else [])
        units = empty(n, d, dtype=triton.unit_dtype(dtype)) if band else None
        return triton.keys_gradient(records.keys_gradient(q, keys, empty(), rows, pairs, units=units))

    return launch


def picked(dtype: torch.dtype, d: int) -> object:
    q, rows = empty(256, d, dtype=dtype), empty(len(Row), 256)
    pairs = Pairs(picked=empty(256, 16, dtype=torch.int64))
    triton.row_losses(records.row_losses(q, q, q, pairs, normalize_keys=True))
    return triton.keys_gradient(records.keys_gradient(q, q, empty(), rows, pairs))


def symmetric(dtype: torch.dtype, d: int) -> object:
    views = empty(VIEWS, d, dtype=dtype)
    return triton.symmetric_gradient(records.symmetric_gradient(views, empty(), empty(len(Row), VIEWS)))


def by_wide(step: Callable[[Tensor], object]) -> Callable[[torch.dtype, int], object]:
    """A step of the wide engine, which would take torch's own operations for tensors without memory."""

    def launch(dtype: torch.dtype, d: int) -> object:
        from eqco_loss.ops.wide import launches, pointwise

        with mock.patch.object(pointwise, "_kernels", return_value=launches):
            return step(empty(VIEWS, d, dtype=dtype))

    return launch


def wide_one_direction(views: Tensor) -> object:
    q, keys = views.chunk(2)
    wide.row_losses(records.row_losses(q, q, keys, Pairs(band=[0, len(q) - 1, len(q)]), normalize_keys=True))
    return wide.keys_gradient(records.keys_gradient(q, keys, empty(), empty(len(Row), len(q))))


def wide_both_directions(views: Tensor) -> object:
    wide.symmetric_losses(records.symmetric_losses(views))
    return wide.symmetric_gradient(records.symmetric_gradient(views, empty(), empty(len(Row), VIEWS)))


QUEUE, BATCH, VIEWS = (256, 65536), (4096, 4096), 8192
MANY = 2**24  # pairs of QUEUE and of BATCH
CASES = [
    *(Case("queue", dtype, 128, forward(*QUEUE), MANY) for dtype in DTYPES),
    Case("queue, raw rows", "fp32", 128, forward(*QUEUE, raw=True), MANY),
    Case("queue", "bf16", 256, forward(*QUEUE), MANY),
    Case("queue", "bf16", 512, forward(*QUEUE), MANY),
    Case("queue, autocast", "bf16", 128, forward(*QUEUE, autocast=True), MANY),
    Case("queue (D, K), autocast", "bf16", 128, forward(*QUEUE, autocast=True, columns=True), MANY),
    Case("queue (D, K), autocast", "bf16", 512, forward(*QUEUE, autocast=True, columns=True), MANY),
    Case("queue, two temperatures", "bf16", 128, forward(*QUEUE, dual=True), MANY),
    Case("queue, ids", "bf16", 128, forward(*QUEUE, ids=True), MANY),
    Case("queue, metrics", "bf16", 128, forward(*QUEUE, metrics=True), MANY),
    *(Case("batch", dtype, 128, forward(*BATCH, band=True), MANY) for dtype in HALF),
    Case("batch, ids", "bf16", 128, forward(*BATCH, band=True, ids=True), MANY),
    Case("batch, loss only", "bf16", 128, forward(VIEWS, VIEWS, band=True, gradient=False), VIEWS**2, 1),
    Case("small batch", "bf16", 128, forward(256, 256, band=True), 2**16),
    Case("own keys", "bf16", 128, forward(256, 16, own=True)),
    Case("own keys, ids and metrics", "bf16", 128, forward(256, 16, own=True, ids=True, metrics=True)),
    *(Case("batch, keys' gradient", dtype, 128, backward(*BATCH, band=True), MANY) for dtype in DTYPES),
    Case("batch, ids, keys' gradient", "bf16", 128, backward(*BATCH, band=True, ids=True), MANY),
    Case("NT-Xent, gradient", "fp32", 128, symmetric, VIEWS**2),
    Case("batch, keys' gradient", "bf16", 256, backward(*BATCH, band=True), MANY),
    Case("NT-Xent, gradient", "bf16", 128, symmetric, VIEWS**2),
    Case("NT-Xent, gradient", "bf16", 256, symmetric, VIEWS**2),
    Case("NT-Xent, gradient", "bf16", 512, symmetric, VIEWS**2),
    Case("own keys' gradient", "bf16", 128, backward(256, 16, own=True)),
    Case("picked", "bf16", 128, picked),
    Case("wide, one direction", "bf16", 512, by_wide(wide_one_direction)),
    *(Case("wide, both directions", dtype, 512, by_wide(wide_both_directions), VIEWS**2, 1) for dtype in HALF),
    Case("wide, both directions", "bf16", 500, by_wide(wide_both_directions), VIEWS**2, 1),
]


def step_of(case: workloads.Case, dtype: torch.dtype, d: int) -> object:
    """Forward and backward, to where a kernel would be launched."""
    problem = workloads.Problem(case, "meta")
    ours = next(one for one in PEERS if one.name == "eqco_loss" and case.workload in one.workloads)
    autocast = torch.bfloat16 if case.dtype == "amp" else None
    with (
        mock.patch.object(triton, "_refusal_of", return_value=None),
        mock.patch.object(functional, "_autocast_dtype", return_value=autocast),
        mock.patch.object(operator, "without_memory", return_value=False),
    ):
        return torch.autograd.grad(ours.prepare(problem)(), problem.leaves)


def matrix() -> list[Case]:
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "high": "fp32", "amp": "bf16"}
    return [
        Case(f"{one.workload} {one.dtype} {one.size}", names[one.dtype], one.d, partial(step_of, one))
        for one in workloads.cases("cuda", workloads.DTYPES)
        if one.d <= 512  # beyond, the fused kernels do not serve
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
def compiling(target: int, built: Callable[[str, str, Any, tuple[int, int], float], None]) -> Iterator[None]:
    """Launches compile for ``target`` and go no further; ``built`` gets name, ptxas's report, kernel, tile and time."""
    import triton
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        report, start = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(report):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        text = report.getvalue()
        if text:  # else this very kernel has been built before
            square = options.get("BLOCK", 0) if "mutual" in self.fn.__module__ else 0  # of the wide engine
            tile = options.get("BLOCK_ROWS", square), options.get("BLOCK_KEYS", square)
            built(self.fn.__name__, text, kernel, tile, time.perf_counter() - start)
        return kernel

    triton.runtime.driver.set_active(NoGpu(target))
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    with (
        mock.patch.object(arguments, "arch", return_value=target),
        mock.patch.object(arguments, "parallel", return_value=132),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launcher, "DIRECT", False),  # or the second launch of a kernel would be a real one
    ):
        yield


def build(work: tuple[int, int, bool]) -> list[Built]:
    """All kernels of one case for one target."""
    target, index, of_matrix = work
    case, rows = (matrix() if of_matrix else CASES)[index], []

    def built(name: str, log: str, kernel: Any, tile: tuple[int, int], seconds: float) -> None:
        registers = int(re.findall(r"Used (\d+) registers", log)[-1])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
        pairs = tile[0] * tile[1]
        loop = main_loop(kernel.asm["cubin"]) if pairs and case.pairs else None
        measured = registers, spilled, kernel.metadata.shared, seconds
        a_pair = kernel.metadata.num_warps * 32 / max(pairs, 1)
        resident = tile[1] if name == "keys_gradient" else tile[0]
        rows.append(Built(target, name, case.name, case.dtype, case.d, *measured, loop, a_pair, resident))

    with compiling(target, built):
        case.launch(DTYPES[case.dtype], case.d)
    return rows


def main(args: Args) -> int:
    start = time.perf_counter()
    cases = matrix() if args.matrix else CASES
    chosen = [index for index, case in enumerate(cases) if args.match in case.name]
    if unknown := sorted(set(args.targets) - set(GPUS)):
        raise SystemExit(f"error: targets: unknown {', '.join(map(str, unknown))}; known: {', '.join(map(str, GPUS))}.")
    if not chosen or not args.targets or args.processes < 1:
        raise SystemExit(
            "error: targets, match, processes: expected one target, one case and one process at the least."
        )
    work = [(target, index, args.matrix) for target in args.targets for index in chosen]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        seen, failures, kernels = set(), [], 0
        print("  ".join(COLUMNS) + "  |  " + "  ".join(LOOP), flush=True)
        for (_, index, _), rows in zip(work, pool.imap(build, work), strict=True):
            for row in rows:
                kernels += 1
                if args.matrix or row.loop is not None or row.fails or (row.target, row.kernel) not in seen:
                    note = "  SERIALISED" if row.serialised else ""
                    note += "  OLDER instruction" if row.older else ""
                    inside = "  <- SPILLS in its loop" if row.fails else "  (spills in its loop)"
                    note += inside if row.spills_inside else "  (spills outside its loop)" if row.spilled else ""
                    note += "  DOES NOT FIT the shared memory" if row.too_big else ""
                    print(
                        f"sm_{row.target:<4} {row.kernel:22} {row.case:26} {row.dtype:10} {row.d:4} {row.registers:4} "
                        f"{row.spilled:6} {row.shared / 1024:6.1f} {row.seconds:5.1f}{row.figures(cases[index])}{note}",
                        flush=True,
                    )
                seen.add((row.target, row.kernel))
                failures += [row] if row.fails else []
    took = time.perf_counter() - start
    bad = f"{len(failures)} do not fit or have a main loop that spills, waits for each product or is of HMMA on sm_90"
    print(f"{kernels} kernels; {bad}; {took:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
