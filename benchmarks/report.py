"""The README's table, docs/scaling.md's and the figures, from the committed CSVs.

    python -m benchmarks.report             # rewrites both pages between their markers, and docs/benchmarks-*.png
    python -m benchmarks.report --check     # fails where they do not agree with the CSVs

A figure carries the digest of the rows it shows, so that an old one is found out.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from .measure import RESULTS, Row, read_csv
from .ranks import FORMS, largest_world, projection, traffic
from .workloads import DTYPES, WORKLOADS, Case

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks: begin, written by python -m benchmarks.report -->", "<!-- benchmarks: end -->"
README_CASES = {  # workload, N, K, all at D = 128: of a CPU, and of a GPU
    "cpu": ("float32", (("M1", 256, 65536), ("S1", 4096, 4095), ("S1", 256, 255), ("S2", 4096, 8190), ("P1", 256, 16))),
    "gpu": (
        "bfloat16",
        (
            ("M1", 256, 65536),
            ("M1", 1024, 65536),
            ("T1", 256, 65536),
            ("M2", 256, 65536),
            ("S1", 4096, 4095),
            ("S1", 16384, 16383),
            ("S2", 4096, 8190),
            ("S2", 32768, 65534),
        ),
    ),
}
COLORS = {"eqco_loss": "tab:orange"}  # ours; the others are grey


@dataclass(frozen=True)
class Args:
    check: bool = False  # change nothing; fail where something does not agree


def main(args: Args) -> None:
    stale = []
    for name, write in PAGES.items():
        page = ROOT / name
        before = page.read_text()
        after = between_markers(before, write())
        if before != after:
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


# ------------------------------------------------------------------------------------------------------------- pages


def between_markers(page: str, text: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{rest[rest.index(END) :]}"


def table() -> str:
    """Every way of some cases of each device that has a CSV."""
    parts = []
    for device, (dtype, chosen) in README_CASES.items():
        path = RESULTS / f"{device}.csv"
        rows = [row for row in (read_csv(path) if path.exists() else []) if row["dtype"] == dtype]
        shown = [[row for row in rows if matches(row, *choice)] for choice in chosen]
        together = [row for case in shown for row in case]
        if not together:
            continue
        graph = any(row["graph_us"] for row in together)
        head = [*(["GPU us, CUDA graph", "times faster"] if graph else []), "ms", "times faster", "extra memory"]
        lines = [f"| | {' | '.join(head)} |", "| --- |" + " --- |" * len(head)]
        for case in shown:
            lines += table_rows(case, graph)
        fewest = min(int(row["rounds"]) for row in together if row["rounds"])
        made = "; ".join(
            dict.fromkeys(f"{r['device']}, torch {r['torch']}, commit {r['commit']}, {r['date']}" for r in together)
        )
        lines += ["", f"Forward and backward, {dtype}, medians of {fewest} or more interleaved rounds; {made}."]
        parts.append("\n".join([*lines, *share_of_a_step(RESULTS / f"step-{device}.csv")]))
    return "\n\n".join(parts)


def share_of_a_step(path: Path) -> list[str]:
    rows = read_csv(path) if path.exists() else []
    return [
        f"Of a SiMo step of ResNet-50 (N = {row['n']}, {row['image_size']} px, {float(rows[0]['ms']):.0f} ms) the loss "
        f"is {100 * float(row['share_of_step']):.2f} %: {row['ms']} ms."
        for row in rows[1:]
        if row["what"].startswith("eqco_loss") and "65536" not in row["what"]
    ]


def matches(row: Row, workload: str, n: int, k: int) -> bool:
    given = row["workload"], int(row["n"]), int(row["k"]), int(row["d"]), row["layout"]
    return given == (workload, n, k, 128, "rows")


def table_rows(case: list[Row], graph: bool) -> list[str]:
    """What the case is, its ways, and why others are none."""
    if not case:
        return []
    what = f"**{WORKLOADS[case[0]['workload']].title}** ({case[0]['workload']}), {case_of(case[0]).size}"
    rest = " |" * (5 if graph else 3)
    lines = [f"| {what} |{rest}"]
    reasons: dict[str, list[str]] = {}
    for row in sorted(case, key=lambda row: (float(row["graph_us"] or "inf"), float(row["ms"] or "inf"))):
        name = f"{row['peer']} {row['version']}".strip()
        if row["status"] != "timed":
            reasons.setdefault(row["status"], []).append(name)
            continue
        cells = [name]
        if graph:
            cells += [number(row["graph_us"], ".4g"), number(row["times_faster_graph"], ".2f")]
        cells += [
            number(row["ms"], ".4g"),
            number(row["times_faster"], ".2f"),
            number(row["peak_extra_mb"], ".1f", " MB"),
        ]
        lines.append("| " + " | ".join(f"**{cell}**" if name == "eqco_loss" else cell for cell in cells) + " |")
    return lines + [f"| {', '.join(names)} | {reason} |{rest[2:]}" for reason, names in reasons.items()]


def number(text: str, form: str, unit: str = "") -> str:
    """A dash where there is none."""
    return f"{float(text):{form}}{unit}" if text else "-"


def case_of(row: Row) -> Case:
    return Case(row["workload"], int(row["n"]), int(row["k"]), int(row["d"]), row["dtype"], row["layout"])


def scaling_page() -> str:
    """What the ranks showed beside the arithmetic, and the arithmetic further on."""
    lines = ["| | ranks | gathered | reduced | sent, all ranks: arithmetic | measured | peak memory a rank |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    rows = read_csv(RESULTS / "ranks.csv")
    for row in rows:
        ranks = int(row["ranks"])
        wire = f"{int(row['wire_bytes_all_ranks']):,}" if row["wire_bytes_all_ranks"] else "not known"
        one = traffic(
            ranks, int(row["n"]), int(row["d"]), "keys detached" if "det" in row["form"] else "both gradients"
        )
        lines.append(
            f"| {row['form']} | {ranks} | {int(row['gathered_bytes']):,} | {int(row['reduced_bytes']):,} "
            f"| {ranks * one.sent(ranks):,.0f} | {wire} | {row['peak_extra_mb']} MB |"
        )
    lines += ["", f"Bytes a step; N = {rows[0]['n']} a rank, D = {rows[0]['d']}, float32; {rows[0]['device']}; torch "]
    lines[-1] += f"{rows[0]['torch']}; commit {rows[0]['commit']}, {rows[0]['date']}."
    lines += ["", "| GPUs | keys | gathered, MB | reduced, MB | network, keys detached | network, both gradients |"]
    lines[-1] += " products | network's share of a step |"
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for count in (8, 64, 256, 1024):
        p = projection(count)
        lines.append(
            f"| {p.ranks} | {p.keys:,} | {p.gathered_mb:.1f} | {p.reduced_mb:.1f} | {p.detached_ms:.2f} ms "
            f"| {p.learning_ms:.2f} ms | {p.compute_ms:.3f} ms | {100 * p.share:.1f} % |"
        )
    limits = [largest_world(0.1, form) for form in FORMS]
    lines += ["", "The network takes a tenth of a step at "]
    lines[-1] += f"{limits[0]:,} GPUs with keys detached, and at {limits[1]:,} with gradients to both sides."
    return "\n".join(lines)


PAGES = {"README.md": table, "docs/scaling.md": scaling_page}

# ------------------------------------------------------------------------------------------------------------ figures

Draw = Callable[[list[Row]], Any]


def figures() -> dict[str, tuple[Draw, list[Row]]]:
    """Of the CSVs that there are: how to draw each, and its rows."""
    found: dict[str, tuple[Draw, list[Row]]] = {}
    for device in ("cpu", "gpu"):
        for name, draw in (("", draw_bars), ("scaling-", draw_scaling)):
            path = RESULTS / f"{name}{device}.csv"
            if path.exists():
                rows = read_csv(path)
                shown = rows if name else [row for row in rows if row["layout"] == "rows"]
                found[f"benchmarks-{name}{device}.png"] = draw, shown
    return found


def draw_bars(rows: list[Row]) -> Any:
    """Ways side by side in each workload's first case: times faster than the baseline, and share of the limit."""
    import matplotlib.pyplot as plt

    cases = [[r for r in rows if r["workload"] == name and r["status"] == "timed"] for name in WORKLOADS]
    usual = README_CASES["gpu" if any(r["graph_us"] for r in rows) else "cpu"]
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
        share.barh(names, [100 * float(r["limit_share"]) for r in case], color=colors)
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


def place(row: Row, dtype: str, sizes: tuple[tuple[str, int, int], ...]) -> tuple[int, ...]:
    """The case a reader looks for first: float32 on a CPU, autocast on a GPU; of the README's size."""
    usual = row["dtype"] == dtype, any(matches(row, *one) for one in sizes)
    return *map(int, usual), -DTYPES.index(row["dtype"]), -int(row["n"]), -int(row["k"]), -int(row["d"])


def draw_scaling(rows: list[Row]) -> Any:
    """Time and memory against K, and against N."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex="col")
    for column, (workload, size) in enumerate((("M1", "k"), ("S1", "n"))):
        mine = [r for r in rows if r["workload"] == workload]
        others = itertools.cycle(("0.2", "tab:blue", "tab:green", "tab:purple", "tab:brown"))
        for name in dict.fromkeys(r["peer"] for r in mine):
            timed = [r for r in mine if r["peer"] == name and r["status"] == "timed"]
            x = [int(r[size]) for r in timed]
            style = {"color": COLORS.get(name, next(others)), "linewidth": 2.2 if name == "eqco_loss" else 1}
            for axis, key in zip(axes[:, column], ("ms", "peak_extra_mb"), strict=True):
                axis.loglog(x, [float(r[key]) for r in timed], marker="o", markersize=3, label=name, **style)
        title = "K keys of a queue, N = 256" if workload == "M1" else "N in-batch, gradients to both sides"
        axes[0, column].set_title(f"{workload}: {title}", fontsize=10)
        axes[1, column].set_xlabel(size.upper())
        axes[0, column].legend(fontsize=8)
    axes[0, 0].set_ylabel("ms, forward and backward")
    axes[1, 0].set_ylabel("peak extra memory, MB")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, torch {rows[0]['torch']}", fontsize=10)
    return figure


def digest(rows: list[Row]) -> str:
    return hashlib.sha256(repr([sorted(row.items()) for row in rows]).encode()).hexdigest()


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
