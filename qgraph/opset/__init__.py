"""Raising the default operator set of a model: `raise_opset`. What each operator needs is in `adapters`."""

from qgraph.opset.raising import raise_opset

__all__ = ["raise_opset"]
