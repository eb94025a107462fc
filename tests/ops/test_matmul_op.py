"""The matrix operators inside ONNX Runtime: the native kernel, the body that the model carries, errors, memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_ir as ir
import pytest

from qgraph import errors, runtime
from qgraph.ops import bodies, layout


def constant(name, array):
    return ir.to_proto(ir.tensor(array, name=name))


def model_of(op, x_dims, constants, attributes):
    """One node; `constants` are its inputs after X, in order."""
    text = ", ".join(f"{k}={v}" for k, v in attributes.items())
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21, "ai.qgraph": 1]>'
        f" g (float[{', '.join(map(str, x_dims))}] X) => (float[{', '.join(f'y{i}' for i in range(len(x_dims)))}] Y)"
        f" {{ [the_node] Y = ai.qgraph.{op} <{text}> (X, {', '.join(constants)}) }}"
    )
    proto.graph.initializer.extend(constant(k, v) for k, v in constants.items())
    proto.functions.append(bodies.proto(op, 21))
    return proto


def int4(
    n, k, *, group=32, bits=8, block=32, asymmetric=False, bias=True, x_dims=None, seed=0, width=4
):
    rng = np.random.default_rng(seed)
    groups = layout.int4_columns(k, group) // (group or layout.int4_columns(k, 0))
    points = rng.integers(0, 2**width, (n, groups)).astype(np.uint8)
    scales = rng.uniform(-0.1, 0.1, (n, groups)).astype(np.float16)
    pack = {4: layout.pack_int4, 3: layout.pack_int3}[width]
    middle = 2 ** (width - 1)
    constants = {
        "codes": pack(rng.integers(0, 2**width, (n, k)), group),
        "scales": layout.tile_groups(scales, 0),
        "zero_points": layout.tile_groups(points, middle)
        if asymmetric
        else np.full((1, 1, 1), middle, np.uint8),
        "bias": rng.standard_normal(n).astype(np.float32) if bias else np.zeros(1, np.float32),
    }
    attributes = {"K": k, "N": n, "block_size": group}
    attributes |= {"activation_bits": bits, "activation_block": block}
    return model_of(f"MatMulInt{width}", x_dims or ["a", "b", k], constants, attributes)


def ternary(n, k, *, bits=8, per_channel=True, x_dims=None, seed=0):
    rng = np.random.default_rng(seed)
    constants = {
        "codes": layout.pack_ternary(rng.integers(-1, 2, (n, k))),
        "scale": rng.uniform(0.1, 1, n if per_channel else 1).astype(np.float32),
        "bias": rng.standard_normal(n).astype(np.float32),
    }
    attributes = {"K": k, "N": n, "activation_bits": bits, "activation_block": 0}
    return model_of("MatMulTernary", x_dims or ["a", "b", k], constants, attributes)


MODELS = {
    "int4 g32": int4(48, 96),
    "int4 g32 blocks of 128": int4(33, 200, block=128),
    "int4 g128 asymmetric": int4(20, 256, group=128, block=128, asymmetric=True),
    "int4 per channel, no bias": int4(7, 77, group=0, block=128, bias=False),
    "int4 float": int4(19, 50, bits=0, block=0, asymmetric=True),
    "int4 w4a4": int4(19, 50, bits=4, block=0),
    "int3 g32": int4(48, 96, width=3),
    "int3 g128 asymmetric": int4(20, 256, group=128, block=128, asymmetric=True, width=3),
    "int3 g16": int4(17, 80, group=16, block=16, width=3),
    "int3 per channel, half a step": int4(7, 77, group=0, block=128, bias=False, width=3),
    "int3 float": int4(19, 50, bits=0, block=0, asymmetric=True, width=3),
    "int3 large": int4(1360, 1552, group=0, block=128, width=3),
    "ternary": ternary(35, 61),
    "ternary per tensor": ternary(16, 100, per_channel=False),
    "ternary float": ternary(5, 40, bits=0),
}


def feed(model, *lead, seed=1):
    k = next(a.i for a in model.graph.node[0].attribute if a.name == "K")
    return {"X": np.random.default_rng(seed).standard_normal((*lead, k)).astype(np.float32)}


@pytest.mark.parametrize("lead", [(1, 1), (3, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_the_body_and_the_reference_agree(name, lead):
    model = MODELS[name]
    onnx.checker.check_model(model)
    feeds = feed(model, *lead)
    (native,) = runtime.session(model, threads=1).run(None, feeds)
    (body,) = runtime.session(model, threads=1, custom_ops=False).run(None, feeds)
    assert native.shape == body.shape
    np.testing.assert_allclose(native, body, rtol=1e-4, atol=1e-4)
    if np.prod(lead):
        (reference,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
        np.testing.assert_allclose(native, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_any_number_of_leading_dimensions(rank):
    dims = [2] * (rank - 1)
    model = int4(20, 64, x_dims=[*dims, 64])
    feeds = feed(model, *dims)
    (native,) = runtime.session(model).run(None, feeds)
    (body,) = runtime.session(model, custom_ops=False).run(None, feeds)
    assert native.shape == (*dims, 20)
    np.testing.assert_allclose(native, body, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [1, 37])
@pytest.mark.parametrize(
    "make", [lambda: int4(1024, 512), lambda: ternary(1024, 2048)], ids=["int4", "ternary"]
)
def test_one_and_two_threads_give_the_same_bits(make, m):
    model = make()
    feeds = feed(model, 1, m)
    one, two = (runtime.session(model, threads=t).run(None, feeds)[0] for t in (1, 2))
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("name", ["int4 g32", "ternary"])
def test_shapes_are_inferred(name):
    model = onnx.ModelProto.FromString(MODELS[name].SerializeToString())
    del model.functions[:]  # only the native operator can tell
    model.graph.output[0].type.tensor_type.ClearField("shape")
    n = next(a.i for a in model.graph.node[0].attribute if a.name == "N")
    (output,) = runtime.session(model).get_outputs()
    assert output.shape == ["a", "b", n]


def test_dimensions_that_nobody_knows_stay_unknown():
    text = """<ir_version: 10, opset_import: ["": 21, "ai.qgraph": 1]>
    g (float[a] A, int64[2] shape) => (int64[2] Z) {
        X = Reshape (A, shape)
        Y = ai.qgraph.MatMulInt4 <K=96, N=48, block_size=32, activation_bits=8, activation_block=32>
            (X, codes, scales, zero_points, bias)
        Z = Shape (Y)
    }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(MODELS["int4 g32"].graph.initializer)
    model.functions.extend(MODELS["int4 g32"].functions)
    feeds = {"A": np.zeros(192, np.float32), "shape": np.array([2, 96])}
    assert runtime.session(model).run(None, feeds)[0].tolist() == [2, 48]


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("width", [4, 3])
def test_weights_may_be_computed(width, asymmetric):
    model = int4(24, 64, asymmetric=asymmetric, width=width)
    feeds = feed(model, 2, 3)
    (expected,) = runtime.session(model).run(None, feeds)
    for held in list(model.graph.initializer):
        tensor = onnx.numpy_helper.to_array(held)
        feeds[held.name] = tensor
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(held.name, held.data_type, tensor.shape)
        )
    del model.graph.initializer[:]
    (found,) = runtime.session(model).run(None, feeds)
    assert found.tobytes() == expected.tobytes()


def change_attribute(name, value):
    def change(model):
        next(a for a in model.graph.node[0].attribute if a.name == name).i = value

    return change


def replace_constant(index, array):
    def change(model):
        held = model.graph.initializer[index]
        held.CopyFrom(constant(held.name, array))

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (change_attribute("block_size", 48), "block_size=48"),
        (change_attribute("activation_bits", 3), "activation_bits=3"),
        (change_attribute("activation_block", 40), "activation_block=40"),
        (change_attribute("N", 0), "N=0"),
        (change_attribute("N", 64), r"codes is \[3, 12, 64\], expected \[4, 12, 64\]"),
        (change_attribute("K", 1 << 40), "is larger than 262144"),
        (replace_constant(0, np.zeros((3, 11, 64), np.uint8)), r"\[3, 11, 64\]"),
        (replace_constant(1, np.zeros((3, 2, 16), np.float16)), r"scales is \[3, 2, 16\]"),
        (replace_constant(1, np.zeros((3, 3, 16), np.int32)), "scales has element type"),
        (replace_constant(2, np.zeros((3, 1, 16), np.uint8)), r"zero_points is \[3, 1, 16\]"),
        (
            replace_constant(3, np.zeros(47, np.float32)),
            r"bias is \[47\], expected \[1\] or \[48\]",
        ),
    ],
)
def test_errors_name_the_node_and_the_numbers(change, text):
    model = int4(48, 96)
    change(model)
    with pytest.raises(errors.RuntimeFailure, match=f"MatMulInt4 'the_node': .*{text}"):
        runtime.session(model)


def test_an_error_about_3_bit_codes_names_them():
    model = int4(48, 96, width=3)
    replace_constant(0, np.zeros((3, 12, 64), np.uint8))(model)
    text = r"MatMulInt3 'the_node': .*codes is \[3, 12, 64\], expected \[3, 6, 96\]"
    with pytest.raises(errors.RuntimeFailure, match=text):
        runtime.session(model)


def test_an_input_of_the_wrong_width_is_an_error():
    model = int4(48, 96, x_dims=["a", "b", "c"])
    session = runtime.session(model)
    with pytest.raises(Exception, match=r"the_node.*\[2, 1, 95\], expected \[\.\.\., 96\]"):
        session.run(None, {"X": np.zeros((2, 1, 95), np.float32)})
    (y,) = session.run(None, {"X": np.zeros((2, 1, 96), np.float32)})
    assert y.shape == (2, 1, 48)


@pytest.mark.parametrize("custom_ops", [True, False])
def test_the_oldest_supported_runtime_agrees(custom_ops, oldest_runtime):
    cases = [(model, feed(model, 2, 3)) for model in MODELS.values()]
    expected = [runtime.session(m, threads=1).run(None, feeds)[0] for m, feeds in cases]
    for found, y in zip(oldest_runtime(cases, custom_ops), expected, strict=True):
        if custom_ops:
            assert found.tobytes() == y.tobytes()
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)


MEMORY = """
import sys, numpy as np, onnxruntime
from qgraph import runtime
def usage():
    status = dict(l.split(":") for l in open("/proc/self/status") if l.startswith(("Rss", "VmHWM")))
    return {k: int(v.split()[0]) / 1024 for k, v in status.items()}
# What any session takes, and the code that it runs.
small = runtime.session(sys.argv[2], threads=1)
small.run(None, {"X": np.ones((1, 128), np.float32)})
before = usage()
session = runtime.session(sys.argv[1], threads=1)
after = usage()
session.run(None, {"X": np.ones((1, 8192), np.float32)})
ran = usage()
for key in ("RssAnon", "RssFile"):
    print(after[key] - before[key], ran[key] - before[key])
print(ran["VmHWM"] - before["RssAnon"] - before["RssFile"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("setting", ["huge", "mapped"])
@pytest.mark.parametrize(
    ("n", "width"), [(8192, 4), (8192, 3), pytest.param(65536, 4, marks=pytest.mark.slow)]
)
def test_memory_is_the_packed_size(n, width, setting, tmp_path):
    k = 8192  # 32 or 256 MiB of codes
    megabytes = (n * k / 2 + n * (k / 128) * 2) / (1 << 20)
    small = int4(16, 128, group=128, block=128, x_dims=["m", 128], width=width)
    codes = {4: (n // 16, k // 8, 64), 3: (n // 16, k // 16, 96)}[width]
    onnx.save(small, tmp_path / "small.onnx")
    model = small
    for name, value in (("N", n), ("K", k)):
        change_attribute(name, value)(model)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = k
    for index, array in (
        (0, np.full(codes, 0x5A, np.uint8)),
        (1, np.full((n // 16, k // 128, 16), 0.01, np.float16)),
        (3, np.zeros(1, np.float32)),
    ):
        replace_constant(index, array)(model)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=1024)
    environment = os.environ | {"QGRAPH_WEIGHTS": setting, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "small.onnx")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    figures = [[float(v) for v in line.split()] for line in done.stdout.splitlines()]
    (anon, anon_ran), (file, file_ran), (peak,) = figures
    slack = 6  # scratch memory, the result, what the runtime keeps for a session
    assert anon_ran + file_ran < megabytes + slack
    assert peak < megabytes + slack + 8  # a piece of the copy is in both
    if setting == "huge" or width == 3:  # codes of 3 bits are widened in any case
        assert megabytes - 1 < anon < megabytes + slack
        assert file_ran < slack
    else:
        assert anon_ran < slack
        assert file < megabytes + slack


SHARED = """
import sys, onnxruntime
from qgraph import runtime
def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024
runtime.session(sys.argv[2], threads=1)
before = anonymous()
session = runtime.session(sys.argv[1], threads=1)
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_widened_codes_are_shared_by_all_nodes_that_read_them(tmp_path):
    """Three nodes of one weight, whose 3-bit codes are 4-bit codes in memory once."""
    model = int4(4096, 4096, group=128, block=128, x_dims=["m", 4096], width=3, bias=False)
    (node,) = model.graph.node
    for i in range(2):
        again = model.graph.node.add()
        again.CopyFrom(node)
        again.name, again.input[0], again.output[0] = f"n{i}", "Y", f"Z{i}"
        model.graph.output.add().CopyFrom(model.graph.output[0])
        model.graph.output[-1].name = f"Z{i}"
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="d")
    onnx.save(int4(16, 128, x_dims=["m", 128], width=3), tmp_path / "small.onnx")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SHARED, str(tmp_path / "m.onnx"), str(tmp_path / "small.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    megabytes = 4096 * 4096 / 2 / (1 << 20)
    assert megabytes < float(done.stdout) < 1.7 * megabytes


def test_an_unknown_setting_of_the_memory_is_an_error(monkeypatch):
    monkeypatch.setenv("QGRAPH_WEIGHTS", "large")
    with pytest.raises(errors.RuntimeFailure, match="QGRAPH_WEIGHTS is large"):
        runtime.session(int4(1024, 4096))


def test_bodies_are_legal_for_every_opset_from_18(tmp_path):
    for opset in (18, 23):
        model = int4(20, 64)
        model.opset_import[0].version = opset
        del model.functions[:]
        model.functions.append(bodies.proto("MatMulInt4", opset))
        onnx.checker.check_model(model)
        feeds = feed(model, 1, 2)
        (native,) = runtime.session(model).run(None, feeds)
        (body,) = runtime.session(model, custom_ops=False).run(None, feeds)
        np.testing.assert_allclose(native, body, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs opset 18"):
        bodies.proto("MatMulInt4", 17)
    assert not Path(tmp_path / "data").exists()
