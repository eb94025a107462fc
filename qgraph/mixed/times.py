"""How long the kernels of each weight take in each format, from ONNX Runtime's own profile of models in one format.

A model is written in each format for all weights that take it; one thread runs the sample of middle size, and what
counts of an operator is the shorter half of its runs: whatever else the machine does only makes runs longer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qgraph import files
from qgraph.auto import timing
from qgraph.data import Feeds
from qgraph.evaluate import sessions
from qgraph.mixed.items import Item
from qgraph.weights import Weight

RUNS = 12
_END = "_kernel_time"
Look = Callable[[Path], Mapping[str, float]]


def measure(
    items: Sequence[Item], written: Callable[[str, Look], Mapping[str, float]], feeds: Feeds
) -> float:
    """Put the seconds into the options.

    Args:
        items: as `items.find` makes them.
        written: writes the model in one format and lets somebody look at the file.
        feeds: one sample.

    Returns:
        Seconds of all operators that the choice does not change.
    """
    choices = dict.fromkeys(o.choice for item in items for o in item.options)
    known = {c: written(c, lambda path: profile(path, feeds)) for c in choices}
    for item in items:
        item.options = [
            replace(o, seconds=sum(_of(w, known[o.choice]) for w in item.weights))
            for o in item.options
        ]
    found = [w for item in items for w in item.weights]
    return float(
        np.median([sum(k.values()) - sum(_of(w, k) for w in found) for k in known.values()])
    )


def profile(model: files.Source, feeds: Feeds) -> dict[str, float]:
    """What each operator takes in seconds, by its name: the mean of the shorter half of its runs."""
    with tempfile.TemporaryDirectory(prefix="qgraph-profile-") as folder:
        session = sessions.open_session(model, profile=Path(folder) / "run")
        for _ in range(RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: dict[str, list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_END):
            found.setdefault(name.removesuffix(_END), []).append(event["dur"] * 1e-6)
    # A body's operators run more than once in a run.
    return {
        name: float(np.mean(sorted(held)[: -(-len(held) // 2)])) * len(held) / RUNS
        for name, held in found.items()
    }


def _of(weight: Weight, known: Mapping[str, float]) -> float:
    """Seconds of the operators that a weight's uses became: they keep the name, or begin with that of the output."""
    total = 0.0
    for use in weight.uses:
        begin = f"{use.node.outputs[0].name}."
        total += sum(s for n, s in known.items() if n == use.node.name or n.startswith(begin))
    return total


def ratio(model: files.Source, path: Path, feeds: Feeds) -> timing.Relative:
    """Time of a written model against that of the float model, in turns."""
    both = {"float": sessions.open_session(model), "mixed": sessions.open_session(path)}
    return timing.relative(both, feeds)["mixed"]
