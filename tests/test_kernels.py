"""The Triton kernels against the oracle: on a GPU where there is one, else in Triton's interpreter on CPU tensors.

python -m pytest tests/test_kernels.py
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, functional, ops
from eqco_loss.ops import KeySet, LogSumExp, Pairs, Row, RowLosses, definition, tiles, triton
from eqco_loss.ops.calls import LN2, KeysGradient, RowOutputs
from eqco_loss.ops.operator import LAYOUT
from eqco_loss.ops.triton import arguments, backward, launch, tables
from tests import cases, test_negatives
from tests.cases import DEVICE, LOSSES, Answer, Case, Sample
from tests.interpreter import cut_sums
from tests.strategies import LAYOUTS
from tests.test_negatives import CHOICES, Choice
from tests.tolerance import assert_as_exact_as_eager

pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch on Linux")
GPU = DEVICE.type == "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def moved(sample: Sample) -> Sample:
    def move(x: Any) -> Any:
        return x if x is None else x.to(DEVICE)

    return Sample(*(move(x) for x in (sample.query, sample.positive, sample.negatives, *sample.ids().values())))


def assert_kernels(case: Case, **how: Any) -> None:
    """Loss and gradients by the suite's one tolerance."""
    sample = cases.make(case)
    truth, plain = cases.truth(case, sample), cases.plain(case, sample)  # before the sample's queue is moved
    got = cases.ours(replace(case, backend="triton"), moved(sample), **how)
    cases.assert_answers(case, got, plain, truth)


# ------------------------------------------------------------------------------------------- against the oracle


SIZES = [(1, 1, 1), (2, 70, 16), (17, 64, 33), (3, 129, 100), (33, 5, 130), (2, 3, 300), (2, 9, 512)]


@pytest.mark.parametrize(("n", "k", "d"), SIZES)
def test_odd_sizes(n: int, k: int, d: int) -> None:
    assert_kernels(Case("eqco", "shared", n=n, k=k, d=d))
    if n > 1:
        for dtype in DTYPES[1:]:
            assert_kernels(Case("dual", "in_batch", n=n, d=d, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_batch", ["keys", "views"])
@pytest.mark.parametrize("loss", [EqCoLoss, DualTempInfoNCE])
@pytest.mark.parametrize("why", ["one row", "one id"])
def test_a_batch_without_negatives_beside_keys(why: str, loss: Any, in_batch: Any, dtype: torch.dtype) -> None:
    """Value and gradients of the keys alone."""
    n, k, d = (1 if why == "one row" else 4), 21, 16
    leaves = [torch.randn(rows, d, device=DEVICE).to(dtype).requires_grad_() for rows in (n, n, k)]
    ids = {"query_ids": torch.full((n,), 3), "negative_ids": torch.arange(k) + 4} if why == "one id" else {}
    ids = {name: x.to(DEVICE) for name, x in ids.items()}
    both, alone = (loss(in_batch=choice, backend="triton")(*leaves, **ids) for choice in (in_batch, None))
    torch.testing.assert_close(both, alone)
    for got, expected in zip(torch.autograd.grad(both, leaves), torch.autograd.grad(alone, leaves), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("choice", CHOICES[::7], ids=str)
def test_every_choice(choice: Choice) -> None:
    """Views, both directions, two sets at once, ids, few of the batch; means and weighted rows."""
    d = test_negatives.data(choice, torch.float32)
    on_device = test_negatives.Data(*(x.to(DEVICE) for x in d))
    reduction = "mean" if choice.symmetric else "none"
    got = test_negatives.ours(choice, on_device, reduction, backend="triton")
    test_negatives.assert_choice(choice, d, got, reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("in_batch", ["keys", "views"])
@pytest.mark.parametrize("n", [2, 17, 70])
def test_both_directions_in_one_pass(n: int, in_batch: Any, dual: bool, dtype: torch.dtype) -> None:
    """Rows as anchors, positives and keys; a mean goes through the kernel of both roles. A learned temperature too."""
    settings = ((True, 0.2, False), (True, 0.03, True), (False, 0.5, True))[: 3 if n == 2 else 2]
    if n == 2 and in_batch == "keys" and dtype != torch.float32:
        n = 3  # with one negative a row, a gradient is the difference of two terms that half products have rounded
    for normalize, t, learned in settings:
        q, k = (torch.randn(n, 20) for _ in range(2))
        q, k = ((F.normalize(x) if not normalize else 3 * x).to(dtype) for x in (q, k))

        def loss(leaf: dict[str, Tensor], backend: Any, normalize: bool = normalize, t: float = t) -> Tensor:
            how: dict[str, Any] = {"in_batch": in_batch, "symmetric": True, "normalize": normalize, "backend": backend}
            one = functional.dual_temp_infonce if dual else functional.eqco_loss
            return one(leaf["q"], leaf["k"], temperature=leaf.get("t", t), **how)

        leaves = {"q": q, "k": k} | ({"t": torch.tensor(t)} if learned else {})
        got = cases.answer(lambda leaf: loss(leaf, "triton"), {name: x.to(DEVICE) for name, x in leaves.items()})
        truth = cases.answer(lambda leaf: loss(leaf, "torch"), {name: x.double() for name, x in leaves.items()})
        plain = cases.answer(lambda leaf: loss(leaf, "torch"), leaves)
        for ours, usual, exact, what in (
            (got.loss, plain.loss, truth.loss, "loss"),
            *((got.gradients[x], plain.gradients[x], truth.gradients[x], x) for x in leaves),
        ):
            if dtype == torch.float32:
                assert_as_exact_as_eager(ours, usual, exact, what, temperature=t)
            else:  # the plain backend upcasts: the products' rounding is the kernels' own, and the result's
                size = exact.abs().max().item()
                if what == "t":  # a difference of similarities: their own size, and the softmax's error
                    size = max(size, 2 * (q.double() @ k.double().T).abs().max().item() / t**2)
                limit = (2e-3 + torch.finfo(ours.dtype).eps) * size
                assert (ours.double() - exact).abs().max().item() <= limit, what


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_reductions_of_both_directions(in_batch: Any, reduction: Any) -> None:
    q, k = (torch.randn(5, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    how: dict[str, Any] = {"in_batch": in_batch, "symmetric": True, "reduction": reduction}
    ours, plain = (EqCoLoss(backend=backend, **how)(q, k) for backend in ("triton", "torch"))
    torch.testing.assert_close(ours, plain, atol=0, rtol=2e-6)
    both = (torch.autograd.grad(loss.sum(), (q, k)) for loss in (ours, plain))
    torch.testing.assert_close(next(both), next(both), atol=2e-6, rtol=1e-5)


ROW_LOSSES = RowLosses(  # of one set of unit rows, every gradient but the keys'
    query=torch.empty(0),
    positive=torch.empty(0),
    first=KeySet(torch.empty(0), Pairs(), normalize=False),
    second=None,
    temperature=1.0,
    learned_temperature=None,
    inter_temperature=None,
    alpha=None,
    normalize=False,
    share=[1, 1],
    reduced=False,
    may_raise=False,
    need_query_gradient=True,
    need_positive_gradient=True,
    need_keys_gradient=False,
    need_metrics=False,
    autocast=None,
    backend="triton",
)


def row_losses(q: Tensor, p: Tensor, keys: Tensor, pairs: Pairs | None = None, **fields: Any) -> RowOutputs:
    """By the kernels, whose answers come back in float64 on the CPU."""
    normalize = fields.pop("normalize_keys", False)
    first = KeySet(keys.to(DEVICE), pairs or Pairs(), normalize)
    call = ROW_LOSSES._replace(query=q.to(DEVICE), positive=p.to(DEVICE), first=first, **fields)
    return RowOutputs(*(x if x is None else x.double().cpu() for x in triton.row_losses(call)))  # type: ignore


def keys_gradient(q: Tensor, keys: Tensor, grad: Tensor, rows: Tensor, t: float, **fields: Any) -> Tensor:
    """By the kernels, in float64 on the CPU."""
    given: dict[str, Any] = {"pairs": Pairs(), "normalize": False} | fields
    call = KeysGradient(
        query=q.to(DEVICE),
        first=KeySet(keys.to(DEVICE), given["pairs"], given["normalize"]),
        grad=grad.to(DEVICE),
        rows=rows.float().to(DEVICE),
        temperature=t,
        learned_temperature=None,
        normalize=given["normalize"],
        autocast=None,
        backend="triton",
    )
    return triton.keys_gradient(call).keys.double().cpu()


def lse_of(rows: Tensor) -> Tensor:
    return (rows[Row.BASE] + rows[Row.TOTAL].log2()) * LN2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.02, 0.07, 0.2, 1.0])
def test_accuracy_targets(t: float, dtype: torch.dtype) -> None:
    """PERFORMANCE: float32 2e-6 or twice eager's error; half 5e-4 for the mean key and 2e-3 for the keys' gradient."""
    n, k, d = 24, 300, 64
    q, p, keys = (F.normalize(torch.randn(x, d)).to(dtype) for x in (n, n, k))
    out = row_losses(q, p, keys, temperature=t, alpha=2.0**20)
    exact = [x.double() for x in (q, p, keys)]
    logits = exact[0] @ exact[2].T / t
    lse, softmax = logits.logsumexp(1), logits.softmax(1)
    shift = math.log(2.0**20 / k)
    weight = torch.sigmoid(shift - ((exact[0] * exact[1]).sum(1) / t - lse))
    assert (lse_of(out.rows) - lse).abs().max() <= 2e-6 * lse.abs().max().clamp_min(1.0)
    row_loss = F.softplus(shift - ((exact[0] * exact[1]).sum(1) / t - lse))
    assert (out.loss - row_loss).abs().max() <= 2e-6 * row_loss.max().clamp_min(1.0)
    assert out.query_gradient is not None
    mean_key = out.query_gradient * t / weight[:, None] + exact[1]
    limit = 2e-6 * max(1.0, 1 / t) if dtype == torch.float32 else 5e-4
    if dtype == torch.bfloat16:  # the dtype of the gradient that the mean key is computed from here
        limit += torch.finfo(dtype).eps / 2 * (out.query_gradient.abs().amax(1) * t / weight).max().item()
    assert (mean_key - softmax @ exact[2]).abs().max() <= limit
    grad = torch.rand(n) / n
    got = keys_gradient(q, keys, grad, out.rows, t)
    expected = (softmax * (grad.double() * weight / t)[:, None]).T @ exact[0]
    limit = 1e-5 if dtype == torch.float32 else 2e-3 + torch.finfo(dtype).eps  # the products', and the result's own
    difference = got - expected
    assert difference.abs().max() <= limit * expected.abs().max() + torch.finfo(dtype).smallest_normal * 2**-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.02, 0.03, 0.1, 0.2])
@pytest.mark.parametrize("lengths", [None, 1e-3, 300.0])
def test_unit_rows_at_their_extremes(lengths: float | None, t: float, dtype: torch.dtype) -> None:
    """No running maximum where a bound serves: rows whose keys are all opposite, all equal, some of each, or random."""
    d = 32
    q = F.normalize(torch.randn(17, d))
    near = F.normalize(q[:1] + 0.01 * torch.randn(150, d))
    q = torch.cat([q[:1], -q[:1], q[1:]])
    for keys in (near, torch.cat([near[:75], -near[75:]]), F.normalize(torch.randn(150, d))):
        raw = (keys if lengths is None else keys * lengths * (0.5 + torch.rand(150, 1))).to(dtype)
        how: dict[str, Any] = {"temperature": t, "normalize": True, "need_positive_gradient": False}
        got = row_losses(q.to(dtype), q.to(dtype), raw, normalize_keys=lengths is not None, **how)
        exact, exact_keys = q.to(dtype).double(), raw.double()
        units = F.normalize(exact), exact_keys if lengths is None else F.normalize(exact_keys)
        logits = units[0] @ units[1].T / t
        lse = logits.logsumexp(1)
        assert (lse_of(got.rows) - lse).abs().max() <= 2e-6 * max(1.0, lse.abs().max().item())
        weight = torch.sigmoid(lse - 1 / t)
        change = (weight / t)[:, None] * (logits.softmax(1) @ units[1] - units[0])
        change = change - units[0] * (units[0] * change).sum(1, keepdim=True)
        limit = 4e-6 if dtype == torch.float32 else 1e-3
        assert (got.query_gradient * exact.norm(dim=1)[:, None] - change).abs().max() <= limit / t


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_strides(layout: str) -> None:
    for mode in ("in_batch", "shared", "per_query"):
        assert_kernels(Case("eqco", mode, n=6), layout=LAYOUTS[layout])


def test_moco_queue_layout() -> None:
    """MoCo keeps (D, K): its transpose goes in as it is."""
    q, p, stored = (torch.randn(*shape, device=DEVICE) for shape in ((5, 12), (5, 12), (12, 90)))
    same = EqCoLoss(backend="triton")
    rtol = 1e-6 if GPU else 0.0  # there the order of a sum follows the layout
    torch.testing.assert_close(same(q, p, stored.T), same(q, p, stored.T.contiguous()), atol=0, rtol=rtol)


@pytest.mark.parametrize("mode", ["shared", "in_batch", "per_query"])
@pytest.mark.parametrize("loss", LOSSES)
def test_learned_temperature(loss: str, mode: str) -> None:
    case = Case(loss, mode, n=6)
    sample = cases.make(case)
    got = cases.ours(replace(case, backend="triton"), moved(sample), learn_temperature=True)
    truth = cases.truth(case, sample, learn_temperature=True)
    cases.assert_answers(case, got, cases.plain(case, sample, learn_temperature=True), truth)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("shape", [(40, 12), (6, 40, 12)], ids=str)
def test_logsumexp(shape: tuple[int, ...], ids: bool) -> None:
    q, keys = torch.randn(6, 12), torch.randn(*shape)
    query_ids, key_ids = (torch.arange(6) % 3, torch.arange(40) % 5) if ids else (None, None)
    on_device = [None if x is None else x.to(DEVICE) for x in (query_ids, key_ids)]
    leaves = [x.to(DEVICE).requires_grad_() for x in (q, keys)]
    first = KeySet(leaves[1], Pairs(query_ids=on_device[0], key_ids=on_device[1]), normalize=False)
    call = LogSumExp(leaves[0], first, 0.5, None, need_query_gradient=True, autocast=None, backend="triton")
    lse = ops.logsumexp(call).lse
    exact = q.double().requires_grad_(), keys.double().requires_grad_()
    one = KeySet(exact[1], Pairs(query_ids, key_ids), normalize=False)
    expected = definition.logsumexp(call._replace(query=exact[0], first=one))
    weight = torch.linspace(0.5, 1.5, 6)
    got = torch.autograd.grad((lse * weight.to(DEVICE)).sum(), leaves)
    truth = torch.autograd.grad((expected * weight).sum(), exact)
    torch.testing.assert_close(lse.double().cpu(), expected, atol=1e-5, rtol=1e-6)
    for a, b in zip(got, truth, strict=True):
        atol = 1e-5 * b.abs().max().item() if GPU else 1e-6  # logits of 20: float32's own rounding of them
        torch.testing.assert_close(a.double().cpu(), b, atol=atol, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- bands of several ranks


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    ("n", "offset", "modulus", "width"),
    [(5, 3, 40, 39), (5, 36, 41, 7), (18, 0, 18, 17), (18, 0, 18, 3), (80, 90, 200, 5)],
)
def test_bands(n: int, offset: int, modulus: int, width: int, views: int) -> None:
    """Rows of one rank against the keys of all: own place out, or the next few, cyclic."""
    q, p, keys = torch.randn(n, 8), torch.randn(n, 8), torch.randn(views * modulus, 8)
    pairs = Pairs(band=[offset, width, modulus])
    grad = torch.rand(n)
    t = torch.tensor(0.3)  # learned, so that its gradient is among the rows
    fields: dict[str, Any] = {"alpha": 64.0, "normalize": True, "need_metrics": True}
    exact = tiles.row_losses(
        ROW_LOSSES._replace(
            query=q.double(),
            positive=p.double(),
            first=KeySet(keys.double(), pairs, normalize=True),
            learned_temperature=t.double(),
            **fields,
        )
    )
    got = row_losses(q, p, keys, pairs, normalize_keys=True, learned_temperature=t.to(DEVICE), **fields)
    for name, a, b in zip(RowOutputs._fields, got, exact, strict=True):
        assert (a is None) == (b is None) == (name == "keys_gradient"), name
        if a is None or b is None:
            continue
        if name == "rows":  # what BASE has been rounded by is in TOTAL
            a, b = (torch.cat([lse_of(x)[None], x[Row.PULL : Row.INVERSE]]) for x in (a, b))
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5, msg=name)
    call = KeysGradient(
        q.double(), KeySet(keys.double(), pairs, True), grad.double(), exact.rows, 0.3, None, True, None, "torch"
    )
    got_keys = keys_gradient(q, keys, grad, got.rows, 0.3, pairs=pairs, normalize=True)
    torch.testing.assert_close(got_keys, tiles.keys_gradient(call).keys, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("filled", [1, 16, 63, 64, 65, 200])
def test_valid_count_on_the_device(filled: int) -> None:
    """A queue that fills: whole splits without a key."""
    q, p = torch.randn(3, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    queue = MomentumQueue(200, 8, device=DEVICE)
    queue.enqueue(torch.randn(filled, 8, device=DEVICE))
    criterion = EqCoLoss(backend="triton")
    torch.testing.assert_close(criterion(q, p, queue), criterion(q, p, queue.keys), atol=1e-6, rtol=1e-6)


IDS_OF = {  # n, negatives
    "queue": (18, 210),
    "given": (18, 210),
    "batch": (72, None),
    "views": (72, None),
}


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        *((where, "int64") for where in IDS_OF),
        *(
            ("given", "high bits"),
            ("batch", "high bits"),
            ("given", "int32"),
            ("given", "NaN"),
            ("batch", "large tiles"),
            ("views", "large tiles"),
        ),
    ],
)
def test_ids_in_few_of_many_tiles(where: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are compared only in tiles that hold equal ones, of one mark or of several."""
    monkeypatch.setattr(launch, "_COLUMNS_AT_ONCE", 0)
    tile = tables.TileSize(128, 64, 4, 1) if kind == "large tiles" else tables.TileSize(16, 16, 4, 1)
    monkeypatch.setattr(launch, "forward_tile", lambda *_, **__: tile)
    monkeypatch.setattr(backward, "keys_tile", lambda *_, **__: tile)
    monkeypatch.setattr(arguments, "parallel", lambda _: 1)
    n, k = IDS_OF[where]
    ids, key_ids = torch.arange(n), torch.arange(210) + 1000
    ids[2], ids[17], ids[70:71] = 3, n - 1, 60  # pairs of a batch's rows that are alike
    key_ids[[5, 6, 100, 209]] = torch.tensor([3, 0, 17, n - 1])
    if kind == "high bits":  # ids that only these tell apart, and a pair of which only they are equal
        ids, key_ids = ids << 32, key_ids << 32
        ids[1] += 1
    wanted = torch.int32 if kind == "int32" else torch.int64
    q, p, keys = (torch.randn(rows, 24).double() for rows in (n, n, 210))
    if kind == "NaN":  # of a key that no query meets
        ids[:], key_ids[7], keys[7] = 0, 0, math.nan

    def answers(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (q, p, keys)]
        given: dict[str, Any] = {"query_ids": ids.to(DEVICE, wanted)}
        criterion = EqCoLoss(0.3, in_batch="views" if where == "views" else None, backend=backend)  # type: ignore[arg-type]
        negatives: Any = leaves[2]
        if where == "given":
            given["negative_ids"] = key_ids.to(DEVICE, wanted)
        if where == "queue":
            negatives = MomentumQueue(300, 24, store_ids=True, dtype=dtype, device=DEVICE)
            negatives.enqueue(keys.to(DEVICE, dtype), key_ids.to(DEVICE))
        metrics = criterion.with_metrics(leaves[0], leaves[1], None if k is None else negatives, **given)
        found = torch.autograd.grad(metrics.loss, leaves, materialize_grads=True, allow_unused=True)
        return [x.detach().double().cpu() for x in (*metrics, *found)]

    got, exact = answers("triton", torch.float32), answers("torch", torch.float64)
    torch.testing.assert_close(got, exact, atol=3e-6, rtol=3e-6)
    assert exact[5] < {"batch": n - 1, "views": 2 * n - 2}.get(where, 210)  # whose mean ids have made smaller


@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 65), (600, 130)])
def test_marks_of_equal_ids(n: int, k: int) -> None:
    """A bit for each 64 keys and 64 queries."""
    ids, key_ids = torch.randperm(9 * n)[:n] // 2, torch.randint(9 * n, (k, 3))[:, 1] // 2
    left = arguments.left_out(Pairs(query_ids=ids.to(DEVICE), key_ids=key_ids.to(DEVICE)))
    marks = arguments.marked(left, n, k).cpu()
    bits = torch.stack([(marks >> bit) & 1 for bit in range(tables.BITS)], 2).flatten(1)[:, : -(-n // 64)]
    equal = F.pad(key_ids[:, None] == ids, (0, -n % 64, 0, -k % 64)).view(-(-k // 64), 64, -(-n // 64), 64)
    assert torch.equal(bits.bool(), equal.any(3).any(1))


# ------------------------------------------------------------------------------------------------- what must not matter


def test_tiles_and_splits_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("dual", "shared", n=18, k=150, d=24)
    sample = cases.make(case)

    def under(config: tables.TileSize | None, parallel: int) -> Answer:
        if config is not None:
            monkeypatch.setattr(launch, "_COLUMNS_AT_ONCE", 0)
            monkeypatch.setattr(launch, "forward_tile", lambda *_, **__: config)
            monkeypatch.setattr(backward, "keys_tile", lambda *_, **__: config)
            monkeypatch.setattr(arguments, "parallel", lambda _: parallel)
        return cases.ours(replace(case, backend="triton"), moved(sample))

    usual = under(None, 1)
    for config, parallel in itertools.product((tables.TileSize(16, 16, 4, 1), tables.TileSize(32, 64, 4, 2)), (1, 3)):
        other = under(config, parallel)
        torch.testing.assert_close(other.loss, usual.loss, atol=1e-6, rtol=2e-6)
        torch.testing.assert_close(other.gradients, usual.gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("copies", [0, 16])
def test_autocast(copies: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 tensors are multiplied in autocast's dtype: tile by tile, or, for many blocks of rows, from one copy."""
    monkeypatch.setattr(launch, "_CONVERSIONS", copies)
    for mode in ("in_batch", "shared"):
        case = Case("eqco", mode, n=18, k=40, d=24)
        sample = cases.make(case)
        truth = cases.truth(case, sample)
        with torch.autocast(DEVICE.type, dtype):
            got = cases.ours(replace(case, backend="triton"), moved(sample))
        assert got.loss.dtype == torch.float32
        pairs = [(got.loss, truth.loss), *((got.gradients[x], truth.gradients[x]) for x in truth.gradients)]
        for ours, exact in pairs:
            error = (ours.double() - exact).norm() / exact.norm()
            assert 1e-6 < error < 2 * torch.finfo(dtype).eps  # of half products, not of float32's


@pytest.mark.parametrize("in_batch", ["keys", "views"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_of_the_other_half(in_batch: Any, dtype: torch.dtype) -> None:
    """Both directions of views in the one half dtype, under autocast's other one, whose torch.cat refuses the first."""
    other = DTYPES[1] if dtype == DTYPES[2] else DTYPES[2]
    q, k = (torch.randn(6, 20, device=DEVICE).to(dtype) for _ in range(2))
    expected = EqCoLoss(in_batch=in_batch, symmetric=True, backend="torch")(q.float(), k.float())
    with torch.autocast(DEVICE.type, other):
        found = EqCoLoss(in_batch=in_batch, symmetric=True, backend="triton")(q, k)
    torch.testing.assert_close(found, expected, atol=0, rtol=2e-2)


def test_an_explicit_gradient_may_be_a_negative_in_memory() -> None:
    case = Case("eqco", "shared", n=6, k=40)
    sample = moved(cases.make(case))
    assert isinstance(sample.negatives, Tensor)
    leaves = [x.detach().requires_grad_() for x in (sample.query, sample.positive, sample.negatives)]
    loss, two = EqCoLoss(backend="triton")(*leaves), torch.tensor(2.0, device=DEVICE)
    expected = torch.autograd.grad(loss, leaves, two, retain_graph=True)
    found = torch.autograd.grad(loss, leaves, torch._neg_view(-two))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_for_bit(dtype: torch.dtype) -> None:
    case = Case("eqco", "in_batch", n=18, d=20, dtype=dtype, backend="triton")
    sample = moved(cases.make(case))
    first, second = cases.ours(case, sample), cases.ours(case, sample)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first.gradients[x], second.gradients[x]) for x in first.gradients)


def test_metrics() -> None:
    case = Case("dual", "shared", n=7, k=40)
    sample = moved(cases.make(case))
    assert isinstance(sample.negatives, Tensor)
    got, expected = (
        cases.criterion(replace(case, backend=backend)).with_metrics(sample.query, sample.positive, sample.negatives)
        for backend in ("triton", "torch")
    )
    for name, a, b in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


def test_second_derivatives() -> None:
    q, p, keys = (torch.randn(n, 6, device=DEVICE, requires_grad=True) for n in (4, 4, 9))

    def second(backend: Any) -> tuple[Tensor, ...]:
        loss = EqCoLoss(backend=backend)(q, p, keys)
        first = torch.autograd.grad(loss, (q, p, keys), create_graph=True)
        return torch.autograd.grad(torch.cat([g.flatten() for g in first]).square().sum(), (q, p, keys))

    for a, b in zip(second("triton"), second("torch"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_float16_gradients_too_small_for_it_are_zero(in_batch: Any) -> None:
    """Every negative is as good as out of reach: no scale brings its gradient back, and none may make it NaN."""
    query = torch.randn(20, 16, device=DEVICE, dtype=torch.float16, requires_grad=True)
    key = query.detach().clone().requires_grad_()
    criterion = EqCoLoss(0.005, alpha=None, in_batch=in_batch, symmetric=in_batch == "views", backend="triton")
    for gradient in torch.autograd.grad(criterion(query, key), [query, key]):
        assert bool((gradient == 0).all())


def test_ids_of_two_dtypes_are_compared_by_value() -> None:
    x, keys = torch.randn(4, 8, device=DEVICE), torch.randn(9, 8, device=DEVICE)
    ids = {"query_ids": torch.full((4,), -1, dtype=torch.int8), "negative_ids": torch.full((9,), 255).to(torch.uint8)}
    ids = {name: value.to(DEVICE) for name, value in ids.items()}
    values = [EqCoLoss(backend=backend)(x, x, keys, **ids) for backend in ("triton", "torch")]
    torch.testing.assert_close(*values)


def test_an_integer_alpha_of_any_size() -> None:
    x = torch.randn(4, 8, device=DEVICE)
    values = [EqCoLoss(alpha=10**20, backend=backend)(x, x + 1) for backend in ("triton", "torch")]
    torch.testing.assert_close(*values)


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "positive", "keys"])
def test_nan_and_inf_come_out_as_nan(where: str, bad: float) -> None:
    tensors = {"query": torch.randn(20, 8), "positive": torch.randn(20, 8), "keys": torch.randn(70, 8)}
    tensors[where][3, 2] = bad
    q, p, keys = (x.to(DEVICE) for x in tensors.values())
    loss = EqCoLoss(backend="triton", reduction="none")(q, p, keys)
    hit = torch.ones(20, dtype=torch.bool) if where == "keys" else torch.arange(20) == 3
    assert torch.equal(loss.isnan().cpu(), hit)


def test_a_row_without_negatives_is_nan() -> None:
    q, p, keys = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (4, 4, 20))
    ids = torch.tensor([0, 1, 2, 7], device=DEVICE)
    key_ids = torch.full((20,), 7, device=DEVICE)
    loss = EqCoLoss(backend="triton", reduction="none")(q, p, keys, query_ids=ids, negative_ids=key_ids)
    assert loss.isnan().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("query", "keys", "reason"),
    [
        (torch.randn(3, 600), torch.randn(5, 600), "D = 600: the kernels take up to 512"),
        (torch.randn(3, 8).double(), torch.randn(5, 8).double(), "float64: the kernels take float16, bfloat16"),
    ],
    ids=["wide", "float64"],
)
def test_refusals_name_the_reason_and_the_way_out(query: Tensor, keys: Tensor, reason: str) -> None:
    query, keys = query.to(DEVICE), keys.to(DEVICE)
    with pytest.raises(ValueError, match=rf"backend: expected.*{reason}.*backend='auto'"):
        EqCoLoss(backend="triton")(query, query, keys)
    assert EqCoLoss(backend="auto")(query, query, keys).isfinite()
    assert EqCoLoss(backend="auto").chosen_backend(query, query, keys)[0] == ("wide" if GPU else "torch")


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of torch 2.6 could not be compiled."""
    monkeypatch.setattr(triton, "capability", lambda index: (9, 0))
    kernels = arguments.kernels()
    monkeypatch.setattr(triton, "kernels", lambda: kernels._replace(version="3.2.0"))
    assert "Triton 3.2.0: the kernels need 3.4" in str(triton._refusal_of("cuda", 0))
    monkeypatch.setattr(triton, "kernels", lambda: kernels._replace(version="3.10.0"))
    assert triton._refusal_of("cuda", 0) is None


def test_many_features_of_float32_need_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 4090 has 99 KB of it, and three pieces of 16 keys and 16 queries of D = 512 take 112."""
    monkeypatch.setattr(triton, "_refusal_of", lambda *device: None)
    with FakeTensorMode():  # which asks for no GPU
        q, k, half = (torch.empty(3, 300, dtype=dtype, device="cuda") for dtype in (*DTYPES[:1] * 2, torch.bfloat16))
        for capability, refused in (((9, 0), None), ((8, 9), "D = 300 in float32: with 99 KB")):
            monkeypatch.setattr(triton, "capability", lambda index, capability=capability: capability)
            for keys in (k, half):
                assert str(triton.refusal(q, keys)).startswith(str(refused))
            assert triton.refusal(half, half) is None
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
        assert triton.refusal(q, k) is None


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.2, 0.02])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [False, True])
def test_float32_is_as_exact_as_eager(temperature: float, normalize: bool, symmetric: bool) -> None:
    """Whatever torch.set_float32_matmul_precision says, products of pieces are as exact as float32's own."""
    if symmetric and not normalize:
        pytest.skip("the symmetric pass is of unit rows")
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(n, 100, generator=generator).to(DEVICE) for n in (48, 48, 1100)]
    rows = [x if normalize else x * (10 * temperature) ** 0.5 / 10 for x in draws]

    def answers(backend: Literal["triton", "torch"], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).clone().requires_grad_() for x in rows[: 2 if symmetric else 3]]
        criterion = EqCoLoss(temperature, symmetric=symmetric, normalize=normalize, backend=backend)
        loss = criterion(*leaves)
        return [loss.detach().cpu(), *(x.cpu() for x in torch.autograd.grad(loss, leaves))]

    truth, eager = answers("torch", torch.float64), answers("torch", torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            got = answers("triton", torch.float32)
            for name, *three in zip(("loss", "query", "keys", "negatives")[: len(got)], got, eager, truth, strict=True):
                ours, plain, exact = (x.double() for x in three)
                error, allowed = ((x - exact).norm() / exact.norm() for x in (ours, plain))
                # A matrix unit cuts its sums off instead of rounding them, which a low temperature makes visible.
                limit = max(5e-7, (3 if temperature < 0.1 else 2) * float(allowed))
                assert error <= limit, f"{name}, {precision}: {error:.1e}, eager {allowed:.1e}"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(GPU, reason="a GPU cuts its sums by itself")
def test_long_sums_of_float32_are_rounded() -> None:
    """In one accumulator over 65,536 keys they were 8e-6 off on an H200, all towards zero."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 16, generator=generator) + 2.0 for n in (16, 16, 4096)]

    def answers(backend: Literal["triton", "torch"], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in rows]
        loss = EqCoLoss(1.0, backend=backend)(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    truth = answers("torch", torch.float64)
    with cut_sums():
        got = answers("triton", torch.float32)
    for name, a, b in zip(("loss", "query", "keys", "negatives"), got, truth, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        assert error <= 5e-7, f"{name}: {error:.1e}"


@pytest.mark.parametrize("count", [2, 3])
def test_pieces_hold_float32(count: int) -> None:
    """Of rows whose elements differ by a factor of 10^4: 22 bits of the largest, or 24 of each."""
    kernels, device = arguments.kernels(), DEVICE
    x = torch.randn(7, 19, device=device) * torch.logspace(-4, 0, 19, device=device)
    unit = x / x.norm(dim=1, keepdim=True)
    out = torch.empty(count, 7, 19, dtype=torch.float16 if count == 2 else torch.bfloat16, device=device)
    kernels.forward.prepare_rows[(1,)](
        x, *x.stride(), out, None, 7, D=19, BLOCK_D=32, BLOCK=16, NORMALIZE=count == 2, POWER=False, CLEAN=False,
        PIECES=count, enable_fp_fusion=True,
    )  # fmt: skip
    truth = unit.double() if count == 2 else x.double()
    got = out.double().sum(0) / (tables.PIECE_SCALE if count == 2 else 1)
    assert float((got - truth).abs().max() / truth.abs().max()) < 1.5e-7
    if count == 3:
        assert bool(((got - truth).abs() <= 2.0**-23 * truth.abs()).all())


@pytest.mark.skipif(GPU, reason="CPU tensors without the interpreter")
def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend: expected tensors that 'triton' serves, got CPU tensors"):
        EqCoLoss(backend="triton")(torch.randn(3, 8), torch.randn(3, 8))


# --------------------------------------------------------------------------------------------------- how many kernels


class Operations(TorchDispatchMode):
    """Names of the operations that start a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "eqco_loss" or not (func.is_view or "empty" in func.name() or "detach" in func.name()):
            self.names.append(func.name().split("::")[1].split(".")[0].removesuffix(f"_{LAYOUT}"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduced", [True, False])
def test_backward_finishes_three_gradients_at_once(dtype: torch.dtype, reduced: bool) -> None:
    """The keys', with the positives' added, and the query's: as torch multiplies and adds what forward left."""
    n, d = 21, 20
    q, keys, query_unit, positive_unit = (torch.randn(n, d, device=DEVICE) for _ in range(4))
    kind = triton.unit_dtype(dtype)
    rows = triton.row_losses(
        ROW_LOSSES._replace(
            query=q.to(dtype),
            positive=keys.to(dtype),
            first=KeySet(keys.to(dtype), Pairs(band=[0, n - 1, n]), True),
            normalize=True,
        )
    ).rows
    call = KeysGradient(
        query=q.to(dtype),
        first=KeySet(keys.to(dtype), Pairs(band=[0, n - 1, n]), True),
        grad=torch.tensor(1 / 3, device=DEVICE) if reduced else torch.linspace(-1, 2, n, device=DEVICE),
        rows=rows,
        temperature=1.0,
        learned_temperature=None,
        normalize=True,
        autocast=None,
        backend="triton",
    )
    both = call._replace(query_gradient=query_unit.to(kind), positive_gradient=positive_unit.to(kind))
    got, alone = triton.keys_gradient(both), triton.keys_gradient(call)
    only_query = triton.keys_gradient(call._replace(query_gradient=both.query_gradient))
    factor = call.grad if reduced else call.grad[:, None]
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-6}[dtype]
    added = query_unit.to(kind).float() * factor, positive_unit.to(kind).float() * factor
    assert alone.query is None
    assert got.query is not None
    assert only_query.query is not None
    assert got.query.dtype == got.keys.dtype == dtype
    torch.testing.assert_close(got.query.float(), added[0], atol=0, rtol=rounding)
    torch.testing.assert_close(got.keys.float(), alone.keys.float() + added[1], atol=3 * rounding, rtol=rounding)
    assert torch.equal(only_query.query, got.query)
    assert torch.equal(only_query.keys, alone.keys)


def test_many_programs_add_up_one_loss() -> None:
    """The last of 2500 programs sums what all have left."""
    from tests.sums import sum_of_programs

    values, scratch, total = (torch.rand(size, device=DEVICE) for size in (2500, 2501, 1))
    scratch[0] = 0.0
    sum_of_programs[(2500,)](values, scratch, total)
    torch.testing.assert_close(total[0], values.double().sum().float(), atol=0, rtol=1e-6)


def test_splits_that_are_not_there_are_zeros() -> None:
    """What lies beyond the last split, row and feature may be NaN, which a weight of 0 would not take out."""
    from tests.sums import loaded_splits

    memory = torch.full((4 * 4 * 16,), math.nan, device=DEVICE)
    memory[: 3 * 3 * 12] = torch.arange(3 * 3 * 12, device=DEVICE) + 1.0
    out = torch.empty(4, 4, 16, device=DEVICE)
    loaded_splits[(1,)](memory, out, 3, 3, D=12, SPLITS=4, ROWS=4)
    expected = torch.zeros(4, 4, 16, device=DEVICE)
    expected[:3, :3, :12] = memory[: 3 * 3 * 12].view(3, 3, 12)
    assert torch.equal(out, expected)


def test_a_simo_step_is_three_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward with detached keys: in the operator our kernel and a sum, and then one multiplication."""
    launches: list[str] = []
    of, own = arguments.kernels().forward, arguments.kernels().own
    for module, name in ((of, "attend"), (of, "combine"), (of, "prepare_rows"), (own, "attend_own")):
        monkeypatch.setattr(module, name, counting(getattr(module, name), name, launches))
    q, k = torch.randn(32, 16, device=DEVICE, requires_grad=True), torch.randn(32, 16, device=DEVICE)
    with Operations() as operations:
        loss = EqCoLoss(num_negatives=15, backend="triton")(q, k)
        forward = operations.names[:]
        operations.names.clear()
        torch.autograd.grad(loss, q, grad_outputs=torch.ones((), device=DEVICE))
    assert launches == ["attend"]
    assert [x for x in forward if x != "ones"] == ["row_losses"]
    assert [x for x in operations.names if x != "ones"] == ["mul"]


def counting(kernel: Any, name: str, launches: list[str]) -> Any:
    class Counting:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            launches.append(name)
            launcher: Callable[..., Any] = kernel[grid]
            return launcher

    return Counting()
