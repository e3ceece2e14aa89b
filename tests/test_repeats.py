"""A call like one before takes the short way, and gives what the long way gives, bit by bit."""

import gc
import numbers
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, repeats
from eqco_loss import _validate as check
from eqco_loss.functional import eqco_loss
from eqco_loss.ops.calls import MOST_KEPT, once_a_kind
from tests.cases import DEVICE

N, K, D = 12, 9, 6
LOSSES: dict[str, Callable[..., Any]] = {
    "eqco": lambda **settings: EqCoLoss(alpha=256, **settings),
    "dual": lambda **settings: DualTempInfoNCE(**settings),
}
Call = tuple[list[Any], dict[str, Any]]  # positional arguments, keywords


def rows(*shape: int, seed: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, dtype).requires_grad_(grad)


def ids(*shape: int, seed: int) -> Tensor:
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def queue(seed: int, store_ids: bool = False) -> MomentumQueue:
    stored = MomentumQueue(2 * K, D, store_ids=store_ids, device=DEVICE)
    stored.enqueue(rows(K + seed, D, seed=seed), ids(K + seed, seed=seed) if store_ids else None)
    return stored


def views(seed: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    return [rows(N, D, seed=3 * seed, dtype=dtype), rows(N, D, seed=3 * seed + 1, dtype=dtype)]


# What a call is made of (settings; arguments by seed), and whether all its tensors are the caller's
CASES: dict[str, tuple[dict[str, Any], Callable[[int], Call], bool]] = {
    "batch": ({}, lambda seed: (views(seed), {}), True),
    "bfloat16": ({}, lambda seed: (views(seed, torch.bfloat16), {}), True),
    "float64": ({}, lambda seed: (views(seed, torch.float64), {}), True),
    "sum": ({"reduction": "sum"}, lambda seed: (views(seed), {}), True),
    "none": ({"reduction": "none"}, lambda seed: (views(seed), {}), True),
    "raw": ({"normalize": False}, lambda seed: (views(seed), {}), True),
    "rolled": ({"num_negatives": 4}, lambda seed: (views(seed), {}), True),
    "random": ({"num_negatives": 4, "sampling": "random"}, lambda seed: (views(seed), {}), False),
    "views": ({"in_batch": "views"}, lambda seed: (views(seed), {}), False),
    "symmetric": ({"symmetric": True}, lambda seed: (views(seed), {}), True),
    "symmetric views": ({"symmetric": True, "in_batch": "views"}, lambda seed: (views(seed), {}), True),
    "symmetric rolled": ({"symmetric": True, "num_negatives": 4}, lambda seed: (views(seed), {}), True),
    "symmetric, two dtypes": (
        {"symmetric": True},
        lambda seed: ([rows(N, D, seed=seed), rows(N, D, seed=9 + seed, dtype=torch.bfloat16)], {}),
        False,
    ),
    "ids": ({}, lambda seed: (views(seed), {"query_ids": ids(N, seed=seed)}), True),
    "given": ({}, lambda seed: ([*views(seed), rows(K, D, seed=3 * seed + 2)], {}), True),
    "given, detached": ({}, lambda seed: ([*views(seed), rows(K, D, seed=3 * seed + 2, grad=False)], {}), True),
    "own": ({}, lambda seed: ([*views(seed), rows(N, K, D, seed=3 * seed + 2)], {}), True),
    "given and batch": ({"in_batch": "keys"}, lambda seed: ([*views(seed), rows(K, D, seed=3 * seed + 2)], {}), True),
    "given with ids": (
        {},
        lambda seed: (
            [*views(seed), rows(K, D, seed=3 * seed + 2)],
            {"query_ids": ids(N, seed=seed), "negative_ids": ids(N, K, seed=seed + 1)},
        ),
        True,
    ),
    "mask": (
        {},
        lambda seed: ([*views(seed), rows(K, D, seed=3 * seed + 2)], {"negative_mask": ids(N, K, seed=seed) > 0}),
        True,
    ),
    "queue": ({}, lambda seed: ([*views(seed), queue(seed)], {}), True),
    "queue and batch": ({"in_batch": "keys"}, lambda seed: ([*views(seed), queue(seed)], {}), True),
    "queue with ids": ({}, lambda seed: ([*views(seed), queue(seed, True)], {"query_ids": ids(N, seed=seed)}), True),
}


def answers(criterion: Any, call: Call, learned: Tensor | None = None) -> list[Tensor]:
    """The loss and every gradient."""
    positional, keywords = call
    torch.manual_seed(0)
    loss = criterion(*positional, **keywords)
    leaves = [x for x in [*positional, learned] if isinstance(x, Tensor) and x.requires_grad]
    weights = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=DEVICE).view(loss.shape)
    return [loss, *torch.autograd.grad(loss, leaves, weights)]


def assert_alike(
    criterion: Any, arguments: Callable[[int], Call], kept: bool, learned: Tensor | None = None, calls: int = 5
) -> None:
    """From the third on calls by the short way, if they may take it, beside the same by the long one."""
    short = []
    for seed in range(calls):  # the second call of a kind is kept
        with mock.patch.object(check, "call", side_effect=AssertionError("checked again")) as checked:
            checked.side_effect = None if seed < 2 or not kept else checked.side_effect
            short.append(answers(criterion, arguments(seed), learned))
    for seed, got in enumerate(short):
        repeats.forget()
        expected = answers(criterion, arguments(seed), learned)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)
    distinct = {float(got[0].detach().sum()) for got in short}
    assert len(distinct) == len(short), "the calls differ, and so must their losses"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_the_short_way_is_the_long_one(name: str, loss: str) -> None:
    settings, arguments, kept = CASES[name]
    assert_alike(LOSSES[loss](**settings), arguments, kept)


@pytest.mark.parametrize("backend", ["triton", "wide"])
@pytest.mark.parametrize("name", ["batch", "bfloat16", "none", "symmetric", "symmetric views", "given", "queue", "own"])
def test_engines(name: str, backend: Any) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    settings, arguments, kept = CASES[name]
    calls = 3 if DEVICE.type == "cpu" else 5  # a GPU's launcher keeps launches of the third
    assert_alike(EqCoLoss(**settings, backend=backend), arguments, kept, calls=calls)


@pytest.mark.parametrize("name", ["batch", "symmetric", "queue", "given"])
def test_a_learned_temperature(name: str) -> None:
    settings, arguments, kept = CASES[name]
    t = nn.Parameter(torch.tensor(0.2, device=DEVICE))
    assert_alike(EqCoLoss(t, **settings), arguments, kept, t)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's value is not read")
def test_the_value_of_a_learned_temperature_counts() -> None:
    t = nn.Parameter(torch.tensor(0.2, device=DEVICE))
    criterion, (positional, _) = EqCoLoss(t), CASES["batch"][1](0)
    before = criterion(*positional).detach()
    with torch.no_grad():
        t.fill_(0.5)
    assert criterion(*positional).detach() != before
    with torch.no_grad():
        t.fill_(-0.5)
    with pytest.raises(ValueError, match="temperature: expected a finite value > 0"):
        criterion(*positional)


CHANGES: dict[str, Callable[[EqCoLoss], None]] = {
    "temperature": lambda criterion: setattr(criterion, "temperature", 0.5),
    "alpha": lambda criterion: setattr(criterion, "alpha", 16.0),
    "num_negatives": lambda criterion: setattr(criterion, "num_negatives", 3),
    "symmetric": lambda criterion: setattr(criterion, "symmetric", True),
    "normalize": lambda criterion: setattr(criterion, "normalize", False),
    "reduction": lambda criterion: setattr(criterion, "reduction", "sum"),
    "in_batch": lambda criterion: setattr(criterion, "in_batch", "views"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_setting_is_seen(change: Callable[[EqCoLoss], None]) -> None:
    criterion, call = EqCoLoss(alpha=256), CASES["batch"][1](0)
    before = [answers(criterion, call) for _ in range(3)][-1][0]
    change(criterion)
    after = [answers(criterion, call) for _ in range(3)][-1]
    repeats.forget()
    assert not torch.equal(after[0], before)
    for one, other in zip(after, answers(criterion, call), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha", True, "alpha: expected a positive number, got bool"),
        ("alpha", -1.0, "alpha: expected a finite number"),
        ("symmetric", 1, "symmetric: expected True or False"),
        ("num_negatives", 0, "num_negatives: expected an integer"),
        ("reduction", "avg", "reduction: expected one of"),
        ("temperature", 0.0, "temperature: expected a finite number"),
        ("temperature", True, "temperature: expected a positive number, got bool"),
    ],
)
def test_a_setting_that_became_wrong_is_an_error(name: str, value: Any, message: str) -> None:
    criterion, (positional, _) = EqCoLoss(1.0, alpha=1.0), CASES["batch"][1](0)
    for _ in range(3):
        criterion(*positional)
    setattr(criterion, name, value)
    with pytest.raises((ValueError, TypeError), match=message):
        criterion(*positional)


WRONG: dict[str, tuple[Call, str]] = {
    "width": (([rows(N, D, seed=0), rows(N, D + 1, seed=1)], {}), "positive_key: expected the shape of query"),
    "one row": (([rows(1, D, seed=0), rows(1, D, seed=1)], {}), "at least 2 rows"),
    "integers": (([ids(N, D, seed=0), rows(N, D, seed=1)], {}), "query: expected float16"),
    "ids": (([*views(0)], {"query_ids": ids(N, seed=0).float()}), "query_ids: expected integers"),
    "an empty queue": (([*views(0), MomentumQueue(2 * K, D, device=DEVICE)], {}), "got an empty one"),
    "no tensor": (([None, rows(N, D, seed=1)], {}), "query: expected a torch.Tensor, got NoneType"),
    "two float types": (
        ([rows(N, D, seed=0, dtype=torch.float64), rows(N, D, seed=1)], {}),
        "positive_key: expected the dtype of query",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_an_argument_that_became_wrong_is_an_error(call: Call, message: str) -> None:
    criterion = EqCoLoss()
    for arguments in (CASES["batch"], CASES["queue"], CASES["ids"]):
        for seed in range(3):
            answers(criterion, arguments[1](seed))
    positional, keywords = call
    with pytest.raises((ValueError, TypeError), match=message):
        criterion(*positional, **keywords)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU is not asked once the host knows")
def test_a_queue_that_was_emptied_is_an_error() -> None:
    criterion, stored, (query, key) = EqCoLoss(), queue(0), views(0)
    for _ in range(3):
        criterion(query, key, stored)
    stored.count.zero_()
    with pytest.raises(ValueError, match="got an empty one"):
        criterion(query, key, stored)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU cannot raise")
def test_a_row_that_ids_leave_nothing_is_an_error() -> None:
    criterion, (query, key) = EqCoLoss(), views(0)
    for seed in range(3):
        criterion(query, key, query_ids=ids(N, seed=seed))
    with pytest.raises(ValueError, match="query 0 has no negatives left"):
        criterion(query, key, query_ids=torch.zeros(N, dtype=torch.int64, device=DEVICE))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_modes_of_torch_are_seen() -> None:
    criterion, call = EqCoLoss(), CASES["batch"][1](0)
    expected = [answers(criterion, call) for _ in range(3)][-1]
    query, key = call[0]
    with torch.no_grad():
        assert not criterion(query, key).requires_grad
    with torch.inference_mode():
        assert criterion(query, key).is_inference()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        coarse = criterion(query, key)
        assert coarse == criterion(query, key)
    assert criterion(query.detach(), key.detach()).grad_fn is None
    again = answers(criterion, call)
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)
    with pytest.raises(NotImplementedError, match="got forward mode"), torch.autograd.forward_ad.dual_level():
        criterion(query, key)
    with pytest.raises(NotImplementedError, match=r"outside torch\.func\.grad"):
        torch.func.grad(lambda x: criterion(x, key))(query)
    with pytest.raises(NotImplementedError, match=r"outside torch\.jit\.trace"):
        torch.jit.trace(criterion, (query, key))


def test_compiled_after_eager_calls(fresh_compiler: None) -> None:
    criterion, call = EqCoLoss(), CASES["batch"][1](0)
    expected = [answers(criterion, call) for _ in range(3)][-1]
    compiled = answers(torch.compile(criterion, backend="aot_eager", fullgraph=True), call)
    for one, other in zip(compiled, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_views_that_are_one_tensor() -> None:
    """Which of two roles a tensor has in a record cannot be told by its identity."""
    criterion, (query, key) = EqCoLoss(), views(0)
    for _ in range(3):
        same = answers(criterion, ([query, query], {}))[0]
    for _ in range(3):
        different = answers(criterion, ([query, key], {}))[0]
    repeats.forget()
    assert torch.equal(different, answers(criterion, ([query, key], {}))[0])
    assert torch.equal(same, answers(criterion, ([query, query], {}))[0])


def test_a_second_derivative_after_the_short_way() -> None:
    criterion, (query, key) = EqCoLoss(), views(0, torch.float64)
    seconds = []
    for _ in range(3):
        loss = criterion(query, key)
        (first,) = torch.autograd.grad(loss, query, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), key)[0])
    for one in seconds[1:]:
        torch.testing.assert_close(one, seconds[0], rtol=1e-12, atol=0.0)


class Number(numbers.Real):
    """One whose value can be changed."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value

    def __lt__(self, other: Any) -> bool:
        return bool(self.value < other)

    def __gt__(self, other: Any) -> bool:
        return bool(self.value > other)


Number.__abstractmethods__ = frozenset()  # of a number's methods these are those that are needed


@pytest.mark.parametrize("name", ["alpha", "inter_temperature", "temperature"])
def test_a_setting_whose_value_changes_within(name: str) -> None:
    number, call = Number(1.5), CASES["batch"][1](0)  # type: ignore[abstract]
    settings: dict[str, Any] = {name: number}
    criterion = DualTempInfoNCE(**settings)
    before = [answers(criterion, call) for _ in range(3)][-1][0]
    number.value = 2.5
    assert not torch.equal(answers(criterion, call)[0], before)
    number.value = -1.0
    with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
        answers(criterion, call)


@pytest.mark.parametrize("wrong", [torch.tensor([0.1, 0.2]), torch.tensor([]), torch.tensor(0.1 + 1j)], ids=str)
def test_a_temperature_that_is_no_number_is_explained(wrong: Tensor) -> None:
    query, key = views(0)
    with pytest.raises(ValueError, match="temperature: expected a number or a 0-dim floating-point tensor"):
        eqco_loss(query, key, temperature=wrong.to(DEVICE))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_rows_without_strides_are_explained() -> None:
    query, key = views(0)
    for x in (ids(N, D, seed=0), query.detach()):
        with pytest.raises(TypeError, match=r"query: expected a dense tensor, got torch\.sparse_csr"):
            eqco_loss(x.to_sparse_csr(), key)


@pytest.mark.parametrize("backend", ["triton", "wide"])
@pytest.mark.parametrize("turned", [0, 1])
def test_views_that_lie_differently(turned: int, backend: Any) -> None:
    """Each direction of both has keys of its own, and a plan by how they lie."""
    if backend == "triton":
        pytest.importorskip("triton")

    def arguments(seed: int) -> Call:
        given = views(seed)
        given[turned] = given[turned].detach().T.contiguous().T.requires_grad_()
        return given, {}

    if backend == "triton":
        from eqco_loss.ops.triton import launch

        with mock.patch.object(launch, "_plan", wraps=launch._plan) as planned:
            for seed in range(4):
                answers(EqCoLoss(symmetric=True, backend=backend), arguments(seed))
        strides = [call.args[5][0].strides for call in planned.call_args_list]
        assert len(set(strides)) == 2
        assert len(strides) == 2 + 2 + 2, "two directions of the first two calls, and two once for their kind"
    assert_alike(EqCoLoss(symmetric=True, backend=backend), arguments, True)


def test_no_tensor_is_kept() -> None:
    """A table of kinds that held a batch would hold its memory, and the graph behind it."""
    seen = []
    for name in ("batch", "symmetric", "queue", "given with ids"):
        criterion = EqCoLoss(nn.Parameter(torch.tensor(0.2, device=DEVICE)), **CASES[name][0])
        for seed in range(3):
            positional, keywords = CASES[name][1](seed)
            criterion(*positional, **keywords)
            seen += [weakref.ref(x) for x in (*positional, *keywords.values(), criterion.temperature)]
    del positional, keywords, criterion
    gc.collect()
    assert not [x() for x in seen if x() is not None]


def test_settings_that_change_at_every_step_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MOST_KEPT", 5)
    query, key = views(0)
    for step in range(40):
        eqco_loss(query, key, temperature=0.1 + step / 100, alpha=float(100 + step))
        assert len(repeats._seen) <= 5
    assert not repeats._records, "none of them came twice"
    for step in range(40):
        for _ in range(2):
            eqco_loss(query, key, alpha=float(100 + step))
        assert 0 < len(repeats._records) <= 5
    looked = []

    @once_a_kind
    def kind(call: Any) -> int:
        looked.append(call.kind)
        return int(call.kind)

    for number in (1, 1, 0, 0, *range(1, MOST_KEPT + 3), 1):
        assert kind(mock.Mock(kind=number)) == number
    assert looked.count(0) == 2
    assert looked.count(2) == 1
    assert looked.count(1) == 2, "1 was let go of, and asked again"


def test_negatives_that_are_the_positives_are_another_call() -> None:
    """Their one gradient is the sum of two, which kernels of tensors apart would not add."""
    criterion, (query, key), other = EqCoLoss(), views(1), rows(N, D, seed=8)

    def gradients(negatives: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(criterion(query, key, negatives), [query, key])

    expected = gradients(key)
    for _ in range(4):
        gradients(other)
    with mock.patch.object(check, "call", wraps=check.call) as checked:
        got = gradients(key)
    assert checked.called
    for one, more in zip(got, expected, strict=True):
        assert torch.equal(one, more)


def test_hooks_of_saved_tensors_are_seen() -> None:
    """What they give back may be another dtype or lie otherwise, which a plan for the kind knows nothing of."""
    criterion, (query, key) = EqCoLoss(), views(1)
    for _ in range(4):
        criterion(query, key).backward()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: x.double(), lambda x: x.float()),
        mock.patch.object(check, "call", wraps=check.call) as checked,
    ):
        criterion(query, key).backward()
    assert checked.called


def test_a_queue_that_counts_in_another_dtype_is_another_kind() -> None:
    """As a state_dict that is assigned may do."""
    stored, (query, key), criterion = queue(2), views(1), EqCoLoss()
    expected = [criterion(query, key, stored) for _ in range(4)][-1]
    stored.load_state_dict({**stored.state_dict(), "count": stored.count.int()}, assign=True)
    with mock.patch.object(check, "call", wraps=check.call) as checked:
        got = criterion(query, key, stored)
    assert checked.called
    assert torch.equal(got, expected)
