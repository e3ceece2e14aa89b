"""What is timed: a workload's inputs, and its loss and gradients in float64, which every way to them must meet."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

T = 0.2  # temperature
INTER_T = 1.0  # of the dual temperature, across rows
ALPHA = 65536.0
DTYPES = ("float32", "high", "bfloat16", "float16", "amp")  # high: float32 with TF32 products; amp: float32, autocast
CHUNK = 2**24  # similarities of the truth at a time


@dataclass(frozen=True)
class Case:
    """One workload at one size: N queries, K negatives each, D features."""

    workload: str
    n: int
    k: int
    d: int = 128
    dtype: str = "float32"
    layout: str = "rows"  # of a queue: "rows" (K, D), or "columns" (D, K) as MoCo keeps it

    @property
    def size(self) -> str:
        columns = ", queue (D, K)" if self.layout == "columns" else ""
        return f"N={self.n} K={self.k} D={self.d}{columns}"

    @property
    def keys_learn(self) -> bool:
        """Whether the keys get a gradient: in-batch, yes; a queue's, another encoder's and SiMo's do not."""
        return WORKLOADS[self.workload].keys_learn

    @property
    def operations(self) -> float:
        """Of the matrix products that no exact way to loss and gradients can do without."""
        return WORKLOADS[self.workload].products * 2.0 * self.rows * self.k * self.d

    @property
    def rows(self) -> int:
        return 2 * self.n if self.workload == "S2" else self.n

    @property
    def bytes(self) -> float:
        """Inputs read once and gradients written once."""
        each = 2 if self.dtype in ("bfloat16", "float16") else 4
        inputs = 2 * self.n + (self.k if WORKLOADS[self.workload].queue else 0)
        gradients = 2 * self.n if self.keys_learn else self.n
        return float(each * self.d * (inputs + gradients))


@dataclass(frozen=True)
class Kind:
    """What a workload asks."""

    title: str
    queue: bool  # negatives are K given keys; otherwise they are of the batch
    keys_learn: bool
    products: float  # of N x K x D that are needed: 1.5 where half of a symmetric matrix of logits is enough
    baseline: str  # the peer that ratios are over


WORKLOADS = {
    "M1": Kind("MoCo: N queries against a queue of K detached keys", True, False, 2, "eager MoCo"),
    "R": Kind("M1 at sizes that no tile divides", True, False, 2, "eager MoCo"),
    "M2": Kind("the positive is a row of the K detached keys", True, False, 2, "eager cross entropy"),
    "T1": Kind("dual temperature against a queue of K detached keys", True, False, 2, "eager dual temperature"),
    "S1": Kind("in-batch InfoNCE, gradients to both sides", False, True, 3, "eager cross entropy"),
    "C1": Kind("CLIP: both directions of S1", False, True, 3, "eager CLIP"),
    "S2": Kind("NT-Xent over 2N embeddings", False, True, 1.5, "eager NT-Xent"),
    "P1": Kind("SiMo: K negatives of the batch, detached, and EqCo's margin", False, False, 2, "eager masked"),
}


class Problem:
    """A case's tensors. ``query`` and, where keys learn, ``key`` are leaves; a queue's keys have unit rows."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, torch.device(device)
        n, k, d = case.n, case.k, case.d
        self.kind = torch.float32 if case.dtype in ("float32", "high", "amp") else getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(0)

        common = torch.randn(1, d, generator=generator)  # embeddings have a mean; without one, negatives hardly pull

        def random(rows: int) -> Tensor:
            return (torch.randn(rows, d, generator=generator) + common).to(self.device)

        query = random(n)
        self.queue: Tensor | None = None  # (K, D)
        if WORKLOADS[case.workload].queue:
            rows = F.normalize(random(k)).to(self.kind)
            self.queue = rows.T.contiguous().T if case.layout == "columns" else rows
        if case.workload == "M2":  # a positive that is near, and a row of the keys
            self.target = torch.randperm(k, generator=generator)[:n].to(self.device)
            key = self.queue[self.target]  # type: ignore[index]
            query = F.normalize(query) + key.float()
        else:
            key = query + 0.7 * random(n)
        self.key = key.to(self.kind).requires_grad_(case.keys_learn)
        self.query = query.to(self.kind).requires_grad_()
        self.leaves = [self.query, self.key] if case.keys_learn else [self.query]
        # float16's gradients as a GradScaler has them: those of single logits would vanish
        self.scale = torch.tensor(2.0**14, device=self.device) if case.dtype == "float16" else None

    def with_own_leaves(self) -> Problem:
        """The same with leaves of the same values that no other way knows.

        A way may hold on to its last step, and through it to the leaves' gradient nodes, which belong to that step's
        stream: no CUDA graph of another way with the same leaves could be captured.
        """
        other = copy.copy(self)
        query, key = (x.detach().clone().requires_grad_(x.requires_grad) for x in (self.query, self.key))
        other.query, other.key, other.leaves = query, key, [query, key][: len(self.leaves)]
        return other

    def truth(self) -> list[Tensor]:
        """Loss and (scaled) gradients in float64 on these inputs, some rows at a time."""
        doubles = [self.query.detach().double().requires_grad_(), self.key.detach().double().requires_grad_()]
        unit = [F.normalize(x) for x in doubles]
        grads = [torch.zeros_like(x) for x in unit]
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        leaves = [x.detach().requires_grad_() for x in unit]
        for rows in self._rows(leaves):
            value = rows()
            loss += value.detach()
            for total, grad in zip(grads, torch.autograd.grad(value, leaves, allow_unused=True), strict=True):
                if grad is not None:
                    total += grad
        grads = list(torch.autograd.grad(unit, doubles, grads))
        if self.scale is not None:
            grads = [x * self.scale for x in grads]
        return [loss, *grads[: len(self.leaves)]]

    def _rows(self, leaves: list[Tensor]) -> Iterator[Callable[[], Tensor]]:
        """The loss of some anchors, as their part of the mean."""
        query, key = leaves
        workload, n = self.case.workload, self.case.n
        keys = None if self.queue is None else self.queue.double()
        step = max(1, CHUNK // (self.case.k + 1))
        directions = [(query, key), (key, query)] if workload in ("C1", "S2") else [(query, key)]
        for anchors, others in directions:
            for start in range(0, n, step):
                rows = torch.arange(start, min(n, start + step), device=self.device)

                def part(anchors: Tensor = anchors, others: Tensor = others, rows: Tensor = rows) -> Tensor:
                    q, positive = anchors[rows], (anchors[rows] * others[rows]).sum(1)
                    logits = q @ (others if keys is None else keys).T
                    if workload == "S2":
                        own = (q @ anchors.T).scatter(1, rows[:, None], -math.inf)
                        logits = torch.cat([logits.scatter(1, rows[:, None], -math.inf), own], 1)
                    elif keys is None:
                        gone = ~band(rows, n, self.case.k)
                        logits = logits.masked_fill(gone, -math.inf)
                    elif workload == "M2":
                        logits = logits.scatter(1, self.target[rows, None], -math.inf)
                    gap = positive / T - (logits / T).logsumexp(1)
                    if workload == "T1":
                        inter = positive / INTER_T - (logits / INTER_T).logsumexp(1)
                        weight = (exact_softplus(gap) - exact_softplus(inter)).exp().detach()
                        return (weight * exact_softplus(-gap)).sum() / n
                    margin = math.log(ALPHA / self.case.k) if workload == "P1" else 0.0
                    return exact_softplus(margin - gap).sum() / (n * len(directions))

                yield part


def exact_softplus(x: Tensor) -> Tensor:
    """F.softplus returns its argument above 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def band(rows: Tensor, n: int, k: int) -> Tensor:
    """(rows, N): which of the N keys are among the next K of each row."""
    return (torch.arange(n, device=rows.device) - rows[:, None] - 1) % n < k


def cases(device: str, dtypes: tuple[str, ...]) -> list[Case]:
    """The whole matrix, the cases that matter most first; on a CPU without the sizes that take it minutes a step."""
    if device == "cpu":
        return [case for dtype in dtypes for case in cpu_cases(dtype)]
    found = [replace(case, dtype=dtype) for case in WORTH for dtype in ("bfloat16", "amp") if dtype in dtypes]
    found += [Case("M1", 256, 65536, dtype=dtype) for dtype in ("float32", "high", "float16") if dtype in dtypes]
    found += [replace(case, dtype=dtype) for case in FURTHER for dtype in ("bfloat16", "amp") if dtype in dtypes]
    return found


WORTH = [
    Case("M1", 256, 65536),
    Case("S1", 4096, 4095),
    Case("C1", 4096, 4095, 512),
    Case("S2", 4096, 8190),
    Case("P1", 256, 16),
    Case("C1", 4096, 4095, 1024),
    Case("S1", 4096, 4095, 256),
    Case("T1", 256, 65536),
    Case("M2", 256, 65536),
    Case("C1", 4096, 4095, 768),
    Case("C1", 4096, 4095, 256),
    Case("S1", 16384, 16383),
]
FURTHER = [
    Case("M1", 1024, 65536),
    Case("C1", 32768, 32767, 512),
    Case("C1", 32768, 32767, 768),
    Case("C1", 32768, 32767, 1024),
    Case("S2", 32768, 65534),
    Case("M1", 256, 65536, layout="columns"),
    Case("R", 250, 65521, 120),
    Case("S1", 256, 255),
    Case("S1", 256, 255, 512),
    Case("S1", 4096, 4095, 512),
    Case("S1", 16384, 16383, 512),
    Case("S2", 256, 510),
    Case("S2", 16384, 32766),
    Case("S2", 32768, 65534, 512),
    Case("P1", 256, 64),
    Case("P1", 256, 255),
]


def cpu_cases(dtype: str) -> list[Case]:
    found = [
        Case("M1", 256, 65536),
        Case("S1", 4096, 4095),
        Case("S1", 256, 255),
        Case("P1", 256, 16),
        Case("S2", 4096, 8190),
        Case("C1", 4096, 4095, 512),
        Case("T1", 256, 65536),
        Case("M2", 256, 65536),
        Case("M1", 1024, 65536),
        Case("M1", 256, 65536, layout="columns"),
        Case("R", 250, 65521, 120),
        Case("S1", 256, 255, 512),
        Case("S1", 4096, 4095, 512),
        Case("S2", 256, 510),
        Case("P1", 256, 64),
        Case("P1", 256, 255),
        Case("C1", 4096, 4095, 768),
        Case("C1", 4096, 4095, 1024),
        *(Case("S1", 64, 63), Case("C1", 64, 63, 512), Case("S2", 64, 126), Case("P1", 64, 16)),  # mostly Python's time
    ]
    return [replace(case, dtype=dtype) for case in found]


def quick_cases(dtypes: tuple[str, ...]) -> list[Case]:
    """A look at every workload, at sizes that two CPU cores pass in two minutes."""
    sizes = [
        Case("M1", 256, 16384),
        Case("M1", 256, 16384, layout="columns"),
        Case("R", 250, 8191, 120),
        Case("M2", 256, 8192),
        Case("T1", 256, 16384),
        Case("S1", 2048, 2047),
        Case("C1", 1024, 1023),
        Case("S2", 1024, 2046),
        *(Case("P1", 256, k) for k in (16, 64, 255)),
    ]
    return [replace(case, dtype=dtype) for dtype in dtypes for case in sizes]
