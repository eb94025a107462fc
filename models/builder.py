"""Builder: writes an ONNX graph line by line, with the names an exporter would give.

Example:
    b = Builder("demo")
    x = b.input("x", FLOAT, ["batch", 64])
    with b.scope("head"):
        y = b.op("MatMul", x, b.initializer("head.weight", w))     # node "/head/MatMul"
    b.output("logits", y, FLOAT, ["batch", 10])
    model = b.model()
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

OPSET = 20
IR_VERSION = 10

BOOL, FLOAT, INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT64

Dims = Sequence[int | str | None]


class Builder:
    """One graph (or subgraph) under construction."""

    def __init__(self, name: str, opset: int = OPSET) -> None:
        """Start an empty graph for the default domain at `opset`."""
        self._name = name
        self._opset = opset
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._functions: list[ir.Function] = []
        self._scope = ""
        self._seen: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put `/name` before the names of the nodes made inside."""
        outer, self._scope = self._scope, f"{self._scope}/{name}"
        yield
        self._scope = outer

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """Add a graph input; a string is a symbolic dimension."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._inputs.append(value)
        return value

    def overridable(self, value: ir.Value) -> None:
        """List an initializer among the inputs too, so that a caller may replace it."""
        self._inputs.append(value)

    def function(self, domain: str, name: str, body: ir.Graph) -> None:
        """Add a model-local function."""
        self._functions.append(ir.Function(domain, name, graph=body, attributes=[]))

    def initializer(self, name: str, array: npt.ArrayLike) -> ir.Value:
        """Return the initializer `name`, made from `array` at its first use."""
        if name not in self._initializers:
            tensor = ir.tensor(np.asarray(array), name=name)
            self._initializers[name] = ir.Value(
                name=name,
                shape=ir.Shape(tensor.numpy().shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        return self._initializers[name]

    def integers(self, name: str, *values: int) -> ir.Value:
        """Return the int64 initializer `name`, [len(values)]: axes, shapes, slice bounds."""
        return self.initializer(name, np.array(values, np.int64))

    def number(self, name: str, value: float) -> ir.Value:
        """Return the float32 initializer `name`, []."""
        return self.initializer(name, np.float32(value))

    def op(
        self, op_type: str, *inputs: ir.Value | None, name: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node with one output and return that."""
        return self.ops(1, op_type, *inputs, name=name, **attributes)[0]

    def ops(
        self,
        count: int,
        op_type: str,
        *inputs: ir.Value | None,
        name: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add a node with `count` outputs and return them."""
        path = self._unique(f"{self._scope}/{name or op_type}")
        outputs = [ir.Value(name=f"{path}_output_{i}") for i in range(count)]
        self._nodes.append(
            ir.node(op_type, inputs, attributes, domain=domain, outputs=outputs, name=path)
        )
        return outputs

    def output(
        self, name: str, value: ir.Value, dtype: ir.DataType | None = None, shape: Dims = ()
    ) -> None:
        """Let `value` leave the graph as `name`; only a subgraph or function may omit the type."""
        value.name = name
        if dtype is not None:
            value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def graph(self) -> ir.Graph:
        """Close the graph: a body for If, Loop, Scan or a function."""
        return ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": self._opset},
            name=self._name,
        )

    def model(self, ir_version: int = IR_VERSION) -> ir.Model:
        """Close the graph and make it a model."""
        graph = self.graph()
        for function in self._functions:
            graph.opset_imports.setdefault(function.domain, 1)
        return ir.Model(
            graph, ir_version=ir_version, producer_name="qgraph.models", functions=self._functions
        )

    def _unique(self, path: str) -> str:
        count = self._seen.get(path, 0)
        self._seen[path] = count + 1
        return f"{path}_{count}" if count else path
