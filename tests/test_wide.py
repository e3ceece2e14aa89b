"""The wide backend by its records, against float64 autograd of the formulas written out here. It runs on a CPU, too."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eqco_loss.ops import wide
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
from eqco_loss.ops.wide import chunks, pointwise
from tests.cases import DEVICE
from tests.interpreter import exact_bfloat16
from tests.tolerance import assert_as_exact_as_eager

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, K, D = 22, 37, 19
BOTH: tuple[tuple[bool, float | None, float, bool], ...] = (
    (False, 50.0, 0.2, True),
    (True, None, 0.2, False),
    (False, 9.0, 0.02, True),
)
Answers = dict[str, Tensor]
STEPS = chunks.steps  # the real ones; see many_chunks


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that sizes which fit a test have several, with ragged ends."""
    monkeypatch.setattr(chunks, "steps", lambda n, k, *_: (min(n, 9), min(k, 16)))
    monkeypatch.setattr(wide, "steps", lambda n, k, *_: (min(n, 9), min(k, 16)))
    monkeypatch.setattr(chunks, "own_rows", lambda keys: 9 if keys.dim() == 3 else len(keys))
    monkeypatch.setattr(wide, "own_rows", lambda keys: 9)


@pytest.fixture(params=["torch", "kernels"], autouse=True)
def pointwise_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """torch's own pointwise operations, and the kernels: on a CPU in Triton's interpreter."""
    if request.param == "torch":
        monkeypatch.setattr(pointwise, "_kernels", lambda x: None)
        yield request.param
        return
    pytest.importorskip("triton")
    if DEVICE.type == "cpu":  # so small that 38 rows are several tiles
        from eqco_loss.ops.wide import mutual

        monkeypatch.setattr(mutual, "BLOCK", 32)
        monkeypatch.setattr(mutual, "BLOCK_D", 16)
    with exact_bfloat16() if DEVICE.type == "cpu" else nullcontext():
        yield request.param


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
    n = 10 if kind in ("own", "own ids") else N  # of keys (N, K, D) the interpreter visits each
    second = []
    if kind in ("ids", "ids of pairs", "own ids"):
        shape = (K,) if kind == "ids" else (n, K)
        pairs = Pairs(integers(n, high=4, seed=4), integers(*shape, high=4, seed=5))
    if kind in ("mask", "mask of pairs"):
        mask = integers(*((K,) if kind == "mask" else (N, K)), high=3, seed=6) > 0
        pairs = Pairs(mask=mask)
    if kind == "everything":
        ids = integers(N, high=4, seed=4), integers(K, high=4, seed=5).int()
        pairs = Pairs(*ids, integers(N, K, high=3, seed=6) > 0, torch.tensor(K - 9, device=DEVICE), band=[3, 30, 37])
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
    ("all ids|ids of pairs|own|own ids|mask|mask of pairs|everything|count|batch|views|ranks|rolled|picked|two sets")
    .replace("all ids", "all|ids")
    .split("|")
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
            backend="wide",
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
            x.cpu(),
            eager[name].cpu(),
            truth[name].cpu(),
            name,
            temperature=case.temperature if case.normalize else 0.02,
        )


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"dual": True, "alpha": None, "reduced": True},
    {"normalize": False, "learned": False},
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind: str, dtype: torch.dtype, pointwise_form: str) -> None:
    """Kernels in the interpreter are slow, and take one of the changes in each dtype."""
    some = CHANGES
    if pointwise_form == "kernels" and DEVICE.type == "cpu":
        place = DTYPES.index(dtype) % len(CHANGES)
        some = CHANGES[place : place + 1]
    for changes in some:
        assert_right(dataclasses.replace(Case(kind, dtype), **changes))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["all", "everything", "own", "picked", "two sets"])
def test_autocast(kind: str, autocast: torch.dtype) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(Case(kind, dtype, autocast=autocast, dual=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [True, False])
def test_rows_of_several_blocks(gradient: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys in a chunk than a kernel takes at a time, the largest logit in the last block."""
    monkeypatch.setattr(chunks, "steps", lambda n, k, *_: (n, k))
    k = 9001
    keys = draw(k, D, seed=3, dtype=dtype)
    case = Case("all", dtype, dual=True)
    call = case.call()
    query = call.query[:3]
    keys[-1] = query[0]
    call = call._replace(query=query, positive=call.positive[:3], first=KeySet(keys, Pairs(), True), share=[1, 1])
    call = call._replace(need_query_gradient=gradient)
    out = wide.row_losses(call)
    grad = case.grad(3)
    eager, truth = dense(call, grad, None), dense(call, grad, torch.float64)
    found = {"loss": out.loss, "temperature": (grad * out.rows[Row.TEMPERATURE_GRADIENT]).sum()}
    found |= {f"metric {metric.name}": out.metrics[metric] for metric in (Metric.NEGATIVE, Metric.LOG_WEIGHT)}
    if gradient:
        found["query"] = (out.query_gradient * grad[:, None]).to(dtype)
    for name, x in found.items():
        assert_as_exact_as_eager(x.cpu(), eager[name].cpu(), truth[name].cpu(), name, temperature=0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_low_temperature_and_a_large_alpha(dtype: torch.dtype) -> None:
    assert_right(Case("all", dtype, temperature=0.02, alpha=2.0**20, learned=False))


# ----------------------------------------------------------------------------------- both directions between two views


def ours_both(call: SymmetricLosses, grad: Tensor) -> Answers:
    out = wide.symmetric_losses(call)
    gradients = wide.symmetric_gradient(
        SymmetricGradient(
            views=call.views,
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
        assert gradients.temperature.shape == (0,)
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
    loss = total * call.ratio
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss * grad.to(loss.dtype), list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("across", [True, False], ids=["across", "views"])
def test_both_directions(across: bool, dtype: torch.dtype, autocast: torch.dtype | None, pointwise_form: str) -> None:
    """In the interpreter one of the settings for each dtype and kind."""
    settings = BOTH
    if pointwise_form == "kernels" and DEVICE.type == "cpu":
        place = (DTYPES.index(dtype) + across + (autocast is not None)) % len(BOTH)
        settings = BOTH[place : place + 1]
    for dual, alpha, temperature, learned in settings:
        case = Case(dtype=dtype, temperature=temperature, learned=learned, reduced=True)
        found: list[tuple[Answers, Answers, Answers]] = []
        for seed in range(4):  # the error of a single number may be small by chance, eager's as ours
            call = SymmetricLosses(
                views=draw(2 * 19, D, dtype=dtype, seed=seed),
                across=across,
                temperature=temperature,
                learned_temperature=case.learned_temperature(),
                inter_temperature=1.0 if dual else None,
                alpha=alpha,
                share=[1, 38],
                autocast=autocast if dtype != torch.float64 else None,
                backend="wide",
            )
            grad = case.grad(1)
            found.append((ours_both(call, grad), dense_both(call, grad, None), dense_both(call, grad, torch.float64)))
        for name in found[0][0]:
            got, eager, truth = (
                torch.stack([one[name].cpu() for one in answers]) for answers in zip(*found, strict=True)
            )
            assert_as_exact_as_eager(got, eager, truth, name, temperature=temperature)


# -------------------------------------------------------------------------------------------------------- log-sum-exps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logsumexp(kind: str, dtype: torch.dtype) -> None:
    sets, n = key_sets(kind, dtype, False)
    query, t = draw(n, D, dtype=dtype) * 0.2, torch.tensor(0.7, device=DEVICE)
    call = LogSumExp(query.to(dtype), sets[0], 1.0, t, True, None, "wide")
    out = wide.logsumexp(call)
    grad = torch.linspace(-1, 1, n, dtype=out.lse.dtype, device=DEVICE)
    gradient = KeysGradient(call.query, sets[0], grad, out.rows, 1.0, t, False, None, "wide")
    got = {
        "lse": out.lse,
        "query": (out.mean_key * (grad / t)[:, None]).to(dtype),
        "keys": wide.keys_gradient(gradient),
    }

    def dense_lse(dtype: torch.dtype) -> Answers:
        q, k = (x.to(dtype).clone().requires_grad_() for x in (call.query, sets[0].keys))
        x = q @ k.T if k.dim() == 2 else (k @ q[:, :, None])[:, :, 0]
        keep = keep_of(sets[0].pairs, *x.shape).to(DEVICE)
        x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
        lse = (x / t).masked_fill(~keep, -math.inf).logsumexp(1)
        gradients = torch.autograd.grad((lse * grad.to(lse.dtype)).sum(), [q, k])
        return {"lse": lse.detach(), "query": gradients[0], "keys": gradients[1]}

    eager, truth = dense_lse(dtype), dense_lse(torch.float64)
    for name, x in got.items():
        assert_as_exact_as_eager(x.cpu(), eager[name].cpu(), truth[name].cpu(), name, temperature=0.05)


# ------------------------------------------------------------------------------------------------------------ the edges


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ids", "mask", "mask of pairs", "own ids", "picked"])
def test_what_is_left_out_may_hold_anything(kind: str, dtype: torch.dtype) -> None:
    """Loss and gradients as if it were not there, and its own gradient is 0; who does meet it gets NaN."""
    call = Case(kind, dtype, reduced=True, learned=False).call()
    one = call.first
    keep = keep_of(one.pairs, len(call.query), K).to(DEVICE)
    place, other = (0, 1) if kind != "own ids" else ((2, 3), (4, 5))
    anything = one.keys.clone()
    if kind == "own ids":
        left = ~keep
        anything[left] = math.nan
        expected = one.keys.masked_fill(left[..., None], 0.0)
    else:
        ids, mask, picked = one.pairs.key_ids, one.pairs.mask, one.pairs.picked
        if ids is not None:
            ids[place], ids[other] = 77, 77
            call.first.pairs.query_ids.fill_(77)  # type: ignore[union-attr]
        if mask is not None:
            mask[..., [place, other]] = False
        if picked is not None:
            picked.clamp_min_(2)
        anything[place], anything[other] = math.nan, math.inf
        expected = one.keys.clone()
        expected[[place, other]] = 0.0
    grad = torch.tensor(1.0, device=DEVICE, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    got = ours(call._replace(first=one._replace(keys=anything)), grad)
    clean = ours(call._replace(first=one._replace(keys=expected)), grad)
    for name, x in got.items():
        assert x.equal(clean[name]), name
    assert not bool(got["keys 0"][anything.isfinite().logical_not()].any())


def test_a_key_that_is_not_finite_is_seen_by_who_meets_it() -> None:
    call = Case("mask of pairs", torch.float32, learned=False).call()
    assert call.first.pairs.mask is not None
    call.first.keys[3] = math.inf
    out = wide.row_losses(call)
    meets = call.first.pairs.mask[:, 3]
    assert 0 < int(meets.sum()) < len(meets)
    assert out.loss.isnan().equal(meets)
    assert out.query_gradient.isnan().all(1).equal(meets)


def test_a_query_without_negatives() -> None:
    call = Case("mask of pairs", torch.float32, learned=False).call()
    assert call.first.pairs.mask is not None
    call.first.pairs.mask[6] = False
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"query 6 has no negatives left \(effective K = 0\)"):
            wide.row_losses(call)
    out = wide.row_losses(call._replace(may_raise=False))
    assert out.loss.isnan().nonzero().flatten().tolist() == [6]
    assert out.rows[Row.PULL].isnan().nonzero().flatten().tolist() == [6]


def test_a_set_without_keys() -> None:
    call = Case("two sets", torch.float32, learned=False).call()
    empty = KeySet(call.query[:0], Pairs(), True)
    with_empty, without = call._replace(first=empty), call._replace(first=call.sets[1], second=None)
    got, expected = (ours(one, Case(dtype=torch.float32).grad(N)) for one in (with_empty, without))
    assert got["loss"].equal(expected["loss"])
    assert got["keys 1"].equal(expected["keys 0"])
    assert got["keys 0"].shape == (0, D)


@pytest.mark.parametrize("t", [0.0, -1.0, math.nan])
def test_a_learned_temperature_that_is_not_positive_gives_nan(t: float) -> None:
    call = Case("all", torch.float32, dual=True).call()
    out = wide.row_losses(call._replace(learned_temperature=torch.tensor(t, device=DEVICE)))
    assert bool(torch.cat([out.loss[:, None], out.query_gradient], 1).isnan().all())


@pytest.mark.parametrize("length", [0.0, 1e-7, 2e-5, 3e4], ids=str)
def test_float16_rows_of_any_length(length: float) -> None:
    """Neither weights nor gradients leave float16's range on the way, and rows of zeros have a finite gradient."""
    case = Case("batch", torch.float16, learned=False)
    call = case.call()
    for x in (call.query, call.positive, call.first.keys):
        x[4:9] = (x[4:9].double() / x[4:9].double().norm(dim=1, keepdim=True) * length).half()
    grad = case.grad(len(call.query))
    got, truth = ours(call, grad), dense(call, grad, torch.float64)
    for name, x in got.items():
        if name in ("query", "positive", "keys 0"):
            ordinary = torch.ones(len(x), dtype=torch.bool)
            ordinary[4:9] = False
            assert bool(x.isfinite().all()), name
            assert_close_by_row(x[ordinary], truth[name][ordinary], name)
    assert_close_by_row(got["loss"], truth["loss"], "loss")


def assert_close_by_row(ours: Tensor, truth: Tensor, what: str) -> None:
    torch.testing.assert_close(ours.double(), truth, rtol=2e-3, atol=2e-3 * truth.abs().max().item(), msg=what)


@pytest.mark.parametrize("kind", ["everything", "two sets", "own ids", "batch"])
def test_the_same_bits_every_time(kind: str) -> None:
    case = Case(kind, torch.bfloat16)
    call = case.call()
    first, again = (ours(call, case.grad(len(call.query))) for _ in range(2))
    assert all(x.equal(again[name]) for name, x in first.items())


# ------------------------------------------------------------------------------------------------- what a pass may cost


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts multiply-adds of products, and refuses what would wait for a GPU or be random in its order there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "index_add", "index_add_", "scatter_add_"}, name
        assert not (name.startswith("index") and any(x is not None and x.dtype == torch.bool for x in args[1])), name
        if name in {"mm", "addmm", "addmm_"}:
            a, b = (args if name == "mm" else args[1:])[:2]
            self.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    """No size depends on data either, so that the launches are the same in every step, as a CUDA graph asks."""
    case = Case(kind, torch.bfloat16, dual=True)
    call = case.call()._replace(may_raise=False)
    with Watch():
        ours(call, case.grad(len(call.query)))


def test_products_are_as_few_as_can_be() -> None:
    """Losses with the query's gradient: 2; the keys' gradient: 2; both directions with the gradient: 4."""
    case = Case(dtype=torch.float32, learned=False, reduced=True)
    call = case.call()
    with Watch() as forward:
        out = wide.row_losses(call)
    assert forward.multiply_adds == 2 * N * K * D
    gradient = KeysGradient(call.query, call.first, case.grad(N), out.rows, 0.2, None, True, None, "wide")
    with Watch() as backward:
        wide.keys_gradient(gradient)
    assert backward.multiply_adds == 2 * N * K * D
    both = SymmetricLosses(draw(2 * 19, D, dtype=torch.float32), True, 0.2, None, None, None, [1, 1], None, "wide")
    with Watch() as watch:
        ours_both(both, case.grad(1))
    assert watch.multiply_adds == 4 * 19 * 19 * D


@pytest.mark.parametrize(("n", "k"), [(1, 1), (256, 65536), (4096, 4096), (32768, 32768), (512, 2**24), (10**6, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_fit_the_workspace(n: int, k: int, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    rows, columns = STEPS(n, k, like, dtype)
    assert 1 <= rows <= n
    assert 1 <= columns <= k
    assert rows * columns * pointwise.bytes_a_pair(like, dtype) <= chunks.WORKSPACE <= 64e6


def test_what_is_refused() -> None:
    x = torch.empty(2, 3)
    assert wide.refusal(x, None, x.bfloat16(), x.double()) is None
    assert "int64" in str(wide.refusal(x, x.long()))
    assert "meta" in str(wide.refusal(x.to("meta")))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["all", "everything", "batch", "picked", "own ids", "two sets"])
def test_in_a_cuda_graph(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype, learned=False)
    call = case.call()
    grad = case.grad(len(call.query))
    expected = ours(call, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ours(call, grad)
    graph.replay()
    torch.cuda.synchronize()
    assert all(x.equal(expected[name]) for name, x in got.items())


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP, N = 8192, D = 768: beside the views' gradient and the sums of one view, the workspace and little more."""
    monkeypatch.undo()
    views = torch.randn(2 * 8192, 768, device=DEVICE, dtype=torch.bfloat16)
    call = SymmetricLosses(views, True, 0.05, None, None, None, [1, 2 * 8192], None, "wide")
    ours_both(call, torch.ones((), device=DEVICE))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours_both(call, torch.ones((), device=DEVICE))
    assert torch.cuda.max_memory_allocated() - before < 2 * 8192 * 768 * 2 + 8192 * 768 * 4 + 64e6
