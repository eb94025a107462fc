"""Random inputs that a model accepts, from its graph alone: for proofs, not for calibration.

Sizes: a symbolic dimension is one number wherever it appears; weights that read an input fix the dimensions that they
share with it. Values: an integer that ends as an index stays inside the table that it indexes; one that ends as a
shape stays harmless. What the graph does not tell is tried out in ONNX Runtime.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph import errors, files
from qgraph.files import Source
from qgraph.verify import equivalence
from qgraph.verify.traces import Trace, trace

SIZES = (8, 6, 10, 12, 5, 7, 9, 11, 4, 14, 13, 15, 16)
BATCH_NAMES = ("n", "b", "bs", "none", "?")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One way to choose what the graph leaves open."""

    batch: int
    past: int
    spatial: int
    sizes: tuple[int, ...]
    rank: int = 2
    values: str = "random"


def sample_feeds(model: Source, count: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Feeds that were seen to run. Batch sizes and past lengths differ between them where they are symbolic.

    Args:
        model: path, ModelProto or onnx_ir.Model; not changed.
        count: how many feeds.
        seed: of the random numbers; same seed, same feeds.

    Raises:
        errors.InputError: QG120, nothing that was tried runs.
        errors.RuntimeFailure: ONNX Runtime does not load the model.
    """
    graph = model if isinstance(model, ir.Model) else files.load(model)
    session = equivalence.session(model)
    inputs = [v for v in graph.graph.inputs if v.name and v.name not in graph.graph.initializers]
    traces = {v: trace(v, graph) for v in inputs}
    return [_first_that_runs(inputs, traces, session, index, seed) for index in range(count)]


def _first_that_runs(
    inputs: list[ir.Value],
    traces: dict[ir.Value, Trace],
    session: Any,
    index: int,
    seed: int,
) -> dict[str, Any]:
    failure: errors.RuntimeFailure | None = None
    usable: dict[str, Any] | None = None
    tried: list[dict[str, Any]] = []
    for attempt in _attempts(index):
        try:
            feed = _feed(inputs, traces, attempt, np.random.default_rng([seed, index]))
        except ValueError:  # the declared sizes cannot be met this way, e.g. seq = total - past < 0
            continue
        if any(_same(feed, other) for other in tried):
            continue
        tried.append(feed)
        try:
            outputs = equivalence.run_once(session, feed)
        except errors.RuntimeFailure as e:
            failure = failure or e
            continue
        if _is_informative(outputs):
            return feed
        usable = usable or feed
    if usable is not None:
        return usable
    raise errors.InputError(
        errors.Diagnostic(
            "error",
            "QG120",
            "sample inputs",
            f"none of {len(tried)} random inputs runs; ONNX Runtime says of the first: {failure}",
            "the graph alone does not tell which inputs are valid: pass real ones with --data",
        )
    ) from failure


def _attempts(index: int) -> Iterator[_Attempt]:
    """Likely sizes first; then equal ones, image sizes, other ranks, and dull values."""
    batch, past = 1 + index % 2, 3 * (index % 2)
    yield _Attempt(batch, past, 32, SIZES)
    yield _Attempt(1, past, 32, SIZES)
    for values in ("random", "zero", "one"):
        for b, size in itertools.product((1, 2), (8, 16, 4, 1, 2)):
            yield _Attempt(b, past, max(size, 2) * 4, (size,), values=values)
    for size in (8, 16):
        yield _Attempt(size, past, 32, SIZES)
    for spatial in (64, 224, 256, 299):
        yield _Attempt(1, 0, spatial, (spatial,))
    for rank, size in itertools.product((1, 3, 4, 0), (8, 1, 32)):
        yield _Attempt(1, 0, size, (size,), rank=rank)


def _feed(
    inputs: list[ir.Value],
    traces: dict[ir.Value, Trace],
    attempt: _Attempt,
    rng: np.random.Generator,
) -> dict[str, Any]:
    bound: dict[str, int] = {}
    for value in inputs:
        _bind_known(value, traces[value], bound)
    shapes = {v: _shape(v, traces[v], attempt, bound) for v in inputs}
    return {v.name or "": _values(v, shapes[v], traces[v], attempt, rng, shapes) for v in inputs}


def _bind_known(value: ir.Value, found: Trace, bound: dict[str, int]) -> None:
    """Give symbols the numbers that weights force on them."""
    for axis, size in found.sizes.items():
        if value.shape is not None and -len(value.shape) <= axis < len(value.shape):
            dim = value.shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value and dim.value.isidentifier():
                bound.setdefault(dim.value, size)


def _shape(
    value: ir.Value, found: Trace, attempt: _Attempt, bound: dict[str, int]
) -> tuple[int, ...]:
    if value.shape is None:
        rank = attempt.rank if found.rank is None else found.rank
        dims: list[int | ir.SymbolicDim] = [ir.SymbolicDim(None)] * rank
    else:
        dims = list(value.shape)
    known = {
        axis % len(dims): n for axis, n in found.sizes.items() if -len(dims) <= axis < len(dims)
    }
    shape = []
    for axis, dim in enumerate(dims):
        if isinstance(dim, int) and (dim > 0 or (dim == 0 and "past" in (value.name or ""))):
            shape.append(dim)
        elif isinstance(dim, int) or dim.value is None:  # old exporters wrote 0 or -1 for "any"
            default = _size("", axis, len(dims), value, attempt, len(bound))
            shape.append(known.get(axis, default))
        else:
            shape.append(_evaluate(dim, axis, len(dims), value, attempt, bound))
    return tuple(shape)


def _evaluate(
    dim: ir.SymbolicDim,
    axis: int,
    rank: int,
    value: ir.Value,
    attempt: _Attempt,
    bound: dict[str, int],
) -> int:
    """The number for a named dimension or an expression such as "past_sequence_length + 1"."""
    name = dim.value or ""
    if name in bound:
        return bound[name]
    try:
        symbols = sorted(dim.free_symbols())
    except Exception:  # noqa: BLE001  any text may stand for a dimension; sympy raises what it likes
        symbols = []
    if not symbols or symbols == [name]:
        bound[name] = _named(name, axis, rank, value, attempt, bound)
        return bound[name]
    for symbol in symbols:
        if symbol not in bound:
            bound[symbol] = _named(symbol, axis, rank, value, attempt, bound)
    size = dim.evaluate(bound)
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"{name} is {size}")
    return size


def _named(
    name: str, axis: int, rank: int, value: ir.Value, attempt: _Attempt, bound: dict[str, int]
) -> int:
    """The number for a symbol that is free. A total length is the past length and the new one together."""
    low = name.lower()
    if "total" in low or ("past" in low and ("plus" in low or "+" in low)):
        fresh = [n for s, n in bound.items() if "seq" in s.lower() and "past" not in s.lower()]
        return attempt.past + (fresh[0] if fresh else attempt.sizes[0])
    return _size(name, axis, rank, value, attempt, len(bound))


def _size(name: str, axis: int, rank: int, value: ir.Value, attempt: _Attempt, count: int) -> int:
    low = name.lower()
    if "past" in low:
        return attempt.past
    is_length = any(part in low for part in ("seq", "len", "time", "tok"))
    if "batch" in low or low in BATCH_NAMES or (axis == 0 and rank > 1 and not is_length):
        return attempt.batch
    is_float = value.dtype is not None and value.dtype.is_floating_point()
    if is_float and rank >= 4 and axis >= 2:
        return attempt.spatial
    return attempt.sizes[count % len(attempt.sizes)]


def _values(
    value: ir.Value,
    shape: tuple[int, ...],
    found: Trace,
    attempt: _Attempt,
    rng: np.random.Generator,
    shapes: dict[ir.Value, tuple[int, ...]],
) -> Any:
    """Data of one input. A sequence gets two equal elements; an optional gets its content."""
    kind = value.type
    if isinstance(kind, ir.SequenceType):
        return [_array(value, kind.elem_type.dtype, shape, found, attempt, rng, shapes)] * 2
    return _array(value, value.dtype, shape, found, attempt, rng, shapes)


def _array(
    value: ir.Value,
    dtype: ir.DataType | None,
    shape: tuple[int, ...],
    found: Trace,
    attempt: _Attempt,
    rng: np.random.Generator,
    shapes: dict[ir.Value, tuple[int, ...]],
) -> Any:
    name = (value.name or "").lower()
    dtype = dtype or ir.DataType.FLOAT
    if dtype == ir.DataType.STRING:
        words = rng.choice(["a", "b", "hello", "the world"], size=shape)
        return np.asarray(words, dtype=object)
    if dtype == ir.DataType.BOOL:
        return np.full(shape, attempt.values != "zero" and "training" not in name)
    as_type = dtype.numpy()
    if attempt.values != "random":
        return np.full(shape, 0 if attempt.values == "zero" else 1, as_type)
    if "mask" in name:
        return np.ones(shape, as_type)
    if found.role is not None:
        return _of_role(found.role, shape, shapes, attempt).astype(as_type)
    if "position" in name and shape and dtype.is_integer():
        counted = (np.arange(shape[-1]) + attempt.past) % (found.limit or 2**31)
        return np.broadcast_to(counted, shape).astype(as_type)
    if found.limit is not None:
        return rng.integers(0, found.limit, shape).astype(as_type)
    if dtype.is_floating_point():
        return rng.standard_normal(shape).astype(as_type)
    if dtype in (ir.DataType.INT8, ir.DataType.UINT8):
        bounds = np.iinfo(as_type)
        return rng.integers(bounds.min, bounds.max + 1, shape).astype(as_type)
    if dtype.is_integer():
        return rng.integers(0, 10, shape).astype(as_type)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(as_type)


_ROLES: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "reshape": lambda shape: np.where(np.arange(int(np.prod(shape))) == 0, -1, 1).reshape(shape),
    "ones": np.ones,
    "zeros": np.zeros,
    "axes": lambda shape: np.arange(int(np.prod(shape))).reshape(shape),
    "few": lambda shape: np.full(shape, 2),
    "many": lambda shape: np.full(shape, 1000),
}


def _of_role(
    role: str, shape: tuple[int, ...], shapes: dict[ir.Value, tuple[int, ...]], attempt: _Attempt
) -> Any:
    """Values of an integer that the graph uses as a shape, an axis, a bound or a length."""
    if role in _ROLES:
        return _ROLES[role](shape)
    # Lengths of sequences: as long as what was fed beside them, with the past.
    by_name = {v.name: s for v, s in shapes.items()}
    fresh = next((s[-1] for n, s in by_name.items() if n and n.endswith("input_ids") and s), 1)
    total = fresh + attempt.past
    return np.full(shape, total - 1 if role == "last" else total)


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(a[k], b[k]) and np.shape(a[k]) == np.shape(b[k]) for k in a)


def _is_informative(outputs: dict[str, Any]) -> bool:
    """False where an output is empty or has nothing finite in it: it would prove nothing."""
    floats = [v for v in outputs.values() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    return all(v.size and np.isfinite(v).any() for v in floats)
