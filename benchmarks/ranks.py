"""What ``gather`` moves and holds, rank by rank, and the arithmetic that carries it to a thousand GPUs.

    python -m benchmarks.ranks              # 1, 2 and 4 gloo ranks on this machine

Bytes are those handed to the collectives, counted as they are called, and where the system tells, those that crossed
the loopback interface; memory is the allocator's peak in a step. Not speed: ranks that share cores show contention.
docs/scaling.md has the arithmetic.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, multiprocessing

from eqco_loss import EqCoLoss

from .measure import RESULTS, Row, peak_extra_bytes, provenance, write_csv

LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
AGREED = 8 * 8  # bytes of each rank: eight int64
STEPS = 20  # between two readings of the loopback's counter
Form = Literal["keys detached", "both gradients"]
FORMS: tuple[Form, ...] = ("keys detached", "both gradients")  # SiMo's and SimCo's


NETWORK = 50e9  # bytes a second and GPU: 400 Gb/s
PRODUCTS = 4e14  # operations a second of half-precision matrix products: about half of an H200's peak
STEP = 0.15  # seconds of a SiMo step of ResNet-50 with 256 images of 224 px: 1,700 images/s


@dataclass(frozen=True)
class Args:
    ranks: tuple[int, ...] = (1, 2, 4)
    n: int = 256  # queries of each rank
    d: int = 128
    out: Path = RESULTS / "ranks.csv"


class Traffic(NamedTuple):
    """Bytes of one rank and one step."""

    gathered: int  # keys of all ranks, as they arrive
    reduced: int  # the keys' gradients, summed over ranks
    agreed: int  # numbers exchanged first, so that ranks that disagree raise an error

    def sent(self, ranks: int) -> float:
        """What a rank puts on the wire: gather and reduction go around a ring."""
        return (ranks - 1) / ranks * (self.gathered + 2 * self.reduced + self.agreed)


def traffic(ranks: int, n: int, d: int, form: Form, element: int = 4) -> Traffic:
    """The arithmetic: every rank sees all rows, and returns a gradient for each where keys learn."""
    rows = ranks * n * d * element
    return Traffic(rows, rows if form == "both gradients" else 0, ranks * AGREED)


class Projection(NamedTuple):
    """A step of one GPU among many: N = 256 queries, D = 128, float32 keys."""

    ranks: int
    keys: int  # of all ranks: K + 1
    gathered_mb: float
    reduced_mb: float
    detached_ms: float  # on the network, keys detached
    learning_ms: float  # on the network, gradients to both sides
    compute_ms: float  # matrix products of this rank's rows, gradients to both sides
    share: float  # of a step, the network with gradients to both sides


def projection(ranks: int, n: int = 256, d: int = 128) -> Projection:
    """The arithmetic of ``traffic`` at the speeds above."""
    detached, learning = (traffic(ranks, n, d, form) for form in FORMS)
    compute = 4 * 2.0 * n * (ranks * n) * d / PRODUCTS
    network = learning.sent(ranks) / NETWORK
    return Projection(
        ranks,
        ranks * n,
        detached.gathered / 1e6,
        learning.reduced / 1e6,
        1e3 * detached.sent(ranks) / NETWORK,
        1e3 * network,
        1e3 * compute,
        network / STEP,
    )


def largest_world(share: float, form: Form, n: int = 256, d: int = 128) -> int:
    """How many ranks there can be while the network takes no more than this share of a step."""
    ranks = 2
    while traffic(ranks + 1, n, d, form).sent(ranks + 1) / NETWORK <= share * STEP:
        ranks += 1
    return ranks


def main(args: Args) -> None:
    if any(count < 1 for count in args.ranks) or args.n < 2 or args.d < 1:
        raise SystemExit(f"error: ranks, n, d: expected at least 1, 2 and 1, got {args.ranks}, {args.n}, {args.d}.")
    origin = provenance("cpu")
    rows: list[Row] = []
    print(f"N = {args.n} a rank, D = {args.d}, float32; {origin['device']}")
    print(
        f"{'':18}{'ranks':>6}{'gathered':>12}{'reduced':>12}{'agreed':>8}{'on the wire':>14}{'peak MB':>9}{'loss':>20}"
    )
    for form in FORMS:
        for count in args.ranks:
            found = measured(count, args.n, args.d, form)
            wire = "" if found["wire"] is None else f"{found['wire']:.0f}"
            print(
                f"{form:18}{count:6}{found['gathered']:12}{found['reduced']:12}{found['agreed']:8}{wire:>14}"
                f"{found['peak'] / 1e6:9.2f}{found['loss']:20.12f}"
            )
            rows.append(
                {
                    "form": form,
                    "ranks": str(count),
                    "n": str(args.n),
                    "d": str(args.d),
                    "gathered_bytes": str(found["gathered"]),
                    "reduced_bytes": str(found["reduced"]),
                    "agreed_bytes": str(found["agreed"]),
                    "wire_bytes_all_ranks": wire,
                    "peak_extra_mb": f"{found['peak'] / 1e6:.3f}",
                    "mean_loss": f"{found['loss']:.9f}",
                    **origin,
                }
            )
            write_csv(args.out, rows)
    print(f"written to {args.out}")


def measured(ranks: int, n: int, d: int, form: Form) -> dict[str, Any]:
    """What rank 0 saw; the wire's bytes are of all ranks, a step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers: Any = context.SimpleQueue()
    workers = [
        context.Process(target=rank_main, args=(rank, ranks, port, n, d, form, answers)) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
        workers[0].join(0.1)
    if any(worker.exitcode for worker in workers):
        for worker in workers:
            worker.terminate()  # it would wait for the one that failed
        raise SystemExit("error: ranks: one of them failed; its own error is above.")
    answer: dict[str, Any] = answers.get()
    return answer


def rank_main(rank: int, ranks: int, port: int, n: int, d: int, form: Form, answers: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "KINETO_LOG_LEVEL": "99"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(rank)
    query = torch.randn(n, d, generator=generator)
    key = (query + torch.randn(n, d, generator=generator)).requires_grad_(form == "both gradients")
    criterion = EqCoLoss(0.2, alpha=65536, gather=True)
    query.requires_grad_()

    def step() -> Tensor:
        loss: Tensor = criterion(query, key)
        torch.autograd.grad(loss, [query, key] if key.requires_grad else [query])
        return loss.detach()

    step()
    with counted() as bytes_of:
        loss = step()
    wire = across_loopback(step)
    peak = torch.tensor([peak_extra_bytes(step, "cpu")])
    dist.all_reduce(loss)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if rank == 0:
        answers.put({**bytes_of, "wire": wire, "peak": int(peak), "loss": float(loss) / ranks})
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes by purpose, of every collective that is called inside."""
    found = {"gathered": 0, "reduced": 0, "agreed": 0}
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, reduce = getattr(dist, name), dist.all_reduce

    def counting_gather(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["gathered" if out.is_floating_point() else "agreed"] += out.nbytes
        return gather(out, x, *args, **kwargs)

    def counting_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["reduced"] += x.nbytes
        return reduce(x, *args, **kwargs)

    with mock.patch.object(dist, name, counting_gather), mock.patch.object(dist, "all_reduce", counting_reduce):
        yield found


def across_loopback(step: Callable[[], object]) -> float | None:
    """Bytes a step, of all ranks; None where the system does not tell. Other programs' traffic counts too."""
    if not LOOPBACK.exists():
        return None
    dist.barrier()
    before = int(LOOPBACK.read_text())
    dist.barrier()
    for _ in range(STEPS):
        step()
    dist.barrier()
    return (int(LOOPBACK.read_text()) - before) / STEPS


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
