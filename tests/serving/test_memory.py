"""The memory that uploads take, in a real service and in the readers by themselves."""

import io
import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from PIL import Image

from benchmarks.server import service_environment
from serving.errors import PickleError
from serving.submission import read_submission
from tests import ROOT
from tests.serving.raw import connected
from tests.serving.samples import pickled
from tests.serving.server import serving

IMAGES = 10_000
LIMIT = 300 * 2**20  # bytes more than the idle service takes


class Peak:
    """The peak memory (RSS, in bytes) of processes together, sampled while a context lasts."""

    def __init__(self, processes: set[psutil.Process]) -> None:
        self.processes = processes
        self.bytes = self.now()

    def now(self) -> int:
        return sum(process.memory_info().rss for process in self.processes)

    @contextmanager
    def sampled(self) -> Iterator[None]:
        over = threading.Event()

        def sample() -> None:
            while not over.wait(0.005):
                self.bytes = max(self.bytes, self.now())

        with ThreadPoolExecutor(1) as thread:
            samples = thread.submit(sample)
            try:
                yield
            finally:
                over.set()
        samples.result()


@pytest.mark.parametrize(("protocol", "count"), [(2, 3), (4, 12)])
def test_submissions_at_once(
    tmp_path: Path,
    images: npt.NDArray[np.uint8],
    model_file: Callable[..., Path],
    protocol: int,
    count: int,
) -> None:
    """Three in the protocol that takes most memory, and too many for `LIMIT` if all were in memory."""
    data, ids = np.resize(images, (IMAGES, 32, 32, 3)), np.arange(IMAGES)
    content = pickled({b"data": data, b"ids": ids}, protocol, old=True)
    assert len(content) > 30_000_000
    others = set(psutil.Process().children(recursive=True))
    with serving(
        tmp_path,
        SERVING_MODEL=str(model_file()),
        SERVING_PROVIDER="cpu",
    ) as url:
        peak = Peak(set(psutil.Process().children(recursive=True)) - others)
        idle = peak.bytes

        def submit(_: int) -> bytes:
            response = httpx.post(f"{url}/submission", files={"file": content}, timeout=120)
            assert response.status_code == 200, response.text
            return response.content

        with peak.sampled(), ThreadPoolExecutor(count) as clients:
            answers = set(clients.map(submit, range(count)))
    (answer,) = answers
    assert len(answer.splitlines()) == IMAGES + 1
    assert len(content) < peak.bytes - idle < LIMIT


PEAK = """
import contextlib
import sys
from pathlib import Path
from serving.errors import RequestError
from serving.images import decode
from serving.inference_protocol import read

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

content = Path(sys.argv[2]).read_bytes()
before = peak()
with contextlib.suppress(RequestError):
    decode(content, 50_000_000) if sys.argv[1] == "decode" else read(content, None, 256)
print(1024 * (peak() - before))
"""


def peak(what: str, file: Path) -> int:
    """Bytes of memory that a process takes to read a file, on top of what it has before."""
    command = [sys.executable, "-c", PEAK, what, str(file)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak"
)


@linux
@pytest.mark.parametrize(
    ("mode", "kind", "side", "options", "copies"),
    [
        # As RGBA these take four bytes per pixel, more than once.
        pytest.param("P", "PNG", 7000, {"transparency": 0}, 2, id="transparent colours of a palette"),
        pytest.param("RGBA", "WEBP", 3500, {"lossless": True, "method": 0}, 18, id="WebP"),
        pytest.param("RGBA", "WEBP", 7000, {"lossless": True, "method": 0}, 1, id="WebP, refused"),
    ],
)
def test_a_small_file_of_many_pixels(
    tmp_path: Path, mode: str, kind: str, side: int, options: dict[str, Any], copies: int
) -> None:
    file = tmp_path / "image"
    Image.new(mode, (side, side)).save(file, kind, **options)
    assert file.stat().st_size < 100_000
    assert peak("decode", file) < copies * side**2


@linux
@pytest.mark.parametrize(
    "data",
    [["a" * 100_000, *["a"] * 2500], [[]] * 1_000_000, [None] * 1_000_000],
    ids=["texts", "lists", "nulls"],
)
def test_a_tensor_of_anything(tmp_path: Path, data: list[Any]) -> None:
    file = tmp_path / "body"
    tensor = {"name": "images", "shape": [256, 32, 32, 3], "datatype": "UINT8", "data": data}
    file.write_text(json.dumps({"inputs": [tensor]}))
    assert peak("read", file) < 50_000_000


def test_requests_that_are_sent_before_there_was_an_answer(
    tmp_path: Path, model_file: Callable[..., Path]
) -> None:
    others = set(psutil.Process().children(recursive=True))
    with (
        serving(tmp_path, SERVING_MODEL=str(model_file()), SERVING_PROVIDER="cpu") as url,
        connected(url) as connection,
    ):
        peak = Peak(set(psutil.Process().children(recursive=True)) - others)
        idle = peak.bytes
        connection.settimeout(2)
        with peak.sampled(), suppress(TimeoutError, ConnectionError):
            connection.sendall(b"GET /nothing HTTP/1.1\r\n\r\n" * 400_000)
    assert peak.bytes - idle < 50 * 2**20


ONE = np.zeros((1, 32, 32, 3), np.uint8)
SIZE = 8 * 2**20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"data": ONE, "ids": np.zeros(SIZE, np.int8)}, "8388608 ids for 1", id="ids"),
        pytest.param({"data": ONE, "x": "\U0001f600" + "a" * SIZE}, "beyond Latin-1", id="wide text"),
    ],
)
def test_no_file_takes_many_times_its_size(content: Any, message: str) -> None:
    file = io.BytesIO(pickled(content))
    tracemalloc.start()
    try:
        with pytest.raises(PickleError, match=message):
            read_submission(file, 20_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * SIZE


def test_garbage_is_not_looked_for_among_the_libraries(tmp_path: Path) -> None:
    """Otherwise each full collection would hold up all requests for a tenth of a second."""
    code = (
        "import gc, json; from serving.service import service; classifier = service(); gc.collect(); "
        "print(json.dumps([len(gc.get_objects()), gc.get_freeze_count()]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=service_environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    looked_at, left_alone = json.loads(process.stdout.splitlines()[-1])
    assert looked_at < left_alone / 10
