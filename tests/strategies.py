"""Sizes, dtypes, layouts and seeds for hypothesis; the values of tensors come from torch, by a drawn seed."""

import math
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import DTYPES, LOSSES, MODES, Case

seeds = st.integers(0, 2**31 - 1)
temperatures = st.floats(0.01, 1.0)
alphas = st.one_of(st.none(), st.floats(1.0, 2.0**20))


@st.composite
def case_of(
    draw: st.DrawFn,
    *,
    losses: Sequence[str] = LOSSES,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    alpha: st.SearchStrategy[float | None] = alphas,
    ids: Sequence[str] = ("none", "flat", "matrix"),
    normalize: Sequence[bool] = (True, False),
    rows: tuple[int, int] = (3, 12),
    keys: tuple[int, int] = (6, 24),
    features: tuple[int, int] = (2, 19),
    temperature: st.SearchStrategy[float] = temperatures,
) -> Case:
    mode = draw(st.sampled_from(modes))
    return Case(
        loss=draw(st.sampled_from(losses)),
        mode=mode,
        n=draw(st.integers(*rows)),
        k=draw(st.integers(*keys)),
        d=draw(st.integers(*features)),
        dtype=draw(st.sampled_from(dtypes)),
        temperature=draw(temperature),
        inter_temperature=draw(temperature),
        alpha=draw(alpha),
        normalize=draw(st.sampled_from(normalize)),
        ids=draw(st.sampled_from([i for i in ids if i != "matrix" or mode in ("shared", "per_query")])),
        seed=draw(seeds),
    )


def _gap_of_nan(x: Tensor, dim: int) -> Tensor:
    """Rows of x with rows of NaN between them, so that whoever forgets a stride meets a NaN."""
    return torch.stack([x, torch.full_like(x, math.nan)], dim)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "moco (D, K).T": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "first two swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second row": lambda x: (
        _gap_of_nan(x, -2).flatten(-3, -2)[..., ::2, :] if x.ndim == 2 else _gap_of_nan(x, 1)[:, 0]
    ),
    "left columns of a wider matrix": lambda x: torch.cat([x, torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]],
    "right columns, every second": lambda x: _gap_of_nan(x, -1).flatten(-2)[..., ::2],
    "offset into a buffer": lambda x: torch.cat([torch.full_like(x, math.nan), x])[len(x) :],
    "its negative in memory": lambda x: torch._neg_view(-x),  # as that of z.conj().imag is
}
layouts = st.sampled_from(sorted(LAYOUTS))
