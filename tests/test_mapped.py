"""Models whose weights stay in their file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import errors, files, mapped, runtime
from qgraph.runtime import sessions

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(31)
GRAPH = """<ir_version: 10, opset_import: ["" : 21], producer_name: "p">
g (float[b, 300] x) => (float[b, 256] y) { m = MatMul(x, w)  y = Add(m, c) }"""


def proto(**more: Array) -> onnx.ModelProto:
    """Large and small weights of several types, some with their data in other fields."""
    made = onnx.parser.parse_model(GRAPH)
    weights = {
        "w": RNG.normal(size=(300, 256)).astype(np.float32),
        "c": np.ones(256, np.float32),
        "half": RNG.normal(size=(7, 11, 1001)).astype(np.float16),
        "ids": RNG.integers(-(2**40), 2**40, 20_001),
        "flags": RNG.integers(0, 2, 70_000).astype(bool),
        **more,
    }
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    values = RNG.normal(size=20_000).tolist()
    made.graph.initializer.append(
        onnx.helper.make_tensor("listed", onnx.TensorProto.FLOAT, [20_000], values)
    )
    made.graph.initializer[0].doc_string = "weights"
    made.metadata_props.add(key="k", value="v" * 300)
    return made


def saved(made: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def same(a: ir.Model, b: ir.Model) -> bool:
    one, other = (ir.to_proto(m).SerializeToString(deterministic=True) for m in (a, b))
    return one == other


def test_the_model_is_that_of_onnx_ir(tmp_path: Path) -> None:
    path = saved(proto(), tmp_path / "m.onnx")
    found, expected = mapped.load(path), ir.load(path)
    assert same(found, expected)
    views = {n: v.const_value for n, v in found.graph.initializers.items()}
    inside = {n for n, t in views.items() if isinstance(t, ir.Tensor)}
    assert inside == {"w", "half", "ids"}, "large, and of a type that numpy reads in place"
    assert not np.asarray(views["w"]).flags.writeable
    mapped.release(found)
    assert same(found, expected)


def test_anonymous_memory_does_not_hold_the_weights(tmp_path: Path) -> None:
    big = RNG.normal(size=(4096, 4096)).astype(np.float32)  # 64 MiB
    path = saved(proto(big=big), tmp_path / "m.onnx")

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10

    before = anonymous()
    model = files.load(path)
    assert anonymous() - before < big.nbytes // 4
    held = model.graph.initializers["big"].const_value
    assert held is not None
    np.testing.assert_array_equal(held.numpy(), big)


def test_a_replaced_file_changes_nothing(tmp_path: Path) -> None:
    path = saved(proto(), tmp_path / "m.onnx")
    expected, found = ir.load(path), files.load(path)
    other = saved(proto(), tmp_path / "other.onnx")
    os.replace(other, path)
    again = files.load(path)
    path.unlink()
    names = [n.name for n in found.graph]
    for node, name in zip(expected.graph, names, strict=True):
        node.name = name
    assert same(found, expected)
    assert not same(found, again)


def test_external_data_stays_outside(tmp_path: Path) -> None:
    made = proto(big=RNG.normal(size=(1024, 512)).astype(np.float32))
    onnx.external_data_helper.convert_model_to_external_data(
        made, location="m.data", size_threshold=1 << 21, convert_attribute=False
    )
    onnx.save(made, tmp_path / "m.onnx")
    found, expected = mapped.load(tmp_path / "m.onnx"), ir.load(tmp_path / "m.onnx")
    held = {n: v.const_value for n, v in found.graph.initializers.items()}
    assert isinstance(held["big"], ir.ExternalTensor)
    assert isinstance(held["w"], ir.Tensor)
    for name, value in expected.graph.initializers.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(np.asarray(held[name]), value.const_value.numpy())


@pytest.mark.parametrize("cut", [1000, 300_000, 1_100_000, -1])
def test_a_truncated_file_is_refused(cut: int, tmp_path: Path) -> None:
    whole = proto(big=RNG.normal(size=(1024, 512)).astype(np.float32)).SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole[:cut] + b"")
    with pytest.raises(ValueError, match=r"ends at byte|no field"):
        mapped.load(path)
    with pytest.raises(errors.InputError, match="QG102"):
        files.load(path)


def test_a_weight_of_another_size_than_its_shape_is_refused(tmp_path: Path) -> None:
    made = proto(big=RNG.normal(size=(1024, 512)).astype(np.float32))
    made.graph.initializer[0].dims[0] = 299
    with pytest.raises(errors.InputError, match=r"QG102.*tensor 'w' has 307200 bytes"):
        files.load(saved(made, tmp_path / "m.onnx"))


def test_sessions_over_large_models_read_weights_from_the_mapped_file(tmp_path, monkeypatch):
    """Packed copies would be memory that cannot be given back."""
    size = 32 << 20
    w = np.random.default_rng(0).standard_normal((1024, size // 4096)).astype(np.float32)
    text = f"g (float[m, 1024] x) => (float[m, {w.shape[1]}] y) {{ y = MatMul(x, W) }}"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 17]>\n{text}')
    proto.graph.initializer.append(ir.to_proto(ir.tensor(w, name="W")))
    path = files.save(ir.from_proto(proto), tmp_path / "m.onnx", external_data=True)
    assert runtime.mapped_weights(files.file_bytes(path)) == {}

    np.save(tmp_path / "x.npy", w[:, :1].T)
    monkeypatch.setattr(sessions, "LARGE", size)
    packed, expected = _opened(path, {})
    mapped, found = _opened(path, runtime.mapped_weights(files.file_bytes(path)))
    assert packed > 0.9 * size > 5 * mapped
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def _opened(path, config):
    """By how many bytes opening a session makes anonymous memory grow, and what it computes.

    In a process of its own: memory that other tests gave back would be taken again, and nothing
    would grow.
    """
    folder = path.parent
    command = [sys.executable, "-c", OPENED, str(folder), json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), np.load(folder / "y.npy")


# A small session first takes what ONNX Runtime needs for itself.
OPENED = """
import json, pathlib, sys
import numpy as np, onnx.parser
from qgraph import runtime

def anonymous():
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) << 10

folder, config = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
header = '<ir_version: 10, opset_import: ["" : 17]>'
small = onnx.parser.parse_model(header + "g (float[m] x) => (float[m] y) { y = Neg(x) }")
runtime.session(small, threads=1)
before = anonymous()
session = runtime.session(folder / "m.onnx", threads=1, config=config)
print(anonymous() - before)
np.save(folder / "y.npy", session.run(None, {"x": np.load(folder / "x.npy")})[0])
"""
