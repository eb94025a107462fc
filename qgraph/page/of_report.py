"""The page of one run of `optimize`: what was decided and why, what it costs, what runs, how to do it again."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Iterable

from qgraph.page import accuracy, decisions, mixture, numbers, runs
from qgraph.page.document import Section, Tile, page
from qgraph.page.elements import Child, el
from qgraph.report import Report, megabytes


def of_report(report: Report) -> str:
    """The whole page, HTML in UTF-8."""
    name = os.path.basename(report.source) or report.source
    lead: list[Child] = [
        "Quantized with recipe ", el("code", report.recipe),
        " for target ", el("code", report.target), ". ", report.headline(), ".",
    ]  # fmt: skip
    if not report.output:
        lead.append(" No model was written: an accuracy floor was missed.")
    sections = [
        Section("accuracy", "Accuracy and speed", accuracy.content(report)),
        Section("mixed", "Mixed precision", mixture.content(report.mixed)),
        Section("findings", "Findings", _findings(report)),
        Section("layers", "Error and bytes of each weight", decisions.plots(report)),
        Section("decisions", "What was decided, and why", decisions.content(report)),
        Section("kernels", "What runs", runs.content(report)),
        Section("ranges", "Activations", runs.activations(report)),
        Section("reproduce", "Doing it again", _reproduce(report)),
    ]
    made_by = ", ".join(f"{k} {v}" for k, v in report.versions.items())
    return page(name, "qgraph report", lead, _tiles(report), sections, el("p", made_by))


def _tiles(report: Report) -> list[Tile]:
    tiles = []
    ratio = report.size_ratio()
    if ratio is not None:
        sizes = f"{megabytes(report.float_bytes)} → {megabytes(report.output_bytes)}"
        tiles.append(Tile("Size of the model", f"{ratio:.2f}x", sizes))
    bits = report.bits_per_weight()
    if bits is not None:
        tiles.append(Tile("Bits per weight", f"{bits:.2f}", "scales, zero points and padding included"))  # fmt: skip
    done, total = len(report.quantized), len(report.ledger)
    tiles.append(Tile("Weights quantized", f"{done} of {total}", f"{total - done} stay float"))
    if report.integer_macs is not None:
        share = numbers.percent(report.integer_macs)
        tiles.append(Tile("Integer kernels", share, "of the multiplications of a sample"))
    return tiles + accuracy.tiles(report)


def _findings(report: Report) -> list[Child]:
    """Warnings first; what stays float is told by the ledger too, but here with its sizes."""
    order = ("error", "warning", "missed", "note")
    found = sorted(report.diagnostics, key=lambda d: order.index(d.severity))
    items = [
        el(
            "li",
            el("span", d.severity, class_="badge"),
            el("code", d.code), " ", el("span", d.where, class_="name"),
            ": " if d.where else "", d.message,
            el("span", f"What to do: {d.hint}", class_="hint") if d.hint else None,
            class_=d.severity,
        )
        for d in found
    ]  # fmt: skip
    content: list[Child] = [el("ul", items, class_="findings") if items else None]
    if report.checks or report.notes:
        content.append(el("div", *_lists(report), class_="two"))
    return content


def _lists(report: Report) -> list[Child]:
    return [
        el("div", el("h3", title), _bullets(lines))
        for title, lines in (("Checked", report.checks), ("Notes", report.notes))
        if lines
    ]


def _bullets(lines: Iterable[str]) -> Child:
    return el("ul", [el("li", line) for line in lines], class_="plain")


def _reproduce(report: Report) -> list[Child]:
    content: list[Child] = []
    if report.command:
        content += [
            el("p", "The command that made this report:"),
            el("pre", shlex.join(report.command), class_="command"),
        ]
    content.append(
        el(
            "p",
            "The recipe below pins every decision that was measured or given back. Save it as ",
            el("code", "recipe.json"),
            " (the JSON twin of this report, written with ",
            el("code", "--report report.json"),
            ", serves as well) and run:",
        )
    )
    output = os.path.basename(report.output) or "model.q.onnx"
    replay = ["qgraph", "optimize", report.source, "-o", output, "--recipe", "recipe.json"]
    data = _data_of(report.command)
    content.append(el("pre", shlex.join([*replay, *data]), class_="command"))
    recipe = json.dumps(report.resolved_recipe, indent=1, ensure_ascii=False)
    content.append(
        el("details", el("summary", "The recipe"), el("pre", recipe, id="recipe"))
    )  # fmt: skip
    if report.seconds:
        content.append(runs.seconds(report))
    return content


def _data_of(command: list[str]) -> list[str]:
    """The options of a command line that say which data was used, as they were written."""
    kept: list[str] = []
    wanted = ("--data", "-d", "--preprocess", "--samples")
    for option, value in itertools.pairwise(command):
        if option in wanted:
            kept += [option, value]
    return kept + [c for c in command if c.startswith(tuple(f"{w}=" for w in wanted if len(w) > 2))]
