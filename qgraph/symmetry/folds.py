"""Applying a transform to a group: constants change, the function does not. In float64, tensor by tensor.

    scale     writers and riders * s,       readers / s
    permute   all of them indexed by π
    rotate    all of them times T along the channel axis (the inverse transposed of an orthogonal matrix is itself)

A new tensor is computed when it is read, each time anew, so that a model of any size stays memory-mapped; with a spool
it is computed once and waits in an unnamed file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors, graph
from qgraph.spool import Spool
from qgraph.symmetry.channels import Member
from qgraph.symmetry.groups import Group, groups

Array: TypeAlias = npt.NDArray[Any]
Change: TypeAlias = Callable[[Array], Array]

_CHUNK = 1 << 22  # elements in float64 at a time
_ORTHOGONAL = 1e-9


@dataclass(frozen=True, slots=True)
class Folded:
    """What a fold did: how many tensors changed, and which had to be copied since others use them unchanged."""

    changed: int = 0
    copied: tuple[str, ...] = ()

    def __add__(self, other: Folded) -> Folded:
        return Folded(self.changed + other.changed, self.copied + other.copied)


def scale(
    model: ir.Model,
    group: Group,
    factors: Array,
    *,
    spool: Spool | None = None,
    keep_bounds: bool = False,
) -> Folded:
    """Multiply the channels of a group: x'[c] = s[c] x[c].

    Args:
        model: changed in place.
        group: of kind "scale".
        factors: s [group.size], in the order of `group.blocks`; positive unless the group is "diagonal".
        spool: keeps new tensors; without one they are computed on reading.
        keep_bounds: leave Clip operators as they are: the caller knows that no scaled channel reaches its bound.

    Raises:
        errors.PipelineError: QG210 where the group or the factors do not allow it.
    """
    s = np.asarray(factors, np.float64).ravel()
    _require(group, group.kind == "scale" and group.legal != "", "may not be scaled")
    _require(group, s.shape == (group.size,), f"has {group.size} channels, found {s.size} factors")
    _require(group, bool(np.isfinite(s).all() and s.all()), "needs finite factors other than 0")
    _require(group, group.legal == "diagonal" or bool((s > 0).all()), "needs positive factors")

    def change(member: Member) -> Change:
        at = group.positions(member)
        own = np.where(at >= 0, s[at], 1.0)
        factor = 1 / own if member.is_inverse else own
        return lambda array: _scaled(array, factor)

    done = _apply(model, group, change, spool)
    for bound in () if keep_bounds else group.bounds:
        at = group.positions(bound)
        own = np.where(at >= 0, s[at], 1.0)
        if (own != 1).any():
            _scale_bounds(model, bound.node, own)
    return done


def rotate(model: ir.Model, group: Group, t: Array, *, spool: Spool | None = None) -> Folded:
    """Rotate the channels of a group: x' = T x.

    Args:
        model: changed in place.
        group: of kind "rotate" whose gains have been absorbed (see `absorb_gains`).
        t: T, orthogonal: [n, n] for every block, or [B, n, n]. Where `group.keeps_mean`, T 1 = 1.
        spool: keeps new tensors; without one they are computed on reading.

    Raises:
        errors.PipelineError: QG210 where the group or the matrix does not allow it.
    """
    n = group.block
    t = np.broadcast_to(np.asarray(t, np.float64), (len(group.blocks), n, n))
    _require(group, group.kind == "rotate" and group.legal != "", "may not be rotated")
    off = max(float(np.abs(each @ each.T - np.eye(n)).max()) for each in t)
    _require(group, off < _ORTHOGONAL, f"needs an orthogonal matrix, found |TT' - 1| = {off:.1e}")
    if group.keeps_mean:
        off = float(np.abs(t.sum(axis=2) - 1).max())
        _require(group, off < 1e-7, f"needs T 1 = 1 for its LayerNorm, found |T 1 - 1| = {off:.1e}")
    for gain in group.gains:
        held = graph.small_array(gain.node.inputs[gain.index])
        _require(group, held is not None and bool((held == held.flat[0]).all()),
                 f"has a gain in {graph.where(gain.node)}; absorb_gains first")  # fmt: skip

    def change(member: Member) -> Change:
        at = group.positions(member)
        return lambda array: _along(array, at, n, lambda rows, block: rows @ t[block].T)

    return _apply(model, group, change, spool)


def permute(
    model: ir.Model, group: Group, order: npt.NDArray[np.int64], *, spool: Spool | None = None
) -> Folded:
    """Reorder the channels of a group: x'[i] = x[order[i]].

    Args:
        model: changed in place.
        group: of kind "permute".
        order: a permutation of 0..n-1 per block, [B, n].
        spool: keeps new tensors; without one they are computed on reading.

    Raises:
        errors.PipelineError: QG210 where the group or the order does not allow it.
    """
    n = group.block
    order = np.broadcast_to(np.asarray(order, np.int64), group.blocks.shape)
    _require(group, group.kind == "permute" and group.legal != "", "may not be permuted")
    is_one = bool((np.sort(order, axis=1) == np.arange(n)).all())
    _require(group, is_one, f"needs permutations of 0..{n - 1}")

    def change(member: Member) -> Change:
        at = group.positions(member)
        return lambda array: _along(array, at, n, lambda rows, block: rows[:, order[block]])

    return _apply(model, group, change, spool)


def absorb_gains(model: ir.Model, group: Group, *, spool: Spool | None = None) -> Folded:
    """Move the gains of norms in the way of a rotation into what reads them: γ becomes 1, W becomes W diag(γ).

    A table that is also the head is copied for the head, since only the head takes the gain.
    """
    done = Folded()
    wanted = {(g.node, g.index) for g in group.gains}
    if not wanted:
        return done
    for each in groups(model, ["scale"]):
        for writer in each.writers:
            if (writer.node, writer.index) not in wanted:
                continue
            held = graph.small_array(writer.node.inputs[writer.index])
            assert held is not None
            at = np.broadcast_to(
                each.positions(writer), np.broadcast_shapes(held.shape, writer.labels.shape)
            )
            gain = np.broadcast_to(held.astype(np.float64), at.shape)
            s = np.ones(each.size)
            s[at[at >= 0]] = 1 / gain[at >= 0]
            if (s != 1).any():
                done += scale(model, each, s, spool=spool)
    return done


def keep_mean(t: Array) -> Array:
    """An orthogonal matrix near `t` [n, n] that maps the all-ones vector to itself.

    T maps 1/√n to some unit vector u; a Householder reflection that maps u back to 1/√n makes T 1 = 1.
    """
    n = len(t)
    one = np.full(n, 1 / np.sqrt(n))
    v = t @ one - one
    norm = float(v @ v)
    return t if norm < 1e-30 else t - np.outer(2 * v / norm, v @ t)


def _require(group: Group, claim: bool, message: str) -> None:
    if not claim:
        hint = f"{graph.where(group.forbids)}: {group.reason}" if group.forbids is not None else ""
        raise errors.PipelineError(
            errors.Diagnostic("error", "QG210", f"group {group.name!r}", message, hint)
        )


def _scaled(array: Array, factor: Array) -> Array:
    shape = np.broadcast_shapes(array.shape, factor.shape)
    out = np.empty(shape, array.dtype)
    wide, factor = np.broadcast_to(array, shape), np.broadcast_to(factor, shape)
    rows = max(1, _CHUNK * (shape[0] if shape else 1) // max(out.size, 1))
    for i in range(0, shape[0] if shape else 0, rows):
        out[i : i + rows] = wide[i : i + rows].astype(np.float64) * factor[i : i + rows]
    return out


def _along(array: Array, at: Array, n: int, mix: Callable[[Array, int], Array]) -> Array:
    """Apply `mix` to rows of n channels: `at` says which channel each position is, -1 for none."""
    shape = np.broadcast_shapes(array.shape, at.shape)
    out = np.array(np.broadcast_to(array, shape))
    axes = [a for a in range(at.ndim) if at.shape[a] > 1]
    if not axes:
        return out
    last = axes[-1] + len(shape) - at.ndim
    at = at.reshape((1,) * (len(shape) - at.ndim) + at.shape)
    for index, row in _slices(at, last):
        part = out[index]
        moved = np.moveaxis(part, last, -1)
        for block, places in _copies(row, n):
            rows = max(1, _CHUNK // n)
            flat = moved.reshape(-1, moved.shape[-1])  # a copy where the axis is not the last
            for i in range(0, len(flat), rows):
                taken = flat[i : i + rows, places].astype(np.float64)
                flat[i : i + rows, places] = mix(taken, block)
            moved[...] = flat.reshape(moved.shape)
    return out


def _slices(at: Array, axis: int) -> Iterator[tuple[tuple[slice, ...], Array]]:
    """(index, channels along the axis) for every part of a tensor in which they are the same."""
    others = [a for a in range(at.ndim) if a != axis and at.shape[a] > 1]
    for place in np.ndindex(*(at.shape[a] for a in others)):
        index = [slice(None)] * at.ndim
        for a, i in zip(others, place, strict=True):
            index[a] = slice(i, i + 1)
        yield tuple(index), at[tuple(index)].ravel()


def _copies(row: Array, n: int) -> Iterator[tuple[int, Array]]:
    """(block, positions [n]) for every time that all channels of a block appear along an axis."""
    order = np.argsort(row, kind="stable")
    order = order[row[order] >= 0]
    for block in np.unique(row[order] // n):
        own = order[row[order] // n == block].reshape(n, -1)
        for places in own.T:
            yield int(block), places


def _apply(
    model: ir.Model,
    group: Group,
    change: Callable[[Member], Change],
    spool: Spool | None,
) -> Folded:
    """Replace the members' tensors; those that other nodes use unchanged are copied."""
    by_use: dict[tuple[ir.Node, int], list[Member]] = {}
    is_scale = group.kind == "scale"  # only there readers change otherwise than writers
    for member in group.members:
        by_use.setdefault((member.node, member.index), []).append(member)
    by_value: dict[ir.Value, dict[Any, list[tuple[ir.Node, int]]]] = {}
    for use, own in by_use.items():
        key = tuple((m.labels.shape, m.labels.tobytes(), m.is_inverse and is_scale) for m in own)
        by_value.setdefault(_origin(*use), {}).setdefault(key, []).append(use)
    names = graph.Names(model)
    copied: list[str] = []
    for value, buckets in by_value.items():
        for uses in buckets.values():
            changes = [change(m) for m in by_use[uses[0]]]
            is_whole = len(buckets) == 1 and set(uses) == _all_uses(value)
            name = str(value.name) if is_whole else names(f"{value.name}.folded")
            made = _changed(value, changes, by_use[uses[0]], name, spool)
            if is_whole:
                value.const_value = made
                value.shape = ir.Shape(made.shape.numpy())
                continue
            copied.append(str(value.name))
            new = graph.add_initializer(model.graph, name, made)
            for node, index in uses:
                _redirect(node, index, new, names)
    graph.remove_dead(model)
    return Folded(len(by_value), tuple(copied))


def _origin(node: ir.Node, index: int) -> ir.Value:
    """The stored tensor behind an input, through a Transpose."""
    v = node.inputs[index]
    assert v is not None
    producer = v.producer()
    if producer is not None:
        v = producer.inputs[0]
        assert v is not None
    return v


def _all_uses(value: ir.Value) -> set[tuple[ir.Node | None, int]]:
    """Nodes and inputs that take a tensor, through Transposes; (None, 0) where the model itself gives or takes it."""
    found: set[tuple[ir.Node | None, int]] = set()
    for node, index in value.uses():
        if node.op_type == "Transpose" and node.domain == "":
            found |= set(node.outputs[0].uses())
            if node.outputs[0].is_graph_output():
                found.add((None, 0))
        else:
            found.add((node, index))
    if value.is_graph_output() or value.is_graph_input():
        found.add((None, 0))
    return found


def _changed(
    value: ir.Value, changes: list[Change], members: list[Member], name: str, spool: Spool | None
) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    shape = np.broadcast_shapes(tuple(tensor.shape.numpy()), *(m.labels.shape for m in members))

    def compute() -> Array:
        array = tensor.numpy()
        for each in changes:
            array = each(array)
        return np.asarray(array, tensor.dtype.numpy())

    if spool is None:
        return graph.lazy(compute, tensor.dtype, shape, name)
    return ir.Tensor(spool.keep(compute()), dtype=tensor.dtype, name=name)


def _redirect(node: ir.Node, index: int, new: ir.Value, names: graph.Names) -> None:
    """Let a node take a new tensor, through a Transpose of its own where there was one."""
    old = node.inputs[index]
    assert old is not None
    through = old.producer()
    if through is None:
        node.replace_input_with(index, new)
        return
    out = graph.value(names(f"{old.name}.folded"), old.dtype, old.shape)
    order = graph.attribute(through, "perm", None)
    attributes = None if order is None else {"perm": list(order)}
    graph.add_node(
        node, "Transpose", [new], [out], name=names(f"{through.name}.folded"), attributes=attributes
    )
    node.replace_input_with(index, out)


def bounds_of(clip: ir.Node) -> tuple[float, float]:
    """Lower and upper bound of a Clip with constant bounds."""
    found = []
    for index, (key, missing) in enumerate((("min", -np.inf), ("max", np.inf)), 1):
        v = clip.inputs[index] if index < len(clip.inputs) else None
        held = graph.attribute(clip, key, missing) if v is None else graph.small_array(v)
        found.append(float(np.asarray(held).reshape(())))
    return found[0], found[1]


def would_copy(group: Group) -> bool:
    """True if a scale of the group copies a weight, because another operator uses it unchanged."""
    uses: dict[ir.Value, set[Any]] = {}
    for member in group.members:
        if member.role != "rider":
            uses.setdefault(member.value, set()).add((member.node, member.index))
    return any(_all_uses(value) != own for value, own in uses.items())


def _scale_bounds(model: ir.Model, clip: ir.Node, factor: Array) -> None:
    """Clip(x, a, b) with a or b other than 0 → Min(Max(x, a s), b s); Relu in place of Max where a is 0."""
    names = graph.Names(model)
    x, out = clip.inputs[0], clip.outputs[0]
    assert x is not None
    dtype = (x.dtype or out.dtype or ir.DataType.FLOAT).numpy()
    steps = [
        ("Relu", None) if op == "Max" and not bound else (op, np.asarray(bound * factor, dtype))
        for op, bound in zip(("Max", "Min"), bounds_of(clip), strict=True)
        if np.isfinite(bound)
    ]
    for number, (op, bounds) in enumerate(steps, 1):
        inputs = [x]
        if bounds is not None:
            name = names(f"{out.name}.bound")
            inputs.append(graph.add_initializer(model.graph, name, bounds))
        if number == len(steps):
            graph.replace_node(clip, op, inputs)
        else:
            made = graph.value(names(f"{out.name}.{op}"), out.dtype, out.shape)
            graph.add_node(clip, op, inputs, [made], name=names(f"{clip.name}.{op}"))
            x = made
