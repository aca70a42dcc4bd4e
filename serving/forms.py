"""Read multipart forms; each part is kept in memory while it is small, and on disk otherwise.

The package `multipart` parses them. It finds the boundary with `bytes.find`; python-multipart, which
Starlette's own forms are built on, makes a callback for each piece of a header.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from tempfile import SpooledTemporaryFile

from multipart import MultipartError, MultipartSegment, PushMultipartParser
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from serving.access_log import request_id
from serving.errors import FieldError, OverloadedError, RequestError, TooLargeError

logger = logging.getLogger("serving")

MAX_TEXTS = 16  # fields of text; a form with more is not one of ours
MAX_TEXT_BYTES = 1024
# How some clients (urllib3 before version 2) give a file name that is not ASCII; the package reads only
# `filename`.
EXTENDED_NAME = re.compile(r"; *filename\* *=", re.IGNORECASE)
# The types of files, for clients that send a file without a name.
OF_FILES = re.compile(r"image/.*|application/octet-stream", re.IGNORECASE)
# Some clients do not quote a boundary that has characters which require it, such as a slash; the
# package's own parser reads it only up to there.
BOUNDARY = re.compile(r';\s*boundary\s*=\s*(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
SPOOLED_BYTES = 2**20  # of a part are kept in memory; a larger part goes to disk


class Part:
    """A field of a form.

    Attributes:
        name: the field's name.
        is_file: whether it came with a file's name, or a file's type; otherwise it is text.
        size: bytes received.
        file: those bytes, positioned at the start once the form is complete.
    """

    def __init__(self, segment: MultipartSegment) -> None:
        self.name: str = segment.name or ""
        self.is_file = segment.filename is not None or bool(
            EXTENDED_NAME.search(segment.header("Content-Disposition", ""))
            or OF_FILES.fullmatch(segment.content_type or "")
        )
        self.size = 0
        self.file = SpooledTemporaryFile(SPOOLED_BYTES)  # noqa: SIM115, closed with the form

    @property
    def on_disk(self) -> bool:
        """Whether the part is on disk, as it is larger than `SPOOLED_BYTES`."""
        return self.size > SPOOLED_BYTES

    def content(self) -> bytes:
        """Read the part's bytes, once the form is complete."""
        return self.file.read()

    async def write(self, content: bytes) -> None:
        """Append bytes that have arrived."""
        self.size += len(content)
        if self.on_disk:
            await run_in_threadpool(self.file.write, content)
        else:
            self.file.write(content)

    def discard(self) -> None:
        """Discard the bytes; an error in closing, as of a disk that is still full, is ignored."""
        if self.on_disk:  # where a thread may still write or read, if the request has ended before it
            # Without a thread for it, it is closed with the last reference.
            with suppress(RuntimeError):
                asyncio.get_running_loop().run_in_executor(None, self._close)
        else:
            self._close()

    def _close(self) -> None:
        with suppress(OSError):
            self.file.close()


@asynccontextmanager
async def received(request: Request, max_files: int) -> AsyncIterator[list[Part]]:
    """Receive the parts of a request's form, in order; their files are deleted on exit.

    Raises:
        RequestError: the body is not a multipart form, or has too many fields of text.
        FieldError: it has several files where only one is allowed, or a text that is too long.
        TooLargeError: it has more than `max_files` files.
        OverloadedError: there is no room for its files.
    """
    parts: list[Part] = []
    try:
        try:
            await _receive(request, max_files, parts)
        except MultipartError as error:
            raise RequestError(f"The multipart form cannot be read: {error.args[0]}.") from None
        except OSError as error:  # a full disk, or too many open files
            logger.error("a file cannot be kept (%s): %s", request_id.get(), error)
            raise OverloadedError(
                "There is no room for the file just now; try again later.", "disk"
            ) from None
        yield parts
    finally:
        for part in parts:
            part.discard()


async def _receive(request: Request, max_files: int, parts: list[Part]) -> None:
    boundary = BOUNDARY.search(request.headers["content-type"])
    if not boundary:
        raise RequestError(
            "The multipart form cannot be read: its Content-Type has no boundary; right would be to "
            "leave this header to the client, as in `curl -F NAME=@FILE`."
        )
    # File names are not used, and some are not UTF-8. Latin-1 decodes any bytes.
    delimiter = (boundary[1] or boundary[2]).encode("latin-1")
    files = 0
    with PushMultipartParser(delimiter, header_charset="latin-1") as parser:
        async for chunk in request.stream():
            for event in parser.parse(chunk) if chunk else ():
                if isinstance(event, MultipartSegment):
                    parts.append(Part(event))
                    files += parts[-1].is_file
                    _check_count(files, len(parts) - files, max_files)
                elif event:
                    part = parts[-1]
                    await part.write(event)
                    if not part.is_file and part.size > MAX_TEXT_BYTES:
                        raise FieldError(
                            f"The field {part.name[:100]!r} holds text of more than {MAX_TEXT_BYTES} "
                            "bytes, and none of ours is that long; a file is sent as in "
                            f"`curl -F {part.name[:100]}=@FILE`."
                        )
    for part in parts:
        part.file.seek(0)


def _check_count(files: int, texts: int, max_files: int) -> None:
    if files > max_files:
        if max_files == 1:
            raise FieldError("The form has several files; right would be one.")
        raise TooLargeError(f"The form has too many files; the limit is {max_files}.")
    if texts > MAX_TEXTS:
        raise RequestError(f"The form has more than {MAX_TEXTS} fields that hold text.")
