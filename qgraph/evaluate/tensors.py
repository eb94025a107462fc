"""Numeric distance between two versions of one tensor: at the outputs, or at values inside."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors, files
from qgraph.evaluate import sessions

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorError:
    """Distance of a tensor from its float version, over all samples, computed in float64.

    sqnr_db is 10 log10(Σx² / Σ(x - y)²), inf where equal; cosine is Σxy / √(Σx² Σy²) and
    worst_cosine that of the worst sample, nan for zero vectors. `broken` counts elements that are
    finite in the float version alone; then sqnr_db is -inf and max_abs inf.
    """

    sqnr_db: float
    max_abs: float
    cosine: float
    worst_cosine: float
    broken: int


def require_same_shape(name: str, x: Array, y: Array) -> None:
    """Refuse a tensor whose shape differs between the models.

    Raises:
        errors.InputError: QG120.
    """
    if x.shape != y.shape:
        what = f"shape {list(x.shape)} in the float model, {list(y.shape)} in the quantized model"
        hint = "were both made from the same model?"
        raise errors.InputError(errors.Diagnostic("error", "QG120", f"value {name!r}", what, hint))


class ErrorMeter:
    """Takes pairs of tensors; keeps sums only."""

    def __init__(self) -> None:
        self._xx = self._yy = self._xy = self._noise = self._max_abs = 0.0
        self._worst = math.inf
        self._broken = 0

    def add(self, reference: Array, other: Array) -> None:
        """One sample. Elements that are not finite in both versions are left out of the sums."""
        x = np.asarray(reference, np.float64).ravel()
        y = np.asarray(other, np.float64).ravel()
        x_finite, y_finite = np.isfinite(x), np.isfinite(y)
        self._broken += int((x_finite & ~y_finite).sum())
        both = x_finite & y_finite
        if not both.all():
            x, y = x[both], y[both]
        xx, yy, xy = _dot(x, x), _dot(y, y), _dot(x, y)
        difference = x - y
        self._noise += _dot(difference, difference)
        self._max_abs = max(self._max_abs, float(np.abs(difference).max(initial=0)))
        self._xx, self._yy, self._xy = self._xx + xx, self._yy + yy, self._xy + xy
        if x.size:
            # Not min(): it would lose a nan.
            self._worst = float(np.minimum(self._worst, _cosine(xx, yy, xy)))

    def result(self) -> TensorError:
        """The distance over the samples so far."""
        if self._broken:
            sqnr, max_abs = -math.inf, math.inf
        else:
            sqnr, max_abs = _decibel(self._xx, self._noise), self._max_abs
        cosine = _cosine(self._xx, self._yy, self._xy)
        worst = self._worst if self._worst < math.inf else math.nan
        return TensorError(sqnr, max_abs, cosine, worst, self._broken)


def _dot(x: Array, y: Array) -> float:
    """Σ xy in one thread: a BLAS splits such a sum by its threads, and waits for them longer than it computes."""
    return float(np.einsum("i,i->", x, y))


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _cosine(xx: float, yy: float, xy: float) -> float:
    return xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else math.nan


def sqnr_per_tensor(
    float_model: files.Source,
    quant_model: files.Source,
    feeds: Mapping[str, Array] | Iterable[Mapping[str, Array]],
    names: Sequence[str] | None = None,
    *,
    threads: int = 1,
) -> dict[str, TensorError]:
    """Distance of values inside the graph, with the error of all nodes before (accumulated).

    Args:
        float_model: the reference.
        quant_model: the model to judge; values correspond by name.
        feeds: one sample, or several.
        names: float values that both main graphs hold; default: all of them, in graph order.
        threads: of each session.

    Raises:
        errors.InputError: QG124 where a name is not a float value of both models, QG120 where its
            shapes differ.
    """
    pair = (files.load(float_model), files.load(quant_model))
    candidates = shared_values(pair, names)
    first, second = (sessions.open_session(model, threads=threads) for model in pair)
    # Only the runtime knows the type of a value that the file leaves untyped.
    floats = [o.name for o in first.get_outputs() if o.type in sessions.FLOAT_TYPES]
    wanted = [name for name in candidates if name in floats]
    require_names(wanted if names is None else candidates, floats, "float model")
    meters = {name: ErrorMeter() for name in wanted}
    for sample in [feeds] if isinstance(feeds, Mapping) else feeds:
        results = zip(first.run(wanted, sample), second.run(wanted, sample), strict=True)
        for name, (x, y) in zip(wanted, results, strict=True):
            require_same_shape(name, x, y)
            meters[name].add(x, y)
    return {name: meter.result() for name, meter in meters.items()}


def shared_values(pair: Sequence[ir.Model], names: Sequence[str] | None) -> list[str]:
    """The named float values, or all that both models hold; they become outputs of both.

    Raises:
        errors.InputError: QG124 where a name is in one model only, or nothing is in both.
    """
    known = [_float_values(model) for model in pair]
    shared = [name for name in known[0] if name in known[1]]
    candidates = shared if names is None else list(names)
    for which, model, values in zip(("float", "quantized"), pair, known, strict=True):
        require_names(candidates, values, f"{which} model")
        _add_outputs(model, values, candidates)
    return candidates


def _float_values(model: ir.Model) -> dict[str, ir.Value]:
    """Node outputs of the main graph that are, or may be, floating-point tensors."""
    values = (v for node in model.graph for v in node.outputs if v.name)
    return {str(v.name): v for v in values if v.type is None or _is_float(v.type)}


def _is_float(kind: ir.TypeProtocol) -> bool:
    return isinstance(kind, ir.TensorType) and kind.dtype.is_floating_point()


def require_names(names: Sequence[str], known: Collection[str], where: str) -> None:
    """Refuse names that are not known, and no names at all.

    Raises:
        errors.InputError: QG124.
    """
    found = [
        (f"has no float value {n!r}", errors.nearest(n, known)) for n in names if n not in known
    ]
    if not names:
        found = [("shares no float value with the other model", "were both made from one model?")]
    if found:
        raise errors.InputError(*(errors.Diagnostic("error", "QG124", where, *f) for f in found))


def _add_outputs(model: ir.Model, values: Mapping[str, ir.Value], names: Sequence[str]) -> None:
    present = {v.name for v in model.graph.outputs}
    model.graph.outputs.extend(values[n] for n in names if n not in present)
