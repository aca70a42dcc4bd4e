"""Run our own programs in separate processes, which share nothing with the process that measures."""

import subprocess
import sys
from collections.abc import Mapping

from benchmarks.server import ROOT
from benchmarks.stored import BenchmarkError


def output(name: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run Python with ``arguments``, in this process's environment or ``env``; returns what it prints.

    Raises:
        BenchmarkError: it fails; the message has the program's ``name`` and the end of its stderr.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{name} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
