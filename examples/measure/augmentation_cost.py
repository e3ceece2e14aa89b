"""What augmentation on the device costs: kernel launches of a batch on a GPU, which need not be there, and CPU time.

    python examples/measure/augmentation_cost.py                   # CIFAR's 32 pixels, 512 images, two views of each
    python examples/measure/augmentation_cost.py --against COMMIT  # beside another commit's augment.py, interleaved

torch's inductor writes the code of a GPU's kernels without a GPU; every call in it of a kernel or of a library's
product is one launch. Without compiling, each of torch's operators that computes something is one launch at least.
"""

import importlib.util
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

import torch
import tyro
from pretrain import augment
from pretrain.choices import Recipe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LAUNCH = re.compile(r"^ *(?:(triton_)\w+\.run|extern_kernels\.(\w+))\(", re.MULTILINE)
# An H100's, which decide how inductor splits a reduction
PROPERTIES = {"major": 9, "minor": 0, "multi_processor_count": 132, "regs_per_multiprocessor": 65536, "warp_size": 32}
PROPERTIES |= {"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "total_memory": 80 << 30}


@dataclass(frozen=True)
class Args:
    size: int = 32  # of the images and of the views, pixels
    batch_size: int = 512
    repeats: int = 7  # of the CPU time, of which the median is printed
    recipe: Recipe | None = None  # None: all of them
    compiled: bool = True  # count the launches, which compiles each recipe for a GPU: half a minute
    against: str | None = None  # a commit whose augment.py is timed, too


def main(args: Args) -> None:
    images = torch.randint(0, 256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8)
    samples = torch.arange(args.batch_size)
    versions: dict[str, Callable[[str], Callable[[], object]]] = {
        "now": lambda name: run(augment, name, images, samples)
    }
    if args.against:
        other = module_of(args.against)
        versions[args.against] = lambda name: run(other, name, images, samples)
    print(f"{args.batch_size} images of {args.size} pixels, two views; {torch.get_num_threads()} threads")
    for name in [args.recipe] if args.recipe else augment.RECIPES:
        calls = {version: make(name) for version, make in versions.items()}
        compiled = launches(augment.RECIPES[name], args.size, args.batch_size) if args.compiled else {}
        listed = ", ".join(f"{count} {kind}" for kind, count in compiled.items())
        print(f"{name}: {sum(compiled.values())} launches compiled ({listed})" if args.compiled else f"{name}:")
        for version, milliseconds in interleaved(calls, args.repeats).items():
            print(f"    {version}: {operators(calls[version])} operators, {milliseconds:.1f} ms on this CPU")


def run(module: ModuleType, name: str, images: Tensor, samples: Tensor) -> Callable[[], object]:
    """Both views of the batch. Before they were made at once, ``view`` was an argument."""
    make = module.OnDevice(module.RECIPES[name], images.shape[2])
    if "view" in make.__call__.__wrapped__.__code__.co_varnames:
        return lambda: [make(images, seed=0, epoch=0, samples=samples, view=view) for view in (0, 1)]
    return lambda: make(images, seed=0, epoch=0, samples=samples)


def module_of(commit: str) -> ModuleType:
    """The augment.py of another commit."""
    here = Path(__file__).parents[1]
    shown = ["git", "-C", str(here), "show", f"{commit}:./pretrain/augment.py"]
    found = subprocess.run(shown, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(
            f"error: against: {found.stderr.strip()}. Give a commit that has examples/pretrain/augment.py."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "augment.py"
        path.write_text(found.stdout)
        spec = importlib.util.spec_from_file_location("augment_before", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
    return module


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):  # the first is to warm up
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
    return {name: 1000 * statistics.median(found[1:]) for name, found in seconds.items()}


class Operators(TorchDispatchMode):
    """Counts those that compute something; views and fresh memory launch nothing."""

    NOTHING: tuple[str, ...] = (
        "empty",
        "view",
        "_unsafe_view",
        "detach",
        "alias",
        "unbind",
        "split",
        "select",
        "slice",
        "expand",
    )
    NOTHING += ("transpose", "permute", "unsqueeze", "as_strided", "_reshape_alias", "t", "squeeze", "split_with_sizes")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.count: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.__name__.split(".")[0] not in self.NOTHING
        return function(*args, **(kwargs or {}))


def operators(call: Callable[[], object]) -> int:
    counted = Operators()
    with counted:
        call()
    return counted.count


def launches(recipe: augment.Recipe, size: int, batch_size: int) -> Counter[str]:
    """Of one batch on a GPU, where all is one compiled graph: by Triton kernels, and by library calls of each name."""
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    fake = FakeTensorMode()
    with absent_gpu(), config.patch(augment.INDUCTOR), torch.no_grad():
        with fake:
            images = torch.empty((50000, 3, size, size), dtype=torch.uint8, device="cuda")
            samples, keys = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (batch_size, 2))

            def views(images: Tensor, samples: Tensor, keys: Tensor) -> Tensor:
                return augment.make_views(recipe, size, images, samples, samples, keys)

            traced = make_fx(views, decomposition_table=select_decomp_table())(images, samples, keys)
        graph = GraphLowering(traced, example_inputs=[images, samples, keys])
        with V.set_graph_handler(graph), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
            graph.run(images, samples, keys)
            code: Any = graph.codegen()[0]
    source: str = getattr(code, "value", code)
    return Counter((triton and "Triton") or library for triton, library in LAUNCH.findall(source))


@contextmanager
def absent_gpu() -> Iterator[None]:
    """What inductor asks of a GPU before it writes code for it."""
    import torch._inductor.scheduler
    import torch.utils._triton
    from torch._dynamo.device_interface import CudaInterface

    properties = SimpleNamespace(name="H100", gcnArchName="", **PROPERTIES)
    answers: list[tuple[Any, str, Any]] = [
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: properties)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch._inductor.scheduler, "has_triton", lambda: True),
        (torch.utils._triton, "triton_hash_with_backend", lambda: "none"),
    ]
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
