"""The page of one evaluation: its figures, its tables, and the error of every layer as a plot."""

from __future__ import annotations

import os
import shlex

import qgraph
from qgraph.evaluate.findings import Findings, Shown, Table
from qgraph.evaluate.isolated import TensorLoss
from qgraph.page import charts, numbers, tables
from qgraph.page.charts import Mark
from qgraph.page.document import Section, Tile, page
from qgraph.page.elements import Child, el
from qgraph.page.tables import Cell, Column


def of_findings(found: Findings) -> str:
    """The whole page, HTML in UTF-8."""
    lead: list[Child] = [f"{found.kind.capitalize()} of ", el("code", found.model)]
    if found.float_model:
        lead += [" against ", el("code", found.float_model)]
    sections = [
        *(
            Section(f"part-{i}", t.title, _table(f"table-{i}", t))
            for i, t in enumerate(found.tables)
        ),
        Section("plot", "Errors in the order of the model", _plots(found)),
        Section("how", "How it was measured", [el("p", sentence) for sentence in found.how]),
        Section("reproduce", "Doing it again", _command(found.command)),
    ]
    tiles = [Tile(f.title, f.text, f.note) for f in found.figures]
    name = os.path.basename(found.model) or found.model
    return page(
        name,
        f"qgraph eval {found.kind}",
        [*lead, "."],
        tiles,
        sections,
        el("p", f"qgraph {qgraph.__version__}"),
    )


def _table(name: str, table: Table) -> list[Child]:
    columns = [Column(c.lstrip(">"), is_number=c.startswith(">")) for c in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    return [tables.table(name, table.title, columns, rows, is_tall=len(rows) > 20)]


def _cell(cell: Shown) -> Cell:
    return Cell(cell) if isinstance(cell, str) else Cell(*cell)


def _plots(found: Findings) -> list[Child]:
    lossy = [t for t in found.losses if t.isolated.sqnr_db < float("inf")]
    if not lossy:
        return []
    return [
        _plot("Isolated", "What each operator loses by itself", lossy, kind=0),
        _plot(
            "Accumulated", "What has arrived, with the error of all operators before", lossy, kind=1
        ),
    ]


def _plot(which: str, meaning: str, losses: list[TensorLoss], *, kind: int) -> Child:
    values = [getattr(t, which.lower()).sqnr_db for t in losses]
    marks = [
        Mark(f"{t.operator}, {t.name}: {numbers.decibels(db)}", db, kind=kind)
        for t, db in zip(losses, values, strict=True)
    ]
    worst = min(marks, key=lambda m: m.value)
    told = f"Signal to noise; higher is better. Worst: {worst.told}."
    drawing = charts.errors(marks, f"{which} error of {len(marks)} values. {told}", what="values")
    return charts.figure(f"{which}: {meaning[0].lower()}{meaning[1:]}", told, drawing)


def _command(command: list[str]) -> list[Child]:
    return [el("pre", shlex.join(command), class_="command")] if command else []
