"""canonicalize: bring what exporters produce into one form that the other passes recognise; the function stays.

- model-local functions are inlined (our own domain excepted), so that their weights are seen and shared;
- float constants in nodes and bodies become initializers of the main graph;
- arithmetic in front of weights is folded, equal constant expressions are merged;
- Einsum with a constant matrix becomes MatMul;
- QuantizeLinear of a constant becomes its codes;
- BatchNormalization and Gemm's alpha/beta are folded into weights, constants added behind a convolution into its bias,
  in float64;
- debug metadata of exporters is dropped, dead nodes and initializers go.

RMSNorm, LayerNorm, GELU, SiLU and rotary embeddings, decomposed or not, are left exactly as they are.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common

from qgraph import graph
from qgraph.passes.canonicalize import affine, bias, constants, einsum, quantized
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register

_DEBUG_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


@register
class Canonicalize(Pass):
    """Fold, lift and inline until every weight is an initializer that feeds its operator."""

    name = "canonicalize"
    gives = frozenset({Fact.CANONICAL})
    keeps = Keeps.FLOAT_EQUAL

    class Options(PassOptions):
        """Options of canonicalize."""

        fold_batch_norm: bool = True
        """Fold BatchNormalization into the convolution before it."""
        to_gemm: bool = False
        """MatMul with 2-D operands and a constant Add become Gemm: integer kernels take the bias inside."""
        freeze_inputs: bool = False
        """Treat initializers that are also graph inputs as constants (callers can no longer override them)."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite `model` in place."""
        options = self.options_as(self.Options)
        needed = model.ir_version < 4
        listed = _unlist_initializers(model) if needed or options.freeze_inputs else []
        if listed and not needed:
            names = ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
            message = (
                f"{len(listed)} graph inputs with defaults ({names}) are constants now: "
                "callers can no longer override them"
            )
            ctx.report("note", "QG215", self.name, message)
        changed = needed or bool(listed)
        changed |= _inline(model)
        changed |= constants.lift(model)
        changed |= einsum.to_matmul(model)
        while constants.merge_equal(model) | constants.fold(model):
            changed = True
            graph.remove_dead(model)
        if options.fold_batch_norm:
            changed |= affine.fold_batch_norm(model)
        changed |= affine.fold_gemm_factors(model)
        changed |= bias.fold(model, to_gemm=options.to_gemm)
        changed |= quantized.fold_quantize(model)
        for node in graph.nodes(model):
            for key in _DEBUG_METADATA:
                changed |= node.metadata_props.pop(key, None) is not None
        changed |= graph.remove_dead(model) > 0
        graph.sort_initializers(model)
        return changed


def _unlist_initializers(model: ir.Model) -> list[str]:
    """Make constants of initializers that are graph inputs too, whose names it returns; before IR 4 all had to be."""
    listed = [v for v in model.graph.inputs if v.is_initializer()]
    for v in listed:
        model.graph.inputs.remove(v)
    model.ir_version = max(model.ir_version, 4)
    return [str(v.name) for v in listed]


def _inline(model: ir.Model) -> bool:
    if not any(f.domain != "ai.qgraph" for f in model.functions.values()):
        return False
    inline = onnx_ir.passes.common.InlinePass(criteria=lambda f: f.domain != "ai.qgraph")
    return bool(inline(model).modified)
