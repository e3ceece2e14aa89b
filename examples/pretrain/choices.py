"""The names an argument can have, without torch, so that ``--help`` need not wait for it."""

from typing import Literal, NamedTuple

Arch = Literal["small", "resnet18", "resnet34", "resnet50", "resnet50x2", "resnet50x4"]
Recipe = Literal["mocov1", "mocov2", "simclr", "simco"]
Norm = Literal["batch", "sync", "shuffle", "split", "group"]
Schedule = Literal["simo", "cosine", "cosine-by-epoch", "drops"]
KeyMomentumSchedule = Literal["constant", "cosine"]
LoggerName = Literal["none", "tensorboard", "wandb"]


class Head(NamedTuple):
    """A projection or prediction head: linear layers with ReLU between them. Words and numbers, for the checkpoint."""

    layers: int = 2
    hidden: int | Literal["inputs", "outputs"] = "inputs"  # width between the layers
    batch_norm: bool = False  # after every layer but the last, none of which then has a bias
    last_norm: Literal["none", "affine", "plain"] = "none"  # after the last layer; plain: without weight and bias
    std: float | None = None  # of the first weights. None: as torch draws them
