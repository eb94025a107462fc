"""Writes one operator's weight in one form, beside the float model that has the dequantized weight instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import files, graph, runtime, weights
from qgraph.pipeline import Context, Instrument, Pass, Pipeline
from qgraph.recipe import Recipe, Rule
from qgraph.target import Form, Target

HERE = Path(__file__).parent
KINDS = ("matmul", "gemm", "conv", "conv_transpose", "gather", "slice", "rnn")
PIPELINE = ("canonicalize", "assign-precision", "solve-weights", "insert-qdq", "cleanup")

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]


def parse(text: str, opset: int, ir_version: int, constants: dict[str, Array]) -> ir.Model:
    """A model from ONNX text; constants become initializers of the main graph."""
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{head}\n{text}")
    proto.graph.initializer.extend(ir.to_proto(ir.tensor(v, name=k)) for k, v in constants.items())
    return ir.from_proto(proto)


@dataclass
class Written:
    """A model with quantized weights, and the float model with the very numbers that the codes stand for."""

    model: ir.Model
    reference: ir.Model
    reasons: list[str] = field(default_factory=list)

    def ops(self) -> list[str]:
        """Operator types in graph order, bodies included."""
        return [n.op_type for n in graph.nodes(self.model)]

    def node(self, op: str) -> ir.Node:
        """The first node of a type."""
        return next(n for n in graph.nodes(self.model) if n.op_type == op)

    def attributes(self, op: str) -> dict[str, Any]:
        """Attributes of the first node of a type."""
        return {a.name: a.value for a in self.node(op).attributes.values()}

    def constants(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Element type and shape of every initializer."""
        held = {str(v.name): v.const_value for _, v in graph.initializers(self.model)}
        return {k: (t.dtype.name, tuple(t.shape.numpy())) for k, t in held.items() if t is not None}

    def error(self, feeds: Feeds, optimize: str = "off") -> float:
        """max |y - want| / max |want| over all outputs, in ONNX Runtime."""
        want = runtime.session(self.reference, threads=1, optimize="off").run(None, feeds)
        got = runtime.session(self.model, threads=1, optimize=optimize).run(None, feeds)
        return worst(want, got)

    def expected(self, feeds: Feeds) -> list[Array]:
        """What the reference computes."""
        return list(runtime.session(self.reference, threads=1, optimize="off").run(None, feeds))


def worst(want: Sequence[Array], got: Sequence[Array]) -> float:
    """Largest relative error; shapes and types must be equal."""
    error = 0.0
    for a, b in zip(want, got, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        x, y = a.astype(np.float64), b.astype(np.float64)
        error = max(error, float(np.abs(x - y).max() / np.abs(x).max()))
    return error


class _Capture(Instrument):
    """Keeps a copy of the float model with dequantized weights, taken when the weights are solved."""

    reference: ir.Model

    def after(self, each: Pass, model: ir.Model, ctx: Context, changed: bool) -> None:
        if each.name != "solve-weights":
            return
        self.reference = graph.clone(model)
        held = {v.name: v for _, v in graph.initializers(self.reference)}
        for weight in weights.find(model):
            q = ctx.plan.solved.get(weight.name)
            if q is None:
                continue
            q.check()
            assert weight.value.const_value is not None
            data = weight.matrix.back(q.dequantize(), weight.dims)
            dtype = weight.value.const_value.dtype
            held[weight.name].const_value = ir.tensor(data.astype(dtype.numpy()), name=weight.name)


Write = Callable[..., Written]


@pytest.fixture
def write() -> Write:
    """`write(form, "int8.ch", text, W=array)`; `forms` maps kinds where one form is not for all."""

    def make(
        form: Form | dict[str, Sequence[Form]],
        spec: str,
        text: str,
        *,
        opset: int = 17,
        ir_version: int = 8,
        activations: str = "float",
        **constants: Array,
    ) -> Written:
        forms = form if isinstance(form, dict) else dict.fromkeys(KINDS, (form,))
        target = Target("test", "one form", forms, max_opset=25)
        rule = Rule(id="test", weights=(spec,), activations=activations)
        recipe = Recipe(target="test", rules=(rule,), min_elements=0, pipeline=PIPELINE)
        model = files.load(parse(text, opset, ir_version, constants))
        ctx, capture = Context(target, recipe), _Capture()
        Pipeline(PIPELINE).run(model, ctx, [capture])
        kept = [d.reason for d in ctx.plan.decisions.values() if d.spec is None]
        return Written(model, capture.reference, kept)

    return make


@pytest.fixture(scope="session")
def old() -> Iterator[Any]:
    """The oldest supported ONNX Runtime."""
    import sys

    sys.path.insert(0, str(HERE))
    import old_runtime

    if not old_runtime.is_available():
        pytest.skip(f"{old_runtime.VARIABLE} names no Python with the oldest ONNX Runtime")
    live = old_runtime.OldRuntime()
    yield live
    live.close()
