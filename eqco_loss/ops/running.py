"""Log-sum-exps under way, in base 2 and in plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .calls import MINIMUM


class Running(NamedTuple):
    """A maximum that the logits so far do not pass, and the sum of their exponentials under it."""

    maximum: Tensor  # (R,); 0 in a pass whose logits are all ``small``
    total: Tensor  # (R,)


def small(largest: float | Tensor, dtype: torch.dtype) -> bool:
    """Whether exponentials of logits from -largest to largest, and their products, are floats without a maximum."""
    if isinstance(largest, Tensor) and not largest.is_cpu:
        return False  # reading it would wait for the device
    return float(largest) <= 0.4 * math.log2(torch.finfo(dtype).max)


def first(x: Tensor, is_small: bool, may_be_empty: bool) -> Running:
    """The state after a first tile, whose logits (R, C) become exponentials in place."""
    if is_small:
        return Running(x.new_zeros(len(x)), x.exp2_().sum(1))
    maximum = x.amax(1)
    if may_be_empty:
        maximum.clamp_min_(MINIMUM)
    return Running(maximum, x.sub_(maximum[:, None]).exp2_().sum(1))


def fold(before: Running, x: Tensor, is_small: bool) -> tuple[Running, Tensor | None]:
    """The state after one more tile, and the factor by which earlier sums shrink, None where they do not."""
    if is_small:
        return Running(before.maximum, before.total + x.exp2_().sum(1)), None
    new = torch.maximum(before.maximum, x.amax(1))
    total = x.sub_(new[:, None]).exp2_().sum(1)
    shrink = (before.maximum - new).exp2_()
    return Running(new, total.addcmul_(before.total, shrink)), shrink


def merged(one: Running, other: Running) -> tuple[Running, Tensor, Tensor]:
    """The state of two passes together, and the factors by which the exponentials of each shrink."""
    maximum = torch.maximum(one.maximum, other.maximum)
    shrink, other_shrink = (one.maximum - maximum).exp2_(), (other.maximum - maximum).exp2_()
    return Running(maximum, one.total * shrink + other.total * other_shrink), shrink, other_shrink
