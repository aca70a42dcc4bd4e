"""Servers to measure: processes that are stopped together with everything they started."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from serving.settings import PREFIX
from training.errors import ExplainedError

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
STOP_SECONDS = 60.0
LOG = "server.log"


class ServerError(ExplainedError):
    """A server that ended, or did not answer in time."""


def environment(**settings: str) -> dict[str, str]:
    """This process's environment, with ``settings`` as the only settings of the service."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return others | settings


def service_environment(folder: Path, **settings: str) -> dict[str, str]:
    """As ``environment``, but BentoML keeps its files in ``folder``, and no usage is reported."""
    silent = {"BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0"}
    return environment(BENTOML_HOME=str(folder / "bentoml"), **silent, **settings)


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    settings: Mapping[str, str],
    answers: Callable[[str], bool],
    folder: Path,
    cwd: Path = ROOT,
) -> Iterator[tuple[str, psutil.Popen]]:
    """Start a server and yield its address and process once it answers.

    At the end the process is stopped together with everything it started.

    Args:
        name: the server's name in error messages.
        command: arguments for Python, in which ``{port}`` stands for the port to listen on.
        settings: environment variables.
        answers: asks the server at an address whether it is ready.
        folder: for its log and BentoML's files.
        cwd: the working directory.

    Raises:
        ServerError: the server ended, or did not answer in time.
    """
    with _reserved_port() as port:
        url = f"http://127.0.0.1:{port}"
        with (folder / LOG).open("wb") as log:
            early: list[int] = []  # a SIGTERM during the start is obeyed once the server can be stopped
            before = signal.signal(signal.SIGTERM, lambda number, _: early.append(number))
            process = psutil.Popen(
                [sys.executable, *(argument.format(port=port) for argument in command)],
                cwd=cwd,
                env=service_environment(folder, **settings),
                stdout=log,
                stderr=log,
            )
        try:
            signal.signal(signal.SIGTERM, before)
            for number in early:
                signal.raise_signal(number)
            deadline = time.monotonic() + START_SECONDS
            while not reached(url, answers):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServerError(f"{name} does not answer: {(folder / LOG).read_text()[-1500:]}")
                time.sleep(0.05)  # nobody listens yet; there is no event to wait for
            yield url, process
        finally:
            _stop(process)


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that nothing has and, on Linux, that nothing gets by chance while the server starts."""
    with socket.socket() as holder:
        if sys.platform == "linux":  # elsewhere, the server could not have it either
            for sharing in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                holder.setsockopt(socket.SOL_SOCKET, sharing, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port


def is_ready(url: str) -> bool:
    """Whether the service at an address says that it is ready."""
    return httpx.get(f"{url}/readyz", timeout=5).is_success


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all its descendants; empty if the process is gone."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory(process: psutil.Process) -> list[float]:
    """The memory (RSS, in MiB) of a process and of each of its descendants."""
    sizes = []
    for member in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes.append(member.memory_info().rss / 2**20)
    return sizes


def reached(url: str, answers: Callable[[str], bool]) -> bool:
    """What ``answers`` returns for the server at an address; False if no server answers there."""
    try:
        return answers(url)
    except httpx.TransportError:
        return False


def _stop(process: psutil.Popen) -> None:
    members = family(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(members, timeout=STOP_SECONDS)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)
