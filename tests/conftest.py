"""One `bentoml serve` process for the session."""

from collections.abc import Iterator

import httpx
import pytest

from tests.serving.server import serving


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a service with the bundled model and limits that tests can reach.

    On the CPU provider, whose figures are the same on every machine.
    """
    with serving(
        tmp_path_factory.mktemp("serve"),
        SERVING_PROVIDER="cpu",
        SERVING_MAX_BODY_BYTES="4000000",
        SERVING_MAX_IMAGE_PIXELS="1000000",
        SERVING_MAX_BATCH_IMAGES="40",
        SERVING_MAX_ROWS="1000",
    ) as address:
        yield address


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
