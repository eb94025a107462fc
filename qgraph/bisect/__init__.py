"""Find what breaks a model: the first pass after which a check fails, or the smallest set of weights.

check = bisect.Accuracy("model.onnx", feeds, min_sqnr=10)
chosen = recipe.load("int4")
print(bisect.bad_pass("model.onnx", chosen, check).guilty)
print(bisect.bad_weights("model.onnx", chosen, check).guilty)
"""

from qgraph.bisect.checks import (
    DEFAULT_SQNR,
    Accuracy,
    Check,
    Divergence,
    Loads,
    Outcome,
    Runs,
    Verifies,
)
from qgraph.bisect.search import Found, Trial, bad_pass, bad_weights

__all__ = [
    "DEFAULT_SQNR",
    "Accuracy",
    "Check",
    "Divergence",
    "Found",
    "Loads",
    "Outcome",
    "Runs",
    "Trial",
    "Verifies",
    "bad_pass",
    "bad_weights",
]
