"""Running models, and telling which of their outputs are predictions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from qgraph import errors, files, runtime

LOGIT_NAMES = ("logits", "prob", "scores")
FLOAT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(double)", "tensor(bfloat16)")


def open_session(
    model: files.Source,
    *,
    threads: int = 1,
    profile: str | os.PathLike[str] | None = None,
    config: Mapping[str, str] | None = None,
) -> Any:
    """An ONNX Runtime session on the CPU, with qgraph's operators where they are installed."""
    if isinstance(model, str) and model.startswith("zoo:"):
        model = files.load(model)
    return runtime.session(model, threads=threads, profile=profile, config=config)


def logit_outputs(session: Any, wanted: Sequence[str]) -> list[str]:
    """`predictions` among the outputs of a session."""
    return predictions(session.get_outputs(), wanted)


def predictions(outputs: Sequence[Any], wanted: Sequence[str]) -> list[str]:
    """Names of those outputs, as a session declares them, that are predictions over classes.

    Those that the caller names, else every float output whose name contains "logits", "prob" or
    "scores" and whose last dimension is not known to be 1.

    Raises:
        errors.InputError: QG121 where a wanted output does not exist or is not float.
    """
    floats = [o for o in outputs if o.type in FLOAT_TYPES]
    for name in wanted:
        if name not in [o.name for o in floats]:
            hint = errors.nearest(name, [o.name for o in floats])
            raise errors.InputError(
                errors.Diagnostic("error", "QG121", "", f"there is no float output {name!r}", hint)
            )
    if wanted:
        return list(wanted)
    named = [o for o in floats if any(part in o.name.lower() for part in LOGIT_NAMES)]
    return [o.name for o in named if o.shape and o.shape[-1] != 1]


def the_logit_output(session: Any, wanted: str | None) -> str:
    """The one output with predictions: as `logit_outputs`, else the only float output.

    Raises:
        errors.InputError: QG121 where that leaves none or several.
    """
    found = logit_outputs(session, [wanted] if wanted else [])
    floats = [o.name for o in session.get_outputs() if o.type in FLOAT_TYPES]
    found = found or floats
    if len(found) != 1:
        shown = ", ".join(o.name for o in session.get_outputs())
        what = f"which output holds the predictions? outputs: {shown}"
        raise errors.InputError(errors.Diagnostic("error", "QG121", "", what, "pass logits=NAME"))
    return found[0]


def require_same_interface(first: Any, second: Any) -> None:
    """Refuse two sessions whose inputs or outputs differ in name or type.

    Raises:
        errors.InputError: QG120 with every difference.
    """
    wrong = []
    for kind in ("input", "output"):
        float_side, quant_side = (
            {v.name: v.type for v in getattr(s, f"get_{kind}s")()} for s in (first, second)
        )
        for name in sorted(float_side.keys() | quant_side.keys()):
            has = (float_side.get(name, "nothing"), quant_side.get(name, "nothing"))
            if has[0] != has[1]:
                what = f"{has[0]} in the float model, {has[1]} in the quantized model"
                other = quant_side if name in float_side else float_side
                hint = errors.nearest(name, other)
                wrong.append(errors.Diagnostic("error", "QG120", f"{kind} {name!r}", what, hint))
    if wrong:
        raise errors.InputError(*wrong)
