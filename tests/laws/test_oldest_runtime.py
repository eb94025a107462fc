"""Results for ONNX Runtime load and run in the oldest version that qgraph supports, and compute the same there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import numerics

FORMS = Path(__file__).parents[1] / "forms"
ENOUGH = 30.0  # dB between two versions: kernels round activations in their own ways


@pytest.fixture(scope="module")
def old() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("old_runtime", FORMS / "old_runtime.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["old_runtime"] = module
    spec.loader.exec_module(module)
    if not module.is_available():
        pytest.skip(f"{module.VARIABLE} names no Python with the oldest ONNX Runtime")
    live = module.OldRuntime()
    live.Refused = module.Refused
    yield live
    live.close()


@pytest.mark.parametrize("target", ["ort", "onnx", "ort-qgraph"])
@pytest.mark.parametrize("recipe", ["int4", "int8-dynamic"])
def test_runs_there_too(odd, eager, old, recipe, target):
    model = odd.build()
    try:
        before = old.run(ir.to_proto(model).SerializeToString(), odd.samples)
    except old.Refused as e:
        pytest.skip(f"the float model does not run there: {e}")
    result = qgraph.optimize(model, eager(recipe), target=target, verify="off", inspect=False)
    now = odd.run(result.to_proto())
    then = old.run(result.to_proto().SerializeToString(), odd.samples)
    for a, b, floats in zip(now, then, before, strict=True):
        for want, got, reference in zip(a, b.values(), floats.values(), strict=True):
            assert want.shape == got.shape and want.dtype == got.dtype
            if want.dtype.kind != "f" or not np.abs(reference).max(initial=0) > 1e-30:
                continue
            assert numerics.sqnr_db(want, got) >= ENOUGH
