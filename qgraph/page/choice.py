"""The part of a report's page about recipe `auto`: what each form measured, and what each class of operators got."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qgraph.page import numbers, tables
from qgraph.page.elements import Child, el
from qgraph.page.tables import Cell, Column


def content(choice: Mapping[str, Any]) -> list[Child]:
    """Whole models by form, then classes; nothing where nothing was chosen by measurement."""
    if not choice:
        return []
    return [
        el("h3", "What was measured to choose"),
        el("p", f"Times are {choice.get('clock', 'processor')} time of one thread, by turns."),
        _uniform(choice.get("uniform", {})),
        _classes(choice.get("classes", ())),
    ]


def _uniform(forms: Mapping[str, Mapping[str, Any]]) -> Child:
    columns = (
        Column("Everything as"),
        Column("Time against float", True),
        Column("Worst output", True),
    )
    rows: list[list[Child | Cell]] = [
        [form, _ratio(found.get("ratio")), _noise(found.get("sqnr_db"))]
        for form, found in forms.items()
    ]
    return tables.table("uniform", "Whole models in one form", columns, rows) if rows else None


def _classes(classes: Any) -> Child:
    columns = (
        Column("Class of operators"), Column("Got"), Column("Weights", True),
        Column("Time of the model by its form, against the one it had when it was tried", is_wide=True),
    )  # fmt: skip
    rows: list[list[Child | Cell]] = []
    for each in classes:
        times = ", ".join(f"{form} {float(t):.2f}x" for form, t in each["times"].items())
        count = len(each["weights"])
        rows.append(
            [each["name"], each["form"], Cell(str(count), float(count)), times or "not timed"]
        )
    return tables.table("classes", "Classes of operators", columns, rows) if rows else None


def _ratio(value: float | None) -> Cell:
    return Cell("", math.nan) if value is None else Cell(f"{value:.2f}x", float(value))


def _noise(value: Any) -> Cell:
    number = math.nan if value is None else float(value)
    return Cell(numbers.decibels(number), number)
