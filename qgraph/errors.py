"""What can go wrong, and how a person is told.

Every message that reaches a user is a `Diagnostic`: what, where, found versus expected, and what to do next.
Codes: QG1xx input, QG2xx transform, QG3xx assignment, QG4xx solving, QG5xx lowering, QG6xx runtime, Vnn verifier.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note", "missed"]


GIVE_SAMPLES = (
    "give samples: --data with an .npz file, a folder of .npz files or images, a text or FILE.py:FUNCTION; "
    "from Python data=..."
)
"""The hint of whatever cannot work without data."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. `missed` is a lost opportunity: correct, but smaller or faster was possible."""

    severity: Severity
    code: str
    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f" {self.where}" if self.where else ""
        hint = f"\n  help: {self.hint}" if self.hint else ""
        return f"{self.severity} {self.code}{place}: {self.message}{hint}"


class QGraphError(Exception):
    """Base of every error that qgraph raises on purpose; carries its diagnostics and an exit code."""

    exit_code = 1

    def __init__(self, *diagnostics: Diagnostic) -> None:
        if not diagnostics:
            raise TypeError(f"{type(self).__name__} needs at least one Diagnostic")
        super().__init__("\n".join(map(str, diagnostics)))
        self.diagnostics = diagnostics


class InputError(QGraphError):
    """A model, data or output path that cannot be used."""


class RecipeError(QGraphError):
    """A recipe, rule, option or name that means nothing."""


class PipelineError(QGraphError):
    """Passes in an order that cannot work, or a pass that broke its own contract."""


class UnsupportedError(QGraphError):
    """A form that the target, the opset or ONNX cannot express."""


class RuntimeFailure(QGraphError):
    """ONNX Runtime, OpenVINO or the native library refused to do something."""


class VerificationError(QGraphError):
    """A model failed the verifier or the equivalence check."""

    exit_code = 2


class AccuracyError(QGraphError):
    """An accuracy floor that the user asked for was missed."""

    exit_code = 3


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence part for unknown names: the closest known ones, or all of them if there are few.

    >>> nearest("int4.g23", ["int4", "int8", "int4.g32"])
    'did you mean int4.g32, int4?'
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.6)
    if close:
        return f"did you mean {', '.join(close)}?"
    if not names:
        return "nothing is known by that kind of name"
    shown = ", ".join(names[:20])
    return f"known: {shown}{', …' if len(names) > 20 else ''}"
