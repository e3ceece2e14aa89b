"""The operators. ``definition`` says what they compute, ``calls`` what they take and return."""

from .backends import choose
from .calls import KeySet, LogSumExp, Metric, Pairs, Row, RowLosses, RowOutputs, SymmetricLosses
from .observers import requires_grad, unobserved
from .operator import Asked, Operator
from .operators import logsumexp, row_losses, symmetric_losses

__all__ = [
    "Asked",
    "KeySet",
    "LogSumExp",
    "Metric",
    "Operator",
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
    "unobserved",
]
