"""Which rows count: the newest of each case, way and device; and if the kernels have changed since."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path

from .measure import RESULTS, Row, read_csv, write_csv

ROOT = Path(__file__).parent.parent
KERNELS = "eqco_loss/ops"
CASE = ("workload", "n", "k", "d", "layout", "dtype")
KEYS = {  # by the beginning of a CSV's name: what a row is a row of
    "gpu": (*CASE, "peer", "device"),
    "cpu": (*CASE, "peer", "device"),
    "scaling": (*CASE, "peer", "device"),
    "step": ("model", "n", "image_size", "dtype", "what", "device"),
    "engines": ("engine", "n", "d", "symmetric", "device"),
    "tests": ("device",),
}


class Age(Enum):
    """Of a row of ours, and its mark in a table."""

    CURRENT = ""
    OLDER = " †"
    UNKNOWN = " ‡"


NOTES = {
    Age.OLDER: f"† of an older {KERNELS} than this one.",
    Age.UNKNOWN: f"‡ unknown whether {KERNELS} has changed since: this tree's git does not have that commit.",
}


@functools.cache
def age(commit: str) -> Age:
    """Whether the kernels of this tree are those of a commit, but for comments and docstrings."""
    if git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}") is None:
        return Age.UNKNOWN  # also where there is no git, and of a tree with changes that no commit has
    changed = (git("diff", "--name-only", "--no-renames", commit, "--", KERNELS) or "").splitlines()
    return Age.CURRENT if all(same_code(commit, name) for name in changed) else Age.OLDER


def same_code(commit: str, name: str) -> bool:
    """Whether a file differs from a commit's in nothing but comments, docstrings and white space."""
    then, now = git("show", f"{commit}:{name}"), ROOT / name
    if then is None or not now.exists() or not name.endswith(".py"):
        return False
    return code_of(then) == code_of(now.read_text())


def code_of(source: str) -> str:
    """What of it runs."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
    return ast.dump(tree)


def git(*arguments: str) -> str | None:
    """What it prints; None where it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def mark(row: Row) -> str:
    """Of ours alone: what others take does not hang on our kernels."""
    return age(row["commit"]).value if is_ours(row) else ""


def notes(rows: Iterable[Row]) -> list[str]:
    found = {age(row["commit"]) for row in rows if is_ours(row)}
    return [note for one, note in NOTES.items() if one in found]


def is_ours(row: Row) -> bool:
    name = row.get("peer") or row.get("what") or "eqco_loss"  # engines are ours
    return name.startswith("eqco_loss") or "the whole step, eqco_loss" in name


def without_marks(page: str) -> str:
    """For a tree whose git cannot tell ages."""
    for one, note in NOTES.items():
        page = page.replace(note, "").replace(one.value, "")
    return " ".join(page.split())


# ---------------------------------------------------------------------------------------------------------- newest rows


@functools.cache
def position(commit: str) -> int | None:
    """How many commits came before it; None where git does not know it."""
    found = git("rev-list", "--count", commit.removesuffix("+changes"), "--")
    return None if found is None else int(found)


FOR_WANT = ("no time", "needs about", "out of memory", "too slow", "the case as a whole")  # a status begins with


def says_nothing(row: Row) -> bool:
    """Whether it was not timed for want of time, memory or a package, which says nothing of the way itself.

    Of ours, want of memory does, because a user of ours meets it, too.
    """
    status = row.get("status", "")
    if is_ours(row) and status.startswith("out of memory"):
        return False
    return status.startswith(FOR_WANT) or "is not installed" in status


def replaces(row: Row, other: Row) -> bool:
    """Because it says something of the way, then by date, then by commit, then because it comes later."""
    if says_nothing(row) != says_nothing(other):
        return says_nothing(other)
    if row["date"] != other["date"]:
        return row["date"] > other["date"]
    mine, its = position(row["commit"]), position(other["commit"])
    return mine is None or its is None or mine >= its


def newest(rows: list[Row], key: tuple[str, ...]) -> list[Row]:
    """One of each key, in the order of those that count."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        name = tuple(row[column] for column in key)
        if name not in found or replaces(row, found[name]):
            found.pop(name, None)
            found[name] = row
    return list(found.values())


def shown(path: Path) -> list[Row]:
    """The rows of a CSV that count; none where there is no such file.

    Those of the device with the most, which pages are about, and the cases that others measured last or alone.
    """
    rows = newest(read_csv(path), key_of(path)) if path.exists() else []
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        case = case_key(row)
        if case not in latest or replaces(row, latest[case]):
            latest[case] = row
    last = [row for row in rows if row["device"] == latest[case_key(row)]["device"]]
    most = next(iter(by_device(last)), None)
    return [row for row in rows if row["device"] in (most, latest[case_key(row)]["device"])]


def by_device(rows: list[Row]) -> dict[str, list[Row]]:
    """The device with the most rows first: ways on two devices are no comparison."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["device"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def of_one_device(rows: list[Row]) -> list[Row]:
    """Of that with the most."""
    return next(iter(by_device(rows).values()), [])


def case_key(row: Row) -> tuple[str, ...]:
    for names in (CASE, ("model",), ("n", "d", "symmetric")):
        if names[0] in row and names[-1] in row:
            return tuple(row[name] for name in names)
    return (row["device"],)  # of tests


def key_of(path: Path) -> tuple[str, ...]:
    return next(key for name, key in KEYS.items() if path.name.startswith(name))


def add(folder: Path, order: Callable[[Row], tuple[int, ...]]) -> list[str]:
    """A run's CSVs into the committed ones; older rows of the same case, way and device go."""
    found = [path for path in sorted(folder.glob("*.csv")) if any(path.name.startswith(name) for name in KEYS)]
    if not found:
        raise SystemExit(f"error: add: {folder} has no CSV of a run. Its names begin with {', '.join(KEYS)}.")
    for path in found:
        into = RESULTS / path.name
        old, new = read_csv(into) if into.exists() else [], read_csv(path)
        columns = list(old[0]) if old else list(new[0]) if new else []
        if any(list(row) != columns or None in row.values() for row in new):
            raise SystemExit(f"error: add: {path} is cut, or has other columns than {into}.")
        if new:
            rows = newest(old + new, key_of(path))
            write_csv(into, sorted(rows, key=order) if "workload" in columns else rows)
    return [path.name for path in found]
