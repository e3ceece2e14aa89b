"""A Lightning module, from pytorch-metric-learning to eqco_loss: one line. Prints the losses of two trainings.

python examples/dropin/lightning_module.py
"""

import pytorch_lightning as pl
import torch
import tyro
from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eqco_loss import EqCoLoss


class SimCLR(pl.LightningModule):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, 32))
        self.criterion = criterion
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images = batch[0]
        z0 = self.encoder(images + 0.5 * torch.randn_like(images))
        z1 = self.encoder(images + 0.5 * torch.randn_like(images))
        loss: Tensor = self.criterion(z0, z1)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(criterion: nn.Module, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = SimCLR(criterion)
    loader = DataLoader(TensorDataset(torch.randn(32 * steps, 3, 16, 16)), batch_size=32)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    return model.losses


def main(steps: int = 10) -> list[tuple[float, float]]:
    """Train twice from one seed.

    Args:
        steps: how many.
    """
    original = SelfSupervisedLoss(NTXentLoss(temperature=0.1))
    # criterion = SelfSupervisedLoss(NTXentLoss(temperature=0.1))
    criterion = EqCoLoss(temperature=0.1, alpha=None, in_batch="views", symmetric=True)  # then alpha=4096
    losses = list(zip(train(original, steps), train(criterion, steps), strict=True))
    for step, (old, new) in enumerate(losses):
        print(f"step {step}  original {old:.6f}  eqco_loss {new:.6f}")
    return losses


if __name__ == "__main__":
    tyro.cli(main)
