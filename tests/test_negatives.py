"""Every choice of negatives against the oracle: views, both directions, two sets at once, ids in all of them."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue
from eqco_loss.functional import negatives_logsumexp
from eqco_loss.negatives import random_negatives
from eqco_loss.ops.backends import BACKENDS
from tests import knobs, oracle
from tests.cases import Answer, answer, eager
from tests.tolerance import assert_as_exact_as_eager

N, D, K = 9, 5, 13
T, INTER = 0.3, 1.0


class Choice(NamedTuple):
    in_batch: Any | None = None
    symmetric: bool = False
    given: str | None = None  # tensor, per_query, queue
    ids: bool = False
    num_negatives: int | None = None
    alpha: float | None = 64.0
    dual: bool = False


CHOICES = [
    Choice(in_batch, symmetric, given, ids, k, alpha, dual)
    for in_batch, symmetric, given, ids, k, (alpha, dual) in itertools.product(
        (None, "keys", "views"),
        (False, True),
        (None, "tensor", "per_query", "queue"),
        (False, True),
        (None, 6),
        ((64.0, False), (None, True)),
    )
    if given is None or not (symmetric or k)
]


class Data(NamedTuple):
    query: Tensor
    key: Tensor
    given: Tensor  # (K, D) or (N, K, D)
    ids: Tensor
    given_ids: Tensor


def data(choice: Choice, dtype: torch.dtype = torch.float64) -> Data:
    g = torch.Generator().manual_seed(0)
    shape = (N, K, D) if choice.given == "per_query" else (K, D)
    query, key, given = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((N, D), (N, D), shape))
    ids = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7, 1])
    return Data(query.to(dtype), key.to(dtype), given.to(dtype), ids, torch.arange(K) % 6)


def criterion(choice: Choice, **more: Any) -> EqCoLoss | DualTempInfoNCE:
    more = {"in_batch": choice.in_batch, "symmetric": choice.symmetric, "num_negatives": choice.num_negatives, **more}
    return (
        DualTempInfoNCE(T, INTER, alpha=choice.alpha, **more)
        if choice.dual
        else EqCoLoss(T, alpha=choice.alpha, **more)
    )


def call_arguments(choice: Choice, d: Data, given: Tensor) -> tuple[Any, dict[str, Tensor | None]]:
    ids: dict[str, Tensor | None] = {"query_ids": d.ids if choice.ids else None}
    if choice.given == "queue":
        queue = MomentumQueue(K + 4, D, dtype=given.dtype, device=given.device, store_ids=choice.ids)
        queue.enqueue(given, d.given_ids if choice.ids else None)
        return queue, ids
    if choice.given is None:
        return None, ids
    return given, {**ids, "negative_ids": d.given_ids if choice.ids else None}


def pool_and_places(choice: Choice, d: Data, query: Tensor, key: Tensor, given: Tensor) -> tuple[Tensor, oracle.Places]:
    """One direction's keys, all in one pool, and whose negatives are where."""
    in_batch = choice.in_batch or ("keys" if choice.given is None else None)
    parts: list[Tensor] = []
    ids: list[Tensor] = []
    places: oracle.Places = [[] for _ in range(N)]
    if in_batch is not None:
        views = 2 if in_batch == "views" else 1
        steps = min(choice.num_negatives // views, N - 1) if choice.num_negatives else N - 1
        parts += [query, key] if views == 2 else [key]
        ids += [d.ids] * views
        for i in range(N):
            places[i] += [N * view + (i + step) % N for view in range(views) for step in range(1, steps + 1)]
    if choice.given is not None:
        start = sum(len(part) for part in parts)
        parts.append(given)
        ids.append(d.given_ids)
        for row in places:
            row += range(start, start + K)
    if choice.given == "per_query":
        pool = torch.cat([part.expand(N, -1, -1) if part.dim() == 2 else part for part in parts], 1)
    else:
        pool = torch.cat(parts)
    if choice.ids:
        places = oracle.without_equal_ids(places, d.ids, torch.cat(ids))
    return pool, places


def directions(choice: Choice, leaf: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    q, k = leaf["query"], leaf["key"]
    return [(q, k), (k, q)] if choice.symmetric else [(q, k)]


def truth_rows(choice: Choice, d: Data, leaf: dict[str, Tensor]) -> list[oracle.Rows]:
    return [
        oracle.rows(
            q,
            k,
            *pool_and_places(choice, d, q, k, leaf.get("given", d.given)),
            temperature=T,
            alpha=choice.alpha,
            inter_temperature=INTER if choice.dual else None,
        )
        for q, k in directions(choice, leaf)
    ]


def leaves(choice: Choice, d: Data) -> dict[str, Tensor]:
    given = {"given": d.given} if choice.given in ("tensor", "per_query") else {}
    return {"query": d.query, "key": d.key, **given}


def ours(choice: Choice, d: Data, reduction: Any, **more: Any) -> Answer:
    def call(leaf: dict[str, Tensor]) -> Tensor:
        negatives, ids = call_arguments(choice, d, leaf.get("given", d.given))
        loss: Tensor = criterion(choice, reduction=reduction, **more)(leaf["query"], leaf["key"], negatives, **ids)
        return loss

    return answer(call, leaves(choice, d))


def assert_choice(choice: Choice, d: Data, got: Answer, reduction: Any) -> None:
    def exact(leaf: dict[str, Tensor]) -> Tensor:
        rows = [one.loss for one in truth_rows(choice, d, leaf)]
        return oracle.reduce(sum(rows[1:], rows[0]) / len(rows), reduction)

    def plain(leaf: dict[str, Tensor]) -> Tensor:
        rows = [
            eager(
                q,
                k,
                *pool_and_places(choice, d, q, k, leaf.get("given", d.given)),
                temperature=T,
                alpha=choice.alpha,
                inter_temperature=INTER if choice.dual else None,
            )
            for q, k in directions(choice, leaf)
        ]
        return oracle.reduce(sum(rows[1:], rows[0]) / len(rows), reduction)

    doubles = {name: x.double() for name, x in leaves(choice, d).items()}
    expected, usual = answer(exact, doubles), answer(plain, leaves(choice, d))
    assert_as_exact_as_eager(got.loss, usual.loss, expected.loss, "loss", temperature=T)
    for name, gradient in got.gradients.items():
        assert_as_exact_as_eager(gradient, usual.gradients[name], expected.gradients[name], name, temperature=T)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_value_and_gradients(choice: Choice, reduction: Any) -> None:
    """float64, every combination; "none" weighs the rows apart, "mean" takes the keys' gradient from the same pass."""
    d = data(choice)
    assert_choice(choice, d, ours(choice, d, reduction), reduction)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_metrics_by_definition(choice: Choice) -> None:
    d = data(choice)
    negatives, ids = call_arguments(choice, d, d.given)
    got = criterion(choice).with_metrics(d.query, d.key, negatives, **ids)
    rows = truth_rows(choice, d, leaves(choice, d))
    for name in got._fields:
        expected = torch.cat([getattr(one, name) for one in rows]).mean()
        torch.testing.assert_close(getattr(got, name), expected, atol=1e-12, rtol=1e-12, msg=name)
        assert getattr(got, name).requires_grad is False


@pytest.mark.parametrize("choice", CHOICES[:: max(1, len(CHOICES) // 24)], ids=str)
def test_tile_size_does_not_matter(choice: Choice) -> None:
    d = data(choice)
    whole = ours(choice, d, "mean")
    with knobs.tiles(10):
        small = ours(choice, d, "mean")
    torch.testing.assert_close(small.loss, whole.loss, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(small.gradients, whole.gradients, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.ids and not c.num_negatives], ids=str)
def test_second_derivatives(choice: Choice) -> None:
    d = data(choice)
    inputs = [x.clone().requires_grad_() for x in leaves(choice, d).values()]

    def loss(*x: Tensor) -> Tensor:
        negatives, ids = call_arguments(choice, d, x[2] if len(x) > 2 else d.given)
        out: Tensor = criterion(choice)(x[0], x[1], negatives, **ids)
        return out

    def definition(*x: Tensor) -> Tensor:
        leaf = dict(zip(leaves(choice, d), x, strict=True))
        rows = [one.loss.mean() for one in truth_rows(choice, d, leaf)]
        return sum(rows[1:], rows[0]) / len(rows)

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(torch.cat([g.flatten() for g in first]).square().sum(), inputs)

    for got, expected in zip(second(loss), second(definition), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)


def test_symmetric_is_the_mean_of_two_calls() -> None:
    d = data(Choice())
    for dual, in_batch in itertools.product((False, True), ("keys", "views")):
        one, both = (criterion(Choice(in_batch, symmetric, dual=dual), reduction="none") for symmetric in (False, True))
        expected = (one(d.query, d.key) + one(d.key, d.query)) / 2
        assert both(d.query, d.key).shape == (N,)
        torch.testing.assert_close(both(d.query, d.key), expected, atol=0, rtol=0)


class NoFloat64(TorchDispatchMode):
    """What a device without float64 does, such as Apple's GPUs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{func}: Cannot convert a MPS Tensor to float64 dtype")
        return out


class WithoutFloat64:
    """A backend whose functions run under that mode, which an operator hides from them."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            with NoFloat64():
                return getattr(self.backend, name)(*args)

        return call


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n", "k"), [(300, 16), (9, 4), (9, None)])
def test_a_device_without_float64(
    n: int, k: int | None, symmetric: bool, dual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draw, loss, gradient and metric in float32."""
    monkeypatch.setattr("eqco_loss.negatives.has_float64", lambda device: False)
    monkeypatch.setitem(BACKENDS, "torch", WithoutFloat64(BACKENDS["torch"]))
    query, key = (torch.randn(n, D, requires_grad=True) for _ in range(2))
    t = torch.tensor(0.3, requires_grad=True)
    make: Any = DualTempInfoNCE if dual else EqCoLoss
    queue = MomentumQueue(12, D)
    with NoFloat64():
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1).double()
        queue.enqueue(key.detach())
        for in_batch, given in itertools.product(("keys", "views"), (None, queue, key.detach()[:5])):
            if given is not None and (symmetric or k):
                continue
            one = make(t, in_batch=in_batch, symmetric=symmetric, num_negatives=k, sampling="random")
            for loss in (one(query, key, given), one.with_metrics(query, key, given).loss):
                assert all(x.isfinite().all() for x in torch.autograd.grad(loss, (query, key, t)))
        lse = negatives_logsumexp(query, key, temperature=t)
        torch.autograd.grad(lse.sum(), (query, key, t))


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("k", [3, 4, 12])
def test_random_negatives_of_views(k: int, float64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without replacement, never of the row's own image, uniform over both views and all ranks' rows."""
    monkeypatch.setattr("eqco_loss.negatives.has_float64", lambda device: float64)
    draws, total, offset, rows = 2000, 9, 3, 4
    count = torch.zeros(rows, 2 * total)
    for _ in range(draws):
        picked = random_negatives(rows, k, torch.device("cpu"), total=total, offset=offset, views=2)
        assert picked.shape == (rows, k)
        assert all(len(set(row)) == k for row in picked.tolist())
        count.scatter_add_(1, picked, torch.ones(rows, k))
    own = torch.arange(rows)[:, None] + offset + torch.tensor([0, total])
    assert bool((count.gather(1, own) == 0).all())
    others = torch.ones_like(count).scatter_(1, own, 0).bool()
    expected = draws * k / (2 * total - 2)
    chi = ((count[others].view(rows, -1) - expected) ** 2 / expected).sum(
        1
    )  # 15 degrees of freedom, and less than k = 1
    assert float(chi.max()) < 45.0


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ("given", {"symmetric": True}, r"symmetric: expected False when negative_keys is given.*0\.5 \* \(criterion\("),
        ("given", {"num_negatives": 3, "in_batch": "keys"}, "num_negatives: expected None when negative_keys is given"),
        ("batch", {"num_negatives": 3, "in_batch": "views"}, "num_negatives: expected an even number.*got 3.*use 4"),
        ("batch", {"in_batch": "view"}, "in_batch: expected one of 'keys', 'views', got 'view'"),
        ("one row", {"in_batch": "views"}, "query: expected at least 2 rows"),
        ("empty queue", {"in_batch": "keys"}, "negative_keys: expected a MomentumQueue that holds keys"),
        ("unlike ids", {"in_batch": "keys"}, "negative_ids: expected integers of shape .* beside query_ids, got None"),
    ],
)
def test_forbidden_combinations(arguments: str, settings: dict[str, Any], message: str) -> None:
    x, ids = torch.randn(4, D), torch.arange(4)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Tensor]]] = {
        "given": ((x, x, x), {}),
        "batch": ((x, x), {}),
        "one row": ((x[:1], x[:1]), {}),
        "empty queue": ((x, x, MomentumQueue(4, D)), {}),
        "unlike ids": ((x, x, x), {"query_ids": ids}),
    }
    positional, named = calls[arguments]
    with pytest.raises(ValueError, match=message):
        EqCoLoss(**settings)(*positional, **named)


def test_moco_checkpoint_loads() -> None:
    """MoCo keeps its queue as (D, K) with the slot to write next."""
    stored, keys = torch.nn.functional.normalize(torch.randn(D, 8), dim=0), torch.randn(3, D)
    queue = MomentumQueue(8, D)
    queue.load_moco(stored, torch.tensor([6]))
    torch.testing.assert_close(queue.keys, torch.cat([stored.T[6:], stored.T[:6]]))
    queue.enqueue(keys)
    torch.testing.assert_close(queue.contents[[6, 7, 0]], torch.nn.functional.normalize(keys, dim=1))
    with pytest.raises(ValueError, match=r"queue: expected MoCo's floating-point \(D, K\) = \(5, 9\), got \(5, 8\)"):
        MomentumQueue(9, D).load_moco(stored)
    with pytest.raises(ValueError, match=r"got .* of torch\.int64"):
        queue.load_moco(stored.long())
    with pytest.raises(ValueError, match=r"pointer: expected 0 <= pointer < 8, got tensor\(\[1, 2\]\)"):
        queue.load_moco(stored, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="pointer: expected 0 <= pointer < 8, got 8"):
        queue.load_moco(stored, 8)
    queue.load_moco(stored, np.int64(6))  # type: ignore[arg-type]
    assert int(queue.cursor) == 6
    with pytest.raises(ValueError, match="got store_ids=True"):
        MomentumQueue(8, D, store_ids=True).load_moco(stored)


@pytest.mark.parametrize("given", ["tensor", "per_query", "queue"])
@pytest.mark.parametrize("in_batch", ["keys", "views"])
@pytest.mark.parametrize("loss", [EqCoLoss, DualTempInfoNCE])
@pytest.mark.parametrize("why", ["one row", "one id"])
def test_a_batch_without_negatives_beside_a_set_that_has_some(why: str, loss: Any, in_batch: Any, given: str) -> None:
    """Value and gradients of the other set alone."""
    n = 1 if why == "one row" else 4
    leaves = [torch.randn(n, D, requires_grad=True) for _ in range(2)]
    keys = torch.randn((n, K, D) if given == "per_query" else (K, D), requires_grad=given != "queue")
    ids = {} if why == "one row" else {"query_ids": torch.full((n,), 3)}
    others = torch.arange(K) + 4
    negatives: Tensor | MomentumQueue = keys
    if given == "queue":
        negatives = MomentumQueue(K, D, store_ids=bool(ids))
        negatives.enqueue(keys, others if ids else None)
    else:
        leaves.append(keys)
        ids |= {"negative_ids": others} if ids else {}
    for reduction in ("mean", "none"):
        both, alone = (
            loss(in_batch=choice, reduction=reduction)(*leaves[:2], negatives, **ids).mean()
            for choice in (in_batch, None)
        )
        torch.testing.assert_close(both, alone)
        for got, expected in zip(torch.autograd.grad(both, leaves), torch.autograd.grad(alone, leaves), strict=True):
            torch.testing.assert_close(got, expected)
