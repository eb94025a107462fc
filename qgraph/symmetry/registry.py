"""Where transfer rules are found: one function per kind of operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import onnx_ir as ir

from qgraph.symmetry.channels import Channels

Rule: TypeAlias = Callable[[Channels, ir.Node], None]

RULES: dict[tuple[str, str], Rule] = {}


def rule(*operators: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register a rule for operators of a domain."""

    def register(fn: Rule) -> Rule:
        for op in operators:
            RULES[domain, op] = fn
        return fn

    return register
