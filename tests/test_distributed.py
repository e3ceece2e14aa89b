"""gather: several ranks give what one process gives, for every kind of negatives, or the same error on all of them."""

import copy
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, functional, momentum_update
from tests.ranks import gathered, run_ranks

SIZES = [(5, 3), (4, 1, 7), (3, 3, 3, 3)]
D = 5


def options(*reductions: str) -> list[dict[str, Any]]:
    """Constructor arguments, and which tensors the call gets."""
    found = []
    for in_batch, symmetric, given, ids, num_negatives, reduction in itertools.product(
        (None, "keys", "views"), (False, True), (None, "tensor", "queue"), (False, True), (None, 4), reductions
    ):
        if given is not None and (symmetric or num_negatives is not None):
            continue  # errors, tested elsewhere
        settings = {"in_batch": in_batch, "symmetric": symmetric, "reduction": reduction}
        found.append({"given": given, "ids": ids, "settings": {**settings, "num_negatives": num_negatives}})
    return found


class World:
    """All the data, and the part of it that rows ``part`` have."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        n = sum(sizes)
        self.query, self.key = (torch.randn(n, D, generator=generator, dtype=torch.float64) for _ in range(2))
        self.head = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.given = torch.randn(13, D, generator=generator, dtype=torch.float64)
        self.ids, self.given_ids = torch.arange(n) % (n - 2), torch.arange(13) % 5

    def loss(
        self,
        cls: Any,
        option: dict[str, Any],
        part: slice,
        gather: bool,
        metrics: bool = False,
        temperature: float | Tensor = 0.3,
    ) -> tuple[Any, Tensor]:
        """The loss of these rows and its gradient for a head that both sides share."""
        head = self.head.clone().requires_grad_()
        criterion = cls(temperature, gather=gather, **option["settings"])
        call = criterion.with_metrics if metrics else criterion
        negatives: Any = None
        extra: dict[str, Any] = {"query_ids": self.ids[part] if option["ids"] else None}
        if option["given"] == "tensor":
            negatives = self.given
            extra["negative_ids"] = self.given_ids if option["ids"] else None
        elif option["given"] == "queue":
            negatives = MomentumQueue(20, D, dtype=torch.float64, store_ids=option["ids"])
            negatives.enqueue(self.given, self.given_ids if option["ids"] else None)
        value = call(self.query[part] @ head, self.key[part] @ head, negatives, **extra)
        (gradient,) = torch.autograd.grad(value.loss if metrics else value, head, retain_graph=True)
        return value, gradient


def compare(rank: int, world: int, sizes: tuple[int, ...]) -> float:
    """Largest difference between the ranks' mean and one process, relative to the values' size."""
    data, start = World(sizes), sum(sizes[:rank])
    mine, everything = slice(start, start + sizes[rank]), slice(None)
    worst = 0.0
    for cls in (EqCoLoss, DualTempInfoNCE):
        for option in options("mean", "sum") if world == 2 else options("mean"):
            loss, gradient = data.loss(cls, option, mine, gather=True)
            got = torch.cat([loss.detach()[None], gradient.flatten()])
            dist.all_reduce(got)
            if rank > 0:
                continue
            expected, expected_gradient = data.loss(cls, option, everything, gather=False)
            truth = torch.cat([expected.detach()[None], expected_gradient.flatten()])
            difference = float((got / world - truth).abs().max() / truth.abs().max())
            assert difference <= 1e-12, (cls, option, difference)
            worst = max(worst, difference)
    return worst


@pytest.mark.parametrize("sizes", [*SIZES[:2], pytest.param(SIZES[2], marks=pytest.mark.slow)], ids=str)
def test_ranks_give_what_one_process_gives(sizes: tuple[int, ...]) -> None:
    """Loss and gradient, every kind of negatives, both losses, one and both directions, uneven batches."""
    assert max(run_ranks(compare, len(sizes), sizes)) <= 1e-12


def test_ranks_that_share_a_device() -> None:
    """What tests/test_cuda.py asks of two ranks on one GPU, asked of a CPU."""
    assert max(run_ranks(gathered, 2, "cpu")) <= 1e-5


def everything_else(rank: int, world: int) -> list[str]:
    sizes = (5, 3)
    data, start = World(sizes), sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])

    for cls, option in itertools.product((EqCoLoss, DualTempInfoNCE), options("mean")):
        got, _ = data.loss(cls, option, mine, gather=True, metrics=True)
        expected, _ = data.loss(cls, option, slice(None), gather=False, metrics=True)
        for name in got._fields[1:]:
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-12, rtol=1e-12)

    none = EqCoLoss(0.3, gather=True, reduction="none")(data.query[mine], data.key[mine])
    whole = EqCoLoss(0.3, reduction="none")(data.query, data.key)
    torch.testing.assert_close(none, whole[mine], atol=1e-12, rtol=1e-12)

    # num_negatives draws from the global batch: rank 0's last row meets rank 1's first
    few = EqCoLoss(0.3, gather=True, num_negatives=1, reduction="none")(data.query[mine], data.key[mine])
    torch.testing.assert_close(few, EqCoLoss(0.3, num_negatives=1, reduction="none")(data.query, data.key)[mine])
    for in_batch in ("keys", "views"):
        random = EqCoLoss(0.3, gather=True, in_batch=in_batch, num_negatives=2, sampling="random")
        assert random(data.query[mine], data.key[mine]).isfinite()

    # rows of one half dtype under autocast of the other, whose torch.cat refuses them
    half = [x[mine].half() for x in (data.query, data.key)]
    settings: dict[str, Any] = {"reduction": "none"}
    for settings["in_batch"] in ("keys", "views"):
        with torch.autocast("cpu", torch.bfloat16):
            mixed = EqCoLoss(0.3, gather=True, **settings)(*half)
        whole = EqCoLoss(0.3, **settings)(data.query, data.key)[mine]
        torch.testing.assert_close(mixed.double(), whole, rtol=2e-2, atol=0.0)

    # the queue: identical on all ranks, whatever they enqueue, also inside DDP with buffers broadcast
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = torch.nn.Linear(D, D)
            self.queue = MomentumQueue(20, D, store_ids=True, gather=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x)
            return out

    for broadcast in (False, True):
        model = DistributedDataParallel(Model(), broadcast_buffers=broadcast)
        for step in range(6):
            torch.manual_seed(10 * step + rank)
            rows = 3 + (rank + step) % 2
            keys = torch.randn(rows, D)
            if step:
                ids = torch.arange(rows) - 100
                loss = EqCoLoss(0.3, gather=True)(model(torch.randn(rows, D)), keys, model.module.queue, query_ids=ids)
                loss.backward()
            model.module.queue.enqueue(keys, torch.arange(rows) + 100 * rank)
        stored = torch.cat([model.module.queue.keys.flatten(), model.module.queue.ids.double()])
        others = [torch.empty_like(stored) for _ in range(world)]
        dist.all_gather(others, stored)
        assert torch.equal(others[0], others[1])
        assert len(model.module.queue) == 20

    # traced: no exchange of counts, equal ranks
    query, key = data.query[:3].clone().requires_grad_(), data.key[:3]
    compiled = torch.compile(EqCoLoss(0.3, gather=True), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(query, key), query)
    (expected,) = torch.autograd.grad(EqCoLoss(0.3, gather=True)(query, key), query)
    torch.testing.assert_close(got, expected)

    fsdp(rank, world)
    unlike(rank)
    return [mistake(*one) for one in mistakes(rank)] + [queue_mistake(rank)]


def unlike(rank: int) -> None:
    """What may differ between ranks, and what only one of them has wrong in its values."""
    x, width = torch.randn(2, D), (torch.int64, torch.int32)[rank]
    EqCoLoss(0.2, alpha=(64, 64.0)[rank], gather=True)(x, x.clone(), query_ids=torch.tensor([1, 2]).to(width))
    queue = MomentumQueue(8, D, store_ids=True, gather=True)
    queue.enqueue(x.to((torch.float32, torch.bfloat16)[rank]), torch.tensor([3, 4]).to(width))
    assert queue.ids is not None
    assert queue.ids.tolist() == [3, 4, 3, 4]
    ids = (torch.tensor([1, 2]), torch.tensor([7, 7]))[rank]  # each of rank 1's rows meets one other, of its own id
    q = x.clone().requires_grad_()
    loss = EqCoLoss(num_negatives=1, gather=True, reduction="none")(q, x, query_ids=ids)
    loss.sum().backward()
    assert loss.isnan().tolist() == [[False, False], [True, False]][rank]


def learned_temperatures(rank: int, world: int) -> list[str]:
    """A temperature that all ranks hold gets one process's gradient on each of them, as encoders do from DDP."""
    sizes = (5, 3)
    data, start = World(sizes), sum(sizes[:rank])
    mine, everything = slice(start, start + sizes[rank]), slice(None)

    def gradient(loss: Callable[[nn.Parameter], Tensor], value: float = 0.3) -> Tensor:
        t = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        loss(t).backward()
        assert t.grad is not None
        return t.grad

    def same(got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got, expected, atol=0, rtol=1e-12)

    for cls, option in itertools.product((EqCoLoss, DualTempInfoNCE), options("mean")):
        for metrics in (False, True):

            def loss(t: nn.Parameter, part: slice, gather: bool) -> Tensor:
                value, _ = data.loss(cls, option, part, gather, metrics, t)  # noqa: B023
                return value.loss if metrics else value  # type: ignore[no-any-return]  # noqa: B023

            same(gradient(lambda t: loss(t, mine, True)), gradient(lambda t: loss(t, everything, False)))

    query, key = data.query, data.key
    whole = gradient(lambda t: EqCoLoss(t, reduction="sum")(query, key))
    same(gradient(lambda t: EqCoLoss(t, reduction="sum", gather=True)(query[mine], key[mine])), whole)

    # "none": what is averaged is what each rank makes of its rows
    parts = [slice(0, 5), slice(5, 8)]
    whole = gradient(
        lambda t: torch.stack([EqCoLoss(t, reduction="none")(query, key)[part].mean() for part in parts]).mean()
    )
    same(gradient(lambda t: EqCoLoss(t, reduction="none", gather=True)(query[mine], key[mine]).mean()), whole)

    def twice(t: nn.Parameter, part: slice, gather: bool) -> Tensor:
        criterion = EqCoLoss(t, gather=gather)
        return criterion(query[part], key[part]) + 2 * criterion(key[part], query[part])

    same(gradient(lambda t: twice(t, mine, True)), gradient(lambda t: twice(t, everything, False)))

    def clip(scale: nn.Parameter, part: slice, gather: bool) -> Tensor:
        t = (-scale).exp()
        return functional.eqco_loss(query[part], key[part], temperature=t, symmetric=True, gather=gather)

    same(gradient(lambda t: clip(t, mine, True)), gradient(lambda t: clip(t, everything, False)))
    half = nn.Parameter(torch.tensor(0.25, dtype=torch.bfloat16))
    EqCoLoss(half, gather=True)(query[mine], key[mine]).backward()
    assert half.grad is not None
    whole = gradient(lambda t: EqCoLoss(t)(query, key), 0.25)
    torch.testing.assert_close(half.grad.double(), whole, rtol=2**-7, atol=0)

    beside_and_inside_ddp(data, mine)

    # traced: nothing is exchanged, ranks are equal
    four = slice(4 * rank, 4 * rank + 4)
    compiled = torch.compile(
        lambda t: functional.eqco_loss(query[four], key[four], temperature=t, gather=True),
        fullgraph=True,
        backend="aot_eager",
    )
    same(gradient(compiled), gradient(lambda t: EqCoLoss(t)(query, key)))

    # rounding is no disagreement; a gradient that one rank does not want, and values of their own, are
    EqCoLoss(torch.tensor(0.3 * (1 + 1e-9 * rank), dtype=torch.float64), gather=True)(query[mine], key[mine])
    wanted = torch.tensor(0.3).requires_grad_(rank == 0)
    parted = torch.tensor((0.452, 0.436)[rank], requires_grad=True)
    return [mistake(EqCoLoss(t, gather=True), query[mine], key[mine]) for t in (wanted, parted)]


def beside_and_inside_ddp(data: World, mine: slice) -> None:
    """Encoder and temperature of every rank step as those of one process."""

    class Model(nn.Module):
        def __init__(self, gather: bool, inside: bool) -> None:
            super().__init__()
            self.head = nn.Linear(D, D, dtype=torch.float64)
            with torch.no_grad():
                self.head.weight.copy_(data.head)
                self.head.bias.zero_()
            self.inside = inside
            self.criterion = EqCoLoss(nn.Parameter(torch.tensor(0.3, dtype=torch.float64)), gather=gather)

        def forward(self, query: Tensor, key: Tensor) -> Any:
            query, key = self.head(query), self.head(key)
            return self.criterion(query, key) if self.inside else (query, key)

    def stepped(gather: bool, inside: bool, part: slice) -> list[Tensor]:
        model = Model(gather, inside)
        criterion = model.criterion
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if not inside:
            del model.criterion
        encoder = DistributedDataParallel(model) if gather else model
        for _ in range(5):
            optimizer.zero_grad()
            out = encoder(data.query[part], data.key[part])
            loss: Tensor = out if inside else criterion(*out)
            loss.backward()
            optimizer.step()
        assert isinstance(criterion.temperature, Tensor)
        return [criterion.temperature.detach(), model.head.weight.detach()]

    for inside in (False, True):
        got, expected = stepped(True, inside, mine), stepped(False, inside, slice(None))
        assert abs(expected[0] - 0.3) > 1e-3
        torch.testing.assert_close(got, expected, atol=0, rtol=1e-10)


def copies(rank: int, world: int) -> str:
    """A process group is shared by copies of a criterion, and no file holds it."""
    group: Any = dist.new_group(range(world))
    criterion = EqCoLoss(nn.Parameter(torch.tensor(0.3)), gather=group)
    copied = copy.deepcopy(nn.ModuleList([criterion]))[0]
    assert isinstance(copied, EqCoLoss)
    assert copy.copy(criterion).gather is copied.gather is criterion.gather is group
    assert copied.temperature is not criterion.temperature
    x = torch.randn(3, D)
    assert torch.equal(copied(x, x), criterion(x, x))
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(TypeError) as caught:
        loaded(x, x)
    loaded.gather = group
    assert torch.equal(loaded(x, x), criterion(x, x))
    assert copy.deepcopy(EqCoLoss(gather=True)).gather is True
    return str(caught.value)


def learned_and_copied(rank: int, world: int) -> list[str]:
    second_derivatives()
    return [*learned_temperatures(rank, world), copies(rank, world)]


def test_a_learned_temperature_and_a_group_of_its_own() -> None:
    for wanted, parted, loaded in run_ranks(learned_and_copied, 2):
        assert "different gradients wanted on rank 1" in wanted
        assert "different temperatures, [0.4519" in parted
        assert "on rank 1 than on rank 0" in parted
        assert "torch.distributed.broadcast(temperature.data, 0)" in parted
        assert "a process group that was saved to a file" in loaded
        assert "gather = group" in loaded


def second_derivatives() -> None:
    """Through a gather they would lack what other ranks' rows add: an error also where autograd prunes what it can."""
    x, y = (torch.randn(4, D, requires_grad=True) for _ in range(2))
    t = torch.tensor(0.2, requires_grad=True)

    def loss() -> Tensor:
        return functional.eqco_loss(x, y, temperature=t, gather=True)

    for inputs in ((x, y), (y,), (t,)):
        with pytest.raises(NotImplementedError, match=r"^gather: .* differentiate twice with gather=False"):
            torch.autograd.grad(loss(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^gather: "):
        loss().backward(create_graph=True)
    torch.autograd.grad(torch.autograd.grad(loss(), x, create_graph=True)[0].sum(), (x,))  # which is not gathered


def queue_mistake(rank: int) -> str:
    with pytest.raises(ValueError, match=r"keys:|gather:") as caught:
        MomentumQueue(8, D, gather=True).enqueue(torch.randn(2, D + rank))
    return str(caught.value)


def fsdp(rank: int, world: int) -> None:
    """momentum_update over shards is momentum_update of the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    query_encoder = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
    key_encoder = copy.deepcopy(query_encoder)
    with torch.no_grad():
        for p in query_encoder.parameters():
            p.add_(torch.randn_like(p))
    whole = copy.deepcopy(key_encoder)
    momentum_update(query_encoder, whole, 0.9)
    plain = copy.deepcopy(key_encoder)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(query_encoder, mesh=mesh)
    fully_shard(key_encoder, mesh=mesh)
    momentum_update(query_encoder, key_encoder, 0.9)
    momentum_update(query_encoder, plain, 0.9)
    for k, p, expected in zip(key_encoder.parameters(), plain.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(k.full_tensor(), expected.detach(), atol=0, rtol=0)  # type: ignore[attr-defined]
        torch.testing.assert_close(p, expected, atol=0, rtol=0)


def mistakes(rank: int) -> list[Any]:
    """Calls that differ between rank 0 and rank 1, or are wrong on one of them."""
    x, ids = torch.randn(4, D), torch.arange(4)
    loss = EqCoLoss(gather=True)
    return [
        (EqCoLoss(alpha=(64, 256)[rank], gather=True), x, x),
        (EqCoLoss(reduction=("mean", "sum")[rank], gather=True), x, x),
        ((EqCoLoss, DualTempInfoNCE)[rank](gather=True), x, x),
        (loss, x.to((torch.float32, torch.float64)[rank]), x.to((torch.float32, torch.float64)[rank])),
        (loss, x[:, : D - rank], x[:, : D - rank]),
        (loss, x, x, (None, x)[rank]),
        (loss, x, x, None, (None, ids)[rank]),
        (loss, x.requires_grad_(rank == 0), x.detach()),
        (loss, x.detach(), x.detach()[:, : D - rank]),  # wrong in itself, on rank 1
        (loss, (x.detach(), "no tensor")[rank], x.detach()),
        (loss, x.detach(), x.detach().to((torch.float16, torch.bfloat16)[rank])),
        (EqCoLoss(torch.tensor(0.2), gather=True), x.detach(), x.detach(), None, None, (0.2, math.nan)[rank]),
    ]


def mistake(
    criterion: Any, query: Any, key: Any, negatives: Any = None, ids: Tensor | None = None, t: float | None = None
) -> str:
    if t is not None:
        criterion.temperature.fill_(t)
    with pytest.raises((TypeError, ValueError)) as caught:
        criterion(query, key, negatives, query_ids=ids)
    return str(caught.value)


def test_metrics_queues_shards_and_mistakes() -> None:
    """Metrics are global, queues identical, shards right; a disagreement is an error on every rank and no hang."""
    zero, one = run_ranks(everything_else, 2)
    expected = ["settings", "settings", "settings", "dtype", "D, [5, 4]", "kind of negative_keys", "query_ids given"]
    for text, messages in zip([*expected, "gradients wanted"], zip(zero, one, strict=True), strict=False):
        for message in messages:
            assert message.startswith("gather: expected the same on every rank"), message
            assert text in message, message
    assert "rank 1" in zero[8]
    assert "rank 1" in zero[9]
    assert one[8].startswith("positive_key: expected the shape of query")
    assert one[9].startswith("query: expected a torch.Tensor")
    assert "different dtype" in zero[10]
    assert "rank 1" in zero[11]
    assert one[11].startswith("temperature: expected a finite value > 0")
    assert "rank 1" in zero[12]
    assert one[12].startswith("keys: expected shape (N, 5)")


def test_gather_needs_a_process_group() -> None:
    x = torch.randn(4, D)
    for call in (lambda: EqCoLoss(gather=True)(x, x), lambda: MomentumQueue(8, D, gather=True).enqueue(x)):
        with pytest.raises(
            ValueError, match=r"gather: expected an initialised process group, got True without one.*init"
        ):
            call()
    with pytest.raises(TypeError, match=r"gather: expected False, True or a torch\.distributed\.ProcessGroup, got 3"):
        EqCoLoss(gather=3)  # type: ignore[arg-type]
