"""Whatever is wrong with a node: an error that names it, in the newest and the oldest runtime, and never a crash."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import errors, runtime
from qgraph.ops import layout

INT = (1 << 63) - 1


def node(op):
    """A sound model of one node, whose weights are constants."""
    n, k, zero = 40, 96, np.zeros(1, np.float32)
    int4 = {
        "codes": layout.pack_int4(np.full((n, k), 3), 32),
        "scales": np.ones((3, 3, 16), np.float16),
        "zero_points": np.full((1, 1, 1), 8, np.uint8),
    }
    rounded = f"N={n}, K={k}, activation_bits=8, activation_block=0"
    x, attributes, constants = {
        "MatMulInt4": ("float[m, 96]", f"{rounded}, block_size=32", int4 | {"bias": zero}),
        "MatMulTernary": (
            "float[m, 96]",
            rounded,
            {"codes": layout.pack_ternary(np.ones((n, k))), "scale": zero + 1, "bias": zero},
        ),
        "GatherInt4": ("int64[m]", f"N={n}, K={k}, block_size=32", int4),
        "Hadamard": ("float[m, 96]", "block_size=32", {"factor": np.ones((1, 1), np.float32)}),
    }[op]
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21, "ai.qgraph": 1]> g ({x} X) => (float[a, b] Y)'
        f" {{ [the_node] Y = ai.qgraph.{op} <{attributes}> (X, {', '.join(constants)}) }}"
    )
    model.graph.initializer.extend(
        ir.to_proto(ir.tensor(v, name=name)) for name, v in constants.items()
    )
    return model


def copy_of(model):
    return onnx.ModelProto.FromString(model.SerializeToString())


def without_inputs(model):
    for index in range(len(model.graph.node[0].input)):
        unnamed = copy_of(model)
        unnamed.graph.node[0].input[index] = ""
        yield f"input {index} is unnamed", unnamed
        fewer = copy_of(model)
        del fewer.graph.node[0].input[index:]
        yield f"inputs from {index} on are absent", fewer


def with_bad_attributes(model):
    for index, held in enumerate(model.graph.node[0].attribute):
        for value in (-1, -INT - 1, INT, 17):
            bad = copy_of(model)
            bad.graph.node[0].attribute[index].i = value
            yield f"{held.name}={value}", bad
        absent = copy_of(model)
        del absent.graph.node[0].attribute[index]
        yield f"{held.name} is absent", absent
        real = copy_of(model)
        real.graph.node[0].attribute[index].CopyFrom(onnx.helper.make_attribute(held.name, 1.5))
        yield f"{held.name} is a float", real


def with_bad_constants(model):
    for index, held in enumerate(model.graph.initializer):
        values = onnx.numpy_helper.to_array(held)
        larger = np.concatenate([values] * 7)
        for name, bad in (
            ("scalar", values.reshape(-1)[0]),
            ("empty", values[:0]),
            ("larger", larger),
            ("one more axis", values[None]),
            ("of another type", values.astype(np.float64)),
        ):
            changed = copy_of(model)
            changed.graph.initializer[index].CopyFrom(
                ir.to_proto(ir.tensor(np.array(bad), name=held.name))
            )
            yield f"{held.name} is {name}", changed


@pytest.mark.parametrize("op", ["MatMulInt4", "MatMulTernary", "GatherInt4", "Hadamard"])
@pytest.mark.parametrize("change", [without_inputs, with_bad_attributes, with_bad_constants])
def test_an_error_names_the_node(op, change):
    model = node(op)
    runtime.session(model)
    for what, bad in change(model):
        with pytest.raises(errors.RuntimeFailure) as caught:
            runtime.session(bad)
        assert "the_node" in str(caught.value), what


@pytest.mark.parametrize("op", ["MatMulInt4", "MatMulTernary", "Hadamard"])
@pytest.mark.parametrize("dims", [(), (0,), (95,), (3, 0), (0, 95)], ids=str)
def test_an_input_of_another_shape_is_an_error_that_says_which(op, dims):
    model = node(op)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    session = runtime.session(model)
    if op == "Hadamard" and dims in ((0,), (3, 0)):  # no blocks at all
        assert session.run(None, {"X": np.zeros(dims, np.float32)})[0].shape == dims
        return
    shape = ", ".join(map(str, dims))
    with pytest.raises(Exception, match=rf"{op} 'the_node': the input is \[{shape}\], expected"):
        session.run(None, {"X": np.zeros(dims, np.float32)})
