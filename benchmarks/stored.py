"""Figures in files: each benchmark has a model of its own, and the README's tables come from them."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from training.files import replacing

Figures = TypeVar("Figures", bound=BaseModel)


class BenchmarkError(RuntimeError):
    """A benchmark that cannot be run, or figures that cannot be read."""


def read(kind: type[Figures], path: Path, benchmark: str) -> Figures:
    """The figures that an earlier run of ``python -m BENCHMARK`` wrote.

    Raises:
        BenchmarkError: there are none, or the file is not one of that benchmark.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise BenchmarkError(f"no figures at {path}: run python -m {benchmark}") from error
    except ValidationError as error:
        raise BenchmarkError(f"{path} does not hold the figures of {benchmark}: {error}") from error


def write(figures: BaseModel, path: Path) -> None:
    """Write the figures beside ``path`` and rename them there."""
    with replacing(path) as file:
        file.write(f"{figures.model_dump_json(indent=2)}\n".encode())
