"""``results.csv``: one row for each finished full run, written by runs only."""

import csv
import io
from pathlib import Path
from statistics import mean, stdev

from pydantic import BaseModel, ConfigDict, ValidationError

from training.errors import ExplainedError, first_of
from training.files import locked, replacing
from training.recipe import Fraction, Views

RESULTS = Path(__file__).parent / "results.csv"

# What may differ when the same trained network is evaluated again, later and perhaps on another
# device. The rest, such as the training's seconds, tells runs apart.
EVALUATION = {"date", "accuracy", "single_view_accuracy", "device", "precision", "python", "torch"}


class ResultsError(ExplainedError):
    """A file of results that cannot be read; the message says why, and of a line which."""


class Result(BaseModel):
    """A row: accuracies are fractions of the test (or held-out ``val``) images.

    ``recipe_digest`` tells a recipe's results from those of its earlier forms.
    ``accuracy`` uses the recipe's views; ``single_view_accuracy`` the image alone. ``seconds``
    covers training and ``val`` evaluation, not the imports, the loading of data, the compilation of
    steps or the final test.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: str
    recipe: str
    recipe_digest: str
    seed: int
    accuracy: Fraction
    single_view_accuracy: Fraction
    val_accuracy: Fraction | None
    views: Views
    test_images: int
    train_images: int
    parameters: int
    epochs: int
    seconds: float
    device: str
    precision: str
    python: str
    torch: str
    commit: str

    def same_run(self, other: "Result") -> bool:
        """Return whether both rows are of the same run, perhaps evaluated again."""
        return self.model_dump(exclude=EVALUATION) == other.model_dump(exclude=EVALUATION)


def read(path: Path = RESULTS) -> list[Result]:
    """Read all rows, oldest first; none if there is no file yet.

    Raises:
        ResultsError: the header is another, a line is not a row (in an unresolved merge, say), or the
            file is not CSV in UTF-8.
        OSError: it cannot be read.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a BOM
        lines = csv.DictReader(file, restkey="more")
        try:
            if lines.fieldnames and set(lines.fieldnames) != set(Result.model_fields):
                columns = ",".join(lines.fieldnames)[:200]
                raise ResultsError(
                    f"{path}, line 1: the columns are {columns!r}; right would be "
                    f"{','.join(Result.model_fields)}"
                )
            return [
                Result.model_validate({key: value or None for key, value in line.items()})
                for line in lines
            ]
        except ValidationError as error:
            raise ResultsError(f"{path}, line {lines.line_num}: not a row: {first_of(error)}") from error
        except (UnicodeDecodeError, csv.Error) as error:  # of bytes read ahead, on whatever line
            raise ResultsError(f"{path}: not CSV in UTF-8: {error}") from error


def record(result: Result, path: Path = RESULTS) -> None:
    """Add a run's row unless it has one; the file is written anew beside the old one and renamed.

    Of runs that end at the same time, each waits for the one before it.

    Raises:
        ResultsError: the present file is damaged.
        OSError: it cannot be read or written.
    """
    if _has_row(result, read(path)):
        return  # without the lock, which needs a writable file
    with locked(path):
        rows = read(path)
        if _has_row(result, rows):
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(Result.model_fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.model_dump() for row in [*rows, result])
        with replacing(path) as file:
            file.write(text.getvalue().encode())


def _has_row(result: Result, rows: list[Result]) -> bool:
    return any(result.same_run(row) for row in rows)


def summary(results: list[Result], digest: str) -> str:
    """The test accuracy in percent that the recipe with this digest reached, or ``not run yet``.

    A run that was repeated with the same seed and outcome counts once: it is no further evidence.
    """
    outcomes = {
        (result.seed, result.accuracy, result.single_view_accuracy)
        for result in results
        if result.recipe_digest == digest
    }
    accuracies = sorted(100 * accuracy for _, accuracy, _ in outcomes)
    match accuracies:
        case []:
            return "not run yet"
        case [accuracy]:
            return f"{accuracy:.2f} % (n=1)"
    return f"{mean(accuracies):.2f} ± {stdev(accuracies):.2f} % (n={len(accuracies)})"
