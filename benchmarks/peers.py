"""Every way to a workload's loss that a user might pick: ours, torch's own, and the packages'.

A way is a function of a :class:`Problem` that prepares what its user would have, and returns the call that is timed.
Where it cannot serve, it raises :class:`UnavailableError` with the reason, which becomes its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue

from . import variants
from .registry import (
    PEERS,
    Loss,
    Peer,
    Prepare,
    UnavailableError,
    amp_dtype,
    gpu_only,
    half_only,
    load,
    peer,
    unit,
)
from .workloads import ALPHA, INTER_T, Problem, T, band

__all__ = ["PEERS"]


# ------------------------------------------------------------------------------------------- M1, R: a queue's K keys


@peer("eager MoCo", "M1", "R", logits=4)
def eager_moco(problem: Problem) -> Loss:
    """MoCo's code path, with its (D, K) queue."""
    query, key = problem.query, problem.key
    stored = queue_of(problem).T
    if problem.case.layout == "rows":
        stored = stored.contiguous()
    labels = torch.zeros(len(query), dtype=torch.long, device=query.device)

    def loss() -> Tensor:
        q, k = unit(query), unit(key)
        l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", q, stored.clone().detach())
        logits = torch.cat([l_pos.to(l_neg.dtype), l_neg], dim=1)
        logits /= T
        return F.cross_entropy(logits.float(), labels)

    return loss


@peer("eager logsumexp", "M1", "R", logits=4)
def eager_logsumexp(problem: Problem) -> Loss:
    """Without the concatenation: the best eager form."""
    query, key, keys = problem.query, problem.key, queue_of(problem)

    def loss() -> Tensor:
        q, k = unit(query), unit(key)
        logits = (q @ keys.T).float() / T
        return F.softplus(logits.logsumexp(1) - (q * k).sum(1).float() / T).mean()

    return loss


@peer("flash-attention trick", "M1", "R")
def flash_trick(problem: Problem) -> Loss:
    """Attention with value = key returns the mean key and the log-sum-exp: a private operator and an epilogue."""
    half_only(problem)
    query, key, keys = problem.query, problem.key, queue_of(problem)

    def loss() -> Tensor:
        rows = amp_dtype(problem, keys.contiguous())
        out: Tensor = FlashTrick.apply(amp_dtype(problem, unit(query)), unit(key), rows)
        return out

    return loss


class FlashTrick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, keys: Tensor) -> Tensor:
        queries, four = q[None, None], keys[None, None]
        if q.is_cuda:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(queries, four, four, scale=1 / T)
        else:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, four, four, scale=1 / T)
        loss = F.softplus(lse.reshape(-1) - (q.float() * k.float()).sum(1) / T)
        weight = -torch.expm1(-loss) / (T * len(q))
        ctx.save_for_backward((out[0, 0].float() - k.float()) * weight[:, None])
        ctx.dtype = q.dtype
        return loss.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unit_gradient,) = ctx.saved_tensors
        return (unit_gradient * grad).to(ctx.dtype), None, None


@peer("lightly NTXentLoss, memory bank and its update", "M1", "R", logits=5)
def lightly_bank(problem: Problem) -> Loss:
    module = load("lightly").NTXentLoss(T, memory_bank_size=(problem.case.k, problem.case.d))
    bank = module.memory_bank
    bank.bank, bank.bank_ptr = queue_of(problem).clone(), torch.zeros(1, dtype=torch.long, device=problem.device)
    return lambda: module(problem.query, problem.key)


@peer("info-nce-pytorch", "M1", "R", logits=4)
def info_nce_queue(problem: Problem) -> Loss:
    module, keys = load("info-nce-pytorch").InfoNCE(T), queue_of(problem)
    return lambda: module(problem.query, problem.key, keys)


@peer("pytorch-metric-learning CrossBatchMemory", "M1")
def metric_learning_memory(problem: Problem) -> Loss:
    raise UnavailableError("another loss: its memory has the batch's own keys among the negatives")


@peer("eqco_loss", "M1", "R")
def ours_queue(problem: Problem) -> Loss:
    """With a MomentumQueue; a (D, K) tensor as it lies in memory."""
    keys = queue_of(problem)
    if problem.case.layout == "columns":
        criterion = EqCoLoss(T, alpha=None, normalize=False)
        return lambda: criterion(unit(problem.query), unit(problem.key), keys)
    criterion, queue = EqCoLoss(T, alpha=None), filled(problem)
    return lambda: criterion(problem.query, problem.key, queue)


# ---------------------------------------------------------------------------- M2: the positive is a row of the keys


@peer("eager cross entropy", "M2", logits=4)
def eager_rows(problem: Problem) -> Loss:
    keys = queue_of(problem)
    return lambda: F.cross_entropy((unit(problem.query) @ keys.T).float() / T, problem.target)


@peer("eqco_loss", "M2")
def ours_rows(problem: Problem) -> Loss:
    """With a MomentumQueue: the positive's own row is left out by its id, and counted as the positive."""
    criterion, keys, queue = EqCoLoss(T, alpha=None), queue_of(problem), filled(problem, ids=True)
    return lambda: criterion(problem.query, keys[problem.target], queue, query_ids=problem.target)


# The packages' cross entropies, which take (queries, rows, labels): M2 with a queue's keys, S1 with the batch's.


def labelled(problem: Problem) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Unit queries over the temperature, unit keys, and each query's row."""
    if problem.queue is None:
        labels = torch.arange(problem.case.n, device=problem.device)
        return lambda: (
            amp_dtype(problem, unit(problem.query) / T),
            amp_dtype(problem, unit(problem.key)),
            labels,
        )
    keys = problem.queue
    return lambda: (amp_dtype(problem, unit(problem.query) / T), amp_dtype(problem, keys), problem.target)


@peer("cut-cross-entropy", "M2", "S1")
def cut_cross_entropy(problem: Problem) -> Loss:
    """Exact: its filter of small gradients is off."""
    gpu_only(problem)
    cut, inputs = load("cut-cross-entropy").linear_cross_entropy, labelled(problem)
    return lambda: cut(*inputs(), filter_eps=None)


@peer("cut-cross-entropy, impl=torch_compile", "M2", "S1", logits=3)
def cut_cross_entropy_compiled(problem: Problem) -> Loss:
    """The package's way for machines without its kernels."""
    compiled, inputs = load("cut-cross-entropy").linear_cross_entropy, labelled(problem)
    return lambda: compiled(*inputs(), impl="torch_compile")


@peer("liger-kernel", "M2", "S1")
def liger(problem: Problem) -> Loss:
    gpu_only(problem)
    module, inputs = load("liger-kernel").LigerFusedLinearCrossEntropyLoss(), labelled(problem)

    def loss() -> Tensor:
        q, keys, labels = inputs()
        value: Tensor = module(keys, q, labels)
        return value

    return loss


@peer("inf-cl", "M2", "S1")
def inf_cl(problem: Problem) -> Loss:
    gpu_only(problem)
    flash, inputs = load("inf-cl").cal_flash_loss, labelled(problem)

    def loss() -> Tensor:
        q, keys, labels = inputs()
        return flash(q, keys, labels, head_dim=min(problem.case.d, 256)).mean()  # type: ignore[no-any-return]

    return loss


def chunked(problem: Problem, **options: Any) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    inputs, chosen = labelled(problem), torch.nn.LinearCrossEntropyOptions(**options)

    def loss() -> Tensor:
        q, keys, labels = inputs()
        return F.linear_cross_entropy(q, keys, labels, options=chosen)

    return loss


@peer("F.linear_cross_entropy, default chunk", "M2", "S1")
def linear_cross_entropy(problem: Problem) -> Loss:
    return chunked(problem)


@peer("F.linear_cross_entropy, 64 MB chunk", "M2", "S1")
def linear_cross_entropy_tuned(problem: Problem) -> Loss:
    rows = max(1, min(problem.case.n, 2**24 // problem.case.k))
    return chunked(problem, batch_chunk_size=rows)


# ------------------------------------------------------------------------------------------ T1: the dual temperature


@peer("eager dual temperature", "T1", logits=6)
def eager_dual(problem: Problem) -> Loss:
    """As its authors write it: two softmaxes and the weight between them."""
    query, key, keys = problem.query, problem.key, queue_of(problem)

    def loss() -> Tensor:
        q = unit(query)
        logits = torch.cat([(q * unit(key)).sum(1, keepdim=True).to(query.dtype), q @ keys.T], 1).float()
        intra, inter = (logits / T).softmax(1)[:, 0], (logits / INTER_T).softmax(1)[:, 0]
        weight = ((1 - inter) / (1 - intra)).detach()
        return -(weight * intra.log()).mean()

    return loss


@peer("eqco_loss", "T1")
def ours_dual(problem: Problem) -> Loss:
    criterion, queue = DualTempInfoNCE(T, INTER_T), filled(problem)
    return lambda: criterion(problem.query, problem.key, queue)


# ------------------------------------------------------------------------------------------------ S1, C1: in-batch


@peer("eager cross entropy", "S1", logits=4)
def eager_batch(problem: Problem) -> Loss:
    labels = torch.arange(problem.case.n, device=problem.device)
    return lambda: F.cross_entropy((unit(problem.query) @ unit(problem.key).T).float() / T, labels)


def masked(problem: Problem, margin: float) -> Loss:
    """EqCo as one would write it: a mask, a log-sum-exp, a softplus."""
    n = problem.case.n
    keep = band(torch.arange(n, device=problem.device), n, problem.case.k)

    def loss() -> Tensor:
        logits = (unit(problem.query) @ unit(problem.key).T).float() / T
        lse = logits.masked_fill(~keep, -math.inf).logsumexp(1)
        return F.softplus(margin + lse - logits.diagonal()).mean()

    return loss


@peer("eager masked", "S1", logits=5)
def eager_masked(problem: Problem) -> Loss:
    return masked(problem, 0.0)


@peer("info-nce-pytorch", "S1", logits=4)
def info_nce_batch(problem: Problem) -> Loss:
    module = load("info-nce-pytorch").InfoNCE(T)
    return lambda: module(problem.query, problem.key)


@peer("pytorch-metric-learning NTXentLoss", "S1", "S2", logits=3, pairs=True)
def metric_learning(problem: Problem) -> Loss:
    losses = load("pytorch-metric-learning")
    module = losses.SelfSupervisedLoss(losses.NTXentLoss(T), symmetric=problem.case.workload == "S2")
    return lambda: module(problem.query, problem.key)


@peer("memeff InfoNCE", "S1")
def memeff_batch(problem: Problem) -> Loss:
    """Its margin of 2 switches its mask of false negatives off; ``stable`` would change the gradient's scale."""
    return memeff(problem, "MemoryEfficientQwen3Loss", margin=2.0)


@peer("memeff CLIP", "C1")
def memeff_clip(problem: Problem) -> Loss:
    return memeff(problem, "MemoryEfficientCLIPLoss")


def memeff(problem: Problem, name: str, **options: Any) -> Loss:
    gpu_only(problem)
    module = getattr(load("memeff"), name)(T, normalized_inputs=True, stable=False, **options)

    def loss() -> Tensor:
        value: Tensor = module(amp_dtype(problem, unit(problem.query)), amp_dtype(problem, unit(problem.key)))
        return value

    return loss


@peer("eqco_loss", "S1")
def ours_batch(problem: Problem) -> Loss:
    criterion = EqCoLoss(T, alpha=None)
    return lambda: criterion(problem.query, problem.key)


@peer("eager CLIP", "C1", logits=6)
def eager_clip(problem: Problem) -> Loss:
    labels = torch.arange(problem.case.n, device=problem.device)

    def loss() -> Tensor:
        logits = (unit(problem.query) @ unit(problem.key).T).float() / T
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return loss


@peer("open_clip ClipLoss", "C1", logits=8)
def open_clip(problem: Problem) -> Loss:
    module = load("open_clip").ClipLoss()
    return lambda: module(unit(problem.query), unit(problem.key), 1 / T)


@peer("eqco_loss", "C1")
def ours_clip(problem: Problem) -> Loss:
    criterion = EqCoLoss(T, alpha=None, symmetric=True)
    return lambda: criterion(problem.query, problem.key)


# ------------------------------------------------------------------------------------------------------ S2: NT-Xent


@peer("eager NT-Xent", "S2", logits=3.5)
def eager_views(problem: Problem) -> Loss:
    n = problem.case.n
    partner = torch.arange(2 * n, device=problem.device).roll(n)

    def loss() -> Tensor:
        z = unit(torch.cat([problem.query, problem.key]))
        return F.cross_entropy(((z @ z.T).float() / T).fill_diagonal_(-math.inf), partner)

    return loss


@peer("lightly NTXentLoss", "S2", logits=6)
def lightly_views(problem: Problem) -> Loss:
    module = load("lightly").NTXentLoss(T)
    return lambda: module(problem.query, problem.key)


@peer("eqco_loss", "S2")
def ours_views(problem: Problem) -> Loss:
    criterion = EqCoLoss(T, alpha=None, in_batch="views", symmetric=True)
    return lambda: criterion(problem.query, problem.key)


# --------------------------------------------------------------------------------------------------------- P1: SiMo


@peer("eager masked", "P1", logits=5)
def eager_picked(problem: Problem) -> Loss:
    return masked(problem, math.log(ALPHA / problem.case.k))


@peer("eager gathered", "P1", logits=5)
def eager_gathered(problem: Problem) -> Loss:
    """(N, K, D) negatives, one product a query."""
    n, k = problem.case.n, problem.case.k
    picked = (torch.arange(n)[:, None] + 1 + torch.arange(k)).remainder(n).to(problem.device)
    margin = math.log(ALPHA / k)

    def loss() -> Tensor:
        q, keys = unit(problem.query), unit(problem.key)
        logits = torch.einsum("nd,nkd->nk", q, keys[picked]).float() / T
        return F.softplus(margin + logits.logsumexp(1) - (q * keys).sum(1).float() / T).mean()

    return loss


@peer("eqco_loss", "P1")
def ours_picked(problem: Problem) -> Loss:
    criterion = EqCoLoss(T, alpha=ALPHA, num_negatives=problem.case.k)
    return lambda: criterion(problem.query, problem.key)


# ----------------------------------------------------------------------------- torch.compile of the eager, and of ours


EAGER: dict[Prepare, tuple[str, ...]] = {
    eager_logsumexp: ("M1", "R"),
    eager_rows: ("M2",),
    eager_dual: ("T1",),
    eager_batch: ("S1",),
    eager_clip: ("C1",),
    eager_views: ("S2",),
    eager_picked: ("P1",),
}
for eager, of in EAGER.items():
    PEERS.append(Peer("torch.compile", of, variants.compiled(eager), logits=3))

OURS: dict[Prepare, str] = {
    ours_queue: "M1",
    ours_rows: "M2",
    ours_dual: "T1",
    ours_batch: "S1",
    ours_clip: "C1",
    ours_views: "S2",
    ours_picked: "P1",
}
for ours, name in OURS.items():
    PEERS += variants.of_ours(ours, name)
for workload, symmetric in (("S1", False), ("C1", True)):
    PEERS += variants.engines(workload, symmetric)


def queue_of(problem: Problem) -> Tensor:
    if problem.queue is None:
        raise ValueError(f"{problem.case.workload}: has no queue.")
    return problem.queue


def filled(problem: Problem, *, ids: bool = False) -> MomentumQueue:
    """A queue of the problem's keys; with ``ids``, each has its place for one."""
    keys = queue_of(problem)
    queue = MomentumQueue(*keys.shape, dtype=keys.dtype, device=keys.device, store_ids=ids)
    if ids:
        queue.enqueue(keys, torch.arange(len(keys), device=keys.device))
    else:
        queue.load_moco(keys.T)
    return queue
