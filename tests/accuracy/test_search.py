"""Accuracy control: what is given back is the least that holds, is told, and can be run again."""

import json

import numpy as np
import pytest

import qgraph
from qgraph import accuracy, data, errors, models
from qgraph.accuracy import rungs, search
from qgraph.accuracy.search import Unit


@pytest.fixture(scope="module")
def digits():
    images, _ = models.eval_data()
    return [{"image": images[i : i + 1]} for i in range(32)]


@pytest.fixture(scope="module")
def lines():
    tokens = models.eval_tokens("tiny-gpt")
    return [{"input_ids": tokens[i * 100 : i * 100 + 32][None]} for i in range(4)]


@pytest.fixture(scope="module")
def missed(digits):
    """A floor that the recipe int8-static misses by 4 dB."""
    plain = qgraph.optimize("zoo:tiny-cnn", "int8-static", data=digits, min_sqnr=1)
    return plain.metrics["outputs"][0]["error"]["sqnr_db"] + 4


def unit(name, damage, cost=1.0):
    made = Unit(name, name, "rtn", cost, {0: rungs.Rung(("int8.ch",), "float", "int8.ch")})
    made.damage = damage
    return made


def test_order_is_damage_per_cost_and_the_unmeasured_come_last():
    found = search.ordered(
        [unit("a", None), unit("b", 1.0), unit("c", 4.0, 8.0), unit("d", 3.0, 2.0)]
    )
    assert [u.weight for u in found] == ["d", "b", "c", "a"]


@pytest.mark.parametrize(
    ("damages", "count"),
    [
        ([0.2, 0.3, 0.4], 0),
        ([5.0, 0.5, 0.4], 1),
        ([5.0, 2.0, 1.5], 3 - 1 + 1),
        ([float("inf"), 0.1], 1),
        ([], 0),
    ],
)
def test_prediction_adds_damages_up(damages, count):
    assert search.predicted([unit(str(i), d) for i, d in enumerate(damages)]) == count


@pytest.mark.parametrize(("total", "count"), [(1, 8), (8, 8), (100, 8), (3, 8)])
def test_few_samples_are_spread_evenly(total, count):
    held = data.load(
        [{"x": np.full((1,), i, np.float32)} for i in range(total)],
        [data.InputInfo("x", np.dtype(np.float32), (1,))],
    )
    chosen = [int(f["x"][0]) for f in search.evenly(held, count)]
    assert chosen == sorted({total * i // count for i in range(count)})


def test_a_missed_floor_gives_back_the_least(digits, tmp_path):
    plain = qgraph.optimize("zoo:tiny-cnn", "int8-static", data=digits, min_sqnr=1)
    before = plain.metrics["outputs"][0]["error"]["sqnr_db"]
    assert not plain.report.control
    floor = before + 4
    held = qgraph.optimize("zoo:tiny-cnn", "int8-static", data=digits, min_sqnr=floor)
    control = held.report.control
    assert held.metrics["outputs"][0]["error"]["sqnr_db"] >= floor
    assert control["held"]
    assert 0 < len(control["returned"]) < len(held.ledger)
    # One sample-wise measurement a weight, and a logarithmic number of whole ones.
    assert control["measurements"]["alone"] == len(plain.report.quantized)
    assert control["measurements"]["whole"] <= 5
    for each in control["returned"]:
        entry = next(e for e in held.ledger if e.weight == each["weight"])
        assert f"--min-sqnr {floor:g}" in entry.reason
        assert f"{each['alone']['logits']['sqnr_db']:.1f} dB" in entry.reason
        assert entry.by == f"rule {rungs.RULE}"
    # One fewer does not hold.
    rules = held.report.resolved_recipe["rules"]
    pins = [r for r in rules if r["id"] == rungs.RULE]
    assert len(pins) == len(control["returned"])
    fewer = {**held.report.resolved_recipe, "rules": [*pins[:-1], *rules[len(pins) :]]}
    missed = qgraph.optimize("zoo:tiny-cnn", fewer, data=digits, min_sqnr=1)
    assert missed.metrics["outputs"][0]["error"]["sqnr_db"] < floor


def test_the_result_can_be_run_again_from_its_report(digits, missed, tmp_path):
    first = qgraph.optimize(
        "zoo:tiny-cnn", "int8-static", data=digits, min_sqnr=missed, output=tmp_path / "a.onnx"
    )
    assert first.report.control["returned"]
    (tmp_path / "report.json").write_text(first.report.to_json())
    qgraph.optimize(
        "zoo:tiny-cnn", tmp_path / "report.json", data=digits, output=tmp_path / "b.onnx"
    )
    second = qgraph.optimize(
        "zoo:tiny-cnn", "int8-static", data=digits, min_sqnr=missed, output=tmp_path / "c.onnx"
    )
    made = [(tmp_path / f"{name}.onnx").read_bytes() for name in "abc"]
    assert made[0] == made[1] == made[2]
    assert first.report.control == second.report.control


@pytest.mark.parametrize(
    ("recipe", "gain"), [("int4", 3.0), ("int8-dynamic", 2.0), ("int8-static", 2.0), ("w4a8", 3.0)]
)
def test_any_recipe(recipe, gain, lines):
    plain = qgraph.optimize("zoo:tiny-gpt", recipe, data=lines, min_sqnr=1, inspect=False)
    floor = plain.metrics["outputs"][0]["error"]["sqnr_db"] + gain
    held = qgraph.optimize("zoo:tiny-gpt", recipe, data=lines, min_sqnr=floor, inspect=False)
    assert held.metrics["outputs"][0]["error"]["sqnr_db"] >= floor
    assert held.report.control["returned"]
    assert held.report.quantized


def test_weights_of_4_bits_get_8_before_any_goes_float(lines):
    floor = 50.0
    held = qgraph.optimize("zoo:tiny-gpt", "int4", data=lines, min_sqnr=floor, inspect=False)
    kinds = {each["to"] for each in held.report.control["returned"]}
    assert "8-bit weights" in kinds
    assert held.metrics["outputs"][0]["error"]["sqnr_db"] >= floor


def test_agreement_and_divergence_are_floors_too(lines):
    with pytest.raises(errors.AccuracyError) as missed:
        qgraph.optimize("zoo:tiny-gpt", "int4", data=lines, min_agreement=1.0, max_time=0)
    assert missed.value.diagnostics[0].code == "QG706"
    assert missed.value.exit_code == 3
    held = qgraph.optimize("zoo:tiny-gpt", "int4", data=lines, min_agreement=1.0, inspect=False)
    assert held.metrics["outputs"][0]["divergence"]["agreement"]["value"] == 1.0
    both = qgraph.optimize(
        "zoo:tiny-gpt", "int4", data=lines, max_kl=1e-4, min_sqnr=20, inspect=False
    )
    assert both.metrics["outputs"][0]["divergence"]["kl_mean"]["value"] <= 1e-4


def test_a_floor_that_only_float_holds_is_missed(digits):
    with pytest.raises(errors.AccuracyError) as missed:
        qgraph.optimize("zoo:tiny-cnn", "int8-static", data=digits, min_sqnr=110)
    codes = [d.code for d in missed.value.diagnostics]
    assert codes == ["QG701", "QG704"]
    text = missed.value.diagnostics[1].message
    assert "only with all weights in float" in text
    assert "the best with anything quantized is" in text
    control = missed.value.report.control
    assert control["held"] is False


def test_time_only_stops(digits):
    ticks = iter(range(0, 10**6, 10))
    held = data.load(digits, data.inputs_of("zoo:tiny-cnn"))
    floors = qgraph.floors.Floors(held, min_sqnr=60)
    ctx, trials = _trials("int8-static", held)
    with trials.written(trials.context.recipe, inspect=False) as (path, _):
        missed = floors.measure("zoo:tiny-cnn", path)
    found = accuracy.Search(
        trials, floors, "zoo:tiny-cnn", trials.context.recipe, 25, clock=lambda: next(ticks)
    ).run(missed, ctx)
    assert found.recipe is None
    assert found.timed_out
    assert found.measurements["alone"] < 8
    assert "raise --max-time" in accuracy.problem(found, floors, 8).hint


def _trials(recipe, held):
    from qgraph import files, pipeline, registry
    from qgraph import recipe as recipes

    chosen = recipes.load(recipe)
    line = pipeline.Pipeline(chosen.pipeline, {k: dict(v) for k, v in chosen.options.items()})
    ctx = pipeline.Context(registry.get("target", chosen.target), chosen, data=held)
    checkpoint = accuracy.Checkpoint()
    line.run(files.load("zoo:tiny-cnn"), ctx, [checkpoint])
    return ctx, accuracy.Trials(line, *checkpoint.kept)


def test_predictions_can_be_named(digits):
    with pytest.raises(errors.InputError) as wrong:
        qgraph.optimize(
            "zoo:tiny-cnn", "int8-static", data=digits, min_agreement=0.5, logits="nothing"
        )
    assert wrong.value.diagnostics[0].code == "QG121"


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_is_between_0_and_1(digits, share):
    with pytest.raises(errors.InputError, match="QG130"):
        qgraph.optimize("zoo:tiny-cnn", "int8-static", data=digits, min_agreement=share)


def test_the_report_tells_it(digits, missed):
    held = qgraph.optimize("zoo:tiny-cnn", "int8-static", data=digits, min_sqnr=missed)
    told = json.loads(held.report.to_json())["control"]
    assert told["measurements"].keys() == {"alone", "whole"}
    assert {"weight", "label", "from", "to", "alone", "cost"} == told["returned"][0].keys()
    assert "accuracy control" in held.report.seconds


def test_activations_get_16_bits_where_the_target_has_them(digits):
    held = qgraph.optimize(
        "zoo:tiny-cnn", "int8-static", target="onnx", data=digits, min_sqnr=44, verify="ends"
    )
    returned = held.report.control["returned"]
    assert {each["to"] for each in returned} == {"16-bit activations"}
    assert len(held.report.quantized) == len(held.ledger)
    wide = {a.spec for a in held.report.activations}
    assert "uint16.tensor.asym" in wide
