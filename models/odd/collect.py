"""The table of odd graphs: one decorated function adds one graph."""

import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph.models.builder import FLOAT, IR_VERSION, OPSET, Builder

ODD: dict[str, Callable[[], ir.Model]] = {}

# Channels of most graphs here: enough for blocks of 32, small enough to run hundreds of times.
WIDTH = 64

Body = Callable[[Builder], None]


def graph(opset: int = OPSET, ir_version: int = IR_VERSION) -> Callable[[Body], Body]:
    """Register a function that fills a Builder as the odd graph of the same name."""

    def register(body: Body) -> Body:
        name = body.__name__

        def make() -> ir.Model:
            b = Builder(name, opset)
            body(b)
            return b.model(ir_version)

        make.__doc__ = body.__doc__
        ODD[name] = make
        return body

    return register


def draw(label: str, *shape: int) -> npt.NDArray[np.float32]:
    """Return normal float32 values of `shape` that depend on `label` alone.

    They are scaled by 1 / sqrt(first dimension), so that products keep the size of their input.
    """
    random = np.random.default_rng(zlib.crc32(label.encode()))
    spread = max(1, shape[0] if shape else 1) ** -0.5
    values: npt.NDArray[np.float64] = random.standard_normal(shape) * spread
    return values.astype(np.float32)


def weight(b: Builder, label: str, *shape: int) -> ir.Value:
    """Return an initializer `label` of drawn values."""
    return b.initializer(label, draw(label, *shape))


def input_rows(b: Builder, width: int = WIDTH) -> ir.Value:
    """Return the input `x`, float [batch, width]."""
    return b.input("x", FLOAT, ["batch", width])


def output_rows(b: Builder, value: ir.Value, width: int = WIDTH) -> None:
    """Let `value` leave as `y`, float [batch, width]."""
    b.output("y", value, FLOAT, ["batch", width])
