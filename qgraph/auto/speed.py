"""The finished model against the float model: how fast it is, and what costs its time where it is not faster."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qgraph import errors, files
from qgraph.auto import timing
from qgraph.data import Dataset, Feeds
from qgraph.evaluate import sessions

SAME = 0.02  # ratios nearer to 1 than this are no difference
LOOKED_AT = 32  # samples among which the one of middle size is timed
_RUNS = 20  # of the profile
_TINY = 1e-3  # seconds
_WORTH_SAYING = 0.01
_CONVERTS = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "ReorderInput", "ReorderOutput",
        "Transpose",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Speed:
    """Time of the quantized model relative to the float model, below 1 is faster.

    Attributes:
        ratio: median over rounds, in turns, one thread.
        lower_quartile: of the same.
        upper_quartile: of the same.
        float_seconds: per run.
        clock: "processor" or "wall".
        why: where the time goes, "" where the model is faster.
    """

    ratio: float
    lower_quartile: float
    upper_quartile: float
    float_seconds: float
    clock: str
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        if abs(self.ratio - 1) <= SAME:
            return f"as fast as the float model ({self.ratio:.2f} of its time, one thread)"
        word = "faster" if self.ratio < 1 else "slower"
        factor = 1 / self.ratio if self.ratio < 1 else self.ratio
        return (
            f"{factor:.2f}x {word} than the float model ({self.ratio:.2f} of its time, one thread)"
        )

    @property
    def is_faster(self) -> bool:
        """Faster by more than what may be noise."""
        return self.ratio < 1 - SAME

    def finding(self) -> errors.Diagnostic | None:
        """A warning where the model is not faster."""
        if self.is_faster:
            return None
        return errors.Diagnostic(
            "warning", "QG710", "latency", f"the quantized model is {self}: {self.why}",
            "where speed is all that counts, keep the float model; the quantized one is smaller",
        )  # fmt: skip


def typical(dataset: Dataset) -> Feeds:
    """The sample of middle size among the first ones."""
    held = list(islice(dataset, LOOKED_AT))
    order = sorted(range(len(held)), key=lambda i: (sum(v.size for v in held[i].values()), i))
    return held[order[len(order) // 2]]


def measure(model: files.Source, quantized: Path, dataset: Dataset) -> Speed:
    """Time both models by turns on the sample of middle size.

    Raises:
        errors.RuntimeFailure: ONNX Runtime refused one of them.
    """
    feeds = typical(dataset)
    both = {
        "float": sessions.open_session(model),
        "quantized": sessions.open_session(quantized),
    }
    found = timing.relative(both, feeds)
    q, seconds = found["quantized"], found["float"].seconds
    made = Speed(q.ratio, q.lower_quartile, q.upper_quartile, seconds, timing.clock_name())
    return made if made.is_faster else replace(made, why=explain(model, quantized, feeds))


def explain(model: files.Source, quantized: Path, feeds: Feeds) -> str:
    """Where the time of a model goes that is not faster, from ONNX Runtime's own profile of both."""
    before, after = (_profile(m, feeds) for m in (model, quantized))
    total = sum(after.values())
    if not total:
        return "it takes too little time for a profile"
    added = sum(after[op] - before[op] for op in _CONVERTS)
    parts = [f"{', '.join(f'{op} {t / total:.0%}' for op, t in after.most_common(3))} of its time"]
    if added >= total * _WORTH_SAYING:
        parts.append(
            f"{added / total:.0%} went into conversions that the float model does not have"
        )
    if total < _TINY:
        parts.append(f"a run takes {total * 1e6:.0f} us, of which fixed costs are a large part")
    return "; ".join(parts)


def _profile(model: files.Source, feeds: Feeds) -> Counter[str]:
    """Seconds per run by operator, as ONNX Runtime counts them."""
    with tempfile.TemporaryDirectory(prefix="qgraph-profile-") as folder:
        session = sessions.open_session(model, profile=Path(folder) / "run")
        for _ in range(_RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            found[str(event["args"]["op_name"])] += event["dur"] * 1e-6 / _RUNS
    return found
