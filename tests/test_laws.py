"""What must hold for every input: sizes, dtypes, strides and seeds drawn by hypothesis, judged by the one tolerance."""

from dataclasses import replace
from itertools import combinations
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqco_loss import EqCoLoss, MomentumQueue
from tests import cases, knobs, oracle
from tests.cases import DTYPES, Case, Sample
from tests.strategies import LAYOUTS, alphas, case_of, layouts, seeds, temperatures

TENSORS = ("shared", "per_query")
some_alpha = st.floats(1.0, 2.0**20)


@given(case_of(), st.sampled_from(["none", "mean", "sum"]))
@settings(max_examples=200)
def test_every_case_is_the_oracle(case: Case, reduction: str) -> None:
    cases.assert_right(case, reduction=reduction)


@given(case_of(ids=("none",), modes=("shared", "per_query", "queue"), alpha=some_alpha), st.integers(2, 5), seeds)
def test_duplicated_negatives_change_nothing(case: Case, r: int, seed: int) -> None:
    """The law that defines EqCo: each negative r times, alpha given, is the same loss and the same gradients."""
    sample = cases.make(case)
    keys = cases.pool_of(sample)
    assert keys is not None
    k = keys.shape[-2]
    order = torch.randperm(k * r, generator=torch.Generator().manual_seed(seed)) % k  # every key r times, shuffled
    if isinstance(sample.negatives, MomentumQueue):
        queue = MomentumQueue(k * r, case.d, dtype=case.dtype)
        queue.load_state_dict(
            {"contents": keys[order], "cursor": torch.tensor(0), "count": torch.tensor(k * r)}, strict=False
        )
        repeated = replace(sample, negatives=queue)
        found = cases.ours(case, repeated)
    else:
        repeated = replace(sample, negatives=keys[..., order, :])
        found = cases.ours(case, repeated)
        of_copies = found.gradients["negatives"].double()
        shared = torch.zeros(keys.shape, dtype=torch.float64).index_add(keys.ndim - 2, order, of_copies)
        found.gradients["negatives"] = shared.to(case.dtype)
    cases.assert_answers(case, found, cases.plain(case, sample), cases.truth(case, sample))


@given(case_of(ids=("none",), modes=("shared",), losses=("eqco",), alpha=st.none()))
def test_alpha_equal_to_k_is_cross_entropy(case: Case) -> None:
    sample = cases.make(case)

    def cross_entropy(leaf: dict[str, Tensor]) -> Tensor:
        q, p, n = leaf["query"], leaf["positive"], leaf["negatives"]
        if case.normalize:
            q, p, n = (F.normalize(x, dim=-1) for x in (q, p, n))
        logits = torch.cat([torch.linalg.vecdot(q, p)[:, None], q @ n.T], 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / case.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none")

    leaves = cases.leaves_of(sample)
    exact = cases.answer(cross_entropy, {name: leaf.double() for name, leaf in leaves.items()})
    plain = cases.answer(cross_entropy, leaves)
    cases.assert_answers(case, cases.ours(case.but(alpha=float(case.k)), sample), plain, exact)
    cases.assert_answers(case, cases.ours(case, sample), plain, exact)
    cases.assert_answers(
        case, cases.ours(case.but(loss="dual", inter_temperature=case.temperature), sample), plain, exact
    )


@given(case_of(losses=("eqco",)))
def test_equal_temperatures_are_eqco(case: Case) -> None:
    """With t = T the weight is one: InfoNCE, or EqCo where alpha is given."""
    sample = cases.make(case)
    dual = case.but(loss="dual", inter_temperature=case.temperature)
    cases.assert_answers(case, cases.ours(dual, sample), cases.plain(case, sample), cases.truth(case, sample))


@given(case_of(modes=TENSORS), seeds)
def test_order_of_the_negatives_does_not_matter(case: Case, seed: int) -> None:
    sample = cases.make(case)
    assert isinstance(sample.negatives, Tensor)
    order = torch.randperm(case.k, generator=torch.Generator().manual_seed(seed))
    ids = None if sample.negative_ids is None else sample.negative_ids[..., order]
    found = cases.ours(case, replace(sample, negatives=sample.negatives[..., order, :], negative_ids=ids))
    found.gradients["negatives"] = found.gradients["negatives"][..., order.argsort(), :]
    cases.assert_answers(case, found, cases.plain(case, sample), cases.truth(case, sample))


@given(case_of(modes=("in_batch",), ids=("none", "flat")), seeds)
def test_order_of_the_batch_does_not_matter(case: Case, seed: int) -> None:
    sample = cases.make(case)
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(seed))
    ids = None if sample.query_ids is None else sample.query_ids[order]
    shuffled = Sample(sample.query[order], sample.positive[order], None, query_ids=ids)
    back = order.argsort()
    found = cases.ours(case, shuffled, reduction="sum")
    gradients = {name: gradient[back] for name, gradient in found.gradients.items()}
    cases.assert_answers(
        case,
        cases.Answer(found.loss, gradients),
        cases.plain(case, sample, reduction="sum"),
        cases.truth(case, sample, reduction="sum"),
    )


@given(case_of(modes=("in_batch", "rolled", *TENSORS), dtypes=(torch.float64,)), seeds)
def test_joint_rotation_does_not_matter(case: Case, seed: int) -> None:
    sample = cases.make(case)
    g = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(case.d, case.d, generator=g, dtype=torch.float64))
    negatives = sample.negatives @ rotation if isinstance(sample.negatives, Tensor) else None
    rotated = replace(sample, query=sample.query @ rotation, positive=sample.positive @ rotation, negatives=negatives)

    def turned_back(answer: cases.Answer) -> cases.Answer:
        return cases.Answer(answer.loss, {name: gradient @ rotation.T for name, gradient in answer.gradients.items()})

    cases.assert_answers(
        case, turned_back(cases.ours(case, rotated)), turned_back(cases.plain(case, rotated)), cases.truth(case, sample)
    )


@given(case_of(), layouts)
@settings(max_examples=100)
def test_strides_do_not_matter(case: Case, layout: str) -> None:
    sample = cases.make(case)
    cases.assert_answers(
        case, cases.ours(case, sample, layout=LAYOUTS[layout]), cases.plain(case, sample), cases.truth(case, sample)
    )


@given(case_of(dtypes=(torch.float64,)))
def test_gradient_is_bounded_row_by_row(case: Case) -> None:
    """||dL_i/dq_i|| <= (2/t)(1 - p_i) for a unit query in the query's role; p_i at the inter temperature for dual."""
    sample = cases.make(case)
    query = oracle.unit(sample.query).requires_grad_()
    loss = cases.criterion(case, reduction="sum")(query, sample.positive, sample.negatives, **sample.ids())
    loss.backward()
    bound = cases.exact_rows(case, replace(sample, query=query.detach())).gradient_norm_bound
    assert query.grad is not None
    assert bool((query.grad.norm(dim=1) <= bound * (1 + 1e-12) + 1e-300).all())


@given(
    case_of(),
    st.sampled_from(["positive", "opposite", "negatives equal the query", "duplicate keys", "all of one point"]),
)
@settings(max_examples=200)
def test_finite_and_right_at_the_extremes(case: Case, extreme: str) -> None:
    """t from 0.01 to 1, alpha to 2^20, every dtype, with positives saturated and keys repeated."""
    sample = cases.make(case)
    tensors = isinstance(sample.negatives, Tensor)
    if extreme == "positive":
        sample = replace(sample, positive=sample.query.clone())
    elif extreme == "opposite":
        sample = replace(sample, positive=-sample.query)
    elif extreme == "negatives equal the query" and isinstance(sample.negatives, Tensor):
        hard = sample.negatives.clone()
        hard[..., 0, :] = sample.query[0]
        sample = replace(sample, negatives=hard)
    elif extreme == "duplicate keys" and isinstance(sample.negatives, Tensor):
        sample = replace(sample, negatives=sample.negatives[..., :1, :].expand_as(sample.negatives).contiguous())
    else:
        one = sample.query[:1]
        negatives = (
            one.expand(sample.negatives.shape).contiguous()
            if isinstance(sample.negatives, Tensor)
            else sample.negatives
        )
        sample = replace(
            sample, query=one.expand_as(sample.query).contiguous(), positive=one.expand_as(sample.query).contiguous()
        )
        sample = replace(sample, negatives=negatives)
    assert tensors == isinstance(sample.negatives, Tensor)
    found = cases.ours(case, sample)
    assert bool(found.loss.isfinite().all())
    assert bool((found.loss >= 0).all())
    for name, gradient in found.gradients.items():
        assert bool(gradient.isfinite().all()), name
    metrics = cases.criterion(case).with_metrics(sample.query, sample.positive, sample.negatives, **sample.ids())
    for name, value in metrics._asdict().items():
        assert bool(value.isfinite()), name
    cases.assert_right(case, sample, cancelling=True)


@given(case_of(modes=("in_batch", "rolled"), ids=("none",)))
def test_in_batch_and_rolled_are_explicit_negatives(case: Case) -> None:
    """The batch's keys, written out as (N, K, D), give the same loss and, through the indexing, the same gradients."""
    sample = cases.make(case)
    index = torch.tensor(cases.places(case, sample))

    def explicit(leaf: dict[str, Tensor]) -> Tensor:
        loss: Tensor = cases.criterion(case.but(mode="per_query"), reduction="none")(
            leaf["query"], leaf["positive"], leaf["positive"][index]
        )
        return loss

    double = case.but(dtype=torch.float64)  # autograd adds the many gradients of one key in the keys' own dtype
    sample = replace(sample, query=sample.query.double(), positive=sample.positive.double())
    found = cases.answer(explicit, cases.leaves_of(sample))
    cases.assert_answers(case, found, cases.plain(double, sample), cases.truth(double, sample))
    cases.assert_answers(case, cases.ours(double, sample), cases.plain(double, sample), cases.truth(double, sample))


@given(case_of(modes=("in_batch",), ids=("none",)))
def test_ids_on_the_diagonal_are_the_batch_without_itself(case: Case) -> None:
    """The batch's keys as a shared set, with every row's own key excluded by its id."""
    sample = cases.make(case)
    ids = torch.arange(case.n) * 3 - 7  # ids are any integers

    def explicit(leaf: dict[str, Tensor]) -> Tensor:
        loss: Tensor = cases.criterion(case.but(mode="shared"), reduction="none")(
            leaf["query"], leaf["positive"], leaf["positive"], query_ids=ids, negative_ids=ids
        )
        return loss

    cases.assert_answers(
        case, cases.answer(explicit, cases.leaves_of(sample)), cases.plain(case, sample), cases.truth(case, sample)
    )


@given(case_of(ids=("flat", "matrix"), modes=("shared", "per_query", "queue")))
def test_a_left_out_negative_may_be_anything(case: Case) -> None:
    """What is excluded for every query changes nothing, however large, and gets no gradient."""
    sample = cases.make(case)
    if not isinstance(sample.negatives, Tensor):
        return
    query_ids = torch.zeros(case.n, dtype=torch.long)
    negative_ids = torch.zeros(sample.negative_ids.shape, dtype=torch.long) if sample.negative_ids is not None else None
    assert negative_ids is not None
    negative_ids[..., 0] = 1
    negative_ids[..., -1] = 1
    near = replace(sample, query_ids=query_ids, negative_ids=negative_ids)
    far = sample.negatives.clone()
    far[..., 1:-1, :] = 1000.0 if not case.normalize else sample.query[0]
    wild = replace(near, negatives=far)
    cases.assert_right(case, near)
    before, after = cases.ours(case, near), cases.ours(case, wild)
    torch.testing.assert_close(before.loss, after.loss)
    assert not bool(after.gradients["negatives"][..., 1:-1, :].any())


@given(
    case_of(rows=(3, 40), keys=(6, 60)),
    st.integers(1, 300),
    st.booleans(),
)
@settings(max_examples=150)
def test_block_size_does_not_matter(case: Case, tile: int, flash: bool) -> None:
    """Tiles from one similarity up, ragged in both directions; with torch's flash attention or without it."""
    sample = cases.make(case)
    with knobs.tiles(tile, flash=flash):
        found = cases.ours(case, sample)
    cases.assert_answers(case, found, cases.plain(case, sample), cases.truth(case, sample))


@given(
    case_of(modes=("rolled",), rows=(130, 330), keys=(2, 70), features=(2, 8)), st.sampled_from([50, 1000, 5000, 2**21])
)
@settings(max_examples=12)
def test_a_narrow_band_of_a_large_batch(case: Case, tile: int) -> None:
    """K far below N, where a backend may visit only the band; N is no multiple of anything."""
    sample = cases.make(case)
    with knobs.tiles(tile):
        found = cases.ours(case, sample)
    cases.assert_answers(case, found, cases.plain(case, sample), cases.truth(case, sample))


@given(case_of(losses=("eqco", "dual"), ids=("none", "flat")))
def test_learned_temperature(case: Case) -> None:
    cases.assert_right(case, learn_temperature=True)


# ------------------------------------------------------------------------------------- random draws of the batch's keys


def who_was_drawn(n: int, k: int, seed: int) -> oracle.Places:
    """The draw behind a seed, off the gradients: with keys along the axes, a query's is nonzero where it met a key."""
    query = torch.full((n, n), 1.0 / n).requires_grad_()
    torch.manual_seed(seed)
    EqCoLoss(1.0, alpha=None, num_negatives=k, sampling="random", normalize=False, reduction="sum")(
        query, torch.eye(n)
    ).backward()
    assert query.grad is not None
    return [[j for j in range(n) if query.grad[i, j] > 0] for i in range(n)]  # the positive's own entry is below zero


@given(st.integers(2, 40), st.integers(1, 45), seeds)
def test_random_draws_k_others_without_replacement(n: int, k: int, seed: int) -> None:
    drawn = who_was_drawn(n, k, seed)
    assert [len(row) for row in drawn] == [min(k, n - 1)] * n
    assert all(i not in row for i, row in enumerate(drawn))
    assert drawn == who_was_drawn(n, k, seed), "torch.manual_seed makes it reproducible"


@given(case_of(modes=("in_batch",), ids=("none", "flat"), rows=(8, 60)), st.integers(2, 70), st.booleans())
@settings(max_examples=100)
def test_random_is_right_for_what_it_drew(case: Case, k: int, tiny_tiles: bool) -> None:
    """Loss, gradients and K_i are the oracle's for the drawn keys; ids then drop further pairs."""
    sample = cases.make(case)
    drawn = who_was_drawn(case.n, k, case.seed)
    kept = drawn
    if sample.query_ids is not None:
        kept = oracle.without_equal_ids(drawn, sample.query_ids, sample.query_ids)
    make = cases.criterion(case, num_negatives=k, sampling="random", reduction="none")

    def ours(leaf: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(case.seed)
        with knobs.tiles(100 if tiny_tiles else None):
            loss: Tensor = make(leaf["query"], leaf["positive"], query_ids=sample.query_ids)
        return loss

    leaves = cases.leaves_of(sample)
    if any(not row for row in kept):
        with pytest.raises(ValueError, match="negative"):
            ours(leaves)
        return
    with mock.patch.object(cases, "places", return_value=kept):
        plain, exact = cases.plain(case, sample), cases.truth(case, sample)
    cases.assert_answers(case, cases.answer(ours, leaves), plain, exact)


def chi_square(counts: Tensor, expected: float) -> float:
    return float(((counts - expected).square() / expected).sum())


@pytest.mark.parametrize(
    ("n", "single_limit", "joint_limit"),
    [(5, 52.6, 66.6), (6, 91.9, 148.2)],  # the 99.9 % points of chi-square; K^2 on either side of N - 1
)
def test_random_is_uniform_and_independent_between_queries(n: int, single_limit: float, joint_limit: float) -> None:
    """K = 2: how often each query met each pair of keys, and each two queries' pairs (SiMo's code shares one draw)."""
    subsets = {pair: code for code, pair in enumerate(combinations(range(n - 1), 2))}
    cells, draws = len(subsets), 900
    single, joint = torch.zeros(n, cells), torch.zeros(cells, cells)
    for seed in range(draws):
        drawn = who_was_drawn(n, 2, seed)
        relative = [sorted((j - i - 1) % n for j in row) for i, row in enumerate(drawn)]
        codes = [subsets[row[0], row[1]] for row in relative]
        single[range(n), codes] += 1
        joint[codes[0], codes[1]] += 1
    assert chi_square(single, draws / cells) < single_limit
    assert chi_square(joint, draws / cells**2) < joint_limit


def test_random_draws_anew_at_every_call() -> None:
    z = torch.randn(32, 8)
    criterion = EqCoLoss(num_negatives=4, sampling="random")
    assert len({criterion(z, z + 0.1).item() for _ in range(8)}) == 8
    torch.manual_seed(7)
    first = [criterion(z, z + 0.1).item() for _ in range(3)]
    torch.manual_seed(7)
    assert first == [criterion(z, z + 0.1).item() for _ in range(3)]


def test_rolled_draws_nothing() -> None:
    z = torch.randn(32, 8)
    state = torch.get_rng_state()
    EqCoLoss(num_negatives=4)(z, z + 0.1)
    EqCoLoss()(z, z + 0.1)
    assert torch.equal(state, torch.get_rng_state())


@given(case_of(modes=("in_batch",), ids=("none", "flat")), st.integers(0, 3), st.sampled_from(["rolled", "random"]))
def test_more_negatives_than_others_means_all_of_them(case: Case, extra: int, sampling: str) -> None:
    """Fewer others than K: all are used, and the margin follows K_i."""
    sample = cases.make(case)

    def all_of_them(leaf: dict[str, Tensor]) -> Tensor:
        criterion = cases.criterion(case, num_negatives=case.n - 1 + extra, sampling=sampling, reduction="none")
        loss: Tensor = criterion(leaf["query"], leaf["positive"], query_ids=sample.query_ids)
        return loss

    found = cases.answer(all_of_them, cases.leaves_of(sample))
    cases.assert_answers(case, found, cases.plain(case, sample), cases.truth(case, sample))


@given(temperatures, alphas, st.sampled_from(DTYPES), seeds)
def test_loss_falls_as_the_positive_approaches(
    temperature: float, alpha: float | None, dtype: torch.dtype, seed: int
) -> None:
    """Monotone in the positive's similarity; and larger for a larger alpha."""
    g = torch.Generator().manual_seed(seed)
    q, n = oracle.unit(cases.draw(g, 1, 8, dtype=torch.float64)), oracle.unit(cases.draw(g, 20, 8, dtype=torch.float64))
    side = cases.draw(g, 1, 8, dtype=torch.float64)
    side = oracle.unit(side - (side * q).sum() * q)
    losses = torch.stack(
        [
            EqCoLoss(temperature, alpha=alpha)(
                (q).to(dtype), (c * q + (1 - c * c) ** 0.5 * side).to(dtype), n.to(dtype)
            )
            for c in (-1.0, -0.5, 0.0, 0.5, 1.0)
        ]
    )
    assert bool((losses.diff() <= 0).all())
    larger = EqCoLoss(temperature, alpha=(alpha or 20.0) * 2)(q.to(dtype), side.to(dtype), n.to(dtype))
    assert larger >= EqCoLoss(temperature, alpha=alpha)(q.to(dtype), side.to(dtype), n.to(dtype))
