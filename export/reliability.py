"""Reliability: how often a model is right when it claims a certain probability of being right."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from serving.predictions import softmax
from training import plots
from training.tables import percent

BINS = 15


class Bins(NamedTuple):
    """Images sorted into ``BINS`` bins of equal width by the probability of their most probable class.

    Attributes:
        share: float64 [BINS], the fraction of the images in each bin.
        confidence: the mean probability in each bin, 0 if it is empty.
        accuracy: the fraction of right answers in each bin, 0 if it is empty.
    """

    share: NDArray[np.float64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al., 2017, arXiv:1706.04599), a fraction."""
        return float((self.share * np.abs(self.accuracy - self.confidence)).sum())


def measure(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> Bins:
    """The reliability of ``logits``, [N, 10], for ``labels``, [N] in 0..9."""
    confidence = softmax(logits).max(1)
    right = (logits.argmax(1) == labels).astype(np.float64)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count, sure, good = (
        np.bincount(place, weights, BINS) for weights in (np.ones(len(labels)), confidence, right)
    )
    some = np.maximum(count, 1)
    return Bins(count / len(labels), sure / some, good / some)


def plot(curves: Mapping[str, Bins], title: str, path: Path) -> None:
    """Plot accuracy against confidence, up to two named curves, into a PNG, SVG or PDF file.

    Raises:
        PlotError: the file name has another ending.
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#444444", linestyle=":", label="as sure as right")
    for (name, bins), color in zip(curves.items(), ("#9aa5b1", "#1f6feb"), strict=False):
        filled = bins.share > 0
        label = f"{name}: error {percent(bins.error)}"
        axes.plot(bins.confidence[filled], bins.accuracy[filled], "o-", color=color, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability", ylabel="fraction right")
    axes.set_title(title, parse_math=False)  # it contains a file name
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    plots.save(figure, path)
