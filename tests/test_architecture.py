"""The shape of the package: who imports whom, what is public, what is documented and that the documentation runs."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import eqco_loss
from eqco_loss import functional

PACKAGE = Path(eqco_loss.__file__).parent

MOST_LINES = 450

# The one direction of imports. A module that is not here is a decision that nobody wrote down.
MAY_IMPORT = {
    "__init__": {"losses", "queue", "momentum", "functional"},
    "losses": {"functional", "_names", "_validate", "distributed", "settings"},
    "functional": {"_agree", "_names", "_validate", "distributed", "negatives", "ops", "repeats", "settings"},
    "repeats": {"ops", "queue", "settings"},
    "negatives": {"distributed", "ops", "queue", "settings"},
    "_agree": {"_validate", "distributed", "queue", "settings"},
    "_validate": {"_names", "distributed", "ops", "queue", "settings"},
    "settings": {"distributed", "queue"},
    "queue": {"_names", "distributed"},
    "_names": set(),
    "momentum": {"_names"},
    "distributed": set(),
    "ops": set(),
}
# The same inside of ops: backends know the records and not each other.
INSIDE_OPS = {
    "__init__": {"backends", "calls", "observers", "operator", "operators"},
    "operators": {"backends", "calls", "definition", "observers", "operator"},
    "operator": {"calls", "flat", "observers"},
    "observers": set(),
    "flat": {"calls"},
    "backends": {"tiles", "triton", "wide"},
    "wide": {"calls", "gap", "shared_kernels", "launcher", "scaled"},
    "tiles": {"blocks", "calls", "definition", "flash", "gap", "mutual", "running", "scaled", "square"},
    "square": {"blocks", "calls", "running"},
    "mutual": {"blocks", "calls", "gap", "running", "scaled", "square"},
    "running": {"calls"},
    "flash": {"blocks", "calls"},
    "blocks": {"calls", "definition"},
    "triton": {"calls", "shared_kernels", "launcher", "scaled"},
    "launcher": set(),
    "gap": {"calls"},
    "scaled": {"calls", "observers"},
    "shared_kernels": {"calls"},
    "definition": {"calls"},
    "calls": set(),
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The row of the table: a module of the package, or `ops` for everything in that folder."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Absolute dotted names of everything that a file imports, relative imports resolved."""
    package = ["eqco_loss", *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def parts_imported(path: Path) -> set[str]:
    """Rows of the table that a file imports from, its own row left out."""
    inside: set[str] = set()
    for name in imported(path):
        steps = name.split(".")
        if steps[0] == "eqco_loss":
            inside.add(steps[1] if len(steps) > 1 else "__init__")
    return inside - {part_of(path)}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} has no place in the import order"
    assert parts_imported(path) <= MAY_IMPORT[part], f"{part} imports {parts_imported(path) - MAY_IMPORT[part]}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda path: path.stem)
def test_backends_do_not_know_each_other(path: Path) -> None:
    room = path.relative_to(PACKAGE / "ops").with_suffix("").parts[0]
    inside = {name.split(".")[2] for name in imported(path) if name.startswith("eqco_loss.ops.")} - {room}
    assert inside <= INSIDE_OPS[room], f"ops/{room} imports {inside - INSIDE_OPS[room]}"


def test_the_order_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {part for part, needs in MAY_IMPORT.items() if part not in done and needs <= done}
        assert ready, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= ready


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_the_only_dependency(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots <= {"torch", "triton", "eqco_loss"} | set(sys.stdlib_module_names)


def test_triton_is_imported_in_one_place_of_a_backend_and_inside_a_function() -> None:
    """The kernels' files import Triton, and one function of each backend imports those files."""
    wide = {"kernels", "launches", "mutual", "mutual_kernels", "view_kernels"}
    kernels_of = {"triton": {"parts", "ids", "forward", "keys", "own", "symmetric"}, "wide": wide}
    places = []
    for path in files():
        tree = ast.parse(path.read_text())
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)
        }
        kernels = kernels_of.get(path.parent.name, set())
        of_kernels = path.stem in kernels or path.stem == "shared_kernels"  # which only kernels import
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)) or of_kernels:
                continue
            names = [alias.name for alias in node.names]
            outside = [] if isinstance(node, ast.ImportFrom) and node.level else names
            outside += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "triton" for name in outside) or kernels & set(names):
                assert id(node) in inside, f"{path.name}:{node.lineno} imports Triton at import time"
                places.append(path.name)
    assert set(places) == {"arguments.py", "pointwise.py"}


def test_no_file_has_outgrown_a_reader() -> None:
    """450 lines, signatures and docstrings included."""
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in files()}
    assert max(long.values()) <= MOST_LINES, {name: lines for name, lines in long.items() if lines > MOST_LINES}


WITHOUT_TRITON = """
import sys
blocked = ("triton", "numpy", "scipy", "sklearn", "torchvision", "lightning", "hypothesis")
sys.modules.update(dict.fromkeys(blocked))  # importing any of them is a ModuleNotFoundError
import torch
import eqco_loss
assert not any(sys.modules.get(name) for name in blocked)
q = torch.randn(4, 8, requires_grad=True)
queue = eqco_loss.MomentumQueue(16, 8)
queue.enqueue(torch.randn(5, 8))
loss = eqco_loss.EqCoLoss()(q, torch.randn(4, 8), queue) + eqco_loss.DualTempInfoNCE()(q, torch.randn(4, 8))
loss.backward()
assert loss.isfinite() and q.grad.isfinite().all()
print(eqco_loss.EqCoLoss().chosen_backend(q, q)[0])
"""


def test_works_with_torch_alone() -> None:
    """A fresh process in which neither Triton nor anything else that a laptop may lack can be imported."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch"


def test_importing_costs_no_more_than_torch() -> None:
    """No CUDA initialisation, no threads, no seed and no default changed by the import."""
    code = (
        "import torch; a = torch.get_rng_state().clone(), torch.get_default_dtype(), torch.get_num_threads();"
        "import eqco_loss; b = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads();"
        "assert torch.equal(a[0], b[0]) and a[1:] == b[1:] and not torch.cuda.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_four_names() -> None:
    assert sorted(eqco_loss.__all__) == ["DualTempInfoNCE", "EqCoLoss", "MomentumQueue", "momentum_update"]
    public = {
        name
        for name in vars(eqco_loss)
        if not name.startswith("_") and not isinstance(vars(eqco_loss)[name], ModuleType)
    }
    assert public == set(eqco_loss.__all__), "and nothing besides"
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", eqco_loss.__version__)
    assert (PACKAGE / "py.typed").exists()


def test_functional_has_what_the_contract_names() -> None:
    assert {
        "eqco_loss",
        "dual_temp_infonce",
        "negatives_logsumexp",
        "cosine_momentum",
    } <= set(functional.__all__)
    for name in functional.__all__:
        assert hasattr(functional, name)


@pytest.mark.parametrize("make", [eqco_loss.EqCoLoss, eqco_loss.DualTempInfoNCE])
def test_argument_names_are_the_fields_own(make: Any) -> None:
    """As in info-nce-pytorch and PyTorch's proposal; everything after the numbers is by keyword."""
    call = list(inspect.signature(make.forward).parameters.values())[1:]
    assert [p.name for p in call] == [
        "query",
        "positive_key",
        "negative_keys",
        "query_ids",
        "negative_ids",
        "negative_mask",
    ]
    assert [p.kind.name for p in call[3:]] == ["KEYWORD_ONLY"] * 3
    settings = inspect.signature(make).parameters
    positional = [name for name, p in settings.items() if p.kind.name == "POSITIONAL_OR_KEYWORD"]
    assert positional == ["temperature", "inter_temperature"][: 1 if make is eqco_loss.EqCoLoss else 2]
    defaults = {name: p.default for name, p in settings.items() if p.kind.name != "VAR_POSITIONAL"}
    expected: dict[str, Any] = {
        "in_batch": None,
        "num_negatives": None,
        "sampling": "rolled",
        "symmetric": False,
        "normalize": True,
        "gather": False,
        "reduction": "mean",
        "backend": "auto",
    }
    expected |= (
        {"temperature": 0.2, "alpha": 65536}
        if make is eqco_loss.EqCoLoss
        else {"temperature": 0.1, "inter_temperature": 1.0, "alpha": None}
    )
    assert defaults == expected


def public_things() -> list[Any]:
    things = [getattr(eqco_loss, name) for name in eqco_loss.__all__]
    functions = [getattr(functional, name) for name in functional.__all__]
    return things + [f for f in functions if inspect.isfunction(f)]


@pytest.mark.parametrize("thing", public_things(), ids=lambda thing: thing.__name__)
def test_public_docstrings(thing: Any) -> None:
    """Args and Shape sections, a source, and an example that runs; every argument is named."""
    text = inspect.getdoc(thing)
    assert text, "no docstring"
    assert doctest.DocTestParser().get_examples(text), "no runnable example"
    if not (inspect.isclass(thing) or thing is eqco_loss.momentum_update):
        return  # a function of `functional` points at its class
    assert "Args:" in text
    assert "Shape:" in text
    assert "Raises:" in text
    arguments = text.split("Args:")[1].split("Shape:")[0]
    for name, parameter in inspect.signature(thing).parameters.items():
        if parameter.kind.name == "VAR_POSITIONAL":  # what is refused, with an explanation
            continue
        assert re.search(rf"^\s*`*{name}\b", arguments, re.MULTILINE) or name in arguments, f"{name} is not documented"


@pytest.mark.parametrize(
    "thing", [eqco_loss.EqCoLoss, eqco_loss.DualTempInfoNCE, eqco_loss.MomentumQueue], ids=lambda thing: thing.__name__
)
def test_documented_defaults_are_the_defaults(thing: Any) -> None:
    """A docstring with the wrong default is the commonest drift: `default X` beside an argument must be its default."""
    text = inspect.getdoc(thing) or ""
    arguments = text.split("Args:")[1].split("Shape:")[0]
    for name, parameter in inspect.signature(thing).parameters.items():
        said = re.search(rf"^\s*{name}\b.*?[Dd]efault:?\s+`*([^\s`;,.]+(?:\.\d+)?)", arguments, re.MULTILINE)
        if said and parameter.default is not None and isinstance(parameter.default, (int, float, str)):
            assert said[1].strip("\"'") == str(parameter.default), f"{name}: {said[0]}"


def modules() -> list[str]:
    return ["eqco_loss", *(m.name for m in pkgutil.walk_packages(eqco_loss.__path__, "eqco_loss."))]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str) -> None:
    if "triton" in name:
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    assert doctest.testmod(module, verbose=False, extraglobs={"torch": torch}).failed == 0


def test_docstring_examples_exist() -> None:
    """The test above cannot pass for want of examples."""
    finder = doctest.DocTestFinder(recurse=True)
    examples = [
        e
        for name in modules()
        if "triton" not in name
        for t in finder.find(importlib.import_module(name))
        for e in t.examples
    ]
    assert len(examples) >= 10


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_asks_the_device(path: Path) -> None:
    """The loss path never waits for a device: .item(), .tolist() and nonzero() stay out of functional and losses."""
    if part_of(path) not in ("functional", "losses"):
        return
    calls = {
        n.func.attr
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }
    assert not calls & {"item", "tolist", "nonzero", "cpu", "numpy"}
