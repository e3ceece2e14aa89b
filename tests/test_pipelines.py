"""Every method's script: kills, ranks and damage change nothing; defaults are the papers'; bad input is told early."""

import copy
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets  # type: ignore[import-untyped]
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision.amp import MixedPrecision
from PIL import Image
from torch import Tensor, nn

import eqco_loss
from eqco_loss import EqCoLoss
from eqco_loss.functional import LossMetrics

from .scripts import EXAMPLES, Script, assert_same_run, leaves, make_images, rows, wait_for

import train_moco  # isort: skip
import train_mocov3  # isort: skip
import train_simo  # isort: skip
from pretrain import arguments, data, pictures, startup, training  # isort: skip
from pretrain.encoders import Head, make_encoder  # isort: skip
from pretrain.optimizers import make_optimizer  # isort: skip
from pretrain.probe import OnlineProbe  # isort: skip
from pretrain.run import Run  # isort: skip
from pretrain.training import Training  # isort: skip

FILES = sorted(EXAMPLES.glob("train_*.py"))  # a new method is tested as soon as its file is there
SCRIPTS: dict[str, ModuleType] = {file.stem.removeprefix("train_"): import_module(file.stem) for file in FILES}
SHORT = ["--epochs=2", "--limit=96", "--batch-size=32", "--knn-every=2", "--no-probe"]
OWN: dict[str, list[str]] = {  # what makes a run of a method hard to resume
    "simo": ["--sampling=random"],
    "moco": ["--queue-size=50", "--queue-ids", "--splits=4"],
    "simclr": [],
    "mocov3": ["--online-probe", "--accumulate=2"],
    "simco": ["--accumulate=2", "--online-probe"],
    "simmoco": ["--plus", "--online-probe"],
}


def script(method: str, folder: Path) -> Script:
    return Script(folder, f"train_{method}.py")


def unbroken(method: str, folder: Path) -> Path:
    """A short run that was never stopped."""
    script(method, folder).run(*SHORT, *OWN.get(method, []), f"--run-dir={folder / 'unbroken'}")
    return folder / "unbroken"


# ------------------------------------------------------------------------------------------- SiMo's shared negatives


def test_shared_negatives_are_columns_of_the_similarities() -> None:
    """Of the N x (N - 1) that are left of them without the diagonal, the same K for all rows."""
    similarities = torch.randn(7, 7)
    off_diagonal = similarities[~torch.eye(7, dtype=torch.bool)].view(7, 6)
    draw = torch.Generator().manual_seed(1)
    columns = torch.randperm(6, generator=torch.Generator().manual_seed(1))[:4]
    found = train_simo.shared_negatives(torch.arange(7)[:, None], torch.arange(7), 4, draw)[:, :, 0]
    assert torch.equal(similarities.gather(1, found), off_diagonal[:, columns])


def test_shared_negatives_are_31_distinct_keys() -> None:
    """As in the authors' code, of N = 256 with K = 16: 2 K less the neighbours among the columns."""
    keys, rows, draw = torch.arange(256)[:, None], torch.arange(256), torch.Generator().manual_seed(0)
    distinct = [len(set(train_simo.shared_negatives(keys, rows, 16, draw).flatten().tolist())) for _ in range(2000)]
    assert max(distinct) == 32
    assert sum(distinct) / 2000 == pytest.approx(32 - 16 * 15 / 255, abs=0.06)


def test_shared_negatives_are_the_same_after_a_kill(tmp_path: Path) -> None:
    simo, words = script("simo", tmp_path), [*SHORT, "--sampling=shared", "--save-minutes=0"]
    simo.run(*words, f"--run-dir={tmp_path / 'unbroken'}")
    simo.run(*words, f"--run-dir={tmp_path / 'run'}", die=("replace", 7), code=-signal.SIGKILL)
    assert "resumed after epoch 0 and step 2" in simo.run(*words, f"--run-dir={tmp_path / 'run'}")
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")


# --------------------------------------------------------------------------------------------------------- MoCo v3


def mocov3_args(folder: Path, **more: Any) -> train_mocov3.Args:
    small = {"epochs": 2, "limit": 64, "batch_size": 16, "knn": False, "probe": False, "device": "cpu", "hidden": 32}
    return train_mocov3.Args(**{**small, "run_dir": folder / "run", **more})


def test_mocov3_is_the_authors_loop(tmp_path: Path) -> None:
    """Two epochs against a loop that is written out: a predictor on the queries, both directions, a rising momentum."""
    how: dict[str, Any] = {"optimizer": "sgd", "base_lr": 0.05, "weight_decay": 0.0, "schedule": "cosine-by-epoch"}
    args = mocov3_args(tmp_path, norm="group", **how)  # batch norm over 16 images would magnify roundings
    train_mocov3.main(args)
    torch.manual_seed(data.seed_of(data.INIT, 0))
    head = Head(hidden=32, batch_norm=True, last_norm="plain")
    encoder = make_encoder("small", channels=1, image_size=32, head=head, dim=64, norm="group")
    key_encoder = copy.deepcopy(encoder)
    predictor = nn.Sequential(
        nn.Linear(64, 32, bias=False), nn.GroupNorm(1, 32), nn.ReLU(), nn.Linear(32, 64, bias=False)
    )
    parameters = [*encoder.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05 * 16 / 256, momentum=0.9)
    digits, step = data.PlacedDigits(seed=0, device=torch.device("cpu"), limit=64), 0
    for epoch in range(2):
        for (x1, x2), _ in digits.batches(epoch, data.Share(16)):
            optimizer.param_groups[0]["lr"] = 0.05 * 16 / 256 * (1 + math.cos(math.pi * epoch / 2)) / 2
            q1, q2 = predictor(encoder(x1)), predictor(encoder(x2))
            m = 1 - 0.5 * (1 + math.cos(math.pi * step / 8)) * (1 - 0.9)
            with torch.no_grad():
                for q, k in zip(encoder.parameters(), key_encoder.parameters(), strict=True):
                    k.mul_(m).add_(q, alpha=1 - m)
                k1, k2 = key_encoder(x1), key_encoder(x2)
            logits = [F.normalize(q) @ F.normalize(k).T / 0.2 for q, k in ((q1, k2), (q2, k1))]
            loss = sum((F.cross_entropy(x, torch.arange(16)) for x in logits), torch.zeros(())) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]
    expected = {"encoder": encoder, "key_encoder": key_encoder, "predictor": predictor}
    for name, module in expected.items():
        for key, value in module.state_dict().items():  # builds of torch round by 2e-6, half a per cent of m is more
            torch.testing.assert_close(state[name][key], value, rtol=1e-5, atol=3e-6, msg=f"{name}.{key}")


def test_mocov3_with_lars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's; vectors have no weight decay and are not adapted, which timm leaves out where there is none."""
    train_mocov3.main(mocov3_args(tmp_path, optimizer="lars", base_lr=0.6, weight_decay=1e-6))
    groups = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["always_adapt"]) for group in groups] == [(1e-6, False), (0.0, False)]
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path / "run")[1:])
    monkeypatch.setattr(train_mocov3, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"optimizer: lars is timm's, which is not installed\. pip install -e .*lars"):
        train_mocov3.main(mocov3_args(tmp_path / "none", optimizer="lars"))


def test_the_key_momentum_rises_as_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def momentum_update(query_encoder: nn.Module, key_encoder: nn.Module, momentum: float) -> None:
        seen.append(momentum)

    monkeypatch.setattr(eqco_loss, "momentum_update", momentum_update)
    args = moco_args(tmp_path, knn=False, accumulate=2, splits=2, key_momentum=0.9)
    train_moco.main(args)
    assert seen == [0.9] * 12
    seen.clear()
    train_moco.main(replace(args, key_momentum_schedule="cosine", run_dir=tmp_path / "cosine"))
    assert seen == pytest.approx([1 - 0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)])


# --------------------------------------------------------------------------------------------------- kills and damage


@pytest.mark.parametrize("method", [pytest.param(x, marks=[] if x == "simo" else pytest.mark.slow) for x in SCRIPTS])
def test_killed_at_random_moments(method: str, tmp_path: Path) -> None:
    words = [
        *SHORT,
        *OWN.get(method, []),
        "--save-minutes=0",
        f"--run-dir={tmp_path / 'run'}",
    ]  # a checkpoint every step
    checkpoint, moments, kills = tmp_path / "run" / "checkpoint.pt", random.Random(method), 0
    for _ in range(3):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = script(method, tmp_path).start(*words)
        while process.is_alive() and not written_since(checkpoint, before):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > 0
    script(method, tmp_path).run(*words)
    assert_same_run(unbroken(method, tmp_path), tmp_path / "run")


def written_since(path: Path, moment: int) -> bool:
    try:
        return path.stat().st_mtime_ns > moment
    except FileNotFoundError:
        return False


def test_sigterm_saves_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    words = ["--epochs=2", "--limit=1000", "--batch-size=8", "--queue-size=50", "--splits=4", "--no-probe"]
    moco = script("moco", tmp_path)
    process = moco.start(*words, f"--run-dir={tmp_path / 'run'}")
    wait_for(lambda: "before training" in moco.log.read_text() if moco.log.exists() else False)
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    output = moco.log.read_text()
    assert process.exitcode == 128 + signal.SIGTERM, output
    assert "stopping after this step, as SIGTERM asks" in output
    assert "Continue with\n  python " in output
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["at"] == f"epoch 0 and step {saved['state']['progress']['step']}"
    assert 0 < saved["state"]["progress"]["step"] < 125
    assert saved["encoder_spec"]["head"] == train_moco.HEADS["v2"]._asdict()
    assert saved["data"] == {"name": "digits", "data_dir": None, "image_size": 32, "channels": 1}


def test_a_damaged_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    good = unbroken("moco", tmp_path)
    words = [*SHORT, *OWN["moco"], f"--run-dir={tmp_path / 'run'}"]
    for damage in ("cut", "empty"):
        shutil.copytree(good, tmp_path / "run")
        path = tmp_path / "run" / "checkpoint.pt"
        path.write_bytes(path.read_bytes()[:5000] if damage == "cut" else b"")
        output = script("moco", tmp_path).run(*words)
        assert f"note     {path} cannot be read" in output
        assert "Going on from checkpoint.previous.pt." in output
        assert_same_run(good, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    output = script("simclr", tmp_path).run(*SHORT, f"--run-dir={good}", code=1)
    assert "was made with other arguments" in output
    assert ["method", "moco", "simclr"] in [line.split() for line in output.splitlines()]


# -------------------------------------------------------------------------------------------------- ranks and pieces


@pytest.mark.parametrize(
    ("method", "own"),
    [
        pytest.param("simo", ["--num-negatives=5"], marks=pytest.mark.slow),
        ("simo", ["--num-negatives=5", "--sampling=shared", "--symmetric"]),
        pytest.param("moco", ["--queue-size=48"], marks=pytest.mark.slow),
        pytest.param("simclr", [], marks=pytest.mark.slow),
        pytest.param("simco", [], marks=pytest.mark.slow),
        pytest.param("simmoco", [], marks=pytest.mark.slow),
        pytest.param("mocov3", [], marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_two_ranks_give_the_curve_of_one_process(method: str, own: list[str], tmp_path: Path) -> None:
    words = ["--epochs=2", "--limit=64", "--batch-size=16", "--knn-every=1", "--no-probe", "--norm=group"]
    words += ["--online-probe"]
    words += ["--optimizer=sgd", "--base-lr=0.05"]  # Adam divides by gradients that are rounding errors
    words += own
    output = script(method, tmp_path).run_ranks(2, *words, f"--run-dir={tmp_path / 'two'}")
    assert "cpu (1 threads), 2 ranks" in output
    assert "command  torchrun --nproc-per-node=2" in output
    script(method, tmp_path).run(*words, f"--run-dir={tmp_path / 'one'}")
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 3
    for first, second in zip(one[1:], two[1:], strict=True):
        assert float(second["loss"]) == pytest.approx(float(first["loss"]), rel=1e-5)
        assert float(second["top1"]) == pytest.approx(float(first["top1"]), abs=1e-4)
        for name in ("knn", "online_probe"):
            assert float(second[name]) == pytest.approx(float(first[name]), abs=0.5)  # two votes of 320
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"] for name in ("one", "two")]
    for name in states[0].keys() & {"encoder", "key_encoder", "queue", "online_probe"}:
        for key, value in states[0][name].items():
            rtol = 0 if name == "online_probe" else 1e-3
            torch.testing.assert_close(states[1][name][key], value, rtol=rtol, atol=1e-5, msg=f"{name}.{key}")


def test_the_online_probe_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    words, simclr = [*SHORT, "--accumulate=2"], script("simclr", tmp_path)
    simclr.run(*words, f"--run-dir={tmp_path / 'without'}")
    output = simclr.run(*words, "--online-probe", f"--run-dir={tmp_path / 'with'}")
    table, plain = rows(tmp_path / "with"), rows(tmp_path / "without")
    assert [bool(row.pop("online_probe")) for row in table] == [False, False, True]
    assert [row.pop("online_probe") for row in plain] == [""] * 3
    assert table == plain
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"] for name in ("with", "without")]
    assert states[0].keys() - states[1].keys() == {"online_probe", "online_probe_optimizer"}
    for key, value in states[1]["encoder"].items():  # weights and statistics of batch norm
        assert torch.equal(value, states[0]["encoder"][key]), key
    assert len(re.findall(r"online probe \d+\.\d %", output)) == 2


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_online_probe_is_the_plain_classifier(pieces: int) -> None:
    """Against torch's own SGD, on the features of a whole batch, with an image that has no label."""
    digits = data.PlacedDigits(seed=0, device=torch.device("cpu"), limit=32)
    digits.labels["train"][3] = -1
    encoder = make_encoder("small", channels=1, image_size=32, head=Head(), dim=8, norm="group")
    online = OnlineProbe(encoder, digits, ranks=1)
    plain = nn.Linear(128, 10)
    plain.load_state_dict(online.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    for epoch in range(2):
        ids, other = torch.arange(32).view(pieces, -1), digits.view(epoch, 1)
        for piece in ids:
            encoder(digits.view(epoch, 0)[piece])
            encoder(other[piece])
            online.backward(piece, pieces)
        online.step(0.3, skip=torch.tensor(False))
        features = encoder.features(digits.view(epoch, 0)).detach()
        online.kept.clear()
        losses = F.cross_entropy(plain(features), digits.labels["train"], ignore_index=-1, reduction="none")
        counts = torch.tensor([int((digits.labels["train"][piece] >= 0).sum()) for piece in ids])
        optimizer.zero_grad()
        (losses.view(pieces, -1).sum(1) / counts).mean().backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(online.state_dict()[name], value)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_shares_are_the_batches_in_order() -> None:
    order = torch.randperm(50)
    for pieces, ranks in ((1, 1), (2, 1), (1, 4), (3, 2)):
        shares = [data.Share(12, pieces, rank, ranks).of(order) for rank in range(ranks)]  # each (4 pieces, 12 / both)
        together = torch.stack(shares, 1).view(4, 12)
        assert torch.equal(together, order[:48].view(4, 12))
        resumed = data.Share(12, pieces, ranks - 1, ranks).of(order, start=3)
        assert torch.equal(resumed, shares[-1][3 * pieces :])
    parts = [data.part(10, rank, 3) for rank in range(3)]
    assert [sample for part in parts for sample in part] == list(range(10))
    assert sorted(map(len, parts)) == [3, 3, 4]


def trained(folder: Path, pieces: int) -> dict[str, Tensor]:
    """A loss whose rows do not see each other, so that pieces cannot matter."""
    args = train_simo.Args(
        epochs=2, limit=32, batch_size=16, accumulate=pieces, norm="group", optimizer="sgd", device="cpu", probe=False,
        run_dir=folder / str(pieces),
    )  # fmt: skip
    training = Training("rows", args, "")
    encoder = training.encoder(Head())
    model = training.start(encoder, make_optimizer(args, encoder), EqCoLoss(), "K = 0")
    firsts = []
    for batch in training.batches():
        firsts.append(batch.first)
        with training.loss_timer():
            embeddings = model(batch.query_view)
            loss = (embeddings - batch.ids[:, None]).square().mean()
        training.step(LossMetrics(loss, *torch.zeros(8)), embeddings)
    assert firsts == ([True] + [False] * (pieces - 1)) * 4
    return encoder.state_dict()


def test_accumulated_pieces_are_one_batch(tmp_path: Path) -> None:
    one, four = trained(tmp_path, 1), trained(tmp_path, 4)
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert rows(tmp_path / "1")[-1]["lr"] == rows(tmp_path / "4")[-1]["lr"]


@pytest.mark.parametrize("own", [{}, {"accumulate": 2, "splits": 2}, {"limit": 16, "queue_ids": True}])
def test_the_queue_is_primed_with_a_batch_that_is_not_trained_on(
    tmp_path: Path, own: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first batch once met its own positives, and its keys were there twice."""
    args = moco_args(tmp_path, epochs=1, knn=False, **{"limit": 48, **own})
    train_moco.main(args)
    assert "K = 80, alpha = K, also while the queue fills, t = 0.1" in capsys.readouterr().out
    queue = eqco_loss.MomentumQueue(args.queue_size, args.dim, store_ids=args.queue_ids)
    queue.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["queue"])
    assert len(queue) == len(queue.keys.unique(dim=0)) == 16 + (args.limit or 0)


# ------------------------------------------------------------------------------------------------ what is not finite


def damage(monkeypatch: pytest.MonkeyPatch, pieces: slice, images: slice, views: slice) -> None:
    """NaN in these ``views`` of these ``images`` in these ``pieces`` of every epoch."""
    whole = data.PlacedDigits.batches

    def batches(self: data.PlacedDigits, epoch: int, share: data.Share, start: int = 0) -> Iterator[data.Views]:
        for piece, batch in enumerate(list(whole(self, epoch, share, start))):
            if piece in range(100)[pieces]:
                for view in batch.views[views]:
                    view[images] = float("nan")
            yield batch

    monkeypatch.setattr(data.PlacedDigits, "batches", batches)


def moco_args(folder: Path, **more: Any) -> train_moco.Args:
    small = {
        "epochs": 2,
        "limit": 96,
        "batch_size": 16,
        "queue_size": 80,
        "knn_every": 1,
        "probe": False,
        "device": "cpu",
    }
    return train_moco.Args(**{**small, "norm": "split", "splits": 4, "run_dir": folder / "run", **more})


@pytest.mark.parametrize("first", [0, 2], ids=["the first batch", "a later one"])
@pytest.mark.parametrize(
    ("images", "views", "own"),
    [
        (slice(None), slice(None), {}),  # all embeddings of both encoders
        (slice(3, 4), slice(1, 2), {"norm": "group", "queue_ids": True}),  # one key
        (slice(3, 4), slice(0, 1), {"norm": "group", "optimizer": "adamw", "base_lr": 1e-3}),  # one query
        (slice(None), slice(None), {"accumulate": 2, "online_probe": True, "splits": 2}),  # one of two pieces
    ],
    ids=["all", "key", "query", "piece"],
)
def test_moco_survives_a_batch_that_is_not_finite(
    images: slice,
    views: slice,
    own: dict[str, Any],
    first: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its step is skipped; nothing that is kept holds a NaN; and a person is told."""
    damage(monkeypatch, slice(first, first + 1), images, views)
    args = moco_args(tmp_path, **own)
    train_moco.main(args)
    table, output = rows(tmp_path / "run"), capsys.readouterr().out
    per_epoch = len(range(16 // args.accumulate)[images]) if views.stop != 1 else 0
    primed = per_epoch if first == 0 else 0  # the batch that primes the queue has the same damage
    keys = [0, per_epoch + primed, 2 * per_epoch + primed]
    assert [row["skipped_steps"] for row in table[1:]] == ["1", "2"]
    assert [int(row["replaced_keys"]) for row in table[1:]] == keys[1:]
    for epoch in (1, 2):
        told = f", and {keys[epoch] - keys[epoch - 1]} keys that were not finite are zeros in the queue" * bool(keys[1])
        note = f"note     epoch {epoch}: 1 of 6 steps skipped, whose gradients were not finite{told}.\n"
        assert output.count(note) == 1, output
    assert all(math.isfinite(float(row[name])) for row in table[1:] for name in ("loss", "top1", "feature_std", "knn"))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]
    for name, value in leaves(state).items():
        assert not isinstance(value, Tensor) or value.isfinite().all(), name
    assert state["queue"]["replaced"].item() == keys[2]


def test_moco_survives_it_with_a_gradient_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that stayed NaN in the queue made it halve its scale in each step, until nothing was left of it."""
    damage(monkeypatch, slice(1, 2), slice(3, 4), slice(1, 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    monkeypatch.setattr(training, "launch", lambda args: Fabric(accelerator="cpu", devices=1, plugins=precision))
    train_moco.main(moco_args(tmp_path, norm="group", epochs=1, limit=32, batch_size=8))
    assert scaler.get_scale() == 512
    (_, row) = rows(tmp_path / "run")
    assert (row["skipped_steps"], row["replaced_keys"]) == ("1", "1")


def test_a_skipped_step_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the weights, nor the running statistics, nor the online probe."""
    damage(monkeypatch, slice(3, 6), slice(None), slice(None))
    args = moco_args(tmp_path, epochs=1, online_probe=True)
    training = Training("moco", args, "")
    encoder = training.encoder(Head())
    model, criterion = training.start(encoder, make_optimizer(args, encoder), EqCoLoss(), ""), EqCoLoss()
    states: list[dict[str, Tensor]] = []
    for batch in training.batches():
        state = leaves({name: module.state_dict() for name, module in training.modules.items()})
        states.append({name: x.clone() for name, x in state.items() if "num_batches_tracked" not in name})
        queries = model(batch.query_view)
        with training.loss_timer():
            metrics = criterion.with_metrics(queries, torch.randn(len(queries), 64))
        training.step(metrics, queries)
    assert training.skipped == 3
    moved = [[name for name in state if not torch.equal(state[name], states[5][name])] for state in states]
    assert len(moved[0]) == len(moved[2]) == len(states[0])
    assert moved[3:] == [[], [], []]


def test_a_run_whose_batches_mostly_are_not_finite_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, slice(1, 5), slice(None), slice(0, 1))
    with pytest.raises(SystemExit, match=r"the loss of epoch 1 is not finite in 4 of 6 batches\. Start a new run"):
        train_moco.main(moco_args(tmp_path))


@pytest.mark.slow
def test_a_checkpoint_of_before_skipped_steps_were_counted(tmp_path: Path) -> None:
    """It has neither their number nor that of the pieces in its sums, and goes on all the same."""
    words = [*SHORT, *OWN["moco"], "--save-minutes=0"]
    script("moco", tmp_path).run(*words, f"--run-dir={tmp_path / 'unbroken'}")
    words.append(f"--run-dir={tmp_path / 'run'}")
    script("moco", tmp_path).run(*words, die=("replace", 7), code=-signal.SIGKILL)
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    assert "and step" in saved["at"]
    progress = saved["state"]["progress"]
    del progress["skipped"], saved["state"]["queue"]["replaced"]
    del saved["fixed"]["key_momentum_schedule"], saved["fixed"]["resume_from"]  # nor were there such arguments
    saved["encoder_spec"]["head"] = "mocov2"
    progress["sums"] = progress["sums"][:3]
    torch.save(saved, path)
    script("moco", tmp_path).run(*words)
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")


# --------------------------------------------------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for seed, (split, name) in enumerate((split, name) for split in ("train", "test") for name in ("cat", "dog")):
        make_images(root / split / name, 6 if split == "train" else 3, seed)
    return root


@pytest.mark.parametrize("augment", ["workers", "device"])
def test_a_folder_stands_for_cifar(images: Path, tmp_path: Path, augment: str) -> None:
    words = ["--dataset=cifar10", f"--data-dir={images}", "--arch=small", "--epochs=2", "--batch-size=4", "--workers=0"]
    words += [f"--augment={augment}", f"--run-dir={tmp_path / 'run'}", "--image-size=32"]
    output = script("simco", tmp_path).run(*words)
    assert "data     cifar10: 12 train and 6 test images" in output
    assert len(rows(tmp_path / "run")) == 3


def open_images(root: Path, augment: str) -> data.Data:
    return data.open_data("imagefolder", root, seed=1, device=torch.device("cpu"), augment=augment)


def test_device_and_workers_show_the_same_samples(images: Path) -> None:
    device, workers = open_images(images, "device"), open_images(images, "workers")
    share = data.Share(4, rank=1, ranks=2)
    pairs = list(zip(device.batches(3, share, start=1), workers.batches(3, share, start=1), strict=True))
    assert len(pairs) == 2
    for one, other in pairs:
        assert torch.equal(one.samples, other.samples)
        assert one.views[0].shape == other.views[0].shape == (2, 3, 36, 36)
        assert not torch.equal(one.views[0], one.views[1])
    for split in ("train", "test"):
        both = (list(images.labelled(split, 0)) for images in (device, workers))
        for (pixels, labels), (others, other_labels) in zip(*both, strict=True):
            assert torch.equal(labels, other_labels)
            torch.testing.assert_close(pixels, others, rtol=0, atol=0.03)  # a rounding of 8 bits
    again = open_images(images, "device").batches(3, data.Share(12))
    assert torch.equal(
        next(iter(again)).views[0][2:4], next(iter(device.batches(3, data.Share(4, rank=1, ranks=2)))).views[0]
    )


def test_images_of_several_sizes_need_workers(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    small = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(small).save(tmp_path / "images" / "train" / "cat" / "small.png")
    with pytest.raises(data.DataError, match=r"images of one size, these have 2\. Give --augment workers"):
        open_images(tmp_path / "images", "device")


class Fake:
    """torchvision's CIFAR and STL-10, with four images in each split."""

    classes = ("cat", "dog")

    def __init__(self, root: Path, download: bool = False, train: bool = True, split: str = "") -> None:
        self.targets = [0, 1, 0, 1]
        self.labels = np.array([-1, -1, 0, 1]) if split == "train+unlabeled" else np.array(self.targets)
        self.data = np.zeros((4, 3, 96, 96) if split else (4, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(("dataset", "size"), [("cifar10", 32), ("cifar100", 32), ("stl10", 96)])
def test_torchvision_data(dataset: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, dataset.upper(), Fake)
    found = data.open_data(dataset, tmp_path, seed=0, device=torch.device("cpu"))
    assert (found.name, found.image_size, found.train_size, found.test_size, found.classes) == (dataset, size, 4, 4, 2)
    (batch,) = found.batches(0, data.Share(4))
    assert batch.views[0].shape == (4, 3, size, size)
    assert [labels.tolist() for _, labels in found.labelled("train", 0)] == [[0, 1, 0, 1]]
    assert found.view_labels().tolist() == ([-1, -1, 0, 1] if dataset == "stl10" else [0, 1, 0, 1])


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **more: Any) -> Iterator[None]:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(data.DataError, match=r"does not hold cifar10, and it cannot be downloaded.*Give --data-dir"):
        data.open_data("cifar10", tmp_path, seed=0, device=torch.device("cpu"))


def test_a_worker_outlives_the_signals_that_stop_a_run() -> None:
    """Those of a terminal or of torchrun reach the workers too, and the step that is under way needs them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        data.outlive_signals(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.alarm(0) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert 0 < signal.alarm(0) <= 30  # and no longer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("error", [ValueError, Image.DecompressionBombError, SyntaxError])
def test_whatever_pil_makes_of_a_broken_file_is_named(
    error: type[Exception], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> Any:
        raise error("no picture")

    picture = next(images.rglob("*.png"))
    monkeypatch.setattr(Image, "open", broken)
    assert data.broken_files([(picture, 0)]) == [picture]
    with pytest.raises(data.DataError, match=r"cannot be decoded .no picture."):
        pictures.read_image(picture)


def test_many_unreadable_images_are_an_error(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    for i in range(3):
        (tmp_path / "images" / "train" / "cat" / f"broken{i}.png").write_bytes(b"x")
    with pytest.raises(data.DataError, match=r"3 of 21 images cannot be read.*More than 10% is no accident"):
        open_images(tmp_path / "images", "workers")


# ---------------------------------------------------------------------------------------------- arguments and defaults


def parsed(method: str, *words: str) -> Any:
    module = SCRIPTS[method]
    version = arguments.given(list(words), "version")
    defaults = train_moco.defaults(version) if method == "moco" else module.DEFAULTS
    return arguments.parse(list(words), defaults, None)


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100", "stl10", "imagefolder"])
def test_defaults_of_every_data_set_pass_the_checks(method: str, dataset: str) -> None:
    args = parsed(method, f"--dataset={dataset}")
    assert args.dataset == dataset
    arguments.check(args)


PAPERS: dict[tuple[str, ...], dict[str, object]] = {
    ("moco", "--data-dir=d", "--version=v1"): {
        "arch": "resnet50", "temperature": 0.07, "queue_size": 65536, "key_momentum": 0.999, "base_lr": 0.03,
        "weight_decay": 1e-4, "batch_size": 256, "schedule": "drops", "recipe": "mocov1", "epochs": 200, "dim": 128,
    },
    ("moco", "--data-dir=d"): {
        "temperature": 0.2, "queue_size": 65536, "schedule": "cosine-by-epoch", "recipe": "mocov2",
    },
    ("moco", "--dataset=cifar10"): {
        "arch": "resnet18", "temperature": 0.1, "queue_size": 4096, "key_momentum": 0.99, "norm": "split", "splits": 8,
        "batch_size": 512, "base_lr": 0.03, "weight_decay": 5e-4, "epochs": 200, "knn_k": 200,
    },
    ("simo", "--data-dir=d"): {
        "arch": "resnet50", "temperature": 0.2, "num_negatives": 16, "alpha": 256, "key_momentum": 0.999,
        "schedule": "simo", "warmup_epochs": 10, "warmup_from": 0.001, "recipe": "mocov2", "weight_decay": 1e-4,
    },
    ("simclr", "--data-dir=d"): {
        "temperature": 0.1, "alpha": 256, "base_lr": 0.3, "weight_decay": 1e-6, "warmup_epochs": 10, "recipe": "simclr",
    },
    ("simco", "--dataset=cifar100"): {
        "arch": "resnet18", "temperature": 0.1, "inter_temperature": 1.0, "base_lr": 0.03, "weight_decay": 5e-4,
        "batch_size": 256, "schedule": "cosine", "warmup_epochs": 10, "warmup_from": 0.1, "recipe": "simco",
    },
    ("mocov3", "--data-dir=d"): {
        "arch": "resnet50", "temperature": 1.0, "key_momentum": 0.99, "key_momentum_schedule": "cosine", "hidden": 4096,
        "dim": 256, "optimizer": "lars", "base_lr": 0.6, "weight_decay": 1e-6, "batch_size": 4096, "epochs": 100,
        "schedule": "cosine", "warmup_epochs": 10, "warmup_from": 0.0,
    },
    ("simmoco", "--dataset=cifar100"): {
        "key_momentum": 0.99, "temperature": 0.1, "inter_temperature": 1.0, "plus": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("words", PAPERS, ids=" ".join)
def test_defaults_are_the_papers(words: tuple[str, ...]) -> None:
    args = parsed(*words)
    assert {name: getattr(args, name) for name in PAPERS[words]} == PAPERS[words]


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (["--batch-size=100"], 3, r"batch_size: expected a multiple of ranks x accumulate = 3 x 1, got 100.*102"),
        (["--batch-size=100", "--accumulate=8"], 1, r"= 1 x 8, got 100. Give --batch-size 104"),
        (["--batch-size=8", "--accumulate=4"], 2, r"expected 2 or more for each rank and piece, 16 in all, got 8"),
        (["--accumulate=0"], 1, "accumulate: expected 1 or more, got 0"),
        (["--dataset=digits", "--data-dir=d"], 1, "data_dir: the digits come with scikit-learn"),
        (["--augment=device"], 1, "augment: the digits are placed"),
        (["--precision=16-mixed", "--device=cpu"], 1, "precision: 16-mixed needs a GPU"),
        (["--dataset=imagefolder", "--device=cpu"], 1, "data_dir: imagefolder needs one"),
        (["--splits=3", "--device=cpu"], 1, "splits: a batch of 64 on each process cannot be split into 3"),
        (["--norm=shuffle", "--device=cpu"], 1, "norm: shuffle needs several processes"),
        (["--queue-size=0", "--device=cpu"], 1, "size: expected an integer >= 1"),
        (["--temperature=0", "--device=cpu"], 1, "temperature"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    words: list[str], ranks: int, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        train_moco.main(parsed("moco", *words))
    assert not list(tmp_path.iterdir())  # nothing was written


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        SystemExit, match=r"error: device: there is no CUDA device here\. Leave --device out, or .* cpu\.$"
    ):
        train_simo.main(parsed("simo", "--device=cuda"))


def test_a_job_of_slurm_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric refuses --ntasks, and its advice would start runs that know nothing of each other."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    message = (
        r"^error: SLURM: this job cannot be used \(You set `--ntasks=2` [^.]* is not supported\)\. For several "
        r"processes give srun --ntasks-per-node=1 torchrun .*; for one, .* or unset SLURM_NTASKS\.$"
    )
    for start in (
        lambda: train_simo.main(train_simo.Args(run_dir=tmp_path)),
        lambda: startup.make_fabric("cpu", devices=1),  # as extract_features.py and linear_eval.py do
    ):
        with pytest.raises(SystemExit, match=message):
            start()


def test_the_commands_of_the_readme_are_understood() -> None:
    text = (EXAMPLES / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"examples/train_(\w+)\.py([^\n`#]*)", text)
    assert len(commands) > 10
    for method, words in commands:
        arguments.check(parsed(method, *words.split()))


def test_a_queue_longer_than_the_data_is_told(tmp_path: Path) -> None:
    words = ["--limit=64", "--batch-size=16", "--epochs=1", "--no-probe", f"--run-dir={tmp_path / 'run'}"]
    output = script("moco", tmp_path).run(*words)
    assert "note     queue_size: 512 keys of 64 images: stale keys" in output
    assert "Give --queue-ids" in output


def test_a_damaged_checkpoint_never_replaces_the_one_before(tmp_path: Path) -> None:
    run = Run(tmp_path, ("epoch",), {}, {})
    for epoch in (1, 2):
        run.save(epoch, {"epoch": epoch})
    assert run.previous.exists()
    run.checkpoint.write_bytes(b"half a checkpoint")
    del run
    again = Run(tmp_path, ("epoch",), {}, {})
    assert again.resume() == {"epoch": 1}
    again.save(2, {"epoch": 2})
    assert torch.load(again.previous, weights_only=True)["epoch"] == 1
    again.save(3, {"epoch": 3})
    assert torch.load(again.previous, weights_only=True)["epoch"] == 2


def test_the_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ("epoch",), {}, {}, rank=1)
    run.rows = [{"epoch": 0}]
    run.save(1, {})
    run.write_config()
    run.draw_curves()
    assert not (tmp_path / "run").exists()
