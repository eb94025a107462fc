"""Operators beside those of a model, on the same inputs: what would change if something were quantized.

A pass adds operators to a copy of the float model, whose results become its outputs, and runs it on samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import files, graph, opset, runtime
from qgraph.observers import Grid

Array = npt.NDArray[Any]

# Operators whose bias can make up for a shift of the mean, and whether axes follow that of the output's channels.
BIASED: Mapping[str, bool] = {"Conv": True, "ConvTranspose": True, "Gemm": False}


class Trials:
    """A copy of a float model that takes operators beside its own.

    Attributes:
        nodes: the operators of the copy's main graph, by first output.
    """

    def __init__(self, model: ir.Model, bits: int) -> None:
        self._model = graph.clone(model)
        needed = 21 if bits == 16 else 10  # of QuantizeLinear
        if graph.opset(self._model) < needed:
            opset.raise_opset(self._model, needed)
        self._names = graph.Names(self._model)
        self._outputs: list[ir.Value] = []
        self.nodes = {str(n.outputs[0].name): n for n in self._model.graph if n.outputs}

    def add(
        self, op: str, *inputs: ir.Value | None, like: ir.Node | None = None, **integers: int
    ) -> ir.Value:
        """A float operator with these attributes and those of `like`; returns what it gives."""
        out = graph.value(self._names(f"trial.{op}"), ir.DataType.FLOAT)
        attributes = () if like is None else tuple(like.attributes.values())
        attributes += tuple(ir.AttrInt64(name, value) for name, value in integers.items())
        self._model.graph.append(ir.Node("", op, inputs, attributes, outputs=[out]))
        return out

    def constant(self, array: Array) -> ir.Value:
        """A constant."""
        return graph.add_initializer(self._model.graph, self._names("trial.constant"), array)

    def rounded(self, value: ir.Value | None, grid: Grid) -> ir.Value:
        """A value put on a grid."""
        numbers = [
            self.constant(np.asarray(grid.scale, np.float32)),
            self.constant(np.asarray(grid.zero_point, grid.spec.qtype.container)),
        ]
        codes = self.add("QuantizeLinear", value, *numbers)
        codes.type = ir.TensorType(grid.spec.qtype.dtype)
        return self.add("DequantizeLinear", codes, *numbers)

    def channels(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """An output of a biased operator, averaged over the axes behind the channels."""
        return self.add("GlobalAveragePool", value) if BIASED[node.op_type] else value

    def columns(self, value: ir.Value, count: int) -> ir.Value:
        """A value [..., count], averaged over all axes but the last: [1, count, 1]."""
        rows = self.add("Reshape", value, self.constant(np.array([-1, count])))
        channels = self.constant(np.array([1, count, -1]))
        return self.add(
            "GlobalAveragePool", self.add("Reshape", self.add("Transpose", rows), channels)
        )

    def output(self, value: ir.Value) -> int:
        """Make a value an output; returns which one."""
        self._outputs.append(value)
        return len(self._outputs) - 1

    def run(self, data: Any, samples: int, threads: int) -> Iterator[Sequence[Array]]:
        """The outputs of each of the first samples.

        Raises:
            errors.RuntimeFailure: QG601, where ONNX Runtime refuses the model.
        """
        self._model.graph.outputs[:] = self._outputs
        graph.remove_dead(self._model)
        with tempfile.TemporaryDirectory(prefix="qgraph-trials-") as folder:
            path = files.save(self._model, Path(folder) / "trials.onnx", external_data=True)
            # Q and DQ are run as they are written, also those that the model came with.
            as_written = {"session.disable_quant_qdq": "1"}
            session = runtime.session(
                path, threads=threads or None, accuracy_level=1, config=as_written
            )
            taken = {i.name for i in session.get_inputs()}
            for feeds in islice(data, samples):
                yield session.run(None, {n: v for n, v in feeds.items() if n in taken})


def channel_means(values: Array) -> Array:
    """[N, C, ...] → [C], float64."""
    axes = tuple(a for a in range(values.ndim) if a != 1)
    return np.asarray(values.mean(axis=axes, dtype=np.float64))
