"""What one sample has to be: names, dtypes, shapes and finite values of the model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qgraph import errors
from qgraph.data import states
from qgraph.data.infos import Array, Casts, Feeds, InputInfo, error, fail


def fit(sample: Any, inputs: Sequence[InputInfo], place: str, casts: Casts) -> Feeds:
    """The sample as arrays of the model's types; raises with everything that is wrong with it."""
    if not isinstance(sample, Mapping):
        hint = f"yield dicts like {{{inputs[0].name!r}: array}}" if inputs else "yield dicts"
        fail("QG113", place, f"a sample is a dict of arrays, found {type(sample).__name__}", hint)
    wrong = names(sample, inputs, place)
    feeds: Feeds = {}
    sizes: dict[str, tuple[int, str]] = {}
    for info in inputs:
        if info.name not in sample:
            continue
        where = f"{place}[{info.name}]"
        try:
            array = _cast(np.asarray(sample[info.name]), info, where, casts)
        except errors.InputError as e:
            wrong += e.diagnostics
            continue
        wrong += _shape(array, info, where, sizes)
        if array.dtype.kind not in "OSUbiu" and not np.isfinite(array).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            bad = f"input {info}: {array[at]} at index {list(at)}"
            wrong.append(error("QG118", where, bad, "remove NaN and infinity from the data"))
        feeds[info.name] = array
    if not wrong:
        wrong = _add_states(feeds, inputs, place, casts, {d: s for d, (s, _) in sizes.items()})
    if wrong:
        raise errors.InputError(*wrong)
    return feeds


def _add_states(
    feeds: Feeds, inputs: Sequence[InputInfo], place: str, casts: Casts, sizes: Mapping[str, int]
) -> list[errors.Diagnostic]:
    """Give the sample the states that it leaves out; tells of those whose shape is not known."""
    wrong = []
    for info in (i for i in inputs if i.name not in feeds):
        state = states.first(info, sizes)
        if state is None:
            found = f"input {info} is not in the data, and its shape cannot be told"
            wrong.append(error("QG153", place, found, f"add an array {info.name!r}"))
            continue
        feeds[info.name] = state
        casts.setdefault(f"{info.name} state", states.note(info, state, place))
    return wrong


def names(
    sample: Iterable[str], inputs: Sequence[InputInfo], place: str
) -> list[errors.Diagnostic]:
    """What is wrong with the names of a sample: unknown ones and missing ones (a state may be left out)."""
    given, known = set(map(str, sample)), [i.name for i in inputs]
    wrong = [
        error("QG113", f"{place}[{n}]", "is no input of the model", errors.nearest(n, known))
        for n in sorted(given - set(known))
    ]
    needed = [i.name for i in states.required(inputs)]
    hint = f"add an array of that name; found: {', '.join(sorted(given)) or 'nothing'}"
    missing = [n for n in needed if n not in given]
    wrong += [error("QG113", place, f"model input {n!r} is missing", hint) for n in missing]
    return wrong


def _cast(array: Array, info: InputInfo, where: str, casts: Casts) -> Array:
    """The array in the input's dtype, where that is allowed."""
    found, wanted = array.dtype, info.dtype
    if found == wanted or (found.kind in "SU" and wanted.kind == "O"):
        return array.astype(wanted, copy=False)
    if found.newbyteorder("=") == wanted:
        return array.astype(wanted)
    is_integer = found.kind in "iu" and wanted.kind in "iu"
    if not is_integer and not (found == np.float64 and wanted == np.float32):
        hint = f"convert it to {wanted}, scaled as the model expects"
        fail("QG114", where, f"input {info}: found {found}", hint)
    with np.errstate(over="ignore"):
        result = array.astype(wanted)
    if is_integer and not np.array_equal(result, array):
        values = f"{found} values {array.min()} … {array.max()} do not fit"
        fail("QG114", where, f"input {info}: {values}", "check the ids or codes")
    if not is_integer and not np.array_equal(np.isfinite(result), np.isfinite(array)):
        fail("QG114", where, f"input {info}: float64 values overflow float32", "scale the data")
    note = f"input {info}: {found} is cast to {wanted}"
    casts.setdefault(f"{info.name} {found}", errors.Diagnostic("note", "QG114", where, note))
    return result


def _shape(
    array: Array, info: InputInfo, where: str, sizes: dict[str, tuple[int, str]]
) -> list[errors.Diagnostic]:
    """What is wrong with rank and dimensions; `sizes` holds the symbolic ones of this sample."""
    if info.shape is None:
        return []
    shown = list(array.shape)
    if array.ndim != len(info.shape):
        rank = len(info.shape)
        hint = f"reshape it to {rank} dimensions"
        if rank - array.ndim == 1:
            hint = "add the batch axis: array[None]"
        found = f"input {info}: found shape {shown}, rank {array.ndim}"
        return [error("QG115", where, found, hint)]
    wrong = []
    for axis, (size, dim) in enumerate(zip(array.shape, info.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            hint = f"dimension {axis} must be {dim}: resize, pad or batch the data so"
            wrong.append(error("QG116", where, f"input {info}: found shape {shown}", hint))
        elif isinstance(dim, str):
            seen, by = sizes.setdefault(dim, (size, info.name))
            if size != seen:
                found = f"input {info}: {dim} is {size} here and {seen} in {by!r}"
                wrong.append(error("QG117", where, found, "inputs of one sample must agree in it"))
    return wrong
