"""What an operator is: registered from its record's fields, sent to a backend, and differentiated.

An operator takes a record of ``calls.py`` and returns another. torch's dispatcher gets its fields one by one
(``flat.py``). The five operators are in ``operators.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import NoneType
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn

from .calls import KeysGradient, LogSumExp, Row, RowLosses, SymmetricGradient, SymmetricLosses, compute_dtype
from .flat import Call, arguments, flatten, unflatten
from .observers import graph_is_kept, is_batched, looked_on, without_memory

# An operator's name ends with this, because torch's compiler keeps graphs on disk under the operators' names, and a
# graph knows the operators' arguments and the sizes of their outputs.
_RECORDS = (RowLosses, KeysGradient, SymmetricLosses, SymmetricGradient, LogSumExp)
_KEPT = 2  # counted up where ``SymmetricOutputs.kept`` gets another size
LAYOUT = f"{len(Row)}_{sum(len(list(arguments(record))) for record in _RECORDS)}_{_KEPT}"
Out = TypeVar("Out")  # what it returns
Result = TypeVar("Result")
Gradients = dict[str, Tensor]  # by the argument's name

_PLAIN = frozenset({Tensor, nn.Parameter, NoneType, float, int, bool, str, list, torch.dtype})


# -------------------------------------------------------------------------------------------------------- the operator


class Operator(Generic[Call, Out]):
    """One operator. ``differentiable`` names the flat arguments that its backward gives gradients of.

    ``twins`` names two of them, which may be one tensor: positives that are the keys. Autograd then gets the tensor
    once, as the second, whose gradient has to be that of both. ``spelt_out`` turns an answer into one whose shapes
    follow from the call alone, as compilers ask.
    """

    def __init__(
        self,
        name: str,
        call: type[Call],
        outputs: Callable[..., Out],
        implementation: Callable[[Call], Any],
        fake: Callable[[Call], Any],
        differentiable: Sequence[str] = (),
        twins: Sequence[str] = (),
        backward: Callable[[Any, Call, Tensor], Gradients] | None = None,
        spelt_out: Callable[[Call, Any], Any] = lambda _, answer: answer,
    ) -> None:
        self.name, self.record, self.outputs = f"{name}_{LAYOUT}", call, outputs
        self.implementation = implementation
        self.may_lack = [NoneType in get_args(hint) for hint in get_type_hints(outputs).values()]
        fields = dict(arguments(call))
        self.places = [list(fields).index(name) for name in differentiable]
        self.tensors = itemgetter(*(n for n, hint in enumerate(fields.values()) if Tensor in (hint, *get_args(hint))))
        self.differentiable, self.twins = differentiable, [list(differentiable).index(name) for name in twins]

        def flat(*inputs: Any) -> Any:
            asked = unflatten(call, inputs)
            return _filled(asked, spelt_out(asked, self.run(asked)), inputs)

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
        self.registered.register_fake(lambda *inputs: _filled(asked := unflatten(call, inputs), fake(asked)))
        self.function: type[torch.autograd.Function] | None = None
        if backward is not None:
            self._register_autograd(name, backward)

    def _register_autograd(self, name: str, backward: Callable[[Any, Call, Tensor], Gradients]) -> None:
        def gradients(ctx: Any, grad: Tensor | None, *_: Any) -> list[Tensor | None]:
            if grad is None:
                return [None] * len(self.differentiable)
            if ctx.call is None:
                tuple(ctx.saved_tensors)  # raises torch's error of a second backward
            if not torch.compiler.is_compiling() and grad.is_neg():
                grad = grad.resolve_neg()
            found = _there(grad, backward, ctx, ctx.call, grad) if ctx.plain else backward(ctx, ctx.call, grad)
            _release(ctx)
            return [found.get(name) for name in self.differentiable]

        def forward(ctx: Any, call: Call, flat: list[Any], others: list[Tensor], *differentiable: Tensor | None) -> Any:
            # Only the loss is an output, as each more would cost time; the others go to the caller through the list.
            loss, *others[:] = self.run(call)
            tensors = self.tensors(flat)
            _keep(ctx, call, tensors, others, self._needed(differentiable, ctx.needs_input_grad[3:]))
            ctx.plain = True  # as tensors are that came past the dispatcher
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
            ctx.length, ctx.plain = len(inputs), False

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
        return _there(call[0], self.implementation, call)

    def __call__(self, call: Call) -> Out:
        flat = flatten(self.record, call)
        plain = not looked_on() and not without_memory(flat[0]) and _PLAIN.issuperset(map(type, flat))
        # Memory that holds a tensor's negative, as that of z.conj().imag does, is copied by the dispatcher.
        plain = plain and not any(x is not None and x.is_neg() for x in self.tensors(flat))
        if plain and self.function is not None:
            others: list[Tensor] = []
            loss = self.function.apply(call, flat, others, *self._leaves(flat))
            return self.outputs(loss, *others)
        if plain and not any(map(is_batched, self.tensors(flat))):
            return self.run(call)  # type: ignore[no-any-return]
        answer = zip(self.registered(*flat), self.may_lack, strict=True)
        return self.outputs(*(_given(field) if may_lack else field for field, may_lack in answer))

    def in_backward(self, ctx: Any, call: Call, grad: Tensor) -> Out:
        """The answer to a call whose tensors forward has seen, all but the gradient."""
        if ctx.plain and type(grad) is Tensor and not looked_on() and not is_batched(grad):
            return self.run(call)  # type: ignore[no-any-return]
        return self(call)

    def flat(self, call: Call) -> list[Any]:
        """A call's arguments, as the dispatcher and ``again`` take them."""
        return flatten(self.record, call)

    def again(self, flat: list[Any]) -> Tensor:
        """The loss of a call like one before, whose arguments are plain, where nobody looks on (``unobserved``)."""
        return self.function.apply(unflatten(self.record, flat), flat, [], *self._leaves(flat))  # type: ignore

    def _leaves(self, flat: list[Any]) -> list[Tensor | None]:
        """What autograd gets: None for the first of two twins, as compiled autograd wants a gradient of all it gets."""
        leaves = [flat[place] for place in self.places]
        if self.twins and leaves[self.twins[0]] is leaves[self.twins[1]]:
            leaves[self.twins[0]] = None
        return leaves


def _there(x: Tensor, function: Callable[..., Result], *arguments: Any) -> Result:
    """``function`` with x's GPU as the current one, which is where Triton launches."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return function(*arguments)
    with torch.cuda.device_of(x):
        return function(*arguments)


def _filled(call: Any, answer: Any, inputs: Sequence[Any] = ()) -> tuple[Tensor, ...]:
    """What the dispatcher gets, which takes no None and no argument: vectors without elements, and copies."""
    x, given = call[0], {id(one) for one in inputs if one is not None}
    return tuple(
        x.new_empty(0, dtype=compute_dtype(x)) if field is None else field.clone() if id(field) in given else field
        for field in answer
    )


def _given(field: Tensor | None) -> Tensor | None:
    """Of an answer's field that may be None: what it was before ``_filled``."""
    return None if field is not None and field.shape == (0,) else field


def kept_answer(ctx: Any) -> list[Any]:
    """The fields but for the loss, of which none is a vector: what ``_keep`` kept of them."""
    return list(ctx.saved_tensors) if ctx.plain else [*map(_given, ctx.saved_tensors)]


class Asked(NamedTuple):
    """What an operator is asked."""

    operator: Operator[Any, Any]
    call: RowLosses | SymmetricLosses


# ------------------------------------------------------------------------------------------- what backward needs, kept


def _keep(
    ctx: Any, call: Any, tensors: Sequence[Tensor | None], others: Sequence[Tensor | None], needed: list[str]
) -> None:
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
    if not graph_is_kept():
        ctx.call = ctx.versions = None


def check_unchanged(ctx: Any, *tensors: Tensor | None) -> None:
    for x in tensors:
        if id(x) in ctx.versions and x is not None and x._version != ctx.versions[id(x)]:
            raise RuntimeError(
                "query, positive_key, negative_keys, temperature, ids: expected to be unchanged between the loss and "
                "backward(), which needs their values (for the keys' gradient, or create_graph=True), got one of "
                f"shape {tuple(x.shape)} changed in place. Call backward() first, or pass a clone."
            )


def dense_gradients(
    ctx: Any, operator: Operator[Any, Any], formula: Callable[[Any], Tensor], grad: Tensor
) -> Gradients:
    """Gradients that can be differentiated again, at eager's cost in memory."""
    flat = flatten(operator.record, ctx.call)
    check_unchanged(ctx, *(x for x in flat if isinstance(x, Tensor)))
    twin, other = operator.twins or (0, 0)
    together = (
        operator.differentiable[twin] not in ctx.needed and flat[operator.places[twin]] is flat[operator.places[other]]
    )
    with torch.enable_grad():
        views = {}
        for name, place in zip(operator.differentiable, operator.places, strict=True):
            if flat[place] is not None:  # a view, because one tensor may serve in several roles
                flat[place] = view = flat[place].view_as(flat[place])
                if name in ctx.needed:
                    views[name] = view
        if together:
            flat[operator.places[twin]] = flat[operator.places[other]]
        loss = formula(unflatten(operator.record, flat))
        gradients = torch.autograd.grad(loss, list(views.values()), grad, create_graph=True)
    return dict(zip(views, gradients, strict=True))
