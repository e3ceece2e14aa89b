"""Which keys each query meets: of the batch, of both its views, given ones, a queue's, or some drawn at random."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .distributed import Ranks, joined
from .ops.calls import KeySet, Pairs
from .queue import MomentumQueue
from .settings import Inputs, Settings


class Direction(NamedTuple):
    """Queries, their positives and the keys that they meet."""

    query: Tensor  # (N, D)
    positive: Tensor  # (N, D)
    first: KeySet
    second: KeySet | None = None


def directions(settings: Settings, inputs: Inputs, ranks: Ranks | None) -> list[Direction]:
    """One direction, or with ``symmetric`` two. Gathers from all ``ranks``, where there are any."""
    query, positive = inputs.query, inputs.positive_key
    given, in_batch = given_set(settings, inputs), batch_kind(settings, inputs)
    if given is not None and in_batch is None:
        return [Direction(query, positive, given)]

    def everyone(x: Tensor) -> Tensor:
        return x if ranks is None else ranks.gather(x)

    views = in_batch == "views"
    keys = everyone(positive)
    queries = everyone(query) if views or settings.symmetric else query
    both = joined([queries, keys]) if views else keys
    key_ids = None if inputs.query_ids is None else everyone(inputs.query_ids.to(torch.int64))
    key_ids = key_ids.repeat(2) if views and key_ids is not None else key_ids

    def batch_set(keys: Tensor) -> KeySet:
        return KeySet(keys, _batch_pairs(settings, inputs, ranks, key_ids, views), settings.normalize)

    found = [Direction(query, positive, batch_set(both), given)]
    if settings.symmetric:
        found.append(Direction(positive, query, batch_set(both if views else queries), given))
    return found


def batch_kind(settings: Settings, inputs: Inputs) -> str | None:
    """Which of the batch's own embeddings are negatives: "keys", "views", or None."""
    return settings.in_batch or ("keys" if inputs.negative_keys is None else None)


def given_set(settings: Settings, inputs: Inputs) -> KeySet | None:
    """The negatives that came as an argument."""
    keys, mask = inputs.negative_keys, inputs.negative_mask
    if keys is None:
        return None
    if isinstance(keys, MomentumQueue):
        ids = None if inputs.query_ids is None else keys.slot_ids
        pairs = Pairs(query_ids=inputs.query_ids, key_ids=ids, mask=mask, filled=keys.count)
        return KeySet(keys.contents, pairs, normalize=False, trusted=True)
    pairs = Pairs(query_ids=inputs.query_ids, key_ids=inputs.negative_ids, mask=mask)
    return KeySet(keys, pairs, settings.normalize)


def _batch_pairs(
    settings: Settings, inputs: Inputs, ranks: Ranks | None, key_ids: Tensor | None, both_views: bool
) -> Pairs:
    rows, views = inputs.query.shape[0], 2 if both_views else 1
    offset, total = (0, rows) if ranks is None else (ranks.offset, ranks.total)
    others = views * (total - 1)
    k = others if settings.num_negatives is None else min(int(settings.num_negatives), others)
    if settings.sampling == "random" and k < others:
        device = inputs.query.device
        picked = random_negatives(rows, k, device, total=total, offset=offset, views=views)
        return Pairs(query_ids=inputs.query_ids, key_ids=key_ids, picked=picked)
    return Pairs(query_ids=inputs.query_ids, key_ids=key_ids, band=[offset, k // views, total])


def has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none."""
    return device.type != "mps"


def random_negatives(
    rows: int, k: int, device: torch.device, *, total: int | None = None, offset: int = 0, views: int = 1
) -> Tensor:
    """(rows, k) indices: for each row k of the others, uniformly, without replacement, independent by row.

    Row i stands at place offset + i of ``total``, and there are ``views`` keys at each place: its own are not drawn.
    """
    total = rows if total is None else total
    others = views * (total - 1)

    def over_own(picked: Tensor, first: int) -> Tensor:
        """From numbers among the others to places among all: those from the row's own place on move up by one."""
        view, place = picked // (total - 1), picked % (total - 1)
        own = torch.arange(offset + first, offset + first + picked.shape[0], device=device)
        return place.add_(place >= own[:, None]).add_(view, alpha=total)

    # Floyd's sampling takes k steps over all rows at once. On a GPU each is a few launches; on a CPU a comparison takes
    # an eighth of the time of drawing a number and looking for the largest.
    if k * k < others * (8 if device.type == "cpu" else 1):
        fewest = others - k + 1  # that a step draws from; each next one draws from one more
        if has_float64(device):
            sizes = torch.arange(fewest, others + 1, device=device)[:, None]
            drawn = (torch.rand((k, rows), dtype=torch.float64, device=device) * sizes).long()
        else:
            drawn = torch.stack([torch.randint(fewest + step, (rows,), device=device) for step in range(k)])
        picked = torch.empty_like(drawn)
        for step, candidate in enumerate(drawn):
            taken = (picked[:step] == candidate).any(0)
            picked[step] = torch.where(taken, fewest + step - 1, candidate)
        return over_own(picked.T.contiguous(), 0)
    step = max(1, 2**20 // others)  # the k largest of others' random numbers, some rows at a time
    counts = {start: min(step, rows - start) for start in range(0, rows, step)}
    return torch.cat(
        [
            over_own(torch.rand((count, others), device=device).topk(k, 1).indices, start)
            for start, count in counts.items()
        ]
    )
