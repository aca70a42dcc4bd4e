"""Forms as clients may send them, in pieces of any size."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from serving.errors import FieldError, OverloadedError, RequestError, TooLargeError
from serving.forms import MAX_TEXT_BYTES, MAX_TEXTS, SPOOLED_BYTES, Part, received
from tests.disk import room_for


def field(name: str, content: bytes, *, file: bool = True) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"' + ('; filename="a.b"' if file else "")
    return b"--x\r\n" + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


def read(
    body: bytes,
    *,
    max_files: int = 2,
    piece: int = 2**16,
    kind: str = "multipart/form-data; boundary=x",
    fails: bool = False,
) -> list[tuple[str, bool, bytes, bool]]:
    """Read a form: each part's name, whether it is a file, its content, and whether it lay on disk."""

    def pieces() -> Iterator[Message]:
        for start in range(0, len(body), piece):
            yield {"type": "http.request", "body": body[start : start + piece], "more_body": True}
        yield {"type": "http.request", "body": b"", "more_body": False}

    messages = pieces()

    async def receive() -> Message:
        return next(messages)

    async def main() -> list[tuple[str, bool, bytes, bool]]:
        scope: dict[str, Any] = {"type": "http", "headers": [(b"content-type", kind.encode())]}
        kept: list[Part] = []
        with suppress(ZeroDivisionError):
            async with received(Request(scope, receive), max_files) as parts:
                kept += parts
                found = [(part.name, part.is_file, part.content(), part.on_disk) for part in parts]
                if fails:
                    raise ZeroDivisionError
        async with asyncio.timeout(60):
            while not all(part.file.closed for part in kept):  # those on disk, in a thread
                await asyncio.sleep(0)
        return found

    return asyncio.run(main())


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50, 2**16])
def test_parts_come_in_order_however_they_are_cut(piece: int) -> None:
    tricky = b"\r\n--\r\n--y\r\n\n--x\r--x\r"  # no boundary: no `--x` follows a whole line break
    body = field("a", tricky) + field("b", b"3", file=False) + field("a", b"") + b"--x--\r\n"
    assert read(body, piece=piece) == [
        ("a", True, tricky, False),
        ("b", False, b"3", False),
        ("a", True, b"", False),
    ]


def test_a_large_file_lies_on_disk() -> None:
    content = bytes(range(256)) * (SPOOLED_BYTES // 256)
    body = field("a", content) + field("b", content + b"!") + b"--x--"
    assert read(body) == [("a", True, content, False), ("b", True, content + b"!", True)]


@pytest.mark.parametrize("length", [1, SPOOLED_BYTES + 1], ids=["in memory", "on disk"])
def test_files_are_closed_after_an_error_too(length: int) -> None:
    assert len(read(field("a", bytes(length)) + b"--x--", fails=True)) == 1


def test_no_room_for_a_file_is_told(caplog: pytest.LogCaptureFixture) -> None:
    body = field("a", bytes(3 * SPOOLED_BYTES)) + b"--x--"
    with room_for(2 * SPOOLED_BYTES), pytest.raises(OverloadedError, match="no room for the file"):
        read(body)
    assert "File too large" in caplog.text
    assert read(body)[0][3]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (b"", RequestError, "cannot be read: Unexpected end"),
        (field("a", b"1"), RequestError, "cannot be read: Unexpected end"),
        (b"--x\r\nno header\r\n\r\n", RequestError, "cannot be read: Malformed"),
        (b"--x\r\nContent-Type: text/plain\r\n\r\n1\r\n--x--", RequestError, "cannot be read: Missing"),
        (b"--x\r\nContent-Disposition: \xff\r\n\r\n", RequestError, "Invalid Content-Disposition"),
        (field("a", b"1") * 3, TooLargeError, "too many files; the limit is 2"),
        (field("a", b"1", file=False) * (MAX_TEXTS + 1), RequestError, f"more than {MAX_TEXTS} fields"),
        (
            field("a", bytes(MAX_TEXT_BYTES + 1), file=False),
            FieldError,
            r"'a' holds text of more than .* `curl -F a=@FILE`",
        ),
    ],
)
def test_what_is_wrong_with_a_form_is_told(body: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(body)


def test_file_names_in_other_encodings() -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="a"; filename="Geb\xe4ude.png"\r\n\r\n'
    assert read(head + b"1\r\n--x--") == [("a", True, b"1", False)]


def test_file_names_that_are_encoded() -> None:
    head = (
        b"--x\r\nContent-Disposition: form-data; name=\"a\"; filename*=utf-8''Geb%C3%A4ude.png\r\n\r\n"
    )
    assert read(head + b"1\r\n--x--") == [("a", True, b"1", False)]


@pytest.mark.parametrize(
    ("kind", "is_file"),
    [
        ("image/png", True),
        ("Image/PNG; a=b", True),
        ("application/octet-stream", True),
        ("text/plain; charset=utf-8", False),
        ("application/json", False),
    ],
)
def test_files_without_a_name_have_a_type(kind: str, is_file: bool) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="a"\r\nContent-Type: %b\r\n\r\n' % kind.encode()
    assert read(head + b"1\r\n--x--") == [("a", is_file, b"1", False)]


def test_several_files_where_one_is_right() -> None:
    with pytest.raises(FieldError, match="right would be one"):
        read(field("a", b"1") * 2 + b"--x--", max_files=1)


@pytest.mark.parametrize(
    ("given", "boundary"),
    [
        *((name, name) for name in ("a/b", "====1==", "a:b", "(a,b)", "a'b?", "----=_Part_1_2.3", "é")),
        ('"a/b"', "a/b"),
        ('"a b;c"', "a b;c"),
        ("a/b; charset=utf-8", "a/b"),
        ("a/b;charset=utf-8", "a/b"),
        (" a/b ", "a/b"),
    ],
)
def test_boundaries_quoted_or_not(given: str, boundary: str) -> None:
    body = (field("a", b"1") + b"--x--").replace(b"--x", b"--" + boundary.encode())
    for key in ("boundary", "BOUNDARY", "xboundary=y; boundary", "boundary "):
        assert read(body, kind=f"multipart/form-data; {key}={given}") == [("a", True, b"1", False)]


@pytest.mark.parametrize(
    "parameter",
    [
        "",
        ";",
        "; boundary",
        "; boundary=",
        '; boundary=""',
        "; boundary= ; a=b",
        '; boundary="x',
        "; xboundary=x",
    ],
)
def test_a_form_needs_a_boundary(parameter: str) -> None:
    with pytest.raises(RequestError, match="has no boundary; right would be to leave this header"):
        read(field("a", b"1") + b"--x--", kind=f"multipart/form-data{parameter}")
