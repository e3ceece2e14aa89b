"""The wide backend by its records, against float64 autograd of the formulas written out here. It runs on a CPU, too."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from eqco_loss.ops import wide
from eqco_loss.ops.calls import (
    KeysGradient,
    KeySet,
    LogSumExp,
    Metric,
    Pairs,
    Row,
    RowLosses,
    SymmetricGradient,
    SymmetricLosses,
)
from eqco_loss.ops.wide import chunks
from tests.tolerance import assert_as_exact_as_eager

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
N, K, D = 22, 37, 19
Answers = dict[str, Tensor]


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that sizes which fit a test have several, with ragged ends."""
    monkeypatch.setattr(chunks, "steps", lambda n, k, *_: (min(n, 5), min(k, 8)))
    monkeypatch.setattr(wide, "steps", lambda n, k, *_: (min(n, 5), min(k, 8)))
    monkeypatch.setattr(chunks, "own_rows", lambda keys: 5 if keys.dim() == 3 else len(keys))
    monkeypatch.setattr(wide, "own_rows", lambda keys: 5)
    monkeypatch.setattr(wide, "ROWS_AT_ONCE", 2)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.exp(torch.randn(shape[:-1], generator=generator, dtype=torch.float64))[..., None]).to(device, dtype)


def integers(*shape: int, high: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def key_sets(kind: str, dtype: torch.dtype, device: str, normalize: bool) -> tuple[list[KeySet], int]:
    """One or two sets of keys, and how many queries there are."""
    keys, n, pairs = draw(K, D, seed=3, dtype=dtype, device=device), N, Pairs()
    given = {"device": device}
    second = []
    if kind in ("ids", "ids of pairs", "own ids"):
        shape = (K,) if kind == "ids" else (N, K)
        pairs = Pairs(integers(N, high=4, seed=4, **given), integers(*shape, high=4, seed=5, **given))
    if kind in ("mask", "mask of pairs"):
        mask = integers(*((K,) if kind == "mask" else (N, K)), high=3, seed=6, **given) > 0
        pairs = Pairs(mask=mask)
    if kind == "everything":
        ids = integers(N, high=4, seed=4, **given), integers(K, high=4, seed=5, **given).int()
        pairs = Pairs(*ids, integers(N, K, high=3, seed=6, **given) > 0, torch.tensor(K - 9, **given), band=[3, 30, 37])
    if kind == "count":
        pairs = Pairs(count=torch.tensor(21, **given))
    if kind == "batch":
        n, pairs = K, Pairs(band=[0, K - 1, K])
    if kind == "views":
        n, keys, pairs = K, draw(2 * K, D, seed=3, dtype=dtype, device=device), Pairs(band=[0, K - 1, K])
    if kind == "ranks":
        pairs = Pairs(band=[7, K - 1, K])
    if kind == "rolled":
        pairs = Pairs(band=[30, 5, K])
    if kind == "picked":
        pairs = Pairs(picked=torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(i))[:6] for i in range(N)]).to(device))
    if kind in ("own", "own ids"):
        keys = draw(N, K, D, seed=3, dtype=dtype, device=device)
    if kind == "two sets":
        ids = integers(N, high=4, seed=4, **given), integers(K, high=4, seed=5, **given)
        more = draw(29, D, seed=7, dtype=dtype, device=device)
        more = more / more.norm(dim=1, keepdim=True)
        second = [KeySet(more, Pairs(count=torch.tensor(17, **given)), False, True)]
        pairs = Pairs(*ids)
    return [KeySet(keys, pairs, normalize), *second], n


KINDS = (
    "all ids|ids of pairs|own|own ids|mask|mask of pairs|everything|count|batch|views|ranks|rolled|picked|two sets"
).replace("all ids", "all|ids").split("|")


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
            if pairs.count is not None:
                keep[i, j] &= j < int(pairs.count)
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
    similarity = torch.cat([q @ k.T if k.dim() == 2 else (k @ q[:, :, None])[:, :, 0] for k, _ in sets], 1).to(statistics)
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
    dtype: torch.dtype = torch.float64
    dual: bool = False
    alpha: float | None = 50.0
    temperature: float = 0.2
    learned: bool = True
    normalize: bool = True
    reduced: bool = False
    autocast: torch.dtype | None = None
    device: str = "cpu"

    def call(self) -> RowLosses:
        sets, n = key_sets(self.kind, self.dtype, self.device, self.normalize)
        shrink = 1.0 if self.normalize else 0.2  # or logits of raw rows saturate every loss
        query, positive = (draw(n, D, seed=i, dtype=self.dtype, device=self.device) * shrink for i in (1, 2))
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
            backend="wide",
        )

    def learned_temperature(self) -> Tensor | None:
        if not self.learned:
            return None
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.tensor(self.temperature, dtype=dtype, device=self.device)

    def grad(self, n: int) -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.reduced:
            return torch.tensor(1.7, dtype=dtype, device=self.device)
        return torch.linspace(-0.5, 1.5, n, dtype=dtype, device=self.device)


def ours(call: RowLosses, grad: Tensor) -> Answers:
    out = wide.row_losses(call)
    factor = grad if grad.dim() == 0 else grad[:, None]
    found = {
        "loss": out.loss,
        "query": (out.query_gradient * factor).to(call.query.dtype),
        "positive": (out.positive_gradient * factor).to(call.positive.dtype),
        **{f"metric {metric.name}": out.metrics[metric] for metric in Metric},
    }
    for place, one in enumerate(call.sets):
        found[f"keys {place}"] = wide.keys_gradient(
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
            )
        )
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
    loss = rows[0] * call.ratio
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
        if name == "metric RANK" and case.dtype != torch.float64:
            continue  # a tie in half precision is none in float64
        assert_as_exact_as_eager(
            x, eager[name], truth[name], name, temperature=case.temperature if case.normalize else 0.02
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind: str, dtype: torch.dtype, device: str) -> None:
    for changes in ({}, {"dual": True, "alpha": None, "reduced": True}, {"normalize": False, "learned": False}):
        assert_right(dataclasses.replace(Case(kind, dtype, device=device), **changes))
