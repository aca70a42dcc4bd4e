"""Where a run happens: program, versions and device, for its folder and its results."""

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
    """One stretch of a run, from a start or resumption to the next; ``step`` is where it took up.

    ``device`` and ``precision`` are those of the training, ``processes`` how many shared it;
    ``compile_seconds``, where its steps were compiled, are not among the run's seconds.
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
    """The session that begins now, at a ``step`` of an ``epoch``, both from 0."""
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
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str:
    """The repository's commit, ``-dirty`` with uncommitted changes, ``unknown`` outside of git.

    The rows that runs add to results.csv are no change of the program.
    """
    try:
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
