"""The operators. ``definition`` says what they compute, ``calls`` what they take and return."""

from .backends import choose
from .calls import KeySet, LogSumExp, Metric, Pairs, Row, RowLosses, RowOutputs, SymmetricLosses
from .operator import logsumexp, requires_grad, row_losses, symmetric_losses

__all__ = [
    "KeySet",
    "LogSumExp",
    "Metric",
    "Pairs",
    "Row",
    "RowLosses",
    "RowOutputs",
    "SymmetricLosses",
    "choose",
    "logsumexp",
    "requires_grad",
    "row_losses",
    "symmetric_losses",
]
