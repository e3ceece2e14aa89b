"""Ctrl-C and SIGTERM end a run after the step it is in."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """The first signal that asked to stop: its ``number``, 0 as long as none did."""

    def __init__(self, *, speaks: bool) -> None:
        self.number, self.speaks = 0, speaks

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM are kept in ``number``; Ctrl-C twice ends the run at once."""
        asked = 0.0

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            if number == signal.SIGINT and self.number and time.monotonic() - asked > 1:
                raise KeyboardInterrupt
            if not self.number:
                self.number, asked = number, time.monotonic()
                if self.speaks:
                    again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ", as SIGTERM asks"
                    print(f"\nstopping after this step{again}", file=sys.stderr, flush=True)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
