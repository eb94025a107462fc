"""What an evaluation found, to be shown: on a terminal, as Markdown, as a page, and as JSON that holds it all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from qgraph.evaluate import statistics
from qgraph.evaluate.isolated import TensorLoss

Shown: TypeAlias = "str | tuple[str, float]"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: what it is, how much, and a note."""

    title: str
    text: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text, or of (text, the number it sorts by); columns whose name starts with ">" stand on the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Shown, ...], ...]


@dataclass
class Findings:
    """The result of one evaluation.

    Attributes:
        kind: what was measured, "perplexity" for instance.
        model: the model that is judged.
        float_model: what it is compared with, "" for nothing.
        how: the conventions, a sentence each.
        figures: the headline.
        tables: the details.
        payload: the same and more, as plain values.
        losses: errors of values inside the graph, to be drawn.
        command: the command line; empty where there was none.
    """

    kind: str
    model: str
    float_model: str
    how: list[str]
    figures: list[Figure]
    tables: list[Table]
    payload: dict[str, Any]
    losses: Sequence[TensorLoss] = ()
    command: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The payload, with what it is about; numbers that are not finite as "inf", "-inf", "nan"."""
        about = {"kind": self.kind, "model": self.model, "float_model": self.float_model or None}
        whole = {**about, "how": self.how, **self.payload, "command": self.command}
        return json.dumps(statistics.plain(whole), indent=1) + "\n"

    def to_markdown(self) -> str:
        """Headline, conventions and tables."""
        against = f" against {self.float_model}" if self.float_model else ""
        lines = [f"# qgraph eval {self.kind}: {self.model}{against}", ""]
        notes = [f" ({each.note})" if each.note else "" for each in self.figures]
        lines += [
            f"- {f.title}: **{f.text}**{note}" for f, note in zip(self.figures, notes, strict=True)
        ]
        lines += ["", *self.how, ""]
        for table in self.tables:
            lines += [f"## {table.title}", "", _row(c.lstrip(">") for c in table.columns)]
            lines.append(_row("--:" if c.startswith(">") else "---" for c in table.columns))
            lines += [_row(text(cell) for cell in row) for row in table.rows]
            lines.append("")
        return "\n".join(lines)

    def to_html(self) -> str:
        """The same as one file for a browser, which needs nothing else."""
        from qgraph import page

        return page.of_findings(self)


def text(cell: Shown) -> str:
    """What a cell shows."""
    return cell if isinstance(cell, str) else cell[0]


def _row(cells: Any) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"
