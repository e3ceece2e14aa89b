"""Every check and every message: the argument, what was expected, what came, and the way out."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ._names import TO_THE_CALL
from .distributed import check_gather
from .ops import observers
from .queue import FLOATS, INTEGERS, MomentumQueue, check_dense
from .settings import Backend, InBatch, Inputs, Reduction, Sampling, Settings

BACKENDS, IN_BATCH, REDUCTIONS, SAMPLINGS = (get_args(each) for each in (Backend, InBatch, Reduction, Sampling))
LARGEST = 1e38  # float32 ends at 3.4e38
LEAST_TEMPERATURE = 1e-37  # logits of unit rows, log2(e) / t, are then numbers of float32

Shapes = tuple[tuple[int, ...], ...]  # those that an argument may have


def lasting_temperature(value: Any) -> None:
    """A temperature that a module keeps for all its calls."""
    if isinstance(value, Tensor) and value.grad_fn is not None:
        raise ValueError(
            "temperature: expected a number, an nn.Parameter or a tensor that was not computed from one, got "
            f"{value.grad_fn.name()}'s result, whose graph is gone after the first backward. Compute it in each step: "
            "eqco_loss.functional.eqco_loss(query, positive_key, temperature=(-scale).exp()), or detach() it."
        )


def settings(chosen: Any) -> None:
    """What a loss was constructed with; ``chosen`` has the fields of ``settings.Settings``."""
    temperature(chosen.temperature)
    if chosen.inter_temperature is not None:
        inter_temperature(chosen.inter_temperature)
    if chosen.alpha is not None:
        positive_number(
            "alpha",
            chosen.alpha,
            "Give the number of negatives to mimic (65536 for MoCo's queue), or None for as many as there are.",
        )
    k, integer = chosen.num_negatives, numbers.Integral  # NumPy's too
    if k is not None and (isinstance(k, bool) or not isinstance(k, integer) or k < 1):
        raise ValueError(
            f"num_negatives: expected an integer >= 1 or None, got {k!r}. None takes every other key of the batch; 16 "
            f"is the SiMo paper's choice."
        )
    one_of("sampling", chosen.sampling, SAMPLINGS)
    if chosen.in_batch is not None:
        one_of("in_batch", chosen.in_batch, IN_BATCH)
    if not isinstance(chosen.symmetric, bool):
        raise TypeError(
            f"symmetric: expected True or False, got {chosen.symmetric!r}. True is the mean of both directions."
        )
    check_gather(chosen.gather)
    if not isinstance(chosen.normalize, bool):
        raise TypeError(
            f"normalize: expected True or False, got {chosen.normalize!r}. True is cosine similarity, False takes "
            f"embeddings as they are."
        )
    one_of("reduction", chosen.reduction, REDUCTIONS)
    one_of("backend", chosen.backend, BACKENDS)


def inter_temperature(value: Any) -> None:
    if isinstance(value, Tensor):
        raise TypeError(
            "inter_temperature: expected a number > 0, got a tensor. The dual-temperature weight is detached, so no "
            "gradient reaches it: pass float(inter_temperature)."
        )
    positive_number("inter_temperature", value, "The paper uses 1.0.", LEAST_TEMPERATURE)


def positive_number(name: str, value: Any, advice: str, least: float = 0.0) -> None:
    _number(name, value, "a positive number", advice)
    if not least < (value if isinstance(value, int) else float(value)) < LARGEST:  # NumPy's halves hold no bound
        bounds = f"between {least:g} and {LARGEST:g}"
        raise ValueError(f"{name}: expected a finite number > 0, {bounds}, got {value!r}. {advice}")


def _number(name: str, value: Any, expected: str, advice: str) -> None:
    real: type[Any] = numbers.Real  # NumPy's too
    if isinstance(value, bool) or not isinstance(value, real):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}. {advice}")


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value.lower(), known, n=1) if isinstance(value, str) else []
        way = f"Write {near[0]!r}." if near else "Pick one of these."
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}. {way}")


def temperature(value: Any) -> None:
    advice = "Papers use 0.05 to 0.5 (SiMo and MoCo v2: 0.2)."
    if not isinstance(value, Tensor):
        advice += " A learned one is a 0-dim tensor that requires a gradient."
        positive_number("temperature", value, advice, LEAST_TEMPERATURE)
        return
    if value.dim() != 0 or not value.is_floating_point():
        raise ValueError(
            f"temperature: expected a number or a 0-dim floating-point tensor, got shape {tuple(value.shape)}, "
            f"{value.dtype}. "
            + ("Use temperature.squeeze().float(), or one loss per temperature." if value.dim() < 2 else TO_THE_CALL)
        )
    # A device's value would have to be waited for, and a traced, mapped or fake one is not to be had.
    if value.device.type == "cpu" and not observers.looked_on() and not 0 < float(value.detach()) < float("inf"):
        raise ValueError(
            f"temperature: expected a finite value > 0, got a tensor of {float(value.detach())!r}. {advice} "
            "A learned one stays positive as log_t.exp(), of CLIP's scale, log(1 / t), as (-scale).exp()."
        )


def embeddings(query: Any, positive_key: Any, negative_keys: Any) -> None:
    """Shapes, dtypes and devices of one call; ``negative_keys`` is a tensor or None here."""
    for name, x in (("query", query), ("positive_key", positive_key)):
        _tensor(name, x)
        if x.dim() != 2:
            raise ValueError(
                f"{name}: expected shape (N, D), one embedding a row, got {tuple(x.shape)}. {_rows_way_out(name, x)}"
            )
        if x.shape[1] == 0:
            raise ValueError(
                f"{name}: expected at least one feature (D >= 1), got {tuple(x.shape)}. Check the projection head's "
                f"output."
            )
        if x.shape[0] == 0:
            raise ValueError(
                f"{name}: expected at least one row (N >= 1), got {tuple(x.shape)}. Skip empty batches "
                f"(drop_last=True in the loader)."
            )
    if positive_key.shape != query.shape:
        raise ValueError(
            f"positive_key: expected the shape of query, {tuple(query.shape)}, since row i is query i's positive, got "
            f"{tuple(positive_key.shape)}. Encode both views of the same images"
            f"{'' if positive_key.shape[1] == query.shape[1] else ' with heads of the same width'}."
        )
    _alike("positive_key", positive_key, query)
    if negative_keys is not None:
        n, d = query.shape
        _tensor("negative_keys", negative_keys)
        if not _are_keys(negative_keys, n, d):
            raise ValueError(
                f"negative_keys: expected (K, D) shared by all queries or (N, K, D) per query, here D = {d} and N = "
                f"{n}, got {tuple(negative_keys.shape)}. {_keys_way_out('negative_keys', negative_keys, n, d)}"
            )
        if negative_keys.shape[-2] == 0:
            raise ValueError(
                f"negative_keys: expected at least one key (K >= 1), got {tuple(negative_keys.shape)}. Leave it out "
                f"to use the batch's other keys."
            )
        _alike("negative_keys", negative_keys, query, dtype=False)


def _are_keys(keys: Tensor, n: int, d: int) -> bool:
    """Whether they are (K, d) or (n, K, d)."""
    return keys.dim() in (2, 3) and keys.shape[-1] == d and keys.shape[:-2] in ((), (n,))


def _keys_way_out(name: str, keys: Tensor, n: int, d: int) -> str:
    """How keys of another shape become (K, D) or (N, K, D). A reshape would scramble them without a word."""
    if keys.dim() == 2 and keys.shape[0] == d:
        return "MoCo keeps its queue as (D, K): pass queue.T."
    if keys.dim() == 3 and keys.shape[:2] == (n, d):
        return f"These lie as (N, D, K): pass {name}.transpose(1, 2)."
    return "Give each key a row of the query's width, and of (N, K, D) one set to each query."


def _rows_way_out(name: str, x: Tensor) -> str:
    """How embeddings of another number of dimensions become rows."""
    if x.dim() < 2:
        return "Give a batch of embeddings: x.flatten(1) of feature maps, torch.stack of single embeddings."
    if x.dim() > 3:
        return "Flatten feature maps with x.flatten(1), or pool them: x.mean((2, 3))."
    if name == "query":
        return (
            "Two views of each image, (N, 2, D), are query, positive_key = x.unbind(1); tokens become rows by "
            "x.flatten(0, 1), their positives alike; feature maps by x.flatten(1)."
        )
    n, p = x.shape[:2]
    return (
        f"Each row has one positive. For {p} positives a query, repeat the query: criterion(query.repeat_interleave({p}"
        f", 0), positive_key.flatten(0, 1), query_ids=torch.arange({n}, device=query.device).repeat_interleave({p})), "
        "whose ids keep a query's positives from being its negatives."
    )


def settings_and_embeddings(chosen: Settings, given: Inputs) -> None:
    """What the choice of a backend rests on."""
    settings(chosen)
    stored = isinstance(given.negative_keys, MomentumQueue)
    embeddings(given.query, given.positive_key, None if stored else given.negative_keys)


def call(chosen: Settings, given: Inputs) -> None:
    """One call of a loss, whose arguments may be anything yet."""
    reverse_mode()
    settings_and_embeddings(chosen, given)
    query, negative_keys = given.query, given.negative_keys
    temperature_device(chosen.temperature, query)
    k = chosen.num_negatives
    if negative_keys is not None and k is not None:
        raise ValueError(
            f"num_negatives: expected None when negative_keys is given, got {k}. It chooses among the batch's own "
            "keys: leave negative_keys out, or pass only the keys you want (negative_keys[:K])."
        )
    if negative_keys is not None and chosen.symmetric:
        raise ValueError(
            "symmetric: expected False when negative_keys is given, got True. Each direction has negatives of its own: "
            "0.5 * (criterion(q1, k2, negatives_2) + criterion(q2, k1, negatives_1))."
        )
    if chosen.in_batch == "views" and k is not None and k % 2:
        raise ValueError(
            f'num_negatives: expected an even number with in_batch="views", got {k}. Both views of the next K/2 images '
            f"are taken: use {k + 1}."
        )
    if isinstance(negative_keys, MomentumQueue):
        queue(negative_keys, query)
    ids(given)
    mask(given)
    if chosen.gather is False and negative_keys is None:
        others(query.shape[0], query)


def reverse_mode() -> None:
    if observers.in_forward_mode():
        raise NotImplementedError(
            "eqco_loss: expected reverse-mode differentiation, got forward mode (torch.func.jvp, forward_ad), which an "
            "operator cannot serve and would take for 0. Use torch.autograd.grad, with create_graph=True for more."
        )
    if observers.is_traced():
        raise NotImplementedError(
            "eqco_loss: expected a call outside torch.jit.trace, which would keep this batch's result as a constant. "
            "Use torch.compile, or torch.export.export."
        )
    if observers.is_transformed_by_grad():
        raise NotImplementedError(
            "eqco_loss: expected a call outside torch.func.grad, vjp and jacrev, whose transform an operator cannot "
            "serve. Use torch.autograd.grad(loss, inputs), with create_graph=True for more."
        )


def others(rows: int, query: Tensor) -> None:
    if rows == 1:
        raise ValueError(
            f"query: expected at least 2 rows when the negatives are the batch's other keys, got {tuple(query.shape)}, "
            "which leaves none. Use a larger batch (drop_last=True in the loader), or pass negative_keys."
        )


def queue(stored: Any, query: Tensor) -> None:
    contents = stored.contents
    if contents.shape[1] != query.shape[1]:
        raise ValueError(
            f"negative_keys: expected a MomentumQueue of dim {query.shape[1]}, the width of query "
            f"{tuple(query.shape)}, got dim {contents.shape[1]}. "
            f"Construct it as MomentumQueue({contents.shape[0]}, {query.shape[1]})."
        )
    if not stored.primed:
        raise ValueError(
            "negative_keys: expected a MomentumQueue that holds keys, got an empty one. Prime it with a batch's keys "
            "before the loop: queue.enqueue(key_encoder(images))."
        )
    _alike("negative_keys", contents, query, dtype=False, advice="Move the queue with queue.to(device).")


def ids(given: Inputs) -> None:
    query, negatives, query_ids, negative_ids = given.query, given.negative_keys, given.query_ids, given.negative_ids
    if negative_ids is not None and not isinstance(negatives, Tensor):
        way = (
            "In a batch query_ids serve both sides"
            if negatives is None
            else "A queue uses the ids it stored (store_ids=True)"
        )
        raise ValueError(
            f"negative_ids: expected None unless negative_keys is a tensor, got one. {way}: leave negative_ids out."
        )
    if query_ids is None:
        if isinstance(negatives, MomentumQueue) and negatives.slot_ids is not None:
            raise ValueError(
                "query_ids: expected integers of shape (N,) with a MomentumQueue that stores ids, got None. "
                "Pass the ids of the queries, or construct the queue with store_ids=False."
            )
        if negative_ids is not None:
            raise ValueError(
                "query_ids: expected integers of shape (N,) beside negative_ids, got None. Pass both, or neither."
            )
        return
    _ids("query_ids", query_ids, ((query.shape[0],),), query)
    if isinstance(negatives, MomentumQueue) and negatives.slot_ids is None:
        raise ValueError(
            "query_ids: expected None with a MomentumQueue that stores no ids, got ids. "
            "Construct it with store_ids=True and pass ids to enqueue, or leave query_ids out."
        )
    if isinstance(negatives, Tensor):
        if negative_ids is None:
            raise ValueError(
                "negative_ids: expected integers of shape (K,) or (N, K) beside query_ids, got None. Pass both, or "
                "neither."
            )
        _ids("negative_ids", negative_ids, _shared_or_own(query, negatives), query)


def mask(given: Inputs) -> None:
    if given.negative_mask is None:
        return
    if given.negative_keys is None:
        raise ValueError(
            "negative_mask: expected None without negative_keys, got one. It says which of negative_keys are "
            "negatives. In a batch query_ids say it: a negative with the query's id is left out."
        )
    if isinstance(given.negative_keys, MomentumQueue):
        shapes, keys = _shared_or_own(given.query, given.negative_keys.contents), "slot of queue.contents"
    else:
        shapes, keys = _shared_or_own(given.query, given.negative_keys), "key"
    _mask("negative_mask", given.negative_mask, shapes, given.query, keys)


def _shared_or_own(query: Tensor, keys: Tensor) -> Shapes:
    """(K,), for all queries, or (N, K), for each its own."""
    n, k = query.shape[0], keys.shape[-2]
    return (k,), (n, k)


def temperature_device(value: Any, query: Tensor) -> None:
    """A learned temperature of another device would have to be waited for."""
    if isinstance(value, Tensor) and value.device != query.device:
        raise ValueError(
            f"temperature: expected a tensor on the query's device, {query.device}, got one on {value.device}. "
            "Move it: temperature.to(query.device)."
        )


def logsumexp_inputs(query: Any, keys: Any, *, query_ids: Any, key_ids: Any, key_mask: Any) -> None:
    """What ``functional.negatives_logsumexp`` is called with."""
    for name, x in (("query", query), ("keys", keys)):
        _tensor(name, x)
    if query.dim() != 2 or 0 in query.shape:
        raise ValueError(
            f"query: expected shape (N, D) with N, D >= 1, got {tuple(query.shape)}. Flatten feature maps with "
            f"query.flatten(1)."
        )
    n, d = query.shape
    if not _are_keys(keys, n, d) or keys.shape[-2] == 0:
        raise ValueError(
            f"keys: expected (K, D) or (N, K, D) with K >= 1, here D = {d} and N = {n}, got {tuple(keys.shape)}. "
            f"{_keys_way_out('keys', keys, n, d)}"
        )
    _alike("keys", keys, query, dtype=False)
    if (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids, key_ids: expected both or neither, got one. Pass both, or neither.")
    if query_ids is not None:
        _ids("query_ids", query_ids, ((n,),), query)
        _ids("key_ids", key_ids, _shared_or_own(query, keys), query)
    if key_mask is not None:
        _mask("key_mask", key_mask, _shared_or_own(query, keys), query, "key")


def cosine_momentum(step: Any, total_steps: Any, base: Any, final: Any) -> None:
    for name, value in (("step", step), ("total_steps", total_steps), ("base", base), ("final", final)):
        _number(name, value, "a number", "Steps are those of the optimiser, momenta from 0 to 1.")
    if not (step >= 0 and total_steps >= 1):
        raise ValueError(
            f"step, total_steps: expected step >= 0 and total_steps >= 1, got {step!r} and {total_steps!r}. Count "
            f"optimiser steps from 0."
        )
    for name, value in (("base", base), ("final", final)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a momentum between 0 and 1, got {value!r}. BYOL rises from 0.996 to 1.")


def _mask(name: str, value: Any, shapes: Shapes, query: Tensor, keys: str) -> None:
    """``keys`` is what each of its places stands for."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a bool tensor of shape {_either(shapes)}, got {type(value).__name__}. Wrap it: "
            f"torch.tensor({name})."
        )
    check_dense(name, value)
    if value.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected bool, True where a {keys} is a negative of the query, got {value.dtype}. Of ones and "
            f"zeros it is {name}.bool(), of 0 and -inf, as they are added to logits, {name} == 0."
        )
    way = "for all queries or in a row for each; the batch's own keys are left out by query_ids."
    _fits(name, value, shapes, query, f"It has one place for each {keys}, {way}")


def _ids(name: str, value: Any, shapes: Shapes, query: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected an integer tensor of shape {_either(shapes)}, got {type(value).__name__}. Wrap numbers: "
            f"torch.tensor({name}); give names numbers by a dictionary: torch.tensor([number_of[x] for x in {name}])."
        )
    check_dense(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers (int8 to int64, or uint8), got {value.dtype}. Use {name}.long().")
    _fits(name, value, shapes, query, "One id for each embedding.")


def _fits(name: str, value: Tensor, shapes: Shapes, query: Tensor, way: str) -> None:
    # The number of dimensions comes first, or a program that is exported for every N would be told that N is not K.
    if not any(value.dim() == len(shape) and tuple(value.shape) == shape for shape in shapes):
        raise ValueError(f"{name}: expected shape {_either(shapes)}, got {tuple(value.shape)}. {way}")
    _alike(name, value, query, dtype=False)


def _either(shapes: Shapes) -> str:
    return " or ".join(map(str, shapes))


def _tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        kinds = "torch.Tensor, a MomentumQueue or None" if name == "negative_keys" else "torch.Tensor"
        sequence = isinstance(x, (list, tuple)) and any(isinstance(one, Tensor) for one in x)
        way = f"Stack its embeddings: torch.stack({name})" if sequence else "Convert it with torch.as_tensor"
        if isinstance(x, MomentumQueue) and name == "keys":  # of negatives_logsumexp
            way = "Give what it holds: queue.keys"
        elif isinstance(x, MomentumQueue):
            way = "A queue comes third: criterion(query, positive_key, queue)"
        elif isinstance(x, numbers.Real):
            way = f"Settings go by keyword: temperature={x!r}"
        raise TypeError(f"{name}: expected a {kinds}, got {type(x).__name__}. {way}.")
    check_dense(name, x)
    if x.dtype in FLOATS:
        return
    expected = f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}"
    if (x.dim() < 2 or x.shape[1:] == (1,)) and not x.is_complex():  # (embeddings, labels), as supervised losses take
        raise TypeError(
            f"{expected} of shape {tuple(x.shape)}. Labels and ids go to query_ids, beside two views of each image: "
            "criterion(query, positive_key, query_ids=labels); those of negative_keys to negative_ids."
        )
    raise TypeError(f"{expected}. Use {name}.{'real' if x.is_complex() else 'float()'}.")


def _alike(name: str, x: Tensor, query: Tensor, *, dtype: bool = True, advice: str = "") -> None:
    if x.device != query.device:
        raise ValueError(
            f"{name}: expected the device of query, {query.device}, got {x.device}. "
            f"{advice or f'Move it with {name}.to(query.device).'}"
        )
    if dtype and x.dtype != query.dtype and torch.float64 in (x.dtype, query.dtype):  # the others meet in float32
        raise ValueError(
            f"{name}: expected the dtype of query, {query.dtype}, got {x.dtype}. Use {name}.to(query.dtype)."
        )
