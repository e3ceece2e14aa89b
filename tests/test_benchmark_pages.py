"""What is published is what was measured: the newest rows, with their ages, and nothing that a person copied."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import history, pages, report
from benchmarks.history import Age
from benchmarks.measure import RESULTS, Row, read_csv, write_csv
from benchmarks.runner import add_rows, place
from benchmarks.workloads import WORKLOADS


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the committed CSVs that pages are written from."""
    copy = tmp_path / "results"
    shutil.copytree(RESULTS, copy, ignore=lambda folder, names: [name for name in names if not name.endswith(".csv")])
    for module in (report, pages, history):
        monkeypatch.setattr(module, "RESULTS", copy)
    return copy


def gpu_row(**changes: str) -> Row:
    """One of ours that is committed, changed."""
    row = next(r for r in read_csv(RESULTS / "gpu.csv") if r["peer"] == "eqco_loss" and r["workload"] == "S1")
    return row | changes


def test_the_pages_and_figures_are_the_csvs() -> None:
    report.main(report.Args(check=True))


SECTION = {"gpu": "docs/benchmarks.md", "cpu": "docs/benchmarks.md", "step-cpu": "docs/benchmarks.md"}
SECTION |= {"engines": "docs/benchmarks.md", "scaling-cpu": "docs/benchmarks.md", "ranks": "docs/scaling.md"}


@pytest.mark.parametrize("name", SECTION)
def test_a_changed_figure_is_found_out(name: str, results: Path) -> None:
    """Whichever CSV it is in."""
    rows = read_csv(results / f"{name}.csv")
    column = next(x for x in ("graph_us", "us", "ms", "peak_extra_mb") if rows[0].get(x))
    write_csv(results / f"{name}.csv", [row | ({column: "1.234"} if row[column] else {}) for row in rows])
    with pytest.raises(SystemExit, match=f"{SECTION[name]}.*not what the CSVs say"):
        report.main(report.Args(check=True))


@pytest.mark.parametrize(
    ("page", "table"), [("README.md", pages.one_row_a_workload), ("docs/benchmarks.md", pages.which_way)]
)
def test_the_pages_have_their_tables(page: str, table: Callable[[], str]) -> None:
    text = (history.ROOT / page).read_text()
    assert history.without_marks(table()) in history.without_marks(text)  # of a tree without git, too
    assert page != "README.md" or "(docs/benchmarks.md)" in text


def test_the_readme_has_a_row_of_each_workload() -> None:
    """Also of those where ours loses."""
    titles = {one.title: one.workload for one in pages.SITUATIONS}
    assert {titles[title] for title in pages.ONE_A_WORKLOAD} == set(WORKLOADS) - {"R"}  # which is M1 at odd sizes


# ----------------------------------------------------------------------------------------------------------------- ages


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Three commits: kernels, a page, kernels again."""
    monkeypatch.setattr(history, "ROOT", tmp_path)
    history.age.cache_clear()
    history.position.cache_clear()
    (tmp_path / "eqco_loss/ops").mkdir(parents=True)
    call(tmp_path, "init", "--quiet")
    for name, text in (("eqco_loss/ops/kernel.py", "1"), ("page.md", "1"), ("eqco_loss/ops/kernel.py", "2")):
        (tmp_path / name).write_text(text)
        call(tmp_path, "add", "--all")
        call(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", name)
    yield tmp_path
    history.age.cache_clear()
    history.position.cache_clear()


def call(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_ages(repository: Path) -> None:
    commits = call(repository, "rev-list", "--reverse", "HEAD").splitlines()
    assert [history.age(x[:7]) for x in commits] == [Age.OLDER, Age.OLDER, Age.CURRENT]
    assert history.age("bf9cd70") is Age.UNKNOWN
    assert history.age(f"{commits[2][:7]}+changes") is Age.UNKNOWN
    assert [history.position(x) for x in (*commits, "bf9cd70")] == [1, 2, 3, None]
    history.age.cache_clear()
    (repository / "eqco_loss/ops/kernel.py").write_text("1")  # changed, and not committed
    assert [history.age(x) for x in commits] == [Age.CURRENT, Age.CURRENT, Age.OLDER]
    history.age.cache_clear()
    (repository / "eqco_loss/ops/kernel.py").write_text('"""A docstring."""\n# a comment\n2  # and another\n')
    (repository / "eqco_loss/ops/other.py").write_text("3")
    assert [history.age(x) for x in commits] == [
        Age.OLDER,
        Age.OLDER,
        Age.CURRENT,
    ]  # what git does not know is no change
    call(repository, "add", "--all")
    history.age.cache_clear()
    assert {history.age(x) for x in commits} == {Age.OLDER}


def test_what_runs_of_a_source() -> None:
    before = 'class A:\n    """A."""\n\n    def f(self):\n        """What f does."""\n        return """text"""\n'
    assert history.code_of(before) == history.code_of(before.replace("What f does", "f's answer").replace("A.", "B."))
    assert history.code_of(before) != history.code_of(before.replace("text", "other text"))
    assert history.code_of(before) != history.code_of(before.replace("f(self)", "g(self)"))


def test_without_git_ages_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the check passes all the same, on pages that were written with it."""
    history.age.cache_clear()
    history.position.cache_clear()
    monkeypatch.setattr(subprocess, "run", without_git)
    assert history.age("HEAD") is Age.UNKNOWN
    assert history.position("HEAD") is None
    row = gpu_row()
    assert history.mark(row) == " ‡"
    assert history.notes([row]) == [history.NOTES[Age.UNKNOWN]]
    report.main(report.Args(check=True))
    history.age.cache_clear()
    history.position.cache_clear()


def without_git(*arguments: object, **options: object) -> None:
    raise FileNotFoundError("git")


def test_marks_are_of_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ages = {"old": Age.OLDER, "new": Age.CURRENT}
    monkeypatch.setattr(history, "age", ages.__getitem__)
    assert history.mark(gpu_row(commit="old")) == " †"
    assert history.mark(gpu_row(commit="old", peer="eqco_loss, torch.compile")) == " †"
    assert history.mark(gpu_row(commit="old", peer="torch.compile")) == ""
    assert history.mark(gpu_row(commit="new")) == ""
    assert history.mark({"what": "the whole step, eqco_loss, K = 16", "commit": "old"}) == " †"
    assert history.mark({"engine": "wide", "commit": "old"}) == " †"
    text = "\n".join(" | ".join(line) for line in pages.case_lines([gpu_row(commit="old")], 10, True, {}))
    assert "eqco_loss †" in text


# --------------------------------------------------------------------------------------------------------- newest rows


def test_the_newest_row_of_a_case_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "position", {"a": 1, "b": 2, "new": None}.__getitem__)
    rows = [gpu_row(commit=commit, date=date) for commit, date in (("b", "2026-01-02"), ("a", "2026-01-02"))]
    key = history.KEYS["gpu"]
    assert history.newest(rows, key) == rows[:1]
    assert history.newest(rows[::-1], key) == rows[:1]
    assert history.newest([rows[0], rows[1] | {"date": "2026-01-03"}], key)[0]["commit"] == "a"
    assert history.newest([rows[0], rows[0] | {"commit": "new"}], key)[0]["commit"] == "new"  # it comes later
    assert len(history.newest([rows[0], rows[0] | {"device": "another"}, rows[0] | {"peer": "b"}], key)) == 3


@pytest.mark.parametrize(
    ("status", "goes"),
    [
        ("no time: three rounds take about 9 s, and 4 s are left", False),
        ("needs about 824 GB, over four fifths of the 23 that are free", False),
        ("out of memory", True),
        ("the case as a whole: fails: RuntimeError: no", False),
        ("too slow: a step took 31.0 s, over 30", False),
        ('lightly is not installed (No module): pip install -e ".[benchmarks]"', False),
        ("wrong: relative error 1.0e-02, over 2e-05", True),
        ("fails: RuntimeError: no such kernel", True),
        ("timed", True),
    ],
)
def test_a_row_that_says_nothing_of_a_way_leaves_what_was_measured(status: str, goes: bool, tmp_path: Path) -> None:
    """Whether a run is added to the committed rows or goes on with a CSV of its own."""
    old, new = gpu_row(date="2026-01-01"), gpu_row(date="2026-01-02", status=status)
    assert history.newest([old, new], history.KEYS["gpu"]) == [new if goes else old]
    assert history.newest([new, old], history.KEYS["gpu"]) == [new if goes else old]
    out = tmp_path / "gpu.csv"
    write_csv(out, [old])
    add_rows(out, [new])
    assert read_csv(out) == [new if goes else old]
    add_rows(out, [old])
    assert read_csv(out) == [old]


def test_a_peer_without_memory_leaves_what_was_measured() -> None:
    """Ours goes, as above: a user meets that, too."""
    old = gpu_row(date="2026-01-01", peer="lightly")
    assert history.newest([old, old | {"date": "2026-01-02", "status": "out of memory"}], history.KEYS["gpu"]) == [old]


def test_of_other_devices_what_they_measured_last_or_alone_is_shown(tmp_path: Path) -> None:
    """Beside all rows of the one with the most."""
    main = [gpu_row(date="2026-01-02", peer=peer) for peer in ("eqco_loss", "torch.compile")]
    older, newer = (gpu_row(date=f"2026-01-0{day}", device="another") for day in (1, 3))
    alone = older | {"n": "5"}
    others = [row | {"n": "6", "peer": row["peer"]} for row in main]
    write_csv(tmp_path / "gpu.csv", [*main, *others, older, alone])
    assert history.shown(tmp_path / "gpu.csv") == [*main, *others, alone]
    write_csv(tmp_path / "gpu.csv", [*main, *others, older, alone, newer])
    assert history.shown(tmp_path / "gpu.csv") == [*main, *others, alone, newer]
    assert history.of_one_device([newer, *main]) == main
    assert history.of_one_device([]) == history.shown(tmp_path / "none.csv") == []


def test_a_row_of_another_gpu_stands_under_its_own_name(results: Path) -> None:
    """One newer case changes nothing of what pages say of the GPU with the most rows."""
    before = pages.one_row_a_workload(), report.figures()["benchmarks-gpu.png"][1]
    pair = [row for row in read_csv(results / "gpu.csv") if (row["workload"], row["dtype"]) == ("M1", "bfloat16")]
    pair = [row | {"device": "NVIDIA RTX 4090", "date": "2999-01-01", "graph_us": "777"} for row in pair]
    write_csv(results / "gpu.csv", read_csv(results / "gpu.csv") + pair)
    engine = read_csv(results / "engines.csv")[0] | {"device": "NVIDIA RTX 4090", "us": "777", "date": "2999-01-01"}
    write_csv(results / "engines.csv", [*read_csv(results / "engines.csv"), engine])
    assert before == (pages.one_row_a_workload(), report.figures()["benchmarks-gpu.png"][1])
    h200, another, *_ = pages.which_way().split("| take |")[:3]
    assert h200.startswith("| NVIDIA H200 |")
    assert "777" not in h200 + another
    assert another.endswith("extra MB: compiled / ours ")
    assert "| NVIDIA RTX 4090 | GPU, us: compiled" in another
    for section in (pages.every_case("gpu")(), pages.engines()):
        first, second = section.split("NVIDIA H200, torch", 1)
        assert "777" not in first
        assert "777" in second
        assert second.rindex("NVIDIA RTX 4090, torch") > second.index("777")
    assert "### M1: MoCo: N queries against a queue of K detached keys, NVIDIA RTX 4090" in pages.every_case("gpu")()


def test_a_run_is_added(results: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    new = gpu_row(graph_us="12.5", date="2999-01-01", commit="new")
    another = gpu_row(n="4", date="2999-01-01")
    write_csv(run / "gpu.csv", [new, another])
    before = read_csv(results / "gpu.csv")
    history.add(run, place)
    after = read_csv(results / "gpu.csv")
    assert len(after) == len(before) + 1
    assert new in after
    assert gpu_row() not in after
    assert [row for row in after if place(row) == place(new)][-1] == new  # by which a tree without git knows it
    history.add(run, place)  # once more changes nothing
    assert read_csv(results / "gpu.csv") == after


def test_what_cannot_be_added(results: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(
        SystemExit, match=r"has no CSV of a run\. Its names begin with gpu, cpu, scaling, step, engines"
    ):
        report.main(report.Args(add=run))
    write_csv(run / "gpu.csv", [{"workload": "S1"}])
    with pytest.raises(SystemExit, match=r"gpu.csv is cut, or has other columns than"):
        report.main(report.Args(add=run))
    with pytest.raises(SystemExit, match="check, add: expected one of them"):
        report.main(report.Args(add=run, check=True))


# ------------------------------------------------------------------------------------------------ what a page says


@pytest.mark.parametrize(
    ("status", "counts", "text"),
    [
        ("0", ("343", "0", "2"), "343 passed, 0 failed, 2 skipped"),
        ("1", ("342", "1", "2"), "342 passed, 1 failed, 2 skipped"),
        ("124", ("6", "0", "0"), "stopped after 6 passed, 0 failed, 0 skipped, status 124"),
        ("124", ("", "", ""), "stopped before they ended, status 124"),
        ("2", ("6", "1", "0"), "stopped after 6 passed, 1 failed, 0 skipped, status 2"),
        ("1", ("", "", ""), "did not run, status 1"),  # no pytest
        ("4", ("", "", ""), "did not run, status 4"),  # no pytest-xdist
    ],
)
def test_what_the_tests_showed_on_a_gpu(
    status: str, counts: tuple[str, ...], text: str, results: Path, tmp_path: Path
) -> None:
    """Counts read as those of all tests where these ended, and nowhere else."""
    run = tmp_path / "run"
    run.mkdir()
    origin = {"device": "a GPU", "torch": "2.11", "triton": "3.6", "commit": "0000000", "date": "2027-01-02"}
    row = dict(zip(("status", "passed", "failed", "skipped"), (status, *counts), strict=True))
    write_csv(run / "tests-gpu.csv", [row | origin])
    history.add(run, place)
    page = pages.every_case("gpu")()
    assert f"Tests of the kernels on it: {text} ‡; a GPU, torch 2.11, commits 0000000" in page


def test_those_that_beat_us_come_first_and_what_is_missing_is_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "age", lambda commit: Age.CURRENT)
    ours = gpu_row(times_faster_graph="5", times_faster="2")
    rows = [
        ours,
        gpu_row(peer="slow", times_faster_graph="2.5", times_faster="1"),
        gpu_row(peer="sooner", times_faster_graph="3", times_faster="4", host_ms="0.5"),
        gpu_row(peer="fast", times_faster_graph="20", times_faster="1.5", peak_extra_mb=""),
        gpu_row(peer="waiting", graph_us="", no_graph="waits for the host", times_faster="1", times_faster_graph=""),
        gpu_row(peer="absent", status="out of memory") | dict.fromkeys(pages.FASTER, ""),
    ]
    first, *lines = pages.case_lines(rows, 9, True, {})
    assert first[0].endswith("faster than ours: fast (4.00 x on the GPU); sooner (2.00 x in wall-clock)")
    assert [line[0].strip("*") for line in lines] == [
        "fast",
        "eqco_loss",
        "sooner",
        "slow",
        "waiting",
        "absent",
    ]
    assert lines[0][6] == ""
    assert lines[4][1:3] == ["waits for the host", ""]
    assert lines[5][1] == "out of memory"
    assert pages.faster_than_ours([ours]) == "nobody is faster than ours"
    assert pages.faster_than_ours(rows[1:]) == "ours has not been measured"
    alone = ours | dict.fromkeys(pages.FASTER, "")
    assert pages.faster_than_ours([alone, *rows[1:]]).startswith("nobody has been compared with ours")


def test_ways_of_two_turns_are_compared_over_the_plain_code_of_each() -> None:
    """A turn of a quicker machine makes nobody faster: 1.3 times our ms, and 0.8 of what ours is over plain code."""
    ours = gpu_row(ms="1.618", times_faster="1.263", graph_us="60", times_faster_graph="6.9")
    other = gpu_row(peer="other", ms="1.209", times_faster="1.019", graph_us="50", times_faster_graph="1.5")
    assert pages.times_faster(other, ours, "times_faster") == pytest.approx(1.019 / 1.263)
    assert pages.times_faster(other, ours | {"times_faster_graph": ""}, "times_faster_graph") is None
    assert pages.faster_than_ours([ours, other]) == "nobody is faster than ours"
    assert pages.advice(ours, other) == "ours"
    assert [line[0].strip("*").split()[0] for line in pages.case_lines([other, ours], 9, True, {})[1:]] == [
        "eqco_loss",
        "other",
    ]


def test_counts_of_tests_are_those_of_a_csv() -> None:
    """A page's own words have none, since no row would tell of them."""
    text = (history.ROOT / "docs/benchmarks.md").read_text()
    for section in pages.PAGES["docs/benchmarks.md"]:
        text = report.between_markers(text, section, "")
    assert re.findall(r"\d+ (?:were |was )?(?:passed|failed|skipped)|\d+ tests", text) == []


def test_why_a_gpus_time_is_blank() -> None:
    """A failure of the whole turn is not told as one of a way, and no blank is left without a reason."""
    blank = {"graph_us": "", "times_faster_graph": ""}
    failed = gpu_row(peer="eqco_loss, torch.compile", no_graph="no CUDA graph: CUDA error") | blank
    replays = gpu_row(peer="eqco_loss, make_graphed_callables", times_faster_graph="")
    again = "that run captured plain code neither: to be measured again"
    assert pages.no_graph(failed, [gpu_row(), failed]) == "no CUDA graph: CUDA error"
    assert pages.no_graph(failed, [gpu_row(), failed, replays]) == again
    assert pages.no_graph(failed, [failed, replays | {"commit": "another"}]) == "no CUDA graph: CUDA error"
    waits = failed | {"no_graph": "waits for the host"}
    assert pages.no_graph(waits, [waits, replays]) == "waits for the host"
    assert pages.no_graph(failed | {"no_graph": ""}, [failed]) == "that run kept no reason"
    assert pages.case_lines([failed | {"no_graph": ""}], 9, True, {})[1][1] == "that run kept no reason"


def test_where_a_gpu_loses_is_told() -> None:
    """The README and the table of ways have every case in which the GPU takes longer than for compiled plain code."""
    rows = [row for row in history.shown(RESULTS / "gpu.csv") if row["times_faster_graph"] and row["layout"] == "rows"]
    cases = {pages.case_of(row) for row in rows}
    found = {(case, row["peer"]): row for case in cases for row in rows if pages.case_of(row) == case}
    for case in cases:
        pair = found.get((case, "eqco_loss")), found.get((case, "torch.compile"))
        if pair[0] and pair[1] and (pages.times_faster(pair[0], pair[1], "times_faster_graph") or 1) < 1:
            (one,) = (x for x in pages.SITUATIONS if (x.workload, x.n, x.d) == (case.workload, case.n, case.d))
            assert one.title in pages.ONE_A_WORKLOAD
            assert f"| {one.title}, {case.dtype} |" in pages.which_way()


def test_the_readme_names_the_dtype_of_each_figure(results: Path) -> None:
    """The first of several that was measured, which another run may change."""
    rows = [row | {"dtype": "amp"} if row["workload"] == "T1" else row for row in read_csv(results / "gpu.csv")]
    assert "| dual temperature, the same queue | bfloat16: 38.2 us" in pages.one_row_a_workload()
    write_csv(results / "gpu.csv", rows)
    assert "| dual temperature, the same queue | amp: 38.2 us" in pages.one_row_a_workload()


def test_figures_are_for_a_person() -> None:
    assert [pages.number(x, ".4g") for x in ("", "0.8743", "84.21", "33142.7", "1021")] == [
        "",
        "0.8743",
        "84.21",
        "33,140",
        "1021",
    ]


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        (("10", "2"), "torch.compile"),
        (("6", "9"), "either"),
        (("4", "9"), "ours; in a CUDA graph where the GPU waits for Python"),
        (("4", "3"), "ours"),
        (("", "9"), "torch.compile"),
        (("", "2.95"), "either"),
        (("", "2"), "ours"),
        (("4", ""), ""),
    ],
)
def test_advice(plain: tuple[str, str], expected: str) -> None:
    compiled = gpu_row(**dict(zip(pages.FASTER, plain, strict=True)))
    assert pages.advice(gpu_row(times_faster_graph="6", times_faster="3"), compiled) == expected


def test_no_row_is_above_the_limit() -> None:
    """Of no CSV; and a row for which another count of operations was taken has none."""
    for path in (RESULTS / f"{name}.csv" for name in ("cpu", "gpu", "scaling-cpu")):
        most = pages.most_of(history.shown(path))
        shares = [pages.limit_share(row, most) for row in history.shown(path) if row["status"] == "timed"]
        assert any(shares)
        assert all(float(share.removesuffix(" %")) <= 100 for share in shares if share)
    row = gpu_row(limit_share="0.5", limit_operations="")
    assert pages.limit_share(row, {}) == "50 %"
    assert pages.limit_share(row | {"operations": "1e+09"}, {}) == ""


def test_all_rows_of_a_device_are_held_against_the_same_limit() -> None:
    """The best of all runs: of one that found a slow GPU, one that kept no limit, and a way beyond both."""
    case = pages.case_of(gpu_row())
    good = gpu_row(limit_operations=str(4 * case.operations), limit_bytes="1e30", graph_us="1e6")
    low = good | {"peer": "low", "limit_operations": str(2 * case.operations), "limit_share": "0.5"}
    none = good | {"peer": "none", "limit_operations": "", "limit_bytes": "", "operations": "1e+09"}
    other = good | {"device": "another", "limit_operations": str(8 * case.operations)}
    most = pages.most_of([good, low, none, other, good | {"status": "out of memory", "graph_us": "", "ms": ""}])
    assert [pages.limit_share(row, most) for row in (good, low, none, other)] == ["25 %", "25 %", "25 %", "12.5 %"]
    fast = good | {"peer": "fast", "graph_us": "1e5"}
    most = pages.most_of([good, fast])
    assert [pages.limit_share(row, most) for row in (good, fast)] == ["10 %", "100 %"]
    assert pages.limit_share(good | {"status": "out of memory"}, most) == ""


def test_a_cpus_copies_are_as_large_as_the_case() -> None:
    """A cache's rate is no limit of a case that no cache holds."""
    small = gpu_row(kernels="", graph_us="", ms="1e6", limit_operations="1e30", limit_bytes="1e30")
    large = small | {"n": "65536", "k": "65535", "limit_bytes": str(pages.case_of(small).bytes)}
    most = pages.most_of([small, large])
    assert float(pages.limit_share(small, most).split()[0]) < 1e-9
    assert float(pages.limit_share(large, most).split()[0]) == pytest.approx(100 * 16 / 1e3)


def test_growth_is_shown_of_a_cpu_and_a_gpu() -> None:
    """Against K and N; ours is in each of the figure's columns, in time and in memory."""
    import matplotlib

    matplotlib.use("Agg")
    rows = report.growing("cpu") + report.growing("gpu")
    figure = report.draw_growth(rows)
    titles = " ".join(axis.get_title() for axis in figure.axes)
    assert all(row["device"] in titles for row in rows if row["workload"] == "S1")
    assert {axis.get_xlabel() for axis in figure.axes} == {"", "K", "N"}
    for axis in figure.axes:
        ours = next(line for line in axis.lines if line.get_label() == "eqco_loss")
        assert len(ours.get_xdata()) > 1


def test_a_gpus_milliseconds_are_no_wall_clock() -> None:
    """A point without a graph is blank in a table, and a gap in a figure."""
    import matplotlib

    matplotlib.use("Agg")
    points = [
        gpu_row(workload="S1", n=str(n), d="128", graph_us=us, ms="999") for n, us in ((1, "1e3"), (2, ""), (4, "4e3"))
    ]
    (table,) = pages.sweeps(points, "n", ("d",))
    assert "| N | GPU ms: ours |" in table
    assert [line.split("|")[2].split()[:1] for line in table.splitlines()[4:7]] == [["1"], [], ["4"]]
    figure = report.draw_sweeps([("n", points, "a title")])
    first, middle, last = figure.axes[0].lines[0].get_ydata()
    assert (first, last) == (1.0, 4.0)
    assert middle != middle
    (table,) = pages.sweeps([row | {"graph_us": ""} for row in points], "n", ("d",))
    assert "| N | ms: ours |" in table
    assert table.count("999") == 3


def test_the_newest_row_of_a_width_counts(results: Path) -> None:
    """Of the sweep's and the matrix's, which have cases in common."""
    old = gpu_row(workload="S1", n="1024", k="1023", date="2026-01-01", graph_us="1e3")
    new = [
        old | {"d": d, "graph_us": us, "date": "2026-01-02"} for d, us in (("32", "2e3"), ("64", "3e3"), ("128", "4e3"))
    ]
    write_csv(results / "gpu.csv", [old | {"d": "128"}])
    write_csv(results / "scaling-gpu.csv", new)
    part = next(part for part in pages.scaling().split("\n\n") if "| 128 |" in part)
    assert [line.split("|")[2].split()[0] for line in part.splitlines()[-3:]] == ["2", "3", "4"]


def test_scaling_in_d_is_a_table_and_a_column_of_the_figure() -> None:
    import matplotlib

    matplotlib.use("Agg")
    rows = history.shown(RESULTS / "scaling-cpu.csv")
    rows = [row for row in rows if row["peer"] == "eqco_loss" and row["d"] == "128"]
    one = next(row for row in rows if row["workload"] == "S1" and row["n"] == "1024")
    widths = [one | {"d": d, "ms": ms} for d, ms in (("32", "3"), ("64", "4"), ("256", "5"))]
    assert report.draw_scaling(rows).axes[0].get_subplotspec().get_gridspec().ncols == 2
    figure = report.draw_scaling(rows + widths)
    assert figure.axes[0].get_subplotspec().get_gridspec().ncols == 3
    assert list(figure.axes[2].lines[0].get_xdata()) == [32, 64, 128, 256]
    (table,) = pages.sweeps([row for row in rows + widths if row["workload"] == "S1"], "d", ("n",))
    assert "S1 against D: N = 1024, float32" in table
    assert "| 32 | 3" in table
