"""Accuracy floors: what a model must reach on data before it may be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qgraph import errors, files
from qgraph.report import Report

if TYPE_CHECKING:
    from qgraph.evaluate import Comparison

_REMEDY = "try --recipe int8-weights, or keep the worst weights float (see --report)"


class FloorMissed(errors.AccuracyError):
    """An accuracy floor was missed; `report` tells all about the model that was not written."""

    def __init__(self, report: Report, problems: Sequence[errors.Diagnostic]) -> None:
        super().__init__(*problems)
        self.report = report


@dataclass(frozen=True, slots=True)
class Floors:
    """What is asked for.

    Attributes:
        data: samples (see `qgraph.data`).
        min_sqnr: dB, for every float output.
        max_kl: nats, mean, for every output that holds predictions over classes.
    """

    data: Any = None
    min_sqnr: float | None = None
    max_kl: float | None = None

    @property
    def is_set(self) -> bool:
        """Something is asked for."""
        return self.min_sqnr is not None or self.max_kl is not None

    def require_data(self) -> None:
        """Refuse floors that nothing can be measured on.

        Raises:
            errors.InputError: QG130.
        """
        if self.is_set and self.data is None:
            text = "an accuracy floor needs data to be measured on"
            raise errors.InputError(
                errors.Diagnostic("error", "QG130", "--min-sqnr/--max-kl", text, "give --data")
            )

    def hold(self, report: Report, model: files.Source, quantized: str | os.PathLike[str]) -> None:
        """Measure, and put the figures into the report.

        Raises:
            FloorMissed: with one diagnostic per output and floor.
        """
        if not self.is_set:
            return
        from qgraph import evaluate

        comparison = evaluate.compare(model, quantized, self.data, rounds=0)
        report.metrics.update(comparison.to_json())
        problems = self.problems(comparison)
        if problems:
            raise FloorMissed(report, problems)

    def problems(self, comparison: Comparison) -> list[errors.Diagnostic]:
        """The floors that a comparison misses, as errors."""
        found = []
        measured = ((o.name, o.error.sqnr_db) for o in comparison.outputs if o.error is not None)
        if self.min_sqnr is not None:
            found += [
                _missed("QG701", name, f"SQNR is {db:.1f} dB, the floor is {self.min_sqnr:g} dB")
                for name, db in measured
                if not db >= self.min_sqnr
            ]
        if self.max_kl is None:
            return found
        judged = [(o.name, o.divergence.kl_mean.value) for o in comparison.outputs if o.divergence]
        found += [
            _missed(
                "QG702", name, f"KL divergence is {kl:.3g} nats, the ceiling is {self.max_kl:g}"
            )
            for name, kl in judged
            if not kl <= self.max_kl
        ]
        if not judged:
            text = "no output looks like predictions over classes, so there is no KL divergence"
            hint = "name it with --logits, or use --min-sqnr"
            found.append(errors.Diagnostic("error", "QG703", "--max-kl", text, hint))
        return found


def _missed(code: str, output: str, message: str) -> errors.Diagnostic:
    return errors.Diagnostic("error", code, f"output {output!r}", message, _REMEDY)
