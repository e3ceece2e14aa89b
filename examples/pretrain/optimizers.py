"""The optimisers that every method can be trained with."""

import torch
from torch import nn

from .arguments import Common


def make_optimizer(args: Common, model: nn.Module) -> torch.optim.Optimizer:
    """As ``--optimizer`` says, for all parameters alike. A method whose optimiser is another makes it in its file."""
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
