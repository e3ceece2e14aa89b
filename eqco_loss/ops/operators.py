"""The five operators, each with what the dispatcher must know of its outputs, and with its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import definition
from .backends import BACKENDS
from .calls import (
    KeySet,
    KeysGradient,
    KeysGradients,
    LogSumExp,
    LogSumExpOutputs,
    Metric,
    Row,
    RowLosses,
    RowOutputs,
    SymmetricGradient,
    SymmetricGradients,
    SymmetricLosses,
    SymmetricOutputs,
    compute_dtype,
    temperature_of,
)
from .observers import is_batched, looked_on
from .operator import Gradients, Operator, check_unchanged, dense_gradients, kept_answer


def _times(call: RowLosses, unit: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a sum over rows, (N, D), times grad, () or (N,)."""
    if looked_on() or is_batched(grad):  # a compiler makes one kernel of it, and vmap has no out=
        factor = grad if grad.dim() == 0 else grad[:, None]
        return ((unit if unit.dtype == grad.dtype else unit.to(grad.dtype)) * factor).to(dtype)
    return BACKENDS[call.backend].times(unit, grad, dtype)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------- row losses


def _row_losses_fake(call: RowLosses) -> RowOutputs:
    n, dtype, backend = call.query.shape[0], compute_dtype(call.query), BACKENDS[call.backend]
    in_forward = call.need_keys_gradient and call.reduced and backend.GIVES_KEYS_GRADIENT

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return call.query.new_empty(shape, dtype=dtype)

    def unit(x: Tensor, wanted: bool) -> Tensor | None:
        return new(*x.shape, dtype=backend.unit_dtype(x.dtype)) if wanted else None

    return RowOutputs(
        loss=new() if call.reduced else new(n),
        query_gradient=unit(call.query, call.need_query_gradient),
        positive_gradient=unit(call.positive, call.need_positive_gradient),
        keys_gradient=new(*call.first.keys.shape) if in_forward else None,
        rows=new(len(Row), n),
        metrics=new(len(Metric), n) if call.need_metrics else None,
    )


def _of_keys(
    ctx: Any,
    call: RowLosses | LogSumExp,
    one: KeySet,
    grad: Tensor,
    rows: Tensor,
    normalize: bool,
    query_gradient: Tensor | None = None,
    positive_gradient: Tensor | None = None,
) -> KeysGradients:
    """The gradient of a set's keys, which forward did not compute."""
    pairs = one.pairs
    tensors = pairs.query_ids, pairs.key_ids, pairs.mask, pairs.filled, pairs.picked
    check_unchanged(ctx, call.query, call.learned_temperature, one.keys, *tensors)
    return keys_gradient.in_backward(
        ctx,
        KeysGradient(
            query=call.query,
            first=one,
            grad=grad,
            rows=rows,
            temperature=call.temperature,
            learned_temperature=call.learned_temperature,
            normalize=normalize,
            autocast=call.autocast,
            backend=call.backend,
            query_gradient=query_gradient,
            positive_gradient=positive_gradient,
            kind=call.kind if isinstance(call, RowLosses) and one is call.first else 0,
        ),
        grad,
    )


def _row_losses_backward(ctx: Any, call: RowLosses, grad: Tensor) -> Gradients:
    if torch.is_grad_enabled():  # create_graph=True
        return dense_gradients(ctx, row_losses, definition.row_losses, grad)
    query_gradient, positive_gradient, keys_gradient_, rows, _ = kept_answer(ctx)
    found: Gradients = {}
    units = {"query": (query_gradient, call.query)}
    together = "first_keys" in ctx.needed and call.positive is call.first.keys
    needed = {*ctx.needed, "positive"} if together else ctx.needed
    if positive_gradient is not None:
        units["positive"] = positive_gradient, call.positive
    if keys_gradient_ is not None:
        units["first_keys"] = keys_gradient_, call.first.keys
    units = {name: unit for name, unit in units.items() if name in needed}
    if "first_keys" in ctx.needed and "first_keys" not in units:
        query, _ = units.pop("query", (None, None))
        positive, _ = units.pop("positive", (None, None)) if together else (None, None)
        of_keys = _of_keys(ctx, call, call.first, grad, rows, call.normalize, query, positive)
        found["first_keys"] = of_keys.keys
        if of_keys.query is not None:
            found["query"] = of_keys.query
    if "second_keys" in ctx.needed and call.second is not None:
        found["second_keys"] = _of_keys(ctx, call, call.second, grad, rows, call.normalize).keys
    for name, (unit, x) in units.items():
        found[name] = _times(call, unit, grad, x.dtype)
    if together and "positive" in found:
        found["first_keys"] = found["first_keys"] + found.pop("positive")
    if "learned_temperature" in ctx.needed and call.learned_temperature is not None:
        of_rows = rows[Row.TEMPERATURE_GRADIENT]
        found["learned_temperature"] = (grad * of_rows).sum().to(call.learned_temperature.dtype)
    return found


def _with_positive_gradient(call: RowLosses, out: RowOutputs) -> RowOutputs:
    if out.positive_gradient is not None or not call.need_positive_gradient:
        return out
    dtype = BACKENDS[call.backend].unit_dtype(call.positive.dtype)
    return out._replace(positive_gradient=call.positive.new_zeros(call.positive.shape, dtype=dtype))


row_losses = Operator(
    "row_losses",
    RowLosses,
    RowOutputs,
    lambda call: BACKENDS[call.backend].row_losses(call),
    _row_losses_fake,
    ("query", "positive", "first_keys", "second_keys", "learned_temperature"),
    ("positive", "first_keys"),
    _row_losses_backward,
    _with_positive_gradient,
)

keys_gradient = Operator(
    "keys_gradient",
    KeysGradient,
    KeysGradients,
    lambda call: BACKENDS[call.backend].keys_gradient(call),
    lambda call: KeysGradients(
        call.first.keys.new_empty(call.first.keys.shape),
        None if call.query_gradient is None else call.query.new_empty(call.query.shape),
    ),
)


# ----------------------------------------------------------------------------------------------------- symmetric losses


def _symmetric_losses_fake(call: SymmetricLosses) -> SymmetricOutputs:
    m, dtype, new = call.first.shape[0], compute_dtype(call.first), call.first.new_empty
    shape, of_kept = BACKENDS[call.backend].keeps(call)
    return SymmetricOutputs(new((), dtype=dtype), new((len(Row), 2 * m), dtype=dtype), new(shape, dtype=of_kept))


def _symmetric_losses_backward(ctx: Any, call: SymmetricLosses, grad: Tensor) -> Gradients:
    if torch.is_grad_enabled():
        return dense_gradients(ctx, symmetric_losses, definition.symmetric_losses, grad)
    rows, kept = ctx.saved_tensors
    check_unchanged(ctx, call.learned_temperature)
    if not kept.numel() or kept.dtype != call.first.dtype:  # else the views themselves are kept, or their gradient
        check_unchanged(ctx, call.first, call.second)
    gradients = symmetric_gradient.in_backward(
        ctx,
        SymmetricGradient(
            first=call.first,
            second=call.second,
            kept=kept,
            grad=grad,
            rows=rows,
            across=call.across,
            temperature=call.temperature,
            learned_temperature=call.learned_temperature,
            autocast=call.autocast,
            backend=call.backend,
            kind=call.kind,
        ),
        grad,
    )
    m, views = call.first.shape[0], gradients.views
    if looked_on() or is_batched(grad):
        found = {"first": views[:m], "second": views[m:]}
    else:  # each half has a count of changes of its own, so that changing one in place does not mark the other
        found = dict(zip(("first", "second"), views.unsafe_split(m), strict=True))
    if call.learned_temperature is not None and gradients.temperature is not None:
        found["learned_temperature"] = gradients.temperature.to(call.learned_temperature.dtype)
    return found


symmetric_losses = Operator(
    "symmetric_losses",
    SymmetricLosses,
    SymmetricOutputs,
    lambda call: BACKENDS[call.backend].symmetric_losses(call),
    _symmetric_losses_fake,
    ("first", "second", "learned_temperature"),
    backward=_symmetric_losses_backward,
)

symmetric_gradient = Operator(
    "symmetric_gradient",
    SymmetricGradient,
    SymmetricGradients,
    lambda call: BACKENDS[call.backend].symmetric_gradient(call),
    lambda call: SymmetricGradients(
        call.first.new_empty((2 * call.first.shape[0], call.first.shape[1])),
        None if call.learned_temperature is None else call.rows.new_empty(()),
    ),
)


# -------------------------------------------------------------------------------------------------------- log-sum-exps


def _logsumexp_fake(call: LogSumExp) -> LogSumExpOutputs:
    (n, d), dtype = call.query.shape, compute_dtype(call.query)
    mean_key = call.query.new_empty((n, d), dtype=dtype) if call.need_query_gradient else None
    return LogSumExpOutputs(
        call.query.new_empty((n,), dtype=dtype), mean_key, call.query.new_empty((len(Row), n), dtype=dtype)
    )


def _logsumexp_backward(ctx: Any, call: LogSumExp, grad: Tensor) -> Gradients:
    if torch.is_grad_enabled():
        return dense_gradients(ctx, logsumexp, definition.logsumexp, grad)
    mean_key, rows = kept_answer(ctx)
    check_unchanged(ctx, call.query, call.learned_temperature)
    t, found = temperature_of(call), {}
    if "query" in ctx.needed:
        found["query"] = (mean_key * (grad / t)[:, None]).to(call.query.dtype)
    if "first_keys" in ctx.needed:
        found["first_keys"] = _of_keys(ctx, call, call.first, grad, rows, False).keys
    if "learned_temperature" in ctx.needed and call.learned_temperature is not None:
        of_rows = (call.query * mean_key).sum(1)
        found["learned_temperature"] = (-(grad * of_rows).sum() / t**2).to(call.learned_temperature.dtype)
    return found


logsumexp = Operator(
    "logsumexp",
    LogSumExp,
    LogSumExpOutputs,
    lambda call: BACKENDS[call.backend].logsumexp(call),
    _logsumexp_fake,
    ("query", "first_keys", "learned_temperature"),
    backward=_logsumexp_backward,
)
