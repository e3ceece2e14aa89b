"""Every check and every message: the argument, what was expected, what came, and the way out."""

from __future__ import annotations

import numbers
import zlib
from typing import Any

import torch
from torch import Tensor

from .distributed import Ranks, cannot_wait, check_gather, equal_ranks, exchange, fail_together, world
from .queue import FLOATS, INTEGERS, MomentumQueue
from .settings import Inputs, Settings

BACKENDS = ("auto", "torch", "triton")
REDUCTIONS = ("none", "mean", "sum")
LARGEST = 1e38  # what float32 holds
SAMPLINGS = ("rolled", "random")


def settings(chosen: Any) -> None:
    """What a loss was constructed with; ``chosen`` has the fields of ``functional.Settings``."""
    temperature(chosen.temperature)
    if chosen.inter_temperature is not None:
        inter_temperature(chosen.inter_temperature)
    if chosen.alpha is not None:
        positive_number(
            "alpha",
            chosen.alpha,
            "Give the number of negatives to mimic (65536 for MoCo's queue), or None for as many as there are.",
        )
    k = chosen.num_negatives
    whole: type[Any] = numbers.Integral  # NumPy's too
    if k is not None and (isinstance(k, bool) or not isinstance(k, whole) or k < 1):
        raise ValueError(
            f"num_negatives: expected an integer >= 1 or None, got {k!r}. None takes every other key of the batch; 16 "
            f"is the SiMo paper's choice."
        )
    one_of("sampling", chosen.sampling, SAMPLINGS)
    if chosen.in_batch is not None:
        one_of("in_batch", chosen.in_batch, ("keys", "views"))
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


def only_by_keyword(name: str, by_position: tuple[str, ...], more: tuple[Any, ...]) -> None:
    """People write EqCoLoss(0.2, 16) and mean 16 negatives."""
    if more:
        raise TypeError(
            f"{name}: expected only {' and '.join(by_position)} by position, got {more[0]!r} besides. Name it: "
            f"num_negatives={more[0]!r} is how many negatives each query meets, alpha={more[0]!r} how many it mimics."
        )


def constructed_temperature(value: Any) -> None:
    """A tensor that was computed keeps one graph, which the first backward frees."""
    if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
        raise ValueError(
            "temperature: expected a number or a leaf tensor (an nn.Parameter), got the result of a computation, whose "
            "graph the first backward() frees. Compute it in each step: functional.eqco_loss(query, positive_key, "
            "temperature=(-scale).exp())."
        )


def inter_temperature(value: Any) -> None:
    if isinstance(value, Tensor):
        raise TypeError(
            "inter_temperature: expected a number > 0, got a tensor. The dual-temperature weight is detached, so no "
            "gradient reaches it: "
            "pass float(inter_temperature)."
        )
    positive_number("inter_temperature", value, "The paper uses 1.0.")


def positive_number(name: str, value: Any, advice: str) -> None:
    real: type[Any] = numbers.Real  # NumPy's too
    if isinstance(value, bool) or not isinstance(value, real):
        raise TypeError(f"{name}: expected a positive number, got {type(value).__name__} {value!r}. {advice}")
    if not 0 < value < LARGEST:
        raise ValueError(f"{name}: expected a finite number > 0, under {LARGEST:g}, got {value!r}. {advice}")


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}. Pick one of these.")


def temperature(value: Any) -> None:
    advice = "Papers use 0.05 to 0.5 (SiMo and MoCo v2: 0.2)."
    if not isinstance(value, Tensor):
        positive_number("temperature", value, advice + " A learned one is a 0-dim tensor that requires a gradient.")
        return
    if value.dim() != 0 or not value.is_floating_point():
        raise ValueError(
            f"temperature: expected a number or a 0-dim floating-point tensor, got shape {tuple(value.shape)}, "
            f"{value.dtype}. "
            "Use temperature.squeeze().float(), or one loss per temperature."
        )
    # A device's value would have to be waited for, and a traced one does not exist yet.
    if (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not 0 < float(value.detach()) < float("inf")
    ):
        raise ValueError(
            f"temperature: expected a finite value > 0, got a tensor of {float(value.detach())!r}. {advice} "
            "A learned one stays positive as log_scale.exp()."
        )


def embeddings(query: Any, positive_key: Any, negative_keys: Any) -> None:
    """Shapes, dtypes and devices of one call; ``negative_keys`` is a tensor or None here."""
    if isinstance(positive_key, Tensor) and positive_key.dtype in INTEGERS and positive_key.dim() == 1:
        raise TypeError(
            f"positive_key: expected embeddings (N, D), row i being query i's positive, got integers "
            f"{tuple(positive_key.shape)}. Labels are not keys: give the two views as query and positive_key, and the "
            "labels as query_ids=labels, so that no query is repelled by its own label."
        )
    for name, x in (("query", query), ("positive_key", positive_key)):
        _tensor(name, x)
        if name == "positive_key" and x.dim() == 3 and query.dim() == 2 and x.shape[::2] == query.shape:
            raise ValueError(
                f"positive_key: expected one positive a query, (N, D) = {tuple(query.shape)}, got {tuple(x.shape)}. Of "
                "P positives each is a row: query.repeat_interleave(P, 0), positive_key.flatten(0, 1), and the same "
                "query_ids for all rows of a query, so that its positives do not repel each other."
            )
        if x.dim() != 2:
            raise ValueError(
                f"{name}: expected shape (N, D), one embedding a row, got {tuple(x.shape)}. "
                "Flatten feature maps with x.flatten(1); put views side by side with torch.cat."
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
            f"{tuple(positive_key.shape)}. "
            "Encode both views of the same images with heads of the same width."
        )
    _alike("positive_key", positive_key, query)
    if negative_keys is not None:
        n, d = query.shape
        _tensor("negative_keys", negative_keys)
        if (
            negative_keys.dim() not in (2, 3)
            or negative_keys.shape[-1] != d
            or (negative_keys.dim() == 3 and negative_keys.shape[0] != n)
        ):
            hint = (
                "MoCo keeps its queue as (D, K): pass queue.T."
                if negative_keys.dim() == 2 and negative_keys.shape[0] == d
                else "Reshape it to one of these."
            )
            raise ValueError(
                f"negative_keys: expected (K, D) shared by all queries or (N, K, D) per query, here D = {d} and N = "
                f"{n}, "
                f"got {tuple(negative_keys.shape)}. {hint}"
            )
        if negative_keys.shape[-2] == 0:
            raise ValueError(
                f"negative_keys: expected at least one key (K >= 1), got {tuple(negative_keys.shape)}. Leave it out "
                f"to use the batch's other keys."
            )
        _alike("negative_keys", negative_keys, query, dtype=False)


def inputs(chosen: Settings, given: Inputs) -> Ranks | None:
    """A call checked, by all ranks together where they gather; who takes part."""
    if chosen.gather is False:
        call(chosen, *given)
        return None
    return agree(chosen, *given)


def call(
    chosen: Any,
    query: Any,
    positive_key: Any,
    negative_keys: Any,
    query_ids: Any,
    negative_ids: Any,
    negative_mask: Any = None,
) -> None:
    """One call of a loss; ``chosen`` has the fields of ``functional.Settings``."""
    reverse_mode()
    settings(chosen)
    stored = isinstance(negative_keys, MomentumQueue)
    embeddings(query, positive_key, None if stored else negative_keys)
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
    if negative_mask is not None:
        mask(query, negative_keys, negative_mask)
    if chosen.in_batch == "views" and k is not None and k % 2:
        raise ValueError(
            f'num_negatives: expected an even number with in_batch="views", got {k}. Both views of the next K/2 images '
            f"are taken: use {k + 1}."
        )
    if stored:
        queue(negative_keys, query)
        source = "queue without ids" if negative_keys.slot_ids is None else "queue"
        ids(query, query_ids, negative_ids, source=source)
    elif negative_keys is not None:
        n, count = query.shape[0], negative_keys.shape[-2]
        ids(query, query_ids, negative_ids, source="tensor", shapes=((count,), (n, count)))
    else:
        ids(query, query_ids, negative_ids, source="batch")
    if chosen.gather is False and negative_keys is None:
        _others(query.shape[0], query)


def reverse_mode() -> None:
    if torch.compiler.is_compiling():
        return
    if getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        raise NotImplementedError(
            "eqco_loss: expected reverse-mode differentiation, got forward mode (torch.func.jvp, forward_ad), which an "
            "operator cannot serve and would take for 0. Use torch.autograd.grad, with create_graph=True for more."
        )
    innermost = torch._C._functorch.peek_interpreter_stack()
    if innermost is not None and innermost.key() == torch._C._functorch.TransformType.Grad:
        raise NotImplementedError(
            "eqco_loss: expected a call outside torch.func.grad, vjp and jacrev, whose transform an operator cannot "
            "serve. Use torch.autograd.grad(loss, inputs), with create_graph=True for more."
        )


def _others(rows: int, query: Tensor) -> None:
    if rows == 1:
        raise ValueError(
            f"query: expected at least 2 rows when the negatives are the batch's other keys, got {tuple(query.shape)}, "
            "which leaves none. Use a larger batch (drop_last=True in the loader), or pass negative_keys."
        )


def agree(
    chosen: Any,
    query: Any,
    positive_key: Any,
    negative_keys: Any,
    query_ids: Any,
    negative_ids: Any,
    negative_mask: Any = None,
) -> Ranks:
    """The same for every rank of a group: whatever is wrong on one is an error on all, and none is left waiting."""
    check_gather(chosen.gather)
    group, rank, size = world(chosen.gather)
    if isinstance(query, Tensor) and cannot_wait(query):
        call(chosen, query, positive_key, negative_keys, query_ids, negative_ids)
        return equal_ranks(chosen.gather, query)
    wrong: Exception | None = None
    try:
        call(chosen, query, positive_key, negative_keys, query_ids, negative_ids)
    except Exception as error:
        wrong = error
    facts = {"an error": 0 if wrong is None else 1}
    if wrong is None:
        t = "learned" if isinstance(chosen.temperature, Tensor) else chosen.temperature
        learned = isinstance(chosen.temperature, Tensor) and chosen.temperature.requires_grad
        facts |= {
            "rows": query.shape[0],
            "D": query.shape[1],
            "dtype": _code((query.dtype, positive_key.dtype)),
            "settings (temperature, alpha, in_batch, num_negatives, sampling, symmetric, normalize, reduction)": _code(
                [float(x) if isinstance(x, numbers.Real) else x for x in chosen._replace(gather=True, temperature=t)]
            ),
            "kind of negative_keys": _code([isinstance(negative_keys, kind) for kind in (Tensor, MomentumQueue)]),
            "query_ids given": int(query_ids is not None),
            "gradients wanted": 8 * learned
            + 4 * torch.is_grad_enabled()
            + 2 * query.requires_grad
            + positive_key.requires_grad,
        }
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    bits = None if wrong is not None else _bits(chosen.temperature)
    everyone = exchange(list(facts.values()) + [0] * (8 - len(facts)), device, group, size, bits)
    fail_together(wrong, [r for r, values in enumerate(everyone) if values[0]])
    for place, name in enumerate(facts):
        values = [row[place] for row in everyone]
        if name != "rows" and len(set(values)) > 1:
            shown = f", {values}," if name == "D" else ""
            odd = [r for r, value in enumerate(values) if value != values[0]]
            raise ValueError(
                f"gather: expected the same on every rank, got different {name}{shown} on rank "
                f"{', '.join(map(str, odd))} than on rank 0. Call the same loss with the same settings on every rank."
            )
    if len({row[-1] for row in everyone}) > 1:
        found = [float(torch.tensor(row[-1], dtype=torch.int64).view(torch.float64)) for row in everyone]
        raise ValueError(
            f"gather: expected a learned temperature of the same value on every rank, got {found}. Start from the "
            "same (torch.distributed.broadcast(temperature.data, 0), or register it in the module that DDP wraps), and "
            "step it on every rank."
        )
    ranks = Ranks(group, rank, tuple(row[1] for row in everyone))
    if negative_keys is None:
        _others(ranks.total, query)
    return ranks


def _bits(value: Any) -> Tensor | None:
    """A temperature that is a tensor, as the integer that its float64 looks like: the device need not be asked."""
    if not isinstance(value, Tensor):
        return None
    kind = torch.float32 if value.device.type == "mps" else torch.float64
    as_float = value.detach().to(kind)
    return as_float.view(torch.int64 if kind == torch.float64 else torch.int32).to(torch.int64)


def _code(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def queue(stored: Any, query: Tensor) -> None:
    if not stored.primed:
        raise ValueError(
            "negative_keys: expected a MomentumQueue that holds keys, got an empty one. Prime it with a first batch's "
            "keys before the loop: "
            "queue.enqueue(key_encoder(images))."
        )
    contents = stored.contents
    if contents.shape[1] != query.shape[1]:
        raise ValueError(
            f"negative_keys: expected a MomentumQueue of dim {query.shape[1]}, the width of query "
            f"{tuple(query.shape)}, got dim {contents.shape[1]}. "
            f"Construct it as MomentumQueue({contents.shape[0]}, {query.shape[1]})."
        )
    _alike("negative_keys", contents, query, dtype=False, advice="Move the queue with queue.to(device).")


def ids(
    query: Tensor, query_ids: Any, negative_ids: Any, *, source: str, shapes: tuple[tuple[int, ...], ...] = ()
) -> None:
    """``source`` is where the negatives come from: "batch", "tensor", "queue" or "queue without ids"."""
    n = query.shape[0]
    if negative_ids is not None and source != "tensor":
        way = (
            "In a batch query_ids serve both sides"
            if source == "batch"
            else "A queue uses the ids it stored (store_ids=True)"
        )
        raise ValueError(
            f"negative_ids: expected None unless negative_keys is a tensor, got one. {way}: leave negative_ids out."
        )
    if query_ids is None:
        if source == "queue":
            raise ValueError(
                "query_ids: expected integers of shape (N,) with a MomentumQueue that stores ids, got None. "
                "Pass the ids of the queries, or construct the queue with store_ids=False."
            )
        if negative_ids is not None:
            raise ValueError(
                "query_ids: expected integers of shape (N,) beside negative_ids, got None. Pass both, or neither."
            )
        return
    _ids("query_ids", query_ids, ((n,),), query)
    if source == "queue without ids":
        raise ValueError(
            "query_ids: expected None with a MomentumQueue that stores no ids, got ids. "
            "Construct it with store_ids=True and pass ids to enqueue, or leave query_ids out."
        )
    if source == "tensor":
        if negative_ids is None:
            raise ValueError(
                "negative_ids: expected integers of shape (K,) or (N, K) beside query_ids, got None. Pass both, or "
                "neither."
            )
        _ids("negative_ids", negative_ids, shapes, query)


def mask(query: Tensor, negative_keys: Any, value: Any, name: str = "negative_mask") -> None:
    """``negative_keys`` is what the mask is about: a tensor, a queue or None."""
    if negative_keys is None:
        raise ValueError(
            f"{name}: expected None unless negative_keys is a tensor or a queue, got one. In a batch query_ids say "
            "which pairs are no negatives."
        )
    stored = isinstance(negative_keys, MomentumQueue)
    n, k = query.shape[0], (negative_keys.contents if stored else negative_keys).shape[-2]
    slots = ", over the slots of the queue's contents," if stored else ""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{name}: expected a bool tensor of shape ({k},) or ({n}, {k}){slots} True where a key is a negative, got "
            f"{got}. Use mask.bool()."
        )
    if tuple(value.shape) not in ((k,), (n, k)):
        raise ValueError(
            f"{name}: expected shape ({k},) or ({n}, {k}){slots} got {tuple(value.shape)}. One value for each key, or "
            "for each pair of a query and a key."
        )
    _alike(name, value, query, dtype=False)


def temperature_device(value: Any, query: Tensor) -> None:
    """A learned temperature of another device would have to be waited for."""
    if isinstance(value, Tensor) and value.device != query.device:
        raise ValueError(
            f"temperature: expected a tensor on the query's device, {query.device}, got one on {value.device}. "
            "Move it: temperature.to(query.device)."
        )


def logsumexp_inputs(query: Any, keys: Any, query_ids: Any, key_ids: Any, key_mask: Any) -> None:
    """What ``functional.negatives_logsumexp`` is called with."""
    for name, x in (("query", query), ("keys", keys)):
        _tensor(name, x)
    if query.dim() != 2 or 0 in query.shape:
        raise ValueError(
            f"query: expected shape (N, D) with N, D >= 1, got {tuple(query.shape)}. Flatten feature maps with "
            f"query.flatten(1)."
        )
    n, d = query.shape
    if (
        keys.dim() not in (2, 3)
        or keys.shape[-1] != d
        or keys.shape[-2] == 0
        or (keys.dim() == 3 and keys.shape[0] != n)
    ):
        raise ValueError(
            f"keys: expected (K, D) or (N, K, D) with K >= 1, here D = {d} and N = {n}, got {tuple(keys.shape)}. MoCo "
            f"keeps its queue as (D, K): pass queue.T."
        )
    _alike("keys", keys, query, dtype=False)
    if (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids, key_ids: expected both or neither, got one. Pass both, or neither.")
    if query_ids is not None:
        k = keys.shape[-2]
        _ids("query_ids", query_ids, ((n,),), query)
        _ids("key_ids", key_ids, ((k,), (n, k)), query)
    if key_mask is not None:
        mask(query, keys, key_mask, "key_mask")


def cosine_momentum(step: Any, total_steps: Any, base: Any, final: Any) -> None:
    if step < 0 or total_steps < 1:
        raise ValueError(
            f"step, total_steps: expected step >= 0 and total_steps >= 1, got {step!r} and {total_steps!r}. Count "
            f"optimiser steps from 0."
        )
    for name, value in (("base", base), ("final", final)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a momentum between 0 and 1, got {value!r}. BYOL rises from 0.996 to 1.")


def _ids(name: str, value: Any, shapes: tuple[tuple[int, ...], ...], query: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected an integer tensor of shape {_either(shapes)}, got {type(value).__name__}. Wrap it: "
            f"torch.tensor({name})."
        )
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers (int64 or narrower, signed), got {value.dtype}. Use {name}.long().")
    if tuple(value.shape) not in shapes:
        raise ValueError(
            f"{name}: expected shape {_either(shapes)}, got {tuple(value.shape)}. One id for each embedding."
        )
    _alike(name, value, query, dtype=False)


def _either(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " or ".join(map(str, shapes))


def _tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        kinds = "torch.Tensor, a MomentumQueue or None" if name == "negative_keys" else "torch.Tensor"
        raise TypeError(f"{name}: expected a {kinds}, got {type(x).__name__}. Convert it with torch.as_tensor.")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}. Use {name}.float().")


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
