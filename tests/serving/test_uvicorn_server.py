"""uvicorn as it is used here: behaviour that we rely on beyond its documentation."""

import gc
import logging
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.uvicorn_server import (
    IDLE_SECONDS,
    ConnectionLimits,
    bypass,
    keep_idle_connections,
    limit_connections,
    separate_requests,
)
from tests.serving.raw import PATIENCE, connected, last, post


def application(name: str) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(f"{name} for {scope['client'][0]}")(scope, receive, send)

    return app


class Server(uvicorn.Server):
    """A server that tells when it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@contextmanager
def running(
    app: ASGIApp, prepare: Callable[[Server], object], **options: Any
) -> Iterator[tuple[Server, str]]:
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="error", **options)
    config.load()
    server = Server(config)
    prepare(server)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.ready.wait(PATIENCE)
        yield server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(("proxy_headers", "client"), [(True, "203.0.113.7"), (False, "127.0.0.1")])
def test_posts_to_these_paths_go_past_the_servers_application(proxy_headers: bool, client: str) -> None:
    headers = {"X-Forwarded-For": "203.0.113.7"}

    def prepare(server: Server) -> None:
        bypass(server, {"/ours"}, application("ours"))

    with running(application("long"), prepare, proxy_headers=proxy_headers) as (_, url):
        assert httpx.post(f"{url}/ours", headers=headers, timeout=60).text == f"ours for {client}"
        assert httpx.get(f"{url}/ours", headers=headers, timeout=60).text == f"long for {client}"
        assert httpx.post(f"{url}/other", headers=headers, timeout=60).text == f"long for {client}"


class Answers:
    """An app that answers with as many bytes as the path says, and tells what becomes of connections."""

    def __init__(self, most: int, seconds: float, head_seconds: float | None = None) -> None:
        self.most, self.seconds, self.head_seconds = most, seconds, head_seconds or seconds
        self.evicted = 0
        self.timers: list[object] = []  # for the client to take what is written, one per pause
        self.answered, self.lost = threading.Semaphore(0), threading.Semaphore(0)
        self.paused, self.resumed = threading.Semaphore(0), threading.Semaphore(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(0, int(scope["path"][1:]), 1000):
                yield bytes(1000)

        await StreamingResponse(pieces())(scope, receive, send)
        self.answered.release()

    def prepare(self, server: Server) -> None:
        """Set the server's limits, and watch its connections."""
        limits = ConnectionLimits(self.most, self.head_seconds, self.seconds, self.evict)
        limit_connections(server, limits)
        limited: Any = server.config.http_protocol_class
        answers = self

        class Watched(limited.func):  # type: ignore[misc]
            def pause_writing(self) -> None:
                super().pause_writing()
                answers.timers.append(self.transport._late)
                answers.paused.release()

            def resume_writing(self) -> None:
                super().resume_writing()
                answers.resumed.release()

            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                answers.lost.release()

        server.config.http_protocol_class = partial(Watched, *limited.args)  # type: ignore[assignment]

    def evict(self) -> None:
        """Count a connection that is closed to make room."""
        self.evicted += 1


def send_without_end(client: socket.socket) -> None:
    while True:
        client.sendall(bytes(1000))


def connect_without_end(url: str) -> None:
    while True:
        connected(url).close()


def get(count: int) -> bytes:
    return f"GET /{count} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


def test_a_closed_connection_ends_though_its_client_does_not_read_the_rest() -> None:
    """The rest is too little for the transport to pause writing; a mere close would wait for ever."""
    answers = Answers(most=100, seconds=1, head_seconds=PATIENCE)
    with (
        running(answers, answers.prepare, timeout_keep_alive=600) as (server, url),
        connected(url) as client,
    ):
        client.sendall(get(0))
        assert answers.answered.acquire(timeout=PATIENCE)
        (connection,) = server.server_state.connections
        while not connection.transport.get_write_buffer_size():  # until the kernel's buffers are full
            client.sendall(get(16_000))
            assert answers.answered.acquire(timeout=PATIENCE)
        client.sendall(last(get(0)))  # not the end of an idle time, in which a slow test might come late
        assert answers.lost.acquire(timeout=PATIENCE)
        assert not answers.paused.acquire(blocking=False)


def test_who_does_not_take_answers_makes_room_for_new_connections() -> None:
    answers = Answers(most=4, seconds=PATIENCE)
    with running(answers, answers.prepare) as (_, url), ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(connected(url))
            client.sendall(get(100_000_000))
            assert answers.paused.acquire(timeout=PATIENCE)
        with ExitStack() as others:
            for count in range(1, 4):
                other = others.enter_context(httpx.Client(timeout=60))
                assert len(other.get(f"{url}/1000").content) == 1000
                assert answers.evicted == count


def test_who_takes_an_answer_slowly_gets_all_of_it() -> None:
    """The timeout begins anew whenever the client takes what was written."""
    answers, count = Answers(most=100, seconds=PATIENCE), 80_000_000
    with running(answers, answers.prepare) as (_, url), connected(url) as client:
        client.sendall(get(count))

        def take() -> int:
            more = len(client.recv(2**20))
            assert more
            return more

        taken = 0
        for _ in range(3):
            assert answers.paused.acquire(timeout=PATIENCE)
            while not answers.resumed.acquire(blocking=False):
                taken += take()
        while taken < count:
            taken += take()
    # Not how long each ran: a test that loses its core would be a client that takes nothing.
    assert len({id(timer) for timer in answers.timers}) == len(answers.timers) >= 3


def test_the_rest_of_a_refused_body_has_a_bodys_time() -> None:
    """It may take longer than a head may; after it the connection is as idle as any other."""
    answers = Answers(most=100, seconds=PATIENCE, head_seconds=0.3)
    with (
        running(answers, answers.prepare, timeout_keep_alive=600) as (_, url),
        connected(url) as client,
    ):
        client.sendall(post("/0", 2))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        for _ in range(2):  # within the body, and after it
            client.sendall(b"x")
            assert not answers.lost.acquire(timeout=3 * answers.head_seconds)
        client.sendall(get(0))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"GET ")
        assert answers.lost.acquire(timeout=PATIENCE)


def test_who_sends_on_and_on_after_the_last_answer_is_hung_up_on() -> None:
    answers = Answers(most=100, seconds=1)
    with running(answers, answers.prepare) as (_, url), connected(url) as client:
        client.sendall(last(post("/0", 10**12)))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_without_end(client)
    assert answers.lost.acquire(timeout=PATIENCE)


def test_the_last_answer_is_not_lost_by_a_stop() -> None:
    answers, rest = Answers(most=100, seconds=PATIENCE), 8_000_000
    with running(answers, answers.prepare) as (server, url), connected(url) as client:
        client.sendall(last(post("/0", rest)))
        assert answers.answered.acquire(timeout=PATIENCE)
        server.should_exit = True
        with pytest.raises((ConnectionRefusedError, ConnectionResetError)):
            connect_without_end(url)
        client.sendall(bytes(rest))
        assert client.makefile("rb").read().startswith(b"HTTP/1.1 200 ")


def test_nothing_is_kept_of_connections_that_were_reset() -> None:
    answers = Answers(most=100, seconds=PATIENCE)
    with running(answers, answers.prepare, timeout_keep_alive=600) as (_, url):
        for _ in range(10):
            with connected(url) as client:
                client.sendall(get(0))
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            assert answers.lost.acquire(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE / 6
        while kept := sum(issubclass(type(each), HttpToolsProtocol) for each in gc.get_objects()):
            assert time.monotonic() < deadline, kept
            gc.collect()


def test_requests_of_a_connection_have_contexts_of_their_own() -> None:
    seen = ContextVar("seen", default="nothing")

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        before = seen.get()
        seen.set(scope["path"])
        await PlainTextResponse(f"{before} before {scope['path']}\n")(scope, receive, send)

    with running(noting, separate_requests) as (_, url), connected(url) as client:
        client.sendall(get(1) + get(2) + last(get(3)))
        said = client.makefile("rb").read()
    assert re.findall(rb"(\S+) before (\S+)\n", said) == [
        (b"nothing", path) for path in (b"/1", b"/2", b"/3")
    ]


def test_what_is_not_http_is_no_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise a client could fill the log."""
    answers, logger = Answers(most=100, seconds=PATIENCE), logging.getLogger("uvicorn.error")
    with (
        running(answers, answers.prepare) as (_, url),
        connected(url) as client,
        caplog.at_level(logging.INFO, logger.name),
    ):
        logger.addHandler(caplog.handler)
        try:
            client.sendall(b"HELLO\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 400 ")
        finally:
            logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(("configured", "seconds"), [(5, IDLE_SECONDS), (600, 600)])
def test_idle_connections_are_kept(configured: int, seconds: int) -> None:
    """They are kept as long as clients' pools keep them, or as configured if that is longer."""
    answers = Answers(most=100, seconds=PATIENCE)

    def prepare(server: Server) -> None:
        keep_idle_connections(server)
        answers.prepare(server)

    with (
        running(answers, prepare, timeout_keep_alive=configured) as (server, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert client.get("/1000").status_code == 200
        assert answers.answered.acquire(timeout=PATIENCE)
        (connection,) = server.server_state.connections
        assert isinstance(connection, HttpToolsProtocol)
        timer = connection.timeout_keep_alive_task
        assert timer is not None
        left = round(timer.when() - connection.loop.time(), 6)  # exact but for the clock's own rounding
        assert seconds - PATIENCE < left <= seconds


@pytest.mark.parametrize(
    ("hard", "fitting", "soft"), [(10_000, 1000, 2024), (1500, 750, 1500), (2000, 1000, 2000)]
)
def test_open_files_bound_the_connections(hard: int, fitting: int, soft: int) -> None:
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
from serving.uvicorn_server import connections_that_fit
print(connections_that_fit(1000, 512), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.split() == [str(fitting), str(soft)]
    assert ("ulimit" in run.stderr) == (fitting < 1000)
