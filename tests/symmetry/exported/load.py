"""Exported graphs with weights drawn from a seed."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir

from qgraph import files

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.txt"))


def load(name: str) -> ir.Model:
    """The graph `name`, e.g. "llama_20": tensors named `w.*` get random numbers, other ones each time the same."""
    proto = onnx.parser.parse_model((HERE / f"{name}.txt").read_text())
    drawn = [v for v in proto.graph.input if v.name.startswith("w.")]
    for info in drawn:
        proto.graph.input.remove(info)
        dims = [d.dim_value for d in info.type.tensor_type.shape.dim]
        rng = np.random.default_rng(zlib.crc32(info.name.encode()))
        if len(dims) == 1:  # gains and biases
            array = rng.uniform(0.5, 1.5, dims)
        else:
            array = rng.normal(size=dims) / np.sqrt(max(dims[-1], 16))
        proto.graph.initializer.append(
            ir.to_proto(ir.tensor(array.astype(np.float32), name=info.name))
        )
    return files.load(proto)
