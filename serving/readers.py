"""The threads in which clients' bytes are read, off the event loop."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import chain
from typing import TypeVar, TypeVarTuple

import numpy as np
import numpy.typing as npt

from serving.errors import RequestError
from serving.images import LARGE_PIXELS, LargeImageError, decode, is_small

SHORT_BYTES = 64 * 1024  # of a request under /v2; a longer one takes long to read
READ_AT_ONCE = 16  # images of a request that a thread decodes in one turn

Pixels = npt.NDArray[np.uint8]
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class Readers:
    """Threads in which a single short read waits neither for a request's many images nor a large one."""

    def __init__(self, threads: int, max_pixels: int) -> None:
        """
        Args:
            threads: how many for short reads, and again as many for long ones.
            max_pixels: limit of an image's width times height.
        """
        self._max_pixels = max_pixels
        self._threads = threads
        self._short = ThreadPoolExecutor(threads, "reader")
        self._long = ThreadPoolExecutor(threads, "bulk-reader")
        self._large = ThreadPoolExecutor(1, "large-reader")  # so one large image at a time is in memory

    async def image(self, content: bytes) -> Pixels:
        """Return the pixels of an image file, uint8 [32, 32, 3].

        Raises:
            ImageError, TooLargeError: as `serving.images.decode`.
        """
        if is_small(content):
            return decode(content, self._max_pixels)
        try:
            return await self.short(decode, content, self._max_pixels, LARGE_PIXELS)
        except LargeImageError:
            return await _in(self._large, decode, content, self._max_pixels)

    async def images(self, contents: list[bytes]) -> list[Pixels | RequestError]:
        """Return the pixels of several image files in order, or for a bad one its error."""
        given_up = threading.Event()
        turns = asyncio.Semaphore(self._threads)  # more would keep other requests' images waiting

        async def read(start: int) -> list[Pixels | RequestError | None]:
            async with turns:
                some = contents[start : start + READ_AT_ONCE]
                return await self.long(self._decoded, some, given_up)

        try:
            read_in_turns = await asyncio.gather(*map(read, range(0, len(contents), READ_AT_ONCE)))
        finally:
            given_up.set()
        return [
            await _in(self._large, self._decoded_large, content) if image is None else image
            for content, image in zip(contents, chain.from_iterable(read_in_turns), strict=True)
        ]

    async def short(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Call a function in the threads for short reads."""
        return await _in(self._short, function, *arguments)

    async def long(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Call a function in the threads for long reads, which may take a second or more."""
        return await _in(self._long, function, *arguments)

    def stop(self) -> None:
        """Begin no more reads; those under way are not waited for."""
        for threads in (self._short, self._long, self._large):
            threads.shutdown(wait=False, cancel_futures=True)

    def _decoded(
        self, contents: list[bytes], given_up: threading.Event
    ) -> list[Pixels | RequestError | None]:
        """Decode the images of one turn, but large ones (None); stop once nobody waits for them."""
        images: list[Pixels | RequestError | None] = []
        for content in contents:
            if given_up.is_set():
                break
            try:
                images.append(decode(content, self._max_pixels, LARGE_PIXELS))
            except LargeImageError:
                images.append(None)
            except RequestError as error:
                images.append(error)
        return images

    def _decoded_large(self, content: bytes) -> Pixels | RequestError:
        try:
            return decode(content, self._max_pixels)
        except RequestError as error:
            return error


async def _in(
    threads: Executor, function: Callable[[*Arguments], Result], *arguments: *Arguments
) -> Result:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
