"""One world of inputs: every kind of keys and pairs, as records, the answer of any engine, and dense autograd's.

The formulas are written out here, in the dtype of the inputs or in float64, and share nothing with the package.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eqco_loss.ops.backends import BACKENDS
from eqco_loss.ops.calls import (
    KeySet,
    KeysGradient,
    LogSumExp,
    Metric,
    Pairs,
    Row,
    RowLosses,
    SymmetricGradient,
    SymmetricLosses,
)
from tests.cases import DEVICE
from tests.tolerance import assert_as_exact_as_eager

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, K, D = 22, 37, 19
Answers = dict[str, Tensor]
BOTH: tuple[tuple[bool, float | None, float, bool], ...] = (  # dual, alpha, temperature, whether it is learned
    (False, 50.0, 0.2, True),
    (True, None, 0.2, False),
    (False, 9.0, 0.02, True),
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.exp(torch.randn(shape[:-1], generator=generator, dtype=torch.float64))[..., None]).to(
        DEVICE, dtype
    )


def integers(*shape: int, high: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def key_sets(kind: str, dtype: torch.dtype, normalize: bool) -> tuple[list[KeySet], int]:
    """One or two sets of keys, and how many queries there are."""
    keys, pairs = draw(K, D, seed=3, dtype=dtype), Pairs()
    n = 5 if kind in ("own", "own ids") else N  # of keys (N, K, D) the interpreter visits each
    second = []
    if kind in ("ids", "ids of pairs", "own ids"):
        shape = (K,) if kind == "ids" else (n, K)
        pairs = Pairs(integers(n, high=4, seed=4), integers(*shape, high=4, seed=5))
    if kind == "ids of few":  # all but three queries meet every key
        keys = draw(40, D, seed=3, dtype=dtype)
        pairs = Pairs(torch.arange(N, device=DEVICE), torch.arange(40, device=DEVICE) + N - 3)
    if kind in ("mask", "mask of pairs"):
        mask = integers(*((K,) if kind == "mask" else (N, K)), high=3, seed=6) > 0
        pairs = Pairs(mask=mask)
    if kind == "everything":  # that a queue may leave out
        ids = integers(N, high=4, seed=4), integers(K, high=4, seed=5).int()
        pairs = Pairs(*ids, integers(N, K, high=3, seed=6) > 0, torch.tensor(K - 9, device=DEVICE))
    if kind == "ranks ids":
        pairs = Pairs(integers(N, high=4, seed=4), integers(K, high=4, seed=5), band=[7, K - 1, K])
    if kind == "rolled ids":
        n, ids = K, (integers(K, high=4, seed=4), integers(K, high=4, seed=5))
        pairs = Pairs(*ids, band=[0, 5, K])
    if kind == "picked ids":
        picked = [torch.randperm(K, generator=torch.Generator().manual_seed(i))[:9] for i in range(N)]
        pairs = Pairs(integers(N, high=4, seed=4), integers(K, high=4, seed=5), picked=torch.stack(picked).to(DEVICE))
    if kind == "count":
        pairs = Pairs(filled=torch.tensor(21, device=DEVICE))
    if kind == "batch":
        n, pairs = K, Pairs(band=[0, K - 1, K])
    if kind == "views":
        n, keys, pairs = K, draw(2 * K, D, seed=3, dtype=dtype), Pairs(band=[0, K - 1, K])
    if kind == "ranks":
        pairs = Pairs(band=[7, K - 1, K])
    if kind == "rolled":
        pairs = Pairs(band=[30, 5, K])
    if kind == "picked":
        pairs = Pairs(
            picked=torch.stack(
                [torch.randperm(K, generator=torch.Generator().manual_seed(i))[:6] for i in range(N)]
            ).to(DEVICE)
        )
    if kind in ("own", "own ids"):
        keys = draw(n, K, D, seed=3, dtype=dtype)
    if kind == "two sets":
        ids = integers(N, high=4, seed=4), integers(K, high=4, seed=5)
        more = draw(29, D, seed=7, dtype=dtype)
        more = more / more.norm(dim=1, keepdim=True)
        second = [KeySet(more, Pairs(filled=torch.tensor(17, device=DEVICE)), False, True)]
        pairs = Pairs(*ids)
    return [KeySet(keys, pairs, normalize), *second], n


KINDS = (
    "all",
    "ids",
    "ids of pairs",
    "ids of few",
    "own",
    "own ids",
    "mask",
    "mask of pairs",
    "everything",
    "count",
    "batch",
    "views",
    "ranks",
    "ranks ids",
    "rolled",
    "rolled ids",
    "picked",
    "picked ids",
    "two sets",
)


# --------------------------------------------------------------------------------------------------------- the formulas


def keep_of(pairs: Pairs, n: int, k: int) -> Tensor:
    """Which pairs stay, one by one."""
    keep = torch.ones(n, k, dtype=torch.bool)
    for i in range(n):
        for j in range(k):
            if pairs.band:
                offset, width, modulus = pairs.band
                ahead = (j - (offset + i)) % modulus
                keep[i, j] &= 1 <= ahead <= width
            if pairs.filled is not None:
                keep[i, j] &= j < int(pairs.filled)
            if pairs.query_ids is not None and pairs.key_ids is not None:
                ids = pairs.key_ids if pairs.key_ids.dim() == 1 else pairs.key_ids[i]
                keep[i, j] &= int(ids[j]) != int(pairs.query_ids[i])
            if pairs.mask is not None:
                mask = pairs.mask if pairs.mask.dim() == 1 else pairs.mask[i]
                keep[i, j] &= bool(mask[j])
        if pairs.picked is not None:
            chosen = torch.zeros(k, dtype=torch.bool)
            chosen[pairs.picked[i].cpu()] = True
            keep[i] &= chosen
    return keep


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def normal(x: Tensor, normalize: bool) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) if normalize else x


def dense_rows(
    q: Tensor,
    p: Tensor,
    sets: list[tuple[Tensor, Tensor]],  # unit keys and which pairs stay
    t: float | Tensor,
    inter_t: float | None,
    alpha: float | None,
) -> tuple[Tensor, dict[Metric, Tensor]]:
    """Of unit rows; the product in their dtype, and from there on float32 for halves."""
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    similarity = torch.cat([q @ k.T if k.dim() == 2 else (k @ q[:, :, None])[:, :, 0] for k, _ in sets], 1).to(
        statistics
    )
    keep = torch.cat([keep for _, keep in sets], 1).to(q.device)
    s = (q * p).sum(1).to(statistics)
    count = keep.sum(1)
    shift = 0.0 if alpha is None else torch.log(alpha / count.to(statistics))

    def gap(t: float | Tensor) -> Tensor:
        return s / t - (similarity / t).masked_fill(~keep, -math.inf).logsumexp(1) - shift

    loss = intra = softplus(-gap(t))
    weight, log_weight = torch.sigmoid(-gap(t)), torch.zeros_like(s)
    if inter_t is not None:
        log_weight = softplus(gap(t)) - softplus(gap(inter_t))
        loss, weight = log_weight.exp().detach() * intra, torch.sigmoid(-gap(inter_t))
    return loss, {
        Metric.WEIGHT: weight,
        Metric.COUNT: count.to(statistics),
        Metric.LOG_WEIGHT: log_weight,
        Metric.INTRA_LOSS: intra,
        Metric.RANK: (keep & (similarity > s[:, None])).sum(1).to(statistics),
        Metric.NEGATIVE: similarity.masked_fill(~keep, 0.0).sum(1) / count,
    }


@dataclass(frozen=True)
class Case:
    kind: str = "all"
    backend: str = "wide"
    dtype: torch.dtype = torch.float64
    dual: bool = False
    alpha: float | None = 50.0
    temperature: float = 0.2
    learned: bool = True
    normalize: bool = True
    reduced: bool = False
    autocast: torch.dtype | None = None

    def call(self) -> RowLosses:
        sets, n = key_sets(self.kind, self.dtype, self.normalize)
        shrink = 1.0 if self.normalize else 0.2  # or logits of raw rows saturate every loss
        query, positive = (draw(n, D, seed=i, dtype=self.dtype) * shrink for i in (1, 2))
        return RowLosses(
            query=query,
            positive=(0.5 * positive + query).to(self.dtype),
            first=sets[0],
            second=sets[1] if len(sets) > 1 else None,
            temperature=self.temperature,
            learned_temperature=self.learned_temperature(),
            inter_temperature=1.0 if self.dual else None,
            alpha=self.alpha,
            normalize=self.normalize,
            share=[3, 2 * n],
            reduced=self.reduced,
            may_raise=True,
            need_query_gradient=True,
            need_positive_gradient=True,
            need_keys_gradient=True,
            need_metrics=True,
            autocast=self.autocast,
            backend=self.backend,
        )

    def learned_temperature(self) -> Tensor | None:
        if not self.learned:
            return None
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.tensor(self.temperature, dtype=dtype, device=DEVICE)

    def grad(self, n: int) -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.reduced:
            return torch.tensor(1.7, dtype=dtype, device=DEVICE)
        return torch.linspace(-0.5, 1.5, n, dtype=dtype, device=DEVICE)


def ours(call: RowLosses, grad: Tensor) -> Answers:
    engine = BACKENDS[call.backend]
    out = engine.row_losses(call)
    factor = grad if grad.dim() == 0 else grad[:, None]
    found = {
        "loss": out.loss,
        "query": (out.query_gradient * factor).to(call.query.dtype),
        "positive": (out.positive_gradient * factor).to(call.positive.dtype),
        **{f"metric {metric.name}": out.metrics[metric] for metric in Metric},
    }
    for place, one in enumerate(call.sets):
        if place == 0 and out.keys_gradient is not None:
            found["keys 0"] = (out.keys_gradient * grad).to(one.keys.dtype)
            continue
        gradients = engine.keys_gradient(
            KeysGradient(
                query=call.query,
                first=one,
                grad=grad,
                rows=out.rows,
                temperature=call.temperature,
                learned_temperature=call.learned_temperature,
                normalize=call.normalize,
                autocast=call.autocast,
                backend=call.backend,
                query_gradient=out.query_gradient if place == 0 else None,
            )
        )
        found[f"keys {place}"] = gradients.keys
        if place == 0:
            found["query"] = gradients.query
    if call.learned_temperature is not None:
        found["temperature"] = (grad * out.rows[Row.TEMPERATURE_GRADIENT]).sum().to(call.learned_temperature.dtype)
    return found


def dense(call: RowLosses, grad: Tensor, dtype: torch.dtype | None) -> Answers:
    """The same by autograd, in ``dtype`` or as the inputs are."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(x.dtype if dtype is None else dtype).clone().requires_grad_()

    leaves = {"query": leaf(call.query), "positive": leaf(call.positive)}
    leaves |= {f"keys {place}": leaf(one.keys) for place, one in enumerate(call.sets)}
    t: float | Tensor = call.temperature
    if call.learned_temperature is not None:
        leaves["temperature"] = t = leaf(call.learned_temperature)
    q, p = (normal(leaves[name], call.normalize) for name in ("query", "positive"))
    sets = [normal(leaves[f"keys {place}"], one.normalize) for place, one in enumerate(call.sets)]
    if call.autocast is not None and dtype is None:
        q, p, sets = q.to(call.autocast), p.to(call.autocast), [k.to(call.autocast) for k in sets]
    keeps = [keep_of(one.pairs, len(q), one.keys.shape[-2]) for one in call.sets]
    rows = dense_rows(q, p, list(zip(sets, keeps, strict=True)), t, call.inter_temperature, call.alpha)
    loss = rows[0] * call.share_factor
    loss = loss.sum() if call.reduced else loss
    gradients = torch.autograd.grad((loss * grad.to(loss.dtype)).sum(), list(leaves.values()))
    metrics = {f"metric {metric.name}": x.detach() for metric, x in rows[1].items()}
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True)), **metrics}


def assert_right(case: Case, call: RowLosses | None = None) -> None:
    call = case.call() if call is None else call
    grad = case.grad(len(call.query))
    got, eager, truth = ours(call, grad), dense(call, grad, None), dense(call, grad, torch.float64)
    assert set(got) == set(truth)
    for name, x in got.items():
        if name == "metric RANK" and (case.dtype.itemsize < 4 or call.autocast is not None):
            continue  # a tie in half precision is none in float64
        assert_as_exact_as_eager(
            x.cpu(),
            eager[name].cpu(),
            truth[name].cpu(),
            name,
            temperature=case.temperature if case.normalize else 0.02,
        )


# ----------------------------------------------------------------------------------- both directions between two views


def ours_both(call: SymmetricLosses, grad: Tensor) -> Answers:
    engine = BACKENDS[call.backend]
    out = engine.symmetric_losses(call)
    gradients = engine.symmetric_gradient(
        SymmetricGradient(
            first=call.first,
            second=call.second,
            kept=out.kept,
            grad=grad,
            rows=out.rows,
            across=call.across,
            temperature=call.temperature,
            learned_temperature=call.learned_temperature,
            autocast=call.autocast,
            backend=call.backend,
        )
    )
    found = {"loss": out.loss, "views": gradients.views}
    if call.learned_temperature is None:
        assert gradients.temperature is None
        return found
    return {**found, "temperature": gradients.temperature}


def dense_both(call: SymmetricLosses, grad: Tensor, dtype: torch.dtype | None) -> Answers:
    leaves = {"views": call.views.to(call.views.dtype if dtype is None else dtype).clone().requires_grad_()}
    t: float | Tensor = call.temperature
    if call.learned_temperature is not None:
        leaves["temperature"] = t = call.learned_temperature.to(dtype).clone().requires_grad_()
    z = normal(leaves["views"], True)
    if call.autocast is not None and dtype is None:
        z = z.to(call.autocast)
    m = len(z) // 2
    here, there = z[:m], z[m:]
    total: float | Tensor = 0.0
    for anchors, others in ((here, there), (there, here)):
        keys = others if call.across else torch.cat([anchors, others])
        keep = keep_of(Pairs(band=[0, m - 1, m]), m, len(keys))
        rows = dense_rows(anchors, others, [(keys, keep)], t, call.inter_temperature, call.alpha)
        total = total + rows[0].sum()
    loss = total * call.share_factor
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss * grad.to(loss.dtype), list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


# -------------------------------------------------------------------------------------------------------- log-sum-exps


def ours_logsumexp(call: LogSumExp, grad: Tensor) -> Answers:
    engine, t = (
        BACKENDS[call.backend],
        call.temperature if call.learned_temperature is None else call.learned_temperature,
    )
    out = engine.logsumexp(call)
    gradient = KeysGradient(
        query=call.query,
        first=call.first,
        grad=grad,
        rows=out.rows,
        temperature=call.temperature,
        learned_temperature=call.learned_temperature,
        normalize=False,
        autocast=None,
        backend=call.backend,
    )
    return {
        "lse": out.lse,
        "query": (out.mean_key * (grad / t)[:, None]).to(call.query.dtype),
        "keys": engine.keys_gradient(gradient).keys,
    }


def dense_logsumexp(call: LogSumExp, grad: Tensor, dtype: torch.dtype) -> Answers:
    q, k = (x.to(dtype).clone().requires_grad_() for x in (call.query, call.first.keys))
    x = q @ k.T if k.dim() == 2 else (k @ q[:, :, None])[:, :, 0]
    keep = keep_of(call.first.pairs, *x.shape).to(DEVICE)
    x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    t = call.temperature if call.learned_temperature is None else call.learned_temperature
    lse = (x / t).masked_fill(~keep, -math.inf).logsumexp(1)
    gradients = torch.autograd.grad((lse * grad.to(lse.dtype)).sum(), [q, k])
    return {"lse": lse.detach(), "query": gradients[0], "keys": gradients[1]}
