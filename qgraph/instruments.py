"""Instruments that hold passes to their word: the verifier, and the proof that a function was kept.

(Timer, Printer, Dumper and StopAfter, which only watch, are in `qgraph.pipeline`.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import onnx_ir as ir

from qgraph import errors, files, graph, verify
from qgraph.pipeline import Context, Instrument, Keeps, Pass

PROVE_UNDER = (
    1 << 29
)  # bytes of weights; running larger float models twice costs more than it proves


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

    TOLERANCE: ClassVar[dict[Keeps, float]] = {Keeps.FLOAT_EQUAL: 1e-4, Keeps.BIT_EXACT: 0.0}

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
        try:
            self._feeds = verify.sample_feeds(model)
        except errors.QGraphError as e:
            self._give_up(e.diagnostics[0].message)

    def _give_up(self, reason: str) -> None:
        self._gave_up = True
        self.lines.append(f"equivalence of rewrites was not proven: {reason}")

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        """Compare with the copy."""
        if self._before is None or not changed or self._feeds is None:
            return
        tolerance = self.TOLERANCE[each.keeps]
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
