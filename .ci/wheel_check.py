"""Imports and trains a step from the installed wheel, beside torch alone."""

import importlib.util
from pathlib import Path

import torch

import eqco_loss
from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue

assert "site-packages" in Path(eqco_loss.__file__).parts, eqco_loss.__file__
assert Path(eqco_loss.__file__).with_name("py.typed").exists()
query = torch.randn(8, 16, requires_grad=True)
queue = MomentumQueue(32, 16)
queue.enqueue(torch.randn(20, 16))
for criterion in (EqCoLoss(), DualTempInfoNCE()):
    for negatives in (None, queue):
        loss = criterion(query, torch.randn(8, 16), negatives)
        loss.backward()
        assert loss.isfinite(), loss
triton = "with" if importlib.util.find_spec("triton") else "without"
print(f"eqco_loss {eqco_loss.__version__} imports and runs beside torch {torch.__version__}, {triton} Triton")
