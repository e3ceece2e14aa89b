"""Every command of the pages that runs an example, in a short form, from a directory that is not the repository's.

`COMMANDS` says for each what is appended so that it is short; a command of a page without an entry fails. All are also
parsed as they stand in the page. torchrun's are two processes here, and a grid's runs come from the server of
`scripts.py`, which has imported everything.
"""

import glob
import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro

from .scripts import EXAMPLES, Script, Started, make_images
from .test_pages import DOCS, README, ROOT, commands, simple_commands

sys.path.insert(0, str(EXAMPLES / "measure"))
sys.path.insert(0, str(EXAMPLES / "papers"))
sys.path.insert(0, str(EXAMPLES / "after"))

import sweep
from pretrain import arguments
from sweeps import jobs, pool


class Short(NamedTuple):
    """How a command is made short."""

    appended: str = ""
    replaced: tuple[tuple[str, str], ...] = ()  # what stands for a path of the reader's, and what is taken for it
    before: str = ""  # a command whose results it needs


DIGITS = "--epochs 1 --limit 64 --batch-size 32 --workers 0"
TINY = "--epochs 1 --batch-size 16 --workers 0"  # of 16 images
IMAGES = f"--data-dir images {TINY}"
SMALL = f"{IMAGES} --arch small --image-size 32"
PROBE = "--epochs 1 --batch-size 8 --workers 0"
SIMO_RUN = "runs/simo-digits-k16-alpha256-seed0"
SIMO = f"python examples/train_simo.py {DIGITS}"
FROM = "runs/simo-cifar10-k16-alpha256-seed0"
CIFAR_RUN = f"python examples/train_simo.py --dataset cifar10 {SMALL} --run-dir {FROM}"
RESNET_RUN = f"python examples/train_moco.py --dataset cifar10 {IMAGES} --image-size 32 --run-dir runs/RUN"
DRAWN = "--draw-only --out sweep"  # from the committed CSV, which the fixture copies there
GRID = "--seeds 1 --epochs 1 --limit 128 --out out"
# Of a batch of images, and stopped after a second; of digits, norm runs to its end, and the others are drawn
FIRST = "--seeds 1 --epochs 1 --arch small --data-dir many --out out --time-limit 0.02"
IMAGENET = (("imagenet", "images"), ("/shared/simo", "runs/shared"))
NODE = Short(SMALL, IMAGENET)
SYNC_NODE = Short(f"{SMALL} --norm shuffle", IMAGENET)  # their own norm, sync, needs CUDA

TORCHRUN = "torchrun --nproc-per-node 8 examples/"
COMMANDS = {
    "python examples/train_simo.py": Short(DIGITS),
    "python examples/train_moco.py": Short(DIGITS),
    "python examples/train_moco.py --version v1": Short(DIGITS),
    "python examples/train_simclr.py": Short(DIGITS),
    "python examples/train_simco.py": Short(DIGITS),
    "python examples/train_simmoco.py": Short(DIGITS),
    "python examples/train_mocov3.py": Short(DIGITS),
    # A folder of images serves as CIFAR or STL-10 does
    "python examples/train_simco.py --dataset cifar100": Short(SMALL),
    "python examples/train_moco.py --dataset stl10": Short(SMALL),
    "python examples/train_moco.py --data-dir DIR": Short(f"{TINY} --arch small --image-size 32", (("DIR", "images"),)),
    "python examples/train_moco.py --dataset cifar10 --augment device --precision bf16-mixed": Short(SMALL),
    f"python examples/train_simo.py --dataset cifar10 --epochs 400 --resume-from {FROM}": Short(
        f"{SMALL} --epochs 2", before=CIFAR_RUN
    ),
    f"{TORCHRUN}train_moco.py --data-dir imagenet --version v1 --precision bf16-mixed": NODE,
    f"{TORCHRUN}train_moco.py --data-dir imagenet --precision bf16-mixed": NODE,
    f"{TORCHRUN}train_simo.py --data-dir imagenet --alpha 65536 --precision bf16-mixed": SYNC_NODE,
    f"{TORCHRUN}train_simclr.py --data-dir imagenet --alpha 4096 --precision bf16-mixed": SYNC_NODE,
    f"{TORCHRUN}train_simco.py --data-dir imagenet --precision bf16-mixed": NODE,
    f"{TORCHRUN}train_simmoco.py --data-dir imagenet --precision bf16-mixed": NODE,
    f"{TORCHRUN}train_mocov3.py --data-dir imagenet --precision bf16-mixed": SYNC_NODE,
    "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/train_simo.py "
    "--data-dir imagenet --batch-size 1024 --precision bf16-mixed --run-dir /shared/simo": SYNC_NODE,
    f"python examples/after/linear_eval.py {SIMO_RUN}": Short(PROBE, before=SIMO),
    "python examples/after/extract_features.py RUN DIR": Short(
        "--workers 0", (("RUN", FROM), ("DIR", "images/test")), before=CIFAR_RUN
    ),
    "python examples/after/export_backbone.py runs/RUN --format torchvision --out resnet50.pth": Short(
        "--small-stem --verify", before=RESNET_RUN
    ),
    "python examples/after/plot_runs.py runs/*": Short(before=SIMO),
    "python examples/after/plot_runs.py runs/sweep/cifar10/*epochs40*": Short(
        replaced=(("runs/sweep/cifar10/*epochs40*", "runs/simo-digits*"),), before=SIMO
    ),
    "python examples/papers/compare_negatives.py": Short("--seeds 1 --epochs 1 --limit 130"),
    "python examples/papers/mutual_information.py": Short("--quick --steps 50 --batches 2 --workers 0"),
    "python examples/papers/gradient_norm.py": Short("--negatives 2 --epochs 1 --every 1 --batch-size 16 --limit 32"),
    "python examples/papers/gradient_norm.py --dataset cifar10": Short(
        "--data-dir images --negatives 4 --epochs 1 --every 1 --batch-size 16 --arch small"
    ),
    "python examples/papers/results_page.py": Short("--out results.md"),
    "python examples/papers/sweep.py --grid digits-k": Short(DRAWN),
    "python examples/papers/sweep.py --grid alpha": Short(DRAWN),
    "python examples/papers/sweep.py --grid batch": Short(DRAWN),
    "python examples/papers/sweep.py --grid momentum": Short(DRAWN),
    "python examples/papers/sweep.py --grid norm": Short(DRAWN),
    "python examples/papers/sweep.py --grid digits-k --jobs 2": Short(DRAWN),
    "python examples/papers/sweep.py --grid alpha --jobs 2": Short(DRAWN),
    "python examples/papers/sweep.py --grid batch --jobs 2": Short(DRAWN),
    "python examples/papers/sweep.py --grid momentum --jobs 2": Short(DRAWN),
    "python examples/papers/sweep.py --grid norm --jobs 2": Short(GRID),
    "python examples/papers/sweep.py --grid cifar10-quick": Short(FIRST),
    "python examples/papers/sweep.py --grid cifar10-quick --time-limit 10": Short(FIRST),
    "python examples/papers/sweep.py --grid cifar100-quick": Short(FIRST),
    "python examples/papers/sweep.py --grid cifar100-quick --time-limit 10": Short(FIRST),
    "python examples/papers/sweep.py --grid cifar10-small": Short(FIRST),
    "python examples/papers/sweep.py --grid cifar10-small --jobs 2": Short(FIRST),
    "python examples/papers/sweep.py --grid cifar10-long": Short(FIRST),
    "python examples/papers/sweep.py --grid cifar10-long --time-limit 10": Short(FIRST),
    "python examples/papers/sweep.py --grid cifar10-k": Short(FIRST),
    "python examples/papers/sweep.py --grid cifar100-dual": Short(FIRST),
    "python examples/measure/profile_step.py simo --dataset cifar10 --augment device --precision bf16-mixed": Short(
        f"{SMALL}"
    ),
    "python examples/measure/augmentation_cost.py": Short("--recipe simco --batch-size 8 --repeats 1 --no-compiled"),
    "python examples/measure/start_time.py --data-dir DIR": Short("--workers 0 --batch-size 8", (("DIR", "images"),)),
}


def found() -> dict[str, str]:
    """Each command of the pages that runs an example, in a block or within a line, and the page that has it."""
    commands_of: dict[str, str] = {}
    for page in (README, EXAMPLES / "README.md", *DOCS):
        lines = [command for _, command in commands(page)]
        lines += re.findall(r"`((?:python3?|torchrun) [^`]*)`", page.read_text())
        for words in (words for line in lines for words in simple_commands(line)):
            if words[0] in ("python", "python3", "torchrun") and any(w.startswith("examples/") for w in words):
                commands_of.setdefault(" ".join(words), str(page.relative_to(ROOT)))
    return commands_of


def split(command: str) -> tuple[str, list[str]]:
    """The script, in examples/, and its words."""
    words = command.split()
    at = next(number for number, word in enumerate(words) if word.startswith("examples/"))
    return words[at].removeprefix("examples/"), words[at + 1 :]


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the script does before it starts; scripts that argparse reads are run in any case."""
    script, words = split(command)
    module: Any = importlib.import_module(Path(script).stem)
    if script.startswith("train_"):
        ranks = {"--nproc-per-node 8": "8", "--nnodes 4": "32"}
        for flag, world in ranks.items():
            if flag in command:
                monkeypatch.setenv("WORLD_SIZE", world)
        version = arguments.given(words, "version")
        defaults = module.defaults(version) if script == "train_moco.py" else module.DEFAULTS
        arguments.check(arguments.parse(words, defaults, None))
    elif hasattr(module, "Args"):
        tyro.cli(module.Args, args=words)


def run(command: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From ``scratch``, with a shell's * replaced by what is there."""
    script, words = split(command)
    words = [
        path
        for word in words
        for path in (sorted(glob.glob(word, root_dir=scratch)) or [word] if "*" in word else [word])
    ]
    if command.startswith("torchrun "):
        new = tempfile.mkdtemp(dir=scratch)  # another command's run may have the same name
        Script(scratch, script, cwd=scratch).run_ranks(2, *words, f"--run-dir={new}/run")
    elif script == "papers/sweep.py":
        monkeypatch.setattr(pool, "started", Started)
        monkeypatch.chdir(scratch)
        sweep.main(tyro.cli(jobs.Args, args=words))
    else:
        Script(scratch, script, cwd=scratch).run(*words)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: some images, and nothing of the repository but the CSVs of the grids."""
    folder = tmp_path_factory.mktemp("reader")
    for seed, name in enumerate(("train/cats", "train/dogs", "test/cats", "test/dogs")):
        make_images(folder / "images" / name, 8, seed)
        make_images(folder / "many" / name, 512, seed)
    shutil.copytree(EXAMPLES / "results" / "sweep", folder / "sweep")
    return folder


def test_every_command_of_the_pages_is_here() -> None:
    pages = found()
    assert {command: page for command, page in pages.items() if command not in COMMANDS} == {}, "commands without entry"
    assert COMMANDS.keys() - pages.keys() == set(), "entries that no page has"


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_understood_as_it_stands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(command, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({split(command)[0] for command in COMMANDS}))
def test_help_is_there(script: str, scratch: Path) -> None:
    assert "--help" in Script(scratch, script, cwd=scratch).run("--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs_in_a_short_form(command: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = COMMANDS[command]
    done = scratch / "done.txt"  # what was run before others
    if short.before and short.before not in (done.read_text().splitlines() if done.exists() else ()):
        run(short.before, scratch, monkeypatch)
        with done.open("a") as file:
            file.write(f"{short.before}\n")
    full = f"{command} {short.appended}"
    for placeholder, path in short.replaced:
        full = re.sub(rf"(?<= ){re.escape(placeholder)}(?= |$)", path, full)
    run(full, scratch, monkeypatch)
