"""Sequential calibration on odd graphs: bodies, shared weights, functions, inputs without a batch, several opsets."""

import pytest

import qgraph

RECIPE = {
    "rules": [{"id": "all", "weights": ["int8.g16", "int8.ch", "float"], "solver": "gptq"}],
    "min_elements": 1,
}


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_weights_see_the_samples(odd, inputs):
    recipe = {**RECIPE, "options": {"solve-weights": {"inputs": inputs}}}
    made = qgraph.optimize(
        odd.build(), recipe, data=odd.samples, inspect=False, verify="ends", threads=1
    )
    # Each weight has its Gram matrix, or a reason why there is none; no sample was lost on the way.
    told = {d.code for d in made.report.diagnostics}
    assert "QG405" not in told
    kinds = {d.message.split(" does not")[0] for d in made.report.diagnostics if d.code == "QG404"}
    assert not any(kind in ("MatMul", "Gemm") for kind in kinds)
    for before, after in zip(odd.outputs, odd.run(made.model), strict=True):
        assert [a.shape for a in before] == [a.shape for a in after]
