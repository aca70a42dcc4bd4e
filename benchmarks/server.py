"""A server to measure, as a process that is ended with all that it started."""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from benchmarks.stored import BenchmarkError
from serving.settings import PREFIX

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
STOP_SECONDS = 30.0


def environment(**settings: str) -> dict[str, str]:
    """This process's, with no settings of the service but these."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return others | settings


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    settings: Mapping[str, str],
    answers: Callable[[str], bool],
) -> Iterator[tuple[str, psutil.Popen]]:
    """A server that answers: its address, and its process. It ends with this one, by SIGTERM too.

    Args:
        name: for errors.
        command: arguments of Python, in which ``{port}`` stands for the port to listen on.
        settings: environment variables.
        answers: asks the server at an address whether it is as it should be.

    Raises:
        BenchmarkError: it ended, or did not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        own = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": f"{folder}/bentoml"}
        early: list[int] = []  # SIGTERM while the server is started is heeded when it can be ended
        before = signal.signal(signal.SIGTERM, lambda number, _: early.append(number))
        process = psutil.Popen(
            [sys.executable, *(argument.format(port=port) for argument in command)],
            cwd=ROOT,
            env=environment(**own, **settings),
            stdout=log,
            stderr=log,
        )
        try:
            signal.signal(signal.SIGTERM, _exit)
            if early:
                _exit(*early)
            deadline = time.monotonic() + START_SECONDS
            while not _ready(url, answers):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchmarkError(f"{name} does not answer: {Path(log.name).read_text()[-1500:]}")
                time.sleep(0.05)  # nobody listens yet; there is no event to wait for
            yield url, process
        finally:
            _stop(process)
            signal.signal(signal.SIGTERM, before)


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory(process: psutil.Process) -> list[float]:
    """MiB of RAM (RSS) of each process of its family."""
    sizes = []
    for member in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes.append(member.memory_info().rss / 2**20)
    return sizes


def _exit(number: int, *_: object) -> None:
    sys.exit(128 + number)


def _ready(url: str, answers: Callable[[str], bool]) -> bool:
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
