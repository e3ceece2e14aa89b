"""A kernel for a test: the sum of numbers, of which each program has one."""

# mypy: ignore-errors

import triton
import triton.language as tl

from eqco_loss.ops.gap_kernels import add_up


@triton.jit
def sum_of_programs(values, scratch, total):
    add_up(tl.load(values + tl.program_id(0)), scratch, total)
