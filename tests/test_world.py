"""Every engine in the one world of inputs: losses, metrics and each gradient against float64 autograd of the formulas.

python -m pytest tests/test_world.py -k triton
"""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eqco_loss.ops import blocks, wide
from eqco_loss.ops.backends import BACKENDS
from eqco_loss.ops.calls import KeySet, LogSumExp, Metric, Pairs, Row, SymmetricLosses
from eqco_loss.ops.triton import arguments
from eqco_loss.ops.wide import chunks, pointwise
from tests import knobs
from tests.cases import DEVICE
from tests.tolerance import assert_as_exact_as_eager
from tests.world import (
    BOTH,
    DTYPES,
    KINDS,
    Answers,
    Case,
    D,
    K,
    N,
    assert_right,
    dense_both,
    dense_logsumexp,
    draw,
    keep_of,
    key_sets,
    ours,
    ours_both,
    ours_logsumexp,
)

ENGINES = ("torch", "torch at once", "triton", "wide by torch", "wide by kernels")
INTERPRETED = ("triton", "wide by kernels") if DEVICE.type == "cpu" else ()  # slow: one of the settings for each dtype


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Tiles and chunks so small that sizes which fit a test have several, with ragged ends, but for "at once"."""
    name: str = request.param
    if name in ("triton", "wide by kernels"):
        pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch on Linux")
    if name.startswith("wide"):
        small_chunks(monkeypatch)
    if name == "wide by torch":
        monkeypatch.setattr(pointwise, "_kernels", lambda x: None)
    # NumPy, which interprets kernels, warns of what a pair that is left out makes of the numbers that it may hold.
    at_once = name == "torch at once"
    with knobs.tiles(None if at_once else 100, flash=not at_once), np.errstate(all="ignore"):
        yield name


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chunks, wide):
        monkeypatch.setattr(module, "chunk_size", lambda n, k, *_: (min(n, 9), min(k, 16)))
        monkeypatch.setattr(module, "own_rows", lambda keys: 3 if keys.dim() == 3 else len(keys))
    if importlib.util.find_spec("triton") is not None and DEVICE.type == "cpu":
        from eqco_loss.ops.wide import mutual

        for name, keys in (("STATISTICS", 64), ("SQUARE", 32), ("WEIGHTS", 64)):
            monkeypatch.setattr(mutual, name, mutual.TileSize(32, keys, 16, 4, 1, 2))


def case_of(engine: str, kind: str = "all", dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    if engine in ("triton", "wide by kernels") and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    return Case(kind, engine.split()[0], dtype, **changes)


def one_dtype_a_kind(engine: str, kind: str, dtype: torch.dtype) -> None:
    """Where kernels are interpreted, each kind has one of the dtypes that they take."""
    if engine in INTERPRETED and dtype != DTYPES[1 + KINDS.index(kind) % 3]:
        pytest.skip("this kind has another dtype in the interpreter")


def some_of(settings: tuple[Any, ...], engine: str, place: int) -> tuple[Any, ...]:
    place %= len(settings)
    return settings[place : place + 1] if engine in INTERPRETED else settings


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"dual": True, "alpha": None, "reduced": True},
    {"normalize": False, "learned": False},
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind: str, dtype: torch.dtype, engine: str) -> None:
    for changes in some_of(CHANGES, engine, DTYPES.index(dtype) + KINDS.index(kind)):
        assert_right(case_of(engine, kind, dtype, **changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["picked", "picked ids"])
@pytest.mark.parametrize("elements", [None, 100])
def test_picks_that_are_fetched(
    elements: int | None, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As plain torch does where a query picks few of many keys."""
    monkeypatch.setattr(blocks, "are_few", lambda picked, keys: True)
    for changes in CHANGES:
        with knobs.tiles(elements):
            assert_right(Case(kind, "torch", dtype, **changes))


@pytest.mark.parametrize("kind", ["ids", "ranks ids"])
def test_ids_that_are_compared_tile_by_tile(kind: str) -> None:
    """As plain torch does where many are equal."""
    for changes in CHANGES:
        with knobs.tiles(100), knobs.patched("MOST_ALIKE", 0):
            assert_right(Case(kind, "torch", torch.float32, **changes))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["all", "everything", "own", "picked", "two sets"])
def test_autocast(kind: str, autocast: torch.dtype, engine: str) -> None:
    for dtype in some_of((torch.float32, torch.bfloat16), engine, KINDS.index(kind)):
        assert_right(case_of(engine, kind, dtype, autocast=autocast, dual=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_low_temperature_and_a_large_alpha(dtype: torch.dtype, engine: str) -> None:
    assert_right(case_of(engine, "all", dtype, temperature=0.02, alpha=2.0**20, learned=False))


def turned(x: Tensor) -> Tensor:
    """The same values, column by column in memory, or of three dimensions feature by feature."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("of", ["query", "positive", "keys", "all"])
@pytest.mark.parametrize("count", [1, 3, None], ids=str)
def test_layouts(of: str, count: int | None, engine: str) -> None:
    """Keys of each query, of which it has ``count``, or shared ones (None), and who lies otherwise in memory."""
    case = case_of(engine, learned=False)
    call = case.call()
    keys = call.first.keys if count is None else draw(len(call.query), count, D, seed=5, dtype=case.dtype)
    call = call._replace(first=KeySet(keys, Pairs(), normalize=True), second=None)
    lie = {name: turned if of in (name, "all") else torch.clone for name in ("query", "positive", "keys")}
    call = call._replace(
        query=lie["query"](call.query),
        positive=lie["positive"](call.positive),
        first=call.first._replace(keys=lie["keys"](keys)),
    )
    assert_right(case, call)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("across", [True, False], ids=["across", "views"])
def test_both_directions(across: bool, dtype: torch.dtype, autocast: torch.dtype | None, engine: str) -> None:
    place = DTYPES.index(dtype) + across + (autocast is not None)
    for dual, alpha, temperature, learned in some_of(BOTH, engine, place):
        case = case_of(engine, dtype=dtype, temperature=temperature, learned=learned, reduced=True)
        found: list[tuple[Answers, Answers, Answers]] = []
        for seed in range(
            2 if engine in INTERPRETED else 4
        ):  # the error of a single number may be small by chance, eager's as ours
            first, second = draw(2 * 19, D, dtype=dtype, seed=seed).chunk(2)
            call = SymmetricLosses(
                first=first,
                second=second,
                across=across,
                temperature=temperature,
                learned_temperature=case.learned_temperature(),
                inter_temperature=1.0 if dual else None,
                alpha=alpha,
                share=[1, 38],
                need_gradient=True,
                autocast=autocast if dtype != torch.float64 else None,
                backend=case.backend,
            )
            grad = case.grad(1)
            found.append((ours_both(call, grad), dense_both(call, grad, None), dense_both(call, grad, torch.float64)))
        for name in found[0][0]:
            got, eager, truth = (
                torch.stack([one[name].cpu() for one in answers]) for answers in zip(*found, strict=True)
            )
            assert_as_exact_as_eager(got, eager, truth, name, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logsumexp(kind: str, dtype: torch.dtype, engine: str) -> None:
    one_dtype_a_kind(engine, kind, dtype)
    case = case_of(engine, kind, dtype)
    sets, n = key_sets(kind, dtype, False)
    query, t = draw(n, D, dtype=dtype) * 0.2, torch.tensor(0.7, device=DEVICE)
    call = LogSumExp(query.to(dtype), sets[0], 1.0, t, True, None, case.backend)
    grad = case.grad(n)
    got, eager, truth = (
        ours_logsumexp(call, grad),
        *(dense_logsumexp(call, grad, one) for one in (dtype, torch.float64)),
    )
    for name, x in got.items():
        assert_as_exact_as_eager(x.cpu(), eager[name].cpu(), truth[name].cpu(), name, temperature=0.05)


def test_more_splits_than_are_put_together_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a GPU's multiprocessors ask for."""
    pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch on Linux")
    monkeypatch.setattr(arguments, "parallel", lambda x: 132)
    case = Case(backend="triton", dtype=torch.float32, dual=True)
    call = case.call()
    keys = draw(2500, D, seed=3, dtype=torch.float32)
    assert_right(case, call._replace(first=KeySet(keys, Pairs(), True)))


# ------------------------------------------------------------------------------------------------------------ the edges


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ids", "mask", "mask of pairs", "own ids", "picked ids", "ranks ids"])
def test_what_is_left_out_may_hold_anything(kind: str, dtype: torch.dtype, engine: str) -> None:
    """Loss and gradients as if it were not there, and its own gradient is 0; who does meet it gets NaN."""
    one_dtype_a_kind(engine, kind, dtype)
    call = case_of(engine, kind, dtype, reduced=True, learned=False).call()
    one = call.first
    keep = keep_of(one.pairs, len(call.query), K).to(DEVICE)
    place, other = (0, 1) if kind != "own ids" else ((2, 3), (4, 5))
    anything = one.keys.clone()
    if kind == "own ids":
        left = ~keep
        anything[left] = math.nan
        expected = one.keys.masked_fill(left[..., None], 0.0)
    else:
        ids, mask = one.pairs.key_ids, one.pairs.mask
        if ids is not None:
            ids[place], ids[other] = 77, 77
            call.first.pairs.query_ids.fill_(77)  # type: ignore[union-attr]
        if mask is not None:
            mask[..., [place, other]] = False
        anything[place], anything[other] = math.nan, math.inf
        expected = one.keys.clone()
        expected[[place, other]] = 0.0
    grad = torch.tensor(1.0, device=DEVICE, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    got = ours(call._replace(first=one._replace(keys=anything)), grad)
    clean = ours(call._replace(first=one._replace(keys=expected)), grad)
    for name, x in got.items():
        assert x.equal(clean[name]), name
    assert not bool(got["keys 0"][anything.isfinite().logical_not()].any())


@pytest.mark.parametrize("kind", ["mask of pairs", "ids", "ranks ids"])
def test_a_key_that_is_not_finite_is_seen_by_who_meets_it(kind: str, engine: str) -> None:
    call = case_of(engine, kind, learned=False).call()
    call.first.keys[3] = math.inf
    out = BACKENDS[call.backend].row_losses(call)
    meets = keep_of(call.first.pairs, N, K)[:, 3].to(DEVICE)
    assert 0 < int(meets.sum()) < len(meets)
    assert out.loss.isnan().equal(meets)
    assert out.query_gradient.isnan().all(1).equal(meets)


def test_a_query_without_negatives(engine: str) -> None:
    call = case_of(engine, "mask of pairs", learned=False).call()
    assert call.first.pairs.mask is not None
    call.first.pairs.mask[6] = False
    row_losses = BACKENDS[call.backend].row_losses
    if DEVICE.type == "cpu" and engine != "triton":  # whose kernels cannot raise
        with pytest.raises(ValueError, match=r"query 6 has no negatives left \(effective K = 0\)"):
            row_losses(call)
    out = row_losses(call._replace(may_raise=False))
    assert out.loss.isnan().nonzero().flatten().tolist() == [6]
    assert out.rows[Row.PULL].isnan().nonzero().flatten().tolist() == [6]


def test_a_set_without_keys(engine: str) -> None:
    call = case_of(engine, "two sets", learned=False).call()
    empty = KeySet(call.query[:0], Pairs(), True)
    with_empty, without = call._replace(first=empty), call._replace(first=call.sets[1], second=None)
    got, expected = (ours(one, case_of(engine).grad(N)) for one in (with_empty, without))
    assert got["loss"].equal(expected["loss"])
    assert got["keys 1"].equal(expected["keys 0"])
    assert got["keys 0"].shape == (0, D)


def test_a_negative_as_similar_as_the_positive_ranks_above_it(engine: str) -> None:
    call = case_of(engine, learned=False).call()
    keys = call.first.keys.clone()
    keys[:N] = call.positive
    others = call._replace(first=KeySet(keys[N:], Pairs(), True)), call._replace(first=KeySet(keys, Pairs(), True))
    above, with_positives = (BACKENDS[call.backend].row_losses(one).metrics[Metric.RANK] for one in others)
    assert bool((with_positives >= above + 1).all())


@pytest.mark.parametrize("t", [0.0, -1.0, math.nan])
def test_a_learned_temperature_that_is_not_positive_gives_nan(t: float, engine: str) -> None:
    call = case_of(engine, dual=True).call()
    out = BACKENDS[call.backend].row_losses(call._replace(learned_temperature=torch.tensor(t, device=DEVICE)))
    assert bool(torch.cat([out.loss[:, None], out.query_gradient], 1).isnan().all())


@pytest.mark.parametrize("kind", ["everything", "two sets", "own ids", "batch"])
def test_the_same_bits_every_time(kind: str, engine: str) -> None:
    case = case_of(engine, kind, torch.bfloat16)
    call = case.call()
    first, again = (ours(call, case.grad(len(call.query))) for _ in range(2))
    assert all(x.equal(again[name]) for name, x in first.items())
