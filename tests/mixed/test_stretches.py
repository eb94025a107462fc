"""A model that is run stretch by stretch gives what it gives in one session, and runs no more of it than it must."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qgraph import files, registry, weights
from qgraph.evaluate.reference import Expected
from qgraph.mixed import stretches
from qgraph.mixed.mixtures import Mixtures, loss
from qgraph.models import data
from qgraph.runtime import sessions
from qgraph.spec import QuantSpec

SPEC = "int4.g32"
BRANCHES = """<ir_version: 10, opset_import: ["" : 21]>
g (float[t, 32] x, bool c) => (float[t, 32] early, float[t, 32] late) {
    a = MatMul(x, A)
    early = MatMul(a, B)
    b = If (c) <then_branch = then () => (float[t, 32] yes) { yes = MatMul(a, C) },
                else_branch = other () => (float[t, 32] no) { no = Identity(early) }>
    d = MatMul(b, D)
    s = Add(d, a)
    late = MatMul(s, E)
}"""


def tokens(count=3, length=24):
    found = data.eval_tokens()
    return [{"input_ids": found[i * length : (i + 1) * length][None]} for i in range(count)]


def branches():
    """Outputs from the middle, a value that is needed much later, and a weight in a body."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(BRANCHES)
    for name in "ABCDE":
        array = rng.standard_normal((32, 32)).astype(np.float32) / 4
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    x = [rng.standard_normal((4, 32)).astype(np.float32) for _ in range(4)]
    return model, [{"x": v, "c": np.array(i % 2 == 0)} for i, v in enumerate(x)]


CASES = {
    "tiny-llama": lambda: (files.load("zoo:tiny-llama"), tokens()),
    "branches": branches,
}


def quantized(found):
    """Each weight rounded to nearest."""
    solver = registry.get("solver", "rtn")()
    spec = QuantSpec.parse(SPEC)
    rng = np.random.default_rng(0)
    return {(w.name, SPEC): solver.solve(np.asarray(w.read()), spec, None, rng) for w in found}


def runners(text, arrays, samples, folder, monkeypatch, most):
    """What runs a model in one session, and what stretch by stretch if it can."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    for output in proto.graph.output:
        if output.name == "logits":
            output.type.tensor_type.ClearField("shape")
    made = []
    for large in (1 << 40, 0):
        path = files.save(ir.from_proto(proto), folder / f"{large}.onnx", external_data=True)
        monkeypatch.setattr(sessions, "LARGE", large)
        monkeypatch.setattr(stretches, "WEIGHTS", most)
        made.append(stretches.runner(files.load(path), samples, folder, 1))
    return made


def test_constants_of_bodies_stay_their_own_where_they_share_a_name(tmp_path, monkeypatch):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[t, 32] x, bool c) => (float[t, 4] y) {
        a = MatMul(x, A)
        b = MatMul(a, B)
        y = If (c) <then_branch = then () => (float[t, 4] yes) <int64[4] at = {0, 1, 2, 3}>
                       { yes = Gather <axis = 1> (b, at) },
                    else_branch = other () => (float[t, 4] no) <int64[4] at = {9, 8, 7, 6}>
                       { no = Gather <axis = 1> (b, at) }>
    }"""
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal((32, 32)).astype(np.float32) for n in "AB"}
    x = rng.standard_normal((3, 32)).astype(np.float32)
    samples = [{"x": x, "c": np.array(c)} for c in (True, False)]
    whole, cut = runners(text, arrays, samples, tmp_path, monkeypatch, 4096)
    assert isinstance(cut, stretches.Stretches) and len(cut._stretches) > 1
    for one, other in zip(whole.outputs({}), cut.outputs({}), strict=True):
        np.testing.assert_allclose(other[0], one[0], rtol=1e-5)


def test_predictions_are_known_without_stated_shapes(tmp_path, monkeypatch):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[t, 32] x) => (float[t, 32] logits, float[t, 1] score_of_one) {
        a = MatMul(x, A)
        logits = MatMul(a, B)
        score_of_one = MatMul(a, C)
    }"""
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal((32, 32)).astype(np.float32) for n in "AB"}
    arrays["C"] = arrays["A"][:, :1].copy()
    samples = [{"x": rng.standard_normal((3, 32)).astype(np.float32)}]
    made = runners(text, arrays, samples, tmp_path, monkeypatch, 4096)
    for runner in made:
        outputs = list(runner.outputs({}))
        assert Expected(runner.declared, outputs).predictions == ["logits"]
    assert isinstance(made[1], stretches.Stretches)


@pytest.mark.parametrize("output", ["same = Identity(x)", "same = Cast <to = 8> (x)"])
def test_what_no_file_keeps_between_stretches_runs_as_a_whole(output, tmp_path, monkeypatch):
    """Outputs of strings, and those that are inputs."""
    kind = "string" if "Cast" in output else "float"
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[t, 32] x) => ({kind}[t, 32] same, float[t, 32] y) {{ {output} y = MatMul(x, A) }}"""
    if kind == "float":
        text = text.replace("[t, 32] same", "[t, 32] x").replace(output, "")
    arrays = {"A": np.eye(32, dtype=np.float32)}
    samples = [{"x": np.ones((2, 32), np.float32)}]
    whole, cut = runners(text, arrays, samples, tmp_path, monkeypatch, 1)
    assert isinstance(cut, stretches.Whole)
    for one, other in zip(whole.outputs({}), cut.outputs({}), strict=True):
        np.testing.assert_array_equal(one[1], other[1])


def both(case, tmp_path, monkeypatch, most):
    """The same mixtures measured in one session, and stretch by stretch."""
    model, samples = CASES[case]()
    found = [w for w in weights.find(model) if not w.uses[0].reason and w.shape[1] % 32 == 0]
    made = []
    for name, large in (("whole", 1 << 40), ("cut", 0)):
        monkeypatch.setattr(sessions, "LARGE", large)
        monkeypatch.setattr(stretches, "WEIGHTS", most)
        (tmp_path / name).mkdir()
        made.append(Mixtures(model, found, samples, (), tmp_path / name, 1, loss))
        made[-1].know(quantized(found))
    return found, *made


@pytest.mark.parametrize(("case", "most"), [("tiny-llama", 200 << 10), ("branches", 5000)])
def test_mixtures_measure_the_same_stretch_by_stretch(case, most, tmp_path, monkeypatch):
    found, whole, cut = both(case, tmp_path, monkeypatch, most)
    assert isinstance(whole._runner, stretches.Whole)
    assert isinstance(cut._runner, stretches.Stretches) and len(cut._runner._stretches) >= 4
    assert cut.has_predictions == whole.has_predictions
    names = [w.name for w in found]
    mixtures = [names, names[:1], names[-1:], names[len(names) // 2 :], names[::2], names[:1], []]
    for held in mixtures:
        specs = dict.fromkeys(held, SPEC)
        expected = whole.halves(specs)
        assert any(expected) == bool(held)
        np.testing.assert_allclose(cut.halves(specs), expected, rtol=5e-3, atol=1e-9)


def test_only_what_differs_is_run_again(tmp_path, monkeypatch):
    found, _, cut = both("tiny-llama", tmp_path, monkeypatch, 200 << 10)
    names = [w.name for w in found]
    ran = []
    run = stretches.Stretches._run
    monkeypatch.setattr(
        stretches.Stretches, "_run", lambda *args: (ran.append(args[1]), run(*args))[1]
    )
    count = len(cut._runner._stretches)

    def ran_for(specs):
        ran.clear()
        result = cut.halves(specs)
        return result, list(ran)

    base = dict.fromkeys(names, SPEC)
    last = {names[-1]: SPEC}
    _, all_of_them = ran_for({names[0]: SPEC})
    assert all_of_them == list(range(all_of_them[0], count)) and all_of_them[0] <= 1
    assert ran_for(last)[1] == [count - 1]  # as in the float model until there
    without = {n: s for n, s in base.items() if n != names[-1]}
    assert ran_for(without)[1] == all_of_them
    cut.stay_near(base)
    near = {n: s for n, s in base.items() if n != names[-2]}
    measured, again = ran_for(near)
    assert again == list(range(again[0], count)) and again[0] > count / 2
    assert ran_for(base)[1] == []  # known
    middle = {n: s for n, s in base.items() if n != names[len(names) // 2]}
    cut.stay_near(middle)  # what was kept before is forgotten, but not what both have
    ran.clear()
    np.testing.assert_allclose(cut._measured(near, keep=False), measured, rtol=1e-6)
    assert min(ran) > 0
    held = {place for kept in cut._runner._kept for place in kept.places}
    assert set(cut._runner._folder.iterdir()) == held
