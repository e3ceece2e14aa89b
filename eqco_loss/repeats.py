"""Calls like one before, as a training loop makes them: they need neither checks nor records worked out again.

What the checks look at and what the operators' records hold beside tensors follow from the settings, from the tensors'
shapes, dtypes and devices, and from torch's modes, which together are a call's *kind*. Of the first call of a kind the
records are kept without their tensors, and later calls only put theirs in. It saves a fifth of the time that Python
takes of a step, for which a GPU may wait (``python -m benchmarks.host``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from . import ops
from .queue import MomentumQueue
from .settings import Inputs, Settings

Kind = tuple[Any, ...]
MOST_KEPT = 1024  # kinds; a full table is emptied, because settings that change at every step would fill the memory


class _Record(NamedTuple):
    """A record of an operator, by its flat arguments (``ops/flat.py``)."""

    operator: ops.Operator[Any, Any]
    flat: list[Any]  # None where a tensor goes; last the kind's number, by which backends keep what they work out
    wires: list[tuple[int, int]]  # the places of its tensors, here and in ``_tensors``


class _Repeated(NamedTuple):
    records: list[_Record]  # of each direction
    settings: Settings  # whose values must live as long as the kind, which knows them by their addresses


_numbers = itertools.count(1)
_kept: dict[Kind, _Repeated | None] = {}  # None: its records hold tensors that are made anew at each call


def kind(settings: Settings, inputs: Inputs) -> Kind | None:
    """What a call shares with others like it; None if it must go the whole way."""
    t, *others = settings
    if settings.gather is not False or not ops.unobserved():
        return None
    found: list[Any] = [torch.is_grad_enabled(), *map(id, others)]
    if isinstance(t, float | int) and not isinstance(t, bool):
        found.append(t)
    elif _is_plain(t) and (not t.is_cpu or 0 < float(t.detach()) < math.inf):  # a CPU's value is checked each time
        found.append(_kind_of(t))
    else:
        return None
    for x in inputs:
        if x is None:
            found.append(None)
        elif _is_plain(x):
            found.append(_kind_of(x))
        elif type(x) is MomentumQueue and x.primed:
            found.append((_kind_of(x.contents), None if x.slot_ids is None else _kind_of(x.slot_ids)))
        else:
            return None
    device = inputs.query.device.type if isinstance(inputs.query, Tensor) else "meta"
    if device == "meta":
        return None
    found.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    return tuple(found)


def losses(kind: Kind | None, settings: Settings, inputs: Inputs) -> list[Tensor] | None:
    """The loss of each direction, if a call of this kind has been kept."""
    known = None if kind is None else _kept.get(kind)
    if known is None:
        return None
    tensors, found = _tensors(settings, inputs), []
    for record in known.records:
        flat = record.flat.copy()
        for place, source in record.wires:
            flat[place] = tensors[source]
        found.append(record.operator.again(flat))
    return found


def keep(kind: Kind | None, settings: Settings, inputs: Inputs, calls: Sequence[ops.Asked]) -> None:
    """Keep what a call's records are beside their tensors, where every one of these is the caller's own."""
    if kind is None or kind in _kept:
        return
    tensors = [x for x in _tensors(settings, inputs) if x is not None]
    if len(set(map(id, tensors))) < len(tensors):  # which of two that are the same one a record has, nobody can tell
        return
    if len(_kept) >= MOST_KEPT:
        forget()
    _kept[kind] = None
    places = {id(x): place for place, x in enumerate(_tensors(settings, inputs))}
    records = []
    for asked in calls:
        flat = asked.operator.flat(asked.call._replace(kind=next(_numbers)))
        wires = [(place, places.get(id(x), -1)) for place, x in enumerate(flat) if isinstance(x, Tensor)]
        if any(source < 0 for _, source in wires):
            return
        records.append(_Record(asked.operator, [None if isinstance(x, Tensor) else x for x in flat], wires))
    _kept[kind] = _Repeated(records, settings._replace(temperature=0.0))


def forget() -> None:
    """Let every call go the whole way again, as after a change of what the package looks at beside its arguments."""
    _kept.clear()


def _is_plain(x: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor, and none of a subclass that might do anything."""
    return type(x) is Tensor or type(x) is nn.Parameter


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
