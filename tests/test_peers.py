"""Published losses, each as one constructor call of ours: equal in value and in gradients to the package that has it.

Float64 throughout (every peer computes in the dtype of its input), to 1e-9 of the largest entry. ``ours * scale ==
theirs``: the scale is 1 wherever it is not written in the test. docs/migration.md is the table of this file.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from info_nce import InfoNCE
from lightly.loss import NTXentLoss as LightlyNTXentLoss
from open_clip.loss import ClipLoss
from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss, SelfSupervisedLoss, SupConLoss
from torch import Tensor, nn

from eqco_loss import EqCoLoss, MomentumQueue, functional
from eqco_loss.functional import eqco_loss
from eqco_loss.settings import Reduction

EQUAL = 1e-9
SIZES = [(2, 3), (7, 5), (33, 16)]  # N, D
TEMPERATURES = [0.05, 0.2, 1.0]

Loss = Callable[..., Tensor]


def embeddings(*shape: int) -> Tensor:
    """Neither unit rows nor rows of one length: whoever normalises has to show it."""
    return torch.randn(*shape, dtype=torch.float64) * (0.5 + torch.rand(*shape[:-1], 1, dtype=torch.float64))


def assert_equal(ours: Loss, theirs: Loss, leaves: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Both are called with the leaves by name. Every leaf gets a gradient from both."""

    def answer(loss: Loss) -> dict[str, Tensor]:
        mine = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        value = loss(**mine)
        assert value.dtype == torch.float64
        gradients = torch.autograd.grad(value.sum(), list(mine.values()))
        return {"loss": value.detach(), **dict(zip(mine, gradients, strict=True))}

    found, expected = answer(ours), answer(theirs)
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        difference = (scale * found[name] - truth).abs().max().item()
        assert difference <= EQUAL * truth.abs().max().item(), f"{name}: off by {difference:.2e}"


def two_views(n: int, d: int) -> dict[str, Tensor]:
    return {"z0": embeddings(n, d), "z1": embeddings(n, d)}


# NT-Xent: SimCLR, 2N anchors with 2N - 2 negatives each. The mean is over the 2N anchors, so the scale is 1.


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_nt_xent_of_lightly(n: int, d: int, t: float) -> None:
    ours = EqCoLoss(temperature=t, alpha=None, in_batch="views", symmetric=True)
    theirs = LightlyNTXentLoss(temperature=t)
    assert_equal(lambda z0, z1: ours(z0, z1), lambda z0, z1: theirs(z0, z1), two_views(n, d))


@pytest.mark.parametrize("peer", [NTXentLoss, SupConLoss])
@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_nt_xent_of_pytorch_metric_learning(n: int, d: int, t: float, peer: type[nn.Module]) -> None:
    """SupCon's anchors have one positive here, which makes it NT-Xent."""
    ours = EqCoLoss(temperature=t, alpha=None, in_batch="views", symmetric=True)
    theirs = SelfSupervisedLoss(peer(temperature=t))
    assert_equal(lambda z0, z1: ours(z0, z1), lambda z0, z1: theirs(z0, z1), two_views(n, d))


@pytest.mark.parametrize("t", TEMPERATURES)
def test_one_direction_of_pytorch_metric_learning(t: float) -> None:
    ours = EqCoLoss(temperature=t, alpha=None)
    theirs = SelfSupervisedLoss(NTXentLoss(temperature=t), symmetric=False)
    assert_equal(lambda z0, z1: ours(z0, z1), lambda z0, z1: theirs(z0, z1), two_views(7, 5))


# InfoNCE: the N columns of its cross entropy are the positive and N - 1 negatives, so alpha=None.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_infonce_of_the_batch(n: int, d: int, t: float, reduction: Reduction) -> None:
    ours = EqCoLoss(temperature=t, alpha=None, reduction=reduction)
    theirs = InfoNCE(temperature=t, reduction=reduction)
    assert_equal(lambda z0, z1: ours(z0, z1), lambda z0, z1: theirs(z0, z1), two_views(n, d))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", ["unpaired", "paired"])
@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_infonce_with_negative_keys(n: int, d: int, t: float, mode: str, reduction: Reduction) -> None:
    """The same call for both modes: (K, D) is unpaired, (N, K, D) is paired."""
    ours = EqCoLoss(temperature=t, alpha=None, reduction=reduction)
    theirs = InfoNCE(temperature=t, reduction=reduction, negative_mode=mode)
    negatives = embeddings(11, d) if mode == "unpaired" else embeddings(n, 11, d)
    leaves = {**two_views(n, d), "negatives": negatives}
    assert_equal(
        lambda z0, z1, negatives: ours(z0, z1, negatives), lambda z0, z1, negatives: theirs(z0, z1, negatives), leaves
    )


# MoCo: logits (N, 1 + K), cross entropy against column 0.


def moco(q: Tensor, k: Tensor, queue: Tensor, t: float) -> Tensor:
    """As MoCo writes it, from the encoders' outputs to the loss. Queue (D, K)."""
    q = nn.functional.normalize(q, dim=1)
    k = nn.functional.normalize(k, dim=1)
    l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    l_neg = torch.einsum("nc,ck->nk", [q, queue.clone().detach()])
    logits = torch.cat([l_pos, l_neg], dim=1)
    logits /= t
    labels = torch.zeros(logits.shape[0], dtype=torch.long)
    loss: Tensor = nn.CrossEntropyLoss()(logits, labels)
    return loss


@pytest.mark.parametrize("t", [0.07, 0.2])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_moco(n: int, d: int, t: float) -> None:
    k, published = embeddings(n, d), F.normalize(embeddings(d, 64), dim=0)
    ours = EqCoLoss(temperature=t, alpha=None)
    queue = MomentumQueue(64, d, dtype=torch.float64)
    queue.load_moco(published)
    for negatives in (queue, published.T):
        assert_equal(lambda q, n=negatives: ours(q, k, n), lambda q: moco(q, k, published, t), {"q": embeddings(n, d)})
    same = EqCoLoss(temperature=t, alpha=64)  # a full queue of K keys: alpha = K
    assert_equal(lambda q: same(q, k, queue), lambda q: moco(q, k, published, t), {"q": embeddings(n, d)})


@pytest.mark.parametrize("t", [0.07, 0.2])
def test_memory_bank_of_lightly(t: float) -> None:
    """Step after step, around the bank. The batch divides its size, since lightly drops the keys that pass its end."""
    theirs = LightlyNTXentLoss(temperature=t, memory_bank_size=(24, 5)).double()
    ours, queue = EqCoLoss(temperature=t, alpha=None), MomentumQueue(24, 5, dtype=torch.float64)
    theirs.memory_bank.bank = F.normalize(theirs.memory_bank.bank, dim=1)  # drawn in float32: unit to float64 now
    queue.load_moco(theirs.memory_bank.bank.T, theirs.memory_bank.bank_ptr)
    for _ in range(5):
        k, bank = embeddings(8, 5), theirs.memory_bank.bank.clone()
        torch.testing.assert_close(queue.contents, bank, rtol=0, atol=1e-15)
        assert_equal(lambda q, k=k: ours(q, k, queue), lambda q, k=k: theirs(q, k), {"q": embeddings(8, 5)})
        queue.enqueue(k)


# CLIP: the mean of both directions, of unit features, with a learned log of the inverse temperature.


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_clip(n: int, d: int, t: float) -> None:
    ours, theirs = EqCoLoss(temperature=t, alpha=None, symmetric=True), ClipLoss()
    assert_equal(
        lambda image, text: ours(image, text),
        lambda image, text: theirs(F.normalize(image, dim=1), F.normalize(text, dim=1), 1 / t),
        {"image": embeddings(n, d), "text": embeddings(n, d)},
    )


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_clip_with_its_learned_logit_scale(n: int, d: int, t: float) -> None:
    """CLIP's parameter is log(1 / t): both forms of ours give that parameter CLIP's gradient."""
    theirs = ClipLoss()
    leaves = {"image": embeddings(n, d), "text": embeddings(n, d), "logit_scale": -torch.tensor(t).double().log()}

    def clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        loss: Tensor = theirs(F.normalize(image, dim=1), F.normalize(text, dim=1), logit_scale.exp())
        return loss

    criterion = EqCoLoss(alpha=None, symmetric=True)

    def module(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        criterion.temperature = (-logit_scale).exp()
        return criterion(image, text)

    def function(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        return eqco_loss(image, text, temperature=(-logit_scale).exp(), alpha=None, symmetric=True)

    assert_equal(module, clip, leaves)
    assert_equal(function, clip, leaves)


def test_clip_with_a_temperature_of_its_own() -> None:
    """A parameter t in place of log(1 / t): the chain rule, d/dt = -(1 / t) d/d log(1 / t)."""
    theirs, image, text = ClipLoss(), F.normalize(embeddings(7, 5), dim=1), F.normalize(embeddings(7, 5), dim=1)
    t = nn.Parameter(torch.tensor(0.07, dtype=torch.float64))
    EqCoLoss(temperature=t, alpha=None, symmetric=True)(image, text).backward()
    logit_scale = nn.Parameter(-t.detach().log())
    theirs(image, text, logit_scale.exp()).backward()
    assert t.grad is not None
    assert logit_scale.grad is not None
    torch.testing.assert_close(t.grad * -t.detach(), logit_scale.grad, rtol=EQUAL, atol=0)


# Ids: a negative of the query's class is none.


def classes(n: int) -> Tensor:
    return torch.arange(n) % 3


@pytest.mark.parametrize("t", TEMPERATURES)
def test_class_masks_in_the_batch(t: float) -> None:
    """An anchor's positive is its other view, its negatives are all of other classes: their pairs, our ids."""
    n, y = 10, classes(10)
    ours, theirs = EqCoLoss(temperature=t, alpha=None, in_batch="views", symmetric=True), NTXentLoss(temperature=t)
    anchors, both = torch.arange(2 * n), torch.cat([y, y])
    negatives = (both[:, None] != both[None, :]).nonzero(as_tuple=True)
    pairs = (anchors, anchors.roll(n), *negatives)
    assert_equal(
        lambda z0, z1: ours(z0, z1, query_ids=y),
        lambda z0, z1: theirs(torch.cat([z0, z1]), indices_tuple=pairs),
        two_views(n, 5),
    )


@pytest.mark.parametrize("t", TEMPERATURES)
def test_labels_with_every_pair_of_a_class(t: float) -> None:
    """pytorch-metric-learning's NTXentLoss(z, y): one row for each positive pair, in the mean over pairs."""
    y = classes(13)
    ours, theirs = EqCoLoss(temperature=t, alpha=None), NTXentLoss(temperature=t)
    a, p = ((y[:, None] == y[None, :]) & ~torch.eye(13, dtype=torch.bool)).nonzero(as_tuple=True)
    assert_equal(
        lambda z: ours(z[a], z[p], z, query_ids=y[a], negative_ids=y), lambda z: theirs(z, y), {"z": embeddings(13, 5)}
    )


@pytest.mark.parametrize("first", ["enqueue", "loss"])
def test_cross_batch_memory_of_pytorch_metric_learning(first: str) -> None:
    """A queue whose ids leave out the query's own key. Enqueued before the loss, as they do, or after it beside the
    batch's own keys: two calls, one number, until the memory is full and the first has already dropped its oldest.
    """
    t, n, d, size = 0.2, 4, 5, 12
    theirs = CrossBatchMemory(NTXentLoss(temperature=t), embedding_size=d, memory_size=size)
    queue = MomentumQueue(size, d, dtype=torch.float64, store_ids=True)
    ours = EqCoLoss(temperature=t, alpha=None, in_batch=None if first == "enqueue" else "keys")
    is_key = torch.arange(2 * n) >= n
    for step in range(5 if first == "enqueue" else size // n):
        k, y = embeddings(n, d), torch.arange(n) + n * step
        if first == "enqueue" or step == 0:  # an empty queue is an error: the first step is primed with its own keys
            queue.enqueue(k, y)

        def memory(q: Tensor, k: Tensor = k, y: Tensor = y) -> Tensor:
            loss: Tensor = theirs(torch.cat([q, k]), torch.cat([y, y]), enqueue_mask=is_key)
            return loss

        if first == "enqueue" or step > 0:
            assert_equal(lambda q, k=k, y=y: ours(q, k, queue, query_ids=y), memory, {"q": embeddings(n, d)})
            if first == "loss":
                queue.enqueue(k, y)
        else:
            memory(embeddings(n, d))


# Published losses that are not on the registry: the formula, and the factor that it has on ours.


def test_scale_of_simclr() -> None:
    """SimCLR's own code adds both directions, each a mean over N: 2."""

    def simclr(z0: Tensor, z1: Tensor) -> Tensor:
        h0, h1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
        n, own = len(h0), torch.eye(len(h0), dtype=torch.float64) * 1e9
        a = torch.cat([h0 @ h1.T, h0 @ h0.T - own], 1) / 0.1
        b = torch.cat([h1 @ h0.T, h1 @ h1.T - own], 1) / 0.1
        return F.cross_entropy(a, torch.arange(n)) + F.cross_entropy(b, torch.arange(n))

    ours = EqCoLoss(temperature=0.1, alpha=None, in_batch="views", symmetric=True)
    assert_equal(lambda z0, z1: ours(z0, z1), simclr, two_views(7, 5), scale=2)


def test_scale_of_supcon() -> None:
    """SupCon's own code multiplies by t / t_base, t_base = 0.07. Two views and no labels: NT-Xent times that."""

    def supcon(z0: Tensor, z1: Tensor) -> Tensor:
        z, n = F.normalize(torch.cat([z0, z1]), dim=1), len(z0)
        logits = (z @ z.T / 0.1).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
        log_prob = logits.log_softmax(1)[torch.arange(2 * n), torch.arange(2 * n).roll(n)]
        return -(0.1 / 0.07) * log_prob.mean()

    ours = EqCoLoss(temperature=0.1, alpha=None, in_batch="views", symmetric=True)
    assert_equal(lambda z0, z1: ours(z0, z1), supcon, two_views(7, 5), scale=0.1 / 0.07)


def test_scale_of_moco_v3() -> None:
    """MoCo v3 multiplies by 2t, and adds two directions that have embeddings of their own: one call for each."""
    t, k1, k2 = 0.2, embeddings(7, 5), embeddings(7, 5)

    def contrastive(q: Tensor, k: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        logits = torch.einsum("nc,mc->nm", [q, k]) / t
        loss: Tensor = nn.CrossEntropyLoss()(logits, torch.arange(len(q))) * (2 * t)
        return loss

    ours = EqCoLoss(temperature=t, alpha=None)
    assert_equal(
        lambda z0, z1: ours(z0, k2) + ours(z1, k1),
        lambda z0, z1: contrastive(z0, k2) + contrastive(z1, k1),
        two_views(7, 5),
        scale=2 * t,
    )


# The table itself.

MIGRATION = Path(__file__).parents[1] / "docs" / "migration.md"
ROWS = [
    (section.splitlines()[0], theirs, ours, float(scale))
    for section in MIGRATION.read_text().split("\n## ")[1:]
    for theirs, ours, scale in re.findall(r"^\| `([^`]+)` \| `([^`]+)`.* \| ([\d.]+) \|$", section, re.MULTILINE)
]
N, K, D = 6, 24, 5


def names_of(section: str, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a section's rows speak of; the same in every call."""
    torch.manual_seed(1)
    names: dict[str, Any] = {"K": K, "D": D, "torch": torch, "nn": nn, **leaves}
    names |= {"EqCoLoss": EqCoLoss, "functional": functional}
    labels, ids, published = classes(N), torch.arange(N), F.normalize(embeddings(D, K), dim=0)
    queue = MomentumQueue(K, D, dtype=torch.float64)
    queue.load_moco(published)
    if section == "lightly":

        def with_our_bank(*args: Any, **settings: Any) -> nn.Module:
            loss: nn.Module = LightlyNTXentLoss(*args, **settings)
            memory: Any = loss.memory_bank
            memory.bank = published.T.contiguous()
            return loss

        return names | {"NTXentLoss": with_our_bank, "queue": queue}
    if section == "info-nce-pytorch":
        return names | {"InfoNCE": InfoNCE, "unpaired": embeddings(K, D), "paired": embeddings(N, K, D)}
    if section == "pytorch-metric-learning":
        a, p = ((labels[:, None] == labels[None, :]) & ~torch.eye(N, dtype=torch.bool)).nonzero(as_tuple=True)
        memory = CrossBatchMemory(NTXentLoss(0.1), embedding_size=D, memory_size=K)
        queue = MomentumQueue(K, D, dtype=torch.float64, store_ids=True)
        queue.enqueue(leaves["k"], ids)
        names |= {"NTXentLoss": NTXentLoss, "SupConLoss": SupConLoss, "SelfSupervisedLoss": SelfSupervisedLoss}
        names |= {"memory": memory, "queue": queue, "is_key": torch.arange(2 * N) >= N}
        return names | {"labels": labels, "ids": ids, "a": a, "p": p}
    if section == "MoCo and MoCo v2":
        q, k = F.normalize(leaves["q"], dim=1), F.normalize(leaves["k"], dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ published], 1) / 0.2
        return names | {"queue": queue, "logits": logits, "labels": torch.zeros(N, dtype=torch.long)}
    image, text = F.normalize(leaves["image"], dim=1), F.normalize(leaves["text"], dim=1)
    return names | {"ClipLoss": ClipLoss, "image": image, "text": text}


def test_the_migration_table_is_read() -> None:
    packages = MIGRATION.read_text().split("\n## Published code")[0]
    assert len(ROWS) == sum("`EqCoLoss(" in line or "`functional." in line for line in packages.splitlines()) == 13


@pytest.mark.parametrize(("section", "theirs", "ours", "scale"), ROWS)
def test_the_migration_table(section: str, theirs: str, ours: str, scale: float) -> None:
    """Both cells of a row, evaluated as they stand there."""
    known = {name: embeddings(N, D) for name in ("q", "k", "z", "z0", "z1", "image", "text")}
    known["logit_scale"] = torch.tensor(2.3, dtype=torch.float64)
    leaves = {name: leaf for name, leaf in known.items() if re.search(rf"\b{name}\b", ours)}
    if "queue" in ours:
        del leaves["k"]  # no gradient: a momentum encoder's

    def evaluate(cell: str) -> Loss:
        def loss(**mine: Tensor) -> Tensor:
            value: Tensor = eval(cell, names_of(section, known | mine))
            return value

        return loss

    assert_equal(evaluate(ours), evaluate(theirs), leaves, scale)
