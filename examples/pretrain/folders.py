"""A folder of images: its splits, its classes, and which of its files are images."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .decoding import Decodings, decoded_files
from .pictures import DAMAGED, DataError, Files, Pictures, Sample, has_header, legible

TRAIN = ("train", "training")  # names of folders, in upper or lower case
TEST = ("test", "val", "valid", "validation", "eval")  # the first that is there

Once = Callable[[Callable[[], Any]], Any]
Splits = dict[str, Pictures]


def image_files(root: Path, limit: int | None, once: Once, decoders: int | None = None) -> tuple[Splits, int, str, str]:
    """``root/train/<class>/*`` and ``root/test/<class>/*`` (see ``TEST``); or ``root/<class>/*``, a tenth to test.

    With ``decoders``, so many processes of each rank decode every file, and what is no image turns up on the way.
    """
    train, test, class_names = find_images(root)
    asked = {"train": train[:limit], "test": test[:limit]}
    decoded: dict[str, Decodings] = {}
    if decoders is None:
        unreadable = once(lambda: {split: set(broken_files(found)) for split, found in asked.items()})
    else:
        decoded = {split: decoded_files(found, decoders) for split, found in asked.items()}
        unreadable = {split: decoded[split].no_images() for split in asked}
    samples = {split: [sample for sample in asked[split] if sample[0] not in unreadable[split]] for split in asked}
    broken = [path for split in asked for path in unreadable[split]]
    every = sum(map(len, asked.values()))
    note = (
        f"{len(broken)} of {every} images cannot be read and are left out, the first is {legible(min(broken))}"
        if broken
        else ""
    )
    if not asked["train"]:
        raise DataError(
            f"data_dir: expected two images or more of a class in {legible(root)}, got one of each, which is held out "
            "for the test. Put more into it, or give train and test folders."
        )
    for split in samples:
        if not samples[split]:
            raise DataError(f"data_dir: {legible(root)} has no readable {split} image ({note or 'too few in all'}).")
    if len(broken) > DAMAGED * every:
        raise DataError(f"data_dir: {note}. More than {DAMAGED:.0%} is no accident: replace them by whole copies.")
    names = [f"{split}/{label}/{path.name}" for split in asked for path, label in samples[split]]
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    files: Splits = {split: Files(found) for split, found in samples.items()}
    if decoded:
        files = {split: decoded[split].without(unreadable[split]) for split in samples}
    return {"views": files["train"], **files}, len(class_names), note, f", {digest[:12]}"


def find_images(root: Path) -> tuple[list[Sample], list[Sample], list[str]]:
    """Training samples, test samples, class names. Any prefix of either list is balanced over the classes."""
    if not root.is_dir():
        what = "a file" if root.exists() else "not there"
        raise DataError(f"data_dir: {legible(root)} is {what}. Give a folder of images.")
    train_folder, held_out = split_folders(root)
    if train_folder is None:
        for folder in subfolders(root):
            if any(path.name.lower() in TRAIN for path in subfolders(folder)):
                raise DataError(
                    f"data_dir: {legible(root)} has no train folder, but {legible(folder)} in it has one. Give "
                    f"--data-dir {legible(folder)}."
                )
        samples, classes = image_folder(root)
        return *hold_out(samples), classes
    samples, classes = image_folder(train_folder)
    if held_out is None:
        return *hold_out(samples), classes
    test, test_classes = image_folder(held_out)
    if test_classes != classes:
        differing = legible(", ".join(sorted(set(classes) ^ set(test_classes))[:5]))
        both = f"{train_folder.name} and {held_out.name}"
        raise DataError(
            f"data_dir: {legible(root)}: {both} differ in their classes ({differing}). Give both the same folders."
        )
    return samples, test, classes


def split_folders(root: Path) -> tuple[Path | None, Path | None]:
    """The folders of training and of test images; None and None where the folders in ``root`` are classes."""
    folders = subfolders(root)
    train = [path for name in TRAIN for path in folders if path.name.lower() == name]
    test = [path for name in TEST for path in folders if path.name.lower() == name]
    if not train and not test:
        return None, None
    others = [path for path in folders if path not in (*train, *test)]
    if len(train) == 1 and (test or not others):
        labelled = [path for path in test if subfolders(path)]  # ImageNet's test has no labels, its val has
        return train[0], (labelled or test)[0] if test else None
    found = legible(", ".join(path.name for path in folders[:8])) + (", ..." if len(folders) > 8 else "")
    raise DataError(
        f"data_dir: {legible(root)} holds the folders {found}, and which of them are the training and the test "
        f"images is not clear. Name them train and {', '.join(TEST[:-1])} or {TEST[-1]} (a tenth of train is held out "
        "where none is there), and move the other folders elsewhere."
    )


def subfolders(folder: Path) -> list[Path]:
    """Without hidden ones, which programs leave behind, and links back; none where the folder is not there."""
    if not folder.is_dir():
        return []
    above = [folder.resolve()]
    found = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path for path in found if not leads_back(path, above))


def leads_back(path: Path, above: list[Path]) -> bool:
    """Whether it is a link to one of the folders ``above`` it, or to one that these are in: its images are theirs."""
    return path.is_symlink() and any(one.is_relative_to(path.resolve()) for one in above)


def image_folder(folder: Path) -> tuple[list[Sample], list[str]]:
    classes = subfolders(folder)
    images = [image_paths(path) for path in classes]
    empty = [path for path, found in zip(classes, images, strict=True) if not found]
    if empty or not classes:
        layout = "train/<class>/* and test/<class>/*, or <class>/*"
        reason = f"there is no class folder in {legible(folder)}"
        if empty:
            reason = f"the class folder {legible(empty[0])} has none. Put images into it, or remove it from every split"
        raise DataError(f"data_dir: expected images as {layout}; {reason}.")
    order = sorted((nth, label, path) for label, found in enumerate(images) for nth, path in enumerate(found))
    return [(path, label) for _, label, path in order], [path.name for path in classes]


def image_paths(folder: Path) -> list[Path]:
    """The images in a folder and in those below it, through links, too, but for those that lead back."""
    from torchvision.datasets.folder import is_image_file  # type: ignore[import-untyped]

    above = {str(folder): [folder.parent.resolve(), folder.resolve()]}
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        on_the_way = above.pop(root)
        folders[:] = [name for name in folders if not leads_back(Path(root, name), on_the_way)]
        above |= {os.path.join(root, name): [*on_the_way, Path(root, name).resolve()] for name in folders}
        found += [(root, name) for name in files if is_image_file(name)]
    return [Path(root, name) for root, name in sorted(found)]


def hold_out(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Every tenth image of each class is for testing, of smaller classes the last."""
    count: dict[int, int] = defaultdict(int)
    for _, label in samples:
        count[label] += 1
    seen: dict[int, int] = defaultdict(int)
    train, test = [], []
    for path, label in samples:
        seen[label] += 1
        if seen[label] % 10 == 0 or seen[label] == count[label] < 10:
            test.append((path, label))
        else:
            train.append((path, label))
    return train, test


def broken_files(samples: list[Sample]) -> list[Path]:
    """Those whose header cannot be read. A truncated image is found when it is used."""
    with ThreadPoolExecutor(16) as pool:
        good = pool.map(has_header, (path for path, _ in samples))
        return [path for (path, _), whole in zip(samples, good, strict=True) if not whole]
