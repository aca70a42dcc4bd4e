"""The command line in processes that can be killed, forked from one that has imported it already."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TextIO

FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(["training.__main__", __name__])


@dataclass(frozen=True)
class Command:
    """A process of the command line, and what it writes to stdout and stderr."""

    process: BaseProcess
    stdout: TextIO
    stderr: TextIO

    def end(self) -> tuple[int | None, str]:
        """Wait for the process; gives its exit code, and its errors."""
        with self.stdout, self.stderr:
            self.stdout.read()
            errors = self.stderr.read()
        self.process.join()
        return self.process.exitcode, errors


def start(*arguments: str, before: str = "") -> Command:
    """Start the command line in a process of its own, which first runs the Python code ``before``."""
    pipes = [os.pipe(), os.pipe()]
    outputs = [Connection(writer, readable=False) for _, writer in pipes]
    # The server keeps the environment in which the first process was started.
    process = FORKSERVER.Process(
        target=_run, args=(arguments, before, dict(os.environ), outputs), daemon=True
    )
    process.start()
    for output in outputs:
        output.close()
    return Command(process, *(os.fdopen(reader) for reader, _ in pipes))


def _run(
    arguments: Sequence[str], before: str, environment: dict[str, str], outputs: Sequence[Connection]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), number)
        output.close()
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # written line by line
    exec(before, {})
    from training.__main__ import main

    sys.exit(main(list(arguments)))
