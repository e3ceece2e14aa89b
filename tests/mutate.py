"""Is every sign and every mask of the kernels tested? Changes one at a time, in a copy, and runs the tests.

    python -m tests.mutate --list                 # what would be changed
    python -m tests.mutate --match keys           # kernels whose file or name holds "keys"

For each kernel: signs (+ becomes -), parts of a mask (a & b becomes a, and b), and comparisons (< becomes <=). A change
is caught if a test fails. Exit status 1 if one survives that is not in ``SAME``, whose changes cannot be seen.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

ROOT = Path(__file__).parents[1]
FUSED = (
    "tests/test_world.py",
    "tests/test_kernels.py",
    "tests/test_both_roles.py",
    "-k",
    "not wide and not torch- and not once",
)
WIDE = ("tests/test_world.py", "tests/test_wide.py", "-k", "kernels")
BOTH = (*WIDE[:-1], "kernels and (directions or statistics or temperatures or views)")
IDS = ("tests/test_kernels.py", "-k", "ids")
TESTS = {  # the files of kernels, and what tests them
    "triton/parts.py": FUSED,
    "triton/forward.py": FUSED,
    "triton/keys.py": FUSED,
    "triton/ids.py": IDS,
    "triton/own.py": FUSED,
    "triton/symmetric.py": FUSED,
    "wide/kernels.py": WIDE,
    "wide/mutual_kernels.py": BOTH,
    "wide/view_kernels.py": BOTH,
    "shared_kernels.py": FUSED,
}
SIGNS: dict[type[ast.AST], tuple[str, str]] = {ast.Add: ("+", "-"), ast.Sub: ("-", "+")}
COMPARISONS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.GtE: (">=", ">"),
    ast.NotEq: ("!=", "=="),
    ast.Gt: (">", ">="),
}
SAME = {  # of a change's kernel and text, why nobody could see it
    "read_temperature: t > 0.0 with >=": "by a temperature of 0 every logit is infinite or NaN, and the loss NaN",
    "partners: half > 0 with >=": "without a second view both branches give the rows themselves",
    "attend: rows < n with <=": "the ids of a row beyond the last are read, and nothing of that row is stored",
    "attend_own: row + tl.arange(0, 1) with -": "a range of one element is 0",
    "fold_kernel: logit > above with >=": "no logit is the threshold, which a positive's logit is less a small part",
    "is_bounded: tl.load(temperature_tensor).to(tl.float32) >= LEAST with >": "there both forms are right",
    "is_bounded: inter_t >= LEAST with >": "there both forms are right",
    "store_statistics: parts + PART_TOTAL * plane_size with -": "PART_TOTAL is 0",
    "lower_than: row + BLOCK_ROWS > row_stop with >=": "a tile that ends with the rows is masked, and needs no mask",
    "lower_than: key + KEYS > key_stop with >=": "a tile that ends with the keys is masked, and needs no mask",
    "lower_than: ahead > -BLOCK_ROWS with >=": "the tile beside the diagonal's is masked, and needs no mask",
    "collect: c < BLOCK_KEYS - 1 with <=": "a tile from the last place of its keys on is masked, and needs no mask",
    "attend_own: s > positive_logit[:, None] with >=": "no logit is the threshold, as in fold_kernel",
    "multiplied: rows < n with <=": "what a row beyond the last has is read, and nothing of that row is stored",
    "keys_gradient: most > 1e-30 with >=": "there both forms are right",
    "keys_gradient_own: row + tl.arange(0, 1) with -": "a range of one element is 0",
    "keys_gradient_picked: key + tl.arange(0, 1) with -": "a range of one element is 0",
    "statistics_of: keys_of_their_own & (key + beside < key_stop) becomes key + beside < key_stop": (
        "rows and keys of a tile on the diagonal are the same, and their numbers are stored in one place"
    ),
    "statistics_kernel: key < key_stop with <=": "no tile begins behind the last key",
    "may_be_alike: found & 1 becomes found": "ids are compared in more tiles than need be, which is as right",
    "may_be_alike: found & 1 becomes 1": "ids are compared in all tiles, which is as right",
    "visit: tl.minimum(row + BLOCK_ROWS, n) - 1 with +": "one mark more is looked at, which is as right",
    "sigmoid: x < 0 with <=": "there both forms are right",
    "softplus_over_sigmoid: x < 0 with <=": "there both forms are right",
    "load_part: rows < n with <=": "what a row beyond the last has is read, and nothing of that row is stored",
}


class Mutation(NamedTuple):
    file: str
    kernel: str
    line: int
    start: int  # of the characters that are replaced
    stop: int
    text: str
    what: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.kernel}:{self.line}: {self.what}"

    @property
    def same(self) -> str | None:
        return SAME.get(f"{self.kernel}: {self.what}")


@dataclass(frozen=True)
class Args:
    match: str = ""  # only kernels whose file or name holds this
    signs: int = 2  # of each kernel, spread over it
    masks: int = 4  # parts of masks and comparisons of each kernel
    jobs: int = 2
    seconds: float = 900.0  # that the tests of a change may take; more is a hang, and so caught
    list: bool = False  # print the changes and run nothing


def main(args: Args) -> int:
    every = [one for file in TESTS for one in mutations(file, args) if args.match in f"{one.file}:{one.kernel}"]
    if args.list:
        print("\n".join(one.name for one in every))
        return 0
    survived = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for one, found in zip(
            every, pool.map(lambda one: one.same or caught_by(one, args.seconds), every), strict=True
        ):
            survived += found is None
            print(f"{one.name:110} {found or 'SURVIVES'}", flush=True)
    print(f"{len(every)} changes, {survived} survive")
    return 1 if survived else 0


def mutations(file: str, args: Args) -> Iterator[Mutation]:
    """Those of each kernel of a file."""
    source = (ROOT / "eqco_loss" / "ops" / file).read_text()
    lines = source.splitlines(keepends=True)
    begins = [sum(map(len, lines[:number])) for number in range(len(lines) + 1)]

    def span(node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return begins[node.lineno - 1] + node.col_offset, begins[node.end_lineno - 1] + node.end_col_offset

    for kernel in ast.parse(source).body:
        if not isinstance(kernel, ast.FunctionDef) or not any("jit" in ast.dump(x) for x in kernel.decorator_list):
            continue
        signs: list[Mutation] = []
        masks: list[Mutation] = []

        def change(node: ast.expr, start: int, stop: int, text: str, what: str, name: str = kernel.name) -> Mutation:
            return Mutation(file, name, node.lineno, start, stop, text, " ".join(what.split()))

        for node in (x for statement in kernel.body for x in ast.walk(statement)):
            if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
                old, new = SIGNS[type(node.op)]
                start, stop = span(node.left)[1], span(node.right)[0]
                text = source[start:stop].replace(old, new, 1)
                signs.append(change(node, start, stop, text, f"{source[slice(*span(node))]} with {new}"))
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
                whole = source[slice(*span(node))]
                for side in (node.left, node.right):
                    kept = source[slice(*span(side))]
                    masks.append(change(node, *span(node), kept, f"{whole} becomes {kept}"))
            if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
                old, new = COMPARISONS[type(node.ops[0])]
                start, stop = span(node.left)[1], span(node.comparators[0])[0]
                text = source[start:stop].replace(old, new, 1)
                masks.append(change(node, start, stop, text, f"{source[slice(*span(node))]} with {new}"))
        for found, most in ((signs, args.signs), (masks, args.masks)):
            unique = list(dict.fromkeys(sorted(found, key=lambda one: one.start)))
            step = max(1.0, len(unique) / most) if most else 1.0
            yield from (unique[int(place * step)] for place in range(min(most, len(unique))))


def caught_by(one: Mutation, seconds: float) -> str | None:
    """The first test that fails, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("eqco_loss", "tests", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        path = copy / "eqco_loss" / "ops" / one.file
        text = path.read_text()
        path.write_text(text[: one.start] + one.text + text[one.stop :])
        options = ("-x", "-q", "--no-header", "-p", "no:cacheprovider")
        command = [sys.executable, "-m", "pytest", *options, *TESTS[one.file]]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"(no end in {seconds:g} s)"
    failed = re.search(r"^(FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[2] if failed else None if done.returncode == 0 else f"(status {done.returncode})"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
