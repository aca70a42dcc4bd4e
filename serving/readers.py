"""The threads in which the bytes of clients are read, off the event loop."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

import numpy as np
import numpy.typing as npt

from serving.errors import RequestError
from serving.images import LARGE_PIXELS, LargeImageError, decode, is_small

SHORT_BYTES = 64 * 1024  # of JSON; more takes long to read
READ_AT_ONCE = 16  # images of a request that a thread decodes in one turn

Pixels = npt.NDArray[np.uint8]
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class Readers:
    """What is single and short waits neither for the many images of a request nor for a large one."""

    def __init__(self, threads: int, max_pixels: int) -> None:
        """
        Args:
            threads: that read what is short, and as many what is long.
            max_pixels: of an image.
        """
        self._max_pixels = max_pixels
        self._short = ThreadPoolExecutor(threads, "reader")
        self._long = ThreadPoolExecutor(threads, "bulk-reader")
        self._large = ThreadPoolExecutor(1, "large-reader")  # so one large image at a time is in memory

    async def image(self, content: bytes) -> Pixels:
        """The pixels of an image file, uint8 [32, 32, 3].

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
        """Those of several files, or what is wrong with each."""
        starts = range(0, len(contents), READ_AT_ONCE)
        given_up = threading.Event()
        try:
            turns = [
                self.long(self._decoded, contents[start : start + READ_AT_ONCE], given_up)
                for start in starts
            ]
            return [image for images in await asyncio.gather(*turns) for image in images]
        finally:
            given_up.set()

    async def short(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """What a function reads, beside other short things."""
        return await _in(self._short, function, *arguments)

    async def long(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """What a function reads in a second or more."""
        return await _in(self._long, function, *arguments)

    def stop(self) -> None:
        """Read nothing more than what is begun."""
        for threads in (self._short, self._long, self._large):
            threads.shutdown(wait=False, cancel_futures=True)

    def _decoded(self, contents: list[bytes], given_up: threading.Event) -> list[Pixels | RequestError]:
        """The images of one turn; no more of them once nobody waits."""
        images: list[Pixels | RequestError] = []
        for content in contents:
            if given_up.is_set():
                break
            try:
                images.append(self._decode(content))
            except RequestError as error:
                images.append(error)
        return images

    def _decode(self, content: bytes) -> Pixels:
        try:
            return decode(content, self._max_pixels, LARGE_PIXELS)
        except LargeImageError:
            return self._large.submit(decode, content, self._max_pixels).result()


async def _in(
    threads: Executor, function: Callable[[*Arguments], Result], *arguments: *Arguments
) -> Result:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
