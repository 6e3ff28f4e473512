"""Pictures of results: small panels, which a page sets side by side and a file holds in a grid.

In a page they are SVG with real text, and take their colours from the page: dark on light, or light on dark.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

INK = "#1a1a1a"  # of text and axes
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#555555")  # told apart by all eyes
ON_DARK = ("#5aa9ff", "#ff8b3d", "#2fc79a", "#e8a5cd", "#f3c04b", "#a8e0ff", "#c9988c", "#b0b0b0")  # the same on a dark page
GREY = "#999999"
MOST_TICKS = 4  # of a logarithmic axis: more would run into one another
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SIZE, SMALL = (3.8, 2.6), (1.56, 1.7)  # inches: 365 and 150 pixels wide at the least
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,  # points: 12 pixels
    "axes.titlesize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,
    "svg.hashsalt": "madkernels",
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title, and what is drawn into it."""

    title: str
    draw: Callable[[Axes], None]
    small: bool = False


def svg(panels: Sequence[Panel], same_y: bool) -> list[str]:
    """Each panel as an SVG element of its own."""
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none"}):
        figures = [Figure(figsize=SMALL if panel.small else SIZE, dpi=72, layout="constrained") for panel in panels]
        _draw(panels, [figure.subplots() for figure in figures], same_y)
        return [_element(figure, panel.title) for figure, panel in zip(figures, panels, strict=True)]


def picture(
    path: Path,
    panels: Sequence[Panel],
    colours: Mapping[str, str] | None = None,
    *,
    title: str = "",
    columns: int = 1,
    same_y: bool = False,
) -> None:
    """Writes panels and their legend as one picture on white, in the format that the suffix names.

    Raises:
        ValueError: the suffix is of no known format.
    """
    rows = math.ceil(len(panels) / columns)
    width, height = SMALL if panels[0].small else SIZE
    longest = max(map(len, colours), default=0) if colours else 0
    across = max(1, int(width * columns / (0.5 + 0.08 * longest)))  # names of the legend in a row, in inches
    below = 0.2 * math.ceil(len(colours or ()) / across)
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "path"}):
        figure = Figure(figsize=(width * columns, height * rows + below + 0.3), layout="constrained", facecolor="white")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        _draw(panels, [next(grid) for _ in panels], same_y)
        for unused in grid:
            unused.set_axis_off()
        if title:
            figure.suptitle(title, fontsize=10)
        if colours:
            handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
            figure.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def colour_variables(on_dark: bool) -> dict[str, str]:
    """The colours of a page by the names of its CSS variables."""
    return {_variable(colour): dark if on_dark else colour for colour, dark in zip(COLOURS, ON_DARK, strict=True)}


def css(colour: str) -> str:
    """A colour as it stands in a page: one of COLOURS follows the page's light and dark."""
    return f"var({_variable(colour)})" if colour in COLOURS else colour


def _variable(colour: str) -> str:
    return f"--c{COLOURS.index(colour)}"


def _draw(panels: Sequence[Panel], places: Sequence[Axes], same_y: bool) -> None:
    for panel, axes in zip(panels, places, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.25)
        panel.draw(axes)
        axes.set_title(textwrap.fill(panel.title, 20 if panel.small else 44))
    if same_y:
        low, high = min(axes.get_ylim()[0] for axes in places), max(axes.get_ylim()[1] for axes in places)
        for axes in places:
            axes.set_ylim(low, high)
    for axes in places:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _label_logarithm(axis)


def _label_logarithm(axis: Axis) -> None:
    low, high = sorted(axis.get_view_interval())
    ticks = log_ticks(low, high)
    axis.set_ticks(ticks, [number(tick, max(ticks) < 1e5) for tick in ticks])
    axis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Two to MOST_TICKS round numbers from low to high: 1, 2, 5 or fewer of each power of ten, or evenly spaced ones."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [tick for power in powers for digit in digits if low <= (tick := digit * 10.0**power) <= high]
        if 2 <= len(ticks) <= MOST_TICKS:
            return ticks
    if len(ticks) > MOST_TICKS:
        return ticks[:: math.ceil(len(ticks) / MOST_TICKS)]
    return [float(tick) for tick in MaxNLocator(3).tick_values(low, high) if low <= tick <= high]


def number(value: float, plain: bool) -> str:
    """A short label: the number as it is, or with a power of ten."""
    if plain and value >= 1e-2:
        return f"{value:,g}"
    digits, power = f"{value:.2e}".split("e")
    digits = digits.rstrip("0").rstrip(".")
    raised = "10" + str(int(power)).translate(SUPERSCRIPTS)
    return raised if digits == "1" else f"{digits}\u00d7{raised}"


def _element(figure: Figure, title: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :]).replace(INK, "currentColor")
    for colour in COLOURS:
        text = text.replace(colour, css(colour))
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
