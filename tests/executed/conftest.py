"""Models written as ONNX text, with weights given as arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

Write = Callable[..., Path]

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write("g (float[m, 64] x) => (float[m, 32] y) { ... }", W=array)` saves a model and returns its path."""

    def save(text: str, name: str = "model", **weights: np.ndarray[Any, Any]) -> Path:
        proto = onnx.parser.parse_model(f"{HEADER}\n{text}")
        for key, array in weights.items():
            proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=key)))
        path = tmp_path / f"{name}.onnx"
        onnx.save(proto, path)
        return path

    return save
