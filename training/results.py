"""``results.csv``: one row for each finished full run, written by runs only."""

import csv
import io
from pathlib import Path
from statistics import mean, stdev

from pydantic import BaseModel, ConfigDict

from training.files import replacing

RESULTS = Path(__file__).parent / "results.csv"


class Result(BaseModel):
    """A row: accuracies are fractions of the test (or held-out ``val``) images, times seconds.

    ``recipe_digest`` tells the results of a recipe from those of an earlier form of it.
    ``accuracy`` uses the recipe's views; ``single_view_accuracy`` the image alone. ``seconds``
    covers training and ``val`` evaluation, not the imports, the loading of data or the final test.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: str
    recipe: str
    recipe_digest: str
    seed: int
    accuracy: float
    single_view_accuracy: float
    val_accuracy: float | None
    views: str
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


def read(path: Path = RESULTS) -> list[Result]:
    """All rows, oldest first; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    return [Result.model_validate(row) for row in rows]


def append(result: Result, path: Path = RESULTS) -> None:
    """Add a row: the file is written anew beside the old one and renamed."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(Result.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in [*read(path), result])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def summary(results: list[Result], digest: str) -> str:
    """The test accuracy, in percent, reached by the recipe with this digest; or ``not run yet``."""
    accuracies = [100 * result.accuracy for result in results if result.recipe_digest == digest]
    match accuracies:
        case []:
            return "not run yet"
        case [accuracy]:
            return f"{accuracy:.2f} % (n=1)"
    return f"{mean(accuracies):.2f} ± {stdev(accuracies):.2f} % (n={len(accuracies)})"
