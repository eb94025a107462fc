"""Hadamard: the matrices, the kernel of every instruction set, the body."""

import os
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_ir as ir
import pytest

from qgraph import errors, native, runtime
from qgraph.ops import bodies, hadamard
from qgraph.runtime import library


def matrix(size):
    f, p = hadamard.split(size)
    return np.kron(hadamard.factor(f), hadamard.sylvester(1 << p)).astype(np.float64)


def model_of(block, factor=None, dims=("a", "b", "c")):
    names = ", ".join(map(str, dims))
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21, "ai.qgraph": 1]> g (float[{names}] X)'
        f" => (float[{names}] Y) {{ [the_node] Y = ai.qgraph.Hadamard <block_size={block}> (X, factor) }}"
    )
    if factor is None:
        factor = hadamard.factor(hadamard.split(block)[0])
    proto.graph.initializer.append(ir.to_proto(ir.tensor(np.array(factor), name="factor")))
    proto.functions.append(bodies.proto("Hadamard", 21))
    return proto


@pytest.mark.parametrize("size", hadamard.FACTOR_SIZES)
def test_factors_are_hadamard_matrices(size):
    made = hadamard.factor(size).astype(np.float64)
    assert set(np.unique(made)) <= {-1, 1}
    np.testing.assert_array_equal(made @ made.T, size * np.eye(size))


def test_sizes_are_split():
    assert [hadamard.split(s) for s in (1, 64, 768, 5120, 14336, 11008 // 43 * 44)] == [
        (1, 0),
        (1, 6),
        (12, 6),
        (20, 8),
        (28, 9),
        (44, 8),
    ]
    for bad in (0, 11, 11008):
        with pytest.raises(ValueError, match="power of two"):
            hadamard.split(bad)
    with pytest.raises(ValueError, match="none of"):
        hadamard.factor(16)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128, 512, 12, 24, 40, 120, 768])
def test_the_kernel_the_body_and_the_reference_agree(block):
    model = model_of(block)
    onnx.checker.check_model(model)
    x = np.random.default_rng(block).standard_normal((2, 3, 2 * block)).astype(np.float32)
    (found,) = runtime.session(model, threads=1).run(None, {"X": x})
    blocks = x.reshape(2, 3, 2, block).astype(np.float64)
    expected = (blocks @ matrix(block).T / np.sqrt(block)).reshape(x.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for (body,) in (
        runtime.session(model, threads=1, custom_ops=False).run(None, {"X": x}),
        onnx.reference.ReferenceEvaluator(model).run(None, {"X": x}),
    ):
        np.testing.assert_allclose(found, body, atol=1e-5)


def test_it_keeps_lengths_shapes_and_is_the_same_with_two_threads():
    model = model_of(4096)
    x = np.random.default_rng(0).standard_normal((1, 40, 4096)).astype(np.float32)
    one, two = (runtime.session(model, threads=t).run(None, {"X": x})[0] for t in (1, 2))
    assert one.tobytes() == two.tobytes()
    np.testing.assert_allclose(np.linalg.norm(one, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    (empty,) = runtime.session(model).run(None, {"X": x[:, :0]})
    assert empty.shape == (1, 0, 4096)
    assert runtime.session(model).get_outputs()[0].shape == ["a", "b", "c"]


SCRIPT = """
import sys, numpy as np
from qgraph import runtime
x = np.random.default_rng(0).standard_normal((2, 3, 240)).astype(np.float32)
sys.stdout.write(runtime.session(sys.argv[1], threads=1).run(None, {"X": x})[0].tobytes().hex())
"""


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    path = tmp_path / "hadamard.onnx"
    onnx.save(model_of(240), path)
    found = set()
    for isa in native.load().isas:
        settings = {"QGRAPH_ISA": isa, "QGRAPH_OPS_LIBRARY": library.library_path()}
        environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SCRIPT, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("block", "factor", "text"),
    [
        (0, np.ones((1, 1)), "block_size=0"),
        (48, np.ones((1, 1)), r"factor is \[1, 1\].*block_size=48"),
        (64, np.ones((12, 12)), r"factor is \[12, 12\]"),
        (128, np.ones((128, 128)), "f up to 64"),
        (8, np.ones(8), r"factor is \[8\]"),
    ],
)
def test_errors_name_the_node_and_the_numbers(block, factor, text):
    with pytest.raises(errors.RuntimeFailure, match=f"Hadamard 'the_node': .*{text}"):
        runtime.session(model_of(block, factor.astype(np.float32)))


def test_rows_that_are_no_whole_blocks_are_an_error():
    session = runtime.session(model_of(64))
    with pytest.raises(Exception, match=r"the_node.*\[1, 1, 100\].*64 divides"):
        session.run(None, {"X": np.zeros((1, 1, 100), np.float32)})
