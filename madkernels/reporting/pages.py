"""HTML reports: each is one file, with its style, its script and its pictures inside. The script only sorts tables,
and loads a page that is served again when it has changed.

Titles, cells and lines are plain text, which is escaped, or :class:`markupsafe.Markup`, which is HTML already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from madkernels.reporting.figures import Panel, colour_variables, css, svg

MADE_BY = '<meta name="generator" content="madkernels">'
WIDE, MANY = 4, 9  # columns: from these on the rows of a table are cards in a narrow window, or are set closer
_TEMPLATES = Environment(
    loader=PackageLoader("madkernels.reporting"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_TEMPLATES.globals |= {
    "MADE_BY": Markup(MADE_BY),
    "MANY": MANY,
    "colour_variables": colour_variables,
    "css": css,
}


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, HTML."""

    title: str
    parts: Sequence[Markup]

    @property
    def anchor(self) -> str:
        """The name that the table of contents links to."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def document(
    title: str, facts: str, gaps: Sequence[str], sections: Iterable[Section | None], *, version: str | None = None
) -> str:
    """A whole page.

    Args:
        facts: a line below the title.
        gaps: what is missing or cannot be trusted, told first.
        version: of a page that is served: it loads itself again once the server has another one.
    """
    kept = [section for section in sections if section]
    return str(_render("page.html", title=title, facts=facts, gaps=gaps, sections=kept, version=version)) + "\n"


def is_page(path: Path) -> bool:
    """Whether the file is a report, which another one may take the place of."""
    return path.is_file() and MADE_BY.encode() in path.read_bytes()


def table(head: Sequence[str], lines: Iterable[Sequence[str]], *, cards: bool = False) -> Markup:
    """Rows under column names. The first cell of a row names it.

    Args:
        cards: in a narrow window rows are cards, however few columns there are.
    """
    return _render("table.html", head=head, lines=lines, cards=cards or len(head) >= WIDE)


def figure(
    panels: Sequence[Panel], caption: str, colours: Mapping[str, str] | None = None, *, same_y: bool = False
) -> Markup:
    """Panels side by side, as many as the window has room for, over one legend: colours by name.

    The same panels give the same text.
    """
    drawn = [Markup(picture) for picture in svg(panels, same_y)]
    return _render("figure.html", panels=drawn, caption=caption, colours=colours or {}, small=panels[0].small)


def note(value: str) -> Markup:
    """A remark, of plain text."""
    return Markup('<p class="note">{}</p>').format(value)


def heading(value: str) -> Markup:
    """A heading within a section."""
    return Markup("<h3>{}</h3>").format(value)


def link(label: str, address: str) -> Markup:
    """A name that leads somewhere."""
    return Markup('<a href="{}">{}</a>').format(address, label)


def beside(*parts: Markup) -> Markup:
    """Parts next to each other where the window is wide enough."""
    return Markup('<div class="beside">{}</div>').format(Markup("").join(parts))


def swatch(label: str, colour: str) -> Markup:
    """A name with its colour before it."""
    return _render("swatch.html", label=label, colour=colour)


def chain(boxes: Iterable[tuple[str, str]]) -> Markup:
    """Boxes with arrows between them, from tokens to logits: names and the colours of their frames."""
    return _render("chain.html", boxes=boxes)


def _render(name: str, **values: Any) -> Markup:
    return Markup(_TEMPLATES.get_template(name).render(**values))
