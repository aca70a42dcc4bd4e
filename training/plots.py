"""Plots as files, in the format that the file's ending gives."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from training.errors import ExplainedError
from training.files import replacing


class PlotError(ExplainedError):
    """A plot's file has an unknown ending; the message names the known ones."""


def file_format(path: Path) -> str:
    """The format of a plot by its file's ending: PNG, SVG or PDF; PNG if there is none.

    Raises:
        PlotError: the ending is another one.
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
