"""The access log: one line of JSON per request, on standard output."""

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from secrets import token_hex

from starlette.datastructures import Headers
from starlette.types import Scope

REQUEST_ID = "x-request-id"
SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context
MAX_SHOWN = 200  # characters of a path in the log

request_id: ContextVar[str] = ContextVar("request_id", default="-")

_logger = logging.getLogger("serving.access")
_logger.setLevel(logging.INFO)
_logger.propagate = False


def open_access_log() -> None:
    """Start the access log; until then `log_request` writes nothing."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.addHandler(handler)


def id_of(headers: Headers) -> str:
    """Return the request's X-Request-Id if it is safe to show as it is, else a new random id."""
    given = headers.get(REQUEST_ID, "")
    return given if SANE_ID.fullmatch(given) else token_hex(16)


def log_request(
    scope: Scope,
    headers: Headers,
    *,
    route: str,
    status: int,
    seconds: float,
    bytes_in: int,
    bytes_out: int,
) -> None:
    """Write a request's line, if the access log is open."""
    if not _logger.handlers:
        return
    client = scope.get("client")
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id.get(),
        "client": client[0] if client else None,
        "method": scope["method"],
        "route": route,
        "path": scope["path"][:MAX_SHOWN],
        "status": status,
        "seconds": round(seconds, 6),
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
    }
    trace = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if trace:
        line["trace_id"] = trace[1]
    _logger.info(json.dumps(line))
