"""smooth: move outliers of activations into weights, channel by channel; what makes the channels undoes it.

    t_j = max|x_j|^α / max|w_j|^(1-α)       x_j / t_j is quantized, w_j t_j reads it

SmoothQuant of Xiao et al. 2023 (arXiv:2211.10438), over the channel symmetries of `qgraph.symmetry`: the factor goes
into whatever makes the channels (norm gains, linears, convolutions, values through attention, one side of a gated
product). α is searched for each group: the output error of all its readers, with activations on one 8-bit grid and
weights on one grid per output channel, on rows of the data that the factors were not made of. A group that is best as
it is stays.

Where nothing can undo the factor (behind a GELU, or where the next norm stands on the stream) `insert` writes an
explicit Mul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import calibrate, graph, numerics, samples, scaling, symmetry, weights
from qgraph.calibrate import rows
from qgraph.observers import Stats, Wanted
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register
from qgraph.scaling import Doubles, Site
from qgraph.spec import QuantSpec

ALPHAS = tuple(round(0.3 + 0.05 * i, 2) for i in range(13))
_ACTIVATIONS = QuantSpec.parse("uint8.tensor.asym")
_WEIGHTS = QuantSpec.parse("int8.ch")
_LEAST_GAIN = 0.98  # a factor that leaves more of the error than this is not worth it
_LEAST_INSERTED = 0.7  # and an operator more is worth it below this
# The error is measured on few rows: among alphas that are nearly as good as the best, the least extreme one is taken.
_AS_GOOD, _MIDDLE = 1.1, 0.5


@register
class Smooth(Pass):
    """Divide outlier channels of activations and multiply the weights that read them."""

    name = "smooth"
    needs = frozenset({Fact.CANONICAL})
    breaks = frozenset({Fact.STATS})
    keeps = Keeps.FLOAT_EQUAL

    class Options(PassOptions):
        """How strongly, judged on how much, and whether operators may be added."""

        alpha: float = 0.0
        """How much of the outliers moves into the weights, 0..1; 0 searches it for every group."""
        rows: int = 512
        """Rows of activations that the search measures the error on."""
        insert: bool = False
        """Write a Mul where no weight or gain can take the factor."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite `model` in place."""
        options = self.options_as(self.Options)
        dataset = samples.require(model, ctx, self.name, "needs samples to find outliers")
        inserted = _insert(model) if options.insert else {}
        sites = scaling.sites(model)
        if not sites:
            return False
        axes = scaling.axes(sites)
        wanted = {name: Wanted(channel_axis=axis) for name, axis in axes.items()}
        stats = calibrate.run(model, dataset, wanted, threads=ctx.threads, progress=ctx.progress)
        taken = rows.take(model, dataset, axes, options.rows, _rng(ctx), threads=ctx.threads)
        chosen: list[float] = []
        for count, site in enumerate(sites):
            ctx.progress(f"smoothing {site.group.name}", count / len(sites))
            is_inserted = any(m.node in inserted for m in site.group.writers)
            needed = _LEAST_INSERTED if is_inserted else _LEAST_GAIN
            alphas = (options.alpha,) if options.alpha else ALPHAS
            found = _search(site, stats, taken, alphas, needed, _rng(ctx))
            if found is not None:
                chosen.append(found[0])
                symmetry.scale(model, site.group, found[1], spool=ctx.spool)
                scaling.follow(taken, site, found[1])
        _drop_unused(inserted)
        if chosen:
            ctx.report(
                "note", "QG213", "smooth",
                f"smoothed {len(chosen)} of {len(sites)} groups of channels, with alpha from "
                f"{min(chosen):g} to {max(chosen):g}",
            )  # fmt: skip
        return bool(chosen)


def _search(
    site: Site,
    stats: Stats,
    taken: dict[str, Doubles],
    alphas: Sequence[float],
    needed: float,
    rng: np.random.Generator,
) -> tuple[float, Doubles] | None:
    """The best (alpha, factors of the channels [C]); None where nothing leaves less than `needed` of the error."""
    group = site.group
    peak, fitted, largest = (np.zeros(group.size) for _ in range(3))
    judged = []
    for reader in site.readers:
        seen = stats[reader.name].channel_absmax
        if seen is None or not len(taken[reader.name]):
            return None
        w = reader.matrix()
        scaling.largest(peak, reader.at, seen.astype(np.float64))
        scaling.largest(largest, reader.at, np.abs(w).max(axis=(0, 1)))
        if len(w) > scaling.OUTPUTS:
            w = w[np.sort(rng.permutation(len(w))[: scaling.OUTPUTS])]
        judged.append(_Judged(taken[reader.name], w, reader.at))
        scaling.largest(fitted, reader.at, np.abs(taken[reader.name][::2]).max(axis=0))
    if not np.isfinite(peak).all() or not np.isfinite(largest).all():
        return None
    plain = sum(j.error(np.ones(group.size)) for j in judged)
    found = {a: sum(j.error(1 / _smoothing(fitted, largest, a)) for j in judged) for a in alphas}
    least = min(found.values())
    if not least < needed * plain:
        return None
    alpha = min((a for a in alphas if found[a] <= _AS_GOOD * least), key=lambda a: abs(a - _MIDDLE))
    return alpha, 1 / _smoothing(peak, largest, alpha)


@dataclass
class _Judged:
    """Rows x [R, K] that a weight w [N, P, K] reads; `at` maps K to the group's channels."""

    x: Doubles
    w: Doubles
    at: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        self._flat = self.w.reshape(-1, self.w.shape[-1])
        self._fitted, self._held = self.x[::2], self.x[1::2] if len(self.x) > 1 else self.x
        self._expected = self._held @ self._flat.T
        self._power = scaling.row_powers(self._expected)

    def error(self, factors: Doubles) -> float:
        """Mean over rows of |ŷ - y|² / |y|², with x f on an 8-bit grid and w / f on one grid per output channel.

        The grid is that of every other row, the error that of the rows between: factors that make all channels
        equally large on the rows they are made of leave no room for others.
        """
        own = scaling.spread(factors, self.at)
        x, seen = self._held * own, self._fitted * own
        scale, zero = numerics.range_grid(float(seen.min()), float(seen.max()), _ACTIVATIONS)
        grid = np.full((1, 1), scale, np.float32), np.full((1, 1), zero, np.uint8)
        codes = numerics.quantize(x, grid[0], grid[1], _ACTIVATIONS)
        rounded = numerics.dequantize(codes, *grid, _ACTIVATIONS)
        w = (self.w / own).reshape(len(self.w), -1)
        w_scale, _ = numerics.min_max_grid(w, _WEIGHTS)
        read = numerics.dequantize(
            numerics.quantize(w, w_scale, None, _WEIGHTS), w_scale, None, _WEIGHTS
        )
        off = rounded @ read.reshape(self._flat.shape).T - self._expected
        return float((np.square(off).sum(axis=1) / self._power).mean())


def _smoothing(peak: Doubles, largest: Doubles, alpha: float) -> Doubles:
    """t_j, with a geometric mean of 1; 1 for channels that are never used."""
    used = (peak > 0) & (largest > 0)
    raw = np.ones_like(peak)
    raw[used] = peak[used] ** alpha / largest[used] ** (1 - alpha)
    return scaling.even(raw, used)


def _insert(model: ir.Model) -> dict[ir.Node, ir.Value]:
    """Write Mul(x, 1) before products whose channels belong to no group that may be scaled; node → x."""
    free = {
        (m.node, m.index)
        for g in symmetry.groups(model, ["scale"])
        if g.legal and not g.bounds and not symmetry.would_copy(g)
        for m in g.readers
    }
    names = graph.Names(model)
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for weight in weights.find(model):
        whole = not weight.others and not weight.is_tied and not weight.is_output
        for use in weight.uses:
            x = use.node.inputs[0]
            is_product = use.kind in ("matmul", "gemm") and not use.reason and not use.in_body
            if x is None or not is_product or (use.node, use.index) in free or not whole:
                continue
            if use.kind == "gemm" and graph.attribute(use.node, "transA", 0):
                continue
            by_input.setdefault(x, []).append(use.node)
    made: dict[ir.Node, ir.Value] = {}
    position = {node: i for i, node in enumerate(model.graph)}
    for x, nodes in by_input.items():
        first = min(nodes, key=lambda n: position[n])
        use = next(u for w in weights.find(model) for u in w.uses if u.node is first)
        w = first.inputs[1]
        assert w is not None
        origin, _ = weights.source(w)
        assert origin is not None and origin.const_value is not None
        k = weights.tensor_shape(origin)[use.matrix.perm[-1]]
        ones = np.ones(k, origin.const_value.dtype.numpy())
        constant = graph.add_initializer(model.graph, names(f"{x.name}.smooth"), ones)
        out = graph.value(names(f"{x.name}.smoothed"), x.dtype, x.shape)
        node = graph.add_node(
            first, "Mul", [x, constant], [out], name=names(f"{first.name}.smooth")
        )
        made[node] = x
        for reader in nodes:
            reader.replace_input_with(0, out)
    return made


def _drop_unused(inserted: dict[ir.Node, ir.Value]) -> None:
    """Take back every Mul that got no factor."""
    for node, x in inserted.items():
        factor = node.inputs[1]
        assert factor is not None
        if (graph.array(factor) == 1).all():
            graph.replace_uses(node.outputs[0], x)
            owner = graph.owner(node)
            owner.remove(node, safe=True)
            if not factor.uses():
                del owner.initializers[str(factor.name)]


def _rng(ctx: Context) -> np.random.Generator:
    return np.random.default_rng(ctx.recipe.seed)
