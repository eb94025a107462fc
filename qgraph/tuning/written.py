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


class Writer:
    """Writes samples that are as long as given ones.

    Args:
        session: of the float model.
        output: with predictions.
        given: samples.
    """

    def __init__(self, session: Any, output: str, given: Sequence[Feeds]) -> None:
        self._session, self._output, self._given = session, output, given

    def obstacle(self) -> str:
        """Why the model cannot write, or ""."""
        feeds = self._given[0]
        kinds = {(a.dtype.kind, a.shape) for a in feeds.values()}
        if len(kinds) != 1 or next(iter(kinds))[0] not in "iu":
            return "its inputs are not tokens alone, or tokens and what is as long as they are"
        found = self._predict(feeds)
        tokens = self._tokens(feeds)
        if found.ndim != tokens.ndim + 1 or found.shape[:-1] != tokens.shape:
            return f"output {self._output!r} has shape {list(found.shape)}: no prediction for each token"
        if tokens.shape[-1] < 2:
            return "a sample has a single token"
        changed = {name: a.copy() for name, a in feeds.items()}
        last = changed[self._name(feeds)]
        last[..., -1] = (last[..., -1] + 1) % found.shape[-1]
        before = found[..., :-1, :]
        if not np.allclose(before, self._predict(changed)[..., :-1, :], rtol=1e-3, atol=1e-3):
            return "its predictions depend on later tokens"
        return self._fixed_length(feeds)

    def _fixed_length(self, feeds: Feeds) -> str:
        try:
            self._predict(_cut(feeds, 1))
        except Exception as e:  # noqa: BLE001 - ONNX Runtime has no exception for it
            return f"it takes no other lengths: {e}"
        return ""

    def write(
        self, count: int, rng: np.random.Generator, progress: Callable[[str, float], None]
    ) -> list[Feeds]:
        """So many samples; each begins and is as long as one of the given."""
        made = []
        for index in range(count):
            progress(f"writing samples, {index + 1} of {count}", index / count)
            made.append(self._one(self._given[index % len(self._given)], rng))
        return made

    def _one(self, given: Feeds, rng: np.random.Generator) -> Feeds:
        name = self._name(given)
        made = {n: a.copy() for n, a in given.items()}
        for length in range(_BEGINNING, self._tokens(given).shape[-1]):
            predicted = self._predict(_cut(made, length))[..., -1, :]
            is_logits = not distributions.is_probability(predicted)
            p = np.exp(distributions.log_probabilities(predicted, is_logits=is_logits))
            drawn = rng.random((*p.shape[:-1], 1))
            made[name][..., length] = (
                (p.cumsum(axis=-1) < drawn).sum(axis=-1).clip(0, p.shape[-1] - 1)
            )
        return made

    def _predict(self, feeds: Feeds) -> Array:
        found: Array = self._session.run([self._output], dict(feeds))[0]
        return found

    def _name(self, feeds: Feeds) -> str:
        """The input with the tokens: of several, the one whose values differ most."""
        return max(feeds, key=lambda name: len(np.unique(feeds[name])))

    def _tokens(self, feeds: Feeds) -> Array:
        return feeds[self._name(feeds)]


def _cut(feeds: Feeds, length: int) -> Feeds:
    return {name: a[..., :length] for name, a in feeds.items()}
