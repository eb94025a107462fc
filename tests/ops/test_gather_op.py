"""GatherInt4: rows of a packed table, alone and beside the MatMulInt4 that shares it."""

import itertools
import os
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_ir as ir
import pytest

from qgraph import errors, runtime
from qgraph.ops import bodies, layout


def table(n, k, group, *, points="many", half=True, seed=0):
    """The constants of a table, and what they stand for."""
    rng = np.random.default_rng(seed)
    groups = layout.int4_columns(k, group) // (group or layout.int4_columns(k, 0))
    codes = rng.integers(0, 16, (n, k))
    scales = rng.uniform(-0.1, 0.1, (n, groups)).astype(np.float16 if half else np.float32)
    zero = rng.integers(0, 16, (n, groups)).astype(np.uint8)
    if points != "many":
        zero[:] = points
    width = group or layout.int4_columns(k, 0)
    z, s = (np.repeat(v.astype(np.float32), width, axis=1)[:, :k] for v in (zero, scales))
    single = np.full((1, 1, 1), points, np.uint8) if points != "many" else None
    constants = {
        "codes": layout.pack_int4(codes, group),
        "scales": layout.tile_groups(scales, 0),
        "zero_points": layout.tile_groups(zero, 8) if single is None else single,
    }
    return constants, (codes.astype(np.float32) - z) * s


def model_of(constants, n, k, group, *, dims=("a", "b"), kind="int64"):
    given = f"{kind}[{', '.join(dims)}]" if dims else kind
    out = ", ".join(f"y{i}" for i in range(len(dims) + 1))
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21, "ai.qgraph": 1]>'
        f" g ({given} I) => (float[{out}] Y)"
        f" {{ [the_node] Y = ai.qgraph.GatherInt4 <N={n}, K={k}, block_size={group}>"
        " (I, codes, scales, zero_points) }"
    )
    proto.graph.initializer.extend(
        ir.to_proto(ir.tensor(v, name=name)) for name, v in constants.items()
    )
    proto.functions.append(bodies.proto("GatherInt4", 21))
    return proto


CASES = {
    "g32": (40, 96, 32, {}),
    "g16 odd": (33, 77, 16, {"half": False}),
    "per channel": (7, 61, 0, {"points": 8}),
    "g128 one point": (20, 256, 128, {"points": 3}),
    "one row of one": (1, 1, 0, {}),
}


def made(name, **options):
    n, k, group, given = CASES[name]
    constants, values = table(n, k, group, **given)
    return model_of(constants, n, k, group, **options), values


def indices(values, *shape):
    n = values.shape[0]
    return np.random.default_rng(1).integers(-n, n, shape)


@pytest.mark.parametrize("kind", ["int64", "int32"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_the_body_and_the_reference_are_exact(name, kind):
    model, values = made(name, kind=kind)
    onnx.checker.check_model(model)
    given = indices(values, 3, 5).astype(kind)
    (reference,) = onnx.reference.ReferenceEvaluator(model).run(None, {"I": given})
    np.testing.assert_array_equal(reference, values[given])
    for custom_ops in (True, False):
        (found,) = runtime.session(model, custom_ops=custom_ops).run(None, {"I": given})
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values[given])


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_indices_of_any_shape(shape):
    model, values = made("g32", dims=[f"d{i}" for i in range(len(shape))])
    given = indices(values, *shape)
    for custom_ops in (True, False):
        (found,) = runtime.session(model, custom_ops=custom_ops).run(None, {"I": np.array(given)})
        np.testing.assert_array_equal(found, values[given])


def test_many_rows_with_one_and_two_threads():
    model, values = made("g32", dims=["a"])
    given = indices(values, 3000)
    for threads in (1, 2):
        (found,) = runtime.session(model, threads=threads).run(None, {"I": given})
        np.testing.assert_array_equal(found, values[given])


def test_shapes_are_inferred():
    model, _ = made("g32")
    del model.functions[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    (output,) = runtime.session(model).get_outputs()
    assert output.shape == ["a", "b", 96]


def test_tables_may_be_computed():
    model, values = made("g32")
    feeds = {"I": indices(values, 2, 3)}
    for held in list(model.graph.initializer):
        feeds[held.name] = onnx.numpy_helper.to_array(held)
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(held.name, held.data_type, held.dims)
        )
    del model.graph.initializer[:]
    (found,) = runtime.session(model).run(None, feeds)
    np.testing.assert_array_equal(found, values[feeds["I"]])


@pytest.mark.parametrize("index", [40, -41, 1 << 40, -(1 << 63)])
def test_an_index_out_of_range_is_an_error(index):
    model, _ = made("g32")
    session = runtime.session(model)
    text = rf"GatherInt4 'the_node': index {index} at position 2, expected -40 to 39"
    with pytest.raises(Exception, match=text):
        session.run(None, {"I": np.array([[0, 39, index]])})


@pytest.mark.parametrize(
    ("attribute", "value", "text"),
    [
        ("block_size", 48, "block_size=48"),
        ("N", 0, "N=0"),
        ("N", 64, r"codes is \[3, 12, 64\], expected \[4, 12, 64\]"),
        ("K", 128, r"codes is \[3, 12, 64\], expected \[3, 16, 64\]"),
        ("block_size", 16, r"scales is \[3, 3, 16\], expected \[3, 6, 16\]"),
    ],
)
def test_errors_name_the_node_and_the_numbers(attribute, value, text):
    model, _ = made("g32")
    next(a for a in model.graph.node[0].attribute if a.name == attribute).i = value
    with pytest.raises(errors.RuntimeFailure, match=f"GatherInt4 'the_node': .*{text}"):
        runtime.session(model)


def test_indices_of_another_type_are_an_error():
    model, _ = made("g32", kind="uint8")
    with pytest.raises(Exception, match="the_node.*indices have element type 2"):
        runtime.session(model).run(None, {"I": np.zeros((1, 1), np.uint8)})


@pytest.mark.parametrize("custom_ops", [True, False])
def test_the_oldest_supported_runtime_agrees(custom_ops, oldest_runtime):
    cases, expected = [], []
    for name, kind in itertools.product(CASES, ["int64", "int32"]):
        model, values = made(name, kind=kind)
        given = indices(values, 2, 3).astype(kind)
        cases.append((model, {"I": given}))
        expected.append(values[given])
    for found, values in zip(oldest_runtime(cases, custom_ops), expected, strict=True):
        np.testing.assert_array_equal(found, values)


SHARED = """
import sys, numpy as np
from qgraph import runtime
def anonymous():
    status = dict(l.split(":") for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(status["RssAnon"].split()[0]) / 1024
before = anonymous()
session = runtime.session(sys.argv[1], threads=1)
given = np.arange(-4096, 4096)
(rows, product) = session.run(None, {"I": given, "X": np.eye(3, 4096, dtype=np.float32)})
np.testing.assert_array_equal(rows[:4096], rows[4096:])
np.testing.assert_allclose(product, rows[4096:, :3].T, atol=1e-6)
del rows, product
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_table_that_is_also_the_head_is_in_memory_once(tmp_path):
    n = k = 4096  # 8 MiB of codes
    constants, _ = table(n, k, 128, points=8)
    model = model_of(constants, n, k, 128, dims=["a"])
    product = onnx.parser.parse_graph(
        "g (float[b, 4096] X, float[1] none) => (float[b, 4096] Z) { Z = ai.qgraph.MatMulInt4"
        f" <N={n}, K={k}, block_size=128, activation_bits=0, activation_block=0>"
        " (X, codes, scales, zero_points, none) }"
    )
    model.graph.node.extend(product.node)
    model.graph.input.append(product.input[0])
    model.graph.output.extend(product.output)
    model.graph.initializer.append(ir.to_proto(ir.tensor(np.zeros(1, np.float32), name="none")))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=1024)
    used = {}
    for setting in ("huge", "mapped"):
        environment = {"QGRAPH_WEIGHTS": setting, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", SHARED, str(path)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | environment,
        )
        assert done.returncode == 0, done.stderr
        used[setting] = float(done.stdout)
    # One copy in huge pages, and none otherwise; what a session takes besides is in both.
    assert 7.5 < used["huge"] - used["mapped"] < 11
