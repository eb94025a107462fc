"""Groups of whole models: a table of what has to be found, and every fold proven."""

import os
from collections import Counter
from pathlib import Path

import pytest

from qgraph import models
from qgraph.models.odd import ODD

DATA = Path(os.environ.get("QGRAPH_TEST_DATA", ""))
needs_data = pytest.mark.skipif(not DATA.name, reason="QGRAPH_TEST_DATA is not set")

DECODER = {  # layers, width, key heads, head, hidden units: what a decoder with gated MLP and rotary positions has
    ("permute", "permutation"): lambda n, d, h, k, f: {(1, d): 1, (h, k): n, (1, f): n},
    ("scale", "diagonal"): lambda n, d, h, k, f: {(1, d): 2 * n + 1, (1, h * k): n, (1, f): n},
    ("scale", ""): lambda n, d, h, k, f: {(1, d): 1, (1, h * k // 2): n},  # pairs of q and k
    ("rotate", "orthogonal"): lambda n, d, h, k, f: {(1, d): 1, (h, k): n},
    ("rotate", ""): lambda n, d, h, k, f: {(h, k // 2): n, (1, f): n},
}


def table(groups, kind, legal):
    """How many groups of each form [B, n] there are."""
    return dict(Counter(g.blocks.shape for g in groups if (g.kind, g.legal) == (kind, legal)))


def test_llama(proven):
    """Grouped heads, rotary positions, RMSNorm in pieces, gated MLP, untied head."""
    groups = proven(models.build("tiny-llama"))
    for key, expected in DECODER.items():
        assert table(groups, *key) == expected(5, 128, 4, 16, 384), key
    (residual,) = [g for g in groups if g.kind == "rotate" and g.size == 128]
    assert len(residual.writers) == 1 + 2 * 5  # the table, and what each layer adds twice
    assert len(residual.readers) == 5 * 5 + 1  # q, k, v, gate, up of each layer, and the head
    assert len(residual.gains) == 2 * 5 + 1
    assert not residual.keeps_mean


def test_llama_with_a_cache(proven):
    """The residual stream is free; values are not, since the caller keeps them."""
    groups = proven(models.build("tiny-llama-kv"))
    assert table(groups, "rotate", "orthogonal") == {(1, 128): 1}
    assert table(groups, "rotate", "") == {(4, 8): 5, (4, 16): 5, (1, 384): 5}
    assert table(groups, "scale", "diagonal") == {(1, 128): 11, (1, 384): 5}
    value = next(g for g in groups if g.kind == "rotate" and g.blocks.shape == (4, 16))
    assert "past_key_values" in value.reason and "is not transformed" in value.reason


def test_gpt(proven):
    """LayerNorm, biases, fused q, k, v, tied table; without rotary positions q and k rotate too."""
    groups = proven(models.build("tiny-gpt"))
    assert table(groups, "rotate", "orthogonal") == {(1, 128): 1, (8, 16): 10}
    assert table(groups, "rotate", "") == {(1, 512): 5}
    assert table(groups, "permute", "permutation") == {(1, 128): 1, (8, 16): 10, (1, 512): 5}
    assert table(groups, "scale", "diagonal") == {(1, 128): 2 * 5 + 1 + 5}
    residual = next(g for g in groups if g.kind == "rotate" and g.size == 128 and g.block == 128)
    assert residual.keeps_mean
    assert {m.value.name for m in residual.writers} >= {"wte.weight", "wpe.weight"}
    assert "wte.weight" in {m.value.name for m in residual.readers}
    hidden = next(g for g in groups if g.kind == "scale" and g.size == 512)
    assert (hidden.legal, hidden.reason) == ("", "Gelu is not linear")


def test_cnn(proven):
    groups = proven(models.build("tiny-cnn"))
    assert table(groups, "scale", "positive") == {(1, 32): 2, (1, 64): 3}
    assert table(groups, "scale", "diagonal") == {(1, 96): 1}
    assert table(groups, "rotate", "orthogonal") == {(1, 96): 1}
    assert table(groups, "permute", "permutation") == {(1, 32): 1, (1, 64): 2, (1, 96): 1}
    assert sum(len(g.bounds) for g in groups if g.kind == "scale") == 2


@pytest.mark.parametrize("name", sorted(ODD))
def test_odd_graphs(proven, name):
    """Whatever is found there may be folded."""
    proven(ODD[name]())


@needs_data
def test_stories(proven):
    """Exported by torch: names lost, rotary pairs by Gather, tied table, Reciprocal of a Sqrt."""
    groups = proven(DATA / "lm/stories260K/stories260K.onnx")
    assert table(groups, "rotate", "orthogonal") == {(1, 64): 1, (4, 8): 5}
    assert table(groups, "scale", "diagonal") == {(1, 64): 11, (1, 32): 5, (1, 172): 5}
    residual = next(g for g in groups if g.kind == "rotate" and g.size == 64 and g.legal)
    assert (len(residual.writers), len(residual.readers), len(residual.gains)) == (11, 26, 11)


@needs_data
def test_minilm(proven):
    """Norms stand on the residual stream: it may not rotate, heads may."""
    groups = proven(DATA / "encoder/minilm_l6_v2/minilm_l6_v2.onnx")
    assert table(groups, "rotate", "orthogonal") == {(12, 32): 12}  # q with k, v
    assert table(groups, "rotate", "") == {(1, 384): 1, (1, 1536): 6}
    assert table(groups, "scale", "diagonal") == {(1, 384): 6}
    assert table(groups, "permute", "permutation") == {(12, 32): 12, (1, 1536): 6}
    residual = next(g for g in groups if g.kind == "rotate" and g.block == 384)
    assert residual.forbids.op_type == "LayerNormalization"
    assert residual.reason == "'last_hidden_state' is an output of the model"
    norm = next(g for g in groups if g.kind == "scale" and g.writers[0].value.name == "n.weight")
    assert (norm.legal, norm.reason) == ("", "normalises over the channels")


@needs_data
def test_shared_layers(proven):
    """ALBERT: one set of weights for all layers is transformed once."""
    groups = proven(DATA / "lm/rxnmapper_albert/rxnmapper_albert.onnx")
    rotations = [g for g in groups if g.kind == "rotate" and g.legal]
    assert rotations
    assert max(len(g.writers) for g in rotations) >= 12


@needs_data
def test_mobilenet(proven):
    """Linear bottlenecks rotate and have any scale; hidden layers between Relu6 have positive ones."""
    groups = proven(DATA / "vision/mobilenetv2_tf/mobilenetv2_1.0_224_tf.onnx")
    assert sum(table(groups, "scale", "diagonal").values()) == 7
    assert sum(table(groups, "scale", "positive").values()) == 35
    assert sum(table(groups, "rotate", "orthogonal").values()) == 7
    assert sum(table(groups, "permute", "permutation").values()) == 25


@needs_data
@pytest.mark.parametrize(
    ("path", "legal"),
    [
        ("vision/cifar_resnet/resnet20.onnx", (12, 12, 0)),
        ("vision/squeezenet1.1/squeezenet1.1.onnx", (25, 25, 0)),
        ("vision/mnist/mnist.onnx", (2, 2, 0)),
        ("vision/mobilenetv2_cifar_probe/mobilenetv2_cifar_probe.onnx", (26, 43, 7)),
        ("other/silero_vad/silero_vad_16k_op15.onnx", (3, 3, 0)),
    ],
)
def test_convolutional_nets(proven, path, legal):
    groups = proven(DATA / path)
    kinds = ("permute", "scale", "rotate")
    assert tuple(sum(g.kind == k and bool(g.legal) for g in groups) for k in kinds) == legal
