"""A real `bentoml serve` process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0


def service_environment(folder: Path, **settings: str) -> dict[str, str]:
    """This process's environment, with no settings but `settings` and nothing sent home."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SERVING_")}
    return (
        environment
        | settings
        | {
            "BENTOML_HOME": str(folder / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "PYTHONUNBUFFERED": "1",
        }
    )


@dataclass(frozen=True)
class Server:
    """A `bentoml serve` process: the supervisor of the workers."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def workers(self) -> set[int]:
        """The process ids of the workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = set()
        for child in children:
            with suppress(psutil.Error):  # it may just have ended
                if "_bentoml_impl.worker.service" in child.cmdline():
                    found.add(child.pid)
        return found


@contextmanager
def serving(folder: Path, *arguments: str, cwd: Path = ROOT, **settings: str) -> Iterator[str]:
    """The address of a `bentoml serve` process that is ready; stopped at the end."""
    with running(folder, *arguments, cwd=cwd, **settings) as server:
        yield server.url


@contextmanager
def running(folder: Path, *arguments: str, cwd: Path = ROOT, **settings: str) -> Iterator[Server]:
    """A `bentoml serve` process that is ready; stopped by SIGTERM, which must end it with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bentoml", "serve", *arguments),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            cwd=cwd,
            env=service_environment(folder, **settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready(url, process, log)
        yield Server(url, process, log)
    finally:
        process.send_signal(signal.SIGTERM)  # does nothing where a test has ended it
        status = process.wait(timeout=START_SECONDS)
    assert status == 0, log.read_text()


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the service ended: {log.read_text()}"
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)  # nobody listens yet; there is no event to wait for
    pytest.fail(f"not ready after {START_SECONDS} seconds: {log.read_text()}")


def wait_for_workers(server: Server, count: int, *, without: int) -> set[int]:
    """The workers, once there are `count` but for that one."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        workers = server.workers() - {without}
        if len(workers) == count:
            return workers
    raise AssertionError(f"{count} workers did not run: {server.log.read_text()}")
