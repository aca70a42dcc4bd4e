"""The uvicorn server that BentoML starts around a worker: how to reach it, and what it lacks."""

import asyncio
import logging
import re
import resource
import signal
import sys
from collections.abc import Callable, Container, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from httptools import HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.errors import RequestError
from serving.responses import error_response

logger = logging.getLogger("serving")

COMPLAINT = "The request is not HTTP that can be read."
NOTE = "Invalid HTTP request received."  # uvicorn's, of each; a client could fill the log with it
HOST = re.compile(rb"[^\s@/?#,]*")
MAX_HEAD_BYTES = 64 * 1024
MAX_PIPELINED = 100  # requests of a connection that wait for the answer to one before them
IDLE_SECONDS = 75  # longer than proxies and clients' pools keep a connection: 60 seconds are usual
OTHER_FILES = 512  # what the process opens beside connections and bodies: libraries, the model, figures


def running_server() -> uvicorn.Server | None:
    """The server of this process, or None where something else runs the service.

    BentoML hands it to nobody; but it is the server that handles this process's signals.
    """
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, uvicorn.Server) else None


def shorten(server: uvicorn.Server, paths: Container[str], app: ASGIApp) -> None:
    """Let `app` answer POST requests to `paths` in place of the server's application.

    Requests that come behind a proxy keep the client's address.
    """

    def shortened(longer: ASGIApp) -> ASGIApp:
        async def either(scope: Scope, receive: Receive, send: Send) -> None:
            short = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in paths
            await (app if short else longer)(scope, receive, send)

        return either

    whole = server.config.loaded_app
    if isinstance(whole, ProxyHeadersMiddleware):
        whole.app = shortened(whole.app)  # type: ignore[arg-type, assignment]
    else:
        server.config.loaded_app = shortened(whole)


def keep_idle_connections(server: uvicorn.Server) -> None:
    """Leave it to clients to close a connection that is idle, for `IDLE_SECONDS` at least.

    uvicorn closes it after five, perhaps while a request is on its way to it, and who sent a POST may
    not send it again.
    """
    server.config.timeout_keep_alive = max(IDLE_SECONDS, server.config.timeout_keep_alive)


def separate_requests(server: uvicorn.Server) -> None:
    """Let no request have the context of the one before it on its connection.

    If that one had a span, the next one's would become a part of it.
    """
    server.config.reset_contextvars = True


class _Flow(FlowControl):
    """Reads nothing while requests wait that a client has sent before it had its answer.

    uvicorn stops when the first one comes, and goes on as soon as a request is answered or reads.
    """

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            super().resume_reading()


class _Transport:
    """A connection's transport, through which the client has so many `seconds` to take what is written.

    Closed by whomever, a transport else waits without end for a client that reads nothing.

    Attributes:
        lingers: whether nothing more is written, and what still comes is read only to be dropped.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        is_sent_in_vain: Callable[[], bool],
    ) -> None:
        """
        Args:
            transport: the server's.
            loop: its event loop.
            seconds: that the client has.
            is_sent_in_vain: whether the client sends the rest of a body that has its answer already.
        """
        self._transport, self._loop, self._seconds = transport, loop, seconds
        self._is_sent_in_vain = is_sent_in_vain
        self._late: asyncio.TimerHandle | None = None
        self.lingers = False
        self.write = transport.write  # called for each answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more can be written."""
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Close it, at the latest when the time is over.

        While a body comes the client may send for so long: of an answer that meets its bytes on the
        way, it would see a reset only (RFC 9112, 9.6).
        """
        if self.is_closing():
            return
        if not self._is_sent_in_vain():
            self.end()
            return
        self.lingers = True
        if self._transport.can_write_eof():  # not through TLS
            self._transport.write_eof()
        self._transport.resume_reading()
        self.hurry()

    def end(self) -> None:
        """Close it, at the latest when the time is over, whatever comes."""
        if not self._transport.is_closing():
            self._transport.close()
            self.hurry()

    def hurry(self) -> None:
        """Let the time begin."""
        if self._late is None:
            self._late = self._loop.call_later(self._seconds, self._transport.abort)

    def relax(self) -> None:
        """There is no hurry; the client has taken what it was to take."""
        if self._late is not None:
            self._late.cancel()
            self._late = None


def connections_that_fit(wanted: int, bodies: int) -> int:
    """As many connections as wanted, or as there can be: the limit of open files is raised for them.

    Beside connections there may be `bodies` on disk.
    """
    others = OTHER_FILES + bodies
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted + others
    if hard != resource.RLIM_INFINITY and hard < files:
        files = hard
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    fitting = min(wanted, max(files - others, files // 2))
    if fitting < wanted:
        logger.warning(
            "%d connections at once, not %d: this process may open %d files (ulimit -Hn)",
            *(fitting, wanted, files),
        )
    return fitting


@dataclass(frozen=True)
class ConnectionLimits:
    """What the connections of a server may take of it, and clients of time.

    When there are more than `most`, that one goes, and `evicted` is called, which has been waited for
    longest, for a whole request or to take its answer: who takes it gets an answer to a request that
    has arrived. A request line with its headers may take `head_seconds`, and 64 KiB, as may what lies
    between and after the pieces of a body. What was written must be taken within `body_seconds`, and
    the rest of a body that was refused must come. Of requests that are sent before there was an answer
    100 wait, and one more closes the connection.
    """

    most: int
    head_seconds: float
    body_seconds: float
    evicted: Callable[[], object]


class _Connection(HttpToolsProtocol):
    """A connection within limits; the server makes one for each client.

    An offer to speak another protocol is ignored.
    """

    transport: _Transport  # type: ignore[assignment]
    _overdue: asyncio.TimerHandle | None = None  # set while the head of a request is awaited
    _running: RequestResponseCycle | None = None  # of the requests that came, the one that began last
    _head_bytes = 0  # since the last byte of a body, or the last request
    _data = _offer = b""  # what the parser reads, and what it is to read again

    def __init__(
        self, limits: ConnectionLimits, awaited: "dict[_Connection, None]", **options: Any
    ) -> None:
        """
        Args:
            limits: of all connections of a server.
            awaited: those of them that are waited for, not that wait for an answer, longest first.
            options: what the server gives.
        """
        super().__init__(**options)
        self._limits, self._awaited = limits, awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        bounded = _Transport(transport, self.loop, self._limits.body_seconds, self._has_refused_a_body)
        super().connection_made(bounded)  # type: ignore[arg-type]
        self.flow = _Flow(transport, self.pipeline)
        self._awaited[self] = None
        if len(self.connections) > self._limits.most:
            next(iter(self._awaited))._make_room()
        self._await(self._limits.head_seconds)

    def data_received(self, data: bytes) -> None:
        if self._overdue is None and (self.cycle is None or self.cycle.response_complete):
            self._await(self._limits.head_seconds)
        self._head_bytes += len(data)
        while data:
            self._data, self._offer = data, b""
            super().data_received(data)
            data = self._offer
        if self._head_bytes > MAX_HEAD_BYTES:
            self._give_up()

    def on_headers_complete(self) -> None:
        self._cancel()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            raise ValueError("The answer before said that the connection closes.")
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False
        else:
            hosts = [value for name, value in self.headers if name == b"host"]
            if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
                raise ValueError("HTTP/1.1 has one Host.")
        if self.parser.should_upgrade():
            self._offer = self._head_without_offer()
            return
        # One read brings thousands of small ones, whose state takes a hundred times their bytes.
        if len(self.pipeline) == MAX_PIPELINED:
            raise ValueError(f"{MAX_PIPELINED} requests wait for the answer to one before them.")
        super().on_headers_complete()
        self.headers = []  # for trailers: nobody has looked whether they may be headers

    def on_body(self, body: bytes) -> None:
        # The rest of a body that was refused is read too, or the client might not see its answer.
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offer:
            return
        if not self.cycle.response_complete and not self.flow.write_paused:
            self._awaited.pop(self, None)
        self._head_bytes = 0
        if self._overdue is not None:  # a refused one; from now on the connection is idle
            self._cancel()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        super().on_message_complete()
        self.cycle.more_body = False  # that of a refused one, too
        if self.transport.lingers:
            self.transport.end()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Unless the next request has come already.
        if self in self.connections and (self.cycle.response_complete or self.cycle.more_body):
            self._awaited[self] = None
            if self._has_refused_a_body():
                self._await(self._limits.body_seconds)

    def send_400_response(self, msg: str) -> None:
        if self.transport.is_closing() or self._has_refused_a_body():
            self.transport.end()  # there was an answer
            return
        if self.pipeline and self.pipeline[0][0] is self.cycle and self.cycle.more_body:
            self.pipeline.popleft()  # its body is what cannot be read
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is not None and not last.response_complete and not last.more_body:
            last.keep_alive = False  # whole requests are answered, and that is the end
            return
        if last is None or last.response_complete or not last.response_started:
            body = bytes(error_response(RequestError(COMPLAINT)).body)
            head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            date = [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n")
            self.transport.write(b"".join([*date, head.encode(), b"\r\n", body]))
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        self.transport.hurry()
        self._awaited.setdefault(self)
        super().pause_writing()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self.transport.relax()
        if self.cycle and not self.cycle.response_complete and not self.cycle.more_body:
            self._awaited.pop(self, None)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._awaited.pop(self, None)
        self._cancel()
        self._unset_keepalive_if_required()  # uvicorn keeps it, and so all of this, after a reset
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells the request that came last
            self._running.message_event.set()
        super().connection_lost(exc)
        self.transport.relax()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing to warn of, but to read behind the head too, where the parser has stopped."""
        upgrade = sys.exception()
        assert isinstance(upgrade, HttpParserUpgrade)
        self._offer += self._data[upgrade.args[0] :]
        # One that has read `Connection: close`, or HTTP/1.0, reads nothing more.
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's

    def _head_without_offer(self) -> bytes:
        """The head of a request as it came, but for its offer to speak another protocol.

        The parser would take what comes behind it, such as its body, for that protocol.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":  # no offer: the other protocol has begun
            raise ValueError("The service is no proxy.")
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _has_refused_a_body(self) -> bool:
        """Whether the body comes still of the request that was answered last."""
        return self.cycle is not None and self.cycle.response_complete and self.cycle.more_body

    def _await(self, seconds: float) -> None:
        """Give up after so many, unless what is awaited comes."""
        self._cancel()
        self._overdue = self.loop.call_later(seconds, self._give_up)

    def _cancel(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _give_up(self) -> None:
        self._cancel()
        self.transport.end()

    def _make_room(self) -> None:
        self._limits.evicted()
        self._awaited.pop(self)
        self.connections.discard(self)  # now, or the next new one would push out another for it
        self._cancel()
        self.transport.abort()


def limit_connections(server: uvicorn.Server, limits: ConnectionLimits) -> None:
    """Close connections that are too many, or bring too much, or too little for too long.

    uvicorn keeps all of them for ever.
    """
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.msg != NOTE)
    server.config.http_protocol_class = partial(_Connection, limits, {})  # type: ignore[assignment]
    server.config.ws_protocol_class = None
