"""The parts of a report's page about operators and activations: what runs, on which grids, and how long it took."""

from __future__ import annotations

import math
import statistics

from qgraph.page import charts, numbers, tables
from qgraph.page.charts import Mark
from qgraph.page.elements import Child, el
from qgraph.page.tables import Cell, Column
from qgraph.report import Report, Shift, megabytes


def content(report: Report) -> list[Child]:
    """Kernels with their share of the work, and every operator that multiplies."""
    if not report.operators:
        return _by_weight(report)
    total = sum(o.macs for o in report.operators) or 1
    columns = (
        Column("Kernel"), Column("Multiplies"), Column("Operators", True),
        Column("Share of multiplications", True),
    )  # fmt: skip
    rows: list[list[Child | Cell]] = [
        [runs or "not told", _kind(is_integer, runs), Cell(f"{count:,}", float(count)),
         tables.share(macs / total, numbers.percent(macs / total))]
        for runs, is_integer, count, macs in report.kernels()
    ]  # fmt: skip
    told = "Read from the graph that the runtime made of the file; multiplications are those of one sample."
    return [
        el("p", told),
        tables.table("kernels-table", "Kernels", columns, rows),
        el(
            "details",
            el("summary", f"Every operator ({len(report.operators)})"),
            _operators(report),
        ),
    ]


def _by_weight(report: Report) -> list[Child]:
    """What runs for the weights, where no multiplications were counted."""
    asked = any(e.runs for e in report.ledger)
    found: dict[str, list[int]] = {}
    for entry in report.quantized:
        for kernel in dict.fromkeys(entry.runs or entry.forms):
            found.setdefault(kernel, []).append(entry.stored_bytes)
    if not found:
        return []
    told = (
        "Read from the graph that the runtime made of the file, for each quantized weight."
        if asked
        else f"The runtime of target {report.target} was not asked; these are the forms that were written."
    )
    columns = (
        Column("Kernel" if asked else "Form"),
        Column("Weights", True),
        Column("Their bytes", True),
    )
    rows: list[list[Child | Cell]] = [
        [
            kernel,
            Cell(f"{len(sizes):,}", float(len(sizes))),
            Cell(megabytes(sum(sizes)), float(sum(sizes))),
        ]
        for kernel, sizes in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]
    return [el("p", told), tables.table("kernels-table", "Kernels", columns, rows)]


def _kind(is_integer: bool, runs: str) -> str:
    return "integers" if is_integer else "floats" if runs else ""


def _operators(report: Report) -> Child:
    columns = (
        Column("Operator"), Column("Type"), Column("Weight"), Column("Multiplications", True),
        Column("What runs"), Column("Multiplies"), Column("Why not integers", is_wide=True),
    )  # fmt: skip
    rows: list[list[Child | Cell]] = [
        [tables.name(o.name or o.output), o.op, tables.name(o.weight), Cell(f"{o.macs:,}", float(o.macs)),
         o.runs, _kind(o.integer, o.runs), f"{o.code} {o.reason}".strip()]
        for o in report.operators
    ]  # fmt: skip
    return tables.table("operators", "Operators that multiply", columns, rows, is_tall=True)


def activations(report: Report) -> list[Child]:
    """What passes did to the channels, and the grids."""
    passes = dict.fromkeys(s.pass_name for s in report.shifts)
    found: list[Child] = [
        _shifts(name, [s for s in report.shifts if s.pass_name == name]) for name in passes
    ]
    if report.activations:
        found.append(_grids(report))
    return found


def _shifts(name: str, shifts: list[Shift]) -> Child:
    marks = [
        Mark(f"{s.value}: {_spread(s.before.spread)} → {_spread(s.after.spread)}", s.after.spread, s.before.spread)
        for s in shifts
    ]  # fmt: skip
    middles = [
        statistics.median(getattr(s, side).spread for s in shifts) for side in ("before", "after")
    ]
    told = (
        f"Median {_spread(middles[0])} → {_spread(middles[1])}, "
        f"worst {_spread(max(s.before.spread for s in shifts))} → {_spread(max(s.after.spread for s in shifts))}."
    )
    description = (
        f"Largest over median channel of {numbers.count(len(shifts), 'activation')} "
        f"before and after {name}. {told}"
    )
    columns = (
        Column("Activation"), Column("Channels", True), Column("Largest before", True),
        Column("Largest after", True), Column("Median before", True), Column("Median after", True),
        Column("Spread before", True), Column("Spread after", True),
    )  # fmt: skip
    rows: list[list[Child | Cell]] = [
        [tables.name(s.value), Cell(f"{s.channels:,}", float(s.channels)),
         *(Cell(numbers.short(v), v) for v in (s.before.largest, s.after.largest, s.before.median, s.after.median)),
         *(Cell(_spread(v), v) for v in (s.before.spread, s.after.spread))]
        for s in shifts
    ]  # fmt: skip
    table = tables.table(
        f"shifts-{name}", f"Channels before and after {name}", columns, rows, is_tall=True
    )
    return [
        charts.figure(
            f"Outlier channels before and after {name}",
            "How far the largest channel of each activation that a product reads stands out of the median channel: "
            f"lower is easier on one grid. {told}",
            charts.shifts(marks, description),
            legend=charts.legend([("ring", "before"), (charts.colour(0), "after")]),
        ),
        el("details", el("summary", f"Every activation ({len(shifts)})"), table),
    ]


def _spread(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{value:.1f}x"


def _grids(report: Report) -> Child:
    columns = (
        Column("Activation"), Column("Codes"), Column("From", True), Column("To", True), Column("Step", True),
        Column("Zero", True), Column("Range by"), Column("Shares the grid of"), Column("Why", is_wide=True),
    )  # fmt: skip
    rows: list[list[Child | Cell]] = [
        [tables.name(a.value), a.spec, Cell(numbers.short(a.low), a.low), Cell(numbers.short(a.high), a.high),
         Cell(numbers.short(a.scale), a.scale), Cell(str(a.zero_point), float(a.zero_point)), a.method,
         tables.name(a.shares) if a.shares else "", a.reason]
        for a in report.activations
    ]  # fmt: skip
    table = tables.table("grids", "Grids of activations", columns, rows, is_tall=True)
    return el("details", el("summary", f"Calibrated grids ({len(report.activations)})"), table)


def seconds(report: Report) -> Child:
    """How long each pass took."""
    total = sum(report.seconds.values())
    columns = (Column("Step"), Column("Seconds", True), Column("Share", True))
    rows: list[list[Child | Cell]] = [
        [name, Cell(f"{value:.2f}", value),
         tables.share(value / total if total else 0.0, numbers.percent(value / total if total else 0.0))]
        for name, value in report.seconds.items()
    ]  # fmt: skip
    table = tables.table("seconds", "Seconds of each step", columns, rows)
    return el("details", el("summary", f"Time of each step ({total:.1f} s)"), table)
