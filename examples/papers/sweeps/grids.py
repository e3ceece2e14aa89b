"""The grids: what each of them varies, and what the papers report of it."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import train_moco
import train_simclr
import train_simco
import train_simmoco
import train_simo

DEFAULTS: dict[str, dict[str, Any]] = {
    "simo": train_simo.DEFAULTS,
    "moco": train_moco.DEFAULTS,
    "simclr": train_simclr.DEFAULTS,
    "simco": train_simco.DEFAULTS,
    "simmoco": train_simmoco.DEFAULTS,
}
NAMES = {"simo": "SiMo", "moco": "MoCo v2", "simclr": "SimCLR", "simco": "SimCo", "simmoco": "SimMoCo"}
ALPHAS = (256, 1024, 4096, 16384, 65536)
# What the papers report (top-1 of a linear probe, %): EqCo's of ImageNet and ResNet-50, Zhang et al.'s of CIFAR-100.
TABLE_1 = {256: 67.5, 512: 67.5, 1024: 67.4}
TABLE_3 = dict(zip(ALPHAS, (68.0, 68.1, 68.1, 68.4, 68.5), strict=True))
TABLE_4 = dict(zip(ALPHAS, (67.0, 67.1, 67.6, 67.3, 67.5), strict=True))
FIGURE_3B = {256: 62.0, 4096: 65.3}  # SimCLR, by alpha
TABLE_6 = {False: 62.1, True: 64.4}  # without a momentum encoder and with one
TABLE_7 = {"split": 58.8, "batch": 64.4}  # shuffling BN and SyncBN, as one process has them
DUAL = {
    "simco": {64: 58.04, 128: 58.29, 256: 58.35, 512: 57.08, 1024: 55.34},
    "simmoco": {64: 54.02, 128: 54.93, 256: 54.11, 512: 52.45, 1024: 49.70},
    "moco": {64: 52.58, 128: 54.40, 256: 53.28, 512: 51.47, 1024: 48.90},
}

Dataset = Literal["digits", "cifar10", "cifar100"]


# For CIFAR in few epochs: no blur on 32 pixels, twice the learning rate, and a warm-up of a tenth of 40 epochs
QUICK = {"recipe": "simco", "base_lr": 0.06, "warmup_epochs": 4}


class Setting(NamedTuple):
    """What is varied: where it is in the figure, the training script's arguments, and the paper's value."""

    method: str
    line: str  # of the figure
    x: float | str
    changes: dict[str, Any]  # to the script's defaults
    paper: float | None = None


class Grid(NamedTuple):
    title: str
    settings: Callable[[str], list[Setting]]  # of a data set
    dataset: Dataset
    axis: str
    seeds: int = 1
    epochs: int | None = None  # None: the training script's
    panels: bool = True  # a panel for each method, or one for all
    paper_on: str = "ImageNet"  # what the paper's values are of


def by_negatives(dataset: str) -> list[Setting]:
    """Few and many negatives, with and without EqCo."""
    alpha, small = (256, (2, 4, 16, 64, 127)) if dataset == "digits" else (256, (4, 16, 64, 255))
    settings = []
    for k in small:
        paper = 68.1 if k == 16 else None
        settings.append(Setting("simo", f"EqCo, alpha = {alpha}", k, {"num_negatives": k, "alpha": alpha}, paper))
        settings.append(Setting("simo", "InfoNCE", k, {"num_negatives": k, "eqco": False}))
    for k in (16, 64, 256, 1024, 4096) if dataset != "digits" else ():
        own = None if k == 4096 else 4096.0  # the same run
        settings.append(Setting("moco", "EqCo, alpha = 4096", k, {"queue_size": k, "alpha": own}))
        settings.append(Setting("moco", "InfoNCE", k, {"queue_size": k, "alpha": None}))
    return settings


def by_few_negatives(dataset: str) -> list[Setting]:
    """Figure 4 in a few minutes: the fewest, the paper's K, and the most that it has, with and without EqCo."""
    settings = []
    for k in (16, 4, 255):  # what tells most comes first
        paper = 68.1 if k == 16 else None
        eqco = {**QUICK, "num_negatives": k, "alpha": 256}
        settings.append(Setting("simo", "EqCo, alpha = 256", k, eqco, paper))
        settings.append(Setting("simo", "InfoNCE", k, {**QUICK, "num_negatives": k, "eqco": False}))
    return settings


def by_loss(dataset: str) -> list[Setting]:
    """Four negatives with and without EqCo, in a network and a batch that two CPU cores train."""
    common = {**QUICK, "arch": "small", "batch_size": 128, "warmup_epochs": 1, "num_negatives": 4}
    eqco = Setting("simo", "EqCo, alpha = 256", 4, {**common, "alpha": 256})
    return [eqco, Setting("simo", "InfoNCE", 4, {**common, "eqco": False})]


def long_run(dataset: str) -> list[Setting]:
    """One SiMo with all that helps on 32 pixels: both directions, more negatives, a sharper temperature."""
    changes = {**QUICK, "symmetric": True, "batch_size": 256, "num_negatives": 128, "temperature": 0.1}
    return [Setting("simo", "SiMo", 128, {**changes, "knn_every": 20})]


def by_alpha(dataset: str) -> list[Setting]:
    most = 127 if dataset == "digits" else 255
    simo = [Setting("simo", "ours", a, {"num_negatives": most, "alpha": a}, TABLE_3[a]) for a in ALPHAS]
    moco = [Setting("moco", "ours", a, {"queue_size": 256, "alpha": float(a)}, TABLE_4[a]) for a in ALPHAS]
    simclr = [Setting("simclr", "ours", a, {"alpha": float(a)}, paper) for a, paper in FIGURE_3B.items()]
    return simo + moco + simclr


def by_batch(dataset: str) -> list[Setting]:
    """The learning rate follows N; the paper's N, or an eighth of it where there are 1,500 images."""
    factor = 8 if dataset == "digits" else 1
    return [Setting("moco", "ours", n // factor, {"batch_size": n // factor}, paper) for n, paper in TABLE_1.items()]


def by_momentum(dataset: str) -> list[Setting]:
    own = DEFAULTS["simo"][dataset].key_momentum
    return [
        Setting("simo", "ours", f"{m:g}", {"key_momentum": m}, paper)
        for m, paper in zip((0.0, own), TABLE_6.values(), strict=True)
    ]


def by_norm(dataset: str) -> list[Setting]:
    """On one device shuffling BN is that over parts of a batch, and SyncBN is batch norm."""
    return [Setting("simo", "ours", norm, {"norm": norm}, paper) for norm, paper in TABLE_7.items()]


def by_batch_dual(dataset: str, sizes: tuple[int, ...] = (256, 64, 128, 512, 1024)) -> list[Setting]:
    """The paper's own size first."""
    same = {"recipe": "simco", "online_probe": True}  # the same views and probe for all three
    return [Setting(m, NAMES[m], n, {"batch_size": n, **same}, DUAL[m][n]) for n in sizes for m in DUAL]


GRIDS = {
    "digits-k": Grid("Figures 3 and 4: the number of negatives", by_negatives, "digits", "K", seeds=3, epochs=40),
    "cifar10-k": Grid("Figures 3 and 4: the number of negatives", by_negatives, "cifar10", "K", epochs=100),
    "cifar10-quick": Grid("Figure 4: the number of negatives", by_few_negatives, "cifar10", "K", epochs=40),
    "cifar10-small": Grid("Four negatives, a small network", by_loss, "cifar10", "K", seeds=3, epochs=10),
    "cifar10-long": Grid("SiMo for 200 epochs", long_run, "cifar10", "K", epochs=200),
    "cifar100-quick": Grid(
        "Dual temperature, 40 epochs", partial(by_batch_dual, sizes=(256,)), "cifar100", "N", 1, 40, False, "CIFAR-100"
    ),
    "cifar100-dual": Grid(
        "Dual temperature: the batch size", by_batch_dual, "cifar100", "N", 1, 200, False, "CIFAR-100"
    ),
    "alpha": Grid("Tables 3 and 4, Figure 3 (b): alpha", by_alpha, "digits", "alpha", seeds=3, epochs=40),
    "batch": Grid("Table 1: queries of a batch", by_batch, "digits", "N", seeds=3, epochs=40),
    "momentum": Grid("Table 6: the key encoder's momentum", by_momentum, "digits", "momentum", seeds=3, epochs=40),
    "norm": Grid("Table 7: shuffling BN (split) and SyncBN (batch)", by_norm, "digits", "norm", seeds=3, epochs=40),
}
