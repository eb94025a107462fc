"""How a tensor is quantized: `QType`, `QuantSpec`, and the result, `QTensor`.

A weight is always solved as a matrix w[N, K]: N output channels, K the reduction axis. `QuantSpec.block` is the
shape of the piece of that matrix that shares one scale, with 0 for "the whole dimension":

    per tensor (0, 0)     per channel (1, 0)     groups of 32 (1, 32)

How a matrix lies in an ONNX tensor (transposed, flattened from a convolution) is the business of `qgraph.weights`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qgraph import errors

if TYPE_CHECKING:
    import onnx_ir as ir

Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class QType:
    """An integer type: codes qmin..qmax in `bits` bits, stored as the ONNX type `onnx_name`.

    ONNX has no type of 3 bits; operators that take them have a layout of their own. With 7 of 8 bits pairs of products
    fit into the 16-bit sums of CPUs without VNNI. 16 bits are for activations.
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    onnx_name: str

    @property
    def is_signed(self) -> bool:
        """True where codes may be negative."""
        return self.qmin < 0

    @property
    def dtype(self) -> ir.DataType:
        """The onnx_ir data type.

        Raises:
            ValueError: ONNX has none.
        """
        import onnx_ir as ir

        if not self.onnx_name:
            raise ValueError(f"ONNX has no type for {self.name}")
        return ir.DataType[self.onnx_name]

    @property
    def stored_bits(self) -> int:
        """Bits of one code in a file."""
        return 8 if self.bits == 7 else self.bits

    @property
    def packed_bits(self) -> int:
        """Bits of one code where whole codes share a byte (`numerics.pack`)."""
        return 4 if self.bits == 3 else self.stored_bits

    @property
    def container(self) -> type[np.integer[Any]]:
        """The numpy type that holds unpacked codes."""
        if self.bits == 16:
            return np.int16 if self.is_signed else np.uint16
        return np.int8 if self.is_signed else np.uint8


def _integers(*widths: int) -> dict[str, QType]:
    types = {}
    for bits in widths:
        half = 2 ** (bits - 1)
        stored = {3: "", 7: "INT8"}.get(bits, f"INT{bits}")
        types[f"int{bits}"] = QType(f"int{bits}", bits, -half, half - 1, stored)
        types[f"uint{bits}"] = QType(f"uint{bits}", bits, 0, 2 * half - 1, stored and f"U{stored}")
    return types


QTYPES: dict[str, QType] = _integers(2, 3, 4, 7, 8)
"""The types of weights."""
WIDE_QTYPES: dict[str, QType] = _integers(16)
"""Types of activations alone."""

_FORM = re.compile(
    r"(?P<type>[a-z0-9]+)(?:\.(?P<grain>tensor|ch|g(?P<group>\d+)))?(?:\.(?P<sym>sym|asym))?(?:\.(?P<scale>f16|f32))?"
)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How to quantize. Signed types are symmetric by default, unsigned ones have zero points.

    Attributes:
        qtype: integer type of the codes.
        block: piece of the [N, K] matrix that shares a scale; 0 is the whole dimension.
        symmetric: no zero point (the code of 0.0 is 0, or 2^(bits-1) for unsigned storage).
        scale_dtype: "float32" or "float16", the type that scales are stored and applied in.
        dynamic: the scale is computed at run time (activations only).
    """

    qtype: QType
    block: tuple[int, int] = (1, 0)
    symmetric: bool = True
    scale_dtype: str = "float32"
    dynamic: bool = False

    @staticmethod
    def parse(text: str) -> QuantSpec:
        """Read "TYPE[.tensor|.ch|.gN][.sym|.asym][.f16|.f32]", e.g. "int4.g32", "uint8.ch.asym", "int8.tensor".

        >>> QuantSpec.parse("uint4.g32").block
        (1, 32)

        Raises:
            errors.RecipeError: QG302 for text of another form or an unknown type.
        """
        match = _FORM.fullmatch(text)
        known = QTYPES | WIDE_QTYPES
        if match is None or match["type"] not in known:
            hint = "write TYPE[.tensor|.ch|.gN][.sym|.asym], e.g. int4.g32.sym; " + errors.nearest(
                text.split(".")[0], known
            )
            what = "is not a quantization spec"
            raise errors.RecipeError(errors.Diagnostic("error", "QG302", repr(text), what, hint))
        qtype = known[match["type"]]
        group = int(match["group"] or 0)
        if match["group"] is not None and group < 2:
            raise errors.RecipeError(
                errors.Diagnostic(
                    "error",
                    "QG302",
                    repr(text),
                    f"has group size {group}",
                    "use at least 2, or .ch for per channel",
                )
            )
        block = (0, 0) if match["grain"] == "tensor" else (1, group)
        symmetric = qtype.is_signed if match["sym"] is None else match["sym"] == "sym"
        return QuantSpec(
            qtype, block, symmetric, "float16" if match["scale"] == "f16" else "float32"
        )

    @property
    def group(self) -> int:
        """Group size along K, 0 for the whole row."""
        return self.block[1]

    @property
    def is_per_tensor(self) -> bool:
        """One scale for everything."""
        return self.block == (0, 0)

    def __str__(self) -> str:
        grain = "tensor" if self.is_per_tensor else f"g{self.group}" if self.group else "ch"
        sign = "sym" if self.symmetric else "asym"
        scale = ".f16" if self.scale_dtype == "float16" else ""
        return f"{self.qtype.name}.{grain}.{sign}{scale}"

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scales of a [n, k] matrix.

        >>> QuantSpec.parse("int4.g32").scale_shape(8, 100)
        (8, 4)
        """
        rows, columns = self.block
        return (1 if rows == 0 else -(-n // rows), 1 if columns == 0 else -(-k // columns))

    def nbytes(self, n: int, k: int) -> int:
        """Stored size of a [n, k] matrix in bytes: codes, scales and zero points, without padding."""
        scales = int(np.prod(self.scale_shape(n, k)))
        codes = n * k + (0 if self.symmetric else scales)
        bits = codes * self.qtype.stored_bits
        return -(-bits // 8) + scales * (2 if self.scale_dtype == "float16" else 4)

    def storage(self, *, signed: bool) -> QuantSpec:
        """The same spec with codes stored as the signed or unsigned type of the same width."""
        return replace(self, qtype=QTYPES[f"{'' if signed else 'u'}int{self.qtype.bits}"])


@dataclass(frozen=True)
class QTensor:
    """A quantized matrix: w ≈ (codes - zero_point) * scale, each block of `spec.block` sharing scale and zero point.

    Attributes:
        spec: how it was quantized.
        codes: [N, K] int8 or uint8, one code per element whatever the width.
        scale: `spec.scale_shape(N, K)` float32 (values representable in `spec.scale_dtype`).
        zero_point: like `scale`, type of the codes; None means the symmetric point (0 signed, 2^(bits-1) unsigned).
        error: sum of squared errors the solver reports, weighted by importance if it had any; NaN if unknown.
    """

    spec: QuantSpec
    codes: Codes
    scale: Floats
    zero_point: Codes | None = None
    error: float = field(default=float("nan"), compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self) -> Floats:
        """The float32 matrix [N, K] that the codes stand for."""
        from qgraph import numerics

        return numerics.dequantize(self.codes, self.scale, self.zero_point, self.spec)

    def stored_as(self, *, signed: bool) -> QTensor:
        """The same numbers with codes shifted into the signed or unsigned type of the same width."""
        if self.spec.qtype.is_signed == signed:
            return self
        spec = self.spec.storage(signed=signed)
        half = 2 ** (spec.qtype.bits - 1)

        def shift(codes: Codes) -> Codes:
            shifted: Codes = (codes.astype(np.int16) + (-half if signed else half)).astype(
                spec.qtype.container
            )
            return shifted

        zero_point = None if self.zero_point is None else shift(self.zero_point)
        return replace(self, spec=spec, codes=shift(self.codes), zero_point=zero_point)

    def check(self) -> None:
        """Raise ValueError where shapes, types or code ranges do not fit the spec."""
        qtype = self.spec.qtype
        if self.codes.ndim != 2 or self.codes.dtype != qtype.container:
            raise ValueError(
                f"codes are {self.codes.dtype}{list(self.codes.shape)}, want {qtype.container.__name__}[N, K]"
            )
        want = self.spec.scale_shape(*self.shape)
        if self.scale.shape != want or self.scale.dtype != np.float32:
            raise ValueError(
                f"scale is {self.scale.dtype}{list(self.scale.shape)}, want float32{list(want)}"
            )
        if self.zero_point is not None and (
            self.zero_point.shape != want or self.zero_point.dtype != self.codes.dtype
        ):
            raise ValueError(
                f"zero_point is {self.zero_point.dtype}{list(self.zero_point.shape)}, "
                f"want {self.codes.dtype}{list(want)}"
            )
        if self.zero_point is None and not self.spec.symmetric:
            raise ValueError(f"{self.spec} is asymmetric but there is no zero_point")
        for name, array in (("codes", self.codes), ("zero_point", self.zero_point)):
            if (
                array is not None
                and array.size
                and (array.min() < qtype.qmin or array.max() > qtype.qmax)
            ):
                raise ValueError(
                    f"{name} span {array.min()}..{array.max()}, {qtype.name} holds {qtype.qmin}..{qtype.qmax}"
                )
        if not np.isfinite(self.scale).all():
            raise ValueError("scale has NaN or Inf")
