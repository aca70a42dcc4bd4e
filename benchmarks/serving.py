"""Requests per second, latency, memory and CPU time of the service, beside other ways to serve a model.

The load is `POST /classify` with a PNG in a form, by number of connections; the network (by default B1)
has random weights. Servers run one after the other, on the same cores as their client: the service, and
the programs of `benchmarks.peers` both as their documentation has them (the float32 file in plain ONNX
Runtime) and with the service's engine and int8 file, which tells engine and server apart.

``python -m benchmarks.serving`` measures, writes ``benchmarks/serving.json`` and each load's raw figures
to ``results/serving.jsonl`` beside it; ``--markdown`` prints the former as a table. The committed file
is of ``--seconds 4 --rounds 3``, ``serving-a1.json`` of ``--network A1 --seconds 4``, as A1's engine
takes so little time that it shows the servers themselves, and ``serving-avx2.json`` of
``--servers 'the service' FastAPI LitServe --seconds 8``.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import httpx
import psutil
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import track

from benchmarks import stored
from benchmarks.engines import Variant
from benchmarks.inference import apart, built
from benchmarks.load import png
from benchmarks.peers.model import ENGINE, MODEL
from benchmarks.program import output
from benchmarks.server import ServerError, family, memory
from benchmarks.server import running as started
from benchmarks.stored import BenchmarkError
from training import data
from training.files import replacing
from training.tables import markdown_table

NETWORK = "B1"
CONNECTIONS = (1, 8, 32, 128)
BATCH = 64  # images of a request to /classify_batch
BATCH_CONNECTIONS = 2
BUSY = 32  # connections at which the service is compared with the best peers
SERVICE = "the service"
DOCUMENTED, OUR_ENGINE = "as documented", "with our engine"
INSTALL = "pip install -c constraints.txt -e '.[peers]'"
PACKAGES = (
    *("bentoml", "fastapi", "litserve", "ray", "uvicorn"),
    *("onnxruntime-gpu", "onnxruntime", "openvino"),
)
WARM_UP = 0.3  # fraction of a load's seconds
CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Server:
    """A program that listens on a port, and the precision and engine with which it runs the model."""

    name: str
    package: str
    command: tuple[str, ...]
    precision: str
    engine: str

    @property
    def label(self) -> str:
        """The server's name in the tables."""
        if self.name == SERVICE:
            return f"{self.name}, {self.precision}"
        how = DOCUMENTED if self.engine == "plain" else OUR_ENGINE
        return f"{self.name}, {how}, {self.precision}"


BENTOML = ("-m", "bentoml", "serve", "--host", "127.0.0.1")
PEERS = {
    "FastAPI": ("fastapi", ("-m", "benchmarks.peers.fastapi_app", "{port}")),
    "LitServe": ("litserve", ("-m", "benchmarks.peers.litserve_app", "{port}")),
    "BentoML": (
        "bentoml",
        (*BENTOML, "benchmarks.peers.bentoml_image:Classifier", "--port", "{port}"),
    ),
    "BentoML, batchable": (
        "bentoml",
        (*BENTOML, "benchmarks.peers.bentoml_batchable:Classifier", "--port", "{port}"),
    ),
    "Ray Serve": ("ray", ("-m", "benchmarks.peers.ray_app", "{port}")),
}
SERVERS = [
    *(Server(SERVICE, "bentoml", (*BENTOML, "--port", "{port}"), each, "") for each in ("int8", "fp32")),
    *(Server(name, *peer, "fp32", "plain") for name, peer in PEERS.items()),
    *(Server(name, *peer, "int8", "service") for name, peer in PEERS.items()),
]


class Figures(stored.Figures):
    """The contents of ``serving.json``; the lists have one element per round.

    Attributes:
        servers: the loads, by the server's label and the number of connections.
        start_seconds: from a server's start to its first answer, by its label.
        batches: images per second of requests with ``BATCH`` images to the service, by precision.
        engine: images per second of the service's engine alone in such batches, by precision.
        skipped: why servers were left out, by their name or label.
    """

    benchmark: ClassVar[str] = "serving"

    network: str
    n: int
    seconds: float
    servers: dict[str, dict[int, list["Load"]]]
    start_seconds: dict[str, list[float]]
    batches: dict[str, list[float]]
    engine: dict[str, list[float]]
    skipped: dict[str, str]


class Load(BaseModel):
    """The figures of a load on a server.

    Attributes:
        rate: answers with status 200 per second, of those that came in time.
        p50, p99: the median and the 99th percentile of their milliseconds, and of later ones'.
        errors: the number of answers with another status and of requests without an answer.
        memory: the memory (RSS, in MiB) of the server's processes at the end.
        cpu: the processor time of the server's processes, in seconds per second.
        client_cpu: the same of the client.
    """

    # Without an answer of status 200 the percentiles are NaN, in the file too.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    rate: float
    p50: float
    p99: float
    errors: int
    memory: float
    cpu: float
    client_cpu: float


# -- measuring --------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(server: Server, file: Path) -> Iterator[tuple[str, psutil.Process, float]]:
    """Start a server; yields the address that classifies, its process, and seconds to the first answer.

    Raises:
        ServerError: the server ended, or did not answer in time.
    """
    image = ("image.png", png(data.load_sample().test.pixels[0].numpy()), "image/png")

    def answers(url: str) -> bool:
        found = httpx.post(f"{url}/classify", files={"image": image}, timeout=30)
        return found.status_code == 200

    settings = {MODEL: str(file), ENGINE: server.engine, "SERVING_MODEL": str(file)}
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        started(server.label, server.command, settings, answers, Path(folder)) as (url, process),
    ):
        yield f"{url}/classify", process, time.perf_counter() - began


def _cpu_seconds(process: psutil.Process) -> float:
    total = 0.0
    for member in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system
    return total


def load(url: str, connections: int, seconds: float, *options: str) -> dict[str, Any]:
    """Run the client in a process of its own and return what it found."""
    command = ("-m", "benchmarks.load", url, "--connections", str(connections))
    printed = output(f"the client of {url}", *command, "--seconds", str(seconds), *options)
    found: dict[str, Any] = json.loads(printed)
    return found


def _loaded(
    url: str, process: psutil.Process, connections: int, seconds: float, raw: dict[str, Any]
) -> Load:
    before = _cpu_seconds(process)
    found = load(url, connections, seconds)
    raw |= found
    good = found["statuses"].get("200", 0)
    return Load(
        rate=found["in_time"] / seconds,
        p50=found["milliseconds"]["50"],
        p99=found["milliseconds"]["99"],
        errors=found["errors"] + found["answers"] - good,
        memory=sum(memory(process)),
        cpu=(_cpu_seconds(process) - before) / found["wall_seconds"],
        client_cpu=found["client_cpu_seconds"] / found["wall_seconds"],
    )


def _engine_alone(file: Path, seconds: float) -> float:
    """Images per second of the service's engine in batches of ``BATCH``, in a process of its own."""
    variant = Variant(file, "", "none")
    found = apart("service:auto", variant, "--batch-sizes", str(BATCH), "--seconds", str(seconds))
    return float(found["rates"][str(BATCH)])


@dataclass
class Measured:
    """The figures of the rounds so far; see ``Figures``. ``raw`` has a line for each load."""

    servers: dict[str, dict[int, list[Load]]]
    start_seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    batches: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    engine: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    raw: list[dict[str, Any]] = field(default_factory=list)

    def leave_out(self, label: str) -> None:
        """Drop a server's figures."""
        del self.servers[label]
        self.start_seconds.pop(label, None)
        self.raw = [line for line in self.raw if line["server"] != label]


def measure(server: Server, file: Path, number: int, seconds: float, measured: Measured) -> None:
    """Measure a server with a model file for one round; the raw lines get the round's ``number``.

    Raises:
        ServerError: the server does not start.
        BenchmarkError: the client fails.
    """
    place: dict[str, Any] = {"server": server.label, "round": number}
    with running(server, file) as (url, process, began):
        measured.start_seconds[server.label].append(began)
        load(url, max(measured.servers[server.label]), WARM_UP * seconds)
        for count, loads in measured.servers[server.label].items():
            line = {**place}
            loads.append(_loaded(url, process, count, seconds, line))
            measured.raw.append(line)
        if server.name == SERVICE:
            options = ("--field", "images", "--images", str(BATCH))
            found = load(f"{url}_batch", BATCH_CONNECTIONS, seconds, *options)
            measured.raw.append({**place, "server": f"{server.label}, /classify_batch", **found})
            measured.batches[server.precision].append(BATCH * found["in_time"] / seconds)
    if server.name == SERVICE:
        measured.engine[server.precision].append(_engine_alone(file, seconds))


# -- figures ----------------------------------------------------------------------------------------


def markdown(figures: Figures) -> str:
    """The figures as a Markdown table, with a note on what they show and where they were measured."""
    counts = list(next(iter(figures.servers.values())))
    rows = [["server", *(f"{count} at once" for count in counts), "memory (MiB)", "start (s)"]]
    for label, loads in figures.servers.items():
        cells = []
        for found in loads.values():
            errors = sum(each.errors for each in found)
            cells.append(
                f"{median(each.rate for each in found):,.0f}/s, "
                f"{_milliseconds(median(each.p50 for each in found))} and "
                f"{_milliseconds(median(each.p99 for each in found))} ms"
                f"{f', {errors:,} errors' if errors else ''}"
            )
        memory = max(median(each.memory for each in found) for found in loads.values())
        start = median(figures.start_seconds[label])
        rows.append([label, *cells, f"{memory:,.0f}", f"{start:.1f}"])
    told = (
        f"`POST /classify` with the network of {figures.network}: requests per second, and the median "
        "and the 99th percentile of their time, by number of connections, each of which waits for its "
        f"answer before the next request. Medians of n={figures.n} loads of {figures.seconds:g} s, and "
        "the errors of all; the client shares the cores. Memory (RSS) is of all the server's processes; "
        "start is the time to the first answer."
    )
    batches = " ".join(
        f"`/classify_batch` with {BATCH} images gives {median(rates):,.0f} images/s ({precision}), "
        f"{100 * median(rates) / median(figures.engine[precision]):.0f} % of the engine's own "
        f"{median(figures.engine[precision]):,.0f}."
        for precision, rates in figures.batches.items()
    )
    missing = "".join(f" {name} was left out: {reason}." for name, reason in figures.skipped.items())
    parts = (told, _multiples(figures), batches, figures.place)
    text = textwrap.fill(" ".join(part for part in parts if part) + missing, 120)
    return f"{markdown_table(rows)}\n\n{text}"


def _multiples(figures: Figures) -> str:
    """A sentence that compares the service with the best peers at ``BUSY`` connections, if measured."""
    rates = {
        label: median(each.rate for each in loads[BUSY])
        for label, loads in figures.servers.items()
        if BUSY in loads
    }
    ours = {
        precision: rates[label]
        for precision in ("int8", "fp32")
        if (label := f"{SERVICE}, {precision}") in rates
    }
    parts = []
    for how, told in ((DOCUMENTED, "set up as documented"), (OUR_ENGINE, "with our engine")):
        peers = {label: rate for label, rate in rates.items() if how in label}
        if peers:
            best = max(peers, key=peers.__getitem__)
            name, _, precision = best.partition(f", {how}, ")
            times = " and ".join(
                f"{rate / peers[best]:.1f} ({own})"
                for own, rate in ours.items()
                if own == precision or how == DOCUMENTED  # with our engine, compare the same file
            )
            if times:
                best_peer = f"the best peer {told} ({name}, {precision})"
                parts.append(f"{times} times as many requests as {best_peer}")
    told = "; ".join(parts)
    return f"With {BUSY} connections the service answers {told}." if parts else ""


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return stored.main(Figures, _parser(), _measure, markdown, arguments)


def _measure(options: argparse.Namespace) -> Iterator[Figures]:
    """Yield the figures so far after each round, without peers that are absent or do not start."""
    if options.rounds < 1 or min(options.connections) < 1:
        raise BenchmarkError("--rounds and --connections have to be at least 1")
    begun = stored.begin(PACKAGES)
    servers = [server for server in SERVERS if options.servers is None or server.name in options.servers]
    absent = [server for server in servers if find_spec(server.package) is None]
    skipped = {server.name: "it is not installed" for server in absent}
    for name, reason in skipped.items():
        print(f"{name} is left out: {reason}: {INSTALL}", file=sys.stderr)
    chosen = [server for server in servers if server not in absent]
    if not chosen:
        raise BenchmarkError("none of the servers is installed")
    raw = options.figures.parent / "results" / f"{options.figures.stem}.jsonl"
    measured = Measured(
        {server.label: {count: [] for count in options.connections} for server in chosen}
    )
    with built([options.network], ["int8"]) as (model,):
        for number in range(options.rounds):
            for server in track(chosen, f"round {number + 1}", console=CONSOLE):
                try:
                    measure(server, model.files[server.precision], number, options.seconds, measured)
                except ServerError as error:
                    if server.name == SERVICE:
                        raise
                    print(f"{server.label} is left out: {error}", file=sys.stderr)
                    skipped[server.label] = "it did not start"
                    measured.leave_out(server.label)
            chosen = [server for server in chosen if server.label not in skipped]
            yield Figures(
                **begun,
                network=options.network,
                n=number + 1,
                seconds=options.seconds,
                servers=measured.servers,
                start_seconds=measured.start_seconds,
                batches=measured.batches,
                engine=measured.engine,
                skipped=skipped,
            )
    raw.parent.mkdir(exist_ok=True)
    with replacing(raw) as file:
        file.writelines(f"{json.dumps(line)}\n".encode() for line in measured.raw)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Requests per second and latency of the service beside other servers.",
    )
    names = list(dict.fromkeys(server.name for server in SERVERS))
    parser.add_argument("--servers", nargs="+", choices=names, help="default: all")
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--network", default=NETWORK, metavar="RECIPE", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=stored.seconds, default=10.0, help="of a load (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
