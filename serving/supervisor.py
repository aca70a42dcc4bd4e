"""The supervisor, `bentoml serve`, which starts the workers: what they share, and who may command it."""

import atexit
import fcntl
import functools
import logging
import os
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from circus.arbiter import Arbiter
from circus.controller import Controller
from circus.exc import ConflictError
from circus.sighandler import SysHandler
from circus.watcher import Watcher
from prometheus_client.mmap_dict import MmapedDict

from serving.errors import StartError
from serving.settings import KEPT_MODEL, METRICS_FOLDER, SUPERVISOR

logger = logging.getLogger("serving")

PREFIX = "cifar10-server-"
LOCK = "supervisor.lock"
ENDING_SECONDS = 10.0  # that a worker needs at most to end, besides the time that its requests have
BUSY_SECONDS = 0.1  # between two attempts to command circus
YOUNG_SECONDS = 60.0  # within which a starting server has locked its folder
NO_VALUES = struct.pack("=ii", 8, 0)  # prometheus_client's file without values: its length, padding
SOCKET_PATH_BYTES = 103  # most in the path of a Unix socket, on macOS; on Linux four more


def prepare(stop_timeout: float) -> None:
    """Set up circus, and the server's own folder that the workers share, before they start.

    Args:
        stop_timeout: seconds that a worker's requests have to finish when it is stopped.

    Raises:
        StartError: there is no place for the folder, or its path is too long.
    """
    try:
        folder = _own_folder()
        figures = folder / "metrics"
        figures.mkdir()
    except OSError as error:
        raise StartError(f"There is no place for the server's own files: {error}") from None
    _instruct_circus(folder, stop_timeout + ENDING_SECONDS)
    _heed_every_signal()
    os.environ[SUPERVISOR] = str(os.getpid())
    os.environ[METRICS_FOLDER] = str(figures)
    os.environ[KEPT_MODEL] = str(folder / "model.onnx")
    # `bentoml containerize` sets it, and BentoML would then not replace workers that have died.
    os.environ.pop("BENTOML_CONTAINERIZED", None)


def _own_folder() -> Path:
    """Make a folder that is removed when this process ends or, if it is killed, by a later server."""
    _remove_left()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Both are open until the process ends. The folder's own lock is for systemd-tmpfiles, which then
    # removes nothing in it that has become old.
    lock, itself = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR), os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # without locks on files, `_remove_left` removes nothing
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(itself, fcntl.LOCK_EX)
    return folder


def _remove_left() -> None:
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        try:
            with lock.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - lock.stat().st_mtime > YOUNG_SECONDS:
                    shutil.rmtree(lock.parent)
        except OSError:  # its server runs, or it is another user's
            continue


def _instruct_circus(folder: Path, patience: float) -> None:
    """Make circus report workers that end, kill stuck ones, and take commands from this user only.

    A worker that is told to stop has `patience` seconds to end; BentoML would give it a day. If none can
    be started for the moment, circus would stop all others. A command can start any program, and by
    default circus listens on loopback ports, open to all users.

    Raises:
        StartError: the folder's path is too long for sockets in it.
    """
    control, events = folder / "control", folder / "events"
    if (excess := len(os.fsencode(control)) - SOCKET_PATH_BYTES) > 0:
        raise StartError(
            f"{folder.parent} is too long a path for sockets in it: set TMPDIR to one that is shorter "
            f"by {excess} bytes"
        )
    begin, spawn = Arbiter.__init__, Watcher.spawn_process

    @functools.wraps(begin)
    def within(
        self: Arbiter, watchers: list[Watcher], endpoint: str, pubsub_endpoint: str, **options: Any
    ) -> None:
        for watcher in watchers:
            watcher.hooks["after_reap"] = _tell_of_the_end
            watcher.graceful_timeout = patience
        begin(self, watchers, f"ipc://{control}", f"ipc://{events}", **options)

    @functools.wraps(spawn)
    def spawned(self: Watcher, recovery_wid: int | None = None) -> float | bool:
        started: float | bool = spawn(self, recovery_wid)
        if started is False:
            logger.error("no worker can be started just now; another attempt follows")
            return True
        return started

    Arbiter.__init__, Watcher.spawn_process = within, spawned


def _tell_of_the_end(
    watcher: Watcher, arbiter: Arbiter, hook_name: str, process_pid: int, exit_code: int, **_: Any
) -> None:
    """Log the end of a worker that was not asked to end, or was asked in vain; circus logs nothing."""
    asked = exit_code in (0, -signal.SIGTERM, -signal.SIGINT)
    if watcher.is_stopping():
        if exit_code == -signal.SIGKILL:
            logger.error("worker %d did not end in time, and was killed", process_pid)
    elif not asked:
        how = f"status {exit_code}" if exit_code > 0 else signal.Signals(-exit_code).name
        logger.error("worker %d ended by %s; another one starts", process_pid, how)
    _clear(Path(os.environ[METRICS_FOLDER]), process_pid)


def _clear(figures: Path, process: int) -> None:
    """Remove what an ended worker has left, but for figures that are part of the sums.

    After a start that fails, circus tries again without limit, and each would leave a megabyte. The
    files of gauges stay, without values: by them, another worker counts one that was killed or crashed.
    """
    for path in figures.glob(f"*_{process}.db"):
        with suppress(FileNotFoundError):  # that worker was first
            if path.name.startswith("gauge"):
                with path.open("r+b") as file:
                    file.write(NO_VALUES)
                    file.truncate()
            elif not any(value for _, value, *_ in MmapedDict.read_all_values_from_file(str(path))):
                path.unlink()


def _heed_every_signal() -> None:
    """Make circus obey a signal that comes while it replaces workers, which it would drop.

    A second Ctrl-C goes on to the workers, which a terminal does not reach: each has its own session.
    """

    def heed(command: Callable[[Arbiter], object], controller: Controller) -> None:
        try:
            command(controller.arbiter)
        except ConflictError:
            controller.loop.call_later(BUSY_SECONDS, heed, command, controller)

    def stop(arbiter: Arbiter) -> None:
        arbiter.stop()
        # Workers have their own. Clients that these let in after the last worker would be reset.
        arbiter.sockets.close_all()

    def hurry(controller: Controller) -> None:
        for watcher in controller.arbiter.iter_watchers():
            if watcher.is_stopping():
                for process in watcher.processes.values():
                    process.send_signal(signal.SIGINT)

    def quit(self: SysHandler) -> None:
        self.controller.loop.add_callback_from_signal(heed, stop, self.controller)

    def reload(self: SysHandler) -> None:
        self.controller.loop.add_callback_from_signal(heed, Arbiter.reload, self.controller)

    def interrupt(self: SysHandler) -> None:
        self.controller.loop.add_callback_from_signal(hurry, self.controller)
        self.quit()

    SysHandler.quit = quit
    SysHandler.reload = reload
    SysHandler.handle_int = interrupt
