"""The default selection of the laws' parameters leaves out no pair of them."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from covering import covering


@pytest.mark.parametrize("sizes", [(61, 11, 4), (6, 11, 5), (5, 5, 5), (3, 2, 1)])
def test_every_pair_meets(sizes):
    axes = [range(n) for n in sizes]
    chosen = covering(*axes, full=False)
    assert len(chosen) == sizes[0] * sizes[1]
    for i, j in itertools.combinations(range(3), 2):
        assert {(c[i], c[j]) for c in chosen} == set(itertools.product(axes[i], axes[j]))


def test_full_is_everything():
    axes = [range(n) for n in (4, 3, 2)]
    assert covering(*axes, full=True) == list(itertools.product(*axes))
