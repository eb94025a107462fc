"""Language models on tokens: perplexity of one, divergence of two.

    nll = -mean over windows and t >= 1 of log p(token_t | tokens before t in the same window)
    perplexity = exp(nll)

A token array is cut into windows of `context` tokens that do not overlap; a shorter rest is left
out. A list of arrays is a list of texts: each is one window by itself, cut at `context` tokens.
The first token of a window is context only, so a window of T tokens counts T - 1 predictions; each
prediction weighs the same. Log-softmax is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from qgraph import errors, files
from qgraph.evaluate import distributions, sessions, statistics

Array = npt.NDArray[Any]
Tokens: TypeAlias = "npt.NDArray[np.integer[Any]] | Sequence[npt.NDArray[np.integer[Any]]]"

INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(nll) over `tokens` predicted tokens in `windows` windows; nll in nats per token."""

    perplexity: float
    nll: float
    tokens: int
    windows: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(statistics.plain(self))


@dataclass(frozen=True, slots=True)
class LanguageComparison:
    """Result of `divergence`.

    Intervals are bootstrapped over windows; nll_change is that of the quantized model minus float.
    """

    divergence: distributions.Divergence
    float_perplexity: Perplexity
    quant_perplexity: Perplexity
    nll_change: statistics.Estimate

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite as "inf", "-inf", "nan"."""
        return dict(statistics.plain(self))


def perplexity(
    model: files.Source,
    tokens: Tokens,
    context: int,
    *,
    logits: str | None = None,
    threads: int = 1,
) -> Perplexity:
    """Perplexity of a model, by the convention at the top of this file.

    Args:
        model: takes one window [1, T] of token ids and gives logits [1, T, vocabulary]; other
            inputs as `LanguageModel` says.
        tokens: one array of ids, or one per text.
        context: tokens per window.
        logits: name of the output; needed where it cannot be told.
        threads: of the session.

    Raises:
        errors.InputError: QG121, QG122 where the model is not understood, QG123 for the tokens.
    """
    language_model = LanguageModel(model, logits, threads)
    nll = statistics.MeanMeter()
    for window in windows(tokens, context):
        values = nll_of(language_model.run(window), window)
        nll.add(values.sum(), len(values))
    return _perplexity(nll)


def divergence(
    float_model: files.Source,
    quant_model: files.Source,
    tokens: Tokens,
    context: int,
    *,
    logits: str | None = None,
    threads: int = 1,
    seed: int = 0,
) -> LanguageComparison:
    """KL(float || quantized), top-1 agreement and both perplexities, in one pass over the tokens.

    KL and agreement are taken over the predictions that the perplexity counts. Arguments and
    errors as for `perplexity`; `seed` is that of the bootstrap.
    """
    pair = [LanguageModel(model, logits, threads) for model in (float_model, quant_model)]
    meter = distributions.DivergenceMeter(is_logits=True)
    nll = [statistics.MeanMeter(), statistics.MeanMeter()]
    for window in windows(tokens, context):
        p, q = (model.run(window) for model in pair)
        meter.add(p[:-1], q[:-1])
        for one, values in zip(nll, (nll_of(p, window), nll_of(q, window)), strict=True):
            one.add(values.sum(), len(values))
    change = statistics.MeanMeter()
    for before, after, count in zip(nll[0].sums, nll[1].sums, nll[0].counts, strict=True):
        change.add(after - before, count)
    return LanguageComparison(
        meter.result(seed), _perplexity(nll[0]), _perplexity(nll[1]), change.estimate(seed)
    )


def _perplexity(nll: statistics.MeanMeter) -> Perplexity:
    mean = nll.mean()
    # A broken model can reach any nll; exp() must not raise on it.
    value = math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan
    return Perplexity(value, mean, sum(nll.counts), len(nll.counts))


def windows(tokens: Tokens, context: int) -> Iterator[npt.NDArray[np.int64]]:
    """The windows that are evaluated; see the top of this file."""
    if context < 2:
        _fail("QG123", "context", f"{context} tokens leave nothing to predict", "use at least 2")
    if isinstance(tokens, np.ndarray):
        array = _ids(tokens)
        if len(array) < context:
            found = f"{len(array)} tokens do not fill one window of {context}"
            _fail("QG123", "tokens", found, "give more tokens or a smaller context")
        for start in range(0, len(array) - context + 1, context):
            yield array[start : start + context]
        return
    texts = [_ids(np.asarray(text))[:context] for text in tokens]
    if not any(len(text) > 1 for text in texts):
        _fail("QG123", "tokens", "no text has two tokens", "give token ids, one array per text")
    yield from (text for text in texts if len(text) > 1)


def _ids(tokens: Array) -> npt.NDArray[np.int64]:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = f"found {tokens.dtype} of shape {list(tokens.shape)}"
        _fail("QG123", "tokens", f"{found}, expected integers of one dimension", "tokens.ravel()?")
    return tokens.astype(np.int64)


def nll_of(logits: npt.NDArray[Any], window: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """-log p of tokens 1 … T-1 of a window [T], from logits [T, vocabulary]."""
    vocabulary = logits.shape[1]
    if window.min() < 0 or window.max() >= vocabulary:
        bad = window[(window < 0) | (window >= vocabulary)][0]
        found = f"id {bad} is not in the vocabulary of {vocabulary}"
        _fail("QG123", "tokens", found, "use the model's own tokenizer")
    result = np.empty(len(window) - 1)
    for rows in distributions.row_chunks(len(result), vocabulary):
        log_p = distributions.log_softmax(logits[rows])
        targets = window[1:][rows]
        result[rows] = -log_p[np.arange(len(targets)), targets]
    return result


class LanguageModel:
    """A session that is fed with token windows.

    Ids go to the integer input named input_ids, or to the only one that is left after those which
    are known by name: attention_mask is all ones, token_type_ids all zeros, position_ids 0 … T-1,
    and a past key or value (float, "past" or "cache" in its name) has length 0.
    """

    def __init__(self, model: files.Source, logits: str | None = None, threads: int = 1) -> None:
        self._session = sessions.open_session(model, threads=threads)
        self._output = sessions.the_logit_output(self._session, logits)
        self._inputs = self._session.get_inputs()
        self._ids = self._find_ids()

    def run(self, window: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Logits [T, vocabulary] of one window [T]."""
        feeds = {given.name: self._feed(given, window) for given in self._inputs}
        logits: Array = self._session.run([self._output], feeds)[0]
        if logits.ndim == 3 and logits.shape[0] == 1:
            logits = logits[0]
        if logits.ndim != 2 or len(logits) != len(window):
            found = f"has shape {list(logits.shape)} for {len(window)} tokens"
            expected = "predictions for every token, [1, T, vocabulary]"
            where = f"output {self._output!r}"
            _fail("QG121", where, f"{found}, expected {expected}", "pass logits=NAME")
        return logits

    def _find_ids(self) -> str:
        names = [i.name for i in self._inputs if i.type in INTEGERS and not _known(i.name)]
        if "input_ids" in names:
            return "input_ids"
        if len(names) != 1:
            _fail("QG122", "", f"which input takes the token ids? {self._listing()}", _RULE)
        return str(names[0])

    def _feed(self, given: Any, window: npt.NDArray[np.int64]) -> Array:
        where, known = f"input {given.name!r}", _known(given.name)
        if given.type in INTEGERS and (known or given.name == self._ids):
            size = given.shape[-1] if given.shape else None
            if isinstance(size, int) and size != len(window):
                found = f"takes {size} tokens, not {len(window)}"
                _fail("QG122", where, found, f"use context={size}")
            row = (_FILL[known](window) if known else window).astype(INTEGERS[given.type])
            return row if len(given.shape) == 1 else row[None]
        is_past = any(part in given.name.lower() for part in _PAST)
        if given.type not in FLOATS or not is_past or len(given.shape) < 3:
            _fail("QG122", where, f"is not understood; {self._listing()}", _RULE)
        return np.zeros(_empty_past(given.shape), FLOATS[given.type])

    def _listing(self) -> str:
        return "inputs: " + ", ".join(f"{i.name} {i.type}{i.shape}" for i in self._inputs)


_RULE = (
    "expected one integer input of token ids, and attention_mask, token_type_ids, position_ids or "
    "float past keys and values"
)
_FILL: dict[str, Callable[[Array], Array]] = {
    "attention_mask": np.ones_like,
    "token_type_ids": np.zeros_like,
    "position_ids": lambda window: np.arange(len(window)),
}
_PAST = ("past", "cache")


def _known(name: str) -> str | None:
    return next((known for known in _FILL if known in name.lower()), None)


def _empty_past(shape: Sequence[int | str | None]) -> list[int]:
    """Batch 1 and no past tokens: every symbolic axis behind the batch is one of time."""
    return [d if isinstance(d, int) else int(axis == 0) for axis, d in enumerate(shape)]


def _fail(code: str, where: str, message: str, hint: str) -> NoReturn:
    raise errors.InputError(errors.Diagnostic("error", code, where, message, hint))
