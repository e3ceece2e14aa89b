"""What a script prints and how it ends, without torch, so that ``--help`` need not wait for it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import NoReturn


def legible(text: object) -> str:
    """Of a file's name, which may hold bytes that are no UTF-8: with these as escapes, so that it can be printed."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def fail(message: object) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    message = legible(message)
    raise SystemExit(f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}")


def print_any_name() -> None:
    """Names of files and folders that are not UTF-8 must not end a script that tells of them."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Decorates a script's main: a device without room is told in one line, with ``advice``, the flags that help."""
    try:
        yield
    except Exception as error:
        import torch  # which the script has imported by now

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        reason = ". ".join(" ".join(str(error).split()).split(". ")[:2])
        fail(f"device: it has no room for this run ({reason.rstrip('.')}). Give {advice}.")
