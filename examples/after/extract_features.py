"""Features of a folder of images, by a trained encoder, in one file that NumPy reads.

    python examples/after/extract_features.py runs/RUN DIR  # DIR/<class>/*, or images without a class
    python examples/after/extract_features.py checkpoint.pt DIR --out features.npz

The file has features (M, width) in float32, labels (M,), names (M,), and classes: class i is called classes[i]. Images
in no class folder have the label -1. Each image is resized and cropped in the middle as the kNN sees it; the features
are the backbone's, without the projection head, not normalised. numpy.load("features.npz")["features"] reads them.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

import numpy as np
import tyro
from pretrain.checkpoint import CheckpointError, checkpoint_file, restore_encoder
from pretrain.console import enough_memory, fail, print_any_name
from pretrain.data import CentreCrops, DataError, centre_crop
from pretrain.folders import image_folder, split_folders, subfolders
from pretrain.pictures import Files, Sample, has_header, legible
from pretrain.run import check_device, written_whole
from pretrain.startup import make_fabric
from torch.utils.data import DataLoader
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    checkpoint: tyro.conf.Positional[Path]  # checkpoint.pt of a training script, or its run directory
    images: tyro.conf.Positional[Path]  # DIR/<class>/*, or DIR/*
    out: Path | None = None  # file to write. None: features.npz beside the checkpoint
    batch_size: int = 256
    workers: int = min(8, os.cpu_count() or 1)  # processes that load images
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


@enough_memory("a smaller --batch-size or --precision bf16-mixed")
def main(args: Args) -> None:
    print_any_name()
    for name, least in {"batch_size": 1, "workers": 0}.items():
        if getattr(args, name) < least:
            fail(f"{name}: expected {least} or more, got {getattr(args, name)}.")
    check_device(args.device)
    try:
        encoder, saved = restore_encoder(args.checkpoint)
        samples, classes = find_samples(args.images)
    except (CheckpointError, DataError) as error:
        fail(str(error).replace("data_dir:", "images:"))
    spec = saved["encoder_spec"]
    if spec["channels"] != 3:
        fail(f"checkpoint: its network takes {spec['channels']} channel(s), and a folder's images have 3.")
    fabric = make_fabric(args.device, devices=1, precision=args.precision)
    encoder.requires_grad_(False).to(fabric.device)
    crops = CentreCrops(Files(samples), centre_crop(spec["image_size"]))
    loader = DataLoader(crops, batch_size=args.batch_size, num_workers=args.workers)
    features, kept = np.empty((len(samples), encoder.width), np.float32), list[int]()
    try:
        for images, numbers, whole in tqdm(loader, unit="batch", disable=None):
            with fabric.autocast():
                found = encoder.features(fabric.to_device(images[whole]))
            rows = numbers[whole].tolist()
            features[len(kept) : len(kept) + len(rows)] = found.float().cpu().numpy()
            kept += rows
    except DataError as error:
        fail(str(error).splitlines()[-1].split("DataError: ")[-1].replace("data_dir:", "images:"))
    for number in sorted(set(range(len(samples))) - set(kept)):
        print(f"note     {legible(samples[number][0])} cannot be decoded and is left out.")
    if not kept:
        fail(f"images: none of the {len(samples)} images in {legible(args.images)} can be decoded.")
    out = args.out or checkpoint_file(args.checkpoint).parent / "features.npz"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(out) as file:
            np.savez(
                file,
                features=features[: len(kept)],
                labels=np.array([samples[number][1] for number in kept], np.int64),
                names=np.array([legible(samples[number][0].relative_to(args.images)) for number in kept]),
                classes=np.array([legible(name) for name in classes], np.str_),
            )
    except OSError as error:
        fail(f"out: {out} cannot be written ({error.strerror}). Give another --out.")
    print(f"{out}: {len(kept)} images, {encoder.width} features each, {len(classes)} classes")


def find_samples(root: Path) -> tuple[list[Sample], list[str]]:
    """In the order of their names, with the numbers of their classes; -1 where the images lie in the folder itself."""
    if not root.is_dir():
        raise DataError(f"images: {legible(root)} is {'a file' if root.exists() else 'not there'}. Give a folder.")
    if subfolders(root):
        train, _ = split_folders(root)
        if train is not None:
            raise DataError(f"images: {legible(root)} holds several splits. Give one of them: {legible(train)}.")
        samples, classes = image_folder(root)
        return sorted(samples), classes
    samples = [(path, -1) for path in sorted(root.iterdir()) if path.is_file() and has_header(path)]
    if not samples:
        raise DataError(f"images: {legible(root)} holds no image, and no folder of images. Give another.")
    return samples, []


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
