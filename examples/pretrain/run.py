"""The run directory: config.json, metrics.csv, curves.png and checkpoint.pt, each written whole; and how to resume."""

import csv
import errno
import json
import os
import platform
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from .console import fail as fail
from .console import legible
from .console import print_any_name as print_any_name
from .data import DataError

Row = dict[str, float | int | None]
PANELS = (  # of the curves: column, title, top
    ("loss", "loss", None),
    ("top1", "contrast accuracy, %", 100),
    ("feature_std", "feature std (0: collapsed)", 1.1),
    ("knn", "kNN, %", 100),
    ("online_probe", "online probe, %", 100),
)
MEASURED = ("knn", "online_probe")  # columns with a value now and then
# Arguments that older checkpoints lack, and what was done then
ADDED: dict[str, Any] = {"key_momentum_schedule": "constant", "resume_from": None}
EXTENDED = ("epochs", "resume_from", "knn_every", "knn_k", "probe")  # what may differ from a run that is gone on from
PACKAGES = ("torch", "torchvision", "lightning-fabric", "lightning", "eqco_loss", "scikit-learn", "numpy")


def check_device(device: str) -> None:
    """One that is asked for by name must be there."""
    no_cuda = device == "cuda" and not torch.cuda.is_available()
    if no_cuda or (device == "mps" and not torch.backends.mps.is_available()):
        fail(f"device: there is no {device.upper()} device here. Leave --device out, or give --device cpu.")


def versions() -> dict[str, str]:
    """Of Python and of the packages that are here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def provenance(device: str) -> dict[str, str]:
    """What a row of results carries: where it was made, and of what."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    listed = "; ".join(f"{package} {number}" for package, number in versions().items())
    return {"device": name, "versions": listed, "commit": commit()}


def commit() -> str:
    """Of the code that runs, "-dirty" where it was changed since; empty where it is no git checkout."""

    def git(*words: str) -> str:
        here = ["git", "-C", str(Path(__file__).parent)]
        return subprocess.run([*here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = ":(top)eqco_loss/*.py", ":(top)examples/*.py"  # results and pages may change
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


@contextmanager
def clear_errors() -> Iterator[None]:
    """What the library, torch or the data find wrong with an argument, as one line for a person."""
    try:
        yield
    except ValueError as error:
        fail(error)


def command() -> str:
    """What to type to run this again."""
    start = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        start = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
        if (nodes := int(os.environ.get("GROUP_WORLD_SIZE", "1"))) > 1:
            start += [f"--nnodes={nodes}", "..."]
    return " ".join(quoted(word) for word in [*start, *sys.argv])


def quoted(word: str) -> str:
    """For a shell. Bytes that are not UTF-8 go as bash writes them."""
    if legible(word) == word:
        return shlex.quote(word)
    return "$'" + legible(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def peak_memory_mb(device: torch.device) -> int:
    """The device's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


@contextmanager
def written_whole(path: Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete and on disk; until then the one before stays.

    And after that, too, under the name ``previous``.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # which torch.save makes a RuntimeError
        raise


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file with the columns of the last row, written whole; rows of an older version may have fewer."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        with written_whole(path) as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror}). Make room, or give another --out; the last one is whole.")


def read_rows(path: Path, check: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    """What ``write_rows`` wrote, none where there is no file. ``check`` raises where a row is not as it should be."""
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            check(row)
    except (KeyError, ValueError, TypeError) as error:
        fail(
            f"{path} cannot be read ({type(error).__name__}: {error}). Delete it to start over, or give another --out."
        )
    return rows


class Run:
    """One run in one directory. To resume it, the ``fixed`` arguments must agree; the ``free`` ones may change."""

    def __init__(
        self,
        directory: Path,
        columns: tuple[str, ...],
        fixed: dict[str, Any],
        free: dict[str, Any],
        contents: dict[str, Any] | None = None,
        rank: int = 0,
    ) -> None:
        self.directory, self.columns, self.fixed, self.free = directory, columns, fixed, free
        self.contents = contents or {}  # what a checkpoint tells besides
        self.writes = rank == 0
        self.rows: list[Row] = []
        self.epoch = 0  # whole epochs that the checkpoint holds
        self.saved = ""  # where the newest checkpoint stands
        self.damaged = False  # the newest checkpoint could not be read
        self.result: Row | None = None
        self.config: dict[str, Any] = {}  # what config.json says
        self.is_new = not directory.exists()
        if not self.writes:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)  # held until this process ends, however it ends
        except OSError as error:
            fail(f"run_dir: {directory} cannot be written ({error.strerror}). Give another --run-dir.")
        try:
            import fcntl

            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by workers that outlive it
        except ImportError:  # not on Windows
            pass
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                fail(f"run_dir: another process is training in {directory}. Wait for it, or give another --run-dir.")
            fail(f"run_dir: {directory} cannot be locked ({error.strerror}). Give a --run-dir on a disk with locks.")
        for path in (self.checkpoint, self.previous):
            if path.is_dir():
                fail(f"run_dir: expected {path} to be a file, got a directory. Move it, or give another --run-dir.")

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    @property
    def previous(self) -> Path:
        """The checkpoint before, for when the newest cannot be read."""
        return self.directory / "checkpoint.previous.pt"

    def resume(self, source: Path | None = None) -> dict[str, Any] | None:
        """The state dicts of the last checkpoint, for a new run those of ``source``; None where there is neither."""
        found = [path for path in (self.checkpoint, self.previous) if path.exists()]
        if not found and source is None:
            return None
        try:
            path, saved = self._newest(found) if found else self._source(source)
            self._check_arguments(path, saved["fixed"], () if found else EXTENDED)
        except SystemExit:
            self._withdraw()
            raise
        self.rows, self.epoch, self.saved = saved["rows"], saved["epoch"], saved["at"]
        if found:
            self.result = saved["result"]
        else:
            self.saved += f" of {path}"
        self.write_metrics()
        for name, then in saved["environment"].items():
            if then != (now := self.environment()[name]):
                self._say(f"note     {name} was {then} and is {now}: the run goes on, but not bit for bit.")
        return dict(saved["state"])

    def _withdraw(self) -> None:
        """Leave no directory behind that this run has made and not written to: others take it for a run."""
        if self.is_new and self.writes:
            with suppress(OSError):  # it is not empty
                (self.directory / "lock").unlink()
                self.directory.rmdir()

    def _source(self, source: Path | None) -> tuple[Path, dict[str, Any]]:
        """The checkpoint of another run, which has fewer epochs."""
        assert source is not None
        path = source / "checkpoint.pt" if source.is_dir() else source
        if not path.is_file():
            fail(f"resume_from: {path} is not there. Give the checkpoint.pt of a run, or its directory.")
        path, saved = self._newest([path])
        if saved["epoch"] >= self.fixed["epochs"]:
            fail(
                f"resume_from: {path} stands at epoch {saved['epoch']}, and --epochs {self.fixed['epochs']} leaves "
                "nothing to train. Give more --epochs."
            )
        return path, saved

    def _newest(self, found: list[Path]) -> tuple[Path, dict[str, Any]]:
        """The first that can be read, and what is in it."""
        damages: list[str] = []
        for path in found:
            try:
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():  # torch does not compare the checksums
                        raise ValueError(f"{damaged} is not what was written")
                saved = torch.load(path, map_location="cpu", weights_only=True)
                if missing := {"fixed", "environment", "rows", "epoch", "at", "result", "state"} - saved.keys():
                    raise ValueError(f"without {', '.join(sorted(missing))}")
            except Exception as error:  # whatever a damaged file makes of the reader
                reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])[:120]
                damages.append(f"{path} cannot be read ({reason}): it is damaged, or not from this script")
                continue
            for damage in damages:
                self._say(f"note     {damage}. Going on from {path.name}.")
                self.damaged = True
            if self.checkpoint not in found and self.previous in found:
                self._say(f"note     {self.checkpoint} is missing. Going on from {path.name}.")
            return path, saved
        these = "it" if len(found) == 1 else "both"
        fail(f"{'; '.join(damages)}. Delete {these} to start over, or give another --run-dir.")

    def _check_arguments(self, path: Path, fixed: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
        missing = "(none)"
        fixed = {name: value for name, value in ADDED.items() if name in self.fixed} | fixed
        differing = [
            (name, str(fixed.get(name, missing)), str(self.fixed.get(name, missing)))
            for name in {**fixed, **self.fixed}
            if name not in ignored and fixed.get(name, missing) != self.fixed.get(name, missing)
        ]
        if not differing:
            return
        table = [("argument", "saved", "given"), *differing]
        width = [max(len(row[column]) for row in table) for column in range(3)]
        advice = ""
        if [row[0] for row in differing] == ["epochs"]:
            advice = (
                "--epochs decides the learning rate of every step, so that other epochs are another run. "
                f"--resume-from {path} with another --run-dir goes on to more of them. "
            )
        lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, width, strict=True)).rstrip() for row in table]
        if ignored:  # of another run, from which this one is to go on
            way = "Give the saved values to go on from it, or leave --resume-from out to start a new run."
        else:
            way = (
                "Give the saved values to resume it or another --run-dir to start a new run; or, to start over, "
                f"delete {self.directory}."
            )
        fail(f"{path} was made with other arguments:\n  " + "\n  ".join(lines) + f"\n{advice}{way}")

    def save(self, epoch: int, state: dict[str, Any], step: int = 0) -> None:
        """Write the checkpoint, ``step`` steps after a whole epoch; keep the one before; then metrics.csv."""
        self.epoch, at = epoch, f"epoch {epoch}" + (f" and step {step}" if step else "")
        if not self.writes:
            return
        content = {
            **self.contents,
            "epoch": epoch,
            "at": at,
            "fixed": self.fixed,
            "environment": self.environment(),
            "rows": self.rows,
            "result": self.result,
            "state": state,
        }
        previous = None if self.damaged else self.previous  # which a damaged one must not replace
        self._write(self.checkpoint, lambda file: torch.save(content, file), previous)
        self.saved, self.damaged = at, False
        self.write_metrics()

    def write_config(self, **more: object) -> None:
        self.config = {"command": command(), "arguments": {**self.fixed, **self.free}, "versions": versions(), **more}
        self._write(
            self.directory / "config.json", lambda file: file.write(json.dumps(self.config, indent=2).encode() + b"\n")
        )

    def write_card(self, text: str) -> None:
        self._write(self.directory / "model_card.md", lambda file: file.write(legible(text).encode()))

    def write_metrics(self) -> None:
        text = StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: row.get(name) for name in self.columns} for row in self.rows)
        self._write(self.directory / "metrics.csv", lambda file: file.write(text.getvalue().encode()))

    def draw_curves(self) -> None:
        if not self.writes:
            return
        from matplotlib.figure import Figure  # no pyplot: no display, no global state

        panels = [panel for panel in PANELS if any(row.get(panel[0]) is not None for row in self.rows)]
        figure = Figure(figsize=(3 * len(panels), 3), layout="constrained")
        for axes, (name, label, top) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            points = [(row["epoch"], row[name]) for row in self.rows if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), marker="o" if name in MEASURED else "")
            axes.set(xlabel="epoch", title=label)
            axes.grid(alpha=0.3)
            axes.set_ylim(0, top)
        self._write(self.directory / "curves.png", lambda file: figure.savefig(file, format="png", dpi=120))

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C, or an image that cannot be decoded, ends the run at once; the last checkpoint stays as it is."""
        try:
            yield
        except KeyboardInterrupt:
            self.stopped(130)
        except DataError as error:
            message = str(error).splitlines()[-1].split("DataError: ")[-1]  # without the traceback of a worker
            fail(f"{message} {self._kept()} Then continue with\n  {command()}")

    def stopped(self, code: int) -> NoReturn:
        if self.writes:
            print(f"\nstopped. {self._kept()} Continue with\n  {command()}", file=sys.stderr)
        raise SystemExit(code) from None

    @staticmethod
    def environment() -> dict[str, str | int]:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "ranks": ranks}

    def _say(self, text: str) -> None:
        if self.writes:
            print(text, flush=True)

    def _write(self, path: Path, write: Callable[[IO[bytes]], object], previous: Path | None = None) -> None:
        if not self.writes:
            return
        try:
            with written_whole(path, previous) as file:
                write(file)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            reason = (str(error).splitlines() or [""])[0]
            fail(f"{path}: cannot be written ({reason}). {self._kept()} Make room, then continue with\n  {command()}")

    def _kept(self) -> str:
        return (
            f"The checkpoint of {self.saved} is whole."
            if self.checkpoint.exists() or self.previous.exists()
            else "There is no checkpoint yet."
        )
