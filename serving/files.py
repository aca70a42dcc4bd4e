"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EEXIST, ENOTDIR
from pathlib import Path


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
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, renamed to it at the end; after an error the old file stays.

    Where `path` is a link, the file that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
