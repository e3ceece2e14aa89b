"""Triton's interpreter, exact and in half the time.

It keeps bfloat16 as bit patterns, which it multiplies as they are, and cuts instead of rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


def _widened(bits: Any) -> Any:
    """bfloat16 as uint16 (...) to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _rounded(values: Any) -> Any:
    """float32 (...) to bfloat16 as uint16, to the nearest, as a GPU does."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """Kernels that run in the interpreter convert and multiply bfloat16 as a GPU does, sums in float32."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, convert, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot

    def between(src: Any, to: Any) -> Any:
        """The conversion, if it is one between bfloat16 and float32."""
        kinds = src.dtype.scalar, to.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_widened(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_rounded(src.data), tl.bfloat16)
        assert tl.bfloat16 not in kinds or kinds[0] == kinds[1], kinds
        return None

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        found = between(src, to)  # which is false where it holds a zero
        return cast(self, src, to) if found is None else found

    def create_fp_to_fp(self: Any, src: Any, to: Any, *rounding: Any) -> Any:
        found = between(src, to)
        return convert(self, src, to, *rounding) if found is None else found

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *rest)

    with mock.patch.multiple(
        InterpreterBuilder, cast_impl=cast_impl, create_fp_to_fp=create_fp_to_fp, create_dot=create_dot
    ):
        yield


@contextmanager
def quicker() -> Iterator[None]:
    """What the interpreter does for each call of a helper and for each element, once.

    It replaces the language's functions by its own for every helper that a kernel calls, makes a table of all dtypes to
    look one up, and reduces by a function of ours element by element, which is done by halves here.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, run, dtype = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    patched: set[tuple[bool, ...]] = set()  # in this launch: whether a function of tl's and one of tl.core's was met
    dtypes: dict[str, Any] = {}

    def patch_lang(function: Any) -> Any:
        names = list(function.__globals__.values())
        seen = tuple(any(x is language for x in names) for language in (tl, tl.core))
        found = None if seen in patched else patch(function)
        patched.add(seen)
        return found

    def call(self: Any, *arguments: Any, **keywords: Any) -> None:
        patched.clear()
        run(self, *arguments, **keywords)

    def np_dtype(of: Any) -> Any:
        scalar = of.scalar
        if scalar.name not in dtypes:
            dtypes[scalar.name] = dtype(scalar)
        return dtypes[scalar.name]

    def generic_reduce(self: Any, inputs: Any) -> Any:
        assert self.axis is not None
        axis, parts = self.axis, [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        while len(parts[0]) > 1:  # a power of two
            halves = [
                self.to_tensor(half, x.dtype)
                for start in (0, 1)
                for x, part in zip(inputs, parts, strict=True)
                for half in [part[start * len(part) // 2 :][: len(part) // 2]]
            ]
            found = self.combine_fn.fn(*halves)
            parts = [x.handle.data for x in (found if isinstance(found, tuple) else (found,))]
        kept = [np.moveaxis(part, 0, axis) if self.keep_dims else part[0] for part in parts]
        return [self.to_tensor(part, x.dtype) for part, x in zip(kept, inputs, strict=True)]

    with (
        mock.patch.multiple(interpreter, _patch_lang=patch_lang, _get_np_dtype=np_dtype),
        mock.patch.object(interpreter.GridExecutor, "__call__", call),
        mock.patch.object(interpreter.ReduceOps, "generic_reduce", generic_reduce),
    ):
        yield


@contextmanager
def cut_sums() -> Iterator[None]:
    """Products whose sums are cut off to 24 bits after every 16 terms, instead of rounded, as by a matrix unit."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        left, right = (
            (_widened(x.data) if x.dtype.scalar == tl.bfloat16 else x.data).astype(np.float64) for x in (a, b)
        )
        total = d.data.astype(np.float64)
        for start in range(0, left.shape[1], 16):
            fraction, exponent = np.frexp(total + left[:, start : start + 16] @ right[start : start + 16])
            total = np.ldexp(np.trunc(fraction * 2**24) / 2**24, exponent)
        return TensorHandle(total.astype(np.float32), tl.float32)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield
