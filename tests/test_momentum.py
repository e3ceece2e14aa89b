"""momentum_update and cosine_momentum."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from eqco_loss import functional, momentum_update
from tests.strategies import seeds
from tests.tolerance import assert_as_exact_as_eager


def encoder(seed: int, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(6)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), norm, nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
        norm.running_mean.normal_()
        norm.num_batches_tracked.fill_(seed)
    return net


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def is_buffer(name: str) -> bool:
    return "running" in name or "tracked" in name


@given(st.one_of(st.floats(0, 0.9999), st.just(1.0)), st.sampled_from([torch.float32, torch.float64]), seeds)
def test_is_the_formula(momentum: float, dtype: torch.dtype, seed: int) -> None:
    query, key = encoder(seed % 1000, dtype=dtype), encoder(seed % 1000 + 1, dtype=dtype)
    q, k = state(query), state(key)
    momentum_update(query, key, momentum)
    for name, value in key.state_dict().items():
        if is_buffer(name):
            assert torch.equal(value, k[name]), f"{name}: MoCo leaves buffers alone"
        else:
            exact = momentum * k[name].double() + (1 - momentum) * q[name].double()
            assert_as_exact_as_eager(value, k[name] * momentum + q[name] * (1 - momentum), exact, name)
    assert all(torch.equal(value, q[name]) for name, value in query.state_dict().items()), (
        "the query encoder is only read"
    )


@pytest.mark.parametrize(("momentum", "source"), [(0.0, "query"), (1.0, "key")])
def test_ends_are_exact(momentum: float, source: str) -> None:
    query, key = encoder(0), encoder(1)
    expected = state({"query": query, "key": key}[source])
    momentum_update(query, key, momentum)
    for name, value in key.state_dict().items():
        if not is_buffer(name):
            assert torch.equal(value, expected[name]), name


def test_default_is_0_999() -> None:
    query, key = encoder(0), encoder(1)
    twin = copy.deepcopy(key)
    momentum_update(query, key)
    momentum_update(query, twin, 0.999, buffers="none")
    assert all(torch.equal(a, b) for a, b in zip(key.state_dict().values(), twin.state_dict().values(), strict=True))


def test_is_in_place_and_out_of_the_graph() -> None:
    """The same storage and the same Parameter objects, so that optimisers, DDP and CUDA graphs keep what they hold."""
    query, key = encoder(0), encoder(1)
    before = [(id(p), p.data_ptr(), p._version) for p in key.parameters()]
    momentum_update(query, key, 0.5)
    after = [(id(p), p.data_ptr(), p._version) for p in key.parameters()]
    assert [b[:2] for b in before] == [a[:2] for a in after]
    assert all(a[2] > b[2] for a, b in zip(after, before, strict=True)), "autograd sees that the values changed"
    for p in key.parameters():
        assert p.requires_grad
        assert p.is_leaf
        assert p.grad is None
        assert p.grad_fn is None


def test_a_frozen_key_encoder_is_updated_and_stays_frozen() -> None:
    query, key = encoder(0), encoder(1).requires_grad_(False)
    momentum_update(query, key, 0.0)
    assert not any(p.requires_grad for p in key.parameters())
    assert all(torch.equal(a, b) for a, b in zip(query.parameters(), key.parameters(), strict=True))


def test_returns_none() -> None:
    result: object = momentum_update(encoder(0), encoder(1))
    assert result is None


@pytest.mark.parametrize("buffers", ["none", "copy", "ema"])
def test_buffers(buffers: str) -> None:
    query, key = encoder(3), encoder(5)
    q, k = state(query), state(key)
    momentum_update(query, key, 0.9, buffers=buffers)
    for name in ("1.running_mean", "1.running_var"):
        expected = {"none": k[name], "copy": q[name], "ema": 0.9 * k[name] + 0.1 * q[name]}[buffers]
        torch.testing.assert_close(key.state_dict()[name], expected)
    counted = key.state_dict()["1.num_batches_tracked"]
    assert counted.dtype == torch.long
    assert counted.item() == (5 if buffers == "none" else 3), "whole numbers have no average: they are copied"


class Odd(nn.Module):
    """Buffers of every kind, shared parameters, a scalar, an empty tensor."""

    flag: Tensor

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.tied = self.first
        self.scale = nn.Parameter(torch.tensor(fill))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("flag", torch.tensor(fill > 0))
        self.register_buffer("steps", torch.tensor([int(fill)], dtype=torch.int32))
        self.register_buffer("scratch", torch.full((2,), fill), persistent=False)
        with torch.no_grad():
            self.first.weight.fill_(fill)
            self.first.bias.fill_(fill)


@pytest.mark.parametrize("buffers", ["none", "copy", "ema"])
def test_tied_scalar_empty_and_boolean(buffers: str) -> None:
    query, key = Odd(1.0), Odd(-3.0)
    momentum_update(query, key, 0.75, buffers=buffers)
    expected = 0.75 * -3.0 + 0.25
    assert key.scale.item() == pytest.approx(expected)
    assert key.first.weight[0, 0].item() == pytest.approx(expected), "a tied weight moves once, not twice"
    assert key.tied is key.first
    assert bool(key.flag) == (buffers != "none")


class Wrapper(nn.Module):
    """What DDP looks like from outside: one submodule called `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapped", ["query", "key", "both"])
def test_ddp_and_compiled_modules_are_unwrapped(wrapped: str) -> None:
    wrappers: list[Callable[[nn.Module], Any]] = [
        nn.parallel.DistributedDataParallel,
        torch.compile,
        lambda m: torch.compile(nn.parallel.DistributedDataParallel(m)),
        lambda m: nn.parallel.DistributedDataParallel(torch.compile(m)),
    ]
    for wrap in wrappers:
        query, key, twin = encoder(0), encoder(1), encoder(1)
        momentum_update(query, twin, 0.9, buffers="ema")
        momentum_update(
            wrap(query) if wrapped in ("query", "both") else query,
            wrap(key) if wrapped in ("key", "both") else key,
            0.9,
            buffers="ema",
        )
        assert all(
            torch.equal(a, b) for a, b in zip(key.state_dict().values(), twin.state_dict().values(), strict=True)
        )


def checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, torch.compile, checkpointed], ids=lambda f: f.__name__)
def test_wrappers_of_single_blocks_are_looked_through(wrap: Any, side: str) -> None:
    """On one side only: what they add to the names is no difference."""
    query, key = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    wrapped = query if side == "query" else key
    before, target = [[x.detach().clone() for x in one.parameters()] for one in (key, query)]
    wrapped[0] = wrap(wrapped[0])
    momentum_update(query, key, 0.25)
    for old, new, towards in zip(before, key.parameters(), target, strict=True):
        torch.testing.assert_close(new, 0.25 * old + 0.75 * towards)


def test_wrappers_names_that_would_collide_are_kept_whole() -> None:
    both = nn.ModuleDict({"module": nn.Linear(2, 2)})
    both.weight = nn.Parameter(torch.zeros(2, 2))
    momentum_update(both, copy.deepcopy(both), 0.5)
    with pytest.raises(ValueError, match="expected the parameter names"):
        momentum_update(both, nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("base", [0.9, 0.99, 0.996, 0.999])
def test_every_step_of_a_cosine_to_one_is_taken(base: float) -> None:
    """float32 rounds the last steps away, which is harmless; it was an error."""
    query, key = encoder(0), encoder(1)
    for step in range(1001):
        momentum_update(query, key, functional.cosine_momentum(step, 1000, base=base))
    momentum_update(query, key, 1 - 1e-12)


def test_momentum_may_be_numpys() -> None:
    query, key = encoder(0), encoder(1)
    half: Any = np.float32(0.5)
    steps: Any = np.int64(3), np.int64(10)
    momentum_update(query, key, half)
    momentum_update(query, key, functional.cosine_momentum(*steps))
    narrow: Any = np.int8(3), 1000, np.float16(0.5)
    found = functional.cosine_momentum(*narrow)
    assert type(found) is float
    assert found == functional.cosine_momentum(3, 1000, 0.5)


def test_exchanged_encoders_are_an_error() -> None:
    """The one that gradients train would be overwritten."""
    query, key = encoder(0), encoder(1).requires_grad_(False)
    before = copy.deepcopy(query.state_dict())
    with pytest.raises(ValueError, match=r"^query_encoder: .* frozen, .* Exchange them"):
        momentum_update(key, query)
    assert all(torch.equal(x, before[name]) for name, x in query.state_dict().items())
    momentum_update(key, query.requires_grad_(False))


@pytest.mark.parametrize("share", ["copy", "head", "moved in"])
def test_encoders_that_share_parameters_are_an_error(share: str) -> None:
    base, head = nn.Linear(3, 3), nn.Linear(3, 2)
    query = nn.Sequential(base, head)
    key = {
        "copy": copy.copy(query),
        "head": nn.Sequential(nn.Linear(3, 3), head),
        "moved in": nn.Sequential(base, head),
    }[share]
    with pytest.raises(ValueError, match=r"'1.weight'.*in common with query_encoder.*deepcopy"):
        momentum_update(query, key)


def test_two_parameters_that_are_one_memory_step_once() -> None:
    """As ``second.weight.data = first.weight.data`` ties them; one Parameter in two modules is one anyway."""

    def tied() -> tuple[nn.Linear, nn.ModuleList]:
        first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        second.weight.data = first.weight.data
        return first, nn.ModuleList([first, second])

    (query, query_encoder), (key, key_encoder) = tied(), tied()
    before = key.weight.detach().clone()
    momentum_update(query_encoder, key_encoder, 0.9)
    torch.testing.assert_close(key.weight.detach(), 0.9 * before + 0.1 * query.weight.detach())


def test_parameters_without_an_address_are_not_taken_for_shared() -> None:
    """Meta tensors, and subclasses that wrap others, as quantised weights are."""
    from torch.testing._internal.two_tensor import TwoTensor

    query, key = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = key.weight.detach().lerp(query.weight.detach(), 0.5)
    for module in (query, key):
        x = module.weight.detach()
        module.weight = nn.Parameter(TwoTensor(x.clone(), x.clone()))
    momentum_update(query, key, 0.5)
    assert isinstance(key.weight, TwoTensor)
    torch.testing.assert_close(key.weight.a, expected)
    momentum_update(query.to("meta"), nn.Linear(3, 2, device="meta"), 0.5)


@pytest.mark.parametrize("side", ["query", "key"])
def test_parameters_that_a_sharder_has_emptied_are_an_error(side: str) -> None:
    """FSDP1 and ZeRO-3 leave parameters of shape (0,) between uses: nothing would move."""
    query, key = encoder(0), encoder(1)
    for x in (query if side == "query" else key).parameters():
        x.data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"{side}_encoder: expected parameters with their values.*fully_shard"):
        momentum_update(query, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_too_coarse_a_dtype_is_an_error_and_not_a_stall(dtype: torch.dtype) -> None:
    """bf16 at 0.999 would move nothing, ever; the key encoder is untouched when it says so."""
    query, key = encoder(0, dtype=dtype), encoder(1, dtype=dtype)
    before = state(key)
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        momentum_update(query, key, 0.9999)
    assert all(torch.equal(value, before[name]) for name, value in key.state_dict().items())


def test_bfloat16_at_0_999_says_so() -> None:
    with pytest.raises(ValueError, match=r"bfloat16.*0\.999|0\.999.*bfloat16"):
        momentum_update(encoder(0, dtype=torch.bfloat16), encoder(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_half_is_fine_where_the_step_is_coarse_enough(dtype: torch.dtype, momentum: float) -> None:
    query, key = encoder(0, dtype=dtype), encoder(1, dtype=dtype)
    q, k = state(query), state(key)
    momentum_update(query, key, momentum)
    for name, value in key.named_parameters():
        exact = momentum * k[name].double() + (1 - momentum) * q[name].double()
        assert_as_exact_as_eager(value.detach(), k[name] * momentum + q[name] * (1 - momentum), exact, name)


def test_float32_key_of_a_half_query() -> None:
    """Weights in bf16, their average in float32: how a half run keeps an average at all."""
    query, key = encoder(0, dtype=torch.bfloat16), encoder(1)
    q, k = state(query), state(key)
    momentum_update(query, key, 0.999)
    for name, value in key.named_parameters():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach(), 0.999 * k[name] + 0.001 * q[name].float())


def test_momentum_1_is_frozen_whatever_the_query_is() -> None:
    query, key = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = copy.deepcopy(key.state_dict())
    with torch.no_grad():
        query.weight.fill_(float("inf"))
    momentum_update(query, key, 1.0)
    assert all(torch.equal(before[name], value) for name, value in key.state_dict().items())


def test_integer_parameters_are_copied() -> None:
    query, key = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for module, value in ((query, 3), (key, 5)):
        module.steps = torch.nn.Parameter(torch.tensor([value]), requires_grad=False)
    momentum_update(query, key, 0.5)
    assert key.get_parameter("steps").tolist() == [3]


def test_converges_to_a_constant_query() -> None:
    """The update is an average: the distance shrinks by the momentum at each step."""
    query, key = encoder(0), encoder(1)
    distances = []
    for _ in range(21):
        distances.append(sum((a - b).norm().item() for a, b in zip(query.parameters(), key.parameters(), strict=True)))
        momentum_update(query, key, 0.9)
    assert distances[-1] / distances[0] == pytest.approx(0.9**20, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ cosine_momentum


@given(st.integers(1, 10_000), st.data(), st.floats(0, 1), st.floats(0, 1))
def test_cosine_momentum(total: int, data: st.DataObject, base: float, final: float) -> None:
    """final - (final - base)(1 + cos(pi step / total)) / 2: base at the start, final at the end."""
    step = data.draw(st.integers(0, total))
    expected = final - (final - base) * (math.cos(math.pi * step / total) + 1) / 2
    found = functional.cosine_momentum(step, total, base, final)
    assert isinstance(found, float)
    assert found == pytest.approx(expected, abs=1e-12)
    assert min(base, final) - 1e-12 <= found <= max(base, final) + 1e-12


def test_cosine_momentum_ends_are_exact_and_default_to_byol() -> None:
    assert functional.cosine_momentum(0, 10) == 0.996
    assert functional.cosine_momentum(10, 10) == 1.0
    assert functional.cosine_momentum(5, 10) == pytest.approx(0.998)
    assert functional.cosine_momentum(25, 10) == 1.0, "a run that goes on keeps the final momentum"
