"""`qgraph doctor`: does this installation work?"""

from __future__ import annotations

from dataclasses import asdict

import typer

from qgraph.cli import options, terminal

ADVICE = frozenset({"calibration", "huge pages"})  # checks that only make things faster


def doctor(as_json: options.Json = False) -> None:
    """Examine the installation.

    Versions, the native library, what the processor can do. Exits with 1
    where something that qgraph needs is missing.
    """
    from qgraph import runtime

    checks = runtime.doctor()
    is_well = all(c.ok for c in checks if c.name not in ADVICE)
    if as_json:
        listed = [{**asdict(c), "required": c.name not in ADVICE} for c in checks]
        terminal.emit({"ok": is_well, "checks": listed})
    else:
        marks = {True: "ok", False: "MISSING"}
        rows = [
            (marks[c.ok] if c.name not in ADVICE else "ok" if c.ok else "advice", c) for c in checks
        ]
        terminal.table(("", "what", "found"), ((mark, c.name, c.detail) for mark, c in rows))
        hints = [f"{c.name}: {c.hint}" for c in checks if not c.ok and c.hint]
        if hints:
            terminal.heading("What to do")
            terminal.bullets(hints)
    if not is_well:
        raise typer.Exit(1)
