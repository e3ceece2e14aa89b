"""The encoders' optimiser; how a step is skipped, and batch norm's statistics mended, without asking the device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .arguments import Common


def make_optimizer(args: Common, model: nn.Module, *, fused: bool = False) -> Optimizer:
    """As ``--optimizer`` says, for all parameters alike; ``fused``: in a few kernels, which a GPU wants.

    A method whose optimiser is another makes it in its file.
    """
    how: dict[str, Any] = {"weight_decay": args.weight_decay} | ({"fused": True} if fused else {})
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **how)
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, **how)


def is_fused(optimizer: Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))


def start_momentum(optimizer: Optimizer) -> None:
    """Zeros, of which the first step makes the same as of none: a fused first step that is skipped leaves garbage."""
    if isinstance(optimizer, torch.optim.SGD) and is_fused(optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """A checkpoint's state; whether steps are fused is this run's to say, not the checkpoint's."""
    fused = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, was in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = was


def step_unless(skip: Tensor, optimizer: Any, plain: Optimizer) -> None:
    """``optimizer.step()``, except where ``skip`` (a bool on the device) is true: nothing that is kept moves then.

    ``plain`` is torch's own in it. A fused optimizer asks ``found_inf`` on the device, as a gradient scaler has it do;
    for another the host has to wait for the answer.
    """
    if not is_fused(plain):
        if not skip:
            optimizer.step()
        return
    plain.found_inf = skip.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del plain.found_inf  # type: ignore[attr-defined]


class Statistics:
    """Running statistics of batch norm, which one batch that is not finite would make NaN for ever."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        layers = [layer for module in modules for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self.running = [x for layer in layers for x in layer.buffers() if x.is_floating_point()]
        self.kept = self._flat() if self.running else torch.empty(0)

    def mend(self) -> None:
        """After a step: what is not finite is again as it was. A few kernels, however many layers there are."""
        if not self.running:
            return
        now = self._flat()
        self.kept = torch.where(now.isfinite(), now, self.kept)
        parts = self.kept.split([x.numel() for x in self.running])
        torch._foreach_copy_(self.running, [part.view_as(x) for part, x in zip(parts, self.running, strict=True)])

    def _flat(self) -> Tensor:
        return torch.cat([x.flatten() for x in self.running])
