"""The sections that pages have of the CSVs. Every figure in them is a row's, or is computed from rows here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .history import KEYS, by_device, is_ours, mark, newest, notes, of_one_device, shown
from .measure import NO_GRAPH, RESULTS, Limits, Row, read_csv
from .ranks import FORMS, largest_world, projection, traffic
from .workloads import WORKLOADS, Case

DEVICES = ("gpu", "cpu")
SAME = 0.05  # figures that are nearer than that are called equal: medians of one machine differ by as much


def case_of(row: Row) -> Case:
    return Case(row["workload"], int(row["n"]), int(row["k"]), int(row["d"]), row["dtype"], row["layout"])


def number(text: str, form: str, unit: str = "") -> str:
    """Blank where there is none; thousands in full, for a person to read."""
    if not text:
        return ""
    value = f"{float(text):{form}}"
    return f"{float(value):,.0f}{unit}" if "e+" in value else f"{value}{unit}"


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)]


def made_by(rows: list[Row]) -> str:
    """Device, versions, commits and dates."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        found.setdefault((row["device"], row["torch"]), {})[f"{row['commit']} ({row['date']})"] = None
    return "; ".join(f"{device}, torch {torch}, commits {', '.join(of)}" for (device, torch), of in found.items()) + "."


def footnotes(rows: list[Row]) -> list[str]:
    return ["", " ".join((made_by(rows), *notes(rows)))]


# -------------------------------------------------------------------------------------------------- the machine's limit


Most = dict[tuple[str, ...], float]  # a second: operations by device and dtype; bytes by what was copied, too


def most_of(rows: list[Row]) -> Most:
    """The most that any run reached, by its products and copies or by a way; nothing where no run kept that.

    One run may find a GPU that is busy or has a low clock, and its rows would be nearer to the limit than they are.
    """
    most: Most = {}
    timed = [row for row in rows if row["status"] == "timed"]
    kept = {products_of(row) for row in timed if row["limit_operations"]}
    for row in timed:
        if products_of(row) in kept:
            case = case_of(row)
            for key, column, work in (
                (products_of(row), "limit_operations", case.operations),
                (copies_of(row), "limit_bytes", case.bytes),
            ):
                most[key] = max(float(row[column] or 0), work / seconds(row), most.get(key, 0.0))
    return most


def products_of(row: Row) -> tuple[str, ...]:
    return row["device"], row["dtype"]


def copies_of(row: Row) -> tuple[str, ...]:
    """A CPU's copies are as large as the case, since caches serve small ones faster; a GPU's are all larger than L2."""
    return *products_of(row), "" if row["kernels"] else f"{case_of(row).bytes:.3g}"


def limit_share(row: Row, most: Most) -> str:
    """Of the machine's limit; blank where no run kept it and this one took another count of operations."""
    if row["status"] != "timed":
        return ""
    case = case_of(row)
    if products_of(row) in most:
        least = Limits(most[products_of(row)], most[copies_of(row)]).seconds(case.operations, case.bytes)
        return f"{100 * least / seconds(row):.3g} %"
    same = row["operations"] == f"{case.operations:.3g}" and row["bytes"] == f"{case.bytes:.3g}"
    return f"{100 * float(row['limit_share']):.3g} %" if row["limit_share"] and same else ""


def seconds(row: Row) -> float:
    """The GPU's own where it is known."""
    return float(row["graph_us"]) / 1e6 if row["graph_us"] else float(row["ms"]) / 1e3


def machine_limits() -> str:
    """What products and memory reached; of rows that did not keep it, from the limits' shares that they have."""
    lines, used = [], []
    for device in DEVICES:
        rows = [row for row in shown(RESULTS / f"{device}.csv") if row["limit_share"]]
        used += rows
        most = most_of(rows)
        for name, dtype in dict.fromkeys(map(products_of, rows)):
            mine = [row for row in rows if products_of(row) == (name, dtype)]
            if (name, dtype) in most:
                products = f"{most[name, dtype] / 1e12:.3g}"
                memory = f"{most[name, dtype, ''] / 1e9:.4g}" if (name, dtype, "") in most else ""
            else:  # a share of two digits or more, of a case that products bound: the largest is the nearest
                sharp = [row for row in mine if float(row["limit_share"]) >= 0.1]
                rates = [float(row["operations"]) / (float(row["limit_share"]) * seconds(row)) for row in sharp]
                products, memory = (f"about {max(rates) / 1e12:.3g}" if rates else ""), ""
            lines.append([name, dtype, products, memory])
    return "\n".join([*table(["", "dtype", "products, TFLOP/s", "memory, GB/s"], lines), "", made_by(used)])


# ------------------------------------------------------------------------------------------------- which way to take


class Situation(NamedTuple):
    """What a reader has, and the case that stands for it: the first dtype that has been measured."""

    title: str
    workload: str
    n: int
    d: int
    dtypes: tuple[str, ...] = ("bfloat16", "amp", "float32")


UNDER_AUTOCAST = ("amp", "bfloat16", "float32")  # as most train them

SITUATIONS = (
    Situation("MoCo's queue of 65,536 keys", "M1", 256, 128),
    Situation("the same, N = 1024", "M1", 1024, 128),
    Situation("dual temperature, the same queue", "T1", 256, 128),
    Situation("the positive is in the queue: ids", "M2", 256, 128),
    Situation("in-batch InfoNCE, N = 4096", "S1", 4096, 128),
    Situation("in-batch InfoNCE, N = 16384", "S1", 16384, 128),
    Situation("NT-Xent, N = 4096", "S2", 4096, 128),
    Situation("NT-Xent, N = 32768", "S2", 32768, 128),
    Situation("CLIP, N = 4096, D = 512", "C1", 4096, 512, UNDER_AUTOCAST),
    Situation("CLIP, N = 4096, D = 1024", "C1", 4096, 1024, UNDER_AUTOCAST),
    Situation("CLIP, N = 32768, D = 768", "C1", 32768, 768, UNDER_AUTOCAST),
    Situation("SiMo, 16 negatives", "P1", 256, 128, UNDER_AUTOCAST),
    Situation("in-batch InfoNCE, N = 256", "S1", 256, 128),
    Situation("in-batch InfoNCE, N = 64", "S1", 64, 128),
    Situation("NT-Xent, N = 64", "S2", 64, 128),
    Situation("CLIP, N = 64, D = 512", "C1", 64, 512, UNDER_AUTOCAST),
)


def which_way() -> str:
    """Ours against torch.compile of plain code, and what follows for a user: a table for each device."""
    parts = []
    for rows in (rows for device in DEVICES for rows in by_device(shown(RESULTS / f"{device}.csv")).values()):
        gpu = any(row["graph_us"] for row in rows)
        lines, used = [], []
        for situation in SITUATIONS:
            pair = next(filter(None, (ours_and_plain(rows, situation, x) for x in situation.dtypes)), None)
            if pair is None:
                continue
            ours, plain = pair
            used += [ours, plain]
            memory = number(plain["peak_extra_mb"], ".4g"), number(ours["peak_extra_mb"], ".4g")
            cells = [f"{situation.title}, {ours['dtype']}"]
            if gpu:
                cells += [number(plain["graph_us"], ".4g"), number(ours["graph_us"], ".4g") + mark(ours)]
            cells += [number(plain["ms"], ".4g"), number(ours["ms"], ".4g") + ("" if gpu else mark(ours))]
            lines.append([*cells, " / ".join(memory), advice(ours, plain)])
        if lines:
            head = [used[0]["device"], *(["GPU, us: compiled", "ours"] if gpu else [])]
            head += ["ms: compiled", "ours", "extra MB: compiled / ours", "take"]
            parts.append("\n".join([*table(head, lines), *footnotes(used)]))
    return "\n\n".join(parts)


def ours_and_plain(rows: list[Row], situation: Situation, dtype: str) -> tuple[Row, Row] | None:
    """Of the largest K."""
    _, workload, n, d, _ = situation
    mine = [
        row
        for row in rows
        if (row["workload"], row["n"], row["d"], row["dtype"]) == (workload, str(n), str(d), dtype)
        and row["layout"] == "rows"
        and row["status"] == "timed"
    ]
    k = (
        min((int(row["k"]) for row in mine), default=0)
        if workload == "P1"
        else max((int(r["k"]) for r in mine), default=0)
    )
    found = {row["peer"]: row for row in mine if int(row["k"]) == k}
    pair = found.get("eqco_loss"), found.get("torch.compile")
    return (pair[0], pair[1]) if pair[0] and pair[1] else None


def times_faster(row: Row, other: Row, column: str) -> float | None:
    """How a way compares with another: both over the plain code of their own turn, since two turns met two machines.

    None where one of the turns has no plain code to compare with.
    """
    return float(row[column]) / float(other[column]) if row[column] and other[column] else None


def advice(ours: Row, plain: Row) -> str:
    """What the figures say: a GPU's own time counts in a busy step, and wall-clock where the GPU waits for Python."""
    wall, graph = (times_faster(ours, plain, column) for column in ("times_faster", "times_faster_graph"))
    if wall is None:
        return ""
    if graph is None:
        return "ours" if wall > 1 + SAME else "torch.compile" if wall < 1 - SAME else "either"
    if graph < 1 - SAME:
        return "torch.compile"
    if graph <= 1 + SAME:
        return "either"
    return "ours" if wall >= 1 - SAME else "ours; in a CUDA graph where the GPU waits for Python"


ONE_A_WORKLOAD = (  # places in SITUATIONS
    "MoCo's queue of 65,536 keys",
    "dual temperature, the same queue",
    "the positive is in the queue: ids",
    "in-batch InfoNCE, N = 4096",
    "NT-Xent, N = 4096",
    "CLIP, N = 4096, D = 512",
    "CLIP, N = 32768, D = 768",
    "SiMo, 16 negatives",
)


def one_row_a_workload() -> str:
    """Times of a GPU and a CPU side by side, without advice: for a reader's first look."""
    found: dict[str, dict[str, tuple[Row, Row]]] = {}
    for device in DEVICES:
        rows = of_one_device(shown(RESULTS / f"{device}.csv"))
        for one in SITUATIONS:
            pair = next(filter(None, (ours_and_plain(rows, one, dtype) for dtype in one.dtypes)), None)
            if one.title in ONE_A_WORKLOAD and pair is not None:
                found.setdefault(one.title, {})[device] = pair
    lines = []
    for title in ONE_A_WORKLOAD:
        cells = []
        for device, key, unit, column in (
            ("gpu", "graph_us", " us", "times_faster_graph"),
            ("cpu", "ms", " ms", "times_faster"),
        ):
            pair = found.get(title, {}).get(device)
            if pair is None:
                cells += ["", "", ""]
                continue
            ratio = times_faster(*pair, column)
            time = f"{pair[0]['dtype']}: {number(pair[0][key], '.3g', unit)}"
            cells += [time + mark(pair[0]), number(pair[1][key], ".3g", unit)]
            cells.append("" if ratio is None else f"{ratio:.2f}")
        lines.append([title, *cells])
    used = [row for pairs in found.values() for pair in pairs.values() for row in pair]
    names = {device: next((p[device][0]["device"] for p in found.values() if device in p), "") for device in DEVICES}
    head = [""]
    for device in DEVICES:
        head += [f"{names[device]}: ours", "compiled", "times faster"]
    return "\n".join([*table(head, lines), *footnotes(used)])


# ------------------------------------------------------------------------------------------------ every case, every way


def every_case(device: str) -> Callable[[], str]:
    """Of each device every workload's cases, and in each those first that are faster than ours."""

    def write() -> str:
        devices = by_device(shown(RESULTS / f"{device}.csv"))
        parts = []
        for name, rows in devices.items():
            parts += workload_tables(rows, f", {name}" if len(devices) > 1 else "")
            parts.append("\n".join(footnotes(rows)).strip())
        return "\n\n".join([*parts, *tests(device)])

    return write


def workload_tables(rows: list[Row], where: str) -> list[str]:
    most = most_of(rows)
    parts = []
    for name, kind in WORKLOADS.items():
        mine = [row for row in rows if row["workload"] == name]
        if not mine:
            continue
        graph = any(row["graph_us"] for row in mine)
        head = ["", *(["GPU, us", "times faster"] if graph else []), "ms", "times faster"]
        head += [*(["Python, ms"] if graph else []), "extra MB", "of the limit", "error"]
        lines = []
        for case in dict.fromkeys(map(case_of, mine)):
            lines += case_lines([row for row in mine if case_of(row) == case], len(head), graph, most)
        parts.append("\n".join([f"### {name}: {kind.title}{where}", "", *table(head, lines)]))
    return parts


def tests(device: str) -> list[str]:
    """What the tests that need the device showed there."""
    found = []
    for row in shown(RESULTS / f"tests-{device}.csv"):
        told = f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
        if not row["passed"]:
            stopped = row["status"] in ("2", "124")  # by a person, or by the time that they had
            told = f"{'stopped before they ended' if stopped else 'did not run'}, status {row['status']}"
        elif row["status"] not in ("0", "1"):
            told = f"stopped after {told}, status {row['status']}"
        found.append(" ".join([f"Tests of the kernels on it: {told}{mark(row)};", made_by([row]), *notes([row])]))
    return found


def case_lines(case: list[Row], width: int, graph: bool, most: Most) -> list[list[str]]:
    """The case, who is faster than ours, every way that was timed, and why others were not."""
    lines = [[f"**{case[0]['dtype']}, {case_of(case[0]).size}**: {faster_than_ours(case)}", *[""] * (width - 1)]]
    reasons: dict[str, list[str]] = {}
    for row in sorted(case, key=lambda row: [-float(row[column] or 0) for column in FASTER]):
        name = f"{row['peer']} {row['version']}".strip()
        if row["status"] != "timed":
            reasons.setdefault(row["status"], []).append(name)
            continue
        cells = [name + mark(row)]
        if graph:
            cells += [number(row["graph_us"], ".4g") or no_graph(row, case), number(row["times_faster_graph"], ".2f")]
        cells += [number(row["ms"], ".4g"), number(row["times_faster"], ".2f")]
        cells += [number(row["host_ms"], ".3g")] if graph else []
        cells += [number(row["peak_extra_mb"], ".1f"), limit_share(row, most), row["relative_error"]]
        lines.append([f"**{x}**" if x and row["peer"] == "eqco_loss" else x for x in cells])
    return lines + [[", ".join(names), reason, *[""] * (width - 2)] for reason, names in reasons.items()]


def no_graph(row: Row, case: list[Row]) -> str:
    """Why the GPU's own time is blank.

    A failure is no property of a way where its turn captured no plain code either: a way that is graphs by itself then
    has a time and nothing to compare it with.
    """
    turn = [other for other in case if (other["commit"], other["date"]) == (row["commit"], row["date"])]
    harness = row["no_graph"].startswith(NO_GRAPH) and "wrong: " not in row["no_graph"]
    if harness and any(x["graph_us"] and not x["times_faster_graph"] for x in turn):
        return "that run captured plain code neither: to be measured again"
    return row["no_graph"] or "that run kept no reason"


def faster_than_ours(case: list[Row]) -> str:
    ours = next((row for row in case if row["peer"] == "eqco_loss" and row["status"] == "timed"), None)
    if ours is None:
        return "ours has not been measured"
    if not ours["times_faster"]:
        return "nobody has been compared with ours, beside which no plain code was timed"
    found: dict[str, float] = {}
    for row in case:
        if row["status"] != "timed" or is_ours(row):
            continue
        ratios = {unit: times_faster(row, ours, column) or 0.0 for column, unit in FASTER.items()}
        better = [f"{ratio:.2f} x {unit}" for unit, ratio in ratios.items() if round(ratio, 2) > 1]
        if better:
            found[f"{row['peer']} ({', '.join(better)})"] = max(ratios.values())
    order = sorted(found, key=lambda name: -found[name])
    return f"faster than ours: {'; '.join(order)}" if order else "nobody is faster than ours"


FASTER = {"times_faster_graph": "on the GPU", "times_faster": "in wall-clock"}

# ------------------------------------------------------------------------------------------- steps, engines, scaling


def in_a_step() -> str:
    lines, used = [], []
    for device in DEVICES:
        for row in shown(RESULTS / f"step-{device}.csv"):
            used.append(row)
            model = f"{row['model']}, N = {row['n']}, {row['image_size']} px, {row['dtype']}"
            figures = [number(row[key], ".4g") for key in ("ms", "host_ms", "gpu_ms")]
            share = f"{100 * float(row['share_of_step']):.3g} %" if row["ms"] else "out of memory"
            lines.append([row["device"], model, row["what"] + mark(row), *figures, share])
    head = ["", "step", "what", "ms", "the loss: Python, ms", "the loss: GPU, ms", "of the step"]
    return "\n".join([*table(head, lines), *footnotes(used)])


def engines() -> str:
    """A table for each device."""
    parts = []
    for rows in by_device(shown(RESULTS / "engines.csv")).values():
        lines = []
        for row in rows:
            directions = "both" if row["symmetric"] == "True" else "one"
            lines.append(
                [row["n"], row["d"], directions, row["engine"] + mark(row), row["us"], row["warm_us"], row["error"]]
            )
        head = ["N", "D", "directions", "engine", "GPU, us", "with a warm L2", "error"]
        parts.append("\n".join([*table(head, lines), *footnotes(rows)]))
    return "\n\n".join(parts)


def scaling() -> str:
    """Time and memory of ours and of torch.compile against K, N and D."""
    parts = []
    for device in DEVICES:
        swept = shown(RESULTS / f"scaling-{device}.csv")
        rows = newest(swept + shown(RESULTS / f"{device}.csv"), KEYS["scaling"])
        for column, workload, fixed in (
            ("k", "M1", ("n", "d")),
            ("n", "S1", ("d",)),
            ("d", "S1", ("n",)),
            ("d", "C1", ("n",)),
        ):
            sweep = swept if column in ("k", "n") else rows
            parts += sweeps([row for row in sweep if row["workload"] == workload], column, fixed)
        if swept:
            parts.append(f"![Time and memory against K, N and D: {device}](benchmarks-scaling-{device}.png)")
    return "\n\n".join(parts)


def sweeps(rows: list[Row], column: str, fixed: tuple[str, ...]) -> list[str]:
    """A table for each group of rows in which one size alone changes, in three steps or more."""
    timed = [row for row in rows if row["status"] == "timed" and row["layout"] == "rows"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in timed:
        groups.setdefault(tuple(row[name] for name in ("device", "dtype", *fixed)), []).append(row)
    parts = []
    for group in groups.values():
        points = sorted({int(row[column]) for row in group})
        if len(points) < 3:
            continue
        first = group[0]
        what = ", ".join(f"{name.upper()} = {first[name]}" for name in fixed)
        title = f"{first['workload']} against {column.upper()}: {what}, {first['dtype']}, {first['device']}."
        lines, used = [], []
        gpu = any(row["graph_us"] for row in group)
        for point in points:
            at = {row["peer"]: row for row in group if int(row[column]) == point}
            pair = [at.get("eqco_loss"), at.get("torch.compile")]
            used += [row for row in pair if row]
            cells = [number(in_unit(row, gpu), ".4g") if row else "" for row in pair]
            memory = [number(row["peak_extra_mb"], ".4g") if row else "" for row in pair]
            lines.append([f"{point:,}", cells[0] + (mark(pair[0]) if pair[0] and cells[0] else ""), cells[1], *memory])
        head = [
            column.upper(),
            f"{'GPU ms' if gpu else 'ms'}: ours",
            "torch.compile",
            "extra MB: ours",
            "torch.compile",
        ]
        parts.append("\n".join([title, "", *table(head, lines), *footnotes(used)]))
    return parts


def in_unit(row: Row, gpu: bool) -> str:
    """Milliseconds of the GPU, and blank where those are not known; or of wall-clock."""
    return str(1e3 * seconds(row)) if row["graph_us"] or not gpu else ""


def ranks() -> str:
    """What the ranks showed beside the arithmetic, and the arithmetic further on."""
    rows = read_csv(RESULTS / "ranks.csv")
    lines = []
    for row in rows:
        count = int(row["ranks"])
        wire = f"{int(row['wire_bytes_all_ranks']):,}" if row["wire_bytes_all_ranks"] else "not known"
        one = traffic(
            count, int(row["n"]), int(row["d"]), "keys detached" if "det" in row["form"] else "both gradients"
        )
        moved = f"{int(row['gathered_bytes']):,}", f"{int(row['reduced_bytes']):,}", f"{count * one.sent(count):,.0f}"
        lines.append([row["form"], str(count), *moved, wire, f"{row['peak_extra_mb']} MB"])
    head = ["", "ranks", "gathered", "reduced", "sent, all ranks: arithmetic", "measured", "peak memory a rank"]
    text = table(head, lines)
    text += ["", f"Bytes a step; N = {rows[0]['n']} a rank, D = {rows[0]['d']}, float32; {made_by(rows)}", ""]
    lines = []
    for count in (8, 64, 256, 1024):
        p = projection(count)
        lines.append([f"{p.ranks}", f"{p.keys:,}", f"{p.gathered_mb:.1f}", f"{p.reduced_mb:.1f}"])
        lines[-1] += [f"{p.detached_ms:.2f} ms", f"{p.learning_ms:.2f} ms", f"{p.compute_ms:.3f} ms"]
        lines[-1].append(f"{100 * p.share:.1f} %")
    head = ["GPUs", "keys", "gathered, MB", "reduced, MB", "network, keys detached", "network, both gradients"]
    text += table([*head, "products", "network's share of a step"], lines)
    limits = [largest_world(0.1, form) for form in FORMS]
    text += ["", "The network takes a tenth of a step at "]
    text[-1] += f"{limits[0]:,} GPUs with keys detached, and at {limits[1]:,} with gradients to both sides."
    return "\n".join(text)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"rows": one_row_a_workload},
    "docs/scaling.md": {"ranks": ranks},
    "docs/benchmarks.md": {
        "ways": which_way,
        "gpu": every_case("gpu"),
        "cpu": every_case("cpu"),
        "step": in_a_step,
        "engines": engines,
        "limits": machine_limits,
        "scaling": scaling,
    },
}
