"""MomentumQueue: a first-in, first-out store of keys."""

from __future__ import annotations

import numbers
import sys
from typing import Any

import torch
from torch import Tensor

from ._names import explains_names
from .distributed import (
    Gather,
    HoldsGroup,
    Ranks,
    cannot_wait,
    check_gather,
    checked_together,
    equal_ranks,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # torch compares no others with these


def check_dense(name: str, x: Tensor) -> None:
    sharded = None if torch.compiler.is_compiling() else sys.modules.get("torch.distributed.tensor")
    if sharded is not None and isinstance(x, sharded.DTensor):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor. Use {name}.full_tensor(), or, of rows that ranks share "
            f"out, {name}.to_local() with gather=True."
        )
    if x.is_nested:
        rows = f"Put its rows into one: torch.cat({name}.unbind())."
        pad = f"Pad it, {name}.to_padded_tensor(0.0); negative_mask says what is padding."
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one. {pad if name == 'negative_keys' else rows}"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}. Use {name}.to_dense().")


class MomentumQueue(HoldsGroup):
    r"""The newest ``size`` keys, first in, first out: negatives for later batches (MoCo, He et al. 2020, 3.2).

    Starts empty, and slots not yet filled are never negatives: there is no random initialisation to unlearn.
    Batches of any size fit: they wrap around, and of a batch larger than ``size`` the newest ``size`` rows stay.
    Rows are normalised to unit length, in float32 (float64 for rows stored so), when they enter. Contents, cursor,
    count and ids are buffers, so a ``state_dict`` resumes bit for bit.

    A key that is not finite, or whose length is not, enters as a row of zeros, a negative whose similarity to
    everything is 0, because a NaN would make every loss NaN until it is overwritten. ``replaced`` counts them; it is a
    buffer, and reading it waits for the device. A key of zeros stays one, and is not counted.

    Enqueue after the loss; before ``backward()`` is safe too, without a clone, but not where the loss is computed again
    then: with ``create_graph=True``, an error, or inside ``torch.utils.checkpoint``, which would meet the newer keys.
    Prime a new queue before the loop with another batch's keys, not the first step's, which would meet its positives.

    Args:
        size: how many keys to keep, K >= 1. No batch size needs to divide it.
        dim: width D of a key.
        dtype: floating dtype of the stored rows; default float32.
        device: where the rows live; ``queue.to(device)`` moves them.
        gather: True, or a process group: ``enqueue`` stores the keys of all its ranks, in rank order, so that all ranks
            hold the same queue. DDP may broadcast buffers or not: it copies what is there already. Uneven batches work.
        store_ids: keep an integer id beside each key, so that a loss called with ``query_ids`` never repels a query
            from a stale copy of itself.

    Shape:
        ``enqueue(keys (N, D), ids (N,))``; ``.keys`` (K, D) and ``.ids`` (K,), oldest first, K = ``len(queue) <=
        size``. ``.keys``, ``.ids`` and ``len()`` are for people: on a GPU they wait for the device. The loss does not
        use them.

    Raises:
        ValueError, TypeError: sizes < 1, a dtype that is not floating, keys of another width, ids missing or not asked
            for.

    Examples:
        >>> import torch
        >>> from eqco_loss import EqCoLoss, MomentumQueue
        >>> queue = MomentumQueue(size=4, dim=2)
        >>> queue.enqueue(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
        >>> len(queue), queue.keys.tolist()
        (2, [[1.0, 0.0], [0.0, 1.0]])
        >>> criterion = EqCoLoss(temperature=0.2, alpha=65536)
        >>> loss = criterion(torch.randn(3, 2), torch.randn(3, 2), queue)
    """

    contents: Tensor  # (size, dim)
    cursor: Tensor  # (): where the next key goes
    count: Tensor  # (): how many slots hold a key
    replaced: Tensor  # (): how many keys were not finite, and are rows of zeros
    slot_ids: Tensor | None  # (size,)

    @explains_names
    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        store_ids: bool = False,
        gather: Gather = False,
    ) -> None:
        super().__init__()
        whole: type[Any] = numbers.Integral  # NumPy's too
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, whole) or value < 1:
                raise ValueError(
                    f"{name}: expected an integer >= 1, got {value!r}. MoCo uses MomentumQueue(65536, 128)."
                )
        size, dim = int(size), int(dim)
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in FLOATS:
            raise TypeError(
                f"dtype: expected a floating dtype, float16, bfloat16, float32 or float64, got {dtype!r}. float32 is "
                "exact, bfloat16 halves the memory."
            )
        self.register_buffer("contents", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("replaced", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("slot_ids", torch.zeros(size, dtype=torch.int64, device=device) if store_ids else None)
        check_gather(gather)
        self.gather = gather
        self._known_to_hold_keys = False  # once the host knows, it need not ask the device again

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Store ``keys`` (N, D), the oldest rows making room; ``ids`` (N,) beside them if and only if ``store_ids``."""
        size = len(self.contents)
        if self.gather is False:
            self._check(keys, ids)
            unit = self._unit(keys[-size:])
        else:
            ranks = self._agree(keys, ids)
            unit = ranks.gather(self._unit(keys))[-size:]
            ids = None if ids is None else ranks.gather(ids.to(torch.int64))
        unit = self._without_nonfinite(unit)
        n = unit.shape[0]
        slots = (self.cursor + torch.arange(n, device=unit.device)) % size
        if self.slot_ids is not None and ids is not None:
            self.slot_ids.index_copy_(0, slots, ids[-size:].to(torch.int64))
        self.contents.index_copy_(0, slots, unit.to(self.contents.dtype))
        self.cursor.add_(n).remainder_(size)
        self.count.add_(n).clamp_(max=size)
        if not torch.compiler.is_compiling():  # an exported program has no attributes to set
            self._known_to_hold_keys = self._known_to_hold_keys or n > 0

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the queue, as it was constructed; also after ``to_empty()``, which leaves anything in the buffers."""
        for buffer in (self.contents, self.cursor, self.count, self.replaced, self.slot_ids):
            if buffer is not None:
                buffer.zero_()
        self._known_to_hold_keys = False

    reset_parameters = reset  # which those who construct modules on the meta device call

    @property
    def primed(self) -> bool:
        """Whether a loss may use the queue, because it holds a key.

        What the buffers say: they may have been copied into from elsewhere. A GPU is asked only as long as it may hold
        nothing, and not in a traced or captured graph; there an empty queue makes the loss NaN.
        """
        count = self.count
        if count.is_cpu and not torch.compiler.is_compiling():
            return int(count) > 0
        if not self._known_to_hold_keys and not cannot_wait(count) and not count.is_meta:
            self._known_to_hold_keys = int(count) > 0
            return self._known_to_hold_keys
        return True

    @property
    def keys(self) -> Tensor:
        """The stored rows (K, D), oldest first; a copy. Waits for the device."""
        return self.contents[self._order()]

    @property
    def ids(self) -> Tensor | None:
        """Their ids (K,), oldest first; a copy, or None without ``store_ids``. Waits for the device."""
        return None if self.slot_ids is None else self.slot_ids[self._order()]

    def __len__(self) -> int:
        """How many keys are stored. Waits for the device."""
        return int(self.count)

    def __bool__(self) -> bool:
        return True  # an empty queue is still a queue: `queue or default` must not drop it

    def extra_repr(self) -> str:
        size, dim = self.contents.shape
        return f"size={size}, dim={dim}, dtype={self.contents.dtype}, store_ids={self.slot_ids is not None}"

    @torch.no_grad()
    def load_moco(self, queue: Tensor, pointer: Tensor | int = 0) -> None:
        """Take over MoCo's own buffers: ``queue`` (dim, size), as its checkpoints keep it, and ``queue_ptr``.

        Examples:
            >>> import torch
            >>> from eqco_loss import MomentumQueue
            >>> state = {"module.queue": torch.randn(128, 4096), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
            >>> queue = MomentumQueue(4096, 128)
            >>> queue.load_moco(state["module.queue"], state["module.queue_ptr"])
            >>> len(queue)
            4096
        """
        size, dim = self.contents.shape
        if not isinstance(queue, Tensor) or queue.shape != (dim, size) or not queue.is_floating_point():
            got = f"{tuple(queue.shape)} of {queue.dtype}" if isinstance(queue, Tensor) else type(queue).__name__
            raise ValueError(
                f"queue: expected MoCo's floating-point (D, K) = ({dim}, {size}), got {got}. Construct "
                "MomentumQueue(K, D) to match."
            )
        if self.slot_ids is not None:
            raise ValueError(
                "queue: expected a MomentumQueue without ids, since MoCo stores none, got store_ids=True. "
                "Construct it with store_ids=False."
            )
        place = pointer.item() if isinstance(pointer, Tensor) and pointer.numel() == 1 else pointer
        whole: type[Any] = numbers.Integral  # NumPy's too
        if isinstance(place, bool) or not isinstance(place, whole) or not 0 <= place < size:
            raise ValueError(f"pointer: expected 0 <= pointer < {size}, got {pointer}. MoCo calls it queue_ptr.")
        self.contents.copy_(self._without_nonfinite(self._unit(queue.T)))
        self.cursor.fill_(int(place))
        self.count.fill_(size)
        self._known_to_hold_keys = True

    def _without_nonfinite(self, unit: Tensor) -> Tensor:
        """Rows of zeros for those that are not finite, and these counted."""
        wrong = ~unit.to(self.contents.dtype).isfinite().all(1)
        self.replaced.add_(wrong.sum())
        return unit.masked_fill(wrong[:, None], 0.0)

    def _unit(self, keys: Tensor) -> Tensor:
        """To unit length; NaN where there is no direction, because the length overflows."""
        keys = keys.detach().to(torch.float64 if self.contents.dtype == torch.float64 else torch.float32)
        length = keys.norm(dim=1, keepdim=True)
        unit: Tensor = keys / length.clamp_min(1e-12).masked_fill(~length.isfinite(), torch.nan)
        return unit

    def _agree(self, keys: Tensor, ids: Tensor | None) -> Ranks:
        """Whatever is wrong on one rank is an error on all, and none is left waiting."""
        if isinstance(keys, Tensor) and cannot_wait(keys):
            self._check(keys, ids)
            return equal_ranks(self.gather, keys)

        def rows() -> list[int]:
            self._check(keys, ids)
            return [len(keys)]

        return checked_together(rows, 1, self.gather, self.contents.device)[0]

    def _order(self) -> Tensor:
        count, size = int(self.count), len(self.contents)
        return (self.cursor - count + torch.arange(count, device=self.contents.device)) % size

    def _apply(self, fn: Any, recurse: bool = True) -> MomentumQueue:
        self._known_to_hold_keys = False  # to_empty() leaves anything in the buffers
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        name, held = f"{prefix}replaced", f"{prefix}count" in state_dict
        if held and self.slot_ids is not None and f"{prefix}slot_ids" not in state_dict:
            args[-1].append(
                f"{prefix}slot_ids: expected the ids of a MomentumQueue with store_ids=True, got a state without. "
                "Construct it with store_ids=False, or start with an empty queue."
            )
        older = held and name not in state_dict  # of a version that did not count them
        if older:
            state_dict = {**state_dict, name: torch.zeros_like(state_dict[f"{prefix}count"])}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._known_to_hold_keys = False

    def _check(self, keys: Tensor, ids: Tensor | None) -> None:
        dim = self.contents.shape[1]
        if not isinstance(keys, Tensor) or not keys.is_floating_point():
            got = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
            raise TypeError(
                f"keys: expected a floating-point tensor (N, {dim}), got {got}. Use torch.as_tensor(keys).float()."
            )
        check_dense("keys", keys)
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise ValueError(
                f"keys: expected shape (N, {dim}), got {tuple(keys.shape)}. Give one key a row, of the queue's dim, "
                "which is the second number of MomentumQueue(size, dim)."
            )
        if keys.device != self.contents.device:
            raise ValueError(
                f"keys: expected the queue's device, {self.contents.device}, got {keys.device}. Move the queue with "
                f"queue.to(device)."
            )
        if (ids is None) != (self.slot_ids is None):
            expected = "ids (N,), since the queue stores them" if ids is None else "None, since the queue stores no ids"
            raise ValueError(
                f"ids: expected {expected}, got {'None' if ids is None else 'ids'}. Give ids to a queue that is "
                "constructed with store_ids=True, and to no other."
            )
        if ids is not None:
            if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
                raise TypeError(
                    f"ids: expected an integer tensor ({len(keys)},), got "
                    f"{getattr(ids, 'dtype', type(ids).__name__)}. Use ids.long()."
                )
            check_dense("ids", ids)
            if ids.device != self.contents.device:
                raise ValueError(
                    f"ids: expected the queue's device, {self.contents.device}, got {ids.device}. Use "
                    f"ids.to({str(self.contents.device)!r})."
                )
            if ids.shape != keys.shape[:1]:
                raise ValueError(
                    f"ids: expected shape ({len(keys)},), one a key, got {tuple(ids.shape)}. Index both alike."
                )
