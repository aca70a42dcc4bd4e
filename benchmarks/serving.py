"""Requests per second and latency of the service, beside other servers with the same model file.

One after the other on the same two cores, each a process that answers HTTP over sockets: the service, and
FastAPI, LitServe, BentoML and Ray Serve as their documentation has them (``benchmarks/peers``). Each peer
runs twice, with plain ONNX Runtime as documented and with the service's engine on the service's provider,
which tells apart what is the engine's gain and what the server's. wrk posts the same PNG images to all, as
forms, from a process of its own. The network is B1 with random weights; answers cost what a trained one's do.

``python -m benchmarks.serving`` measures, writes ``benchmarks/serving.json``, and wrk's own words into
``benchmarks/results``; ``--markdown`` prints the tables that the README has from that file.
"""

import argparse
import importlib.util
import io
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from benchmarks import load
from benchmarks.inference import BenchmarkError, Model, _apart, _version, built
from benchmarks.load import Form, Load
from serving.providers import FULL_NAMES
from serving.settings import PREFIX
from training import data, device, provenance
from training.__main__ import markdown_table
from training.files import replacing

FIGURES = Path(__file__).with_suffix(".json")
RESULTS = Path(__file__).parent / "results" / "serving"
ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = (1, 8, 32, 128)
IMAGES = 256  # different ones that are posted in turns
BATCH = 64  # images of a /classify_batch
BATCH_CONNECTIONS = 2  # so that one is read while the engine has the other
CORES = 2
MODEL = "B1"
PACKAGES = (
    *("bentoml", "fastapi", "litserve", "ray", "starlette", "uvicorn", "uvloop", "httptools"),
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino"),
)
START_SECONDS = 120.0
STOP_SECONDS = 20.0
WARM_UP = 1.0  # seconds of load before the first measurement

CONSOLE = Console(stderr=True)
SERVICE = "service"
PLAIN = "onnxruntime"


@dataclass(frozen=True)
class Program:
    """A server: its name for people, the packages it needs, its command, and its form's field."""

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    field: str = "image"


def _bento(target: str) -> tuple[str, ...]:
    return ("bentoml", "serve", *target.split(), "--host", "127.0.0.1", "--port", "{port}")


PROGRAMS = {
    SERVICE: Program("this service", ("bentoml",), _bento("")),
    "fastapi": Program("FastAPI", ("fastapi",), ("benchmarks.peers.fastapi",)),
    "litserve": Program("LitServe", ("litserve",), ("benchmarks.peers.litserve",)),
    "bento": Program("BentoML", ("bentoml",), _bento("benchmarks.peers.bento:Single")),
    "bento-batched": Program(
        "BentoML, `batchable`", ("bentoml",), _bento("benchmarks.peers.bento:Batched"), "images"
    ),
    "ray": Program("Ray Serve", ("ray", "fastapi"), ("benchmarks.peers.ray",)),
}


class Server(BaseModel):
    """A server with an engine and a precision: a number, or a load of each of ``CONNECTIONS``, a round.

    ``ready`` is seconds from the process's start to the first answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    program: str
    engine: str
    precision: str
    ready: list[float]
    loads: dict[int, list[Load]]

    def middle(self, connections: int, figure: str) -> float:
        """The median of a figure of the loads by so many connections."""
        return median(getattr(found, figure) for found in self.loads[connections])


class Batches(BaseModel):
    """Images per second through /classify_batch, and of its engine alone, a number a round."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str
    precision: str
    images: int
    rate: list[float]
    engine_alone: list[float]


class Figures(BaseModel):
    """What ``serving.json`` holds; ``n`` rounds, each of ``seconds`` a number of connections."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: str
    commit: str
    device: str
    python: str
    packages: dict[str, str]
    model: str
    n: int
    seconds: float
    servers: list[Server]
    batches: list[Batches]


# -- servers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A server that answers; ``ready`` is how many seconds that took."""

    url: str
    process: psutil.Process
    ready: float

    def processes(self) -> list[psutil.Process]:
        """The server's process and those it started."""
        return [self.process, *self.process.children(recursive=True)]

    def cpu(self) -> float:
        """Seconds of processors that its processes have had."""
        times = [process.cpu_times() for process in self.processes()]
        return sum(each.user + each.system for each in times)

    def memory(self) -> list[float]:
        """MiB in RAM of each of its processes."""
        return [process.memory_info().rss / 2**20 for process in self.processes()]


@contextmanager
def running(program: Program, file: Path, engine: str, first: Form) -> Iterator[Running]:
    """A server, from its process's start over its first answer to its end.

    Raises:
        BenchmarkError: it ended, or gave no answer in time; the message has the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        log = Path(folder) / "log"
        command = [part.format(port=port) for part in program.command]
        with log.open("wb") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=_environment(folder, file, engine, port),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        url = f"http://127.0.0.1:{port}"
        tree = psutil.Process(process.pid)
        try:
            while not _answers(f"{url}/classify", first):
                if process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                    end = log.read_text(errors="replace").strip()[-1000:]
                    raise BenchmarkError(f"{program.name} does not answer: {end}")
                time.sleep(0.02)
            yield Running(url, tree, time.perf_counter() - began)
        finally:
            _end(process, tree)


def _environment(folder: str, file: Path, engine: str, port: int) -> dict[str, str]:
    """Ours without settings, and what any of the servers reads."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return ours | {
        "SERVING_MODEL": str(file),
        "PEER_MODEL": str(file),
        "PEER_ENGINE": engine,
        "PEER_PORT": str(port),
        "PYTHONPATH": str(ROOT),  # Ray's workers start elsewhere
        "BENTOML_HOME": f"{folder}/bentoml",
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _answers(url: str, form: Form) -> bool:
    headers = {"Content-Type": form.content_type}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, form.content, headers)):
            return True
    except urllib.error.HTTPError as error:
        if error.code in (404, 500, 502, 503):  # it listens already and is not ready
            return False
        raise BenchmarkError(f"{url} answers {error.code}: {error.read()[:500]!r}") from error
    except OSError:
        return False


def _end(process: "subprocess.Popen[bytes]", tree: psutil.Process) -> None:
    """By SIGTERM; whatever of its processes is left after that, by SIGKILL."""
    children = tree.children(recursive=True) if tree.is_running() else []
    process.terminate()
    _, left = psutil.wait_procs([tree, *children], timeout=STOP_SECONDS)
    for each in left:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


# -- measuring --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forms:
    """Files with forms that wrk posts, by the field that a server reads and the images in each."""

    folder: Path
    images: list[bytes]
    boundary: str

    def write(self, field: str, size: int) -> list[Path]:
        """One file for each ``size`` images."""
        paths = []
        for start in range(0, len(self.images), size):
            path = self.folder / f"{field}-{size}-{start}"
            path.write_bytes(self.form(field, start, size).content)
            paths.append(path)
        return paths

    def form(self, field: str, start: int, size: int) -> Form:
        """The form with ``size`` images from ``start``."""
        return load.form(field, self.images[start : start + size], self.boundary)


def png_images(count: int) -> list[bytes]:
    """The first test images of the bundled sample, as PNG files."""
    files = []
    for pixels in data.load_sample().test.pixels.numpy()[:count]:
        file = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(file, "PNG")
        files.append(file.getvalue())
    return files


class Benchmark:
    """Measures servers, and keeps what it found."""

    def __init__(self, forms: Forms, seconds: float, connections: Sequence[int], results: Path) -> None:
        self.forms, self.seconds, self.connections = forms, seconds, connections
        self.results = results
        self.servers: dict[tuple[str, str, str], Server] = {}
        self.batches: dict[str, Batches] = {}

    def round(self, model: Model, programs: Sequence[str]) -> None:
        """All servers with all precisions of a model, one after the other."""
        for precision, file in model.files.items():
            provider = self._service(file, precision)
            for name in programs:
                for engine in (PLAIN, provider):
                    self._peer(name, file, engine, precision)
            given = ["--batch-sizes", str(BATCH), "--seconds", str(self.seconds)]
            found = _apart(f"{SERVICE}:{provider}", file, model.recipe, *given)
            self.batches[precision].engine_alone.append(found["rates"][str(BATCH)])

    def _service(self, file: Path, precision: str) -> str:
        """Measure the service as it comes; returns the provider that it took."""
        program = PROGRAMS[SERVICE]
        with running(program, file, "", self.forms.form(program.field, 0, 1)) as server:
            with urllib.request.urlopen(f"{server.url}/model") as answer:
                full = json.load(answer)["provider"]
            provider = next(name for name, its in FULL_NAMES.items() if its == full)
            self._loads(server, SERVICE, provider, precision)
            begun = Batches(engine=provider, precision=precision, images=BATCH, rate=[], engine_alone=[])
            forms = self.forms.write("images", BATCH)
            said = self._wrk(f"{server.url}/classify_batch", forms, BATCH_CONNECTIONS)
            self._keep(f"{precision}-{SERVICE}-batches", said.text)
            if said.errors:
                raise BenchmarkError(f"/classify_batch failed {said.errors} times: {said.text}")
            rate = said.requests * BATCH / said.seconds
            self.batches.setdefault(precision, begun).rate.append(rate)
        return provider

    def _peer(self, name: str, file: Path, engine: str, precision: str) -> None:
        program = PROGRAMS[name]
        with running(program, file, engine, self.forms.form(program.field, 0, 1)) as server:
            self._loads(server, name, engine, precision)

    def _loads(self, server: Running, name: str, engine: str, precision: str) -> None:
        forms = self.forms.write(PROGRAMS[name].field, 1)
        url = f"{server.url}/classify"
        begun = Server(
            program=name,
            engine=engine,
            precision=precision,
            ready=[],
            loads={connections: [] for connections in self.connections},
        )
        kept = self.servers.setdefault((name, engine, precision), begun)
        kept.ready.append(server.ready)
        load.wrk(url, forms, self.forms.boundary, CORES, WARM_UP)
        for connections in self.connections:
            cpu = server.cpu()
            said = self._wrk(url, forms, connections)
            cpu, memory = server.cpu() - cpu, server.memory()
            self._keep(f"{precision}-{name}-{engine}", said.text)
            kept.loads[connections].append(
                Load(
                    connections=connections,
                    rate=said.requests / said.seconds,
                    p50=said.p50,
                    p99=said.p99,
                    errors=said.errors,
                    server_cpu=cpu / said.seconds,
                    client_cpu=said.cpu / said.seconds,
                    memory=sum(memory),
                    worker_memory=max(memory),
                )
            )
        rates = ", ".join(f"{connections}: {each[-1].rate:,.0f}" for connections, each in kept.loads.items())
        CONSOLE.print(f"{precision} {name} {engine}: ready in {server.ready:.1f} s; requests/s by {rates}")

    def _wrk(self, url: str, forms: Sequence[Path], connections: int) -> load.Answered:
        return load.wrk(url, forms, self.forms.boundary, connections, self.seconds)

    def _keep(self, name: str, text: str) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        with (self.results / f"{name}.txt").open("a") as file:
            file.write(f"{text.replace(str(self.forms.folder), '')}\n")


# -- figures ----------------------------------------------------------------------------------------


def read(path: Path = FIGURES) -> Figures:
    """The figures of an earlier benchmark.

    Raises:
        BenchmarkError: there are none, or the file is not one of ours.
    """
    try:
        return Figures.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise BenchmarkError(f"no figures at {path}: run python -m benchmarks.serving") from error
    except ValidationError as error:
        raise BenchmarkError(f"{path} does not hold the figures of this benchmark: {error}") from error


def write(figures: Figures, path: Path = FIGURES) -> None:
    """Write the figures beside ``path`` and rename them there."""
    with replacing(path) as file:
        file.write(f"{figures.model_dump_json(indent=2)}\n".encode())


def markdown(figures: Figures) -> str:
    """The figures as Markdown tables, each with what it says, and where they are from."""
    connections = list(figures.servers[0].loads)
    busy = connections[len(connections) // 2]
    client = max(each.client_cpu for server in figures.servers for each in _all(server))
    packages = ", ".join(f"{name} {found}" for name, found in figures.packages.items())
    of_servers = (
        "By connections: requests per second, and in brackets the latency's p50 and p99 in ms; errors of all "
        f"loads; processor time a request at {busy} connections; the most memory (RSS) of all the server's "
        "processes and of the largest; seconds from the process's start to the first answer."
    )
    of_ratios = (
        "*As documented* is the best of the peers with plain ONNX Runtime, *our engine* the best of the peers "
        "with the service's engine on the same provider, by requests per second; p50 is beside the lowest of "
        "all peers'."
    )
    of_batches = (
        f"`/classify_batch` with {BATCH} images, from {BATCH_CONNECTIONS} connections, in images per second, "
        f"beside the engine alone in batches of {BATCH}. All tables: net {figures.model} with random weights, "
        f"{IMAGES} PNG images of CIFAR-10 in turns, posted as forms by wrk, which had at most "
        f"{100 * client:.0f} % of one core; medians of n={figures.n} measurements of {figures.seconds:g} s. "
        f"{figures.device}; Python {figures.python}, {packages}; commit {figures.commit[:12]}, "
        f"{figures.date[:10]}."
    )
    tables = (
        *(_servers_table(figures, connections, busy), of_servers),
        *(_ratios_table(figures, connections), of_ratios),
        *(_batches_table(figures), of_batches),
    )
    return "\n\n".join(part if part.startswith("|") else textwrap.fill(part, 120) for part in tables)


def _all(server: Server) -> list[Load]:
    return [found for each in server.loads.values() for found in each]


def _engine(server: Server) -> str:
    return "plain" if server.engine == PLAIN else f"ours, {server.engine}"


def _servers_table(figures: Figures, connections: Sequence[int], busy: int) -> str:
    head = ["precision", "server", "engine", *map(str, connections)]
    rows = [[*head, "errors", "CPU (ms)", "memory (MiB)", "ready (s)"]]
    for server in figures.servers:
        cells = [
            f"{server.middle(count, 'rate'):,.0f} "
            f"({server.middle(count, 'p50'):,.1f}, {server.middle(count, 'p99'):,.1f})"
            for count in connections
        ]
        cpu = 1000 * server.middle(busy, "server_cpu") / server.middle(busy, "rate")
        together, largest = (
            max(getattr(found, figure) for found in _all(server)) for figure in ("memory", "worker_memory")
        )
        errors = sum(found.errors for found in _all(server))
        rows.append(
            [
                *(server.precision, PROGRAMS[server.program].name, _engine(server), *cells),
                *(f"{errors}", f"{cpu:.1f}", f"{together:,.0f}, {largest:,.0f}"),
                f"{median(server.ready):.1f}",
            ]
        )
    return markdown_table(rows)


def _ratios_table(figures: Figures, connections: Sequence[int]) -> str:
    rows = [
        [
            *("precision", "connections", "this service", "as documented", "ratio", "our engine", "ratio"),
            *("p50", "peers' p50", "p99 / p50"),
        ]
    ]
    for service in (server for server in figures.servers if server.program == SERVICE):
        peers = [
            server
            for server in figures.servers
            if server.program != SERVICE and server.precision == service.precision
        ]
        for count in connections:
            rate, p50 = service.middle(count, "rate"), service.middle(count, "p50")
            cells = [service.precision, str(count), f"{rate:,.0f}"]
            for documented in (True, False):
                rates = [
                    (peer.middle(count, "rate"), PROGRAMS[peer.program].name)
                    for peer in peers
                    if (peer.engine == PLAIN) is documented
                ]
                best, name = max(rates, default=(0.0, ""))
                cells += [f"{best:,.0f} ({name})", f"{rate / best:.2f}"] if best else ["", ""]
            lowest = min((peer.middle(count, "p50") for peer in peers), default=None)
            cells += [f"{p50:,.1f}", "" if lowest is None else f"{lowest:,.1f}"]
            rows.append([*cells, f"{service.middle(count, 'p99') / p50:.1f}"])
    return markdown_table(rows)


def _batches_table(figures: Figures) -> str:
    rows = [["precision", "engine", "/classify_batch", "engine alone", "share"]]
    for batches in figures.batches:
        rate, alone = median(batches.rate), median(batches.engine_alone)
        share = f"{100 * rate / alone:.0f} %"
        rows.append([batches.precision, batches.engine, f"{rate:,.0f}", f"{alone:,.0f}", share])
    return markdown_table(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        figures = read(options.figures) if options.markdown else _run(options)
    except (BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown(figures))
    return 0


def _run(options: argparse.Namespace) -> Figures:
    if options.rounds < 1 or options.seconds < 1:
        raise BenchmarkError("--rounds and --seconds have to be at least 1")
    if not load.available():
        raise BenchmarkError(load.INSTALL)
    programs = [name for name in options.peers if _installed(name)]
    if hasattr(os, "sched_setaffinity"):  # for this process and all that it starts
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    for old in options.results.glob("*.txt"):
        old.unlink()
    with built([options.model], options.precisions) as (model,), tempfile.TemporaryDirectory() as folder:
        forms = Forms(Path(folder), png_images(IMAGES), load.boundary())
        benchmark = Benchmark(forms, options.seconds, options.connections, options.results)
        for _ in range(options.rounds):
            benchmark.round(model, programs)
    figures = Figures(
        date=provenance.now(),
        commit=provenance.commit(),
        device=device.describe(device.choose()),
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        model=options.model,
        n=options.rounds,
        seconds=options.seconds,
        servers=list(benchmark.servers.values()),
        batches=list(benchmark.batches.values()),
    )
    write(figures, options.figures)
    return figures


def _installed(name: str) -> bool:
    missing = [package for package in PROGRAMS[name].packages if not importlib.util.find_spec(package)]
    if missing:
        CONSOLE.print(
            f"{PROGRAMS[name].name} is left out, for there is no {', '.join(missing)}: "
            "pip install -c constraints.txt -e '.\\[peers]'"
        )
    return not missing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Requests per second and latency of the service, beside other servers.",
    )
    peers = [name for name in PROGRAMS if name != SERVICE]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, help="default: all")
    parser.add_argument(
        "--model", default=MODEL, help="a recipe, with random weights, or a model file (default: %(default)s)"
    )
    parser.add_argument(
        "--precisions", nargs="*", choices=["int8"], default=["int8"], help="beside fp32 (default: int8)"
    )
    parser.add_argument("--connections", nargs="+", type=int, default=CONNECTIONS, metavar="N")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of each load (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--figures", type=Path, default=FIGURES, metavar="FILE", help="default: benchmarks/serving.json"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="for what wrk says (default: benchmarks/results/serving)",
    )
    parser.add_argument(
        "--markdown", action="store_true", help="measure nothing: print the tables of the figures"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
