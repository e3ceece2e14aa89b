"""The names an argument can have, without torch, so that ``--help`` need not wait for it."""

from typing import Literal

Arch = Literal["small", "resnet18", "resnet34", "resnet50", "resnet50x2", "resnet50x4"]
Norm = Literal["batch", "sync", "shuffle", "split", "group"]
Schedule = Literal["simo", "cosine", "cosine-by-epoch", "drops"]
