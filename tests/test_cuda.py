"""What only a GPU can show: compiled kernels at full size, graphs, autocast, no host synchronisation.

python -m pytest tests/test_kernels.py tests/test_cuda.py
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, functional
from tests import knobs
from tests.ranks import gathered, run_ranks
from tests.tolerance import assert_as_exact_as_eager

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Criterion = EqCoLoss | DualTempInfoNCE


def rows(n: int, d: int = 128, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(n, d, device="cuda", generator=generator).to(dtype)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def exact(q: Tensor, k: Tensor, negatives: Tensor | None, t: float, alpha: float) -> Tensor:
    """float64, the whole matrix."""
    q, k = F.normalize(q.double()), F.normalize(k.double())
    s = (q * k).sum(1) / t
    if negatives is None:
        logits = (q @ k.T / t).fill_diagonal_(-math.inf)
        count = len(k) - 1
    else:
        logits, count = q @ F.normalize(negatives.double()).T / t, len(negatives)
    return F.softplus(math.log(alpha / count) + logits.logsumexp(1) - s)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "alpha"), [(0.02, 2.0**20), (0.07, 65536.0), (0.2, 256.0), (1.0, 1.0)])
@pytest.mark.parametrize("k", [None, 65536, 4097])
def test_full_size(k: int | None, t: float, alpha: float, dtype: torch.dtype, precision: str) -> None:
    """Loss and gradients at N = 300, D = 128 against float64 on the rounded inputs.

    Rows weigh differently, and as a GradScaler has it: the largest gradient is 1, so that float16 can hold them.
    """
    if precision == "high" and dtype != torch.float32:
        pytest.skip("float32 only")
    q, p = rows(300, dtype=dtype), rows(300, dtype=dtype, seed=1)
    p = (q + 0.5 * p).to(dtype)
    negatives = None if k is None else rows(k, dtype=dtype, seed=2)
    leaves = [x.requires_grad_() for x in (q, p, negatives) if x is not None]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    truth = exact(doubles[0], doubles[1], None if k is None else doubles[2], t, alpha)
    weight = torch.linspace(0.5, 1.5, 300, device="cuda")
    gradients = torch.autograd.grad((truth * weight).sum(), doubles)
    scale = 1 / max(float(x.abs().max()) for x in gradients)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        loss = EqCoLoss(t, alpha=alpha, backend="triton", reduction="none")(q, p, negatives)
        got = torch.autograd.grad((loss * (weight * scale)).sum(), leaves)
    finally:
        torch.set_float32_matmul_precision(before)
    step = {"highest": 4e-6, "high": 2e-3}[precision] if dtype == torch.float32 else 4e-6
    assert float((loss.double() - truth).detach().abs().max()) <= step * max(1.0, 1 / t)
    limit = {"highest": 1e-5, "high": 4e-3}[precision] if dtype == torch.float32 else 4e-3
    for a, b in zip(got, gradients, strict=True):
        assert float((a.double() / scale - b).norm() / b.norm()) <= limit * max(1.0, 0.1 / t)


@pytest.mark.parametrize("d", [1, 16, 100, 256, 384, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(d: int, dtype: torch.dtype) -> None:
    q, p = rows(130, d, dtype).requires_grad_(), rows(130, d, dtype, 1).requires_grad_()
    got = EqCoLoss(backend="triton", reduction="none")(q, p)
    truth = exact(q, p, None, 0.2, 65536)
    plain = EqCoLoss(backend="torch", reduction="none")(q, p)
    assert_as_exact_as_eager(got.cpu(), plain.cpu(), truth.detach().cpu(), "loss", temperature=0.05)


def step(criterion: Criterion, q: Tensor, k: Tensor, negatives: Any = None) -> tuple[Tensor, Tensor]:
    loss = criterion(q, k, negatives)
    return loss, torch.autograd.grad(loss, q)[0]


def test_auto_takes_the_kernels() -> None:
    q = rows(8)
    assert EqCoLoss().chosen_backend(q, q)[0] == "triton"
    for other, why in ((q.double(), "float64"), (rows(8, 600), "D = 600")):
        name, reason = EqCoLoss().chosen_backend(other, other)
        assert name == "wide"
        assert why in reason


@pytest.fixture
def as_users_have_it() -> Iterator[None]:
    """Deterministic algorithms of torch's own may wait for the device."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device(as_users_have_it: None) -> None:
    q, k = rows(256).requires_grad_(), rows(256, seed=1)
    queue = MomentumQueue(4096, 128, device="cuda")
    queue.enqueue(k)
    criterion = EqCoLoss()
    step(criterion, q, k, queue)  # compiles
    criterion.with_metrics(q, k, queue)
    with no_synchronisation():
        step(criterion, q, k, queue)
        queue.enqueue(k)
        criterion.with_metrics(q, k, queue)


@pytest.mark.parametrize("in_batch", ["keys", "views"])
def test_cuda_graph(in_batch: Any) -> None:
    """Loss and backward captured once and replayed on new values."""
    q, k = rows(256).requires_grad_(), rows(256, seed=1)
    criterion = EqCoLoss(in_batch=in_batch, symmetric=in_batch == "views")
    stream: torch.cuda.Stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(criterion, q, k)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step(criterion, q, k)
        loss = loss.detach()  # or q's node, which belongs to the captured stream, lives on
    with torch.no_grad():
        q.copy_(rows(256, seed=7))
    graph.replay()
    expected = step(criterion, q, k)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_whole_and_once(fresh_compiler: None) -> None:
    counter = CompileCounterWithBackend("inductor")
    criterion = EqCoLoss()
    queue = MomentumQueue(1000, 128, device="cuda")
    queue.enqueue(rows(100))

    def function(q: Tensor, k: Tensor) -> Tensor:
        loss: Tensor = criterion(F.normalize(q), k, queue)
        return loss

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for seed in range(4):
        q, k = rows(64, seed=seed).requires_grad_(), rows(64, seed=seed + 10)
        assert torch.allclose(compiled(q, k), function(q, k), rtol=1e-5)
        torch.autograd.backward(compiled(q, k))
        queue.enqueue(k)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_in_half(dtype: torch.dtype) -> None:
    """A float32 queue is read tile by tile; the loss is float32 and near the exact one."""
    q, k, negatives = rows(64).requires_grad_(), rows(64, seed=1), rows(5000, seed=2)
    with torch.autocast("cuda", dtype):
        loss, gradient = step(EqCoLoss(), q, k, negatives)
    full, exact_gradient = step(EqCoLoss(backend="torch"), q, k, negatives)
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach() - full.detach())) <= 2e-3
    assert float((gradient - exact_gradient).norm() / exact_gradient.norm()) <= 1e-2


def test_grad_scaler_and_accumulation() -> None:
    layer = nn.Linear(128, 128).cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    for _ in range(2):
        with torch.autocast("cuda", torch.float16):
            loss = EqCoLoss()(layer(rows(64)), rows(64, seed=1))
        scaler.scale(loss / 2).backward()
    assert layer.weight.grad is not None
    scaled = layer.weight.grad.clone() / 2.0**14
    layer.zero_grad()
    EqCoLoss()(layer(rows(64)), rows(64, seed=1)).backward()
    assert float((scaled - layer.weight.grad).norm() / layer.weight.grad.norm()) <= 2e-2


def test_checkpointing_and_inference_mode() -> None:
    q, k = rows(64).requires_grad_(), rows(64, seed=1)
    plain = step(EqCoLoss(), q, k)
    loss = checkpoint(EqCoLoss(), q, k, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, q)[0], plain[1])
    with torch.inference_mode():
        torch.testing.assert_close(EqCoLoss()(q, k), plain[0])  # without a gradient it is another kernel


def test_a_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q = rows(64).to("cuda:1").requires_grad_()
    loss, gradient = step(EqCoLoss(), q, rows(64, seed=1).to("cuda:1"))
    first, expected = step(EqCoLoss(), q.detach().to("cuda:0").requires_grad_(), rows(64, seed=1))
    assert torch.equal(loss.cpu(), first.cpu())
    assert torch.equal(gradient.cpu(), expected.cpu())


def test_two_ranks_on_one_gpu() -> None:
    """Over gloo, as two processes of nccl cannot share a GPU."""
    assert max(run_ranks(gathered, 2, "cuda")) <= 1e-5


@pytest.mark.parametrize("loss", [functional.eqco_loss, functional.dual_temp_infonce])
def test_bit_for_bit(loss: Callable[..., Tensor]) -> None:
    q, k = rows(1000, dtype=torch.bfloat16).requires_grad_(), rows(1000, dtype=torch.bfloat16, seed=1).requires_grad_()
    first, second = (torch.autograd.grad(loss(q, k), (q, k)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("n", "d", "dtype"), [(2, 256, torch.float16), (32, 64, torch.float32)], ids=str)
def test_more_than_two_to_the_31_offsets(n: int, d: int, dtype: torch.dtype) -> None:
    """K = 2^24 keys: 64-bit offsets, in float16 within the keys, in float32 between the three pieces of them."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB")
    keys = torch.zeros(2**24, d, dtype=dtype, device="cuda")
    keys[:, 0] = 1.0
    keys[-1, 0], keys[-1, 1] = 0.0, 1.0
    q = torch.zeros(n, d, dtype=dtype, device="cuda")
    q[:, 1] = 1.0
    lse = functional.negatives_logsumexp(q, keys, temperature=0.02)
    expected = math.log((2**24 - 1) + math.exp(50.0))
    assert torch.allclose(lse, torch.full_like(lse, expected), rtol=1e-6)


def test_products_where_float16_is_summed_in_float16() -> None:
    q, k = rows(64, dtype=torch.float16).requires_grad_(), rows(64, dtype=torch.float16, seed=1)
    expected = step(EqCoLoss(backend="wide"), q, k)
    with knobs.float16_summed_in_float16():
        torch.testing.assert_close(step(EqCoLoss(backend="wide"), q, k), expected, atol=1e-4, rtol=1e-2)
