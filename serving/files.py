"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EEXIST, ENOTDIR
from pathlib import Path
from typing import IO


def check_replaceable(path: Path) -> None:
    """Whether `replacing` could put a file there, to know it before the work that makes its content.

    Raises:
        OSError: something else than a file is there, or the folder is absent or not for us to write.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(EEXIST, "not a file that can be replaced", str(path))
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise NotADirectoryError(ENOTDIR, "not a folder to write into", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(EACCES, "this folder cannot be written to", str(folder))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file beside `path` that takes its place once it is written and on the disk.

    A kill at any moment leaves the old file or the new one; after an error the old one stays, and
    nothing beside it. Where `path` is a link, the file that it leads to is replaced.

    Raises:
        OSError: it cannot be written, and of which file that is so.
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
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
