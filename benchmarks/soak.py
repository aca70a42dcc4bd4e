"""Whether the service stays as it was under hours of use: counts, memory, file descriptors and threads.

A real ``bentoml serve`` process with its default settings takes mixed load from several clients at once:
images alone, in batches and as raw bodies, submissions, inference requests, pages; among them bad input
from the tests' corpus, forms that are wrong, and clients that leave before they have sent all. Each
answer's status is held against the one that it should have; only 503, which sheds load on purpose, may
come instead. Meanwhile the memory of the server's processes is sampled, and a line is fitted to it after
a warm-up.

``python -m benchmarks.soak`` measures and writes ``benchmarks/soak.json``; ``--markdown`` prints the
table that the README has from that file.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pickle
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import Progress

from benchmarks import stored
from benchmarks.stored import BenchmarkError
from serving.settings import BUNDLED_MODEL, PREFIX
from training import data, device, provenance
from training.__main__ import markdown_table

FIGURES = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "serving" / "corpus"
PACKAGES = ("bentoml", "numpy", "onnxruntime-gpu", "pillow", "starlette", "uvicorn")
# Of the time, before the memory's slope is taken: threads and batch sizes that have not met yet take
# memory once when they do, for minutes.
WARM_UP = 0.5
SAMPLES = 120  # of memory, over the whole time
START_SECONDS = 120.0
ANSWER_SECONDS = 300.0
BATCH = 16  # images of a /classify_batch and of an inference request
ROWS = 400  # images of a submission; enough that its file lies on disk
SHED = 503
LEFT = "left"  # in place of a status: the client did not wait for one

CONSOLE = Console(stderr=True)


class Figures(BaseModel):
    """What ``soak.json`` holds.

    Attributes:
        n: requests.
        counts: by route and by status, or ``left``.
        unexpected: of those, by route and status: not the status that the request should have.
        memory: MiB (RSS) of all processes of the server, at even times from begin to end.
        descriptors, threads: of all processes, when each request was made once and after the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: str
    commit: str
    device: str
    python: str
    packages: dict[str, str]
    seconds: float
    clients: int
    n: int
    counts: dict[str, dict[str, int]]
    unexpected: dict[str, dict[str, int]]
    memory: list[float]
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
def server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A ``bentoml serve`` process with default settings that is ready: its address, and itself.

    Raises:
        BenchmarkError: it does not start, or does not end with 0 at SIGTERM.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment |= {"BENTOML_HOME": str(folder / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
    environment["SERVING_MODEL"] = str(BUNDLED_MODEL)
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, log)
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(START_SECONDS)
    if status != 0:
        raise BenchmarkError(f"the server ended with {status}: {log.read_text()[-500:]}")


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)  # nobody listens yet; there is no event to wait for
    raise BenchmarkError(f"the server does not start: {log.read_text()[-500:]}")


@dataclass(frozen=True)
class State:
    """Of a process and its children: memory in MiB, open file descriptors, threads."""

    memory: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> "State":
        """As it is now."""
        all_ = [process, *process.children(recursive=True)]
        return cls(
            sum(each.memory_info().rss for each in all_) / 2**20,
            sum(each.num_fds() for each in all_),
            sum(each.num_threads() for each in all_),
        )


# -- the load ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A request that is made again and again, ``weight`` times as often as one of weight 1."""

    route: str
    weight: float
    status: int
    request: dict[str, Any]

    async def make(self, client: httpx.AsyncClient) -> str:
        """The status of the answer."""
        method, path = self.route.split()
        return str((await client.request(method, path, **self.request)).status_code)


@dataclass(frozen=True)
class Leaving(Call):
    """A client that leaves after half of its body."""

    async def make(self, client: httpx.AsyncClient) -> str:
        """No status."""
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
    """All requests of the load, for a server that calls its model so."""
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
        """All answers."""
        return sum(count.total() for count in self.counts.values())


@asynccontextmanager
async def clients(url: str, load: list[Call], count: int, tally: Tally) -> AsyncIterator[None]:
    """Makes requests in ``count`` tasks, each with connections of its own, as long as it lasts."""
    over = asyncio.Event()
    weights = [call.weight for call in load]

    async def work(number: int) -> None:
        chance = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:
            while not over.is_set():
                (call,) = chance.choices(load, weights)
                tally.add(call, await call.make(client))

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(work(number))
        try:
            yield
        finally:
            over.set()


async def soak(url: str, process: psutil.Process, seconds: float, count: int) -> dict[str, Any]:
    """The measured part of the figures."""
    tally = Tally()
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:
        load = calls((await client.get("/model")).json()["name"])
        for call in load:
            await call.make(client)
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
        "descriptors": (began.descriptors, ended.descriptors),
        "threads": (began.threads, ended.threads),
    }


async def _settled(process: psutil.Process, before: State | None) -> State:
    """The state when the server has noticed that connections are closed, if it does."""
    for _ in range(100):
        state = State.of(process)
        if before is not None and state.descriptors <= before.descriptors:
            break
        await asyncio.sleep(0.05)
    return state


# -- figures ----------------------------------------------------------------------------------------


def read(path: Path = FIGURES) -> Figures:
    """The figures of an earlier soak.

    Raises:
        BenchmarkError: there are none, or the file is not one of ours.
    """
    return stored.read(Figures, path, "benchmarks.soak")


def markdown(figures: Figures) -> str:
    """The figures as a Markdown table, what else was measured, and where they are from."""
    statuses = sorted({status for counts in figures.counts.values() for status in counts})
    rows = [["request", *statuses]]
    for route, counts in sorted(figures.counts.items()):
        rows.append([f"`{route}`", *(f"{counts[s]:,}" if s in counts else "" for s in statuses)])
    packages = ", ".join(f"{name} {found}" for name, found in figures.packages.items())
    wrong = sum(sum(counts.values()) for counts in figures.unexpected.values())
    begin = WARM_UP * figures.seconds / 60
    first, *_, last = figures.memory
    text = (
        f"{figures.n:,} requests of {figures.clients} clients in {figures.seconds / 60:g} minutes, by "
        f"status; *{LEFT}* are those of clients that left while they sent. {wrong} had another status "
        f"than they should. The server's processes took {first:,.0f} MiB (RSS) at the begin, "
        f"{figures.warm[0]:,.0f} MiB after {begin:g} minutes and {last:,.0f} MiB at the end; a line "
        f"through the time after {begin:g} minutes rises by {figures.slope:.2f} MiB per minute. They "
        f"had {figures.descriptors[0]} file descriptors open before and "
        f"{figures.descriptors[1]} after, {figures.threads[0]} threads before and {figures.threads[1]} "
        f"after. {figures.device}; Python {figures.python}, {packages}; commit {figures.commit[:12]}, "
        f"{figures.date[:10]}."
    )
    return f"{markdown_table(rows)}\n\n{textwrap.fill(text, 120)}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 if an answer was not as it should be."""
    options = _parser().parse_args(arguments)
    try:
        figures = read(options.figures) if options.markdown else _run(options)
    except (BenchmarkError, httpx.HTTPError, OSError) as error:
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(markdown(figures))
    return 1 if figures.unexpected and not options.markdown else 0


def _run(options: argparse.Namespace) -> Figures:
    if options.seconds <= 0 or options.clients < 1:
        raise BenchmarkError("--clients has to be at least 1, and --seconds above 0")
    date, commit = provenance.now(), provenance.commit()  # of the server's code, at its start
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (url, process):
        measured = asyncio.run(soak(url, process, options.seconds, options.clients))
    figures = Figures(
        date=date,
        commit=commit,
        device=device.describe(device.choose()),
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        seconds=options.seconds,
        clients=options.clients,
        **measured,
    )
    stored.write(figures, options.figures)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Mixed load and bad input against a server of its own, while its memory, file "
        "descriptors and threads are watched.",
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--figures", type=Path, default=FIGURES, metavar="FILE", help="default: benchmarks/soak.json"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="measure nothing: print the table of the figures"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
