"""From a training script's checkpoint back to its encoder."""

from pathlib import Path
from typing import Any

import torch

from .encoders import Encoder, encoder_of

EXPECTED = "a checkpoint.pt of a training script, or its run directory"


class CheckpointError(ValueError):
    """The file is not a usable checkpoint; the message names it and what was expected."""


def checkpoint_file(path: Path) -> Path:
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file} is not there. Give {EXPECTED}.")
    return file


def restore_encoder(path: Path) -> tuple[Encoder, dict[str, Any]]:
    """The trained encoder, on the CPU and in eval mode, and all else that the checkpoint holds."""
    file = checkpoint_file(path)
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}). Give {EXPECTED}.") from None
    except Exception:  # whatever another or a damaged file makes of the reader; its words are not for a person
        raise CheckpointError(f"{file} is no checkpoint, or a damaged one. Give {EXPECTED}.") from None
    wanted = ("encoder_spec", "state", "data")
    missing = wanted if not isinstance(saved, dict) else [key for key in wanted if not isinstance(saved.get(key), dict)]
    if missing:
        raise CheckpointError(f"{file} has no {', '.join(missing)}. Give {EXPECTED}.")
    if "encoder" not in saved["state"]:
        raise CheckpointError(f"{file} has no encoder in its state. Give {EXPECTED}.")
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away
        try:
            encoder = encoder_of(saved["encoder_spec"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: its encoder_spec {saved['encoder_spec']} is none ({error}).") from None
    try:
        encoder.load_state_dict(saved["state"]["encoder"])
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:])[:300]
        raise CheckpointError(f"{file}: its weights do not fit {saved['encoder_spec']}: {reason}") from None
    return encoder.eval(), saved
