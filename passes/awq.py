"""awq: scale up the channels of weights that read large activations, so that rounding the weights loses less.

    s_j = mean|x_j|^α / mean|w_j|^β        x_j / s_j is made instead of x_j,  w_j s_j is rounded instead of w_j

Activation-aware weight quantization of Lin et al. 2023 (arXiv:2306.00978), over the channel symmetries of
`qgraph.symmetry`: the factor goes into whatever makes the channels (norm gains, linears, values through attention with
shared heads, one side of a gated product). (α, β) is searched for each group: the error of all its readers' outputs on
rows of the data, with the readers rounded as the recipe's rules will have them. A group that is best as it is stays.
With β = 0 that is the method of the paper; β = 1 - α also takes back what one layer scales up and the next one down.

Activations keep their type, so this serves recipes that quantize weights alone; `smooth` serves the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from qgraph import registry, samples, scaling, symmetry, weights
from qgraph.calibrate import rows
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.plan import QuantPlan
from qgraph.recipe import FLOAT
from qgraph.registry import register
from qgraph.scaling import Doubles, Reader, Site
from qgraph.solver import Solver
from qgraph.spec import QuantSpec
from qgraph.weights import Weight

TENTHS = tuple(i / 10 for i in range(11))
EXPONENTS = (*((a, 0.0) for a in TENTHS[1:]), *((a, round(1 - a, 1)) for a in TENTHS[:-1]))
_LEAST_GAIN = 0.98  # a factor that leaves more of the error than this is not worth it


@register
class Awq(Pass):
    """Scale up the channels of weights that read large activations, before the weights are rounded."""

    name = "awq"
    needs = frozenset({Fact.CANONICAL})
    breaks = frozenset({Fact.STATS})
    keeps = Keeps.FLOAT_EQUAL
    repeats = "a second search starts from the sizes that the first one left, and may scale further"

    class Options(PassOptions):
        """How strongly, and judged on how much."""

        alpha: float = Field(default=0.0, ge=0, le=1)
        """How much of the activations' sizes moves into the weights, 0..1; 0 searches exponents for every group."""
        rows: int = Field(default=512, ge=1)
        """Rows of activations that sizes and errors are measured on."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite `model` in place."""
        options = self.options_as(self.Options)
        dataset = samples.require(
            model, ctx, self.name, "needs samples to tell which channels are large"
        )
        sites = scaling.sites(model)
        if not sites:
            return False
        planned = _planned(model, ctx)
        exponents = ((options.alpha, 0.0),) if options.alpha else EXPONENTS
        rng = np.random.default_rng(ctx.recipe.seed)
        axes = scaling.axes(sites)
        taken = rows.take(model, dataset, axes, options.rows, rng, threads=ctx.threads)
        chosen: list[tuple[float, float]] = []
        for count, site in enumerate(sites):
            ctx.progress(f"scaling {site.group.name}", count / len(sites))
            judged = _judged(site, taken, planned, ctx)
            sizes = _sizes(site, taken), _weights(site)
            if not judged or not all(np.isfinite(each).all() for each in sizes):
                continue
            plain = sum(j.error(np.ones(site.group.size)) for j in judged)
            found = {e: sum(j.error(_factors(*sizes, *e)) for j in judged) for e in exponents}
            best = min(found, key=lambda e: found[e])
            if found[best] < _LEAST_GAIN * plain:
                chosen.append(best)
                factors = _factors(*sizes, *best)
                symmetry.scale(model, site.group, factors, spool=ctx.spool)
                scaling.follow(taken, site, factors)
        if chosen:
            both, alphas = sum(b > 0 for _, b in chosen), [a for a, _ in chosen]
            ctx.report(
                "note", "QG217", "awq",
                f"scaled {len(chosen)} of {len(sites)} groups of channels, with alpha from {min(alphas):g} to "
                f"{max(alphas):g}, {both} of them by the sizes of weights too",
            )  # fmt: skip
        return bool(chosen)


@dataclass
class _Judged:
    """Rows x [R, C] that a weight [N, K] reads, K being C channels of P pixels; `at` maps C to the group's channels."""

    x: Doubles
    w: Doubles
    at: npt.NDArray[np.int64]
    spec: QuantSpec
    solver: Solver

    def __post_init__(self) -> None:
        self._pixels = self.w.shape[1] // len(self.at)
        self._power = scaling.row_powers(self._of(self.w))

    def error(self, factors: Doubles) -> float:
        """Mean over rows of |ŷ - y|² / |y|², with x f and the rounded w / f."""
        own = np.repeat(scaling.spread(factors, self.at), self._pixels)
        rounded = self.solver.solve(
            (self.w / own).astype(np.float32), self.spec, None, np.random.default_rng(0)
        )
        off = self._of(rounded.dequantize() * own - self.w)
        return float((np.square(off).sum(axis=1) / self._power).mean())

    def _of(self, w: Doubles) -> Doubles:
        """Outputs [R, N P] of a weight, each pixel by itself."""
        flat = w.reshape(len(w), -1, self._pixels).transpose(0, 2, 1).reshape(-1, len(self.at))
        product: Doubles = self.x @ flat.T
        return product


def _judged(
    site: Site,
    taken: dict[str, Doubles],
    planned: dict[tuple[ir.Node, int], tuple[Weight, QuantSpec]],
    ctx: Context,
) -> list[_Judged]:
    """The readers that will be quantized."""
    found = []
    rng = np.random.default_rng(ctx.recipe.seed)
    solver: Solver = registry.get("solver", "rtn")(threads=ctx.threads)
    for reader in _rounded(site):
        held = planned.get((reader.member.node, reader.member.index))
        if held is None or not len(taken[reader.name]):
            continue
        w = np.asarray(held[0].read(), np.float64)
        if len(w) > scaling.OUTPUTS:
            w = w[np.sort(rng.permutation(len(w))[: scaling.OUTPUTS])]
        found.append(_Judged(taken[reader.name], w, reader.at, held[1], solver))
    return found


def _sizes(site: Site, taken: dict[str, Doubles]) -> Doubles:
    """Mean |x| of the group's channels [C] over all rows of all activations that are read."""
    read = {r.name: r for r in site.readers}.values()
    return _means(
        site, [(r, np.abs(taken[r.name]).mean(axis=0)) for r in read if len(taken[r.name])]
    )


def _weights(site: Site) -> Doubles:
    """Mean |w| of what reads each of the group's channels [C]."""
    return _means(site, [(r, np.abs(r.matrix()).mean(axis=(0, 1))) for r in _rounded(site)])


def _rounded(site: Site) -> list[Reader]:
    """Readers whose rounding a factor changes: a depthwise weight has one channel, and its scale, for each output."""
    return [r for r in site.readers if not r.is_depthwise]


def _means(site: Site, found: list[tuple[Reader, Doubles]]) -> Doubles:
    """The mean [C] of what readers say about their own channels."""
    total, count = np.zeros(site.group.size), np.zeros(site.group.size)
    for reader, own in found:
        is_own = reader.at >= 0
        np.add.at(total, reader.at[is_own], own[is_own])
        np.add.at(count, reader.at[is_own], 1)
    return total / np.maximum(count, 1)


def _factors(sizes: Doubles, w: Doubles, alpha: float, beta: float) -> Doubles:
    """1 / s_j, with a geometric mean of 1; 1 for channels that are never used."""
    used = (sizes > 0) & (w > 0)
    raw = np.ones_like(sizes)
    raw[used] = w[used] ** beta / sizes[used] ** alpha
    return scaling.even(raw, used)


def _planned(model: ir.Model, ctx: Context) -> dict[tuple[ir.Node, int], tuple[Weight, QuantSpec]]:
    """How each use of a weight will be quantized by the recipe; float ones are left out.

    assign-precision is asked, on a context of its own. Activations do not matter here, and static ones could not be
    planned yet.
    """
    rules = tuple(r.model_copy(update={"activations": FLOAT}) for r in ctx.recipe.rules)
    recipe = ctx.recipe.model_copy(update={"rules": rules})
    asked = Context(ctx.target, recipe, plan=QuantPlan(), threads=ctx.threads)
    registry.get("pass", "assign-precision")().run(model, asked)
    specs = {d.value: d.spec for d in asked.plan.quantized() if d.spec is not None}
    return {
        (use.node, use.index): (weight, specs[weight.name])
        for weight in weights.find(model)
        if weight.name in specs
        for use in weight.uses
    }
