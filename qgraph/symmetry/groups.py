"""Groups of channels that have to be transformed together, and what may be done to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common

from qgraph import graph
from qgraph.symmetry import attention, elementwise, joined, linear, norms, shapes
from qgraph.symmetry.channels import (
    ANY,
    FULL,
    MEAN,
    NONE,
    Channels,
    Dims,
    Gain,
    Kind,
    Labels,
    Member,
)
from qgraph.symmetry.registry import RULES

__all__ = [
    "KINDS",
    "Group",
    "analyse",
    "attention",
    "elementwise",
    "groups",
    "joined",
    "linear",
    "norms",
    "shapes",
]

Class: TypeAlias = Literal["", "permutation", "positive", "diagonal", "orthogonal"]
KINDS: tuple[Kind, ...] = ("permute", "scale", "rotate")
_LARGEST: dict[Kind, Class] = {
    "permute": "permutation",
    "scale": "diagonal",
    "rotate": "orthogonal",
}


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that are transformed together, with every constant that this changes.

    Attributes:
        name: the first activation in graph order that has these channels.
        kind: of transform that was analysed: "permute", "scale" or "rotate".
        legal: largest class of transforms that leaves the function as it is: "permutation"; "positive" or "diagonal";
            "orthogonal"; "" if none.
        blocks: [B, n]: the channels; those of a row may mix, rows may be transformed differently. B is 1 where the
            whole axis mixes, the number of heads where each head is on its own.
        writers: weights that make the channels, with labels of their positions.
        readers: weights that take them.
        riders: biases and the like, transformed with the writers; gains too where permuted.
        bounds: Clip operators whose bounds have to follow a scale.
        gains: factors that have to move into their readers before a rotation (see `folds.absorb_gains`).
        products: of two activations that both have these channels and sum over them (queries and keys).
        keeps_mean: a rotation has to map the all-ones vector of every block to itself, since a LayerNorm subtracts the
            mean; or the writers are centred and the mean is dropped.
        reason: why `legal` is not larger, for people.
        forbids: the node that is the reason.
    """

    name: str
    kind: Kind
    legal: Class
    blocks: npt.NDArray[np.int64]
    writers: tuple[Member, ...]
    readers: tuple[Member, ...]
    riders: tuple[Member, ...] = ()
    bounds: tuple[Member, ...] = ()
    gains: tuple[Gain, ...] = ()
    products: tuple[ir.Node, ...] = ()
    keeps_mean: bool = False
    reason: str = ""
    forbids: ir.Node | None = None

    @property
    def size(self) -> int:
        """Number of channels."""
        return int(self.blocks.size)

    @property
    def block(self) -> int:
        """Channels that mix: all of them, or one head's."""
        return int(self.blocks.shape[1])

    @property
    def members(self) -> tuple[Member, ...]:
        """Everything that a transform changes."""
        return self.writers + self.readers + self.riders

    def positions(self, member: Member) -> npt.NDArray[np.int64]:
        """Where the group's channels lie in a member: its labels as indices into `blocks.ravel()`, -1 elsewhere."""
        order = np.argsort(self.blocks, axis=None)
        ordered = self.blocks.ravel()[order]
        at = np.minimum(np.searchsorted(ordered, member.labels), len(ordered) - 1)
        return np.where(ordered[at] == member.labels, order[at], -1)


def groups(model: ir.Model, kinds: Sequence[Kind] = KINDS) -> list[Group]:
    """All groups of a canonical model that have writers and readers, legal or not, in graph order by kind.

    Args:
        model: not changed.
        kinds: of transforms to analyse.

    Nothing is computed with weights; shapes come from ONNX's shape inference.
    """
    dims = _dims(model)
    result: list[Group] = []
    scale = analyse(model, "scale", dims) if {"scale", "rotate"} & set(kinds) else None
    for kind in kinds:
        c = scale if kind == "scale" and scale is not None else analyse(model, kind, dims)
        if kind == "rotate" and scale is not None:
            _check_gains(c, scale)
        result += _collect(c)
    return result


def analyse(model: ir.Model, kind: Kind, dims: dict[ir.Value, Dims] | None = None) -> Channels:
    """Follow the channels of every activation of the main graph through all operators."""
    c = Channels(kind, _dims(model) if dims is None else dims)
    for node in model.graph:
        _step(c, node)
    return c


def _step(c: Channels, node: ir.Node) -> None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    rule = RULES.get((domain, node.op_type))
    for v in _captured(node):
        held = c.layout(v) or c.joined.get(v)
        if held is not None:
            c.pin(held.labels, node, "is used in a body")
    tracked = [h for v in node.inputs if (h := c.layout(v)) is not None]
    if any(h.is_square for h in tracked) and node.op_type not in _KEEP_SQUARES:
        for h in tracked:
            c.pin(h.labels, node, "takes squares of channels")
    if joined.step(c, node):
        pass
    elif rule is not None:
        rule(c, node)
    else:
        for h in tracked:
            c.pin(h.labels, node, f"{node.op_type} is not known to keep channels apart")
    for v in node.outputs:
        held = c.layout(v) or c.joined.get(v)
        if held is not None and v.is_graph_output():
            c.pin(held.labels, node, f"{v.name!r} is an output of the model")


_KEEP_SQUARES = frozenset({"ReduceMean", "ReduceSum", "Identity", "Cast"})


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values of outer graphs that bodies of a node use."""
    for body in graph.bodies(node):
        inside = {v for n in body for v in n.outputs} | set(body.inputs)
        for n in body:
            yield from (v for v in (*n.inputs, *_captured(n)) if v is not None and v not in inside)
        yield from (v for v in body.outputs if v not in inside)


def _dims(model: ir.Model) -> dict[ir.Value, Dims]:
    """Dimensions of every value, inferred on a copy."""
    copy = graph.clone(model)
    onnx_ir.passes.common.ShapeInferencePass()(copy)
    found: dict[ir.Value, Dims] = {}
    for ours, theirs in zip(model.graph, copy.graph, strict=True):
        for v, inferred in zip(ours.outputs, theirs.outputs, strict=True):
            shape = inferred.shape if inferred.shape is not None else v.shape
            if shape is not None:
                found[v] = tuple(d if isinstance(d, int) else d.value for d in shape)
    for v in model.graph.inputs:
        if v.shape is not None:
            found[v] = tuple(d if isinstance(d, int) else d.value for d in v.shape)
    return found


def _check_gains(c: Channels, scale: Channels) -> None:
    """A gain moves into its readers if the channels behind it may be scaled."""
    taken: dict[int, Gain] = {}
    for gain in c.gains:
        held = scale.layout(gain.node.outputs[0])
        if held is None:
            c.limit(gain.labels, gain.node, "its gain has no readers to move into", rotate=NONE)
            continue
        level = scale.level(held.labels)
        array = graph.small_array(gain.node.inputs[gain.index])
        assert array is not None
        if level < (ANY if (array < 0).any() else 2):
            node, why = scale.reason(held.labels)
            text = f"the gain of {graph.where(gain.node)} cannot move into its readers: {why}"
            c.limit(gain.labels, node or gain.node, text, rotate=NONE)
        for root in np.unique(scale.find(held.labels.ravel())).tolist():
            if taken.setdefault(root, gain) is not gain:
                text = f"its readers have the gain of {graph.where(taken[root].node)} too"
                c.limit(gain.labels, gain.node, text, rotate=NONE)
                break


def _collect(c: Channels) -> list[Group]:
    """Channels by what they take part in: those that always appear together form a group."""
    n = c.count
    if n == 0:
        return []
    whole = np.zeros(n, np.uint64)
    for number, (_, labels) in enumerate(c.seen):
        whole[np.unique(c.find(labels.ravel()))] += _hash(number)
    single = whole.copy()
    for number, rows in enumerate(c.parts):
        for row, labels in enumerate(rows):
            single[np.unique(c.find(labels))] += _hash(len(c.seen) + number, row + 1)
    roots = [np.unique(c.find(m.labels.ravel())) for m in c.members]
    touched: dict[int, dict[str, list[Member]]] = {}
    channels: dict[int, set[int]] = {}
    for member, own in zip(c.members, roots, strict=True):
        kept = Member(
            member.node,
            member.index,
            member.value,
            c.find(member.labels),
            member.role,
            member.is_inverse,
        )
        for key in np.unique(whole[own]):
            at = touched.setdefault(int(key), {})
            at.setdefault(member.role, []).append(kept)
            channels.setdefault(int(key), set()).update(own[whole[own] == key].tolist())
    first = _first_seen(c, whole)
    result: list[tuple[int, int, Group]] = []
    summed: dict[int, list[ir.Node]] = {}
    for labels, node in c.summed:
        for key in np.unique(whole[c.find(labels.ravel())]):
            summed.setdefault(int(key), []).append(node)
    for key, by_role in touched.items():
        if not by_role.get("writer") or key not in first:
            continue
        if not by_role.get("reader") and key not in summed:
            continue
        ids = np.array(sorted(channels[key]), np.int64)
        for blocks in _blocks(ids, single[ids]):
            order, value = first[key]
            group = _group(c, str(value.name), blocks, by_role, summed.get(key, ()))
            result.append((order, int(blocks.min()), group))
    return [g for *_, g in sorted(result, key=lambda item: item[:2])]


def _hash(number: int, row: int = 0) -> np.uint64:
    """A well-mixed number, so that sums of different sets differ (splitmix64)."""
    z = (number * 0x9E3779B97F4A7C15 + row * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % (1 << 64)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % (1 << 64)
    return np.uint64(z ^ (z >> 31))


def _first_seen(c: Channels, whole: npt.NDArray[np.uint64]) -> dict[int, tuple[int, ir.Value]]:
    found: dict[int, tuple[int, ir.Value]] = {}
    for number, (value, labels) in enumerate(c.seen):
        for key in np.unique(whole[c.find(labels.ravel())]):
            found.setdefault(int(key), (number, value))
    return found


def _blocks(ids: Labels, parts: npt.NDArray[np.uint64]) -> list[Labels]:
    """Channels as rows that may mix, [B, n]; rows of different length are groups of their own."""
    rows: dict[int, list[int]] = {}
    for channel, part in zip(ids.tolist(), parts.tolist(), strict=True):
        rows.setdefault(part, []).append(channel)
    by_size: dict[int, list[list[int]]] = {}
    for row in rows.values():
        by_size.setdefault(len(row), []).append(row)
    return [np.array(same, np.int64) for same in by_size.values()]


def _group(
    c: Channels,
    name: str,
    blocks: Labels,
    by_role: dict[str, list[Member]],
    products: Sequence[ir.Node],
) -> Group:
    level = c.level(blocks)
    node, reason = c.reason(blocks)
    largest = _LARGEST[c.kind]
    legal: Class = "" if level == NONE else largest
    if c.kind == "scale" and NONE < level < ANY:
        legal = "positive"
    own = set(blocks.ravel().tolist())
    gains = tuple(
        Gain(g.node, g.index, c.find(g.labels))
        for g in c.gains
        if not own.isdisjoint(c.find(g.labels.ravel()).tolist())
    )
    return Group(
        name=name,
        kind=c.kind,
        legal=legal,
        blocks=blocks,
        writers=tuple(_unique(by_role["writer"], own)),
        readers=tuple(_unique(by_role.get("reader", []), own)),
        riders=tuple(_unique(by_role.get("rider", []), own)),
        bounds=tuple(_unique(by_role.get("bound", []), own)),
        gains=gains,
        products=tuple(products),
        keeps_mean=c.kind == "rotate" and MEAN <= level < FULL,
        reason=reason,
        forbids=node,
    )


def _unique(members: list[Member], own: set[int]) -> Iterator[Member]:
    for m in members:
        if not own.isdisjoint(m.labels.ravel().tolist()):
            yield m
