"""The frame of HTML reports: no script, no file beside them, pictures inside. Cells and sections are HTML."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence

import matplotlib

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#555555")  # told apart by all eyes
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; } figcaption, .note { color: #555; font-size: .9rem; }
.stack { display: flex; flex-wrap: wrap; gap: .3rem; align-items: center; margin: .4rem 0 1rem; }
.stack span { border: 2px solid; border-radius: .4rem; padding: .15rem .6rem; background: #fff; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .5rem; }
.gap { background: #fff4e5; padding: .6rem 1rem; border-left: 4px solid #e69f00; }
"""


def document(title: str, sections: Iterable[str]) -> str:
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def text(value: object) -> str:
    return html.escape(str(value))


def note(value: str) -> str:
    """A remark below a table, of plain text."""
    return f'<p class="note">{text(value)}</p>'


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def figure(drawn: Figure, caption: str) -> str:
    """The same picture gives the same text."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "madkernels", "svg.fonttype": "path"}):
        drawn.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    named = f'<svg role="img" aria-label="{text(caption)}"'
    return f"<figure>{named}{svg[svg.index('<svg') + 4 :]}<figcaption>{text(caption)}</figcaption></figure>"


def finish(axes: Axes) -> None:
    """Gives axes their common look. Logarithmic axes are labelled at ones and threes: more would run into one another."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter(FuncFormatter(_figure))
            axis.set_minor_formatter(NullFormatter())


def _figure(value: float, place: int | None = None) -> str:
    """Small numbers as they are, large ones with a power of ten."""
    if 1e-2 <= value < 1e4:
        return f"{value:g}"
    digits, power = f"{value:.0e}".split("e")
    times = "" if digits == "1" else rf"{digits}\times"
    return rf"$\mathdefault{{{times}10^{{{int(power)}}}}}$"


def swatch(label: str, colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>{text(label)}'


def gaps(lines: Sequence[str]) -> str:
    """What is missing, in a box; nothing where nothing is."""
    if not lines:
        return ""
    return '<div class="gap">' + "".join(f"<div>{text(line)}</div>" for line in lines) + "</div>"
