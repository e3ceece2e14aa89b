"""The next batch, made ready while this one is trained on."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning_fabric import Fabric

from .data import Views


def ahead(batches: Iterator[Views], fabric: Fabric) -> Iterator[Views]:
    """The batches, on the device. On CUDA copies and augmentation of the next run on a stream of their own."""
    if fabric.device.type != "cuda":
        for batch in batches:
            yield fabric.to_device(batch)
        return
    stream = torch.cuda.Stream(fabric.device)
    stream.wait_stream(torch.cuda.current_stream(fabric.device))  # which may still be filling the memory to read from

    def prepared() -> tuple[Views, Any] | None:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return None if batch is None else (fabric.to_device(batch), stream.record_event())

    following = prepared()
    while following is not None:
        batch, ready = following
        following = prepared()  # before this one's step is queued, so that it needs not wait for it
        now = torch.cuda.current_stream(fabric.device)
        now.wait_event(ready)
        for tensor in (*batch.views, batch.samples):
            tensor.record_stream(now)  # or its memory would be another batch's while this stream still reads it
        yield batch
