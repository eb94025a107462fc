"""Decoders of any size with random weights: LLaMA's graph, written to disk one weight at a time.

    python bench/decoders.py 1b out.onnx

RMSNorm, rotary positions, grouped-query attention and SwiGLU are written out in primitive operators, as exporters do.
MatMul weights are [K, N] and lie in a data file beside the model. Equal arguments give equal bytes.
"""

from __future__ import annotations

import argparse
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qgraph import files, graph
from qgraph.models.builder import FLOAT, INT64, Builder

MASKED = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """[K, N] of the matrices of one layer."""
        keys = self.key_heads * self.head_dim
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }

    @property
    def parameters(self) -> int:
        layer = sum(k * n for k, n in self.linear.values())
        return self.layers * layer + 2 * self.vocabulary * self.hidden


_TINY_LLAMA = Shape(2048, 22, 5632, 32, 4, 32000)
SHAPES = {
    "tiny": Shape(512, 12, 1408, 8, 4, 4096),  # 42 M parameters, latency of the result
    "quick": Shape(1024, 12, 2816, 16, 4, 8000),  # 152 M, 0.6 GB: over the limit of proofs
    "small": Shape(768, 12, 2048, 12, 4, 16000),  # 100 M, 0.4 GB
    "3gb": replace(_TINY_LLAMA, layers=15),  # 792 M, 3.2 GB
    "1b": _TINY_LLAMA,  # 1.1 G, 4.4 GB
}


def write(
    path: str | os.PathLike[str], shape: Shape, *, seed: int = 0, cache: bool = False
) -> Path:
    """Generate and save a decoder: input_ids [batch, seq] -> logits [batch, seq, vocabulary]."""
    model = build(shape, seed=seed, cache=cache)
    return files.save(model, path, force=True, external_data=True)


def build(shape: Shape, *, seed: int = 0, cache: bool = False) -> ir.Model:
    """The decoder as a model whose weights are drawn when they are read.

    With `cache`, keys and values of earlier tokens come in as past.{i}.key/value
    [batch, key_heads, past, head_dim], and all of them leave as present.{i}.key/value.
    """
    model = _Decoder(shape, cache).model()
    for _, v in graph.initializers(model):
        assert v.const_value is not None and v.shape is not None
        dims = tuple(v.shape.numpy())
        if len(dims) == 2:
            v.const_value = graph.lazy(_Normal(str(v.name), dims, seed), FLOAT, dims, str(v.name))
    return model


@dataclass(frozen=True)
class _Normal:
    name: str
    dims: tuple[int, int]
    seed: int

    def __call__(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
        w = rng.standard_normal(self.dims, np.float32)
        w *= np.float32(self.dims[-1 if "embed" in self.name else 0] ** -0.5)
        return w


class _Decoder:
    def __init__(self, shape: Shape, cache: bool) -> None:
        self.shape, self.cache, self.b = shape, cache, Builder("decoder")

    def model(self) -> ir.Model:
        b, shape = self.b, self.shape
        ids = b.input("input_ids", INT64, ["batch", "seq"])
        self.dims = ["batch", shape.key_heads, "past", shape.head_dim]
        self.pasts = [
            [b.input(f"past.{i}.{part}", FLOAT, self.dims) for part in ("key", "value")]
            for i in range(shape.layers if self.cache else 0)
        ]
        zero, one = b.initializer("zero", np.int64(0)), b.initializer("one", np.int64(1))
        start, end = zero, b.op("Squeeze", b.op("Shape", ids, start=1, end=2))
        if self.cache:
            start = b.op("Squeeze", b.op("Shape", self.pasts[0][0], start=2, end=3))
            end = b.op("Add", start, end)
        positions = b.op("Range", start, end, one)
        keys = b.op("Range", zero, end, one) if self.cache else positions
        self.cos, self.sin = self._rotary(positions)
        rows = b.op("Unsqueeze", positions, b.integers("axis_1", 1))
        seen = b.op("LessOrEqual", b.op("Unsqueeze", keys, b.integers("axis_0", 0)), rows)
        self.mask = b.op("Where", seen, b.number("zero_f32", 0.0), b.number("masked", MASKED))
        table = self._weight("embed_tokens.weight", shape.vocabulary, shape.hidden)
        h = b.op("Gather", table, ids, axis=0)
        for i in range(shape.layers):
            with b.scope(f"layers.{i}"):
                h = self._block(i, h)
        h = self._norm("norm", h)
        logits = b.op("MatMul", h, self._weight("lm_head.weight", shape.hidden, shape.vocabulary))
        b.output("logits", logits, FLOAT, ["batch", "seq", shape.vocabulary])
        return b.model()

    def _weight(self, name: str, rows: int, columns: int) -> ir.Value:
        # A stand-in without memory; `build` puts the real weight in its place.
        return self.b.initializer(name, np.broadcast_to(np.float32(0), (rows, columns)))

    def _linear(self, name: str, x: ir.Value) -> ir.Value:
        size = self.shape.linear[name.rsplit(".", 1)[-1]]
        return self.b.op("MatMul", x, self._weight(f"{name}.weight", *size))

    def _rotary(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        b, half = self.b, np.arange(0, self.shape.head_dim, 2, dtype=np.float32)
        frequencies = np.float32(10000) ** -(half / np.float32(self.shape.head_dim))
        row = b.op("Cast", b.op("Unsqueeze", positions, b.integers("axis_1", 1)), to=FLOAT)
        angles = b.op("Mul", row, b.initializer("inv_freq", frequencies))
        angles = b.op("Concat", angles, angles, axis=-1)
        return b.op("Cos", angles), b.op("Sin", angles)

    def _block(self, i: int, h: ir.Value) -> ir.Value:
        b, name = self.b, f"layers.{i}"
        h = b.op("Add", h, self._attention(i, self._norm(f"{name}.input_norm", h)))
        x = self._norm(f"{name}.post_norm", h)
        gate = self._linear(f"{name}.gate_proj", x)
        gate = b.op("Mul", gate, b.op("Sigmoid", gate))
        x = b.op("Mul", gate, self._linear(f"{name}.up_proj", x))
        return b.op("Add", h, self._linear(f"{name}.down_proj", x))

    def _attention(self, i: int, x: ir.Value) -> ir.Value:
        b, shape, name = self.b, self.shape, f"layers.{i}"
        query = self._rotate(self._heads(f"{name}.q_proj", x, shape.heads))
        key = self._rotate(self._heads(f"{name}.k_proj", x, shape.key_heads))
        value = self._heads(f"{name}.v_proj", x, shape.key_heads)
        if self.cache:
            key = b.op("Concat", self.pasts[i][0], key, axis=2)
            value = b.op("Concat", self.pasts[i][1], value, axis=2)
            for part, present in (("key", key), ("value", value)):
                b.output(
                    f"present.{i}.{part}", present, FLOAT, [*self.dims[:2], "total", self.dims[3]]
                )
        keys = b.op("Transpose", self._repeat(key), perm=[0, 1, 3, 2])
        scores = b.op("Mul", b.op("MatMul", query, keys), b.number("scale", shape.head_dim**-0.5))
        weights = b.op("Softmax", b.op("Add", scores, self.mask), axis=-1)
        mixed = b.op("Transpose", b.op("MatMul", weights, self._repeat(value)), perm=[0, 2, 1, 3])
        mixed = b.op("Reshape", mixed, b.integers("merged_heads", 0, 0, shape.hidden))
        return self._linear(f"{name}.o_proj", mixed)

    def _heads(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        b = self.b
        split = b.integers(f"split_{heads}", 0, 0, heads, self.shape.head_dim)
        return b.op("Transpose", b.op("Reshape", self._linear(name, x), split), perm=[0, 2, 1, 3])

    def _rotate(self, x: ir.Value) -> ir.Value:
        b, half, last = self.b, self.shape.head_dim // 2, self.b.integers("axis_last", -1)
        middle = b.integers("middle", half)
        low = b.op("Slice", x, b.integers("axis_0", 0), middle, last)
        high = b.op("Slice", x, middle, b.integers("end", np.iinfo(np.int64).max), last)
        turned = b.op("Concat", b.op("Neg", high), low, axis=-1)
        return b.op("Add", b.op("Mul", x, self.cos), b.op("Mul", turned, self.sin))

    def _repeat(self, x: ir.Value) -> ir.Value:
        """[batch, key_heads, seq, d] -> [batch, heads, seq, d], each head repeated."""
        b, shape = self.b, self.shape
        groups, d = shape.heads // shape.key_heads, b.integers("head_dim", shape.head_dim)
        batch, seq = b.op("Shape", x, start=0, end=1), b.op("Shape", x, start=2, end=3)
        inner = [b.integers("key_heads", shape.key_heads), b.integers("groups", groups)]
        wide = b.op("Concat", batch, *inner, seq, d, axis=0)
        x = b.op("Expand", b.op("Unsqueeze", x, b.integers("axis_2", 2)), wide)
        heads = b.integers("heads", shape.heads)
        return b.op("Reshape", x, b.op("Concat", batch, heads, seq, d, axis=0))

    def _norm(self, name: str, x: ir.Value) -> ir.Value:
        b = self.b
        mean = b.op("ReduceMean", b.op("Pow", x, b.number("two", 2.0)), b.integers("axis_last", -1))
        shifted = b.op("Add", mean, b.number("epsilon", 1e-5))
        x = b.op("Mul", x, b.op("Reciprocal", b.op("Sqrt", shifted)))
        gain = b.initializer(f"{name}.weight", np.ones(self.shape.hidden, np.float32))
        return b.op("Mul", gain, x)


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate a decoder with random weights.")
    parser.add_argument("scale", choices=SHAPES)
    parser.add_argument("output")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.output, SHAPES[given.scale], seed=given.seed)
    print(f"{given.output}: {SHAPES[given.scale].parameters / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
