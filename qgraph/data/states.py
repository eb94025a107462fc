"""What a model carries from one call to the next: inputs that a sample may leave out, and what they then hold.

A recurrent state or a key-value cache is known by its name. The first call of a session gives it zeros, and an empty
cache where the past has no fixed length, so that is what a sample without it means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from qgraph import errors
from qgraph.data.infos import Array, InputInfo

_WORDS = {"state", "states", "past", "cache", "hidden", "h", "c", "h0", "c0", "hn", "cn"}
_PAST = {"past", "cache", "memory"}


def is_state(info: InputInfo) -> bool:
    """Whether the input is a float tensor that is named like a state: `state`, `h0`, `past_key_values.0.key`."""
    words = _words(info.name)
    if info.dtype.kind in "biuOSU" or words.isdisjoint(_WORDS):
        return False
    # What an encoder hands to a decoder is data, not a state.
    is_data = "encoder" in words or {"hidden", "states"} <= words
    return not (is_data and words.isdisjoint(_PAST))


def required(inputs: Sequence[InputInfo]) -> tuple[InputInfo, ...]:
    """The inputs that a sample cannot leave out: all but states; all of them where nothing else is there."""
    return tuple(i for i in inputs if not is_state(i)) or tuple(inputs)


def first(info: InputInfo, sizes: Mapping[str, int]) -> Array | None:
    """The state of a first call, or None where its shape cannot be told.

    Args:
        info: the state.
        sizes: the symbolic dimensions that the sample's other inputs fix.
    """
    if info.shape is None:
        return None
    shape = []
    for dim in info.shape:
        words = _words(dim) if isinstance(dim, str) else set()
        if isinstance(dim, int):
            shape.append(dim)
        elif dim is not None and dim in sizes:
            shape.append(sizes[dim])
        elif not words.isdisjoint(_PAST):
            shape.append(0)
        elif "batch" in words:
            shape.append(1)
        else:
            return None
    return np.zeros(shape, info.dtype)


def note(info: InputInfo, state: Array, where: str) -> errors.Diagnostic:
    """What is told where a state was left out. Zeros say less than recorded states: that is a warning."""
    if state.size == 0:
        found = f"input {info} is not in the data: every sample starts with an empty one"
        return errors.Diagnostic("note", "QG153", where, found)
    found = f"input {info} is not in the data: every sample gets zeros, as a first call does"
    hint = "feed recorded states too where ranges or accuracy have to hold for later calls"
    return errors.Diagnostic("warning", "QG153", where, found, hint)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))
