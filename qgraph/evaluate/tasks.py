"""Pieces of real tasks: top-1 accuracy and agreement, sentence embeddings, rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import data as samples
from qgraph import errors, files
from qgraph.evaluate import sessions, statistics

Floats = npt.NDArray[np.float64]


def accuracy(
    model: files.Source,
    data: samples.Source | samples.Dataset,
    labels: Sequence[npt.ArrayLike] | npt.NDArray[Any],
    *,
    logits: str | None = None,
    threads: int = 1,
    seed: int = 0,
) -> statistics.Estimate:
    """Share of predictions whose top-1 class is the label.

    Args:
        model: its predictions are [..., classes].
        data: anything `qgraph.data.load` takes.
        labels: per sample a class index, or an array [...] of them; negative ones are not counted.
        logits: name of the output; needed where it cannot be told.
        threads: of the session.
        seed: of the bootstrap over samples.

    Raises:
        errors.InputError: QG11x, QG121; QG125 where labels and predictions do not fit.
    """
    dataset = dataset_of(data, model)
    session = sessions.open_session(model, threads=threads)
    output = sessions.the_logit_output(session, logits)
    _require_fit("labels", len(labels), len(dataset), "samples")
    meter = statistics.MeanMeter()
    for index, (feeds, given) in enumerate(zip(dataset, labels, strict=True)):
        top = session.run([output], feeds)[0].argmax(axis=-1).ravel()
        label = np.asarray(given).ravel()
        _require_fit(f"labels of sample {index}", label.size, top.size, "predictions")
        meter.add(int((top == label).sum()), int((label >= 0).sum()))
    return meter.estimate(seed)


@dataclass(frozen=True, slots=True)
class AccuracyComparison:
    """Result of `accuracies`: shares of right predictions, their difference and agreement, over the same samples."""

    float_accuracy: statistics.Estimate
    quant_accuracy: statistics.Estimate
    change: statistics.Estimate
    agreement: statistics.Estimate

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(statistics.plain(self))


def accuracies(
    float_model: files.Source,
    quant_model: files.Source,
    data: samples.Source | samples.Dataset,
    labels: Sequence[npt.ArrayLike] | npt.NDArray[Any],
    *,
    logits: str | None = None,
    threads: int = 1,
    seed: int = 0,
) -> AccuracyComparison:
    """Accuracy of two models sample by sample, so that the interval of the change is that of pairs.

    Arguments and errors as for `accuracy`; predictions without a label count for nothing, in agreement either.
    """
    dataset = dataset_of(data, float_model)
    pair = [sessions.open_session(model, threads=threads) for model in (float_model, quant_model)]
    output = sessions.the_logit_output(pair[0], logits)
    _require_fit("labels", len(labels), len(dataset), "samples")
    right = [statistics.MeanMeter(), statistics.MeanMeter()]
    change, same = statistics.MeanMeter(), statistics.MeanMeter()
    for index, (feeds, given) in enumerate(zip(dataset, labels, strict=True)):
        first, second = (s.run([output], feeds)[0].argmax(axis=-1).ravel() for s in pair)
        label = np.asarray(given).ravel()
        _require_fit(f"labels of sample {index}", label.size, first.size, "predictions")
        counted = label >= 0
        hits = [int((top == label)[counted].sum()) for top in (first, second)]
        for meter, hit in zip(right, hits, strict=True):
            meter.add(hit, int(counted.sum()))
        change.add(hits[1] - hits[0], int(counted.sum()))
        same.add(int((first == second)[counted].sum()), int(counted.sum()))
    figures = (meter.estimate(seed) for meter in (*right, change, same))
    return AccuracyComparison(*figures)


def _require_fit(where: str, labels: int, others: int, what: str) -> None:
    if labels != others:
        found = f"{labels} labels for {others} {what}"
        hint = "give one label, or one array of labels, per sample"
        raise errors.InputError(errors.Diagnostic("error", "QG125", where, found, hint))


def agreement(
    float_model: files.Source,
    quant_model: files.Source,
    data: samples.Source | samples.Dataset,
    *,
    logits: str | None = None,
    threads: int = 1,
    seed: int = 0,
) -> statistics.Estimate:
    """Share of predictions whose top-1 class both models agree on; arguments as for `accuracy`."""
    dataset = dataset_of(data, float_model)
    pair = [sessions.open_session(model, threads=threads) for model in (float_model, quant_model)]
    output = sessions.the_logit_output(pair[0], logits)
    meter = statistics.MeanMeter()
    for feeds in dataset:
        first, second = (s.run([output], feeds)[0].argmax(axis=-1) for s in pair)
        meter.add(int((first == second).sum()), first.size)
    return meter.estimate(seed)


def dataset_of(data: samples.Source | samples.Dataset, model: files.Source) -> samples.Dataset:
    """The data as a dataset that fits the model."""
    if isinstance(data, samples.Dataset):
        return data
    return samples.load(data, samples.inputs_of(model))


def mean_pool(hidden: npt.NDArray[Any], mask: npt.NDArray[Any]) -> Floats:
    """Unit vectors [batch, d]: hidden states [batch, T, d] averaged where mask [batch, T] is 1."""
    weights = np.asarray(mask, np.float64)[..., None]
    pooled = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))


def cosines(a: npt.ArrayLike, b: npt.ArrayLike) -> Floats:
    """Cosine of each row of a [n, d] with the same row of b.

    >>> cosines([[1, 0], [1, 1]], [[1, 0], [1, 0]]).round(4).tolist()
    [1.0, 0.7071]
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray((x * y).sum(axis=1) / norms)


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Rank correlation of two lists; equal values share their mean rank.

    >>> round(spearman([1, 2, 3], [2, 2, 9]), 4)
    0.866
    """
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], np.float64)
