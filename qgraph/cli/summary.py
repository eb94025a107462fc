"""What `qgraph optimize` prints of a report: what was done, what was not and why, and what was proven."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qgraph.cli import terminal

if TYPE_CHECKING:
    from qgraph import errors
    from qgraph.report import Report


def show(report: Report) -> None:
    """Print the summary."""
    terminal.line(report.headline(), "bold green" if report.quantized else "bold yellow")
    _groups(report)
    _floats(report)
    _accuracy(report.metrics)
    _given_back(report.control)
    if report.checks:
        terminal.heading("Checked")
        terminal.bullets(report.checks)
    if report.notes:
        terminal.heading("Notes")
        terminal.bullets(report.notes)
    others = [d for d in report.diagnostics if not _is_ledger_line(d)]
    if others:
        terminal.heading("Findings")
        terminal.bullets(str(d).partition("\n")[0] for d in others)
    terminal.line()
    terminal.pairs(
        [
            ("model", report.source),
            ("recipe", f"{report.recipe}, for target {report.target}"),
            ("passes", f"{sum(report.seconds.values()):.1f} s"),
            ("output", report.output),
        ]
    )


def _is_ledger_line(each: errors.Diagnostic) -> bool:
    """Told already, as what stays float."""
    return each.severity == "missed" and each.message.startswith("stays float: ")


def _groups(report: Report) -> None:
    from qgraph.report import megabytes

    if not report.quantized:
        return
    terminal.heading("Quantized")
    columns = (
        "operators",
        "weights are",
        "what runs",
        ">weights",
        ">before",
        ">after",
        ">worst SQNR",
    )
    terminal.table(
        columns,
        (
            (ops, spec, runs, count, megabytes(a), megabytes(b), terminal.decibels(sqnr))
            for ops, spec, runs, count, a, b, sqnr in report.groups()
        ),
    )


def _floats(report: Report) -> None:
    from qgraph.report import megabytes

    stayed = report.stayed_float()
    if not stayed:
        return
    terminal.heading("Float, and why")
    terminal.table(
        (">weights", ">size", "code", "reason"),
        ((count, megabytes(size), code, reason) for code, reason, count, size in stayed),
    )


def _accuracy(metrics: dict[str, Any]) -> None:
    if not metrics:
        return
    terminal.heading(f"Accuracy on {terminal.counted(metrics['samples'], 'sample')}")
    rows = []
    for each in metrics["outputs"]:
        error, divergence = each["error"], each["divergence"]
        sqnr = terminal.decibels(float(error["sqnr_db"])) if error else ""
        kl = f"{divergence['kl_mean']['value']:.2e} nats" if divergence else ""
        agreement = f"{divergence['agreement']['value']:.2%}" if divergence else ""
        rows.append((each["name"], sqnr, kl, agreement))
    terminal.table(("output", ">SQNR", ">KL divergence", ">same top-1"), rows)


def _given_back(control: dict[str, Any]) -> None:
    """What accuracy control did, where a floor was missed at first."""
    if not control:
        return
    terminal.heading(f"Given back so that the floors hold: {control['why']}")
    rows = []
    for each in control["returned"]:
        noise = [o["sqnr_db"] for o in each["alone"].values() if "sqnr_db" in o]
        alone = terminal.decibels(min(noise)) if noise else "not measured"
        rows.append((each["label"], each["from"], each["to"], alone))
    terminal.table(("weight", "was", "is", ">alone it left"), rows)
