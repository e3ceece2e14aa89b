"""lightly's SimCLR, from its NTXentLoss to eqco_loss: one line. Prints the losses of two trainings, step by step.

python examples/dropin/lightly_simclr.py
"""

import torch
import tyro
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn

from eqco_loss import EqCoLoss


class SimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.projection_head = SimCLRProjectionHead(256, 64, 32)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.backbone(x))
        return z


def train(criterion: nn.Module, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = SimCLR()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        images = torch.randn(32, 3, 16, 16)
        x0, x1 = images + 0.5 * torch.randn_like(images), images + 0.5 * torch.randn_like(images)
        z0, z1 = model(x0), model(x1)
        loss = criterion(z0, z1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps: int = 10) -> list[tuple[float, float]]:
    """Train twice from one seed.

    Args:
        steps: how many.
    """
    original = NTXentLoss(temperature=0.5)
    # criterion = NTXentLoss(temperature=0.5)
    criterion = EqCoLoss(temperature=0.5, alpha=None, in_batch="views", symmetric=True)  # then alpha=4096
    losses = list(zip(train(original, steps), train(criterion, steps), strict=True))
    for step, (old, new) in enumerate(losses):
        print(f"step {step}  original {old:.6f}  eqco_loss {new:.6f}")
    return losses


if __name__ == "__main__":
    tyro.cli(main)
