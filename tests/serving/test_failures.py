"""Faults while the service runs: an engine that fails, a request that takes too long."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from serving.errors import ImageError, OverloadedError
from serving.responses import error_response
from tests.serving.models import write_fragile_model
from tests.serving.samples import encoded
from tests.serving.server import Server, running, serving, wait_until
from tests.transcripts import assert_as_shown

DARK = encoded(np.full((32, 32, 3), 100, np.uint8))
BRIGHT = encoded(np.full((32, 32, 3), 200, np.uint8))
NO_NUMBERS = encoded(np.full((32, 32, 3), 50, np.uint8))


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service whose model fails on `BRIGHT` and gives NaN for `NO_NUMBERS`."""
    folder = tmp_path_factory.mktemp("fragile")
    model = write_fragile_model(folder)
    with running(folder, SERVING_MODEL=str(model), SERVING_PROVIDER="cpu") as server:
        yield server


def test_a_failing_engine_is_a_500_without_details_and_the_service_lives_on(fragile: Server) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=fragile.url, timeout=60) as client:
            return [
                await client.post("/classify", files={"image": DARK}),
                *await asyncio.gather(
                    *(
                        client.post("/classify", files={"image": each})
                        for each in [BRIGHT, DARK, NO_NUMBERS, DARK] * 10
                    )
                ),
                await client.post("/classify", files={"image": DARK}),
            ]

    first, *mixed, last = asyncio.run(ask())
    for response in (first, *mixed[1::2], last):
        assert response.status_code == 200
    for response in mixed[::2]:
        assert response.status_code == 500
        assert response.json() == {
            "error": {"code": "internal_error", "message": "The service failed; its log says why."}
        }
    assert_as_shown("internal_error", fragile.url)


TRACEBACK = "\nTraceback (most recent call last):\n"


@pytest.mark.parametrize(
    ("pixel", "begin", "told"),
    [
        (200, TRACEBACK, "indices element out of"),
        (50, ": tiny ", " gave logits that are no finite numbers\n"),
    ],
)
def test_why_a_request_failed_is_in_the_log_under_its_id(
    fragile: Server, pixel: int, begin: str, told: str
) -> None:
    picture = encoded(np.full((32, 32, 3), pixel, np.uint8))
    answer = httpx.post(f"{fragile.url}/classify", files={"image": picture}, timeout=60)
    assert answer.status_code == 500
    failed = f"/classify ({answer.headers['x-request-id']}) failed{begin}"
    wait_until(lambda: told in fragile.log.read_text().partition(failed)[2], fragile)


def test_a_request_that_takes_too_long(tmp_path: Path) -> None:
    with serving(tmp_path, SERVING_REQUEST_TIMEOUT="0.0001") as url:
        response = httpx.post(f"{url}/classify", files={"image": DARK}, timeout=60)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        assert_as_shown("timeout", url)
        assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200


def test_overload_says_when_to_come_again() -> None:
    response = error_response(OverloadedError("5 requests wait already.", "queue"))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert json.loads(bytes(response.body)) == {
        "error": {"code": "overloaded", "message": "5 requests wait already."}
    }
    assert "retry-after" not in error_response(ImageError("No image.")).headers
