"""The two criteria, as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NoReturn

from torch import Tensor

from . import _validate as check
from . import functional
from ._names import check_positional, explains_names
from .distributed import Gather, HoldsGroup
from .functional import LossMetrics
from .settings import Backend, InBatch, Inputs, Negatives, Reduction, Sampling, Settings

__all__ = ["DualTempInfoNCE", "EqCoLoss", "LossMetrics"]


class Criterion(HoldsGroup):
    """What both losses share: the settings, and three ways to call them."""

    temperature: float | Tensor
    inter_temperature: float | None
    alpha: float | None
    in_batch: InBatch | None
    num_negatives: int | None
    sampling: Sampling
    symmetric: bool
    normalize: bool
    reduction: Reduction
    backend: Backend
    _has_two_temperatures: ClassVar[bool]

    def __init__(self, settings: Settings, positional: tuple[object, ...]) -> None:
        super().__init__()
        check_positional(positional)
        check.settings(settings)
        check.lasting_temperature(settings.temperature)
        for name, value in zip(Settings._fields, settings, strict=True):  # an nn.Parameter registers itself
            setattr(self, name, value)

    @property
    def settings(self) -> Settings:
        """What the attributes say now: they may be changed between calls, and are checked in each."""
        chosen = self._attributes()
        if (chosen.inter_temperature is not None) != self._has_two_temperatures:
            raise ValueError(
                f"inter_temperature: expected {'a number' if self._has_two_temperatures else 'None'} in "
                f"{type(self).__name__}, got {chosen.inter_temperature!r}. EqCoLoss has one temperature, "
                "DualTempInfoNCE has two: construct the other one."
            )
        return chosen

    def _attributes(self) -> Settings:
        return Settings(*[getattr(self, name) for name in Settings._fields])

    if TYPE_CHECKING:  # nn.Module's says nothing about arguments and returns Any

        def __call__(
            self,
            query: Tensor,
            positive_key: Tensor,
            negative_keys: Negatives = None,
            *,
            query_ids: Tensor | None = None,
            negative_ids: Tensor | None = None,
            negative_mask: Tensor | None = None,
        ) -> Tensor:
            """The loss, as ``forward``."""

    @explains_names
    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Negatives = None,
        *,
        query_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss: a 0-dim tensor, or (N,) with ``reduction="none"``. Arguments and shapes: see the class."""
        return functional.compute_loss(
            self.settings, Inputs(query, positive_key, negative_keys, query_ids, negative_ids, negative_mask)
        )

    @explains_names
    def with_metrics(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Negatives = None,
        *,
        query_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> LossMetrics:
        """The loss and what to log beside it, as a NamedTuple. Arguments and shapes: see the class.

        It computes both itself: a subclass's ``forward`` and hooks of the module see none of it.
        """
        return functional.compute_metrics(
            self.settings, Inputs(query, positive_key, negative_keys, query_ids, negative_ids, negative_mask)
        )

    @explains_names
    def chosen_backend(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Negatives = None,
        *,
        query_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> tuple[str, str]:
        """The backend that would serve this call, and why."""
        return functional.chosen_backend(
            self.settings, Inputs(query, positive_key, negative_keys, query_ids, negative_ids, negative_mask)
        )

    def extra_repr(self) -> str:
        shown = self._attributes()._asdict()
        if isinstance(shown["temperature"], Tensor):
            shown["temperature"] = "learned" if shown["temperature"].requires_grad else "a tensor"
        if shown["inter_temperature"] is None:
            del shown["inter_temperature"]
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class EqCoLoss(Criterion):
    """InfoNCE whose value and gradient do not depend on how many negatives it is given.

        L_i = log(1 + (alpha / K_i) sum_j exp((s(q_i, n_j) - s(q_i, k_i)) / t))

    With s the cosine similarity and K_i the number of negatives that query i really has. ``alpha`` is how many
    negatives the loss mimics: SiMo trains with 16 and mimics 256 or 65536. ``alpha = K`` (or None) is InfoNCE. Exact,
    without allocating the N x K similarities, but on a CPU those of small batches, up to 2^20.

    Source: EqCo (Zhu et al. 2020), equations 1 and 5 with the margin ``t log(alpha / K)``; Theorems 1 and 2 are among
        the metrics.

    Args:
        temperature: t > 0, a number, or a 0-dim tensor, which may require a gradient. An ``nn.Parameter`` becomes the
            module's own. A compiled program has numbers built in: one that a schedule changes should be a tensor. One
            that is computed from a parameter, such as CLIP's, belongs in ``eqco_loss.functional.eqco_loss``.
        positional: nothing; it turns ``EqCoLoss(0.2, 16)``, which could mean two things, into an error that says so.
        alpha: how many negatives to mimic, > 0. None: as many as there are, row by row.
        in_batch: the batch's own negatives. None: ``"keys"`` if no ``negative_keys`` are given, else none. ``"keys"``:
            the other rows of positive_key. ``"views"``: every other embedding of both views (SimCLR), 2N - 2. With
            ``negative_keys`` both sets count.
        num_negatives: how many of the batch's other keys each query meets; None for all N - 1. Only without
            ``negative_keys``. With fewer others than asked for all are used, and the margin follows.
        sampling: which ones. ``"rolled"``: the next K rows, cyclic, a uniform draw after a shuffle. ``"random"``: a
            draw per query, without replacement, from the device's generator; for sorted or grouped batches.
        symmetric: the mean of both directions, query to key and key to query, with gradient to both sides. Only without
            ``negative_keys``; ``reduction="none"`` stays (N,).
        normalize: bring query, positive and negative keys to unit length first. A MomentumQueue holds unit rows and is
            left as it is.
        gather: True, or a process group: in-batch negatives come from all its ranks, uneven batches included, gradients
            return to the rank that owns the key, and each rank's value is its rows' sum times (world size / rows of all
            ranks), such that after DDP's averaging values and gradients are those of one process with the whole batch
            (``"sum"``: times the world size; ``"none"``: as it is). A learned temperature gets the averaged gradient on
            every rank, inside a DDP module or beside it.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: ``"auto"``, or ``"torch"`` or ``"triton"`` by name, which obeys or raises; ``chosen_backend(...)``
            tells what serves a call and why. The Triton kernels take float16, bfloat16 and float32 with D up to 512
            (``"auto"``: 256), on NVIDIA GPUs of compute capability 8.0 or newer; ``"wide"`` takes any D on CUDA.

    Shape:
        - query, positive_key: (N, D); row i of positive_key is query i's positive. float16, bfloat16, float32 or
          float64.
        - negative_keys: None for the other rows of positive_key; (K, D) shared by all queries; (N, K, D) per query; or
          a ``MomentumQueue``.
        - query_ids (N,), negative_ids (K,) or (N, K): integers. A negative with the query's id is left out; the
          positive always stays. In a batch query_ids serve both sides, and a queue uses the ids it stored.
        - negative_mask (K,) or (N, K): bool, beside a tensor of negative_keys; True where the key is a negative of the
          query. With a queue (size,) or (N, size), over its slots as they are stored in ``queue.contents``. What ids
          or the mask leave out may hold anything, NaN too, and gets no gradient.
        - output: 0-dim, or (N,) with ``reduction="none"``; float32 for half inputs. Gradients reach query, positive_key
          and negative_keys.

    Raises:
        ValueError: a temperature or alpha that is not positive, N = 1 with no other negatives, an empty queue, shapes,
            devices, ids or a mask that do not fit, a row that ids or the mask leave without negatives (on CPU without
            ``gather``; NaN in that row elsewhere).
        TypeError: arguments of the wrong kind, embeddings that are not floating point, ids that are not integers, a
            mask that is not bool.

    Examples:
        >>> import torch
        >>> from eqco_loss import EqCoLoss
        >>> criterion = EqCoLoss(temperature=0.2, alpha=65536, num_negatives=16)
        >>> query = torch.randn(256, 128, requires_grad=True)
        >>> positive_key = torch.randn(256, 128)
        >>> loss = criterion(query, positive_key)
        >>> loss.backward()
        >>> criterion.with_metrics(query, positive_key).effective_k
        tensor(16.)
    """

    _has_two_temperatures = False

    @explains_names
    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *positional: NoReturn,
        alpha: float | None = 65536,
        in_batch: InBatch | None = None,
        num_negatives: int | None = None,
        sampling: Sampling = "rolled",
        symmetric: bool = False,
        normalize: bool = True,
        gather: Gather = False,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            Settings(
                temperature=temperature,
                inter_temperature=None,
                alpha=alpha,
                in_batch=in_batch,
                num_negatives=num_negatives,
                sampling=sampling,
                symmetric=symmetric,
                normalize=normalize,
                gather=gather,
                reduction=reduction,
                backend=backend,
            ),
            positional,
        )


class DualTempInfoNCE(Criterion):
    """InfoNCE with one temperature within each row and another across rows.

        L_i = sg[(1 - p_i(T)) / (1 - p_i(t))] (-log p_i(t)),    p_i(t) = sigmoid(gap_i(t))

    The small intra temperature t decides which negatives of a row matter; the large inter temperature T decides how
    much each row matters. The weight is detached (sg). Computed without 1 - p, so it stays finite where the published
    code is NaN.

    Source: Dual Temperature Helps Contrastive Learning Without Many Negative Samples (Zhang et al. 2022), the loss of
        SimCo and SimMoCo. ``alpha`` is an extension: EqCo's margin in both gaps.

    Args:
        temperature: t > 0, within a row; a number or a 0-dim tensor, which may require a gradient.
        inter_temperature: T > 0, across rows; a number.
        positional: nothing, as in ``EqCoLoss``.
        alpha: how many negatives to mimic, > 0. None, the paper's loss: as many as there are.
        in_batch, num_negatives, sampling, symmetric, normalize, gather, reduction, backend: as in ``EqCoLoss``.

    Shape:
        As ``EqCoLoss``.

    Raises:
        ValueError, TypeError: as ``EqCoLoss``.

    Examples:
        >>> import torch
        >>> from eqco_loss import DualTempInfoNCE
        >>> criterion = DualTempInfoNCE(temperature=0.1, inter_temperature=1.0)
        >>> query = torch.randn(256, 128, requires_grad=True)
        >>> criterion(query, torch.randn(256, 128)).backward()
    """

    _has_two_temperatures = True

    @explains_names
    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        inter_temperature: float = 1.0,
        *positional: NoReturn,
        alpha: float | None = None,
        in_batch: InBatch | None = None,
        num_negatives: int | None = None,
        sampling: Sampling = "rolled",
        symmetric: bool = False,
        normalize: bool = True,
        gather: Gather = False,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        check.inter_temperature(inter_temperature)
        super().__init__(
            Settings(
                temperature=temperature,
                inter_temperature=inter_temperature,
                alpha=alpha,
                in_batch=in_batch,
                num_negatives=num_negatives,
                sampling=sampling,
                symmetric=symmetric,
                normalize=normalize,
                gather=gather,
                reduction=reduction,
                backend=backend,
            ),
            positional,
        )
