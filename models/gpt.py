"""tiny-gpt: LayerNormalization, learned positions, biases, Gelu, one matrix for both embeddings.

    h = h + c_proj(attention(split(c_attn(ln_1(h)))))
    h = h + fc_out(gelu(fc_in(ln_2(h))))
    logits = ln_f(h) wte^T

wte is also the table that Gather reads.
"""

import math

import numpy as np
import onnx_ir as ir

from qgraph.models import checkpoint
from qgraph.models.builder import FLOAT, INT64, Builder
from qgraph.models.shapes import Gpt

MASKED = float(np.finfo(np.float32).min)


def build(name: str) -> ir.Model:
    """Build: input_ids [batch, seq <= positions] -> logits [batch, seq, vocabulary]."""
    return _Decoder(name, Gpt()).model()


class _Decoder:
    def __init__(self, name: str, shape: Gpt) -> None:
        self.shape = shape
        self.weights = checkpoint.load(name)
        self.b = Builder(name)

    def model(self) -> ir.Model:
        b, shape = self.b, self.shape
        ids = b.input("input_ids", INT64, ["batch", "seq"])
        with b.scope("transformer"):
            length = b.op("Shape", ids, start=1, end=2)
            self.mask = self._causal_mask(length)
            h = b.op("Gather", self._weight("wte.weight"), ids, name="wte/Gather", axis=0)
            h = b.op("Add", h, self._position_rows(length))
            for i in range(shape.layers):
                with b.scope(f"h.{i}"):
                    h = self._block(f"h.{i}", h)
            h = self._norm("ln_f", h)
        with b.scope("lm_head"):
            table = b.op("Transpose", self._weight("wte.weight"), perm=[1, 0])
            logits = b.op("MatMul", h, table)
        b.output("logits", logits, FLOAT, ["batch", "seq", shape.vocabulary])
        return b.model()

    def _position_rows(self, length: ir.Value) -> ir.Value:
        """length: [1] -> rows of the position table, [seq, hidden]."""
        b = self.b
        zero, one = b.initializer("zero", np.int64(0)), b.initializer("one", np.int64(1))
        positions = b.op("Range", zero, b.op("Squeeze", length), one)
        return b.op("Gather", self._weight("wpe.weight"), positions, name="wpe/Gather", axis=0)

    def _causal_mask(self, length: ir.Value) -> ir.Value:
        """length: [1] -> [seq, seq], the most negative float above the diagonal, 0 elsewhere."""
        b = self.b
        square = b.op("Concat", length, length, axis=0)
        full = b.op("Expand", b.number("masked", MASKED), square)
        return b.op("Trilu", full, b.initializer("one", np.int64(1)), upper=1)

    def _block(self, key: str, h: ir.Value) -> ir.Value:
        b = self.b
        x = self._norm(f"{key}.ln_1", h)
        with b.scope("attn"):
            x = self._attention(key, x)
        h = b.op("Add", h, x)
        x = self._norm(f"{key}.ln_2", h)
        with b.scope("mlp"):
            x = b.op("Gelu", self._linear(f"{key}.fc_in", x))
            x = self._linear(f"{key}.fc_out", x)
        return b.op("Add", h, x)

    def _attention(self, key: str, x: ir.Value) -> ir.Value:
        b, shape = self.b, self.shape
        joint = self._linear(f"{key}.c_attn", x)
        parts = b.ops(3, "Split", joint, axis=-1, num_outputs=3)
        split = b.integers("split_heads", 0, 0, shape.heads, shape.head_dim)
        query, keys, value = (b.op("Reshape", part, split) for part in parts)
        query = b.op("Transpose", query, perm=[0, 2, 1, 3])
        keys = b.op("Transpose", keys, perm=[0, 2, 3, 1])
        value = b.op("Transpose", value, perm=[0, 2, 1, 3])
        scores = b.op("MatMul", query, keys, name="scores/MatMul")
        scores = b.op("Div", scores, b.number("sqrt_head_dim", math.sqrt(shape.head_dim)))
        weights = b.op("Softmax", b.op("Add", scores, self.mask), axis=-1)
        mixed = b.op("MatMul", weights, value, name="mixed/MatMul")
        mixed = b.op("Transpose", mixed, perm=[0, 2, 1, 3])
        merged = b.op("Reshape", mixed, b.integers("merged_heads", 0, 0, shape.hidden))
        return self._linear(f"{key}.c_proj", merged)

    def _norm(self, key: str, x: ir.Value) -> ir.Value:
        gain, bias = self._weight(f"{key}.weight"), self._weight(f"{key}.bias")
        name = f"{key.rsplit('.', 1)[-1]}/LayerNormalization"
        return self.b.op(
            "LayerNormalization", x, gain, bias, name=name, axis=-1, epsilon=self.shape.epsilon
        )

    def _linear(self, key: str, x: ir.Value) -> ir.Value:
        """x: [..., K] -> x W + b, [..., N]."""
        b, name = self.b, key.rsplit(".", 1)[-1]
        x = b.op("MatMul", x, self._weight(f"{key}.weight"), name=f"{name}/MatMul")
        return b.op("Add", self._weight(f"{key}.bias"), x, name=f"{name}/Add")

    def _weight(self, key: str) -> ir.Value:
        return self.b.initializer(key, self.weights[key])
