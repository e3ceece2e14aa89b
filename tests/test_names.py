"""Arguments that are none of ours: the error says which was meant, or what to write instead."""

import inspect
import re
from typing import Any

import pytest
import torch

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, functional, momentum_update
from eqco_loss._names import OF_A_CALL, OF_A_LOSS, OTHER_NAMES
from eqco_loss.settings import Inputs, Settings
from tests.test_errors import IDS, KEYS, D, Q, rows


@pytest.mark.parametrize(
    ("make", "keywords", "way_out"),
    [
        (EqCoLoss, {"tau": 0.07}, "Write temperature=."),
        (EqCoLoss, {"temp": 0.07}, "Write temperature=."),
        (EqCoLoss, {"T": 0.07}, "Write temperature=."),
        (EqCoLoss, {"Temperature": 0.07}, "Write temperature=."),
        (EqCoLoss, {"temprature": 0.07}, "Write temperature=."),
        (EqCoLoss, {"K": 16}, "Write num_negatives=."),
        (EqCoLoss, {"alpha": 256, "n_negatives": 16}, "Write num_negatives=."),
        (EqCoLoss, {"bank": KEYS}, "negative_keys belongs in the call: criterion(query, positive_key, negative_keys="),
        (EqCoLoss, {"query_ids": IDS}, "query_ids belongs in the call: criterion(query, positive_key, query_ids=...)."),
        (EqCoLoss, {"labels": IDS}, "query_ids belongs in the call"),
        (EqCoLoss, {"gather_distributed": True}, "Write gather=."),
        (EqCoLoss, {"weights": rows()}, 'give reduction="none", and weigh the loss of each.'),
        (EqCoLoss, {"inter_temperature": 1.0}, "DualTempInfoNCE has two temperatures."),
        (EqCoLoss, {"colour": "red"}, "help(EqCoLoss) tells what each does."),
        (DualTempInfoNCE, {"tau": 0.1}, "Write temperature=."),
        (DualTempInfoNCE, {"T": 1.0}, "Write inter_temperature=."),
        (DualTempInfoNCE, {"inter_temp": 1.0}, "Write inter_temperature=."),
        (MomentumQueue, {"K": 5, "dim": D}, "Write size=."),
        (MomentumQueue, {"size": 5, "feature_dim": D}, "Write dim=."),
        (MomentumQueue, {"size": 5, "dim": D, "ids": True}, "Write store_ids=."),
        (MomentumQueue, {"size": 5, "dim": D, "momentum": 0.999}, "help(MomentumQueue) tells what each does."),
        (DualTempInfoNCE, {"intra_temperature": 0.1}, "Write temperature=."),
        (EqCoLoss, {"logit_scale": 2.66}, "goes to eqco_loss.functional: temperature=(-scale).exp()."),
        (momentum_update, {"encoder_q": Q, "encoder_k": Q}, "Write query_encoder=."),
        (momentum_update, {"m": 0.99}, "Write momentum=."),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else ", ".join(value)),
)
def test_a_keyword_of_another_name_is_told_ours(make: Any, keywords: dict[str, Any], way_out: str) -> None:
    """The class, what it has, and what was meant."""
    known = list(inspect.signature(make).parameters)
    wrong = next(name for name in keywords if name not in known)
    with pytest.raises(TypeError) as caught:
        make(**keywords)
    listed = ", ".join(name for name in known if name != "positional")
    start = f"{wrong}: expected an argument of {make.__name__} ({listed}), got {wrong!r}. "
    assert str(caught.value).startswith(start)
    assert way_out in str(caught.value).removeprefix(start)


@pytest.mark.parametrize(
    ("keywords", "way_out"),
    [
        ({"labels": IDS}, "Write query_ids=."),
        ({"target": IDS}, "Write query_ids=."),
        ({"queue": KEYS}, "Write negative_keys=."),
        ({"mask": IDS}, "Write negative_mask=."),
        ({"tau": 0.1}, "temperature belongs in the constructor: EqCoLoss(temperature=...)."),
        ({"K": 16}, "num_negatives belongs in the constructor: EqCoLoss(num_negatives=...)."),
        ({"weight": Q}, 'give reduction="none", and weigh the loss of each.'),
    ],
    ids=str,
)
def test_a_call_tells_ours_too(keywords: dict[str, Any], way_out: str) -> None:
    criterion: Any = EqCoLoss()
    for call in (criterion, criterion.with_metrics, criterion.chosen_backend):
        with pytest.raises(TypeError, match=f"^{next(iter(keywords))}: expected an argument of ") as caught:
            call(Q, Q, **keywords)
        assert str(caught.value).endswith(way_out)


def test_both_views_in_one_batch_are_told_apart() -> None:
    criterion: Any = EqCoLoss()
    function: Any = functional.eqco_loss
    for call in (criterion, criterion.with_metrics, criterion.chosen_backend, function):
        with pytest.raises(TypeError, match=r"^positive_key: expected the second view .* embeddings\.chunk\(2\);"):
            call(torch.cat([Q, Q]))
        query, positive_key = torch.cat([Q, KEYS[: len(Q)]]).chunk(2)
        call(query, positive_key)


def test_a_function_tells_ours_too() -> None:
    function: Any = functional.eqco_loss
    with pytest.raises(TypeError, match=r"^tau: expected an argument of eqco_loss .* Write temperature=\.$"):
        function(Q, Q, tau=0.1)
    lse: Any = functional.negatives_logsumexp
    for name, ours in (("mask", "key_mask"), ("negative_mask", "key_mask"), ("negative_keys", "keys"), ("t", "temp")):
        with pytest.raises(TypeError, match=rf"^{name}: expected an argument of negatives_logsumexp .* Write {ours}"):
            lse(Q, **({} if ours == "keys" else {"keys": KEYS}), **{name: KEYS})
    with pytest.raises(TypeError, match=r"^keys: .* got MomentumQueue\. Give what it holds: queue\.keys\.$"):
        lse(Q, MomentumQueue(8, D))


def test_other_names_are_of_arguments_that_there_are() -> None:
    makes = (EqCoLoss, DualTempInfoNCE, MomentumQueue, momentum_update)
    known = {name for make in makes for name in inspect.signature(make).parameters}
    of_lse = set(inspect.signature(functional.negatives_logsumexp).parameters)
    assert {name for names in OTHER_NAMES.values() for name in names} <= known | set(OF_A_CALL) | of_lse
    assert not known & OTHER_NAMES.keys()
    assert set(OF_A_CALL) == set(Inputs._fields)
    assert set(OF_A_LOSS) == set(Settings._fields)


def test_wrong_names_are_the_type_checkers_to_find_and_show_no_private_name() -> None:
    """An ignored error that mypy does not find is an error."""
    criterion = EqCoLoss()
    for wrong in (
        lambda: EqCoLoss(tau=0.07),  # type: ignore[call-arg]
        lambda: DualTempInfoNCE(tau=0.07),  # type: ignore[call-arg]
        lambda: MomentumQueue(K=5, dim=D),  # type: ignore[call-arg]
        lambda: functional.eqco_loss(Q, Q, weights=Q),  # type: ignore[call-arg]
        lambda: criterion(Q, Q, weights=Q),  # type: ignore[call-arg]
        lambda: criterion.with_metrics(Q, Q, weights=Q),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError) as caught:
            wrong()
        assert re.search(r"tau|K|weights", str(caught.value))
        assert not re.search(r"\b_[A-Z]", str(caught.value))
