"""Accuracy floors: what a model must reach on data before it may be written."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qgraph import errors, files
from qgraph.report import Report

if TYPE_CHECKING:
    from qgraph.evaluate import Comparison, OutputError

_REMEDY = "try --recipe int8-weights, or keep the worst weights float (see --report)"
_SURPRISE = (
    1e-3  # nats that a floor of 100 % agreement is worth, where outputs are only put in order
)


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
        min_agreement: share of equal top-1 predictions, 0..1, for every such output.
        logits: names of the outputs that hold predictions; () tells them by name.
    """

    data: Any = None
    min_sqnr: float | None = None
    max_kl: float | None = None
    min_agreement: float | None = None
    logits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        share = self.min_agreement
        if share is not None and not 0 < share <= 1:
            raise errors.InputError(
                errors.Diagnostic(
                    "error", "QG130", "--min-agreement", f"{share:g} is no share between 0 and 1",
                    "write 0.99 for 99 % of the predictions",
                )
            )  # fmt: skip

    @property
    def is_set(self) -> bool:
        """Something is asked for."""
        return (self.min_sqnr, self.max_kl, self.min_agreement) != (None, None, None)

    def __str__(self) -> str:
        given = {
            "--min-sqnr": self.min_sqnr,
            "--max-kl": self.max_kl,
            "--min-agreement": self.min_agreement,
        }
        return " ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)

    def require_data(self) -> None:
        """Refuse floors that nothing can be measured on.

        Raises:
            errors.InputError: QG130.
        """
        if self.is_set and self.data is None:
            text = "an accuracy floor needs data to be measured on"
            where = "--min-sqnr/--max-kl/--min-agreement"
            raise errors.InputError(errors.Diagnostic("error", "QG130", where, text, "give --data"))

    def measure(self, model: files.Source, quantized: str | os.PathLike[str]) -> Comparison:
        """Compare a quantized model with its float model on all samples."""
        from qgraph import evaluate

        return evaluate.compare(model, quantized, self.data, logits=self.logits, rounds=0)

    def problems(self, outputs: Sequence[OutputError]) -> list[errors.Diagnostic]:
        """The floors that measured outputs miss, as errors."""
        found = []
        if self.min_sqnr is not None:
            measured = ((o.name, o.error.sqnr_db) for o in outputs if o.error is not None)
            found += [
                _missed("QG701", name, f"SQNR is {db:.1f} dB, the floor is {self.min_sqnr:g} dB")
                for name, db in measured
                if not db >= self.min_sqnr
            ]
        judged = [(o.name, o.divergence) for o in outputs if o.divergence]
        for name, each in judged:
            kl, same = each.kl_mean.value, each.agreement.value
            if self.max_kl is not None and not kl <= self.max_kl:
                text = f"KL divergence is {kl:.3g} nats, the ceiling is {self.max_kl:g}"
                found.append(_missed("QG702", name, text))
            if self.min_agreement is not None and not same >= self.min_agreement:
                text = f"top-1 agreement is {same:.2%}, the floor is {self.min_agreement:.2%}"
                found.append(_missed("QG706", name, text))
        if (self.max_kl, self.min_agreement) != (None, None) and not judged:
            text = "no output looks like predictions over classes, so there is nothing to judge"
            where = "--max-kl" if self.max_kl is not None else "--min-agreement"
            hint = "name it with --logits, or use --min-sqnr"
            found.append(errors.Diagnostic("error", "QG703", where, text, hint))
        return found

    @staticmethod
    def can_be_met(problems: Sequence[errors.Diagnostic]) -> bool:
        """Whether more bits could help: not where there is nothing to judge."""
        return all(each.code != "QG703" for each in problems)

    def damage(self, outputs: Sequence[OutputError]) -> float:
        """How far outputs are from the float model's, in units of what the floors allow.

        Noise power and KL divergence of independent errors add up, and so do these. Agreement is too coarse to put
        single operators in order; the KL divergence stands for it. NaN counts as infinite.
        """
        worst: list[float] = []
        if self.min_sqnr is not None:
            noise = [o.error.sqnr_db for o in outputs if o.error is not None]
            worst.append(max((10 ** ((self.min_sqnr - db) / 10) for db in noise), default=0.0))
        kl = max((o.divergence.kl_mean.value for o in outputs if o.divergence), default=0.0)
        if self.max_kl is not None:
            worst.append(kl / max(self.max_kl, 1e-12))
        if self.min_agreement is not None:
            worst.append(kl / max(1 - self.min_agreement, _SURPRISE))
        total = math.fsum(worst) if all(map(math.isfinite, worst)) else math.inf
        return max(total, 0.0)


def _missed(code: str, output: str, message: str) -> errors.Diagnostic:
    return errors.Diagnostic("error", code, f"output {output!r}", message, _REMEDY)
