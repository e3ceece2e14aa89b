"""All files of a data set, each opened and decoded once, in processes: for sets that are kept in memory."""

import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .pictures import Arrays, DamagedImageError, DataError, NoImageError, Sample, legible, read_image

AT_ONCE = 256  # files a process decodes before it hands them over


class Decodings(Arrays):
    """Files that are in memory; ``damages`` has what was wrong with those that are not."""

    def __init__(
        self, samples: list[Sample], pixels: "np.ndarray[Any, Any]", damages: dict[int, DamagedImageError]
    ) -> None:
        super().__init__(pixels, [label for _, label in samples], damages)
        self.samples = samples

    def name(self, sample: int) -> str:
        return legible(self.samples[sample][0])

    def no_images(self) -> set[Path]:
        """Those of which not even the header could be read."""
        return {self.samples[sample][0] for sample, one in self.damages.items() if isinstance(one, NoImageError)}

    def without(self, paths: set[Path]) -> "Decodings":
        keep = [sample for sample, (path, _) in enumerate(self.samples) if path not in paths]
        damages = {new: self.damages[old] for new, old in enumerate(keep) if old in self.damages}
        return Decodings([self.samples[old] for old in keep], self.pixels[keep] if paths else self.pixels, damages)


class Part(NamedTuple):
    """What a process hands over, of consecutive files."""

    pixels: Tensor  # uint8 (n, H, W, 3), of the whole ones
    sizes: set[tuple[int, ...]]
    errors: dict[int, DataError]  # by their number in the data set


class Opened(Dataset[tuple[int, Any]]):
    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, sample: int) -> tuple[int, Any]:
        try:
            return sample, np.asarray(read_image(self.samples[sample][0]))
        except DataError as error:  # raised here it would reach the user within the loader's own traceback
            return sample, error


def decoded_files(samples: list[Sample], workers: int) -> Decodings:
    """Every file, in ``workers`` processes (0: in this one)."""
    loader = DataLoader(
        Opened(samples),
        batch_size=AT_ONCE,
        num_workers=workers if len(samples) > AT_ONCE else 0,
        collate_fn=handed_over,
        generator=torch.Generator(),  # leaves the default generator alone
        worker_init_fn=outlive_signals,
    )
    parts, errors, sizes = list[Tensor](), dict[int, DataError](), set[tuple[int, ...]]()
    for part in loader:
        parts.append(part.pixels)
        errors |= part.errors
        sizes |= part.sizes
    if len(sizes) > 1:
        raise DataError(
            f"augment: on the device needs images of one size, these have {len(sizes)}. Give --augment workers."
        )
    damages = dict[int, DamagedImageError]()
    for sample, error in errors.items():
        if not isinstance(error, DamagedImageError):
            raise error
        damages[sample] = error
    size = sizes.pop() if sizes else (1, 1, 3)
    pixels = np.zeros((len(samples), *size), np.uint8)
    whole = np.ones(len(samples), bool)
    whole[list(damages)] = False
    start, places = 0, np.flatnonzero(whole)
    for part in parts:
        pixels[places[start : start + len(part)]] = part.numpy()
        start += len(part)
    return Decodings(samples, pixels, damages)


def handed_over(found: list[tuple[int, Any]]) -> Part:
    errors = {sample: one for sample, one in found if isinstance(one, DataError)}
    whole = [one for _, one in found if not isinstance(one, DataError)]
    sizes = {one.shape for one in whole}
    same = len(sizes) == 1
    return Part(
        torch.from_numpy(np.stack(whole)) if same else torch.empty(0, 1, 1, 3, dtype=torch.uint8), sizes, errors
    )


def outlive_signals(worker: int) -> None:
    """The run finishes its step and saves; its workers must live until then, whoever else gets the signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # SIGTERM may be meant for this worker alone: it has half a minute
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
