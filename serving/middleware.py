"""Middleware around every request: metrics and log, the shape of errors, admission, limits on the body.

All of it is plain ASGI. What is inside `ErrorShape` may raise: a `RequestError` is answered with its own
status, anything else with 500. What is outside must not raise before the answer starts: BentoML would
let such a request hang until its timeout.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Iterable
from http import HTTPStatus

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access_log import REQUEST_ID, id_of, log_request, request_id
from serving.drain import Drain
from serving.errors import (
    InternalError,
    MediaTypeError,
    RequestError,
    SlowBodyError,
    TooLargeError,
    UnauthorizedError,
)
from serving.inference_protocol import is_protocol
from serving.limits import Budget
from serving.responses import ErrorBody, ErrorDetail, error_body, error_response

logger = logging.getLogger("serving")

Header = tuple[bytes, bytes]

HIDDEN_HEADERS = frozenset({b"server", b"x-bentoml-request-id"})  # what runs here is nobody's business
# BentoML's page at / would load a tracker's script, which could read all that is tried out there.
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)
# For a request of this type BentoML would write a traceback into the log.
FOR_BENTOML = "application/vnd.bentoml+pickle"
FREE_BYTES = 64 * 1024  # of a body; up to this a request is not refused for the size of other bodies
GONE = 499  # nginx's status for a client that left before the answer

# For the machines that watch the service: these need no key, and are answered even while it stops.
OPEN_PATHS = frozenset(
    {"/healthz", "/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}
)
# A browser asks for these without a key; the page itself takes the key for requests tried out on it.
PAGE_PATHS = frozenset({"/", "/docs.json"})
PAGE_FILES = "/static_content/"


class Observed:
    """Counts, times and logs every request, and adds its id and the common headers to its answer."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        from serving import metrics  # in workers only, see there

        self.app, self.drain, self.metrics = app, drain, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), GONE
        bytes_in = bytes_out = 0
        headers = Headers(scope=scope)
        identity = id_of(headers)
        request_id.set(identity)

        async def counted() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def noted(message: Message) -> None:
            nonlocal status, bytes_out
            if message["type"] == "http.response.start":
                status = message["status"]
                completed = self._completed(message["headers"], identity)
                # A client that waits for 100 Continue and is refused may go on with the body or with its
                # next request; nothing tells them apart.
                if status >= 400 and not bytes_in and "expect" in headers:
                    completed.append((b"connection", b"close"))
                message = {**message, "headers": completed}
            elif scope["method"] != "HEAD":  # to which uvicorn sends no body
                bytes_out += len(message.get("body", b""))
            await send(message)

        self.metrics.under_way.inc()
        try:
            await self.app(scope, counted, noted)
        finally:
            seconds = time.perf_counter() - began
            route = self.metrics.route(scope["path"])
            self.metrics.under_way.dec()
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(seconds)
            log_request(
                scope,
                headers,
                route=route,
                status=status,
                seconds=seconds,
                bytes_in=bytes_in,
                bytes_out=bytes_out,
            )

    def _completed(self, headers: Iterable[Header], identity: str) -> list[Header]:
        completed = [header for header in headers if header[0] not in HIDDEN_HEADERS]
        completed += [(REQUEST_ID.encode(), identity.encode()), (b"x-content-type-options", b"nosniff")]
        if any(name == b"content-type" and value.startswith(b"text/html") for name, value in completed):
            completed.append((b"content-security-policy", PAGE_POLICY.encode()))
        if self.drain.stopping:
            completed.append((b"connection", b"close"))
        return completed


class ErrorShape:
    """Gives the errors of routing and of BentoML (404, 405, 500, ...) the same shape as ours.

    Under /v2 all errors, including ours, get the shape of the Open Inference Protocol.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and hold an error answer back until its body is complete."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None  # of an error whose body is still coming
        body = b""
        started = False

        async def shaped(message: Message) -> None:
            nonlocal start, body, started
            if message.get("status") == HTTPStatus.TEMPORARY_REDIRECT:
                # Starlette's, to the path without its trailing slash at whatever host the client named.
                message = {**message, "status": HTTPStatus.NOT_FOUND, "headers": []}
            status = message.get("status", 0)  # of the start of an answer
            if status >= 400 and status != GONE:  # nobody reads the answer to a client that has left
                start = message
            elif start is None:
                started = True
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    started = True
                    await _send_shaped(scope, receive, send, start, body)

        app = self.app
        if scope["path"].endswith("\n"):  # which Starlette's routes would overlook
            app = Response(status_code=HTTPStatus.NOT_FOUND)
        try:
            await app(scope, receive, shaped)
        except Exception as error:
            if started:
                if isinstance(error, RequestError):
                    return  # too late for an error answer; uvicorn ends the connection
                raise
            if not isinstance(error, RequestError):
                logger.exception("%s %s (%s) failed", scope["method"], scope["path"], request_id.get())
                error = InternalError()
            await error_response(error)(scope, receive, shaped)


async def _send_shaped(scope: Scope, receive: Receive, send: Send, start: Message, body: bytes) -> None:
    """Send an error in the shape that its path requires, with our text if it is not one of ours."""
    status = HTTPStatus(start["status"])
    headers = Headers(raw=start["headers"])
    try:
        detail = ErrorBody.model_validate_json(body, extra="forbid").error
    except ValueError:
        methods = " or ".join(sorted(headers.get("allow", "another").split(", ")))
        message = {
            HTTPStatus.NOT_FOUND: f"There is nothing at {scope['path']}; see / for what there is.",
            HTTPStatus.METHOD_NOT_ALLOWED: f"{scope['method']} is not a method of {scope['path']}; "
            f"right would be {methods}.",
        }.get(status, status.description or status.phrase)
        detail = ErrorDetail(code=status.phrase.lower().replace(" ", "_"), message=message)
    shaped = (
        {"error": detail.message}
        if is_protocol(scope["path"])
        else error_body(detail.code, detail.message)
    )
    of_the_body = {"content-length", "content-type"}
    kept = {name: value for name, value in headers.items() if name not in of_the_body}
    await JSONResponse(shaped, status, kept)(scope, receive, send)


class Admission:
    """Refuses requests without the key, if one is set, and all new ones once the service stops."""

    def __init__(self, app: ASGIApp, drain: Drain, api_key: SecretStr | None) -> None:
        self.app, self.drain = app, drain
        self.key = api_key.get_secret_value().encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        if self.key is not None and not (
            scope["path"] in PAGE_PATHS
            or scope["path"].startswith(PAGE_FILES)
            or any(hmac.compare_digest(given, self.key) for given in _given_keys(scope))
        ):
            raise UnauthorizedError(
                "The service asks for its key; send it as `Authorization: Bearer KEY` or as "
                "`X-API-Key: KEY`."
            )
        with self.drain.request():
            await self.app(scope, receive, send)


def _given_keys(scope: Scope) -> list[bytes]:
    """Return the keys in a request's headers, as raw bytes, so that a key may have any character."""
    keys = []
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            keys.append(value)
        elif name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                keys.append(key.strip())
    return keys


class Reception:
    """Receives the body within its limits, and cancels the work for a client that has left.

    A body is refused if it has more than `max_bytes` (at once by its Content-Length, otherwise while it
    arrives), if it has not arrived after `seconds`, or if too little is left of `uploads`, the budget of
    bytes for all bodies under way.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float, uploads: Budget) -> None:
        self.app = app
        self.uploads = uploads
        self.max_bytes = max_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, watching its body and its client."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._check_head(Headers(scope=scope))
        task = asyncio.current_task()
        assert task is not None, "requests are handled in tasks"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.seconds
        received = held = 0
        answered = left = False
        leaving: asyncio.Task[Message] | None = None  # started once the body is there

        async def watched() -> Message:
            nonlocal received, held, leaving
            if leaving is not None:
                return await leaving
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                # Raised in the endpoint that is reading, which answers with it; so is the next.
                raise SlowBodyError(f"The body took over {self.seconds:g} seconds to arrive.") from None
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self._too_large()
            if received > FREE_BYTES:
                self.uploads.take(received - FREE_BYTES - held)
                held = received - FREE_BYTES
            if message["type"] == "http.request" and not message.get("more_body", False):
                leaving = loop.create_task(until_left())
            return message

        async def until_left() -> Message:
            nonlocal left
            message = await receive()
            if not answered:
                left = True
                task.cancel()
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, watched, noted)
        except asyncio.CancelledError:
            if not left:
                raise
            task.uncancel()
            await Response(status_code=GONE)(scope, receive, send)  # for BentoML, the end of it
        finally:
            self.uploads.give_back(held)
            if leaving is not None:
                leaving.cancel()

    def _check_head(self, headers: Headers) -> None:
        """Raise a `RequestError` for a body that need not be read, as its headers say enough."""
        for name, right in (("content-encoding", "identity"), ("transfer-encoding", "chunked")):
            codings = ",".join(headers.getlist(name))
            if {coding.strip().lower() for coding in codings.split(",")} - {right, ""}:
                raise MediaTypeError(
                    f"The body has the {name.title()} {codings[:100]!r}; right would be none, as images "
                    "are compressed already."
                )
        if headers.get("content-type", "").partition(";")[0].strip() == FOR_BENTOML:
            raise MediaTypeError(f"The Content-Type is {FOR_BENTOML!r}, which no endpoint reads.")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_bytes:
            raise self._too_large()

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"The body is too large; the limit is {self.max_bytes} bytes.")
