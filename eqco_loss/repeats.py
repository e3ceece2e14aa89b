"""Calls like one before, as a training loop makes them: they need neither checks nor records worked out again.

What the checks look at and what the operators' records hold beside tensors follow from the settings, from the tensors'
shapes, strides, dtypes and devices, and from torch's modes, which together are a call's *kind*. At the second call of a
kind its records are kept without their tensors, and later calls only put theirs in. It saves a fifth of the time that
Python takes of a step, for which a GPU may wait (``python -m benchmarks.host``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import NoneType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from . import ops
from .queue import MomentumQueue
from .settings import Inputs, Settings

Kind = tuple[Any, ...]
# The most kinds in each table; a full one is emptied. Settings that change at every step would else fill the memory.
MOST_KEPT = 1024


class _Record(NamedTuple):
    """A record of an operator, by its flat arguments (``ops/flat.py``)."""

    operator: ops.Operator[Any, Any]
    flat: list[Any]  # None where a tensor goes; last the kind's number, by which backends keep what they work out
    wires: list[tuple[int, int]]  # for each tensor its index in ``flat``, and in the list that ``_tensors`` gives


_VALUES = frozenset({NoneType, bool, int, float, str})  # settings of other types may change within
_numbers = itertools.count(1)
_seen: dict[Kind, None] = {}  # once so far: settings that change at every step are not worth keeping
_records: dict[Kind, list[_Record]] = {}  # of each direction; an empty list where a call cannot be repeated


def kind(settings: Settings, inputs: Inputs) -> Kind | None:
    """What a call shares with others like it; None if it must go the whole way."""
    if not ops.unobserved():  # first, because a compiler need not understand the rest
        return None
    t, *others = settings
    types = [*map(type, others)]
    if settings.gather is not False or not _VALUES.issuperset(types):
        return None
    if inputs.negative_keys is inputs.positive_key:  # one gradient instead of two
        return None
    found: list[Any] = [torch.is_grad_enabled(), *types, *others]  # the types, because True == 1 == 1.0
    if type(t) is float:
        found.append(t)
    elif _is_plain(t) and t.dim() == 0 and t.is_floating_point() and (not t.is_cpu or 0 < float(t.detach()) < math.inf):
        found.append(_kind_of(t))  # a value on a CPU is checked at every call
    else:
        return None
    for x in inputs:
        if x is None:
            found.append(None)
        elif _is_plain(x):
            found.append(_kind_of(x))
        elif type(x) is MomentumQueue and x.primed and _is_plain(x.contents):
            found.append((_kind_of(x.contents), x.count.dtype, None if x.slot_ids is None else _kind_of(x.slot_ids)))
        else:
            return None
    device = inputs.query.device.type if isinstance(inputs.query, Tensor) else "meta"
    if device == "meta":
        return None
    found.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    return tuple(found)


def losses(kind: Kind | None, settings: Settings, inputs: Inputs) -> list[Tensor] | None:
    """The loss of each direction, if the records of this kind are kept."""
    records = None if kind is None else _records.get(kind)
    if not records:
        return None
    tensors, found = _tensors(settings, inputs), []
    for record in records:
        flat = record.flat.copy()
        for place, source in record.wires:
            flat[place] = tensors[source]
        found.append(record.operator.again(flat))
    return found


def keep(kind: Kind | None, settings: Settings, inputs: Inputs, calls: Sequence[ops.Asked]) -> None:
    """Keep a call's records without their tensors, at the second call of its kind, if these are all the caller's own.

    Others are made anew at each call: views put together, negatives drawn at random, ids of another dtype.
    """
    if kind is None or kind in _records:
        return
    if kind not in _seen:
        _make_room(_seen)
        _seen[kind] = None
        return
    tensors = [None if x is None else id(x) for x in _tensors(settings, inputs)]
    given = [x for x in tensors if x is not None]
    if len(set(given)) < len(given):  # one tensor as two arguments: a record does not tell which of them it holds
        return
    records: list[_Record] = []
    for asked in calls:
        flat = asked.operator.flat(asked.call._replace(kind=next(_numbers)))
        own = [(place, id(x)) for place, x in enumerate(flat) if isinstance(x, Tensor)]
        if any(address not in given for _, address in own):
            records = []
            break
        wires = [(place, tensors.index(address)) for place, address in own]
        records.append(_Record(asked.operator, [None if isinstance(x, Tensor) else x for x in flat], wires))
    _make_room(_records)
    _records[kind] = records


def _make_room(table: dict[Kind, Any]) -> None:
    if len(table) >= MOST_KEPT:
        table.clear()


def forget() -> None:
    """Let every call go the whole way again.

    For tests, which change what the package looks at beside its arguments: a tile, or who serves which device.
    """
    _seen.clear()
    _records.clear()


def _is_plain(x: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor of strides whose memory holds its values, and none of a subclass that may do anything."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return False
    return x.layout is torch.strided and not x.is_nested and not x.is_neg()


def _kind_of(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad


def _tensors(settings: Settings, inputs: Inputs) -> list[Tensor | None]:
    """Where a record's tensors can come from."""
    query, positive_key, negatives, *others = inputs
    learned = settings.temperature if isinstance(settings.temperature, Tensor) else None
    if isinstance(negatives, MomentumQueue):
        queue = negatives.contents, negatives.slot_ids, negatives.count
        return [query, positive_key, *others, learned, *queue]
    return [query, positive_key, *others, learned, negatives]
