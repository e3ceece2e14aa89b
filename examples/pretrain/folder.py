"""A folder of images: which of them are for training and which for testing, by the names of its folders."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .pictures import DAMAGED, DataError, Files, Pictures, Sample, has_header, printable

TESTS = ("test", "val", "valid", "validation", "eval")  # names of a folder of test images; the first that is there
SPLITS = ("train", *TESTS)
LAYOUT = (
    f"Expected DIR/train/<class>/* and DIR/test/<class>/* (or {', '.join(TESTS[1:])}, all in upper or lower case), or "
    "DIR/<class>/*."
)

Once = Callable[[Callable[[], Any]], Any]
Splits = dict[str, Pictures]


class Found(NamedTuple):
    train: list[Sample]
    test: list[Sample]
    classes: list[str]
    note: str  # what a person should know about the choice


class Images(NamedTuple):
    splits: Splits
    classes: int
    note: str
    digest: str  # the same for the same names


def image_files(root: Path, limit: int | None, once: Once) -> Images:
    """What ``find_images`` finds, without the files that do not begin as an image does."""
    found = find_images(root)
    asked = {"train": found.train[:limit], "test": found.test[:limit]}
    unreadable = once(lambda: {split: set(broken_files(samples)) for split, samples in asked.items()})
    samples = {split: [sample for sample in asked[split] if sample[0] not in unreadable[split]] for split in asked}
    broken = [path for split in asked for path in unreadable[split]]
    every = sum(map(len, asked.values()))
    note = (
        f"{len(broken)} of {every} images cannot be read and are left out, the first is {printable(min(broken))}"
        if broken
        else ""
    )
    for split in samples:
        if not samples[split]:
            raise DataError(f"data_dir: {root} has no readable {split} image ({note or 'too few in all'}).")
    if len(broken) > DAMAGED * every:
        raise DataError(f"data_dir: {note}. More than {DAMAGED:.0%} is no accident: replace them by whole copies.")
    names = [f"{split}/{label}/{path.name}" for split in asked for path, label in samples[split]]
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()  # names need not be UTF-8
    files = {split: Files(chosen) for split, chosen in samples.items()}
    notes = "; ".join(filter(None, (note, found.note)))
    return Images({"views": files["train"], **files}, len(found.classes), notes, f", {digest[:12]}")


def find_images(root: Path) -> Found:
    """By the names of the folders. Any prefix of the training or the test samples is balanced over the classes."""
    if not root.is_dir():
        raise DataError(f"data_dir: {root} is {'a file' if root.exists() else 'not there'}. Give a folder of images.")
    splits, held_out = split_folders(root), "every tenth image of each class is held out for the evaluation"
    if "train" not in splits:
        check_classes(root)
        samples, classes = image_folder(root, "every")
        return Found(*hold_out(samples), classes, f"{held_out}, as there is no train folder")
    samples, classes = image_folder(splits.pop("train"), "train")
    if not splits:
        check_nothing_else(root, classes)
        return Found(*hold_out(samples), classes, f"{held_out}, as there is no test folder")
    usable = [folder for folder in splits.values() if subfolders(folder)]
    if not usable:
        names = " and ".join(folder.name for folder in splits.values())
        raise DataError(f"data_dir: {root}: {names} beside train has no class folders. {LAYOUT}")
    chosen, unused = usable[0], [folder.name for folder in splits.values() if folder != usable[0]]
    test, test_classes = image_folder(chosen, chosen.name)
    if test_classes != classes:
        differing = ", ".join(sorted(set(classes) ^ set(test_classes))[:5])
        raise DataError(f"data_dir: {root}: train and {chosen.name} differ in their classes ({differing}).")
    note = f"{chosen.name} has the test images, {', '.join(unused)} is not used" if unused else ""
    return Found(samples, test, classes, note)


def split_folders(root: Path) -> dict[str, Path]:
    """ "train" and those of TESTS that are there, in this order, with their folders."""
    found: dict[str, Path] = {}
    for folder in subfolders(root):
        if (other := found.setdefault(folder.name.lower(), folder)) != folder and folder.name.lower() in SPLITS:
            raise DataError(f"data_dir: {root} has both {other.name} and {folder.name}. Leave one of them.")
    return {name: found[name] for name in SPLITS if name in found}


def subfolders(folder: Path) -> list[Path]:
    """Without hidden ones, which programs leave behind."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "__MACOSX"
    )


def check_classes(root: Path) -> None:
    """Where there is no train folder, the folders must be classes, and no split may be trained on as if it were one."""
    folders = subfolders(root)
    if not folders:
        files = sum(path.is_file() for path in root.iterdir())
        raise DataError(f"data_dir: {root} has no folders in it, and {files} files. {LAYOUT}")
    for folder in folders:
        if "train" in split_folders(folder):
            raise DataError(f"data_dir: {root} has no train folder, but {folder} has. Give --data-dir {folder}.")
    split = [f.name for f in folders if f.name.lower().startswith(("train", *TESTS)) and subfolders(f)]
    if split:
        raise DataError(f"data_dir: {root} has no train folder; found {listed(folders)}. {LAYOUT}")


def check_nothing_else(root: Path, classes: list[str]) -> None:
    """Beside a train folder alone, none may have its classes: it would be a test folder of a name we do not know."""
    others = [folder for folder in subfolders(root) if folder.name.lower() != "train"]
    alike = [folder for folder in others if {path.name for path in subfolders(folder)} & set(classes)]
    if alike:
        raise DataError(
            f"data_dir: {root}: found {listed(alike)} beside train, with the same classes. {LAYOUT} Rename it, or move "
            "it elsewhere to hold out every tenth training image."
        )


def listed(folders: list[Path]) -> str:
    more = f" and {len(folders) - 5} more" if len(folders) > 5 else ""
    return ", ".join(folder.name for folder in folders[:5]) + more


def image_folder(folder: Path, split: str) -> tuple[list[Sample], list[str]]:
    """Samples and class names, one folder a class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # type: ignore[import-untyped]

    classes = [path.name for path in subfolders(folder)]
    if not classes:
        raise DataError(f"data_dir: {folder} has no class folders. {LAYOUT}")
    found = make_dataset(folder, {name: i for i, name in enumerate(classes)}, IMG_EXTENSIONS, allow_empty=True)
    if empty := sorted(set(range(len(classes))) - {label for _, label in found}):
        names = listed([folder / classes[label] for label in empty])
        raise DataError(
            f"data_dir: no image for {split} of the class {names}: {folder / classes[empty[0]]} has none of "
            f"{' '.join(IMG_EXTENSIONS)}. Put images there, or delete the folder in each split."
        )
    nth: dict[int, int] = defaultdict(int)
    order = []
    for path, label in found:
        order.append((nth[label], label, Path(path)))
        nth[label] += 1
    return [(path, label) for _, label, path in sorted(order)], classes


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
