"""Einsum with a constant matrix is a MatMul that exporters write differently.

Einsum("btk,kn->btn", x, W)  →  MatMul(x, W)          Einsum("btk,nk->btn", x, W)  →  MatMul(x, Transpose(W))
"""

from __future__ import annotations

import onnx_ir as ir

from qgraph import graph


def to_matmul(model: ir.Model) -> bool:
    """Rewrite every Einsum that contracts the last axis of x with one axis of a constant 2-D W."""
    names = graph.Names(model)
    changed = False
    for node in graph.nodes(model):
        if node.op_type != "Einsum" or node.domain != "" or len(node.inputs) != 2:
            continue
        x, w = node.inputs
        turned = _is_linear(str(graph.attribute(node, "equation", "")))
        if turned is None or x is None or w is None or not graph.is_constant(w):
            continue
        if turned:
            assert w.const_value is not None
            shape = [int(d) for d in reversed(w.const_value.shape.numpy())]
            flipped = graph.value(names(f"{w.name}.transposed"), w.dtype, shape)
            name = names(f"{w.name}.Transpose")
            graph.add_node(
                node, "Transpose", [w], [flipped], name=name, attributes={"perm": [1, 0]}
            )
            w = flipped
        graph.replace_node(node, "MatMul", [x, w])
        changed = True
    return changed


def _is_linear(equation: str) -> bool | None:
    """False for W [K, N], True for W [N, K], None where the equation is no product with a matrix.

    >>> _is_linear("btk,kn->btn"), _is_linear("...k,nk->...n"), _is_linear("bik,bkj->bij")
    (False, True, None)
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    x, comma, w = left.partition(",")
    if (
        not arrow
        or not comma
        or "," in w
        or len(w) != 2
        or "." in w
        or not x
        or len(set(x.replace(".", ""))) != len(x.replace(".", ""))
    ):
        return None
    k = x[-1]
    n = w.replace(k, "", 1)
    if k not in w or len(n) != 1 or n in x or out != x[:-1] + n:
        return None
    return w == n + k
