"""The README and the pages are executed: python blocks from top to bottom, and every command names what exists."""

import ast
import csv
import importlib.util
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import eqco_loss
from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue, functional

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "examples" / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SHELLS = ("bash", "sh", "shell", "console")
OF_DOCS = {"mkdocs"}  # programs of the extra "docs", which are not among the tests'

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """(line, text) of a page's fenced blocks in these languages."""
    text = page.read_text()
    found = re.finditer(r"^[ ]*```[ ]*(\w+)[^\n]*\n(.*?)^[ ]*```[ ]*$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 1, m[2]) for m in found if m[1] in languages]


def test_readme_has_python_and_commands() -> None:
    assert blocks(README, "python"), "no python block"
    assert blocks(README, *SHELLS), "no shell block"


@each_page
def test_every_fence_says_its_language(page: Path) -> None:
    """A block without a language would be skipped in silence."""
    fences = re.findall(r"^[ ]*```[ ]*(\S*)", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0
    opening = set(fences[::2])
    assert opening <= {"python", *SHELLS, "text", "bibtex", "toml", "yaml", "diff"}, (
        f"unknown or unnamed fences: {opening}"
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks(page: Path) -> None:
    """The blocks of a page share one namespace, top to bottom."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def commands(page: Path) -> list[tuple[int, str]]:
    """(line, command), continuation lines joined, comments and prompts and what a command printed left out."""
    found = []
    for line, text in blocks(page, *SHELLS):
        prompted = any(row.startswith("$ ") for row in text.splitlines())
        for row in re.sub(r"\\\n\s*", " ", text).splitlines():
            row = row.strip()
            if prompted:
                if not row.startswith("$ "):
                    continue
                row = row[2:]
            if row and not row.startswith("#"):
                found.append((line, row))
    return found


def simple_commands(command: str) -> list[list[str]]:
    """Split at && ; | and take environment assignments off the front."""
    parts: list[list[str]] = [[]]
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    for token in lexer:
        if set(token) <= set("&;|()"):
            parts.append([])
        else:
            parts[-1].append(token)
    out = []
    for part in parts:
        while part and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", part[0]):
            part = part[1:]
        if part:
            out.append(part)
    return out


def flags_of(script: Path) -> set[str]:
    """Flags that tyro makes of the dataclasses in a script and beside it, and those that argparse is told of."""
    known = {"--help", "-h"}
    for path in script.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        name = field.target.id.replace("_", "-")
                        known |= {f"--{name}", f"--no-{name}"}
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.fullmatch(r"--?[\w-]+", node.value)
            ):
                known.add(node.value)
    return known


def check_flags(script: Path, arguments: list[str]) -> None:
    known = flags_of(script)
    for argument in arguments:
        if argument.startswith("-") and not re.fullmatch(r"-\d.*", argument):
            flag = argument.split("=")[0].replace("_", "-") if argument.startswith("--") else argument
            assert flag in known, f"{script.name} has no {flag}"


def check_python(arguments: list[str]) -> None:
    while arguments and arguments[0] in ("-W", "-X"):
        arguments = arguments[2:]
    if not arguments or arguments[0] == "-c":
        return
    if arguments[0] == "-m":
        module = arguments[1]
        where = ROOT.joinpath(*module.split("."))
        if where.is_dir():
            assert (where / "__main__.py").exists(), f"{module} cannot be run"
            check_flags(where / "__main__.py", arguments[2:])
        elif where.with_suffix(".py").exists():
            check_flags(where.with_suffix(".py"), arguments[2:])
        else:
            assert importlib.util.find_spec(module.split(".")[0]), f"no module {module}"
            check_paths(arguments[2:])
        return
    script = ROOT / arguments[0]
    assert script.exists(), f"{arguments[0]} does not exist"
    check_flags(script, arguments[1:])


def check_paths(arguments: list[str]) -> None:
    """What looks like a path of the project must be there."""
    for argument in arguments:
        if argument.split("/")[0] in {p.name for p in ROOT.iterdir()} and "/" in argument:
            assert (ROOT / argument.split("::")[0]).exists(), f"{argument} does not exist"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=f"{page.relative_to(ROOT)}:{line}: {command}")
        for page in PAGES
        for line, command in commands(page)
    ],
)
def test_shell_command(command: str) -> None:
    """Scripts exist, modules can be run, flags are fields of the script's arguments, programs are known."""
    for words in simple_commands(command):
        program, arguments = words[0], words[1:]
        if program in ("python", "python3", "torchrun"):
            while program == "torchrun" and arguments[0].startswith("--"):  # torchrun's own flags, with or without "="
                arguments = arguments[1 if "=" in arguments[0] else 2 :]
            check_python(arguments)
        elif program in ("pip", "git", "cd", "uv", "source", "ls", "cat"):
            check_paths(arguments)
        elif "/" in program or program.startswith("."):
            assert (ROOT / program).exists(), f"{program} does not exist"
        elif program not in OF_DOCS:
            assert shutil.which(program) or importlib.util.find_spec(program), f"{program} is not there"
            check_paths(arguments)


@each_page
def test_links_to_files_exist(page: Path) -> None:
    """Images and files that a page points at, and headings of other pages."""
    targets = re.findall(r"\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"", page.read_text())
    for target in (a or b for a, b in targets):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{file.name} has no heading #{anchor}, but {anchors(file)}"


def test_scripts_that_a_text_names_are_there() -> None:
    """In pages, docstrings, comments, results and the notebook: nobody is sent to an old place."""
    kinds = ("*.md", "*.py", "*.ipynb", "*.toml", "*.yml")
    texts = [
        path
        for kind in kinds
        for place in ("docs", "eqco_loss", "examples", "benchmarks", "tests", ".github")
        for path in (ROOT / place).rglob(kind)
    ]
    texts += [path for path in ROOT.glob("*.*") if path.suffix in (".md", ".toml", ".yml", ".cff")]
    for path in texts:
        for script in re.findall(r"\bexamples/[\w/]+\.py\b", path.read_text()):
            assert (ROOT / script).exists(), f"{path.relative_to(ROOT)}: {script}"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, where mkdocs and GitHub make the same of them: of plain words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", text) for text in words} & {re.sub(r"[\s-]+", "-", text) for text in words}


@each_page
def test_tests_that_a_page_names_exist(page: Path) -> None:
    """`test_file.py::test_one`, and `test_two` after it."""
    for file in re.findall(r"\btest_\w+\.py", page.read_text()):
        assert (ROOT / "tests" / file).exists(), f"{file} does not exist"
    file = ""
    for named, test in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", page.read_text()):
        file = named or file
        assert file, f"{test}: of which file?"
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"


def test_every_page_is_in_the_sites_navigation() -> None:
    """`mkdocs build --strict` says whether what is in it exists."""
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\nplugins:")[0]
    assert {page.name for page in DOCS} <= set(re.findall(r"\w+\.md", navigation))


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {eqco_loss.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == eqco_loss.__version__


def test_the_description_for_package_indexes_has_no_relative_links() -> None:
    """What pyproject.toml substitutes in the README, where none of the repository's files are beside it."""
    section = (ROOT / "pyproject.toml").read_text().split("[tool.hatch.metadata.hooks.fancy-pypi-readme]")[1]
    rules = re.findall(r"pattern = '(.+)', replacement = ['\"](.*)['\"]", section.split("\n[")[0])
    assert len(rules) == 3
    text = README.read_text()
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    assert [
        line for line in text.splitlines() if re.search(r"\]\((?!https?:|mailto:|#)|<img (?!.*https?:)", line)
    ] == []
    code = r"^```.*?^```"
    blocks_of = [re.findall(code, page, re.MULTILINE | re.DOTALL) for page in (README.read_text(), text)]
    assert blocks_of[0] == blocks_of[1]


def test_the_citation_has_both_papers() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    for title, arxiv in (("EqCo: Equivalent Rules", "2010.01929"), ("Dual Temperature Helps", "2203.17248")):
        paper = text.split(title)[1].split("\n  - type:")[0]
        assert f'\n    url: "https://arxiv.org/abs/{arxiv}"' in paper
        assert f"10.48550/arXiv.{arxiv}" in paper
        assert f"(https://arxiv.org/abs/{arxiv})" in README.read_text()


def test_the_readmes_losses_run() -> None:
    """Each call of the table "Which loss, for your case"."""
    table = README.read_text().split("## Which loss")[1].split("##")[0]
    calls = re.findall(r"`((?:EqCoLoss|DualTempInfoNCE|functional)[^`]*)`", table)
    assert len(calls) >= 6
    n, d = 16, 8
    q, k, i, t = (torch.randn(n, d) for _ in range(4))
    queue = MomentumQueue(32, d)
    queue.enqueue(k)
    names: dict[str, object] = {"q": q, "k": k, "image": i, "text": t, "queue": queue}
    names |= {"hard": torch.randn(n, 3, d), "scale": torch.tensor(2.0)}
    names |= {"EqCoLoss": EqCoLoss, "DualTempInfoNCE": DualTempInfoNCE, "functional": functional}
    for call in calls:
        found = eval(call, names)
        loss = found if isinstance(found, torch.Tensor) else found(q, k)
        assert loss.isfinite(), call


def test_a_first_loss_is_what_the_readme_says() -> None:
    """Of its block's random pairs, of pairs that tell nothing, and of positives among orthogonal negatives."""
    said = re.search(r"# ([\d.]+): .* log\(1 \+ alpha\) = ([\d.]+), perfect ones ([\d.]+)", README.read_text())
    assert said is not None
    criterion = EqCoLoss(temperature=0.2, alpha=65536, num_negatives=16)
    torch.manual_seed(0)
    unrelated = [criterion(torch.randn(256, 128), torch.randn(256, 128)).item() for _ in range(20)]
    perfect = criterion(torch.eye(256), torch.eye(256)).item()
    found = sum(unrelated) / 20, math.log(1 + 65536), perfect
    assert [f"{value:.1f}" for value in found] == list(said.groups())


def test_the_first_run_is_what_was_measured() -> None:
    """The spread over machines of its kNN and of its time is that of examples/results/first_run.csv."""
    with (ROOT / "examples" / "results" / "first_run.csv").open() as file:
        rows = list(csv.DictReader(file))

    def spread(column: str) -> str:
        values = sorted(float(row[column]) for row in rows if row[column])
        return f"{values[0]:g} to {values[-1]:g}"

    untrained, knn, time = (spread(column) for column in ("untrained_knn", "knn", "seconds"))
    for page in (README, EXAMPLES / "README.md"):
        text = " ".join(page.read_text().split())
        assert f"kNN is {untrained} % untrained and {knn} % at the end" in text
        assert f"it takes {time} seconds on two idle cores." in text
    for page in [*PAGES, *EXAMPLES.rglob("*.py")]:  # and nowhere else, or otherwise
        text = " ".join(page.read_text().split())
        said = re.findall(r"([\d.]+) % (?:untrained|before training)", text)
        assert set(said) <= {untrained.split()[-1]}, page
        assert set(re.findall(r"(\d+) seconds on two idle cores", text)) <= {time.split()[-1]}, page


def test_the_digits_are_what_was_measured() -> None:
    """Each method's row is of results/digits/runs.csv, its kNN the curve's last, and SiMo's one of the first runs'."""
    folder = EXAMPLES / "results" / "digits"
    with (folder / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    text = (EXAMPLES / "README.md").read_text()
    for run in runs:
        assert f"| `{run['command']}` | {run['knn']} % | {run['linear_probe']} % |" in text
        with (folder / run["run"] / "metrics.csv").open() as file:
            curve = [row["knn"] for row in csv.DictReader(file) if row["knn"]]
        assert [f"{float(knn):.1f}" for knn in (curve[0], curve[-1])] == [run["untrained_knn"], run["knn"]]
    assert len({(run["commit"], run["torch"], run["cpu"], run["threads"]) for run in runs}) == 1
    assert {run["run"] for run in runs} == {path.parent.name for path in folder.glob("*/metrics.csv")}
    with (EXAMPLES / "results" / "first_run.csv").open() as file:
        first = [(row["knn"], row["linear_probe"]) for row in csv.DictReader(file)]
    assert (runs[0]["knn"], runs[0]["linear_probe"]) in first


def cells(grid: str, start: str) -> list[list[str]]:
    """Of the rows of a grid in docs/results.md, which is written from its CSV, that start so."""
    rows = (ROOT / "docs" / "results.md").read_text().split(f"--grid {grid}`")[1].split("##")[0].splitlines()
    return [[cell.strip() for cell in row.split("|")] for row in rows if row.startswith(start)]


def test_the_grids_tables_are_of_the_page_of_results() -> None:
    """Each kNN (linear probe) of the examples' page."""
    text = (EXAMPLES / "README.md").read_text()

    def means(rows: list[list[str]], column: int) -> list[str]:
        return [f"{row[column].split(' ±')[0]} ({row[column + 1].split(' ±')[0]})" for row in rows]

    for loss in ("EqCo, alpha = 256", "InfoNCE"):
        by_k = means([row for row in cells("digits-k", "| SiMo |") if row[3] == loss], 5)
        assert f"| {loss} | {' | '.join(by_k)} |" in text
    for name, grid, start in (
        ("Table 3, SiMo", "alpha", "| SiMo |"),
        ("Table 4, MoCo v2", "alpha", "| MoCo v2 |"),
        ("Figure 3 (b), SimCLR", "alpha", "| SimCLR |"),
        ("Table 1, MoCo v2", "batch", "| MoCo v2 |"),
        ("Table 6, SiMo", "momentum", "| SiMo |"),
        ("Table 7, SiMo", "norm", "| SiMo |"),
    ):
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {name}"))
        found = cells(grid, start)
        assert row.split("|")[2].split(":")[0].strip() == ", ".join(means(found, 4))
        assert row.split("|")[3].strip() == ", ".join(line[6] for line in found)


def test_what_alpha_does_is_of_the_page_of_results() -> None:
    """SiMo's least and most over alpha, of the paper and of ours."""
    found = cells("alpha", "| SiMo |")
    paper, knn = ([float(row[column].split(" ")[0]) for row in found] for column in (6, 4))
    text = " ".join((ROOT / "docs" / "negatives.md").read_text().split())
    assert f"from alpha = {found[0][2]} to {found[-1][2]} SiMo has {min(paper)} to {max(paper)} % on ImageNet" in text
    assert f"on digits {max(knn)} to {min(knn)} % of kNN" in text


def test_the_claim_is_of_the_page_of_results() -> None:
    """What four negatives give with and without EqCo, with the spread over seeds, and the paper's figures."""
    four = {row[3].split(",")[0]: row for row in cells("digits-k", "| SiMo | 4 |")}
    assert {row[4] for row in four.values()} == {"3"}
    text = " ".join(README.read_text().split())
    knn = f"a kNN of {four['EqCo'][5]} % with EqCo and {four['InfoNCE'][5]} % without it (three seeds)"
    assert knn in text
    small = {row[3].split(",")[0]: row for row in cells("cifar10-small", "| SiMo | 4 |")}
    assert {row[4] for row in small.values()} == {"3"}
    knn = f"{small['EqCo'][5]} % and {small['InfoNCE'][5]} %"
    assert f"on CIFAR-10, a small network for ten epochs, {knn}: no gain" in text
    (simo,) = (row[7] for row in cells("digits-k", "| SiMo | 16 | EqCo"))
    (moco,) = (row[6] for row in cells("alpha", "| MoCo v2 | 65536 |"))
    assert f"SiMo with 16 reaches {simo} %, MoCo v2 with 65,536 {moco} %" in text
