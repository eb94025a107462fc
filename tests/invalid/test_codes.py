"""One broken model per verifier code, beside a twin that differs only in the fault and passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import errors, verify
from qgraph.verify import rules

Build = Callable[[], ir.Model]


@dataclass(frozen=True)
class Case:
    code: str
    name: str
    broken: Build
    fixed: Build
    where: str
    message: str
    severity: str = "error"


CASES: list[Case] = []


def case(code: str, where: str, message: str, severity: str = "error") -> Callable[[Any], Any]:
    """Register `build(is_broken)`."""

    def register(build: Callable[[bool], ir.Model]) -> Callable[[bool], ir.Model]:
        name = f"{code}-{build.__name__}"
        CASES.append(
            Case(code, name, lambda: build(True), lambda: build(False), where, message, severity)
        )
        return build

    return register


def parse(
    body: str, opset: int = 21, ir_version: int = 10, extra: str = "", **weights: Any
) -> ir.Model:
    """A model from ONNX text; `weights` become initializers (their data cannot be written in text)."""
    text = f'<ir_version: {ir_version}, opset_import: ["" : {opset}{extra}]>\n{body}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    for name, data in weights.items():
        held = data if isinstance(data, ir.TensorProtocol) else ir.tensor(np.asarray(data))
        give(model, name, held)
    return model


def give(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Turn a graph input into an initializer."""
    value = next(v for v in model.graph.inputs if v.name == name)
    model.graph.inputs.remove(value)
    value.const_value = tensor
    value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
    model.graph.register_initializer(value)
    return value


def packed(data: Any, dtype: ir.DataType) -> ir.TensorProtocol:
    """Codes of a small type; never written as text, where ONNX's parser mistakes values for bytes."""
    return ir.tensor(np.asarray(data, np.int8), dtype=dtype)


RELU = "g (float[4] x) => (float[4] y) { [n] y = Relu(x) }"


@case("V01", "model", "com.microsoft")
def domain_without_import(is_broken: bool) -> ir.Model:
    model = parse(
        "g (float[4] x) => (float[4] y) { [n] y = com.microsoft.Gelu(x) }",
        extra=', "com.microsoft" : 1',
    )
    if is_broken:
        del model.graph.opset_imports["com.microsoft"]
    return model


@case("V01", "model", "opset 99")
def unknown_opset(is_broken: bool) -> ir.Model:
    model = parse(RELU)
    model.graph.opset_imports[""] = 99 if is_broken else 21
    return model


@case("V01", "model", "IR version 99")
def unknown_ir_version(is_broken: bool) -> ir.Model:
    return parse(RELU, ir_version=99 if is_broken else 10)


@case("V01", "function local::F", "ai.onnx")
def function_without_import(is_broken: bool) -> ir.Model:
    model = with_function()
    if is_broken:
        next(iter(model.functions.values())).opset_imports.clear()
    return model


@case("V02", "b", "two values have this name")
def one_name_twice(is_broken: bool) -> ir.Model:
    model = parse("g (float[4] x) => (float[4] y) { [n] b = Relu(x) [m] y = Add(b, x) }")
    made = ir.Node("", "Neg", [model.graph.inputs[0]], name="extra")
    made.outputs[0].name = "b" if is_broken else "c"
    model.graph[-1].prepend(made)
    model.graph[-1].replace_input_with(1, made.outputs[0])
    return model


@case("V02", "n", "two nodes have this name")
def node_name_twice(is_broken: bool) -> ir.Model:
    second = "n" if is_broken else "m"
    return parse(f"g (float[4] x) => (float[4] y) {{ [n] b = Relu(x) [{second}] y = Neg(b) }}")


@case("V02", "x", "two values have this name")
def initializer_named_like_an_input(is_broken: bool) -> ir.Model:
    model = parse("g (float[4] x, float[4] w) => (float[4] y) { [n] y = Add(x, w) }")
    weight = give(model, "w", ir.tensor(np.ones(4, np.float32)))
    if is_broken:
        weight.name = "x"
    return model


@case("V02", "choose.then_branch/h", "hides an outer value of the same name that this body reads")
def hidden_outer_value(is_broken: bool) -> ir.Model:
    model = branches()
    then = model.graph[-1].attributes["then_branch"].as_graph()
    then[0].outputs[0].name = "h" if is_broken else "t"
    return model


@case("V03", "m", "'h' does not exist in the graph")
def removed_producer(is_broken: bool) -> ir.Model:
    model = parse("g (float[4] x) => (float[4] y) { [n] h = Relu(x) [m] y = Neg(h) }")
    if is_broken:
        model.graph.remove(model.graph[0])
    return model


@case("V03", "choose.then_branch/inner", "'h' does not exist in the graph")
def dangling_in_a_body(is_broken: bool) -> ir.Model:
    model = branches()
    if is_broken:
        lost = ir.Value(name="h", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
        model.graph[-1].attributes["then_branch"].as_graph()[0].replace_input_with(0, lost)
    return model


@case("V03", "function local::F/f", "'z' does not exist in the graph")
def dangling_in_a_function(is_broken: bool) -> ir.Model:
    model = with_function()
    if is_broken:
        function = next(iter(model.functions.values()))
        function[0].replace_input_with(0, ir.Value(name="z"))
    return model


@case("V04", "m", "before the node that produces it", severity="warning")
def wrong_order(is_broken: bool) -> ir.Model:
    model = parse("g (float[4] x) => (float[4] y) { [n] h = Relu(x) [m] y = Neg(h) }")
    if is_broken:
        first = model.graph[0]
        model.graph.remove(first)
        model.graph.append(first)
    return model


@case("V04", "n", "is in a cycle: n -> m -> n")
def cycle(is_broken: bool) -> ir.Model:
    model = parse("g (float[4] x) => (float[4] y) { [n] h = Add(x, x) [m] y = Neg(h) }")
    if is_broken:
        model.graph[0].replace_input_with(1, model.graph[1].outputs[0])
    return model


@case("V05", "n", "ai.onnx has no operator 'Rellu'")
def misspelled_operator(is_broken: bool) -> ir.Model:
    model = parse(RELU)
    model.graph[0].op_type = "Rellu" if is_broken else "Relu"
    return model


@case("V05", "n", "no operator 'Gelu' at version 13")
def operator_of_a_later_opset(is_broken: bool) -> ir.Model:
    body = "g (float[4] x) => (float[4] y) { [n] y = Gelu(x) }"
    return parse(body, opset=13 if is_broken else 20)


@case("V05", "n", "was removed from ai.onnx by version 11")
def operator_of_an_earlier_opset(is_broken: bool) -> ir.Model:
    operator = "Scatter" if is_broken else "ScatterElements"
    return parse(
        f"g (float[4] x, int64[2] i, float[2] u) => (float[4] y) {{ [n] y = {operator}(x, i, u) }}",
        opset=11,
    )


@case("V05", "n", "ext::Thing is not known here", severity="warning")
def unknown_custom_operator(is_broken: bool) -> ir.Model:
    model = parse(RELU, extra=', "ext" : 1')
    if is_broken:
        model.graph[0].domain, model.graph[0].op_type = "ext", "Thing"
    return model


@case("V06", "n", "Relu has 2 inputs, its schema wants 1")
def too_many_inputs(is_broken: bool) -> ir.Model:
    model = parse(RELU)
    if is_broken:
        model.graph[0].resize_inputs(2)
        model.graph[0].replace_input_with(1, model.graph.inputs[0])
    return model


@case("V06", "n", "Add needs its input 'B'")
def empty_required_input(is_broken: bool) -> ir.Model:
    model = parse("g (float[4] x) => (float[4] y) { [n] y = Add(x, x) }")
    if is_broken:
        model.graph[0].replace_input_with(1, None)
    return model


@case("V06", "n", "Concat needs its attribute 'axis'")
def missing_attribute(is_broken: bool) -> ir.Model:
    model = parse("g (float[4] x) => (float[8] y) { [n] y = Concat <axis = 0> (x, x) }")
    if is_broken:
        del model.graph[0].attributes["axis"]
    return model


@case("V06", "c", "Constant has 0 values, must have one")
def constant_without_value(is_broken: bool) -> ir.Model:
    model = parse("g () => (float y) { [c] y = Constant <value_float = 1.0> () }")
    if is_broken:
        model.graph[0].attributes.clear()
    return model


@case("V06", "n", "has no attribute 'axes'")
def unknown_attribute(is_broken: bool) -> ir.Model:
    model = parse("g (float[4] x) => (float[4] y) { [n] y = Softmax <axis = 0> (x) }")
    if is_broken:
        model.graph[0].attributes["axes"] = ir.AttrInt64s("axes", [0])
    return model


@case("V06", "n", "attribute 'axis' of Softmax is FLOAT, must be INT")
def attribute_of_another_type(is_broken: bool) -> ir.Model:
    model = parse("g (float[4] x) => (float[4] y) { [n] y = Softmax <axis = 0> (x) }")
    if is_broken:
        model.graph[0].attributes["axis"] = ir.AttrFloat32("axis", 0.0)
    return model


@case("V06", "call", "has 2 inputs, the function F takes 1")
def too_many_arguments(is_broken: bool) -> ir.Model:
    model = with_function()
    if is_broken:
        model.graph[0].resize_inputs(2)
        model.graph[0].replace_input_with(1, model.graph.inputs[0])
    return model


@case("V07", "y", "output 0 is produced by nothing")
def output_of_nothing(is_broken: bool) -> ir.Model:
    model = parse(RELU)
    if is_broken:
        model.graph.outputs[0] = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))
    return model


@case("V07", "choose.then_branch/x", "is a value of an outer graph")
def body_gives_an_outer_value(is_broken: bool) -> ir.Model:
    then = "x) { }" if is_broken else "t) { t = Identity(x) }"
    return parse(
        f"""g (bool c, float[4] x) => (float[4] y) {{
            [choose] y = If (c) <
                then_branch = t () => (float[4] {then},
                else_branch = e () => (float[4] e) {{ e = Neg(x) }}> }}"""
    )


@case("V07", "w", "initializer has no data")
def initializer_without_data(is_broken: bool) -> ir.Model:
    model = weighted()
    if is_broken:
        model.graph.initializers["w"].const_value = None
    return model


@case("V07", "w", "holds DOUBLE, declared as FLOAT")
def data_of_another_type(is_broken: bool) -> ir.Model:
    model = weighted()
    if is_broken:
        model.graph.initializers["w"].const_value = ir.tensor(np.ones(4), name="w")
    return model


@case("V07", "w", "has shape [3], declared as [4]")
def data_of_another_shape(is_broken: bool) -> ir.Model:
    model = weighted()
    if is_broken:
        model.graph.initializers["w"].const_value = ir.tensor(np.ones(3, np.float32), name="w")
    return model


@case("V07", "x", "graph input has no type")
def untyped_input(is_broken: bool) -> ir.Model:
    model = parse(RELU)
    if is_broken:
        model.graph.inputs[0].type = None
    return model


def quantized(opset: int = 21, attributes: str = "", **inputs: Any) -> ir.Model:
    """DequantizeLinear of constants named q, s and (where given) z."""
    names = ", ".join(n for n in ("q", "s", "z") if n in inputs)
    declared = ", ".join(f"float[1] {n}" for n in inputs)
    body = (
        f"g ({declared}) => (float[A, B] y) {{ [n] y = DequantizeLinear {attributes} ({names}) }}"
    )
    return parse(body, opset=opset, **inputs)


Q8 = np.zeros((4, 6), np.int8)


@case("V08", "n", "zero point is UINT8, codes are INT8")
def zero_point_of_another_type(is_broken: bool) -> ir.Model:
    zero = np.uint8(0) if is_broken else np.int8(0)
    return quantized(q=Q8, s=np.float32(1), z=zero)


@case("V08", "n", "INT4 codes need opset 21, the model has 19")
def int4_too_early(is_broken: bool) -> ir.Model:
    codes = packed(np.zeros((4, 6)), ir.DataType.INT4)
    return quantized(opset=19 if is_broken else 21, q=codes, s=np.float32(1))


@case("V08", "n", "INT2 codes need opset 25, the model has 21")
def int2_too_early(is_broken: bool) -> ir.Model:
    codes = packed(np.zeros((4, 6)), ir.DataType.INT2)
    model = quantized(opset=21 if is_broken else 25, q=codes, s=np.float32(1))
    model.ir_version = 13
    return model


@case("V08", "n", "a scale per channel needs opset 13")
def per_channel_too_early(is_broken: bool) -> ir.Model:
    return quantized(opset=10 if is_broken else 13, q=Q8, s=np.ones(6, np.float32))


@case("V08", "n", "scale has 5 elements, axis 1 of the input has 6")
def scale_of_another_length(is_broken: bool) -> ir.Model:
    return quantized(q=Q8, s=np.ones(5 if is_broken else 6, np.float32))


@case("V08", "n", "axis 2 is outside")
def axis_outside(is_broken: bool) -> ir.Model:
    axis = 2 if is_broken else 0
    return quantized(attributes=f"<axis = {axis}>", q=Q8, s=np.ones(4, np.float32))


@case("V08", "n", "block_size 4 needs [4, 2]")
def blocks_that_do_not_cover(is_broken: bool) -> ir.Model:
    scale = np.ones((4, 3 if is_broken else 2), np.float32)
    return quantized(attributes="<axis = 1, block_size = 4>", q=Q8, s=scale)


@case("V08", "n", "without block_size")
def matrix_of_scales_without_blocks(is_broken: bool) -> ir.Model:
    attributes = "<axis = 1>" if is_broken else "<axis = 1, block_size = 3>"
    return quantized(attributes=attributes, q=Q8, s=np.ones((4, 2), np.float32))


@case("V08", "n", "block_size needs opset 21")
def blocks_too_early(is_broken: bool) -> ir.Model:
    model = quantized(attributes="<axis = 1, block_size = 3>", q=Q8, s=np.ones((4, 2), np.float32))
    if is_broken:
        model.graph.opset_imports[""] = 19
    return model


@case("V08", "n", "zero point has shape [4], scale [6]")
def zero_point_of_another_shape(is_broken: bool) -> ir.Model:
    zero = np.zeros(4 if is_broken else 6, np.int8)
    return quantized(q=Q8, s=np.ones(6, np.float32), z=zero)


@case("V08", "n", "scale is 0")
def zero_scale(is_broken: bool) -> ir.Model:
    return quantized(q=Q8, s=np.float32(0 if is_broken else 1))


@case("V08", "n", "scale has NaN or Inf")
def infinite_scale(is_broken: bool) -> ir.Model:
    return quantized(q=Q8, s=np.float32(np.inf if is_broken else 1))


@case("V08", "n", "output is declared UINT8, the zero point makes it INT8")
def quantize_declared_as_another_type(is_broken: bool) -> ir.Model:
    declared = "uint8" if is_broken else "int8"
    return parse(
        f"g (float[4] x, float[1] s, float[1] z) => ({declared}[4] y)"
        " { [n] y = QuantizeLinear(x, s, z) }",
        s=np.float32(1),
        z=np.int8(0),
    )


def nbits(b: Any = (8, 2, 16), s: int = 16, z: int = 8, block: int = 32, bits: int = 4) -> ir.Model:
    """MatMulNBits with N=8 and K=40."""
    return parse(
        "g (float[M, 40] x, float[1] b, float[1] s, float[1] z) => (float[M, 8] y) { [n] y ="
        f" com.microsoft.MatMulNBits <K = 40, N = 8, bits = {bits}, block_size = {block}>"
        " (x, b, s, z) }",
        extra=', "com.microsoft" : 1',
        b=np.zeros(b, np.uint8),
        s=np.ones(s, np.float32),
        z=np.zeros(z, np.uint8),
    )


@case("V09", "n", "B has shape [8, 16, 2], must be [8, 2, 16]")
def packed_weight_shape(is_broken: bool) -> ir.Model:
    return nbits(b=(8, 16, 2)) if is_broken else nbits()


@case("V09", "n", "scales have 8 elements, must have 8 x 2")
def packed_scales(is_broken: bool) -> ir.Model:
    return nbits(s=8) if is_broken else nbits()


@case("V09", "n", "zero points have 16 elements, must have 8 x 1 packed bytes")
def packed_zero_points(is_broken: bool) -> ir.Model:
    return nbits(z=16) if is_broken else nbits()


@case("V09", "n", "block_size is 24, must be a power of two")
def packed_block(is_broken: bool) -> ir.Model:
    return nbits(block=24) if is_broken else nbits()


@case("V09", "n", "bits is 3")
def packed_bits(is_broken: bool) -> ir.Model:
    return nbits(bits=3) if is_broken else nbits()


@case("V09", "n", "scales have shape [10, 3], must be [10, 2]")
def gathered_scales(is_broken: bool) -> ir.Model:
    return parse(
        "g (float[1] q, int64[2] i, float[1] s) => (float[2, 32] y) { [n] y ="
        " com.microsoft.GatherBlockQuantized <block_size = 16, bits = 4> (q, i, s) }",
        extra=', "com.microsoft" : 1',
        q=np.zeros((10, 16), np.uint8),
        s=np.ones((10, 3 if is_broken else 2), np.float32),
    )


@case("V10", "dead", "no output is used", severity="warning")
def dead_node(is_broken: bool) -> ir.Model:
    extra = "[dead] z = Neg(x)" if is_broken else ""
    return parse(f"g (float[4] x) => (float[4] y) {{ [n] y = Relu(x) {extra} }}")


@case("V10", "w", "initializer is not used", severity="warning")
def dead_initializer(is_broken: bool) -> ir.Model:
    model = weighted()
    if is_broken:
        model.graph[0].replace_input_with(1, model.graph.inputs[0])
    return model


@case("V11", "choose.else_branch", "gives 2 outputs, If expects 1")
def branch_with_more_outputs(is_broken: bool) -> ir.Model:
    model = branches()
    other = model.graph[-1].attributes["else_branch"].as_graph()
    if is_broken:
        made = ir.Node("", "Relu", [model.graph.inputs[0]], name="more")
        made.outputs[0].name = "e2"
        other.append(made)
        other.outputs.append(made.outputs[0])
    return model


@case("V11", "loop.body", "takes 3 inputs, Loop passes 4")
def loop_with_another_state(is_broken: bool) -> ir.Model:
    model = parse(
        """g (int64 n, bool c, float[4] x) => (float[4] y) {
            [loop] y = Loop (n, c, x) <body = b (int64 i, bool go, float[4] s) => (bool on, float[4] t)
                { [a] on = Identity(go) [b] t = Relu(s) }> }"""
    )
    if is_broken:
        model.graph[0].resize_inputs(4)
        model.graph[0].replace_input_with(3, model.graph.inputs[2])
    return model


@case("V13", "call", "has no function body in the model")
def custom_operator_without_body(is_broken: bool) -> ir.Model:
    model = with_function("ai.qgraph")
    if is_broken:
        model.functions.clear()
    return model


def branches() -> ir.Model:
    """If whose branches read the outer values h and x."""
    return parse(
        """g (bool c, float[4] x) => (float[4] y) {
            [first] h = Neg(x)
            [choose] y = If (c) <
                then_branch = t () => (float[4] t) { [inner] t = Relu(h) },
                else_branch = e () => (float[4] e) { [other] e = Neg(x) }> }"""
    )


def with_function(domain: str = "local") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 21, "{domain}" : 1]>
        g (float[4] x) => (float[4] y) {{ [call] y = {domain}.F(x) }}
        <domain: "{domain}", opset_import: ["" : 21]> F (a) => (b) {{ [f] b = Relu(a) }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def weighted() -> ir.Model:
    body = "g (float[4] x, float[4] w) => (float[4] y) { [n] y = Add(x, w) }"
    return parse(body, w=np.ones(4, np.float32))


@pytest.mark.parametrize("each", CASES, ids=lambda c: c.name)
def test_finds_the_fault(each: Case) -> None:
    found = [d for d in verify.verify(each.broken()) if d.code == each.code]
    hits = [d for d in found if d.where == each.where and each.message in d.message]
    assert hits, "\n".join(map(str, verify.verify(each.broken()))) or "nothing was found"
    assert hits[0].severity == each.severity


@pytest.mark.parametrize("each", CASES, ids=lambda c: c.name)
def test_fixed_twin_passes(each: Case) -> None:
    assert verify.verify(each.fixed()) == []


@pytest.mark.parametrize("each", CASES, ids=lambda c: c.name)
def test_fixed_twin_loads_in_a_stock_runtime(each: Case) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        ir.to_proto(each.fixed()).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def test_every_code_has_a_broken_model() -> None:
    elsewhere = {"V12"}  # needs files, see below
    assert {c.code for c in CASES} | elsewhere == {r.code for r in rules.RULES}


@pytest.mark.parametrize("fault", ["missing", "short", "length"])
def test_external_data(fault: str, tmp_path: Path) -> None:
    model = weighted()
    (tmp_path / "w.bin").write_bytes(np.ones(4, np.float32).tobytes())
    held = ir.ExternalTensor(
        "w.bin", 0, 16, ir.DataType.FLOAT, shape=ir.Shape([4]), name="w", base_dir=tmp_path
    )
    model.graph.initializers["w"].const_value = held
    assert verify.verify(model) == []
    if fault == "missing":
        (tmp_path / "w.bin").unlink()
    elif fault == "short":
        (tmp_path / "w.bin").write_bytes(b"\0" * 8)
    else:
        held = ir.ExternalTensor(
            "w.bin", 0, 8, ir.DataType.FLOAT, shape=ir.Shape([4]), name="w", base_dir=tmp_path
        )
        model.graph.initializers["w"].const_value = held
    (found,) = verify.verify(model)
    message = {"missing": "does not exist", "short": "has 8 bytes", "length": "need 16"}[fault]
    assert (found.code, found.where, found.severity) == ("V12", "w", "error")
    assert message in found.message


def test_check_raises_with_every_error() -> None:
    model = removed_producer(True)
    model.graph[0].attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
    with pytest.raises(errors.VerificationError) as raised:
        verify.check(model, where="after cleanup")
    assert {d.code for d in raised.value.diagnostics} == {"V03", "V06"}
    assert all(d.where == "after cleanup: m" for d in raised.value.diagnostics)
    assert raised.value.exit_code == 2


def test_check_refuses_a_graph_out_of_order() -> None:
    with pytest.raises(errors.VerificationError, match="V04"):
        verify.check(wrong_order(True))


def test_check_lets_warnings_pass() -> None:
    verify.check(dead_node(True))
