"""MatMul and Gemm whose product is one of our operators: what MatMulInt4 and MatMulTernary have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import graph, ops
from qgraph.ops import bodies
from qgraph.spec import QTensor, QuantSpec
from qgraph.target import Form, Request, Writer
from qgraph.weights import Use, Weight

# As kMaxColumns in runtime_ops/kernels/kernel.h.
MAX_K = 1 << 18
# Below this, calls cost more than products, and a tile of 16 rows is mostly padding.
MIN_N, MIN_ELEMENTS = 16, 1 << 12


class MatMulPacked(Form):
    """A 2-D weight in the kernels' own layout; the node carries N, K and how activations are rounded."""

    domains: ClassVar[Mapping[str, int]] = {bodies.DOMAIN: bodies.VERSION}
    op: ClassVar[str]

    def refuses(self, request: Request) -> str:
        """A 2-D float32 weight that is not too small, and is used as a matrix only."""
        use = request.use
        if not self.rounds_as(request.activation):
            return "its kernel quantizes activations by itself; ask for float activations"
        if request.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return f"takes float32 or float16 activations, not {request.dtype.name}"
        if len(request.dims) != 2:
            return f"takes a 2-D weight, this one is {len(request.dims)}-D"
        n, k = use.matrix.shape(request.dims)
        if n < MIN_N or n * k < MIN_ELEMENTS:
            return f"a weight of {n} x {k} is too small to gain anything"
        if k > MAX_K:
            return f"sums over at most {MAX_K}, not {k}"
        if use.kind == "gemm" and graph.attribute(use.node, "transA", 0):
            return "takes no transposed activations (Gemm transA=1)"
        if use.kind == "gemm" and graph.attribute(use.node, "alpha", 1.0) != 1.0:
            return "takes no Gemm alpha"
        return ""

    def opset(self, request: Request) -> int:
        """The operator's body is written for this opset."""
        return bodies.MIN_OPSET

    def layout(self, request: Request) -> Hashable:
        """Tiles of one operator, of the weight as this use sees it."""
        return (self.name, request.use.matrix)

    def rounds_as(self, activation: QuantSpec | None) -> bool:
        """Whether the kernel treats activations as the recipe wants; they are float for all but itself."""
        return activation is None

    @abstractmethod
    def stored(
        self, writer: Writer, weight: Weight, q: QTensor
    ) -> tuple[list[ir.Value], dict[str, Any]]:
        """The constants between X and the bias, and the attributes besides N and K."""

    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """Replace MatMul or Gemm; a Gemm's constant row of biases goes into the node, any other is added after it."""
        writer.require(self.domains)
        ops.require(writer.model, self.op)
        n, k = q.shape
        constants, attributes = self.stored(writer, weight, q)
        node = use.node
        bias, rest = _bias(writer, use, n)
        inputs = [node.inputs[0], *constants, bias]
        attributes = {"N": n, "K": k, **attributes}
        if rest is None:
            return graph.replace_node(
                node, self.op, inputs, domain=bodies.DOMAIN, attributes=attributes
            )
        product = graph.value(writer.names(f"{node.outputs[0].name}.product"), float_type(use))
        name = writer.names(f"{node.name or node.outputs[0].name}.{self.op}")
        made = graph.add_node(
            node, self.op, inputs, [product], name=name, domain=bodies.DOMAIN, attributes=attributes
        )
        graph.replace_node(node, "Add", [product, rest])
        return made


def float_type(use: Use) -> ir.DataType:
    """The type of the weight as its operator reads it, which is that of the operator's result."""
    read = use.node.inputs[use.index]
    assert read is not None
    return read.dtype or use.node.outputs[0].dtype or ir.DataType.FLOAT


def _bias(writer: Writer, use: Use, n: int) -> tuple[ir.Value, ir.Value | None]:
    """The bias that the operator itself adds, and one that is left to an Add."""

    def zero() -> ir.Value:
        return writer.constant(("no bias",), "no_bias", lambda: np.zeros(1, np.float32))

    node = use.node
    given = node.inputs[2] if use.kind == "gemm" and len(node.inputs) > 2 else None
    if given is None:
        return zero(), None
    beta = float(graph.attribute(node, "beta", 1.0))
    if graph.is_constant(given) and graph.array(given).size in (1, n):
        values = graph.array(given)
        if values.ndim <= 1 or values.shape[-1] == values.size:
            row = np.asarray(values, np.float32).reshape(-1) * np.float32(beta)
            key = ("bias row", given.name, beta)
            return writer.constant(key, f"{given.name}.row", lambda: row), None
    if beta == 1.0:
        return zero(), given
    dtype = float_type(use)
    factor = writer.constant(
        ("scalar", beta, dtype), "beta", lambda: np.asarray(beta, dtype.numpy())
    )
    scaled = graph.value(writer.names(f"{given.name}.scaled"), dtype)
    graph.add_node(node, "Mul", [given, factor], [scaled], name=writer.names(f"{given.name}.Mul"))
    return zero(), scaled
