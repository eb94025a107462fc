"""What a law is tried on: a selection that covers every pair of parameters; with QGRAPH_FULL=1, everything."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

FULL = os.environ.get("QGRAPH_FULL") == "1"


def covering(
    first: Sequence[Any], second: Sequence[Any], third: Sequence[Any], full: bool = FULL
) -> list[tuple[Any, Any, Any]]:
    """Triples in which every pair of values of two axes meets, as in a Latin square; all triples where `full`.

    The third axis is the shortest: pair (i, j) of the first two stands with value (i + j) % len(third) of it.
    """
    assert len(third) <= min(len(first), len(second))
    if full:
        return list(itertools.product(first, second, third))
    return [
        (a, b, third[(i + j) % len(third)])
        for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second))
    ]
