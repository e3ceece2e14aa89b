"""What comes before a run's first step: the device and the ranks, the data, the run directory."""

import dataclasses
import inspect
import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from .arguments import FREE, Common, ranks
from .data import Data, DataError, open_data
from .run import Run, check_device, fail


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
    return make_fabric(
        args.device, strategy=strategy, devices=here, num_nodes=ranks() // here, precision=args.precision
    )


def make_fabric(device: str, **how: Any) -> Fabric:
    """Launched, or one line about what is wrong with the device or with the job."""
    try:
        fabric = Fabric(accelerator=device, **how)
        fabric.launch()
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        if "SLURM" in str(error):
            fail(
                f"SLURM: this job cannot be used ({str(error).split(' HINT:')[0].rstrip('.')}). For several processes "
                "give srun --ntasks-per-node=1 torchrun --nproc-per-node N before the script; for one, give srun "
                "--ntasks-per-node=1, or unset SLURM_NTASKS."
            )
        fail(f"device: {device} cannot be used ({error}). Leave --device out to take what there is.")
    return fabric


def open_training_data(args: Common, fabric: Fabric, *, compiled: bool) -> Data:
    """Raises DataError where the arguments ask for what these data do not have."""
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
        compiled=compiled and fabric.device.type == "cuda",
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
    if ranks() > data.test_size:
        raise DataError(
            f"nproc-per-node: expected no more ranks than the {data.test_size} test images, got {ranks()}. Start fewer."
        )
    return data


def open_run(
    method: str, label: str, args: Common, data: Data, fabric: Fabric, columns: tuple[str, ...], *, compiled: bool
) -> Run:
    """The run directory. A resumed run must agree in all that can change a result."""
    longer = f"-epochs{args.epochs}" if args.resume_from else ""
    directory = args.run_dir or Path("runs") / f"{method}-{data.name}-{label}-seed{args.seed}{longer}"
    fixed = {"method": method, "data": data.fingerprint, **dataclasses.asdict(args)}
    fixed |= {"resume_from": args.resume_from and str(args.resume_from)}
    fixed |= {"device": fabric.device.type, "image_size": data.image_size, "compile": compiled}
    free = {name: fixed.pop(name) for name in FREE}
    free = {name: str(value) if isinstance(value, Path) else value for name, value in free.items()}
    where = {"name": args.dataset, "data_dir": args.data_dir and str(args.data_dir)}
    contents = {"data": {**where, "image_size": data.image_size, "channels": data.channels}}
    return Run(directory, columns, fixed, free, contents, fabric.global_rank)
