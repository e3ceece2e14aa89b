"""The README's table, docs/benchmarks.md's, docs/scaling.md's and the figures, from the committed CSVs.

    python -m benchmarks.report                  # rewrites the pages between their markers, and docs/benchmarks-*.png
    python -m benchmarks.report --check          # fails where they do not agree with the CSVs
    python -m benchmarks.report --add FOLDER     # takes a run's CSVs in first: its rows replace older ones

A row of ours that was measured before the last change of eqco_loss/ops is marked. A figure carries the digest of the
rows it shows, so that an old one is found out.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from .history import ROOT, Age, add, age, is_ours, of_one_device, shown, without_marks
from .measure import RESULTS, Row, read_csv
from .pages import PAGES, case_of, in_unit, limit_share, most_of
from .runner import place as in_matrix
from .workloads import DTYPES, WORKLOADS

DRAWN = {  # dtype, and of each workload N and D: what a reader looks for first
    "cpu": ("float32", ((256, 128), (4096, 128), (4096, 512), (250, 120))),
    "gpu": ("bfloat16", ((256, 128), (4096, 128), (4096, 512))),
}
COLORS = {"eqco_loss": "tab:orange"}  # ours; the others are grey
LINES = COLORS | {"torch.compile": "tab:green", "eager masked": "tab:blue", "eager logsumexp": "tab:blue"}


@dataclass(frozen=True)
class Args:
    check: bool = False  # change nothing; fail where something does not agree
    add: Path | None = None  # a folder of CSVs that a run wrote


def main(args: Args) -> None:
    if args.check and args.add is not None:
        raise SystemExit("error: check, add: expected one of them. Add first, then check.")
    if args.add is not None:
        print(f"added: {', '.join(add(args.add, in_matrix))}")
    stale = []
    for name, sections in PAGES.items():
        page = ROOT / name
        before = after = page.read_text()
        for section, write in sections.items():
            after = between_markers(after, section, write())
        same = before == after or (
            args.check and not ages_are_known() and without_marks(before) == without_marks(after)
        )
        if not same:
            stale.append(name)
            if not args.check:
                page.write_text(after)
    for name, (draw, rows) in figures().items():
        path = ROOT / "docs" / name
        if digest_in(path) != digest(rows):
            stale.append(f"docs/{name}")
            if not args.check:
                save(draw(rows), path, rows)
    if args.check and stale:
        raise SystemExit(f"error: {', '.join(stale)}: not what the CSVs say. Run python -m benchmarks.report.")
    print("nothing to change" if not stale else f"written: {', '.join(stale)}")


def ages_are_known() -> bool:
    """A copy without git, or with part of the history, cannot tell whether the kernels have changed since a row."""
    rows = [row for path in RESULTS.glob("*.csv") for row in read_csv(path) if is_ours(row)]
    return all(age(row["commit"]) is not Age.UNKNOWN for row in rows)


def between_markers(page: str, name: str, text: str) -> str:
    begin = f"<!-- benchmarks, {name}: begin, written by python -m benchmarks.report -->"
    end = f"<!-- benchmarks, {name}: end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{rest[rest.index(end) :]}"


# ------------------------------------------------------------------------------------------------------------ figures

Draw = Callable[[list[Row]], Any]


def figures() -> dict[str, tuple[Draw, list[Row]]]:
    """Of the CSVs that there are: how to draw each, and its rows, which but for growth are of one device."""
    found: dict[str, tuple[Draw, list[Row]]] = {}
    for device in ("cpu", "gpu"):
        for name, draw in (("", draw_bars), ("scaling-", draw_scaling)):
            path = RESULTS / f"{name}{device}.csv"
            if path.exists():
                rows = of_one_device(shown(path))
                drawn = rows if name else [row for row in rows if row["layout"] == "rows"]
                found[f"benchmarks-{name}{device}.png"] = draw, drawn
    drawn = [row for device in ("cpu", "gpu") for row in growing(device)]
    if drawn:
        found["benchmarks-growth.png"] = draw_growth, drawn
    return found


def growing(device: str) -> list[Row]:
    """The rows of a device that show growth, of ours, eager and torch.compile: its sweep, or else the matrix."""
    sweep = RESULTS / f"scaling-{device}.csv"
    path = sweep if sweep.exists() else RESULTS / f"{device}.csv"
    rows = shown(path) if path.exists() else []
    ways = [row for row in rows if row["peer"] in ("eqco_loss", "torch.compile") or row["peer"].startswith("eager")]
    return [row for row in ways if path == sweep or row["dtype"] == DRAWN[device][0]]


def draw_bars(rows: list[Row]) -> Any:
    """Ways side by side in each workload's first case: times faster than the baseline, and share of the limit."""
    import matplotlib.pyplot as plt

    cases = [[r for r in rows if r["workload"] == name and r["status"] == "timed"] for name in WORKLOADS]
    most = most_of(rows)
    usual = DRAWN["gpu" if any(r["graph_us"] for r in rows) else "cpu"]
    cases = [[r for r in case if place(r, *usual) == max(place(x, *usual) for x in case)] for case in cases if case]
    heights = [len(case) for case in cases]
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(11, 0.28 * sum(heights) + 0.75 * len(cases)), height_ratios=heights, squeeze=False
    )
    for (bars, share), case in zip(axes, cases, strict=True):
        names = [r["peer"] for r in case]
        colors = [COLORS.get(name, "0.6") for name in names]
        ratio = "times_faster_graph" if any(r["times_faster_graph"] for r in case) else "times_faster"
        ratios = [float(r[ratio] or "nan") for r in case]
        bars.barh(names, ratios, color=colors)
        bars.bar_label(bars.containers[0], fmt="%.2f", padding=2, fontsize=8)
        bars.axvline(1, color="0.3", linewidth=0.8)
        bars.set_title(f"{case[0]['workload']}: {case_of(case[0]).size}, {case[0]['dtype']}", fontsize=9, loc="left")
        share.barh(names, [float(limit_share(r, most).removesuffix(" %") or "nan") for r in case], color=colors)
        share.bar_label(share.containers[0], fmt="%.1f", padding=2, fontsize=8)
        share.set_yticks([])
        for one in (bars, share):
            one.set_ylim(len(names) - 0.5, -0.5)  # also where a bar is missing
            one.tick_params(labelsize=8)
            one.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("times faster than the baseline, forward and backward", fontsize=9)
    axes[-1, 1].set_xlabel("% of the machine's limit (matrix products, memory)", fontsize=9)
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=10)
    return figure


def place(row: Row, dtype: str, sizes: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """The case a reader looks for first: float32 on a CPU, bfloat16 on a GPU; of a usual size."""
    n, d = int(row["n"]), int(row["d"])
    return int(row["dtype"] == dtype), int((n, d) in sizes), -DTYPES.index(row["dtype"]), -n, -int(row["k"]), -d


Sweep = tuple[str, list[Row], str]  # the size that grows, the rows, and a title


def draw_scaling(rows: list[Row]) -> Any:
    """Time and memory against K, against N, and against D where there are such rows."""
    widest = max((int(r["n"]) for r in rows if r["workload"] == "S1" and r["d"] != "128"), default=0)
    sweeps = [
        *growth(rows),
        ("d", [r for r in rows if (r["workload"], int(r["n"])) == ("S1", widest)], f"S1: D features, N = {widest}"),
    ]
    figure = draw_sweeps([sweep for sweep in sweeps if sweep[1]])
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, torch {rows[0]['torch']}", fontsize=10)
    return figure


def draw_growth(rows: list[Row]) -> Any:
    """Of every device the growth in K and N that was measured, beside each other."""
    sweeps = []
    for device in dict.fromkeys(row["device"] for row in rows):
        for size, mine, title in growth([row for row in rows if row["device"] == device]):
            sweeps.append((size, mine, f"{title}\n{device}, {mine[0]['dtype']}"))
    return draw_sweeps(sweeps)


def growth(rows: list[Row]) -> list[Sweep]:
    found = [
        ("k", [r for r in rows if (r["workload"], r["n"]) == ("M1", "256")], "K keys of a queue, N = 256"),
        ("n", [r for r in rows if r["workload"] == "S1" and r["d"] == "128"], "N in-batch, gradients to both sides"),
        ("n", [r for r in rows if r["workload"] == "S2"], "N images, NT-Xent of both views"),
    ]
    return [(size, mine, title) for size, mine, title in found if len({row[size] for row in mine}) > 1]


def draw_sweeps(sweeps: list[Sweep]) -> Any:
    """Time above, memory below."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(sweeps), figsize=(4.6 * len(sweeps), 6.5), sharex="col", squeeze=False)
    for column, (size, mine, title) in enumerate(sweeps):
        gpu = any(r["graph_us"] for r in mine)
        for name in dict.fromkeys(r["peer"] for r in mine):
            timed = sorted(
                (r for r in mine if r["peer"] == name and r["status"] == "timed"), key=lambda r: int(r[size])
            )
            x = [int(r[size]) for r in timed]
            style = {"color": LINES.get(name, "0.2"), "linewidth": 2.2 if name == "eqco_loss" else 1}
            times = [float(in_unit(r, gpu) or "nan") for r in timed]
            for axis, y in zip(axes[:, column], (times, [float(r["peak_extra_mb"]) for r in timed]), strict=True):
                axis.loglog(x, y, marker="o", markersize=3, label=name, **style)
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].set_xlabel(size.upper())
        points = sorted({int(r[size]) for r in mine})
        if len(points) < 4:
            axes[1, column].set_xticks(points, [f"{point:,}" for point in points])
            axes[1, column].set_xticks([], minor=True)
        axes[0, column].legend(fontsize=8)
    axes[0, 0].set_ylabel("ms, forward and backward")
    axes[1, 0].set_ylabel("peak extra memory, MB")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure


def digest(rows: list[Row]) -> str:
    """Of all that is drawn of them."""
    most = most_of(rows)
    return hashlib.sha256(repr([(sorted(row.items()), limit_share(row, most)) for row in rows]).encode()).hexdigest()


def digest_in(path: Path) -> str:
    from PIL import Image

    if not path.exists():
        return ""
    with Image.open(path) as image:
        return str(image.info.get("Description", ""))


def save(figure: Any, path: Path, rows: list[Row]) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=110, metadata={"Description": digest(rows)})
    plt.close(figure)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        import matplotlib

        matplotlib.use("Agg")
    main(tyro.cli(Args, description=__doc__))
