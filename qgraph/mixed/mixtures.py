"""What a mixture of formats costs at the model's outputs: the float model with its weights replaced by quantized ones.

No operator is exchanged, so a mixture takes as long to open as the float model, and only the weights that differ from
the mixture before are written.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import files, graph, mapped, spool
from qgraph.data import Feeds
from qgraph.evaluate.comparison import OutputError
from qgraph.evaluate.reference import Expected
from qgraph.mixed import stretches
from qgraph.recipe import FLOAT
from qgraph.spec import QTensor
from qgraph.weights import Weight
from qgraph.workdir import WorkDir

Solved = Mapping[tuple[str, str], QTensor]
"""Quantized weights by name and spec."""
Judge = Callable[[Sequence[OutputError]], float]
_MEASURED = "measured"
_SECONDS = 5.0  # between two writings of it
WORST = 1e6
"""What outputs count that are not finite."""


class Mixtures:
    """Measures mixtures on the same samples.

    Args:
        model: a float model; left unchanged.
        found: the weights that are replaced.
        samples: on which outputs are compared.
        logits: outputs that hold predictions, as for `evaluate.compare`.
        folder: an empty folder that outlives this.
        threads: of ONNX Runtime; 0 is one per core.
        judge: makes one number of what outputs lose.
        work: keeps what was measured, and knows what was before an interruption; or None.
    """

    def __init__(
        self,
        model: ir.Model,
        found: Sequence[Weight],
        samples: Sequence[Feeds],
        logits: Sequence[str],
        folder: Path,
        threads: int,
        judge: Judge,
        work: WorkDir | None = None,
    ) -> None:
        self._judge, self._source = judge, model
        path = files.save(model, folder / "float.onnx", external_data=True)
        mapped.release(model)
        copy = files.load(path)
        values = {str(v.name): v for _, v in graph.initializers(copy)}
        self._values = {w.name: values[w.name] for w in found}
        self._weights = {w.name: w for w in found}
        self._held = dict.fromkeys(self._weights, FLOAT)
        self._runner = stretches.runner(copy, samples, folder, threads or os.cpu_count() or 1)
        outputs = list(self._runner.outputs({}, keep=True))
        self._expected = Expected(self._runner.declared, outputs, logits)
        self._parts = min(2, len(outputs))
        self._solved: dict[tuple[str, str], QTensor] = {}
        self._known = _Known(work)
        self._near: dict[str, str] = {}

    @property
    def measured(self) -> int:
        """How many mixtures were."""
        return self._known.count

    @property
    def has_predictions(self) -> bool:
        """There is an output with predictions over classes, so there are KL divergences."""
        return bool(self._expected.predictions)

    def know(self, solved: Solved) -> None:
        """Take in quantized weights, from which mixtures are made."""
        self._solved.update(solved)

    def loss(self, specs: Mapping[str, str]) -> float:
        """What the outputs lose where weights have these specs and all others are float."""
        return sum(self.halves(specs)) / 2

    def halves(self, specs: Mapping[str, str]) -> tuple[float, float]:
        """The same on each half of the samples; twice the same where there is only one sample."""
        asked = {w: s for w, s in specs.items() if s != FLOAT}
        found = self._known.get(asked)
        if found is None:
            found = self._measured(asked, keep=False)
            self._known.add(asked, found)
        return found

    def stay_near(self, specs: Mapping[str, str]) -> None:
        """Make ready to measure mixtures that differ from this one in few weights."""
        asked = {w: s for w, s in specs.items() if s != FLOAT}
        if self._runner.keeps and asked != self._near:
            found = self._measured(asked, keep=True)
            self._near = asked
            if self._known.get(asked) is None:
                self._known.add(asked, found)

    def _measured(self, specs: Mapping[str, str], *, keep: bool) -> tuple[float, float]:
        for name in self._weights:
            self._put(name, specs.get(name, FLOAT))
        mapped.release(self._source)
        outputs = self._runner.outputs(specs, keep=keep)
        losses = [self._judge(each) for each in self._expected.judge(outputs, self._parts)]
        return losses[0], losses[-1]

    def _put(self, name: str, spec: str) -> None:
        """Give a weight the values that it has under a spec."""
        if self._held[name] == spec:
            return
        weight, value = self._weights[name], self._values[name]
        array: npt.NDArray[np.floating] = (
            graph.array(weight.value)
            if spec == FLOAT
            else weight.matrix.back(self._solved[name, spec].dequantize(), weight.dims)
        )
        if spec != FLOAT:
            spool.drop(self._solved[name, spec])
        held = value.const_value
        assert held is not None
        stored = np.ascontiguousarray(array, held.dtype.numpy())
        if isinstance(held, ir.ExternalTensor):
            held.release()
            with open(held.path, "r+b") as stream:
                stream.seek(held.offset or 0)
                stream.write(stored.tobytes())
        else:
            value.const_value = ir.tensor(stored, name=name)
        self._held[name] = spec


class _Known:
    """What was measured, by mixture; kept in a work folder every few seconds."""

    def __init__(self, work: WorkDir | None) -> None:
        self._work, self._stored = work, time.monotonic()
        held = None if work is None else work.load(_MEASURED)
        self._losses: dict[str, tuple[float, float]] = {}
        if held is not None:
            self._losses = {key: (a, b) for key, (a, b) in held[1].items()}

    @property
    def count(self) -> int:
        return len(self._losses)

    def get(self, specs: Mapping[str, str]) -> tuple[float, float] | None:
        return self._losses.get(_key(specs))

    def add(self, specs: Mapping[str, str], losses: tuple[float, float]) -> None:
        self._losses[_key(specs)] = losses
        if self._work is not None and time.monotonic() - self._stored > _SECONDS:
            self._work.store(_MEASURED, {}, self._losses)
            self._stored = time.monotonic()


def _key(specs: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(specs.items())).encode()).hexdigest()


def loss(outputs: Sequence[OutputError]) -> float:
    """KL divergence in nats, of the output where it is largest; without predictions, the largest share of noise."""
    judged = [o.divergence.kl_mean.value for o in outputs if o.divergence is not None]
    if judged:
        return _finite(max(judged))
    noise = [10 ** (-o.error.sqnr_db / 10) for o in outputs if o.error is not None]
    return _finite(max(noise, default=0.0))


def _finite(value: float) -> float:
    return max(value, 0.0) if np.isfinite(value) else WORST
