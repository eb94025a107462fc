"""Is a model well formed, and do two models compute the same?

`verify` runs every rule of `rules.RULES` over every graph of a model and returns what they find:

    V01 imports   V02 names      V03 dangling values   V04 order       V05 unknown operators
    V06 arity     V07 declared   V08 quantize nodes    V09 packed      V10 dead (warning)
    V11 bodies    V12 external   V13 custom op without its function body

`equivalent` and `sample_feeds` are the numeric half: both models run in ONNX Runtime on the same inputs.
The rules on a graph's structure are in `structure`; those that ask an operator's schema in `schema`, those that know
quantized operators in `quantized`.
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph import errors
from qgraph.verify import quantized, rules, schema, structure
from qgraph.verify.equivalence import Equivalence, equivalent
from qgraph.verify.feeds import sample_feeds

__all__ = ["Equivalence", "check", "equivalent", "sample_feeds", "verify"]

_RULE_MODULES = (schema, quantized, structure)  # importing them registers their rules


def verify(model: ir.Model) -> list[errors.Diagnostic]:
    """Everything that is wrong with a model, in order of code, then of place in the model. Never raises."""
    scopes = rules.scopes(model)
    return [
        errors.Diagnostic(found.severity or each.severity, each.code, *found[:3])
        for each in sorted(rules.RULES, key=lambda r: r.code)
        for scope in scopes
        for found in each.find(scope)
    ]


def check(model: ir.Model, where: str = "") -> None:
    """Raise if `verify` finds an error; `where` says when, e.g. "after insert-qdq".

    A graph that is only out of order fails here too: runtimes sort it, but onnx_ir refuses to clone it.

    Raises:
        errors.VerificationError: with every error, not only the first.
    """
    found = [d for d in verify(model) if d.severity == "error" or d.code == "V04"]
    if found:
        if where:
            found = [
                errors.Diagnostic(d.severity, d.code, f"{where}: {d.where}", d.message, d.hint)
                for d in found
            ]
        raise errors.VerificationError(*found)
