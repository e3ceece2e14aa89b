"""What is timed: each workload's inputs, and the ways to get its loss and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue

TEMPERATURE = 0.2


class Variant(NamedTuple):
    """One way to get the loss: a function of the leaves, and the float64 truth it must agree with."""

    loss: Callable[[], Tensor]
    truth: Callable[[], Tensor]
    needs: str  # what a user has to install for it


class Workload(NamedTuple):
    """Inputs and variants; every step is the loss and the gradients of ``leaves``."""

    name: str
    size: str
    leaves: list[Tensor]
    baseline: str
    variants: dict[str, Variant]

    def step(self, name: str) -> tuple[Tensor, ...]:
        loss = self.variants[name].loss()
        return loss, *torch.autograd.grad(loss, self.leaves)

    def error(self, name: str) -> float:
        """Largest relative error (in the norm) of the loss and its gradients against float64."""
        got = self.step(name)
        truth = self.variants[name].truth()
        expected = (truth, *torch.autograd.grad(truth, self.leaves))
        return max(
            float((g.detach() - e.detach()).norm() / e.detach().norm()) for g, e in zip(got, expected, strict=True)
        )


def m1(n: int = 256, k: int = 65536, d: int = 128) -> Workload:
    """MoCo: N queries against a queue of K detached keys."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n, d, generator=generator)
    positive = F.normalize(query + torch.randn(n, d, generator=generator), dim=1)
    query = query.requires_grad_()
    queue = MomentumQueue(k, d)
    queue.enqueue(torch.randn(k, d, generator=generator))
    moco_queue = queue.contents.T.contiguous()  # (D, K), as MoCo keeps it

    def moco() -> Tensor:
        q = F.normalize(query, dim=1)
        l_pos = torch.einsum("nc,nc->n", [q, positive]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, moco_queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1)
        logits /= TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))

    eqco = EqCoLoss(TEMPERATURE, alpha=k)
    dual = DualTempInfoNCE(TEMPERATURE, 1.0)

    def infonce_truth() -> Tensor:
        q = F.normalize(query.double(), dim=1)
        s = (q * F.normalize(positive.double(), dim=1)).sum(1)
        lse = torch.logsumexp(q @ queue.contents.double().T / TEMPERATURE, 1)
        return F.softplus(lse - s / TEMPERATURE).mean()

    def dual_truth() -> Tensor:
        q = F.normalize(query.double(), dim=1)
        s, neg = (q * F.normalize(positive.double(), dim=1)).sum(1), q @ queue.contents.double().T
        gap, inter_gap = (s / t - torch.logsumexp(neg / t, 1) for t in (TEMPERATURE, 1.0))
        return (torch.exp(F.softplus(gap) - F.softplus(inter_gap)).detach() * F.softplus(-gap)).mean()

    return Workload(
        "M1",
        f"N={n} K={k} D={d}, queue detached",
        [query],
        "eager MoCo (einsum, cat, divide, cross_entropy)",
        {
            "eager MoCo (einsum, cat, divide, cross_entropy)": Variant(moco, infonce_truth, "torch"),
            "eqco_loss.EqCoLoss": Variant(lambda: eqco(query, positive, queue), infonce_truth, "eqco_loss"),
            "eqco_loss.DualTempInfoNCE": Variant(lambda: dual(query, positive, queue), dual_truth, "eqco_loss"),
        },
    )


def s1(n: int = 4096, d: int = 128) -> Workload:
    """In-batch: N queries against the other N - 1 keys, gradients to both sides."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n, d, generator=generator)
    key = (query + torch.randn(n, d, generator=generator)).requires_grad_()
    query = query.requires_grad_()
    alpha = 65536
    margin = math.log(alpha / (n - 1))
    diagonal = torch.eye(n, dtype=torch.bool)

    def eager_eqco() -> Tensor:
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / TEMPERATURE
        lse = torch.logsumexp(logits.masked_fill(diagonal, -math.inf), 1)
        return F.softplus(margin + lse - logits.diagonal()).mean()

    def cross_entropy() -> Tensor:
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / TEMPERATURE
        return F.cross_entropy(logits, torch.arange(n))

    eqco = EqCoLoss(TEMPERATURE, alpha=alpha)

    def truth(shift: float) -> Tensor:
        logits = F.normalize(query.double(), dim=1) @ F.normalize(key.double(), dim=1).T / TEMPERATURE
        lse = torch.logsumexp(logits.masked_fill(diagonal, -math.inf), 1)
        return F.softplus(shift + lse - logits.diagonal()).mean()

    return Workload(
        "S1",
        f"N={n} K={n - 1} D={d}, in-batch, both gradients",
        [query, key],
        "eager EqCo (matmul, mask, logsumexp, softplus)",
        {
            "eager EqCo (matmul, mask, logsumexp, softplus)": Variant(eager_eqco, lambda: truth(margin), "torch"),
            "eager InfoNCE (matmul, cross_entropy)": Variant(cross_entropy, lambda: truth(0.0), "torch"),
            "eqco_loss.EqCoLoss": Variant(lambda: eqco(query, key), lambda: truth(margin), "eqco_loss"),
        },
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {"M1": m1, "S1": s1}
