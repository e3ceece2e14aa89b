"""What an operator is asked and what it answers: one record each, with the shape beside each field.

Every backend takes these records and returns these answers. N is the number of queries, K of keys, D of features. A
*set* is some keys together with which of them are negatives of which query; a *pair* is one query and one key. Logits
are in base 2: ``x_ij = s(q_i, n_j) log2(e) / t``, because exp2 is the cheaper exponential.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class Row(IntEnum):
    """The rows of ``rows``, which backward needs of every query.

    The softmax of a pair is ``2 ** (x_ij - BASE_i) / TOTAL_i``. BASE is the log-sum-exp as float32 can hold it, and
    TOTAL, close to 1, is what rounding took from it: without it the softmax of large logits is off by their rounding.
    """

    BASE = 0  # log-sum-exp of the negatives' logits, in base 2
    TOTAL = 1  # the sum of 2 ** (x_ij - BASE_i)
    PULL = 2  # share * weight / (t TOTAL): the loss's derivative by s(q_i, n_j) is PULL_i * 2 ** (x_ij - BASE_i)
    POSITIVE = 3  # s(q, k)
    TEMPERATURE_GRADIENT = 4  # the derivative by t of this row's part of the loss; read only where t is learned
    # The others serve kernels, which multiply rows as they are stored. The fused engine fills all of them. The wide
    # engine's kernels of two views fill INVERSE and BOUNDED_PULL, which they make of PULL instead of STORED_PULL.
    INVERSE = 5  # 1 / length, or 1 where the query is taken as it is
    SCALE = 6  # from products to logits: INVERSE log2(e) / t
    STORED_PULL = 7  # PULL * INVERSE
    BOUNDED_PULL = 8  # STORED_PULL where 2 ** (logit - largest possible logit) stands for the softmax
    SHIFT = 9  # log2(|STORED_PULL|) - BASE: one number a row instead of two, which leaves registers


class Metric(IntEnum):
    """The rows of ``metrics``, which only ``with_metrics`` asks for."""

    WEIGHT = 0  # -d loss / d gap
    COUNT = 1  # K_i, the negatives that are left
    LOG_WEIGHT = 2  # of the dual temperature; 0 for EqCo
    INTRA_LOSS = 3  # softplus(log(alpha / K_i) - gap(t)), which estimates the mutual information
    RANK = 4  # how many negatives are more similar than the positive
    NEGATIVE = 5  # the negatives' mean similarity


class Pairs(NamedTuple):
    """Which pairs (query i, key j) are negatives: all, but for those that a field leaves out."""

    query_ids: Tensor | None = None  # (N,)
    key_ids: Tensor | None = None  # (K,) or (N, K): pairs of equal ids are left out
    mask: Tensor | None = None  # (K,) or (N, K), bool: pairs that are False are left out
    filled: Tensor | None = None  # (): keys from this place on do not exist, in a queue that is still filling
    picked: Tensor | None = None  # (N, C): query i meets the keys picked[i] and no others
    band: list[int] = []  # noqa: RUF012  # offset, width, modulus: query i stands at place a = (offset + i) % modulus
    #                       and meets the keys whose place j % modulus is one of the next ``width`` after a, cyclic

    @property
    def by_ids(self) -> bool:
        return self.query_ids is not None and self.key_ids is not None

    @property
    def by_pair(self) -> bool:
        """Whether single pairs are left out, which only a comparison of each pair can tell."""
        return self.by_ids or self.mask is not None

    def negatives(self, keys: Tensor) -> int | None:
        """How many each query has, where the host knows it."""
        if self.by_pair or self.filled is not None:
            return None
        if self.picked is not None:
            return self.picked.shape[1]
        return self.band[1] * (len(keys) // self.band[2]) if self.band else keys.shape[-2]


class KeySet(NamedTuple):
    """Some keys, and which of them each query meets."""

    keys: Tensor  # (K, D), shared by all queries, or (N, K, D), each query's own
    pairs: Pairs
    normalize: bool  # whether keys are to be brought to unit length; a queue's rows have it already
    trusted: bool = False  # whether no key can be NaN or infinite, because a queue checked them when they entered

    @property
    def own(self) -> bool:
        """Whether each query has keys of its own, which no product of matrices serves."""
        return self.keys.dim() == 3 or self.pairs.picked is not None


class RowLosses(NamedTuple):
    """The loss of each query against one or two sets of keys, and its gradients for query and positive."""

    query: Tensor  # (N, D)
    positive: Tensor  # (N, D)
    first: KeySet
    second: KeySet | None
    temperature: float
    learned_temperature: Tensor | None  # (); it replaces ``temperature``
    inter_temperature: float | None  # None: EqCo
    alpha: float | None  # None: alpha = K_i
    normalize: bool  # whether query and positive are to be brought to unit length
    share: list[int]  # numerator and denominator of what every row's loss is multiplied by, as a mean does
    reduced: bool  # whether the loss is one number, the sum over the rows
    may_raise: bool  # whether a query without negatives is an error on a CPU; else its loss is NaN, as on a GPU
    need_query_gradient: bool
    need_positive_gradient: bool
    need_keys_gradient: bool  # of the first set; a backend that has it from the same pass returns it
    need_metrics: bool
    autocast: torch.dtype | None  # what torch.autocast asks products to be multiplied in
    backend: str
    kind: int = 0  # calls with the same number have the same fields and layouts, see ``once_a_kind``; 0: look at all

    @property
    def share_factor(self) -> float:
        return self.share[0] / self.share[1]

    @property
    def sets(self) -> list[KeySet]:
        return [self.first] if self.second is None else [self.first, self.second]


class RowOutputs(NamedTuple):
    """Without a gradient where it is not needed. The dispatcher gets a tensor (0,) for each None."""

    loss: Tensor  # (), or (N,) unless ``reduced``
    query_gradient: Tensor | None  # (N, D), of the sum over the rows of share * loss
    positive_gradient: Tensor | None  # (N, D); None also where the keys' has it, because they are one tensor
    keys_gradient: Tensor | None  # the first set's, in its shape; None also where the pass does not give it
    rows: Tensor  # (len(Row), N); zeros where the pass leaves backward nothing to do (``square``)
    metrics: Tensor | None  # (len(Metric), N)


class SymmetricLosses(NamedTuple):
    """Both directions between two views, where every row is an anchor, a positive and a key."""

    first: Tensor  # (M, D)
    second: Tensor  # (M, D), in the same dtype: row i is the image of the first's row i
    across: bool  # whether only the other view's rows are negatives (CLIP, SimCo), or both views' (NT-Xent)
    temperature: float
    learned_temperature: Tensor | None  # ()
    inter_temperature: float | None
    alpha: float | None
    share: list[int]
    need_gradient: bool
    autocast: torch.dtype | None
    backend: str
    kind: int = 0

    @property
    def share_factor(self) -> float:
        return self.share[0] / self.share[1]

    @property
    def negatives(self) -> int:
        """How many each row has."""
        return (len(self.first) - 1) * (1 if self.across else 2)

    @property
    def views(self) -> Tensor:
        """(2M, D), a copy: rows i and i + M are one image's."""
        return torch.cat([self.first, self.second])


class SymmetricOutputs(NamedTuple):
    loss: Tensor  # (): the sum over the rows of share * loss
    rows: Tensor  # (len(Row), 2M); TEMPERATURE_GRADIENT is only for the backend's own gradient
    kept: Tensor  # (2M, D or more): what the backend keeps for its gradient: both views, as they are or as they are
    #               multiplied, or the gradient itself; else (0,)


class SymmetricGradient(NamedTuple):
    """The gradient of ``grad * loss`` for the views."""

    first: Tensor  # (M, D)
    second: Tensor  # (M, D)
    kept: Tensor  # of ``SymmetricOutputs``
    grad: Tensor  # ()
    rows: Tensor  # (len(Row), 2M)
    across: bool
    temperature: float
    learned_temperature: Tensor | None
    autocast: torch.dtype | None
    backend: str
    kind: int = 0


class SymmetricGradients(NamedTuple):
    views: Tensor  # (2M, D), in the views' dtype
    temperature: Tensor | None  # () in float32 or float64, where it is learned


class LogSumExp(NamedTuple):
    """The log-sum-exp of each query's similarities over t. Nothing is normalised."""

    query: Tensor  # (N, D)
    first: KeySet
    temperature: float
    learned_temperature: Tensor | None
    need_query_gradient: bool
    autocast: torch.dtype | None
    backend: str


class LogSumExpOutputs(NamedTuple):
    lse: Tensor  # (N,)
    mean_key: Tensor | None  # (N, D): the softmax-weighted mean of the keys, t times the query's gradient
    rows: Tensor  # (len(Row), N); PULL is 1 / (t TOTAL), POSITIVE and TEMPERATURE_GRADIENT are 0


class KeysGradient(NamedTuple):
    """The gradient of a set's keys, dL/dn_j = sum_i grad_i PULL_i 2 ** (x_ij - BASE_i) q_i.

    Where keys are normalised this is the unit keys', which then passes through the normalisation to the raw ones.

    What else backward multiplies by ``grad`` comes along, so that a backend may do so in the same launch.
    """

    query: Tensor  # (N, D)
    first: KeySet
    grad: Tensor  # (), of a reduced loss, or (N,)
    rows: Tensor  # (len(Row), N)
    temperature: float
    learned_temperature: Tensor | None
    normalize: bool  # whether the query is to be brought to unit length
    autocast: torch.dtype | None
    backend: str
    query_gradient: Tensor | None = None  # (N, D): forward's, which is returned times ``grad``
    positive_gradient: Tensor | None = None  # (K, D): forward's, of positives that are these keys, N = K; it is added
    kind: int = 0


class KeysGradients(NamedTuple):
    keys: Tensor  # in the shape and dtype of the keys
    query: Tensor | None  # (N, D) in the query's dtype, where ``query_gradient`` was given


def loss_of(call: RowLosses | SymmetricLosses) -> str:
    """Which loss a call asks for, by the name that every formula of a loss branches on."""
    return "eqco" if call.inter_temperature is None else "dual"


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the arithmetic runs in: float32, or float64 where the query is that."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def temperature_of(call: RowLosses | SymmetricLosses | SymmetricGradient | LogSumExp | KeysGradient) -> float | Tensor:
    """t as a number, or as a tensor of the arithmetic's dtype, NaN where it is not positive."""
    t = call.learned_temperature
    if t is None:
        return call.temperature
    t = t.to(compute_dtype(call[0]))
    return torch.where(t > 0, t, math.nan)


Result = TypeVar("Result")


def plainly(function: Callable[..., Result]) -> Callable[..., Result]:
    """Runs a backend's function without gradients and autocast, which are switched off only if they are on."""

    def without_autocast(call: Any, *others: Any) -> Result:
        device = call[0].device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(call, *others)
        torch.set_autocast_enabled(device, False)  # torch.autocast, which does the same, takes longer than a launch
        try:
            return function(call, *others)
        finally:
            torch.set_autocast_enabled(device, True)

    @functools.wraps(function)
    def plain(call: Any, *others: Any) -> Result:
        if not torch.is_grad_enabled():
            return without_autocast(call, *others)
        with torch.no_grad():
            return without_autocast(call, *others)

    return plain


MOST_KEPT = 1024  # kinds of calls; a full table is emptied
Found = TypeVar("Found")


def once_a_kind(work_out: Callable[..., Found]) -> Callable[..., Found]:
    """``work_out(call, *others)``, once for each kind. Of a call it may look at all but its tensors' values.

    It must return something. Threads may empty the table while others read it.
    """
    table: dict[tuple[Any, ...], Found] = {}

    @functools.wraps(work_out)
    def looked_up(call: Any, *others: Any) -> Found:
        if not call.kind:
            return work_out(call, *others)
        key = call.kind, *others
        found = table.get(key)
        if found is None:
            if len(table) >= MOST_KEPT:
                table.clear()
            found = table[key] = work_out(call, *others)
        return found

    return looked_up


MINIMUM = -1e30  # where a running maximum starts: -inf would make inf - inf on a tile with nothing in it
NORM_EPS = 1e-12  # the least length that a row is divided by
TIE = 1e-5  # a negative that is less similar than the positive by so little, relatively, counts as more similar


def no_negatives(row: int) -> ValueError:
    """What a backend raises on a CPU for a query that has nothing to be told apart from."""
    return ValueError(
        f"query {row} has no negatives left (effective K = 0): expected at least one key that neither ids nor mask "
        "leave out. Leave such queries out, make ids finer, give more negatives (num_negatives=None: all), look "
        "whether the mask is True where a key is a negative, or prime a queue that is empty yet: queue.enqueue(keys)."
    )


def checked_maxima(maximum: Tensor, count: Tensor, may_raise: bool, first: int = 0) -> Tensor:
    """The maxima of rows that have a negative: else an error, or NaN on a device that cannot raise.

    ``count`` (R,) says how many each row has, and ``first`` where the first of the rows stands.
    """
    empty = count == 0
    if not (empty.is_cpu and may_raise):
        return torch.where(empty, math.nan, maximum)
    if bool(empty.any()):
        raise no_negatives(first + int(empty.nonzero()[0]))
    return maximum


def slices(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    """From ``start`` to ``stop``, ``step`` at a time."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def either(a: Tensor | None, b: Tensor) -> Tensor:
    """Where one of two conditions holds, of which the first may be absent."""
    return b if a is None else a | b


def gradient_eps(dtype: torch.dtype) -> float:
    """The least length that a gradient is divided by, so that it fits the dtype of what it is the gradient of."""
    return torch.finfo(torch.float16).tiny if dtype == torch.float16 else NORM_EPS


def rounded_log_sum(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(BASE, TOTAL) of a sum of exponentials under its maximum: exact, because ``maximum - base`` is."""
    base = maximum + total.log2()
    return base, total * (maximum - base).exp2()
