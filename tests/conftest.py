"""Sharing the cores among test workers, and one `bentoml serve` process for the session."""

import os
import signal
import sys
from collections.abc import Iterator

import httpx
import loky
import pytest
from hypothesis import HealthCheck, settings

from tests.serving.server import serving

CORES: int = loky.cpu_count()
MOST_WORKERS = 4  # each takes memory for torch and for the servers that it starts

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Set before torch is imported, here and in the processes that tests start: more threads would only
    # wait for those of the other workers, and a run with another number of them gives other bits.
    assert "torch" not in sys.modules
    threads = max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(threads)

# A test's outcome depends neither on the machine's speed nor on chance; `make fuzz` is for the latter.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "search", settings.get_profile("repeatable"), derandomize=False, max_examples=5000
)
settings.load_profile("repeatable")

# A process started in the background of a script ignores Ctrl-C, and so do the processes it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """The number of workers for `--numprocesses auto`."""
    return min(MOST_WORKERS, CORES)


@pytest.fixture(scope="module")
def sample() -> Iterator[None]:
    """Make the bundled sample the data set."""
    from training import data  # imports torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(data.ROOT_VARIABLE, str(data.SAMPLE))
        yield


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a service with the bundled model and limits that tests can reach.

    It uses the CPU provider, whose figures are the same on every machine.
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
