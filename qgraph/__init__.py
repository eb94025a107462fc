"""qgraph: a compiler for neural-network quantization. ONNX in, smaller and faster ONNX out, and the reasons why.

    import qgraph

    result = qgraph.optimize("model.onnx", recipe="int4", output="model.q.onnx")
    print(result.report.text())

Everything is imported on first use, so that importing qgraph costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgraph.compiler import Result, optimize
    from qgraph.errors import Diagnostic, QGraphError
    from qgraph.files import load, save
    from qgraph.pipeline import Context, Fact, Instrument, Keeps, Pass, PassOptions, Pipeline
    from qgraph.plan import Decision, QuantPlan
    from qgraph.recipe import Recipe, Rule
    from qgraph.registry import register
    from qgraph.runtime import library_path, session
    from qgraph.solver import Solver, SolverOptions, WeightStats
    from qgraph.spec import QTensor, QType, QuantSpec
    from qgraph.target import Form, Request, Target, Writer

_HOME = {
    "errors": ("Diagnostic", "QGraphError"),
    "files": ("load", "save"),
    "compiler": ("Result", "optimize"),
    "pipeline": ("Context", "Fact", "Instrument", "Keeps", "Pass", "PassOptions", "Pipeline"),
    "plan": ("Decision", "QuantPlan"),
    "recipe": ("Recipe", "Rule"),
    "registry": ("register",),
    "runtime": ("library_path", "session"),
    "solver": ("Solver", "SolverOptions", "WeightStats"),
    "spec": ("QTensor", "QType", "QuantSpec"),
    "target": ("Form", "Request", "Target", "Writer"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "Context",
    "Decision",
    "Diagnostic",
    "Fact",
    "Form",
    "Instrument",
    "Keeps",
    "Pass",
    "PassOptions",
    "Pipeline",
    "QGraphError",
    "QTensor",
    "QType",
    "QuantPlan",
    "QuantSpec",
    "Recipe",
    "Request",
    "Result",
    "Rule",
    "Solver",
    "SolverOptions",
    "Target",
    "WeightStats",
    "Writer",
    "library_path",
    "load",
    "optimize",
    "register",
    "save",
    "session",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'qgraph' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"qgraph.{module}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
