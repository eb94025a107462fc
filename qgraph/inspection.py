"""What is in a model: its interface, operators and weights, what of it can be quantized, and why the rest cannot.

    found = inspect_model("model.onnx")
    for weight in found.weights: print(weight.label, weight.reason or "can be quantized")

Reads the graph only: no weight is loaded into memory and nothing runs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx_ir as ir

from qgraph import errors, files, graph, registry, verify, weights
from qgraph import recipe as recipes
from qgraph.pipeline import Context, Pipeline
from qgraph.weights import Weight

PLANNING = ("canonicalize", "assign-precision")
_QUANTIZED = ("Quantize", "NBits", "Integer", "QLinear", "Int4", "Ternary")  # in names of operators


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output; a dimension is a size, a name or None, a shape is None where the rank is unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None
    has_default: bool = False


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """One stored float tensor that operators multiply with or look up in.

    Attributes:
        name: of the initializer.
        label: a name a person recognises.
        operators: operator types that use it, with counts.
        shape: of the tensor.
        matrix: (N, K), what a solver sees.
        dtype: element type.
        nbytes: stored size.
        uses: number of nodes that use it.
        tied: used in several ways, as a table and as a head.
        others: operator types that use it in a way that keeps a float copy alive.
        reason: why it cannot be quantized, "" where it can.
    """

    name: str
    label: str
    operators: dict[str, int]
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    dtype: str
    nbytes: int
    uses: int
    tied: bool
    others: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A stored tensor; `readers` are operator types, `reason` says why it is no weight ("" for one)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    readers: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a recipe would do for a target: how many weights become what, and why the rest stays float."""

    target: str
    recipe: str
    specs: dict[str, int]
    quantized_bytes: int
    stays: dict[str, int]


@dataclass(frozen=True, slots=True)
class Symmetry:
    """Channels that can be transformed together, or the reason why not; see `qgraph.symmetry`.

    Attributes:
        name: an activation that has these channels.
        kind: "permute", "scale" or "rotate".
        legal: the largest class of transforms that keeps the function, "" where there is none.
        channels: how many.
        block: how many of them may mix: all, or those of one head.
        writers: weights that make the channels.
        readers: weights that take them.
        riders: biases, gains and tables in between.
        gains: norms whose gain has to move into the readers first.
        keeps_mean: a rotation has to keep the all-ones vector (LayerNorm).
        bounds: Clip operators that have to become one bound per channel.
        reason: why `legal` is not larger.
        node: whose reason it is.
    """

    name: str
    kind: str
    legal: str
    channels: int
    block: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    riders: int
    gains: int
    keeps_mean: bool
    bounds: int
    reason: str
    node: str


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect_model`. `to_json` is stable: pipelines may rely on its keys.

    Attributes:
        source: path or zoo:NAME.
        file_bytes: of the file and its external data; 0 for a model that is no file.
        weight_bytes: of all stored tensors.
        external_files: names of the files that hold external data.
        ir_version: of the format.
        opsets: version by domain, "ai.onnx" for the default one.
        producer: who wrote the file.
        metadata: keys and values of the model.
        inputs: that a caller feeds.
        outputs: that a caller gets.
        operators: number of nodes by type, bodies included, most first.
        functions: model-local functions.
        weights: what weights.find knows, in order of use.
        others: stored tensors of two or more dimensions that are no weight, largest first.
        largest: the largest stored tensors.
        findings: what the verifier says.
        forecasts: per target, if asked for.
        symmetries: groups of channels, if asked for.
    """

    source: str
    file_bytes: int
    weight_bytes: int
    external_files: tuple[str, ...]
    ir_version: int
    opsets: dict[str, int]
    producer: str
    metadata: dict[str, str]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: dict[str, int]
    functions: tuple[str, ...]
    weights: tuple[WeightInfo, ...]
    others: tuple[Constant, ...]
    largest: tuple[Constant, ...]
    findings: tuple[errors.Diagnostic, ...]
    forecasts: tuple[Forecast, ...] = field(default=())
    symmetries: tuple[Symmetry, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect_model(
    source: files.Source,
    *,
    targets: Iterable[str] = (),
    recipe: str = "auto",
    largest: int = 10,
    with_symmetries: bool = False,
) -> Inspection:
    """Look at a model.

    Args:
        source: path, "zoo:NAME", ModelProto or onnx_ir.Model; not changed.
        targets: also say what `recipe` would do for these.
        recipe: name or file.
        largest: how many of the largest tensors to list.
        with_symmetries: also say which channels can be permuted, scaled and rotated.

    Raises:
        errors.InputError: QG101 to QG104 where the model cannot be read.
        errors.RecipeError: QG303 for an unknown target or recipe.
    """
    model = files.load(source)
    is_file = isinstance(source, (str, os.PathLike)) and os.path.isfile(source)
    found = weights.find(model)
    known = {w.value for w in found}
    held = [v for _, v in graph.initializers(model) if v.const_value is not None]
    constants = [_constant(v, is_weight=v in known) for v in held]
    constants.sort(key=lambda c: (-c.nbytes, c.name))
    return Inspection(
        source=os.fspath(source) if isinstance(source, (str, os.PathLike)) else "(model in memory)",
        file_bytes=files.file_bytes(source) if is_file else 0,  # type: ignore[arg-type]
        weight_bytes=files.weight_bytes(model),
        external_files=_external_files(model),
        ir_version=model.ir_version,
        opsets={domain or "ai.onnx": v for domain, v in sorted(model.opset_imports.items())},
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        metadata=dict(sorted(model.metadata_props.items())),
        inputs=tuple(map(_port, model.graph.inputs)),
        outputs=tuple(map(_port, model.graph.outputs)),
        operators=_operators(model),
        functions=tuple(sorted(f"{f.domain}::{f.name}" for f in model.functions.values())),
        weights=tuple(map(_weight, found)),
        others=tuple(c for c in constants if c.reason and len(c.shape) > 1),
        largest=tuple(constants[:largest]),
        findings=tuple(verify.verify(model)),
        forecasts=tuple(forecast(model, target, recipe) for target in targets),
        symmetries=symmetries(model) if with_symmetries else (),
    )


def forecast(model: ir.Model, target: str, recipe: str = "auto") -> Forecast:
    """What a recipe would do with a model for a target; nothing is solved or written."""
    chosen = recipes.load(recipe).model_copy(update={"target": target})
    ctx = Context(registry.get("target", target), chosen)
    work = graph.clone(model)
    Pipeline(PLANNING).run(work, ctx)
    found = {w.name: w for w in weights.find(work)}
    specs: Counter[str] = Counter()
    stays: Counter[str] = Counter()
    nbytes = 0
    for decision in ctx.plan.decisions.values():
        if decision.role != "weight":
            continue
        if decision.spec is None:
            stays[f"{decision.code} {decision.reason}"] += 1
            continue
        specs[str(decision.spec)] += 1
        nbytes += ctx.target.nbytes(decision.spec, decision.forms, *found[decision.value].shape)
    return Forecast(target, chosen.name, dict(specs), nbytes, dict(stays))


def symmetries(model: ir.Model) -> tuple[Symmetry, ...]:
    """Groups of channels of a model, as `canonicalize` leaves it; the model itself is not changed."""
    from qgraph import symmetry

    work = graph.clone(model)
    chosen = recipes.load("auto")
    Pipeline(("canonicalize",)).run(work, Context(registry.get("target", chosen.target), chosen))
    return tuple(
        Symmetry(
            name=g.name,
            kind=g.kind,
            legal=g.legal,
            channels=g.size,
            block=g.block,
            writers=tuple(dict.fromkeys(str(m.value.name) for m in g.writers)),
            readers=tuple(dict.fromkeys(str(m.value.name) for m in g.readers)),
            riders=len(g.riders),
            gains=len(g.gains),
            keeps_mean=g.keeps_mean,
            bounds=len(g.bounds),
            reason=g.reason,
            node=graph.where(g.forbids) if g.forbids is not None else "",
        )
        for g in symmetry.groups(work)
    )


def _port(value: ir.Value) -> Port:
    dims = None
    if value.shape is not None:
        dims = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    dtype = value.dtype.name.lower() if value.dtype is not None else str(value.type or "")
    return Port(str(value.name), dtype, dims, value.is_initializer())


def _operators(model: ir.Model) -> dict[str, int]:
    counts = Counter(
        f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.nodes(model)
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _constant(value: ir.Value, *, is_weight: bool) -> Constant:
    tensor = value.const_value
    assert tensor is not None
    readers = tuple(sorted({node.op_type for node, _ in value.uses()}))
    is_quantized = bool(readers) and all(any(p in r for p in _QUANTIZED) for r in readers)
    reason = (
        ""
        if is_weight
        else "is quantized already"
        if is_quantized
        else "is no float tensor"
        if tensor.dtype not in graph.FLOATS
        else f"is read by {', '.join(readers)} only, which takes no quantized weights"
        if readers
        else "is not used"
    )
    dims = tuple(tensor.shape.numpy())
    return Constant(str(value.name), _type(tensor), dims, int(tensor.nbytes), readers, reason)


def _type(tensor: ir.TensorProtocol) -> str:
    return tensor.dtype.name.lower()


def _weight(weight: Weight) -> WeightInfo:
    assert weight.value.const_value is not None
    return WeightInfo(
        name=weight.name,
        label=weight.label,
        operators=dict(Counter(u.node.op_type for u in weight.uses)),
        shape=weight.dims,
        matrix=weight.shape,
        dtype=_type(weight.value.const_value),
        nbytes=weight.nbytes,
        uses=len(weight.uses),
        tied=weight.is_tied,
        others=tuple(sorted({n.op_type for n in weight.others})),
        reason=next((u.reason for u in weight.uses if u.reason), ""),
    )


def _external_files(model: ir.Model) -> tuple[str, ...]:
    tensors = (v.const_value for _, v in graph.initializers(model))
    return tuple(sorted({str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}))
