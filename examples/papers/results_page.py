"""docs/results.md: every grid's command and what it gave, from the files that sweep.py keeps in examples/results/sweep.

    python examples/papers/results_page.py

A grid that has not been run has its place and its command. Run this again when sweep.py has made new results.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

import tyro
from pretrain.run import written_whole
from sweeps.grids import GRIDS

ROOT = Path(__file__).parents[2]
EXPECTED = {  # two cores, or where nothing was run yet what is expected of one H200
    "cifar10-small": "50 minutes, two cores",
    "cifar10-quick": "a quarter of an hour, H200",
    "cifar100-quick": "10 minutes, H200",
    "cifar10-long": "half an hour, H200",
    "cifar10-k": "two hours, H200",
    "cifar100-dual": "eight hours, H200",
    "digits-k": "21 minutes, two cores",
    "alpha": "43 minutes, two cores",
    "batch": "11 minutes, two cores",
    "momentum": "4 minutes, two cores",
    "norm": "4 minutes, two cores",
}
GOALS = {
    "cifar10-small": "All 50,000 images, 10 epochs, a network of six convolutions: what two CPU cores can do.",
    "cifar10-quick": "The paper's figure is of ImageNet: without EqCo the accuracy falls with K, with it hardly. "
    "The runs' curves over the epochs: `python examples/after/plot_runs.py runs/sweep/cifar10/*epochs40*`.",
    "cifar10-long": "The goal is a kNN of 84.8 %, the level of lightly's SimCLR and MoCo after 200 epochs.",
    "cifar100-quick": "The paper's order is SimCo, SimMoCo, MoCo v2; its 58.35, 54.11 and 53.28 % are of 200 epochs.",
}
HEAD = """# Results

Written by `python examples/papers/results_page.py` from what `examples/papers/sweep.py` keeps. Each command stops with
`--time-limit MINUTES` and goes on when it is given again; `--data-dir` says where CIFAR is. Other results, of digits
and of mutual information, are in [the examples' page](../examples/README.md#the-papers-results).
"""


@dataclass(frozen=True)
class Args:
    results: Path = ROOT / "examples" / "results" / "sweep"  # of sweep.py
    out: Path = ROOT / "docs" / "results.md"


def main(args: Args) -> None:
    with written_whole(args.out) as file:
        file.write(page(args.results).encode())
    print(args.out)


def page(results: Path) -> str:
    return "\n".join([HEAD, *(line for name in EXPECTED for line in section(name, results))])


def section(name: str, results: Path) -> list[str]:
    """A grid's command, and its table and figure, where there are any."""
    grid, table = GRIDS[name], results / f"{name}.md"
    lines = [f"## {grid.title} ({grid.dataset})", ""]
    lines += [GOALS[name], ""] if name in GOALS else []
    lines += [f"`python examples/papers/sweep.py --grid {name}`, {EXPECTED[name]}.", ""]
    if not table.exists():
        return [*lines, "Not run yet.", ""]
    _, _, *body, _, _ = table.read_text().splitlines()  # without its title and its command
    return [*lines, *body, "", f"![{grid.title}](../examples/results/sweep/{name}.png)", ""]


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
