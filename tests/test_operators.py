"""What PyTorch asks of an operator: opcheck, gradcheck, compile, autocast, versions, memory, determinism."""

import math
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import eqco_loss.ops
from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, functional
from eqco_loss.ops.flat import flatten
from eqco_loss.ops.operator import LAYOUT, Operator
from tests import cases, knobs, oracle
from tests.cases import LOSSES, MODES, MODES_AND_IDS, Case, Sample
from tests.tolerance import assert_as_exact_as_eager

TINY = Case(n=4, k=6, d=3, dtype=torch.float64, alpha=9.0, temperature=0.5)


def tiny(loss: str, mode: str, **changes: object) -> Case:
    if mode == "per_query":
        changes |= {"n": 3, "k": 4, "d": 2}
    return TINY.but(**{"loss": loss, "mode": mode, "k": 2 if mode == "rolled" else 6, **changes})


# -------------------------------------------------------------------------------------------------------------- opcheck


def operators() -> list[str]:
    """Every operator that the package registers, whatever they are called."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix("eqco_loss::").split(".")[0] for name in names if name.startswith("eqco_loss::")})


class Recorder:
    """Remembers the arguments with which the package calls its operators, by way of the public functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, list[list[Any]]] = {}
        original = Operator.__call__

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach().clone().requires_grad_(value.requires_grad and torch.is_grad_enabled())

        def call(operator: Operator[Any, Any], record: Any) -> Any:
            flat = [leaf(value) for value in flatten(type(record), record)]
            self.calls.setdefault(operator.name, []).append(flat)
            return original(operator, record)

        monkeypatch.setattr(Operator, "__call__", call)
        monkeypatch.setattr(Operator, "in_backward", lambda operator, ctx, record, grad: operator(record))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch hides it in a way that pytest undoes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [*MODES, "random", "lse"])
def test_opcheck(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, on the very arguments the public functions pass."""
    recorder = Recorder(monkeypatch)
    made = 0
    for loss, ids in (("eqco", "none"), ("dual", "flat")):
        case = Case(
            loss,
            "in_batch" if mode == "random" else "shared" if mode == "lse" else mode,
            n=6,
            k=7,
            d=4,
            dtype=dtype,
            ids=ids,
        )
        sample = cases.make(case)
        leaves = {name: leaf.requires_grad_() for name, leaf in cases.leaves_of(sample).items()}
        if mode == "lse":
            assert isinstance(sample.negatives, Tensor)
            result = functional.negatives_logsumexp(
                sample.query, sample.negatives, temperature=0.5, query_ids=sample.query_ids, key_ids=sample.negative_ids
            )
        else:
            t = nn.Parameter(torch.tensor(0.3)) if loss == "eqco" else None
            num, sampling = (3, "random") if mode == "random" else (None, "rolled")
            criterion = cases.criterion(case, temperature=t, num_negatives=num, sampling=sampling)
            ids_of = {"query_ids": sample.query_ids, "negative_ids": sample.negative_ids}
            result = criterion(leaves["query"], leaves["positive"], leaves.get("negatives", sample.negatives), **ids_of)
        torch.autograd.backward(result.sum())
    for name, calls in recorder.calls.items():
        for arguments in calls:
            made += 1
            report = torch.library.opcheck(getattr(torch.ops.eqco_loss, name).default, tuple(arguments))
            assert set(report.values()) == {"SUCCESS"}, report
    assert made >= 2


def test_opcheck_reaches_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators(), "no operator is registered"
    recorder = Recorder(monkeypatch)
    query, keys = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    EqCoLoss()(query, query.detach(), keys).backward()
    torch.autograd.backward(functional.negatives_logsumexp(query, keys).sum())
    EqCoLoss(symmetric=True)(query, 2 * query).backward()
    assert set(recorder.calls) == set(operators())


class Seen(TorchDispatchMode):
    """Somebody who looks on: the package's operators that pass by."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "eqco_loss":
            self.names.append(func.name().split("::")[1].removesuffix(f"_{LAYOUT}"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [*MODES, "lse"])
@pytest.mark.parametrize("loss", LOSSES)
def test_past_the_dispatcher_is_the_same(loss: str, mode: str) -> None:
    """Nobody looks on: no dispatch. A mode does: it sees the operators. The same bits either way."""
    case = Case(loss, "shared" if mode == "lse" else mode, n=6, k=7, d=4)
    sample = cases.make(case)
    leaves = {name: leaf.requires_grad_() for name, leaf in cases.leaves_of(sample).items()}

    def results() -> list[Tensor]:
        negatives = leaves.get("negatives", sample.negatives)
        if mode == "lse":
            assert isinstance(negatives, Tensor)
            value = functional.negatives_logsumexp(leaves["query"], negatives, temperature=0.5)
        else:
            value = cases.criterion(case, reduction="none")(leaves["query"], leaves["positive"], negatives)
        wanted = [leaf for name, leaf in leaves.items() if mode != "lse" or name != "positive"]
        return [value.detach(), *torch.autograd.grad(value.square().sum(), wanted)]

    operator = "logsumexp" if mode == "lse" else "row_losses"
    with mock.patch.object(getattr(eqco_loss.ops, operator), "registered", side_effect=AssertionError):
        straight = results()
    with Seen() as seen:
        dispatched = results()
    assert seen.names[0] == operator
    assert all(torch.equal(a, b) for a, b in zip(straight, dispatched, strict=True))


class Subclass(Tensor):
    """A tensor of somebody's own."""


def test_a_tensor_subclass_meets_the_operator() -> None:
    query = torch.randn(4, 3).as_subclass(Subclass)
    with mock.patch.object(eqco_loss.ops.row_losses, "registered", side_effect=InterruptedError):
        EqCoLoss()(torch.randn(4, 3), torch.randn(4, 3))
        with pytest.raises(InterruptedError):
            EqCoLoss()(query, torch.randn(4, 3))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_meta_device_tells_shapes(loss: str, symmetric: bool) -> None:
    """As when a model is built without memory: shapes and dtypes of loss and gradients, and nothing computed."""
    criterion = (EqCoLoss if loss == "eqco" else DualTempInfoNCE)(symmetric=symmetric)
    query, key = (torch.empty(4, 3, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    value = criterion(query, key)
    value.backward()
    assert value.is_meta
    assert (value.shape, value.dtype) == ((), torch.float32)
    for leaf in (query, key):
        assert leaf.grad is not None
        assert leaf.grad.is_meta
        assert (leaf.grad.shape, leaf.grad.dtype) == ((4, 3), torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------ gradcheck


def as_function(case: Case, sample: Sample, **choice: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The loss of every row as a function of the tensors that may require grad."""
    leaves = cases.leaves_of(sample, temperature=choice.pop("temperature", None))
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}

    def function(*values: Tensor) -> Tensor:
        leaf = dict(zip(leaves, values, strict=True))
        criterion = cases.criterion(case, temperature=leaf.get("temperature"), reduction="none", **choice)
        torch.manual_seed(5)
        loss: Tensor = criterion(
            leaf["query"], leaf["positive"], leaf.get("negatives", sample.negatives), **sample.ids()
        )
        return loss

    return function, tuple(leaves.values())


@pytest.mark.parametrize(("mode", "ids"), [*MODES_AND_IDS, ("random", "none")])
def test_gradcheck(mode: str, ids: str) -> None:
    """First and second derivatives of EqCo, in float64, for every kind of negatives."""
    case = tiny("eqco", "in_batch" if mode == "random" else mode, ids=ids)
    choice: dict[str, Any] = {"num_negatives": 2, "sampling": "random"} if mode == "random" else {}
    function, leaves = as_function(case, cases.make(case), **choice)
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_a_learned_temperature(mode: str, normalize: bool) -> None:
    case = tiny("eqco", mode, normalize=normalize)
    function, leaves = as_function(case, cases.make(case), temperature=torch.tensor(0.4, dtype=torch.float64))
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_gradcheck_of_negatives_logsumexp(per_query: bool, ids: bool) -> None:
    query = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(*((4, 5, 3) if per_query else (5, 3)), dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    of_ids = {"query_ids": torch.arange(4), "key_ids": torch.arange(5)} if ids else {}

    def function(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return functional.negatives_logsumexp(q, k, temperature=t, **of_ids)

    assert gradcheck(function, (query, keys, t))
    assert gradgradcheck(function, (query, keys, t))


@pytest.mark.parametrize("learn_temperature", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_of_the_definition(loss: str, mode: str, learn_temperature: bool) -> None:
    """Finite differences cannot judge a detached weight, as the dual temperature has; autograd of it can."""
    case = tiny(loss, mode, ids="flat", temperature=0.3)
    sample = cases.make(case)
    leaves = cases.leaves_of(sample, temperature=cases.temperature_leaf(case) if learn_temperature else None)

    def second(value: Callable[[dict[str, Tensor]], Tensor]) -> tuple[Tensor, ...]:
        fresh = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        rows = value(fresh)
        weight = torch.linspace(1, 2, len(rows), dtype=rows.dtype)
        first = torch.autograd.grad((rows * weight).sum(), list(fresh.values()), create_graph=True)
        directions = [torch.linspace(-1, 1, g.numel(), dtype=g.dtype).reshape(g.shape).sin() for g in first]
        along = sum(((g * d).sum() for g, d in zip(first, directions, strict=True)), torch.zeros((), dtype=rows.dtype))
        return (*(g.detach() for g in first), *torch.autograd.grad(along, list(fresh.values())))

    def ours(leaf: dict[str, Tensor]) -> Tensor:
        loss: Tensor = cases.criterion(case, temperature=leaf.get("temperature"), reduction="none")(
            leaf["query"], leaf["positive"], leaf.get("negatives", sample.negatives), **sample.ids()
        )
        return loss

    found, exact = second(ours), second(lambda leaf: cases.exact_rows(case, sample, leaf).loss)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_second_derivatives_of_half_inputs_are_finite() -> None:
    query = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    keys = torch.randn(9, 8, dtype=torch.bfloat16, requires_grad=True)
    (first,) = torch.autograd.grad(EqCoLoss()(query, query.detach(), keys), query, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (query, keys))
    assert all(bool(g.isfinite().all()) and g.dtype == torch.bfloat16 for g in second)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("similarity", [-1.0, 1.0])
def test_second_derivatives_far_out_are_finite(loss: str, similarity: float) -> None:
    """logaddexp's own second derivative is NaN at gaps of hundreds."""
    z = torch.eye(6, dtype=torch.float64)
    query = z.clone().requires_grad_()
    criterion = cases.criterion(Case(loss, temperature=0.002, alpha=None))
    (first,) = torch.autograd.grad(
        criterion(query, similarity * z, torch.roll(z, 1, 0) * -similarity), query, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum() + first.sum(), query)
    assert bool(first.isfinite().all())
    assert bool(second.isfinite().all())


# -------------------------------------------------------------------------------------------------------------- compile


def gradients_of(function: Callable[..., Tensor], sample: Sample) -> cases.Answer:
    def call(leaf: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        return function(leaf["query"], leaf["positive"], leaf.get("negatives", sample.negatives), **sample.ids())

    return cases.answer(call, cases.leaves_of(sample))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", [*MODES, "random"])
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_to_one_graph(loss: str, mode: str) -> None:
    """fullgraph=True, values and gradients as eager's, with ids and without, in the middle of other code."""
    for ids in ("none", "flat"):
        case = Case(loss, "in_batch" if mode == "random" else mode, ids=ids, n=9)
        sample = cases.make(case)
        num, sampling = (4, "random") if mode == "random" else (None, "rolled")
        criterion = cases.criterion(case, num_negatives=num, sampling=sampling, reduction="none")

        def step(
            q: Tensor, p: Tensor, n: cases.Negatives, criterion: cases.Criterion = criterion, **ids: Tensor | None
        ) -> Tensor:
            loss: Tensor = criterion(q * 2.0, p, n, **ids)
            return loss + 1.0

        eager = gradients_of(step, sample)
        compiled = gradients_of(torch.compile(step, fullgraph=True, backend="aot_eager"), sample)
        torch.testing.assert_close(compiled.loss, eager.loss, rtol=0, atol=0)
        for name, gradient in compiled.gradients.items():
            torch.testing.assert_close(gradient, eager.gradients[name], rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_metrics_a_learned_temperature_and_an_enqueue() -> None:
    """A whole MoCo step as one graph."""
    criterion = EqCoLoss(nn.Parameter(torch.tensor(0.2)), alpha=256)
    queues = [MomentumQueue(12, 4) for _ in range(2)]
    for queue in queues:
        queue.enqueue(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    query, key = torch.randn(3, 4), torch.randn(3, 4)

    def step(q: Tensor, k: Tensor, queue: MomentumQueue) -> tuple[Tensor, ...]:
        metrics = criterion.with_metrics(q, k, queue)
        queue.enqueue(k)
        return tuple(metrics)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        for a, b in zip(step(query, key, queues[0]), compiled(query, key, queues[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert all(
        torch.equal(a, b) for a, b in zip(queues[0].state_dict().values(), queues[1].state_dict().values(), strict=True)
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("ids", [False, True])
def test_no_recompile_while_a_queue_fills(ids: bool) -> None:
    """One graph from the first key to long after the wrap."""
    counter = CompileCounterWithBackend("aot_eager")
    criterion = EqCoLoss()
    queue = MomentumQueue(32, 4, store_ids=ids)
    queue.enqueue(torch.randn(1, 4), torch.zeros(1, dtype=torch.long) - 1 if ids else None)

    def step(q: Tensor, k: Tensor, ids: Tensor | None) -> Tensor:
        loss: Tensor = criterion(q, k, queue, query_ids=ids)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for turn in range(8):
        q, k = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
        of_keys = torch.arange(5) + 5 * turn if ids else None
        expected = step(q, k, of_keys)
        torch.testing.assert_close(compiled(q, k, of_keys), expected)
        queue.enqueue(k, of_keys)
    assert len(queue) == 32
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_every_batch_size() -> None:
    """dynamic=True: the last, smaller batch of an epoch costs no new graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(EqCoLoss(), fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for n in (7, 12, 9):
        q, p = torch.randn(n, 4), torch.randn(n, 4)
        torch.testing.assert_close(compiled(q, p), EqCoLoss()(q, p))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] >= 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["batch", "tensor", "queue", "lse"])
def test_one_graph_for_every_batch_size_with_ids(kind: str) -> None:
    queue = MomentumQueue(12, 3, store_ids=True)
    queue.enqueue(torch.randn(12, 3), torch.arange(12))

    def loss(query: Tensor, key: Tensor, ids: Tensor) -> Any:
        if kind == "lse":
            return functional.negatives_logsumexp(query, key, query_ids=ids, key_ids=ids).mean()
        if kind == "queue":
            return EqCoLoss()(query, key, queue, query_ids=ids)
        if kind == "tensor":
            return EqCoLoss()(query, key, key.detach(), query_ids=ids, negative_ids=ids)
        return EqCoLoss()(query, key, query_ids=ids)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for n in (6, 9, 5):
        given = torch.randn(n, 3), torch.randn(n, 3), torch.arange(n)
        torch.testing.assert_close(compiled(*given), loss(*given))
        graphs.append(counter.frame_count)  # torch may compile the first one twice, to find out which numbers are fixed
    assert graphs[0] == graphs[-1]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", [{}, {"symmetric": True, "in_batch": "views"}, {"num_negatives": 2}], ids=str)
def test_exports_for_every_batch_size(kind: dict[str, Any], strict: bool) -> None:
    criterion, n = EqCoLoss(**kind), torch.export.Dim("n", min=2, max=64)
    given = torch.randn(6, 3), torch.randn(6, 3)
    program = torch.export.export(criterion, given, dynamic_shapes=({0: n}, {0: n}), strict=strict).module()
    for rows in (6, 9, 5):
        query, key = torch.randn(rows, 3), torch.randn(rows, 3)
        torch.testing.assert_close(program(query, key), criterion(query, key))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_compiles_with_a_temperature_of_another_dtype(in_batch: Any) -> None:
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    criterion = EqCoLoss(temperature, in_batch=in_batch, symmetric=True)
    query, key = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    leaves = [query, key, temperature]
    expected = torch.autograd.grad(criterion(query, key), leaves)
    compiled = torch.autograd.grad(torch.compile(criterion, backend="aot_eager")(query, key), leaves)
    for got, gradient in zip(compiled, expected, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor() -> None:
    """Once through the real compiler."""
    case = Case()
    sample = cases.make(case)
    criterion = cases.criterion(case, reduction="none")
    eager, compiled = gradients_of(criterion, sample), gradients_of(torch.compile(criterion, fullgraph=True), sample)
    torch.testing.assert_close(compiled.loss, eager.loss)
    torch.testing.assert_close(compiled.gradients, eager.gradients)


# ------------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(loss: str, mode: str, dtype: torch.dtype) -> None:
    """float32 in, float32 out, no worse than eager under the same autocast; the queue's rows stay what they are."""
    case = Case(loss, mode, n=9, k=20, d=16)
    sample = cases.make(case)
    with torch.autocast("cpu", dtype=dtype):
        found, plain = cases.ours(case, sample), cases.plain(case, sample)
    assert found.loss.dtype == torch.float32
    assert {gradient.dtype for gradient in found.gradients.values()} == {torch.float32}
    cases.assert_answers(case, found, plain, cases.truth(case, sample))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_after_a_half_encoder(dtype: torch.dtype) -> None:
    """What a step under autocast gives: half embeddings from the encoder, a float32 queue, backward outside."""
    encoder = nn.Linear(6, 8)
    images = torch.randn(5, 6)
    queue = MomentumQueue(10, 8)
    queue.enqueue(torch.randn(10, 8))
    with torch.autocast("cpu", dtype=dtype):
        query = encoder(images)
        loss = EqCoLoss()(query, query.detach(), queue)
    assert query.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()
    assert encoder.weight.grad is not None
    assert bool(encoder.weight.grad.isfinite().all())


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"num_negatives": 4}, {"sampling": "random"}], ids=str)
@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_autocast_of_another_dtype(
    in_batch: Any, settings: dict[str, Any], dtype: torch.dtype, autocast: torch.dtype
) -> None:
    """torch.cat under autocast refuses the half dtype that is not its own."""
    leaves = [torch.randn(8, 6).to(dtype).requires_grad_() for _ in range(2)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    criterion = EqCoLoss(in_batch=in_batch, **settings)
    with torch.autocast("cpu", dtype=autocast):
        loss, metrics = criterion(*leaves), criterion.with_metrics(*leaves)
    torch.testing.assert_close(loss.double(), criterion(*exact), rtol=2e-2, atol=0.0)
    torch.testing.assert_close(metrics.loss, loss)
    for got, expected in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(criterion(*exact), exact), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=0.05 * float(expected.abs().max()))


# ------------------------------------------------------------------------------- what changes between loss and backward


@pytest.mark.parametrize("ids", ["none", "flat"])
@pytest.mark.parametrize("loss", LOSSES)
def test_enqueue_before_backward(loss: str, ids: str) -> None:
    """MoCo's order: loss, enqueue, backward. The gradient is that of the negatives the loss saw, no clone needed."""
    for seed in (0, 1):  # half full, and wrapped
        case = Case(loss, "queue", ids=ids, seed=seed)
        sample = cases.make(case)
        expected, plain = cases.truth(case, sample), cases.plain(case, sample)
        leaf = {name: value.clone().requires_grad_() for name, value in cases.leaves_of(sample).items()}
        rows = cases.criterion(case, reduction="none")(
            leaf["query"], leaf["positive"], sample.negatives, **sample.ids()
        )
        assert isinstance(sample.negatives, MomentumQueue)
        sample.negatives.enqueue(leaf["positive"].detach(), torch.arange(case.n) if ids == "flat" else None)
        (rows * torch.linspace(0.5, 1.5, case.n)).sum().backward()
        for name, value in leaf.items():
            assert value.grad is not None
            assert_as_exact_as_eager(
                value.grad, plain.gradients[name], expected.gradients[name], name, temperature=case.temperature
            )


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("mode", "changed"),
    [
        (mode, changed)
        for mode in ("in_batch", "shared", "per_query")
        for changed in ("query", "positive", "negatives", "temperature")
        if changed != "negatives" or mode != "in_batch"
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_change_in_place_before_backward_is_never_silent(loss: str, mode: str, changed: str, reduction: Any) -> None:
    """Either the gradients of the values that the loss saw, or an error that says so; never another gradient."""
    case = Case(loss, mode)
    sample = cases.make(case)
    expected = cases.ours(case, sample, reduction=reduction, learn_temperature=True).gradients
    leaves = cases.leaves_of(sample, temperature=cases.temperature_leaf(case))
    leaf = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    value = cases.criterion(case, temperature=leaf["temperature"], reduction=reduction)(
        leaf["query"], leaf["positive"], leaf.get("negatives")
    )
    with torch.no_grad():
        leaf[changed].mul_(-0.5)
    total = (value * torch.linspace(0.5, 1.5, case.n)).sum() if value.ndim else value
    try:
        total.backward()
    except RuntimeError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "in place" in refused or "inplace" in refused
        return
    for name, tensor in leaf.items():
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, expected[name], msg=f"gradient of {name}")


@pytest.mark.parametrize("mode", ["shared", "per_query"])
def test_keys_that_a_backward_needs_and_that_changed_raise(mode: str) -> None:
    """Row by row nothing of the keys' gradient is known before backward: it must say that it cannot be had any more."""
    sample = cases.make(Case(mode=mode))
    assert isinstance(sample.negatives, Tensor)
    keys = sample.negatives.requires_grad_()
    rows = cases.criterion(Case(mode=mode), reduction="none")(sample.query, sample.positive, keys)
    with torch.no_grad():
        keys.mul_(-1.0)
    with pytest.raises(RuntimeError, match="negative_keys"):
        rows.sum().backward()


def test_second_derivatives_after_an_enqueue_raise() -> None:
    """create_graph=True needs the queue's old rows, which are gone."""
    queue = MomentumQueue(4, 3)
    queue.enqueue(torch.randn(4, 3))
    query = torch.randn(2, 3, requires_grad=True)
    loss = EqCoLoss()(query, query.detach(), queue)
    queue.enqueue(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="in place"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_backward_twice_and_retain_graph() -> None:
    query = torch.randn(4, 3, requires_grad=True)
    loss = EqCoLoss()(query, query.detach())
    (first,) = torch.autograd.grad(loss, query, retain_graph=True)
    (second,) = torch.autograd.grad(loss, query)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("lse", [False, True])
def test_a_loss_that_is_kept_lets_go_of_its_inputs_after_backward(lse: bool) -> None:
    """As torch does with what it saved, and as it says when backward comes again."""
    query = torch.randn(4, 3, requires_grad=True)
    keys = query * 2
    alive = weakref.ref(keys)
    loss: Any = functional.negatives_logsumexp(query, keys).sum() if lse else EqCoLoss()(query, query.detach(), keys)
    del keys
    loss.backward(retain_graph=True)
    assert alive() is not None
    loss.backward()
    assert alive() is None
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, query, create_graph=create_graph)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "settings", [{}, {"num_negatives": 4}, {"symmetric": True}, {"in_batch": "views"}, {"backend": "wide"}], ids=str
)
def test_compiled_autograd(settings: dict[str, Any], reduction: Any, fresh_compiler: None) -> None:
    """It takes a gradient on each edge that needs one, also of keys that are the positives."""
    query, key = torch.randn(12, 6, requires_grad=True), torch.randn(12, 6, requires_grad=True)
    losses = EqCoLoss(reduction=reduction, **settings)(query, key)
    expected = torch.autograd.grad(losses.sum(), (query, key), retain_graph=True)

    def backward() -> None:
        torch.autograd.backward(losses.sum())

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(backward, backend="eager")()
    for leaf, gradient in zip((query, key), expected, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_trace_is_refused() -> None:
    """It would have this batch's loss as a constant."""
    given = torch.randn(4, 3), torch.randn(4, 3)
    for function in (EqCoLoss(), lambda q, k: functional.negatives_logsumexp(q, k)):
        with pytest.raises(
            NotImplementedError, match=r"expected a call outside torch\.jit\.trace.* Use torch\.compile"
        ):
            torch.jit.trace(function, given)


def test_nothing_is_kept_alive_after_the_loss_is_gone() -> None:
    """No reference cycle holds the embeddings of past steps."""
    import gc

    gc.disable()
    try:
        query, keys = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
        watched = weakref.ref(query)
        loss = EqCoLoss()(query.requires_grad_(), query.detach().clone(), keys)
        loss.backward()
        del query, loss
        assert watched() is None
    finally:
        gc.enable()


def test_embeddings_are_left_as_they_were() -> None:
    for mode in MODES:
        case = Case(mode=mode)
        sample = cases.make(case)
        before = {name: value.clone() for name, value in cases.leaves_of(sample).items()}
        cases.ours(case, sample)
        for name, value in cases.leaves_of(sample).items():
            assert torch.equal(value, before[name])


# ----------------------------------------------------------------------------------------------- determinism and memory


@pytest.mark.parametrize("mode", [*MODES, "random"])
@pytest.mark.parametrize("loss", LOSSES)
def test_bit_for_bit(loss: str, mode: str) -> None:
    """The same numbers from run to run, to the last bit, at a size that takes many tiles and both threads."""
    case = Case(
        loss, "in_batch" if mode == "random" else mode, n=300, k=30 if mode == "rolled" else 700, d=33, ids="flat"
    )
    if mode == "per_query":
        case = case.but(n=40)
    sample = cases.make(case)
    num, sampling = (20, "random") if mode == "random" else (None, "rolled")
    criterion = cases.criterion(case, num_negatives=num, sampling=sampling, reduction="none")
    first, second = gradients_of(criterion, sample), gradients_of(criterion, sample)
    assert torch.equal(first.loss, second.loss)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


class Memory:
    """Every allocation of torch's CPU allocator within the block, in bytes."""

    largest: int
    peak: int

    def __enter__(self) -> "Memory":
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profiler.stop()
        kineto: Any = self.profiler.profiler
        events = [(e.start_ns(), e.nbytes()) for e in kineto.kineto_results.events() if e.name() == "[memory]"]
        sizes = [size for _, size in sorted(events)]
        now = self.peak = 0
        self.largest = max(sizes, default=0)
        for size in sizes:
            now += size
            self.peak = max(self.peak, now)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("mode", [*MODES, "random"])
@pytest.mark.parametrize("loss", LOSSES)
def test_never_n_by_k(loss: str, mode: str, flash: bool) -> None:
    """No allocation, nor all of them together, comes near the N x K similarities: forward, backward, with metrics.

    The tile budget is as far below N x K here as the real one is below a real problem.
    """
    batch = mode in ("in_batch", "rolled", "random")
    n, k, d = (600, 599, 4) if batch else (256, 256, 4) if mode == "per_query" else (256, 2048, 4)
    case = Case(loss, "in_batch" if mode == "random" else mode, n=n, k=400 if mode == "rolled" else k, d=d)
    sample = cases.make(case)
    num, sampling = (20, "random") if mode == "random" else (None, "rolled")
    criterion = cases.criterion(case, num_negatives=num, sampling=sampling)
    query, positive = sample.query.requires_grad_(), sample.positive.requires_grad_()
    negatives = sample.negatives.requires_grad_() if isinstance(sample.negatives, Tensor) else sample.negatives
    criterion(query, positive, negatives)  # whatever is made once is made now
    with knobs.tiles(4096, flash=flash), Memory() as memory:
        torch.autograd.backward(criterion(query, positive, negatives))
        criterion.with_metrics(query.detach(), positive.detach(), negatives)
    matrix = 4 * n * k
    gradients = 3 * 4 * n * k * d if mode == "per_query" else 0  # the keys' own size, which the caller has paid already
    if mode != "per_query":
        assert memory.largest < matrix / 4, f"{memory.largest} bytes at once; N x K is {matrix}"
    assert memory.peak < matrix / 2 + gradients, f"{memory.peak} bytes; N x K is {matrix}"


def test_the_memory_meter_sees_n_by_k() -> None:
    """The test above can fail: plain eager does."""
    q, keys = torch.randn(256, 4, requires_grad=True), torch.randn(2048, 4)
    with Memory() as memory:
        torch.autograd.backward(torch.logsumexp(q @ keys.T, 1).sum())
    assert memory.largest >= 4 * 256 * 2048
    assert memory.peak >= 2 * 4 * 256 * 2048


def test_the_real_size_within_two_megabytes() -> None:
    """MoCo's own size, N = 256, K = 65536, D = 128: temporaries under 2 MB where the matrix is 64 MB."""
    queue = MomentumQueue(65536, 128)
    queue.enqueue(torch.randn(65536, 128))
    query = torch.randn(256, 128, requires_grad=True)
    key = torch.randn(256, 128)
    criterion = EqCoLoss()
    criterion(query, key, queue)
    with Memory() as memory:
        criterion(query, key, queue).backward()
    assert memory.peak <= 2 * 2**20, f"{memory.peak / 2**20:.2f} MB"


@pytest.mark.parametrize("classes", [66, 200, 10**6])
def test_ids_of_the_real_size(classes: int) -> None:
    """However many pairs have equal ids, no list of them comes near N x K."""
    (query, key, keys), generator = (torch.randn(n, 8) for n in (512, 512, 32768)), torch.Generator().manual_seed(0)
    ids, key_ids = (torch.randint(classes, (n,), generator=generator) for n in (512, 32768))
    with Memory() as memory:
        EqCoLoss()(query.requires_grad_(), key, keys, query_ids=ids, negative_ids=key_ids).backward()
    assert memory.peak <= 16 * 2**20, f"{memory.peak / 2**20:.2f} MB; N x K is 64"


def test_fresh_memory_is_nan_here() -> None:
    """What the whole suite rests on: whatever nobody wrote is NaN."""
    assert bool(torch.empty(1000).isnan().all())
    case = Case(mode="queue", seed=1)  # half full
    loss = cases.ours(case, cases.make(case)).loss
    assert bool(loss.isfinite().all())


def test_unfilled_rows_are_never_read() -> None:
    """Not multiplied by zero: not read."""
    for dtype in (torch.float32, torch.bfloat16):
        for ids in ("none", "flat"):
            case = Case(mode="queue", seed=1, dtype=dtype, ids=ids)
            sample = cases.make(case)
            expected = cases.ours(case, sample)
            assert isinstance(sample.negatives, MomentumQueue)
            sample.negatives.contents[len(sample.negatives) :] = math.nan
            found = cases.ours(case, sample)
            assert torch.equal(found.loss, expected.loss)
            assert torch.equal(found.gradients["query"], expected.gradients["query"])


def test_oracle_is_alone() -> None:
    """It shares nothing with what it judges."""
    with open(oracle.__file__) as source:
        text = source.read()
    assert "eqco_loss" not in text
    assert "import tests" not in text
    assert "from tests" not in text
