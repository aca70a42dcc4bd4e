"""The budget of what all requests hold together, by itself and in a real service."""

import asyncio
import contextlib
import select
import time
from collections.abc import Iterator

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from serving.errors import OverloadedError
from serving.limits import Budget
from serving.middleware import FREE_BYTES, Reception
from tests.serving.raw import PATIENCE, connected, post
from tests.serving.samples import encoded
from tests.serving.server import serving

MAX_PIPELINED = 100  # as the README says


def test_what_is_not_there_is_refused_and_nothing_taken() -> None:
    budget = Budget(10, "uploads", "None left.")
    budget.take(7)
    with pytest.raises(OverloadedError, match="None left"):
        budget.take(4)
    budget.take(3)
    assert budget.spent
    budget.give_back(10)
    budget.take(10)


def test_a_share_is_given_back_also_after_an_error() -> None:
    budget = Budget(2, "queue", "None left.")
    with contextlib.suppress(ZeroDivisionError), budget.share():
        with budget.share():
            assert budget.spent
            with pytest.raises(OverloadedError):
                budget.share().__enter__()
            assert budget.spent
        assert not budget.spent
        1 / 0  # noqa: B018
    budget.take(2)


def test_a_body_gives_back_what_it_took_and_no_more() -> None:
    """In pieces, of which the last one may find no room."""
    room, piece = 100_000, FREE_BYTES // 2
    budget = Budget(room, "uploads", "None left.")

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in Request(scope, receive).stream():
            pass

    async def receive() -> Message:
        pieces.pop()
        return {"type": "http.request", "body": bytes(piece), "more_body": bool(pieces)}

    async def send(message: Message) -> None:
        pass

    reception = Reception(read, 10**6, 60, budget)
    for count in (2, 4, 6, 5, 6):
        pieces = [None] * count
        scope = {"type": "http", "headers": []}
        refused = count * piece - FREE_BYTES > room
        with pytest.raises(OverloadedError) if refused else contextlib.nullcontext():
            asyncio.run(reception(scope, receive, send))
        budget.take(room)
        assert budget.spent
        budget.give_back(room)


def test_requests_that_wait_for_an_answer_before_theirs_are_bounded(url: str) -> None:
    request, line = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"HTTP/1.1 200"
    with connected(url) as connection:
        connection.sendall(request * (1 + MAX_PIPELINED))
        answers = b""
        while answers.count(line) <= MAX_PIPELINED:
            answers += connection.recv(65536)
    with connected(url) as connection:  # small enough to be read at once, before the first is answered
        connection.sendall(request * (2 + MAX_PIPELINED))
        assert connection.makefile("rb").read().count(line) == 1 + MAX_PIPELINED
    answers = b""
    with connected(url) as connection:
        with contextlib.suppress(ConnectionError):  # the server may hang up before it has all of them
            connection.sendall(request * 20 * MAX_PIPELINED)
        with contextlib.suppress(ConnectionError):
            while more := connection.recv(65536):
                answers += more
    assert answers.count(line) < 20 * MAX_PIPELINED
    assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200


@pytest.fixture(scope="module")
def narrow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(
        tmp_path_factory.mktemp("narrow"),
        SERVING_PROVIDER="cpu",
        SERVING_HEAD_TIMEOUT="3",
        SERVING_BODY_TIMEOUT="600",
        SERVING_MAX_BODY_BYTES="1000000",
        SERVING_MAX_UPLOAD_BYTES="1000000",
    ) as url:
        yield url


def test_bodies_that_are_many_bytes_together(narrow_url: str, images: npt.NDArray[np.uint8]) -> None:
    """Part of a body that never ends leaves no room for others as large, but small ones are served."""
    deadline = time.monotonic() + PATIENCE

    def send_large() -> httpx.Response:
        assert time.monotonic() < deadline
        return client.post("/classify", content=bytes(600_000), headers={"Content-Type": "image/png"})

    with httpx.Client(base_url=narrow_url, timeout=60) as client, contextlib.ExitStack() as stack:
        refused = None
        while refused is None:
            connection = stack.enter_context(connected(narrow_url))
            connection.sendall(post("/classify", 900_000) + bytes(600_000))
            # This one may be refused instead, if another body has not given its bytes back yet.
            while refused is None and not select.select([connection], [], [], 0)[0]:
                answer = send_large()
                assert answer.status_code in (400, 503)
                refused = answer if answer.status_code == 503 else None
        message = "The uploads under way reach their limit of 1000000 bytes; try again shortly."
        assert refused.json() == {"error": {"code": "overloaded", "message": message}}
        assert refused.headers["retry-after"] == "1"
        small = {"image": ("a.png", encoded(images[0]))}
        assert client.post("/classify", files=small).status_code == 200
        stack.close()
        while send_large().status_code != 400:
            pass


def test_a_head_has_less_time_than_a_body(narrow_url: str) -> None:
    with connected(narrow_url) as connection:
        connection.sendall(b"GET ")
        assert connection.recv(65536) == b""


def test_an_idle_connection_is_kept_longer_than_uvicorn_would(narrow_url: str) -> None:
    with connected(narrow_url) as connection:
        connection.sendall(b"HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.settimeout(7)  # seconds; uvicorn's own limit is 5
        with pytest.raises(TimeoutError):
            connection.recv(65536)
