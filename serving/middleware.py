"""Around every request: its figures, the limit of its body, and one shape for every error.

All are plain ASGI and raise nothing before the answer starts: BentoML would let such a request
hang until its timeout.
"""

import logging
import time
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import InternalError, TooLargeError
from serving.inference_protocol import PREFIX
from serving.responses import ErrorBody, ErrorDetail, error_body, error_response

logger = logging.getLogger("serving")


GONE = "499"  # as nginx has it: the client left before the answer


class Measured:
    """Counts and times every request."""

    def __init__(self, app: ASGIApp) -> None:
        from serving import metrics  # in a worker only, as it says

        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = self.metrics.route(scope["path"])
            self.metrics.requests.labels(route, status).inc()
            self.metrics.request_seconds.labels(route).observe(time.perf_counter() - began)


class BodyLimit:
    """Refuses bodies of more than `max_bytes`: by Content-Length at once, else while they come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its bytes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = TooLargeError(f"The body is too large; the limit is {self.max_bytes} bytes.")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self.max_bytes:
            await error_response(error)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise error  # to the endpoint that is reading, which answers with it
            return message

        await self.app(scope, counted, send)


class ErrorShape:
    """Gives the errors of routing and of BentoML (404, 405, 500, ...) the shape of ours.

    Under /v2 all errors, ours too, get the shape of the Open Inference Protocol.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and hold an error back until its shape is known."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None  # of an error whose body is still coming
        body = b""
        started = False

        async def shaped(message: Message) -> None:
            nonlocal start, body, started
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                started = True
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    started = True
                    await _send_shaped(scope, receive, send, start, body)

        try:
            await self.app(scope, receive, shaped)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            await error_response(InternalError("The service failed; its log says why."))(
                scope, receive, send
            )


async def _send_shaped(scope: Scope, receive: Receive, send: Send, start: Message, body: bytes) -> None:
    """Send an error in the shape that its path has: as it is, or with another body."""
    status = HTTPStatus(start["status"])
    protocol = scope["path"].startswith(f"{PREFIX}/")
    headers = Headers(raw=start["headers"])
    try:
        detail = ErrorBody.model_validate_json(body, extra="forbid").error
    except ValueError:
        message = {
            HTTPStatus.NOT_FOUND: f"There is nothing at {scope['path']}; see / for what there is.",
            HTTPStatus.METHOD_NOT_ALLOWED: f"{scope['method']} is not a method of {scope['path']}.",
        }.get(status, status.description or status.phrase)
        detail = ErrorDetail(code=status.phrase.lower().replace(" ", "_"), message=message)
    shaped = {"error": detail.message} if protocol else error_body(detail.code, detail.message)
    of_the_body = {"content-length", "content-type"}
    kept = {name: value for name, value in headers.items() if name not in of_the_body}
    await JSONResponse(shaped, status, kept)(scope, receive, send)
