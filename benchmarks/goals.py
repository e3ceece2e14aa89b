"""What our kernels should take on an H200, in order of worth, and what a run shows of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .history import CASE, is_ours
from .measure import Row, read_csv, write_csv
from .workloads import Case

JUDGED = "H200"
BROKEN = ("wrong", "fails", "out of memory", "the case as a whole")  # how the status of a row of ours begins


class Goal(NamedTuple):
    """A case and what it should take on an H200, in microseconds of a CUDA graph."""

    case: Case
    us: float | None = None


GOALS = [  # in order of worth
    Goal(Case("M1", 256, 65536, dtype="bfloat16"), 28),
    Goal(Case("S1", 4096, 4095, dtype="bfloat16"), 60),
    Goal(Case("C1", 4096, 4095, 512, "amp"), 140),
    Goal(Case("S2", 4096, 8190, dtype="bfloat16"), 135),
    Goal(Case("P1", 256, 16, dtype="amp"), 12),
    Goal(Case("M1", 256, 65536, dtype="amp"), 40),
    Goal(Case("C1", 4096, 4095, 1024, "amp"), 250),
    Goal(Case("S1", 4096, 4095, 256, "bfloat16"), 100),
    Goal(Case("M2", 256, 65536, dtype="bfloat16"), 60),
    Goal(Case("C1", 4096, 4095, 768, "amp")),
    Goal(Case("T1", 256, 65536, dtype="bfloat16"), 38),
    Goal(Case("M1", 1024, 65536, dtype="bfloat16"), 80),
    Goal(Case("S1", 4096, 4095, dtype="amp")),
    Goal(Case("C1", 32768, 32767, 768, "bfloat16"), 13000),
    Goal(Case("M1", 256, 65536), 180),
    Goal(Case("M1", 256, 65536, dtype="high"), 80),
    Goal(Case("S1", 16384, 16383, dtype="bfloat16"), 600),
    Goal(Case("S2", 32768, 65534, dtype="bfloat16"), 6500),
]


class Run(NamedTuple):
    """A file may have rows of another device, of another commit or of an earlier run, which say nothing of this one."""

    path: Path
    origin: Row
    earlier: list[Row]

    @classmethod
    def begin(cls, path: Path, origin: Row, anew: bool) -> Run:
        """A row of before is known by its times, which never agree; failures may, so ours go if cases run ``anew``."""
        run = cls(path, origin, [])
        earlier = read_csv(path) if path.exists() else []
        kept = [row for row in earlier if row["status"] == "timed" or not (anew and is_ours(row) and run.made(row))]
        if kept and kept != earlier:
            write_csv(path, kept)
        elif earlier and not kept:
            path.unlink()
        return run._replace(earlier=kept)

    def made(self, row: Row) -> bool:
        return all(row[name] == self.origin[name] for name in ("device", "commit"))

    def rows(self) -> list[Row]:
        found = read_csv(self.path) if self.path.exists() else []
        return [row for row in found if self.made(row) and row not in self.earlier]


def table(rows: list[Row], device: str) -> str:
    """Each goal is met, missed or not run, or ours has no time and a reason, by the rows of one run."""
    found = {(*case_of(row), row["peer"]): row for row in rows}
    judged = JUDGED in device
    lines = [f"{'GPU, us':44}{'wanted':>9}{'is':>9}   torch.compile"]
    verdicts: Counter[str] = Counter()
    for case, us in GOALS:
        key = (case.workload, str(case.n), str(case.k), str(case.d), case.layout, case.dtype)
        ours, rival = found.get((*key, "eqco_loss")), found.get((*key, "torch.compile"))
        measured = ours["graph_us"] if ours else ""
        told = verdict(ours, us if judged else None)
        verdicts[told if told in ("met", "missed", "not run", "") else "broken"] += 1
        compared = measured and rival and rival["graph_us"]
        ratio = f"{float(rival['graph_us']) / float(measured):.2f} x" if compared and rival else ""
        title = f"{case.workload} {case.dtype} {case.size:30}"[:44]
        lines.append(f"{title:44}{'' if us is None else f'{us:g}':>9}{measured:>9}   {ratio:8} {told}".rstrip())
    counts = ", ".join(f"{verdicts[name]} {name}" for name in ("met", "missed", "broken", "not run"))
    if not judged:
        counts = f"The goals are those of an {JUDGED}, and this is another GPU ({device}): none is met or missed."
    return "\n".join([*lines, counts])


def verdict(ours: Row | None, us: float | None) -> str:
    if ours is None:
        return "not run"
    if ours["status"] != "timed":
        return ours["status"]
    if not ours["graph_us"]:
        return ours["no_graph"] or "no time of the GPU"
    return "" if us is None else "met" if float(ours["graph_us"]) <= us else "missed"


def broken(rows: list[Row]) -> list[str]:
    """The rows in which a way of ours is wrong or fails, be it only as a graph."""
    found = []
    for row in filter(is_ours, rows):
        reason = row["no_graph"] if "wrong: " in row["no_graph"] else row["status"]
        if reason is row["no_graph"] or reason.startswith(BROKEN):
            found.append(f"{' '.join(case_of(row))}, {row['peer']}: {reason}")
    return found


def case_of(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in CASE)
