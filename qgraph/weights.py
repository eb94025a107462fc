"""Where the weights are: which constants are used how, by which operators, and how each lies as a matrix [N, K].

A `Weight` is one stored tensor with all its uses. It may be used by several nodes, in several bodies, directly or
through one Transpose (tied embeddings): it is quantized once and stays shared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph
from qgraph.spec import QuantSpec

_ANONYMOUS = re.compile(r"(val|onnx::\w+|_v|t)_?\d+$")
_VIEWS = frozenset(
    {
        "Unsqueeze",
        "Squeeze",
        "Reshape",
        "Cast",
        "Identity",
        "Transpose",
        "Expand",
        "Gather",
        "Slice",
    }
)
_SENTINEL = 1e4


@dataclass(frozen=True, slots=True)
class Matrix:
    """How a tensor's dimensions form a matrix [N, K]: transpose by `perm`; the first `rows` dimensions are N.

    MatMul B[K, N] is Matrix((1, 0), 1), Conv W[O, I, kh, kw] is Matrix((0, 1, 2, 3), 1).
    """

    perm: tuple[int, ...]
    rows: int = 1

    def shape(self, tensor: Sequence[int]) -> tuple[int, int]:
        """(N, K) of a tensor of that shape."""
        sizes = [tensor[p] for p in self.perm]
        return int(np.prod(sizes[: self.rows])), int(np.prod(sizes[self.rows :]))

    def of(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The tensor as a matrix [N, K]; a view where that is possible."""
        return tensor.transpose(self.perm).reshape(self.shape(tensor.shape))

    def back(self, matrix: npt.NDArray[Any], tensor: Sequence[int]) -> npt.NDArray[Any]:
        """The inverse of `of`: a matrix [N, K] as a contiguous tensor of that shape."""
        sizes = [tensor[p] for p in self.perm]
        return np.ascontiguousarray(matrix.reshape(sizes).transpose(np.argsort(self.perm)))

    def onnx_form(
        self, spec: QuantSpec, tensor: Sequence[int]
    ) -> tuple[int | None, int, tuple[int, ...]] | str:
        """(axis, block_size, scale shape) as DequantizeLinear wants them, or the reason why there is none.

        axis is None per tensor; block_size is 0 where the form is not blocked.
        """
        if spec.is_per_tensor:
            return None, 0, ()
        k_axes = self.perm[self.rows :]
        wide = [a for a in k_axes if tensor[a] != 1]
        n_axes = [a for a in self.perm[: self.rows] if tensor[a] != 1] or [self.perm[0]]
        if spec.group == 0 and len(n_axes) == 1:
            return n_axes[0], 0, (tensor[n_axes[0]],)
        if len(wide) > 1:
            return f"blocks would run over {len(wide)} axes of a {list(tensor)} tensor; ONNX blocks one axis"
        axis = wide[0] if wide else k_axes[-1]
        size = spec.group or tensor[axis]
        return axis, size, tuple(-(-d // size) if a == axis else d for a, d in enumerate(tensor))


@dataclass(frozen=True, slots=True)
class Use:
    """One node that reads a weight.

    Attributes:
        node: the operator.
        index: which input of it.
        kind: "matmul", "gemm", "conv", "conv_transpose", "gather", "slice", "rnn".
        matrix: how the *weight tensor* (before any Transpose) lies as [N, K] for this use.
        through: the Transpose between weight and node, if any.
        reason: why this use cannot be quantized, or "".
        in_body: the node stands in a body (If, Loop, Scan), not in the main graph.
    """

    node: ir.Node
    index: int
    kind: str
    matrix: Matrix
    through: ir.Node | None = None
    reason: str = ""
    in_body: bool = False


@dataclass(slots=True)
class Weight:
    """A stored float tensor that quantizable operators use.

    Attributes:
        value: the initializer.
        label: a name a person recognises (the exporter's layer name where the initializer's own says nothing).
        uses: every quantizable use.
        others: nodes that use it in a way that cannot be quantized (they keep a float copy alive).
    """

    value: ir.Value
    label: str
    uses: list[Use] = field(default_factory=list)
    others: list[ir.Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The initializer's name, the key of plans and reports."""
        return str(self.value.name)

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        assert self.value.const_value is not None
        return tuple(self.value.const_value.shape.numpy())

    @property
    def matrix(self) -> Matrix:
        """The layout that most uses agree on (the first of them on a tie)."""
        layouts = [u.matrix for u in self.uses]
        return max(layouts, key=layouts.count)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.matrix.shape(self.dims)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the float tensor."""
        assert self.value.const_value is not None
        return int(self.value.const_value.nbytes)

    @property
    def kinds(self) -> list[str]:
        """The kinds of use, in order of first appearance."""
        return list(dict.fromkeys(u.kind for u in self.uses))

    @property
    def is_tied(self) -> bool:
        """Used in more than one way: as a table and as a head, or both straight and transposed."""
        return len({(u.through is not None, u.kind) for u in self.uses}) > 1

    @property
    def is_output(self) -> bool:
        """The graph gives the weight away as it is, or transposed."""
        turned = [u.through.outputs[0] for u in self.uses if u.through is not None]
        return any(v.is_graph_output() for v in [self.value, *turned])

    def read(self) -> npt.NDArray[Any]:
        """The weight as a matrix [N, K], read-only, in its stored float type; a view of the file where possible."""
        return self.matrix.of(graph.array(self.value))


def find(model: ir.Model) -> list[Weight]:
    """All weights of a model, bodies included, in order of first use."""
    found: dict[ir.Value, Weight] = {}
    for node in graph.nodes(model):
        for index, v in enumerate(node.inputs):
            if v is None:
                continue
            origin, through = source(v)
            if origin is None:
                continue
            use = use_of(node, index, len(tensor_shape(origin)), through)
            if use is None:
                continue
            if origin.is_graph_input() and not use.reason:
                use = replace(
                    use,
                    reason="it is a graph input with a default, so a caller may override it; "
                    "--set options.canonicalize.freeze_inputs=true makes such inputs constants",
                )
            if node.graph is not model.graph:
                use = replace(use, in_body=True)
            weight = found.setdefault(origin, Weight(origin, _label(origin, node)))
            weight.uses.append(use)
    for weight in found.values():
        ours = {u.node for u in weight.uses}
        readers = [n for n, _ in weight.value.uses()]
        turned = {u.through for u in weight.uses if u.through is not None}
        readers = [n for n in readers if n not in turned] + [
            n for t in turned for n, _ in t.outputs[0].uses()
        ]
        weight.others = [n for n in dict.fromkeys(readers) if n not in ours]
    _make_unique(found.values())
    return list(found.values())


def source(v: ir.Value) -> tuple[ir.Value | None, ir.Node | None]:
    """The stored float tensor behind a node input, and the Transpose in between if there is one."""
    through = None
    producer = v.producer()
    if (
        producer is not None
        and producer.op_type == "Transpose"
        and producer.domain == ""
        and producer.inputs[0] is not None
    ):
        through, v = producer, producer.inputs[0]
    if (
        not v.is_initializer()
        or v.const_value is None
        or v.const_value.dtype not in graph.FLOATS
        or len(v.const_value.shape) < 2
    ):
        return None, None
    return v, through


def use_of(node: ir.Node, index: int, rank: int, through: ir.Node | None = None) -> Use | None:
    """How input `index` of a node uses a weight tensor of that rank; None where that input is no weight.

    Args:
        node: the operator.
        index: which input of it.
        rank: of the weight tensor.
        through: the Transpose between the weight and the node, if any.
    """
    found = LAYOUTS.get((node.domain, node.op_type, index))
    if found is None:
        return None
    kind, layout = found
    answer = layout(node, rank)
    if isinstance(answer, str):
        return Use(node, index, kind, Matrix(tuple(range(rank))), through, answer)
    if through is not None:
        # The node sees source.transpose(order): its dimension d is the source's dimension order[d].
        order = graph.attribute(through, "perm", list(reversed(range(rank))))
        answer = Matrix(tuple(int(order[p]) for p in answer.perm), answer.rows)
    return Use(node, index, kind, answer, through)


def tensor_shape(constant: ir.Value) -> tuple[int, ...]:
    """Shape of a constant's data."""
    assert constant.const_value is not None
    return tuple(constant.const_value.shape.numpy())


def _matmul(node: ir.Node, rank: int) -> Matrix | str:
    return Matrix((*range(rank - 2), rank - 1, rank - 2), rank - 1)


def _matmul_left(node: ir.Node, rank: int) -> Matrix | str:
    if graph.is_constant(node.inputs[1]):
        return "both inputs of the MatMul are constant"
    return "the weight is the left input of the MatMul; runtimes quantize the right one only"


def _gemm(node: ir.Node, rank: int) -> Matrix | str:
    return Matrix((0, 1)) if graph.attribute(node, "transB", 0) else Matrix((1, 0))


def _conv(node: ir.Node, rank: int) -> Matrix | str:
    return Matrix(tuple(range(rank)))


def _conv_transpose(node: ir.Node, rank: int) -> Matrix | str:
    return Matrix((1, 0, *range(2, rank)))


def _gather(node: ir.Node, rank: int) -> Matrix | str:
    axis = int(graph.attribute(node, "axis", 0))
    if axis % rank != 0:
        return f"Gather along axis {axis}; only rows (axis 0) of a table can be quantized"
    if graph.is_constant(node.inputs[1]):
        return "the Gather has constant indices; it is not an embedding"
    return Matrix(tuple(range(rank)), rank - 1)


def _slice(node: ir.Node, rank: int) -> Matrix | str:
    """A table whose first rows are cut off, as learned positions are; axes must be the first one only."""
    axes = (
        graph.small_array(node.inputs[3])
        if len(node.inputs) > 3 and node.inputs[3] is not None
        else graph.attribute(node, "axes", None)
    )
    if axes is None or [int(a) % rank for a in np.asarray(axes).reshape(-1)] != [0]:
        return "a Slice along other axes than rows"
    table = graph.array(node.inputs[0]) if graph.is_constant(node.inputs[0]) else None  # type: ignore[arg-type]
    if table is None or not np.isfinite(table).all() or np.abs(table).max(initial=0) >= _SENTINEL:
        return "it holds a sentinel such as -1e9 or -inf: a mask, not a table of positions"
    if any(reader.op_type == "Mul" for reader in _readers(node.outputs[0])):
        return "its rows are factors (rotary embedding); their error would grow with every token"
    return Matrix(tuple(range(rank)), rank - 1)


def _readers(v: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, looking through reshapes."""
    found: list[ir.Node] = []
    for node, _ in v.uses():
        found += _readers(node.outputs[0]) if node.op_type in _VIEWS else [node]
    return found


def _rnn(node: ir.Node, rank: int) -> Matrix | str:
    return Matrix((0, 1, 2), 2)


def _unknown(text: str) -> Callable[[ir.Node, int], str]:
    return lambda node, rank: text


LAYOUTS: dict[tuple[str, str, int], Any] = {
    ("", "MatMul", 1): ("matmul", _matmul),
    ("", "MatMul", 0): ("matmul", _matmul_left),
    ("", "Gemm", 1): ("gemm", _gemm),
    ("", "Conv", 1): ("conv", _conv),
    ("", "ConvTranspose", 1): ("conv_transpose", _conv_transpose),
    ("", "Gather", 0): ("gather", _gather),
    ("", "Slice", 0): ("slice", _slice),
    **{("", op, index): ("rnn", _rnn) for op in ("LSTM", "GRU", "RNN") for index in (1, 2)},
    # Operators that hold weights and have no quantized form here yet: listed, so that the report can say so.
    ("", "Einsum", 1): ("einsum", _unknown("this Einsum is no product with a matrix")),
    **{
        ("com.microsoft", op, 1): (
            "fused",
            _unknown(f"com.microsoft.{op} is fused already; quantize the model before fusing it"),
        )
        for op in ("Attention", "FusedMatMul", "FusedGemm", "FusedConv", "NhwcFusedConv")
    },
}


def _label(source: ir.Value, node: ir.Node) -> str:
    """The initializer's name, or the layer name that the exporter left in the node where that is `val_41`."""
    name = str(source.name)
    if not _ANONYMOUS.match(name):
        return name
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    parts = [p.strip(" '\"[]") for p in scopes.split(",")]
    layer = next((p for p in reversed(parts) if p and "." in p), "")
    return f"{layer}.weight" if layer else f"{node.name or node.op_type}:{name}"


def _make_unique(found: Iterable[Weight]) -> None:
    seen: dict[str, int] = {}
    for weight in found:
        count = seen.get(weight.label, 0)
        seen[weight.label] = count + 1
        if count:
            weight.label = f"{weight.label}#{count + 1}"
