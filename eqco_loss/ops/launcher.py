"""Launches of Triton's kernels, for every backend that has some.

At each launch Triton binds the arguments and compares every global that the kernel uses, which takes 60 to 90 us where
there are 60 arguments. The compiled kernel that this finds is kept here under everything that Triton compiles another
kernel for, and later launches go straight to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from types import NoneType
from typing import Any, NamedTuple

from torch import Tensor

DIRECT = True  # False, for benchmarks and tests, takes Triton's own road at every launch
MOST_KEPT = 1024  # compiled kernels of one pattern, so that strides which change at every step fill no memory


class _Pattern(NamedTuple):
    """Launches of one kernel whose arguments have the same types and whose constants have the same names."""

    tensors: Callable[[Sequence[Any]], tuple[Tensor, ...]]  # picks them from the arguments
    specialised: Callable[[Sequence[Any]], tuple[Any, ...]]  # integers for whose value a kernel may be compiled
    others: Callable[[Sequence[Any]], tuple[int, ...]]  # integers of which only the width counts
    last: tuple[str, ...]  # the constexprs' names, in the kernel's order
    compiled: dict[tuple[Any, ...], Any]


_patterns: dict[tuple[Any, ...], _Pattern | None] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``: a tensor and more, all constexprs, and Triton's options."""
    kind = (id(kernel), *map(type, arguments), *constants)
    pattern = _patterns[kind] if kind in _patterns else _patterns.setdefault(kind, _pattern(kernel, arguments))
    if pattern is None or not DIRECT or max(pattern.others(arguments), default=0) >= 2**31:
        kernel[grid](*arguments, **constants)
        return
    tensors = pattern.tensors(arguments)
    key = (
        tensors[0].get_device(),
        *[x.dtype for x in tensors],
        *[x.data_ptr() % 16 for x in tensors],
        *pattern.specialised(arguments),
        *constants.values(),
    )
    compiled = pattern.compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*arguments, *[constants[name] for name in pattern.last])
        return
    if len(pattern.compiled) >= MOST_KEPT:
        pattern.compiled.clear()
    compiled = kernel[grid](*arguments, **constants)
    if compiled is not None:  # None where a hook of Triton's has taken the compilation over
        pattern.compiled[key] = compiled


def _pattern(kernel: Any, arguments: Sequence[Any]) -> _Pattern | None:
    """None for a kernel that Triton's interpreter runs, which compiles nothing."""
    parameters = getattr(kernel, "params", None)
    if parameters is None:
        return None
    places = range(len(arguments))
    tensors = [place for place in places if isinstance(arguments[place], Tensor)]
    others = [place for place in places if type(arguments[place]) is int and parameters[place].do_not_specialize]
    by_type = (Tensor, float, NoneType)  # None is compiled away, and no float has a kernel of its own
    specialised = [place for place in places if place not in others and not isinstance(arguments[place], by_type)]
    last = tuple(kernel.arg_names[len(arguments) :])
    return _Pattern(_picker(tensors), _picker(specialised), _picker(others), last, {})


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple(values[place] for place in places)
