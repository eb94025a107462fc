"""What a bisection asks of every model that it tries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from qgraph import errors, evaluate, files, runtime, verify
from qgraph.floors import Floors

DEFAULT_SQNR = 10.0  # dB; below that an output has little to do with the float one


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check says of one model."""

    ok: bool
    detail: str


class Check(Protocol):
    """Judges the model in a file. `name` says what holds where it is ok."""

    name: str

    def __call__(self, path: Path) -> Outcome:
        """Judge one model; never raises for what is wrong with it."""


class Verifies:
    """The verifier finds no error."""

    name = "the verifier finds no error"

    def __call__(self, path: Path) -> Outcome:
        """Verify."""
        wrong = [d for d in verify.verify(ir.load(path)) if d.severity == "error"]
        return Outcome(not wrong, str(wrong[0]) if wrong else "no error")


class Loads:
    """ONNX Runtime loads it."""

    name = "ONNX Runtime loads the model"

    def __call__(self, path: Path) -> Outcome:
        """Open a session."""
        try:
            runtime.session(path, threads=1)
        except errors.RuntimeFailure as e:
            return Outcome(False, e.diagnostics[0].message)
        return Outcome(True, "loads")


class Runs:
    """ONNX Runtime runs it on given inputs."""

    name = "ONNX Runtime runs the model"

    def __init__(self, feeds: Iterable[Mapping[str, Any]]) -> None:
        self._feeds = feeds

    def __call__(self, path: Path) -> Outcome:
        """Run every feed."""
        loaded = Loads()(path)
        if not loaded.ok:
            return loaded
        session = runtime.session(path, threads=1)
        count = 0
        for feeds in self._feeds:
            try:
                session.run(None, dict(feeds))
            except Exception as e:  # noqa: BLE001 - the runtime's exceptions are not public
                return Outcome(False, f"loads, but does not run: {e}")
            count += 1
        return Outcome(True, f"runs on {count} inputs")


class Accuracy:
    """Its outputs are close to those of the float model."""

    def __init__(
        self,
        model: files.Source,
        feeds: Any,
        *,
        min_sqnr: float | None = None,
        max_kl: float | None = None,
        min_agreement: float | None = None,
    ) -> None:
        self._model, self._feeds = model, feeds
        self._floors = Floors(feeds, min_sqnr, max_kl, min_agreement)
        self._runs = Runs(feeds)
        sqnr = f"SQNR is at least {min_sqnr:g} dB" if min_sqnr is not None else ""
        kl = f"KL divergence is at most {max_kl:g} nats" if max_kl is not None else ""
        same = (
            f"top-1 agreement is at least {min_agreement:.2%}" if min_agreement is not None else ""
        )
        self.name = f"the model runs, and its {' and '.join(filter(None, (sqnr, kl, same)))}"

    def __call__(self, path: Path) -> Outcome:
        """Compare with the float model."""
        ran = self._runs(path)
        if not ran.ok:
            return ran
        found = evaluate.compare(self._model, path, self._feeds, rounds=0)
        problems = self._floors.problems(found.outputs)
        parts = [p.message for p in problems if p.code == "QG703"]
        for output in found.outputs:
            if output.error is not None:
                sqnr = output.error.sqnr_db
                parts.append(f"{output.name} {'exact' if sqnr == math.inf else f'{sqnr:.1f} dB'}")
            if output.divergence is not None:
                parts.append(f"KL {output.divergence.kl_mean.value:.2g}")
                parts.append(f"agreement {output.divergence.agreement.value:.2%}")
        return Outcome(not problems, ", ".join(parts))


class Divergence:
    """A language model predicts as the float model does."""

    def __init__(self, model: files.Source, tokens: Any, context: int, *, max_kl: float) -> None:
        self._model, self._tokens, self._context = model, tokens, context
        self._max_kl = max_kl
        self.name = f"KL divergence on tokens is at most {max_kl:g} nats"

    def __call__(self, path: Path) -> Outcome:
        """Compare with the float model."""
        loaded = Loads()(path)
        if not loaded.ok:
            return loaded
        found = evaluate.divergence(self._model, path, self._tokens, self._context)
        mean = found.divergence.kl_mean.value
        return Outcome(mean <= self._max_kl, f"KL {mean:.2g} nats")
