"""rotate with `scores`: queries and keys go through Hadamard transforms, or rotate with their weights."""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import errors, files, graph, verify
from qgraph.models.builder import FLOAT, Builder

sys.path.insert(0, str(Path(__file__).parents[1] / "symmetry" / "exported"))
import load


def rotated(model, target="ort-qgraph", **options):
    """The model behind rotate, proven equal; nothing but queries and keys unless asked for."""
    options = {"scores": 64, "residual": False, "heads": False} | options
    recipe = {
        "target": target,
        "pipeline": ["canonicalize", "rotate"],
        "options": {"rotate": options},
    }
    source = files.load(model) if isinstance(model, str) else model
    result = qgraph.optimize(graph.clone(source), recipe, inspect=False)
    same = verify.equivalent(source, result.model, verify.sample_feeds(source), rtol=1e-4)
    assert same.ok, same.reason
    return result


@pytest.fixture(scope="module")
def decoder():
    """tiny-llama with transforms."""
    return rotated("zoo:tiny-llama")


def placed(result):
    return [n for n in result.model.graph if n.op_type == "Hadamard"]


def notes(result, code):
    return [d.message for d in result.report.diagnostics if d.code == code]


def above(node):
    """What makes the input of a node."""
    return node.inputs[0].producer()


def test_a_decoder_transforms_queries_and_keys_behind_the_rotary_embedding(decoder):
    result = decoder
    assert len([n for n in result.model.graph if "scores" in str(n.name) and _is_fed(n)]) == 5
    assert len(placed(result)) == 10 == len(notes(result, "QG212"))  # in five layers
    assert {above(n).op_type for n in placed(result)} == {"Add"}  # x cos + turned x sin
    assert all(graph.attribute(n, "block_size", 0) == 16 for n in placed(result))
    assert all("queries or keys" in text for text in notes(result, "QG212"))
    # The mix of values sums over positions.
    assert not [n for n in result.model.graph if "mixed" in str(n.name) and _is_fed(n)]


def _is_fed(node):
    """Whether a transform stands in front of a node, a Transpose or Reshape between."""
    made = [v.producer() for v in node.inputs if v is not None and v.producer() is not None]
    return any(
        n.op_type == "Hadamard" or (n.op_type in ("Transpose", "Reshape") and _is_fed(n))
        for n in made
    )


def test_the_transforms_mix_channels(decoder):
    """With one side left as it is the scores are others."""
    model = graph.clone(decoder.model)
    first = next(n for n in model.graph if n.op_type == "Hadamard")
    for user, index in tuple(first.outputs[0].uses()):
        user.replace_input_with(index, first.inputs[0])
    feeds = verify.sample_feeds(model)
    assert not verify.equivalent(decoder.model, model, feeds, rtol=1e-2).ok


def test_it_is_off_by_default():
    assert not placed(rotated("zoo:tiny-llama", scores=0))


@pytest.mark.parametrize("source", ["zoo:tiny-llama-kv", "llama_cache_20"])
def test_keys_of_a_cache_keep_their_basis(source):
    """The transform stands behind the concatenation, and what leaves the model is what comes out of that."""
    result = rotated(source if ":" in source else load.load(source))
    behind = [above(n) for n in placed(result) if above(n).op_type == "Concat"]
    assert len(behind) == len(placed(result)) // 2 > 0
    assert all(n.outputs[0].is_graph_output() for n in behind)


@pytest.mark.parametrize(
    ("name", "layers"), [("llama_18", 2), ("llama_20", 2), ("llama_qk_norm_20", 1)]
)
def test_keys_that_several_heads_share_are_transformed_once(name, layers):
    """Exported grouped attention: above Expand, the reshapes and the scales of both sides."""
    result = rotated(load.load(name))
    assert len(placed(result)) == 2 * layers
    assert {above(n).op_type for n in placed(result)} == {"Add"}
    assert {graph.attribute(n, "block_size", 0) for n in placed(result)} == {8}


@pytest.mark.parametrize("name", ["gpt_20", "bert_20", "vit_20", "torch_encoder_20"])
def test_without_a_rotary_embedding_the_rotation_folds(name):
    result = rotated(load.load(name), target="ort")
    assert not placed(result) and not notes(result, "QG216")
    assert notes(result, "QG211") == ["rotated (4 heads of 8 channels)"] * (
        1 if name == "torch_encoder_20" else 2
    )


def attention(form, d=16, dtype="f4", heads=2):
    """Queries and keys with something between them and their projections that no rotation passes."""
    rng = np.random.default_rng(3)
    kind = FLOAT if dtype == "f4" else ir.DataType.DOUBLE
    b = Builder("g")
    x = b.input("x", kind, [1, 6, 8])

    def side(name):
        w = b.initializer(f"{name}.weight", rng.normal(size=(8, heads * d)).astype(dtype))
        y = b.op("Tanh", b.op("MatMul", x, w))
        return b.op("Reshape", y, b.integers(f"{name}.shape", 1, 6, heads, d))

    q, k = side("q"), side("k")
    if form == "einsum":
        y = b.op("Einsum", q, k, equation="bqhd,bkhd->bhqk")
    elif form == "einsum, d first":
        k = b.op("Transpose", k, perm=[0, 2, 3, 1])
        y = b.op("Einsum", q, k, equation="bqhd,bhdk->bhqk")
    else:
        q = b.op("Transpose", q, perm=[0, 2, 1, 3])
        k = b.op("Transpose", k, perm=[0, 2, 3, 1])
        if form == "scaled":
            q, k = (
                b.op("Mul", v, b.initializer(n, np.array(0.5, dtype)))
                for v, n in ((q, "s"), (k, "t"))
            )
        if form == "turned":
            k = b.op(
                "Neg", k
            )  # which is not looked through: channels stay the axis before the last
        y = b.op("MatMul", q, k)
    b.output("y", y, kind, [1, heads, 6, 6])
    return b.model()


@pytest.mark.parametrize("form", ["matmul", "scaled", "einsum", "einsum, d first"])
def test_forms_of_the_product(form):
    result = rotated(attention(form))
    assert [above(n).op_type for n in placed(result)] == ["Reshape"] * 2  # into heads
    assert "turned" not in str([n.name for n in result.model.graph])


def test_channels_that_are_nowhere_the_last_axis_are_turned():
    result = rotated(attention("turned"))
    (turn,) = [n for n in placed(result) if above(n).name.endswith(".turned")]
    assert [n.op_type for n, _ in turn.outputs[0].uses()] == ["Transpose"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: attention("matmul", d=12), "no power of two from 8 to 64 divides 12 channels"),
        (lambda: attention("matmul", dtype="f8"), "they are not known to be float32 or float16"),
        (lambda: load.load("llama_23"), "Attention multiplies them inside"),
    ],
)
def test_what_stays_as_it_is_has_a_reason(make, text):
    result = rotated(make())
    assert not placed(result)
    assert set(notes(result, "QG218")) == {f"queries and keys stay as they are: {text}"}


def test_a_head_that_is_no_power_of_two_is_transformed_in_blocks():
    result = rotated(attention("matmul", d=24))
    assert [graph.attribute(n, "block_size", 0) for n in placed(result)] == [8, 8]


def test_where_there_are_no_queries_it_says_so():
    b = Builder("g")
    w = b.initializer("w", np.eye(16, dtype="f4"))
    b.output("y", b.op("MatMul", b.op("Tanh", b.input("x", FLOAT, [2, 16])), w), FLOAT, [2, 16])
    (text,) = notes(rotated(b.model()), "QG218")
    assert text == "no product of two activations sums over channels: there are no queries and keys"


def test_a_target_without_the_operator_warns():
    result = rotated("zoo:tiny-llama", target="openvino")
    assert not placed(result)
    assert notes(result, "QG216") == [
        "what no rotation reaches stays as it is: target 'openvino' has no Hadamard operator"
    ]


def test_blocks_are_powers_of_two():
    with pytest.raises(errors.RecipeError, match=r"QG305.*scores.*48 is no power of two"):
        rotated("zoo:tiny-llama", scores=48)
