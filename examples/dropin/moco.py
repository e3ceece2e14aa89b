"""MoCo, from its own loss, queue and momentum update to eqco_loss. Prints the losses of two trainings.

python examples/dropin/moco.py
"""

import copy

import torch
import tyro
from torch import Tensor, nn

from eqco_loss import EqCoLoss, MomentumQueue, momentum_update

K, DIM, M, T = 64, 32, 0.99, 0.2  # MoCo v2 has 65536, 128, 0.999, 0.2


class MoCo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder_q = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, DIM))
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        # self.register_buffer("queue", nn.functional.normalize(torch.randn(dim, K), dim=0))
        # self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.negatives = MomentumQueue(K, DIM)
        # criterion = nn.CrossEntropyLoss()
        self.criterion = EqCoLoss(temperature=T, alpha=None)  # then alpha=65536, and as many keys as you can afford

    def update_key_encoder(self) -> None:
        # for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
        #     param_k.data = param_k.data * self.m + param_q.data * (1.0 - self.m)
        momentum_update(self.encoder_q, self.encoder_k, momentum=M)

    def loss(self, q: Tensor, k: Tensor) -> Tensor:
        # l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        # l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        # logits = torch.cat([l_pos, l_neg], dim=1)
        # logits /= self.T
        # labels = torch.zeros(logits.shape[0], dtype=torch.long)
        # loss = criterion(logits, labels)
        loss: Tensor = self.criterion(q, k, self.negatives)
        # self._dequeue_and_enqueue(k)
        self.negatives.enqueue(k)
        return loss

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        q = nn.functional.normalize(self.encoder_q(im_q), dim=1)  # may stay: ours normalises what is given
        with torch.no_grad():
            self.update_key_encoder()
            k = nn.functional.normalize(self.encoder_k(im_k), dim=1)
        return self.loss(q, k)


class Original(MoCo):
    """The commented lines, to compare with: MoCo's published code on one device, where nothing is shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = nn.functional.normalize(torch.randn(DIM, K), dim=0)
        self.queue_ptr = torch.zeros(1, dtype=torch.long)

    def update_key_encoder(self) -> None:
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data = param_k.data * M + param_q.data * (1.0 - M)

    def loss(self, q: Tensor, k: Tensor) -> Tensor:
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1)
        logits /= T
        labels = torch.zeros(logits.shape[0], dtype=torch.long)
        loss: Tensor = nn.CrossEntropyLoss()(logits, labels)
        ptr, batch_size = int(self.queue_ptr), len(k)
        assert K % batch_size == 0  # MoCo's condition; MomentumQueue has none
        self.queue[:, ptr : ptr + batch_size] = k.T
        self.queue_ptr[0] = (ptr + batch_size) % K
        return loss


def train(model: MoCo, steps: int) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(steps):
        images = torch.randn(32, 3, 16, 16)
        loss = model(images + 0.5 * torch.randn_like(images), images + 0.5 * torch.randn_like(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(steps: int = 10) -> list[tuple[float, float]]:
    """Train both from the same weights and the same queue.

    Args:
        steps: how many.
    """
    torch.manual_seed(0)
    original, model = Original(), MoCo()
    model.load_state_dict(original.state_dict())
    # MoCo's queue starts with random keys, ours empty: primed with another batch's keys, or with a checkpoint's queue.
    model.negatives.load_moco(original.queue, original.queue_ptr)
    losses = list(zip(train(original, steps), train(model, steps), strict=True))
    for step, (old, new) in enumerate(losses):
        print(f"step {step}  original {old:.6f}  eqco_loss {new:.6f}")
    return losses


if __name__ == "__main__":
    tyro.cli(main)
