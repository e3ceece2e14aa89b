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
from .distributed import Ranks, cannot_wait, check_gather, equal_ranks, exchange, fail_together, world
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
    group, rank, size = world(chosen.gather)
    query, positive_key, negative_keys, t = given.query, given.positive_key, given.negative_keys, chosen.temperature
    if isinstance(query, Tensor) and cannot_wait(query):
        check.call(chosen, given)
        return equal_ranks(chosen.gather, query)
    wrong: Exception | None = None
    try:
        check.call(chosen, given)
    except Exception as error:
        wrong = error
    facts: dict[str, int | Tensor] = {"rows": -1}  # an error
    if wrong is None:
        facts = {
            "rows": query.shape[0],
            "D": query.shape[1],
            "dtype": _code((query.dtype, positive_key.dtype)),
            "settings (temperature, alpha, in_batch, num_negatives, sampling, symmetric, normalize, reduction)": _code(
                [
                    "a tensor" if isinstance(x, Tensor) else float(x) if isinstance(x, numbers.Real) else x
                    for x in chosen._replace(gather=True)
                ]
            ),
            "kind of negative_keys": _code([isinstance(negative_keys, kind) for kind in (Tensor, MomentumQueue)]),
            "query_ids given": int(given.query_ids is not None),
            "gradients wanted": _bits(
                [
                    torch.is_grad_enabled(),
                    *(isinstance(x, Tensor) and x.requires_grad for x in (query, positive_key, t)),
                ]
            ),
            "temperature": t.detach().double().view(torch.int64) if isinstance(t, Tensor) else 0,  # not read on a GPU
        }
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    everyone = exchange(list(facts.values()) + [0] * (AGREED - len(facts)), device, group, size)
    fail_together(wrong, [r for r, values in enumerate(everyone) if values[0] < 0])
    for place, name in enumerate(facts):
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
    ranks = Ranks(group, rank, tuple(row[0] for row in everyone))
    if negative_keys is None:
        check.others(ranks.total, query)
    return ranks


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
