"""The learning-rate range test (L. Smith, 2017, arXiv:1506.01186), as report A used it.

The rate grows exponentially from step to step; the suggestion is the rate at which the smoothed loss
falls fastest before its minimum: a loss that has blown up also falls fast when it recovers.
Grid and smoothing are those of the implementation whose grid has the report's 0.112202: rate i of n is
low * (high / low) ** (i / n), counted from 1, and 0.112202 is rate 81 of 100.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from training import plots
from training.learner import Learner, TrainingError
from training.recipe import LARGEST

SMOOTHING = 0.98  # of the moving average of the losses, which is corrected for its start at 0
DIVERGED = 4.0  # times the lowest smoothed loss
SKIPPED = 10, 1  # steps at the beginning and at the end


@dataclass(frozen=True)
class Measurement:
    """A step of the test: its ``rate``, its batch's mean ``loss``, and the ``smooth`` loss."""

    rate: float
    loss: float
    smooth: float


def rates(low: float, high: float, steps: int) -> list[float]:
    """The rates of a test, from just above ``low`` to ``high``.

    Raises:
        TrainingError: ``low`` and ``high`` are no range, or the steps are too few to show a slope.
    """
    if not 0 < low < high <= LARGEST:
        raise TrainingError(
            f"no range of rates: --low {low:g} must be above 0 and below --high {high:g}, and that at "
            f"most {LARGEST:g}"
        )
    if steps < sum(SKIPPED) + 2:
        raise TrainingError(f"{steps} steps show no slope: take at least {sum(SKIPPED) + 2}")
    return [low * (high / low) ** (step / steps) for step in range(1, steps + 1)]


def measure(learner: Learner, tried: list[float]) -> Iterator[Measurement]:
    """Train ``learner`` for one step at each rate; ends early if the loss diverges.

    The rates of other parameter groups keep their ratio to ``learner.lr``.
    """
    base = learner.lr
    average, lowest, step = 0.0, math.inf, 0
    while step < len(tried):
        for batch in itertools.islice(learner.batches(step // learner.steps), len(tried) - step):
            rate = tried[step]
            loss_sum, _ = learner.learn(batch, (rate / base).__mul__)
            loss = loss_sum.item() / learner.selected(batch.count)
            step += 1
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            smooth = average / (1 - SMOOTHING**step)
            if not math.isfinite(loss):
                return
            yield Measurement(rate, loss, smooth)
            if smooth > DIVERGED * lowest:
                return
            lowest = min(lowest, smooth)


def suggest(measured: list[Measurement]) -> float:
    """The rate at which the smoothed loss falls fastest before its minimum.

    Raises:
        TrainingError: the loss diverged within the first steps, or it never falls.
    """
    first, last = SKIPPED[0], len(measured) - SKIPPED[1]
    if last - first < 2:
        raise TrainingError(
            f"the loss diverged after {len(measured)} steps, at rate {measured[-1].rate:g}: "
            "begin with a lower --low"
            if measured
            else "the loss is not finite at the first rate: begin with a lower --low"
        )
    smooth = np.array([point.smooth for point in measured[first:last]])
    slopes = np.gradient(smooth)[: smooth.argmin() + 1]
    if slopes.min() >= 0:
        raise TrainingError(
            f"the loss falls nowhere between the rates {measured[first].rate:.4g} and "
            f"{measured[last - 1].rate:.4g}: try another --low or --high"
        )
    return measured[first + int(slopes.argmin())].rate


def plot(measured: list[Measurement], suggestion: float, own: float, title: str, path: Path) -> None:
    """Plot the losses over the rates into a PNG, SVG or PDF file.

    Raises:
        PlotError: the file's ending is another one.
        OSError: the file cannot be written.
    """
    tried = [point.rate for point in measured]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(tried, [p.loss for p in measured], color="#9aa5b1", linewidth=1, label="loss of the batch")
    axes.plot(tried, [p.smooth for p in measured], color="#1f6feb", linewidth=2, label="smoothed")
    axes.axvline(suggestion, color="#d1495b", label=f"suggestion {suggestion:.4g}")
    axes.axvline(own, color="#444444", linestyle=":", label=f"recipe {own:.4g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    axes.set_title(title, parse_math=False)  # it holds a file's name
    # A batch's loss can blow up tenfold; what counts is how the smoothed one falls and rises.
    smooth = [point.smooth for point in measured]
    margin = (max(smooth) - min(smooth)) / 2
    axes.set_ylim(min(smooth) - margin, max(smooth) + margin)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    plots.save(figure, path)
