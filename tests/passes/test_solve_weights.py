"""Gram matrices from samples to solvers: which weights share one, what is said where there is none, bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

import qgraph
from qgraph import errors, files, numerics, runtime, weights
from qgraph.calibrate import groups
from qgraph.models import data
from qgraph.models.builder import BOOL, FLOAT, Builder

PURE = ["linear.sensitive_share=0.0"]


def samples(count=4):
    tokens = data.eval_tokens()
    return [{"input_ids": tokens[i * 128 : (i + 1) * 128][None]} for i in range(count)]


def linear(model):
    return [w for w in weights.find(model) if w.kinds == ["matmul"] and not w.uses[0].reason]


def test_weights_that_read_one_tensor_share_its_gram_matrix():
    model = files.load("zoo:tiny-llama")
    found = {w.label: groups.inputs_of(w) for w in linear(model)}
    by_input: dict[tuple[str, ...] | str, int] = {}
    for inputs in found.values():
        by_input[inputs] = by_input.get(inputs, 0) + 1
    assert {1, 2, 3} <= set(by_input.values())  # down or output; gate and up; queries, keys, values


def tiny_llama(recipe, **options):
    return qgraph.optimize("zoo:tiny-llama", recipe, overrides=PURE, inspect=False, **options)


@pytest.mark.parametrize("target", ["ort", "ort-qgraph", "openvino"])
def test_int4_gptq_is_nearer_to_the_float_model_than_int4(target):
    from qgraph import evaluate

    tokens = data.eval_tokens()[4096:6144]
    found = {}
    for recipe in ("int4", "int4-gptq"):
        given = samples(16) if recipe == "int4-gptq" else None
        result = tiny_llama(recipe, target=target, data=given)
        assert sum(e.spec.startswith("uint4") for e in result.ledger) >= 10
        compared = evaluate.divergence(
            files.load("zoo:tiny-llama"), result.model, tokens, 128
        ).divergence
        found[recipe] = compared.kl_mean.value
    assert found["int4-gptq"] < 0.85 * found["int4"]


def test_inputs_of_the_quantized_model_are_better_than_those_of_the_float_model():
    from qgraph import evaluate

    tokens = data.eval_tokens()[4096:6144]
    found = {}
    for inputs in ("float", "quantized"):
        recipe = {"extends": "int4-gptq", "options": {"solve-weights": {"inputs": inputs}}}
        result = tiny_llama(recipe, data=samples(24))
        compared = evaluate.divergence(files.load("zoo:tiny-llama"), result.model, tokens, 128)
        found[inputs] = compared.divergence.kl_mean.value
    assert found["quantized"] < 0.97 * found["float"]


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_the_same_codes_each_time(inputs):
    recipe = {"extends": "int4-gptq", "options": {"solve-weights": {"inputs": inputs}}}
    made = [
        tiny_llama(recipe, data=samples(2), threads=threads).to_proto().SerializeToString()
        for threads in (1, 2)
    ]
    assert made[0] == made[1]


def test_without_samples_it_says_what_to_give():
    with pytest.raises(errors.InputError) as caught:
        tiny_llama("int4-gptq")
    found = caught.value.diagnostics[0]
    assert found.code == "QG131" and "--data" in found.hint and "round-descent" in found.where


def test_a_weight_without_gram_matrix_is_named():
    recipe = {
        "name": "all",
        "rules": [{"id": "all", "weights": "int8.ch", "solver": "gptq"}],
        "min_elements": 1,
    }
    result = qgraph.optimize("zoo:tiny-cnn", recipe, data=images(), inspect=False)
    found = [d for d in result.report.diagnostics if d.code == "QG404"]
    assert found and all("Conv" in d.message for d in found)
    assert {d.where for d in found} < {e.label for e in result.ledger}


def images():
    name = files.load("zoo:tiny-cnn").graph.inputs[0].name
    rng = np.random.default_rng(0)
    return [{name: rng.random((1, 1, 8, 8), np.float32)} for _ in range(4)]


def test_a_branch_that_no_sample_takes_is_named():
    rng = np.random.default_rng(0)
    b, then, other = Builder("main"), Builder("then"), Builder("else")
    x, flag = b.input("x", FLOAT, ["batch", 64]), b.input("flag", BOOL, [])
    for branch, op in ((then, "Relu"), (other, "Neg")):
        w = branch.initializer(f"{op}.weight", rng.standard_normal((64, 64)).astype(np.float32))
        branch.output(f"{op}_out", branch.op("MatMul", branch.op(op, x), w))
    chosen = b.op("If", flag, then_branch=then.graph(), else_branch=other.graph())
    b.output("y", chosen, FLOAT, ["batch", 64])
    rows = rng.standard_normal((4, 64)).astype(np.float32)
    result = qgraph.optimize(
        b.model(),
        {"name": "all", "rules": [{"id": "all", "weights": "int4.g32", "solver": "gptq"}]},
        data=[{"x": rows, "flag": np.asarray(True)}],
        inspect=False,
    )
    found = [d for d in result.report.diagnostics if d.code == "QG405"]
    assert [d.where for d in found] == ["Neg.weight"] and "never reach" in found[0].message


@pytest.mark.parametrize("layers", [2, 6])
def test_corrections_of_weights_that_several_layers_share(layers):
    """One matrix cannot make up for what each layer has lost, but for part of it: better than for nothing."""
    rng = np.random.default_rng(0)
    b = Builder("loop")
    h = b.input("x", FLOAT, ["rows", 64])
    first, second = (
        b.initializer(n, (rng.standard_normal((64, 64)) / 5).astype(np.float32)) for n in "vw"
    )
    for _ in range(layers):
        h = b.op("Add", h, b.op("MatMul", b.op("Tanh", b.op("MatMul", h, first)), second))
    b.output("y", h, FLOAT, ["rows", 64])
    model = b.model()
    sizes = np.linspace(0.1, 2, 64)
    data = [{"x": (rng.standard_normal((32, 64)) * sizes).astype(np.float32)} for _ in range(16)]
    test = {"x": (rng.standard_normal((256, 64)) * sizes).astype(np.float32)}
    (want,) = runtime.session(model).run(None, test)
    found = {}
    for inputs in ("float", "quantized"):
        recipe = {
            "name": "loop",
            "rules": [{"ops": ["MatMul"], "weights": "uint2.g32.asym", "solver": "round-descent"}],
            "options": {"solve-weights": {"inputs": inputs}},
            "min_elements": 1,
        }
        made = qgraph.optimize(model, recipe, target="ort", data=data, inspect=False)
        (got,) = runtime.session(made.to_proto()).run(None, test)
        found[inputs] = numerics.sqnr_db(want, got)
    assert found["quantized"] > found["float"] + 0.4
