"""Concurrent requests share runs of the engine.

BentoML's own `batchable=True` is not used: it polls instead of waking up, its queue has no bound,
it counts requests rather than images, takes one argument only, and one bad item fails its batch.
Here a run takes whatever waits at that moment, so an idle service answers at once and a busy one
fills its batches, with no delay to tune. The engine's thread takes the next batch by itself: the event
loop, which may be busy reading requests, is never between two runs.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

logger = logging.getLogger("serving")

Images = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


@dataclass
class _Job:
    images: Images
    logits: asyncio.Future[Logits]
    queued: float


class Batcher:
    """Runs the engine in one thread, with turns between single images and chunks of bulk work.

    Single images are run up to `max_batch_size` at a time. Bulk work is cut into chunks of that
    size and takes every other turn while single images wait, so neither can hold up the other.
    """

    def __init__(
        self,
        run: Callable[[Images], Logits],
        *,
        max_batch_size: int,
        waited: Callable[[float], None],
    ) -> None:
        """
        Args:
            run: uint8 [N, 32, 32, 3] to float32 [N, classes]; called in one thread.
            max_batch_size: images in one call of `run`.
            waited: told, when its run begins, for how many seconds each image or chunk has waited;
                called in the same thread.
        """
        self._run = run
        self._max_batch_size = max_batch_size
        self._waited = waited
        self._waiting = 0
        self._singles: deque[_Job] = deque()
        self._chunks: deque[_Job] = deque()
        self._work = threading.Event()
        self._stopped = False
        self._idle = asyncio.Event()  # nobody waits
        self._idle.set()
        self._engine: threading.Thread | None = None

    def start(self) -> None:
        """Begin to take turns; needs a running event loop."""
        loop = asyncio.get_running_loop()
        self._engine = threading.Thread(
            target=self._take_turns, args=(loop,), name="engine", daemon=True
        )
        self._engine.start()

    async def stop(self) -> None:
        """Stop taking turns and wait for the run under way."""
        self._stopped = True
        self._work.set()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.join)

    async def finish(self) -> None:
        """Answer everybody who waits, then stop; nobody may come any more."""
        await self._idle.wait()
        await self.stop()

    async def one(self, image: Images) -> Logits:
        """Logits float32 [classes] of one image uint8 [32, 32, 3]."""
        with self._counted():
            logits: Logits = (await self._queued(self._singles, image[np.newaxis]))[0]
            return logits

    async def many(self, images: Images) -> AsyncIterator[Logits]:
        """Logits of images uint8 [N, 32, 32, 3], in order, as float32 [n, classes] a chunk.

        While the engine runs a chunk the next one is laid out in memory and queued, so `images` can be a
        view in any strides, and of a file that is larger than the memory; it is never copied whole.
        """
        with self._counted():
            under_way: deque[asyncio.Future[Logits]] = deque()
            try:
                for start in range(0, len(images), self._max_batch_size):
                    chunk = images[start : start + self._max_batch_size]
                    if not chunk.flags.c_contiguous:
                        chunk = await asyncio.to_thread(np.ascontiguousarray, chunk)
                    under_way.append(self._queued(self._chunks, chunk))
                    if len(under_way) > 1:
                        yield await under_way.popleft()
                while under_way:
                    yield await under_way.popleft()
            finally:
                for logits in under_way:
                    if not logits.cancel():
                        logits.exception()  # looked at, or asyncio would log it

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._waiting += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._idle.set()

    def _queued(self, queue: deque[_Job], images: Images) -> asyncio.Future[Logits]:
        job = _Job(images, asyncio.get_running_loop().create_future(), time.perf_counter())
        queue.append(job)
        self._work.set()
        return job.logits

    def _take_turns(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stopped:
            self._work.wait()
            self._work.clear()
            while (self._singles or self._chunks) and not self._stopped:
                self._turn(self._taken(self._singles, self._max_batch_size), loop)
                self._turn(self._taken(self._chunks, 1), loop)

    @staticmethod
    def _taken(queue: deque[_Job], count: int) -> list[_Job]:
        """Up to `count` jobs that somebody still waits for."""
        jobs: list[_Job] = []
        while queue and len(jobs) < count:
            job = queue.popleft()
            if not job.logits.done():
                jobs.append(job)
        return jobs

    def _turn(self, jobs: list[_Job], loop: asyncio.AbstractEventLoop) -> None:
        """One run, which begins for these jobs what they have waited for."""
        now = time.perf_counter()
        for job in jobs:
            self._waited(now - job.queued)
        if jobs:
            self._answered(jobs, loop)

    def _answered(self, jobs: list[_Job], loop: asyncio.AbstractEventLoop) -> None:
        """One run; where it fails, one for each job, so that the one it failed for harms no other."""
        try:
            batch = jobs[0].images if len(jobs) == 1 else np.concatenate([j.images for j in jobs])
            logits = self._run(batch)
        except Exception as error:
            if len(jobs) == 1:
                loop.call_soon_threadsafe(_fail, jobs[0], error)
            else:
                logger.warning("a run of %d images failed (%s); each runs alone", len(jobs), error)
                for job in jobs:
                    if not job.logits.done():
                        self._answered([job], loop)
        else:
            loop.call_soon_threadsafe(_answer, jobs, logits)


def _answer(jobs: list[_Job], logits: Logits) -> None:
    start = 0
    for job in jobs:
        if not job.logits.done():
            job.logits.set_result(logits[start : start + len(job.images)])
        start += len(job.images)


def _fail(job: _Job, error: Exception) -> None:
    if not job.logits.done():
        job.logits.set_exception(error)
