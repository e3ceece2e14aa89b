"""What the loss costs in a SiMo step: encoders, loss, backward, optimiser and momentum update, of two ResNets.

    python -m benchmarks.step                       # ResNet-18 at 32 px and ResNet-50 at 224 px; small batches on a CPU
    python -m benchmarks.step --models resnet18     # one of them, of which the other's rows stay
    python -m benchmarks.step --compiled            # encoders that torch compiles, as training scripts do on a GPU

The loss is timed alone, forward and backward to the embeddings: Python's time, and the GPU's in a CUDA graph, or around
the call where it is a graph already or cannot become one. Then it is timed inside the step, under autocast as alone,
between marks around the loss's call and around its part of the backward pass; and the whole step beside one whose loss
is a product with a constant. On a GPU that is busy, Python's time inside a step costs nothing: the share of a step is
the GPU's time. On a CPU both are the same.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50  # type: ignore[import-untyped]

from eqco_loss import EqCoLoss, momentum_update

from .measure import (
    CALL,
    REPLAY,
    RESULTS,
    Row,
    Step,
    Timing,
    captured,
    host_and_wall,
    interleave_both,
    interleave_gpu,
    no_graph_because,
    provenance,
    read_csv,
    write_csv,
)
from .peers import PEERS
from .runner import check_device, free, reason_of, step_of
from .workloads import ALPHA, WORKLOADS, Case, Problem, T, band

Criterion = Callable[[Tensor, Tensor], Tensor]


class Model(NamedTuple):
    title: str
    build: Callable[..., nn.Module]
    features: int  # before the projection head
    image_size: int  # pixels
    batch: dict[str, int]  # N, by device
    goal: float  # of a step, the loss's share at most


MODELS = {
    "resnet18": Model("ResNet-18, 3 x 3 stem", resnet18, 512, 32, {"cuda": 512, "cpu": 64}, 0.03),
    "resnet50": Model("ResNet-50", resnet50, 2048, 224, {"cuda": 256, "cpu": 16}, 0.01),
}
ALONE = ("eqco_loss", "torch.compile", "eqco_loss, make_graphed_callables")  # and the baselines
COMPILED = ", compiled encoders"
COLUMNS = ("model", "n", "image_size", "dtype", "what", "ms", "min_ms", "max_ms", "host_ms", "gpu_ms", "share_of_step")


@dataclass(frozen=True)
class Args:
    models: tuple[str, ...] = tuple(MODELS)
    batch_size: int | None = None  # N. None: 512 and 256 on a GPU, 64 and 16 images on a CPU
    image_size: int | None = None  # pixels. None: 32 and 224
    compiled: bool = False  # whether torch compiles the encoders
    device: Literal["cpu", "cuda"] | None = None  # None: a GPU where there is one
    rounds: int | None = None  # None: 20 on a GPU, 5 on a CPU
    out: Path | None = None  # None: benchmarks/results/step-{cpu,gpu}.csv


def main(args: Args) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        raise SystemExit(f"error: models: unknown {', '.join(unknown)}; known: {', '.join(MODELS)}.")
    rounds = (20 if device == "cuda" else 5) if args.rounds is None else args.rounds
    for name, value, least in (("batch_size", args.batch_size, 2), ("image_size", args.image_size, 32)):
        if value is not None and value < least:
            raise SystemExit(f"error: {name}: expected {least} or more, got {value}.")
    if rounds < 1:
        raise SystemExit(f"error: rounds: expected 1 or more, got {rounds}.")
    out = args.out or RESULTS / f"step-{'gpu' if device == 'cuda' else 'cpu'}.csv"
    origin = provenance(device) | {"rounds": str(rounds)}
    check_out(out, origin)
    print(f"{origin['device']}; {rounds} rounds")
    for model in args.models:
        free(device)
        n = args.batch_size or MODELS[model].batch[device]
        try:
            rows = measured(model, n, args.image_size or MODELS[model].image_size, device, rounds, args.compiled)
        except torch.OutOfMemoryError:
            print(f"{model}, N = {n}: out of memory. Give a smaller --batch-size.")
            rows = [no_memory(model, n, args.image_size or MODELS[model].image_size, device, args.compiled)]
        before = read_csv(out) if out.exists() else []
        old = [row for row in before if row["model"] != model or row["what"].endswith(COMPILED) != args.compiled]
        write_csv(out, old + [{**row, **origin} for row in rows])
    print(f"written to {out}")


def check_out(out: Path, origin: Row) -> None:
    """A file that is cut or has other columns is an error before any time is spent on what could not be written."""
    columns = tuple(dict.fromkeys((*COLUMNS, *origin, "rounds")))
    if any(tuple(row) != columns or None in row.values() for row in (read_csv(out) if out.exists() else [])):
        raise SystemExit(
            f"error: out: {out} is cut, or has other columns than {', '.join(columns)}. Remove it, or give another."
        )


def no_memory(model: str, n: int, image_size: int, device: str, compiled: bool) -> Row:
    """The row of a step that does not fit into memory: it has no time, and its share is no number."""
    of = {"model": model, "n": str(n), "image_size": str(image_size), "dtype": dtype_of(device)}
    what = f"the whole step, eqco_loss, K = {min(16, n - 1)}" + (COMPILED if compiled else "")
    return dict.fromkeys(COLUMNS, "") | of | {"what": what, "share_of_step": "nan"}


def dtype_of(device: str) -> str:
    return "amp" if device == "cuda" else "float32"


def measured(model: str, n: int, image_size: int, device: str, rounds: int, compiled: bool = False) -> list[Row]:
    """The rows of a model, printed as they come."""
    dtype = dtype_of(device)
    picked, queue = Case("P1", n, min(16, n - 1), dtype=dtype), Case("M1", n, 65536, dtype=dtype)
    print(f"\n{MODELS[model].title}, N = {n}, {image_size} px, {dtype}")
    print(f"{'':66}{'ms':>9}{'host ms':>9}{'GPU ms':>9}{'of the step':>13}")
    of = {"model": model, "n": str(n), "image_size": str(image_size), "dtype": dtype}
    rows: list[Row] = []

    def add(what: str, wall: Timing, host: float | None, gpu: float | None, share: float) -> None:
        what += COMPILED if compiled else ""
        row = dict.fromkeys(COLUMNS, "") | of | {"what": what, "share_of_step": f"{share:.3g}"}
        row |= {"ms": f"{1e3 * wall.median:.4g}", "min_ms": f"{1e3 * wall.low:.4g}", "max_ms": f"{1e3 * wall.high:.4g}"}
        row |= {key: f"{1e3 * x:.4g}" for key, x in (("host_ms", host), ("gpu_ms", gpu)) if x is not None}
        rows.append(row)
        print(f"{what:66}{row['ms']:>9}{row['host_ms']:>9}{row['gpu_ms']:>9}{100 * share:11.2f} %")

    step = SimoStep(model, n, image_size, device, compiled)
    inside = step.compared(criteria(n, picked.k, device), rounds)
    whole = inside["eqco_loss"].wall.median
    for name, one in inside.items():
        wall, host, gpu = one
        share = 1.0 if host is None else (host if gpu is None else gpu) / wall.median
        add(f"the whole step, {name}, K = {picked.k}", wall, host, gpu, share)
        if name == "eqco_loss":
            verdict = "met" if share <= MODELS[model].goal else "missed"
            print(f"    goal for the loss inside a step: {100 * MODELS[model].goal:g} %, {verdict}")
    del step
    for case in () if compiled else (picked, queue):
        for name, (wall, host, gpu) in alone(case, device, rounds).items():
            share = (wall.median if gpu is None else gpu) / whole
            add(f"{name}, alone, K = {case.k}", wall, host if device == "cuda" else None, gpu, share)
    return rows


def alone(case: Case, device: str, rounds: int) -> dict[str, Inside]:
    """Each way to the loss by itself: forward, and backward to the embeddings."""
    names = (*ALONE[: 3 if device == "cuda" else 2], WORKLOADS[case.workload].baseline)
    problem = Problem(case, device)
    steps: dict[str, Step] = {}
    graphs: dict[str, Step] = {}
    called: dict[str, Step] = {}  # graphs already, and what cannot become one
    for one in PEERS:
        if one.wanted(case) and one.name in names:
            try:
                step = partial(step_of, problem, one.prepare(problem))
                step()
            except RuntimeError as failure:
                print(f"{one.name}, alone, K = {case.k}: {reason_of(failure)}")
                continue
            steps[one.name] = step
            if device == "cuda" and one.replays:
                called[one.name] = step
            elif device == "cuda":
                try:
                    graphs[one.name] = captured(step).replay
                except RuntimeError as failure:
                    torch.cuda.synchronize()
                    print(f"{one.name}, alone, K = {case.k}: {no_graph_because(failure)}")
                    called[one.name] = step
    both = interleave_both(steps, 4 * rounds, "alone", device)
    gpu: dict[str, float] = {}
    for some, cycles in ((graphs, REPLAY), (called, CALL)):
        if some:
            gpu |= {name: cold.median for name, (cold, _) in interleave_gpu(some, rounds, cycles).items()}
    return {name: Inside(x.wall, x.host.median, gpu.get(name)) for name, x in both.items()}


def criteria(n: int, k: int, device: str) -> dict[str, Criterion]:
    """What a step can end with."""
    constant = torch.randn(n, 128, generator=torch.Generator().manual_seed(0)).to(device)
    keep = band(torch.arange(n), n, k).to(device)
    margin = torch.tensor(ALPHA / k).log().item()

    def eager(query: Tensor, key: Tensor) -> Tensor:
        logits = (nn.functional.normalize(query) @ nn.functional.normalize(key).T).float() / T
        lse = logits.masked_fill(~keep, -torch.inf).logsumexp(1)
        return nn.functional.softplus(margin + lse - logits.diagonal()).mean()

    return {
        "a product for a loss": lambda query, key: (query * constant).sum(),
        "eager masked": eager,
        "eqco_loss": EqCoLoss(T, alpha=ALPHA, num_negatives=k),
    }


class Inside(NamedTuple):
    """A step's wall-clock, and the loss's seconds: Python's, and the GPU's."""

    wall: Timing
    host: float | None
    gpu: float | None


class SimoStep:
    """One optimiser step of SiMo: two encoders, of which one learns; any loss of their embeddings."""

    def __init__(self, model: str, n: int, image_size: int, device: str, compiled: bool = False) -> None:
        torch.manual_seed(0)
        kind = MODELS[model]
        self.device = device
        encoder: Any = kind.build(num_classes=128)
        if model == "resnet18":
            encoder.conv1, encoder.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        encoder.fc = nn.Sequential(nn.Linear(kind.features, kind.features), nn.ReLU(), encoder.fc)
        self.encoder = encoder.to(device, memory_format=torch.channels_last)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        if compiled:
            self.encoder.compile()
            self.key_encoder.compile()
        shape = n, 3, image_size, image_size
        self.views = [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)]
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
        self.marks: list[Mark] = []

    def __call__(self, criterion: Criterion) -> None:
        """Leaves four marks: before and after the loss's call, and before and after its part of backward."""
        momentum_update(self.encoder, self.key_encoder, 0.999)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            with torch.no_grad():
                keys = self.key_encoder(self.views[1])
            queries = self.encoder(self.views[0])
            queries.register_hook(lambda gradient: self.mark())
            self.marks.clear()
            self.mark()
            loss = criterion(queries, keys)
            self.mark()
        self.mark()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def mark(self) -> None:
        event = None
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append(Mark(time.perf_counter(), event))

    def compared(self, criteria: dict[str, Criterion], rounds: int) -> dict[str, Inside]:
        """The same encoders with each loss in turn, and these in every order, as each meets what the last one left."""
        walls: dict[str, list[float]] = {name: [] for name in criteria}
        hosts: dict[str, list[float]] = {name: [] for name in criteria}
        gpus: dict[str, list[float]] = {name: [] for name in criteria}
        order, shuffle = list(criteria), random.Random(0).shuffle
        for trial in range(-1, rounds):
            shuffle(order)
            for name in order:
                wall = host_and_wall(partial(self, criteria[name]), self.device)[1]
                if trial < 0:
                    continue  # the first of each warms up
                walls[name].append(wall)
                before, called, asked, done = self.marks
                hosts[name].append(called.host - before.host + done.host - asked.host)
                if before.event and called.event and asked.event and done.event:
                    forward, backward = before.event.elapsed_time(called.event), asked.event.elapsed_time(done.event)
                    gpus[name].append((forward + backward) / 1e3)
        return {
            name: Inside(
                Timing.of(walls[name]),
                statistics.median(hosts[name]),
                statistics.median(gpus[name]) if gpus[name] else None,
            )
            for name in criteria
        }


class Mark(NamedTuple):
    host: float  # seconds
    event: torch.cuda.Event | None


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
