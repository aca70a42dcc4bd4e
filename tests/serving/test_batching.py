import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from serving.batching import Batcher, Logits


def image(value: int) -> npt.NDArray[np.uint8]:
    return np.full((32, 32, 3), value, np.uint8)


def values(images: npt.NDArray[np.uint8]) -> Logits:
    """A stand-in for the engine's work: the only logit of an image is its first value."""
    return images[:, 0, 0, :1].astype(np.float32)


class Engine:
    """Runs `values`, but each run waits for permission, so that a test decides the order."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.waits: list[float] = []
        self.running = threading.Semaphore(0)
        self.permission = threading.Semaphore(0)

    def __call__(self, images: npt.NDArray[np.uint8]) -> Logits:
        self.batches.append(values(images)[:, 0].astype(int).tolist())
        self.running.release()
        self.permission.acquire()
        if 255 in self.batches[-1]:
            raise ValueError("a batch that fails")
        return values(images)

    async def started(self) -> None:
        await asyncio.to_thread(self.running.acquire)


def run(test: Callable[[Engine, Batcher], Awaitable[None]], threads: int = 1) -> Engine:
    engine = Engine()

    async def main() -> None:
        batcher = Batcher(
            engine, max_batch_size=3, chunk_size=4, waited=engine.waits.append, threads=threads
        )
        batcher.start()
        try:
            await asyncio.wait_for(test(engine, batcher), 60)
        finally:
            engine.permission.release(1000)
            await batcher.stop()

    asyncio.run(main())
    assert min(engine.waits) >= 0
    return engine


async def collected(batcher: Batcher, *numbers: int) -> list[int]:
    images = np.stack([image(number) for number in numbers])
    return [int(row[0]) async for logits in batcher.many(images) for row in logits]


async def requested(batcher: Batcher, *numbers: int) -> list["asyncio.Task[Logits]"]:
    """Make requests, and return them once they have reached the queue."""
    tasks = [asyncio.create_task(batcher.one(image(number))) for number in numbers]
    await asyncio.sleep(0)
    return tasks


def test_what_waits_is_taken_together_and_answers_are_not_mixed_up() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        first = await requested(batcher, 0)
        await engine.started()
        rest = await requested(batcher, *range(1, 7))
        engine.permission.release(100)
        logits = await asyncio.gather(*first, *rest)
        assert [int(row[0]) for row in logits] == list(range(7))

    engine = run(test)
    assert engine.batches == [[0], [1, 2, 3], [4, 5, 6]]
    assert len(engine.waits) == 7


def test_single_images_and_bulk_work_take_turns() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        bulk = asyncio.create_task(collected(batcher, *range(100, 112)))
        await engine.started()
        singles = await requested(batcher, *range(6))
        engine.permission.release(100)
        assert await bulk == list(range(100, 112))
        await asyncio.gather(*singles)

    assert run(test).batches == [
        [100, 101, 102, 103],
        [0, 1, 2],
        [104, 105, 106, 107],
        [3, 4, 5],
        [108, 109, 110, 111],
    ]


def test_with_two_threads_single_images_run_beside_bulk_work() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        bulk = [asyncio.create_task(collected(batcher, *numbers)) for numbers in ([100, 101], [102])]
        await engine.started()
        first = await requested(batcher, 0)
        await engine.started()
        assert engine.batches == [[100, 101], [0]], "one chunk at a time"
        rest = await requested(batcher, 1, 2)
        engine.permission.release(100)
        logits = await asyncio.gather(*first, *rest)
        assert [int(row[0]) for row in logits] == [0, 1, 2]
        assert await asyncio.gather(*bulk) == [[100, 101], [102]]

    assert len(run(test, threads=2).waits) == 5


def test_each_of_two_threads_takes_its_share_of_what_waits() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        tasks = []
        for number in range(2):
            tasks += await requested(batcher, number)
            await engine.started()
        tasks += await requested(batcher, 2, 3, 4)
        assert engine.batches == [[0], [1]]
        for expected in [2, 3], [4]:
            engine.permission.release()
            await engine.started()
            assert engine.batches[-1] == expected
        engine.permission.release(100)
        logits = await asyncio.gather(*tasks)
        assert [int(row[0]) for row in logits] == [0, 1, 2, 3, 4]

    run(test, threads=2)


def test_bulk_work_begins_whichever_thread_became_idle_last() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        engine.permission.release(100)
        for number in range(20):
            (single,) = await requested(batcher, number)
            assert int((await single)[0]) == number
            assert await collected(batcher, 100) == [100]

    run(test, threads=2)


def test_who_fails_a_batch_harms_no_other() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        first = await requested(batcher, 0)
        await engine.started()
        before, failing, after, later = await requested(batcher, 1, 255, 2, 3)
        bulk = asyncio.create_task(collected(batcher, 5, 6, 255))
        await asyncio.sleep(0)
        engine.permission.release(100)
        for task in failing, bulk:
            with pytest.raises(ValueError, match="a batch that fails"):
                await task
        assert [int((await task)[0]) for task in (*first, before, after, later)] == [0, 1, 2, 3]

    engine = run(test)
    assert engine.batches == [[0], [5, 6, 255], [1, 255, 2], [1], [255], [2], [3]]
    assert len(engine.waits) == 6, "each image and chunk waits once"


def test_what_nobody_waits_for_is_not_run() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        first = await requested(batcher, 0)
        await engine.started()
        cancelled, kept = await requested(batcher, 1, 2)
        cancelled.cancel()
        engine.permission.release(100)
        await asyncio.gather(*first, kept)

    assert run(test).batches == [[0], [2]]


class Recorded:
    """Images that record which chunks were taken of them."""

    def __init__(self, count: int) -> None:
        self.images = np.stack([image(number) for number in range(count)])
        self.starts: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chunk: slice) -> npt.NDArray[np.uint8]:
        self.starts.append(chunk.start)
        return self.images[chunk]


async def taken(images: Recorded, starts: list[int]) -> None:
    while images.starts != starts:
        await asyncio.sleep(0)


def test_a_chunk_is_laid_out_while_the_engine_runs_another_and_no_more_are() -> None:
    images = Recorded(14)

    async def bulk(batcher: Batcher) -> list[int]:
        chunks = batcher.many(cast(npt.NDArray[np.uint8], images))
        return [int(row[0]) async for logits in chunks for row in logits]

    async def test(engine: Engine, batcher: Batcher) -> None:
        labels = asyncio.create_task(bulk(batcher))
        await engine.started()
        await taken(images, [0, 4])
        engine.permission.release()
        await engine.started()
        await taken(images, [0, 4, 8])
        assert engine.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
        engine.permission.release(100)
        assert await labels == list(range(14))

    run(test)
    assert images.starts == [0, 4, 8, 12]


def test_what_is_left_of_bulk_work_that_nobody_waits_for_is_not_run() -> None:
    images = Recorded(12)

    async def test(engine: Engine, batcher: Batcher) -> None:
        chunks = batcher.many(cast(npt.NDArray[np.uint8], images))
        bulk = asyncio.ensure_future(anext(chunks))
        await engine.started()
        await taken(images, [0, 4])
        bulk.cancel()
        await asyncio.wait([bulk])
        engine.permission.release(100)
        assert await collected(batcher, 20) == [20]

    assert run(test).batches == [[0, 1, 2, 3], [20]]


def test_who_leaves_during_a_run_harms_no_other() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        first = await requested(batcher, 0)
        await engine.started()
        leaving, staying = await requested(batcher, 1, 2)
        engine.permission.release()
        await engine.started()
        leaving.cancel()
        engine.permission.release(100)
        assert [int((await task)[0]) for task in (*first, staying)] == [0, 2]

    assert run(test).batches == [[0], [1, 2]]


@pytest.mark.parametrize("bulk", [True, False])
def test_the_end_comes_once_everybody_has_an_answer(bulk: bool) -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        work: list[asyncio.Task[Any]] = []
        if bulk:
            work.append(asyncio.create_task(collected(batcher, *range(9))))
        else:
            work += await requested(batcher, *range(9))
        await engine.started()
        finished = asyncio.create_task(batcher.finish())
        _, pending = await asyncio.wait([finished], timeout=0.2)
        assert pending
        engine.permission.release(100)
        await finished
        assert all(task.done() for task in work)
        answers = await asyncio.gather(*work)
        assert [int(number) for number in np.ravel(answers)] == list(range(9))

    run(test)


def test_a_stop_waits_for_the_run_under_way() -> None:
    async def test(engine: Engine, batcher: Batcher) -> None:
        (single,) = await requested(batcher, 7)
        await engine.started()
        stopped = asyncio.create_task(batcher.stop())
        _, pending = await asyncio.wait([stopped], timeout=0.2)
        assert pending
        engine.permission.release()
        await stopped
        assert int((await single)[0]) == 7

    run(test)
