"""rotate: what is rotated, that the function stays, and that outliers are gone from what is quantized."""

import numpy as np
import pytest

import qgraph
from qgraph import errors, files, graph, online_hadamard, symmetry, verify
from qgraph.models.builder import FLOAT, Builder
from qgraph.models.data import eval_tokens

PIPELINE = ["canonicalize", "rotate"]


def rotated(model, target="ort-qgraph", data=None, **options):
    recipe = {"target": target, "pipeline": PIPELINE, "options": {"rotate": options}}
    return qgraph.optimize(model, recipe, data=data, inspect=False)


def notes(result, code):
    return [d for d in result.report.diagnostics if d.code == code]


def equal(before, after, tolerance=1e-4):
    feeds = verify.sample_feeds(files.load(before))
    found = verify.equivalent(files.load(before), after, feeds, rtol=tolerance)
    assert found.ok, found
    return found


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-kv", "tiny-gpt", "tiny-bitnet"])
def test_decoders_stay_float_equal(name):
    result = rotated(f"zoo:{name}")
    equal(f"zoo:{name}", result.model)
    texts = [d.message for d in notes(result, "QG211")]
    assert any("(128 channels)" in t for t in texts), "the residual stream"
    heads = [t for t in texts if "heads of" in t]
    # Keys and values that leave the model as a cache may not be rotated.
    assert len(heads) == (0 if name == "tiny-llama-kv" else 5)


def _table(model):
    return next(
        n for n in model.graph if n.op_type == "Gather" and n.inputs[0].is_initializer()
    ).inputs[0]


def test_matrices_are_dense_afterwards():
    """The embedding's rows really are rotated: no channel of the stream is what it was."""
    before = files.load("zoo:tiny-llama")
    after = rotated("zoo:tiny-llama").model
    old, new = (graph.array(_table(m)) for m in (before, after))
    assert np.allclose(np.linalg.norm(old, axis=1), np.linalg.norm(new, axis=1), rtol=1e-5)
    assert np.abs(old - new).max() > 0.1 * np.abs(old).max()


def test_parts_can_be_left_out():
    only_heads = rotated("zoo:tiny-llama", residual=False)
    assert len(notes(only_heads, "QG211")) == 5
    only_stream = rotated("zoo:tiny-llama", heads=False)
    assert len(notes(only_stream, "QG211")) == 1


@pytest.mark.parametrize("matrix", ["hadamard", "pca", "learned"])
def test_samples_choose_the_matrix(matrix):
    data = [{"input_ids": eval_tokens()[None, i : i + 64]} for i in range(0, 256, 64)]
    result = rotated("zoo:tiny-llama", data=data, matrix=matrix, seeds=2)
    equal("zoo:tiny-llama", result.model)
    again = rotated("zoo:tiny-llama", data=data, matrix=matrix, seeds=2)
    assert result.to_proto().SerializeToString() == again.to_proto().SerializeToString()


def test_a_matrix_from_samples_needs_samples():
    with pytest.raises(errors.RecipeError, match="QG305.*needs samples"):
        rotated("zoo:tiny-llama", matrix="pca")


def test_online_transforms_stand_before_what_nothing_reaches():
    result = rotated("zoo:tiny-llama", online=64)
    equal("zoo:tiny-llama", result.model)
    placed = [n for n in result.model.graph if n.op_type == "Hadamard"]
    # 384 = 3 * 128 columns behind each gate: blocks of 64.
    assert len(placed) == 5 == len(notes(result, "QG212"))
    assert all(graph.attribute(n, "block_size", 0) == 64 for n in placed)
    readers = [n for p in placed for n, _ in p.outputs[0].uses()]
    assert [r.op_type for r in readers] == ["MatMul"] * 5


def test_the_result_runs_without_the_library_too(tmp_path):
    result = rotated("zoo:tiny-llama", online=64)
    path = result.save(tmp_path / "r.onnx")
    feeds = verify.sample_feeds(files.load(path))[0]
    with_ops, without = (
        qgraph.session(path, custom_ops=use).run(None, feeds)[0] for use in (True, False)
    )
    assert np.allclose(with_ops, without, atol=1e-4 * np.abs(without).max())


def test_a_target_without_the_operator_gets_no_online_transforms_and_a_warning():
    result = rotated("zoo:tiny-llama", target="openvino", online=64)
    (warning,) = notes(result, "QG216")
    assert warning.severity == "warning" and "has no Hadamard operator" in warning.message
    assert not [n for n in result.model.graph if n.op_type == "Hadamard"]
    assert notes(result, "QG211")


def test_online_blocks_are_powers_of_two():
    with pytest.raises(errors.RecipeError, match="no power of two"):
        rotated("zoo:tiny-llama", online=48)


@pytest.mark.parametrize(
    ("k", "largest", "block"), [(384, 128, 128), (384, 64, 64), (172, 128, 0), (4096, 128, 128)]
)
def test_block_of(k, largest, block):
    assert online_hadamard.block_of(k, largest) == block


def gated(readers=1):
    """x → Sigmoid → products that nothing can be folded into."""
    rng = np.random.default_rng(5)
    b = Builder("g")
    x = b.op("Sigmoid", b.input("x", FLOAT, ["m", 32]))
    for i in range(readers):
        w = b.initializer(f"w{i}", rng.normal(size=(32, 24)).astype("f4"))
        b.output(f"y{i}", b.op("MatMul", x, w), FLOAT, ["m", 24])
    return b.model()


def test_readers_of_one_activation_share_its_transform():
    model = gated(readers=3)
    result = rotated(model, online=32)
    assert [n.op_type for n in result.model.graph].count("Hadamard") == 1
    feeds = verify.sample_feeds(model)
    assert verify.equivalent(model, result.model, feeds, rtol=1e-5).ok


def test_where_nothing_may_be_rotated_it_says_why():
    result = rotated(gated())
    (note,) = notes(result, "QG213")
    assert "nothing may be rotated" in note.message


def test_a_tied_table_is_untied_and_said():
    model = files.load("zoo:tiny-gpt")
    groups = [g for g in symmetry.groups(model, ["rotate"]) if g.legal and g.size == 128]
    assert groups[0].keeps_mean  # LayerNorm: only rotations that keep the mean
    result = rotated("zoo:tiny-gpt")
    equal("zoo:tiny-gpt", result.model)
    (said,) = [d.message for d in notes(result, "QG211") if "(128 channels)" in d.message]
    assert "had to be copied" in said
