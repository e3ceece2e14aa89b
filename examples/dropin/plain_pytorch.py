"""A plain PyTorch loop, from info-nce-pytorch to eqco_loss: one line. Prints the losses of two trainings.

python examples/dropin/plain_pytorch.py
"""

import torch
import tyro
from info_nce import InfoNCE
from torch import nn

from eqco_loss import EqCoLoss


def train(criterion: nn.Module, steps: int) -> list[float]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        images = torch.randn(32, 3, 16, 16)
        query = encoder(images + 0.5 * torch.randn_like(images))
        positive_key = encoder(images + 0.5 * torch.randn_like(images))
        loss = criterion(query, positive_key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(steps: int = 10) -> list[tuple[float, float]]:
    """Train twice from one seed.

    Args:
        steps: how many.
    """
    original = InfoNCE(temperature=0.1)
    # criterion = InfoNCE(temperature=0.1)
    criterion = EqCoLoss(temperature=0.1, alpha=None)  # then alpha=65536: as if there were as many
    losses = list(zip(train(original, steps), train(criterion, steps), strict=True))
    for step, (old, new) in enumerate(losses):
        print(f"step {step}  original {old:.6f}  eqco_loss {new:.6f}")
    return losses


if __name__ == "__main__":
    tyro.cli(main)
