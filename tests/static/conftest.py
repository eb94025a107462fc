"""What a runtime executes and computes, read without qgraph's own reading of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from qgraph import files

Array = np.ndarray[Any, Any]

# Operators of ONNX Runtime that multiply, and those of them that multiply integers → the input that is the weight.
INTEGER = {
    "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1,
}  # fmt: skip
PRODUCTS = ("Conv", "Gemm", "MatMul", "FusedMatMul", "FusedConv", "FusedGemm", "NhwcFusedConv")


@pytest.fixture
def parse() -> Callable[..., ir.Model]:
    """`parse("g (float[m, 64] x) => (float[m, 64] y) { ... }", W=array)`; arrays become initializers."""

    def make(text: str, opset: int = 17, ir_version: int = 8, **constants: Array) -> ir.Model:
        head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>'
        proto = onnx.parser.parse_model(f"{head}\n{text}")
        proto.graph.initializer.extend(
            ir.to_proto(ir.tensor(np.asarray(v), name=k)) for k, v in constants.items()
        )
        return files.load(proto)

    return make


@dataclass
class Executed:
    """A model in its runtime.

    Attributes:
        products: of every operator that multiplies its type, and whether it multiplies integers.
        types: names of the weights' element types, of the integer products.
        ops: every operator that is executed.
        run: computes the outputs.
    """

    products: list[tuple[str, bool]]
    types: list[str]
    ops: list[str]
    run: Callable[[Mapping[str, Array]], list[Array]]

    @property
    def all_integer(self) -> bool:
        """There are products, and all of integers."""
        return bool(self.products) and all(integer for _, integer in self.products)


def _ort(path: Path, scratch: Path) -> Executed:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(scratch / "executed.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    executed = onnx.load(scratch / "executed.onnx")
    constants = {i.name: i.data_type for i in executed.graph.initializer}
    nodes = list(executed.graph.node)
    found, types = [], []
    for node in nodes:
        if node.op_type in INTEGER:
            found.append((node.op_type, True))
            weight = node.input[INTEGER[node.op_type]]
            if weight in constants:
                types.append(onnx.TensorProto.DataType.Name(constants[weight]).lower())
        elif node.op_type in PRODUCTS:
            found.append((node.op_type, False))
    return Executed(found, types, [n.op_type for n in nodes], lambda f: session.run(None, dict(f)))


def _openvino(path: Path) -> Executed:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    found, types, ops = [], [], []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {k: str(getattr(v, "value", v)) for k, v in op.get_rt_info().items()}
        ops.append(info["layerType"])
        if info["layerType"] in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            x, w = (str(i.get_element_type().get_type_name()) for i in op.inputs()[:2])
            integer = x in ("u8", "i8") and w == "i8" and info["runtimePrecision"] == x
            found.append((info["layerType"], integer))
            if integer:
                types.append({"i8": "int8"}[w])
    return Executed(found, types, ops, lambda f: list(compiled(dict(f)).values()))


@pytest.fixture
def executed(tmp_path: Path) -> Callable[[str | Path, str], Executed]:
    """`executed(path, "ort")`: the model as that runtime executes it."""

    def look(path: str | Path, target: str) -> Executed:
        return _openvino(Path(path)) if target == "openvino" else _ort(Path(path), tmp_path)

    return look
