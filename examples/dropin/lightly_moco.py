"""lightly's MoCo, from NTXentLoss with a memory bank to eqco_loss. Prints the losses of two trainings, step by step.

python examples/dropin/lightly_moco.py
"""

import copy

import torch
import tyro
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from eqco_loss import EqCoLoss, MomentumQueue, momentum_update


class MoCo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.projection_head = MoCoProjectionHead(256, 64, 32)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        # self.criterion = NTXentLoss(temperature=0.5, memory_bank_size=(48, 32))
        self.criterion: nn.Module = EqCoLoss(temperature=0.5, alpha=None)  # then alpha=65536: any size will do
        self.queue = MomentumQueue(48, 32)

    def update(self) -> None:
        # update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        momentum_update(self.backbone, self.backbone_momentum, momentum=0.99)
        # update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        momentum_update(self.projection_head, self.projection_head_momentum, momentum=0.99)

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        # loss = self.criterion(query, key)
        loss: Tensor = self.criterion(query, key, self.queue)
        self.queue.enqueue(key)
        return loss

    def forward(self, x_query: Tensor, x_key: Tensor) -> Tensor:
        self.update()
        query = self.projection_head(self.backbone(x_query))
        key = self.projection_head_momentum(self.backbone_momentum(x_key)).detach()
        return self.loss(query, key)


class Original(MoCo):
    """The commented lines, to compare with."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = NTXentLoss(temperature=0.5, memory_bank_size=(48, 32))

    def update(self) -> None:
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        loss: Tensor = self.criterion(query, key)
        return loss


def train(model: MoCo, steps: int) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    losses = []
    for _ in range(steps):
        images = torch.randn(16, 3, 16, 16)
        loss = model(images + 0.5 * torch.randn_like(images), images + 0.5 * torch.randn_like(images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps: int = 10) -> list[tuple[float, float]]:
    """Train both from the same weights and the same bank.

    Args:
        steps: how many.
    """
    torch.manual_seed(0)
    original, model = Original(), MoCo()
    model.load_state_dict(original.state_dict())
    # lightly's bank starts with random keys, ours empty: primed with another batch's keys, or with what lightly drew.
    model.queue.load_moco(original.criterion.get_buffer("memory_bank.bank").T)
    losses = list(zip(train(original, steps), train(model, steps), strict=True))
    for step, (old, new) in enumerate(losses):
        print(f"step {step}  original {old:.6f}  eqco_loss {new:.6f}")
    return losses


if __name__ == "__main__":
    tyro.cli(main)
