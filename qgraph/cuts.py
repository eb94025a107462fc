"""Where a model may be cut: what is alive between two of its nodes, and the narrow points between its weights.

Node i stands between the places i and i + 1, in the order of the file. A value is alive at a place where a node before
it computed the value (or a caller gave it) and a node behind it reads it; nodes in bodies count as the node of the
main graph that holds them. Constants are alive nowhere.

    Gather . Norm  q k v  attention  o  Add . Norm  gate up  Mul  down  Add . Norm
           ^ residual stream only           ^                               ^
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from qgraph import graph


class Order:
    """A model's main graph in the order of the file. The model must not change meanwhile.

    Attributes:
        nodes: of the main graph.
    """

    def __init__(self, model: ir.Model) -> None:
        self.nodes = list(model.graph)
        self._place = {node: place for place, node in enumerate(self.nodes)}
        self._place |= {
            inner: self._place[top]
            for body, top in graph.ancestors(model).items()
            for inner in body
        }
        self._made = {v: 0 for v in model.graph.inputs if not v.is_initializer()}
        self._made |= {v: i + 1 for i, n in enumerate(self.nodes) for v in n.outputs}
        self._read = dict.fromkeys(self._made, -1)  # where the last reader stands
        for node, place in self._place.items():
            for v in node.inputs:
                if v in self._read:
                    self._read[v] = max(self._read[v], place)
        for body, top in graph.ancestors(model).items():
            for v in body.outputs:  # a body may give a value of the main graph as it is
                if v in self._read:
                    self._read[v] = max(self._read[v], self._place[top])
        changes = [0] * (len(self.nodes) + 2)
        for v, made in self._made.items():
            if self._read[v] >= made:
                changes[made] += 1
                changes[self._read[v] + 1] -= 1
        self._widths: list[int] = []
        for change in changes:
            self._widths.append(change + (self._widths[-1] if self._widths else 0))

    def place(self, node: ir.Node) -> int:
        """The place right before a node, or before the node of the main graph that holds it."""
        return self._place[node]

    def made(self, value: ir.Value) -> int:
        """The first place at which a value of the main graph is there."""
        return self._made[value]

    def width(self, place: int) -> int:
        """How many values are alive at a place."""
        return self._widths[place]

    def alive(self, place: int) -> list[ir.Value]:
        """The values that are alive at a place, in the order in which they are computed."""
        return [v for v, made in self._made.items() if made <= place <= self._read[v]]

    def narrowest(self, after: int, until: int) -> int:
        """The place behind `after`, at most `until`, at which the fewest values are alive; the last of several."""
        return min(range(until, after, -1), key=self.width)


def blocks(order: Order, places: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Cut at narrow points: between two neighbours of `places` where no gap beside it is narrower.

    Args:
        order: of a model.
        places: distinct and ascending, right before the nodes that something is done about.

    Yields:
        Where a block begins, and the places that lie in it.
    """
    gaps = [order.narrowest(a, b) for a, b in itertools.pairwise(places)]
    widths = [order.width(place) for place in gaps]
    start, held = 0, list(places[:1])
    for index, (gap, place) in enumerate(zip(gaps, places[1:], strict=True)):
        if widths[index] <= min(widths[max(index - 1, 0) : index + 2]):
            yield start, held
            start, held = gap, []
        held.append(place)
    if held:
        yield start, held


def weight_bytes(model: ir.Model, order: Order) -> list[int]:
    """For each place, the bytes of constants that nodes before it read."""
    nbytes = [0] * (len(order.nodes) + 1)
    for node in graph.nodes(model):
        held = {v: v.const_value for v in node.inputs if v is not None}
        nbytes[order.place(node) + 1] += sum(t.nbytes for t in held.values() if t is not None)
    return list(itertools.accumulate(nbytes))


def stops(order: Order, read: Sequence[int], start: int, end: int, most: int) -> Iterator[int]:
    """Narrow places between two others, so that few weights are needed from one to the next.

    Args:
        order: of a model.
        read: its `weight_bytes`.
        start: the earlier place.
        end: the later place.
        most: bytes of weights between neighbours, unless one operator alone needs more.
    """
    while read[end] - read[start] > most:
        near, far = (
            bisect.bisect_right(read, read[start] + share) - 1 for share in (most // 2, most)
        )
        start = order.narrowest(min(near, far - 1), far) if far > start else start + 1
        yield start
