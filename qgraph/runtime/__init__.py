"""ONNX Runtime as qgraph uses it: sessions, the native library, what the installation can do.

Importing this is cheap: ONNX Runtime and the libraries beside it load on first use.
"""

from qgraph.runtime.capability import capabilities
from qgraph.runtime.checks import Check, doctor
from qgraph.runtime.library import library_path
from qgraph.runtime.sessions import mapped_weights, session

__all__ = ["Check", "capabilities", "doctor", "library_path", "mapped_weights", "session"]
