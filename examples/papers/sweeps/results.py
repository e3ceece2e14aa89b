"""What a grid gave: rows of a CSV, a table, what EqCo claims of it, and a figure."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.run import fail, read_rows, written_whole

from .grids import NAMES, Grid, Setting
from .jobs import Args, Job, Row


def read(path: Path) -> list[Row]:
    return read_rows(path, lambda row: (float(row["knn"]), float(row["probe"] or "nan"), float(row["wall_seconds"])))


def row_of(job: Job, rows: list[Row]) -> Row | None:
    """Its row; one without the probe that is asked for does not count."""
    wanted = job.key
    return next(
        (r for r in rows if all(r.get(name) == wanted[name] for name in wanted) and (r["probe"] or not job.probe)), None
    )


class Point(NamedTuple):
    setting: Setting
    knn: list[float]  # of each seed
    probe: list[float]


def points_of(grid: Grid, dataset: str, table: dict[int, list[Job]], rows: list[Row]) -> list[Point]:
    points = []
    for number, setting in enumerate(grid.settings(dataset)):
        found = [row for job in table[number] if (row := row_of(job, rows))]
        if found:
            probes = [float(row["probe"]) for row in found if row["probe"]]
            points.append(Point(setting, [float(row["knn"]) for row in found], probes))
    return points


def show(args: Args, grid: Grid, table: dict[int, list[Job]], rows: list[Row], path: Path) -> None:
    dataset = args.dataset or grid.dataset
    points = points_of(grid, dataset, table, rows)
    if not points:
        fail(f"{path} has no run of this grid yet. Run the command without --draw-only, with the arguments it had.")
    probe = probe_of(table[0][0])
    lines = [f"{grid.title}, {dataset}", "", *table_lines(grid, points, probe), *verdicts(points)]
    print("\n".join(lines))
    with written_whole(path.with_suffix(".md")) as file:
        file.write("\n".join([*lines, "", f"`{short_command(args)}`", ""]).encode())
    draw(path.with_suffix(".png"), grid, dataset, points, probe)
    print(f"Results are in {path}, {path.with_suffix('.md').name} and {path.with_suffix('.png').name}")


def probe_of(job: Job) -> str:
    """What the column of probes is: the run's own at its end, or beside it, or the papers' after it."""
    if job.args.online_probe:
        return "online probe"
    return "logistic regression" if job.args.probe and not job.probe else "linear probe"


def short_command(args: Args) -> str:
    """What decides the results, without the machine's own paths."""
    given = {
        "dataset": args.dataset,
        "seeds": args.seeds,
        "epochs": args.epochs,
        "limit": args.limit,
        "arch": args.arch,
    }
    words = [f"--{name} {value}" for name, value in given.items() if value is not None]
    return " ".join(["python examples/papers/sweep.py --grid", args.grid, *words])


def table_lines(grid: Grid, points: list[Point], probe: str) -> list[str]:
    head = ["method", grid.axis, "loss" if grid.axis == "K" else "", "seeds", "kNN, %", f"{probe}, %"]
    head.append(f"paper, {grid.paper_on}, %")
    body = [
        [
            NAMES[setting.method],
            str(setting.x),
            setting.line if grid.axis == "K" else "",
            str(len(knn)),
            spread(knn),
            spread(probes),
            "" if setting.paper is None else str(setting.paper),
        ]
        for setting, knn, probes in points
    ]
    keep = [column for column in range(len(head)) if any(row[column] for row in body)]
    rows = [[row[column] for column in keep] for row in [head, *body]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(keep), *lines[1:]]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def verdicts(points: list[Point]) -> list[str]:
    """What EqCo claims of K, in points of kNN, where there are runs to tell."""
    lines = []
    for method in dict.fromkeys(point.setting.method for point in points):
        for line in sorted({p.setting.line for p in points if p.setting.line.startswith(("EqCo", "InfoNCE"))}):
            of_k = {p.setting.x: statistics.mean(p.knn) for p in points if p.setting[:2] == (method, line)}
            if len(of_k) > 1:
                least, most = min(of_k), max(of_k)
                gaps = [f"K = {k} {of_k[k] - of_k[most]:+.1f}" for k in dict.fromkeys((least, 16)) if k in of_k]
                lines.append(f"{NAMES[method]}, {line}: against K = {most}, {', '.join(gaps)} points of kNN.")
    return ["", *lines] if lines else []


def draw(path: Path, grid: Grid, dataset: str, points: list[Point], probe: str) -> None:
    """kNN above and the probe below; crosses are the paper's, where they are of the same data."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    methods = list(dict.fromkeys(point.setting.method for point in points)) if grid.panels else [""]
    measures = ["knn", *(["probe"] if any(point.probe for point in points) else [])]
    figure = Figure(figsize=(1.5 + 4 * len(methods), 3.2 * len(measures) + 0.4), layout="constrained")
    same_data = dataset == grid.paper_on.lower().replace("-", "")
    for panels, measure in zip(figure.subplots(len(measures), len(methods), squeeze=False), measures, strict=True):
        for axes, method in zip(panels, methods, strict=True):
            mine = [point for point in points if method in ("", point.setting.method)]
            draw_panel(axes, mine, measure, same_data and measure == "probe")
            axes.set(xlabel=grid.axis, ylabel="kNN, %" if measure == "knn" else f"{probe}, %")
            axes.set_title(NAMES[method] if method else "")
            axes.grid(alpha=0.3)
            if len({point.setting.line for point in mine}) > 1:
                axes.legend(fontsize="small")
    figure.suptitle(f"{grid.title}, {dataset}")
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_panel(axes: Any, points: list[Point], measure: str, papers: bool) -> None:
    numbers = all(isinstance(point.setting.x, int) for point in points)
    ticks = list(dict.fromkeys(point.setting.x for point in points))
    ticks = sorted(ticks, key=float) if numbers else ticks
    place = {x: math.log2(float(x)) if numbers else i for i, x in enumerate(ticks)}
    for number, line in enumerate(dict.fromkeys(point.setting.line for point in points)):
        mine = [p for p in points if p.setting.line == line and (p.knn if measure == "knn" else p.probe)]
        mine.sort(key=lambda point: place[point.setting.x])
        values = [point.knn if measure == "knn" else point.probe for point in mine]
        at = [place[point.setting.x] for point in mine]
        means = [statistics.mean(found) for found in values]
        deviations = [statistics.stdev(found) if len(found) > 1 else 0.0 for found in values]
        axes.errorbar(at, means, deviations, fmt="o-", color=f"C{number}", capsize=3, markersize=4, label=line)
        if papers:
            axes.plot(at, [p.setting.paper for p in mine], "x--", color=f"C{number}", alpha=0.6, label=f"{line}, paper")
    axes.set_xticks(list(place.values()), [str(x) for x in ticks])
