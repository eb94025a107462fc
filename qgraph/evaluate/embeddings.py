"""Models that give a vector for a text or an image: how far vectors move, and whether similarities keep their order.

e_i       the output [batch, d], or hidden states [batch, T, d] pooled over T; scaled to length 1
cosine    mean over i of e_i · ê_i                         float against quantized
Spearman  of e_i · e_j against ê_i · ê_j over all pairs; or of each model's e_2i · e_2i+1 against given scores
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from qgraph import data as samples
from qgraph import errors, files
from qgraph.evaluate import sessions, statistics, tasks

Floats = npt.NDArray[np.float64]
Pool: TypeAlias = Literal["mean", "first"]
POOLS: tuple[Pool, ...] = ("mean", "first")
MOST = 1000  # vectors of which all pairs are compared


@dataclass(frozen=True, slots=True)
class EmbeddingComparison:
    """Result of `embeddings`.

    Attributes:
        output: which output was taken.
        vectors: how many there were.
        cosine: mean cosine of a vector with its float version.
        worst_cosine: the smallest.
        spearman: rank correlation of the similarities of all pairs (of the first MOST vectors), nan below 3 vectors.
        float_spearman: rank correlation of the float model's similarities with the given scores, None without.
        quant_spearman: the same of the quantized model.
    """

    output: str
    vectors: int
    cosine: statistics.Estimate
    worst_cosine: float
    spearman: float
    float_spearman: float | None
    quant_spearman: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite as "inf", "-inf", "nan"."""
        return dict(statistics.plain(self))


def embeddings(
    float_model: files.Source,
    quant_model: files.Source,
    data: samples.Source | samples.Dataset,
    *,
    output: str | None = None,
    pool: Pool = "mean",
    scores: Sequence[float] | npt.NDArray[Any] | None = None,
    threads: int = 1,
    seed: int = 0,
) -> EmbeddingComparison:
    """Compare the vectors that two models give.

    Args:
        float_model: the reference.
        quant_model: the model to judge.
        data: anything `qgraph.data.load` takes.
        output: name of the output [batch, d] or [batch, T, d]; needed where there are several float ones.
        pool: of hidden states: "mean" over the tokens where the input with "mask" in its name is 1 (all without one),
            or the "first" token.
        scores: how similar vectors 0 and 1, 2 and 3, … are by human judgement.
        threads: of each session.
        seed: of the bootstrap over samples.

    Raises:
        errors.InputError: QG11x for the data; QG120, QG121 for the models; QG125 where scores and vectors do not fit.
    """
    dataset = tasks.dataset_of(data, float_model)
    pair = [sessions.open_session(model, threads=threads) for model in (float_model, quant_model)]
    sessions.require_same_interface(*pair)
    name = _output(pair[0], output)
    meter = statistics.MeanMeter()
    found: tuple[list[Floats], list[Floats]] = ([], [])
    worst = np.inf
    for feeds in dataset:
        both = [_vectors(session.run([name], feeds)[0], feeds, pool, name) for session in pair]
        cosines = tasks.cosines(*both)
        meter.add(float(cosines.sum()), len(cosines))
        worst = float(np.minimum(worst, cosines.min(initial=np.inf)))
        for kept, vectors in zip(found, both, strict=True):
            kept.append(vectors)
    first, second = (np.concatenate(vectors) for vectors in found)
    judged: list[float | None] = [None, None]
    if scores is not None:
        judged = [_against(scores, vectors) for vectors in (first, second)]
    return EmbeddingComparison(
        output=name,
        vectors=len(first),
        cosine=meter.estimate(seed),
        worst_cosine=worst,
        spearman=tasks.spearman(_pairs(first), _pairs(second)) if len(first) > 2 else np.nan,
        float_spearman=judged[0],
        quant_spearman=judged[1],
    )


def _output(session: Any, wanted: str | None) -> str:
    floats = [o.name for o in session.get_outputs() if o.type in sessions.FLOAT_TYPES]
    if wanted is not None and wanted not in floats:
        _fail("QG121", "", f"there is no float output {wanted!r}", errors.nearest(wanted, floats))
    if wanted is None and len(floats) != 1:
        shown = ", ".join(floats)
        _fail("QG121", "", f"which output holds the vectors? float outputs: {shown}", "pass output=NAME")  # fmt: skip
    return wanted or str(floats[0])


def _vectors(
    values: npt.NDArray[Any], feeds: Mapping[str, npt.NDArray[Any]], pool: Pool, name: str
) -> Floats:
    """Unit vectors [batch, d] of an output."""
    array = np.asarray(values, np.float64)
    if array.ndim == 3 and pool == "first":
        array = array[:, 0]
    elif array.ndim == 3:
        masks = [
            f for key, f in feeds.items() if "mask" in key.lower() and f.shape == array.shape[:2]
        ]
        mask = masks[0] if masks else np.ones(array.shape[:2])
        return tasks.mean_pool(array, mask)
    if array.ndim != 2:
        found = f"has shape {list(values.shape)}, expected [batch, d] or [batch, T, d]"
        _fail("QG121", f"output {name!r}", found, "pass output=NAME")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(array / np.linalg.norm(array, axis=1, keepdims=True))


def _pairs(vectors: Floats) -> Floats:
    """Similarities of all pairs of the first vectors."""
    taken = vectors[:MOST]
    similar: Floats = (taken @ taken.T)[np.triu_indices(len(taken), 1)]
    return similar


def _against(scores: Sequence[float] | npt.NDArray[Any], vectors: Floats) -> float:
    given = np.asarray(scores, np.float64).ravel()
    if 2 * len(given) != len(vectors) or len(given) < 3:
        found = f"{len(given)} scores for {len(vectors)} vectors"
        _fail("QG125", "scores", found, "give one score for each two vectors, at least 3")
    return tasks.spearman(given, (vectors[::2] * vectors[1::2]).sum(axis=1))


def _fail(code: str, where: str, message: str, hint: str) -> NoReturn:
    raise errors.InputError(errors.Diagnostic("error", code, where, message, hint))
