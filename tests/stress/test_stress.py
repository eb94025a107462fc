"""Outliers injected into models: plain INT8 collapses; smoothed or rotated they are as good as without outliers.

KL divergence to the float model, on few tokens. MiniLM gives no logits: there the squared error of its sentences,
relative to their squared norm. QGRAPH_FULL=1 adds the other halves of decoders in four bits and of MiniLM.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import evaluate, files, models, recipe, verify
from qgraph.evaluate import distributions
from qgraph.models.data import digits

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))
import outliers
import real_data

FULL = os.environ.get("QGRAPH_FULL") == "1"
STORIES, MINILM = "lm/stories260K", "encoder/minilm_l6_v2"
RESNET = "vision/cifar_resnet/resnet20.onnx"


def changed(base: str, *first: str, **options: Any) -> dict[str, Any]:
    """A recipe with these passes behind canonicalize instead of those that it has for outliers."""
    made = recipe.load(base).model_dump()
    held = [p for p in made["pipeline"] if p not in ("equalize", "smooth", "rotate")]
    made["pipeline"] = (held[0], *first, *held[1:])
    made["options"] = {k: v for k, v in made["options"].items() if k in held} | options
    return made | {"name": "changed"}


ROTATED = ("equalize", "rotate")


class Decoder:
    """Texts, and the divergence that quantizing a model costs."""

    def __init__(self, name: str) -> None:
        if name == "stories260K":
            tokenizer = f"{STORIES}/tok512.bin"
            self.reference = files.load(real_data.data(f"{STORIES}/stories260K.onnx"))
            encoder = real_data.SentencePieces(real_data.data(tokenizer))
            text = real_data.data("text/tinystories/tinystories_0_699.json").read_text("utf-8")
            fed = [encoder.encode(s)[:256] for s in json.loads(text)[:16]]
            self.texts, self.context = [t[:256] for t in real_data.story_tokens(tokenizer, 4)], 256
        else:
            self.reference, self.context = models.build(name), 128
            tokens = models.eval_tokens(name)
            cut = [tokens[i * 128 : (i + 1) * 128] for i in range(20)]
            fed, self.texts = cut[:12], cut[12:18]
        self.data = [{"input_ids": np.asarray(t, np.int64)[None]} for t in fed]

        self._usual: dict[str, float] = {}
        self._stressed: dict[str, ir.Model] = {}

    def stressed(self, kind: str) -> ir.Model:
        if kind not in self._stressed:
            self._stressed[kind] = stressed(self.reference, kind, 10)
        return self._stressed[kind]

    def usual(self, how: str) -> float:
        """Of the model without outliers."""
        if how not in self._usual:
            self._usual[how] = self.kl(self.reference, how)
        return self._usual[how]

    def kl(self, model: ir.Model, how: Any) -> float:
        work = outliers.canonical(model)
        data = self.data if "observe" in recipe.load(how).pipeline else None
        made = qgraph.optimize(work, how, data=data, verify="off", inspect=False).model
        found = evaluate.divergence(self.reference, made, self.texts, self.context)
        return float(found.divergence.kl_mean.value)


@functools.cache
def decoder(name: str) -> Decoder:
    try:
        return Decoder(name)
    except real_data.MissingData as e:
        pytest.skip(str(e))


def stressed(model: ir.Model, kind: str, least: int) -> ir.Model:
    """With outliers in `least` groups at least, and proven to compute the same."""
    made, count = outliers.inject(model, kind)
    assert count >= least
    same = verify.equivalent(model, made, verify.sample_feeds(model), rtol=1e-4)
    assert same.ok, same.reason
    return made


both = pytest.mark.parametrize(
    ("name", "kind"), [("tiny-llama", "norms"), ("stories260K", "values")]
)


@both
def test_decoders_in_dynamic_int8(name, kind):
    d = decoder(name)
    stress, usual = d.stressed(kind), d.usual("int8-dynamic")
    assert d.kl(stress, "int8-dynamic") > 10 * usual
    assert d.kl(stress, changed("int8-dynamic", *ROTATED)) < 1.5 * usual


def test_a_decoder_in_static_int8():
    """tiny-llama and tiny-gpt are in tests/passes/test_smooth.py."""
    d = decoder("stories260K")
    stress, usual = d.stressed("norms"), d.usual("int8-static")
    assert d.kl(stress, "int8-static") > 5 * usual
    smooth = changed("int8-smooth", "smooth", smooth={"alpha": 0.5})
    assert d.kl(stress, smooth) < 1.5 * usual


FOUR_BITS = [
    ("tiny-llama", "norms", "w4a4"),
    ("stories260K", "values", "w4a8-rotated"),
    ("tiny-llama", "norms", "w4a8-rotated"),
    ("stories260K", "values", "w4a4"),
]


@pytest.mark.parametrize(("name", "kind", "base"), FOUR_BITS if FULL else FOUR_BITS[:2])
def test_decoders_in_four_bits(name, kind, base):
    """Half of what there is without rotation, and (nearly) what there is without outliers."""
    d = decoder(name)
    stress = d.stressed(kind)
    rotated = d.kl(stress, base)
    assert rotated < 0.5 * d.kl(stress, changed(base))
    assert rotated < 1.1 * d.usual(base)


def test_rotation_alone_undoes_outliers_of_norms():
    """Without evening out channels first."""
    d = decoder("tiny-llama")
    alone = changed("w4a4", "rotate", rotate={"online": 128})
    found = d.kl(d.stressed("norms"), alone)
    assert found < 0.5 * d.kl(d.stressed("norms"), changed("w4a4"))
    assert found < 1.1 * d.kl(d.reference, alone)


def outputs(model: ir.Model, feeds: list[dict[str, Any]]) -> list[Any]:
    session = qgraph.session(model)
    return [session.run(None, f)[0] for f in feeds]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "dynamic",
        pytest.param("static", marks=pytest.mark.skipif(not FULL, reason="set QGRAPH_FULL=1")),
    ],
)
def test_minilm(kind):
    """Post-norm: the stream takes the norms' outputs too, where a Mul divides it."""
    pytest.importorskip("tokenizers")
    try:
        reference = files.load(real_data.data(f"{MINILM}/minilm_l6_v2.onnx"))
        first, second, _ = real_data.sts_pairs(16)
    except real_data.MissingData as e:
        pytest.skip(str(e))
    data = [f for _, f in real_data.sentence_batches(first, size=8)]
    feeds = [f for _, f in real_data.sentence_batches(second, size=8)]
    stress = stressed(reference, "norms", 12)
    expected = outputs(reference, feeds)

    def error(model: ir.Model, how: Any) -> float:
        static = "observe" in recipe.load(how).pipeline
        made = qgraph.optimize(
            outliers.canonical(model),
            how,
            data=data if static else None,
            verify="off",
            inspect=False,
        )
        off, power = 0.0, 0.0
        for feed, a, b in zip(feeds, expected, outputs(made.model, feeds), strict=True):
            mask = feed["attention_mask"][..., None].astype(np.float64)
            off += float((mask * np.square(a - b, dtype=np.float64)).sum())
            power += float((mask * np.square(a, dtype=np.float64)).sum())
        return off / power

    usual = error(reference, f"int8-{kind}")
    if kind == "dynamic":
        assert error(stress, "int8-dynamic") > 4 * usual
        assert error(stress, changed("int8-dynamic", *ROTATED)) < 1.5 * usual
    else:
        smooth = changed("int8-smooth", "smooth", smooth={"insert": True, "alpha": 0.5, "rows": 64})
        assert error(stress, "int8-static") > 2 * usual
        assert error(stress, smooth) < 1.5 * usual


def test_depthwise_convolutions():
    """tiny-cnn: depthwise convolutions, and Clips whose bounds the outliers made one for each channel."""
    reference = models.build("tiny-cnn")
    fed, seen = (digits(held_out=h)[0] for h in (False, True))
    data, feeds = [{"image": fed[i : i + 24]} for i in range(0, 120, 24)], [{"image": seen}]
    stress = stressed(reference, "channels", 6)
    (expected,) = (distributions.log_softmax(y) for y in outputs(reference, feeds))

    def kl(model: ir.Model, how: Any) -> float:
        work = outliers.canonical(model)
        made = qgraph.optimize(work, how, data=data, verify="off", inspect=False)
        (found,) = (distributions.log_softmax(y) for y in outputs(made.model, feeds))
        return float(distributions.kl_divergence(expected, found).mean())

    usual = kl(reference, "int8-static")
    assert kl(stress, "int8-static") > 50 * usual
    assert kl(stress, changed("int8-smooth", "smooth", smooth={"alpha": 0.7})) < 1.5 * usual
    assert kl(stress, changed("int8-static", "equalize")) < 1.5 * usual


def test_convolutions():
    """A residual net with shortcuts that pad channels: its stream is read with channels of other stages."""
    try:
        reference = files.load(real_data.data(RESNET))
        images = [x for x, _ in real_data.cifar(None, 100)]
    except real_data.MissingData as e:
        pytest.skip(str(e))
    name = reference.graph.inputs[0].name
    data, feeds = [{name: images[0][:24]}], [{name: x} for x in images[1:]]
    stress = stressed(reference, "channels", 12)
    expected = [distributions.log_softmax(y) for y in outputs(reference, feeds)]

    def kl(model: ir.Model, how: Any) -> float:
        made = qgraph.optimize(
            outliers.canonical(model), how, data=data, verify="off", inspect=False
        )
        found = [distributions.log_softmax(y) for y in outputs(made.model, feeds)]
        each = [distributions.kl_divergence(p, q) for p, q in zip(expected, found, strict=True)]
        return float(np.concatenate(each).mean())

    usual = kl(reference, "int8-static")
    assert kl(stress, "int8-static") > 50 * usual
    smooth = changed("int8-smooth", "smooth", smooth={"alpha": 0.5, "rows": 128})
    assert kl(stress, smooth) < 1.5 * usual
