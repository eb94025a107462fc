"""What our operators compute, in plain ONNX.

A model carries the body of every ai.qgraph operator that it uses, as a function of the same name. With the native
library the kernel runs; without it, ONNX Runtime and onnx.reference run the body, which unpacks the same bytes. The
bodies are the specification: kernels are tested against them.

Activations are rounded in blocks of `activation_block` along K (0 is the whole row), with one scale each:

    s = max|x| / L,  x ≈ s * round(x * (L / max|x|))      L = 127 for 8 bits, 7 for 4 bits; 0 bits keeps x

Activations and results are float32 or float16, computed in float32 and rounded once; GatherInt4 gives float32.

No input is optional: runtimes up to 1.23 crash on absent inputs, and a body cannot ask for them. A bias of [1] with 0
and zero points of [1, 1, 1] with 8 (4 for 3 bits) stand for none.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser
import onnx_ir as ir

DOMAIN = "ai.qgraph"
VERSION = 1
MIN_OPSET = 18

# x → its dynamically rounded value. Blocks below 2^-100 count as zero, so that 1 / max stays finite.
_ROUNDED = """
    X32 = Cast <to: int = 1> (X)
    k = Constant <value_int: int = @K> ()
    bits = Constant <value_int: int = @activation_bits> ()
    asked = Constant <value_int: int = @activation_block> ()
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    four = Constant <value_int: int = 4> ()
    at_0 = Constant <value_ints: ints = [0]> ()
    last = Constant <value_ints: ints = [-1]> ()
    is_blocked = Greater (asked, zero)
    block = Where (is_blocked, asked, k)
    k_up = Add (k, block)
    k_last = Sub (k_up, one)
    blocks = Div (k_last, block)
    padded = Mul (blocks, block)
    missing = Sub (padded, k)
    missing_1d = Unsqueeze (missing, at_0)
    pads = Concat <axis: int = 0> (at_0, missing_1d)
    float_zero = Constant <value_float: float = 0.0> ()
    rank = Size (x_shape)
    last_axis = Sub (rank, one)
    last_axis_1d = Unsqueeze (last_axis, at_0)
    x_padded = Pad (X32, pads, float_zero, last_axis_1d)
    lead = Shape <end: int = -1> (X)
    k_1d = Unsqueeze (k, at_0)
    blocks_1d = Unsqueeze (blocks, at_0)
    block_1d = Unsqueeze (block, at_0)
    padded_1d = Unsqueeze (padded, at_0)
    blocked_shape = Concat <axis: int = 0> (lead, blocks_1d, block_1d)
    x_blocks = Reshape <allowzero: int = 1> (x_padded, blocked_shape)
    sizes = Abs (x_blocks)
    peak = ReduceMax <keepdims: int = 1> (sizes, last)
    tiny = Constant <value_float: float = 7.888609052210118e-31> ()
    is_zero = Less (peak, tiny)
    is_4_bits = Equal (bits, four)
    levels_4 = Constant <value_float: float = 7.0> ()
    levels_8 = Constant <value_float: float = 127.0> ()
    levels = Where (is_4_bits, levels_4, levels_8)
    float_one = Constant <value_float: float = 1.0> ()
    divisor = Where (is_zero, float_one, peak)
    inverse = Div (levels, divisor)
    plain_scale = Div (peak, levels)
    x_scale = Where (is_zero, float_zero, plain_scale)
    scaled = Mul (x_blocks, inverse)
    x_codes = Round (scaled)
    x_values = Mul (x_codes, x_scale)
    joined_shape = Concat <axis: int = 0> (lead, padded_1d)
    x_joined = Reshape <allowzero: int = 1> (x_values, joined_shape)
    x_rounded = Slice (x_joined, at_0, k_1d, last)
    is_rounded = Greater (bits, zero)
    x = Where (is_rounded, x_rounded, X32)
"""

# [tiles * 16, columns] → W [N, K].
_CUT = """
    n_given = Constant <value_int: int = @N> ()
    k_given = Constant <value_int: int = @K> ()
    start = Constant <value_ints: ints = [0, 0]> ()
    first_axis = Constant <value_ints: ints = [0]> ()
    n_end = Unsqueeze (n_given, first_axis)
    k_end = Unsqueeze (k_given, first_axis)
    end = Concat <axis: int = 0> (n_end, k_end)
    axes = Constant <value_ints: ints = [0, 1]> ()
    W = Slice (w_all, start, end, axes)
"""

_INT4_CODES = """
    nibble = Constant <value: tensor = uint8 {15}> ()
    shift = Constant <value: tensor = uint8 {4}> ()
    low = BitwiseAnd (codes, nibble)
    high = BitShift <direction: string = "RIGHT"> (codes, shift)
    tiled_shape = Constant <value_ints: ints = [0, 0, 1, 16, 4]> ()
    low_tiled = Reshape (low, tiled_shape)
    high_tiled = Reshape (high, tiled_shape)
    fields = Concat <axis: int = 2> (low_tiled, high_tiled)
"""

_INT3_CODES = """
    byte_axis = Constant <value_ints: ints = [2]> ()
    bytes_0 = Constant <value_ints: ints = [0]> ()
    bytes_64 = Constant <value_ints: ints = [64]> ()
    bytes_96 = Constant <value_ints: ints = [96]> ()
    low_bytes = Slice (codes, bytes_0, bytes_64, byte_axis)
    high_bytes = Slice (codes, bytes_64, bytes_96, byte_axis)
    low_shape = Constant <value_ints: ints = [0, 0, 1, 64]> ()
    high_shape = Constant <value_ints: ints = [0, 0, 1, 32]> ()
    low_by_field = Reshape (low_bytes, low_shape)
    high_by_field = Reshape (high_bytes, high_shape)
    low_shifts = Constant <value: tensor = uint8[4, 1] {0, 2, 4, 6}> ()
    first_shifts = Constant <value: tensor = uint8[4, 1] {0, 1, 2, 3}> ()
    second_shifts = Constant <value: tensor = uint8[4, 1] {4, 5, 6, 7}> ()
    low_shifted = BitShift <direction: string = "RIGHT"> (low_by_field, low_shifts)
    first_shifted = BitShift <direction: string = "RIGHT"> (high_by_field, first_shifts)
    second_shifted = BitShift <direction: string = "RIGHT"> (high_by_field, second_shifts)
    high_shifted = Concat <axis: int = 3> (first_shifted, second_shifted)
    low_mask = Constant <value: tensor = uint8 {3}> ()
    high_mask = Constant <value: tensor = uint8 {1}> ()
    high_place = Constant <value: tensor = uint8 {2}> ()
    low_bits = BitwiseAnd (low_shifted, low_mask)
    high_bit = BitwiseAnd (high_shifted, high_mask)
    high_bits = BitShift <direction: string = "LEFT"> (high_bit, high_place)
    flat_fields = BitwiseOr (low_bits, high_bits)
    tiled_shape = Constant <value_ints: ints = [0, 0, 4, 16, 4]> ()
    fields = Reshape (flat_fields, tiled_shape)
"""

_GROUPED_WEIGHTS = """
    rows = Transpose <perm: ints = [0, 3, 1, 2, 4]> (fields)
    groups = Shape <start: int = 1, end: int = 2> (scales)
    tile_rows = Constant <value_ints: ints = [0, 16]> ()
    rest = Constant <value_ints: ints = [-1]> ()
    grouped_shape = Concat <axis: int = 0> (tile_rows, groups, rest)
    grouped = Reshape (rows, grouped_shape)
    q = Cast <to: int = 1> (grouped)
    scales_by_row = Transpose <perm: ints = [0, 2, 1]> (scales)
    scales_float = Cast <to: int = 1> (scales_by_row)
    s = Unsqueeze (scales_float, rest)
    points_by_row = Transpose <perm: ints = [0, 2, 1]> (zero_points)
    points_float = Cast <to: int = 1> (points_by_row)
    z = Unsqueeze (points_float, rest)
    centred = Sub (q, z)
    dequantized = Mul (centred, s)
    w_all = Flatten <axis: int = 2> (dequantized)
"""

_TERNARY_WEIGHTS = """
    three = Constant <value: tensor = uint8 {3}> ()
    shifts = Constant <value: tensor = uint8[4, 1] {0, 2, 4, 6}> ()
    by_field_shape = Constant <value_ints: ints = [0, 0, 1, 64]> ()
    by_field = Reshape (codes, by_field_shape)
    shifted = BitShift <direction: string = "RIGHT"> (by_field, shifts)
    fields = BitwiseAnd (shifted, three)
    tiled_shape = Constant <value_ints: ints = [0, 0, 4, 16, 4]> ()
    tiled = Reshape (fields, tiled_shape)
    rows = Transpose <perm: ints = [0, 3, 1, 2, 4]> (tiled)
    flat = Flatten <axis: int = 2> (rows)
    q = Cast <to: int = 1> (flat)
    middle = Constant <value_float: float = 1.0> ()
    w_all = Sub (q, middle)
"""

_PRODUCT = """
    w_turned = Transpose <perm: ints = [1, 0]> (W)
    product = MatMul (x, w_turned)
"""

# H = factor (x) Sylvester; entry (i, j) of Sylvester's matrix is -1 to the number of bits in i & j.
_HADAMARD = """
    block_scalar = Constant <value_int: int = @block_size> ()
    block_axis = Constant <value_ints: ints = [0]> ()
    block = Unsqueeze (block_scalar, block_axis)
    given_shape = Shape (X)
    lead = Shape <end: int = -1> (X)
    size = Shape <end: int = 1> (factor)
    order = Div (block, size)
    rest = Constant <value_ints: ints = [-1]> ()
    width = Shape <start: int = -1> (X)
    blocks = Div (width, block)
    split_shape = Concat <axis: int = 0> (lead, blocks, size, order)
    X32 = Cast <to: int = 1> (X)
    x = Reshape <allowzero: int = 1> (X32, split_shape)
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    order_scalar = Squeeze (order)
    index = Range (zero, order_scalar, one)
    bits = Cast <to: int = 12> (index)
    at_0 = Constant <value_ints: ints = [0]> ()
    rows = Unsqueeze (bits, rest)
    columns = Unsqueeze (bits, at_0)
    b32 = BitwiseAnd (rows, columns)
    n16 = Constant <value: tensor = uint32 {16}> ()
    n8 = Constant <value: tensor = uint32 {8}> ()
    n4 = Constant <value: tensor = uint32 {4}> ()
    n2 = Constant <value: tensor = uint32 {2}> ()
    n1 = Constant <value: tensor = uint32 {1}> ()
    s16 = BitShift <direction: string = "RIGHT"> (b32, n16)
    b16 = BitwiseXor (b32, s16)
    s8 = BitShift <direction: string = "RIGHT"> (b16, n8)
    b8 = BitwiseXor (b16, s8)
    s4 = BitShift <direction: string = "RIGHT"> (b8, n4)
    b4 = BitwiseXor (b8, s4)
    s2 = BitShift <direction: string = "RIGHT"> (b4, n2)
    b2 = BitwiseXor (b4, s2)
    s1 = BitShift <direction: string = "RIGHT"> (b2, n1)
    b1 = BitwiseXor (b2, s1)
    parity_bits = BitwiseAnd (b1, n1)
    parity = Cast <to: int = 1> (parity_bits)
    two = Constant <value_float: float = 2.0> ()
    float_one = Constant <value_float: float = 1.0> ()
    doubled = Mul (two, parity)
    sylvester = Sub (float_one, doubled)
    turned = MatMul (x, sylvester)
    mixed = MatMul (factor, turned)
    block_float = Cast <to: int = 1> (block)
    norm = Sqrt (block_float)
    scaled = Div (mixed, norm)
    Y32 = Reshape <allowzero: int = 1> (scaled, given_shape)
    Y = CastLike (Y32, X)
"""

# Rows are picked before they are unpacked. One zero point may stand for all.
_GATHER = """
    n_given = Constant <value_int: int = @N> ()
    k_given = Constant <value_int: int = @K> ()
    at_0 = Constant <value_ints: ints = [0]> ()
    last = Constant <value_ints: ints = [-1]> ()
    n_1d = Unsqueeze (n_given, at_0)
    k_1d = Unsqueeze (k_given, at_0)
    four = Constant <value_ints: ints = [4]> ()
    steps = Shape <start: int = 1, end: int = 2> (codes)
    groups = Shape <start: int = 1, end: int = 2> (scales)
    lane_shape = Constant <value_ints: ints = [0, 0, 16, 4]> ()
    lanes = Reshape (codes, lane_shape)
    by_row = Transpose <perm: ints = [0, 2, 1, 3]> (lanes)
    code_shape = Concat <axis: int = 0> (last, steps, four)
    code_rows_padded = Reshape (by_row, code_shape)
    code_rows = Slice (code_rows_padded, at_0, n_1d, at_0)
    value_shape = Concat <axis: int = 0> (last, groups)
    scales_by_row = Transpose <perm: ints = [0, 2, 1]> (scales)
    scale_rows_padded = Reshape (scales_by_row, value_shape)
    scale_rows = Slice (scale_rows_padded, at_0, n_1d, at_0)
    scales_shape = Shape (scales)
    points_spread = Expand (zero_points, scales_shape)
    points_by_row = Transpose <perm: ints = [0, 2, 1]> (points_spread)
    point_rows_padded = Reshape (points_by_row, value_shape)
    point_rows = Slice (point_rows_padded, at_0, n_1d, at_0)
    picked = Gather <axis: int = 0> (code_rows, indices)
    picked_scales = Gather <axis: int = 0> (scale_rows, indices)
    picked_points = Gather <axis: int = 0> (point_rows, indices)
    nibble = Constant <value: tensor = uint8 {15}> ()
    shift = Constant <value: tensor = uint8 {4}> ()
    low = BitwiseAnd (picked, nibble)
    high = BitShift <direction: string = "RIGHT"> (picked, shift)
    halves = Concat <axis: int = -1> (low, high)
    lead = Shape (indices)
    eight = Constant <value_ints: ints = [8]> ()
    columns = Mul (steps, eight)
    width = Div (columns, groups)
    grouped_shape = Concat <axis: int = 0> (lead, groups, width)
    grouped = Reshape <allowzero: int = 1> (halves, grouped_shape)
    q = Cast <to: int = 1> (grouped)
    scales_float = Cast <to: int = 1> (picked_scales)
    s = Unsqueeze (scales_float, last)
    points_float = Cast <to: int = 1> (picked_points)
    z = Unsqueeze (points_float, last)
    centred = Sub (q, z)
    dequantized = Mul (centred, s)
    padded_shape = Concat <axis: int = 0> (lead, columns)
    padded = Reshape <allowzero: int = 1> (dequantized, padded_shape)
    Y = Slice (padded, at_0, k_1d, last)
"""

_BODIES = {
    "MatMulInt4": (
        "<K, N, block_size, activation_bits, activation_block> (X, codes, scales, zero_points, bias) => (Y)",
        "x_shape = Shape (X)\n"
        + _ROUNDED
        + _INT4_CODES
        + _GROUPED_WEIGHTS
        + _CUT
        + _PRODUCT
        + "Y32 = Add (product, bias)\nY = CastLike (Y32, X)",
    ),
    "MatMulInt3": (
        "<K, N, block_size, activation_bits, activation_block> (X, codes, scales, zero_points, bias) => (Y)",
        "x_shape = Shape (X)\n"
        + _ROUNDED
        + _INT3_CODES
        + _GROUPED_WEIGHTS
        + _CUT
        + _PRODUCT
        + "Y32 = Add (product, bias)\nY = CastLike (Y32, X)",
    ),
    "MatMulTernary": (
        "<K, N, activation_bits, activation_block> (X, codes, scale, bias) => (Y)",
        "x_shape = Shape (X)\n"
        + _ROUNDED
        + _TERNARY_WEIGHTS
        + _CUT
        + _PRODUCT
        + "scaled_product = Mul (product, scale)\nY32 = Add (scaled_product, bias)\nY = CastLike (Y32, X)",
    ),
    "GatherInt4": (
        "<K, N, block_size> (indices, codes, scales, zero_points) => (Y)",
        _GATHER,
    ),
    "Hadamard": ("<block_size> (X, factor) => (Y)", _HADAMARD),
}

NAMES = tuple(_BODIES)


@functools.cache
def proto(name: str, opset: int) -> onnx.FunctionProto:
    """The body of an operator as a FunctionProto, for models of that opset.

    Raises:
        ValueError: the opset is below 18.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"the body of {name} needs opset {MIN_OPSET}, the model has {opset}")
    signature, body = _BODIES[name]
    head = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{name} {signature}'
    return onnx.parser.parse_function(f"{head} {{\n{body}\n}}")


def rounding(domain: str, opset: int) -> ir.Function:
    """`Round` of a domain: X with its blocks rounded as the operators here round theirs.

    Raises:
        ValueError: the opset is below 18.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"rounding needs opset {MIN_OPSET}, the model has {opset}")
    head = f'<domain: "{domain}", opset_import: ["": {opset}]>\nRound <K, activation_bits, activation_block> (X) => (Y)'
    body = f"x_shape = Shape (X)\n{_ROUNDED}\nY = CastLike (x, X)"
    return ir.serde.deserialize_function(onnx.parser.parse_function(f"{head} {{\n{body}\n}}"))


def function(name: str, opset: int) -> ir.Function:
    """The body of an operator as a new onnx_ir function."""
    return ir.serde.deserialize_function(proto(name, opset))


def require(model: ir.Model, name: str) -> None:
    """Let a model carry the body of an operator; once, however often it is asked."""
    opset = model.graph.opset_imports.get("", MIN_OPSET)
    model.graph.opset_imports.setdefault("", opset)
    model.graph.opset_imports.setdefault(DOMAIN, VERSION)
    made = function(name, opset)
    model.functions.setdefault(made.identifier(), made)
