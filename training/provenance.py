"""What a run is made with: code, versions and device, recorded in its folder and its results."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NotRequired

import numpy as np
import torch
from typing_extensions import TypedDict

from training.results import RESULTS


class Session(TypedDict):
    """One stretch of a run, from a start or resumption to the next; it began at ``step`` of ``epoch``.

    ``device`` and ``precision`` are those of the training, ``processes`` is how many shared it.
    ``compile_seconds``, there if its steps were compiled, are not part of the run's seconds.
    """

    started: str
    epoch: int
    step: int
    device: str
    precision: str
    processes: int
    system: str
    python: str
    torch: str
    torchvision: str
    numpy: str
    commit: str
    compile_seconds: NotRequired[float]


def session(epoch: int, step: int, device: str, precision: str, processes: int) -> Session:
    """A session that begins now, at a ``step`` of an ``epoch``, both counted from 0."""
    return Session(
        started=now(),
        epoch=epoch,
        step=step,
        device=device,
        precision=precision,
        processes=processes,
        system=" ".join([platform.system(), platform.machine(), *platform.libc_ver()]),
        python=platform.python_version(),
        torch=str(torch.__version__),
        torchvision=version("torchvision"),
        numpy=np.__version__,
        commit=commit(),
    )


def now() -> str:
    """The current UTC time in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str:
    """The repository's commit, with ``-dirty`` if changes are uncommitted; ``unknown`` outside git.

    Only changes of tracked files count, and not those of results.csv: they are the rows that runs add.
    """
    try:
        _git("ls-files", "--error-unmatch", RESULTS.name)  # or it is a copy within another repository
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS.name}")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changes else head


def _git(*arguments: str) -> str:
    process = subprocess.run(
        ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True
    )
    return process.stdout.strip()
