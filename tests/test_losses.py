"""Values, gradients and metrics against the float64 oracle, in every mode."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, functional
from tests import cases, oracle
from tests.cases import DTYPES, LOSSES, MODES, MODES_AND_IDS, Case
from tests.strategies import LAYOUTS
from tests.tolerance import CONSTANT, FLOOR, assert_as_exact_as_eager, error


def id_of(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize(("mode", "ids"), MODES_AND_IDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients(loss: str, mode: str, ids: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        cases.assert_right(Case(loss, mode, dtype=dtype, ids=ids, seed=seed))


@pytest.mark.parametrize("alpha", [None, 1.0, 11, 65536.0, 2.0**20])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_alpha(loss: str, mode: str, alpha: float | None) -> None:
    cases.assert_right(Case(loss, mode, alpha=alpha, ids="flat"))
    cases.assert_right(Case(loss, mode, alpha=alpha, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_unnormalised(loss: str, mode: str, dtype: torch.dtype) -> None:
    cases.assert_right(Case(loss, mode, dtype=dtype, normalize=False))


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_temperatures(loss: str, mode: str, temperature: float) -> None:
    for seed in range(3):
        cases.assert_right(Case(loss, mode, temperature=temperature, seed=seed))
        cases.assert_right(Case(loss, mode, temperature=temperature, seed=seed, dtype=torch.float64))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_layouts(loss: str, mode: str, layout: str) -> None:
    """Every layout meets every kind of negatives: torch's flash attention is silently wrong for a transposed query."""
    for case in (Case(loss, mode), Case(loss, mode, normalize=False), Case(loss, mode, dtype=torch.bfloat16)):
        sample = cases.make(case)
        found = cases.ours(case, sample, layout=LAYOUTS[layout])
        cases.assert_answers(case, found, cases.plain(case, sample), cases.truth(case, sample))


ODD_SIZES = [  # one row has no other negatives in its batch: an error, tested with the errors
    (mode, n, k, d)
    for mode in MODES
    for n, k, d in [(1, 1, 1), (1, 9, 3), (2, 1, 129), (33, 65, 17), (5, 300, 2), (130, 7, 64)]
    if n > 1 or mode not in ("in_batch", "rolled")
]


@pytest.mark.parametrize(("mode", "n", "k", "d"), ODD_SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_odd_sizes(loss: str, mode: str, n: int, k: int, d: int) -> None:
    cases.assert_right(Case(loss, mode, n=n, k=max(k, 3) if mode == "queue" else k, d=d))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_reduction(loss: str, mode: str, reduction: str) -> None:
    case = Case(loss, mode, ids="flat")
    cases.assert_right(case, reduction=reduction)
    result = cases.ours(case, cases.make(case), reduction=reduction).loss
    assert result.shape == ((case.n,) if reduction == "none" else ())


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_learned_temperature(loss: str, mode: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        cases.assert_right(Case(loss, mode, dtype=dtype, ids="flat", seed=seed), learn_temperature=True)


@pytest.mark.parametrize("kind", ["batch", "shared", "both", "lse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=id_of)
def test_a_learned_temperature_in_half_precision_is_its_float32_value(dtype: torch.dtype, kind: str) -> None:
    """As after ``criterion.bfloat16()``: value and gradients, also of the temperature, in float32 arithmetic."""
    leaves = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]

    def results(t: Tensor) -> list[Tensor]:
        query, key = leaves
        if kind == "lse":
            loss = functional.negatives_logsumexp(query, key, temperature=t).sum()
        elif kind == "shared":
            loss = EqCoLoss(t)(query, query.detach() + 1, key)
        else:
            loss = EqCoLoss(t, symmetric=kind == "both")(query, key)
        return [loss, *torch.autograd.grad(loss, [*leaves, t])]

    half = torch.tensor(0.07).to(dtype).requires_grad_()
    *got, of_t = results(half)
    *expected, of_float = results(half.detach().float().requires_grad_())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(of_t.float(), of_float, rtol=torch.finfo(dtype).eps, atol=0)


def test_learned_temperature_alone() -> None:
    """Embeddings are frozen and only the scale learns."""
    case = Case()
    sample = cases.make(case)
    scale = torch.nn.Parameter(torch.tensor(0.2))
    cases.criterion(case, temperature=scale)(sample.query, sample.positive, sample.negatives).backward()
    exact = cases.truth(case, sample, reduction="mean", learn_temperature=True).gradients["temperature"]
    assert scale.grad is not None
    assert_as_exact_as_eager(
        scale.grad, cases.plain(case, sample, reduction="mean", learn_temperature=True).gradients["temperature"], exact
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_parameter_of_the_criterion_is_found_by_an_optimiser(loss: str) -> None:
    scale = torch.nn.Parameter(torch.tensor(0.2))
    criterion = cases.criterion(Case(loss), temperature=scale)
    assert [id(p) for p in criterion.parameters()] == [id(scale)]


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_dtype_of_the_result(loss: str, mode: str, dtype: torch.dtype) -> None:
    """float32 for half inputs; gradients in the dtype of what they belong to."""
    case = Case(loss, mode, dtype=dtype)
    result = cases.ours(case, cases.make(case))
    assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {gradient.dtype for gradient in result.gradients.values()} == {dtype}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_function_and_module_are_one(loss: str, mode: str) -> None:
    case = Case(loss, mode, ids="flat")
    sample = cases.make(case)
    num_negatives = case.k if mode == "rolled" else None
    module = cases.criterion(case)
    expected = module(sample.query, sample.positive, sample.negatives, **sample.ids())
    arguments = {"temperature": case.temperature, "alpha": case.alpha}
    if loss == "dual":
        arguments["inter_temperature"] = case.inter_temperature
    value = functional.eqco_loss if loss == "eqco" else functional.dual_temp_infonce
    call: dict[str, Any] = {**arguments, **sample.ids(), "num_negatives": num_negatives}
    assert torch.equal(expected, value(sample.query, sample.positive, sample.negatives, **call))


def test_settings_may_be_changed_and_may_be_numpys() -> None:
    """Each by its name, in every call."""
    query, key = torch.randn(4, 3), torch.randn(4, 3)
    criterion = EqCoLoss()
    numpys: dict[str, Any] = {"temperature": np.float32(0.5), "alpha": np.int64(7), "num_negatives": np.int64(2)}
    for name, value in {**numpys, "backend": "torch"}.items():
        setattr(criterion, name, value)
    assert criterion.backend == "torch"
    assert criterion.chosen_backend(query, key) == ("torch", "asked for by name")
    assert torch.equal(criterion(query, key), EqCoLoss(0.5, alpha=7, num_negatives=2)(query, key))
    assert torch.equal(criterion(query, key), EqCoLoss(**numpys)(query, key))
    criterion.backend = "none"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="backend: expected one of"):
        criterion(query, key)


def test_defaults_are_the_documented_ones() -> None:
    case = Case(alpha=65536.0)
    sample = cases.make(case)
    documented = cases.criterion(case)(sample.query, sample.positive, sample.negatives)
    assert torch.equal(EqCoLoss()(sample.query, sample.positive, sample.negatives), documented)
    case = Case("dual", temperature=0.1, inter_temperature=1.0, alpha=None)
    documented = cases.criterion(case)(sample.query, sample.positive, sample.negatives)
    assert torch.equal(DualTempInfoNCE()(sample.query, sample.positive, sample.negatives), documented)


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize(("mode", "ids"), MODES_AND_IDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_metrics(loss: str, mode: str, ids: str, dtype: torch.dtype) -> None:
    """Each is the row mean of its definition; the loss is the loss."""
    case = Case(loss, mode, ids=ids, dtype=dtype)
    sample = cases.make(case)
    query = sample.query.clone().requires_grad_()
    metrics = cases.criterion(case).with_metrics(query, sample.positive, sample.negatives, **sample.ids())
    assert set(metrics._fields) == {"loss", *METRICS}
    found = cases.Answer(metrics.loss.detach(), {"query": torch.autograd.grad(metrics.loss, query)[0]})
    plain, truth = (f(case, sample, reduction="mean") for f in (cases.plain, cases.truth))
    cases.assert_answers(case, found, plain, cases.Answer(truth.loss, {"query": truth.gradients["query"]}))
    exact = cases.exact_rows(case, sample)
    for name in METRICS:
        value: Tensor = getattr(metrics, name)
        assert value.shape == (), name
        assert not value.requires_grad, name
        expected = getattr(exact, name).double().mean()
        # Similarities of half inputs are sums of rounded unit rows; everything else follows from them.
        roundings = 8 * (1 / case.temperature) * torch.finfo(dtype).eps
        assert abs(value.double() - expected) <= roundings * max(1.0, abs(expected)), (name, value, expected)


METRICS = (
    "top1_accuracy",
    "top5_accuracy",
    "positive_similarity",
    "negative_similarity",
    "effective_k",
    "mi_estimate",
    "gradient_norm_bound",
    "mean_log_weight",
)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_are_means_whatever_the_reduction(loss: str, reduction: str) -> None:
    case = Case(loss)
    sample = cases.make(case)
    mean = cases.criterion(case).with_metrics(sample.query, sample.positive, sample.negatives)
    other = cases.criterion(case, reduction=reduction).with_metrics(sample.query, sample.positive, sample.negatives)
    assert other.loss.shape == ((case.n,) if reduction == "none" else ())
    for name in METRICS:
        assert torch.equal(getattr(mean, name), getattr(other, name)), name


def test_top1_counts_a_tie_as_wrong_and_knows_no_margin() -> None:
    query = torch.eye(4)
    negatives = torch.stack(
        [query[0], -query[1], -query[2], -query[3]]
    )  # ties with query 0's positive, below the others'
    positive = torch.stack([query[0], query[1], -query[2], query[3]])  # query 2's positive is its worst key
    for alpha in (1e-3, 2.0**20):
        metrics = EqCoLoss(alpha=alpha).with_metrics(query, positive, negatives)
        assert metrics.top1_accuracy.item() == 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("in_batch", ["keys", "views", None])
def test_collapsed_embeddings_are_no_contrast(in_batch: Any, dtype: torch.dtype) -> None:
    """All alike: however their similarities are rounded, no query tells its positive from the others."""
    for d in (3, 7, 128):
        z = torch.randn(d).to(dtype).expand(64, d)
        negatives = None if in_batch else z[:9]
        metrics = EqCoLoss(in_batch=in_batch).with_metrics(z.clone(), z.clone(), negatives)
        assert metrics.top1_accuracy.item() == metrics.top5_accuracy.item() == 0


@pytest.mark.parametrize("where", ["query", "positive"])
def test_metrics_of_a_nan_are_nan(where: str) -> None:
    tensors = {"query": torch.randn(4, 3), "positive": torch.randn(4, 3)}
    tensors[where][0] = math.nan
    metrics = EqCoLoss().with_metrics(tensors["query"], tensors["positive"], torch.randn(7, 3))
    assert metrics.loss.isnan()
    assert metrics.top1_accuracy.isnan()
    assert metrics.top5_accuracy.isnan()


def test_mutual_information_is_a_lower_bound_only_for_small_alpha() -> None:
    """log(1 + alpha) - L never exceeds log(1 + alpha); with everything saturated it reaches it."""
    query = torch.eye(16)
    metrics = EqCoLoss(temperature=0.01, alpha=15).with_metrics(query, query)
    assert metrics.mi_estimate.item() == pytest.approx(math.log(16))


@pytest.mark.parametrize("loss", LOSSES)
def test_only_what_asks_gets_a_gradient(loss: str) -> None:
    """Every subset of {query, positive, negatives} that may require grad."""
    case = Case(loss)
    sample = cases.make(case)
    full = cases.ours(case, sample, reduction="mean").gradients
    for asked in range(8):
        leaves = {
            name: leaf.clone().requires_grad_(bool(asked >> bit & 1))
            for bit, (name, leaf) in enumerate(cases.leaves_of(sample).items())
        }
        result = cases.criterion(case)(leaves["query"], leaves["positive"], leaves["negatives"])
        assert result.requires_grad == bool(asked)
        if asked:
            result.backward()
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                assert leaf.grad is not None
                torch.testing.assert_close(leaf.grad, full[name], msg=f"{name} of {asked:03b}")
            else:
                assert leaf.grad is None, f"{name} of {asked:03b}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_grad_and_eval_give_the_same_value(loss: str, mode: str) -> None:
    case = Case(loss, mode)
    sample = cases.make(case)
    with_grad = cases.ours(case, sample).loss
    module = cases.criterion(case, reduction="none").eval()
    with torch.no_grad():
        without = module(sample.query, sample.positive, sample.negatives)
    with torch.inference_mode():
        inference = module(sample.query.clone(), sample.positive.clone(), sample.negatives)
    assert not without.requires_grad
    torch.testing.assert_close(without, with_grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inference.clone(), without, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_tensor_in_two_roles(loss: str) -> None:
    """SimCo without a projector twin: the same embeddings are queries and keys, and both roles' gradients add up."""
    case = Case(loss, "in_batch", temperature=0.5)
    z = cases.make(case).query
    shared = z.clone().requires_grad_()
    cases.criterion(case)(shared, shared).backward()
    sample = cases.Sample(z, z, None)
    exact = cases.truth(case, sample, reduction="mean").gradients
    plain = cases.plain(case, sample, reduction="mean").gradients
    assert shared.grad is not None
    assert_as_exact_as_eager(
        shared.grad, plain["query"] + plain["positive"], exact["query"] + exact["positive"], "gradient of both roles"
    )


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.05, 0.1])
def test_dual_temperature_on_an_orthonormal_batch(temperature: float) -> None:
    """Where the published code, which forms 1 - p, is NaN: a well separated batch of 256."""
    z = torch.eye(256)
    query = z.clone().requires_grad_()
    loss = DualTempInfoNCE(temperature, 1.0)(query, z)
    loss.backward()
    # Literal, every row alike: gap(t) = 1/t - log 255.
    gap, gap_inter = 1 / temperature - math.log(255), 1.0 - math.log(255)

    def softplus(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    log_loss = softplus(gap) - softplus(gap_inter) + math.log(softplus(-gap))
    assert loss.item() == pytest.approx(math.exp(log_loss), rel=1e-5)
    assert query.grad is not None
    assert bool(query.grad.isfinite().all())
    # d loss / d gap(t) = -sigmoid(-gap(T)); off the query's own direction, where normalisation does nothing.
    softmax = 1 / 255
    weight = 1 / (1 + math.exp(gap_inter)) / 256
    assert query.grad[0, 1].item() == pytest.approx(weight / temperature * softmax, rel=1e-5)


def test_infonce_is_cross_entropy() -> None:
    """alpha = K: the value that F.cross_entropy gives, in the layout that MoCo writes."""
    case = Case(alpha=None, n=9, k=33, d=16)
    sample = cases.make(case)
    assert isinstance(sample.negatives, Tensor)
    q, k, queue = (F.normalize(x, dim=1) for x in (sample.query, sample.positive, sample.negatives))
    l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    l_neg = torch.einsum("nc,ck->nk", q, queue.T)
    logits = torch.cat([l_pos, l_neg], dim=1) / case.temperature
    moco = F.cross_entropy(logits, torch.zeros(9, dtype=torch.long))
    torch.testing.assert_close(EqCoLoss(0.2, alpha=33)(sample.query, sample.positive, sample.negatives), moco)


def test_negatives_logsumexp() -> None:
    g = torch.Generator().manual_seed(3)
    for dtype in DTYPES:
        for shape in ((11, 5), (7, 11, 5)):
            query = cases.draw(g, 7, 5, dtype=dtype)
            keys = cases.draw(g, *shape, dtype=dtype)
            query_ids = torch.arange(7) % 4
            key_ids = torch.arange(11) % 6
            for ids in (False, True):
                negatives = oracle.all_places(7, 11)
                if ids:
                    negatives = oracle.without_equal_ids(negatives, query_ids, key_ids)

                def ours(
                    leaf: dict[str, Tensor], ids: bool = ids, a: Tensor = query_ids, b: Tensor = key_ids
                ) -> Tensor:
                    return functional.negatives_logsumexp(
                        leaf["query"],
                        leaf["keys"],
                        temperature=0.7,
                        query_ids=a if ids else None,
                        key_ids=b if ids else None,
                    )

                def exact(leaf: dict[str, Tensor], negatives: oracle.Places = negatives) -> Tensor:
                    return oracle.negatives_logsumexp(leaf["query"], leaf["keys"], negatives, 0.7)

                def plain(leaf: dict[str, Tensor], negatives: oracle.Places = negatives) -> Tensor:
                    q, n = leaf["query"], leaf["keys"]
                    s = q @ n.T if n.ndim == 2 else (n @ q[:, :, None]).squeeze(-1)
                    s = s.to(torch.promote_types(s.dtype, torch.float32))
                    keep = torch.zeros_like(s, dtype=torch.bool)
                    for i, row in enumerate(negatives):
                        keep[i, row] = True
                    return (s / 0.7).masked_fill(~keep, -math.inf).logsumexp(1)

                leaves = {"query": query, "keys": keys}
                exact_leaves = {name: leaf.double() for name, leaf in leaves.items()}
                result = cases.answer(ours, leaves)
                assert result.loss.shape == (7,)
                cases.assert_answers(
                    Case(temperature=0.7), result, cases.answer(plain, leaves), cases.answer(exact, exact_leaves)
                )


@pytest.mark.parametrize("loss", LOSSES)
def test_queue_rows_are_not_normalised_again(loss: str) -> None:
    """`normalize` is about what is handed in; a queue's rows are what they are."""
    queue = MomentumQueue(6, 4)
    queue.enqueue(torch.randn(6, 4))
    queue.contents.mul_(0.5)  # no longer unit: were they normalised again, this would not show
    case = Case(loss, "queue", n=3, d=4)
    sample = cases.Sample(torch.randn(3, 4), torch.randn(3, 4), queue)
    cases.assert_right(case, sample)


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_a_queue_of_another_dtype(dtype: torch.dtype) -> None:
    """A half queue costs half the memory, under float32 queries."""
    queue = MomentumQueue(9, 8, dtype=dtype)
    queue.enqueue(torch.randn(9, 8))
    assert queue.keys.dtype == dtype
    query, positive = torch.randn(4, 8), torch.randn(4, 8)
    case = Case(mode="queue", n=4, d=8)
    sample = cases.Sample(query, positive, queue)
    found, exact = cases.ours(case, sample), cases.truth(case, sample)
    bound = 20 * torch.finfo(torch.float32).eps if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    assert error(found.loss, exact.loss) <= bound * 10
    assert error(found.gradients["query"], exact.gradients["query"]) <= bound * 10


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mode", ["shared", "per_query", "queue"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_mask_leaves_out(loss: str, mode: str, own: bool) -> None:
    """Each query's loss and gradient are those of its remaining negatives alone, whatever the others hold."""
    case = Case(loss, mode, dtype=torch.float64)
    sample = cases.make(case)
    one, queue = cases.criterion(case, reduction="none"), sample.negatives
    slots = queue.contents if isinstance(queue, MomentumQueue) else queue
    assert slots is not None
    mask = torch.rand((case.n, case.k) if own else (case.k,)) < 0.5
    mask[..., 1] = True
    rows = mask.expand(case.n, case.k)
    leaves = {"query": sample.query, "positive": sample.positive}
    if not isinstance(queue, MomentumQueue):
        leaves["negatives"] = slots = slots.masked_fill(
            ~(mask if own and mode == "per_query" else rows.any(0))[..., None], math.nan
        )

    def masked(leaf: dict[str, Tensor]) -> Tensor:
        return one(leaf["query"], leaf["positive"], leaf.get("negatives", queue), negative_mask=mask)

    def alone(leaf: dict[str, Tensor]) -> Tensor:
        found = []
        for i, row in enumerate(rows):
            keys = leaf.get("negatives", slots)
            keys = (keys[i] if keys.dim() == 3 else keys)[row]
            found.append(one(leaf["query"][i : i + 1], leaf["positive"][i : i + 1], keys))
        return torch.cat(found)

    got, expected = cases.answer(masked, leaves), cases.answer(alone, leaves)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-10, atol=0)
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[name], rtol=1e-9, atol=1e-12, msg=name)
    lse = functional.negatives_logsumexp(sample.query, slots, key_mask=mask)
    assert lse.isfinite().all()


def test_the_helper_itself_can_fail() -> None:
    """A test helper that never asserts is the commonest bug of a suite."""
    exact = torch.ones(3, dtype=torch.float64)
    eager = torch.tensor([1.0, 1.0, 1.0 + 1e-6])
    assert_as_exact_as_eager(eager, eager, exact)
    for wrong in (1.0 + 2e-6 * CONSTANT, 1.0 + FLOOR * 1e-6 * CONSTANT, float("nan")):
        with pytest.raises(AssertionError):
            assert_as_exact_as_eager(torch.tensor([1.0, 1.0, wrong]), eager, exact)
    with pytest.raises(AssertionError):
        assert_as_exact_as_eager(torch.ones(2), torch.ones(2), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_of_zeros_is_no_division_by_zero(loss: str, mode: str, dtype: torch.dtype) -> None:
    """A dead embedding has no direction: normalising it must not make the batch's loss or anyone's gradient NaN."""
    case = Case(loss, mode, dtype=dtype)
    sample = cases.make(case)
    sample.query[1] = 0
    sample.positive[2] = 0
    if isinstance(sample.negatives, Tensor):
        sample.negatives[..., 3, :] = 0
    found = cases.ours(case, sample, reduction="mean")
    assert bool(found.loss.isfinite())
    for name, gradient in found.gradients.items():
        assert bool(gradient.isfinite().all()), name
