"""Leading a float model and its twin through the blocks: statistics for each group of weights, each node run once.

With a work folder, where both stand is written down at the end of each block, and interrupted work goes on there.
The stops are the same whether or not something interrupts, and so are all numbers.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from qgraph.calibrate.groups import Block, Group
from qgraph.calibrate.twins import Means, Twins, collect
from qgraph.spec import QTensor
from qgraph.weights import Weight

_LEFT = re.compile(r"inputs-(\d+)-\w+")


class Course:
    """The way through a model.

    Args:
        twins: at the start of it.
        blocks: of the model, in order.
        folder: of work that is kept, or None.
    """

    def __init__(self, twins: Twins, blocks: Sequence[Block], folder: Path | None) -> None:
        self._twins, self._blocks, self._folder = twins, blocks, folder
        self._stops: list[int] = []
        self._is_under_way = False
        asking = [i for i, b in enumerate(blocks) if any(g.inputs for g in b.groups)]
        self._last = asking[-1] if asking else -1

    def replace(self, weight: Weight, q: Future[Any] | QTensor) -> None:
        """Hear how a weight was solved."""
        self._twins.replace(weight, q)

    def skip(self, number: int) -> None:
        """Hear that all weights of the next block are solved already."""
        self._stops += [g.place for g in self._blocks[number].groups if g.inputs]
        self._end(number)

    def collect(self, group: Group) -> tuple[Means, Means]:
        """What the weights of a group see, on every other sample and on the rest."""
        self._stops.append(group.place)
        self._go()
        return collect(self._twins, group)

    def finish(self, number: int) -> None:
        """Hear that all weights of a block are solved, and that the results are kept."""
        self._end(number)
        if self._folder is None or number >= self._last:
            return
        self._go()
        start = self._blocks[number + 1].start
        if self._twins.place == start:
            self._twins.leave(self._folder / f"inputs-{number + 1:04d}")
            for path, count in _left(self._folder):
                if count <= number:
                    shutil.rmtree(path)

    def _end(self, number: int) -> None:
        if number < self._last:
            self._stops.append(self._blocks[number + 1].start)

    def _go(self) -> None:
        """Make all stops up to here; the first time, from where earlier work left off."""
        if not self._is_under_way:
            self._is_under_way = True
            left = [] if self._folder is None else _left(self._folder)
            both = [n for _, n in left]
            whole = [n for n in both if both.count(n) == self._twins.sides]
            if whole and self._folder is not None:
                start = self._blocks[max(whole)].start
                self._twins.enter(start, self._folder / f"inputs-{max(whole):04d}")
        for place in self._stops:
            self._twins.step(place)
        self._stops.clear()


def _left(folder: Path) -> list[tuple[Path, int]]:
    """What was written down, and at the start of which block."""
    found = ((path, _LEFT.fullmatch(path.name)) for path in sorted(folder.iterdir()))
    return [(path, int(match[1])) for path, match in found if match]
