import asyncio
import threading

import numpy as np
import numpy.typing as npt
import pytest

from serving import readers
from serving.errors import ImageError
from serving.images import LargeImageError, decode
from serving.readers import READ_AT_ONCE, Readers
from tests.serving.samples import encoded


class Late:
    """Decoding that waits for `permission` once it has `begun`; `decoded` has what it did, in order."""

    def __init__(self) -> None:
        self.begun, self.permission = threading.Event(), threading.Event()
        self.decoded: list[bytes] = []

    def __call__(self, content: bytes, *limits: int) -> npt.NDArray[np.uint8]:
        self.begun.set()
        assert self.permission.wait(60)
        self.decoded.append(content)
        return decode(content, *limits)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    found = Late()
    monkeypatch.setattr(readers, "decode", found)
    return found


def picture(value: int) -> bytes:
    return encoded(np.full((32, 32, 3), value, np.uint8))


def test_images_that_nobody_waits_for_are_not_decoded(late: Late) -> None:
    async def main() -> None:
        threads = Readers(1, 10**6)
        batch = asyncio.create_task(threads.images([picture(0)] * (READ_AT_ONCE + 1)))
        assert await asyncio.to_thread(late.begun.wait, 60)
        batch.cancel()
        await asyncio.wait([batch])
        late.permission.set()
        await threads.long(len, late.decoded)  # after what the only thread had begun
        threads.stop()

    asyncio.run(main())
    assert len(late.decoded) == 1


def test_a_request_of_many_images_lets_others_take_turns(late: Late) -> None:
    async def main() -> None:
        threads = Readers(1, 10**6)
        many = asyncio.create_task(threads.images([picture(0)] * (5 * READ_AT_ONCE)))
        assert await asyncio.to_thread(late.begun.wait, 60)
        few = asyncio.create_task(threads.images([picture(255)]))
        await asyncio.sleep(0)
        late.permission.set()
        assert len(await few) == 1
        assert len(await many) == 5 * READ_AT_ONCE
        threads.stop()

    asyncio.run(main())
    assert late.decoded.index(picture(255)) == READ_AT_ONCE, "after the one turn that was under way"


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


def test_a_bad_large_image_of_a_request_harms_no_other() -> None:
    large = encoded(np.zeros((2100, 2000, 3), np.uint8))

    async def main() -> None:
        threads = Readers(1, 10**7)
        found = await threads.images([large, large[: len(large) // 2], picture(7)])
        threads.stop()
        first, bad, last = found
        assert (np.asarray(first) == 0).all()
        assert isinstance(bad, ImageError)
        assert (np.asarray(last) == 7).all()

    asyncio.run(main())
