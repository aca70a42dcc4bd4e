"""Charts as SVG elements for a page, whose style sheet gives them their colours.

matplotlib knows no CSS: it draws in placeholder colours, which then become ``var(--...)``, so a chart
follows the page into dark mode. Text is kept as text. The same values give the same bytes.
"""

import io
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from training import tables

COLOURS = 8  # --series-0 to --series-7 of the style sheet
INK, MUTED, GRID, BAR = "#fe0100", "#fe0101", "#fe0102", "#fe0103"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", BAR: "bar"} | {
    f"#fe00{number:02x}": f"series-{number}" for number in range(COLOURS)
}
# Inches: narrow enough that text is still legible on a phone. Font sizes are in points, 72 to the inch.
WIDTH, HEIGHT = 5.6, 3.1
LABEL = 0.19  # inches between the labels beside a chart
FRAME = 0.6  # inches above and below the axes
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "grid.color": GRID,
    "lines.linewidth": 2,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Series:
    """A line over epochs, or a single point, with the text at its end.

    ``colour`` is a number among the page's colours, which repeat; ``faint`` lines are thin and dotted;
    a ``diamond`` is what was measured once, unlike a line of one epoch.
    """

    label: str
    epochs: Sequence[int]
    values: Sequence[float]
    colour: int
    faint: bool = False
    diamond: bool = False


def lines(
    title: str,
    series: Sequence[Series],
    *,
    percent: bool = False,
    changes: Sequence[tuple[int, str]] = (),
    from_zero: bool = False,
) -> Markup:
    """Lines over epochs, each with its label at its end.

    Args:
        title: for those who cannot see the chart; different for each chart of a page.
        series: what to draw; those with an empty label are explained by the others.
        percent: whether values are fractions, to be shown in percent.
        changes: epochs (the first is 1) at which something changes, and the text to write there.
        from_zero: whether the vertical axis begins at 0.
    """

    def draw(axes: Axes) -> None:
        values = [value for part in series for value in part.values]
        last = max(part.epochs[-1] for part in series)
        if percent:
            low = np.floor(10 * min(values)) / 10
            axes.set_ylim(low, max(np.ceil(10 * max(values)) / 10, low + 0.1))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        for part in series:
            colour = _colour(part.colour)
            width, dots = (1.2, (0, (1, 1.5))) if part.faint else (2.0, "-")
            axes.plot(part.epochs, part.values, color=colour, linewidth=width, linestyle=dots)
            marker = "D" if part.diamond else "o"
            axes.plot(
                part.epochs[-1], part.values[-1], marker, color=colour, markersize=5, clip_on=False
            )
        if from_zero:
            axes.set_ylim(0)
        axes.set_xlim(0.5, last + 0.5)
        for epoch, text in changes:
            if epoch > 1:
                axes.axvline(epoch - 0.5, color=GRID, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(
                text,
                (epoch - 0.5, 0),
                (3, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=MUTED,
                fontsize=9,
            )
        _label_ends(axes, [part for part in series if part.label], height)
        _label_ticks(axes)

    said = tables.percent if percent else _figure
    height = max(HEIGHT, LABEL * sum(bool(part.label) for part in series) + FRAME)
    ends = [
        f"{part.label or title}, from {said(part.values[0])} to {said(part.values[-1])}"
        if len(set(part.values)) > 1
        else part.label or f"{said(part.values[0])} in each epoch"
        for part in series
        if part.label or len(series) == 1
    ]
    return _chart(title, "; ".join([title, *ends]), height, draw)


def steps(title: str, epochs: Sequence[int], values: Sequence[float]) -> Markup:
    """A chart with one step for each epoch, as high as its value."""

    def draw(axes: Axes) -> None:
        axes.stairs(values, [epoch - 0.5 for epoch in (*epochs, epochs[-1] + 1)], fill=True, color=BAR)
        axes.set_xlim(0.5, epochs[-1] + 0.5)
        axes.set_ylim(0)
        _label_ticks(axes)

    middle = float(np.median(values))
    return _chart(title, f"{title}; the median is {_figure(middle)}", HEIGHT, draw)


def bars(title: str, labels: Sequence[str], fractions: Sequence[float], mean: float) -> Markup:
    """A bar for each label, in percent, and a line at the ``mean``."""

    def draw(axes: Axes) -> None:
        axes.barh(labels, [1.0] * len(labels), height=0.72, color=GRID)
        axes.barh(labels, fractions, height=0.72, color=BAR)
        axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (3, 3)))
        for place, fraction in enumerate(fractions):
            axes.text(1.03, place, tables.percent(fraction), va="center")
        axes.set_xlim(0, 1)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(visible=False)
        axes.spines.bottom.set_visible(False)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])

    said = [f"{label} {tables.percent(value)}" for label, value in zip(labels, fractions, strict=True)]
    return _chart(title, f"{title}: {', '.join(said)}", 0.5 + 0.34 * len(labels), draw)


def _chart(name: str, description: str, height: float, draw: Callable[[Axes], None]) -> Markup:
    # Without the reset a user's own matplotlib settings would change the pages.
    with style.context(STYLE | {"svg.hashsalt": name}, after_reset=True), warnings.catch_warnings():
        # Of a run's name in Chinese, say: the text is for the browser's fonts, not for matplotlib's.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=(WIDTH, height))
        draw(figure.subplots())
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    found = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', file.getvalue(), re.DOTALL)
    assert found is not None
    drawing = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", found[2], flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # the charts of a page would share these ids
    drawing = re.sub(r' style="[^"]*"', _restyle, drawing)
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'viewBox="{}" role="img" aria-label="{}">'
    )
    return head.format(found[1], description) + Markup(drawing + "</svg>")


def _restyle(attribute: re.Match[str]) -> str:
    text = re.sub(r"font-family: [^;\"]*;? ?", "", attribute[0])
    return re.sub("|".join(VARIABLES), lambda colour: f"var(--{VARIABLES[colour[0]]})", text)


def _label_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _label_ends(axes: Axes, series: Sequence[Series], height: float) -> None:
    """Write labels right of the axes, beside the ends of their lines but not over each other."""
    low, high = axes.get_ylim()
    ends = [(part.values[-1] - low) / (high - low) for part in series]
    for part, place in zip(series, _spread(ends, LABEL / (height - FRAME)), strict=True):
        axes.annotate(
            part.label,
            (part.epochs[-1], part.values[-1]),
            (1.025, place),
            textcoords="axes fraction",
            verticalalignment="center",
            color=_colour(part.colour),
            arrowprops={
                "alpha": 0.5,
                "arrowstyle": "-",
                "color": _colour(part.colour),
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Places near the given ones and in the same order, at least ``gap`` apart and at most 1."""
    order = sorted(range(len(places)), key=places.__getitem__)
    spread = list(places)
    for below, above in itertools.pairwise(order):
        spread[above] = max(spread[above], spread[below] + gap)
    highest = 1.0
    for place in reversed(order):
        spread[place] = min(spread[place], highest)
        highest = spread[place] - gap
    return spread


def _colour(number: int) -> str:
    return f"#fe00{number % COLOURS:02x}"


def _figure(value: float) -> str:
    return f"{value:.4g}"
