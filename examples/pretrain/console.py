"""What a script prints and how it ends, without torch, so that ``--help`` need not wait for it."""

import os
import sys
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
