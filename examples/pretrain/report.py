"""What a person sees of a run: the header, a bar or a line an epoch, notes, and what its logger gets."""

import sys
from typing import Any

import torch
from lightning_fabric import Fabric
from tqdm import tqdm

from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue

from .arguments import Common, ranks
from .data import Data
from .loggers import open_logger
from .run import Row, Run, command, provenance
from .schedule import warms_up

NOT_FINITE = ("skipped_steps", "replaced_keys")  # columns that count since the run began
COLLAPSED = 0.1  # feature std below which a run is called so


class Report:
    """Of the first rank; the others are silent."""

    def __init__(self, args: Common, fabric: Fabric) -> None:
        self.args, self.fabric = args, fabric
        self.logger: Any = None  # of Fabric's, from the header on

    def say(self, text: str) -> None:
        if self.fabric.is_global_zero:
            print(text, flush=True)

    def header(
        self,
        data: Data,
        run: Run,
        criterion: EqCoLoss | DualTempInfoNCE,
        loss: str,
        queue: MomentumQueue | None,
        steps: int,
        *,
        compiled: bool,
    ) -> None:
        """Of ``steps`` an epoch, and with it config.json; ``loss`` is what the method says about its loss."""
        args, fabric = self.args, self.fabric
        rows = torch.zeros(args.batch_size // args.accumulate // ranks(), args.dim, device=fabric.device)
        backend, reason = criterion.chosen_backend(rows, rows, queue)
        device = provenance(fabric.device.type)
        run.write_config(
            device=str(fabric.device),
            device_name=device["device"],
            threads=torch.get_num_threads(),
            ranks=ranks(),
            loss_backend=[backend, reason],
            commit=device["commit"],
        )
        missing = ", not compiled: Triton is missing" if fabric.device.type == "cuda" and args.compile is None else ""
        code = ", compiled" if compiled else missing
        many = f", {ranks()} ranks" if ranks() > 1 else ""
        pieces = f", in {args.accumulate} pieces" if args.accumulate > 1 else ""
        at = f", resumed after {run.saved}" if run.saved else ""
        self.say(f"command  {command()}")
        self.say(f"device   {fabric.device} ({device['device']}){many}, {args.precision}; loss by {backend} ({reason})")
        self.say(f"data     {data.name}: {data.fingerprint}; {data.image_size} px, {args.arch}, norm {args.norm}{code}")
        if data.note:
            self.say(f"note     {data.note}")
        self.say(f"loss     N = {args.batch_size}{pieces}, {loss}")
        self.say(f"steps    {steps} an epoch, {args.epochs} epoch{'s' if args.epochs > 1 else ''}")
        if warms_up(args.schedule) and args.warmup_epochs >= args.epochs:
            self.say(
                f"note     epochs: the learning rate rises for {args.warmup_epochs:g} epochs, and this run has "
                f"{args.epochs}. It tries the command and learns next to nothing: give more --epochs to train."
            )
        self.say(f"run      {run.directory}{at}")
        if fabric.is_global_zero:
            self.logger = open_logger(args.logger, run.directory, run.epoch + 1, run.config["arguments"])

    def begin(self, total: int, done: int) -> None:
        """Show a bar of ``total`` steps, where there is a terminal."""
        quiet = not (sys.stderr.isatty() and self.fabric.is_global_zero)
        self.bar = tqdm(total=total, initial=done, unit="step", disable=quiet)

    def not_finite(self, row: Row, before: Row, steps: int) -> None:
        """Of the epoch that ``row`` is of; the rows count from the run's beginning."""
        skipped, keys = (int(row[name] or 0) - int(before.get(name) or 0) for name in NOT_FINITE)
        if skipped or keys:
            entered = f", and {keys} keys that were not finite are zeros in the queue" if keys else ""
            self.say(
                f"note     epoch {row['epoch']}: {skipped} of {steps} steps skipped, whose gradients were not finite"
                f"{entered}."
            )

    def damage(self, data: Data) -> None:
        for note in data.damage.news():
            self.say(f"note     {note}")

    def epoch(self, row: Row) -> None:
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

    def log(self, row: Row) -> None:
        if self.logger is not None:
            self.logger.log_metrics({name: value for name, value in row.items() if value is not None}, row["epoch"])
            self.logger.save()

    def end(self) -> None:
        self.bar.close()
        if self.logger is not None:
            self.logger.finalize("success")


def summary(result: Row) -> str:
    when = {"knn_untrained": "untrained", "knn": "trained"}
    knn = [f"{result[name]:.1f} % {word}" for name, word in when.items() if name in result]
    figures = [f"kNN {', '.join(knn)}"] if knn else []
    probes = {"online_probe": "online probe", "linear_probe": "logistic regression"}
    figures += [f"{title} {result[name]:.1f} %" for name, title in probes.items() if name in result]
    return ("; ".join(figures) or "Nothing was measured") + "."
