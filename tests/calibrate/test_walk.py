"""Stretch by stretch the values are those of a whole run, each node runs once, and roundings are what kernels do."""

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import cuts, files, graph, runtime, weights
from qgraph import recipe as recipes
from qgraph.calibrate import groups
from qgraph.calibrate import walk as walks
from qgraph.calibrate.groups import Group
from qgraph.calibrate.simulate import simulate
from qgraph.calibrate.twins import Twins, collect
from qgraph.calibrate.walk import Walk
from qgraph.data import inputs_of, load
from qgraph.models import data
from qgraph.pipeline import Context, Pipeline


def tokens(count=3, length=32):
    found = data.eval_tokens()
    return [{"input_ids": found[i * length : (i + 1) * length][None]} for i in range(count)]


def reference(model, names, feeds):
    work = graph.clone(model)
    values = {v.name: v for n in work.graph for v in n.outputs}
    work.graph.outputs[:] = [values[n] for n in names]
    graph.remove_dead(work)
    session = runtime.session(work, threads=1, accuracy_level=1)
    return [session.run(None, feed) for feed in feeds]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt"])
def test_values_are_those_of_a_whole_run(name, tmp_path):
    model = files.load(f"zoo:{name}")
    feeds = tokens()
    walk = Walk(model, load(feeds, inputs_of(model)), tmp_path, 1)
    places = [walk.order.place(u.node) for w in weights.find(model) for u in w.uses]
    for place in sorted(set(places))[::3]:
        walk.step(place)
        assert walk.place == place
        names = [str(v.name) for v in walk.order.alive(place) if v.producer() is not None][-3:]
        names += [str(walk.order.nodes[place].outputs[0].name)]
        for got, want in zip(walk.values(names), reference(model, names, feeds), strict=True):
            for each, expected in zip(names, want, strict=True):
                np.testing.assert_allclose(got[each], expected, rtol=2e-4, atol=2e-5)


def test_what_lies_before_is_not_run_again(tmp_path, monkeypatch):
    model = files.load("zoo:tiny-llama")
    walk = Walk(model, load(tokens(), inputs_of(model)), tmp_path, 1)
    ran: list[int] = []
    extract = ir.convenience.extract

    def counted(*args):
        part = extract(*args)
        ran.append(len(part))
        return part

    monkeypatch.setattr(ir.convenience, "extract", counted)
    for place in range(0, len(walk.order.nodes), 7):
        walk.step(place)
    assert sum(ran) <= len(walk.order.nodes)


def test_a_long_way_is_cut_so_that_few_weights_are_needed_at_once(tmp_path, monkeypatch):
    model = files.load("zoo:tiny-llama")
    dataset = load(tokens(), inputs_of(model))
    monkeypatch.setattr(walks, "WEIGHTS", 200 << 10)
    needed: list[int] = []
    save = files.save

    def watched(part, *args, **kwargs):
        needed.append(files.weight_bytes(part))
        return save(part, *args, **kwargs)

    monkeypatch.setattr(files, "save", watched)
    walk = Walk(model, dataset, tmp_path, 1)
    end = len(walk.order.nodes) - 1
    walk.step(end)
    largest = max(v.const_value.nbytes for _, v in graph.initializers(model))
    assert walk.place == end and len(needed) > 4
    assert max(needed) <= max(200 << 10, largest + 4096) < files.weight_bytes(model) / 3
    name = str(walk.order.nodes[end].outputs[0].name)
    for got, want in zip(walk.values([name]), reference(model, [name], tokens()), strict=True):
        np.testing.assert_allclose(got[name], want[0], rtol=2e-4, atol=2e-5)


def test_values_that_were_left_are_those_that_are_entered(tmp_path):
    model = files.load("zoo:tiny-llama")
    dataset = load(tokens(), inputs_of(model))
    place = cuts.Order(model).place(weights.find(model)[9].uses[0].node)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (Walk(model, dataset, tmp_path / n, 1) for n in "ab")
    first.step(place)
    first.leave(tmp_path / "left")
    second.enter(place, tmp_path / "left")
    names = [str(v.name) for v in first.order.alive(place)]
    for here, there in zip(first.values(names), second.values(names), strict=True):
        assert all(np.array_equal(here[n], there[n]) for n in names)


def planned(recipe, target):
    model = files.load("zoo:tiny-llama")
    chosen = recipes.load(recipe)
    ctx = Context(qgraph.registry.get("target", target), chosen)
    Pipeline(["canonicalize", "assign-precision"]).run(model, ctx)
    return model, ctx


@pytest.mark.parametrize(
    ("recipe", "target", "levels"),
    [("w4a8", "ort-qgraph", 127), ("int8-dynamic", "ort", 255), ("int4", "ort", 0)],
)
def test_operators_read_what_their_kernels_round(recipe, target, levels, tmp_path):
    model, ctx = planned(recipe, target)
    simulated = simulate(model, ctx.plan, ctx.target)
    assert bool(simulated.origins) == bool(levels)
    if not levels:
        return
    feeds = tokens(1)
    walk = Walk(simulated.model, load(feeds, inputs_of(model)), tmp_path, 1)
    rounded, origin = next(iter(simulated.origins.items()))
    (values,) = walk.values([rounded, origin])
    x, seen = values[origin], values[rounded]
    assert not np.array_equal(x, seen)
    if levels == 255:
        low, high = min(x.min(), 0), max(x.max(), 0)
        assert np.abs(x - seen).max() <= (high - low) / 255 * 0.51
        return
    blocks = x.reshape(-1, 32)
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    expected = np.rint(blocks * (127 / peak)) * (peak / 127)
    np.testing.assert_allclose(seen.reshape(-1, 32), expected, rtol=1e-5, atol=1e-6)


def test_the_float_side_rounds_nothing(tmp_path):
    model, ctx = planned("w4a8", "ort-qgraph")
    simulated = simulate(model, ctx.plan, ctx.target)
    plain = simulated.plain()
    feeds = tokens(1)
    session = runtime.session(model, threads=1)
    whole = session.run(None, feeds[0])[0]
    walk = Walk(plain, load(feeds, inputs_of(model)), tmp_path, 1)
    (values,) = walk.values([str(plain.graph.outputs[0].name)])
    np.testing.assert_allclose(next(iter(values.values())), whole, rtol=2e-4, atol=2e-4)


def test_solvers_see_rounded_inputs_and_what_rounding_lost(tmp_path):
    model, ctx = planned("w4a8", "ort-qgraph")
    simulated = simulate(model, ctx.plan, ctx.target)
    dataset = load(tokens(2), inputs_of(model))
    twins = Twins(simulated, dataset, tmp_path, 1, alone=False)
    weight, rounded = next(
        (w, str(w.uses[0].node.inputs[0].name))
        for w in weights.find(simulated.model)
        if w.uses[0].node.inputs[0].name in simulated.origins
    )
    assert groups.inputs_of(weight) == (rounded,)
    origin = simulated.origins[rounded]
    means, rest = collect(twins, Group((weight,), (rounded,), 0))
    means.take(rest)
    walk = Walk(simulated.model, dataset, tmp_path, 1)
    values = list(walk.values([rounded, origin]))
    x, seen = (
        np.concatenate([v[n].reshape(-1, v[n].shape[-1]) for v in values]).astype(np.float64)
        for n in (origin, rounded)
    )
    np.testing.assert_allclose(means.gram, seen.T @ seen / len(x), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(means.cross, x.T @ seen / len(x), rtol=1e-6, atol=1e-9)
    assert not np.allclose(means.gram, x.T @ x / len(x), rtol=1e-6, atol=1e-9)


def test_static_grids_are_applied_where_operators_compute_on_codes(tmp_path):
    recipe = {
        "extends": "int8-static",
        "pipeline": ["canonicalize", "observe", "assign-precision"],
        "rules": [],
    }
    model = files.load("zoo:tiny-cnn")
    chosen = recipes.load(recipe)
    rng = np.random.default_rng(0)
    feeds = [{model.graph.inputs[0].name: rng.random((1, 1, 8, 8), np.float32)} for _ in range(2)]
    dataset = load(feeds, inputs_of(model))
    options = {n: dict(v) for n, v in chosen.options.items()}
    ctx = Context(qgraph.registry.get("target", "ort"), chosen, data=dataset)
    Pipeline(chosen.pipeline, options).run(model, ctx)
    simulated = simulate(model, ctx.plan, ctx.target)
    assert ctx.plan.operators and simulated.origins
    walk = Walk(simulated.model, dataset, tmp_path, 1)
    for rounded, origin in simulated.origins.items():
        grid = ctx.plan.grids[origin]
        for values in walk.values([rounded, origin]):
            codes = np.rint(values[origin] / np.float32(grid.scale)) + grid.zero_point
            low, high = grid.spec.qtype.qmin, grid.spec.qtype.qmax
            expected = (np.clip(codes, low, high) - grid.zero_point) * grid.scale
            np.testing.assert_allclose(values[rounded], expected, atol=1e-5)
