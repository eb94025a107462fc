"""Times of models that take turns on the same feeds, in one thread.

The clock counts processor time of this thread, in which a session of one thread runs: other processes do not count.
Seen on a machine with five times more runnable processes than cores, three measurements of one pair of models gave
0.49, 0.48, 0.48 by this clock and 0.51, 0.53, 0.35 by the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qgraph.data import Feeds

SHORTEST = 0.002  # seconds; faster runs are repeated, so that clock and call do not count
LEAST, MOST = 7, 25  # rounds
_FINE = 1e-6  # seconds; a coarser clock cannot time a model


@dataclass(frozen=True, slots=True)
class Relative:
    """Time of one model relative to the first one: the median over rounds and its quartiles; seconds per run."""

    ratio: float
    lower_quartile: float
    upper_quartile: float
    seconds: float


def clock_name() -> str:
    """What is counted: "processor" time, or "wall" where the system's processor clock is too coarse."""
    return "processor" if time.get_clock_info("thread_time").resolution <= _FINE else "wall"


def relative(
    sessions: Mapping[str, Any], feeds: Feeds, seconds: float = 1.0
) -> dict[str, Relative]:
    """Time sessions of one thread by turns.

    Args:
        sessions: by name; the first is what the others are compared with.
        feeds: one sample.
        seconds: about how long the first one shall run in all.
    """
    clock = time.thread_time if clock_name() == "processor" else time.perf_counter
    repeats = {}
    once = []
    for name, session in sessions.items():
        session.run(None, feeds)  # the first run allocates
        least = min(_seconds(clock, session, feeds, 1) for _ in range(3))
        repeats[name] = max(1, int(np.ceil(SHORTEST / max(least, 1e-7))))
        once.append(least * repeats[name])
    rounds = int(np.clip(seconds / max(once[0], 1e-7), LEAST, MOST))
    measured = np.empty((rounds, len(sessions)))
    for line in measured:
        line[:] = [_seconds(clock, s, feeds, repeats[name]) for name, s in sessions.items()]
    ratios = measured / measured[:, :1]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75], axis=0)
    typical = np.median(measured, axis=0)
    return {
        name: Relative(float(middle[i]), float(low[i]), float(high[i]), float(typical[i]))
        for i, name in enumerate(sessions)
    }


def _seconds(clock: Any, session: Any, feeds: Feeds, repeats: int) -> float:
    start = clock()
    for _ in range(repeats):
        session.run(None, feeds)
    return float(clock() - start) / repeats
