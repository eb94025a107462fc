"""Gradients through any float ONNX model: ONNX Runtime computes forward, rules per operator go back."""

from qgraph.gradients import attention, convolution  # noqa: F401  (they register their rules)
from qgraph.gradients.tape import Tape

__all__ = ["Tape"]
