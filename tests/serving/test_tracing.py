"""Spans, as an OpenTelemetry collector receives them."""

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks.server import ServerError
from tests.listener import listening, refusing
from tests.serving.samples import encoded
from tests.serving.server import running, serving, wait_until

PICTURE = {"image": ("a.png", encoded(np.zeros((32, 32, 3), np.uint8)))}
SENDER = "00f067aa0ba902b7"
SERVER = 2  # the kind of a request's own span

Spans = Queue[Any]


@pytest.fixture
def spans() -> Iterator[tuple[str, Spans]]:
    """The address of a collector, and the spans that it receives, except those within a request's."""
    got: Spans = Queue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        if span.kind == SERVER:
                            got.put(span)
            self.send_response(200)
            self.end_headers()

    with listening(Collector) as address:
        yield address, got


def parent(trace: str, recorded: bool) -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{SENDER}-{'01' if recorded else '00'}"}


def test_spans_continue_the_senders_trace(tmp_path: Path, spans: tuple[str, Spans]) -> None:
    collector, got = spans
    with serving(
        tmp_path,
        SERVING_PROVIDER="cpu",
        SERVING_TRACING="1",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector,
        OTEL_BSP_SCHEDULE_DELAY="100",  # milliseconds
    ) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.get("/readyz").status_code == 200
            client.post("/classify", files=PICTURE, headers=parent("1" * 32, recorded=False))
            client.post("/classify", files=PICTURE, headers=parent("2" * 32, recorded=True))
            client.get("/nothing")
        continued, own = got.get(timeout=60), got.get(timeout=60)
    assert (continued.trace_id.hex(), continued.parent_span_id.hex()) == ("2" * 32, SENDER)
    assert continued.name == "POST /classify"
    status = {item.key: item.value.int_value for item in own.attributes}["http.status_code"]
    assert (own.parent_span_id, own.name, status) == (b"", "GET /nothing", 404)
    assert got.empty()


def test_a_share_of_the_requests_has_spans_the_last_sent_as_the_service_stops(
    tmp_path: Path, spans: tuple[str, Spans]
) -> None:
    (collector, got), count = spans, 64  # all or none of them have spans once in 2**63 times
    with (
        serving(
            tmp_path,
            SERVING_PROVIDER="cpu",
            SERVING_TRACING="0.5",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector,
            OTEL_BSP_SCHEDULE_DELAY="3600000",
        ) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        for _ in range(count):
            client.get("/nothing")
        client.post("/classify", files=PICTURE, headers=parent("5" * 32, recorded=True))
    sent = 0
    while got.get(timeout=60).trace_id.hex() != "5" * 32:  # its span comes last
        sent += 1
    assert 0 < sent < count


def test_a_collector_that_is_not_there_is_a_line_in_the_log(tmp_path: Path) -> None:
    with (
        refusing() as collector,
        running(
            tmp_path,
            SERVING_PROVIDER="cpu",
            SERVING_TRACING="0.5",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector,
            OTEL_BSP_SCHEDULE_DELAY="100",
        ) as server,
    ):
        traced = parent("4" * 32, recorded=True)
        answer = httpx.post(f"{server.url}/classify", files=PICTURE, headers=traced, timeout=60)
        assert answer.status_code == 200
        port = collector.rpartition(":")[2]
        told = re.compile(rf"\[WARNING\] .*host='127\.0\.0\.1', port={port}\b.* while exporting spans")
        wait_until(lambda: told.search(server.log.read_text()) is not None, server)
        answer = httpx.post(f"{server.url}/classify", files=PICTURE, headers=traced, timeout=60)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_PROPAGATORS", "tracecontext,b3", "Propagator b3 not found"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100", "max_export_batch_size must be"),
    ],
)
def test_what_opentelemetry_refuses_is_told_at_start(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    settings: dict[str, Any] = {"SERVING_TRACING": "0.5", name: value}
    with (
        pytest.raises(ServerError, match=f"cannot be set up, with {name}: {message}"),
        running(tmp_path, **settings),
    ):
        pytest.fail("it runs")


def test_without_it_there_are_none(tmp_path: Path, spans: tuple[str, Spans]) -> None:
    collector, got = spans
    with serving(
        tmp_path,
        SERVING_PROVIDER="cpu",
        OTEL_PROPAGATORS="none_that_is_installed",
        OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT="no number",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector,
        OTEL_BSP_SCHEDULE_DELAY="1",
    ) as url:
        answer = httpx.post(
            f"{url}/classify", files=PICTURE, headers=parent("3" * 32, recorded=True), timeout=60
        )
        assert answer.status_code == 200
    assert got.empty()  # any span would have been sent before the service ended
