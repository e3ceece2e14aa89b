"""What surrounds a method's loop: devices and ranks, data, resuming, evaluation, and what a person sees."""

import dataclasses
import inspect
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Generic, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from tqdm import tqdm

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue
from eqco_loss.functional import LossMetrics

from .arguments import FREE, Args, Common, check, ranks
from .data import DRAW, INIT, SHUFFLE, STEP, Data, DataError, Share, generator_of, open_data, seed_of
from .encoders import Encoder, Head, make_encoder
from .evaluate import knn_accuracy, linear_probe
from .norms import check_norm
from .optimizers import Statistics, load, make_optimizer, start_momentum, step_unless
from .prefetch import ahead
from .probe import BASE_LR, OnlineProbe
from .run import Row, Run, check_device, clear_errors, command, fail, peak_memory_mb
from .schedule import learning_rate, set_learning_rate

TIMED = ("images_per_s", "data_share", "loss_share", "seconds", "memory_mb")  # columns that no two runs share
NOT_FINITE = ("skipped_steps", "replaced_keys")  # since the run began
COLUMNS = ("epoch", "loss", "top1", "feature_std", "knn", "online_probe", "lr", *NOT_FINITE, *TIMED)
MEASURED = 50  # on a GPU, the loss's share is measured in every so many pieces
COLLAPSED = 0.1  # feature std below which a run is called so


class Batch(NamedTuple):
    """What one process computes at a time: a batch, or its rank's part of a piece of it."""

    query_view: Tensor  # (N, C, H, W)
    key_view: Tensor  # (N, C, H, W), of the same images
    ids: Tensor  # (N,), the images' numbers
    first: bool  # piece of an accumulated batch: the key encoder moves once a batch
    shuffle: torch.Generator  # for shuffling BN, the same on every rank
    draw: torch.Generator  # for negatives that the ranks draw alike


class Training(Generic[Args]):
    """One run of one method. The method's file has its loop; here is what every method does alike."""

    def __init__(self, method: str, args: Args, label: str) -> None:
        check(args)
        self.method, self.args, self.ranks = method, args, ranks()
        self.fabric = launch(args)
        on_cuda = self.fabric.device.type == "cuda"
        torch.backends.cudnn.deterministic = args.deterministic or not on_cuda
        torch.backends.cudnn.benchmark = on_cuda and not args.deterministic
        self.compile = on_cuda and find_spec("triton") is not None if args.compile is None else args.compile
        self.share = Share(args.batch_size, args.accumulate, self.fabric.global_rank, self.ranks)
        self.rows = args.batch_size // args.accumulate // self.ranks  # of a process's batch
        with clear_errors():
            check_norm(args.norm, self.fabric.device, self.ranks, self.rows, args.splits)
            self.data = self._open_data()
        self.steps = self.data.train_size // args.batch_size  # optimiser steps of an epoch
        self.run = self._open_run(label)
        self.state = self.run.resume()
        self.fabric.barrier()  # every rank has read it before anyone writes
        if self.run.result is not None:
            self.say(f"{self.run.directory} is finished. {summary(self.run.result)}")
            raise SystemExit(0)
        self.done = 0  # optimiser steps
        # Of this epoch's pieces where all are finite: loss, top-1 accuracy, feature std, and how many these pieces are
        self.sums = torch.zeros(4, device=self.fabric.device)
        # Whether the last step's gradients were not finite, and of how many steps; on the device, as nobody waits
        self.skipping = torch.zeros((), dtype=torch.bool, device=self.fabric.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.fabric.device)
        self.signal = 0  # that asked to stop
        self.writer: Any = None  # of TensorBoard

    def say(self, text: str) -> None:
        if self.fabric.is_global_zero:
            print(text, flush=True)

    def encoder(self, head: Head) -> Encoder:
        """The query encoder with its first weights."""
        args = self.args
        shape = {"channels": self.data.channels, "image_size": self.data.image_size, "dim": args.dim}
        spec: dict[str, Any] = {"arch": args.arch, **shape, "head": head, "norm": args.norm, "splits": args.splits}
        self.run.contents["encoder_spec"] = spec
        torch.manual_seed(seed_of(INIT, args.seed))
        return make_encoder(**spec)

    def start(
        self, encoder: Encoder, criterion: EqCoLoss | DualTempInfoNCE, loss: str, **others: nn.Module
    ) -> nn.Module:
        """Resume, move to the device, wrap for several ranks. Returns the model to call; ``others`` are saved with it.

        ``loss`` is what the header says about it.
        """
        fused = self.fabric.device.type == "cuda"
        self.probe = OnlineProbe(encoder, self.data, self.ranks, fused=fused) if self.args.online_probe else None
        if self.probe is not None:
            others["online_probe"] = self.probe
        self.query_encoder, self.modules = encoder, {"encoder": encoder, **others}
        optimizer = make_optimizer(self.args, encoder, fused=fused)
        if self.state is not None:
            for name, module in self.modules.items():
                module.load_state_dict(self.state[name])
        for module in others.values():
            self.fabric.to_device(module)
        if self.compile:
            for module in self.modules.values():
                if isinstance(module, Encoder):
                    module.compile()
        self.model: Any
        self.model, self.optimizer = self.fabric.setup(encoder, optimizer)
        self.plain_optimizer = optimizer
        for one in (optimizer, *([self.probe.optimizer] if self.probe is not None else [])):
            start_momentum(one)
        if self.state is not None:
            load(optimizer, self.state["optimizer"])
            if self.probe is not None:
                load(self.probe.optimizer, self.state["online_probe_optimizer"])
            self.fabric.strategy.precision.load_state_dict(self.state["scaler"])
            progress = self.state["progress"]
            self.done = progress["step"]
            self.skipped += progress.get("skipped", 0)
            counted = [float(self.done % self.steps * self.args.accumulate)] * (len(progress["sums"]) == 3)
            sums = torch.cat([progress["sums"], torch.tensor(counted)])  # older checkpoints counted all pieces
            self.sums = self.fabric.to_device(sums)
            self.state = None
        self.queue = next((module for module in others.values() if isinstance(module, MomentumQueue)), None)
        self.statistics = Statistics(module for module in self.modules.values() if isinstance(module, Encoder))
        self._print_header(criterion, loss, self.queue)
        model: nn.Module = self.model
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        return self.fabric.autocast()

    # ------------------------------------------------------------------------------------------------------ the loop

    def batches(self) -> Iterator[Batch]:
        """Every batch that is left of the run; what belongs between two of them, or two epochs, happens in between."""
        args, fabric = self.args, self.fabric
        self.clock = Clock(fabric.device)
        self.bar = tqdm(
            total=args.epochs * self.steps,
            initial=self.done,
            unit="step",
            disable=not (sys.stderr.isatty() and fabric.is_global_zero),
        )
        self.saved_at = time.monotonic()
        with self.run.interruptible(), self._signals(), closing(self.data):
            if not self.run.rows:
                self.run.rows = [{"epoch": 0, "knn": self._knn()}]
                if self.args.knn:
                    self.say(f"kNN {self.run.rows[0]['knn']:.1f} % before training")
                self._note_damage()
            while self.done < args.epochs * self.steps:
                epoch, start = divmod(self.done, self.steps)
                self.clock.start()
                batches = ahead(self.data.batches(epoch, self.share, start), fabric)
                pieces = enumerate(self.clock.waiting(batches), start * args.accumulate)
                for piece, (views, ids) in pieces:
                    number = (epoch, piece)
                    first, self.last = piece % args.accumulate == 0, (piece + 1) % args.accumulate == 0
                    if first:
                        set_learning_rate(self.plain_optimizer, self.rate(args.base_lr))
                    torch.manual_seed(seed_of(STEP, args.seed, *number, fabric.global_rank))  # for whatever draws
                    shuffle, draw = (generator_of(purpose, args.seed, *number) for purpose in (SHUFFLE, DRAW))
                    self.clock.begin_piece(piece)
                    with fabric.no_backward_sync(self.model, enabled=not self.last):
                        yield Batch(views[0], views[1], ids, first, shuffle, draw)
                    if self.probe is not None:
                        self.probe.backward(ids, args.accumulate)
                    self.clock.end_piece()
                    if self.last:
                        if self.probe is not None:
                            self.probe.step(self.rate(BASE_LR), skip=self.skipping)
                        self.done += 1
                        self.bar.update()
                        self._between_steps()
                self._end_epoch(epoch + 1, self.done - epoch * self.steps - start)
            self.bar.close()
            self._finish()

    def rate(self, base_lr: float) -> float:
        """Learning rate of the next step: linear in the queries of a batch."""
        args = self.args
        peak = base_lr * args.batch_size / 256
        shape = args.schedule, self.done, self.steps, args.epochs, args.warmup_epochs, args.warmup_from
        return peak * learning_rate(*shape)

    def loss_timer(self) -> AbstractContextManager[None]:
        """Around the loss, so that its share of a step can be told."""
        return self.clock.loss()

    def step(self, metrics: LossMetrics, *embeddings: Tensor) -> None:
        """Backward, and with the last piece of a batch the optimiser's step. ``embeddings`` (N, D) are the model's.

        A step whose gradients are not finite is skipped, in float32 as a gradient scaler does it in float16, because
        weights that are NaN stay so.
        """
        self.clock.begin_backward(*embeddings)
        self.fabric.backward(metrics.loss / self.args.accumulate)
        queries = embeddings[0].detach()
        if self.ranks > 1:
            queries = self.fabric.all_gather(queries).flatten(0, 1)  # type: ignore[union-attr]
        std = feature_std(queries)
        figures = torch.stack([metrics.loss.detach(), metrics.top1_accuracy, std, torch.ones_like(std)])
        self.sums += torch.where(figures.isfinite().all(), figures, 0.0)
        if self.last:
            gradients = [x.grad for x in self.query_encoder.parameters() if x.grad is not None]
            self.skipping = ~nn.utils.get_total_norm(gradients).isfinite()  # on every rank alike
            self.skipped += self.skipping
            if getattr(self.fabric.strategy.precision, "scaler", None) is not None:
                self.optimizer.step()  # a gradient scaler skips for itself, and lowers its scale
            else:
                step_unless(self.skipping, self.optimizer, self.plain_optimizer)
            self.optimizer.zero_grad()
            self.statistics.mend()

    # ------------------------------------------------------------------------------------- between steps and epochs

    def _between_steps(self) -> None:
        late = time.monotonic() - self.saved_at > 60 * self.args.save_minutes
        stop, save = self.signal, int(late)
        if self.ranks > 1:  # all ranks do the same
            asked = torch.tensor([stop, save], device=self.fabric.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            stop, save = asked.tolist()
        epoch, step = divmod(self.done, self.steps)
        if step == 0:  # the epoch's end saves
            self.signal = stop
        elif stop or save:
            self._save(epoch, step)
            if stop:
                self.run.stopped(128 + stop)

    def _end_epoch(self, epoch: int, steps: int) -> None:
        args = self.args
        *sums, counted = self._mean_over_ranks(self.sums).tolist()
        pieces = self.steps * args.accumulate
        if counted < pieces / 2:
            fail(
                f"the loss of epoch {epoch} is not finite in {pieces - counted:.0f} of {pieces} batches. "
                "Start a new run with a smaller --base-lr."
            )
        loss, top1, std = (value / counted for value in sums)
        times = self.clock.stop()
        measure = epoch == args.epochs or epoch % args.knn_every == 0
        row: Row = {"epoch": epoch, "loss": loss, "top1": 100 * top1, "feature_std": std}
        row["lr"] = self.plain_optimizer.param_groups[0]["lr"]
        row["skipped_steps"] = int(self.skipped)
        row["replaced_keys"] = None if self.queue is None else int(self.queue.replaced)
        self._note_what_was_not_finite(row)
        row["images_per_s"] = round(steps * args.batch_size / times.seconds, 1)
        row["data_share"], row["loss_share"] = round(times.data_share, 4), round(times.loss_share, 4)
        row["seconds"], row["memory_mb"] = round(times.seconds, 3), peak_memory_mb(self.fabric.device)
        row["knn"] = self._knn() if measure else None
        if measure and self.probe is not None:
            row["online_probe"] = self.probe.accuracy(self.query_encoder, self.data)
        self.run.rows.append(row)
        self.sums.zero_()
        self._save(epoch, 0)
        self._note_damage()
        if measure:
            self.run.draw_curves()
        self._print_epoch(row)
        self._write_tensorboard(row)
        if self.signal:
            self.run.stopped(128 + self.signal)

    def _finish(self) -> None:
        rows = self.run.rows
        measured = {"knn_untrained": rows[0]["knn"], "knn": rows[-1]["knn"]}
        self.run.result = {name: value for name, value in measured.items() if value is not None}
        if self.probe is not None:
            self.run.result["online_probe"] = rows[-1]["online_probe"]
        if self.args.probe:
            self.run.result["linear_probe"] = linear_probe(self.query_encoder, self.data)
        self._save(self.args.epochs, 0)
        self.say(f"{summary(self.run.result)} Results are in {self.run.directory}")

    def _save(self, epoch: int, step: int) -> None:
        self.sums = self._mean_over_ranks(self.sums)  # rank 0's file speaks for all
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        state["optimizer"] = self.plain_optimizer.state_dict()
        if self.probe is not None:
            state["online_probe_optimizer"] = self.probe.optimizer.state_dict()
        state["scaler"] = self.fabric.strategy.precision.state_dict()
        state["progress"] = {"step": self.done, "skipped": int(self.skipped), "sums": self.sums}
        self.run.save(epoch, state, step)
        self.saved_at = time.monotonic()

    def _knn(self) -> float | None:
        if not self.args.knn:
            return None
        if self.ranks > 1:
            for buffer in self.query_encoder.buffers():  # running statistics are each rank's own while training
                dist.broadcast(buffer, 0)
        device = torch.device("cpu") if self.args.knn_device == "cpu" else self.fabric.device
        return knn_accuracy(self.query_encoder, self.data, self.args.knn_k, device=device)

    def _mean_over_ranks(self, sums: Tensor) -> Tensor:
        if self.ranks == 1:
            return sums
        mean: Tensor = self.fabric.all_reduce(sums.clone(), reduce_op="mean")  # type: ignore[assignment]
        return mean

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step it is in, with a checkpoint; Ctrl-C twice ends it at once."""
        asked = 0.0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            if number == signal.SIGINT and self.signal and time.monotonic() - asked > 1:
                raise KeyboardInterrupt
            if not self.signal:
                self.signal, asked = number, time.monotonic()
                if self.fabric.is_global_zero:
                    again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ", as SIGTERM asks"
                    print(f"\nstopping after this step{again}", file=sys.stderr, flush=True)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ----------------------------------------------------------------------------------------------- before the loop

    def _open_data(self) -> Data:
        args, fabric = self.args, self.fabric
        data = open_data(
            args.dataset,
            args.data_dir,
            seed=args.seed,
            device=fabric.device,
            image_size=args.image_size,
            limit=args.limit,
            workers=args.workers,
            recipe=args.recipe,
            augment=args.augment,
            compiled=self.compile and fabric.device.type == "cuda",
            once=lambda work: fabric.broadcast(work() if fabric.is_global_zero else None),
        )
        if args.batch_size > data.train_size:
            raise DataError(
                f"batch_size: expected at most the number of training images, {data.train_size}, got "
                f"{args.batch_size}. Give --batch-size {data.train_size} or less."
            )
        if args.probe and len(torch.unique(data.view_labels())) < 2:
            raise DataError(
                "probe: expected training images of two classes or more, got one. Give --no-probe, or images of more."
            )
        if self.ranks > data.test_size:
            raise DataError(
                f"nproc-per-node: expected no more ranks than the {data.test_size} test images, got {self.ranks}. "
                "Start fewer."
            )
        return data

    def _open_run(self, label: str) -> Run:
        """The run directory. A resumed run must agree in all that can change a result."""
        args, data = self.args, self.data
        directory = args.run_dir or Path("runs") / f"{self.method}-{data.name}-{label}-seed{args.seed}"
        fixed = {"method": self.method, "data": data.fingerprint, **dataclasses.asdict(args)}
        fixed |= {"device": self.fabric.device.type, "image_size": data.image_size, "compile": self.compile}
        free = {name: fixed.pop(name) for name in FREE}
        free = {name: str(value) if isinstance(value, Path) else value for name, value in free.items()}
        where = {"name": args.dataset, "data_dir": args.data_dir and str(args.data_dir)}
        contents = {"data": {**where, "image_size": data.image_size, "channels": data.channels}}
        return Run(directory, COLUMNS, fixed, free, contents, self.fabric.global_rank)

    def _print_header(self, criterion: EqCoLoss | DualTempInfoNCE, loss: str, queue: MomentumQueue | None) -> None:
        args, fabric, data, run = self.args, self.fabric, self.data, self.run
        rows = torch.zeros(self.rows, args.dim, device=fabric.device)
        backend, reason = criterion.chosen_backend(rows, rows, queue)
        run.write_config(
            device=str(fabric.device),
            threads=torch.get_num_threads(),
            ranks=self.ranks,
            loss_backend=[backend, reason],
        )
        cuda = fabric.device.type == "cuda"
        device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
        compiled = (
            ", compiled"
            if self.compile
            else ", not compiled: Triton is missing"
            if cuda and args.compile is None
            else ""
        )
        many = f", {self.ranks} ranks" if self.ranks > 1 else ""
        pieces = f", in {args.accumulate} pieces" if args.accumulate > 1 else ""
        at = f", resumed after {run.saved}" if run.saved else ""
        self.say(f"command  {command()}")
        self.say(f"device   {fabric.device} ({device}){many}, {args.precision}; loss by {backend} ({reason})")
        self.say(
            f"data     {data.name}: {data.fingerprint}; {data.image_size} px, {args.arch}, norm {args.norm}{compiled}"
        )
        if data.note:
            self.say(f"note     {data.note}")
        self.say(f"loss     N = {args.batch_size}{pieces}, {loss}")
        self.say(f"steps    {self.steps} an epoch, {args.epochs} epochs")
        self.say(f"run      {run.directory}{at}")

    # ------------------------------------------------------------------------------------------------ for a person

    def _note_what_was_not_finite(self, row: Row) -> None:
        """Of this epoch; the rows count from the run's beginning."""
        before = self.run.rows[-1]
        steps, keys = (int(row[name] or 0) - int(before.get(name) or 0) for name in NOT_FINITE)
        if steps or keys:
            entered = f", and {keys} keys that were not finite are zeros in the queue" if keys else ""
            self.say(
                f"note     epoch {row['epoch']}: {steps} of {self.steps} steps skipped, whose gradients were not finite"
                f"{entered}."
            )

    def _note_damage(self) -> None:
        for note in self.data.damage.news():
            self.say(f"note     {note}")

    def _print_epoch(self, row: Row) -> None:
        measured = "" if row["knn"] is None else f"  kNN {row['knn']:.1f} %"
        measured += f"  online probe {row['online_probe']:.1f} %" if "online_probe" in row else ""
        collapsed = " (collapsed)" if row["feature_std"] < COLLAPSED else ""  # type: ignore[operator]
        curves = f"loss {row['loss']:.3f}  top-1 {row['top1']:.1f} %  std {row['feature_std']:.2f}{collapsed}{measured}"
        speed = f"{row['images_per_s']:.0f} images/s (data {row['data_share']:.0%}, loss {row['loss_share']:.0%})"
        line = f"epoch {row['epoch']}/{self.args.epochs}  {curves}  {speed}  {row['memory_mb']:.0f} MB"
        if not sys.stderr.isatty():
            self.say(line)
        elif self.fabric.is_global_zero:
            self.bar.set_postfix_str(curves)
            if measured:
                self.bar.write(line)

    def _write_tensorboard(self, row: Row) -> None:
        if not (self.args.tensorboard and self.fabric.is_global_zero):
            return
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.run.directory / "tensorboard", purge_step=row["epoch"])
        for name, value in row.items():
            if value is not None:
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()


def launch(args: Common) -> Fabric:
    """Lightning Fabric for one process, or for those that torchrun started."""
    check_device(args.device)
    if args.precision == "16-mixed" and (args.device in ("cpu", "mps") or not torch.cuda.is_available()):
        fail("precision: 16-mixed needs a GPU. Give --precision bf16-mixed, or leave it out.")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # the header says it all
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Of the buffers only running statistics differ between ranks, and training does not read them.
    renamed = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    strategy = DDPStrategy(**buffers) if ranks() > 1 else "auto"
    try:
        fabric = Fabric(
            accelerator=args.device,
            strategy=strategy,
            devices=here,
            num_nodes=ranks() // here,
            precision=args.precision,
        )
        fabric.launch()
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        fail(f"device: {args.device} cannot be used ({error}). Leave --device out to take what there is.")
    return fabric


def feature_std(queries: Tensor) -> Tensor:
    """Standard deviation of the unit queries, in units of that of a spread-out batch: 1 is spread out, 0 collapsed."""
    spread: Tensor = F.normalize(queries).std(0).mean() * math.sqrt(queries.shape[1])
    return spread


def mean_of(first: LossMetrics, second: LossMetrics) -> LossMetrics:
    """Of both directions."""
    return LossMetrics(*((a + b) / 2 for a, b in zip(first, second, strict=True)))


def summary(result: Row) -> str:
    when = {"knn_untrained": "untrained", "knn": "trained"}
    knn = [f"{result[name]:.1f} % {word}" for name, word in when.items() if name in result]
    figures = [f"kNN {', '.join(knn)}"] if knn else []
    probes = [name for name in ("online_probe", "linear_probe") if name in result]
    figures += [f"{name.replace('_', ' ')} {result[name]:.1f} %" for name in probes]
    return ("; ".join(figures) or "Nothing was measured") + "."


class Times(NamedTuple):
    seconds: float
    data_share: float  # of the time, waiting for the next batch
    loss_share: float  # of a piece's time, forward and backward of the loss


class Clock:
    """Where an epoch's time goes. On a GPU by events, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.every = device.type == "cuda", MEASURED if device.type == "cuda" else 1

    def start(self) -> None:
        self.begun, self.waited = time.perf_counter(), 0.0
        self.pieces: list[dict[str, Any]] = []
        self.marks: dict[str, Any] | None = None

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def begin_piece(self, number: int) -> None:
        self.marks = {} if number % self.every == min(1, self.every - 1) else None  # not the very first
        self._mark("begin")

    @contextmanager
    def loss(self) -> Iterator[None]:
        self._mark("loss")
        yield
        self._mark("loss end")

    def begin_backward(self, *embeddings: Tensor) -> None:
        self._mark("backward")
        for embedding in embeddings if self.marks is not None else ():
            embedding.register_hook(self._end_backward)

    def _end_backward(self, gradient: Tensor) -> None:
        """The loss's part of it is done where the first embedding has its gradient."""
        if self.marks is not None and "backward end" not in self.marks:
            self._mark("backward end")

    def end_piece(self) -> None:
        self._mark("end")
        if self.marks is not None:
            self.pieces.append(self.marks)

    def stop(self) -> Times:
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begun
        total = sum(self._between(marks, "begin", "end") for marks in self.pieces)
        loss = sum(
            self._between(marks, "loss", "loss end") + self._between(marks, "backward", "backward end")
            for marks in self.pieces
        )
        return Times(seconds, self.waited / seconds, loss / total if total else 0.0)

    def _mark(self, name: str) -> None:
        if self.marks is None:
            return
        if self.cuda:
            self.marks[name] = torch.cuda.Event(enable_timing=True)
            self.marks[name].record()
        else:
            self.marks[name] = time.perf_counter()

    def _between(self, marks: dict[str, Any], begin: str, end: str) -> float:
        if self.cuda:
            return float(marks[begin].elapsed_time(marks[end])) / 1000
        return float(marks[end] - marks[begin])
