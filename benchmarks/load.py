"""HTTP load from outside: wrk, a client in C, in a process of its own."""

import json
import resource
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

SCRIPT = Path(__file__).with_suffix(".lua")
TIMEOUT = 30  # seconds for an answer
INSTALL = "wrk is not installed: `apt install wrk`, or `brew install wrk`"


class Load(BaseModel):
    """What a client with ``connections`` saw, each of which waits for an answer before it asks again.

    ``rate`` is requests answered per second, ``p50`` and ``p99`` are latencies in ms, ``errors`` counts
    requests without an answer or with another status than 2xx and 3xx. ``server_cpu`` and ``client_cpu`` are
    seconds of processors per second, ``memory`` and ``worker_memory`` (of the server's processes together,
    and of the largest) MiB in RAM at the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    connections: int
    rate: float
    p50: float
    p99: float
    errors: int
    server_cpu: float
    client_cpu: float
    memory: float
    worker_memory: float


class Form(BaseModel):
    """A multipart form with files of one field."""

    model_config = ConfigDict(frozen=True)

    boundary: str
    content: bytes

    @property
    def content_type(self) -> str:
        """The header of a request with the form."""
        return f"multipart/form-data; boundary={self.boundary}"


def form(field: str, files: Sequence[bytes], boundary: str) -> Form:
    """A form with PNG files, as curl would send it."""
    head = 'Content-Disposition: form-data; name="{}"; filename="{}.png"\r\nContent-Type: image/png\r\n\r\n'
    parts = [
        b"--%b\r\n%b%b\r\n" % (boundary.encode(), head.format(field, number).encode(), content)
        for number, content in enumerate(files)
    ]
    return Form(boundary=boundary, content=b"".join(parts) + b"--%b--\r\n" % boundary.encode())


def available() -> bool:
    """Whether wrk is installed."""
    return shutil.which("wrk") is not None


class Answered(BaseModel):
    """What wrk reports: ``text`` is its own, ``cpu`` its processor's seconds."""

    text: str
    cpu: float
    requests: int
    seconds: float
    p50: float
    p99: float
    errors: int


def wrk(url: str, forms: Sequence[Path], boundary: str, connections: int, seconds: float) -> Answered:
    """Post the forms in turns for ``seconds``, at least one.

    Raises:
        subprocess.CalledProcessError: wrk failed.
    """
    began = _children_cpu()
    done = subprocess.run(
        [
            *("wrk", "--threads", "1", "--connections", str(connections)),
            *("--duration", f"{max(1, round(seconds))}s", "--timeout", f"{TIMEOUT}s", "--latency"),
            *("--script", str(SCRIPT), url, "--", boundary, *map(str, forms)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return Answered(
        text=done.stdout,
        cpu=_children_cpu() - began,
        requests=found["requests"],
        seconds=found["microseconds"] / 1e6,
        p50=found["p50"] / 1e3,
        p99=found["p99"] / 1e3,
        errors=sum(found[kind] for kind in ("connect", "read", "write", "status", "timeout")),
    )


def boundary() -> str:
    """A line that is in none of the files."""
    return uuid4().hex


def _children_cpu() -> float:
    """Seconds of processors that ended child processes have had; the servers run on."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
