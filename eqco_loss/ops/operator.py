"""The operators: registered from their records' fields, sent to a backend, and differentiated.

An operator takes a record of ``calls.py`` and returns another. torch's dispatcher gets its fields one by one
(``flat.py``).

Private names of torch that are used here, and why:

- ``torch._C._len_torch_dispatch_stack``, ``torch._C._functorch.peek_interpreter_stack``: whether a mode or a transform
  looks on. Where nobody does, a call passes the dispatcher by, whose wrappers cost 0.1 to 0.3 ms.
- ``torch._C._functorch.is_batchedtensor``, ``get_unwrapped``, ``is_legacy_batchedtensor``: what ``vmap`` hides.
- ``torch._C._autograd._get_current_graph_task_keep_graph``: whether inputs may be let go of after backward. An older
  torch may not have it; then they are kept as long as the loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import NoneType
from typing import Any, Generic, TypeVar, get_args

import torch
from torch import Tensor, nn

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
from .flat import Call, arguments, flatten, unflatten

# An operator's name ends with this, because torch's compiler keeps graphs on disk under the operators' names, and a
# graph knows the operators' arguments and the sizes of their outputs.
_RECORDS = (RowLosses, KeysGradient, SymmetricLosses, SymmetricGradient, LogSumExp)
_KEPT = 2  # counted up where ``SymmetricOutputs.kept`` gets another size
LAYOUT = f"{len(Row)}_{sum(len(list(arguments(record))) for record in _RECORDS)}_{_KEPT}"
Out = TypeVar("Out")  # what it returns
Gradients = dict[str, Tensor]  # by the argument's name

_PLAIN = frozenset({Tensor, nn.Parameter, NoneType, float, int, bool, str, list, torch.dtype})


# -------------------------------------------------------------------------------------------------------- the operator


class Operator(Generic[Call, Out]):
    """One operator. ``differentiable`` names the flat arguments that its backward gives gradients of."""

    def __init__(
        self,
        name: str,
        call: type[Call],
        outputs: Callable[..., Out],
        implementation: Callable[[Call], Any],
        fake: Callable[[Call], Any],
        differentiable: Sequence[str] = (),
        backward: Callable[[Any, Call, Tensor], Gradients] | None = None,
    ) -> None:
        self.name, self.record, self.outputs = f"{name}_{LAYOUT}", call, outputs
        self.implementation = implementation
        fields = dict(arguments(call))
        self.places = [list(fields).index(name) for name in differentiable]
        self.tensors = itemgetter(*(n for n, hint in enumerate(fields.values()) if Tensor in (hint, *get_args(hint))))
        self.differentiable = differentiable

        def flat(*inputs: Any) -> Any:
            return tuple(self.run(unflatten(call, inputs)))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in fields.items()]
        returns = tuple[(Tensor,) * len(outputs._fields)]  # type: ignore
        flat.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
        self.registered = torch.library.custom_op(
            f"eqco_loss::{self.name}",
            flat,
            mutates_args=(),
            schema=torch.library.infer_schema(flat, mutates_args=()),
        )
        self.registered.register_fake(lambda *inputs: tuple(fake(unflatten(call, inputs))))
        self.function: type[torch.autograd.Function] | None = None
        if backward is not None:
            self._register_autograd(name, backward)

    def _register_autograd(self, name: str, backward: Callable[[Any, Call, Tensor], Gradients]) -> None:
        def gradients(ctx: Any, grad: Tensor | None, *_: Any) -> list[Tensor | None]:
            if grad is None:
                return [None] * len(self.differentiable)
            if ctx.call is None:
                tuple(ctx.saved_tensors)  # raises torch's error of a second backward
            found = backward(ctx, ctx.call, grad)
            _release(ctx)
            return [found.get(name) for name in self.differentiable]

        def forward(ctx: Any, call: Call, flat: list[Any], others: list[Tensor], *differentiable: Tensor | None) -> Any:
            # Only the loss is an output, as each more would cost time; the others go to the caller through the list.
            loss, *others[:] = self.run(call)
            tensors = self.tensors(flat)
            _keep(ctx, call, tensors, others, self._needed(differentiable, ctx.needs_input_grad[3:]))
            return loss

        def function_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, None, None, *gradients(ctx, grad))

        methods = {"forward": staticmethod(forward), "backward": staticmethod(function_backward)}
        self.function = type(name, (torch.autograd.Function,), methods)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            tensors = [inputs[place] for place in self.places]
            needed = self._needed(tensors, [ctx.needs_input_grad[place] for place in self.places])
            given = self.tensors(inputs)
            ctx.mark_non_differentiable(*output[1:])
            _keep(ctx, unflatten(self.record, inputs), given, output[1:], needed)
            ctx.length = len(inputs)

        def registered_backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            flat: list[Tensor | None] = [None] * ctx.length
            for place, gradient in zip(self.places, gradients(ctx, *grads), strict=True):
                flat[place] = gradient
            return tuple(flat)

        self.registered.register_autograd(registered_backward, setup_context=setup_context)

    def _needed(self, tensors: Sequence[Any], needs: Sequence[bool]) -> list[str]:
        found = zip(self.differentiable, tensors, needs, strict=True)
        return [name for name, x, need in found if need and x is not None]

    def run(self, call: Call) -> Any:
        x: Tensor = call[0]
        if not x.is_cuda:
            return self.implementation(call)
        with torch.cuda.device_of(x):
            return self.implementation(call)

    def __call__(self, call: Call) -> Out:
        flat = flatten(self.record, call)
        plain = not _looked_on() and not _without_memory(flat[0]) and _PLAIN.issuperset(map(type, flat))
        if plain and self.function is not None:
            others: list[Tensor] = []
            loss = self.function.apply(call, flat, others, *[flat[place] for place in self.places])
            return self.outputs(loss, *others)
        if plain and not any(map(_is_batched, self.tensors(flat))):
            return self.run(call)  # type: ignore[no-any-return]
        return self.outputs(*self.registered(*flat))


def _looked_on() -> bool:
    """Whether a compiler, a mode or a transform of torch.func must see the operator itself."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _without_memory(x: Tensor) -> bool:
    return x.is_meta


def requires_grad(x: Tensor | None) -> bool:
    """Whether x requires a gradient, also where torch.func.vmap hides it."""
    if x is not None and not torch.compiler.is_compiling():
        while torch._C._functorch.is_batchedtensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return x is not None and x.requires_grad


def _is_batched(x: Tensor | None) -> bool:
    """Whether x is a batch of torch.autograd.grad(is_grads_batched=True), which torch keeps apart from torch.func."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)


# ------------------------------------------------------------------------------------------- what backward needs, kept


def _keep(ctx: Any, call: Any, tensors: Sequence[Tensor | None], others: Sequence[Tensor], needed: list[str]) -> None:
    """Keep for backward the call and its outputs other than the loss.

    Inputs are not in ``save_for_backward``, because its version check would reject a queue that was enqueued to before
    backward, though backward does not need a queue's keys.
    """
    ctx.save_for_backward(*others)
    ctx.call, ctx.needed = call, needed
    ctx.versions = {id(x): x._version for x in tensors if x is not None and not x.is_inference()}
    ctx.set_materialize_grads(False)  # or autograd would make zeros for the outputs that are not differentiable


def _release(ctx: Any) -> None:
    """Let go of the inputs after a backward that keeps no graph, as torch does of what it saved itself."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps is not None and not keeps():
        ctx.call = ctx.versions = None


def _check_unchanged(ctx: Any, *tensors: Tensor | None) -> None:
    for x in tensors:
        if id(x) in ctx.versions and x is not None and x._version != ctx.versions[id(x)]:
            raise RuntimeError(
                "query, positive_key, negative_keys, temperature, ids: expected to be unchanged between the loss and "
                "backward(), which needs their values (for the keys' gradient, or create_graph=True), got one of "
                f"shape {tuple(x.shape)} changed in place. Call backward() first, or pass a clone."
            )


def _dense_gradients(
    ctx: Any, operator: Operator[Any, Any], formula: Callable[[Any], Tensor], grad: Tensor
) -> Gradients:
    """Gradients that can be differentiated again, at eager's cost in memory."""
    flat = flatten(operator.record, ctx.call)
    _check_unchanged(ctx, *(x for x in flat if isinstance(x, Tensor)))
    with torch.enable_grad():
        views = {}
        for name, place in zip(operator.differentiable, operator.places, strict=True):
            if flat[place] is not None:  # a view, because one tensor may serve as positive and as keys
                flat[place] = view = flat[place].view_as(flat[place])
                if name in ctx.needed:
                    views[name] = view
        loss = formula(unflatten(operator.record, flat))
        gradients = torch.autograd.grad(loss, list(views.values()), grad, create_graph=True)
    return dict(zip(views, gradients, strict=True))


def _times(call: RowLosses, unit: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a sum over rows, (N, D), times grad, () or (N,)."""
    if _looked_on() or _is_batched(grad):  # a compiler makes one kernel of it, and vmap has no out=
        factor = grad if grad.dim() == 0 else grad[:, None]
        return ((unit if unit.dtype == grad.dtype else unit.to(grad.dtype)) * factor).to(dtype)
    return BACKENDS[call.backend].times(unit, grad, dtype)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------- row losses


def _row_losses_fake(call: RowLosses) -> RowOutputs:
    n, dtype, backend = call.query.shape[0], compute_dtype(call.query), BACKENDS[call.backend]
    in_forward = call.need_keys_gradient and backend.gives_keys_gradient(call)

    def new(*shape: int, wanted: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return call.query.new_empty(shape if wanted else (0,), dtype=dtype)

    def unit(x: Tensor, wanted: bool) -> Tensor:
        return new(*x.shape, dtype=backend.unit_dtype(x.dtype)) if wanted else new(0)

    return RowOutputs(
        loss=new() if call.reduced else new(n),
        query_gradient=unit(call.query, call.need_query_gradient),
        positive_gradient=unit(call.positive, call.need_positive_gradient),
        keys_gradient=new(*call.first.keys.shape, wanted=in_forward),
        rows=new(len(Row), n),
        metrics=new(len(Metric), n, wanted=call.need_metrics),
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
    _check_unchanged(ctx, call.query, call.learned_temperature, one.keys, *one.pairs[:-1])
    return keys_gradient(
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
        )
    )


def _row_losses_backward(ctx: Any, call: RowLosses, grad: Tensor) -> Gradients:
    if torch.is_grad_enabled():  # create_graph=True
        return _dense_gradients(ctx, row_losses, definition.row_losses, grad)
    query_gradient, positive_gradient, keys_gradient_, rows, _ = ctx.saved_tensors
    found: Gradients = {}
    units = {"query": (query_gradient, call.query), "positive": (positive_gradient, call.positive)}
    if keys_gradient_.dim() == call.first.keys.dim():
        units["first_keys"] = keys_gradient_, call.first.keys
    units = {name: unit for name, unit in units.items() if name in ctx.needed}
    if "first_keys" in ctx.needed and "first_keys" not in units:
        query, _ = units.pop("query", (None, None))
        # Of positives that are the keys, the gradients belong to one tensor, and autograd need not add them.
        positive, _ = units.pop("positive", (None, None)) if call.positive is call.first.keys else (None, None)
        of_keys = _of_keys(ctx, call, call.first, grad, rows, call.normalize, query, positive)
        found["first_keys"] = of_keys.keys
        if query is not None:
            found["query"] = of_keys.query
    if "second_keys" in ctx.needed and call.second is not None:
        found["second_keys"] = _of_keys(ctx, call, call.second, grad, rows, call.normalize).keys
    for name, (unit, x) in units.items():
        found[name] = _times(call, unit, grad, x.dtype)
    if "learned_temperature" in ctx.needed and call.learned_temperature is not None:
        of_rows = rows[Row.TEMPERATURE_GRADIENT]
        found["learned_temperature"] = (grad * of_rows).sum().to(call.learned_temperature.dtype)
    return found


row_losses = Operator(
    "row_losses",
    RowLosses,
    RowOutputs,
    lambda call: BACKENDS[call.backend].row_losses(call),
    _row_losses_fake,
    ("query", "positive", "first_keys", "second_keys", "learned_temperature"),
    _row_losses_backward,
)

keys_gradient = Operator(
    "keys_gradient",
    KeysGradient,
    KeysGradients,
    lambda call: BACKENDS[call.backend].keys_gradient(call),
    lambda call: KeysGradients(
        call.first.keys.new_empty(call.first.keys.shape),
        call.query.new_empty(call.query.shape) if call.query_gradient is not None else call.rows.new_empty(0),
    ),
)


# ----------------------------------------------------------------------------------------------------- symmetric losses


def _symmetric_losses_fake(call: SymmetricLosses) -> SymmetricOutputs:
    m, dtype, new = call.first.shape[0], compute_dtype(call.first), call.first.new_empty
    shape, of_kept = BACKENDS[call.backend].keeps(call)
    return SymmetricOutputs(new((), dtype=dtype), new((len(Row), 2 * m), dtype=dtype), new(shape, dtype=of_kept))


def _symmetric_losses_backward(ctx: Any, call: SymmetricLosses, grad: Tensor) -> Gradients:
    if torch.is_grad_enabled():
        return _dense_gradients(ctx, symmetric_losses, definition.symmetric_losses, grad)
    rows, kept = ctx.saved_tensors
    _check_unchanged(ctx, call.learned_temperature)
    if not kept.numel() or kept.dtype != call.first.dtype:  # else the views themselves are kept, or their gradient
        _check_unchanged(ctx, call.first, call.second)
    gradients = symmetric_gradient(
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
        )
    )
    m, views = call.first.shape[0], gradients.views
    if _looked_on() or _is_batched(grad):
        found = {"first": views[:m], "second": views[m:]}
    else:  # each half has a count of changes of its own, so that changing one in place does not mark the other
        found = dict(zip(("first", "second"), views.unsafe_split(m), strict=True))
    if call.learned_temperature is not None:
        found["learned_temperature"] = gradients.temperature.to(call.learned_temperature.dtype)
    return found


symmetric_losses = Operator(
    "symmetric_losses",
    SymmetricLosses,
    SymmetricOutputs,
    lambda call: BACKENDS[call.backend].symmetric_losses(call),
    _symmetric_losses_fake,
    ("first", "second", "learned_temperature"),
    _symmetric_losses_backward,
)

symmetric_gradient = Operator(
    "symmetric_gradient",
    SymmetricGradient,
    SymmetricGradients,
    lambda call: BACKENDS[call.backend].symmetric_gradient(call),
    lambda call: SymmetricGradients(
        call.first.new_empty((2 * call.first.shape[0], call.first.shape[1])),
        call.rows.new_empty((0,) if call.learned_temperature is None else ()),
    ),
)


# -------------------------------------------------------------------------------------------------------- log-sum-exps


def _logsumexp_fake(call: LogSumExp) -> LogSumExpOutputs:
    (n, d), dtype = call.query.shape, compute_dtype(call.query)
    mean_key = call.query.new_empty((n, d) if call.need_query_gradient else (0,), dtype=dtype)
    return LogSumExpOutputs(
        call.query.new_empty((n,), dtype=dtype), mean_key, call.query.new_empty((len(Row), n), dtype=dtype)
    )


def _logsumexp_backward(ctx: Any, call: LogSumExp, grad: Tensor) -> Gradients:
    if torch.is_grad_enabled():
        return _dense_gradients(ctx, logsumexp, definition.logsumexp, grad)
    mean_key, rows = ctx.saved_tensors
    _check_unchanged(ctx, call.query, call.learned_temperature)
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
    _logsumexp_backward,
)
