"""qgraph's own operators: their weight layout, and what they compute, as ONNX functions."""

from qgraph.ops.bodies import DOMAIN, VERSION, function, require

__all__ = ["DOMAIN", "VERSION", "function", "require"]
