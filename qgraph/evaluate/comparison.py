"""Two models on the same data: accuracy of the outputs, bytes and time, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import data as samples
from qgraph import files
from qgraph.evaluate import cost, distributions, sessions, statistics, tensors


@dataclass(frozen=True, slots=True)
class OutputError:
    """One output. `error` for float outputs, `equal` (share of elements) for all others.

    `divergence` is there for the outputs that hold predictions over classes.
    """

    name: str
    error: tensors.TensorError | None
    equal: float | None
    divergence: distributions.Divergence | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of `compare`. Ratios are quantized / float: below 1 is smaller or faster."""

    outputs: tuple[OutputError, ...]
    samples: int
    data_digest: str
    float_bytes: int
    quant_bytes: int
    size_ratio: float
    bits_per_weight: float | None
    latency: cost.Latency | None

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite as "inf", "-inf", "nan"."""
        return dict(statistics.plain(self))


def compare(
    float_model: files.Source,
    quant_model: files.Source,
    data: samples.Source | samples.Dataset,
    *,
    logits: str | Sequence[str] = (),
    count: int | None = None,
    rounds: int = 20,
    threads: int = 1,
    seed: int = 0,
) -> Comparison:
    """Run both models on every sample and compare their outputs; no output is kept.

    Predictions over classes are the outputs named in `logits`; without it every float output whose
    name contains "logits", "prob" or "scores" and whose last axis has at least 2 classes. They get
    KL(float || quantized) in nats and top-1 agreement with bootstrap 95 % intervals over samples.

    Args:
        float_model: the reference.
        quant_model: the model to judge.
        data: anything `qgraph.data.load` takes.
        logits: see above.
        count: use the first so many samples.
        rounds: of the latency measurement on the first sample; 0 leaves it out.
        threads: of each session.
        seed: of the bootstrap.

    Raises:
        errors.InputError: QG11x for the data; QG120, QG121 where the models do not fit.
    """
    if isinstance(data, samples.Dataset) and count is None:
        dataset = data
    else:
        dataset = samples.load(data, samples.inputs_of(float_model), count)
    first = sessions.open_session(float_model, threads=threads)
    second = sessions.open_session(quant_model, threads=threads)
    sessions.require_same_interface(first, second)
    predictions = sessions.logit_outputs(first, [logits] if isinstance(logits, str) else logits)
    meters = [OutputMeter(o.name, o.name in predictions) for o in first.get_outputs()]
    names = [meter.name for meter in meters]
    for feeds in dataset:
        results = zip(first.run(names, feeds), second.run(names, feeds), strict=True)
        for meter, (x, y) in zip(meters, results, strict=True):
            meter.add(x, y)
    sizes = cost.model_bytes(float_model), cost.model_bytes(quant_model)
    latency = cost.interleave(first, second, next(iter(dataset)), rounds) if rounds else None
    return Comparison(
        outputs=tuple(meter.result(seed) for meter in meters),
        samples=len(dataset),
        data_digest=dataset.digest(),
        float_bytes=sizes[0],
        quant_bytes=sizes[1],
        size_ratio=sizes[1] / sizes[0],
        bits_per_weight=cost.bits_per_weight(float_model, quant_model),
        latency=latency,
    )


@dataclass(slots=True)
class OutputMeter:
    """Collects what is told about one output."""

    name: str
    is_prediction: bool
    error: tensors.ErrorMeter | None = None
    equal: statistics.MeanMeter = field(default_factory=statistics.MeanMeter)
    divergence: distributions.DivergenceMeter | None = None

    def add(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
        """The output of both models for one sample."""
        tensors.require_same_shape(self.name, x, y)
        if x.dtype.kind in "OSUbiu":
            self.equal.add(int(np.equal(x, y).sum()), x.size)
            return
        self.error = self.error or tensors.ErrorMeter()
        self.error.add(x, y)
        if self.is_prediction and x.ndim and x.shape[-1] >= 2:
            self.divergence = self.divergence or distributions.DivergenceMeter()
            self.divergence.add(x, y)

    def result(self, seed: int | None) -> OutputError:
        """What the samples so far say."""
        return OutputError(
            name=self.name,
            error=self.error.result() if self.error else None,
            equal=self.equal.mean() if self.equal.counts else None,
            divergence=self.divergence.result(seed) if self.divergence else None,
        )
