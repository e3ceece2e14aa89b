"""Launches of Triton's kernels, for every backend that has some.

At each launch Triton binds the arguments and compares every global that the kernel uses, which takes 60 to 90 us where
there are 60 arguments. The compiled kernel that this finds is kept here under everything that Triton compiles another
kernel for, and later launches go straight to it. Of a call that is like one before, most of that is known besides.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

DIRECT = True  # False, for benchmarks and tests, takes Triton's own road at every launch
# The most launches that are kept by their constants, and kernels that each launch keeps for one list of types: strides
# or constants that change at every step would fill the memory. A full table is emptied.
MOST_KEPT = 1024

_dtype_of = attrgetter("dtype")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors, as TRITON_INTERPRET=1 asks at the first use."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@functools.cache
def multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


class _Pattern(NamedTuple):
    """Launches whose arguments have the same types."""

    tensors: Callable[[Sequence[Any]], tuple[Tensor, ...]]  # picks them from the arguments
    specialised: Callable[[Sequence[Any]], tuple[Any, ...]]  # integers for whose value a kernel may be compiled
    others: Callable[[Sequence[Any]], tuple[int, ...]]  # integers of which only the width counts
    last: tuple[Any, ...]  # the constexprs, in the kernel's order
    compiled: dict[tuple[Any, ...], Any]

    def key(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """All beside the types that Triton may compile another kernel for."""
        tensors = self.tensors(arguments)
        return (
            tensors[0].get_device(),
            *map(_dtype_of, tensors),
            *_alignments(tensors),
            *self.specialised(arguments),
        )


class _Kind(NamedTuple):
    """Launches of calls of one kind, which differ in nothing but where their tensors begin."""

    pattern: _Pattern
    runs: dict[tuple[int, ...], Callable[..., None]]  # by the tensors' alignments


class Launch:
    """A kernel with its constexprs and Triton's options fixed.

    A call takes the grid and the other arguments, of which one at least is a tensor. Plans keep it, so that no launch
    has to look two dozen constants up again.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        self.patterns: dict[tuple[type, ...], _Pattern] = {}
        self.kinds: dict[Hashable, _Kind] = {}
        self.interpreted = getattr(kernel, "params", None) is None  # Triton's interpreter compiles nothing

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        if self.interpreted or not DIRECT:
            self.kernel[grid](*arguments, **self.constants)
            return
        types = tuple(map(type, arguments))
        pattern = self.patterns.get(types) or self._pattern(types)
        key = pattern.key(arguments)
        compiled = pattern.compiled.get(key)
        if max(pattern.others(arguments), default=0) >= 2**31:
            self.kernel[grid](*arguments, **self.constants)
        elif compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*arguments, *pattern.last)
        else:
            if len(pattern.compiled) >= MOST_KEPT:
                pattern.compiled.clear()
            compiled = self.kernel[grid](*arguments, **self.constants)
            # None where a hook of Triton's has taken the compilation over; a promise where Triton compiles aside.
            if hasattr(type(compiled), "__getitem__"):
                pattern.compiled[key] = compiled

    def again(self, kind: Hashable, grid: tuple[int, ...], *arguments: Any) -> None:
        """The same, where a kind's later launches have the grid, types, dtypes, devices and numbers of its first.

        ``kind`` may be that of a call that makes one such launch (``calls.once_a_kind``); 0 promises nothing.
        """
        one = self.kinds.get(kind) if DIRECT else None
        run = None if one is None else one.runs.get(_alignments(one.pattern.tensors(arguments)))
        if one is not None and run is not None:
            run(*arguments, *one.pattern.last)
            return
        self(grid, *arguments)
        if kind and DIRECT and not self.interpreted:
            self._keep(kind, grid, arguments)

    def _keep(self, kind: Hashable, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        pattern = self.patterns[tuple(map(type, arguments))]
        compiled = pattern.compiled.get(pattern.key(arguments))
        if compiled is None or max(pattern.others(arguments), default=0) >= 2**31:
            return
        if len(self.kinds) >= MOST_KEPT:
            self.kinds.clear()
        one = self.kinds.setdefault(kind, _Kind(pattern, {}))
        one.runs[_alignments(pattern.tensors(arguments))] = compiled[(*grid, 1, 1)[:3]]

    def _pattern(self, types: tuple[type, ...]) -> _Pattern:
        parameters, places = self.kernel.params, range(len(types))
        tensors = [place for place in places if issubclass(types[place], Tensor)]
        others = [place for place in places if types[place] is int and parameters[place].do_not_specialize]
        by_type = (Tensor, float, NoneType)  # None is compiled away, and no float has a kernel of its own
        specialised = [place for place in places if place not in others and not issubclass(types[place], by_type)]
        last = tuple(self.constants[name] for name in self.kernel.arg_names[len(types) :])
        found = _Pattern(_picker(tensors), _picker(specialised), _picker(others), last, {})
        return self.patterns.setdefault(types, found)


def _alignments(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Triton compiles another kernel for an address that 16 does not divide."""
    return tuple([address % 16 for address in map(Tensor.data_ptr, tensors)])


_bound: dict[tuple[Any, ...], Launch] = {}


def bind(kernel: Any, constants: dict[str, Any]) -> Launch:
    """The launch that is kept for these constants, or a new one. Callers share what it has compiled."""
    key = (id(kernel), *constants, *constants.values())
    found = _bound.get(key)
    if found is None:
        if len(_bound) >= MOST_KEPT:
            _bound.clear()
        found = _bound.setdefault(key, Launch(kernel, constants))
    return found


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, for callers without a plan: each call looks the constants up."""
    bind(kernel, constants)(grid, *arguments)


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple(values[place] for place in places)
