"""`--report FILE`: which files can be written, and writing them whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypeAlias

import typer

from qgraph import errors
from qgraph.cli import options

KINDS = {".html": "to_html", ".json": "to_json", ".md": "to_markdown"}
"""The method that writes a report, by the suffix of its file."""

Reports: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write what was found: .html, .json or .md. May be repeated.",
        rich_help_panel=options.OUTPUT,
    ),
]


class Reported(Protocol):
    """What can be written as a report."""

    command: list[str]

    def to_html(self) -> str:
        """A page for a browser."""

    def to_json(self) -> str:
        """Plain values."""

    def to_markdown(self) -> str:
        """Markdown."""


def check(paths: Sequence[Path] | None, *, force: bool) -> None:
    """Refuse files that cannot be written, before any work.

    Raises:
        errors.InputError: QG105.
    """
    for path in paths or ():
        if path.suffix not in KINDS:
            message = f"is no kind of report; the suffix is {path.suffix!r}"
            hint = f"name a file that ends in {', '.join(KINDS)}"
            raise errors.InputError(errors.Diagnostic("error", "QG105", str(path), message, hint))
    from qgraph import files

    for path in paths or ():
        files.check_output(path, force=force)


def write(report: Reported, paths: Sequence[Path] | None) -> None:
    """Write each file under another name and then move it there."""
    for path in paths or ():
        text = getattr(report, KINDS[path.suffix])()
        with tempfile.TemporaryDirectory(prefix=".qgraph-", dir=path.parent) as folder:
            whole = Path(folder) / path.name
            # A file's name may hold bytes that are no UTF-8.
            whole.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(whole, path)
