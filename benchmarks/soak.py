"""Check that the service stays stable under long use: answers, memory, file descriptors and threads.

A real ``bentoml serve`` process with default settings takes a mixed load from several clients at once:
single images, batches, raw bodies, submissions, inference requests and pages, among them bad input from
the tests' corpus, malformed forms, and clients that leave before they have sent everything. Each answer
must have the status expected for its request; only 503, which sheds load on purpose, may come instead.
Meanwhile the memory of the server's processes is sampled, and a line is fitted to the samples after a
warm-up.

``python -m benchmarks.soak`` measures and writes ``benchmarks/soak.json``; ``--markdown`` prints from
that file the table in ``benchmarks/README.md``.
"""

import argparse
import asyncio
import contextlib
import json
import pickle
import random
import sys
import tempfile
import textwrap
import tomllib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from benchmarks import stored
from benchmarks.server import ROOT, ServerError, family, is_ready, memory, running
from benchmarks.stored import BenchmarkError
from serving.settings import BUNDLED_MODEL
from training import data
from training.tables import markdown_table

CORPUS = ROOT / "tests" / "serving" / "corpus"
PACKAGES = (
    *("bentoml", "numpy", "pillow", "starlette", "uvicorn"),
    *("onnxruntime", "onnxruntime-gpu", "openvino"),
)
# Fraction of the time before the memory's slope is taken: each thread takes memory once for each batch
# size that it meets for the first time, which goes on for minutes.
WARM_UP = 0.5
SAMPLES = 120  # of the memory, over the whole time
ANSWER_SECONDS = 300.0
BATCH = 16  # images of a /classify_batch and of an inference request
ROWS = 400  # images of a submission; enough for the upload to be kept on disk
SHED = 503
# A soak fails if more than this share of all requests is shed or, provided it lasts long enough to tell,
# if memory grows by more than this slope, in MiB per minute.
MOST_SHED = 0.1
MOST_SLOPE = 1.0
LONG_SECONDS = 600.0
LEFT = "left"  # in place of a status: the client did not wait for one

CONSOLE = Console(stderr=True)


class Figures(stored.Figures):
    """The contents of ``soak.json``.

    Attributes:
        n: the number of requests.
        counts: requests by route and by status, or ``left``.
        unexpected: those of them that had another status than they should, by route and status.
        memory: the memory (RSS, in MiB) of all the server's processes, at even intervals to the end.
        worker: that of the largest process at the end, which is the worker.
        descriptors, threads: of all processes, before the load (each request was made once) and after.
    """

    benchmark: ClassVar[str] = "soak"

    seconds: float
    clients: int
    n: int
    counts: dict[str, dict[str, int]]
    unexpected: dict[str, dict[str, int]]
    memory: list[float]
    worker: float
    descriptors: tuple[int, int]
    threads: tuple[int, int]

    @property
    def warm(self) -> list[float]:
        """The memory after the warm-up."""
        return self.memory[int(WARM_UP * len(self.memory)) :]

    @property
    def slope(self) -> float:
        """MiB per minute, of the least-squares line through the memory after the warm-up."""
        minutes = np.arange(len(self.warm)) * self.seconds / 60 / len(self.memory)
        return float(np.polyfit(minutes, self.warm, 1)[0])


# -- the server -------------------------------------------------------------------------------------


@contextmanager
def server() -> Iterator[tuple[str, psutil.Process]]:
    """Run ``bentoml serve`` with default settings; yields its address and process once it is ready.

    Raises:
        ServerError: it does not start, or its exit code after SIGTERM is not 0.
    """
    command = ("-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", "{port}")
    settings = {"SERVING_MODEL": str(BUNDLED_MODEL)}
    with (
        tempfile.TemporaryDirectory() as folder,
        running("the service", command, settings, is_ready, Path(folder)) as (url, process),
    ):
        yield url, process
    if process.returncode != 0:
        raise ServerError(f"the service ended with {process.returncode}")


@dataclass(frozen=True)
class State:
    """Totals over a process and its descendants; ``memory`` and the ``largest`` one's are in MiB."""

    memory: float
    largest: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> "State":
        """Measure ``process`` and its descendants now."""
        sizes = memory(process)
        descriptors = threads = 0
        for each in family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                descriptors += each.num_fds()
                threads += each.num_threads()
        return cls(sum(sizes), max(sizes), descriptors, threads)


# -- the load ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A request that is made again and again, ``weight`` times as often as one of weight 1."""

    route: str
    weight: float
    status: int
    request: dict[str, Any]

    async def make(self, client: httpx.AsyncClient) -> str:
        """Make the request and return the status of the answer."""
        method, path = self.route.split()
        return str((await client.request(method, path, **self.request)).status_code)


@dataclass(frozen=True)
class Leaving(Call):
    """A request whose client leaves after half of its body."""

    async def make(self, client: httpx.AsyncClient) -> str:
        """Send half of the request's body, close the connection and return ``LEFT``."""
        request = client.build_request(*self.route.split(), **self.request)
        content = request.read()
        lines = [f"{request.method} {request.url.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in request.headers.items()]
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode() + content[: len(content) // 2])
            await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        return LEFT


def calls(model: str) -> list[Call]:
    """All requests of the load, for a server whose model is named ``model``."""
    infer = f"POST /v2/models/{model}/infer"
    found = [*_good(data.load_sample().test.pixels.numpy(), infer), *_wrong(infer)]
    expected = tomllib.loads((CORPUS / "expected.toml").read_text())
    for folder, path, name in (("images", "/classify", "image"), ("pickles", "/submission", "file")):
        for file, (status, _) in expected[folder].items():
            content = (CORPUS / folder / file).read_bytes()
            found.append(Call(f"POST {path}", 0.5, status, {"files": {name: (file, content)}}))
    return found


def _good(pixels: npt.NDArray[np.uint8], infer: str) -> list[Call]:
    small, photo = _image(pixels[0], "PNG"), _image(pixels[1], "JPEG", (640, 480))
    several = [("images", (f"{n}", _image(pixels[n], "PNG"))) for n in range(BATCH)]
    file = pickle.dumps({b"data": pixels[:ROWS], b"ids": np.arange(ROWS)}, 4)
    tensor = {"name": "images", "shape": [BATCH, 32, 32, 3], "datatype": "UINT8"}
    one = {**tensor, "shape": [1, 32, 32, 3], "data": pixels[0].flatten().tolist()}
    binary = {"inputs": [{**tensor, "parameters": {"binary_data_size": pixels[:BATCH].nbytes}}]}
    head = json.dumps(binary).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    return [
        Call("POST /classify", 30, 200, {"files": {"image": small}, "data": {"top_k": "3"}}),
        Call("POST /classify", 10, 200, {"files": {"image": photo}}),
        Call("POST /classify", 10, 200, {"content": small, "headers": {"Content-Type": "image/png"}}),
        Call("POST /classify_batch", 4, 200, {"files": [*several, ("images", b"no image")]}),
        Call("POST /submission", 0.5, 200, {"files": {"file": file}}),
        Call(infer, 5, 200, {"json": {"inputs": [one]}}),
        Call(infer, 3, 200, {"content": head + pixels[:BATCH].tobytes(), "headers": length}),
        Call("GET /", 2, 200, {}),
        Call("GET /docs.json", 1, 200, {}),
        Call("GET /model", 3, 200, {}),
        Call("GET /metrics", 3, 200, {}),
        Call("GET /readyz", 3, 200, {}),
        Call("GET /v2/health/ready", 3, 200, {}),
        Leaving("POST /classify", 2, 200, {"files": {"image": photo}}),
        Leaving("POST /submission", 1, 200, {"files": {"file": file}}),
    ]


def _wrong(infer: str) -> list[Call]:
    return [
        Call("POST /classify", 1, 415, {"json": {"image": "http://localhost/a.png"}}),
        Call("POST /classify", 1, 422, {"files": {"picture": b"a"}}),
        Call("POST /classify", 1, 422, {"files": {"image": b"a"}, "params": {"top_k": "11"}}),
        Call("POST /classify_batch", 1, 422, {"files": {"images": (None, "text")}}),
        Call("POST /submission", 1, 422, {"files": [("file", b"a"), ("file", b"b")]}),
        Call(infer, 1, 400, {"content": b"{"}),
        Call("POST /v2/models/another/infer", 1, 404, {"content": b"{}"}),
        Call("GET /classify", 1, 405, {}),
        Call("GET /nothing", 1, 404, {}),
    ]


def _image(pixels: npt.NDArray[np.uint8], kind: str, size: tuple[int, int] = (32, 32)) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).resize(size).save(file, kind)
    return file.getvalue()


@dataclass
class Tally:
    """What came back, by route and status."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    unexpected: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, call: Call, status: str) -> None:
        """Count an answer."""
        self.counts.setdefault(call.route, Counter())[status] += 1
        if status not in (LEFT, str(call.status), str(SHED)):
            self.unexpected.setdefault(call.route, Counter())[status] += 1

    @property
    def n(self) -> int:
        """The number of all requests."""
        return sum(count.total() for count in self.counts.values())


@asynccontextmanager
async def clients(url: str, load: list[Call], count: int, tally: Tally) -> AsyncIterator[None]:
    """Make requests in ``count`` tasks, each with its own connections, as long as the context lasts."""
    over = asyncio.Event()
    weights = [call.weight for call in load]

    async def work(number: int) -> None:
        chance = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:
            while not over.is_set():
                (call,) = chance.choices(load, weights)
                try:
                    status = await call.make(client)
                except (httpx.HTTPError, OSError) as error:
                    status = type(error).__name__  # as unexpected as a wrong status
                tally.add(call, status)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(work(number))
        try:
            yield
        finally:
            over.set()


async def soak(url: str, process: psutil.Process, seconds: float, count: int) -> dict[str, Any]:
    """Put the load on a server; returns the fields of ``Figures`` that are measured."""
    tally = Tally()
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:
        load = calls((await client.get("/model")).json()["name"])
        for call in load:
            try:
                await call.make(client)
            except httpx.HTTPError as error:
                raise ServerError(f"the service does not answer {call.route}: {error!r}") from error
    began, memory = await _settled(process, None), []
    with Progress(console=CONSOLE) as progress:
        task = progress.add_task("soaking", total=SAMPLES)
        async with clients(url, load, count, tally):
            for _ in range(SAMPLES):
                await asyncio.sleep(seconds / SAMPLES)
                memory.append(State.of(process).memory)
                progress.advance(task)
    ended = await _settled(process, began)
    return {
        "n": tally.n,
        "counts": tally.counts,
        "unexpected": tally.unexpected,
        "memory": memory,
        "worker": ended.largest,
        "descriptors": (began.descriptors, ended.descriptors),
        "threads": (began.threads, ended.threads),
    }


async def _settled(process: psutil.Process, before: State | None) -> State:
    """The state after 5 s, or once there are no more descriptors than ``before``.

    In that time the server notices that connections are closed.
    """
    for _ in range(100):
        state = State.of(process)
        if before is not None and state.descriptors <= before.descriptors:
            break
        await asyncio.sleep(0.05)
    return state


# -- figures ----------------------------------------------------------------------------------------


def markdown(figures: Figures) -> str:
    """The figures as a Markdown table, with a note on what else was measured, and where."""
    statuses = sorted({status for counts in figures.counts.values() for status in counts})
    rows = [["request", *statuses]]
    for route, counts in sorted(figures.counts.items()):
        rows.append([f"`{route}`", *(f"{counts[s]:,}" if s in counts else "" for s in statuses)])
    wrong = sum(sum(counts.values()) for counts in figures.unexpected.values())
    begin = WARM_UP * figures.seconds / 60
    first, *_, last = figures.memory
    text = (
        f"{figures.n:,} requests of {figures.clients} clients in {figures.seconds / 60:g} minutes, by "
        f"status; *{LEFT}* counts clients that disconnected while sending. {wrong} had an unexpected "
        f"status. The server's processes took {first:,.0f} MiB (RSS) after "
        f"{figures.seconds / len(figures.memory):.0f} s, "
        f"{figures.warm[0]:,.0f} MiB after {begin:g} minutes and {last:,.0f} MiB at the end, "
        f"{figures.worker:,.0f} MiB of which are the worker's; a line "
        f"fitted to the time after {begin:g} minutes rises by {figures.slope:.2f} MiB per minute. They "
        f"had {figures.descriptors[0]} file descriptors open before and "
        f"{figures.descriptors[1]} after, {figures.threads[0]} threads before and {figures.threads[1]} "
        f"after. {figures.place}"
    )
    return f"{markdown_table(rows)}\n\n{textwrap.fill(text, 120)}"


def failed(figures: Figures) -> str:
    """What is wrong with the figures; an empty string if nothing is."""
    sheds = sum(counts.get(str(SHED), 0) for counts in figures.counts.values())
    if figures.unexpected:
        return f"answers that were not as they should be: {figures.unexpected}"
    if sheds > MOST_SHED * figures.n:
        return f"{sheds} of {figures.n} requests were shed"
    if figures.descriptors[1] > figures.descriptors[0]:
        return f"file descriptors leak: {figures.descriptors[0]} became {figures.descriptors[1]}"
    if figures.seconds >= LONG_SECONDS and figures.slope > MOST_SLOPE:
        return f"memory grows by {figures.slope:.2f} MiB per minute"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, which is 1 if the soak failed."""
    return stored.main(Figures, _parser(), _measure, markdown, arguments, failed)


def _measure(options: argparse.Namespace) -> Iterator[Figures]:
    if options.clients < 1:
        raise BenchmarkError("--clients has to be at least 1")
    begun = stored.begin(PACKAGES)
    with server() as (url, process):
        measured = asyncio.run(soak(url, process, options.seconds, options.clients))
        yield Figures(**begun, seconds=options.seconds, clients=options.clients, **measured)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Mixed load and bad input against a server of its own, while its memory, file "
        "descriptors and threads are watched.",
    )
    parser.add_argument("--seconds", type=stored.seconds, default=600.0, help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=8, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
