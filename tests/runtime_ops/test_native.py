"""Finding and loading the native library, packing."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from qgraph import errors, native, numerics
from qgraph.runtime import library


def run_python(code, **environment):
    """Run code in a fresh process with this one's library."""
    settings = os.environ | {"QGRAPH_OPS_LIBRARY": library.library_path()} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@given(
    codes=st_numpy.arrays(np.uint8, st_numpy.array_shapes(min_dims=1, max_dims=3, min_side=0)),
    bits=st.sampled_from([2, 4, 8]),
)
def test_pack_puts_the_first_code_in_the_low_bits(codes, bits):
    codes = codes & np.uint8(2**bits - 1)
    packed = native.pack(codes, bits)
    assert packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] * bits // 8))
    for row, bytes_ in zip(
        codes.reshape(-1, codes.shape[-1]) if codes.size else [],
        packed.reshape(-1, packed.shape[-1]) if packed.size else [],
        strict=True,
    ):
        value = int.from_bytes(bytes_.tobytes(), "little")
        assert value == sum(int(c) << bits * n for n, c in enumerate(row))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_agrees_with_numerics(bits):
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(0).integers(-half, half, (6, 64)).astype(np.int8)
    packed = native.pack(codes, bits)
    np.testing.assert_array_equal(packed.ravel(), numerics.pack(codes, bits))


def test_pack_names_what_it_refuses():
    with pytest.raises(ValueError, match="int32"):
        native.pack(np.zeros((2, 2), np.int32), 4)
    with pytest.raises(ValueError, match="strided"):
        native.pack(np.zeros((2, 4), np.uint8)[:, ::2], 4)
    with pytest.raises(ValueError, match="bits is 3"):
        native.pack(np.zeros((2, 4), np.uint8), 3)


@pytest.mark.parametrize("isa", native.load().isas)
def test_the_environment_caps_the_instruction_set(isa):
    code = "from qgraph import native; print(native.load().isa)"
    assert run_python(code, QGRAPH_ISA=isa).strip() == isa


def test_an_unknown_instruction_set_is_an_error():
    code = "from qgraph import native; native.load()"
    assert "QG605" in run_python(code, QGRAPH_ISA="avx3")
    code = (
        "import onnx.parser; from qgraph import runtime;"
        'm = onnx.parser.parse_model(\'<ir_version: 10, opset_import: ["": 21]>'
        " g (float[1] x) => (float[1] y) { y = Neg(x) }');"
        "runtime.session(m, custom_ops=True)"
    )
    assert "QGRAPH_ISA must be" in run_python(code, QGRAPH_ISA="avx3")


def test_a_missing_library_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("QGRAPH_OPS_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(errors.RuntimeFailure, match="QG603.*does not exist"):
        native.load()
    monkeypatch.delenv("QGRAPH_OPS_LIBRARY")
    monkeypatch.setattr(library, "_installed_libraries", lambda: iter(()))
    with pytest.raises(errors.RuntimeFailure, match="pip install"):
        native.load()


def test_a_file_that_is_no_library_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "libqgraph_ops.so"
    path.write_bytes(b"text")
    monkeypatch.setenv("QGRAPH_OPS_LIBRARY", str(path))
    with pytest.raises(errors.RuntimeFailure, match="QG604"):
        native.load()


def test_another_interface_version_is_refused(monkeypatch, tmp_path):
    path = shutil.copy(library.library_path(), tmp_path)
    monkeypatch.setenv("QGRAPH_OPS_LIBRARY", path)
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    with pytest.raises(errors.RuntimeFailure, match="this qgraph needs 99"):
        native.load()


def test_the_library_is_loaded_once():
    assert native.load() is native.load()
