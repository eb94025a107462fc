"""Targets and forms: what a runtime executes well, and how a quantized weight is written for it.

A `Form` is one way to write one use of a quantized weight into the graph (DequantizeLinear + MatMul, MatMulNBits,
...). A `Target` is a value: which forms it prefers for which kind of use. Both answer "no" with a reason, and that
text is the line in the report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.spec import QTensor, QuantSpec
from qgraph.spool import Spool
from qgraph.weights import Use, Weight


@dataclass(frozen=True, slots=True)
class Request:
    """A question to a form: may this use of a weight be written so?

    Attributes:
        use: the operator and the layout of the weight for it.
        dims: shape of the weight tensor.
        dtype: float type of the weight tensor.
        spec: how the weight is quantized.
        activation: how the operator's input is quantized, None for float.
        tied: the weight is also used in another way (a table that is also the head).
        barred: forms that cannot be taken for a reason that lies outside of this weight, each with the reason.
    """

    use: Use
    dims: tuple[int, ...]
    dtype: ir.DataType
    spec: QuantSpec
    activation: QuantSpec | None = None
    tied: bool = False
    barred: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How an operator rounds its input at run time.

    Attributes:
        bits: of the codes.
        block: columns that share a scale without zero point, 0 for the whole row; None where the whole tensor has one
            scale and zero point (DynamicQuantizeLinear).
    """

    bits: int
    block: int | None = None


class Form(ABC):
    """One way to write a quantized weight for its operator."""

    name: ClassVar[str]
    summary: ClassVar[str]
    domains: ClassVar[Mapping[str, int]] = {}
    takes_half_scales: ClassVar[bool] = False
    """Scales may be float16 where activations are float32."""

    @abstractmethod
    def refuses(self, request: Request) -> str:
        """Why this form cannot serve the request, or "" where it can."""

    @abstractmethod
    def opset(self, request: Request) -> int:
        """The lowest version of the default operator set that the form needs."""

    def layout(self, request: Request) -> Hashable:
        """How the codes lie in the file. Uses of one weight share one copy where their forms agree on it."""
        return self.name

    def nbytes(self, spec: QuantSpec, n: int, k: int) -> int:
        """What codes, scales and zero points of a [n, k] matrix take in the file, with padding."""
        return spec.nbytes(n, k)

    def partners(self, use: Use) -> tuple[int, ...]:
        """Further inputs of the operator that hold weights and must be in this form too."""
        return ()

    def rounding(self, spec: QuantSpec) -> Rounding | None:
        """How the operator rounds its input when the weight is quantized so; None where that is left to the runtime."""
        return None

    @abstractmethod
    def write(
        self, writer: Writer, weight: Weight, use: Use, q: QTensor, activation: QuantSpec | None
    ) -> ir.Node:
        """Replace the use in the graph; returns the node that now computes the operator's output."""


@dataclass(frozen=True, slots=True)
class Support:
    """A target's answer: a form, or the reason why there is none."""

    form: Form | None
    reason: str = ""


_MOVES = "Concat MaxPool Reshape Transpose Flatten Squeeze Unsqueeze Resize Slice Pad Identity"
MOVES = frozenset(_MOVES.split())
"""Operators that runtimes execute on codes as they are, where input and output share a grid."""


@dataclass(frozen=True)
class Integers:
    """Which operators a target computes on codes when their activations have static grids.

    Attributes:
        weighted: operators with weights → whether their kernel may leave its result in float.
        joined: operators without weights that compute on codes where all inputs and the output have grids.
        moves: operators that pass codes on; input and output share a grid.
        types: specs of activations that the kernels take, the default first.
        centred: operators whose kernels take no zero point but 0.
        gives_floats: an integer kernel gives float results too; what computes in float reads those and no codes.
        unsigned: kernels of operators without weights take uint8 alone, and none applies a Relu to a signed grid.
        needs_bias: a Conv without a bias is computed wrongly; it gets one of a single step.
        floats: operators whose weights stay float in models with static activations, each with the reason.
    """

    weighted: Mapping[str, bool]
    joined: frozenset[str]
    moves: frozenset[str]
    types: tuple[str, ...]
    centred: frozenset[str] = frozenset()
    unsigned: bool = False
    needs_bias: bool = False
    floats: Mapping[str, str] = field(default_factory=dict)
    gives_floats: bool = False

    def refuses(self, activation: QuantSpec) -> str:
        """Why no kernel computes on activations of this spec, or ""."""
        taken = [QuantSpec.parse(text) for text in self.types]
        if any(
            t.qtype == activation.qtype and (activation.symmetric or not t.symmetric) for t in taken
        ):
            return ""
        return f"its kernels take activations of {', '.join(self.types)}, not {activation}"


@dataclass(frozen=True)
class Target:
    """A runtime to compile for. A value: register your own with `qgraph.register(Target(...))`.

    Attributes:
        name: as in `--target NAME`.
        summary: one line for `qgraph targets`.
        forms: for each kind of use ("matmul", "gemm", "conv", "conv_transpose", "gather",
            "slice", "rnn") the forms that the
            target takes, best first.
        max_opset: highest default-domain opset that the oldest supported version of the runtime loads.
        auto: specs that the recipe `auto` tries per kind, best first, with the reason that the report prints.
        inspect: reads the graph that the runtime really executes and says what became of each value; None where
            the target is not one runtime.
        notes: sentences for the report on a model that has a form, by the form's name.
        integers: which operators compute on codes; None where static activations bring nothing.
        timed: ONNX Runtime runs its files as they are served, so latency can be measured with it.
        fuses_readers: it makes one product of those that read the same tensor (q/k/v, gate/up) where their weights
            have one format.
    """

    name: str
    summary: str
    forms: Mapping[str, Sequence[Form]]
    max_opset: int = 23
    auto: Mapping[str, Sequence[tuple[str, str, str]]] = field(default_factory=dict)
    inspect: Callable[[str, Sequence[str]], Mapping[str, Any]] | None = None
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    integers: Integers | None = None
    timed: bool = False
    fuses_readers: bool = False

    def support(self, request: Request, reachable_opset: int) -> Support:
        """The best form for a request that needs no higher opset than `reachable_opset`, or why there is none."""
        forms, reason = self._accepting(request, reachable_opset)
        return Support(forms[0] if forms else None, reason)

    def support_all(
        self, requests: Sequence[Request], reachable_opset: int
    ) -> tuple[list[Form], str]:
        """A form for every use of one weight, such that its codes are stored once; or why there is none."""
        accepted: list[dict[Hashable, Form]] = []
        for request in requests:
            forms, reason = self._accepting(request, reachable_opset)
            if not forms:
                return [], reason
            accepted.append({f.layout(request): f for f in reversed(forms)})
        common = [layout for layout in accepted[0] if all(layout in a for a in accepted)]
        if not common:
            names = ", ".join(sorted({f.name for a in accepted for f in a.values()}))
            return [], f"its uses would store the codes in different layouts ({names})"
        # The dictionaries are worst first: the best for all has the highest places.
        best = max(common, key=lambda layout: sum(list(a).index(layout) - len(a) for a in accepted))
        return [a[best] for a in accepted], ""

    def _accepting(self, request: Request, reachable_opset: int) -> tuple[list[Form], str]:
        """Every form that serves a request, best first, or why none does."""
        accepting, reasons = [], []
        for form in self.forms.get(request.use.kind, ()):
            reason = request.barred.get(form.name) or form.refuses(request) or _mixed(form, request)
            needed = 0 if reason else form.opset(request)
            if not reason and needed > min(self.max_opset, reachable_opset):
                limit = (
                    f"target {self.name} stays at {self.max_opset}"
                    if needed > self.max_opset
                    else f"this model can be raised to {reachable_opset} only"
                )
                reason = f"needs opset {needed}, {limit}"
            if reason:
                reasons.append(f"{form.name}: {reason}")
            else:
                accepting.append(form)
        if not accepting and not reasons:
            return [], f"target {self.name} has no quantized form for {request.use.node.op_type}"
        return accepting, "" if accepting else "; ".join(reasons)

    def form(self, name: str) -> Form:
        """The form of that name."""
        return next(f for forms in self.forms.values() for f in forms if f.name == name)

    def nbytes(self, spec: QuantSpec, forms: Sequence[str], n: int, k: int) -> int:
        """What a [n, k] matrix takes in the file where its uses have these forms; they share what is stored."""
        named = [self.form(name) for name in forms if name]
        return max((form.nbytes(spec, n, k) for form in named), default=spec.nbytes(n, k))


def _mixed(form: Form, request: Request) -> str:
    is_half = request.spec.scale_dtype == "float16" and request.dtype == ir.DataType.FLOAT
    return (
        "its scales have the type of the activations, float32"
        if is_half and not form.takes_half_scales
        else ""
    )


class Writer:
    """Writes forms into one model: fresh names, and constants that several uses share are written once."""

    def __init__(self, model: ir.Model, spool: Spool) -> None:
        self.model = model
        self.names = graph.Names(model)
        self._spool = spool
        self._ancestors = graph.ancestors(model)
        self._shared: dict[tuple[Any, ...], ir.Value] = {}
        self._computed: dict[tuple[Any, ...], tuple[ir.Value, ...]] = {}

    def place(self, weight: Weight, use: Use) -> tuple[ir.Graph, ir.Node]:
        """Where a DequantizeLinear for this use goes: the graph that holds its constants, and the node it precedes.

        ONNX Runtime does not load a DequantizeLinear in a body whose codes lie outside. So both go into the body
        where no other graph uses the weight, and otherwise both go outside, before the node that holds the body.
        """
        body = graph.owner(use.node)
        if body is self.model.graph or all(u.node.graph is body for u in weight.uses):
            return body, use.node
        return self.model.graph, self._ancestors[body]

    def constant(
        self,
        key: tuple[Any, ...],
        name: str,
        make: Callable[[], np.ndarray[Any, Any] | ir.TensorProtocol],
        home: ir.Graph | None = None,
    ) -> ir.Value:
        """The initializer for `key` (weight name and storage form), made on first use and shared afterwards."""
        if key not in self._shared:
            data = make()
            tensor = data if not isinstance(data, np.ndarray) else ir.tensor(self._spool.keep(data))
            self._shared[key] = graph.add_initializer(
                home or self.model.graph, self.names(name), tensor
            )
        return self._shared[key]

    def packed(
        self,
        key: tuple[Any, ...],
        name: str,
        codes: Callable[[], np.ndarray[Any, Any]],
        dtype: ir.DataType,
        home: ir.Graph | None = None,
    ) -> ir.Value:
        """An initializer of an ONNX sub-byte (or 8-bit) type from one code per byte."""
        from qgraph import numerics

        def make() -> ir.TensorProtocol:
            unpacked = codes()
            if dtype.bitwidth == 8:
                return ir.tensor(self._spool.keep(unpacked))
            data = self._spool.keep(numerics.pack(unpacked, dtype.bitwidth))
            return ir.PackedTensor(data, dtype, shape=ir.Shape(unpacked.shape))

        return self.constant(key, name, make, home)

    def memo(
        self, key: tuple[Any, ...], make: Callable[[], tuple[ir.Value, ...]]
    ) -> tuple[ir.Value, ...]:
        """Computed values that several uses share (a quantized activation), made on first use."""
        if key not in self._computed:
            self._computed[key] = make()
        return self._computed[key]

    def require(self, domains: Mapping[str, int]) -> None:
        """Import the operator sets that a form uses."""
        for domain, version in domains.items():
            self.model.graph.opset_imports.setdefault(domain, version)
