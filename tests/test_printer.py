"""The text of a model: goldens, and that it depends on the model alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import graph, printer


def parse(text: str, **weights: ir.TensorProtocol) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    for name, tensor in weights.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = tensor
        model.graph.register_initializer(value)
    return model


def plain() -> ir.Model:
    model = parse(
        """<ir_version: 10, opset_import: ["com.microsoft" : 1, "" : 21], producer_name: "here",
            producer_version: "1.2", metadata_props: ["zeta": "last", "alpha": "first one"]>
        main (float[N, 4] x, float[4, 2] w, float[2] b, int64 n) => (float[N, 2] y) {
            [first] h = MatMul(x, w)
            s = Add(h, b)
            [act] y = com.microsoft.QuickGelu <alpha = 1.702> (s)
        }""",
        w=ir.tensor(np.arange(12, dtype=np.float32).reshape(6, 2)[:4], name="w"),
        b=ir.tensor(np.float32([0.1, -2]), name="b"),
    )
    model.graph[0].name = "/fc/MatMul"
    return model


def test_golden() -> None:
    expected = """\
        model ir 10, here 1.2
        opset ai.onnx 21, com.microsoft 1
        metadata
          alpha = "first one"
          zeta = "last"

        graph main
          in   x: float32[N, 4]
          in   n: int64[]
          init b: float32[2] = [0.1, -2.0]
          init w: float32[4, 2] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
          h = MatMul(x, w)  # /fc/MatMul
          s = Add(h, b)
          y: float32[N, 2] = com.microsoft::QuickGelu(s) {alpha=1.702}  # act
          out  y
        """
    assert printer.text(plain()) == textwrap.dedent(expected)


def test_golden_of_bodies_and_functions() -> None:
    model = parse(
        """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        main (bool c, float[2] x) => (float[2] y, float[2] z) {
            [choose] y = If (c) <
                then_branch = then () => (float[2] a) { a = Relu(x) },
                else_branch = other () => (float[2] b) <float[1] k = {2}> { b = Mul(x, k) }>
            [call] z = local.F <slope = 0.5> (x)
        }
        <domain: "local", opset_import: ["" : 21]>
        F <slope> (p) => (q) { q = LeakyRelu <alpha: float = @slope> (p) }"""
    )
    expected = """\
        model ir 10
        opset ai.onnx 21, local 1

        graph main
          in   c: bool[]
          in   x: float32[2]
          y: float32[2] = If(c)  # choose
            else_branch: other
              init k: float32[1] = [2.0]
              b: float32[2] = Mul(x, k)
              out  b
            then_branch: then
              a: float32[2] = Relu(x)
              out  a
          z: float32[2] = local::F(x) {slope=0.5}  # call
          out  y
          out  z

        function local::F <slope>
          opset ai.onnx 21
          in   p
          q = LeakyRelu(p) {alpha=@slope}
          out  q
        """
    assert printer.text(model) == textwrap.dedent(expected)


def test_order_of_dicts_does_not_matter() -> None:
    model, other = plain(), plain()
    for held in (other.metadata_props, other.graph.opset_imports):
        items = list(held.items())
        held.clear()
        held.update(reversed(items))
    values = list(other.graph.initializers.values())
    other.graph.initializers.clear()
    for value in reversed(values):
        other.graph.register_initializer(value)
    assert printer.text(other) == printer.text(model)
    assert printer.diff(model, other) == ""


def test_clone_reads_the_same() -> None:
    model = plain()
    assert printer.text(graph.clone(model)) == printer.text(model)


@pytest.mark.parametrize("seed", ["0", "1"])
def test_hash_seed_does_not_matter(seed: str) -> None:
    code = (
        "import onnx.parser, onnx_ir as ir\nfrom qgraph import printer\n"
        'm = onnx.parser.parse_model(\'<ir_version: 10, opset_import: ["" : 21, "z" : 1, "a" : 2]>'
        " g (float[2] x) => (float[2] y) { y = Elu <alpha = 0.5> (x) }')\n"
        "print(printer.text(ir.from_proto(m)), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "opset a 2, ai.onnx 21, z 1\n" in done.stdout
    assert "y: float32[2] = Elu(x) {alpha=0.5}\n" in done.stdout


class TestTensor:
    def test_small_shows_values(self) -> None:
        assert printer.tensor(ir.tensor(np.int64(3))) == "int64[] = 3"
        assert printer.tensor(ir.tensor(np.float32([1e-5, 0.1]))) == "float32[2] = [1e-05, 0.1]"
        assert printer.tensor(ir.tensor(np.array([True, False]))) == "bool[2] = [true, false]"
        assert printer.tensor(ir.tensor(np.zeros((0, 3), np.float32))) == "float32[0, 3] = []"

    def test_small_types(self) -> None:
        codes = ir.tensor(np.int8([-8, 7, 0]), dtype=ir.DataType.INT4)
        assert printer.tensor(codes) == "int4[3] = [-8, 7, 0]"

    def test_doubles_show_every_digit(self) -> None:
        assert (
            printer.tensor(ir.tensor(np.float64([0.1 + 1e-15])))
            == "float64[1] = [0.100000000000001]"
        )

    def test_medium_shows_a_hash(self) -> None:
        data = np.arange(100, dtype=np.float32)
        text = printer.tensor(ir.tensor(data))
        assert text.startswith("float32[100] #")
        data = data.copy()
        data[50] += 1
        assert printer.tensor(ir.tensor(data)) != text

    def test_large_is_read_on_request_only(self) -> None:
        data = np.zeros(100_000, np.float32)
        assert printer.tensor(ir.tensor(data)) == "float32[100000]"
        assert printer.tensor(ir.tensor(data), hashes=True).startswith("float32[100000] #")

    def test_lazy_is_read_on_request_only(self) -> None:
        reads = []

        def compute() -> ir.TensorProtocol:
            reads.append(1)
            return ir.tensor(np.zeros(20, np.float32))

        held = ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape([20]))
        assert printer.tensor(held) == "float32[20]"
        assert not reads
        printer.tensor(held, hashes=True)
        assert reads

    def test_strings(self) -> None:
        held = ir.StringTensor([b"a", b'b"'], shape=ir.Shape([2]))
        assert printer.tensor(held) == 'string[2] = ["a", "b\\""]'


class TestNames:
    def test_odd_names_are_quoted(self) -> None:
        model = plain()
        model.graph[0].outputs[0].name = "a, b"
        assert '"a, b" = MatMul(x, w)' in printer.text(model)

    def test_missing_inputs_and_outputs(self) -> None:
        model = parse(
            """<ir_version: 10, opset_import: ["" : 21]>
            g (float[2] x, float m) => (float[2] y) { y = Clip(x, , m) }"""
        )
        assert "y: float32[2] = Clip(x, -, m)\n" in printer.text(model)

    def test_unknown_shapes(self) -> None:
        model = plain()
        model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
        assert "h: float16[...] = MatMul" in printer.text(model)
        model.graph[0].outputs[0].shape = ir.Shape([None, 2])
        assert "h: float16[?, 2] = MatMul" in printer.text(model)

    def test_only_our_metadata_of_nodes(self) -> None:
        model = plain()
        model.graph[1].metadata_props.update({"pkg.torch.stack": "x" * 500, "qgraph.from": "h"})
        assert 's = Add(h, b)  # qgraph.from="h"\n' in printer.text(model)

    def test_long_metadata_is_cut_but_a_change_shows(self) -> None:
        model, other = plain(), plain()
        model.metadata_props["long"] = "x" * 500
        other.metadata_props["long"] = "x" * 499 + "y"
        assert "… (500 characters, #" in printer.text(model)
        assert len(max(printer.text(model).splitlines(), key=len)) < 200
        assert printer.diff(model, other)


def test_diff_shows_what_changed() -> None:
    other = plain()
    other.graph[0].op_type = "Gemm"
    lines = printer.diff(plain(), other).splitlines()
    assert [line for line in lines if line.startswith(("-", "+"))][2:] == [
        "-  h = MatMul(x, w)  # /fc/MatMul",
        "+  h = Gemm(x, w)  # /fc/MatMul",
    ]
