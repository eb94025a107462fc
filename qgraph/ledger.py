"""From a finished run to its report: the ledger, what really runs, and what was missed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from qgraph import errors, files
from qgraph.executed.match import Ran
from qgraph.pipeline import Context
from qgraph.report import Activation, Entry, Report
from qgraph.target import Target


def entries(ctx: Context) -> list[Entry]:
    """One line per weight: what the plan decided, what was written, what arrived quantized."""
    ledger = []
    for decision in ctx.plan.decisions.values():
        if decision.role != "weight":
            continue
        record = ctx.records.get(decision.value, {})
        entry: Entry = record["entry"]
        entry.reason, entry.by, entry.code = decision.reason, decision.by, decision.code
        if decision.spec is not None and "nodes" in record:
            entry.spec = str(decision.spec)
            entry.activation = str(decision.activation) if decision.activation else ""
            entry.stored_bytes = record["stored_bytes"]
            entry.forms = [n["form"] for n in record["nodes"]]
            entry.sqnr_db = record["sqnr_db"]
            entry.mse = record["squared_error"] / max(record["elements"], 1)
            entry.pass_name = "insert-qdq"
        ledger.append(entry)
    arrived = [r["entry"] for name, r in ctx.records.items() if name not in ctx.plan.decisions]
    return ledger + arrived


def activations(ctx: Context) -> list[Activation]:
    """One line per activation with a static grid, in graph order."""
    return [
        Activation(
            d.value, str(d.grid.spec), d.grid.low, d.grid.high, d.grid.scale, d.grid.zero_point,
            d.solver, d.shares, d.reason,
        )
        for d in ctx.plan.decisions.values()
        if d.grid is not None
    ]  # fmt: skip


def _count_macs(report: Report, ctx: Context, ran: Mapping[str, Ran]) -> None:
    """What runs for every operator with products, and which share of them is integer."""
    _say_why(ctx, ran)
    report.operators = list(ctx.operators.values())
    total = sum(o.macs for o in report.operators)
    if total:
        report.integer_macs = sum(o.macs for o in report.operators if o.integer) / total
        report.checks.append(
            f"{report.integer_macs:.1%} of the multiplications of one sample run in integer kernels"
        )


def _say_why(ctx: Context, ran: Mapping[str, Ran], unknown: str = "") -> None:
    """What runs for every operator with products, and why it is no integer kernel; `unknown` where nobody looked."""
    for operator in ctx.operators.values():
        found = ran.get(operator.output)
        operator.runs = found.kernel if found else ""
        operator.integer = found is not None and found.how == "integer"
        if operator.integer:
            continue
        decision = ctx.plan.decisions.get(operator.weight)
        if decision is not None and decision.spec is None:
            operator.code, operator.reason = decision.code, decision.reason
        elif operator.weight in ctx.records and decision is None:  # it arrived quantized
            runs = f"{ctx.target.name} executes {operator.runs or 'something unknown'} for it"
            operator.code, operator.reason = (
                "QG319",
                "; ".join(filter(None, [operator.reason, unknown or runs])),
            )
        elif decision is not None:
            held = f"its weight is {decision.spec}, its activations are float"
            hidden = found.detail if found is not None and found.how == "unknown" else unknown
            operator.reason = (hidden or held) if decision.activation is not None else held
        else:
            operator.code = "QG314"
            operator.reason = "a product of activations; they stay float"


def ask_runtime(
    report: Report, ctx: Context, goal: Target, path: Path, source: files.Source
) -> None:
    """Ask the target's runtime what it executes for every use of a quantized weight.

    Raises:
        errors.VerificationError: QG202 where the runtime takes the float model but not the quantized one.
    """
    outputs = [n["output"] for r in ctx.records.values() for n in r.get("nodes", ())]
    report.operators = list(ctx.operators.values())
    if not outputs or goal.inspect is None:
        _say_why(ctx, {}, f"target {goal.name} does not say what it runs")
        return
    outputs = list(dict.fromkeys([*outputs, *ctx.operators]))
    ctx.progress(f"asking {goal.name} what it runs", 0.0)
    try:
        ran = goal.inspect(str(path), outputs)
    except errors.RuntimeFailure as e:
        _blame(report, goal, source, e)
        _say_why(ctx, {}, "what runs could not be checked")
        return
    for entry in report.ledger:
        nodes = ctx.records.get(entry.weight, {}).get("nodes", ())
        entry.runs = [str(ran[n["output"]].kernel) for n in nodes if n["output"] in ran]
    _count_macs(report, ctx, ran)
    report.checks.append(
        f"the fusion check opened the model in {goal.name} and read the graph that it executes"
    )


def _blame(
    report: Report, goal: Target, source: files.Source, failure: errors.RuntimeFailure
) -> None:
    """A runtime that refuses the result: our fault if it takes the float model, a warning if it does not."""
    found = failure.diagnostics[0]
    if not _takes_float(goal, source):
        text = f"what runs could not be checked; {goal.name} does not take the float model either: {found.message}"
        report.diagnostics.append(
            errors.Diagnostic("warning", found.code, found.where, text, found.hint)
        )
        return
    raise errors.VerificationError(
        errors.Diagnostic(
            "error",
            "QG202",
            goal.name,
            f"takes the float model, but not the quantized one: {found.message}",
            "qgraph bisect MODEL --check load --weights finds the weight; please report it",
        )
    ) from failure


def _takes_float(goal: Target, source: files.Source) -> bool:
    assert goal.inspect is not None
    with tempfile.TemporaryDirectory(prefix=".qgraph-") as folder:
        path = files.save(files.load(source), Path(folder) / "float.onnx")
        try:
            goal.inspect(str(path), [])
        except errors.RuntimeFailure:
            return False
    return True


def say_what_was_missed(report: Report, goal: Target) -> None:
    """What stayed float, grouped by reason; and a warning when nothing was quantized at all."""
    for code, reason, count, size in report.stayed_float():
        where = f"{count} weight{'s' if count > 1 else ''} ({size} bytes)"
        report.diagnostics.append(
            errors.Diagnostic("missed", code, where, f"stays float: {reason}")
        )
    outcome = "the output is the canonicalized float model"
    if report.ledger and not report.quantized:
        text = f"nothing was quantized for target {goal.name}; {outcome}"
        report.diagnostics.append(
            errors.Diagnostic("warning", "QG320", "", text, "the lines above say why")
        )
    elif not report.ledger:
        text = f"the model has no weights that qgraph can quantize; {outcome}"
        report.diagnostics.append(
            errors.Diagnostic("warning", "QG321", "", text, "see: qgraph inspect MODEL")
        )
