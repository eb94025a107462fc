"""What is printed, and where: results to stdout, everything else to stderr.

Colours and the progress bar appear on a terminal only; NO_COLOR is respected. What is piped is plain text in lines
of at most WIDTH columns, or JSON where that was asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from qgraph.errors import Diagnostic

_log = logging.getLogger(__name__)

WIDTH = 140  # of tables in pipes and files
PATIENCE = 1.0  # seconds before a progress bar appears
STYLES = {"error": "bold red", "warning": "bold yellow", "missed": "yellow", "note": "bold blue"}

Progress = Callable[[str, float], None]

found: dict[str, Any] = {}
"""What a command that fails has found out before; printed with the errors as JSON."""

given: list[str] = []
"""The command line, without the program's name."""


def console(*, is_error: bool = False) -> Console:
    """Where to print. No text is taken for markup: shapes have brackets."""
    from rich.console import Console

    stream = sys.stderr if is_error else sys.stdout
    return Console(
        file=stream,
        width=None if stream.isatty() else WIDTH,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
        markup=False,
        emoji=False,
    )


def emit(payload: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(plain(payload), indent=1) + "\n")


def plain(value: Any) -> Any:
    """The value as strict JSON: numbers that are not finite are null, what JSON does not know is a string."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def diagnostics(found: Iterable[Diagnostic]) -> None:
    """Print findings to stderr."""
    from rich.text import Text

    out = console(is_error=True)
    for each in found:
        head = f"{each.severity} {each.code}"
        text, mark, hint = str(each).partition("\n  help: ")
        parts: list[str | tuple[str, str]] = [(head, STYLES[each.severity])]
        parts.append(text.removeprefix(head))
        if mark:
            parts += ["\n  ", ("help", "bold cyan"), f": {hint}"]
        out.print(Text.assemble(*parts), soft_wrap=True)


def diagnostics_json(found: Iterable[Diagnostic]) -> list[dict[str, str]]:
    """Findings as plain data."""
    keys = ("severity", "code", "where", "message", "hint")
    return [{key: getattr(each, key) for key in keys} for each in found]


def line(text: str = "", style: str = "") -> None:
    """Print one line of a result, never broken."""
    from rich.text import Text

    console().print(Text(text, style=style), soft_wrap=True)


def heading(text: str) -> None:
    """Print the title of what follows, after an empty line."""
    line()
    line(text, "bold")


def bullets(texts: Iterable[str]) -> None:
    """Print a list, one entry a line."""
    for text in texts:
        line(f"  - {text}")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; columns whose name starts with ">" are aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 1), header_style="dim")
    for column in columns:
        is_number = column.startswith(">")
        justify = "right" if is_number else "left"
        made.add_column(column.lstrip(">"), justify=justify, no_wrap=is_number)  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*(Text(_cell(each)) for each in row))
    _print(made)


def _cell(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def pairs(rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, aligned; empty values are left out."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, show_header=False, padding=(0, 1))
    made.add_column(style="dim", no_wrap=True)
    made.add_column()
    for name, value in rows:
        if value not in ("", None):
            made.add_row(name, Text(str(value)))
    _print(made)


def _print(renderable: RenderableType) -> None:
    """Print without the spaces that rich puts at the ends of lines."""
    out = console()
    with out.capture() as captured:
        out.print(renderable)
    out.file.writelines(f"{each.rstrip()}\n" for each in captured.get().splitlines())


def counted(count: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "weight"), counted(2, "weight")
    ('1 weight', '2 weights')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def decibels(value: float | None) -> str:
    """An SQNR for people: "exact" where nothing differs.

    >>> decibels(21.26), decibels(math.inf)
    ('21.3 dB', 'exact')
    """
    if value is None or math.isnan(value):
        return ""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def shape(dims: Iterable[object] | None) -> str:
    """A shape as a person writes it.

    >>> shape([1, "batch", None])
    '[1, batch, ?]'
    """
    if dims is None:
        return "[...]"
    return f"[{', '.join('?' if d is None else str(d) for d in dims)}]"


@contextlib.contextmanager
def progress(*, is_shown: bool = True) -> Iterator[Progress]:
    """A function that shows what is being done and the share done, 0..1; below 0 the share is not known.

    The bar appears on stderr after a second, on a terminal only, and is gone afterwards.
    """
    out = console(is_error=True)
    if not is_shown or not out.is_terminal:
        yield lambda what, share: _log.info("%s", what)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Progress(*columns, console=out, transient=True)
    task = bar.add_task("starting", total=None)

    def show(what: str, share: float) -> None:
        _log.info("%s", what)
        bar.update(task, description=what, total=1.0 if share >= 0 else None, completed=share)

    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield show
    finally:
        timer.cancel()
        timer.join()  # or the bar could start after it was stopped
        bar.stop()
