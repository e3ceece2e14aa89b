"""The operators' records with what the benchmarks leave as it is: unit rows, temperature 0.2, the Triton backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqco_loss.ops import KeySet, Pairs, RowLosses
from eqco_loss.ops.calls import KeysGradient, SymmetricGradient, SymmetricLosses

T = 0.2


def row_losses(query: Tensor, positive: Tensor, keys: Tensor, pairs: Pairs | None = None, **fields: Any) -> RowLosses:
    """A mean of EqCo's losses and its query gradient; ``normalize_keys``, or any field of the record, changes that."""
    given: dict[str, Any] = {
        "second": None,
        "temperature": T,
        "learned_temperature": None,
        "inter_temperature": None,
        "alpha": 65536.0,
        "normalize": True,
        "share": [1, len(query)],
        "reduced": True,
        "may_raise": False,
        "need_query_gradient": True,
        "need_positive_gradient": False,
        "need_keys_gradient": False,
        "need_metrics": False,
        "autocast": None,
        "backend": "triton",
    }
    first = KeySet(keys, pairs or Pairs(), fields.pop("normalize_keys", False))
    return RowLosses(query=query, positive=positive, first=first, **(given | fields))


def keys_gradient(
    query: Tensor,
    keys: Tensor,
    grad: Tensor,
    rows: Tensor,
    pairs: Pairs | None = None,
    autocast: Any = None,
    *,
    units: Tensor | None = None,
) -> KeysGradient:
    """Of raw keys, which are normalised. ``units``: query's and positives' gradients, which come along."""
    return KeysGradient(
        query=query,
        first=KeySet(keys, pairs or Pairs(), normalize=True),
        grad=grad,
        rows=rows,
        temperature=T,
        learned_temperature=None,
        normalize=True,
        autocast=autocast,
        backend="triton",
        query_gradient=units,
        positive_gradient=units,
    )


def symmetric_losses(views: Tensor, across: bool = True) -> SymmetricLosses:
    """A mean of EqCo's losses in both directions."""
    first, second = views.chunk(2)
    return SymmetricLosses(
        first=first,
        second=second,
        across=across,
        temperature=T,
        learned_temperature=None,
        inter_temperature=None,
        alpha=65536.0,
        share=[1, len(views)],
        need_gradient=True,
        autocast=None,
        backend="triton",
    )


def symmetric_gradient(
    views: Tensor, grad: Tensor, rows: Tensor, across: bool = False, autocast: torch.dtype | None = None
) -> SymmetricGradient:
    first, second = views.chunk(2)
    return SymmetricGradient(
        first=first,
        second=second,
        kept=views,
        grad=grad,
        rows=rows,
        across=across,
        temperature=T,
        learned_temperature=None,
        autocast=autocast,
        backend="triton",
    )
