"""Tables that can be sorted, and read aloud."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.page.elements import Child, el


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a cell, and the number that it is sorted by, where that is not its text.

    `number` is nan where there is none; None sorts by the text.
    """

    content: Child
    number: float | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; `is_number` columns stand on the right, `is_wide` ones hold sentences."""

    title: str
    is_number: bool = False
    is_wide: bool = False


def table(
    name: str,
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Child | Cell]],
    *,
    kinds: Sequence[str] = (),
    subject: int = 0,
    is_tall: bool = False,
) -> ET.Element:
    """A table in a frame that scrolls.

    Args:
        name: id of the table; its rows are NAME-0, NAME-1, ….
        caption: for screen readers; the page has headings.
        columns: one per cell of a row.
        rows: what stands in them.
        kinds: per row what the filter chooses by.
        subject: the column that names the row.
        is_tall: scroll inside the page rather than with it.
    """
    head = el("tr", [_heading(column) for column in columns])
    body = [
        el(
            "tr",
            [_cell(c, column, i == subject) for i, (c, column) in enumerate(zip(row, columns, strict=True))],
            id=f"{name}-{index}",
            data_kind=kinds[index] if kinds else None,
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip
    made = el(
        "table",
        el("caption", caption),
        el("thead", head),
        el("tbody", body),
        id=name,
        class_="sortable",
    )
    classes = "scroll tall" if is_tall else "scroll"
    return el("div", made, class_=classes, role="region", aria_label=caption, tabindex="0")


def _heading(column: Column) -> ET.Element:
    button = el("button", column.title, type="button")
    return el(
        "th", button, scope="col", aria_sort="none", class_="right" if column.is_number else None
    )


def _cell(content: Child | Cell, column: Column, is_subject: bool) -> ET.Element:
    cell = content if isinstance(content, Cell) else Cell(content)
    number = None
    if cell.number is not None:
        # Inf is the largest of all: it must not be taken for a missing number.
        bounded = min(max(cell.number, -1e300), 1e300)
        number = "" if math.isnan(cell.number) else repr(bounded)
    if is_subject:
        classes = "subject right" if column.is_number else "subject"
        return el("th", cell.content, scope="row", class_=classes, data_v=number)
    kind = "right" if column.is_number else "wide" if column.is_wide else None
    return el("td", cell.content, class_=kind, data_v=number)


def share(value: float, text: str) -> Cell:
    """A share with a bar."""
    bar = el("span", el("i", style=f"width:{100 * value:.1f}%"), class_="bar", aria_hidden="true")
    return Cell([text, bar], value)


def name(text: str) -> ET.Element:
    """A name from the model."""
    return el("span", text, class_="name")
