"""The parts of a report's page that tell what was lost and what was gained, as measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import compress
from typing import Any, TypeAlias

from qgraph.page import choice, numbers, tables
from qgraph.page.document import Tile
from qgraph.page.elements import Child, el
from qgraph.page.tables import Cell, Column
from qgraph.report import Report

Form: TypeAlias = Callable[[float], str]


def tiles(report: Report) -> list[Tile]:
    """Figures for the headline: the worst output counts."""
    found = []
    ratio = report.latency.get("ratio")
    if ratio is not None:
        quartiles = (
            f"{report.latency['lower_quartile']:.2f} to {report.latency['upper_quartile']:.2f}"
        )
        found.append(
            Tile("Time of the model", f"{ratio:.2f}x", f"quartiles {quartiles}, one thread")
        )
    outputs = report.metrics.get("outputs", ())
    sample = numbers.count(int(report.metrics.get("samples", 0)), "sample")
    noise = [number(o["error"]["sqnr_db"]) for o in outputs if o["error"]]
    if noise:
        note = f"signal to noise, {sample}"
        found.append(Tile("Worst output", numbers.decibels(min(noise)), note))
    judged = [o["divergence"] for o in outputs if o["divergence"]]
    if judged:
        worst = max(judged, key=lambda d: number(d["kl_mean"]["value"]))["kl_mean"]
        found.append(
            Tile("KL divergence", numbers.short(number(worst["value"])), f"nats, {sample}")
        )
        least = min(judged, key=lambda d: number(d["agreement"]["value"]))["agreement"]
        note = interval(least, numbers.percent) or sample
        found.append(Tile("Same top-1", numbers.percent(number(least["value"])), note))
    return found


def number(value: Any) -> float:
    """A number of a metric: those that are not finite are written as text."""
    return float(value)


def interval(estimate: Mapping[str, Any], form: Form) -> str:
    """The 95 % interval of an estimate; "" where there is none."""
    if estimate["low"] is None or estimate["high"] is None:
        return ""
    return f"95 %: {form(number(estimate['low']))} to {form(number(estimate['high']))}"


def content(report: Report) -> list[Child]:
    """Outputs, latency, and what accuracy control or recipe auto measured."""
    return [
        outputs_table(report.metrics.get("outputs", ()), report.metrics.get("samples", 0)),
        _latency(report.latency),
        *choice.content(report.choice),
        *_given_back(report.control, "so that the accuracy floors hold", 0),
        *(
            _given_back(each, f"after the choice: {each['for']}", number)
            for number, each in enumerate(report.choice.get("given_back", ()), 1)
        ),
    ]


def outputs_table(outputs: Any, samples: int) -> Child:
    """One row per output: its noise, and divergence and agreement where it holds predictions."""
    if not outputs:
        return None
    columns = [
        Column("Output"), Column("SQNR", True), Column("Largest error", True), Column("Cosine", True),
        Column("Mean KL (nats)", True), Column("KL 99 %", True), Column("KL worst", True),
        Column("Same top-1", True), Column("Equal", True),
    ]  # fmt: skip
    figures = [_figures(o) for o in outputs]
    is_used = [any(row[i].content for row in figures) for i in range(len(columns) - 1)]
    rows: list[list[Child | Cell]] = [
        [tables.name(o["name"]), *compress(row, is_used)]
        for o, row in zip(outputs, figures, strict=True)
    ]
    columns = list(compress(columns, [True, *is_used]))
    told = (
        f"Against the float model, on {numbers.count(int(samples), 'sample')}. "
        "SQNR is the signal to quantization noise."
    )
    return [el("p", told), tables.table("outputs", "Accuracy of each output", columns, rows)]


def _figures(output: Mapping[str, Any]) -> list[Cell]:
    error, divergence, equal = output["error"], output["divergence"], output["equal"]
    blank = Cell("", math.nan)
    cells = 8 * [blank]
    if error:
        sqnr, largest, cosine = (number(error[k]) for k in ("sqnr_db", "max_abs", "cosine"))
        cells[:3] = (
            Cell(numbers.decibels(sqnr), sqnr),
            Cell(numbers.short(largest), largest),
            Cell(f"{cosine:.5f}", cosine),
        )
    if divergence:
        tail = [number(divergence[k]) for k in ("kl_p99", "kl_max")]
        cells[3:7] = (
            estimate_cell(divergence["kl_mean"], numbers.short),
            *(Cell(numbers.short(value), value) for value in tail),
            estimate_cell(divergence["agreement"], numbers.percent),
        )
    if equal is not None:
        cells[7] = Cell(numbers.percent(number(equal)), number(equal))
    return cells


def estimate_cell(estimate: Mapping[str, Any], form: Form) -> Cell:
    """An estimate with its interval below."""
    value, told = number(estimate["value"]), interval(estimate, form)
    return Cell([form(value), el("div", told, class_="soft") if told else None], value)


def _latency(latency: Mapping[str, Any]) -> Child:
    if "ratio" not in latency:
        return None
    told = f"{1 / latency['ratio']:.2f}x as fast as the float model" if latency["ratio"] else ""
    text = (
        f"Latency: {latency['ratio']:.2f} of the float model's time ({told}); quartiles "
        f"{latency['lower_quartile']:.2f} to {latency['upper_quartile']:.2f}; the float model takes "
        f"{latency['float_seconds'] * 1e3:.3g} ms. Measured by turns, {latency['clock']} time of one thread."
    )
    return [
        el("p", text),
        el("p", str(latency["why"]), class_="soft") if latency.get("why") else None,
    ]


def _given_back(control: Mapping[str, Any], purpose: str, number_of_table: int) -> list[Child]:
    if not control:
        return []
    columns = [Column("Weight"), Column("Was"), Column("Is"), Column("Alone it left", True)]
    rows: list[list[Child | Cell]] = []
    for each in control["returned"]:
        noise = [number(o["sqnr_db"]) for o in each["alone"].values() if "sqnr_db" in o]
        worst = min(noise) if noise else math.nan
        alone = Cell(numbers.decibels(worst) or "not measured", worst)
        rows.append([tables.name(each["label"]), each["from"], each["to"], alone])
    return [
        el("h3", f"Given back {purpose}"),
        el("p", str(control["why"])),
        tables.table(f"given-back-{number_of_table}", "Weights that got bits back", columns, rows),
    ]
