"""What a mixture of formats costs at the model's outputs: the float model with its weights replaced by quantized ones.

No operator is exchanged, so a mixture takes as long to open as the float model, and only the weights that differ from
the mixture before are written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import files, graph, runtime
from qgraph.data import Feeds
from qgraph.evaluate import sessions
from qgraph.evaluate.comparison import OutputError
from qgraph.evaluate.reference import Reference
from qgraph.recipe import FLOAT
from qgraph.spec import QTensor
from qgraph.weights import Weight

Solved = Mapping[tuple[str, str], QTensor]
"""Quantized weights by name and spec."""
Judge = Callable[[Sequence[OutputError]], float]
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
    ) -> None:
        self._judge = judge
        self._folder, self._threads = folder, threads or os.cpu_count() or 1
        path = files.save(model, folder / "float.onnx", external_data=True)
        self._config = runtime.mapped_weights(files.file_bytes(path))
        self._reference = Reference(path, samples, logits, self._config)
        self._starts = (0, 1) if len(samples) > 1 else (0, 0)
        self._model = files.load(path)
        values = {str(v.name): v for _, v in graph.initializers(self._model)}
        self._values = {w.name: values[w.name] for w in found}
        self._weights = {w.name: w for w in found}
        self._held = dict.fromkeys(self._weights, FLOAT)
        self._solved: dict[tuple[str, str], QTensor] = {}
        self._known: dict[frozenset[tuple[str, str]], tuple[float, float]] = {}

    @property
    def measured(self) -> int:
        """How many mixtures were."""
        return len(self._known)

    @property
    def has_predictions(self) -> bool:
        """There is an output with predictions over classes, so there are KL divergences."""
        return bool(self._reference.predictions)

    def know(self, solved: Solved) -> None:
        """Take in quantized weights, from which mixtures are made."""
        self._solved.update(solved)

    def loss(self, specs: Mapping[str, str]) -> float:
        """What the outputs lose where weights have these specs and all others are float."""
        return sum(self.halves(specs)) / 2

    def halves(self, specs: Mapping[str, str]) -> tuple[float, float]:
        """The same on each half of the samples; twice the same where there is only one sample."""
        key = frozenset((w, s) for w, s in specs.items() if s != FLOAT)
        if key not in self._known:
            for name in self._weights:
                self._put(name, specs.get(name, FLOAT))
            path = self._folder / "mixture.onnx"
            ir.save(self._model, path)
            session = sessions.open_session(str(path), threads=self._threads, config=self._config)
            first, second = (
                self._judge(self._reference.judge(session, start, 2)) for start in self._starts
            )
            self._known[key] = first, second
        return self._known[key]

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


def loss(outputs: Sequence[OutputError]) -> float:
    """KL divergence in nats, of the output where it is largest; without predictions, the largest share of noise."""
    judged = [o.divergence.kl_mean.value for o in outputs if o.divergence is not None]
    if judged:
        return _finite(max(judged))
    noise = [10 ** (-o.error.sqnr_db / 10) for o in outputs if o.error is not None]
    return _finite(max(noise, default=0.0))


def _finite(value: float) -> float:
    return max(value, 0.0) if np.isfinite(value) else WORST
