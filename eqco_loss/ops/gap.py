"""From a query's gap to its loss, in torch: what every backend does once its pass over the negatives is over."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .calls import LN2


class Values(NamedTuple):
    """What the losses are made of, (R,) each."""

    loss: Tensor
    intra_loss: Tensor
    weight: Tensor  # -d loss / d gap
    log_weight: Tensor | None  # the logarithm of the dual temperature's weight


class Seen(NamedTuple):
    """A positive's logit in base 2, less the maximum of the negatives' logits, and their sum of 2 ** (logit - maximum).

    The maximum goes first, because its difference to another large logit is exact and its sum with log2 is not.
    """

    above: Tensor  # (R,)
    total: Tensor  # (R,)

    def gap(self, shift: float | Tensor) -> Tensor:
        return (self.above - self.total.log2()) * LN2 - shift


def values(loss: str, intra: Seen, inter: Seen | None, count: int | Tensor, alpha: float | None) -> Values:
    """``loss`` is one of ``calls.loss_of``; ``inter`` the same as ``intra`` at the dual temperature's second one.

    ``count`` says how many negatives a query has.
    """
    shift: float | Tensor = 0.0
    if alpha is not None:
        # A quotient of the least alpha would be 0.
        shift = math.log(alpha) - (torch.log(count) if isinstance(count, Tensor) else math.log(count))
    gap = intra.gap(shift)
    minus = -gap
    intra_loss = _softplus(minus)
    if loss == "eqco" or inter is None:
        return Values(intra_loss, intra_loss, minus.sigmoid_(), None)
    inter_gap = inter.gap(shift)
    weight = torch.sigmoid(-inter_gap)  # = W * sigmoid(-gap), because the factor that vanishes cancels
    log_weight = _softplus(gap) - _softplus(inter_gap)
    return Values(weight * softplus_over_sigmoid(gap), intra_loss, weight, log_weight)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), which from 40 on is x in float64, too; torch's own threshold of 20 is off by 2e-9 there."""
    return softplus(x, threshold=40)


def softplus_over_sigmoid(x: Tensor) -> Tensor:
    """softplus(-x) / sigmoid(-x) without the overflow of either: 1 + exp(-x)/2 as x grows, -x as it falls."""
    e = torch.exp(-x.abs())
    at_positive = torch.where(e < 1e-10, 1.0 + 0.5 * e, torch.log1p(e) / e.clamp_min(1e-30) * (1.0 + e))
    return torch.where(x < 0, (torch.relu(-x) + torch.log1p(e)) * (1.0 + e), at_positive)
