"""One small function for each change of an operator's meaning between two opsets.

`ADAPTERS[(operator, version)]` rewrites a node of the version before into one of that version. Steps without an
adapter only added types or optional things whose default is the old meaning; `opset` checks that on the schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.opset.edit import Edit, Refused

Adapter: TypeAlias = Callable[[ir.Node, Edit], None]

ADAPTERS: dict[tuple[str, int], Adapter] = {}

REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSumSquare",
)  # fmt: skip
ARITHMETIC = (
    "Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less",
)  # fmt: skip


def adapter(version: int, *operators: str) -> Callable[[Adapter], Adapter]:
    """Register what turns operators of an earlier version into those of `version`."""

    def register(function: Adapter) -> Adapter:
        for operator in operators:
            ADAPTERS[operator, version] = function
        return function

    return register


def _nothing(node: ir.Node, edit: Edit) -> None:
    """The schemas differ, the meaning does not."""


# Clip-1 had no bounds by default, Clip-6 the largest float. GRU-1 misspelled a default.
for _step in (("Clip", 6), ("GRU", 3)):
    ADAPTERS[_step] = _nothing


@adapter(13, "Squeeze", "Unsqueeze", "ReduceSum")
@adapter(18, *REDUCTIONS)
def axes_to_input(node: ir.Node, edit: Edit) -> None:
    """axes: attribute -> input."""
    axes = edit.take(node, "axes")
    if axes:
        edit.add_input(node, 1, edit.constant(node, axes, np.int64, "axes"))


@adapter(13, "Softmax", "LogSoftmax", "Hardmax")
def softmax_13(node: ir.Node, edit: Edit) -> None:
    """Softmax over all axes from `axis` on -> over one: Reshape(Softmax(Flatten(x, axis), -1), Shape(x))."""
    axis = edit.get(node, "axis", 1)
    x = node.inputs[0]
    rank = edit.rank(x)
    if axis == -1 or (rank and (axis % rank == rank - 1 or _trailing_ones(x, axis % rank))):
        edit.set(node, axis=axis)
        return
    flat = edit.before(node, "Flatten", [x], {"axis": axis})
    y = edit.move(node, [flat], axis=-1)
    edit.become(node, "Reshape", [y, edit.before(node, "Shape", [x])])


def _trailing_ones(x: ir.Value | None, axis: int) -> bool:
    """True if nothing but ones follows `axis`, so that one axis is all axes from there on."""
    return x is not None and x.shape is not None and all(d == 1 for d in x.shape[axis + 1 :])


@adapter(11, "Clip")
def clip_11(node: ir.Node, edit: Edit) -> None:
    """min, max: attributes -> inputs. An absent bound is no bound (Clip-6: the largest float)."""
    for index, name in ((1, "min"), (2, "max")):
        bound = edit.take(node, name)
        if bound is not None:
            edit.add_input(node, index, edit.constant(node, bound, _numpy(node, edit), name))


@adapter(2, "Pad")
def pad_2(node: ir.Node, edit: Edit) -> None:
    """The attribute paddings -> pads."""
    edit.set(node, pads=edit.take(node, "paddings"))


@adapter(11, "Pad")
def pad_11(node: ir.Node, edit: Edit) -> None:
    """pads, value: attributes -> inputs."""
    edit.add_input(node, 1, edit.constant(node, edit.take(node, "pads"), np.int64, "pads"))
    value = edit.take(node, "value", 0.0)
    if value != 0:
        edit.add_input(node, 2, edit.constant(node, value, _numpy(node, edit), "value"))


@adapter(10, "Slice")
def slice_10(node: ir.Node, edit: Edit) -> None:
    """starts, ends, axes: attributes -> inputs."""
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        values = edit.take(node, name)
        if values is not None:
            edit.add_input(node, index, edit.constant(node, values, np.int64, name))


@adapter(10, "TopK")
def topk_10(node: ir.Node, edit: Edit) -> None:
    """k: attribute -> input."""
    edit.add_input(node, 1, edit.constant(node, [edit.take(node, "k")], np.int64, "k"))


@adapter(5, "Reshape")
def reshape_5(node: ir.Node, edit: Edit) -> None:
    """shape: attribute -> input."""
    edit.add_input(node, 1, edit.constant(node, edit.take(node, "shape", ()), np.int64, "shape"))


@adapter(2, "Split")
def split_2(node: ir.Node, edit: Edit) -> None:
    """Lengths could come as an input once; as an attribute they stay."""
    if len(node.inputs) > 1:
        raise Refused("its lengths are an input, which opset 2 took away")
    edit.set(node, axis=edit.get(node, "axis", 0))


@adapter(13, "Split")
def split_13(node: ir.Node, edit: Edit) -> None:
    """split: attribute -> input."""
    lengths = edit.take(node, "split")
    if lengths is not None:
        edit.add_input(node, 1, edit.constant(node, lengths, np.int64, "split"))


@adapter(18, "Split")
def split_18(node: ir.Node, edit: Edit) -> None:
    """Without lengths the number of outputs has to be said."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        edit.set(node, num_outputs=len(node.outputs))


@adapter(6, "Cast")
def cast_6(node: ir.Node, edit: Edit) -> None:
    """to: type name -> type number."""
    edit.set(node, to=int(ir.DataType[str(edit.take(node, "to")).upper()]))


@adapter(4, "Concat")
def concat_4(node: ir.Node, edit: Edit) -> None:
    """axis: 1 by default -> required."""
    edit.set(node, axis=edit.get(node, "axis", 1))


@adapter(6, "Selu")
def selu_6(node: ir.Node, edit: Edit) -> None:
    """The constants got more digits."""
    edit.set(node, alpha=edit.get(node, "alpha", 1.6732), gamma=edit.get(node, "gamma", 1.0507))


@adapter(2, "LpPool", "GlobalLpPool")
def lp_2(node: ir.Node, edit: Edit) -> None:
    """p: float -> int."""
    p = edit.take(node, "p", 2.0)
    if p != int(p):
        raise Refused(f"p is {p}, opset 2 only has whole numbers")
    edit.set(node, p=int(p))


@adapter(7, *ARITHMETIC)
def broadcast_7(node: ir.Node, edit: Edit) -> None:
    """B aligned at `axis` of A -> numpy broadcasting, which aligns at the end."""
    axis = edit.take(node, "axis")
    if not edit.take(node, "broadcast", 0) or axis is None:
        return
    a, b = edit.rank(node.inputs[0]), edit.rank(node.inputs[1])
    if a is None or b is None:
        raise Refused("it broadcasts along an axis and the ranks of its inputs are not known")
    missing = a - axis % a - b
    if missing > 0:
        node.replace_input_with(1, _append_ones(node, edit, 1, b, missing))


@adapter(7, "PRelu")
def prelu_7(node: ir.Node, edit: Edit) -> None:
    """One slope for each channel -> numpy broadcasting."""
    x, slope = edit.rank(node.inputs[0]), edit.rank(node.inputs[1])
    if x is None or slope is None:
        raise Refused("the ranks of its inputs are not known")
    if slope == 1 and x > 2:
        node.replace_input_with(1, _append_ones(node, edit, 1, 1, x - 2))


def _append_ones(node: ir.Node, edit: Edit, index: int, rank: int, count: int) -> ir.Value:
    axes = list(range(rank, rank + count))
    return edit.before(node, "Unsqueeze", [node.inputs[index]], {"axes": axes})


@adapter(7, "Gemm")
def gemm_7(node: ir.Node, edit: Edit) -> None:
    """The attribute broadcast went: C always broadcasts."""
    edit.take(node, "broadcast")


@adapter(7, "LSTM", "GRU", "RNN")
def recurrent_7(node: ir.Node, edit: Edit) -> None:
    """output_sequence went: Y is given if it is asked for."""
    edit.take(node, "output_sequence")


@adapter(7, "BatchNormalization")
def batch_norm_7(node: ir.Node, edit: Edit) -> None:
    """is_test=1 went: it is the only meaning left."""
    if not edit.take(node, "is_test", 0):
        raise Refused("it is in training mode (is_test=0)")


@adapter(9, "BatchNormalization")
def batch_norm_9(node: ir.Node, edit: Edit) -> None:
    """spatial=1 went: it is the only meaning left."""
    if not edit.take(node, "spatial", 1):
        raise Refused("it normalizes each pixel on its own (spatial=0)")


@adapter(14, "BatchNormalization")
def batch_norm_14(node: ir.Node, edit: Edit) -> None:
    """The outputs for training changed."""
    _drop_outputs(node, "its statistics are used, so it is in training mode")


@adapter(7, "Dropout")
def dropout_7(node: ir.Node, edit: Edit) -> None:
    """is_test=1 went: it is the only meaning left."""
    if not edit.take(node, "is_test", 0):
        raise Refused("it is in training mode (is_test=0)")


@adapter(10, "Dropout")
def dropout_10(node: ir.Node, edit: Edit) -> None:
    """The mask became a boolean."""
    _drop_outputs(node, "its mask is used, which opset 10 made a boolean")


@adapter(12, "Dropout")
def dropout_12(node: ir.Node, edit: Edit) -> None:
    """ratio: attribute -> input; the mask of an inference became all true."""
    _drop_outputs(node, "its mask is used, which means another thing since opset 12")
    ratio = edit.take(node, "ratio")
    if ratio is not None:
        edit.add_input(node, 1, edit.constant(node, ratio, np.float32, "ratio"))


def _drop_outputs(node: ir.Node, reason: str) -> None:
    """Leave only the first output."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Refused(reason)
    node.resize_outputs(1)


@adapter(11, "Scatter")
def scatter_11(node: ir.Node, edit: Edit) -> None:
    """Scatter -> ScatterElements."""
    node.op_type = "ScatterElements"


@adapter(7, "Upsample")
def upsample_7(node: ir.Node, edit: Edit) -> None:
    """height_scale, width_scale -> scales."""
    height, width = edit.take(node, "height_scale"), edit.take(node, "width_scale")
    edit.set(node, scales=[1.0, 1.0, height, width])
    if edit.get(node, "mode", "nearest") == "bilinear":
        edit.set(node, mode="linear")


@adapter(9, "Upsample")
def upsample_9(node: ir.Node, edit: Edit) -> None:
    """scales: attribute -> input."""
    scales = edit.take(node, "scales")
    edit.add_input(node, 1, edit.constant(node, scales, np.float32, "scales"))


@adapter(10, "Upsample")
def upsample_10(node: ir.Node, edit: Edit) -> None:
    """Upsample -> Resize."""
    node.op_type = "Resize"
    edit.only_grows = True


@adapter(11, "Resize")
def resize_11(node: ir.Node, edit: Edit) -> None:
    """Coordinates got a choice. Before: x / scale, rounded down where it grows, up where it shrinks."""
    x, scales = node.inputs[0], node.inputs[1]
    rounding = "floor"
    if edit.get(node, "mode", "nearest") == "nearest" and not edit.only_grows:
        known = graph.small_array(scales, 16)
        shrinks = None if known is None else {bool(s < 1) for s in known.ravel() if s != 1}
        if shrinks is None or len(shrinks) > 1:
            what = "are not constant" if shrinks is None else "both grow and shrink"
            raise Refused(
                f"its scales {what}, so that the rounding that it means is not one of opset 11"
            )
        rounding = "ceil" if True in shrinks else "floor"
    edit.set(node, coordinate_transformation_mode="asymmetric", nearest_mode=rounding)
    edit.inputs(node, [x, edit.constant(node, [], np.float32, "roi"), scales])


@adapter(13, "Resize")
def resize_13(node: ir.Node, edit: Edit) -> None:
    """One way to compute coordinates went."""
    mode = edit.get(node, "coordinate_transformation_mode", "")
    if mode == "tf_half_pixel_for_nn":
        raise Refused(f"{mode} was removed; half_pixel_symmetric comes near")


@adapter(16, "RoiAlign")
def roi_align_16(node: ir.Node, edit: Edit) -> None:
    """The default became half_pixel; before it was output_half_pixel."""
    edit.set(node, coordinate_transformation_mode="output_half_pixel")


@adapter(20, "GridSample")
def grid_sample_20(node: ir.Node, edit: Edit) -> None:
    """Mode bilinear -> linear, bicubic -> cubic: the operator is no longer for images alone."""
    mode = edit.take(node, "mode", "bilinear")
    edit.set(node, mode={"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


@adapter(20, "DFT")
def dft_20(node: ir.Node, edit: Edit) -> None:
    """axis: attribute -> input, and another default."""
    edit.add_input(node, 2, edit.constant(node, edit.take(node, "axis", 1), np.int64, "axis"))


@adapter(21, "GroupNormalization")
def group_norm_21(node: ir.Node, edit: Edit) -> None:
    """Scale and bias of each group -> of each channel: s[g] -> s[g * C/G + i]."""
    x = node.inputs[0]
    groups = edit.get(node, "num_groups")
    count = edit.constant(node, [groups], np.int64, "groups")
    channels = edit.before(node, "Shape", [x], {"start": 1, "end": 2})
    size = edit.before(node, "Div", [channels, count])
    shape = edit.before(node, "Concat", [count, size], {"axis": 0})
    axes = edit.constant(node, [1], np.int64, "axes")
    flat = edit.constant(node, [-1], np.int64, "flat")
    for index in (1, 2):
        column = edit.before(node, "Unsqueeze", [node.inputs[index], axes])
        spread = edit.before(node, "Expand", [column, shape])
        node.replace_input_with(index, edit.before(node, "Reshape", [spread, flat]))


def _numpy(node: ir.Node, edit: Edit) -> np.dtype[np.generic]:
    """The numpy type of the node's first input."""
    dtype = edit.dtype(node.inputs[0])
    if dtype is None:
        raise Refused("the type of its input is not known; run shape inference first")
    return dtype.numpy()


def operators() -> Sequence[str]:
    """Names of the operators that have an adapter, for the documentation."""
    return sorted({name for name, _ in ADAPTERS})
