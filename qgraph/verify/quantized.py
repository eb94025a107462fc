"""Verifier rules for quantized operators: V08 (QuantizeLinear, DequantizeLinear), V09 (packed contrib operators)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qgraph import graph
from qgraph.verify.rules import Finding, Scope, rule, tensor_dtype, tensor_shape

SMALL = 4096  # scales with more elements are not read

T = ir.DataType
CODE_SINCE = {
    T.INT8: 10, T.UINT8: 10, T.INT32: 10,
    T.FLOAT8E4M3FN: 19, T.FLOAT8E4M3FNUZ: 19, T.FLOAT8E5M2: 19, T.FLOAT8E5M2FNUZ: 19,
    T.INT16: 21, T.UINT16: 21, T.INT4: 21, T.UINT4: 21,
    T.FLOAT4E2M1: 23, T.INT2: 25, T.UINT2: 25,
}  # fmt: skip
TYPE_NUMBERS = {int(t) for t in T}
CONTRIB_CODES = {T.INT8, T.UINT8, T.INT16, T.UINT16, T.INT32, T.INT4, T.UINT4}
AXIS_SINCE = 13
BLOCK_SINCE = 21


@rule("V08")
def quantize_nodes(scope: Scope) -> Iterator[Finding]:
    """Scale, zero point, axis, block size and code type of each Q and DQ node fit each other and the opset."""
    for node in scope.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.domain not in ("", "com.microsoft") or len(node.inputs) < 2:
            continue
        for message, hint in _codes(scope, node):
            yield Finding(scope.at(node), message, hint)
        for message, hint in _granularity(scope, node):
            yield Finding(scope.at(node), message, hint)
        for message, hint in _values(node):
            yield Finding(scope.at(node), message, hint)


@rule("V09")
def packed_nodes(scope: Scope) -> Iterator[Finding]:
    """Packed weights, scales and zero points have the shapes that the attributes promise."""
    for node in scope.nodes:
        if node.domain != "com.microsoft":
            continue
        if node.op_type == "MatMulNBits":
            found = _matmul_nbits(node)
        elif node.op_type == "GatherBlockQuantized":
            found = _gather_block_quantized(node)
        else:
            continue
        for message in found:
            yield Finding(scope.at(node), message)
        if node.op_type == "MatMulNBits" and _input(node, 4) is not None:
            yield Finding(
                scope.at(node),
                "uses g_idx, which ONNX Runtime computes wrongly for most bit widths",
                "permute the activations with Gather instead",
                "warning",
            )


def _codes(scope: Scope, node: ir.Node) -> Iterator[tuple[str, str]]:
    """The type of the codes is legal at the opset, and zero point and codes share it."""
    is_quantize = node.op_type == "QuantizeLinear"
    zero_point = tensor_dtype(_input(node, 2))
    codes = tensor_dtype(node.outputs[0]) if is_quantize else tensor_dtype(node.inputs[0])
    if is_quantize:
        number = _int(node, "output_dtype", 0)
        if number not in TYPE_NUMBERS:
            yield f"output_dtype is {number}, which is no type", ""
            return
        asked = T(number) if number else None
        implied = zero_point or asked or T.UINT8
        if codes is not None and codes != implied:
            source = "zero point" if zero_point else "output_dtype" if asked else "default"
            yield f"output is declared {codes.name}, the {source} makes it {implied.name}", ""
        if zero_point and asked and asked != zero_point:
            yield f"output_dtype is {asked.name}, zero point is {zero_point.name}", ""
        codes = implied
    elif codes is not None and zero_point is not None and zero_point != codes:
        yield f"zero point is {zero_point.name}, codes are {codes.name}", "they share one type"
    if codes is None:
        return
    version = scope.imports.get(node.domain, 1)
    if node.domain != "":
        if codes not in CONTRIB_CODES:
            yield f"{codes.name} codes are not supported by com.microsoft", ""
    elif codes not in CODE_SINCE:
        yield f"{codes.name} is no type for codes", ""
    elif version < CODE_SINCE[codes]:
        need = CODE_SINCE[codes]
        yield f"{codes.name} codes need opset {need}, the model has {version}", "raise the opset"


def _granularity(scope: Scope, node: ir.Node) -> Iterator[tuple[str, str]]:
    """The scale is one value, one per index of `axis`, or one per block along `axis`."""
    scale = tensor_shape(node.inputs[1])
    if scale is None:
        return
    zero_point = tensor_shape(_input(node, 2))
    if zero_point is not None and _squeeze_one(zero_point) != _squeeze_one(scale):
        yield (
            f"zero point has shape {_show(zero_point)}, scale {_show(scale)}",
            "they must be equal",
        )
    x = tensor_shape(node.inputs[0])
    block = _int(node, "block_size", 0)
    version = scope.imports.get(node.domain, 1) if node.domain == "" else BLOCK_SINCE
    if block < 0:
        yield f"block_size is {block}", "0 or a positive number"
    elif block > 0:
        if version < BLOCK_SINCE:
            yield (
                f"block_size needs opset {BLOCK_SINCE}, the model has {version}",
                "raise the opset",
            )
        yield from _blocked(node, x, scale, block)
    elif len(scale) > 1:
        yield (
            f"scale has shape {_show(scale)} without block_size",
            "set block_size, or use rank 0 or 1",
        )
    elif scale not in ([], [1]):
        if version < AXIS_SINCE:
            yield f"a scale per channel needs opset {AXIS_SINCE}, the model has {version}", ""
        yield from _per_axis(node, x, scale[0])


def _per_axis(
    node: ir.Node, x: list[int | None] | None, count: int | None
) -> Iterator[tuple[str, str]]:
    axis = _int(node, "axis", 1)
    if x is None:
        return
    if not -len(x) <= axis < len(x):
        yield f"axis {axis} is outside the input's shape {_show(x)}", ""
    elif _differ(x[axis], count):
        yield f"scale has {count} elements, axis {axis} of the input has {x[axis]}", ""


def _blocked(
    node: ir.Node, x: list[int | None] | None, scale: list[int | None], block: int
) -> Iterator[tuple[str, str]]:
    axis = _int(node, "axis", 1)
    if x is None:
        return
    if len(scale) != len(x):
        yield f"block_size needs a scale of rank {len(x)}, it has shape {_show(scale)}", ""
        return
    if not -len(x) <= axis < len(x):
        yield f"axis {axis} is outside the input's shape {_show(x)}", ""
        return
    want = list(x)
    size = want[axis]
    want[axis] = None if size is None else -(-size // block)
    if any(_differ(a, b) for a, b in zip(want, scale, strict=True)):
        yield f"scale has shape {_show(scale)}, block_size {block} needs {_show(want)}", ""


def _values(node: ir.Node) -> Iterator[tuple[str, str]]:
    try:
        scale = graph.small_array(node.inputs[1], SMALL)
    except ValueError:  # a Constant node without a value, which V06 reports
        return
    if scale is None or scale.size == 0:
        return
    if not np.isfinite(scale).all():
        yield "scale has NaN or Inf", "the range behind it was not finite"
    elif not scale.all():
        yield "scale is 0", "an all-zero block needs any other scale, e.g. 1"


def _matmul_nbits(node: ir.Node) -> Iterator[str]:
    n, k = _int(node, "N", 0), _int(node, "K", 0)
    bits, block = _int(node, "bits", 4), _int(node, "block_size", 0)
    if n < 1 or k < 1:
        yield f"N={n} and K={k} must be positive"
        return
    if bits not in (2, 4, 8):
        yield f"bits is {bits}, ONNX Runtime knows 2, 4 and 8"
        return
    if not _is_block(block):
        yield f"block_size is {block}, must be a power of two from 16 on"
        return
    blocks = -(-k // block)
    rows = -(-blocks * bits // 8)
    if (a := tensor_shape(_input(node, 0))) and _differ(a[-1], k):
        yield f"the last dimension of A is {a[-1]}, K is {k}"
    b = _input(node, 1)
    if (shape := tensor_shape(b)) is not None and any(
        map(_differ, _padded(shape, 3), (n, blocks, block * bits // 8))
    ):
        yield f"B has shape {_show(shape)}, must be [{n}, {blocks}, {block * bits // 8}]"
    if (dtype := tensor_dtype(b)) not in (None, T.UINT8):
        yield f"B is {dtype.name}, must be UINT8"
    if _differ(_size(_input(node, 2)), n * blocks):
        yield f"scales have {_size(_input(node, 2))} elements, must have {n} x {blocks}"
    zero_point = _input(node, 3)
    is_packed = tensor_dtype(zero_point) in (None, T.UINT8)
    if _differ(_size(zero_point), n * (rows if is_packed else blocks)):
        want = f"{n} x {rows} packed bytes" if is_packed else f"{n} x {blocks}"
        yield f"zero points have {_size(zero_point)} elements, must have {want}"
    if _differ(_size(_input(node, 5)), n):
        yield f"bias has {_size(_input(node, 5))} elements, N is {n}"


def _gather_block_quantized(node: ir.Node) -> Iterator[str]:
    bits, block = _int(node, "bits", 4), _int(node, "block_size", 128)
    data, scales = tensor_shape(_input(node, 0)), tensor_shape(_input(node, 2))
    dtype = tensor_dtype(_input(node, 0))
    if dtype is not None and dtype.name.startswith("FLOAT"):
        return
    if not _is_block(block):
        yield f"block_size is {block}, must be a power of two from 16 on"
        return
    if data is None or scales is None:
        return
    axis = _int(node, "quantize_axis", 1)
    if len(data) != len(scales) or not -len(data) <= axis < len(data):
        yield f"scales have shape {_show(scales)}, data {_show(data)}, quantize_axis is {axis}"
        return
    packing = 1
    if dtype == T.UINT8:
        if bits not in (2, 4, 8):
            yield f"bits is {bits}, uint8 data holds 2, 4 or 8"
            return
        packing = 8 // bits
    want = list(data)
    if packing > 1 and want[-1] is not None:
        want[-1] *= packing
    size = want[axis]
    want[axis] = None if size is None else -(-size // block)
    if any(map(_differ, want, scales)):
        yield f"scales have shape {_show(scales)}, must be {_show(want)}"
    zero_points = tensor_shape(_input(node, 3))
    if zero_points is not None:
        if packing > 1 and want[-1] is not None:
            want[-1] = -(-want[-1] // packing)
        if len(zero_points) != len(want) or any(map(_differ, want, zero_points)):
            yield f"zero points have shape {_show(zero_points)}, must be {_show(want)}"


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _int(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    if found is None or found.is_ref() or found.type != ir.AttributeType.INT:
        return default
    return found.as_int()


def _is_block(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def _differ(a: int | None, b: int | None) -> bool:
    """True where both are known and unequal."""
    return a is not None and b is not None and a != b


def _size(value: ir.Value | None) -> int | None:
    shape = tensor_shape(value)
    if shape is None or any(d is None for d in shape):
        return None
    return int(np.prod([d for d in shape if d is not None]))


def _padded(shape: list[int | None], rank: int) -> list[int | None]:
    """The shape if it has the rank, else one that fits nothing."""
    return shape if len(shape) == rank else [-1] * rank


def _squeeze_one(shape: list[int | None]) -> list[int | None]:
    """One value is one value, whether of rank 0 or 1."""
    return [] if shape == [1] else shape


def _show(shape: list[int | None]) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"
