import asyncio
import threading

import numpy as np
import numpy.typing as npt
import pytest

from serving import readers
from serving.images import LargeImageError, decode
from serving.readers import READ_AT_ONCE, Readers
from tests.serving.samples import encoded


def test_images_that_nobody_waits_for_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, permission = threading.Event(), threading.Event()
    decoded: list[bytes] = []

    def decode_later(content: bytes, *limits: int) -> npt.NDArray[np.uint8]:
        begun.set()
        assert permission.wait(60)
        decoded.append(content)
        return decode(content, *limits)

    async def main() -> None:
        threads = Readers(1, 10**6)
        picture = encoded(np.zeros((32, 32, 3), np.uint8))
        batch = asyncio.create_task(threads.images([picture] * (READ_AT_ONCE + 1)))
        assert await asyncio.to_thread(begun.wait, 60)
        batch.cancel()
        await asyncio.wait([batch])
        permission.set()
        await threads.long(len, decoded)  # after what the only thread had begun
        threads.stop()

    monkeypatch.setattr(readers, "decode", decode_later)
    asyncio.run(main())
    assert len(decoded) == 1


def test_a_request_of_many_images_lets_others_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, permission = threading.Event(), threading.Event()
    decoded: list[bytes] = []

    def decode_later(content: bytes, *limits: int) -> npt.NDArray[np.uint8]:
        begun.set()
        assert permission.wait(60)
        decoded.append(content)
        return np.zeros((32, 32, 3), np.uint8)

    async def main() -> None:
        threads = Readers(1, 10**6)
        many = asyncio.create_task(threads.images([b"many"] * (5 * READ_AT_ONCE)))
        assert await asyncio.to_thread(begun.wait, 60)
        few = asyncio.create_task(threads.images([b"few"]))
        await asyncio.sleep(0)
        permission.set()
        assert len(await few) == 1
        assert len(await many) == 5 * READ_AT_ONCE
        threads.stop()

    monkeypatch.setattr(readers, "decode", decode_later)
    asyncio.run(main())
    assert decoded.index(b"few") == READ_AT_ONCE, "after the one turn that was under way"


def test_large_images_of_a_request_hold_up_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    permission = threading.Event()

    def decode_large_later(content: bytes, *limits: int) -> npt.NDArray[np.uint8]:
        if content == b"large":
            if len(limits) == 2:
                raise LargeImageError
            assert permission.wait(60)
        return np.full((32, 32, 3), len(content), np.uint8)

    async def main() -> None:
        threads = Readers(1, 10**6)
        several = asyncio.create_task(threads.images([b"large", b"a", b"large"]))
        async with asyncio.timeout(60):
            await threads.images([b"small"])
        assert not several.done()
        permission.set()
        found = await several
        assert [image.max() for image in found if isinstance(image, np.ndarray)] == [5, 1, 5]
        threads.stop()

    monkeypatch.setattr(readers, "decode", decode_large_later)
    asyncio.run(main())
