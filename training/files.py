"""Files that are replaced as a whole or not at all, and locks on files and folders."""

import fcntl
import glob
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EEXIST
from pathlib import Path
from typing import IO

LEFTOVER_SECONDS = 3600.0  # no file takes this long to write


def make_place(path: Path) -> None:
    """Make the folder for a file that ``replacing`` will write, and check it before the work starts.

    Raises:
        OSError: the folder cannot be made or written to, or ``path`` is something other than a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise FileExistsError(EEXIST, "not a file that can be replaced", str(path))
    folder = Path(os.path.realpath(path)).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(EACCES, "this folder cannot be written to", str(folder))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file beside ``path`` that takes its place once it is written and on the disk.

    A kill at any moment leaves the old file or the new one; after an error the old one stays. Each
    process writes a file of its own; a later call removes those over an hour old, left by processes
    that were killed. If ``path`` is a link, its target is replaced.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    path = Path(os.path.realpath(path))
    _remove_leftovers(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as when the disk is full
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file for this process, once no other holds it; a missing file is created.

    Inside, ``path`` may be replaced. Nothing is locked if the file system has no ``flock``.
    """
    while True:
        with path.open("ab") as file:
            with suppress(OSError):  # no locks here: better to go on without one than to fail
                fcntl.flock(file, fcntl.LOCK_EX)
            # The process that held it before may have put another file in its place.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Lock a folder for this process; yields False if another process holds it, else True.

    Nothing is locked if the file system has no ``flock``.
    """
    descriptor, free = os.open(folder, os.O_RDONLY), True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        free = False
    except OSError:  # no locks here
        pass
    try:
        yield free
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.new"):
        number = left.name[len(path.name) + 1 : -len(".new")]
        try:
            if number.isdecimal() and time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                left.unlink()
        except OSError:  # another process was faster, or it is not ours to remove
            continue
