"""The part of a report's page about mixed precision: the front of size and loss, and what weights could have been."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qgraph.page import charts, numbers, tables
from qgraph.page.charts import Point
from qgraph.page.elements import Child, el
from qgraph.page.tables import Cell, Column
from qgraph.report import megabytes

MEASURES = {
    "kl": "KL divergence in nats",
    "noise": "noise over signal of the outputs",
    "floors": "share of the floors",
}


def content(mixed: Mapping[str, Any]) -> list[Child]:
    """What was measured and chosen; nothing where formats were not mixed."""
    if not mixed:
        return []
    measure = MEASURES.get(mixed["measure"], str(mixed["measure"]))
    asked = " and ".join(filter(None, (mixed["budget"], mixed["floors"]))) or "no budget"
    swaps = mixed["swaps"]
    lost, expected = (numbers.short(float(mixed[k])) for k in ("measured", "predicted"))
    told = (
        f"Asked for: {asked}. Chosen: {mixed['avg_bits']:.2f} bits per weight with a {measure} of "
        f"{lost} ({expected} was predicted from each weight alone), after "
        f"{numbers.count(int(mixed['measurements']), 'measurement')} on "
        f"{numbers.count(int(mixed['samples']), 'sample')}."
    )
    if swaps.get("tried"):
        told += f" Of {numbers.count(int(swaps['tried']), 'swap')} that were tried {swaps['taken']} helped."
    return [el("p", told), _front(mixed, measure), _groups(mixed, measure)]


def _front(mixed: Mapping[str, Any], measure: str) -> Child:
    points = [
        Point(
            float(p["avg_bits"]), float(p["measured"]),
            f"{p['avg_bits']:.2f} bits per weight, {megabytes(p['bytes'])}: measured "
            f"{numbers.short(float(p['measured']))}, predicted {numbers.short(float(p['predicted']))}"
            + (", chosen" if p["chosen"] else ""),
            is_chosen=p["chosen"],
        )
        for p in mixed["front"]
    ]  # fmt: skip
    if len(points) < 2:
        return None
    chosen = next((p.told for p in points if p.is_chosen), "none of them")
    description = f"{measure} against bits per weight for {len(points)} mixtures; chosen: {chosen}"
    columns = (
        Column("Bits per weight", True), Column("Bytes of weights", True), Column("Measured", True),
        Column("Predicted", True), Column("Chosen"),
    )  # fmt: skip
    rows: list[list[Child | Cell]] = [
        [Cell(f"{p['avg_bits']:.2f}", float(p["avg_bits"])), Cell(megabytes(p["bytes"]), float(p["bytes"])),
         *(Cell(numbers.short(float(p[k])), float(p[k])) for k in ("measured", "predicted")),
         "chosen" if p["chosen"] else ""]
        for p in mixed["front"]
    ]  # fmt: skip
    return [
        charts.figure(
            "Size against loss",
            f"Each point is the best mixture found for its size, with its {measure} as measured: "
            "lower and further left is better.",
            charts.pareto(points, "bits per weight", measure, description),
        ),
        el(
            "details",
            el("summary", f"Every point ({len(points)})"),
            tables.table("front", "Mixtures by size", columns, rows),
        ),
    ]


def _groups(mixed: Mapping[str, Any], measure: str) -> Child:
    columns = (
        Column("Weights that share a format"), Column("Format"), Column("Elements", True),
        Column("Loss alone", True), Column("What else it could have been, and its loss", is_wide=True),
    )  # fmt: skip
    rows: list[list[Child | Cell]] = []
    for group in mixed["groups"]:
        loss = {o["format"]: float(o["loss"]) for o in group["options"]}
        own = loss.get(group["format"], math.nan)
        others = ", ".join(
            f"{form} {numbers.short(value)}"
            for form, value in loss.items()
            if form != group["format"]
        )
        labels = [el("div", tables.name(label)) for label in group["labels"]]
        size = Cell(f"{group['elements']:,}", float(group["elements"]))
        rows.append([labels, group["format"], size, Cell(numbers.short(own), own), others])
    table = tables.table("mixture", "Formats that were weighed", columns, rows, is_tall=True)
    told = f"The loss is the {measure} that the format of this group alone is expected to cost."
    return [el("h3", "What was weighed"), el("p", told), table]
