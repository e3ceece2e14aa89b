"""The same loss, taken otherwise: compiled, in a CUDA graph, or by an engine that is asked for by name."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from eqco_loss import EqCoLoss
from eqco_loss.settings import Backend

from .registry import Loss, Peer, Prepare, UnavailableError, gpu_only
from .workloads import Case, Problem, T


def compiled(prepare: Prepare, mode: str | None = None) -> Prepare:
    def prepare_compiled(problem: Problem) -> Loss:
        loss: Loss = torch.compile(prepare(problem), dynamic=False, mode=mode)
        return loss

    return prepare_compiled


def reduced_overhead(prepare: Prepare) -> Prepare:
    """torch.compile, whose programs become CUDA graphs."""

    def prepare_reduced(problem: Problem) -> Loss:
        gpu_only(problem, "its programs are CUDA graphs")
        loss = compiled(prepare, "reduce-overhead")(problem)

        def step() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()  # or a forward without its backward would leave the fast path
            return loss()

        return step

    return prepare_reduced


def graphed(prepare: Prepare) -> Prepare:
    """torch.cuda.make_graphed_callables: forward and backward are a CUDA graph each, in otherwise eager code."""

    def prepare_graphed(problem: Problem) -> Loss:
        gpu_only(problem, "it is a CUDA graph")
        static = copy.copy(problem)  # whose leaves are the callable's arguments
        loss = prepare(static)

        def of(query: Tensor, key: Tensor) -> Tensor:
            static.query, static.key = query, key
            return loss()

        samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in (problem.query, problem.key))
        with torch.autocast("cuda", torch.bfloat16, enabled=problem.case.dtype == "amp", cache_enabled=False):
            callable_: Any = torch.cuda.make_graphed_callables(of, samples)
        return lambda: callable_(problem.query, problem.key)

    return prepare_graphed


def of_ours(prepare: Prepare, workload: str) -> list[Peer]:
    return [
        Peer("eqco_loss, torch.compile", (workload,), compiled(prepare)),
        Peer("eqco_loss, torch.compile reduce-overhead", (workload,), reduced_overhead(prepare), replays=True),
        Peer("eqco_loss, make_graphed_callables", (workload,), graphed(prepare), replays=True),
    ]


def engine(name: Backend, symmetric: bool) -> Prepare:
    def prepare_engine(problem: Problem) -> Loss:
        gpu_only(problem)
        criterion = EqCoLoss(T, alpha=None, symmetric=symmetric, backend=name)
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=problem.case.dtype == "amp"):
                criterion(problem.query, problem.key)
        except ValueError as refusal:
            raise UnavailableError(str(refusal)) from None
        return lambda: criterion(problem.query, problem.key)

    return prepare_engine


def engines(workload: str, symmetric: bool) -> list[Peer]:
    names: tuple[Backend, ...] = ("triton", "wide")
    return [Peer(f"eqco_loss, {x}", (workload,), engine(x, symmetric), serves=both_engines) for x in names]


def both_engines(case: Case) -> bool:
    """Where it is a question which engine serves."""
    return case.d in (256, 512)
