"""Which tiles are fastest on this GPU: candidates for the static tables in eqco_loss/ops/triton/tables.py, in turn.

    python -m benchmarks.tune                              # every pass in bfloat16
    python -m benchmarks.tune --passes "M1 forward" --dtype float32

Each candidate must give what the table's own tile gives before it is timed, in CUDA graphs, L2 flushed and warm; one
that does not fit or is wrong is a row that says so. The fastest of each pass are printed beside the table's tile; the
tables themselves are changed by hand.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from eqco_loss.ops import Pairs
from eqco_loss.ops.triton import arguments, backward, launch
from eqco_loss.ops.triton.tables import Tile

from . import records
from .measure import RESULTS, Row, Timing, captured, interleave, interleave_gpu, provenance, set_precision, write_csv
from .runner import check_device

Outputs = tuple[Tensor, ...]
Pass = Callable[[Tile | None], Outputs]
RESIDENT, STREAMED, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
PASSES = ("M1 forward", "M1 autocast", "M2 forward", "S1 forward", "S1 keys' gradient", "S2 forward", "S2 gradient")
CLOSE = {"float32": 1e-4, "high": 1e-2, "bfloat16": 2e-2, "float16": 1e-2}  # to the table's tile, in the norm


@dataclass(frozen=True)
class Args:
    passes: tuple[str, ...] = PASSES
    dtype: Literal["float32", "high", "bfloat16", "float16"] = "bfloat16"
    d: int = 128  # features
    rounds: int = 20
    waves: tuple[float, ...] = (1.0, 2.0)  # times as many splits of the forward passes as the launcher takes
    processes: int = 1  # that compile the candidates before they are timed
    out: Path = RESULTS / "tune.csv"


def main(args: Args) -> None:
    unknown = [name for name in args.passes if name not in PASSES]
    if unknown:
        raise SystemExit(f"error: passes: unknown {', '.join(unknown)}; known: {', '.join(PASSES)}.")
    for setting in ("rounds", "processes"):
        if not getattr(args, setting) > 0:
            raise SystemExit(f"error: {setting}: expected more than 0, got {getattr(args, setting)}.")
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU, and tiles are tuned on the GPU that they are for.")
    check_device("cuda")
    set_precision(args.dtype)
    rows: list[Row] = []
    origin = provenance("cuda")
    every = passes(args.dtype, args.d, "cuda")
    compile_first(args)
    for name in args.passes:
        found = tried(every[name], tiles(args.dtype), args.waves if "forward" in name else (1.0,), args.dtype)
        timings = timed({place: step for place, (_, _, step) in enumerate(found) if callable(step)}, args.rounds)
        part = []
        for place, (tile, wave, step) in enumerate(found):
            row = {"pass": name, "dtype": args.dtype, "d": str(args.d)}
            row |= dict(zip(Tile._fields, map(str, tile or ("table",) * len(Tile._fields)), strict=True))
            row |= {"waves": f"{wave:g}", "status": step if isinstance(step, str) else "timed", "us": "", "warm_us": ""}
            if place in timings:
                cold, warm = timings[place]
                row |= {"us": f"{1e6 * cold.median:.4g}", "warm_us": f"{1e6 * warm.median:.4g}"}
            part.append(row | origin)
        rows += part
        write_csv(args.out, rows)
        show(name, part)
    print(f"written to {args.out}")


def compile_first(args: Args) -> None:
    """Each candidate once, in processes side by side, so that its kernels lie in Triton's cache on disk."""
    if args.processes == 1:
        return
    work = list(itertools.product(args.passes, tiles(args.dtype)))
    shares = [(args.dtype, args.d, work[place :: args.processes]) for place in range(args.processes)]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.starmap(compile_some, shares, chunksize=1)


def compile_some(dtype: str, d: int, work: list[tuple[str, Tile | None]], device: str = "cuda") -> None:
    every = passes(dtype, d, device)
    for name, tile in work:
        with contextlib.suppress(Exception):  # the one that times them says why
            every[name](tile)


def tiles(dtype: str) -> list[Tile | None]:
    """The table's (None), and all that may be worth a try."""
    half = dtype in ("bfloat16", "float16")
    every = map(Tile, *zip(*itertools.product(RESIDENT, STREAMED, WARPS, STAGES), strict=True))
    return [None, *(x for x in every if (x.resident >= 32 and x.streamed >= 32) or not half)]


def passes(dtype: str, d: int, device: str, m: int = 256, k: int = 65536, n: int = 4096) -> dict[str, Pass]:
    """The kernels' passes, by the tile that they take."""
    kind = {"high": torch.float32}.get(dtype) or getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, d, generator=generator).to(device, kind)

    q, queue, query = random(m), F.normalize(random(k).float()).to(kind), random(n)
    key = query + random(n)
    views, partners, band = torch.cat([query, key]), torch.cat([key, query]), Pairs(band=[0, n - 1, n])
    grad, ids = torch.tensor(1.0, device=device), torch.arange(k, device=device)

    def forward(query: Tensor, positive: Tensor, keys: Tensor, pairs: Pairs, **fields: Any) -> Pass:
        call = records.row_losses(query, positive, keys, pairs, **fields)
        return lambda tile: launch.row_losses(call, tile)

    batch = {"normalize_keys": True, "need_positive_gradient": True}
    loss_only = {"normalize_keys": True, "need_query_gradient": False}
    of_keys = records.keys_gradient(query, key, grad, launch.row_losses(
        records.row_losses(query, key, key, band, **batch)).rows, band)  # fmt: skip
    of_views = records.symmetric_gradient(views, grad, launch.row_losses(
        records.row_losses(views, partners, views, band, **loss_only)).rows)  # fmt: skip
    ours: dict[str, Pass] = {
        "M1 forward": forward(q, q, queue, Pairs()),
        "M1 autocast": forward(q.float(), q.float(), queue.float(), Pairs(), autocast=kind),
        "M2 forward": forward(q, q, queue, Pairs(query_ids=ids[:m], key_ids=ids)),
        "S1 forward": forward(query, key, key, band, **batch),
        "S1 keys' gradient": lambda tile: (backward.keys_gradient(of_keys, tile).keys,),
        "S2 forward": forward(views, partners, views, band, **loss_only),
        "S2 gradient": lambda tile: backward.symmetric_gradient(of_views, tile)[:1],
    }
    return {name: ours[name] for name in PASSES}


def tried(
    one: Pass, candidates: list[Tile | None], waves: tuple[float, ...], dtype: str
) -> list[tuple[Tile | None, float, Callable[[], Outputs] | str]]:
    """Each candidate that gives what the table's tile gives, as a step to time; of the others, why not."""
    expected = one(None)
    found: list[tuple[Tile | None, float, Callable[[], Outputs] | str]] = []
    fits = arguments.wave
    for tile, wave in tqdm(list(itertools.product(candidates, waves)), desc="checking", leave=False):

        def more(*of: object, wave: float = wave) -> int:
            return max(1, int(wave * fits(*of)))  # type: ignore[arg-type]

        def step(tile: Tile | None = tile, more: Callable[..., int] = more) -> Outputs:
            with mock.patch.object(arguments, "wave", more):
                return one(tile)

        try:
            pairs = [(a.double(), b.double()) for a, b in zip(step(), expected, strict=True) if a.numel()]
            error = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
            wrong = not error <= CLOSE[dtype]  # a NaN is wrong
            found.append((tile, wave, f"differs by {error:.1e}" if wrong else step))
        except Exception as failure:  # does not fit, or does not compile
            found.append(
                (tile, wave, f"{type(failure).__name__}: {(str(failure).splitlines() or ['no text'])[0][:80]}")
            )
    return found


def timed(
    steps: dict[int, Callable[[], Outputs]], rounds: int, device: str = "cuda"
) -> dict[int, tuple[Timing, Timing]]:
    """Cold and warm; on a CPU, where only the interpreter runs kernels, wall-clock twice."""
    named = {str(place): step for place, step in steps.items()}
    if device == "cuda":
        measured = interleave_gpu({name: captured(step).replay for name, step in named.items()}, rounds)
    else:
        measured = {name: (one, one) for name, one in interleave(named, rounds, "steps").items()}
    return {int(name): both for name, both in measured.items()}


def show(name: str, rows: list[Row]) -> None:
    done = sorted((row for row in rows if row["us"]), key=lambda row: float(row["us"]))
    best = [row for row in done if row["resident"] != "table"][:8]
    print(f"\n{name}, {rows[0]['dtype']}, D = {rows[0]['d']}: {len(done)} of {len(rows)} ran")
    for row in [*(row for row in done if row["resident"] == "table"), *best]:
        tile = " x ".join(row[field] for field in Tile._fields)
        print(f"{tile:28} waves {row['waves']:>3}{row['us']:>10} us{row['warm_us']:>10} us warm")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
