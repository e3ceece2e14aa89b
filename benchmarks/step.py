"""The loss's share of a ResNet-50 SiMo step: encoders, loss, backward, optimiser and momentum update.

    python -m benchmarks.step               # N = 256 on a GPU, 16 images on a CPU

Each way's loss is timed alone, forward and backward to the embeddings, in turn with the whole step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torchvision.models import resnet50  # type: ignore[import-untyped]

from eqco_loss import EqCoLoss, momentum_update

from .measure import RESULTS, Row, Step, interleave, provenance, write_csv
from .peers import PEERS
from .runner import check_device, step_of
from .workloads import Case, Problem


@dataclass(frozen=True)
class Args:
    batch_size: int | None = None  # N. None: 256 on a GPU, 16 on a CPU
    image_size: int = 224  # pixels
    device: Literal["cpu", "cuda"] | None = None  # None: a GPU where there is one
    rounds: int | None = None  # None: 30 on a GPU, 5 on a CPU
    out: Path | None = None  # None: benchmarks/results/step-{cpu,gpu}.csv


def main(args: Args) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    n = (256 if device == "cuda" else 16) if args.batch_size is None else args.batch_size
    rounds = (30 if device == "cuda" else 5) if args.rounds is None else args.rounds
    for name, value, least in (("batch_size", n, 2), ("image_size", args.image_size, 32), ("rounds", rounds, 1)):
        if value < least:
            raise SystemExit(f"error: {name}: expected {least} or more, got {value}.")
    out = args.out or RESULTS / f"step-{'gpu' if device == 'cuda' else 'cpu'}.csv"
    dtype = "amp" if device == "cuda" else "float32"
    picked, queue = Case("P1", n, min(16, n - 1), dtype=dtype), Case("M1", n, 65536, dtype=dtype)
    losses: dict[str, Step] = {}
    for case in (picked, queue):
        for one in PEERS:
            if case.workload in one.workloads and one.name in ("eqco_loss", "eager masked", "eager MoCo"):
                problem = Problem(case, device)
                losses[f"{one.name}, K = {case.k}"] = partial(step_of, problem, one.prepare(problem))
    step = f"the whole step, K = {picked.k}"
    steps: dict[str, Step] = {step: SimoStep(n, args.image_size, device), **losses}
    for warm_up in steps.values():
        warm_up()
    timings = interleave(steps, rounds, "step", device)
    whole = timings[step].median
    origin = provenance(device) | {"rounds": str(rounds)}
    rows: list[Row] = []
    print(f"ResNet-50, N = {n}, {args.image_size} px, {dtype}, {origin['device']}; {rounds} rounds")
    for name, timing in timings.items():
        share = timing.median / whole
        print(f"{name:28}{1e3 * timing.median:12.3f} ms{100 * share:10.3f} %")
        rows.append(
            {
                "n": str(n),
                "image_size": str(args.image_size),
                "dtype": dtype,
                "what": name,
                "ms": f"{1e3 * timing.median:.4g}",
                "min_ms": f"{1e3 * timing.low:.4g}",
                "max_ms": f"{1e3 * timing.high:.4g}",
                "share_of_step": f"{share:.3g}",
                **origin,
            }
        )
    write_csv(out, rows)
    print(f"written to {out}")


class SimoStep:
    """One optimiser step of SiMo: two encoders, of which one learns."""

    def __init__(self, n: int, image_size: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        encoder = resnet50(num_classes=128)
        encoder.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), encoder.fc)
        self.encoder = encoder.to(device, memory_format=torch.channels_last)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        shape = n, 3, image_size, image_size
        self.views = [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)]
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
        self.criterion = EqCoLoss(0.2, alpha=65536, num_negatives=16)

    def __call__(self) -> Tensor:
        momentum_update(self.encoder, self.key_encoder, 0.999)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            with torch.no_grad():
                keys = self.key_encoder(self.views[1])
            queries = self.encoder(self.views[0])
        loss: Tensor = self.criterion(queries, keys)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
