"""The whole pipeline on every odd graph, for every recipe and target: it runs, it is close, and nothing is silent.

By default every graph meets every recipe and every target, and every recipe every target; QGRAPH_FULL=1 tries all three
together.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import graph, numerics, printer, registry, verify
from qgraph.models.odd import ODD
from qgraph.recipe import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from covering import covering

# What the worst output may lose, in dB, by the fewest bits of a weight: up to three layers of random numbers, with
# activations that the kernels round to 8 bits.
FLOORS = {2: 3.0, 3: 7.0, 4: 12.0, 8: 28.0}
WHOLE = 20.0  # one 8-bit scale for a whole tensor, whatever its rows are like
FLOAT = 100.0
RUNTIMES = [t for t in registry.names("target") if t != "openvino"]
CHANCE = "one product decides every output: what 2 bits leave of it is chance"
SUBNORMAL = "outputs below the smallest normal float32: kernels may flush them to zero"
SILENT = 1e-3  # what a weight of zeros may add to an output that is zero
OPENVINO = (
    "tied_embedding",
    "gemm_alpha_beta",
    "conv_grouped",
    "shared_weight",
    "if_outer_weight",
    "odd_k",
    "gather_embedding",
)


def sqnr(odd: Any, outputs: list[list[Any]]) -> float:
    """Of the worst float output over all samples; outputs that are zero must stay silent."""
    found = [999.0]
    for index, first in enumerate(odd.outputs[0]):
        want = np.concatenate([np.ravel(o[index]) for o in odd.outputs])
        got = np.concatenate([np.ravel(o[index]) for o in outputs])
        if first.dtype.kind != "f":
            assert np.array_equal(want, got)
        elif not want.any():
            assert np.abs(got).max() <= SILENT
        else:
            found.append(numerics.sqnr_db(want, got))
    return min(found)


def floor(result: qgraph.Result) -> float:
    """What the result must reach."""
    specs = [qgraph.QuantSpec.parse(e.spec) for e in result.report.quantized]
    return min((WHOLE if s.is_per_tensor else FLOORS[s.qtype.bits] for s in specs), default=FLOAT)


def check_ledger(result: qgraph.Result, model: ir.Model) -> None:
    """Every weight has a line with a reason; nothing is quantized in silence or left float in silence."""
    report = result.report
    for entry in result.ledger:
        assert entry.reason and entry.by
        if entry.spec:
            assert entry.forms and entry.stored_bytes < max(entry.float_bytes, 400) + 100
        else:
            assert entry.code
            assert entry.stored_bytes == entry.float_bytes
    warned = {d.code for d in report.diagnostics} & {"QG320", "QG321"}
    assert bool(warned) == (not report.quantized)
    json.loads(report.to_json())


def check_model(result: qgraph.Result, before: ir.Model) -> None:
    """Well formed, nothing dead, the same interface but for inputs that the recipe froze, which the report names."""
    model = result.model
    frozen = "".join(d.message for d in result.report.diagnostics if d.code == "QG215")
    defaults = {n for n in before.graph.initializers if n in frozen}
    assert not [str(d) for d in verify.verify(model) if d.severity == "error" or d.code == "V10"]
    for old, new in (
        (before.graph.inputs, model.graph.inputs),
        (before.graph.outputs, model.graph.outputs),
    ):
        assert [(v.name, v.dtype, str(v.shape)) for v in old if v.name not in defaults] == [
            (v.name, v.dtype, str(v.shape)) for v in new
        ]
    for _, v in graph.initializers(model):
        assert v.const_value is not None and tuple(v.const_value.numpy().shape) == tuple(
            v.const_value.shape.numpy()
        )


@pytest.mark.parametrize(
    ("odd", "recipe", "target"),
    covering(list(ODD), list(PRESETS), RUNTIMES),
    indirect=["odd"],
)
def test_runs_and_is_close(odd, eager, recipe, target):
    before = odd.build()
    data = odd.samples if PRESETS[recipe].needs_data else None
    result = qgraph.optimize(before, eager(recipe), target=target, data=data, inspect=False)
    check_model(result, before)
    check_ledger(result, before)
    got = odd.run(result.to_proto())
    if odd.name == "subnormal_weight":
        pytest.skip(SUBNORMAL)
    if odd.name == "single_row" and recipe == "int2-tuned":
        pytest.skip(CHANCE)
    assert sqnr(odd, got) >= floor(result)


@pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed")
@pytest.mark.parametrize("name", OPENVINO)
@pytest.mark.parametrize("recipe", ["int4", "int8-weights"])
def test_runs_in_openvino(name, recipe, eager, tmp_path):
    import openvino

    from qgraph.models.odd import feeds

    model = ODD[name]()
    path = tmp_path / "model.onnx"
    result = qgraph.optimize(model, eager(recipe), target="openvino", output=path, inspect=False)
    qgraph.save(model, tmp_path / "float.onnx")
    core = openvino.Core()
    sample = feeds(model)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    got, want = (
        next(iter(core.compile_model(str(p), "CPU", exact)(sample).values()))
        for p in (path, tmp_path / "float.onnx")
    )
    assert numerics.sqnr_db(want, got) >= floor(result)


@pytest.mark.parametrize("name", registry.names("target"))
def test_a_target_describes_itself(name):
    target = registry.get("target", name)
    assert target.summary and target.forms
    for kind, forms in target.forms.items():
        assert forms, f"{kind} has no form"
        for form in forms:
            assert form.name and form.summary and target.form(form.name).name == form.name
    for specs in target.auto.values():
        for spec, activations, why in specs:
            assert spec == "float" or qgraph.QuantSpec.parse(spec)
            assert activations in ("float", "int8") and why


def test_the_source_is_left_alone(odd, eager, tmp_path):
    model = odd.build()
    before = printer.text(model)
    proto = ir.to_proto(model)
    content = proto.SerializeToString(deterministic=True)
    path = tmp_path / "float.onnx"
    path.write_bytes(content)
    for source, target in ((model, "ort"), (model, "onnx"), (proto, "ort"), (path, "onnx")):
        qgraph.optimize(
            source, eager("int4"), target=target, verify="off", inspect=False
        ).to_proto()
    assert printer.text(model) == before
    assert ir.to_proto(model).SerializeToString(deterministic=True) == content
    assert proto.SerializeToString(deterministic=True) == content
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["float.onnx"]
