"""The two things that a call of a loss is made of."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from .distributed import Gather
from .queue import MomentumQueue

Negatives = Tensor | MomentumQueue | None  # (K, D) shared, (N, K, D) per query, a queue, or the batch's other keys
InBatch = Literal["keys", "views"]
Sampling = Literal["rolled", "random"]
Reduction = Literal["none", "mean", "sum"]
Backend = Literal["auto", "torch", "triton", "wide"]


class Settings(NamedTuple):
    """What a loss is, apart from its tensors."""

    temperature: float | Tensor
    inter_temperature: float | None  # None: EqCo
    alpha: float | None
    in_batch: InBatch | None
    num_negatives: int | None
    sampling: Sampling
    symmetric: bool
    normalize: bool
    gather: Gather
    reduction: Reduction
    backend: Backend


class Inputs(NamedTuple):
    """The tensors of one call."""

    query: Tensor  # (N, D)
    positive_key: Tensor  # (N, D)
    negative_keys: Negatives = None
    query_ids: Tensor | None = None  # (N,)
    negative_ids: Tensor | None = None  # (K,) or (N, K)
    negative_mask: Tensor | None = None  # (K,) or (N, K), bool
