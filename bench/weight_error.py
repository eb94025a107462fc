"""Weight error of a quantized file against its float model, matrix by matrix, whoever wrote it.

    python bench/weight_error.py float.onnx quantized.onnx

Reads MatMulNBits, and MatMul or Gemm behind DequantizeLinear or other arithmetic on constants (which ONNX Runtime
evaluates). Operators are matched by the name of their output, which every tool keeps.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qgraph import files, graph, numerics, runtime, weights
from qgraph.spec import QuantSpec

_PART = 1 << 22  # elements compared at a time
_LINEAR = ("MatMul", "Gemm", "MatMulNBits")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Error:
    """The error of one matrix.

    Attributes:
        name: of the float weight.
        output: name of what the operator computes, the same in every tool's file.
        bits: of its codes; 32 where it stayed float.
        stored_bytes: codes, scales and zero points.
        elements: N * K.
        noise: Σ (w - q)².
        power: Σ w².
    """

    name: str
    output: str
    bits: int
    stored_bytes: int
    elements: int
    noise: float
    power: float

    @property
    def sqnr_db(self) -> float:
        return 10 * math.log10(self.power / self.noise) if self.noise else math.inf

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bits": self.bits,
            "bits_per_weight": round(8 * self.stored_bytes / self.elements, 3),
            "mse": self.noise / self.elements,
            "sqnr_db": round(self.sqnr_db, 2),
        }


def of(source: str | Path, quantized: str | Path) -> list[Error]:
    """The error of every matrix that a MatMul or Gemm of the float model multiplies by.

    Raises:
        LookupError: an operator of the float model has no counterpart.
    """
    model = ir.load(quantized)
    produced = {str(v.name): n for n in graph.nodes(model) for v in n.outputs}
    errors = []
    for weight in weights.find(files.load(source)):
        use = next((u for u in weight.uses if u.kind in ("matmul", "gemm") and not u.reason), None)
        if use is None or len(weight.dims) != 2:
            continue
        output = str(use.node.outputs[0].name)
        node = _linear(produced.get(output))
        if node is None:
            raise LookupError(f"{quantized}: nothing computes {output!r}")
        w = use.matrix.of(graph.array(weight.value))
        errors.append(_error(weight.label, output, w, node))
    return errors


def total(errors: list[Error]) -> dict[str, Any]:
    """The error over a whole model, and the bits that it takes."""
    elements = sum(e.elements for e in errors)
    noise, power = sum(e.noise for e in errors), sum(e.power for e in errors)
    return {
        "matrices": len(errors),
        "elements": elements,
        "bits_per_weight": 8 * sum(e.stored_bytes for e in errors) / elements,
        "four_bit_share": sum(e.elements for e in errors if e.bits == 4) / elements,
        "mse": noise / elements,
        "sqnr_db": 10 * math.log10(power / noise) if noise else math.inf,
    }


def _linear(node: ir.Node | None, steps: int = 4) -> ir.Node | None:
    """The linear operator behind an output: itself, or before a bias or a change of shape."""
    while node is not None and steps:
        if node.op_type in _LINEAR:
            return node
        above = [v.producer() for v in node.inputs if v is not None]
        node, steps = next((n for n in above if n is not None), None), steps - 1
    return None


def _error(name: str, output: str, w: Array, node: ir.Node) -> Error:
    n, k = w.shape
    rows = max(1, _PART // k)
    read = _nbits(node, n, k) if node.op_type == "MatMulNBits" else _expression(node)
    noise = power = 0.0
    for start in range(0, n, rows):
        part = np.asarray(w[start : start + rows], np.float64)
        power += float(np.square(part).sum())
        noise += float(np.square(part - read(slice(start, start + rows))).sum())
    bits, nbytes = _stored(node)
    return Error(name, output, bits, nbytes, n * k, noise, power)


def _nbits(node: ir.Node, n: int, k: int) -> Any:
    """Reads rows of a MatMulNBits weight."""
    bits = int(graph.attribute(node, "bits", 4))
    block = int(graph.attribute(node, "block_size", 32))
    spec = QuantSpec.parse(f"uint{bits}.g{block}.sym")
    blocks = -(-k // block)
    codes, scales, points = (
        None if v is None else graph.array(v) for v in [*node.inputs, None][1:4]
    )
    assert codes is not None and scales is not None

    def unpacked(values: Array, columns: int) -> Array:
        flat = numerics.unpack(
            np.ascontiguousarray(values), bits, values.size * 8 // bits, signed=False
        )
        return flat.reshape(len(values), -1)[:, :columns]

    def read(part: slice) -> Array:
        q = unpacked(codes.reshape(n, -1)[part], k)
        s = scales.reshape(n, blocks)[part].astype(np.float32)
        if points is None or points.size == 0:
            zero = None
        elif points.dtype == np.uint8:
            zero = unpacked(points.reshape(n, -1)[part], blocks)
        else:  # float zero points
            zero = points.reshape(n, blocks)[part]
        return numerics.dequantize(q, s, zero, spec)

    return read


def _expression(node: ir.Node) -> Any:
    """Reads rows of a weight that is computed from constants: runs that part of the graph."""
    v = node.inputs[1]
    assert v is not None
    is_transposed = node.op_type == "Gemm" and graph.attribute(node, "transB", 0)
    value = graph.array(v) if graph.is_constant(v) else _evaluate(v)
    matrix = value if is_transposed else value.T
    return lambda part: np.asarray(matrix[part], np.float64)


def _evaluate(v: ir.Value) -> Array:
    nodes, constants = _behind(v)
    kept = [
        ir.Value(name=c.name, const_value=c.const_value, type=c.type, shape=c.shape)
        for c in constants
    ]
    made: dict[ir.Value, ir.Value] = dict(zip(constants, kept, strict=True))
    copies = []
    for node in nodes:
        outputs = [ir.Value(name=o.name) for o in node.outputs]
        inputs = [None if i is None else made[i] for i in node.inputs]
        copies.append(
            ir.Node(
                node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs
            )
        )
        made.update(zip(node.outputs, outputs, strict=True))
    result = made[v]
    result.type = ir.TensorType(ir.DataType.FLOAT)
    assert isinstance(nodes[0].graph, ir.Graph)
    imports: Mapping[str, int] = nodes[0].graph.opset_imports
    whole = ir.Graph(
        [], [result], nodes=copies, initializers=kept, opset_imports=dict(imports), name="w"
    )
    proto = files.to_proto(ir.Model(whole, ir_version=10))
    return np.asarray(runtime.session(proto, optimize="off").run(None, {})[0])


def _behind(v: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that compute a value, in order, and the constants that they start from."""
    nodes: list[ir.Node] = []
    constants: list[ir.Value] = []

    def visit(value: ir.Value) -> None:
        producer = value.producer()
        if producer is None:
            if value.const_value is None:
                raise LookupError(f"{v.name!r} depends on the input {value.name!r}")
            if value not in constants:
                constants.append(value)
        elif producer not in nodes:
            for each in producer.inputs:
                if each is not None:
                    visit(each)
            nodes.append(producer)

    visit(v)
    return nodes, constants


def _stored(node: ir.Node) -> tuple[int, int]:
    """Bits of the codes, and bytes of codes, scales and zero points."""
    held = list(_tensors(node))
    nbytes = sum(t.nbytes for t in held)
    if node.op_type == "MatMulNBits":
        return int(graph.attribute(node, "bits", 4)), nbytes
    return max(held, key=lambda t: t.size).dtype.bitwidth, nbytes


def _tensors(node: ir.Node) -> Iterator[ir.TensorProtocol]:
    inputs = node.inputs[1:4] if node.op_type == "MatMulNBits" else node.inputs[1:2]
    for v in inputs:
        if v is None:
            continue
        for constant in _behind(v)[1]:
            assert constant.const_value is not None
            if constant.const_value.dtype != ir.DataType.INT64:  # shapes
                yield constant.const_value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("quantized")
    given = parser.parse_args()
    errors = of(given.source, given.quantized)
    for error in errors:
        row = error.to_json()
        print(f"{row['sqnr_db']:7.2f} dB {row['bits_per_weight']:6.2f} bits  {row['name']}")
    print(total(errors))


if __name__ == "__main__":
    main()
