"""`qgraph inspect`: what is in a model, what of it can be quantized, and why the rest cannot."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from qgraph.cli import options, terminal

if TYPE_CHECKING:
    from qgraph.inspection import Constant, Inspection, Port, Symmetry

EXAMPLES = """
Examples:
  qgraph inspect model.onnx
  qgraph inspect model.onnx --weights
  qgraph inspect model.onnx --target ort --target openvino
  qgraph inspect model.onnx --symmetries
"""

All = Annotated[bool, typer.Option("--weights", help="List every weight, not only groups of them.")]
Symmetries = Annotated[
    bool,
    typer.Option(
        "--symmetries", help="Also list which channels can be permuted, scaled and rotated."
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="NAME",
        help='Also say what the recipe would do for this target. May be repeated; "all" is every one.',
        rich_help_panel=options.TO_DO,
    ),
]


def inspect(
    model: options.Model,
    all_weights: All = False,
    symmetries: Symmetries = False,
    target: Targets = None,
    recipe: options.Recipe = "auto",
    as_json: options.Json = False,
) -> None:
    """Show what is in a model and what can be quantized.

    Inputs and outputs, operators, the largest tensors, every weight that can
    be quantized, and for every other one the reason why it cannot. Nothing
    runs and nothing is changed.
    """
    from qgraph import inspection, registry

    targets = registry.names("target") if "all" in (target or ()) else target or ()
    with terminal.progress(is_shown=not as_json) as progress:
        progress("reading", -1)
        found = inspection.inspect_model(
            model, targets=targets, recipe=recipe, with_symmetries=symmetries
        )
    if as_json:
        terminal.emit(found.to_json())
        return
    _overview(found)
    _interface(found)
    _operators(found)
    _largest(found)
    if all_weights:
        _every_weight(found)
    else:
        _groups(found)
    _unquantizable(found)
    _forecasts(found)
    if symmetries:
        _symmetries(found)
    terminal.diagnostics(found.findings)


def _overview(found: Inspection) -> None:
    from qgraph.report import megabytes

    where = f", weights in {', '.join(found.external_files)}" if found.external_files else ""
    terminal.pairs(
        [
            ("model", found.source),
            ("size", megabytes(found.file_bytes) + where if found.file_bytes else ""),
            ("tensors", megabytes(found.weight_bytes)),
            ("format", f"IR version {found.ir_version}"),
            ("opsets", ", ".join(f"{domain} {v}" for domain, v in found.opsets.items())),
            ("producer", found.producer),
            ("functions", ", ".join(found.functions)),
            ("quantized by", found.metadata.get("qgraph", "")),
        ]
    )


def _interface(found: Inspection) -> None:
    terminal.heading("Inputs and outputs")

    def row(kind: str, port: Port) -> tuple[str, str, str, str]:
        note = "has a default" if port.has_default else ""
        return kind, port.name, f"{port.dtype}{terminal.shape(port.shape)}", note

    rows = [row("in", p) for p in found.inputs] + [row("out", p) for p in found.outputs]
    terminal.table(("", "name", "type", ""), rows)


def _operators(found: Inspection) -> None:
    terminal.heading(f"Operators ({terminal.counted(sum(found.operators.values()), 'node')})")
    shown = [f"{name} x{count}" if count > 1 else name for name, count in found.operators.items()]
    terminal.table(("",), [(", ".join(shown),)])


def _largest(found: Inspection) -> None:
    if not found.largest:
        return
    terminal.heading("Largest tensors")
    terminal.table((">size", "type", "read by", "name"), map(_constant_row, found.largest))


def _constant_row(each: Constant) -> tuple[str, str, str, str]:
    from qgraph.report import megabytes

    dims = terminal.shape(each.shape)
    return megabytes(each.nbytes), f"{each.dtype}{dims}", ", ".join(each.readers), each.name


def _groups(found: Inspection) -> None:
    from qgraph.report import megabytes

    able = [w for w in found.weights if not w.reason]
    size = sum(w.nbytes for w in able)
    share = f", {size / found.weight_bytes:.0%} of the bytes" if found.weight_bytes else ""
    terminal.heading(f"Can be quantized: {terminal.counted(len(able), 'weight')}{share}")
    groups: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for w in able:
        key = (
            "/".join(w.operators),
            f"{w.dtype}{terminal.shape(w.shape)}",
            _sharing(w.tied, w.uses),
        )
        groups[key] += 1
        sizes[key] += w.nbytes
    rows = ((key[0], key[1], groups[key], megabytes(sizes[key]), key[2]) for key in groups)
    if groups:
        terminal.table(("operators", "type", ">weights", ">size", ""), rows)


def _sharing(is_tied: bool, uses: int) -> str:
    if is_tied:
        return f"tied: {uses} uses of different kinds"
    return f"shared by {uses} nodes" if uses > 1 else ""


def _every_weight(found: Inspection) -> None:
    from qgraph.report import megabytes

    terminal.heading(f"Weights ({len(found.weights)})")
    rows = []
    for w in found.weights:
        notes = [
            _sharing(w.tied, w.uses),
            f"float for {', '.join(w.others)} too" if w.others else "",
        ]
        verdict = f"float: {w.reason}" if w.reason else "; ".join(filter(None, notes))
        n, k = w.matrix
        rows.append(
            (
                w.label,
                "/".join(w.operators),
                f"{w.dtype}{terminal.shape(w.shape)}",
                f"{n} x {k}",
                megabytes(w.nbytes),
                verdict,
            )
        )
    terminal.table(("weight", "operators", "type", ">N x K", ">size", ""), rows)


def _unquantizable(found: Inspection) -> None:
    """Weights with a reason, and the other tensors, which no operator multiplies with."""
    from qgraph.report import megabytes

    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for w in found.weights:
        if w.reason:
            counts[w.reason] += 1
            sizes[w.reason] += w.nbytes
    for c in found.others:
        counts[c.reason] += 1
        sizes[c.reason] += c.nbytes
    if counts:
        terminal.heading("Cannot be quantized, and why")
        rows = (
            (counts[r], megabytes(sizes[r]), r) for r in sorted(counts, key=lambda r: -sizes[r])
        )
        terminal.table((">tensors", ">size", "reason"), rows)


def _forecasts(found: Inspection) -> None:
    from qgraph.report import megabytes

    for each in found.forecasts:
        terminal.heading(f"Recipe {each.recipe} for target {each.target}")
        total = sum(each.specs.values()) + sum(each.stays.values())
        done = sum(each.specs.values())
        size = f", {megabytes(each.quantized_bytes)} instead of float" if done else ""
        terminal.line(f"  {done} of {total} weights would be quantized{size}")
        terminal.bullets(f"{spec}: {count}" for spec, count in each.specs.items())
        terminal.bullets(f"float: {count}, {reason}" for reason, count in each.stays.items())


_KINDS = {"permute": "Permutations", "scale": "Scales", "rotate": "Rotations"}


def _symmetries(found: Inspection) -> None:
    """Groups of channels by kind of transform, and for each one that is not free the node and the reason."""
    for kind, title in _KINDS.items():
        groups = [s for s in found.symmetries if s.kind == kind]
        free = sum(bool(s.legal) for s in groups)
        terminal.heading(f"{title}: {free} of {terminal.counted(len(groups), 'group')}")
        if groups:
            columns = ("channels of", ">size", "legal", "written by", "read by", "")
            terminal.table(columns, map(_symmetry_row, groups))


def _symmetry_row(each: Symmetry) -> tuple[str, str, str, str, str, str]:
    size = str(each.channels) if each.block == each.channels else (
        f"{each.channels // each.block} x {each.block}"
    )  # fmt: skip
    notes = [
        f"{each.node}: {each.reason}" if each.reason else "",
        f"{terminal.counted(each.gains, 'gain')} move into readers" if each.gains else "",
        "keeps the mean" if each.keeps_mean else "",
        f"{terminal.counted(each.bounds, 'Clip')} with bounds" if each.bounds else "",
    ]
    makers, takers = _names(each.writers), _names(each.readers)
    return each.name, size, each.legal or "none", makers, takers, "; ".join(filter(None, notes))


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown
