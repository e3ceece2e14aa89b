"""Where the time of a training step goes: data, augmentation, encoders, loss, backward, optimiser, momentum update.

    python examples/measure/profile_step.py simo                            # digits
    python examples/measure/profile_step.py simo --dataset cifar10 --augment device --precision bf16-mixed
    python examples/measure/profile_step.py --steps 20 moco --data-dir DIR  # any of a training script's arguments

It runs the script itself, for a few steps that warm up (and compile) and then a few under torch.profiler, and prints
the milliseconds of a step in each phase: on the host, and on a GPU what its kernels took. Augmentation is a part of
data, and the loss's own backward one of backward. No kNN is measured, and what the script writes goes to a folder that
is deleted. --trace FILE keeps the profile for chrome://tracing.
"""

import argparse
import contextlib
import functools
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

METHODS = ("simo", "moco", "mocov3", "simclr", "simco", "simmoco")
PHASES = ("data", "augmentation", "encoders forward", "loss", "backward", "optimizer", "momentum update", "queue")


class EnoughError(Exception):
    """All steps that were asked for are done."""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warmup", type=int, default=5, help="steps before those that are measured")
    parser.add_argument("--steps", type=int, default=10, help="that are measured")
    parser.add_argument("--trace", type=Path, help="a file for the profile, .json or .json.gz")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of its training script")
    args = parser.parse_args(words)
    if args.steps < 1 or args.warmup < 0:
        parser.error("--steps: expected 1 or more, and --warmup 0 or more.")
    import torch
    from pretrain.arguments import parse

    script: Any = importlib.import_module(f"train_{args.method}")
    more = ["--no-knn", "--no-probe", "--epochs", "1000000", "--save-minutes", "1e9"]
    with tempfile.TemporaryDirectory() as folder:
        parsed = parse([*args.arguments, *more, "--run-dir", folder], script.DEFAULTS, None)
        on_gpu = parsed.device in ("auto", "cuda") and torch.cuda.is_available()
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        profile = torch.profiler.profile(activities=kinds)
        with labelled(args.warmup, args.steps, profile), contextlib.suppress(EnoughError):
            script.main(parsed)
    print(table(profile, args.steps, parsed.batch_size, on_gpu))
    if args.trace:
        profile.export_chrome_trace(str(args.trace))


@contextlib.contextmanager
def labelled(warmup: int, steps: int, profile: Any) -> Iterator[None]:
    """The parts of a step under the names of ``PHASES``; the profile is of ``steps`` steps, after ``warmup`` others."""
    from lightning_fabric import Fabric
    from pretrain import training
    from pretrain.augment import OnDevice
    from pretrain.clock import Clock
    from pretrain.encoders import Encoder
    from torch import Tensor
    from torch.profiler import record_function

    import eqco_loss

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **how: Any) -> Any:
            with record_function(name):
                return function(*args, **how)

        return call

    done = 0
    between = training.Training._between_steps

    def between_steps(run: training.Training[Any]) -> None:
        nonlocal done
        done += 1
        if done == warmup + steps:
            wait(run)
            profile.stop()
            raise EnoughError
        between(run)
        if done == warmup:
            wait(run)
            profile.start()

    def wait(run: training.Training[Any]) -> None:
        Tensor.item(run.sums[0])  # for the device

    def waiting(clock: Clock, batches: Iterator[Any]) -> Iterator[Any]:
        inner = real_waiting(clock, batches)
        if warmup == 0 and done == 0:
            profile.start()
        while True:
            with record_function("data"):
                batch = next(inner, None)
            if batch is None:
                return
            yield batch

    real_waiting, real_loss = Clock.waiting, Clock.loss

    @contextlib.contextmanager
    def loss(clock: Clock) -> Iterator[None]:
        with record_function("loss"), real_loss(clock):
            yield

    patches: list[tuple[Any, str, Any]] = [
        (training.Training, "_between_steps", between_steps),
        (Clock, "waiting", waiting),
        (Clock, "loss", loss),
        (OnDevice, "__call__", named("augmentation", OnDevice.__call__)),
        (Encoder, "__call__", named("encoders forward", Encoder.__call__)),
        (Fabric, "backward", named("backward", Fabric.backward)),
        (eqco_loss, "momentum_update", named("momentum update", eqco_loss.momentum_update)),
        (eqco_loss.MomentumQueue, "enqueue", named("queue", eqco_loss.MomentumQueue.enqueue)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, new in patches:
            stack.enter_context(mock.patch.object(owner, name, new))
        yield


def table(profile: Any, steps: int, batch_size: int, on_gpu: bool) -> str:
    """A line for each phase that occurred; the whole step is what the wall clock says."""
    found = {event.key: event for event in profile.key_averages()}
    for key in [key for key in found if key.startswith("Optimizer.step#")]:  # torch names it so
        found["optimizer"] = found[key]
    span = [(event.time_range.start, event.time_range.end) for event in profile.events()]
    whole = (max(end for _, end in span) - min(start for start, _ in span)) / 1000 / steps
    lines = [f"{'milliseconds a step':24}{'host':>9}{'share':>7}" + f"{'GPU':>9}" * on_gpu]
    for phase in PHASES:
        if phase in found:
            host = found[phase].cpu_time_total / 1000 / steps
            gpu = f"{found[phase].device_time_total / 1000 / steps:9.2f}" if on_gpu else ""
            lines.append(f"{phase:24}{host:9.2f}{host / whole:7.0%}{gpu}")
    lines.append(f"{'whole step':24}{whole:9.2f}{1:7.0%}")
    return "\n".join([*lines, f"{1000 * batch_size / whole:.0f} images/s, under the profiler"])


if __name__ == "__main__":
    main()
