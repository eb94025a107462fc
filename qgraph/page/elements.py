"""HTML and SVG as trees of the standard library: whatever is text is escaped, because nothing is ever pasted together.

el("td", "a < b", class_="name")        <td class="name">a &lt; b</td>
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from typing import TypeAlias

Child: TypeAlias = "ET.Element | str | Iterable[Child] | None"

# Characters that a browser would drop or that would hide what stands there: shown as their pictures.
_SHOWN = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_SHOWN |= {0x7F: 0x2421, **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)}
_SHOWN |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def el(tag: str, *children: Child, **attributes: str | float | bool | None) -> ET.Element:
    """An element.

    Args:
        tag: its name.
        children: elements, text, or lists of them; None is left out.
        attributes: a trailing "_" is dropped and "_" stands for "-"; True is an empty attribute, None and False none.
    """
    made = ET.Element(tag)
    for key, value in attributes.items():
        if value is not None and value is not False:
            name = key.rstrip("_").replace("_", "-")
            made.set(name, "" if value is True else shown(str(value)))
    _append(made, children)
    return made


def _append(parent: ET.Element, children: Iterable[Child]) -> None:
    for child in children:
        if child is None:
            continue
        if isinstance(child, ET.Element):
            parent.append(child)
        elif isinstance(child, str):
            _append_text(parent, shown(child))
        else:
            _append(parent, child)


def _append_text(parent: ET.Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text


def shown(text: str) -> str:
    r"""The text with control characters made visible, direction overrides and lone surrogates replaced.

    >>> shown("a\x00b")
    'a␀b'
    """
    return text.translate(_SHOWN)


def html(root: ET.Element) -> str:
    """The document as text."""
    return "<!doctype html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"
