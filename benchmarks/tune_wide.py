"""What ``benchmarks.tune`` tries of the wide engine: candidates for the tiles of eqco_loss/ops/wide/mutual.py."""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import records

SHAPES = ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (64, 256, 4))  # rows, keys, warps
FEATURES, STAGES, GROUPS = (64,), (2, 3, 4), (16,)  # measured: 32 and 128 features, and 5 stages, are slower
SHARED = (64 * 2**10, 227 * 2**10)  # bytes that the stages of a loop may take: less hides no latency
ELEMENTS, WARPS = (512, 1024, 2048, 4096), (2, 4, 8)
PASSES = ("wide statistics", "wide weights", "wide rows")


class Candidate(NamedTuple):
    """The fields of ``mutual.TileSize``, which is not imported where there is no Triton."""

    rows: int
    keys: int
    features: int
    warps: int
    stages: int
    group: int


class Rows(NamedTuple):
    """The fields of ``mutual.RowBlocks``."""

    elements: int
    warps: int


class Problem(NamedTuple):
    dtype: str  # of the views; "amp": float32 under autocast
    d: int
    n: int  # images
    device: str


def candidates(name: str, groups: tuple[int, ...] = GROUPS) -> list[Candidate | Rows | None]:
    """The table's (None), and all that may be worth a try."""
    if name == "wide rows":
        return [None, *map(Rows, *zip(*product(ELEMENTS, WARPS), strict=True))]
    found: list[Candidate | Rows | None] = [None]
    for (rows, keys, warps), features, stages, group in product(SHAPES, FEATURES, STAGES, groups):
        if SHARED[0] <= (rows + keys) * features * 2 * stages <= SHARED[1]:
            found.append(Candidate(rows, keys, features, warps, stages, group))
    return found


def engine() -> Any:
    return importlib.import_module("eqco_loss.ops.wide.mutual")


@contextmanager
def taken(name: str, tile: Candidate | Rows | None) -> Iterator[None]:
    """The table's tile of a pass is this one."""
    if tile is None:
        yield
        return
    of_tables: dict[str, Any] = {"wide statistics": "STATISTICS", "wide weights": "WEIGHTS", "wide rows": "ROWS"}
    mutual = engine()
    kind = mutual.RowBlocks if name == "wide rows" else mutual.TileSize
    with mock.patch.object(mutual, of_tables[name], kind(*tile)):
        yield


@functools.lru_cache(maxsize=1)
def passes(problem: Problem) -> dict[str, Callable[[Any], tuple[Tensor, ...]]]:
    """CLIP's forward, its gradient and both, by the tile of what is tuned."""
    mutual = engine()
    amp = problem.dtype == "amp"
    products = torch.bfloat16 if amp else getattr(torch, problem.dtype)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(problem.n, problem.d, generator=generator)
    views = torch.cat([query, query + 0.7 * torch.randn(problem.n, problem.d, generator=generator)])
    views = views.to(problem.device, torch.float32 if amp else products)
    autocast = products if amp else None
    losses = records.symmetric_losses(views)._replace(autocast=autocast)
    first = mutual.symmetric_losses(losses, products)
    gradient = records.symmetric_gradient(
        views, torch.ones((), device=problem.device), first.rows, across=True, autocast=autocast
    )._replace(kept=first.kept)

    def forward() -> tuple[Tensor, ...]:
        out = mutual.symmetric_losses(losses, products)
        return out.loss, out.rows[:3]

    def backward() -> tuple[Tensor, ...]:
        return (mutual.symmetric_gradient(gradient, products).views,)

    def both() -> tuple[Tensor, ...]:
        return *forward(), *backward()

    steps = {"wide statistics": forward, "wide weights": backward, "wide rows": both}

    def by_tile(name: str) -> Callable[[Any], tuple[Tensor, ...]]:
        def step(tile: Candidate | Rows | None) -> tuple[Tensor, ...]:
            with taken(name, tile):
                return steps[name]()

        return step

    return {name: by_tile(name) for name in PASSES}


def compiled(work: tuple[Problem, str, Candidate | Rows | None]) -> None:
    """One candidate, run once in a process of its own, which leaves its kernels in Triton's cache on disk."""
    problem, name, tile = work
    with contextlib.suppress(Exception):  # the process that times it meets the same failure, and says so
        passes(problem)[name](tile)
        torch.cuda.synchronize()


def compile_all(problem: Problem, wanted: list[tuple[str, Candidate | Rows | None]], processes: int) -> None:
    work = [(problem, name, tile) for name, tile in wanted]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(compiled, work):
            pass
