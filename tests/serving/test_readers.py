import asyncio
import threading

import numpy as np
import numpy.typing as npt
import pytest

from serving import readers
from serving.images import decode
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
