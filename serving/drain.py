"""The end of a worker: no request that it has accepted is lost.

BentoML's supervisor sends SIGTERM to each worker and waits. uvicorn by itself closes its port at once,
tells nobody before, and waits for requests under way without bound. Here the worker says first that it
is not ready, still takes what is on its way to it, then refuses new requests, finishes those under way
and only then lets uvicorn stop.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from serving.errors import StoppingError
from serving.settings import SUPERVISOR

logger = logging.getLogger("serving")

ARRIVING_SECONDS = 0.3  # in which requests that were sent before the signal still come in
REFUSING_SECONDS = 0.3  # at least, in which clients on kept connections are told, not cut off
CLOSING_SECONDS = 2  # for clients that do not read their answers, after all has been answered
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's <sys/prctl.h>


class Drain:
    """Counts the requests under way, and at SIGTERM or SIGINT waits for them.

    Attributes:
        stopping: whether a signal came; the worker is not ready any more.
        refusing: whether new requests are refused.
    """

    def __init__(self, limit: float) -> None:
        """
        Args:
            limit: seconds in which the requests under way may finish; then they get 503.
        """
        self.stopping = False
        self.refusing = False
        self._limit = limit
        self._expired = False
        self._under_way: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._waiting: asyncio.Task[None] | None = None

    def listen(self, server: uvicorn.Server) -> None:
        """Take the signals over from the server; called in its event loop, in the main thread.

        The end of the supervisor, however it came, is as SIGTERM then (on Linux).
        """
        server.config.timeout_graceful_shutdown = CLOSING_SECONDS
        loop = asyncio.get_running_loop()

        def stop(number: int, frame: FrameType | None) -> None:
            # An event loop that sleeps is not woken up by a handler alone.
            if self.stopping and number == signal.SIGINT:  # again Ctrl-C: at once
                loop.call_soon_threadsafe(self._expire)
            else:
                loop.call_soon_threadsafe(self._begin, lambda: server.handle_exit(number, None))

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        # A worker would outlive a supervisor that is killed, and hold its port.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
            parent = str(os.getppid())
            if os.environ.get(SUPERVISOR, parent) != parent:  # it has ended already
                stop(signal.SIGTERM, None)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, which is finished before the worker ends.

        Raises:
            StoppingError: the worker takes no new requests, or this one took too long to end.
        """
        if self.refusing:
            raise StoppingError("The service is stopping; another one or a later try may answer.")
        task = asyncio.current_task()
        assert task is not None, "requests are handled in tasks"
        self._under_way.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not self._expired:
                raise
            task.uncancel()
            raise StoppingError("The service stopped before the request was finished.") from None
        finally:
            self._under_way.discard(task)
            if not self._under_way:
                self._idle.set()

    def _begin(self, stop: Callable[[], None]) -> None:
        if not self.stopping:
            self.stopping = True
            self._waiting = asyncio.get_running_loop().create_task(self._finish(stop))

    async def _finish(self, stop: Callable[[], None]) -> None:
        await asyncio.sleep(ARRIVING_SECONDS)
        self.refusing = True
        logger.info("stopping; %d requests are under way", len(self._under_way))
        await asyncio.sleep(REFUSING_SECONDS)
        try:
            async with asyncio.timeout(self._limit):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests took over %g s to finish", len(self._under_way), self._limit)
            self._expire()
        stop()

    def _expire(self) -> None:
        """Let go of the requests under way, and take no new ones."""
        self.refusing = self._expired = True
        for task in self._under_way:
            task.cancel()
