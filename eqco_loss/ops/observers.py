"""Who looks on at a call: compilers, modes, transforms, tracers. Where nobody does, a call passes the dispatcher by.

Private names of torch that are used here:

- ``torch._C._len_torch_dispatch_stack``, ``torch._C._functorch.peek_interpreter_stack``: whether a mode or a transform
  looks on. The dispatcher's wrappers cost 0.1 to 0.3 ms. ``get_interpreter_stack`` and ``TransformType``: which one.
- ``torch._C._autograd._top_saved_tensors_default_hooks``: whether what is kept for backward may come back otherwise.
- ``torch.autograd.forward_ad._current_level``, ``torch._C._is_tracing``: forward differentiation, torch.jit.trace.
- ``torch._C._autograd._get_current_graph_task_keep_graph``: whether a backward may come again. An older torch may not
  have it; then inputs are kept as long as the loss.
- ``torch._C._functorch.is_batchedtensor``, ``get_unwrapped``, ``is_legacy_batchedtensor``: what ``vmap`` hides.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unobserved() -> bool:
    """Whether no compiler, mode, transform, tracer, forward differentiation or hook of saved tensors looks on."""
    if torch.compiler.is_compiling() or in_forward_mode():
        return False
    return not looked_on() and not is_traced() and _saved_tensors_hooks(True) is None


def in_forward_mode() -> bool:
    """Whether torch.func.jvp or forward_ad differentiates, which a compiler sees, too."""
    return torch.autograd.forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether torch.jit.trace records."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def is_transformed_by_grad() -> bool:
    """Whether torch.func.grad, vjp or jacrev transforms the call, which a compiler sees to itself."""
    if torch.compiler.is_compiling():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or []
    return any(one.key() == torch._C._functorch.TransformType.Grad for one in transforms)


# Without it every call is taken for one that a hook looks on at.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def looked_on() -> bool:
    """Whether a compiler, a mode or a transform of torch.func must see the operator itself."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def graph_is_kept() -> bool:
    """Whether this backward may be followed by another one of the same loss, as far as torch tells."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or bool(keeps())


def without_memory(x: Tensor) -> bool:
    return x.is_meta


def requires_grad(x: Tensor | None) -> bool:
    """Whether x requires a gradient, also where torch.func.vmap hides it; there a compiler cannot tell, and it may."""
    while x is not None and torch._C._functorch.is_batchedtensor(x):
        if torch.compiler.is_compiling():
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return x is not None and x.requires_grad


def is_batched(x: Tensor | None) -> bool:
    """Whether x is a batch of torch.autograd.grad(is_grads_batched=True), which torch keeps apart from torch.func."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)
