"""tiny-llama, tiny-llama-kv and tiny-bitnet: one decoder, three graphs.

    h = h + o(attention(q(n(h)), k(n(h)), v(n(h))))       q, k rotated; each key serves two queries
    h = h + down(silu(gate(n(h))) * up(n(h)))             n = RMSNorm, written out as exporters do

With `cache`, keys and values of earlier tokens come in as `past_key_values.{i}.key/value` and all
of them leave as `present.{i}.key/value`; positions then start at the past length, which may be 0.
"""

import numpy as np
import onnx_ir as ir

from qgraph.models import checkpoint
from qgraph.models.builder import FLOAT, INT64, Builder, Dims
from qgraph.models.shapes import Llama

# Most negative float32: exporters add it where attention may not look.
MASKED = float(np.finfo(np.float32).min)


def build(name: str, *, cache: bool = False) -> ir.Model:
    """Return the decoder with the weights called `name`.

    Inputs: input_ids [batch, seq]; with `cache`, each past [batch, key_heads, past, head_dim].
    Outputs: logits [batch, seq, vocabulary]; with `cache`, each present, total = past + seq.
    """
    return _Decoder(name, Llama(), cache).model()


class _Decoder:
    def __init__(self, name: str, shape: Llama, cache: bool) -> None:
        self.shape, self.cache = shape, cache
        self.weights = checkpoint.load(name)
        self.b = Builder(f"{name}-kv" if cache else name)

    def model(self) -> ir.Model:
        b, shape = self.b, self.shape
        ids = b.input("input_ids", INT64, ["batch", "seq"])
        pasts = [self._past(i) for i in range(shape.layers)] if self.cache else None
        with b.scope("model"):
            positions, total = self._positions(ids, pasts[0][0] if pasts else None)
            self.cos, self.sin = self._rotary(positions)
            self.mask = self._causal_mask(positions, total)
            embedding = b.initializer("embed_tokens.weight", self.weights["embed_tokens.weight"])
            h = b.op("Gather", embedding, ids, name="embed_tokens/Gather", axis=0)
            presents = []
            for i in range(shape.layers):
                with b.scope(f"layers.{i}"):
                    h, present = self._block(i, h, pasts[i] if pasts else None)
                    presents.append(present)
            h = self._norm("norm", h)
        logits = self._linear("lm_head", h)
        b.output("logits", logits, FLOAT, ["batch", "seq", shape.vocabulary])
        if self.cache:
            dims: Dims = ["batch", shape.key_heads, "total", shape.head_dim]
            for i, (key, value) in enumerate(presents):
                b.output(f"present.{i}.key", key, FLOAT, dims)
                b.output(f"present.{i}.value", value, FLOAT, dims)
        return b.model()

    def _past(self, i: int) -> tuple[ir.Value, ir.Value]:
        dims: Dims = ["batch", self.shape.key_heads, "past", self.shape.head_dim]
        name = f"past_key_values.{i}"
        key = self.b.input(f"{name}.key", FLOAT, dims)
        return key, self.b.input(f"{name}.value", FLOAT, dims)

    def _positions(self, ids: ir.Value, past: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """Return the positions of the new tokens, [seq], and the total length, []."""
        b = self.b
        zero, one = b.initializer("zero", np.int64(0)), b.initializer("one", np.int64(1))
        start, total = zero, b.op("Squeeze", b.op("Shape", ids, start=1, end=2))
        if past is not None:
            start = b.op("Squeeze", b.op("Shape", past, start=2, end=3))
            total = b.op("Add", start, total)
        return b.op("Range", start, total, one), total

    def _rotary(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """positions: [seq] -> cos, sin [1, 1, seq, head_dim]; a MatMul, as transformers does."""
        b, shape = self.b, self.shape
        half = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
        frequencies = (np.float32(shape.theta) ** -half).reshape(1, -1, 1)
        with b.scope("rotary_emb"):
            row = b.op("Unsqueeze", positions, b.integers("axes_0_1", 0, 1))
            row = b.op("Cast", row, to=FLOAT)
            angles = b.op("MatMul", b.initializer("rotary_emb.inv_freq", frequencies), row)
            angles = b.op("Transpose", angles, perm=[0, 2, 1])
            angles = b.op("Concat", angles, angles, axis=-1)
            axis = b.integers("axis_1", 1)
            cos = b.op("Unsqueeze", b.op("Cos", angles), axis)
            return cos, b.op("Unsqueeze", b.op("Sin", angles), axis)

    def _causal_mask(self, positions: ir.Value, total: ir.Value) -> ir.Value:
        """Return [seq, total]: 0 where a query may look, the most negative float elsewhere."""
        b = self.b
        keys = b.op(
            "Range", b.initializer("zero", np.int64(0)), total, b.initializer("one", np.int64(1))
        )
        rows = b.op("Unsqueeze", positions, b.integers("axis_1", 1))
        seen = b.op("LessOrEqual", b.op("Unsqueeze", keys, b.integers("axis_0", 0)), rows)
        return b.op("Where", seen, b.number("zero_f32", 0.0), b.number("masked", MASKED))

    def _block(
        self, i: int, h: ir.Value, past: tuple[ir.Value, ir.Value] | None
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        b = self.b
        x = self._norm(f"layers.{i}.input_norm", h)
        with b.scope("self_attn"):
            mixed, present = self._attention(i, x, past)
        h = b.op("Add", h, mixed)
        x = self._norm(f"layers.{i}.post_norm", h)
        with b.scope("mlp"):
            gate = self._linear(f"layers.{i}.gate_proj", x)
            gate = b.op("Mul", gate, b.op("Sigmoid", gate))
            x = b.op("Mul", gate, self._linear(f"layers.{i}.up_proj", x))
            x = self._linear(f"layers.{i}.down_proj", x)
        return b.op("Add", h, x), present

    def _attention(
        self, i: int, x: ir.Value, past: tuple[ir.Value, ir.Value] | None
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        b, shape = self.b, self.shape
        query = self._rotate(self._heads(f"layers.{i}.q_proj", x, shape.heads))
        key = self._rotate(self._heads(f"layers.{i}.k_proj", x, shape.key_heads))
        value = self._heads(f"layers.{i}.v_proj", x, shape.key_heads)
        if past is not None:
            key = b.op("Concat", past[0], key, axis=2)
            value = b.op("Concat", past[1], value, axis=2)
        keys = b.op("Transpose", self._repeat(key), perm=[0, 1, 3, 2])
        scores = b.op("MatMul", query, keys, name="scores/MatMul")
        scores = b.op("Mul", scores, b.number("attention_scale", shape.head_dim**-0.5))
        weights = b.op("Softmax", b.op("Add", scores, self.mask), axis=-1)
        mixed = b.op("MatMul", weights, self._repeat(value), name="mixed/MatMul")
        mixed = b.op("Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = b.op("Reshape", mixed, b.integers("merged_heads", 0, 0, shape.hidden))
        return self._linear(f"layers.{i}.o_proj", mixed), (key, value)

    def _heads(self, key: str, x: ir.Value, heads: int) -> ir.Value:
        """x: [batch, seq, hidden] -> [batch, heads, seq, head_dim]."""
        b = self.b
        shape = b.integers(f"split_{heads}_heads", 0, 0, heads, self.shape.head_dim)
        return b.op("Transpose", b.op("Reshape", self._linear(key, x), shape), perm=[0, 2, 1, 3])

    def _rotate(self, x: ir.Value) -> ir.Value:
        """Return x cos + (-high, low) sin, where low and high are the halves of the last axis."""
        b, half = self.b, self.shape.head_dim // 2
        last, middle = b.integers("axis_last", -1), b.integers("half_head", half)
        end = b.integers("slice_end", np.iinfo(np.int64).max)
        low = b.op("Slice", x, b.integers("axis_0", 0), middle, last)
        high = b.op("Slice", x, middle, end, last)
        turned = b.op("Concat", b.op("Neg", high), low, axis=-1)
        return b.op("Add", b.op("Mul", x, self.cos), b.op("Mul", turned, self.sin))

    def _repeat(self, x: ir.Value) -> ir.Value:
        """x: [batch, key_heads, total, d] -> [batch, heads, total, d], each head repeated."""
        b, shape = self.b, self.shape
        times = b.integers("key_groups", shape.heads // shape.key_heads)
        head_dim = b.integers("head_dim", shape.head_dim)
        batch, total = b.op("Shape", x, start=0, end=1), b.op("Shape", x, start=2, end=3)
        kept = b.integers("key_heads", shape.key_heads)
        wide = b.op("Concat", batch, kept, times, total, head_dim, axis=0)
        x = b.op("Expand", b.op("Unsqueeze", x, b.integers("axis_2", 2)), wide)
        heads = b.integers("heads", shape.heads)
        return b.op("Reshape", x, b.op("Concat", batch, heads, total, head_dim, axis=0))

    def _norm(self, key: str, x: ir.Value) -> ir.Value:
        """Return x / sqrt(mean(x^2) + epsilon) * gain."""
        b = self.b
        with b.scope(key.rsplit(".", 1)[-1]):
            square = b.op("Pow", x, b.number("two", 2.0))
            mean = b.op("ReduceMean", square, b.integers("axis_last", -1), keepdims=1)
            shifted = b.op("Add", mean, b.number("rms_epsilon", self.shape.epsilon))
            x = b.op("Mul", x, b.op("Reciprocal", b.op("Sqrt", shifted)))
            weight = b.initializer(f"{key}.weight", self.weights[f"{key}.weight"])
            return b.op("Mul", weight, x)

    def _linear(self, key: str, x: ir.Value) -> ir.Value:
        b = self.b
        weight = b.initializer(f"{key}.weight", self.weights[f"{key}.weight"])
        return b.op("MatMul", x, weight, name=f"{key.rsplit('.', 1)[-1]}/MatMul")
