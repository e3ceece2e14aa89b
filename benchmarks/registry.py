"""What a way is, the list of all of them, and the packages that some need."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .workloads import Case, Problem

Loss = Callable[[], Tensor]
Prepare = Callable[[Problem], Loss]
EXTRA = 'pip install -e ".[benchmarks]"'
PACKAGES = {  # distribution, and the module to import
    "lightly": ("lightly", "lightly.loss"),
    "info-nce-pytorch": ("info-nce-pytorch", "info_nce"),
    "pytorch-metric-learning": ("pytorch-metric-learning", "pytorch_metric_learning.losses"),
    "open_clip": ("open_clip_torch", "open_clip.loss"),
    "cut-cross-entropy": ("cut-cross-entropy", "cut_cross_entropy"),
    "liger-kernel": ("liger_kernel", "liger_kernel.transformers"),
    "inf-cl": ("inf-cl", "inf_cl"),
    "memeff": ("memeff", "memeff"),
}


class UnavailableError(Exception):
    """Why a peer cannot serve a case."""


def everywhere(case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Peer:
    """One way to the loss of some workloads."""

    name: str
    workloads: tuple[str, ...]
    prepare: Prepare
    logits: float = 0.0  # how many float32 tensors of its logits' size it holds at once, forward and backward
    pairs: bool = False  # its logits have a column for every pair of a positive and a negative of any row
    replays: bool = False  # its calls are CUDA graphs already, which cannot be captured into another
    serves: Callable[[Case], bool] = everywhere  # where it is a way of its own

    def wanted(self, case: Case) -> bool:
        return case.workload in self.workloads and self.serves(case)

    @property
    def package(self) -> str | None:
        return next((package for package in PACKAGES if self.name.startswith(package)), None)

    @property
    def version(self) -> str:
        """Blank of what is no package, or one that can be imported without having been installed."""
        try:
            return importlib.metadata.version(PACKAGES[self.package][0]) if self.package else ""
        except importlib.metadata.PackageNotFoundError:
            return ""

    def bytes(self, problem: Problem) -> float:
        """What it is expected to hold at once."""
        case = problem.case
        columns = case.k * (case.rows if self.pairs else 1)
        return 4.0 * self.logits * case.rows * columns


PEERS: list[Peer] = []


def peer(name: str, *workloads: str, **about: Any) -> Callable[[Prepare], Prepare]:
    """Adds the decorated function to the list; ``about`` has the other fields of :class:`Peer`."""

    def add(prepare: Prepare) -> Prepare:
        PEERS.append(Peer(name, workloads, prepare, **about))
        return prepare

    return add


def load(package: str) -> Any:
    """Its module, or the extra to install."""
    distribution, module = PACKAGES[package]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{distribution} is not installed ({error}): {EXTRA}") from error


def gpu_only(problem: Problem, why: str = "its kernels are Triton's") -> None:
    if problem.device.type != "cuda":
        raise UnavailableError(f"no CPU path: {why}")


def half_only(problem: Problem) -> None:
    if problem.device.type == "cuda" and problem.case.dtype in ("float32", "high"):
        raise UnavailableError("flash attention is for half precision")


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def amp_dtype(problem: Problem, x: Tensor) -> Tensor:
    """Autocast does not reach a package's own kernels: their user converts."""
    return x.bfloat16() if problem.case.dtype == "amp" else x
