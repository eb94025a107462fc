"""Samples that a language model writes itself: token after token, drawn from its own predictions.

Few samples are soon learned by heart when all weights move. What the float model writes is as good for that as what was
given, because only its predictions count, and there is as much of it as is asked for (Liu et al., LLM-QAT,
arXiv:2305.17888, 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qgraph.data import Feeds
from qgraph.evaluate import distributions
from qgraph.gradients.rules import Array

_BEGINNING = 1  # tokens of a given sample that a written one begins with
_TOGETHER = 16  # samples written at a time, where the model takes batches


class Writer:
    """Writes samples that begin like given ones.

    Args:
        session: of the float model.
        output: with predictions.
        given: samples.
        length: of what is written, in tokens; samples that are shorter are followed by what is as short.
    """

    def __init__(self, session: Any, output: str, given: Sequence[Feeds], length: int) -> None:
        self._session, self._output, self._given, self._length = session, output, given, length

    def obstacle(self) -> str:
        """Why the model cannot write, or ""."""
        feeds = self._given[0]
        kinds = {(a.dtype.kind, a.shape) for a in feeds.values()}
        if len(kinds) != 1 or next(iter(kinds))[0] not in "iu":
            return "its inputs are not tokens alone, or tokens and what is as long as they are"
        found, name = self._predict(feeds), _tokens(feeds)
        if found.ndim != 3 or found.shape[:-1] != feeds[name].shape:
            return f"output {self._output!r} has shape {list(found.shape)}: no prediction for each token"
        if feeds[name].shape[-1] < 2:
            return "a sample has a single token"
        changed = {**feeds, name: feeds[name].copy()}
        changed[name][..., -1] = (changed[name][..., -1] + 1) % found.shape[-1]
        before = found[..., :-1, :]
        if not np.allclose(before, self._predict(changed)[..., :-1, :], rtol=1e-3, atol=1e-3):
            return "its predictions depend on later tokens"
        refusal = self._refusal(_cut(feeds, 1))
        return f"it takes samples of one length only: {refusal}" if refusal else ""

    def _refusal(self, feeds: Feeds) -> str:
        """What ONNX Runtime says where the model does not run on a sample of another shape, or ""."""
        try:
            self._predict(feeds)
        except Exception as e:  # noqa: BLE001 - ONNX Runtime's exceptions have no common type
            return str(e).partition("\n")[0] or type(e).__name__
        return ""

    def write(
        self, count: int, rng: np.random.Generator, progress: Callable[[str, float], None]
    ) -> list[Feeds]:
        """So many samples."""
        starts = [self._given[i % len(self._given)] for i in range(count)]
        pair = _stacked([self._given[0]] * 2, 2)
        size = 1 if self._refusal(pair) else _TOGETHER
        made: list[Feeds] = []
        while len(made) < count:
            progress(f"writing samples, {len(made)} of {count}", len(made) / count)
            made += self._write(starts[len(made) : len(made) + size], rng)
        return made

    def _write(self, starts: Sequence[Feeds], rng: np.random.Generator) -> list[Feeds]:
        name = _tokens(starts[0])
        length = min(self._length, *(each[name].shape[-1] for each in starts))
        made = _stacked(starts, length)
        for place in range(_BEGINNING, length):
            predicted = self._predict(_cut(made, place))[:, -1]
            is_logits = not distributions.is_probability(predicted)
            p = np.exp(distributions.log_probabilities(predicted, is_logits=is_logits))
            drawn = (p.cumsum(axis=-1) < rng.random((len(p), 1))).sum(axis=-1)
            made[name][:, place] = drawn.clip(0, p.shape[-1] - 1)
        rows = len(made[name]) // len(starts)
        return [
            {n: a[i * rows : (i + 1) * rows] for n, a in made.items()} for i in range(len(starts))
        ]

    def _predict(self, feeds: Feeds) -> Array:
        found: Array = self._session.run([self._output], dict(feeds))[0]
        return found


def _tokens(feeds: Feeds) -> str:
    """The input with the tokens: of several, the one whose values differ most."""
    return max(feeds, key=lambda name: len(np.unique(feeds[name])))


def _cut(feeds: Feeds, length: int) -> Feeds:
    return {name: a[..., :length] for name, a in feeds.items()}


def _stacked(samples: Sequence[Feeds], length: int) -> dict[str, Array]:
    """Samples of one length as one batch, in arrays of their own."""
    return {n: np.concatenate([s[n][..., :length] for s in samples]) for n in samples[0]}
