"""What the ledger says is stored is what the file holds: codes, scales, zero points and padding."""

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

import qgraph
from qgraph import graph, registry

SPECS = (
    *("int2.g32", "uint2.g16.asym.f16", "uint2.g64.asym", "int3.g32", "uint3.g64.asym.f16"),
    *("uint3.ch.asym", "int4.g32", "int4.ch.f16", "uint4.g128.asym", "uint4.g32.asym.f16"),
    *("int8.g32", "int8.ch", "int8.g128.f16", "uint8.g32.asym"),
)


def product(k, n):
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]>'
        f" g (float[m, {k}] x) => (float[m, {n}] y) {{ y = MatMul(x, w) }}"
    )
    w = np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    return model


@pytest.mark.parametrize("shape", [(256, 96), (200, 70), (97, 160)], ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("target", registry.names("target"))
def test_stored_bytes_are_those_of_the_file(target, spec, shape):
    recipe = {"rules": [{"weights": [spec, "float"]}], "min_elements": 1}
    result = qgraph.optimize(product(*shape), recipe, target=target, inspect=False)
    (entry,) = result.ledger
    held = [v for _, v in graph.initializers(result.model) if v.name != "no_bias"]
    stored = sum(v.const_value.nbytes for v in held)
    if not entry.spec:
        assert stored == entry.stored_bytes == 4 * shape[0] * shape[1]
        return
    # A zero point of 0 that a runtime wants to see is no part of the format.
    zeros = [v for v in held if ".zero" in v.name and not graph.array(v).any()]
    assert entry.stored_bytes == stored - sum(v.const_value.nbytes for v in zeros)


def test_a_format_that_takes_more_than_float_is_refused_with_the_bytes():
    """Blocks of 16 columns and a scale for each are more than a weight of one column."""
    recipe = {"rules": [{"weights": ["int4.g32", "float"]}], "min_elements": 1}
    result = qgraph.optimize(product(1, 2048), recipe, inspect=False)
    (entry,) = result.ledger
    assert not entry.spec and entry.code == "QG315"
    assert "it would take 24576 bytes, in float 8192" in entry.reason
