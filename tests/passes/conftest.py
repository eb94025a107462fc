"""Models from ONNX text, and one pass run on them with its promise proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import files, graph, registry, verify
from qgraph.pipeline import Context, Keeps, Pipeline
from qgraph.recipe import Recipe

Array = np.ndarray[Any, Any]


@pytest.fixture
def parse() -> Callable[..., ir.Model]:
    """`parse("g (float[m, 64] x) => (float[m, 64] y) { ... }", W=array)`; arrays become initializers."""

    def make(text: str, opset: int = 17, ir_version: int = 8, **constants: Array) -> ir.Model:
        functions = ', "f" : 1' if '"f"' in text else ""
        head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}{functions}]>'
        proto = onnx.parser.parse_model(f"{head}\n{text}")
        proto.graph.initializer.extend(
            ir.to_proto(ir.tensor(v, name=k)) for k, v in constants.items()
        )
        return files.load(proto)

    return make


@dataclass
class After:
    """A model after some passes."""

    model: ir.Model
    ctx: Context
    changed: bool

    def ops(self) -> list[str]:
        """Operator types, bodies included."""
        return [n.op_type for n in graph.nodes(self.model)]

    def constants(self) -> dict[str, Array]:
        """Every initializer's data."""
        return {str(v.name): np.asarray(graph.array(v)) for _, v in graph.initializers(self.model)}


@pytest.fixture
def after() -> Callable[..., After]:
    """`after("canonicalize", model)` runs the named passes on a copy and proves what the last one keeps."""

    def run(
        names: str,
        model: ir.Model,
        recipe: Recipe | None = None,
        target: str = "ort",
        **options: Any,
    ) -> After:
        held = [registry.get("pass", n) for n in names.split()]
        made = [p(**options) if p is held[-1] else p() for p in held]
        ctx = Context(registry.get("target", target), recipe or Recipe.default())
        work = graph.clone(model)
        for each in made[:-1]:
            each.run(work, ctx)
        before = graph.clone(work)
        changed = made[-1].run(work, ctx)
        Pipeline(made)
        verify.check(work)
        keeps = made[-1].keeps
        if keeps is not Keeps.NOTHING:
            rtol = 1e-4 if keeps is Keeps.FLOAT_EQUAL else 0.0
            found = verify.equivalent(before, work, verify.sample_feeds(before), rtol=rtol)
            assert found.ok, found.reason
        return After(work, ctx, changed)

    return run
