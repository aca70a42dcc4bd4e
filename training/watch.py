"""Reasons for a run to stop before its end: signals and a time limit."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TIME_LIMIT = 75  # "try again" in sysexits.h, and no signal's number


class Stopped(Exception):
    """A run stopped early, after writing its checkpoint.

    Attributes:
        exit_code: 128 + N for signal N, 75 for the time limit.
    """

    def __init__(self, reason: int) -> None:
        timely = reason == TIME_LIMIT
        super().__init__("the time limit" if timely else signal.Signals(reason).name)
        self.exit_code = reason if timely else 128 + reason


class Watch:
    """Collects reasons for a run to stop.

    Args:
        max_seconds: time within which the run must have written its checkpoint; None: no limit.
        started: the monotonic time from which it counts; None: now.
    """

    def __init__(self, max_seconds: float | None = None, started: float | None = None) -> None:
        self._signals: list[int] = []
        began = time.monotonic() if started is None else started
        self._deadline = None if max_seconds is None else began + max_seconds

    def reason(self, needed: float) -> int:
        """Why to stop before work of ``needed`` seconds: a signal's number, TIME_LIMIT, or 0."""
        if self._signals:
            return self._signals[0]
        late = self._deadline is not None and time.monotonic() + needed > self._deadline
        return TIME_LIMIT if late else 0

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as reasons to stop; after the first, they act as they did before."""
        before = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def receive(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)
            put_back()

        def put_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in before:
            signal.signal(number, receive)
        try:
            yield
        finally:
            put_back()
