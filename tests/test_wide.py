"""What is the wide backend's own: chunks, products, memory, and CUDA graphs. Its values are tests/test_world.py's."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.records import keys_gradient, row_losses
from eqco_loss import EqCoLoss
from eqco_loss.ops import launcher, wide
from eqco_loss.ops.calls import (
    KeySet,
    KeysGradient,
    Metric,
    Pairs,
    Row,
    SymmetricLosses,
)
from eqco_loss.ops.wide import chunks, pointwise
from tests import knobs
from tests.cases import DEVICE
from tests.interpreter import exact_bfloat16
from tests.tolerance import assert_as_exact_as_eager
from tests.world import DTYPES, KINDS, Case, D, K, N, dense, dense_both, draw, ours, ours_both

CHUNK_SIZE = chunks.chunk_size  # the real ones; see many_chunks


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that sizes which fit a test have several, with ragged ends."""
    monkeypatch.setattr(chunks, "chunk_size", lambda n, k, *_: (min(n, 9), min(k, 16)))
    monkeypatch.setattr(wide, "chunk_size", lambda n, k, *_: (min(n, 9), min(k, 16)))
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

        for name, keys in (("STATISTICS", 64), ("SQUARE", 32), ("WEIGHTS", 64)):
            monkeypatch.setattr(mutual, name, mutual.TileSize(32, keys, 16, 4, 1, 2))
    with exact_bfloat16() if DEVICE.type == "cpu" else nullcontext():
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [True, False])
def test_rows_of_several_blocks(gradient: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys in a chunk than a kernel takes at a time, the largest logit in the last block."""
    monkeypatch.setattr(chunks, "chunk_size", lambda n, k, *_: (n, k))
    k = 9001
    keys = draw(k, D, seed=3, dtype=dtype)
    case = Case("all", dtype=dtype, dual=True)
    call = case.call()
    query = call.query[:3]
    keys[-1] = query[0]
    call = call._replace(query=query, positive=call.positive[:3], first=KeySet(keys, Pairs(), True), share=[1, 1])
    call = call._replace(need_query_gradient=gradient)
    out = wide.row_losses(call)
    grad = case.grad(3)
    eager, truth = dense(call, grad, None), dense(call, grad, torch.float64)
    found = {"loss": out.loss, "temperature": (grad * out.rows[Row.TEMPERATURE_GRADIENT]).sum()}
    assert out.metrics is not None
    assert gradient == (out.query_gradient is not None)
    found |= {f"metric {metric.name}": out.metrics[metric] for metric in (Metric.NEGATIVE, Metric.LOG_WEIGHT)}
    if out.query_gradient is not None:
        found["query"] = (out.query_gradient * grad[:, None]).to(dtype)
    for name, x in found.items():
        assert_as_exact_as_eager(x.cpu(), eager[name].cpu(), truth[name].cpu(), name, temperature=0.2)


@pytest.mark.parametrize("length", [0.0, 1e-7, 2e-5, 3e4], ids=str)
def test_float16_rows_of_any_length(length: float) -> None:
    """Neither weights nor gradients leave float16's range on the way, and rows of zeros have a finite gradient."""
    case = Case("batch", dtype=torch.float16, learned=False)
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
    case = Case(kind, dtype=torch.bfloat16, dual=True)
    call = case.call()._replace(may_raise=False)
    with Watch():
        ours(call, case.grad(len(call.query)))


def halves(views: Tensor) -> tuple[Tensor, Tensor]:
    first, second = views.chunk(2)
    return first, second


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
    both = SymmetricLosses(
        *halves(draw(2 * 19, D, dtype=torch.float32)), True, 0.2, None, None, None, [1, 1], True, None, "wide"
    )
    with Watch() as watch:
        ours_both(both, case.grad(1))
    assert watch.multiply_adds == 4 * 19 * 19 * D


FREE = {
    "empty",
    "new_empty",
    "empty_like",
    "slice",
    "select",
    "unbind",
    "view",
    "alias",
    "permute",
}  # memory, and views of it


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """What a GPU would run: kernels of Triton, products, and torch's operations, but for memory and views of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.quiet = False  # while an interpreter or a CPU's conversions are at work
        launch, multiply = launcher.Launch.__call__, chunks.product

        def noted(name: str, step: Any, *args: Any, **kwargs: Any) -> None:
            self.found.append(name)
            self.quiet = True
            step(*args, **kwargs)
            self.quiet = False

        def noted_launch(one: launcher.Launch, *args: Any) -> None:
            noted(one.kernel.__name__, launch, one, *args)

        def noted_product(*args: Any, **kwargs: Any) -> None:
            noted("product", multiply, *args, **kwargs)

        monkeypatch.setattr(launcher.Launch, "__call__", noted_launch)
        for module in (chunks, wide):
            monkeypatch.setattr(module, "product", noted_product)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.quiet and name not in FREE:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learned", [False, True], ids=["", "learned"])
@pytest.mark.parametrize("form", ["bfloat16", "autocast", "float16"])
@pytest.mark.parametrize("across", [True, False], ids=["across", "views"])
def test_launches_of_both_directions(
    across: bool, form: str, learned: bool, pointwise_form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eager code each costs Python 10 us and more, and in a CUDA graph the GPU a microsecond or two."""
    if pointwise_form == "torch":
        pytest.skip("of the kernels")
    monkeypatch.setattr(chunks, "chunk_size", CHUNK_SIZE)
    dtype = torch.float32 if form == "autocast" else getattr(torch, form)
    t = torch.tensor(0.1, device=DEVICE) if learned else None
    autocast = torch.bfloat16 if form == "autocast" else None
    views = draw(2 * 19, 64, dtype=dtype)  # whole steps of features on a GPU, too
    call = SymmetricLosses(*halves(views), across, 0.2, t, None, None, [1, 38], True, autocast, "wide")
    grad = torch.ones((), device=DEVICE)
    with Launches(monkeypatch) as seen:
        ours_both(call, grad)
    fitting = ["mul", "abs", "amax", "gt", "scalar_tensor", "where", "div"] if form == "float16" else []
    products = ["view_weights_kernel", "product", "product"]  # the second one, of the keys
    if not across:  # a chunk for each view, of which the second one has no keys but its own rows
        products += ["view_weights_kernel", "product"]
    assert seen.found == [
        *("prepare_kernel", "statistics_kernel", "finish_views_kernel"),
        *(["prepare_kernel"] if form == "float16" else []),
        *fitting,
        *products,
        "through_views_kernel",
        *(["sum", "mul"] if learned else []),
    ]


@pytest.mark.parametrize("form", ["bfloat16", "autocast", "float16"])
def test_views_changed_between_the_passes(form: str, pointwise_form: str) -> None:
    """What backward reads again is an error if it has changed; a copy that forward kept gives the right gradient."""
    dtype, autocast = (torch.float32, True) if form == "autocast" else (getattr(torch, form), False)
    first, second = (draw(9, 64, seed=seed, dtype=dtype).requires_grad_() for seed in (0, 1))
    criterion = EqCoLoss(0.2, symmetric=True, backend="wide")

    def gradients(changed: bool) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in (first, second)]
        inputs = [x * 1 for x in leaves]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss = criterion(*inputs)
        if changed:
            with torch.no_grad():
                inputs[1].fill_(1.0)
        return torch.autograd.grad(loss, leaves)

    kept = form == "bfloat16" or pointwise_form == "torch"
    if kept:
        for a, b in zip(gradients(True), gradients(False), strict=True):
            assert torch.equal(a, b)
    else:
        with pytest.raises(RuntimeError, match="changed in place"):
            gradients(True)


def test_launches_of_one_direction(pointwise_form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In-batch negatives under autocast, gradients to both sides."""
    if pointwise_form == "torch":
        pytest.skip("of the kernels")
    for module in (chunks, wide):
        monkeypatch.setattr(module, "chunk_size", CHUNK_SIZE)
    monkeypatch.setattr(chunks, "own_rows", len)
    query, key = (draw(24, 32, seed=seed, dtype=torch.float32) for seed in (0, 1))
    pairs = Pairs(band=[0, 23, 24])
    call = row_losses(query, key, key, pairs, normalize_keys=True, need_positive_gradient=True, autocast=torch.bfloat16)
    grad = torch.ones((), device=DEVICE)
    with Launches(monkeypatch) as seen:
        rows = wide.row_losses(call).rows
        forward, seen.found = seen.found, []
        wide.keys_gradient(keys_gradient(query, key, grad, rows, pairs, autocast=torch.bfloat16))
    assert forward == [
        *("measure_kernel", "measure_kernel", "mul", "measure_kernel", "dots_kernel"),
        *("product", "fold_kernel", "product", "finish_kernel"),
        *("through_unit_kernel", "through_unit_kernel", "sum"),
    ]
    assert seen.found == [
        *("measure_kernel", "mul", "mul", "mul", "measure_kernel"),
        *("product", "weights_kernel", "product", "through_unit_kernel"),
    ]


def test_products_in_float32_where_a_gpu_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else halves are converted before they are multiplied: by torch's setting for float16, by the GPU for bfloat16."""
    for capability, has in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(chunks, "_capability", lambda index, capability=capability: capability)
        assert chunks.multiplies_to_float32(torch.bfloat16, 0) == has
        assert chunks.multiplies_to_float32(torch.float16, 0)
    with knobs.float16_summed_in_float16():
        assert not chunks.multiplies_to_float32(torch.float16, 0)
        assert chunks.multiplies_to_float32(torch.bfloat16, 0)


def test_what_is_multiplied_ends_with_its_last_row(pointwise_form: str) -> None:
    """Blocks of features are powers of two, and what lies behind the last row is not theirs."""
    if pointwise_form == "torch":
        pytest.skip("of the kernels")
    from eqco_loss.ops.wide.view_kernels import _COPY, prepare_kernel

    half, d, width = 5, 70, 96
    here, there = halves(draw(2 * half, d, dtype=torch.float32))
    memory, rows = (
        torch.full((2 * half * width + 64,), 7.0, device=DEVICE),
        torch.empty(len(Row), 2 * half, device=DEVICE),
    )
    scratch = torch.ones(1, device=DEVICE)
    prepare_kernel[(2,)](
        here, *here.stride(), there, *there.stride(), memory, width, None, rows, scratch, half,
        D=d, WIDTH=width, ROWS_AS=_COPY, MEASURE=True, BLOCK_ROWS=4, BLOCK_D=128,
    )  # fmt: skip
    out = memory[: 2 * half * width].view(2 * half, width)
    assert torch.equal(out[:, :d], torch.cat([here, there]))
    assert not out[:, d:].any()
    assert (memory[2 * half * width :] == 7.0).all()
    assert scratch.item() == 0.0
    torch.testing.assert_close(rows[Row.INVERSE], 1 / torch.cat([here, there]).norm(dim=1))


@pytest.mark.parametrize("across", [True, False], ids=["across", "views"])
@pytest.mark.parametrize(("dual", "t", "learned"), [(False, 0.2, False), (False, 0.02, False), (True, 0.2, True)])
def test_chunks_of_statistics(
    across: bool, dual: bool, t: float, learned: bool, pointwise_form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics that are folded chunk by chunk, and gradients of chunks, are those of a single chunk."""
    if pointwise_form == "torch":
        pytest.skip("of the kernels")
    from eqco_loss.ops.wide import mutual

    given = torch.tensor(t, device=DEVICE) if learned else None
    view = draw(45, D)  # the other is alike, so that a pair of one image which is not left out shows
    views = torch.cat([view, view + 0.1 * view.roll(1, 0)]).bfloat16()
    call = SymmetricLosses(*halves(views), across, t, given, 0.5 if dual else None, None, [1, 90], True, None, "wide")
    grad = torch.ones((), device=DEVICE)
    if DEVICE.type == "cuda":
        monkeypatch.setattr(mutual, "STATISTICS", mutual.TileSize(32, 64, 32, 4, 2, 2))
        monkeypatch.setattr(mutual, "SQUARE", mutual.TileSize(32, 32, 32, 4, 2, 2))
    several, truth = ours_both(call, grad), dense_both(call, grad, torch.float64)
    monkeypatch.setattr(mutual, "STATISTICS_BYTES", 1)
    every = ours_both(call, grad)
    monkeypatch.setattr(chunks, "chunk_size", lambda n, k, *_: (min(n, 40), min(k, 70)))  # of several tiles each
    monkeypatch.setattr(mutual, "WEIGHTS", mutual.WEIGHTS._replace(rows=32, keys=32))
    larger = ours_both(call, grad)
    monkeypatch.setattr(chunks, "chunk_size", CHUNK_SIZE)
    single = ours_both(call, grad)
    for name, x in single.items():
        for other in (several[name], every[name], larger[name]):
            torch.testing.assert_close(other, x, rtol=2e-2 if name == "views" else 1e-5, atol=1e-6, msg=name)
        off = (x.double() - truth[name]).abs().max() / truth[name].abs().max()
        assert off < 0.01, (name, float(off))  # of bfloat16 products


@pytest.mark.parametrize("across", [True, False], ids=["across", "views"])
def test_statistics_of_rows_that_leave_no_room(
    across: bool, pointwise_form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many keys as a row of the workspace holds: what is stored behind them is the next row's."""
    if pointwise_form == "torch":
        pytest.skip("of the kernels")
    monkeypatch.setattr(chunks, "chunk_size", CHUNK_SIZE)
    call = SymmetricLosses(
        *halves(draw(2 * 40, D, dtype=torch.bfloat16)), across, 0.2, None, None, None, [1, 80], True, None, "wide"
    )
    grad = torch.ones((), device=DEVICE)
    got, truth = ours_both(call, grad), dense_both(call, grad, torch.float64)
    for name, x in truth.items():
        off = (got[name].double() - x).abs().max() / x.abs().max()
        assert off < 0.01, (name, float(off))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("t", "inter"), [(0.5, 0.004), (0.004, 0.5)])
def test_one_of_two_temperatures_is_low(t: float, inter: float, learned: bool, pointwise_form: str) -> None:
    """Its logits need a running maximum, though the other one's do not."""
    if pointwise_form == "torch":
        pytest.skip("of the kernels")
    given = torch.tensor(t, device=DEVICE) if learned else None
    views = draw(2 * 19, D, dtype=torch.bfloat16)
    call = SymmetricLosses(*halves(views), True, t, given, inter, None, [1, 38], True, None, "wide")
    grad = torch.ones((), device=DEVICE)
    got, truth = ours_both(call, grad), dense_both(call, grad, torch.float64)
    for name, x in truth.items():
        off = (got[name].double() - x).abs().max() / x.abs().max()
        assert off < 0.05, (name, float(off))  # of bfloat16 rows, whose products the temperature magnifies


@pytest.mark.parametrize(("n", "k"), [(1, 1), (256, 65536), (4096, 4096), (32768, 32768), (512, 2**24), (10**6, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_fit_the_workspace(n: int, k: int, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    rows, columns = CHUNK_SIZE(n, k, like, dtype)
    assert 1 <= rows <= n
    assert 1 <= columns <= k
    assert rows * columns * pointwise.bytes_a_pair(like, dtype) <= chunks.WORKSPACE <= 64e6


def test_what_is_refused() -> None:
    x = torch.empty(2, 3)
    assert wide.refusal(x, None, x.bfloat16(), x.double()) is None
    assert "meta" in str(wide.refusal(x.to("meta")))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["all", "everything", "batch", "picked", "own ids", "two sets"])
def test_in_a_cuda_graph(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype=dtype, learned=False)
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
    call = SymmetricLosses(*halves(views), True, 0.05, None, None, None, [1, 2 * 8192], True, None, "wide")
    ours_both(call, torch.ones((), device=DEVICE))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours_both(call, torch.ones((), device=DEVICE))
    assert torch.cuda.max_memory_allocated() - before < 2 * 8192 * 768 * 2 + 8192 * 768 * 4 + 64e6
