"""A float model and its twin on the same samples: what is replaced, what the means are, what solvers make of them."""

from __future__ import annotations

import numpy as np
import pytest

import qgraph
from qgraph import files, registry, weights
from qgraph.calibrate import groups
from qgraph.calibrate.groups import Group
from qgraph.calibrate.simulate import Simulated
from qgraph.calibrate.twins import Means, Twins, collect
from qgraph.models import data
from qgraph.passes.solvers import weighted
from qgraph.solver import WeightStats
from qgraph.spec import QTensor, QuantSpec


def samples(count=3):
    tokens = data.eval_tokens()
    return [{"input_ids": tokens[i * 64 : (i + 1) * 64][None]} for i in range(count)]


def linear(model):
    return [w for w in weights.find(model) if w.kinds == ["matmul"] and not w.uses[0].reason]


@pytest.fixture
def model():
    return files.load("zoo:tiny-llama")


@pytest.fixture
def twins(model, tmp_path):
    dataset = qgraph.data.load(samples(), qgraph.data.inputs_of(model))
    return Twins(Simulated(model, {}), dataset, tmp_path, 1, alone=False)


def output(weight):
    return str(weight.uses[0].node.outputs[0].name)


def scaled(weight, factor):
    """A quantized weight that stands for `factor` times the weight, nearly."""
    spec = QuantSpec.parse("int8.ch")
    w = np.float32(factor) * weight.read()
    scale = np.maximum(np.abs(w).max(axis=1, keepdims=True) / 127, 1e-9).astype(np.float32)
    return QTensor(spec, np.rint(w / scale).astype(np.int8), scale)


def group_of(weight):
    inputs = groups.inputs_of(weight)
    assert not isinstance(inputs, str)
    return Group((weight,), inputs, 0)


def test_twins_are_alike_until_a_weight_is_replaced(model, twins):
    first, *_, last = linear(model)
    names = [output(first), output(last)]
    for values in twins.samples(names):
        for name in names:
            np.testing.assert_array_equal(*values[name])
    twins.replace(first, scaled(first, 0))
    for values in twins.samples(names):
        assert values[names[0]][0].any() and not values[names[0]][1].any()
        assert not np.array_equal(*values[names[1]])
    assert first.read().any()  # the model that was given is as it was


def test_means_are_those_of_the_two_models(model, twins):
    found = linear(model)
    first = found[0]
    last = next(
        w for w in reversed(found) if w.shape[1] > w.shape[0]
    )  # down to the residual stream
    twins.replace(first, scaled(first, 0.5))
    group = group_of(last)
    halves = collect(twins, group)
    assert [half.rows for half in halves] == [2 * 64, 64]
    means, rest = halves
    means.take(rest)
    stream = last.uses[0].node.outputs[0].uses()[0][0]
    other = next(v for v in stream.inputs if v.name != output(last)).name
    pairs = list(twins.samples([group.inputs[0], other]))
    x, seen, r, other_r = (
        np.concatenate([p[name][side].reshape(-1, p[name][side].shape[-1]) for p in pairs])
        for name, side in ((group.inputs[0], 0), (group.inputs[0], 1), (other, 0), (other, 1))
    )
    x, seen = x.astype(np.float64), seen.astype(np.float64)
    rows = len(x)
    assert means.rows == rows == 3 * 64
    np.testing.assert_allclose(means.gram, seen.T @ seen / rows, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(means.cross, x.T @ seen / rows, rtol=1e-9, atol=1e-11)
    lost = (r.astype(np.float64) - other_r).T @ seen / rows
    np.testing.assert_allclose(means.offsets[last.name], lost, rtol=1e-9, atol=1e-11)


def test_alone_only_the_gram_matrix_is_made(model, tmp_path):
    dataset = qgraph.data.load(samples(), qgraph.data.inputs_of(model))
    alone = Twins(Simulated(model, {}), dataset, tmp_path, 1, alone=True)
    means, rest = collect(alone, group_of(linear(model)[-1]))
    means.take(rest)
    assert means.rows == 3 * 64 and means.gram is not None
    assert means.cross is None and means.offsets == {}


def test_what_is_not_added_to_anything_has_no_offset(model, twins):
    assert [half.offsets for half in collect(twins, group_of(linear(model)[0]))] == [{}, {}]


def pair(n=24, k=64, rows=1500, noise=0.3):
    """Weights, inputs of the float model and of the quantized one, and what is lost in the stream."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, k)) @ (rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k))
    seen = x + noise * (x @ rng.standard_normal((k, k)) / np.sqrt(k))
    lost = seen @ rng.standard_normal((k, n)) * 0.01 + 0.01 * rng.standard_normal((rows, n))
    w = (0.05 * rng.standard_normal((n, k))).astype(np.float32)
    return w, x, seen, lost


def stats_of(x, seen, lost):
    means = Means()
    means.add((x, seen), {"w": (lost, np.zeros_like(lost))})
    found = means.finish().stats("w")
    assert found is not None
    return found


@pytest.mark.parametrize("text", ["uint4.g32", "int4.ch", "uint2.g16.asym", "int8.tensor"])
@pytest.mark.parametrize("name", ["gptq", "round-descent"])
def test_solvers_make_up_for_what_was_lost_before(name, text):
    w, x, seen, lost = pair()
    whole = stats_of(x, seen, lost)
    spec = QuantSpec.parse(text)
    wanted = x @ w.T + lost

    def off(stats):
        solver = registry.get("solver", name)()
        q = solver.solve(w, spec, stats, np.random.default_rng(0))
        q.check()
        return float(np.square(wanted - seen @ q.dequantize().T).mean())

    plain = WeightStats(gram=whole.gram)
    without_offset = WeightStats(gram=whole.gram, cross=whole.cross)
    assert off(whole) < off(without_offset) < off(plain)


def test_without_a_difference_the_target_is_the_weight():
    w, x, _, lost = pair()
    whole = stats_of(x, x, 0 * lost)
    q = [
        registry.get("solver", "gptq")().solve(
            w, QuantSpec.parse("uint4.g32"), stats, np.random.default_rng(0)
        )
        for stats in (whole, WeightStats(gram=whole.gram))
    ]
    np.testing.assert_allclose(q[0].dequantize(), q[1].dequantize(), atol=1e-6)


def test_no_rows_say_nothing_and_add_nothing():
    x = np.ones((3, 2))
    full = Means()
    full.add((x, x), {})
    empty = Means()
    empty.take(full.finish())
    empty.take(Means().finish())
    assert empty.rows == 3 and np.array_equal(empty.gram, np.ones((2, 2)))
    assert Means().finish().stats("w") is None


def test_few_rows_are_believed_less():
    shares = []
    for rows in (50, 400, 8000):
        w, x, seen, lost = pair(rows=2 * rows)
        lost = lost + np.random.default_rng(1).standard_normal(lost.shape)
        parts = slice(0, rows), slice(rows, None)
        first, second = (stats_of(x[part], seen[part], lost[part]) for part in parts)
        shares.append(weighted.shrinkage(w, (first, second), 0.01))
    assert shares == sorted(shares) and shares[0] < 0.3 and shares[-1] > 0.8


def test_noise_alone_is_not_believed():
    w, x, _, _ = pair(rows=400)
    noise = np.random.default_rng(1).standard_normal((400, len(w)))
    halves = [stats_of(x[part], x[part], noise[part]) for part in (slice(0, 200), slice(200, 400))]
    assert weighted.shrinkage(w, (halves[0], halves[1]), 0.01) < 0.1
    still = stats_of(x, x, 0 * noise)
    assert weighted.shrinkage(w, (still, still), 0.01) == 0
