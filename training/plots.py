"""Plots as files, in the format that the file's name says."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from training.errors import ExplainedError
from training.files import replacing


class PlotError(ExplainedError):
    """A plot that is to be a file of no known kind; the message names the kinds."""


def file_format(path: Path) -> str:
    """The format of a plot: PNG, SVG or PDF by the file's ending, and PNG without one.

    Raises:
        PlotError: another ending.
    """
    kind = path.suffix.removeprefix(".") or "png"
    if kind not in ("png", "svg", "pdf"):
        raise PlotError(f"{path}: a plot is a .png, .svg or .pdf file")
    return kind


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file; as PNG or SVG, the same figure gives the same bytes.

    Raises:
        PlotError: as ``file_format``.
        OSError: the file cannot be written there.
    """
    kind = file_format(path)
    with matplotlib.rc_context({"svg.hashsalt": "plot"}), replacing(path) as file:
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
