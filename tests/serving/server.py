"""A real `bentoml serve` process."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.server import LOG, is_ready
from benchmarks.server import running as started
from tests import ROOT
from tests.serving.models import write_slow_model

START_SECONDS = 180.0


@dataclass(frozen=True)
class Server:
    """A `bentoml serve` process: the supervisor of the workers."""

    url: str
    process: psutil.Popen
    log: Path

    def workers(self) -> set[int]:
        """The process ids of the workers."""
        found = set()
        for child in self.process.children(recursive=True):
            with suppress(psutil.Error):  # it may just have ended
                if "_bentoml_impl.worker.service" in child.cmdline():
                    found.add(child.pid)
        return found


@contextmanager
def serving(folder: Path, *arguments: str, cwd: Path = ROOT, **settings: str) -> Iterator[str]:
    """Run `bentoml serve` and yield its address once it is ready; stops it at the end."""
    with running(folder, *arguments, cwd=cwd, exit_code=0, until=is_ready, **settings) as server:
        yield server.url


def serving_slowly(folder: Path, **settings: str) -> AbstractContextManager[str]:
    """As `serving`, with a model so slow that requests wait for each other."""
    settings |= {"SERVING_MODEL": str(write_slow_model(folder))}
    settings |= {"SERVING_PROVIDER": "cpu", "SERVING_THREADS": "1"}
    return serving(folder, cwd=ROOT, **settings)


@contextmanager
def running(
    folder: Path,
    *arguments: str,
    cwd: Path = ROOT,
    exit_code: int = 0,
    until: Callable[[str], bool] = is_ready,
    **settings: str,
) -> Iterator[Server]:
    """Run `bentoml serve` and yield it once it is ready; stops it by SIGTERM if it has not ended."""
    command = ("-m", "bentoml", "serve", *arguments, "--host", "127.0.0.1", "--port", "{port}")
    settings |= {"PYTHONUNBUFFERED": "1"}
    with started("the service", command, settings, until, folder, cwd) as (url, process):
        server = Server(url, process, folder / LOG)
        yield server
    assert process.returncode == exit_code, server.log.read_text()


def wait_for_workers(server: Server, count: int, *, without: int | None = None) -> set[int]:
    """Wait until there are `count` workers, not counting `without`, and return them."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        workers = server.workers() - {without}
        if len(workers) == count:
            return workers
    raise AssertionError(f"{count} workers did not run: {server.log.read_text()}")


def wait_until(holds: Callable[[], bool], server: Server) -> None:
    """Wait until `holds()` is true; fails with the server's log if it does not become so in time."""
    deadline = time.monotonic() + START_SECONDS
    while not holds():
        assert time.monotonic() < deadline, server.log.read_text()
