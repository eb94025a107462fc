"""The shell of a page: one file that needs no network and lets nothing run but its own script."""

from __future__ import annotations

import base64
import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from qgraph.page.elements import Child, el, html

_SECURITY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{}'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure of the headline: what it is, how much, and a note."""

    title: str
    figure: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page; `key` is its anchor."""

    key: str
    title: str
    content: Sequence[Child]


def page(
    title: str,
    kind: str,
    lead: Child,
    tiles: Sequence[Tile],
    sections: Sequence[Section],
    footer: Child,
) -> str:
    """The whole page as text.

    Args:
        title: what the page is about, a model's name.
        kind: what page it is.
        lead: one or two sentences below the title.
        tiles: the headline's figures.
        sections: in order; those without content are left out.
        footer: what stands at the end.
    """
    kept = [s for s in sections if any(c is not None for c in s.content)]
    script = _own("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_SECURITY.format(digest)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content="qgraph"),
        # An icon of its own, or browsers look for one.
        el("link", rel="icon", href="data:,"),
        el("title", f"{title} · {kind}"),
        el("style", _own("page.css")),
    )
    top = el(
        "header",
        el("div", kind, class_="kind"),
        el("h1", title),
        el("p", lead, class_="lead"),
        el("dl", [_tile(t) for t in tiles], class_="tiles") if tiles else None,
    )
    links = el("ul", [el("li", el("a", s.title, href=f"#{s.key}")) for s in kept])
    body = el(
        "body",
        el("a", "Skip to the content", href="#content", class_="skip"),
        top,
        el("nav", links, aria_label="Parts of this page"),
        el("main", [_section(s) for s in kept], id="content"),
        el("footer", el("div", footer)),
        el("script", script),
    )
    return html(el("html", head, body, lang="en"))


def _tile(tile: Tile) -> ET.Element:
    return el(
        "div",
        el("dt", tile.title),
        el("dd", tile.figure, class_="figure"),
        el("dd", tile.note, class_="note") if tile.note else None,
        class_="tile",
    )


def _section(section: Section) -> ET.Element:
    heading = el("h2", section.title, id=f"{section.key}-title")
    return el(
        "section", heading, section.content, id=section.key, aria_labelledby=f"{section.key}-title"
    )


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
