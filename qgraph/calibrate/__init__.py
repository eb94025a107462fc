"""Calibration: run the float model on samples and remember what its activations are like (see `qgraph.observers`).

Everything streams: a sample's activations are reduced as soon as ONNX Runtime hands them over and then dropped.
"""

from __future__ import annotations

from qgraph.calibrate.instrument import find
from qgraph.calibrate.runs import run
from qgraph.calibrate.types import infer as infer_types

__all__ = ["find", "infer_types", "run"]
