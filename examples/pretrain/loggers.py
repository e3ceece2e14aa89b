"""Where the metrics of every epoch go besides metrics.csv: TensorBoard, or Weights & Biases, by Fabric's loggers."""

import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .choices import LoggerName
from .console import fail

NEEDED = {"none": (), "tensorboard": ("tensorboard",), "wandb": ("wandb", "lightning")}  # packages


def check_logger(name: LoggerName) -> None:
    if missing := [package for package in NEEDED[name] if find_spec(package) is None]:
        fail(
            f"logger: {name} needs {' and '.join(missing)}, not installed. pip install -e '.[{name}]', or leave "
            "--logger out."
        )


def open_logger(name: LoggerName, directory: Path, epoch: int, arguments: dict[str, Any]) -> Any:
    """One of Fabric's loggers, for a run that logs from ``epoch`` on; None for none."""
    if name == "none":
        return None
    if name == "tensorboard":
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(directory, name="tensorboard", version="", purge_step=epoch)
    import wandb
    from wandb.integration.lightning.fabric import WandbLogger

    file = directory / "wandb-id.txt"  # a resumed run goes on in the same place, a new one in a new place
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    try:
        logger = WandbLogger(project="eqco_loss", name=directory.name, save_dir=directory, id=file.read_text())
        logger.log_hyperparams(arguments)
    except wandb.errors.Error as error:
        fail(f"logger: wandb cannot start ({error}). Log in with `wandb login`, or set WANDB_MODE=offline.")
    return logger
