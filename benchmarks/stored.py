"""Figures in files: each benchmark has a model of its own, and its Markdown tables are made from it."""

import math
import platform
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from serving.errors import ProviderError
from training import device, provenance
from training.errors import ExplainedError, first_of
from training.files import make_place, replacing

FOLDER = Path(__file__).parent


class BenchmarkError(ExplainedError):
    """A benchmark that cannot be run, or figures that cannot be read."""


class Figures(BaseModel):
    """What a benchmark found, and with which device, versions and commit.

    Attributes:
        benchmark: its name; ``python -m benchmarks.NAME`` measures, and NAME.json has the figures.
        date, commit: as of the start; each measurement imports the code as it is when its turn comes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    benchmark: ClassVar[str]

    date: str
    commit: str
    device: str
    python: str
    packages: dict[str, str]

    @classmethod
    def file(cls) -> Path:
        """The benchmark's own file, which is used by default."""
        return FOLDER / f"{cls.benchmark}.json"

    @property
    def place(self) -> str:
        """Device, versions, commit and day, as a sentence."""
        versions = [f"Python {self.python}", *(f"{name} {each}" for name, each in self.packages.items())]
        return f"{self.device}; {', '.join(versions)}; commit {self.commit[:12]}, {self.date[:10]}."


Kind = TypeVar("Kind", bound=Figures)


def begin(packages: Sequence[str]) -> dict[str, Any]:
    """The fields of ``Figures`` as of now, with the versions of the ``packages`` that are installed."""
    return {
        "date": provenance.now(),
        "commit": provenance.commit(),
        "device": device.describe(device.choose()),
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := version_of(name))},
    }


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read(kind: type[Kind], path: Path | None = None) -> Kind:
    """The figures that an earlier run of the benchmark wrote.

    Raises:
        BenchmarkError: there are none, or the file is not one of that benchmark.
    """
    path = path or kind.file()
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise BenchmarkError(
            f"no figures at {path}: run python -m benchmarks.{kind.benchmark}"
        ) from error
    except ValidationError as error:
        raise BenchmarkError(
            f"{path} does not hold the figures of benchmarks.{kind.benchmark}: {first_of(error)}"
        ) from error


def seconds(text: str) -> float:
    """An option's seconds.

    Raises:
        ArgumentTypeError: not a number above 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def main(
    kind: type[Kind],
    parser: ArgumentParser,
    measure: Callable[[Namespace], Iterator[Kind]],
    markdown: Callable[[Kind], str],
    arguments: Sequence[str] | None,
    failed: Callable[[Kind], str] = lambda figures: "",
) -> int:
    """Run a benchmark's command line.

    Args:
        kind: the benchmark's figures.
        parser: a parser for the benchmark's own options.
        measure: yields the figures so far, repeatedly. Each time a file beside theirs is replaced as a
            whole, so that an interruption costs only what came after; at the end it takes their place.
        markdown: makes the Markdown that is printed.
        arguments: the command line's arguments; None for the process's.
        failed: says what is wrong with the figures, if anything; the exit code is 1 then.

    Returns:
        The exit code.
    """
    parser.add_argument(
        "--figures", type=Path, default=kind.file(), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="measure nothing; print the tables of the figures"
    )
    options = parser.parse_args(arguments)
    device.limit_threads()
    figures: Kind | None = None
    partial = options.figures.with_name(f"{options.figures.name}.partial")
    try:
        if options.markdown:
            figures = read(kind, options.figures)
        else:
            make_place(options.figures)
            with _ended_in_order():
                for figures in measure(options):
                    with replacing(partial) as file:
                        file.write(f"{figures.model_dump_json(indent=2)}\n".encode())
            partial.replace(options.figures)
    except (ExplainedError, ProviderError, OSError, KeyboardInterrupt) as error:
        if figures is not None:  # what was measured before: the disk may be full
            print(markdown(figures))
        kept = f"; what was measured before is in {partial}" if figures and partial.exists() else ""
        interrupted = isinstance(error, KeyboardInterrupt)
        print(f"interrupted{kept}" if interrupted else f"error: {error}{kept}", file=sys.stderr)
        return 130 if interrupted else 1
    assert figures is not None, "a benchmark measures something"
    print(markdown(figures))
    if not options.markdown and (complaint := failed(figures)):
        print(f"error: {complaint}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, with what it started and its temporary files."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
