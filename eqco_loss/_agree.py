"""The check of a call, which ranks make together: whatever is wrong on one is an error on all."""

from __future__ import annotations

import math
import numbers
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _validate as check
from .distributed import Ranks, cannot_wait, check_gather, checked_together, equal_ranks
from .queue import MomentumQueue
from .settings import Inputs, Settings

AGREED = 8  # numbers that ranks exchange before a loss


def inputs(chosen: Settings, given: Inputs) -> Ranks | None:
    """A call checked, by all ranks together where they gather; who takes part."""
    if chosen.gather is False:
        check.call(chosen, given)
        return None
    return _agree(chosen, given)


def _agree(chosen: Settings, given: Inputs) -> Ranks:
    """The same for every rank of a group: whatever is wrong on one is an error on all, and none is left waiting."""
    check_gather(chosen.gather)
    query = given.query
    if isinstance(query, Tensor) and cannot_wait(query):
        check.call(chosen, given)
        return equal_ranks(chosen.gather, query)

    found: dict[str, int | Tensor] = {}

    def facts() -> list[int | Tensor]:
        check.call(chosen, given)
        found.update(_facts(chosen, given))
        return list(found.values())

    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    ranks, everyone = checked_together(facts, AGREED, chosen.gather, device)
    for place, name in enumerate(found):
        values = [row[place] for row in everyone]
        if name == "temperature":
            _same_temperature(values)
        elif name != "rows" and len(set(values)) > 1:
            shown = f", {values}," if name == "D" else ""
            odd = [r for r, value in enumerate(values) if value != values[0]]
            raise ValueError(
                f"gather: expected the same on every rank, got different {name}{shown} on rank "
                f"{', '.join(map(str, odd))} than on rank 0. Call the same loss with the same settings on every rank."
            )
    if given.negative_keys is None:
        check.others(ranks.total, query)
    return ranks


def _facts(chosen: Settings, given: Inputs) -> dict[str, int | Tensor]:
    """What ranks compare of a checked call, by the name that an error gives it; the rows alone may differ."""
    query, positive_key, t = given.query, given.positive_key, chosen.temperature
    names = ", ".join(name for name in Settings._fields if name != "gather")
    numbers_and_words = [
        "a tensor" if isinstance(x, Tensor) else float(x) if isinstance(x, numbers.Real) else x
        for x in chosen._replace(gather=True)
    ]
    wanted = [isinstance(x, Tensor) and x.requires_grad for x in (query, positive_key, t)]
    return {
        "rows": query.shape[0],
        "D": query.shape[1],
        "dtype": _code((query.dtype, positive_key.dtype)),
        f"settings ({names})": _code(numbers_and_words),
        "kind of negative_keys": _code([isinstance(given.negative_keys, kind) for kind in (Tensor, MomentumQueue)]),
        "query_ids given": int(given.query_ids is not None),
        "gradients wanted": _bits([torch.is_grad_enabled(), *wanted]),
        # As bits, which the exchange reads for all ranks at once; to read a GPU's here would be to wait for it twice.
        "temperature": t.detach().double().view(torch.int64) if isinstance(t, Tensor) else 0,
    }


def _same_temperature(bits: list[int]) -> None:
    """A tensor's value on each rank, as the bits of a float64."""
    values = [struct.unpack("d", struct.pack("q", x))[0] for x in bits]
    # GPUs of two makes may round exp() differently; ranks that step on their own are further apart after one step.
    odd = [r for r, t in enumerate(values) if bits[r] != bits[0] and not math.isclose(t, values[0], rel_tol=1e-6)]
    if odd:
        raise ValueError(
            f"gather: expected the same on every rank, got different temperatures, {values}, on rank "
            f"{', '.join(map(str, odd))} than on rank 0. Start them alike: register the parameter in the module that "
            "DistributedDataParallel wraps, or torch.distributed.broadcast(temperature.data, 0) once. Its gradient is "
            "then the same on every rank."
        )


def _bits(values: Sequence[bool]) -> int:
    return sum(value << place for place, value in enumerate(values))


def _code(value: Any) -> int:
    return zlib.crc32(repr(value).encode())
