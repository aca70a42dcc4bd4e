"""Graceful shutdown of a worker: no request that it has accepted is lost.

BentoML's supervisor sends SIGTERM to each worker and waits. uvicorn by itself closes its port at once,
without warning, and waits for requests under way without limit. Here the worker first reports that it
is not ready while it still takes requests on their way to it, then refuses new ones, finishes those
under way and only then lets uvicorn stop.
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

ARRIVING_SECONDS = 0.3  # in which requests sent before the signal still arrive and are taken
REFUSING_SECONDS = 0.3  # at least, in which clients on open connections get 503 and are not just cut off
CLOSING_SECONDS = 2  # for clients to read their answers, once all requests have been answered
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's <sys/prctl.h>


class Drain:
    """Keeps track of the requests under way, and waits for them on SIGTERM or SIGINT.

    Attributes:
        stopping: whether a signal has come; the worker is no longer ready.
        refusing: whether new requests are refused.
    """

    def __init__(self, limit: float) -> None:
        """
        Args:
            limit: seconds that the requests under way have to finish; after that they get 503.
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
        """Take over the server's signals; call this in its event loop, in the main thread.

        On Linux, the end of the supervisor, whatever its cause, then counts as SIGTERM too.
        """
        server.config.timeout_graceful_shutdown = CLOSING_SECONDS
        loop = asyncio.get_running_loop()

        def stop(number: int, frame: FrameType | None) -> None:
            # A signal handler alone does not wake up an event loop that sleeps, and one that is busy may
            # not have begun to stop when the next signal comes.
            if self.stopping and number == signal.SIGINT:  # Ctrl-C while stopping: stop at once
                loop.call_soon_threadsafe(self._expire)
            else:
                self.stopping = True
                loop.call_soon_threadsafe(self._begin, lambda: server.handle_exit(number, None))

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        # Otherwise a worker would outlive a killed supervisor and keep its port.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
            parent = str(os.getppid())
            if os.environ.get(SUPERVISOR, parent) != parent:  # it has ended already
                stop(signal.SIGTERM, None)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Mark a request as under way within the `with` block; the worker waits for it before it ends.

        Raises:
            StoppingError: the worker takes no new requests, or it stopped before this one was finished.
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
        if self._waiting is None:
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
        """Cancel the requests under way, and take no new ones."""
        self.refusing = self._expired = True
        for task in self._under_way:
            task.cancel()
