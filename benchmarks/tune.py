"""Which tiles are fastest on this GPU: candidates for the static tables in eqco_loss/ops/triton/tables.py, in turn.

    python -m benchmarks.tune                              # every pass of the fused kernels in bfloat16
    python -m benchmarks.tune --passes "M1 forward" --dtype float32
    python -m benchmarks.tune --passes "wide statistics" "wide weights" "wide rows" --dtype amp --d 512

The passes of the wide engine are CLIP's forward, its backward, products by the vendor's library included, and both,
with candidates for eqco_loss/ops/wide/mutual.py; several processes compile these first.

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
from eqco_loss.ops.triton.tables import TileSize

from . import records, tune_wide
from .measure import RESULTS, Row, Timing, captured, interleave, interleave_gpu, provenance, set_precision, write_csv
from .runner import check_device

Outputs = tuple[Tensor, ...]
Pass = Callable[[Any], Outputs]  # by the tile that it takes, None for the table's
RESIDENT, STREAMED, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
PASSES = ("M1 forward", "M1 autocast", "M2 forward", "S1 forward", "S1 keys' gradient", "S2 forward", "S2 gradient")
# To the table's tile, in the norm.
CLOSE = {"float32": 1e-4, "high": 1e-2, "bfloat16": 2e-2, "float16": 1e-2, "amp": 2e-2}
FIELDS = dict.fromkeys(TileSize._fields + tune_wide.Candidate._fields + tune_wide.Rows._fields)  # of any candidate


@dataclass(frozen=True)
class Args:
    passes: tuple[str, ...] = PASSES
    dtype: Literal["float32", "high", "bfloat16", "float16", "amp"] = "bfloat16"  # "amp": wide passes only
    d: int = 128  # features
    n: int = 4096  # images, of the wide passes
    groups: tuple[int, ...] = tune_wide.GROUPS  # rows of tiles that programs share, of the wide passes
    processes: int = 14  # that compile the candidates before they are timed
    rounds: int = 20
    waves: tuple[float, ...] = (1.0, 2.0)  # times as many splits of the forward passes as the launcher takes
    out: Path = RESULTS / "tune.csv"


def main(args: Args) -> None:
    every = (*PASSES, *tune_wide.PASSES)
    unknown = [name for name in args.passes if name not in every]
    if unknown:
        raise SystemExit(f"error: passes: unknown {', '.join(unknown)}; known: {', '.join(every)}.")
    of_wide = [name for name in args.passes if name in tune_wide.PASSES]
    if of_wide and args.dtype in ("float32", "high"):
        raise SystemExit("error: dtype: expected bfloat16, float16 or amp, the wide engine's kernels multiply halves.")
    if args.dtype == "amp" and len(of_wide) < len(args.passes):
        raise SystemExit('error: dtype: "amp" is for the wide passes.')
    if not (args.rounds > 0 and args.processes > 0):
        raise SystemExit(f"error: rounds, processes: expected more than 0, got {args.rounds} and {args.processes}.")
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU, and tiles are tuned on the GPU that they are for.")
    check_device("cuda")
    set_precision(args.dtype)
    rows: list[Row] = []
    origin = provenance("cuda")
    candidates: dict[str, list[Any]] = {name: tiles(args.dtype) for name in PASSES}
    candidates |= {name: tune_wide.candidates(name, args.groups) for name in tune_wide.PASSES}
    problem = tune_wide.Problem(args.dtype, args.d, args.n, "cuda")
    if of_wide:
        tune_wide.compile_all(problem, [(name, tile) for name in of_wide for tile in candidates[name]], args.processes)
    fused = {}
    if len(of_wide) < len(args.passes):
        compile_first(args, [name for name in args.passes if name not in of_wide])
        fused = passes(args.dtype, args.d, "cuda")
    for name in args.passes:
        waves = args.waves if name in PASSES and "forward" in name else (1.0,)
        one = tune_wide.passes(problem)[name] if name in of_wide else fused[name]
        part = compared(name, one, candidates[name], waves, args.dtype, args.d, args.rounds)
        rows += [row | origin for row in part]
        write_csv(args.out, rows)
    print(f"written to {args.out}")


def compared(
    name: str, one: Pass, candidates: list[Any], waves: tuple[float, ...], dtype: str, d: int, rounds: int
) -> list[Row]:
    """Each candidate of a pass is a row, and the fastest are printed."""
    found = tried(one, candidates, waves, dtype)
    timings = timed({place: step for place, (_, _, step) in enumerate(found) if callable(step)}, rounds)
    fields = type(candidates[-1])._fields
    rows = []
    for place, (tile, wave, step) in enumerate(found):
        row = {"pass": name, "dtype": dtype, "d": str(d)} | dict.fromkeys(FIELDS, "")
        row |= dict(zip(fields, map(str, tile or ("table",) * len(fields)), strict=True))
        row |= {"waves": f"{wave:g}", "status": step if isinstance(step, str) else "timed", "us": "", "warm_us": ""}
        if place in timings:
            cold, warm = timings[place]
            row |= {"us": f"{1e6 * cold.median:.4g}", "warm_us": f"{1e6 * warm.median:.4g}"}
        rows.append(row)
    show(name, rows, fields)
    return rows


def compile_first(args: Args, names: list[str]) -> None:
    """Each candidate once, in processes side by side, so that its kernels lie in Triton's cache on disk."""
    work = list(itertools.product(names, tiles(args.dtype)))
    shares = [(args.dtype, args.d, work[place :: args.processes]) for place in range(args.processes)]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.starmap(compile_some, shares, chunksize=1)


def compile_some(dtype: str, d: int, work: list[tuple[str, TileSize | None]], device: str = "cuda") -> None:
    every = passes(dtype, d, device)
    for name, tile in work:
        with contextlib.suppress(Exception):  # the one that times them says why
            every[name](tile)


def tiles(dtype: str) -> list[TileSize | None]:
    """The table's (None), and all that may be worth a try."""
    half = dtype in ("bfloat16", "float16")
    every = map(TileSize, *zip(*itertools.product(RESIDENT, STREAMED, WARPS, STAGES), strict=True))
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
        return lambda tile: tuple(x for x in launch.row_losses(call, tile) if x is not None)

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
        "S2 gradient": lambda tile: (backward.symmetric_gradient(of_views, tile).views,),
    }
    return {name: ours[name] for name in PASSES}


def tried(
    one: Pass, candidates: list[Any], waves: tuple[float, ...], dtype: str
) -> list[tuple[Any, float, Callable[[], Outputs] | str]]:
    """Each candidate that gives what the table's tile gives, as a step to time; of the others, why not."""
    expected = one(None)
    found: list[tuple[Any, float, Callable[[], Outputs] | str]] = []
    plain = arguments.device
    for tile, wave in tqdm(list(itertools.product(candidates, waves)), desc="checking", leave=False):

        def more(x: Tensor, wave: float = wave) -> arguments.Device:
            return plain(x)._replace(warps=wave * plain(x).warps)

        def step(tile: Any = tile, more: Callable[[Tensor], arguments.Device] = more) -> Outputs:
            with mock.patch.object(arguments, "device", more):
                return one(tile)

        try:
            pairs = [(a.double(), b.double()) for a, b in zip(step(), expected, strict=True)]
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


def show(name: str, rows: list[Row], fields: tuple[str, ...]) -> None:
    done = sorted((row for row in rows if row["us"]), key=lambda row: float(row["us"]))
    best = [row for row in done if row[fields[0]] != "table"][:8]
    print(f"\n{name}, {rows[0]['dtype']}, D = {rows[0]['d']}: {len(done)} of {len(rows)} ran")
    for row in [*(row for row in done if row[fields[0]] == "table"), *best]:
        tile = " x ".join(row[field] for field in fields)
        print(f"{tile:44} waves {row['waves']:>3}{row['us']:>10} us{row['warm_us']:>10} us warm")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
