"""Kernels for tests: the sum of numbers, of which each program has one, and splits as ``combine`` loads them."""

# mypy: ignore-errors
# ruff: noqa: N803

import triton
import triton.language as tl

from eqco_loss.ops.shared_kernels import add_up
from eqco_loss.ops.triton.forward import load_outs


@triton.jit
def sum_of_programs(values, scratch, total):
    add_up(tl.load(values + tl.program_id(0)), scratch, total)


@triton.jit
def loaded_splits(outs, out, splits, n, D: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    some, rows, d = tl.arange(0, SPLITS), tl.arange(0, ROWS), tl.arange(0, 16)
    found = load_outs(outs, some, splits, rows, n, D, 16)
    tl.store(out + (some[:, None, None] * ROWS + rows[None, :, None]) * 16 + d[None, None, :], found)
