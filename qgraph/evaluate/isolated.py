"""Which layer hurts: the error of every value inside the graph, alone and with that of all before it.

    accumulated   float model(x) against quantized model(x): what has arrived here
    isolated      the same, but every operator of the quantized model reads what the *float* model computed before it:
                  what is lost between the nearest shared values and here, and nowhere else

Both models run as they are but for their inputs and outputs: in the second run of the quantized model each value that
both models hold is fed from the float model. An isolated error counts rounded inputs, rounded weights and the kernel.
Making a value an output may undo fusions of ONNX Runtime, so integer kernels are told as the float operators between
Q and DQ that they stand for. Values whose name is all that they share (`meanings`) are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qgraph import files, graph
from qgraph.evaluate import sessions, statistics, tensors
from qgraph.evaluate.meanings import Meaning
from qgraph.evaluate.tensors import Array, ErrorMeter, TensorError

DTYPES = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(double)": ir.DataType.DOUBLE,
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True, slots=True)
class TensorLoss:
    """What is lost at one value: its name, the operator of the float model that makes it, and both errors."""

    name: str
    operator: str
    isolated: TensorError
    accumulated: TensorError


@dataclass(frozen=True, slots=True)
class TensorLosses:
    """Result of `tensor_losses`, in the order of the float graph; `moved` are values that mean something else."""

    tensors: tuple[TensorLoss, ...]
    moved: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite as "inf", "-inf", "nan"."""
        return dict(statistics.plain(self))

    def worst(self) -> list[TensorLoss]:
        """Those that lose anything by themselves, the worst first."""
        lossy = [t for t in self.tensors if t.isolated.sqnr_db < float("inf")]
        return sorted(lossy, key=lambda t: t.isolated.sqnr_db)


def tensor_losses(
    float_model: files.Source,
    quant_model: files.Source,
    feeds: Mapping[str, Array] | Iterable[Mapping[str, Array]],
    names: Sequence[str] | None = None,
    *,
    threads: int = 1,
) -> TensorLosses:
    """Isolated and accumulated errors.

    The data is read twice. Memory: three times the values of one sample that are compared.

    Args:
        float_model: the reference. For a model that was smoothed or rotated take the float model after that
            (`qgraph optimize --stop-after smooth`).
        quant_model: the model to judge; values correspond by name.
        feeds: one sample, or several.
        names: float values that both main graphs hold; default: all that depend on an input.
        threads: of each session.

    Raises:
        errors.InputError: QG124 where a name is not a float value of both models, QG120 where its shapes differ.
    """
    pair = files.load(float_model), files.load(quant_model)
    outputs = {str(v.name) for v in pair[0].graph.outputs}
    is_all = names is None
    candidates = tensors.shared_values(pair, _moving(pair) if is_all else names)
    first, second = (sessions.open_session(model, threads=threads) for model in pair)
    types = {o.name: o.type for o in first.get_outputs()}
    floats = [name for name in candidates if types[name] in DTYPES]
    tensors.require_names(floats if is_all else candidates, floats, "float model")
    samples = [feeds] if isinstance(feeds, Mapping) else feeds
    arrived = {name: ErrorMeter() for name in floats}
    meanings = {name: Meaning() for name in floats}
    for sample in samples:
        for name, x, y in zip(
            floats, first.run(floats, sample), second.run(floats, sample), strict=True
        ):
            tensors.require_same_shape(name, x, y)
            arrived[name].add(x, y)
            meanings[name].add(x, y)
    moved = [n for n in floats if n not in outputs and meanings[n].is_other()]
    wanted = [n for n in floats if n not in moved]
    inputs = _cut(pair[1], {name: DTYPES[types[name]] for name in wanted})
    third = sessions.open_session(pair[1], threads=threads)
    alone = {name: ErrorMeter() for name in wanted}
    for sample in samples:
        expected = first.run(wanted, sample)
        given = {**sample, **dict(zip(inputs, expected, strict=True))}
        for name, x, y in zip(wanted, expected, third.run(wanted, given), strict=True):
            alone[name].add(x, y)
    makers = {str(v.name): graph.where(node) for node in pair[0].graph for v in node.outputs}
    losses = [TensorLoss(n, makers[n], alone[n].result(), arrived[n].result()) for n in wanted]
    return TensorLosses(tuple(losses), tuple(moved))


def _moving(pair: Sequence[ir.Model]) -> list[str]:
    """Values of both models that depend on an input: what is made of constants alone is part of the layer."""
    found: list[dict[str, ir.Value]] = []
    for model in pair:
        moved = {v for v in model.graph.inputs if v.const_value is None}
        for node in model.graph:
            if moved.intersection(node.inputs) or any(True for _ in graph.bodies(node)):
                moved.update(node.outputs)
        found.append({str(v.name): v for n in model.graph for v in n.outputs if v in moved})
    return [
        name
        for name, value in found[0].items()
        if name in found[1] and (value.dtype is None or value.dtype.is_floating_point())
    ]


def _cut(model: ir.Model, types: Mapping[str, ir.DataType]) -> list[str]:
    """Let consumers of every named value read a new input instead; the value stays an output. Names of the inputs."""
    fresh = graph.Names(model)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    made = []
    for name, dtype in types.items():
        given = graph.value(fresh(f"{name}.float"), dtype)
        for node, index in list(values[name].uses()):
            node.replace_input_with(index, given)
        made.append(given)
    model.graph.inputs.extend(made)
    return [str(v.name) for v in made]
