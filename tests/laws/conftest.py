"""What the laws are tried on: the odd graphs, and the recipes that take even the smallest weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import recipe, runtime
from qgraph.models.odd import ODD, feeds

Array = np.ndarray[Any, Any]
RECIPES = ("auto", "int4", "int8-dynamic", "int8-weights", "int4-g128")


class Odd:
    """One odd graph: fresh models, sample inputs, and what the float model computes on them."""

    def __init__(self, name: str) -> None:
        self.name = name
        model = self.build()
        self.samples = [
            feeds(model, seed, batch, seq) for seed, batch, seq in ((0, 2, 7), (1, 3, 5))
        ]
        self.outputs = self.run(model)

    def build(self) -> ir.Model:
        """A fresh model."""
        return ODD[self.name]()

    def run(self, model: Any, optimize: str = "all") -> list[list[Array]]:
        """Outputs for each sample."""
        session = runtime.session(model, threads=1, optimize=optimize)
        return [session.run(None, sample) for sample in self.samples]


_KNOWN: dict[str, Odd] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `odd` runs on every odd graph, unless it says itself on which."""
    named = [m.args[0] for m in metafunc.definition.iter_markers("parametrize")]
    if "odd" in metafunc.fixturenames and not any("odd" in n for n in named):
        metafunc.parametrize("odd", list(ODD), indirect=True)


@pytest.fixture
def odd(request: pytest.FixtureRequest) -> Odd:
    """The odd graph of this test; the float model runs once."""
    name = request.param
    if name not in _KNOWN:
        _KNOWN[name] = Odd(name)
    return _KNOWN[name]


@pytest.fixture
def eager() -> Callable[[str], recipe.Recipe]:
    """`eager("int4")`: the preset without a smallest size."""
    return lambda name: recipe.PRESETS[name].model_copy(update={"min_elements": 0})
