"""Laws 1, 5 and 7 for every registered pass on every odd graph, with what stands before it in the pipeline.

After each pass the model is well formed, computes what the pass promises, and has the same inputs and outputs. A pass
that reports no change changed nothing, and running it again changes nothing either.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from qgraph import graph, printer, registry, verify
from qgraph.pipeline import Context, Fact, Keeps, Pass
from qgraph.recipe import DEFAULT_PIPELINE, PRESETS

PASSES = registry.names("pass")
FLOAT_EQUAL = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 4e-3}


def chain(name: str) -> list[str]:
    """The passes that must run before a pass, in the order of the default pipeline."""
    if name in DEFAULT_PIPELINE:
        return list(DEFAULT_PIPELINE[: DEFAULT_PIPELINE.index(name)])
    before: list[str] = []
    have: set[Fact] = set()
    for each in DEFAULT_PIPELINE:
        if registry.get("pass", name).needs <= have:
            break
        have = have - registry.get("pass", each).breaks | registry.get("pass", each).gives
        before.append(each)
    return before


def interface(model: ir.Model) -> list[tuple[Any, ...]]:
    held = [*model.graph.inputs, None, *model.graph.outputs]
    return [() if v is None else (v.name, v.dtype, str(v.shape)) for v in held]


def make(name: str) -> Pass:
    made: Pass = registry.get("pass", name)()
    return made


@pytest.fixture(params=["int4", "int8-dynamic"])
def ctx(request: pytest.FixtureRequest, eager: Any) -> Context:
    return Context(registry.get("target", "ort"), eager(request.param))


@pytest.mark.parametrize("name", PASSES)
def test_keeps_its_word(name, odd, ctx):
    model = odd.build()
    ctx.data = odd.samples
    for each in chain(name):
        make(each).run(model, ctx)
    before, text = graph.clone(model), printer.text(model)
    each = make(name)
    changed = each.run(model, ctx)
    assert isinstance(changed, bool)
    assert interface(model) == interface(before)
    found = [d for d in verify.verify(model) if d.severity == "error" or d.code in ("V04", "V10")]
    allowed = {"V10"} if name in ("assign-precision", "solve-weights") else set()
    assert not [str(d) for d in found if d.code not in allowed]
    after = printer.text(model)
    assert changed or after == text
    if each.keeps is not Keeps.NOTHING and changed:
        half = any(v.dtype == ir.DataType.FLOAT16 for v in model.graph.inputs)
        rtol = FLOAT_EQUAL[ir.DataType.FLOAT16 if half else ir.DataType.FLOAT]
        result = verify.equivalent(
            before, model, odd.samples, rtol=rtol if each.keeps is Keeps.FLOAT_EQUAL else 0.0
        )
        assert result.ok, result.reason
    again = make(name).run(model, ctx)
    if each.repeats:
        return
    assert not again
    assert printer.text(model) == after


@pytest.mark.parametrize("name", PASSES)
def test_declares_facts_that_a_pipeline_can_satisfy(name):
    each = registry.get("pass", name)
    given = set().union(*(registry.get("pass", n).gives for n in PASSES))
    assert each.needs <= given
    assert not each.needs & each.gives, "a pass cannot need what it gives"
    assert each.__doc__ and each.run.__doc__


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_pipeline_that_can_run(name):
    from qgraph.pipeline import Pipeline

    made = Pipeline(PRESETS[name].pipeline)
    assert [p.name for p in made.passes] == list(PRESETS[name].pipeline)
