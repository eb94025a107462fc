"""tiny-cnn: digits classifier with Conv + BatchNormalization left apart, as trained.

Seven layers (stem, depthwise, pointwise, two 3x3 with a residual, depthwise of stride 2,
pointwise), then GlobalAveragePool, Flatten, Gemm. Each layer is Conv, BatchNormalization, perhaps
Add, then Relu or Clip(0, 6).
"""

import onnx_ir as ir

from qgraph.models import checkpoint
from qgraph.models.builder import FLOAT, Builder
from qgraph.models.shapes import CLASSES, CNN, CNN_EPSILON, ConvLayer


def build(name: str) -> ir.Model:
    """Build: image [batch, 1, 8, 8] -> logits [batch, 10]."""
    b = Builder(name)
    weights = checkpoint.load(name)
    x = b.input("image", FLOAT, ["batch", 1, 8, 8])
    outputs: dict[str, ir.Value] = {}
    for layer in CNN:
        with b.scope(layer.name):
            x = outputs[layer.name] = _layer(b, weights, layer, x, outputs.get(layer.adds))
    x = b.op("Flatten", b.op("GlobalAveragePool", x), axis=1)
    weight = b.initializer("classifier.weight", weights["classifier.weight"])
    bias = b.initializer("classifier.bias", weights["classifier.bias"])
    logits = b.op("Gemm", x, weight, bias, name="classifier/Gemm")
    b.output("logits", logits, FLOAT, ["batch", CLASSES])
    return b.model()


def _layer(
    b: Builder,
    weights: dict[str, checkpoint.Array],
    layer: ConvLayer,
    x: ir.Value,
    residual: ir.Value | None,
) -> ir.Value:
    def weight(key: str) -> ir.Value:
        return b.initializer(f"{layer.name}.{key}", weights[f"{layer.name}.{key}"])

    x = b.op(
        "Conv",
        x,
        weight("conv.weight"),
        kernel_shape=[layer.kernel] * 2,
        strides=[layer.stride] * 2,
        pads=[layer.kernel // 2] * 4,
        dilations=[1, 1],
        group=layer.groups,
    )
    parts = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    x = b.op("BatchNormalization", x, *map(weight, parts), epsilon=CNN_EPSILON)
    if residual is not None:
        x = b.op("Add", x, residual)
    if layer.activation == "relu":
        return b.op("Relu", x)
    if layer.activation == "clip":
        return b.op("Clip", x, b.number("zero", 0.0), b.number("six", 6.0))
    return x
