"""Let concurrent requests share runs of the engine.

BentoML's own `batchable=True` is not used: it polls instead of waking up, its queue has no bound,
it takes one argument only, and one bad item fails its batch.
Here a run takes whatever waits at that moment, so an idle service answers at once and a busy one
fills its batches, with no delay to tune. The engine's threads fetch the next batch themselves, so a
run never waits for the event loop, which may be busy reading requests.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

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
    """Runs the engine in threads, alternating between single images and chunks of bulk work.

    Each thread takes its share of the waiting single images, up to `max_batch_size`, and leaves the
    rest to the next free thread. Bulk work is cut into chunks that run one at a time: only the first
    thread takes them, every other turn while single images wait. So neither can hold up the other.
    """

    def __init__(
        self,
        run: Callable[[Images], Logits],
        *,
        max_batch_size: int,
        chunk_size: int,
        waited: Callable[[float], None],
        threads: int = 1,
    ) -> None:
        """
        Args:
            run: from images uint8 [N, 32, 32, 3] to logits float32 [N, classes]; called in all threads.
            max_batch_size: most single images in one call of `run`.
            chunk_size: most images of bulk work in one call.
            waited: called in the same threads when a run begins, once for each image or chunk in it,
                with the seconds that it waited.
            threads: how many calls of `run` at a time.
        """
        self._run = run
        self._max_batch_size = max_batch_size
        self._chunk_size = chunk_size
        self._waited = waited
        self._waiting = 0
        self._singles: deque[_Job] = deque()
        self._chunks: deque[_Job] = deque()
        self._arrived = threading.Condition()  # notified of new work and of the end
        self._stopped = False
        self._idle = asyncio.Event()  # set while nobody waits for logits
        self._idle.set()
        self._threads: list[threading.Thread] = []
        self._thread_count = threads

    def start(self) -> None:
        """Start the threads; needs a running event loop.

        Raises:
            RuntimeError: not all can be started; then none stays.
        """
        loop = asyncio.get_running_loop()
        self._threads = [
            threading.Thread(target=self._take_turns, args=(loop, queues), name="engine", daemon=True)
            for queues in ([self._singles, self._chunks], *[[self._singles]] * (self._thread_count - 1))
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:
            self._end()
            raise

    async def stop(self) -> None:
        """Stop the threads and wait for the runs under way; what is still queued gets no answer."""
        self._end()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    async def finish(self) -> None:
        """Answer everything that waits, then stop; nothing new may be added."""
        await self._idle.wait()
        await self.stop()

    async def one(self, image: Images) -> Logits:
        """Return the logits, float32 [classes], of one image, uint8 [32, 32, 3]."""
        with self._counted():
            logits: Logits = (await self._queued(self._singles, image[np.newaxis]))[0]
            return logits

    async def many(self, images: Images) -> AsyncIterator[Logits]:
        """Yield the logits of images, uint8 [N, 32, 32, 3], in order: float32 [n, classes] per chunk.

        While the engine runs a chunk, the next one is made contiguous and queued. So `images` may be a
        view with any strides, even of a file larger than memory; it is never copied as a whole.
        """
        with self._counted():
            under_way: deque[asyncio.Future[Logits]] = deque()
            try:
                for start in range(0, len(images), self._chunk_size):
                    chunk = images[start : start + self._chunk_size]
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
                        logits.exception()  # retrieved, or asyncio would log it

    def _end(self) -> None:
        with self._arrived:
            self._stopped = True
            self._arrived.notify_all()

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
        with self._arrived:
            queue.append(job)
            self._arrived.notify_all()
        return job.logits

    def _take_turns(self, loop: asyncio.AbstractEventLoop, queues: list[deque[_Job]]) -> None:
        """Run what waits in `queues`, taking from each in turn, until `stop`."""
        for queue in cycle(queues):
            with self._arrived:
                self._arrived.wait_for(lambda: self._stopped or any(queues))
                jobs = self._taken(queue)
            if self._stopped:
                break
            now = time.perf_counter()
            for job in jobs:
                self._waited(now - job.queued)
            if jobs:
                self._answered(jobs, loop)

    def _taken(self, queue: deque[_Job]) -> list[_Job]:
        """Take the single images, or the chunk, of one run; drop those that nobody waits for."""
        share = -(-len(queue) // self._thread_count)
        count = min(share, self._max_batch_size) if queue is self._singles else 1
        jobs: list[_Job] = []
        while queue and len(jobs) < count:
            job = queue.popleft()
            if not job.logits.done():
                jobs.append(job)
        return jobs

    def _answered(self, jobs: list[_Job], loop: asyncio.AbstractEventLoop) -> None:
        """Run the jobs together; if that fails, run each alone, so that a bad one fails no other."""
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
