"""Groups of small graphs, each proven by folding random members of its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph import files, graph, registry, symmetry, verify
from qgraph.pipeline import Context, Pipeline
from qgraph.recipe import Recipe
from qgraph.symmetry import Group

Array = np.ndarray[Any, Any]
RTOL = 1e-4


def orthogonal(rng: np.random.Generator, group: Group) -> Array:
    """A random rotation for every block, [B, n, n]."""
    n = group.block
    made = [np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in group.blocks]
    return np.stack([symmetry.keep_mean(t) for t in made] if group.keeps_mean else made)


def transform(model: ir.Model, group: Group, rng: np.random.Generator) -> symmetry.Folded:
    """Apply a random member of the largest legal class."""
    if group.kind == "scale":
        s = np.exp(rng.normal(size=group.size))
        if group.legal == "diagonal":
            s *= rng.choice([-1.0, 1.0], group.size)
        return symmetry.scale(model, group, s)
    if group.kind == "permute":
        order = np.stack([rng.permutation(group.block) for _ in group.blocks])
        return symmetry.permute(model, group, order)
    done = symmetry.absorb_gains(model, group)
    return done + symmetry.rotate(model, group, orthogonal(rng, group))


def weights(model: ir.Model) -> dict[str, Array]:
    """Every stored float tensor."""
    return {
        str(v.name): np.array(graph.array(v))
        for _, v in graph.initializers(model)
        if v.const_value is not None and v.const_value.dtype in graph.FLOATS
    }


def prove(model: ir.Model, *, seed: int = 0, together: bool = False) -> list[Group]:
    """Groups of all kinds; every legal one is transformed at random and the outputs compared.

    Each group alone on a fresh copy, or all of a kind `together` on one.
    """
    feeds = verify.sample_feeds(model)
    rng = np.random.default_rng(seed)
    found = symmetry.groups(model)
    for kind in symmetry.KINDS:
        count = sum(g.kind == kind for g in found)
        for indices in [range(count)] if together else [range(i, i + 1) for i in range(count)]:
            work = graph.clone(model)
            groups = symmetry.groups(work, [kind])
            for index in indices:
                _transform_one(work, groups[index], rng, has_to_change=not together)
            _equal(model, work, feeds, kind if together else groups[indices[0]])
    return found


def _transform_one(
    work: ir.Model, group: Group, rng: np.random.Generator, *, has_to_change: bool
) -> None:
    """Transform a legal group and see that something changed; an illegal one has a node and a reason."""
    if not group.legal:
        assert group.reason and group.forbids is not None
        return
    before = weights(work) if has_to_change else {}
    done = transform(work, group, rng)
    assert done.changed
    if has_to_change and group.block > 1:
        after = weights(work)
        assert any(n not in before or not np.array_equal(before[n], a) for n, a in after.items())


def _equal(a: ir.Model, b: ir.Model, feeds: Any, what: Any) -> None:
    verify.check(b, where="after a fold")
    same = verify.equivalent(a, b, feeds, rtol=RTOL)
    assert same.ok, f"{what}: {same.reason}"


def canonical(source: Any) -> ir.Model:
    """A model as `canonicalize` leaves it."""
    model = files.load(source) if not isinstance(source, ir.Model) else source
    recipe = Recipe.default()
    Pipeline(["canonicalize"]).run(model, Context(registry.get("target", recipe.target), recipe))
    return model


class Found:
    """Groups of one small graph, by kind."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def of(self, kind: str) -> list[Group]:
        """Groups of one kind."""
        return [g for g in self.groups if g.kind == kind]

    def legal(self, kind: str) -> list[str]:
        """Their classes."""
        return [g.legal for g in self.of(kind)]

    @property
    def only(self) -> dict[str, str]:
        """The class by kind, of a graph with one group of every kind."""
        assert [len(self.of(k)) for k in symmetry.KINDS] == [1, 1, 1], self.groups
        return {g.kind: g.legal for g in self.groups}

    def reason(self, kind: str) -> str:
        """Node and text of the only group of a kind."""
        (group,) = self.of(kind)
        assert group.forbids is not None
        return f"{group.forbids.op_type}: {group.reason}"


@pytest.fixture
def found() -> Callable[..., Found]:
    """`found("g (float[m, 8] x) => (float[m, 8] y) {...}", A=array)`: its groups, proven."""

    def make(text: str, opset: int = 18, domain: str = "", **constants: Array) -> Found:
        extra = f', "{domain}" : 1' if domain else ""
        head = f'<ir_version: 9, opset_import: ["" : {opset}{extra}]>'
        proto = onnx.parser.parse_model(f"{head}\n{text}")
        proto.graph.initializer.extend(
            ir.to_proto(ir.tensor(np.asarray(v), name=k)) for k, v in constants.items()
        )
        return Found(prove(files.load(proto)))

    return make


@pytest.fixture
def draw() -> Callable[..., Array]:
    """`draw(8, 16)`: random float32."""
    rng = np.random.default_rng(7)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


@pytest.fixture
def proven() -> Callable[..., list[Group]]:
    """`proven(source)`: groups of a whole model as canonicalize leaves it, all of a kind folded together."""
    return lambda source: prove(canonical(source), together=True)
