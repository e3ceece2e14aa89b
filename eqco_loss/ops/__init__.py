"""The two operators: schema, dispatch and autograd. Backends are plain functions of tensors beside this file.

Both take the same description of which (query i, key j) pairs are negatives, flattened for the dispatcher:

- ``query_ids (N,)`` with ``key_ids (K,) or (N, K)``: a pair of equal ids is left out;
- ``valid_count ()``: keys at and beyond it do not exist (a queue that is still filling);
- ``picked (N, C)``: row i has the keys ``picked[i]`` and no others;
- ``band [offset, width, modulus]``: row i sits at ``a = (offset + i) % modulus`` and has the keys whose place
  ``j % modulus`` is one of the next ``width`` after ``a``, cyclic. ``width = modulus - 1`` leaves out the row's own
  place.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from . import torch_backend, triton_backend
from .tiles import Pairs
from .torch_backend import Stat, compute_dtype
from .triton_backend import refusal as triton_refusal

__all__ = ["Pairs", "Stat", "negatives_logsumexp", "requires_grad", "row_losses", "triton_refusal"]

_PAIRS = "Tensor? query_ids, Tensor? key_ids, Tensor? valid_count, Tensor? picked, SymInt[] band"
_PLAIN = frozenset({Tensor, nn.Parameter, NoneType, float, int, bool, str, list, torch.dtype})


# --------------------------------------------------------------------------------------------- by the dispatcher or not


class _Operator:
    """A registered operator, called past the dispatcher where nobody looks on: its wrappers cost 0.1 to 0.3 ms a call.

    Compilers, modes, torch.func's transforms, tensor subclasses and the meta device meet the operator itself, as they
    must.
    """

    def __init__(self, implementation: Callable[..., Any], schema: str) -> None:
        name = f"eqco_loss::{implementation.__name__}"
        self.implementation = implementation
        self.registered = torch.library.custom_op(name, implementation, mutates_args=(), schema=schema)
        self.differentiable: type[torch.autograd.Function] | None = None

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        self.registered.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = self.implementation(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.differentiable = type(self.implementation.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *inputs: Any) -> Any:
        if _looked_on() or _without_memory(inputs[0]) or not _PLAIN.issuperset(map(type, inputs)):
            return self.registered(*inputs)
        if self.differentiable is not None:
            return self.differentiable.apply(*inputs)
        if any(isinstance(x, Tensor) and _is_batched(x) for x in inputs):  # an operator of backward
            return self.registered(*inputs)
        return self.implementation(*inputs)


def _looked_on() -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _without_memory(x: Tensor) -> bool:
    return x.is_meta


def requires_grad(x: Tensor | None) -> bool:
    """Also of a tensor under torch.func.vmap, which hides it."""
    if x is not None and not torch.compiler.is_compiling():
        while torch._C._functorch.is_batchedtensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return x is not None and x.requires_grad


def _is_batched(grad: Tensor) -> bool:
    """Of torch.autograd.grad(is_grads_batched=True), which torch keeps apart from torch.func."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def _operator(schema: str) -> Callable[[Callable[..., Any]], _Operator]:
    return lambda implementation: _Operator(implementation, schema)


# --------------------------------------------------------------------------------------------------------- row losses


@_operator(
    "(Tensor query, Tensor positive, Tensor keys, Tensor? extra_keys, Tensor? learned_temperature, "
    f"{_PAIRS}, Tensor? extra_key_ids, Tensor? extra_valid_count, float temperature, float? inter_temperature, "
    "float? alpha, bool normalize, bool normalize_keys, bool normalize_extra, bool may_raise, "
    "bool need_query_gradient, bool need_positive_gradient, bool need_keys_gradient, bool need_statistics, "
    "SymInt[] share, ScalarType? autocast, str backend, str both_roles) -> "
    "(Tensor loss, Tensor query_gradient, Tensor positive_gradient, Tensor keys_gradient, Tensor stats)",
)
def row_losses(
    query: Tensor,  # (N, D)
    positive: Tensor,  # (N, D)
    keys: Tensor,  # (K, D) or (N, K, D)
    extra_keys: Tensor | None,  # a second set of negatives, (K', D) or (N, K', D)
    learned_temperature: Tensor | None,  # (); replaces temperature
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    valid_count: Tensor | None,
    picked: Tensor | None,
    band: list[int],
    extra_key_ids: Tensor | None,
    extra_valid_count: Tensor | None,
    temperature: float,
    inter_temperature: float | None,
    alpha: float | None,
    normalize: bool,
    normalize_keys: bool,
    normalize_extra: bool,
    may_raise: bool,  # where nothing is left to a row, on a CPU; else it is NaN
    need_query_gradient: bool,
    need_positive_gradient: bool,
    need_keys_gradient: bool,
    need_statistics: bool,
    share: list[int],  # [numerator, denominator]: what loss and gradients are multiplied by, as a mean does
    autocast: torch.dtype | None,  # what the kernels multiply in
    backend: str,
    # "", or: query, positive and keys are the same two views of a batch, query has the whole gradient, and the
    # negatives are of both "views" (NT-Xent) or the other view's "keys" (CLIP, SimCo)
    both_roles: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss per row (N,) with its gradients for the raw query (N, D) and positive (N, D), and ``stats`` (len(Stat), N).

    With ``normalize``, keys that are not to be normalised are unit rows already: a queue's. ``keys_gradient`` has the
    keys' shape and is that of the sum over rows: backward scales it where all rows weigh the same, as after a mean or a
    sum. What is not needed comes back empty.
    """
    t = temperature if learned_temperature is None else learned_temperature.to(compute_dtype(query))
    if both_roles and backend == "torch" and not need_statistics:
        across = both_roles == "keys"
        loss, stats = torch_backend.both_roles_losses(
            query, Pairs(band=band), across, t, inter_temperature, alpha, normalize, _ratio(share)
        )
        return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0), stats
    sets_of_pairs = (
        Pairs(query_ids, key_ids, valid_count, picked, band),
        Pairs(query_ids, extra_key_ids, extra_valid_count),
    )
    flags = normalize, normalize_keys, normalize_extra, need_query_gradient, need_positive_gradient

    def losses(query: Tensor, positive: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        given = query, positive, keys, extra_keys, *sets_of_pairs, t, inter_temperature, alpha, *flags
        if backend == "torch":
            return torch_backend.row_losses(*given, need_keys_gradient, need_statistics, _ratio(share), may_raise)
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            out = triton_backend.row_losses(*given, need_statistics, _ratio(share), autocast)
        loss, query_gradient, positive_gradient, stats = out
        return loss, query_gradient, positive_gradient, loss.new_empty(0), stats

    if both_roles == "views":
        positive = query.roll(query.shape[0] // 2, 0)
    if both_roles == "keys":  # each view against the other, without gradients
        first, second = query.chunk(2)
        there, back = losses(first, second, second), losses(second, first, first)
        return torch.cat([there[0], back[0]]), there[1], there[2], there[3], torch.cat([there[4], back[4]], 1)
    return losses(query, positive, keys)


def _ratio(share: list[int]) -> float:
    return share[0] / share[1] if share else 1.0


@row_losses.registered.register_fake
def _(query: Tensor, positive: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_query, need_positive, need_keys = rest[-8:-5]
    (n, _), dtype = query.shape, compute_dtype(query)
    return (
        query.new_empty((n,), dtype=dtype),
        query.new_empty(query.shape if need_query else (0,), dtype=dtype),
        query.new_empty(query.shape if need_positive else (0,), dtype=dtype),
        query.new_empty(keys.shape if need_keys else (0,), dtype=dtype),
        query.new_empty((len(Stat), n), dtype=dtype),
    )


def _row_losses_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    _keep_inputs(ctx, inputs)


def _row_losses_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    query_gradient, positive_gradient, unit_keys_gradient, stats = ctx.saved_tensors
    if grad is None:
        return (None,) * len(ctx.inputs)
    query, positive, keys, extra_keys, learned, *pairs = ctx.inputs[:10]
    extra_ids, extra_count, temperature, *settings = ctx.inputs[10:18]  # to normalize_extra
    *chosen, both_roles = ctx.inputs[-4:]  # share, autocast, backend
    extra_pairs = [pairs[0], extra_ids, extra_count, None, []]
    normalize, normalize_keys, normalize_extra = settings[-3:]

    def formula(q: Tensor, p: Tensor, k: Tensor, extra: Tensor | None, t: Tensor | None) -> Tensor:
        t_ = temperature if t is None else t.to(compute_dtype(q))
        of = Pairs(*pairs), Pairs(*extra_pairs), t_, *settings
        if both_roles == "views":
            p, k = q.roll(len(q) // 2, 0), q
        if both_roles == "keys":
            first, second = q.chunk(2)
            directions = (first, second), (second, first)
            rows = torch.cat([torch_backend.dense_row_losses(a, b, b, None, *of) for a, b in directions])
        else:
            rows = torch_backend.dense_row_losses(q, p, k, extra, *of)
        return rows * _ratio(chosen[0])

    if torch.is_grad_enabled():  # create_graph
        return _dense_gradients(ctx, grad, formula, 5)
    need_query, need_positive, need_keys, need_extra, need_temperature = ctx.needs_input_grad[:5]
    weight, lse = stats[Stat.WEIGHT], stats[Stat.LSE]
    out: list[Tensor | None] = [None] * len(ctx.inputs)
    if both_roles and (need_query or need_temperature):
        _check_unchanged(ctx, query, learned)
        settings = pairs[-1], temperature, normalize, *chosen, both_roles
        out[0], of_temperature = both_roles_gradient(query, grad, weight, lse, stats[Stat.POSITIVE], learned, *settings)
        if learned is not None:
            out[4] = of_temperature.to(learned.dtype)
    elif need_query and not both_roles:
        out[0] = _times(query_gradient, grad, query.dtype)
    if need_positive:
        out[1] = _times(positive_gradient, grad, positive.dtype)
    if need_keys:
        _check_unchanged(ctx, query, keys, learned, *pairs[:-1])
        unit = unit_keys_gradient if unit_keys_gradient.dim() == keys.dim() else None
        flags = normalize, normalize_keys
        out[2] = keys_gradient(query, keys, grad, weight, lse, unit, learned, *pairs, temperature, *flags, *chosen)
    if need_extra:
        _check_unchanged(ctx, query, extra_keys, learned, *extra_pairs[:-1])
        flags = normalize, normalize_extra
        out[3] = keys_gradient(
            query, extra_keys, grad, weight, lse, None, learned, *extra_pairs, temperature, *flags, *chosen
        )
    if need_temperature and not both_roles:
        out[4] = (grad * stats[Stat.TEMPERATURE_GRADIENT]).sum().to(learned.dtype)
    _release_inputs(ctx)
    return tuple(out)


def _times(unit: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """unit (N, D) times grad (N,), rounded by the same kernel."""
    if _looked_on() or _is_batched(grad):  # a compiler fuses them, and vmap has no out=
        return (unit * grad[:, None]).to(dtype)
    return torch.mul(unit, grad[:, None], out=torch.empty_like(unit, dtype=dtype))


row_losses.register_autograd(_row_losses_backward, setup_context=_row_losses_context)


# ------------------------------------------------------------------------------------------------ negatives_logsumexp


@_operator(
    f"(Tensor query, Tensor keys, Tensor? learned_temperature, {_PAIRS}, float temperature, "
    "bool need_query_gradient, ScalarType? autocast, str backend) -> (Tensor lse, Tensor mean_key)",
)
def negatives_logsumexp(
    query: Tensor,  # (N, D)
    keys: Tensor,  # (K, D) or (N, K, D)
    learned_temperature: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    valid_count: Tensor | None,
    picked: Tensor | None,
    band: list[int],
    temperature: float,
    need_query_gradient: bool,
    autocast: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(q_i . n_j / t) per row (N,), and the softmax-weighted mean key (N, D): t times its gradient."""
    t = temperature if learned_temperature is None else learned_temperature.to(compute_dtype(query))
    pairs = Pairs(query_ids, key_ids, valid_count, picked, band)
    if backend == "triton":
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            return triton_backend.negatives_logsumexp(query, keys, pairs, t, need_query_gradient, autocast)
    return torch_backend.negatives_logsumexp(query, keys, pairs, t, need_query_gradient)


@negatives_logsumexp.registered.register_fake
def _(query: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(query)
    mean_key = query.new_empty(query.shape if rest[-3] else (0,), dtype=dtype)
    return query.new_empty((query.shape[0],), dtype=dtype), mean_key


def _logsumexp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)
    _keep_inputs(ctx, inputs)


def _logsumexp_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    lse, mean_key = ctx.saved_tensors
    if grad is None:
        return (None,) * len(ctx.inputs)
    query, keys, learned, *pairs = ctx.inputs[:8]
    temperature = ctx.inputs[8]

    def formula(q: Tensor, k: Tensor, t: Tensor | None) -> Tensor:
        return torch_backend.dense_logsumexp(q, k, Pairs(*pairs), temperature if t is None else t.to(compute_dtype(q)))

    if torch.is_grad_enabled():  # create_graph
        return _dense_gradients(ctx, grad, formula, 3)
    _check_unchanged(ctx, query, learned)
    t = temperature if learned is None else learned.to(compute_dtype(query))
    need_query, need_keys, need_temperature = ctx.needs_input_grad[:3]
    out: list[Tensor | None] = [None] * len(ctx.inputs)
    if need_query:
        out[0] = (mean_key * (grad / t)[:, None]).to(query.dtype)
    if need_keys:
        _check_unchanged(ctx, keys, *pairs[:-1])
        one = torch.ones_like(lse)
        flags = False, False, [], *ctx.inputs[-2:]
        out[1] = keys_gradient(query, keys, grad, one, lse, None, learned, *pairs, temperature, *flags)
    if need_temperature:
        out[2] = (-(grad * (query * mean_key).sum(1)).sum() / t**2).to(learned.dtype)
    _release_inputs(ctx)
    return tuple(out)


negatives_logsumexp.register_autograd(_logsumexp_backward, setup_context=_logsumexp_context)


# ----------------------------------------------------------------------------------------------------- both backwards


@_operator(
    "(Tensor query, Tensor keys, Tensor grad, Tensor weight, Tensor lse, Tensor? unit, "
    f"Tensor? learned_temperature, {_PAIRS}, float temperature, bool normalize, bool normalize_keys, SymInt[] share, "
    "ScalarType? autocast, str backend) -> Tensor",
)
def keys_gradient(
    query: Tensor,
    keys: Tensor,
    grad: Tensor,  # (N,)
    weight: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    unit: Tensor | None,  # what it is for grad = 1, where the forward pass knows
    learned_temperature: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    valid_count: Tensor | None,
    picked: Tensor | None,
    band: list[int],
    temperature: float,
    normalize: bool,
    normalize_keys: bool,
    share: list[int],
    autocast: torch.dtype | None,
    backend: str,
) -> Tensor:
    """Gradient of share * sum_i grad_i weight_i lse_i with respect to the raw keys, in their shape and dtype."""
    if unit is not None and (grad.stride(0) == 0 or bool((grad == grad[0]).all())):  # a mean's is one number
        return (unit * grad[0]).to(keys.dtype)
    t = temperature if learned_temperature is None else learned_temperature.to(compute_dtype(query))
    pairs = Pairs(query_ids, key_ids, valid_count, picked, band)
    if backend == "triton":
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            return triton_backend.logsumexp_keys_gradient(
                query, keys, grad, weight, lse, pairs, t, normalize, normalize_keys, _ratio(share), autocast
            )
    row_weight = grad * weight * _ratio(share)
    return torch_backend.logsumexp_keys_gradient(
        query, keys, row_weight, lse, pairs, t, normalize, normalize_keys, keys.dtype
    )


@keys_gradient.registered.register_fake
def _(query: Tensor, keys: Tensor, *rest: Any) -> Tensor:
    return keys.new_empty(keys.shape)


@_operator(
    "(Tensor query, Tensor grad, Tensor weight, Tensor lse, Tensor similarity, Tensor? learned_temperature, "
    "SymInt[] band, float temperature, bool normalize, SymInt[] share, ScalarType? autocast, str backend, "
    "str both_roles) -> (Tensor gradient, Tensor temperature_gradient)",
)
def both_roles_gradient(
    query: Tensor,  # (2M, D)
    grad: Tensor,  # (2M,)
    weight: Tensor,  # (2M,)
    lse: Tensor,  # (2M,)
    similarity: Tensor,  # (2M,), to the positive
    learned_temperature: Tensor | None,
    band: list[int],
    temperature: float,
    normalize: bool,
    share: list[int],
    autocast: torch.dtype | None,
    backend: str,
    both_roles: str,
) -> tuple[Tensor, Tensor]:
    """Gradient of rows that are anchors, positives and keys, in their shape and dtype; and a learned temperature's."""
    t = temperature if learned_temperature is None else learned_temperature.to(compute_dtype(query))
    if backend == "triton":
        settings = both_roles == "keys", t, normalize, _ratio(share), autocast
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            return triton_backend.both_roles_gradient(query, grad, weight, lse, similarity, *settings)
    pairs_of_views = Pairs(band=band), both_roles == "keys"
    row_weight = grad * weight * _ratio(share)
    return torch_backend.both_roles_gradient(query, row_weight, lse, similarity, *pairs_of_views, t, normalize)


@both_roles_gradient.registered.register_fake
def _(query: Tensor, grad: Tensor, weight: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    learned, backend = rest[1], rest[-2]
    return query.new_empty(query.shape), lse.new_empty((0,) if learned is None and backend == "triton" else ())


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...]) -> None:
    # Not save_for_backward: its version check would reject a queue that was enqueued to before backward, though a
    # queue's keys are not needed there.
    ctx.inputs = inputs
    tensors = (x for x in inputs if isinstance(x, Tensor) and not x.is_inference())
    ctx.versions = {id(x): x._version for x in tensors}
    ctx.set_materialize_grads(False)  # or zeros for the gradients among the outputs


def _release_inputs(ctx: Any) -> None:
    """After a backward that keeps no graph, as torch lets go of what it saved itself."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # an older torch may not tell
    if keeps is not None and not keeps():
        ctx.inputs = ctx.versions = None


def _check_unchanged(ctx: Any, *tensors: Tensor | None) -> None:
    for x in tensors:
        if id(x) in ctx.versions and x is not None and x._version != ctx.versions[id(x)]:
            raise RuntimeError(
                "query, positive_key, negative_keys, temperature, ids: expected to be unchanged between the loss and "
                "backward(), which needs their values (for the keys' gradient, or create_graph=True), got one of "
                f"shape {tuple(x.shape)} changed in place. Call backward() first, or pass a clone."
            )


def _dense_gradients(ctx: Any, grad: Tensor, formula: Callable[..., Tensor], tensors: int) -> tuple[Tensor | None, ...]:
    """Gradients of the first ``tensors`` inputs that can be differentiated again, at eager's cost in memory."""
    _check_unchanged(ctx, *(x for x in ctx.inputs if isinstance(x, Tensor)))
    with torch.enable_grad():
        # Views, because one tensor may serve as positive and as keys, and each needs its own gradient.
        views = [None if x is None else x.view_as(x) for x in ctx.inputs[:tensors]]
        wanted = {i: x for i, x in enumerate(views) if x is not None and ctx.needs_input_grad[i]}
        gradients = torch.autograd.grad(formula(*views), list(wanted.values()), grad, create_graph=True)
    out: list[Tensor | None] = [None] * len(ctx.inputs)
    for i, gradient in zip(wanted, gradients, strict=True):
        out[i] = gradient
    return tuple(out)
