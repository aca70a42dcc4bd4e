"""A benchmark that is stopped by SIGTERM, as a process of its own."""

import contextlib
import signal
import sys
from collections.abc import Callable

import psutil

from benchmarks.server import family
from tests import ROOT


def assert_ends_with_all_it_started(
    module: str, *arguments: str, begun: Callable[[psutil.Process], bool]
) -> None:
    """Stop a benchmark once it has started a process for which ``begun`` is true."""

    def has_begun(member: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):  # it may have just ended, as git does
            return begun(member)
        return False

    with psutil.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT) as process:
        while not any(map(has_begun, members := family(process)[1:])):
            assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(members, timeout=30)[1]
