"""Several runs in one figure: loss, contrast accuracy, feature std, kNN and online probe, with a band over seeds.

    python examples/after/plot_runs.py runs/*  # the figure is runs/runs.png; what is no run there is passed over

Runs whose config.json differs in nothing but the seed are one curve, their mean, in a band from the least to the most.
The legend says in what the curves differ.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

import tyro
from pretrain.run import ADDED, MEASURED, PANELS, fail, print_any_name, written_whole

# Of config.json's arguments, what makes no other curve: where the run is, how it is computed, what is measured of it
IGNORED = {"seed", "run_dir", "data_dir", "workers", "device", "logger", "tensorboard", "compile", "channels_last"}
IGNORED |= {"online_probe", "knn", "knn_device"}

Curve = dict[int, float]  # epoch to value


class NotDrawnError(ValueError):
    """Of a directory that is no run, or of which there is nothing to draw yet; the message says why."""


@dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run directories
    out: Path | None = None  # .png, .pdf or .svg. None: runs.png in the folder that holds the first run


@dataclass(frozen=True)
class Record:
    directory: Path
    arguments: dict[str, Any]  # those that matter
    seed: Any
    curves: dict[str, Curve]  # by column


def main(args: Args) -> None:
    print_any_name()
    runs = [path for path in args.runs if not path.is_file()]  # runs/* finds the figure of the last time, too
    if not runs:
        fail("runs: expected one run directory or more, got none.")
    records, passed = list[Record](), list[str]()
    for directory in runs:
        try:
            records.append(read(directory))
        except NotDrawnError as error:
            passed.append(str(error))
    if not records:
        fail(f"runs: {'; '.join(passed)}. Give directories that a training script has written.")
    for reason in passed:
        print(f"note     {reason}: passed over.")
    groups = grouped(records)
    names = legend([group[0].arguments for group in groups])
    out = args.out or runs[0].resolve().parent / "runs.png"
    draw(groups, names, out)
    for name, group in zip(names, groups, strict=True):
        knn = [list(record.curves["knn"].values())[-1] for record in group if record.curves["knn"]]
        last = f", kNN {mean(knn):.1f} % ({min(knn):.1f} to {max(knn):.1f})" if knn else ""
        print(f"{name}: {len(group)} run(s){last}")
    print(f"figure: {out}")


def read(directory: Path) -> Record:
    """Raises NotDrawnError where there is nothing to draw."""
    if not directory.is_dir():
        fail(f"runs: {directory} is not there. Give directories that a training script has written.")
    config, metrics = directory / "config.json", directory / "metrics.csv"
    for file in (config, metrics):
        if not file.is_file():
            raise NotDrawnError(f"{file} is not there")
    try:
        arguments = json.loads(config.read_text())["arguments"]
        with metrics.open(newline="") as text:
            rows = list(csv.DictReader(text))
        curves = {
            column: {int(row["epoch"]): float(row[column]) for row in rows if row.get(column)}
            for column, _, _ in PANELS
        }
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise NotDrawnError(f"{config} or {metrics.name} cannot be read ({reason})") from None
    if not any(curves.values()):
        raise NotDrawnError(f"{metrics} has no epoch yet")
    kept = {name: value for name, value in {**ADDED, **arguments}.items() if name not in IGNORED}
    return Record(directory, kept, arguments.get("seed"), curves)


def grouped(records: list[Record]) -> list[list[Record]]:
    """Runs that share all but the seed, in the order given."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        group = groups.setdefault(json.dumps(record.arguments, sort_keys=True), [])
        for other in group:
            if other.seed == record.seed:
                fail(f"runs: {other.directory} and {record.directory} are the same run. Give one of them.")
        group.append(record)
    return list(groups.values())


def legend(arguments: list[dict[str, Any]]) -> list[str]:
    """Of each group, the arguments in which it differs from another."""
    names = list(dict.fromkeys(name for one in arguments for name in one))
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in arguments}) > 1]
    return [", ".join(f"{name} {one.get(name)}" for name in differing) or "all runs" for one in arguments]


def band(curves: list[Curve]) -> list[tuple[int, float, float, float]]:
    """Epoch, mean, least and most, where all of the curves have a value."""
    shared = sorted(set(curves[0]).intersection(*curves[1:]))
    values = {epoch: [curve[epoch] for curve in curves] for epoch in shared}
    return [(epoch, mean(found), min(found), max(found)) for epoch, found in values.items()]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(groups: list[list[Record]], names: list[str], out: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    panels = [panel for panel in PANELS if any(record.curves[panel[0]] for group in groups for record in group)]
    figure = Figure(figsize=(3.25 * len(panels), 3.4 + 0.22 * len(groups)), layout="constrained")
    for axes, (column, title, top) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, group in enumerate(groups):
            points = band([record.curves[column] for record in group])
            if points:
                epochs, middle, least, most = zip(*points, strict=True)
                axes.plot(epochs, middle, color=f"C{number}", marker="." if column in MEASURED else "")
                axes.fill_between(epochs, least, most, color=f"C{number}", alpha=0.25, linewidth=0)
        axes.set(xlabel="epoch", title=title)
        axes.set_ylim(0, top)
        axes.grid(alpha=0.3)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=f"C{number}") for number in range(len(groups))]
    figure.legend(handles, names, loc="outside lower center", ncols=1 if max(map(len, names)) > 60 else 2)
    kind = out.suffix.removeprefix(".") or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        fail(f"out: {out.suffix} is no picture. Give .png, .pdf or .svg.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(out) as file:
            figure.savefig(file, format=kind, dpi=120)
    except OSError as error:
        fail(f"out: {out} cannot be written ({error.strerror}).")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
