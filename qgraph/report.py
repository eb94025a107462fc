"""The report: for every weight what was decided, why, by whom, at what cost, and what really runs.

One `Report` is shown four ways: text for a terminal, Markdown, a page for a browser (`qgraph.page`), and JSON for
pipelines, which holds all that the others show.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from qgraph import errors


@dataclass(slots=True)
class Entry:
    """One line of the ledger: one weight.

    Attributes:
        weight: initializer name in the model that was read.
        label: a name a person recognises.
        operators: operator types that use it, with counts.
        shape: dimensions of the tensor.
        float_bytes: stored size before.
        stored_bytes: stored size after (codes, scales, zero points); equal to float_bytes where it stays float.
        spec: how it is quantized, "" where it stays float.
        activation: how its operators' inputs are quantized, "" for float.
        code: diagnostic code where it stays float.
        reason: why.
        by: the rule or pass that decided.
        forms: how each use was written.
        runs: what the runtime executes for each use; empty where it was not asked.
        sqnr_db: 10 log10(Σw² / Σ(w - q)²), None where it stays float.
        mse: mean squared error of the weight, None where it stays float.
        pass_name: the pass that wrote it, "" where none did.
    """

    weight: str
    label: str
    operators: dict[str, int]
    shape: tuple[int, ...]
    float_bytes: int
    stored_bytes: int
    spec: str = ""
    activation: str = ""
    code: str = ""
    reason: str = ""
    by: str = ""
    forms: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    sqnr_db: float | None = None
    mse: float | None = None
    pass_name: str = ""


@dataclass(slots=True)
class Activation:
    """One activation with a static grid.

    Attributes:
        value: its name.
        spec: type of the codes.
        low: smallest value on the grid.
        high: largest value on the grid.
        scale: value of one step.
        zero_point: code of 0.0.
        method: how the range was chosen.
        shares: the first of the values that share the grid, "" where none does.
        reason: which operators compute on its codes.
    """

    value: str
    spec: str
    low: float
    high: float
    scale: float
    zero_point: int
    method: str
    shares: str = ""
    reason: str = ""


@dataclass(slots=True)
class Operator:
    """One operator that multiplies: Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU, RNN.

    Attributes:
        output: its first output.
        op: operator type in the float model.
        name: its name, "" where it has none.
        weight: the weight that it reads, "" for a product of activations.
        macs: multiply-accumulates for one sample.
        runs: what the runtime executes for it, "" where it was not asked.
        integer: the runtime multiplies integers.
        code: diagnostic code where it does not.
        reason: why.
    """

    output: str
    op: str
    name: str
    weight: str
    macs: int
    runs: str = ""
    integer: bool = False
    code: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far the channels of one activation reach: max|x_j| over samples, for each channel j.

    Attributes:
        largest: of all channels.
        median: of the channels.
        profile: quantiles over the channels, from the smallest to the largest in equal steps.
    """

    largest: float
    median: float
    profile: list[float]

    @property
    def spread(self) -> float:
        """Largest over median channel: what one grid for all of them loses. Inf where most channels are never used."""
        if not self.median:
            return math.inf if self.largest else 1.0
        return self.largest / self.median


@dataclass(frozen=True, slots=True)
class Shift:
    """One activation before and after a pass that evened channels out.

    Attributes:
        value: its name before the pass.
        pass_name: the pass.
        channels: how many it has.
        before: reach of its channels.
        after: the same of what the same operator reads afterwards.
    """

    value: str
    pass_name: str
    channels: int
    before: Reach
    after: Reach


@dataclass
class Report:
    """What one run of `optimize` did. `to_json` is stable: pipelines may rely on its keys."""

    source: str
    output: str
    recipe: str
    target: str
    float_bytes: int = 0
    output_bytes: int = 0
    ledger: list[Entry] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    """What passes that smooth, equalize or rotate did to activations, where there was data."""
    operators: list[Operator] = field(default_factory=list)
    integer_macs: float | None = None
    """Share of multiply-accumulates in integer kernels, 0..1; None where the runtime was not asked."""
    diagnostics: list[errors.Diagnostic] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    """What accuracy control gave back and measured, where a floor was missed at first."""
    mixed: dict[str, Any] = field(default_factory=dict)
    """What mixed precision measured and chose, and the front of size and loss."""
    choice: dict[str, Any] = field(default_factory=dict)
    """What recipe `auto` measured, where it had data."""
    latency: dict[str, Any] = field(default_factory=dict)
    """Time against the float model (`qgraph.auto.Speed`), where there was data and the target can be timed."""
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    resolved_recipe: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    """The command line; empty where there was none."""

    @property
    def quantized(self) -> list[Entry]:
        """The weights that were quantized."""
        return [e for e in self.ledger if e.spec]

    def to_json(self) -> str:
        """The whole report as JSON, with what follows from it under "summary"; NaN and Inf as null."""
        whole = {**asdict(self), "summary": self.summary()}
        return json.dumps(_plain(whole), indent=1) + "\n"

    def to_html(self) -> str:
        """The report as one file for a browser, which needs nothing else."""
        from qgraph import page

        return page.of_report(self)

    def bits_per_weight(self) -> float | None:
        """Stored bits per element of all weights of the ledger, scales, zero points and padding included."""
        elements = sum(math.prod(e.shape) for e in self.ledger)
        return 8 * sum(e.stored_bytes for e in self.ledger) / elements if elements else None

    def kernels(self) -> list[tuple[str, bool, int, int]]:
        """(kernel, whether it multiplies integers, operators, multiplications of a sample), most first."""
        found: dict[tuple[str, bool], list[int]] = {}
        for each in self.operators:
            found.setdefault((each.runs, each.integer), []).append(each.macs)
        rows = [(*key, len(macs), sum(macs)) for key, macs in found.items()]
        return sorted(rows, key=lambda row: (-row[3], row[0]))

    def summary(self) -> dict[str, Any]:
        """What the headline says and the tables count, as plain values."""
        return {
            "headline": self.headline(),
            "weights": len(self.ledger),
            "quantized": len(self.quantized),
            "size_ratio": self.size_ratio(),
            "bits_per_weight": self.bits_per_weight(),
            "weight_bytes": {
                "float": sum(e.float_bytes for e in self.ledger),
                "stored": sum(e.stored_bytes for e in self.ledger),
            },
            "groups": [
                dict(zip(("operators", "spec", "runs", "weights", "float_bytes", "stored_bytes",
                          "worst_sqnr_db"), row, strict=True))
                for row in self.groups()
            ],
            "stayed_float": [
                dict(zip(("code", "reason", "weights", "bytes"), row, strict=True))
                for row in self.stayed_float()
            ],
            "kernels": [
                dict(zip(("runs", "integer", "operators", "macs"), row, strict=True))
                for row in self.kernels()
            ],
        }  # fmt: skip

    def size_ratio(self) -> float | None:
        """Bytes of the output over bytes of the input; None where nothing was written."""
        return (
            self.output_bytes / self.float_bytes if self.float_bytes and self.output_bytes else None
        )

    def headline(self) -> str:
        """One sentence: how many weights, how many bytes."""
        total = len(self.ledger)
        done = len(self.quantized)
        if total == 0:
            return "no quantizable weights in this model"
        ratio = self.output_bytes / self.float_bytes if self.float_bytes else 1.0
        size = (
            f"{megabytes(self.float_bytes)} → {megabytes(self.output_bytes)} ({ratio:.2f}x)"
            if self.output_bytes
            else ""
        )
        return f"{done} of {total} weights quantized; {size}".rstrip("; ")

    def stayed_float(self) -> list[tuple[str, str, int, int]]:
        """(code, reason, how many weights, their bytes) of what stayed float, most bytes first."""
        counts: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        for e in self.ledger:
            if not e.spec:
                counts[e.code, e.reason] += 1
                sizes[e.code, e.reason] += e.float_bytes
        return sorted(
            ((c, r, counts[c, r], sizes[c, r]) for c, r in counts),
            key=lambda row: (-row[3], row[0], row[1]),
        )

    def groups(self) -> list[tuple[str, str, str, int, int, int, float]]:
        """(operators, spec, what runs, weights, bytes before, bytes after, worst SQNR) of what was quantized."""
        found: dict[tuple[str, str, str], list[Entry]] = {}
        for e in self.quantized:
            runs = ", ".join(dict.fromkeys(e.runs or e.forms))
            found.setdefault(("/".join(e.operators), e.spec, runs), []).append(e)
        return [
            (
                *key,
                len(es),
                sum(e.float_bytes for e in es),
                sum(e.stored_bytes for e in es),
                min((e.sqnr_db for e in es if e.sqnr_db is not None), default=math.nan),
            )
            for key, es in found.items()
        ]

    def to_markdown(self) -> str:
        """The report as Markdown, with the whole ledger."""
        lines = [f"# qgraph report: {self.source}", "", f"**{self.headline()}**", ""]
        lines += [
            f"- output: `{self.output}`",
            f"- recipe: `{self.recipe}`, target: `{self.target}`",
        ]
        lines += [f"- {k}: {v}" for k, v in self.versions.items()]
        lines += [
            "",
            "## What happened",
            "",
            *(f"- {note}" for note in [*self.notes, *self.checks]),
        ]
        lines += [
            f"- {d.severity} {d.code} {d.where}: {d.message}" + (f" ({d.hint})" if d.hint else "")
            for d in self.diagnostics
        ]
        lines += [
            "",
            "## Ledger",
            "",
            "| weight | operators | shape | spec | bytes | SQNR dB | runs | why |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for e in self.ledger:
            operators = ", ".join(f"{k} x{v}" if v > 1 else k for k, v in e.operators.items())
            size = f"{e.float_bytes} → {e.stored_bytes}" if e.spec else f"{e.float_bytes}"
            sqnr = "" if e.sqnr_db is None else f"{e.sqnr_db:.1f}"
            runs = ", ".join(dict.fromkeys(e.runs or e.forms))
            why = f"{e.code} {e.reason}".strip()
            shape = "x".join(map(str, e.shape))
            lines.append(
                f"| {e.label} | {operators} | {shape} | {e.spec or 'float'} | {size} | {sqnr} | {runs} | {why} |"
            )
        lines += [
            "",
            "## Recipe to reproduce",
            "",
            "```json",
            json.dumps(self.resolved_recipe, indent=1),
            "```",
            "",
        ]
        return "\n".join(lines)


def megabytes(nbytes: int) -> str:
    """A size for people.

    >>> megabytes(3_604_262), megabytes(32)
    ('3.60 MB', '32 B')
    """
    if nbytes < 1000:
        return f"{nbytes} B"
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 100_000 else f"{nbytes / 1e3:.1f} kB"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
