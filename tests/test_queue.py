"""MomentumQueue is collections.deque(maxlen=size), whatever happens to it."""

import copy
import io
import pickle
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

from eqco_loss import EqCoLoss, MomentumQueue
from tests import cases, oracle
from tests.cases import DTYPES, Case
from tests.strategies import seeds

QUEUE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def rows_for(seed: int, size: int, dim: int) -> Tensor:
    """Rows of very different lengths: the queue makes them unit."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, dim, generator=g) * torch.logspace(-3, 3, max(size, 1))[:size, None]


class QueueMachine(RuleBasedStateMachine):
    """Any order of enqueues (wrapping, larger than the queue), of saving and loading, of copies and of losses."""

    @initialize(
        size=st.integers(1, 9), dim=st.integers(1, 4), store_ids=st.booleans(), dtype=st.sampled_from(QUEUE_DTYPES)
    )
    def start(self, size: int, dim: int, store_ids: bool, dtype: torch.dtype) -> None:
        self.settings = {"size": size, "dim": dim, "store_ids": store_ids, "dtype": dtype}
        self.queue = self.new()
        self.never_saved = self.new()
        self.model: deque[Tensor] = deque(maxlen=size)
        self.model_ids: deque[int] = deque(maxlen=size)
        self.next_id = 0

    def new(self) -> MomentumQueue:
        return MomentumQueue(**self.settings)  # type: ignore[arg-type]

    @rule(size=st.integers(1, 24), seed=seeds)
    def enqueue(self, size: int, seed: int) -> None:
        dim, store_ids, dtype = (self.settings[name] for name in ("dim", "store_ids", "dtype"))
        assert isinstance(dim, int)
        assert isinstance(dtype, torch.dtype)
        keys = rows_for(seed, size, dim)
        ids = torch.arange(self.next_id, self.next_id + size)
        self.next_id += size
        for queue in (self.queue, self.never_saved):
            queue.enqueue(keys, ids if store_ids else None)
        self.model.extend(F.normalize(keys, dim=1).to(dtype))
        self.model_ids.extend(ids.tolist())

    @rule()
    def save_and_resume(self) -> None:
        """Through a file, as a checkpoint goes, into a queue that was never touched."""
        file = io.BytesIO()
        torch.save(self.queue.state_dict(), file)
        file.seek(0)
        self.queue = self.new()
        self.queue.load_state_dict(torch.load(file, weights_only=True))

    @rule()
    def copy(self) -> None:
        self.queue = copy.deepcopy(self.queue)

    @rule()
    def lose(self) -> None:
        """A loss reads the queue and leaves it as it was."""
        if self.model:
            query = torch.randn(2, self.queue.contents.shape[1])
            before = {name: value.clone() for name, value in self.queue.state_dict().items()}
            EqCoLoss()(query, query, self.queue)
            for name, value in self.queue.state_dict().items():
                assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name

    @invariant()
    def is_the_deque(self) -> None:
        if not hasattr(self, "queue"):
            return
        keys, ids = self.queue.keys, self.queue.ids
        assert len(self.queue) == len(keys) == len(self.model)
        assert keys.dtype == self.settings["dtype"]
        assert not keys.requires_grad
        if self.model:
            close = torch.finfo(keys.dtype).eps if keys.dtype.itemsize == 2 else 4 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(keys, torch.stack(list(self.model)), rtol=close, atol=close)
        if self.settings["store_ids"]:
            assert ids is not None
            assert ids.tolist() == list(self.model_ids)
        else:
            assert ids is None

    @invariant()
    def a_resumed_queue_is_bit_identical(self) -> None:
        if not hasattr(self, "queue"):
            return
        resumed, straight = self.queue.state_dict(), self.never_saved.state_dict()
        assert list(resumed) == list(straight)
        for name, value in resumed.items():
            assert torch.equal(value.nan_to_num(7.0), straight[name].nan_to_num(7.0)), name


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15)
TestQueueMachine = QueueMachine.TestCase


def test_state_is_persistent_buffers() -> None:
    assert set(MomentumQueue(4, 2).state_dict()) == {"contents", "cursor", "count", "replaced"}
    with_ids = MomentumQueue(4, 2, store_ids=True)
    assert set(with_ids.state_dict()) == {"contents", "cursor", "count", "replaced", "slot_ids"}
    assert with_ids.contents.shape == (4, 2)
    assert with_ids.slot_ids is not None
    assert with_ids.slot_ids.shape == (4,)
    assert with_ids.cursor.shape == with_ids.count.shape == ()
    assert not list(with_ids.parameters())


def test_fresh_queues_are_bit_identical() -> None:
    """Nothing of fresh memory, nothing random: what is saved is a function of what was enqueued."""
    a, b = MomentumQueue(5, 3, store_ids=True).state_dict(), MomentumQueue(5, 3, store_ids=True).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a), "and none of it is NaN"


def test_starts_empty() -> None:
    queue = MomentumQueue(4, 2)
    assert len(queue) == 0
    assert queue.keys.shape == (0, 2)
    assert queue.ids is None
    ids = MomentumQueue(4, 2, store_ids=True).ids
    assert ids is not None
    assert ids.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_default(dtype: torch.dtype) -> None:
    assert MomentumQueue(4, 2).keys.dtype == torch.float32
    queue = MomentumQueue(4, 2, dtype=dtype, device="cpu")
    queue.enqueue(torch.tensor([[3.0, 4.0]], dtype=dtype))
    torch.testing.assert_close(queue.keys, torch.tensor([[0.6, 0.8]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_keys_are_normalised_in_float32(dtype: torch.dtype) -> None:
    """Rows so small or so large that their squares leave the half range are unit all the same."""
    queue = MomentumQueue(3, 64)
    keys = torch.randn(3, 64).to(dtype) * torch.tensor([[1e-4], [1.0], [1e3]], dtype=dtype)
    queue.enqueue(keys)
    torch.testing.assert_close(queue.keys, F.normalize(keys.float(), dim=1))


def test_enqueue_detaches_and_copies() -> None:
    queue = MomentumQueue(4, 3)
    keys = torch.randn(2, 3, requires_grad=True)
    queue.enqueue(keys)
    assert not queue.keys.requires_grad
    assert not queue.contents.requires_grad
    before = queue.keys.clone()
    with torch.no_grad():
        keys.zero_()
    assert torch.equal(queue.keys, before)


def test_keys_are_the_owners_copy() -> None:
    """What a person does to .keys does not reach the queue's rows of the past."""
    queue = MomentumQueue(4, 3, store_ids=True)
    queue.enqueue(torch.randn(3, 3), torch.arange(3))
    held, held_ids = queue.keys.clone(), queue.ids
    seen = queue.keys
    queue.enqueue(torch.randn(3, 3), torch.arange(3, 6))
    assert held_ids is not None
    assert held_ids.tolist() == [0, 1, 2]
    assert torch.equal(seen, held)


@given(st.integers(2, 9), st.integers(1, 20), seeds)
@settings(max_examples=40)
def test_unfilled_slots_are_never_negatives(size: int, enqueued: int, seed: int) -> None:
    """A queue's loss is that of its valid keys as a tensor, while it fills and after it wraps."""
    queue = MomentumQueue(size, 4, dtype=torch.float64)
    queue.enqueue(rows_for(seed, enqueued, 4).double())
    g = torch.Generator().manual_seed(seed)
    query, positive = torch.randn(3, 4, generator=g).double(), torch.randn(3, 4, generator=g).double()
    case = Case(mode="queue", n=3, d=4, dtype=torch.float64)
    cases.assert_right(case, cases.Sample(query, positive, queue))
    metrics = EqCoLoss().with_metrics(query, positive, queue)
    assert metrics.effective_k.item() == min(size, enqueued)


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_stale_copies_of_an_image_are_not_negatives(loss: str) -> None:
    """A queue larger than the data set holds old keys of the query's own image (MoCo issue 24)."""
    queue = MomentumQueue(12, 4, store_ids=True)
    queue.enqueue(torch.randn(12, 4), torch.arange(12) % 4)
    sample = cases.Sample(torch.randn(3, 4), torch.randn(3, 4), queue, query_ids=torch.tensor([0, 3, 99]))
    case = Case(loss, "queue", n=3, d=4, ids="flat")
    cases.assert_right(case, sample)
    metrics = cases.criterion(case).with_metrics(sample.query, sample.positive, queue, query_ids=sample.query_ids)
    assert metrics.effective_k.item() == pytest.approx((9 + 9 + 12) / 3)


def test_stored_ids_without_query_ids_are_an_error() -> None:
    queue = MomentumQueue(6, 4, store_ids=True)
    queue.enqueue(torch.randn(6, 4), torch.zeros(6, dtype=torch.long))
    query = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"query_ids: expected integers of shape .* that stores ids, got None"):
        EqCoLoss()(query, query, queue)
    assert EqCoLoss().with_metrics(query, query, queue, query_ids=torch.tensor([1, 2])).effective_k.item() == 6


@pytest.mark.parametrize("metrics", [False, True])
def test_a_queue_that_was_emptied_behind_its_back_is_an_error(metrics: bool) -> None:
    """By a broadcast of buffers, say."""
    queue = MomentumQueue(4, 3)
    queue.enqueue(torch.randn(2, 3))
    queue.count.zero_()
    criterion = EqCoLoss()
    with pytest.raises(ValueError, match="expected a MomentumQueue that holds keys, got an empty one"):
        (criterion.with_metrics if metrics else criterion)(torch.randn(2, 3), torch.randn(2, 3), queue)


def test_a_resumed_run_is_bit_identical() -> None:
    """Twenty steps straight, against ten, a checkpoint, and ten more: the same losses to the last bit."""

    def run(queue: MomentumQueue, steps: range) -> list[Tensor]:
        losses = []
        for step in steps:
            g = torch.Generator().manual_seed(step)
            q, k = torch.randn(5, 8, generator=g), torch.randn(5, 8, generator=g)
            if len(queue):
                losses.append(EqCoLoss()(q, k, queue))
            queue.enqueue(k)
        return losses

    straight = MomentumQueue(37, 8)
    expected = run(straight, range(20))
    first = MomentumQueue(37, 8)
    found = run(first, range(10))
    second = MomentumQueue(37, 8)
    second.load_state_dict(first.state_dict())
    found += run(second, range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(second.keys, straight.keys)


def test_moves_and_casts_with_its_module() -> None:
    """A queue is a module: .to() of the model that holds it moves its rows and leaves the bookkeeping in integers."""
    model = torch.nn.ModuleDict({"queue": MomentumQueue(4, 3, store_ids=True)})
    queue = model["queue"]
    assert isinstance(queue, MomentumQueue)
    queue.enqueue(torch.randn(3, 3), torch.tensor([2**40, 5, -1]))
    model.to(torch.float16)
    assert queue.contents.dtype == torch.float16
    assert not queue.cursor.is_floating_point()
    assert not queue.count.is_floating_point()
    assert queue.ids is not None
    assert queue.ids.tolist() == [2**40, 5, -1]
    queue.enqueue(torch.randn(3, 3), torch.arange(3))
    assert queue.keys.dtype == torch.float16
    assert len(queue) == 4
    assert MomentumQueue(4, 3).to("meta").contents.device.type == "meta"


def test_enqueue_under_inference_mode_of_the_key_encoder() -> None:
    """Keys made under torch.no_grad() or inference_mode() go in like any other."""
    queue = MomentumQueue(4, 3)
    with torch.inference_mode():
        keys = torch.randn(2, 3)
    queue.enqueue(keys)
    query = torch.randn(2, 3, requires_grad=True)
    EqCoLoss()(query, keys.clone(), queue).backward()
    assert query.grad is not None
    assert len(queue) == 2


def test_oracle_agrees_with_the_deque() -> None:
    """The oracle's own reading of a queue, once by hand: size 3, five keys, the newest three."""
    queue = MomentumQueue(3, 2, dtype=torch.float64)
    angles = torch.arange(5, dtype=torch.float64)
    keys = torch.stack([angles.cos(), angles.sin()], 1)
    queue.enqueue(keys[:2])
    queue.enqueue(keys[2:])
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    expected = oracle.negatives_logsumexp(query, keys[2:], [[0, 1, 2]], 0.5)
    by_hand = torch.log((angles[2:].cos() / 0.5).exp().sum())
    torch.testing.assert_close(expected[0], by_hand)
    loss = EqCoLoss(0.5, alpha=None)(query, query, queue)
    torch.testing.assert_close(loss, torch.log1p((by_hand - 2.0).exp()), rtol=1e-6, atol=1e-6)


def test_copied_buffers_make_a_queue_that_holds_keys() -> None:
    """As DDP's broadcast, dist.broadcast and an in-place load of a checkpoint do; it was said to be empty."""
    filled, fresh = MomentumQueue(8, 3), MomentumQueue(8, 3)
    filled.enqueue(torch.randn(4, 3))
    for theirs, mine in zip(filled.buffers(), fresh.buffers(), strict=True):
        mine.copy_(theirs)
    query = torch.randn(2, 3)
    assert len(fresh) == 4
    torch.testing.assert_close(EqCoLoss()(query, query, fresh), EqCoLoss()(query, query, filled))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_key_that_is_not_finite_is_a_neutral_negative(value: float, dtype: torch.dtype) -> None:
    """One such row made every loss NaN until it was overwritten."""
    keys = torch.randn(5, 4).to(dtype)
    keys[2, 1] = value
    queue = MomentumQueue(8, 4, dtype=dtype)
    queue.enqueue(keys)
    assert int(queue.replaced) == 1
    assert len(queue) == 5
    assert torch.equal(queue.keys[2], torch.zeros(4, dtype=dtype))
    clean = MomentumQueue(8, 4, dtype=dtype)
    clean.enqueue(torch.where(keys.isfinite().all(1, keepdim=True), keys, 0.0))
    query = torch.randn(2, 4, requires_grad=True)
    loss = EqCoLoss()(query, query.detach(), queue)
    torch.testing.assert_close(loss, EqCoLoss()(query, query.detach(), clean), rtol=0, atol=0)
    assert torch.autograd.grad(loss, query)[0].isfinite().all()


@pytest.mark.parametrize(
    ("value", "given", "stored"),
    [
        (1e300, torch.float64, torch.float32),  # no float32
        (1e30, torch.float32, torch.float32),  # its square is none
        (1e30, torch.bfloat16, torch.float16),
        (1e300, torch.float64, torch.float64),
    ],
)
def test_a_row_too_long_to_have_a_direction_is_one_too(value: float, given: torch.dtype, stored: torch.dtype) -> None:
    """Its length overflows: it became zeros that nobody had counted."""
    queue = MomentumQueue(4, 2, dtype=stored)
    queue.enqueue(torch.tensor([[value, value], [0.0, 2.0]], dtype=given))
    assert queue.keys.tolist() == [[0, 0], [0, 1]]
    assert int(queue.replaced) == 1
    queue.load_moco(torch.tensor([[value, 0.0, 1.0, 1.0], [value, 2.0, 0.0, 0.0]], dtype=given))
    assert queue.keys.tolist() == [[0, 0], [0, 1], [1, 0], [1, 0]]
    assert int(queue.replaced) == 2


def test_a_key_of_zeros_stays_one_and_is_not_counted() -> None:
    queue = MomentumQueue(4, 2)
    queue.enqueue(torch.zeros(1, 2))
    assert queue.keys.tolist() == [[0, 0]]
    assert int(queue.replaced) == 0


@pytest.mark.parametrize("store_ids", [False, True])
def test_a_compiled_enqueue_replaces_them_too(store_ids: bool, fresh_compiler: None) -> None:
    queue, eager = (MomentumQueue(8, 3, store_ids=store_ids) for _ in range(2))
    ids = torch.arange(5) if store_ids else None
    compiled = torch.compile(queue.enqueue, fullgraph=True, backend="aot_eager")
    for step in range(3):
        keys = torch.randn(5, 3)
        keys[step] = torch.nan
        compiled(keys, ids)
        eager.enqueue(keys, ids)
    for name, value in eager.state_dict().items():
        assert torch.equal(queue.state_dict()[name], value), name
    assert int(queue.replaced) == 3
    assert queue.primed


def test_keys_without_ids_are_not_loaded_where_ids_are_stored() -> None:
    """Not even with strict=False, which would give all of them the id 0."""
    queue, other = MomentumQueue(4, 2), nn.ModuleDict({"queue": MomentumQueue(4, 2, store_ids=True), "head": nn.ReLU()})
    queue.enqueue(torch.randn(3, 2))
    state = {f"queue.{name}": value for name, value in queue.state_dict().items()}
    for strict in (False, True):
        with pytest.raises(RuntimeError, match=r"queue\.slot_ids: expected the ids of a MomentumQueue with store_ids"):
            other.load_state_dict(state, strict=strict)
    other.load_state_dict({}, strict=False)  # of a model without a queue


@pytest.mark.parametrize("store_ids", [False, True])
def test_reset_is_as_constructed(store_ids: bool) -> None:
    queue = MomentumQueue(4, 2, store_ids=store_ids)
    new = {name: value.clone() for name, value in queue.state_dict().items()}
    queue.enqueue(torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]), torch.tensor([5, 6]) if store_ids else None)
    assert int(queue.replaced) == 1
    queue.reset()
    assert not queue.primed
    assert all(torch.equal(value, new[name]) for name, value in queue.state_dict().items())
    with torch.device("meta"):
        made = MomentumQueue(4, 2, store_ids=store_ids)
    made.to_empty(device="cpu").reset_parameters()
    assert all(torch.equal(value, new[name]) for name, value in made.state_dict().items())


def test_a_state_of_before_replaced_keys_were_counted_loads() -> None:
    queue = MomentumQueue(4, 2)
    queue.enqueue(torch.randn(3, 2))
    state = queue.state_dict()
    del state["replaced"]
    fresh = nn.ModuleDict({"queue": MomentumQueue(4, 2)})
    fresh.load_state_dict({f"queue.{name}": value for name, value in state.items()})
    torch.testing.assert_close(fresh["queue"].keys, queue.keys)
    with torch.device("meta"):
        assigned = MomentumQueue(4, 2)
    assigned.load_state_dict(state, assign=True)
    assigned.enqueue(torch.full((1, 2), torch.nan))
    assert int(assigned.replaced) == 1
    assert len(assigned) == 4


def test_the_device_is_asked_once_whether_it_holds_keys() -> None:
    """Not at all after an enqueue; once after a copy, a load, or to_empty, which change the buffers only."""
    asked: list[int] = []

    class Count(Tensor):
        is_cpu = False

        def __int__(self) -> int:
            asked.append(1)
            return int(self.as_subclass(Tensor))

    def elsewhere(queue: MomentumQueue) -> MomentumQueue:
        queue.count = queue.count.as_subclass(Count)
        return queue

    filled = elsewhere(MomentumQueue(4, 2))
    assert not filled.primed
    assert len(asked) == 1
    filled.enqueue(torch.randn(3, 2))
    assert filled.primed
    assert len(asked) == 1
    changes: dict[str, Any] = {
        "copied": lambda queue: [a.copy_(b) for a, b in zip(queue.buffers(), filled.buffers(), strict=True)],
        "loaded": lambda queue: queue.load_state_dict(filled.state_dict()),
        "assigned": lambda queue: queue.load_state_dict(filled.state_dict(), assign=True),
    }
    for name, change in changes.items():
        queue, before = elsewhere(MomentumQueue(4, 2)), len(asked)
        change(queue)
        elsewhere(queue)
        assert [queue.primed, queue.primed] == [True, True], name
        assert len(asked) == before + 1, name
    emptied = elsewhere(filled.to_empty(device="cpu"))
    emptied.count.zero_()
    assert not emptied.primed


def test_sizes_may_be_numpys() -> None:
    sizes: Any = np.int64(4), np.int32(2)
    assert MomentumQueue(*sizes).contents.shape == (4, 2)


def test_copies_and_pickles_hold_the_keys() -> None:
    queue = MomentumQueue(4, 2, store_ids=True)
    queue.enqueue(torch.randn(3, 2), torch.arange(3))
    for other in (copy.deepcopy(queue), copy.copy(queue), pickle.loads(pickle.dumps(queue))):
        torch.testing.assert_close(other.keys, queue.keys)
        assert len(other) == 3


def test_a_process_group_is_shared_by_copies_and_left_behind_by_pickles() -> None:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        group: Any = dist.new_group([0])
        for module in (MomentumQueue(4, 2, gather=group), EqCoLoss(gather=group)):
            assert copy.deepcopy(module).gather is group
            assert copy.copy(module).gather is group
            loaded = pickle.loads(pickle.dumps(module))
            with pytest.raises(TypeError, match=r"gather: expected.*Set it after loading"):
                loaded.enqueue(torch.randn(2, 2)) if isinstance(module, MomentumQueue) else loaded(
                    torch.randn(3, 2), torch.randn(3, 2)
                )
            loaded.gather = True
    finally:
        dist.destroy_process_group()
