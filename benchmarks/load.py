"""Load on a server: each connection sends its next request when the previous one is answered.

``python -m benchmarks.load URL --connections 32 --seconds 5`` prints a line of JSON. The requests, real
images as PNG in multipart forms, are built before the clock starts, so that the client costs little.
"""

import argparse
import asyncio
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from urllib.parse import urlsplit

import httptools
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

SAMPLE = Path(__file__).resolve().parent.parent / "training" / "cifar10_sample.npz"
PERCENTILES = (50, 90, 99, 100)
IMAGES = 256
PATIENCE = 30.0  # seconds to wait for answers that are under way when the time is up


def requests(url: str, field: str, images: int) -> list[bytes]:
    """HTTP requests as bytes, each with ``images`` PNG files in form fields named ``field``."""
    with np.load(SAMPLE, allow_pickle=False) as sample:
        pixels = sample["test_images"][:IMAGES]
    files = cycle(png(image) for image in pixels)
    made = []
    for _ in range(IMAGES if images == 1 else 8):
        parts = [(field, ("image.png", content, "image/png")) for content in islice(files, images)]
        request = httpx.Request("POST", url, files=parts)
        head = [f"POST {request.url.raw_path.decode()} HTTP/1.1".encode()]
        head += [name + b": " + value for name, value in request.headers.raw]
        made.append(b"\r\n".join([*head, b"", request.read()]))
    return made


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An image file of ``pixels``, uint8 [height, width, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, bodies: Iterator[bytes], until: float, answers: "Answers") -> None:
        self.bodies, self.until, self.answers = bodies, until, answers
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.sent: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Read the answer."""
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Count the answer and send the next request."""
        now = time.perf_counter()
        assert self.sent is not None
        status = self.parser.get_status_code()
        self.answers.statuses[status] += 1
        if status == 200:
            self.answers.seconds.append(now - self.sent)
            self.answers.in_time += now <= self.until
        self.sent = None
        if now < self.until and self.parser.should_keep_alive():
            self._send()
        else:
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        """Count a request without an answer as an error."""
        if self.sent is not None:
            self.answers.errors += 1
        self._end()

    def _send(self) -> None:
        assert self.transport is not None
        self.parser = httptools.HttpResponseParser(self)
        self.sent = time.perf_counter()
        self.transport.write(next(self.bodies))

    def _end(self) -> None:
        if self.transport is not None:
            self.transport.close()
        if not self.over.done():
            self.over.set_result(None)


class Answers:
    """Answers to the requests that were sent in time.

    Those that come after the time count too, as they are the slowest.

    Attributes:
        seconds: of each answer with status 200.
        in_time: how many of these came in time.
        statuses: counts of all answers by status.
        errors: the number of requests without an answer.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.in_time = 0
        self.statuses: Counter[int] = Counter()
        self.errors = 0

    async def run(self, url: str, bodies: list[bytes], connections: int, seconds: float) -> None:
        """Keep ``connections`` busy for ``seconds``, then wait for the answers under way."""
        address = urlsplit(url)
        assert address.hostname is not None
        host, port = address.hostname, address.port or 80
        until = time.perf_counter() + seconds

        async def client(number: int) -> None:
            mine = cycle(bodies[number % len(bodies) :] + bodies[: number % len(bodies)])
            while time.perf_counter() < until:  # reconnects if the server has hung up
                try:
                    _, protocol = await asyncio.get_running_loop().create_connection(
                        lambda: Client(mine, until, self), host, port
                    )
                except OSError:
                    self.errors += 1
                    await asyncio.sleep(0.1)
                    continue
                try:
                    await asyncio.wait_for(protocol.over, seconds + PATIENCE)
                except TimeoutError:
                    self.errors += 1

        await asyncio.gather(*(client(number) for number in range(connections)))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--field", default="image", help="of the form (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1, help="per request (default: %(default)s)")
    options = parser.parse_args()
    bodies = requests(options.url, options.field, options.images)
    answers, began, wall = Answers(), time.process_time(), time.perf_counter()
    asyncio.run(answers.run(options.url, bodies, options.connections, options.seconds))
    milliseconds = [1000 * value for value in answers.seconds] or [float("nan")]
    found = {
        "connections": options.connections,
        "images": options.images,
        "seconds": options.seconds,
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "answers": answers.statuses.total(),
        "statuses": answers.statuses,
        "in_time": answers.in_time,
        "errors": answers.errors,
        "milliseconds": dict(
            zip(PERCENTILES, np.percentile(milliseconds, PERCENTILES).round(3).tolist(), strict=True)
        ),
        "client_cpu_seconds": round(time.process_time() - began, 3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
