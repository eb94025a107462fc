"""The graph that a runtime really executes, after its own rewriting.

`qgraph.executed.ort` and `qgraph.executed.openvino` read it, `qgraph.executed.match` says which executed node now
computes each value of a model that qgraph wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

Scalar = int | float | str


@dataclass(frozen=True, slots=True)
class ConstantInput:
    """A constant that a node reads.

    Attributes:
        name: the runtime's name for it, often a made-up one.
        dtype: element type as numpy and ONNX write it: "uint4", "int8", "float32".
        shape: its dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExecutedNode:
    """One node that the runtime executes.

    Attributes:
        op: operator ("MatMulNBits") or layer type ("FullyConnected").
        name: the runtime's name of the node.
        inputs: what it reads, in order: values for ONNX Runtime, node names for OpenVINO.
        outputs: names of the model's values that it computes. OpenVINO lists every value fused into the node.
        constants: the inputs that are constants.
        domain: operator domain, "" for the standard one and for OpenVINO.
        detail: what else the runtime says about it, for people.
        input_dtypes: element type of each input, "" where the runtime does not say.
        attributes: the attributes that are single numbers or texts.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[ConstantInput, ...] = ()
    domain: str = ""
    detail: str = ""
    input_dtypes: tuple[str, ...] = ()
    attributes: Mapping[str, Scalar] = field(default_factory=dict)

    def constant(self, index: int) -> ConstantInput | None:
        """The constant that input number `index` is, None where it is computed or absent."""
        if index >= len(self.inputs):
            return None
        return next((c for c in self.constants if c.name == self.inputs[index]), None)


@dataclass(frozen=True)
class ExecutedGraph:
    """Everything that a runtime executes for one model, bodies of If and Loop included where it shows them.

    Attributes:
        runtime: "onnxruntime" or "openvino".
        version: its version.
        nodes: in the order of the runtime, a body after the node that holds it.
    """

    runtime: str
    version: str
    nodes: tuple[ExecutedNode, ...]

    @cached_property
    def _producers(self) -> dict[str, ExecutedNode]:
        found: dict[str, ExecutedNode] = {}
        for node in self.nodes:
            for output in node.outputs:
                found.setdefault(output, node)
        return found

    def producer(self, output_name: str) -> ExecutedNode | None:
        """The node that computes a value, None where no node does."""
        return self._producers.get(output_name) if output_name else None
