"""The uvicorn server that BentoML starts around a worker: how to reach it, and what it lacks."""

import asyncio
import signal
from collections.abc import Container

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024


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


def limit_heads(server: uvicorn.Server, seconds: float) -> None:
    """Close connections whose request line and headers take over `seconds`, or 64 KiB, to arrive.

    uvicorn has neither limit: a client that sends a header line a minute, or nothing at all, would be
    kept for ever.
    """

    class Connection(HttpToolsProtocol):
        _overdue: asyncio.TimerHandle | None = None  # set while the head of a request is awaited
        _head_bytes = 0
        _in_body = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            if self._overdue is None and (self.cycle is None or self.cycle.response_complete):
                self._await_head()
            in_body = self._in_body
            super().data_received(data)
            # The rest of a body that was refused is read, or the client might not see its answer.
            if self._overdue is not None and not (in_body or self._in_body):
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._give_up()

        def on_headers_complete(self) -> None:
            self._cancel()
            self._in_body = True
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_body = False
            if self._overdue is not None:  # the time of a refused body is not that of the next head
                self._await_head()
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            self._cancel()
            self._head_bytes = 0
            self._overdue = self.loop.call_later(seconds, self._give_up)

        def _cancel(self) -> None:
            if self._overdue is not None:
                self._overdue.cancel()
                self._overdue = None

        def _give_up(self) -> None:
            self._cancel()
            self.transport.close()

    if server.config.http_protocol_class is HttpToolsProtocol:
        server.config.http_protocol_class = Connection
