"""Files that are either whole or as they were before, and files that one process at a time changes."""

import glob
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EEXIST
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

LEFTOVER_SECONDS = 3600.0  # no file takes so long to write


def make_place(path: Path) -> None:
    """Make the folder of a file that `replacing` is to write, before the work that makes its content.

    Raises:
        OSError: it cannot be made or written to, or something else than a file is at ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise FileExistsError(EEXIST, "not a file that can be replaced", str(path))
    folder = Path(os.path.realpath(path)).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(EACCES, "this folder cannot be written to", str(folder))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file beside ``path`` that takes its place once it is written and on the disk.

    A kill at any moment leaves the old file or the new one; after an error the old one stays. Each
    process has a file of its own; what one that was killed left beside is removed an hour later. Where
    ``path`` is a link, the file that it leads to is replaced.

    Raises:
        OSError: it cannot be written, and of which file that is so.
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
        if error.errno is not None and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file for this process alone, after the others that hold it; it is made where it is not.

    Inside, ``path`` may be replaced. Where the system (Windows) or the file system has no ``flock``
    nothing is held.
    """
    if sys.platform == "win32":
        yield
        return
    while True:
        with path.open("ab") as file:
            with suppress(OSError):  # no locks here: better a row at risk than none
                fcntl.flock(file, fcntl.LOCK_EX)
            # The one who held it before has perhaps put another file in its place.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process alone, if no other one holds it; yields whether none does.

    Where the system (Windows) or the file system has no ``flock`` nothing is held.
    """
    if sys.platform == "win32":
        yield True
        return
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
