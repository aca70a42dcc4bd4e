"""The uvicorn server that BentoML starts in each worker: how to get at it, and the limits it lacks."""

import asyncio
import logging
import re
import resource
import signal
import sys
from collections.abc import Callable, Container, Sized
from dataclasses import dataclass
from functools import partial
from itertools import chain
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
NOTE = "Invalid HTTP request received."  # logged by uvicorn for each; a client could fill the log
HOST = re.compile(rb"[^\s@/?#,]*")
MAX_HEAD_BYTES = 64 * 1024
MAX_PIPELINED = 100  # requests of a connection that wait for the answer to one before them
IDLE_SECONDS = 75  # longer than proxies and clients' pools keep a connection: 60 seconds are usual
OTHER_FILES = 512  # opened besides connections and bodies: libraries, the model, figures


def running_server() -> uvicorn.Server | None:
    """Return the server of this process, or None if something else runs the service.

    BentoML gives no access to it, but it is the server that handles this process's SIGTERM.
    """
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, uvicorn.Server) else None


def bypass(server: uvicorn.Server, paths: Container[str], app: ASGIApp) -> None:
    """Let `app` answer POST requests to `paths` in place of the server's application.

    Behind a proxy, the requests that `app` gets have the client's address, too.
    """

    def bypassed(usual: ASGIApp) -> ASGIApp:
        async def either(scope: Scope, receive: Receive, send: Send) -> None:
            ours = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in paths
            await (app if ours else usual)(scope, receive, send)

        return either

    whole = server.config.loaded_app
    if isinstance(whole, ProxyHeadersMiddleware):
        whole.app = bypassed(whole.app)  # type: ignore[arg-type, assignment]
    else:
        server.config.loaded_app = bypassed(whole)


def keep_idle_connections(server: uvicorn.Server) -> None:
    """Keep idle connections open for at least `IDLE_SECONDS`, so that clients close them first.

    uvicorn closes them after five seconds, perhaps while a request is on its way, and a client may not
    send a POST again.
    """
    server.config.timeout_keep_alive = max(IDLE_SECONDS, server.config.timeout_keep_alive)


def separate_requests(server: uvicorn.Server) -> None:
    """Give each request a context of its own, not that of the request before it on its connection.

    If that one had a span, the next one's span would become a part of it.
    """
    server.config.reset_contextvars = True


class _Flow(FlowControl):
    """Reads nothing from a connection while pipelined requests wait.

    uvicorn stops reading when the first comes, but goes on as soon as a request is answered or reads.
    """

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            super().resume_reading()


class _Transport:
    """A connection's transport that gives the client `seconds` to take what is written.

    Otherwise a transport, whoever closes it, waits without end for a client that reads nothing.

    Attributes:
        lingers: whether nothing more is written, and what still arrives is read only to be dropped.
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
            transport: the server's transport.
            loop: its event loop.
            seconds: the time that the client has.
            is_sent_in_vain: tells whether the client still sends a body whose request has been answered.
        """
        self._transport, self._loop, self._seconds = transport, loop, seconds
        self._is_sent_in_vain = is_sent_in_vain
        self._late: asyncio.TimerHandle | None = None
        self.lingers = False
        self.write = transport.write  # not by __getattr__, as it is called for each answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether nothing more can be written."""
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection, after `seconds` at the latest.

        A client that is still sending a body may go on for that time: if the connection were closed at
        once, it would see a reset instead of its answer (RFC 9112, 9.6).
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
        """Close the connection, after `seconds` at the latest, even if the client is still sending."""
        if not self._transport.is_closing():
            self._transport.close()
            self.hurry()

    def hurry(self) -> None:
        """Start the client's time, unless it has started."""
        if self._late is None:
            self._late = self._loop.call_later(self._seconds, self._transport.abort)

    def relax(self) -> None:
        """Stop the client's time, as it has taken what was written."""
        if self._late is not None:
            self._late.cancel()
            self._late = None


def connections_that_fit(wanted: int, bodies: int) -> int:
    """Raise the limit of open files as needed; return how many connections fit in, `wanted` at most.

    `bodies` is how many request bodies may be on disk at the same time.
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
    """Limits on the connections of a server, and on the time that clients may take.

    If there are more than `most` connections, the one is closed whose client the server has waited for
    longest, to send a whole request or to take its answer, and `evicted` is called. So a request that
    has arrived is answered if its client reads. A request line with its headers may take `head_seconds`
    and 64 KiB; the 64 KiB also hold for what lies between and after the pieces of a body. What was
    written must be taken, and the rest of a refused body must arrive, within `body_seconds`. Up to 100
    pipelined requests wait for the answer to one before them; one more closes the connection.
    """

    most: int
    head_seconds: float
    body_seconds: float
    evicted: Callable[[], object]


class _Connection(HttpToolsProtocol):
    """A connection that keeps within limits; the server makes one of these for each.

    An offer to speak another protocol (the header Upgrade) is ignored.
    """

    transport: _Transport  # type: ignore[assignment]
    _timer: asyncio.TimerHandle | None = None  # while a head or the rest of a refused body is due
    _running: RequestResponseCycle | None = None  # the request that was started last
    _head_bytes = 0  # received since the last byte of a body, or the last request
    _in_head = False  # whether a part of a head has come
    _data = _offer = b""  # what the parser reads, and what it is to read next

    def __init__(
        self, limits: ConnectionLimits, awaited: "dict[_Connection, None]", **options: Any
    ) -> None:
        """
        Args:
            limits: those of all the server's connections.
            awaited: the connections whose clients the server waits for, longest first; shared by all.
            options: what uvicorn passes.
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
        self._start_timer(self._limits.head_seconds)

    def data_received(self, data: bytes) -> None:
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start_timer(self._limits.head_seconds)
        self._head_bytes += len(data)
        while data:
            self._data, self._offer = data, b""
            super().data_received(data)
            data = self._offer
        if self._head_bytes > MAX_HEAD_BYTES:
            self._give_up()

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            raise ValueError("The answer before said that the connection closes.")
        if len(self.url) + sum(map(len, chain.from_iterable(self.headers))) > MAX_HEAD_BYTES:
            raise ValueError("The head is too long.")  # and came in one piece
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False
        else:
            hosts = [value for name, value in self.headers if name == b"host"]
            if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
                raise ValueError("HTTP/1.1 has one Host.")
        if self.parser.should_upgrade():
            self._offer = self._head_without_offer()
            return
        # One read can bring thousands of small requests, whose state takes a hundred times their bytes.
        if len(self.pipeline) == MAX_PIPELINED:
            raise ValueError(f"{MAX_PIPELINED} requests wait for the answer to one before them.")
        super().on_headers_complete()
        self.headers = []  # for trailers, so that they do not become the request's headers unchecked

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
        if self._timer is not None:  # of a refused body; from now on the connection is idle
            self._stop_timer()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        super().on_message_complete()
        self.cycle.more_body = False  # of a refused body, too
        if self.transport.lingers:
            self.transport.end()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Unless the next request has come already.
        if self in self.connections and (self.cycle.response_complete or self.cycle.more_body):
            self._awaited[self] = None
            if self._has_refused_a_body():
                self._start_timer(self._limits.body_seconds)
            elif self._in_head:  # which began to come before this answer
                self._start_timer(self._limits.head_seconds)

    def send_400_response(self, msg: str) -> None:
        if self.transport.is_closing() or self._has_refused_a_body():
            self.transport.end()  # it has its answer already
            return
        if self.pipeline and self.pipeline[0][0] is self.cycle and self.cycle.more_body:
            self.pipeline.popleft()  # its body is what could not be read
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is not None and not last.response_complete and not last.more_body:
            last.keep_alive = False  # complete requests are still answered, then it closes
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
        self._stop_timer()
        self._unset_keepalive_if_required()  # uvicorn keeps the timer, and so this object, after a reset
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells only the request that came last
            self._running.message_event.set()
        super().connection_lost(exc)
        self.transport.relax()

    def _unsupported_upgrade_warning(self) -> None:
        """Read on after the head, where the parser has stopped; there is nothing to warn of."""
        upgrade = sys.exception()
        assert isinstance(upgrade, HttpParserUpgrade)
        self._offer += self._data[upgrade.args[0] :]
        # A parser that has read `Connection: close`, or HTTP/1.0, reads nothing more.
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _head_without_offer(self) -> bytes:
        """Return the head of a request as it came, but without its offer to speak another protocol.

        With the offer, the parser would take what follows, such as the body, for that protocol.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":  # not an offer: the other protocol has begun
            raise ValueError("The service is no proxy.")
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _has_refused_a_body(self) -> bool:
        """Return whether the body of the request that was answered last is still arriving."""
        return self.cycle is not None and self.cycle.response_complete and self.cycle.more_body

    def _start_timer(self, seconds: float) -> None:
        """Close the connection after `seconds`, unless `_stop_timer` is called before."""
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._stop_timer()
        self.transport.end()

    def _make_room(self) -> None:
        self._limits.evicted()
        self._awaited.pop(self)
        self.connections.discard(self)  # at once, or the next new one would evict another one
        self._stop_timer()
        self.transport.abort()


def limit_connections(server: uvicorn.Server, limits: ConnectionLimits) -> None:
    """Close connections that are too many, that bring too much, or too little for too long.

    uvicorn by itself keeps all of them for ever.
    """
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.msg != NOTE)
    server.config.http_protocol_class = partial(_Connection, limits, {})  # type: ignore[assignment]
    server.config.ws_protocol_class = None
