"""Pages about runs, for people: one about each run, and one that compares several.

A page is one file without scripts that loads nothing else; the same runs give the same bytes. What it
says about the training comes from the checkpoint alone.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import torch
from markupsafe import Markup
from rich.console import Console
from torch import nn

from training import checkpoint, data
from training.checkpoint import Checkpoint
from training.data import DataSet, Images
from training.errors import ExplainedError
from training.files import replacing
from training.model import parameter_count
from training.recipe import Model, Recipe
from training.report import charts, layers, pictures
from training.report.predictions import Predictions, predict
from training.tables import percent

PAGE = "report.html"
COMPARISON = "comparison.html"

MISTAKES = 24
LEGEND_LENGTH = 16  # characters of a run's name in the legend of a comparison
SAMPLES, TIMES = 6, 7  # training images shown, and augmented versions of each
TRAIN, VAL, TEST, REPORTED = 0, 1, 2, 3  # colours in a run's charts

# What a page's header says in its own words, or a better place on the page does.
TOLD = {
    *("recipe", "accuracy", "single_view_accuracy", "val_accuracy", "views", "parameters", "seconds"),
    *("epoch", "step", "epochs", "sessions", "result"),
}
# The facts that come first in the list below it; the others keep the checkpoint's order.
FIRST = ("date", "started", "device", "precision", "seed", "train_images", "test_images")


class ReportError(ExplainedError):
    """Runs cannot be reported on, or not together; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A run to report on, and the path of its page."""

    name: str
    page: Path
    state: Checkpoint
    recipe: Recipe
    network: nn.Module

    @property
    def val_accuracy(self) -> float | None:
        """Accuracy on the held-out images after the last epoch so far; None if there are none."""
        return self.state.history[-1].get("val_accuracy") if self.state.history else None

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy on the test images; None if the run was not evaluated on them."""
        return self.state.result.accuracy if self.state.result else None

    @property
    def seconds(self) -> float:
        """The training time of the epochs that are done."""
        return self.state.history[-1]["seconds"] if self.state.history else 0.0

    @property
    def timestamp(self) -> str:
        """When the run was evaluated on the test images, else when it was started."""
        times = [session["started"] for session in self.state.sessions]
        return _moment(self.state.result.date if self.state.result else times[0]) if times else ""

    def facts(self) -> dict[str, str]:
        """All facts about the run in its checkpoint, as texts by name.

        If sessions differ in a value, the text has each of them; of more than two starts, the first and
        the last.
        """
        values: dict[str, Any] = {}
        for session in self.state.sessions:
            for name, value in session.items():
                values.setdefault(name, []).append(value)
        facts = self.state.facts()
        values |= facts | {"commit": self.state.commit} | (facts["result"] or {})
        texts = {name: _text(name, value) for name, value in values.items() if value is not None}
        if len(starts := values.get("started", [])) > 2:
            texts["started"] = f"{_moment(starts[0])} to {_moment(starts[-1])}, {len(starts)} sessions"
        return texts


def write(folders: Sequence[Path], out: Path | None, console: Console) -> Iterator[Path]:
    """Write a page for each run, and one that compares them if there are several.

    Args:
        folders: those of the runs.
        out: the folder for all pages. Without it a run's page is ``report.html`` in its own folder,
            and the comparison lies in the folder that the runs' folders have in common.
        console: for a warning if a run's last checkpoint cannot be used, so that the page is about the
            previous one.

    Yields:
        The path of each page once it is written.

    Raises:
        CheckpointError, RecipeError: a run has no checkpoint that can be used.
        DataError: the data set is missing or damaged.
        ReportError: a run is of another data set, or two pages would have the same path.
        OSError: a page cannot be written.
    """
    entries = [_read(folder, out, console) for folder in folders]
    parent = os.path.commonpath([folder.absolute().parent for folder in folders])
    comparison = (out or Path(parent)) / COMPARISON
    pages = [entry.page for entry in entries] + [comparison] * (len(entries) > 1)
    for page in pages:
        if pages.count(page) > 1:
            raise ReportError(f"{page} would be written twice: name other runs, or rename one's folder")
    dataset = data.load()
    for entry in entries:
        if entry.state.run["data"] != dataset.source:
            raise ReportError(
                f"{entry.name} is a run on {entry.state.run['data']}, but the data set at hand is "
                f"{dataset.source}: set {data.ROOT_VARIABLE} to that of the run"
            )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        yield _save(entry.page, run_page(entry, dataset))
    if len(entries) > 1:
        yield _save(comparison, comparison_page(entries, comparison.parent))


def run_page(entry: Entry, dataset: DataSet) -> str:
    """The page of one run."""
    limit = entry.state.run["limit"]
    train, val = (part.first(limit) for part in data.split(dataset.train, entry.recipe.data.validation))
    summary = layers.summarize(entry.network)
    shown, images = ("test", dataset.test.first(limit)) if entry.state.result else ("val", val)
    predictions = predict(entry.network, entry.recipe, images) if len(images) else None
    return _render(
        "run.html",
        entry=entry,
        state=entry.state,
        recipe=entry.recipe,
        facts=sorted(
            (fact for fact in entry.facts().items() if fact[0] not in TOLD),
            key=lambda fact: FIRST.index(fact[0]) if fact[0] in FIRST else len(FIRST),
        ),
        curves=_curves(entry),
        durations=_durations(entry.state.history),
        shown=shown,
        predictions=predictions,
        class_bars=_class_bars(entry.state.classes, predictions) if predictions else "",
        mistakes=predictions.mistakes(MISTAKES) if predictions else [],
        samples=_samples(entry, train),
        summary=summary,
    )


def comparison_page(entries: Sequence[Entry], folder: Path) -> str:
    """The page in ``folder`` that compares runs, with links to theirs."""
    rows = [
        {
            "entry": entry,
            "facts": entry.facts(),
            "link": quote(Path(os.path.relpath(entry.page, folder)).as_posix()),
            "parameters": parameter_count(entry.network),
        }
        for entry in entries
    ]
    return _render(
        "comparison.html",
        rows=rows,
        best_test=max((e.test_accuracy for e in entries if e.test_accuracy is not None), default=None),
        best_val=max((e.val_accuracy for e in entries if e.val_accuracy is not None), default=None),
        colours=charts.COLOURS,
        curves=_compared_curves(entries),
        same_loss=len({_loss(entry.recipe) for entry in entries}) == 1,
    )


def _read(folder: Path, out: Path | None, console: Console) -> Entry:
    state, warning = checkpoint.load_last(folder / checkpoint.FILE)
    if warning:
        console.print(warning, style="yellow")
    state.optimizers.clear()  # not needed here, and as large as the network or larger
    name = folder.resolve().name
    page = folder / PAGE if out is None else out / f"{name}.html"
    network = state.network()
    for weights in (state.model, state.average, state.selector):  # which many runs would hold twice
        if weights is not None:
            weights.clear()
    return Entry(name, page, state, state.parsed_recipe(), network)


def _save(page: Path, text: str) -> Path:
    with replacing(page) as file:
        file.write(text.encode())
    return page


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "commits": lambda text: re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", text),
        "count": lambda number: f"{number:,}",
        "data_uri": pictures.data_uri,
        "duration": _duration,
        "megabytes": lambda number: f"{number / 1e6:.2f} MB",
        "model": _model,
        "percent": percent,
    }
    return environment.get_template(template).render(values)


# -- a run ------------------------------------------------------------------------------------------


def _curves(entry: Entry) -> dict[str, Markup]:
    """Charts of the metrics over epochs, by title; none before the first epoch has ended."""
    history = entry.state.history
    if not history:
        return {}
    accuracies: list[charts.Series] = []
    losses: list[charts.Series] = []
    for name, colour in (("train", TRAIN), ("val", VAL)):
        accuracy = _series(history, f"{name}_accuracy", colour)
        loss = _series(history, f"{name}_loss", colour)
        if accuracy.values:
            accuracies.append(replace(accuracy, label=f"{name} {percent(accuracy.values[-1])}"))
            losses.append(replace(loss, label=f"{name} {loss.values[-1]:.4g}"))
    if (value := entry.test_accuracy) is not None:
        label = f"test {percent(value)}"
        accuracies.append(charts.Series(label, [history[-1]["epoch"]], [value], TEST, diamond=True))
    if (claim := entry.recipe.report) is not None:
        label = f"reported {percent(claim.accuracy)}"
        ends = [history[0]["epoch"], history[-1]["epoch"]]
        accuracies.append(charts.Series(label, ends, [claim.accuracy] * 2, REPORTED, faint=True))
    changes = [
        (part.from_epoch + 1, f"{part.size} px")
        for part in entry.recipe.resolution
        if part.from_epoch < history[-1]["epoch"]
    ]
    seconds = _durations(history)
    unit, length = ("minutes", 60) if max(seconds) >= 120 else ("seconds", 1)
    time = f"Time of an epoch, {unit}"
    epochs = [line["epoch"] for line in history]
    return {
        "Accuracy": charts.lines("Accuracy", accuracies, percent=True, changes=changes),
        "Loss": charts.lines("Loss", losses, changes=changes),
        "Learning rate": charts.lines("Learning rate", [_series(history, "lr", TRAIN)], from_zero=True),
        time: charts.steps(time, epochs, [value / length for value in seconds]),
    }


def _series(history: Sequence[dict[str, Any]], key: str, colour: int) -> charts.Series:
    """A metric's line without a label, empty if the run has no such metric."""
    lines = [line for line in history if key in line]
    return charts.Series("", [line["epoch"] for line in lines], [line[key] for line in lines], colour)


def _durations(history: Sequence[dict[str, Any]]) -> list[float]:
    """The seconds that each epoch took; a history counts them from the run's start."""
    ends = [line["seconds"] for line in history]
    return [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]


def _class_bars(classes: Sequence[str], predictions: Predictions) -> Markup:
    accuracies = predictions.class_accuracies()
    best_first = sorted(accuracies, key=accuracies.__getitem__, reverse=True)
    return charts.bars(
        "Accuracy by class",
        [classes[label] for label in best_first],
        [accuracies[label] for label in best_first],
        predictions.correct / len(predictions.images),
    )


def _samples(entry: Entry, train: Images) -> tuple[Images, list[pictures.Augmented]]:
    """The first training image of each of some classes, and what the recipe makes of them."""
    firsts = {label: place for place, label in reversed(list(enumerate(train.labels.tolist())))}
    places = torch.tensor(sorted(firsts.values())[:SAMPLES])
    originals = Images(train.pixels[places], train.labels[places])
    seed = entry.state.run["seed"]
    return originals, pictures.augmented(entry.recipe, seed, train, places, TIMES)


# -- several runs -----------------------------------------------------------------------------------


def _compared_curves(entries: Sequence[Entry]) -> dict[str, Markup]:
    numbered = [(number, entry) for number, entry in enumerate(entries) if entry.state.history]
    if not numbered:
        return {}
    held_out = any(entry.val_accuracy is not None for entry in entries)
    accuracies: list[charts.Series] = []
    losses: list[charts.Series] = []
    for number, entry in numbered:
        history, label = entry.state.history, f"{number + 1} {_shortened(entry.name)}"
        for metric, curves in (("accuracy", accuracies), ("loss", losses)):
            train = _series(history, f"train_{metric}", number)
            val = _series(history, f"val_{metric}", number)
            curves.append(replace(train, faint=held_out, label="" if val.values else label))
            curves.append(replace(val, label=label))
        if (value := entry.test_accuracy) is not None:
            point = charts.Series("", [history[-1]["epoch"]], [value], number, diamond=True)
            accuracies.append(point)
    return {
        "Accuracy": charts.lines("Accuracy", [s for s in accuracies if s.values], percent=True),
        "Loss": charts.lines("Loss", [s for s in losses if s.values]),
    }


def _loss(recipe: Recipe) -> tuple[object, ...]:
    """The settings that decide which loss, over which images, a recipe's train figures show."""
    return recipe.label_smoothing, recipe.mixing, recipe.selection, recipe.distillation


def _shortened(name: str) -> str:
    return name if len(name) <= LEGEND_LENGTH else name[: LEGEND_LENGTH - 1] + "…"


# -- texts ------------------------------------------------------------------------------------------


def _text(name: str, value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return str(value) if name == "seed" else f"{value:,}"
        case list():
            return " + ".join(dict.fromkeys(_text(name, item) for item in value))
    return _moment(value) if name in ("date", "started") else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _model(config: Model) -> str:
    """A network's kind and the numbers that set its size: ``resnet 4-4-3 / 64-128-256``."""
    sizes = [value for value in config.model_dump().values() if isinstance(value, tuple)]
    dash = "\N{NON-BREAKING HYPHEN}"
    return config.kind.replace("_", " ") + " " + " / ".join(dash.join(map(str, size)) for size in sizes)


def _moment(text: str) -> str:
    """Format a time in ISO 8601 as UTC, to the minute."""
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
