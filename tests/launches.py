"""Does the launcher run the compiled kernels that Triton's own launcher would? A command, because pytest's process has
Triton interpret kernels where there is no GPU.

    python -m tests.launches
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.host import no_launches
from eqco_loss import DualTempInfoNCE, EqCoLoss, MomentumQueue
from eqco_loss.functional import negatives_logsumexp
from eqco_loss.ops import launcher

Launched = list[tuple[Any, ...]]  # of each launch, the compiled kernel's hash, its grid, and what it was given
CONSTANTS = {"D": 32, "BLOCK_D": 32, "BLOCK": 16, "NORMALIZE": True, "POWER": False, "CLEAN": False, "PIECES": 1}


@contextmanager
def noted(found: Launched) -> Iterator[None]:
    """Kernels are those of a GPU that need not be there, and a launch is only noted."""
    from triton.compiler.compiler import CompiledKernel

    def run(self: Any) -> Callable[..., None]:
        def note(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
            given = rest[3:]  # launch metadata and two hooks come before the arguments
            found.append((self.hash, (x, y, z), *map(described, given)))

        return note

    with no_launches(90, []), mock.patch.object(CompiledKernel, "run", property(run)):
        yield


def described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape, argument.stride(), argument.data_ptr() % 16
    return argument


def launches(found: Launched, step: Callable[[], object], *, direct: bool) -> Launched:
    found.clear()
    with mock.patch.object(launcher, "DIRECT", direct):
        step()
    return list(found)


def steps(n: int, d: int, dtype: torch.dtype, shift: int) -> dict[str, Callable[[], object]]:
    """Losses of several kinds with their gradients; ``shift`` moves the queries' memory off 16 bytes."""
    query = torch.randn(n * d + shift).to(dtype)[shift:].view(n, d).requires_grad_()
    key = torch.randn(n, d).to(dtype).requires_grad_()
    ids, queue = torch.arange(n) % 7, MomentumQueue(64, d, store_ids=True)
    queue.enqueue(torch.randn(40, d), torch.arange(40))
    plain_queue = MomentumQueue(64, d)
    plain_queue.enqueue(torch.randn(40, d))
    given = torch.randn(d, 50).to(dtype).T  # (K, D), column by column
    own, many = torch.randn(n, 9, d).to(dtype).requires_grad_(), torch.randn(1100, d).to(dtype).requires_grad_()
    with_ids = {"query_ids": ids, "negative_ids": torch.arange(1100)}

    def gradients(loss: Tensor, grad: Tensor | None = None) -> object:
        return torch.autograd.grad(loss, [query, key, own, many], grad, allow_unused=True)

    def with_metrics(criterion: EqCoLoss | DualTempInfoNCE, *inputs: Tensor, **given: Tensor) -> object:
        return gradients(criterion.with_metrics(query, key, *inputs, **given).loss)

    return {
        "batch": lambda: gradients(EqCoLoss()(query, key)),
        "both directions": lambda: gradients(EqCoLoss(symmetric=True)(query, key)),
        "views": lambda: gradients(DualTempInfoNCE(symmetric=True, in_batch="views")(query, key)),
        "random": lambda: gradients(EqCoLoss(num_negatives=3, sampling="random")(query, key)),
        "queue": lambda: gradients(EqCoLoss()(query, key, queue, query_ids=ids)),
        "columns": lambda: gradients(EqCoLoss(reduction="none")(query, key, given).sum()),
        "rows of one kind": lambda: (
            gradients(EqCoLoss(reduction="none")(query, key).sum()),
            gradients(EqCoLoss(reduction="none")(query, key), torch.ones(n)),
        ),
        "another gradient": lambda: gradients(EqCoLoss()(query, key), torch.ones(2)[1]),
        "queue and batch": lambda: gradients(EqCoLoss(in_batch="keys")(query, key, given)),
        "queue and batch, dual": lambda: gradients(DualTempInfoNCE(in_batch="keys")(query, key, plain_queue)),
        "float queue": lambda: gradients(EqCoLoss()(query, key, plain_queue)),
        "own": lambda: with_metrics(EqCoLoss(), own, query_ids=ids, negative_ids=torch.arange(9)),
        "picked": lambda: with_metrics(DualTempInfoNCE(num_negatives=3, sampling="random"), query_ids=ids),
        "many": lambda: gradients(DualTempInfoNCE()(query, key, many)),
        "many, ids": lambda: with_metrics(EqCoLoss(), many, **with_ids),
        "many, mask": lambda: gradients(EqCoLoss()(query, key, many, negative_mask=torch.ones(1100) > 0)),
        "log-sum-exp": lambda: gradients(negatives_logsumexp(query, key).sum()),
    }


def same_kernels(found: Launched) -> int:
    count = 0
    for n, d, dtype, shift in ((40, 24, torch.bfloat16, 0), (40, 24, torch.bfloat16, 1), (5, 16, torch.float32, 0)):
        for name, step in steps(n, d, dtype, shift).items():
            by_triton = launches(found, step, direct=False)
            assert by_triton, f"{name}: expected launches"
            launches(found, step, direct=True)
            with mock.patch("triton.runtime.jit.JITFunction.run", side_effect=AssertionError("bound again")):
                for _ in range(4):  # the third time is of a kind that is known, the fourth of launches that are
                    directly = launches(found, step, direct=True)
                    assert directly == by_triton, f"{name}, {n} x {d}, {dtype}, shift {shift}"
            count += len(directly)
    return count


def known_kinds_are_not_looked_at(found: Launched) -> int:
    """From the fourth call of a kind on, no launch of the fused kernels' steps asks which kernel it is of."""
    count, key = 0, launcher._Pattern.key
    for name, step in steps(40, 24, torch.bfloat16, 0).items():
        if name not in ("batch", "both directions", "views", "float queue", "another gradient"):
            continue
        for _ in range(4):
            launches(found, step, direct=True)
        with mock.patch.object(launcher._Pattern, "key", autospec=True, side_effect=key) as asked:
            launches(found, step, direct=True)
        assert not asked.called, name
        count += len(found)
    return count


def calls_that_are_nearly_of_a_kind(found: Launched) -> int:
    """Other kernels than those of the calls before, which had the same shapes and dtypes."""
    count, (query, key, other) = 0, (torch.randn(40, 24, requires_grad=True) for _ in range(3))
    criterion, queue, short = EqCoLoss(), MomentumQueue(64, 24), MomentumQueue(64, 24)
    for one in (queue, short):
        one.enqueue(torch.randn(40, 24))
    short.load_state_dict({**short.state_dict(), "count": short.count.int()}, assign=True)
    halves = torch.autograd.graph.saved_tensors_hooks(Tensor.half, lambda x: x)

    def gradients(*negatives: Tensor | MomentumQueue) -> object:
        return torch.autograd.grad(criterion(query, key, *negatives), [query, key])

    def from_halves() -> object:
        with halves:
            loss = criterion(query, key)
        return torch.autograd.grad(loss, [query, key])

    pairs: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: gradients(other), lambda: gradients(key)),
        (lambda: gradients(queue), lambda: gradients(short)),
        (gradients, from_halves),
    ]
    for of_a_kind, step in pairs:
        for _ in range(4):
            launches(found, of_a_kind, direct=True)
        by_triton = launches(found, step, direct=False)
        assert launches(found, step, direct=True) == by_triton
        count += len(by_triton)
    return count


def arguments_that_take_another_kernel(found: Launched) -> int:
    """Each call differs from the first in one thing that Triton compiles another kernel for."""
    from eqco_loss.ops.triton.arguments import kernels

    x, out, factor = torch.zeros(4, 32), torch.zeros(4, 32), torch.zeros(4)
    first = (x, 32, 1, out, factor, 4)
    others = [
        (x.half(), *first[1:]),
        (torch.zeros(4 * 32 + 1)[1:], *first[1:]),  # not aligned to 16 bytes
        (x, 33, *first[2:]),  # a stride that 16 does not divide
        (x, 32, 2, *first[3:]),  # one that is not 1
        (x, 2**31, *first[2:]),  # one of 64 bits
        (x, 32, 1, None, factor, 4),
        (*first[:5], 2**31),  # a size of 64 bits, of which nothing else counts
    ]

    def kernel(call: tuple[Any, ...], direct: bool, **changed: bool) -> Any:
        step = lambda: launcher.launch(kernels().forward.prepare_rows, (1,), *call, **{**CONSTANTS, **changed})  # noqa: E731
        (one,) = launches(found, step, direct=direct)
        return one[0], len(one)

    by_triton = [kernel(call, False) for call in (first, *others)]
    assert len(set(by_triton)) == len(by_triton)
    for _ in range(2):
        assert [kernel(call, True) for call in (first, *others)] == by_triton
        assert kernel((*first[:5], 16), True) == by_triton[0]
        assert kernel(first, True, CLEAN=True) == kernel(first, False, CLEAN=True) != by_triton[0]
    return len(by_triton)


def what_is_kept_has_an_end(found: Launched) -> int:
    from eqco_loss.ops.triton.arguments import kernels

    x = torch.zeros(4, 32)
    with mock.patch.object(launcher, "MOST_KEPT", 4), mock.patch.object(launcher, "_bound", {}):
        for stride in range(32, 52):
            launcher.launch(kernels().forward.prepare_rows, (1,), x, stride, 1, None, x, 4, **CONSTANTS)
        (one,) = launcher._bound.values()
        (pattern,) = one.patterns.values()
        assert 0 < len(pattern.compiled) <= 4
        for length in range(10):
            launcher.bind(kernels().forward.prepare_rows, {**CONSTANTS, "BLOCK": length})
            assert 0 < len(launcher._bound) <= 4
        return len(pattern.compiled)


def main() -> int:
    found: Launched = []
    with noted(found):
        print(f"{same_kernels(found)} launches ran the kernels that Triton's launcher ran")
        print(f"{known_kinds_are_not_looked_at(found)} launches were of kinds that are known")
        print(f"{calls_that_are_nearly_of_a_kind(found)} launches were nearly of a kind")
        print(f"{arguments_that_take_another_kernel(found)} kinds of arguments ran a kernel each")
        print(f"{what_is_kept_has_an_end(found)} kernels were kept of 20 strides")
    return 0


if __name__ == "__main__":
    sys.exit(main())
