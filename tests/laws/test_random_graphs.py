"""Graphs that nobody thought of: layers at random, over weights that are shared, tied, hidden and captured at random.

Each is drawn from a seed, so a failure is found again by its number.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import graph, numerics, runtime, verify
from qgraph.models.builder import BOOL, FLOAT, INT64, Builder

WIDTH, VOCABULARY = 64, 96
SEEDS = range(16)
FLOORS = {"auto": 15.0, "int4": 2.0, "int8-dynamic": 15.0}


class Drawn:
    """A random graph under construction: layers from [n, k] to [n, m], weights by shape."""

    def __init__(self, seed: int) -> None:
        self._choose = random.Random(seed)
        self._values = np.random.default_rng(seed)
        self._weights: dict[tuple[int, ...], list[str]] = {}
        self._count = 0
        self.main = Builder("drawn", self._choose.choice([13, 17, 18, 20, 21]))
        self._flag = self.main.input("flag", BOOL, [])

    def build(self) -> ir.Model:
        """A few layers, sometimes between an embedding and its tied head."""
        b, width = self.main, WIDTH
        table = None
        if self._choose.random() < 0.4:
            ids = b.input("ids", INT64, ["n"])
            table = self._weight((VOCABULARY, WIDTH))
            x = b.op("Tanh", b.op("Gather", table, ids))
        else:
            x = b.input("x", FLOAT, ["n", WIDTH])
        for _ in range(self._choose.randint(2, 5)):
            x, width = self._layer(b, x, width)
        if table is not None:
            x = b.op("MatMul", x, self._hidden(b, (width, WIDTH)))
            x, width = b.op("MatMul", x, b.op("Transpose", table, perm=[1, 0])), VOCABULARY
        b.output("y", b.op("Identity", x), FLOAT, ["n", width])
        model = b.model(8)
        graph.remove_dead(model)  # weights that were drawn and then not used
        return model

    def _layer(self, b: Builder, x: ir.Value, k: int, depth: int = 0) -> tuple[ir.Value, int]:
        m = self._choose.choice([WIDTH, WIDTH, 48, 37, VOCABULARY])
        kind = self._choose.choice(
            ["matmul", "matmul", "gemm", "turned", "scaled", "if", "act", "add"]
        )
        if kind == "if" and depth < 2:
            branches = [self._branch(x, k, depth + 1) for _ in range(2)]
            y = b.op("If", self._flag, then_branch=branches[0], else_branch=branches[1])
            return y, WIDTH
        if kind == "gemm":
            return b.op("Gemm", x, self._hidden(b, (k, m)), self._vector(m)), m
        if kind == "turned":
            return b.op("Gemm", x, self._hidden(b, (m, k)), transB=1), m
        if kind == "scaled":
            w = self._hidden(b, (m, k))
            return b.op("Gemm", x, w, self._vector(m), transB=1, alpha=0.5, beta=2.0), m
        if kind == "act":
            return b.op("Mul", b.op("Tanh", x), self._vector(k)), k
        if kind == "add":
            return b.op("Add", b.op("MatMul", x, self._hidden(b, (k, k))), x), k
        return b.op("MatMul", x, self._hidden(b, (k, m))), m

    def _branch(self, x: ir.Value, k: int, depth: int) -> ir.Graph:
        """A body of one or two layers that ends at the usual width."""
        self._count += 1
        b = Builder(f"branch{self._count}")
        for _ in range(self._choose.randint(1, 2)):
            x, k = self._layer(b, x, k, depth)
        y = b.op("MatMul", x, self._hidden(b, (k, WIDTH)))
        b.output(f"branch{self._count}_out", y)
        self._rename(b)
        return b.graph()

    def _rename(self, b: Builder) -> None:
        """Names of a body must not hide those outside."""
        self._count += 1
        for node in b._nodes:
            for v in node.outputs:
                if "_out" not in str(v.name) or str(v.name).startswith("/"):
                    v.name = f"b{self._count}{v.name}"

    def _hidden(self, b: Builder, shape: tuple[int, int]) -> ir.Value:
        """A weight of that shape: itself, or what an expression makes of others."""
        kind = self._choose.choice(["plain", "plain", "plain", "turned", "gain", "flat", "parts"])
        if kind == "turned":
            return b.op("Transpose", self._weight(shape[::-1]), perm=[1, 0])
        if kind == "gain":
            return b.op("Mul", self._weight(shape), self._vector(shape[1]))
        if kind == "flat":
            name = f"shape_{shape[0]}_{shape[1]}"
            return b.op(
                "Reshape", self._weight((shape[0] * shape[1], 1)), self.main.integers(name, *shape)
            )
        if kind == "parts":
            half = shape[0] // 2
            parts = [self._weight((n, shape[1])) for n in (half, shape[0] - half)]
            return b.op("Concat", *parts, axis=0)
        return self._weight(shape)

    def _weight(self, shape: tuple[int, ...]) -> ir.Value:
        """A new initializer of the main graph, or one that is there already."""
        known = self._weights.setdefault(shape, [])
        if not known or self._choose.random() < 0.5:
            known.append(f"w{len(known)}_{shape[0]}_{shape[1]}")
        name = self._choose.choice(known)
        values = self._values.standard_normal(shape) / np.sqrt(WIDTH)
        return self.main.initializer(name, values.astype(np.float32))

    def _vector(self, size: int) -> ir.Value:
        values = np.abs(self._values.standard_normal(size)) + 0.5
        return self.main.initializer(f"v{size}", values.astype(np.float32))


def samples(model: ir.Model) -> list[dict[str, Any]]:
    random_ = np.random.default_rng(0)
    given = {v.name for v in model.graph.inputs}
    x = (
        {"ids": random_.integers(0, VOCABULARY, 5)}
        if "ids" in given
        else {"x": random_.standard_normal((5, WIDTH)).astype(np.float32)}
    )
    return [{**x, **({"flag": np.array(f)} if "flag" in given else {})} for f in (True, False)]


@pytest.mark.parametrize("seed", SEEDS)
def test_runs_and_is_close(seed):
    model = Drawn(seed).build()
    feeds = samples(model)
    session = runtime.session(model, threads=1)
    want = np.concatenate([session.run(None, f)[0] for f in feeds])
    for target in ("ort", "onnx"):
        for recipe, floor in FLOORS.items():
            case = f"seed {seed}, {recipe}, {target}"
            result = qgraph.optimize(
                model, recipe, target=target, overrides=["min_elements=256"], inspect=False
            )
            found = [
                d for d in verify.verify(result.model) if d.severity == "error" or d.code == "V10"
            ]
            assert not found, case
            assert all(e.reason and (e.spec or e.code) for e in result.ledger), case
            codes = [v for _, v in graph.initializers(result.model) if ".codes" in str(v.name)]
            assert len(codes) == len(result.report.quantized), f"{case}: codes are stored once"
            session = runtime.session(result.to_proto(), threads=1)
            got = np.concatenate([session.run(None, f)[0] for f in feeds])
            assert numerics.sqnr_db(want, got) >= floor, case
