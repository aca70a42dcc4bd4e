"""Requests per second, latency, memory and CPU time of the service, beside what people run otherwise.

A network (B1) with random weights, `POST /classify` with a PNG in a form, by number of connections.
Servers run one after the other on the same cores as their client: the service, and the programs of
`benchmarks.peers` as their documentation has them (the float32 file in plain ONNX Runtime) and with the
service's engine and its int8 file, which shows what is engine and what is server.

``python -m benchmarks.serving`` measures, writes ``benchmarks/serving.json`` and each load's raw figures
to ``benchmarks/results/serving.jsonl``; ``--markdown`` prints the README's tables from the former.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import track

from benchmarks import stored
from benchmarks.inference import built, packages
from benchmarks.load import requests
from benchmarks.peers import net
from benchmarks.stored import BenchmarkError
from serving.settings import PREFIX
from training import device, provenance
from training.__main__ import markdown_table
from training.files import replacing
from training.recipe import RecipeError

ROOT = Path(__file__).resolve().parent.parent
FIGURES = Path(__file__).with_suffix(".json")
RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
NETWORK = "B1"
CONNECTIONS = (1, 8, 32, 128)
BATCH = 64  # images of a request to /classify_batch
BATCH_CONNECTIONS = 2
BUSY = 32  # connections by which the service is compared with the best peers
SERVICE = "the service"
DOCUMENTED, OUR_ENGINE = "as documented", "with our engine"
INSTALL = "pip install -c constraints.txt -e '.[peers]'"
PACKAGES = ("bentoml", "fastapi", "litserve", "ray", "uvicorn", "onnxruntime-gpu", "onnxruntime")
START_SECONDS = 90.0
WARM_UP = 0.3  # of a load's seconds
CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Server:
    """A program to start on a port, with a model file in one of two engines."""

    name: str
    package: str
    command: tuple[str, ...]
    precision: str
    engine: str

    @property
    def label(self) -> str:
        """As the tables have it."""
        if self.name == SERVICE:
            return f"{self.name}, {self.precision}"
        how = DOCUMENTED if self.engine == "plain" else OUR_ENGINE
        return f"{self.name}, {how}, {self.precision}"


BENTOML = ("-m", "bentoml", "serve")
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


class Figures(BaseModel):
    """What ``serving.json`` holds; a round's figures are in lists.

    Attributes:
        servers: for each server's label, by number of connections.
        start_seconds: from a server's start to its first answer.
        batches: images per second of requests with ``BATCH`` images to the service, by precision.
        engine: images per second of the service's engine alone in batches of as many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: str
    commit: str
    device: str
    python: str
    packages: dict[str, str]
    network: str
    n: int
    seconds: float
    servers: dict[str, dict[int, list["Load"]]]
    start_seconds: dict[str, list[float]]
    batches: dict[str, list[float]]
    engine: dict[str, list[float]]
    skipped: dict[str, str]


class Load(BaseModel):
    """A load on a server.

    Attributes:
        rate: answers with status 200 per second.
        p50, p99: their milliseconds.
        errors: answers with another status, and requests without one.
        memory: MiB of the server's processes in RAM (RSS) at the end.
        cpu: seconds of processor time of the server's processes for each second.
        client_cpu: that of the client.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    """The server's address, its process, and the seconds until its first answer; stopped at the end.

    Raises:
        BenchmarkError: it ended, or did not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/classify"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        environment |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": f"{folder}/bentoml"}
        environment |= {net.MODEL: str(file), net.ENGINE: server.engine, "SERVING_MODEL": str(file)}
        arguments = [argument.format(port=port) for argument in server.command]
        began = time.perf_counter()
        process = psutil.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        try:
            _wait(server, process, url, log.name)
            yield url, process, time.perf_counter() - began
        finally:
            _stop(process)


def _wait(server: Server, process: psutil.Popen, url: str, log: str) -> None:
    body = requests(url, "image", 1)[0].split(b"\r\n\r\n", 1)
    headers = dict(line.split(": ", 1) for line in body[0].decode().split("\r\n")[1:])
    deadline = time.perf_counter() + START_SECONDS
    while time.perf_counter() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.post(url, content=body[1], headers=headers, timeout=30).status_code == 200:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    said = Path(log).read_text()[-1500:]
    raise BenchmarkError(f"{server.label} does not answer: {said}")


def _stop(process: psutil.Popen) -> None:
    """End a server with all that it started."""
    family = _family(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=15)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(alive, timeout=15)


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> float:
    total = 0
    for member in _family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total / 2**20


def _cpu_seconds(process: psutil.Process) -> float:
    total = 0.0
    for member in _family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system
    return total


def load(url: str, connections: int, seconds: float, *options: str) -> dict[str, Any]:
    """What the client, in a process of its own, found."""
    command = [sys.executable, "-m", "benchmarks.load", url, "--connections", str(connections)]
    done = subprocess.run(
        [*command, "--seconds", str(seconds), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _loaded(
    url: str, process: psutil.Process, connections: int, seconds: float, raw: dict[str, Any]
) -> Load:
    before = _cpu_seconds(process)
    began = time.perf_counter()
    found = load(url, connections, seconds)
    elapsed = time.perf_counter() - began
    raw |= found
    good = found["statuses"].get("200", 0)
    return Load(
        rate=good / seconds,
        p50=found["milliseconds"]["50"],
        p99=found["milliseconds"]["99"],
        errors=found["errors"] + found["answers"] - good,
        memory=_memory(process),
        cpu=(_cpu_seconds(process) - before) / elapsed,
        client_cpu=found["client_cpu_seconds"] / seconds,
    )


def _engine_alone(file: Path, seconds: float) -> float:
    """Images per second of the service's engine in batches of ``BATCH``, in a process of its own."""
    code = (
        "import sys, loky; from pathlib import Path; from serving.engine import Engine; "
        "from benchmarks.engines import measure; "
        "run = Engine(Path(sys.argv[1]), 'auto', loky.cpu_count()).run; "
        "print(measure(run, int(sys.argv[2]), float(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, str(file), str(BATCH), str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def compare(
    servers: Sequence[Server],
    connections: Sequence[int],
    seconds: float,
    rounds: int,
    network: str = NETWORK,
) -> tuple[Figures, list[dict[str, Any]]]:
    """Measure ``servers`` in ``rounds``; a server whose package is missing is left out and told.

    Raises:
        BenchmarkError: a server does not start.
    """
    skipped = {server.name: INSTALL for server in servers if find_spec(server.package) is None}
    chosen = [server for server in servers if server.name not in skipped]
    figures: dict[str, dict[int, list[Load]]] = {
        server.label: {count: [] for count in connections} for server in chosen
    }
    starts: dict[str, list[float]] = {server.label: [] for server in chosen}
    batches: dict[str, list[float]] = {}
    engine: dict[str, list[float]] = {}
    raw: list[dict[str, Any]] = []
    with built([network], ["int8"]) as (model,):
        for turn, server in enumerate(track([*chosen] * rounds, "measuring servers", console=CONSOLE)):
            file = model.files[server.precision]
            with running(server, file) as (url, process, started):
                starts[server.label].append(started)
                load(url, max(connections), WARM_UP * seconds)
                for count in connections:
                    line: dict[str, Any] = {"server": server.label, "round": turn // len(chosen)}
                    found = _loaded(url, process, count, seconds, line)
                    figures[server.label][count].append(found)
                    raw.append(line)
                if server.name == SERVICE:
                    options = ("--field", "images", "--images", str(BATCH))
                    line = {"server": f"{server.label}, /classify_batch", "round": turn // len(chosen)}
                    line |= load(f"{url}_batch", BATCH_CONNECTIONS, seconds, *options)
                    raw.append(line)
                    rate = BATCH * line["statuses"].get("200", 0) / seconds
                    batches.setdefault(server.precision, []).append(rate)
            if server.name == SERVICE:
                engine.setdefault(server.precision, []).append(_engine_alone(file, seconds))
    return (
        Figures(
            date=provenance.now(),
            commit=provenance.commit(),
            device=device.describe(device.choose()),
            python=platform.python_version(),
            packages=packages(PACKAGES),
            network=network,
            n=rounds,
            seconds=seconds,
            servers=figures,
            start_seconds=starts,
            batches=batches,
            engine=engine,
            skipped=skipped,
        ),
        raw,
    )


# -- figures ----------------------------------------------------------------------------------------


def read(path: Path = FIGURES) -> Figures:
    """The figures of an earlier benchmark.

    Raises:
        BenchmarkError: there are none, or the file is not one of ours.
    """
    return stored.read(Figures, path, "benchmarks.serving")


def write(figures: Figures, raw: Sequence[dict[str, Any]], path: Path, results: Path) -> None:
    """Write the figures and each load's raw ones beside their places and rename them there."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with replacing(results) as file:
        file.write("".join(f"{json.dumps(line)}\n" for line in raw).encode())
    stored.write(figures, path)


def markdown(figures: Figures) -> str:
    """The figures as a Markdown table, with what they say and where they are from."""
    counts = list(next(iter(figures.servers.values())))
    rows = [["server", *(f"{count} at once" for count in counts), "memory (MiB)", "start (s)"]]
    for label, loads in figures.servers.items():
        cells = []
        for found in loads.values():
            errors = sum(each.errors for each in found)
            cells.append(
                f"{_median(found, 'rate'):,.0f}/s, {_median(found, 'p50'):,.0f} and "
                f"{_median(found, 'p99'):,.0f} ms{f', {errors} errors' if errors else ''}"
            )
        memory = max(median(each.memory for each in found) for found in loads.values())
        start = median(figures.start_seconds[label])
        rows.append([label, *cells, f"{memory:,.0f}", f"{start:.1f}"])
    told = (
        f"`POST /classify` with the network of {figures.network}: requests per second, and the median "
        "and the 99th percentile of their time, by connections that each wait for their answer. Medians "
        f"of n={figures.n} loads of {figures.seconds:g} s; the client shares the cores. Memory (RSS) is "
        "of all the server's processes; the start is until the first answer."
    )
    batches = " ".join(
        f"`/classify_batch` with {BATCH} images gives {median(rates):,.0f} images/s ({precision}), "
        f"{100 * median(rates) / median(figures.engine[precision]):.0f} % of the engine's own "
        f"{median(figures.engine[precision]):,.0f}."
        for precision, rates in figures.batches.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in figures.packages.items())
    missing = "".join(f" {name} was not there." for name in figures.skipped)
    place = (
        f"{figures.device}; Python {figures.python}, {versions}; commit {figures.commit[:12]}, "
        f"{figures.date[:10]}."
    )
    parts = (told, _multiples(figures), batches, place)
    text = textwrap.fill(" ".join(part for part in parts if part) + missing, 120)
    return f"{markdown_table(rows)}\n\n{text}"


def _multiples(figures: Figures) -> str:
    """What the service's requests per second are multiples of, where they were measured at ``BUSY``."""
    rates = {
        label: _median(loads[BUSY], "rate") for label, loads in figures.servers.items() if BUSY in loads
    }
    ours = max((rate for label, rate in rates.items() if label.startswith(SERVICE)), default=None)
    parts = []
    for how, told in ((DOCUMENTED, "peer as documented"), (OUR_ENGINE, "with our engine")):
        peers = {label: rate for label, rate in rates.items() if how in label}
        if ours is not None and peers:
            best = max(peers, key=peers.__getitem__)
            times, name = ours / peers[best], best.partition(how)[0].rstrip(", ")
            parts.append(f"{times:.1f} times as many as the best {told} ({name})")
    return f"With {BUSY} connections the service answers {' and '.join(parts)}." if parts else ""


def _median(loads: Sequence[Load], field: str) -> float:
    return float(median(getattr(load, field) for load in loads))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        figures = read(options.figures) if options.markdown else _run(options)
    except (BenchmarkError, RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown(figures))
    return 0


def _run(options: argparse.Namespace) -> Figures:
    if options.rounds < 1 or options.seconds <= 0 or min(options.connections) < 1:
        raise BenchmarkError("--rounds and --connections have to be at least 1, and --seconds above 0")
    servers = [server for server in SERVERS if options.servers is None or server.name in options.servers]
    figures, raw = compare(
        servers, options.connections, options.seconds, options.rounds, options.network
    )
    for name, command in figures.skipped.items():
        print(f"{name} is left out, as it is not installed: {command}", file=sys.stderr)
    write(figures, raw, options.figures, options.results)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Requests per second and latency of the service beside other servers.",
    )
    names = list(dict.fromkeys(server.name for server in SERVERS))
    parser.add_argument("--servers", nargs="+", choices=names, help="default: all")
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--network", default=NETWORK, metavar="RECIPE", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a load (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument(
        "--markdown", action="store_true", help="measure nothing: print the table of the figures"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
