"""Weights in the order in which they are solved: those that read the same tensors together, in blocks of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qgraph import cuts, graph
from qgraph.weights import Weight


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that are solved from the same values.

    Attributes:
        weights: in the order of their operators.
        inputs: the tensors that they are multiplied with; none where nothing is asked of the data.
        place: before the first of their operators.
    """

    weights: tuple[Weight, ...]
    inputs: tuple[str, ...]
    place: int


@dataclass(frozen=True, slots=True)
class Block:
    """The groups between two narrow points of the model.

    Attributes:
        start: the narrow point before them.
        groups: in order.
    """

    start: int
    groups: tuple[Group, ...]


def inputs_of(weight: Weight) -> tuple[str, ...] | str:
    """The tensors whose last axis the weight is multiplied with, or why its inputs have no Gram matrix here."""
    names: dict[str, None] = {}
    for use in weight.uses:
        v = use.node.inputs[0]
        if use.kind not in ("matmul", "gemm") or use.index != 1 or v is None or not v.name:
            return f"{use.node.op_type} does not multiply its weight with the last axis of an input"
        if use.kind == "gemm" and graph.attribute(use.node, "transA", 0):
            return "Gemm with transA=1 sums over the rows of its input"
        if use.matrix.rows != 1:
            return "a stack of matrices has one Gram matrix for each"
        names[v.name] = None
    return tuple(names)


def blocks(
    order: cuts.Order, found: Sequence[Weight], inputs: Mapping[str, tuple[str, ...]]
) -> list[Block]:
    """Cut a model into blocks.

    Args:
        order: of the model.
        found: the weights to solve.
        inputs: what each of them asks for, by name.
    """
    members: dict[tuple[str, ...] | ir.Value, list[tuple[int, Weight]]] = {}
    for weight in found:
        place = min(order.place(u.node) for u in weight.uses)
        members.setdefault(inputs[weight.name] or weight.value, []).append((place, weight))
    at: dict[int, list[Group]] = {}
    for held in members.values():
        held.sort(key=lambda each: each[0])
        place, first = held[0]
        group = Group(tuple(w for _, w in held), inputs[first.name], place)
        at.setdefault(place, []).append(group)
    return [
        Block(start, tuple(group for place in places for group in at[place]))
        for start, places in cuts.blocks(order, sorted(at))
    ]
