"""Residual streams: what may read one, what forbids rotating it, and that the report of `rotate` names it."""

import sys
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import qgraph
from qgraph import files

sys.path.insert(0, str(Path(__file__).parent / "exported"))
import load

# Two experts, of which the best one of each row counts: its share is Softmax's, all other rows get 0.
ROUTER = """r = MatMul(n, R) p = Softmax <axis = -1> (r) share, best = TopK <axis = -1> (p, one)
    is_first = Equal(best, zero) first = Cast <to = 1> (is_first) by = Mul(share, first)
    e = MatMul(n, E) q = Sigmoid(e) o = MatMul(q, O) v = Mul(o, by) t = Add(s, v)"""
TEXT = """g (float[m, 6] x) => (float[m, 5] y%s) {
    h = MatMul(x, A) k = RMSNormalization <axis = -1> (h, g) a = MatMul(k, B) c = Tanh(a) b = MatMul(c, C)
    s = Add(h, b) n = RMSNormalization <axis = -1> (s, f) %s
    z = RMSNormalization <axis = -1> (t, f) y = MatMul(z, D) }"""
PLAIN = "u = MatMul(n, P) t = Add(s, u)"


def constants(draw):
    made = {"A": draw(6, 8), "B": draw(8, 7), "C": draw(7, 8), "D": draw(8, 5), "P": draw(8, 8), "R": draw(8, 2),
            "E": draw(8, 9), "O": draw(9, 8)}  # fmt: skip
    gains = {"g": np.abs(draw(8)) + 0.5, "f": np.abs(draw(8)) + 0.5}
    return made | gains | {"one": np.int64([1]), "zero": np.int64([0])}


def stream(result, kind="rotate"):
    (group,) = [g for g in result.of(kind) if "A" in {m.value.name for m in g.writers}]
    return group


def test_a_stream_rotates(found, draw):
    group = stream(found(TEXT % ("", PLAIN), 23, **constants(draw)))
    assert (group.legal, group.block) == ("orthogonal", 8)
    assert {m.value.name for m in group.readers} == {"B", "D", "P"}


def test_a_router_reads_the_stream_as_any_linear_does(found, draw):
    """The stream rotates, the router's weights with it; its shares of an expert change nothing."""
    result = found(TEXT % ("", ROUTER), 23, **constants(draw))
    group = stream(result)
    assert (group.legal, group.block, group.keeps_mean) == ("orthogonal", 8, False)
    assert {m.value.name for m in group.readers} == {"B", "D", "R", "E"}
    assert {m.value.name for m in group.writers} == {"A", "C", "O"}
    # Which expert is chosen is no channel of anything: what the router makes is no group.
    assert not [g for g in result.groups if "R" in {m.value.name for m in g.writers}]
    # What stands before the router and the expert may be scaled, both are readers of it.
    (norm,) = [g for g in result.of("scale") if "E" in {m.value.name for m in g.readers}]
    assert norm.legal == "diagonal" and {"R", "E"} <= {m.value.name for m in norm.readers}


REFUSED = [
    ("w = Sigmoid(s) t = Mul(s, w)", "", "Sigmoid: Sigmoid is not linear"),
    ("w = Relu(s) t = Add(s, w)", "", "Relu: Relu keeps only positive factors of single channels"),
    # A router without weights: the stream itself is sorted.
    ("w, i = TopK <axis = -1> (s, one) t = Mul(s, w)", "", "TopK: TopK is not known to keep channels apart"),
    ("w = Softmax <axis = -1> (s) t = Mul(s, w)", "", "Softmax: Softmax is not linear"),
    # Post-norm: the stream goes on behind the gain.
    ("u = MatMul(n, P) t = Add(n, u)", "",
     "RMSNormalization: the gain of RMSNormalization 'n' cannot move into its readers: normalises over the channels"),
    (PLAIN, ", float[m, 8] s", "Add: 's' is an output of the model"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "output", "reason"), REFUSED)
def test_what_forbids_a_rotation_is_named(found, draw, body, output, reason):
    result = found(TEXT % (output, body), 23, **constants(draw))
    group = stream(result)
    assert (group.legal, f"{group.forbids.op_type}: {group.reason}") == ("", reason)


@pytest.mark.parametrize(("body", "output", "reason"), REFUSED[:3])
def test_the_pass_says_why_nothing_rotates(draw, body, output, reason):
    head = '<ir_version: 10, opset_import: ["" : 23]>'
    proto = onnx.parser.parse_model(f"{head}\n{TEXT % (output, body)}")
    proto.graph.initializer.extend(
        ir.to_proto(ir.tensor(v.astype("f4") if v.dtype.kind == "f" else v, name=k))
        for k, v in constants(draw).items()
    )
    assert reason.split(": ")[1] in warning(files.load(proto))


def test_the_pass_refuses_a_post_norm_encoder():
    """Heads rotate there; asked for the stream alone the pass names the norm and leaves all as it is."""
    text = warning(load.load("bert_20"), heads=False)
    assert "cannot move into its readers: normalises over the channels" in text


def warning(model, **options):
    """The text with which rotate leaves a model as it is."""
    recipe = {
        "target": "ort-qgraph",
        "pipeline": ["canonicalize", "rotate"],
        "options": {"rotate": options},
    }
    result = qgraph.optimize(model, recipe, inspect=False)
    assert not [d for d in result.report.diagnostics if d.code in ("QG211", "QG212")]
    (found,) = [d for d in result.report.diagnostics if d.code == "QG213"]
    assert found.severity == "warning" and found.message.startswith("nothing may be rotated: ")
    return found.message
