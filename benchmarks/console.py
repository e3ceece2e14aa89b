"""A case's rows on the terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm

from .measure import Row
from .workloads import WORKLOADS, Case


def show(case: Case, rows: list[Row]) -> None:
    tqdm.write(f"\n{case.workload} {case.dtype}: {WORKLOADS[case.workload].title}; {case.size}")
    graph = any(row["graph_us"] for row in rows)
    head = f"{'':42}{'fwd ms':>9}{'ms':>9}{'min-max':>17}{'x':>7}"
    head += f"{'graph us':>10}{'x':>7}{'kernels':>9}" if graph else ""
    tqdm.write(head + f"{'MB':>9}{'of limit':>10}{'error':>10}")
    for row in rows:
        if row["status"] != "timed":
            tqdm.write(f"{row['peer']:42}  {row['status']}")
            continue
        line = f"{row['peer']:42}{row['forward_ms']:>9}{row['ms']:>9}{row['min_ms'] + '-' + row['max_ms']:>17}"
        line += f"{shorter(row['times_faster']):>7}"
        if graph:
            line += f"{row['graph_us']:>10}{shorter(row['times_faster_graph']):>7}{row['kernels']:>9}"
        line += f"{row['peak_extra_mb']:>9}{percent(row['limit_share']):>10}{row['relative_error']:>10}"
        tqdm.write(f"{line}   {row['no_graph']}".rstrip())
    sys.stdout.flush()  # a run that is killed has shown what was finished


def shorter(ratio: str) -> str:
    return f"{float(ratio):.2f}" if ratio else ""


def percent(share: str) -> str:
    return f"{100 * float(share):.0f} %"
