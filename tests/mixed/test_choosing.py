"""Budgets are kept by the written file, floors by what is measured, and what was chosen can be made again."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest

import qgraph
from qgraph import errors, files, graph, mixed, registry
from qgraph.auto import timing
from qgraph.floors import Floors
from qgraph.mixed import costs as mixed_costs
from qgraph.mixed import mixtures, times
from qgraph.passes.solvers import gptq

QUICK = {"inspect": False, "verify": "ends"}


def made(net, recipe, samples, path=None, **budget):
    return qgraph.optimize(net, recipe, data=samples, output=path, force=True, **QUICK, **budget)


def formats(result):
    return {e.weight: e.spec.split(".")[0] or "float" for e in result.ledger}


def kl(result):
    return result.metrics["outputs"][0]["divergence"]["kl_mean"]["value"]


@pytest.fixture(scope="module")
def uniform(net, samples, tmp_path_factory):
    """Uniform formats: bytes of the file and KL."""
    found = {}
    for spec in ("uint2.g32.asym", "uint4.g32.asym", "int8.g32"):
        path = tmp_path_factory.mktemp("uniform") / "u.onnx"
        rules = {"rules": [{"weights": [spec]}]}
        result = made(net, rules, samples, path, max_kl=1e9)
        found[spec] = files.file_bytes(path), kl(result)
    return found


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("size", [28_000, 33_333, "40kB"])
def test_the_file_is_never_larger_than_asked(net, recipe, samples, tmp_path, size, external):
    path = tmp_path / "m.onnx"
    result = made(net, recipe, samples, path, max_size=size, external_data=external)
    most = 40_000 if size == "40kB" else size
    assert files.file_bytes(path) == result.report.output_bytes
    # As much as a notch of the smallest weight may be left over, and no more.
    assert most - 5_000 < files.file_bytes(path) <= most
    assert (path.parent / "m.onnx.data").exists() == external


def test_what_cannot_be_met_says_what_can_and_that_is_true(net, recipe, samples, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(mixed.BudgetMissed, match=r"QG331.*cannot be met") as caught:
        made(net, recipe, samples, path, max_size=10_000)
    assert caught.value.exit_code == 3
    assert not path.exists()
    hint = caught.value.diagnostics[0].hint
    least = int(hint.split("--max-size ")[1].split()[0])
    made(net, recipe, samples, path, max_size=least)
    assert files.file_bytes(path) == least
    with pytest.raises(mixed.BudgetMissed):
        made(net, recipe, samples, path, max_size=least - 1)
    with pytest.raises(mixed.BudgetMissed, match=r"3\.12 bits per weight"):
        made(net, recipe, samples, path, avg_bits=2)


def test_a_mixture_beats_the_uniform_format_of_its_size(net, recipe, samples, tmp_path, uniform):
    _, loss = uniform["uint4.g32.asym"]
    path = tmp_path / "m.onnx"
    # The recipe is written into the file, so that it can be made again: that is not weights.
    result = made(net, recipe, samples, path, avg_bits=8 * 160 / 256, max_kl=1e9)
    assert kl(result) < loss
    assert len(set(formats(result).values())) > 1
    assert result.report.mixed["avg_bits"] <= 5.0 + 1e-9
    figures = {e["labels"][0]: e for e in result.report.mixed["groups"]}
    assert (
        figures["layers.0.back"]["options"][0]["loss"]
        < figures["layers.3.back"]["options"][0]["loss"]
    )


def test_the_front_goes_down_and_holds_the_choice(net, recipe, samples):
    result = made(net, recipe, samples, avg_bits=4.5)
    front = result.report.mixed["front"]
    assert [p["bytes"] for p in front] == sorted(p["bytes"] for p in front)
    others = [p for p in front if not p["chosen"]]
    assert [p["predicted"] for p in others] == sorted(
        (p["predicted"] for p in others), reverse=True
    )
    assert all(p["measured"] > 0 for p in front)
    (chosen,) = [p for p in front if p["chosen"]]
    assert chosen["bytes"] == result.report.mixed["bytes"]
    stored = [v.const_value.nbytes for v in result.model.graph.initializers.values()]
    assert chosen["bytes"] == sum(stored)
    assert json.loads(result.report.to_json())["mixed"]["front"] == front


def test_the_recipe_in_the_report_makes_the_same_file(net, recipe, samples, tmp_path):
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    result = made(net, recipe, samples, first, avg_bits=4.5)
    held = qgraph.recipe.load(json.loads(result.report.to_json())["resolved_recipe"])
    assert not mixed.is_mixed(held) and not held.budget.is_set
    again = qgraph.optimize(net, held, output=second, **QUICK)
    assert not again.report.mixed
    assert first.read_bytes() == second.read_bytes()


def test_a_floor_alone_takes_the_fewest_bytes(net, recipe, samples, uniform, tmp_path):
    floor = uniform["uint4.g32.asym"][1]
    result = made(net, recipe, samples, tmp_path / "m.onnx", max_kl=floor)
    assert kl(result) <= floor
    assert result.report.mixed["avg_bits"] < 5.125
    tighter = made(net, recipe, samples, tmp_path / "n.onnx", max_kl=floor / 20)
    assert kl(tighter) <= floor / 20
    assert tighter.report.mixed["bytes"] > result.report.mixed["bytes"]


def test_noise_is_a_floor_too(net, recipe, samples):
    result = made(net, recipe, samples, min_sqnr=25)
    assert result.metrics["outputs"][0]["error"]["sqnr_db"] >= 25
    assert result.report.mixed["measure"] == "floors"


def test_a_floor_that_a_budget_forbids_is_an_error_with_what_would_do(
    net, recipe, samples, tmp_path
):
    path = tmp_path / "m.onnx"
    with pytest.raises(errors.AccuracyError) as caught:
        made(net, recipe, samples, path, avg_bits=4, max_kl=0.01)
    assert caught.value.exit_code == 3 and not path.exists()
    codes = [d.code for d in caught.value.diagnostics]
    assert codes == ["QG702", "QG332"]
    hint = caught.value.diagnostics[1].hint
    assert "would do" in hint
    bits = float(hint.split()[1])
    result = made(net, recipe, samples, path, avg_bits=bits + 0.01, max_kl=0.011)
    assert kl(result) <= 0.011


def test_readers_of_a_tensor_share_a_format_where_the_target_fuses_them(net, recipe, samples):
    fusing = replace(registry.get("target", "ort"), fuses_readers=True)
    result = made(net, recipe, samples, target=fusing, avg_bits=4.5)
    held = formats(result)
    assert all(held[f"layers.{i}.left"] == held[f"layers.{i}.right"] for i in range(4))
    assert len(set(held.values())) > 1
    assert sorted(len(g["weights"]) for g in result.report.mixed["groups"]) == [1] * 5 + [2] * 4
    free = {**recipe, "budget": {"avg_bits": 4.5, "tie_readers": False}}
    apart = made(net, free, samples, target=fusing)
    assert {len(g["weights"]) for g in apart.report.mixed["groups"]} == {1}


def pretend(path, feeds):
    """A machine on which a product takes as many milliseconds as its weight has bits."""
    found = {"other": 0.004}
    for node in graph.nodes(files.load(path)):
        if node.op_type in ("MatMul", "MatMulNBits"):
            found[str(node.name)] = 1e-3 * graph.attribute(node, "bits", 32)
    return found


@pytest.fixture
def pretended(monkeypatch):
    def ratio(model, path, feeds):
        before, after = (sum(pretend(each, feeds).values()) for each in (model, path))
        return timing.Relative(after / before, 0, 0, after)

    monkeypatch.setattr(times, "profile", pretend)
    monkeypatch.setattr(times, "ratio", ratio)


def seconds(result):
    return sum(pretend(result.path, None).values())


@pytest.mark.parametrize(
    ("limit", "most"), [("0.25x", 0.25 * (13 * 0.032 + 0.004)), ("80ms", 0.08)]
)
def test_measured_kernel_times_are_kept_within_a_limit(
    net, recipe, samples, tmp_path, pretended, limit, most
):
    result = made(net, recipe, samples, tmp_path / "m.onnx", max_latency=limit)
    assert most - 0.032 < seconds(result) <= most
    assert len(set(formats(result).values())) > 1
    timed = result.report.mixed["timing"]
    assert timed["other_seconds"] == pytest.approx(0.004)
    assert timed["seconds"] == pytest.approx(seconds(result))
    # Bytes as well: both hold.
    both = made(net, recipe, samples, tmp_path / "n.onnx", max_latency=limit, avg_bits=4.5)
    assert seconds(both) <= most and both.report.mixed["avg_bits"] <= 4.5


def test_a_time_that_nothing_reaches_is_an_error(net, recipe, samples, tmp_path, pretended):
    with pytest.raises(
        mixed.BudgetMissed, match=r"QG331 --max-latency 1ms.*cannot be met"
    ) as caught:
        made(net, recipe, samples, tmp_path / "m.onnx", max_latency="1ms")
    least = float(caught.value.diagnostics[0].hint.split("--max-latency ")[1].split("x")[0])
    assert least == pytest.approx((13 * 0.002 + 0.004) / (13 * 0.032 + 0.004), abs=0.01)


def test_real_kernels_are_timed(net, recipe, samples):
    result = made(net, recipe, samples, max_latency="100x")
    options = [o for g in result.report.mixed["groups"] for o in g["options"]]
    assert (
        sum(o["seconds"] > 0 for o in options) > len(options) / 2
    )  # the clock counts microseconds
    assert 0 < result.report.mixed["timing"]["ratio"] < 100


def test_interrupted_work_does_not_measure_again(net, samples, tmp_path, monkeypatch):
    choices = ["uint2.g32.asym", "uint4.g32.asym", "int8.g32"]
    rules = {"rules": [{"choices": choices, "solver": "round-descent"}]}
    whole, path, folder = tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "work"
    made(net, rules, samples, whole, avg_bits=4.5)
    once, count = gptq.Gptq.solve, itertools.count()

    def interrupted(self, *args):
        if self.name == "round-descent" and next(count) == 7:
            raise KeyboardInterrupt
        return once(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(gptq.Gptq, "solve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(net, rules, samples, path, avg_bits=4.5, work_dir=folder)
    assert not path.exists()
    monkeypatch.setattr(mixed.Chooser, "choose", None)
    result = made(net, rules, samples, path, avg_bits=4.5, work_dir=folder)
    assert path.read_bytes() == whole.read_bytes()
    assert result.report.mixed["front"]


class Calls:
    """Counts quick solves and measurements, and interrupts one of them."""

    def __init__(self, monkeypatch):
        self.count, self.at = Counter(), None
        self._watch(
            monkeypatch, gptq.Gptq, "solve", lambda solver: solver.name == mixed_costs.QUICK
        )
        self._watch(monkeypatch, mixtures.Mixtures, "_measured", lambda _: True)

    def _watch(self, monkeypatch, owner, name, counts):
        once = getattr(owner, name)

        def watched(found, *args, **more):
            if counts(found):
                if self.at == (name, self.count[name]):
                    raise KeyboardInterrupt
                self.count[name] += 1
            return once(found, *args, **more)

        monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize("at", [("solve", 17), ("_measured", 9)])
def test_an_interrupted_choice_goes_on(net, samples, tmp_path, monkeypatch, at):
    """What was weighed is not solved again, what was measured is not measured again, and the choice is the same."""
    choices = ["uint2.g32.asym", "uint4.g32.asym", "int8.g32"]
    rules = {"rules": [{"choices": choices, "solver": "round-descent"}]}
    whole, path, folder = tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "work"
    monkeypatch.setattr(mixtures, "_SECONDS", 0.0)
    calls = Calls(monkeypatch)
    made(net, rules, samples, whole, avg_bits=4.5)
    solved, measured = calls.count["solve"], calls.count["_measured"]
    calls.count.clear()
    calls.at = at
    with pytest.raises(KeyboardInterrupt):
        made(net, rules, samples, path, avg_bits=4.5, work_dir=folder)
    assert not path.exists()
    calls.at = None
    made(net, rules, samples, path, avg_bits=4.5, work_dir=folder)
    assert path.read_bytes() == whole.read_bytes()
    block = 3 * len(choices)  # a layer is solved again where it was interrupted
    assert 0 <= calls.count["solve"] - solved < block
    assert calls.count["_measured"] - measured <= 1  # the float model
    assert not list(folder.iterdir())


def test_a_choice_for_other_floors_is_not_taken_up(net, recipe, samples, tmp_path):
    """Losses are counted in what the floors allow, so those that were measured for others mean something else."""
    given = {"data": samples, "work_dir": tmp_path / "work", **QUICK}

    def stop(what, share):
        if what.startswith("exchanging") or what == "measuring the front":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qgraph.optimize(net, recipe, max_kl=0.02, progress=stop, **given)
    with pytest.raises(errors.InputError, match=r"QG106.*floors was --max-kl 0.02, is --min-sqnr"):
        qgraph.optimize(net, recipe, min_sqnr=20.0, **given)
    qgraph.optimize(net, recipe, max_kl=0.02, **given)
    assert not list((tmp_path / "work").iterdir())


def test_wider_mixtures_are_measured_with_a_work_folder_too(
    net, recipe, samples, tmp_path, monkeypatch
):
    """Where the first file misses its floor, measuring goes on, and so does keeping what was measured."""
    monkeypatch.setattr(mixtures, "_SECONDS", 0.0)
    given = {"data": samples, "max_kl": 0.02, **QUICK}
    first = qgraph.optimize(net, recipe, **given)
    once, missed = Floors.problems, []

    def problems(self, outputs):
        found = once(self, outputs)
        if not missed:
            missed.append(errors.Diagnostic("error", "QG702", "logits", "as if it had missed"))
            return [*found, *missed]
        return found

    monkeypatch.setattr(Floors, "problems", problems)
    result = qgraph.optimize(net, recipe, work_dir=tmp_path / "work", **given)
    assert missed and result.report.mixed["bytes"] > first.report.mixed["bytes"]
    assert not list((tmp_path / "work").iterdir())


def test_a_budget_needs_choices_and_data(net, recipe, samples):
    with pytest.raises(errors.RecipeError, match="QG330"):
        made(net, "int4", samples, avg_bits=4)
    with pytest.raises(errors.InputError, match="QG131"):
        made(net, recipe, None, avg_bits=4)
    with pytest.raises(errors.RecipeError, match=r"QG305 --max-size.*is no size"):
        made(net, recipe, samples, max_size="large")
    with pytest.raises(errors.RecipeError, match=r"QG305 --max-latency.*is no time"):
        made(net, recipe, samples, max_latency="soon")
    with pytest.raises(errors.RecipeError, match=r"QG305 --avg-bits"):
        made(net, recipe, samples, avg_bits=-1.0)


def test_without_data_that_reaches_it_nothing_is_chosen(samples, net):
    rules = {"rules": [{"names": ["head"], "weights": "int8.g32", "choices": ["int8.ch"]}]}
    result = made(net, rules, samples, avg_bits=9)
    assert formats(result)["head"] == "int8"
    assert {e.spec for e in result.ledger if e.weight != "head"} == {""}


def test_the_preset_stands_for_auto_and_aims_at_its_own_budget(net, samples):
    result = made(net, "auto", samples, avg_bits=5)
    assert result.report.recipe == "mixed"
    assert result.report.mixed["avg_bits"] <= 5
    plain = made(net, "mixed", samples)
    assert any("as without a choice" in note for note in plain.report.notes)
    usual = made(net, {"rules": [{"weights": "uint4.g32.asym"}]}, samples)
    stored = [
        sum(v.const_value.nbytes for v in r.model.graph.initializers.values())
        for r in (plain, usual)
    ]
    assert 0.9 * stored[1] < stored[0] <= stored[1]
