"""Where an epoch's time goes: waiting for data, the loss, everything else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

TIMED = ("images_per_s", "data_share", "loss_share", "seconds", "memory_mb")  # columns that no two runs share
MEASURED = 50  # on a GPU, the loss's share is measured in every so many pieces


class Times(NamedTuple):
    seconds: float
    data_share: float  # of the time, waiting for the next batch
    loss_share: float  # of a piece's time, forward and backward of the loss


class Clock:
    """Where an epoch's time goes. On a GPU by events, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.every = device.type == "cuda", MEASURED if device.type == "cuda" else 1

    def start(self) -> None:
        self.begun, self.waited = time.perf_counter(), 0.0
        self.pieces: list[dict[str, Any]] = []
        self.marks: dict[str, Any] | None = None

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def begin_piece(self, number: int) -> None:
        self.marks = {} if number % self.every == min(1, self.every - 1) else None  # not the very first
        self._mark("begin")

    @contextmanager
    def loss(self) -> Iterator[None]:
        self._mark("loss")
        yield
        self._mark("loss end")

    def begin_backward(self, *embeddings: Tensor) -> None:
        self._mark("backward")
        for embedding in embeddings if self.marks is not None else ():
            embedding.register_hook(self._end_backward)

    def _end_backward(self, gradient: Tensor) -> None:
        """The loss's part of it is done where the first embedding has its gradient."""
        if self.marks is not None and "backward end" not in self.marks:
            self._mark("backward end")

    def end_piece(self) -> None:
        self._mark("end")
        if self.marks is not None:
            self.pieces.append(self.marks)

    def stop(self) -> Times:
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begun
        total = sum(self._between(marks, "begin", "end") for marks in self.pieces)
        loss = sum(
            self._between(marks, "loss", "loss end") + self._between(marks, "backward", "backward end")
            for marks in self.pieces
        )
        return Times(seconds, self.waited / seconds, loss / total if total else 0.0)

    def _mark(self, name: str) -> None:
        if self.marks is None:
            return
        if self.cuda:
            self.marks[name] = torch.cuda.Event(enable_timing=True)
            self.marks[name].record()
        else:
            self.marks[name] = time.perf_counter()

    def _between(self, marks: dict[str, Any], begin: str, end: str) -> float:
        if self.cuda:
            return float(marks[begin].elapsed_time(marks[end])) / 1000
        return float(marks[end] - marks[begin])
