"""Records as flat arguments, which are all that torch's dispatcher knows, and back.

A record is flattened by its fields' names: ``first.pairs.key_ids`` is the argument ``first_pairs_key_ids``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, NamedTuple, Optional, TypeVar, get_args, get_type_hints

from .calls import KeySet, KeysGradient, LogSumExp, Pairs, RowLosses, SymmetricGradient, SymmetricLosses

Call = TypeVar("Call", bound=NamedTuple)  # the record that an operator takes
_NESTED = (Pairs, KeySet)  # records inside of records


class _Field(NamedTuple):
    nested: type[Any] | None  # the record that it is
    optional: bool


def _fields(record: type[Any]) -> dict[str, tuple[Any, _Field]]:
    """Each field's name, its type without None, and what it is."""
    found = {}
    for name, hint in get_type_hints(record).items():
        kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
        found[name] = kinds[0], _Field(kinds[0] if kinds[0] in _NESTED else None, kinds[0] is not hint)
    return found


_LAYOUTS = {
    record: [field for _, field in _fields(record).values()]
    for record in (*_NESTED, RowLosses, SymmetricLosses, SymmetricGradient, LogSumExp, KeysGradient)
}


def arguments(record: type[Any], prefix: str = "", optional: bool = False) -> Iterator[tuple[str, Any]]:
    """The flat arguments' names and types."""
    for name, (kind, field) in _fields(record).items():
        maybe = optional or field.optional
        if field.nested is not None:
            yield from arguments(field.nested, f"{prefix}{name}_", maybe)
        else:
            plain = Sequence[int] if kind == list[int] else kind
            yield prefix + name, Optional[plain] if maybe else plain  # noqa: UP045  # of a type that is a value


def flatten(record: type[Any], call: Any) -> list[Any]:
    """A record's values in the order of ``arguments``; of an absent record, as many times None."""
    flat = list(call)
    for place, nested in _NESTED_FROM_BEHIND[record]:
        value = flat[place]
        flat[place : place + 1] = _ABSENT[nested] if value is None else flatten(nested, value)
    return flat


_ABSENT = {record: [None for _ in arguments(record)] for record in _NESTED}
_NESTED_FROM_BEHIND = {  # the last first, because a record's fields in its place move only what is behind it
    record: [(place, field.nested) for place, field in reversed(list(enumerate(layout))) if field.nested]
    for record, layout in _LAYOUTS.items()
}


def unflatten(record: type[Call], flat: Sequence[Any]) -> Call:
    """The record of such values."""
    return _unflatten(record, list(flat))  # type: ignore[no-any-return]


def _unflatten(record: type[Any], values: list[Any]) -> Any:
    for place, nested in reversed(_NESTED_FROM_BEHIND[record]):
        end = place + len(_ABSENT[nested])
        absent = nested is KeySet and values[place] is None  # no set of keys is without keys
        values[place:end] = [None if absent else _unflatten(nested, values[place:end])]
    return record._make(values)
