"""Channels: which positions of which tensors must be transformed alike, for one kind of transform.

A channel is one unknown of the transform. Every activation that the analysis follows has a label array: an integer per
position along its channel axes, size 1 along the other axes, as in broadcasting. Label i at a position says "here acts
row i of the transform"; operators tie labels of their inputs and outputs together (union-find) and limit what may be
done to them. Reshape, Transpose, Split, Concat and repeated heads are then nothing but indexing of labels.

Three kinds of transform are followed apart, since operators connect tensors differently under each:

    permute   x'[c] = x[π(c)]          elementwise operators and norms pass it on
    scale     x'[c] = s[c] x[c]        a norm ends it, its gain begins a new one
    rotate    x'    = T x, T'T = 1     a norm passes it on once its gain has moved into the readers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph

Kind: TypeAlias = Literal["permute", "scale", "rotate"]
Role: TypeAlias = Literal["writer", "reader", "rider", "bound"]
Labels: TypeAlias = npt.NDArray[np.int64]
Dims: TypeAlias = tuple[int | str | None, ...]

# What a channel may still be multiplied with. Rotations have two levels of freedom, too.
NONE, POSITIVE, ANY = 0, 2, 3
MEAN, FULL = 2, 3  # rotate: any that maps the all-ones vector to itself; any
_REASONS = 1 << 32


@dataclass(frozen=True, slots=True)
class Layout:
    """Labels of an activation; `is_square`: of the squares of the transformed numbers (between Pow and ReduceMean)."""

    labels: Labels
    is_square: bool = False


@dataclass(frozen=True, slots=True)
class Joined:
    """An activation one of whose axes holds several, of which not all sizes are known: [batch * heads, seq, d].

    Attributes:
        labels: along the finer axes, [1, heads, 1, d].
        dims: of the finer axes.
        spans: how many of them each axis of the tensor holds, (2, 1, 1).
    """

    labels: Labels
    dims: Dims
    spans: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """One constant that is changed when a group is transformed.

    Attributes:
        node: the operator that takes it.
        index: as which input of that.
        value: the stored tensor; a Transpose may stand between it and the node.
        labels: of its positions, in the tensor's own axes, size 1 where all positions are alike; of higher rank than
            the tensor where that has to be expanded.
        role: writers make the channels, readers take them, riders lie between (biases, gains); bounds are a Clip's.
        is_inverse: it gets the inverse transposed of the transform.
    """

    node: ir.Node
    index: int
    value: ir.Value
    labels: Labels
    role: Role
    is_inverse: bool = False


@dataclass(frozen=True, slots=True)
class Gain:
    """A factor per channel in the way of a rotation: it has to move into the readers first."""

    node: ir.Node
    index: int
    labels: Labels


@dataclass
class Channels:
    """The state of one analysis; rules read and write it.

    Attributes:
        kind: of transform.
        dims: of every value, as far as shape inference knows them.
        layouts: labels of activations.
        joined: of those with joined axes, which few operators pass (see `joined`).
        members: constants met so far.
        gains: factors that rotations have to move.
        seen: activations in graph order, with their labels.
        parts: labels [P, ...]: positions along the first axis must not mix.
        reasons: why a level is what it is.
        count: number of labels.
        summed: labels of channels that meet their own kind in a product (queries and keys), where they end without a
            reader; and the product.
    """

    kind: Kind
    dims: dict[ir.Value, Dims]
    layouts: dict[ir.Value, Layout] = field(default_factory=dict)
    joined: dict[ir.Value, Joined] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    seen: list[tuple[ir.Value, Labels]] = field(default_factory=list)
    parts: list[Labels] = field(default_factory=list)
    summed: list[tuple[Labels, ir.Node]] = field(default_factory=list)
    reasons: list[tuple[ir.Node | None, str]] = field(default_factory=lambda: [(None, "")])
    _parent: Labels = field(default_factory=lambda: np.empty(0, np.int64))
    _limit: Labels = field(default_factory=lambda: np.empty(0, np.int64))  # level and reason in one
    count: int = 0
    _weights: dict[tuple[Any, ...], Labels] = field(default_factory=dict)

    def fresh(self, shape: Sequence[int]) -> Labels:
        """New labels of that shape."""
        n = int(np.prod(shape, dtype=np.int64))
        start, self.count = self.count, self.count + n
        if self.count > len(self._parent):
            more = np.arange(len(self._parent), 2 * self.count, dtype=np.int64)
            self._parent = np.concatenate([self._parent, more])
            self._limit = np.concatenate([self._limit, np.full(len(more), ANY * _REASONS)])
        return np.arange(start, self.count, dtype=np.int64).reshape(shape)

    def of_weight(self, value: ir.Value, axis: int, role: Role) -> Labels:
        """Labels along one axis of a stored tensor, the same for all its uses.

        Scales of writers and readers are inverse to each other, so a tensor that is both (a tied table) gets two sets.
        """
        key = (value, axis, role if self.kind == "scale" else "")
        if key not in self._weights:
            assert value.const_value is not None
            self._weights[key] = self.fresh([int(value.const_value.shape.numpy()[axis])])
        return self._weights[key]

    def find(self, labels: Labels) -> Labels:
        """The representatives of labels."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                self._parent[labels] = roots
                return roots
            roots = above

    def tie(self, a: Labels, b: Labels) -> None:
        """Labels at the same place (after broadcasting) become one."""
        a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        while True:
            x, y = self.find(a), self.find(b)
            differ = x != y
            if not differ.any():
                return
            low, high = np.minimum(x, y)[differ], np.maximum(x, y)[differ]
            np.minimum.at(self._parent, high, low)
            np.minimum.at(self._limit, self.find(high), self._limit[high])

    def limit(
        self,
        labels: Labels,
        node: ir.Node,
        text: str,
        *,
        permute: int = ANY,
        scale: int = ANY,
        rotate: int = FULL,
    ) -> None:
        """Allow no more than this level; kinds that are not named stay as they are."""
        level = {"permute": permute, "scale": scale, "rotate": rotate}[self.kind]
        if level == ANY:
            return
        self.reasons.append((node, text))
        code = level * _REASONS + len(self.reasons) - 1
        np.minimum.at(self._limit, self.find(labels.ravel()), code)

    def pin(self, labels: Labels, node: ir.Node, text: str) -> None:
        """Allow nothing, whatever the kind."""
        self.limit(labels, node, text, permute=NONE, scale=NONE, rotate=NONE)

    def level(self, labels: Labels) -> int:
        """The least freedom that any of these labels has."""
        return int(self._limit[self.find(labels.ravel())].min() // _REASONS)

    def reason(self, labels: Labels) -> tuple[ir.Node | None, str]:
        """Which node allows no more than `level`, and why."""
        return self.reasons[int(self._limit[self.find(labels.ravel())].min() % _REASONS)]

    def part(self, labels: Labels, axes: Sequence[int]) -> None:
        """Positions along these axes must not mix: each takes another part in what follows."""
        axes = [a for a in axes if labels.shape[a] > 1]
        if axes and self.kind != "scale":
            moved = np.moveaxis(labels, axes, range(len(axes)))
            self.parts.append(moved.reshape(int(np.prod(moved.shape[: len(axes)])), -1))

    def collapse(self, labels: Labels, keep: int) -> Labels:
        """Tie everything along all axes but one; the labels along that one, [n]."""
        flat = np.moveaxis(labels, keep, -1).reshape(-1, labels.shape[keep])
        if len(flat) > 1:
            self.tie(flat[:1], flat)
        first: Labels = flat[0]
        return first

    def layout(self, v: ir.Value | None) -> Layout | None:
        """Labels of an activation, if the analysis follows it."""
        return None if v is None else self.layouts.get(v)

    def put(self, v: ir.Value, labels: Labels, *, is_square: bool = False) -> None:
        """From here on `v` is followed."""
        self.layouts[v] = Layout(labels, is_square)
        self.seen.append((v, labels))

    def put_joined(self, v: ir.Value, held: Joined) -> None:
        """From here on `v` is followed, through few operators if axes are joined."""
        if max(held.spans, default=1) == 1:
            self.put(v, held.labels)
        else:
            self.joined[v] = held
            self.seen.append((v, held.labels))

    def add(
        self,
        role: Role,
        node: ir.Node,
        index: int,
        labels: Labels,
        value: ir.Value | None = None,
        *,
        is_inverse: bool | None = None,
    ) -> None:
        """A constant takes part."""
        value = node.inputs[index] if value is None else value
        assert value is not None
        if value.const_value is not None:
            rank = len(value.const_value.shape)
            while labels.ndim > max(rank, 1) and labels.shape[0] == 1:
                labels = labels[0]
        inverse = role == "reader" if is_inverse is None else is_inverse
        self.members.append(Member(node, index, value, labels, role, inverse))

    def rank(self, v: ir.Value | None) -> int | None:
        """Rank of a value, if known."""
        if v is None:
            return None
        if graph.is_constant(v):
            assert v.const_value is not None
            return len(v.const_value.shape)
        held = self.layouts.get(v)
        if held is not None:
            return held.labels.ndim
        return len(self.dims[v]) if v in self.dims else None

    def varies(self, v: ir.Value, labels: Labels, only: int | None = None) -> bool:
        """True if `v`, broadcast to the labels' axes, may differ between channels, along one axis `only` if given."""
        producer = v.producer()
        if producer is not None and producer.op_type == "Expand" and producer.inputs[0] is not None:
            v = producer.inputs[0]  # copies along an axis are all the same
        if graph.is_constant(v):
            assert v.const_value is not None
            dims: Dims | None = tuple(v.const_value.shape.numpy())
        else:
            dims = self.dims.get(v)
        if dims is None:
            return True
        for offset in range(1, min(len(dims), labels.ndim) + 1):
            is_asked = only is None or only == labels.ndim - offset
            if is_asked and labels.shape[-offset] > 1 and dims[-offset] != 1:
                return True
        return False


def padded(labels: Labels, rank: int) -> Labels:
    """Labels with 1s in front, up to that rank."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)
