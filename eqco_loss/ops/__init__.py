"""The two operators: schema, dispatch and autograd. Backends are plain functions of tensors beside this file.

Both take the same description of which (query i, key j) pairs count as negatives, flattened for the dispatcher:

- ``query_ids (N,)`` with ``key_ids (K,) or (N, K)``: a pair of equal ids is left out;
- ``valid_count ()``: keys at and beyond it do not exist (a queue that is still filling);
- ``index (N, C)``: row i has the keys ``index[i]`` and no others;
- ``band [offset, width, modulus]``: row i sits at ``a = (offset + i) % modulus`` and has the keys whose place ``j % modulus`` is one of the next
  ``width`` after ``a``, cyclic. ``width = modulus - 1`` leaves out the row's own place only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import torch_backend
from .torch_backend import Pairs, Stat

__all__ = ["Pairs", "Stat", "negatives_logsumexp", "row_losses"]

_PAIRS = "Tensor? query_ids, Tensor? key_ids, Tensor? valid_count, Tensor? index, SymInt[] band"


# ---------------------------------------------------------------------------------------------------------------- row losses


@torch.library.custom_op(
    "eqco_loss::row_losses",
    mutates_args=(),
    schema=f"(Tensor query, Tensor positive, Tensor keys, Tensor? learned_temperature, {_PAIRS}, float temperature, "
    "float? inter_temperature, float? alpha, bool normalize, bool normalize_keys, bool need_query_gradient, "
    "bool need_positive_gradient, bool need_statistics) -> (Tensor loss, Tensor query_gradient, Tensor positive_gradient, Tensor stats)",
)
def row_losses(
    query: Tensor,  # (N, D)
    positive: Tensor,  # (N, D)
    keys: Tensor,  # (K, D) or (N, K, D)
    learned_temperature: Tensor | None,  # (); replaces temperature
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    valid_count: Tensor | None,
    index: Tensor | None,
    band: list[int],
    temperature: float,
    inter_temperature: float | None,
    alpha: float | None,
    normalize: bool,
    normalize_keys: bool,
    need_query_gradient: bool,
    need_positive_gradient: bool,
    need_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss per row (N,), its gradients with respect to the raw query and positive (N, D), and ``Stat`` rows (len(Stat), N)."""
    return torch_backend.row_losses(
        query,
        positive,
        keys,
        Pairs(query_ids, key_ids, valid_count, index, band),
        temperature if learned_temperature is None else learned_temperature,
        inter_temperature,
        alpha,
        normalize,
        normalize_keys,
        need_query_gradient,
        need_positive_gradient,
        need_statistics,
    )


@row_losses.register_fake
def _(query: Tensor, positive: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_query_gradient, need_positive_gradient = rest[-3:-1]
    n, d = query.shape
    dtype = torch_backend.compute_dtype(query)
    return (
        query.new_empty((n,), dtype=dtype),
        query.new_empty((n, d) if need_query_gradient else (0,), dtype=dtype),
        query.new_empty((n, d) if need_positive_gradient else (0,), dtype=dtype),
        query.new_empty((len(Stat), n), dtype=dtype),
    )


def _row_losses_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, query_gradient, positive_gradient, stats = output
    ctx.mark_non_differentiable(query_gradient, positive_gradient, stats)
    ctx.save_for_backward(query_gradient, positive_gradient, stats)
    _keep_inputs(ctx, inputs, keys=inputs[2])


def _row_losses_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs = ctx.inputs
    query, positive, keys, learned_temperature = inputs[:4]
    pairs, rest = Pairs(*inputs[4:8], inputs[8]), inputs[9:]
    if torch.is_grad_enabled():  # create_graph: differentiate the plain formula again
        _check_unchanged(ctx, keys)
        return _dense_gradients(ctx, grad, lambda q, p, k, t: torch_backend.dense_row_losses(q, p, k, pairs, rest[0] if t is None else t, *rest[1:5]), 4)
    query_gradient, positive_gradient, stats = ctx.saved_tensors
    need_query, need_positive, need_keys, need_temperature = ctx.needs_input_grad[:4]
    out: list[Tensor | None] = [None] * len(inputs)
    if need_query:
        out[0] = (query_gradient * grad[:, None]).to(query.dtype)
    if need_positive:
        out[1] = (positive_gradient * grad[:, None]).to(positive.dtype)
    if need_keys:
        _check_unchanged(ctx, keys)
        temperature, _, _, normalize, normalize_keys = rest[:5]
        out[2] = keys_gradient(
            query, keys, grad * stats[Stat.WEIGHT], stats[Stat.LSE], learned_temperature, *inputs[4:9], temperature, normalize, normalize_keys
        )
    if need_temperature:
        out[3] = (grad * stats[Stat.TEMPERATURE_GRADIENT]).sum().to(learned_temperature.dtype)
    return tuple(out)


row_losses.register_autograd(_row_losses_backward, setup_context=_row_losses_context)


# --------------------------------------------------------------------------------------------------------- negatives_logsumexp


@torch.library.custom_op(
    "eqco_loss::negatives_logsumexp",
    mutates_args=(),
    schema=f"(Tensor query, Tensor keys, Tensor? learned_temperature, {_PAIRS}, float temperature, bool need_query_gradient)"
    " -> (Tensor lse, Tensor mean_key)",
)
def negatives_logsumexp(
    query: Tensor,  # (N, D)
    keys: Tensor,  # (K, D) or (N, K, D)
    learned_temperature: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    valid_count: Tensor | None,
    index: Tensor | None,
    band: list[int],
    temperature: float,
    need_query_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(q_i . n_j / t) per row (N,), and the softmax-weighted mean of the keys (N, D), which is t times its gradient."""
    return torch_backend.negatives_logsumexp(
        query,
        keys,
        Pairs(query_ids, key_ids, valid_count, index, band),
        temperature if learned_temperature is None else learned_temperature,
        need_query_gradient,
    )


@negatives_logsumexp.register_fake
def _(query: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, d = query.shape
    dtype = torch_backend.compute_dtype(query)
    return query.new_empty((n,), dtype=dtype), query.new_empty((n, d) if rest[-1] else (0,), dtype=dtype)


def _logsumexp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    lse, mean_key = output
    ctx.mark_non_differentiable(mean_key)
    ctx.save_for_backward(lse, mean_key)
    _keep_inputs(ctx, inputs, keys=inputs[1])


def _logsumexp_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs = ctx.inputs
    query, keys, learned_temperature = inputs[:3]
    pairs, temperature = Pairs(*inputs[3:7], inputs[7]), inputs[8]
    if torch.is_grad_enabled():
        _check_unchanged(ctx, keys)
        return _dense_gradients(ctx, grad, lambda q, k, t: torch_backend.dense_logsumexp(q, k, pairs, temperature if t is None else t), 3)
    lse, mean_key = ctx.saved_tensors
    t = temperature if learned_temperature is None else learned_temperature
    need_query, need_keys, need_temperature = ctx.needs_input_grad[:3]
    out: list[Tensor | None] = [None] * len(inputs)
    if need_query:
        out[0] = (mean_key * (grad / t)[:, None]).to(query.dtype)
    if need_keys:
        _check_unchanged(ctx, keys)
        out[1] = keys_gradient(query, keys, grad, lse, learned_temperature, *inputs[3:8], temperature, False, False)
    if need_temperature:
        out[2] = (-(grad * (query * mean_key).sum(1)).sum() / t**2).to(learned_temperature.dtype)
    return tuple(out)


negatives_logsumexp.register_autograd(_logsumexp_backward, setup_context=_logsumexp_context)


# ---------------------------------------------------------------------------------------------------------------- both backwards


@torch.library.custom_op(
    "eqco_loss::keys_gradient",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor row_weight, Tensor lse, Tensor? learned_temperature, "
    f"{_PAIRS}, float temperature, bool normalize, bool normalize_keys) -> Tensor",
)
def keys_gradient(
    query: Tensor,
    keys: Tensor,
    row_weight: Tensor,  # (N,): what arrives at each row's log-sum-exp
    lse: Tensor,  # (N,)
    learned_temperature: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    valid_count: Tensor | None,
    index: Tensor | None,
    band: list[int],
    temperature: float,
    normalize: bool,
    normalize_keys: bool,
) -> Tensor:
    """Gradient of sum_i row_weight_i lse_i with respect to the raw keys, in one more pass; same shape and dtype as ``keys``."""
    return torch_backend.keys_gradient(
        query,
        keys,
        row_weight,
        lse,
        Pairs(query_ids, key_ids, valid_count, index, band),
        temperature if learned_temperature is None else learned_temperature,
        normalize,
        normalize_keys,
    )


@keys_gradient.register_fake
def _(query: Tensor, keys: Tensor, *rest: Any) -> Tensor:
    return keys.new_empty(keys.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], keys: Tensor) -> None:
    # Not save_for_backward: its version check would reject a queue that was enqueued to before backward, though a queue's keys are not needed there.
    ctx.inputs = inputs
    ctx.keys_version = None if keys.is_inference() else keys._version
    ctx.set_materialize_grads(True)


def _check_unchanged(ctx: Any, keys: Tensor) -> None:
    if ctx.keys_version is not None and keys._version != ctx.keys_version:
        raise RuntimeError(
            "negative_keys was changed in place between the loss and backward(), and this backward needs its values "
            "(keys that require a gradient, or create_graph=True): call backward() before changing it, or pass a clone."
        )


def _dense_gradients(ctx: Any, grad: Tensor, formula: Any, tensors: int) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of the first ``tensors`` inputs through the plain N x K formula: right to any order, at eager's cost in memory."""
    with torch.enable_grad():
        # Views, because one tensor may serve as positive and as keys, and each needs its own gradient.
        views = [None if x is None else x.view_as(x) for x in ctx.inputs[:tensors]]
        wanted = [i for i in range(tensors) if ctx.needs_input_grad[i]]
        gradients = torch.autograd.grad(formula(*views), [views[i] for i in wanted], grad, create_graph=True, allow_unused=True)
    out: list[Tensor | None] = [None] * len(ctx.inputs)
    for i, gradient in zip(wanted, gradients, strict=True):
        out[i] = gradient
    return tuple(out)
