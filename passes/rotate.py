"""rotate: spread outliers over channels with orthogonal matrices that fold into the weights around them (QuaRot).

Where the channels of an activation may be rotated is found by `qgraph.symmetry`: the residual stream of a pre-norm
decoder (R1 in the papers), the values of every attention head (R2), linear pairs of 1x1 convolutions. Gains of norms
move into their readers first. Nothing of this costs time at inference. `online` adds Hadamard transforms that do,
before linear operators that no rotation reaches (R4), and `scores` those of queries and keys (R3).
Sources: QuaRot arXiv 2404.00456, SpinQuant arXiv 2405.16406, DartQuant arXiv 2511.04063.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from qgraph import (
    errors,
    graph,
    online_hadamard,
    online_scores,
    ops,
    opset,
    rotations,
    symmetry,
    weights,
)
from qgraph.channel_rows import channel_rows
from qgraph.online_hadamard import Placed
from qgraph.online_scores import Product
from qgraph.ops import bodies
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register
from qgraph.symmetry import Group

Floats = npt.NDArray[np.float64]


@register
class Rotate(Pass):
    """Rotate activations so that they quantize well."""

    name = "rotate"
    needs = frozenset({Fact.CANONICAL})
    breaks = frozenset({Fact.STATS})
    keeps = Keeps.FLOAT_EQUAL
    repeats = "a rotated model may be rotated again, and nothing in it says that it was"

    class Options(PassOptions):
        """What is rotated, and by which matrices."""

        residual: bool = True
        """Rotate whole channel axes, such as the residual stream (R1)."""
        heads: bool = True
        """Rotate the values of attention heads, head by head (R2)."""
        online: int = Field(default=0, ge=0)
        """Largest block of the Hadamard transforms that run before linear operators no rotation reaches (R4), a power
        of two; 0 for none. Left out, with a warning, where the target lacks qgraph's operators."""
        scores: int = Field(default=0, ge=0)
        """Largest block of the Hadamard transforms of queries and keys before their products (R3), a power of two; 0
        for none. They run with the model, as those of `online` do; where no rotary embedding stands between, queries
        and keys of a head rotate with their weights instead. Worth it where these products are quantized."""
        matrix: Literal["hadamard", "pca", "learned"] = "hadamard"
        """"hadamard": with random signs; "pca": principal axes, then Hadamard; "learned": improved on samples. The last
        two need --data."""
        seeds: int = Field(default=4, ge=1)
        """How many draws of signs are tried where there is data; the one of least kurtosis is taken."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rotate `model` in place."""
        options = self.options_as(Rotate.Options)
        self._check(options, ctx)
        before = graph.opset(model)
        is_ready = self._make_ready(model, options, ctx)
        untied: dict[str, tuple[str, ...]] = {}
        for group in self._legal(model, options):
            untied[group.name] = symmetry.absorb_gains(model, group, spool=ctx.spool).copied
        found = self._legal(model, options)
        placed = []
        if is_ready:
            placed += self._online(model, found, options.online, ctx)
            placed += _scores(model, found, options.scores, ctx) if options.scores else []
        samples = channel_rows(model, found, ctx)
        for number, group in enumerate(found):
            ctx.progress(f"rotating {group.name}", number / len(found))
            rng = np.random.default_rng([ctx.recipe.seed, number])
            t = _matrix(group, samples.get(number), options, rng)
            folded = symmetry.rotate(model, group, t, spool=ctx.spool)
            _say(group, (*untied.get(group.name, ()), *folded.copied), ctx)
        if not found and not placed:
            _say_nothing(model, ctx)
        return bool(found or placed) or graph.opset(model) != before

    def _check(self, options: Options, ctx: Context) -> None:
        for option, size in (("online", options.online), ("scores", options.scores)):
            if size & (size - 1):
                _refuse(option, f"{size} is no power of two", "give 32, 64, 128, ...")
        if options.matrix != "hadamard" and ctx.data is None:
            hint = f"{errors.GIVE_SAMPLES}; or matrix = hadamard"
            _refuse("matrix", f"{options.matrix!r} needs samples", hint)

    def _make_ready(self, model: ir.Model, options: Options, ctx: Context) -> bool:
        """Raise the opset to that of the operator's body; False, with a warning, where that cannot be done."""
        wanted = options.online and any(online_hadamard.is_linear(w) for w in weights.find(model))
        if options.scores and not wanted:
            products = online_scores.find(model, options.scores)
            unrotated = _unrotated(products, self._legal(model, options))
            wanted = any(not p.reason for p in unrotated)
        reason = ""
        if not wanted:
            return True
        if ops.DOMAIN not in _domains(ctx):
            reason = f"target {ctx.target.name!r} has no Hadamard operator"
        elif graph.opset(model) < bodies.MIN_OPSET:
            try:
                opset.raise_opset(model, bodies.MIN_OPSET)
            except errors.UnsupportedError as e:
                reason = e.diagnostics[0].message
        if reason:
            text = f"what no rotation reaches stays as it is: {reason}"
            ctx.report("warning", "QG216", "rotate", text, "--target ort-qgraph, opset 18 or newer")
        return not reason

    @staticmethod
    def _legal(model: ir.Model, options: Options) -> list[Group]:
        """Groups that may be rotated, have somebody who profits, and are asked for."""
        return [
            g
            for g in symmetry.groups(model, ["rotate"])
            if g.legal
            and (
                (options.residual if len(g.blocks) == 1 else options.heads)
                if g.readers
                else options.scores and any(online_scores.is_open(n) for n in g.products)
            )
        ]

    @staticmethod
    def _online(model: ir.Model, found: list[Group], online: int, ctx: Context) -> list[Placed]:
        if not online:
            return []
        rotated = {m.node for g in found for m in g.readers}
        placed = online_hadamard.insert(model, rotated, online, spool=ctx.spool)
        for each in placed:
            ctx.report(
                "note", "QG212", each.activation,
                f"goes through a Hadamard transform in blocks of {each.block} at run time, before "
                + ", ".join(each.readers),
            )  # fmt: skip
        return placed


def _unrotated(products: list[Product], found: list[Group]) -> list[Product]:
    """Products whose queries and keys no group of `found` rotates."""
    rotated = {n for g in found for n in g.products}
    return [p for p in products if p.node not in rotated]


def _scores(model: ir.Model, found: list[Group], largest: int, ctx: Context) -> list[Placed]:
    """Transform queries and keys that no group of `found` rotates; say which stay as they are."""
    every = online_scores.find(model, largest)
    if not every:
        text = "no product of two activations sums over channels: there are no queries and keys"
        ctx.report("warning", "QG218", "rotate", text, "leave out options.rotate.scores")
    products = _unrotated(every, found)
    for product in products:
        if product.reason:
            text = f"queries and keys stay as they are: {product.reason}"
            ctx.report("note", "QG218", graph.where(product.node), text)
    placed = online_scores.insert(model, [p for p in products if not p.reason])
    for each in placed:
        ctx.report(
            "note", "QG212", each.activation,
            f"goes through a Hadamard transform in blocks of {each.block} at run time, before "
            f"{', '.join(each.readers)}: queries or keys",
        )  # fmt: skip
    return placed


def _domains(ctx: Context) -> set[str]:
    return {d for forms in ctx.target.forms.values() for f in forms for d in f.domains}


def _refuse(option: str, message: str, hint: str) -> None:
    raise errors.RecipeError(
        errors.Diagnostic("error", "QG305", f"options.rotate.{option}", message, hint)
    )


def _say(group: Group, copied: tuple[str, ...], ctx: Context) -> None:
    where = f"{len(group.blocks)} heads of {group.block}" if len(group.blocks) > 1 else group.size
    names = ", ".join(dict.fromkeys(copied))
    untied = (
        f"; {names} had to be copied, since it was shared (a tied table and head)" if names else ""
    )
    ctx.report("note", "QG211", group.name, f"rotated ({where} channels){untied}")


def _say_nothing(model: ir.Model, ctx: Context) -> None:
    reasons = dict.fromkeys(
        f"{g.name}: {graph.where(g.forbids)} {g.reason}"
        for g in symmetry.groups(model, ["rotate"])
        if not g.legal and g.forbids is not None
    )
    text = "; ".join(list(reasons)[:3]) or "it has no channels between linear operators"
    hint = "qgraph inspect --symmetries lists every group with its reason"
    ctx.report("warning", "QG213", "rotate", f"nothing may be rotated: {text}", hint)


def _matrix(
    group: Group, rows: Floats | None, options: Rotate.Options, rng: np.random.Generator
) -> Floats:
    """The best of several draws, by kurtosis of the rotated rows."""
    n = group.block

    def finish(t: Floats) -> Floats:
        return symmetry.keep_mean(t) if group.keeps_mean else t

    if rows is None:
        return finish(rotations.randomized(n, rng))
    rows = rows.reshape(-1, n)  # heads are samples, too
    draws = []
    for _ in range(options.seeds):
        if options.matrix == "pca":
            t = rotations.principal(rows, rng)
        else:
            t = rotations.randomized(n, rng)
        draws.append(finish(t))
    best = min(draws, key=lambda t: rotations.kurtosis(rows @ t.T))
    # Where the mean has to be kept, descent would leave the matrices that keep it.
    if options.matrix == "learned" and not group.keeps_mean:
        best = rotations.learned(rows, best)
    return best
