"""Instruments that hold passes to their word: the verifier, and the proof that a function was kept.

(Timer, Printer, Dumper and StopAfter, which only watch, are in `qgraph.pipeline`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import onnx_ir as ir

from qgraph import errors, files, graph, verify
from qgraph.pipeline import Context, Instrument, Keeps, Pass

PROVE_UNDER = (
    1 << 29
)  # bytes of weights; running larger float models twice costs more than it proves


_RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


class Verifier(Instrument):
    """Runs the structural verifier after every pass (or after the last one only)."""

    def __init__(self, *, every: bool = True) -> None:
        self._every = every

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        """Verify the model."""
        last = ctx.recipe.pipeline and each.name == ctx.recipe.pipeline[-1]
        if self._every or last:
            verify.check(model, where=f"after pass {each.name}")


class EquivalenceChecker(Instrument):
    """Runs the model before and after each pass that claims to keep the function, on sample inputs.

    `lines` says what was proven, and what could not be and why.
    """

    # What "float-equal" may differ by, relative to the largest element: some roundings of the coarsest type in use.
    TOLERANCE: ClassVar[dict[ir.DataType, float]] = {
        ir.DataType.FLOAT: 1e-4,
        ir.DataType.FLOAT16: 4e-3,
        ir.DataType.BFLOAT16: 3e-2,
    }

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._before: ir.Model | None = None
        self._feeds: list[dict[str, Any]] | None = None
        self._gave_up = False

    def before(self, each: Pass, model: ir.Model, ctx: Context) -> None:
        """Keep a copy, if the pass makes a promise."""
        self._before = None
        if each.keeps is Keeps.NOTHING or self._gave_up:
            return
        if self._feeds is None:
            self._prepare(model)
        if not self._gave_up:
            self._before = graph.clone(model)

    def _prepare(self, model: ir.Model) -> None:
        size = files.weight_bytes(model)
        if size > PROVE_UNDER:
            self._give_up(
                f"the model has {size >> 20} MB of weights, more than {PROVE_UNDER >> 20} MB"
            )
            return
        random = next((n for n in _all_nodes(model) if _is_random(n)), None)
        if random is not None:
            # ONNX Runtime seeds such a node by its position in the graph, which any rewrite may change.
            self._give_up(f"{graph.where(random)} draws random numbers without a seed")
            return
        try:
            self._feeds = verify.sample_feeds(model)
        except errors.QGraphError as e:
            self._give_up(e.diagnostics[0].message)

    def _give_up(self, reason: str) -> None:
        self._gave_up = True
        self.lines.append(f"equivalence of rewrites was not proven: {reason}")

    def _tolerance(self, model: ir.Model) -> float:
        """The tolerance of the coarsest float type among the model's values."""
        held = {v.dtype for g in graph.graphs(model) for v in [*g.inputs, *g.initializers.values()]}
        held |= {v.dtype for n in graph.nodes(model) for v in n.outputs}
        return max(t for dtype, t in self.TOLERANCE.items() if dtype in held | {ir.DataType.FLOAT})

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        """Compare with the copy."""
        if self._before is None or not changed or self._feeds is None:
            return
        tolerance = self._tolerance(model) if each.keeps is Keeps.FLOAT_EQUAL else 0.0
        found = verify.equivalent(self._before, model, self._feeds, rtol=tolerance)
        if not found.ok:
            text = (
                f"claims to be {each.keeps.value}, but output {found.worst_output!r} changed by "
                f"{found.max_rel_error:.2g} (relative; at most {tolerance:g} allowed). {found.reason}"
            )
            hint = "qgraph bisect narrows it down; --verify ends skips the proof"
            raise errors.VerificationError(
                errors.Diagnostic("error", "QG201", f"pass {each.name}", text.strip(), hint)
            )
        self.lines.append(
            f"{each.name}: proven {each.keeps.value} on {len(self._feeds)} samples, "
            f"largest relative error {found.max_rel_error:.1e}"
        )


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from graph.nodes(model)
    for function in model.functions.values():
        yield from function.all_nodes()


def _is_random(node: ir.Node) -> bool:
    if node.domain != "" or "seed" in node.attributes:
        return False
    if node.op_type != "Dropout":
        return node.op_type in _RANDOM
    training = node.inputs[2] if len(node.inputs) > 2 else None
    known = graph.small_array(training)
    return training is not None and (known is None or bool(known.any()))
