"""Loss throughput on a GPU: CUDA-graph time, eager wall-clock, memory, kernels and error, against what one would write.

    python -m pytest tests/test_kernels.py tests/test_cuda.py && python -m benchmarks.gpu

Every variant first agrees with float64; then all variants of a workload are timed in turn. Rows go to
results/gpu.csv as each workload ends, so a run that is stopped keeps what it has.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from eqco_loss import EqCoLoss

from .measure import provenance, write_csv

T = 0.2
RESULTS = Path(__file__).parent / "results" / "gpu.csv"
MAX_ERROR = {"float32": 2e-5, "high": 5e-3, "bfloat16": 2e-2, "float16": 2e-2}  # relative, of loss and gradients


@dataclass(frozen=True)
class Args:
    workloads: tuple[str, ...] = ("M1", "S1", "S2", "S3", "P1")  # M1 queue, S1 in-batch, S2 and S3 NT-Xent, P1 SiMo
    rounds: int = 50  # each variant runs once a round
    scale: int = 1  # divides N and K: a quick look
    device: str = "cuda"  # cpu only checks that the variants agree
    out: Path = RESULTS


class Problem(NamedTuple):
    """Leaves that get gradients, and the ways to the loss."""

    name: str
    size: str
    dtype: str  # bfloat16, float16, float32, high (float32 with tf32 products), amp (float32 under bfloat16 autocast)
    leaves: list[Tensor]
    truth: Callable[[list[Tensor]], Tensor]  # of float64 leaves
    variants: dict[str, Callable[[], Tensor]]  # the first is the baseline
    gate: Problem | None = None  # a smaller one that float64 has room for


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def queue_problem(n: int, k: int, d: int, dtype: str, device: str) -> Problem:
    """M1: MoCo's N queries against K detached keys."""
    kind = torch.float32 if dtype in ("high", "amp") else getattr(torch, dtype)
    q, p, keys = (unit(torch.randn(x, d, device=device)) for x in (n, n, k))
    p = unit(q + 0.7 * p)
    q, p, keys = (x.to(kind) for x in (q, p, keys))
    leaf, stored, zeros = q.requires_grad_(), keys.T.contiguous(), torch.zeros(n, dtype=torch.long, device=device)
    ours = EqCoLoss(T, alpha=k, normalize=False)

    def eager() -> Tensor:
        positive = torch.einsum("nc,nc->n", leaf, p).unsqueeze(-1)
        logits = torch.cat([positive, torch.einsum("nc,ck->nk", leaf, stored)], dim=1) / T
        return F.cross_entropy(logits.float(), zeros)

    def flash() -> Tensor:
        return FlashTrick.apply(leaf, p, keys)  # type: ignore[no-any-return]

    variants = {
        "eager MoCo": eager,
        "torch.compile": torch.compile(eager) if device == "cuda" else eager,
        "eqco_loss": lambda: ours(leaf, p, keys),
    }
    if dtype in ("bfloat16", "float16") and device == "cuda":
        variants["flash-attention trick"] = flash

    def truth(x: list[Tensor]) -> Tensor:
        logits = x[0] @ keys.double().T / T
        return F.softplus(logits.logsumexp(1) - (x[0] * p.double()).sum(1) / T).mean()

    return Problem("M1", f"N={n} K={k} D={d}, queue detached", dtype, [leaf], truth, variants)


class FlashTrick(torch.autograd.Function):
    """Flash attention with value = key returns the mean key and the log-sum-exp: six lines, half precision only."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor, p: Tensor, keys: Tensor) -> Tensor:
        four = q[None, None], keys[None, None]
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(four[0], four[1], four[1], scale=1 / T)
        loss = F.softplus(lse[0, 0] - (q.float() * p.float()).sum(1) / T)
        weight = -torch.expm1(-loss) / (T * len(q))  # sigmoid(-gap)
        ctx.save_for_backward((out[0, 0].float() - p.float()) * weight[:, None])
        ctx.dtype = q.dtype  # type: ignore[attr-defined]
        return loss.mean()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unit_gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (unit_gradient * grad).to(ctx.dtype), None, None  # type: ignore[attr-defined]


def batch_problem(n: int, d: int, dtype: str, device: str, k: int | None = None, detached: bool = False) -> Problem:
    """S1: N queries against the others' keys, both gradients. P1: K of them, keys detached, SiMo's normalisation."""
    kind = torch.float32 if dtype in ("high", "amp") else getattr(torch, dtype)
    query, key = torch.randn(n, d, device=device), torch.randn(n, d, device=device)
    key = (query + 0.7 * key).to(kind).requires_grad_(not detached)
    query = query.to(kind).requires_grad_()
    leaves = [query] if detached else [query, key]
    alpha, count = 65536.0, n - 1 if k is None else k
    rows = torch.arange(n, device=device)
    keep = ((rows - rows[:, None] - 1) % n) < count
    shift = math.log(alpha / count)

    def loss_of(q: Tensor, other: Tensor) -> Tensor:
        q, other = unit(q), unit(other)
        logits = (q @ other.T / T).float() if q.dtype != torch.float64 else q @ other.T / T
        positive = logits.diagonal()
        lse = logits.masked_fill(~keep, -math.inf).logsumexp(1)
        return F.softplus(shift + lse - positive).mean()

    ours = EqCoLoss(T, alpha, num_negatives=k)

    def eager() -> Tensor:
        return loss_of(query, key)

    return Problem(
        "P1" if detached else "S1",
        f"N={n} K={count} D={d}, in-batch, {'keys detached' if detached else 'both gradients'}",
        dtype,
        leaves,
        lambda x: loss_of(x[0], key.detach().double() if detached else x[1]),
        {
            "eager EqCo": eager,
            "torch.compile": torch.compile(eager) if device == "cuda" else eager,
            "eqco_loss": lambda: ours(query, key),
        },
    )


def views_problem(name: str, n: int, d: int, dtype: str, device: str) -> Problem:
    """S2, S3: NT-Xent over 2N embeddings, gradients to all."""
    kind = torch.float32 if dtype in ("high", "amp") else getattr(torch, dtype)
    first, second = torch.randn(n, d, device=device), torch.randn(n, d, device=device)
    two = (first + 0.7 * second).to(kind).requires_grad_()
    one = first.to(kind).requires_grad_()
    partner = torch.arange(2 * n, device=device).roll(n)

    def loss_of(a: Tensor, b: Tensor) -> Tensor:
        z = unit(torch.cat([a, b]))
        logits = z @ z.T / T
        logits = (logits if z.dtype == torch.float64 else logits.float()).fill_diagonal_(-math.inf)
        return F.cross_entropy(logits, partner)

    # InfoNCE's cross entropy has the positive among the 2N - 1: gap's log-sum-exp is over the other 2N - 2.
    ours = EqCoLoss(T, alpha=None, in_batch="views", symmetric=True)

    def eager() -> Tensor:
        return loss_of(one, two)

    variants = {"eager NT-Xent": eager, "eqco_loss": lambda: ours(one, two)}
    if n <= 8192 and device == "cuda":
        variants["torch.compile"] = torch.compile(eager)
    gate = views_problem(name, 4096, d, dtype, device) if n > 8192 else None
    return Problem(name, f"2N={2 * n} D={d}, NT-Xent", dtype, [one, two], lambda x: loss_of(*x), variants, gate)


def problems(args: Args) -> dict[str, list[Callable[[], Problem]]]:
    s, device = args.scale, args.device
    return {
        "M1": [
            lambda dtype=dtype: queue_problem(256, 65536 // s, 128, dtype, device)  # type: ignore[misc]
            for dtype in ("bfloat16", "amp", "float16", "float32", "high")
        ],
        "S1": [lambda dtype=dtype: batch_problem(4096 // s, 128, dtype, device) for dtype in ("bfloat16", "amp")],  # type: ignore[misc]
        "S2": [lambda dtype=dtype: views_problem("S2", 4096 // s, 128, dtype, device) for dtype in ("bfloat16", "amp")],  # type: ignore[misc]
        "S3": [lambda: views_problem("S3", 32768 // s, 128, "bfloat16", device)],
        "P1": [
            lambda k=k: batch_problem(256, 128, "bfloat16", device, k, detached=True)  # type: ignore[misc]
            for k in (16, 64, 255)
        ],
    }


# --------------------------------------------------------------------------------------------------------- measuring


def step(problem: Problem, variant: str) -> tuple[Tensor, ...]:
    device = problem.leaves[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=problem.dtype == "amp"):
        loss = problem.variants[variant]()
    return loss, *torch.autograd.grad(loss, problem.leaves)


def error(problem: Problem, variant: str) -> float:
    """Largest relative error, in the norm, of loss and gradients against float64 on the rounded inputs."""
    doubles = [x.detach().double().requires_grad_() for x in problem.leaves]
    truth = problem.truth(doubles)
    expected = (truth, *torch.autograd.grad(truth, doubles))
    got = step(problem, variant)
    return max(
        float((g.detach().double() - e.detach()).norm() / e.detach().norm()) for g, e in zip(got, expected, strict=True)
    )


def captured(problem: Problem, variant: str) -> torch.cuda.CUDAGraph:
    """The step as a graph: what is left is the GPU's own time."""
    torch.cuda.empty_cache()  # a graph has a pool of its own
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(problem, variant)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(problem, variant)
    return graph


class Figures(NamedTuple):
    graph_us: float  # median, L2 flushed before each
    warm_us: float
    eager_us: float  # wall-clock of an eager step, device included
    peak_mb: float
    kernels: int


def measure(problem: Problem, rounds: int) -> dict[str, Figures]:
    """All variants in turn, once a round."""
    graphs = {variant: captured(problem, variant) for variant in problem.variants}
    flush = torch.empty(128 * 2**20, dtype=torch.int8, device="cuda")
    times: dict[str, tuple[list[float], list[float], list[float]]] = {v: ([], [], []) for v in problem.variants}
    for _ in tqdm(range(rounds), desc=f"{problem.name} {problem.dtype}", leave=False, disable=not sys.stderr.isatty()):
        for variant, graph in graphs.items():
            for which in (0, 1):
                if which == 0:
                    flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                times[variant][which].append(1e3 * begin.elapsed_time(end))
            start = time.perf_counter()
            step(problem, variant)
            torch.cuda.synchronize()
            times[variant][2].append(1e6 * (time.perf_counter() - start))
    figures = {}
    for variant in problem.variants:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(problem, variant)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(problem, variant)
            torch.cuda.synchronize()
        kernels = len([e for e in profile.events() or [] if e.device_type == torch.profiler.DeviceType.CUDA])
        graph_us, warm_us, eager_us = (statistics.median(x) for x in times[variant])
        figures[variant] = Figures(graph_us, warm_us, eager_us, peak, kernels)
    return figures


def main(args: Args) -> None:
    known = problems(args)
    if unknown := [name for name in args.workloads if name not in known]:
        raise SystemExit(f"error: workloads: unknown {', '.join(unknown)}; known: {', '.join(known)}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: device: torch sees no GPU. --device cpu --scale 64 only checks the variants.")
    import triton

    origin = provenance() | {"triton": triton.__version__}
    if args.device == "cuda":
        origin["device"] = torch.cuda.get_device_name()
    table: list[dict[str, str]] = []
    for make in (make for name in args.workloads for make in known[name]):
        torch.manual_seed(0)
        problem = make()
        torch.set_float32_matmul_precision("high" if problem.dtype == "high" else "highest")
        limit = MAX_ERROR.get(problem.dtype, 2e-2)
        errors = {variant: error(problem.gate or problem, variant) for variant in problem.variants}
        print(f"\n{problem.name} {problem.dtype}: {problem.size}")
        wrong = {variant: e for variant, e in errors.items() if not e <= limit}
        for variant, e in wrong.items():
            print(f"{variant:24} not timed: error {e:.1e} is over {limit:.0e}")
            del problem.variants[variant]
        if "eqco_loss" in wrong:
            raise SystemExit(f"error: eqco_loss disagrees with float64 at {problem.name} {problem.dtype}.")
        if args.device != "cuda":
            print("  ".join(f"{variant} {e:.1e}" for variant, e in errors.items()))
            continue
        figures = measure(problem, args.rounds)
        base = next(iter(figures.values()))
        print(
            f"{'':24}{'graph us':>10}{'warm us':>10}{'x':>7}{'eager us':>10}{'x':>7}{'MB':>9}{'kernels':>9}{'error':>9}"
        )
        for variant, f in figures.items():
            ratio, eager_ratio = base.graph_us / f.graph_us, base.eager_us / f.eager_us
            print(
                f"{variant:24}{f.graph_us:10.1f}{f.warm_us:10.1f}{ratio:7.2f}{f.eager_us:10.0f}{eager_ratio:7.2f}"
                f"{f.peak_mb:9.1f}{f.kernels:9}{errors[variant]:9.1e}"
            )
            table.append(
                {
                    "workload": problem.name,
                    "size": problem.size,
                    "dtype": problem.dtype,
                    "variant": variant,
                    **{name: f"{value:.3f}" for name, value in f._asdict().items()},
                    "times_faster_graph": f"{ratio:.3f}",
                    "times_faster_eager": f"{eager_ratio:.3f}",
                    "relative_error": f"{errors[variant]:.2e}",
                    "rounds": str(args.rounds),
                    **origin,
                }
            )
        write_csv(args.out, table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
