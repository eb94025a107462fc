"""The parts of a report's page about weights: error and bytes as plots, and the ledger."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from qgraph.page import charts, numbers, tables
from qgraph.page.charts import Mark
from qgraph.page.elements import Child, el
from qgraph.page.tables import Cell, Column
from qgraph.report import Entry, Report, megabytes

FLOAT = "float"


def kinds(report: Report) -> dict[str, int]:
    """How weights are stored → number of the colour; most bytes first, float last."""
    sizes: dict[str, int] = {}
    for entry in report.quantized:
        sizes[entry.spec] = sizes.get(entry.spec, 0) + entry.float_bytes
    order = sorted(sizes, key=lambda spec: (-sizes[spec], spec))
    return {
        **{spec: min(i, charts.COLOURS - 2) for i, spec in enumerate(order)},
        FLOAT: charts.COLOURS - 1,
    }


def plots(report: Report) -> list[Child]:
    """Where the bytes are, the error of each weight, and the bytes of each weight."""
    if not report.ledger:
        return []
    colours = kinds(report)
    return [_whole(report, colours), _errors(report, colours), _sizes(report, colours)]


def _legend(
    report: Report, colours: Mapping[str, int], *, with_float: bool
) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for entry in report.ledger:
        counts[entry.spec or FLOAT] = counts.get(entry.spec or FLOAT, 0) + 1
    return [
        (charts.colour(number), f"{spec} ({numbers.count(counts[spec], 'weight')})")
        for spec, number in colours.items()
        if counts.get(spec) and (with_float or spec != FLOAT)
    ]


def _whole(report: Report, colours: Mapping[str, int]) -> Child:
    stored: dict[str, int] = {}
    for entry in report.ledger:
        stored[entry.spec or FLOAT] = stored.get(entry.spec or FLOAT, 0) + entry.stored_bytes
    before = sum(e.float_bytes for e in report.ledger)
    pieces = [(s, stored[s], charts.colour(n)) for s, n in colours.items() if stored.get(s)]
    rows = [("before", [("before", before, "before")]), ("after", pieces)]
    told = ", ".join(f"{megabytes(size)} as {spec}" for spec, size, _ in pieces)
    return charts.figure(
        "Where the bytes of the weights are",
        "Codes, scales and zero points of all weights of the ledger, by how they are stored.",
        charts.stacked(rows, f"Weights took {megabytes(before)} before; now {told}."),
        legend=charts.legend(_legend(report, colours, with_float=True)),
    )


def _errors(report: Report, colours: Mapping[str, int]) -> Child:
    rows = [(i, e, e.sqnr_db) for i, e in enumerate(report.ledger) if e.sqnr_db is not None]
    if not rows:
        return None
    marks = [
        Mark(
            f"{e.label}: {numbers.decibels(db)} as {e.spec}",
            db,
            kind=colours[e.spec],
            row=f"ledger-{i}",
        )
        for i, e, db in rows
    ]
    _, worst, least = min(rows, key=lambda row: row[2])
    middle = statistics.median(db for _, _, db in rows)
    range_told = (
        f"Median {numbers.decibels(middle)}, worst {numbers.decibels(least)} at {worst.label}."
    )
    description = (
        f"Signal to quantization noise of {numbers.count(len(rows), 'weight')}. {range_told}"
    )
    return charts.figure(
        "Error of each weight",
        f"Signal to quantization noise of the weight itself; higher is better. {range_told}",
        charts.errors(marks, description),
        legend=charts.legend(_legend(report, colours, with_float=False)),
    )


def _sizes(report: Report, colours: Mapping[str, int]) -> Child:
    marks = [
        Mark(
            f"{e.label}: {megabytes(e.float_bytes)} → {megabytes(e.stored_bytes)} as {e.spec or FLOAT}",
            e.stored_bytes, e.float_bytes, colours[e.spec or FLOAT], f"ledger-{i}",
        )
        for i, e in enumerate(report.ledger)
    ]  # fmt: skip
    largest = max(report.ledger, key=lambda e: e.stored_bytes)
    total = sum(e.stored_bytes for e in report.ledger)
    share = numbers.percent(largest.stored_bytes / total if total else 0.0)
    description = (
        f"Bytes of {numbers.count(len(marks), 'weight')}; the largest is {largest.label} with "
        f"{megabytes(largest.stored_bytes)}, {share} of all."
    )
    return charts.figure(
        "Bytes of each weight",
        f"Before (grey) and after (coloured). The largest is {largest.label} with {megabytes(largest.stored_bytes)}, "
        f"{share} of all.",
        charts.sizes(marks, description),
        legend=charts.legend([("before", "before"), *_legend(report, colours, with_float=True)]),
    )


COLUMNS = (
    Column("Weight"), Column("Stored as"), Column("Bits", True), Column("Before", True), Column("After", True),
    Column("SQNR", True), Column("What runs"), Column("Why", is_wide=True),
)  # fmt: skip


def content(report: Report) -> list[Child]:
    """The groups, what stays float, and the ledger with its filter."""
    if not report.ledger:
        return [el("p", "This model has no weights that qgraph can quantize.")]
    colours = kinds(report)
    rows = [_row(entry, colours) for entry in report.ledger]
    stored = [e.spec or FLOAT for e in report.ledger]
    told = (
        "One row for each weight. A search takes any words of a row, such as a layer, an operator, a code or a rule; "
        "a click on a heading sorts."
    )
    return [
        _groups(report),
        _floats(report),
        el("h3", "Ledger"),
        el("p", told),
        _tools(colours, stored),
        tables.table("ledger", "Ledger of weights", COLUMNS, rows, kinds=stored, is_tall=True),
    ]


def _tools(colours: Mapping[str, int], stored: list[str]) -> Child:
    options = [
        el("option", f"{spec} ({stored.count(spec)})", value=spec)
        for spec in colours
        if spec in stored
    ]
    everything = el("option", f"all ({len(stored)})", value="")
    return el(
        "form",
        el("label", "Search", el("input", type="search", placeholder="layers.0 MatMul")),
        el("label", "Stored as", el("select", everything, options)),
        el("output", "", role="status"),
        class_="tools",
        data_table="ledger",
        hidden=True,
    )


def _row(entry: Entry, colours: Mapping[str, int]) -> list[Child | Cell]:
    stored, elements = entry.spec or FLOAT, math.prod(entry.shape)
    bits = 8 * entry.stored_bytes / elements if elements else math.nan
    sqnr = math.nan if entry.sqnr_db is None else entry.sqnr_db
    known = entry.weight if entry.weight != entry.label else None
    operators = ", ".join(f"{k} x{v}" if v > 1 else k for k, v in entry.operators.items())
    why: Child = [el("code", entry.code), " ", entry.reason] if entry.code else entry.reason
    is_news = entry.by.removeprefix("rule ") not in entry.reason
    shape = "x".join(map(str, entry.shape))
    return [
        [
            tables.name(entry.label),
            el("div", tables.name(known), class_="soft") if known else None,
            el("div", f"{operators}, {shape}", class_="soft"),
        ],
        [
            el("span", swatch(colours[stored]), stored, class_="spec"),
            el("div", f"inputs {entry.activation}", class_="soft spec")
            if entry.activation
            else None,
        ],
        Cell(f"{bits:.2f}" if elements else "", bits),
        Cell(megabytes(entry.float_bytes), float(entry.float_bytes)),
        Cell(megabytes(entry.stored_bytes), float(entry.stored_bytes)),
        Cell(numbers.decibels(entry.sqnr_db), sqnr),
        ", ".join(dict.fromkeys(entry.runs or entry.forms)),
        [why, el("div", f"decided by {entry.by}", class_="soft") if is_news else None],
    ]


def swatch(kind: int) -> Child:
    """A small square in a kind's colour."""
    square = el("rect", width=10, height=10, rx=2, class_=charts.colour(kind))
    return el("svg", square, viewBox="0 0 10 10", class_="swatch", aria_hidden="true")


def _groups(report: Report) -> Child:
    if not report.quantized:
        return None
    columns = (
        Column("Operators"), Column("Stored as"), Column("What runs"), Column("Weights", True),
        Column("Before", True), Column("After", True), Column("Worst SQNR", True),
    )  # fmt: skip
    rows: list[list[Child | Cell]] = [
        [
            operators, spec, runs, Cell(f"{count:,}", float(count)),
            Cell(megabytes(before), float(before)), Cell(megabytes(after), float(after)),
            Cell(numbers.decibels(worst), worst),
        ]
        for operators, spec, runs, count, before, after, worst in report.groups()
    ]  # fmt: skip
    table = tables.table("groups", "What was quantized, in groups", columns, rows)
    return [el("h3", "Quantized"), table]


def _floats(report: Report) -> Child:
    stayed = report.stayed_float()
    if not stayed:
        return None
    columns = (
        Column("Code"),
        Column("Why", is_wide=True),
        Column("Weights", True),
        Column("Size", True),
    )
    rows: list[list[Child | Cell]] = [
        [
            el("code", code),
            reason,
            Cell(f"{count:,}", float(count)),
            Cell(megabytes(size), float(size)),
        ]
        for code, reason, count, size in stayed
    ]
    return [
        el("h3", "Float, and why"),
        tables.table("floats", "What stays float, and why", columns, rows),
    ]
