"""The CPU's own flash attention with value = key: log-sum-exp and mean key in one fused pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import Ready
from .calls import LN2, LOG2E

FLASH_ELEMENTS = 2**19  # of keys that flash attention cannot take as they lie: they are made ready so many at a time


def serves(ready: Ready) -> bool:
    """Whether every query meets the same keys, on a CPU whose torch has the operator."""
    keys, pairs = ready.keys[:2]
    return (
        keys.device.type == "cpu"
        and not ready.keys.own
        and not pairs.by_pair
        and not pairs.band
        and (pairs.filled is None or int(pairs.filled) > 0)  # of no keys it kills the process
        and flash_works()
    )


def parts(ready: Ready) -> Iterator[Tensor]:
    """The keys, ready to multiply, in as many parts as they must be copied in."""
    keys, pairs = ready.keys[:2]
    keys = keys if pairs.filled is None else keys[: int(pairs.filled)]
    as_they_lie = keys.is_contiguous() and keys.dtype == ready.dtype and not ready.keys.normalize
    size = len(keys) if as_they_lie else max(1, FLASH_ELEMENTS // keys.shape[1])
    return (ready(part)[0].contiguous() for part in torch.split(keys, max(1, size)))


def attend(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax-weighted mean of the keys (N, D), and the log-sum-exp (N,) of logits.keys, both in base 2."""
    q, k = logits.contiguous()[None, None], keys[None, None]  # of a transposed query it is silently wrong
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=LN2)
    return out[0, 0], lse[0, 0] * LOG2E


@functools.cache
def flash_works() -> bool:
    """Whether torch's private operator is there and still returns (mean, log-sum-exp)."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 8, generator=generator, dtype=torch.float32, device="cpu") for n in (3, 37))
    logits = q @ k.T
    try:
        mean, base = attend(q * LOG2E, k)
        torch.testing.assert_close(mean, torch.softmax(logits, 1) @ k)
        torch.testing.assert_close(base * LN2, torch.logsumexp(logits, 1))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError, IndexError):
        return False
    return True
