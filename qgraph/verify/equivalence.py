"""Two models on the same inputs: error(y) = max|a - b| / max|a| for every output y, in float64.

Both run in ONNX Runtime with its graph optimizer off, so that what is compared is the two graphs as they are written
and not what an optimizer makes of them, and on one thread, so that sums are added in one order.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors, files, runtime
from qgraph.files import Source

IN_MEMORY = 1 << 30  # bytes of weights; ONNX messages end at 2 GB

Feeds: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Equivalence:
    """How close two models are.

    Attributes:
        max_rel_error: largest relative error of a floating-point output; inf where shapes, types, NaNs or infinities
            are not the same.
        worst_output: the output with that error, or with the most unequal integers.
        ok: every error is at most the tolerance, and every integer, boolean and string is equal.
        unequal_share: largest share of unequal elements in an integer, boolean or string output.
        reason: why it is not ok, for people.
    """

    max_rel_error: float
    worst_output: str
    ok: bool
    unequal_share: float = 0.0
    reason: str = ""


def equivalent(
    a: Source,
    b: Source,
    feeds: Sequence[Feeds],
    *,
    rtol: float = 1e-4,
    ties: float = 0.0,
) -> Equivalence:
    """Run both models on every feed and compare every output.

    Args:
        a: the reference: path, ModelProto or onnx_ir.Model.
        b: the model that should compute the same.
        feeds: inputs by name; see `sample_feeds`. Names that a model does not take are left out.
        rtol: largest relative error that is still ok.
        ties: share of unequal elements that is still ok in an integer output, for ArgMax-like ties.

    Raises:
        errors.RuntimeFailure: one of the models does not load or run.
        errors.InputError: there are no feeds.
    """
    if not feeds:
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG119", "feeds", "nothing to compare on", "pass one or more"
            )
        )
    # One after the other: two sessions would hold the weights twice.
    expected = run(a, feeds)
    actual = run(b, feeds)
    result = Equivalence(0.0, "", True)
    for want, got in zip(expected, actual, strict=True):
        if list(want) != list(got):
            both = f"{', '.join(want)} against {', '.join(got)}"
            return Equivalence(math.inf, "", False, reason=f"the outputs differ: {both}")
        for name, reference in want.items():
            result = _worse(result, _compare(name, reference, got[name], rtol, ties))
    return result


def run(model: Source, feeds: Sequence[Feeds]) -> list[dict[str, Any]]:
    """Outputs by name for each feed, from ONNX Runtime with its optimizer off."""
    live = session(model)
    return [run_once(live, feed) for feed in feeds]


def session(model: Source) -> Any:
    """A session with the optimizer off; a model too large for one message goes through a temporary file."""
    if isinstance(model, ir.Model):
        if files.weight_bytes(model) > IN_MEMORY:
            with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
                path = files.save(model, os.path.join(folder, "model.onnx"), external_data=True)
                return runtime.session(path, optimize="off", threads=1)
        return runtime.session(files.to_proto(model), optimize="off", threads=1)
    return runtime.session(model, optimize="off", threads=1)


def run_once(session: Any, feed: Feeds) -> dict[str, Any]:
    """Outputs by name. Inputs of other models in `feed` are left out."""
    import onnxruntime

    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4  # what it says is in the exception too
    taken = {i.name: feed[i.name] for i in session.get_inputs() if i.name in feed}
    names = [o.name for o in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, taken, quiet), strict=True))
    except Exception as e:  # the runtime's exception types are not public
        raise errors.RuntimeFailure(
            errors.Diagnostic("error", "QG602", "ONNX Runtime", f"could not run the model: {e}")
        ) from e


def relative_error(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """max|a - b| / max|a| in float64; inf where NaNs or infinities differ; max|b| where a is 0 throughout."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.size == 0:
        return 0.0
    finite = np.isfinite(x)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return math.inf
    x, y = x[finite], y[finite]
    if not np.isfinite(y).all():
        return math.inf
    if x.size == 0:
        return 0.0
    peak = float(np.abs(x).max())
    return float(np.abs(x - y).max()) / (peak or 1.0)


def _worse(a: Equivalence, b: Equivalence) -> Equivalence:
    """The joint result of two comparisons, named after the worse one."""
    if a.ok != b.ok:
        worst = a if b.ok else b
    else:
        worst = max(a, b, key=lambda e: (e.max_rel_error, e.unequal_share))
    return Equivalence(
        max(a.max_rel_error, b.max_rel_error),
        worst.worst_output,
        a.ok and b.ok,
        max(a.unequal_share, b.unequal_share),
        worst.reason,
    )


def _compare(name: str, a: Any, b: Any, rtol: float, ties: float) -> Equivalence:
    result = Equivalence(0.0, name, True)
    for x, y in _leaves(a, b):
        if x is None or y is None:
            return Equivalence(math.inf, name, False, reason=f"{name}: the sequences differ")
        result = _worse(result, _compare_arrays(name, np.asarray(x), np.asarray(y), rtol, ties))
    return result


def _compare_arrays(
    name: str, a: npt.NDArray[Any], b: npt.NDArray[Any], rtol: float, ties: float
) -> Equivalence:
    if a.dtype != b.dtype or a.shape != b.shape:
        both = f"{a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}"
        return Equivalence(math.inf, name, False, reason=f"{name}: {both}")
    if a.dtype.kind in "biuOUS":
        share = float(np.mean(a != b)) if a.size else 0.0
        is_ok = share <= ties
        reason = "" if is_ok else f"{name}: {share:.2%} of the elements are unequal"
        return Equivalence(0.0, name, is_ok, share, reason)
    error = relative_error(a, b)
    is_ok = error <= rtol
    reason = "" if is_ok else f"{name}: relative error {error:.3g}, allowed {rtol:.3g}"
    return Equivalence(error, name, is_ok, 0.0, reason)


def _leaves(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of arrays of two outputs; sequences and maps are walked. A None means that the structures differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping) and list(a) == list(b):
        for key in a:
            yield from _leaves(a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            yield from _leaves(x, y)
    elif (
        isinstance(a, (Mapping, list))
        or isinstance(b, (Mapping, list))
        or (a is None) != (b is None)
    ):
        yield None, None
    elif a is not None:
        yield a, b
