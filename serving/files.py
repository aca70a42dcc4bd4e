"""Replace files so that they are never incomplete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EEXIST, ENOTDIR
from pathlib import Path
from typing import IO


def check_replaceable(path: Path) -> None:
    """Raise `OSError` unless `replacing` can write `path`, to know it before its content is computed.

    Raises:
        OSError: `path` is something other than a file, or its folder is missing or not writable.
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
    """Open a binary file beside `path` for writing; it replaces `path` once it is complete and on disk.

    If the process is killed, `path` is either the old file or the new one. After an error the old file
    stays, and the new one is removed. If `path` is a link, the file that it points to is replaced.

    Raises:
        OSError: the file cannot be written; the error names it.
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
        if error.errno is not None and error.filename is None:  # such as that of a full disk
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)
