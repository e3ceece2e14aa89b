"""momentum_update: the key encoder follows the query encoder."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._names import explains_names


@explains_names
@torch.no_grad()
def momentum_update(
    query_encoder: nn.Module, key_encoder: nn.Module, momentum: float = 0.999, *, buffers: str = "none"
) -> None:
    r"""Move the key encoder towards the query encoder, in place: ``key = momentum * key + (1 - momentum) * query``.

    Source: MoCo (He et al. 2020), equation 2. Call it once a step, before the keys are encoded.

    No gradient is recorded, and storages stay the same. ``DistributedDataParallel`` and ``torch.compile`` wrappers on
    either side are looked through, also around single blocks, as are ``DataParallel`` and activation checkpointing, and
    parameters sharded by FSDP2 (``DTensor``) are updated shard by shard.

    Args:
        query_encoder: trained by gradients; left as it is.
        key_encoder: same parameter names and shapes; float32 is right for it even where the query encoder is in half
            precision.
        momentum: between 0 (a copy) and 1 (frozen); MoCo 0.999, SiMo 0.999, SimMoCo 0.99. On a schedule that rises to 1
            float32 rounds the last steps away, which is harmless.
        buffers: what to do with buffers (batch norm's running statistics): ``"none"`` leaves them to the key encoder's
            own passes (MoCo), ``"copy"`` copies them, ``"ema"`` averages the floating ones like parameters and copies
            the integers.

    Raises:
        ValueError: names or shapes that differ, ``momentum`` outside [0, 1], an unknown ``buffers``, encoders that
            are exchanged, share parameters or whose parameters a sharder has emptied, or a key encoder in half
            precision that cannot represent the step (bfloat16 at 0.999 would never move).

    Shape:
        Every parameter keeps its own; they must agree pairwise.

    Examples:
        >>> import copy, torch
        >>> from eqco_loss import momentum_update
        >>> query_encoder = torch.nn.Linear(2, 2)
        >>> key_encoder = copy.deepcopy(query_encoder)
        >>> momentum_update(query_encoder, key_encoder, momentum=0.999)
    """
    real: type[Any] = numbers.Real  # NumPy's too
    if isinstance(momentum, bool) or not isinstance(momentum, real) or not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum: expected a number between 0 (copy) and 1 (frozen), got {momentum!r}. MoCo uses 0.999."
        )
    if buffers not in ("none", "copy", "ema"):
        raise ValueError(f"buffers: expected 'none', 'copy' or 'ema', got {buffers!r}. MoCo leaves them alone: 'none'.")
    for name, encoder in (("query_encoder", query_encoder), ("key_encoder", key_encoder)):
        if not isinstance(encoder, nn.Module):
            raise TypeError(
                f"{name}: expected a torch.nn.Module, got {type(encoder).__name__}. Pass the module itself."
            )
    query_encoder, key_encoder = _unwrap(query_encoder), _unwrap(key_encoder)
    if query_encoder is key_encoder:
        raise ValueError(
            "key_encoder: expected another module than query_encoder, got the same one, which would never lag behind. "
            "Make it with copy.deepcopy(query_encoder)."
        )
    if not _learns(query_encoder) and _learns(key_encoder):
        raise ValueError(
            "query_encoder: expected the encoder that gradients train, got one that is frozen, beside a key_encoder "
            "that is not. Exchange them, momentum_update(query_encoder, key_encoder), or, if they are meant so, freeze "
            "the second: key_encoder.requires_grad_(False)."
        )
    momentum = float(momentum)
    _check_apart(query_encoder, key_encoder)
    parameters = _pair(_named(query_encoder.named_parameters()), _named(key_encoder.named_parameters()), "parameter")
    averaged = [(q, k) for q, k in parameters if k.is_floating_point() or k.is_complex()]
    copied = [(q, k) for q, k in parameters if not (k.is_floating_point() or k.is_complex())]
    if buffers != "none":
        for q, k in _pair(_named(query_encoder.named_buffers()), _named(key_encoder.named_buffers()), "buffer"):
            (averaged if buffers == "ema" and k.is_floating_point() else copied).append((q, k))
    _check_step({k.dtype for _, k in averaged if k.is_floating_point()}, momentum)
    if momentum == 1:
        averaged = []
    if momentum == 0:
        copied, averaged = averaged + copied, []
    for q, k in copied:
        k.copy_(q)
    # Two parameters that are one memory are one weight, which must not step twice.
    averaged = list({(_memory(k), k.shape, k.stride()): (q, k) for q, k in averaged}.values())
    if averaged:
        same = [q.to(device=k.device, dtype=k.dtype) for q, k in averaged]
        torch._foreach_lerp_([k for _, k in averaged], same, 1 - momentum)


def _learns(module: nn.Module) -> bool:
    return any(x.requires_grad for x in module.parameters())


def _unwrap(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch.compile
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "module"}  # of torch.compile, checkpointing, DataParallel


def _named(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """By name, without what wrappers around single blocks add; whole where two would then be called the same."""
    whole = dict(named)
    short = {".".join(step for step in name.split(".") if step not in _WRAPPERS): x for name, x in whole.items()}
    return short if len(short) == len(whole) else whole


def _check_apart(query_encoder: nn.Module, key_encoder: nn.Module) -> None:
    """A shared parameter would follow itself, and one that a sharder has emptied has nothing to follow."""
    query, key = _named(query_encoder.named_parameters()), _named(key_encoder.named_parameters())
    theirs = {_memory(q) for q in query.values() if q.numel()}
    shared = [name for name, k in key.items() if k.numel() and _memory(k) in theirs]
    if shared:
        raise ValueError(
            f"key_encoder: expected parameters of its own, got {_some(shared)} in common with query_encoder, which "
            "would never lag behind. Make it with copy.deepcopy(query_encoder); copy.copy and modules that are used in "
            "both share them."
        )
    for which, named in (("query_encoder", query), ("key_encoder", key)):
        empty = [name for name, x in named.items() if x.shape == (0,)]
        if empty:
            raise ValueError(
                f"{which}: expected parameters with their values, got {_some(empty)} of size 0, as a sharder leaves "
                "them between uses. Call momentum_update where they are gathered (FSDP.summon_full_params, "
                "deepspeed.zero.GatheredParameters), or use FSDP2 (fully_shard), whose shards it updates."
            )


def _memory(x: Tensor) -> Any:
    """What two tensors have in common if and only if they are the same memory."""
    local = x.to_local() if _sharded(x) else x  # type: ignore[attr-defined]
    address = local.data_ptr()
    return (local.device, address) if address else id(x)  # none: a meta tensor, or a subclass that wraps others


def _pair(query: dict[str, Tensor], key: dict[str, Tensor], kind: str) -> list[tuple[Tensor, Tensor]]:
    advice = "Build both encoders the same way, for example key_encoder = copy.deepcopy(query_encoder)."
    missing, extra = sorted(query.keys() - key.keys()), sorted(key.keys() - query.keys())
    if missing or extra:
        raise ValueError(
            f"key_encoder: expected the {kind} names of query_encoder, got {_some(missing)} missing and "
            f"{_some(extra)} besides. {advice}"
        )
    for name, q in query.items():
        if q.shape != key[name].shape:
            raise ValueError(
                f"key_encoder: expected {kind} {name!r} of shape {tuple(q.shape)}, got {tuple(key[name].shape)}. "
                f"{advice}"
            )
    return [_local(q, key[name], name) for name, q in query.items()]


def _local(q: Any, k: Any, name: str) -> tuple[Tensor, Tensor]:
    """What this rank holds of both, where FSDP2 or tensor parallelism shards them."""
    if not _sharded(k):
        return (q.full_tensor() if _sharded(q) else q), k
    if not _sharded(q) or q.placements != k.placements or q.device_mesh != k.device_mesh:
        raise ValueError(
            f"key_encoder: expected {name!r} sharded as query_encoder has it, got {k.placements} against "
            f"{q.placements if _sharded(q) else 'a plain tensor'}. Apply the same fully_shard to both encoders."
        )
    return q.to_local(), k.to_local()


def _sharded(x: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")  # a second to import, so only where somebody has
    return tensor is not None and isinstance(x, tensor.DTensor)


def _some(names: list[str]) -> str:
    return (
        "none"
        if not names
        else ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    )


def _check_step(dtypes: set[torch.dtype], momentum: float) -> None:
    for dtype in dtypes & {torch.float16, torch.bfloat16}:
        # A step under half a unit in the last place is lost: within this bound, only for weights closer than 1/8. A
        # schedule that rises to 1 starts with steps that the dtype must hold, and float32 holds those of all of them.
        if 0 < 1 - momentum < 4 * torch.finfo(dtype).eps:
            raise ValueError(
                f"key_encoder: expected a dtype that can hold steps of {1 - momentum:.2g} (momentum = {momentum}), "
                f"got {dtype}, which would round them away and never move. Keep the key encoder in float32 "
                "(key_encoder.float()), and use autocast for its forward pass."
            )
