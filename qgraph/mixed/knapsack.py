"""The multiple-choice knapsack: one option for each item, within budgets, exactly (scipy's HiGHS).

    minimise  Σ_i Σ_o loss[i, o] x[i, o]   where  Σ_o x[i, o] = 1,  Σ bytes x ≤ budget,  x ∈ {0, 1}

Or the other way round: the fewest bytes for which the loss is within a limit. Both are the same call with other rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qgraph import errors

_MOST_SECONDS = 60.0
_SLACK = 1e-7  # relative; the solver's own tolerance


@dataclass(frozen=True)
class Limit:
    """Σ of one option's value per item must not be above this: `values[i][o]`."""

    values: Sequence[Sequence[float]]
    most: float


def solve(objective: Sequence[Sequence[float]], limits: Sequence[Limit]) -> list[int] | None:
    """The option of each item for which the sum of the objective is least, or None where no choice is within limits.

    Args:
        objective: a value for every option of every item.
        limits: what else must hold.

    Raises:
        errors.UnsupportedError: QG333 where scipy is not installed.
    """
    if not objective:
        return []
    limits = [each for each in limits if each.most != math.inf]
    if any(sum(min(v) for v in each.values) > each.most for each in limits):
        return None
    optimize, sparse = _scipy()
    counts = [len(values) for values in objective]
    rows = np.repeat(np.arange(len(counts)), counts)
    size = len(rows)
    one_each = sparse.csr_array((np.ones(size), (rows, np.arange(size))))
    constraints: list[Any] = [optimize.LinearConstraint(one_each, 1, 1)]
    for each in limits:
        flat = _flat(each.values)
        scale = max(float(np.abs(flat).max()), 1e-300)
        top = each.most / scale
        constraints.append(
            optimize.LinearConstraint(flat[None] / scale, -np.inf, top - _SLACK * abs(top))
        )
    cost = _flat(objective)
    with _silent():  # HiGHS tells, whatever its options, which of its own functions it is in
        found = optimize.milp(
            cost / max(float(np.abs(cost).max()), 1e-300),
            constraints=constraints,
            integrality=np.ones(size),
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": _MOST_SECONDS},
        )
    if found.x is None:
        return None
    starts = np.cumsum([0, *counts])
    return [int(np.argmax(found.x[a:b])) for a, b in itertools.pairwise(starts)]


def moves(objective: Sequence[Sequence[float]], chosen: Sequence[int], most: int) -> Limit:
    """So many items at most that have other options than in a choice."""
    rows = zip(objective, chosen, strict=True)
    return Limit([[float(i != now) for i in range(len(v))] for v, now in rows], most)


def _flat(values: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    return np.concatenate([np.asarray(v, np.float64) for v in values])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What the process prints on standard output goes nowhere: lines of C code would be among somebody's JSON."""
    library = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
    if sys.stdout is not None:
        sys.stdout.flush()
    library.fflush(None)  # what waits in buffers was printed before
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError as e:
        raise errors.UnsupportedError(
            errors.Diagnostic(
                "error", "QG333", "mixed precision", "needs scipy, which is not installed",
                'pip install "qgraph[mixed]"',
            )
        ) from e  # fmt: skip
    return optimize, sparse
