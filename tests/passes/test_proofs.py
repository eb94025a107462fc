"""The proof that a pass keeps the function: it fails where it should, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import errors, graph, registry
from qgraph.instruments import EquivalenceChecker
from qgraph.pipeline import Context, Keeps, Pass, Pipeline
from qgraph.recipe import Recipe

SCALES = "g ({kind}[m, 64] x) => ({kind}[m, 64] y) {{ y = Mul(x, W) }}"


class Scale(Pass):
    """Multiplies every weight by a factor."""

    name = "scale"
    keeps = Keeps.FLOAT_EQUAL

    def __init__(self, factor: float, keeps: Keeps = Keeps.FLOAT_EQUAL) -> None:
        super().__init__()
        self.factor = factor
        self.keeps = keeps  # type: ignore[misc]

    def run(self, model: ir.Model, ctx: Context) -> bool:
        for _, v in graph.initializers(model):
            data = graph.array(v)
            v.const_value = ir.tensor((data * data.dtype.type(self.factor)), name=v.name)
        return True


class DropIdentity(Pass):
    """Removes every Identity."""

    name = "drop-identity"
    keeps = Keeps.BIT_EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        for node in list(model.graph):
            if node.op_type == "Identity":
                graph.replace_uses(node.outputs[0], node.inputs[0])
                model.graph.remove(node, safe=True)
        return True


def prove(model: ir.Model, each: Pass) -> list[str]:
    ctx = Context(registry.get("target", "ort"), Recipe())
    checker = EquivalenceChecker()
    Pipeline([each]).run(model, ctx, [checker])
    return checker.lines


def parse(text: str, **weights: np.ndarray[Any, Any]) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    proto.graph.initializer.extend(ir.to_proto(ir.tensor(w, name=k)) for k, w in weights.items())
    return ir.from_proto(proto)


def test_a_changed_function_is_found():
    model = parse(SCALES.format(kind="float"), W=np.ones((64,), np.float32))
    with pytest.raises(
        errors.VerificationError, match="QG201 pass scale: claims to be float-equal"
    ):
        prove(model, Scale(1.001))


def test_a_rounding_is_float_equal_but_not_bit_exact():
    model = parse(SCALES.format(kind="float"), W=np.ones((64,), np.float32))
    assert "proven float-equal on 2 samples" in prove(model, Scale(1 + 1e-6))[0]
    with pytest.raises(errors.VerificationError, match="claims to be bit-exact"):
        prove(model, Scale(1 + 1e-6, Keeps.BIT_EXACT))


def test_float16_may_differ_by_its_own_rounding():
    model = parse(SCALES.format(kind="float16"), W=np.ones((64,), np.float16))
    assert "proven float-equal" in prove(model, Scale(1.001))[0]
    with pytest.raises(errors.VerificationError):
        prove(model, Scale(1.01))


@pytest.mark.parametrize("attribute", ["", "<seed=1.0>"])
def test_random_numbers_are_proven_only_if_they_are_the_same_each_time(attribute):
    # canonicalize drops the Identity; ONNX Runtime seeds what has no seed by the node's position.
    text = f"""g (float[m, 64] x) => (float[m, 64] y)
        {{ i = Identity(x) a = Identity(i) n = RandomNormalLike{attribute}(x) h = MatMul(a, W) y = Add(h, n) }}"""
    lines = prove(parse(text, W=np.eye(64, dtype=np.float32)), DropIdentity())
    if attribute:
        assert lines[0].startswith("drop-identity: proven bit-exact")
    else:
        said = "RandomNormalLike 'n' draws random numbers without a seed"
        assert lines == [f"equivalence of rewrites was not proven: {said}"]


def test_a_model_without_valid_inputs_is_let_pass_and_said_so():
    text = "g (float[m, 64] x) => (float[1, 63] y) { h = Mul(x, W) y = Reshape(h, shape) }"
    shape = np.array([1, 63], np.int64)
    lines = prove(parse(text, W=np.ones((64,), np.float32), shape=shape), DropIdentity())
    assert len(lines) == 1 and "was not proven: none of" in lines[0]
