"""What surrounds a method's step: batches, resuming, evaluation. The step itself is in the method's file.

The parts: startup (device, data, run directory), clock (where the time goes), statistics (of embeddings and batch
norm), signals (how a run is stopped), report (what a person sees), run (what is on the disk).
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from importlib.util import find_spec
from typing import Any, Generic, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue
from eqco_loss.functional import LossMetrics, cosine_momentum

from .arguments import Args, KeyMomentumSchedule, check, ranks
from .card import model_card
from .clock import TIMED, Clock
from .data import DRAW, INIT, NEVER, SHUFFLE, STEP, Share, generator_of, seed_of
from .encoders import Encoder, Head, encoder_of
from .evaluate import knn_accuracy, linear_probe
from .norms import check_norm
from .optimizers import Statistics, load, start_momentum, step_unless
from .prefetch import ahead
from .probe import BASE_LR, OnlineProbe
from .report import NOT_FINITE, Report, summary
from .run import Row, clear_errors, fail, peak_memory_mb
from .schedule import learning_rate, set_learning_rate
from .signals import StopSignal
from .startup import launch, open_run, open_training_data
from .statistics import feature_std

COLUMNS = ("epoch", "loss", "top1", "feature_std", "knn", "online_probe", "lr", *NOT_FINITE, *TIMED)


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
        self.args, self.ranks = args, ranks()
        self.fabric = launch(args)
        self.fused = self.fabric.device.type == "cuda"  # whether an optimiser's step is to be a few kernels
        torch.backends.cudnn.deterministic = args.deterministic or not self.fused
        torch.backends.cudnn.benchmark = self.fused and not args.deterministic
        self.compile = self.fused and find_spec("triton") is not None if args.compile is None else args.compile
        self.report = Report(args, self.fabric)
        self.say = self.report.say
        self.share = Share(args.batch_size, args.accumulate, self.fabric.global_rank, self.ranks)
        with clear_errors():
            rows = args.batch_size // args.accumulate // self.ranks  # of a process's batch
            check_norm(args.norm, self.fabric.device, self.ranks, rows, args.splits)
            self.data = open_training_data(args, self.fabric, compiled=self.compile)
        self.steps = self.data.train_size // args.batch_size  # optimiser steps of an epoch
        self.run = open_run(method, label, args, self.data, self.fabric, COLUMNS, compiled=self.compile)
        self.state = self.run.resume(args.resume_from)
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
        self.stop = StopSignal(speaks=self.fabric.is_global_zero)

    def encoder(self, head: Head, *, zero_init_residual: bool = False) -> Encoder:
        """The query encoder with its first weights. ``zero_init_residual``: every residual branch starts at zero."""
        args = self.args
        shape = {"channels": self.data.channels, "image_size": self.data.image_size, "dim": args.dim}
        spec: dict[str, Any] = {"arch": args.arch, **shape, "norm": args.norm, "splits": args.splits}
        spec |= {"head": head._asdict(), "zero_init_residual": zero_init_residual}
        self.run.contents["encoder_spec"] = spec
        torch.manual_seed(seed_of(INIT, args.seed))
        return encoder_of(spec)

    def start(
        self,
        encoder: Encoder,
        optimizer: torch.optim.Optimizer,
        criterion: EqCoLoss | DualTempInfoNCE,
        loss: str,
        *,
        model: nn.Module | None = None,
        **others: nn.Module,
    ) -> nn.Module:
        """Resume, move to the device, wrap for several ranks. Returns the model to call; ``others`` are saved with it.

        ``loss`` is what the header says about it. ``model`` is what the optimiser trains, the encoder where it is left
        out; where it has more parts than that, name them among the others, too.
        """
        online = self.args.online_probe
        self.probe = OnlineProbe(encoder, self.data, self.ranks, fused=self.fused) if online else None
        if self.probe is not None:
            others["online_probe"] = self.probe
        self.query_encoder, self.modules = encoder, {"encoder": encoder, **others}
        self.trained: nn.Module = model or encoder
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
        self.model, self.optimizer = self.fabric.setup(self.trained, optimizer)
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
        self.statistics = Statistics(self.modules.values())
        self.report.header(self.data, self.run, criterion, loss, self.queue, self.steps, compiled=self.compile)
        wrapped: nn.Module = self.model
        return wrapped

    def autocast(self) -> AbstractContextManager[Any]:
        return self.fabric.autocast()

    # ------------------------------------------------------------------------------------------------------ the loop

    def batches(self) -> Iterator[Batch]:
        """Every batch that is left of the run; what belongs between two of them, or two epochs, happens in between."""
        args, fabric = self.args, self.fabric
        self.clock = Clock(fabric.device)
        self.report.begin(args.epochs * self.steps, self.done)
        self.saved_at = time.monotonic()
        with self.run.interruptible(), self.stop.heeded(), closing(self.data):
            if not self.run.rows:
                self.run.rows = [{"epoch": 0, "knn": self._knn()}]
                if self.args.knn:
                    self.say(f"kNN {self.run.rows[0]['knn']:.1f} % before training")
                self.report.damage(self.data)
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
                        self.report.bar.update()
                        self._between_steps()
                self._end_epoch(epoch + 1, self.done - epoch * self.steps - start)
            self.report.end()
            self._finish()

    def another_batch(self) -> Iterator[Batch]:
        """The pieces of a batch that is not trained on, of fresh views: a queue's first keys."""
        args = self.args
        views_of_pieces = ahead(self.data.batches(NEVER, self.share, self.steps - 1), self.fabric)
        for piece, (views, ids) in enumerate(views_of_pieces):
            shuffle, draw = (generator_of(purpose, args.seed, NEVER, piece) for purpose in (SHUFFLE, DRAW))
            yield Batch(views[0], views[1], ids, piece == 0, shuffle, draw)

    def rate(self, base_lr: float) -> float:
        """Learning rate of the next step: linear in the queries of a batch."""
        args = self.args
        peak = base_lr * args.batch_size / 256
        shape = args.schedule, self.done, self.steps, args.epochs, args.warmup_epochs, args.warmup_from
        return peak * learning_rate(*shape)

    def key_momentum(self, base: float, schedule: KeyMomentumSchedule) -> float:
        """Of the key encoder's next update. cosine: from ``base`` to 1 over the whole run (BYOL, MoCo v3)."""
        return cosine_momentum(self.done, self.args.epochs * self.steps, base) if schedule == "cosine" else base

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
            gradients = [x.grad for x in self.trained.parameters() if x.grad is not None]
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
        stop, save = self.stop.number, int(late)
        if self.ranks > 1:  # all ranks do the same
            asked = torch.tensor([stop, save], device=self.fabric.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            stop, save = asked.tolist()
        epoch, step = divmod(self.done, self.steps)
        if step == 0:  # the epoch's end saves
            self.stop.number = stop
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
        self.report.not_finite(row, self.run.rows[-1], self.steps)
        row["images_per_s"] = round(steps * args.batch_size / times.seconds, 1)
        row["data_share"], row["loss_share"] = round(times.data_share, 4), round(times.loss_share, 4)
        row["seconds"], row["memory_mb"] = round(times.seconds, 3), peak_memory_mb(self.fabric.device)
        row["knn"] = self._knn() if measure else None
        if measure and self.probe is not None:
            row["online_probe"] = self.probe.accuracy(self.query_encoder, self.data)
        self.run.rows.append(row)
        self.sums.zero_()
        self._save(epoch, 0)
        self.report.damage(self.data)
        if measure:
            self.run.draw_curves()
        self.report.epoch(row)
        self.report.log(row)
        if self.stop.number:
            self.run.stopped(128 + self.stop.number)

    def _finish(self) -> None:
        rows = self.run.rows
        measured = {"knn_untrained": rows[0]["knn"], "knn": rows[-1]["knn"]}
        self.run.result = {name: value for name, value in measured.items() if value is not None}
        if self.probe is not None:
            self.run.result["online_probe"] = rows[-1]["online_probe"]
        if self.args.probe:
            self.run.result["linear_probe"] = linear_probe(self.query_encoder, self.data)
        self.run.write_card(model_card(self.run))
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
