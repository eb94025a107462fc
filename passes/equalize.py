"""equalize: scale channels so that per-tensor grids serve all of them; what reads them undoes it.

    s_c = sqrt(r2_c / r1_c)      r1: largest weight that makes channel c, r2: largest that reads it, each over the
                                 largest of its tensor; group by group until nothing moves any more

Cross-layer equalization of Nagel et al. 2019, Data-Free Quantization (arXiv:1906.04721, 4.1), over the channel
symmetries of `qgraph.symmetry` instead of pairs of layers: a group may have any number of writers and readers, residual
adds, concatenations and depthwise convolutions included. It serves targets with one scale per weight tensor; with a
scale per channel there is next to nothing to gain.

A Clip with an upper bound (Relu6) passes no scale but 1, so by default such channels are left alone. With
clips = "measured" calibration shows which channels never reach the bound: it does not matter for them, and they are
scaled as long as they stay below. That is equal on the data, and proven there. "exact" writes one bound per channel
instead, which keeps the function on every input, but no integer kernel absorbs it and the scaled ranges share one grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import calibrate, errors, graph, samples, symmetry, verify
from qgraph.observers import Wanted
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register
from qgraph.symmetry import Group, Member

Doubles: TypeAlias = npt.NDArray[np.float64]

_LARGEST = 2.0**10  # a factor beyond this serves no grid, only dead channels
_LEAST = 1.01  # smaller factors than this are not worth another weight
_KEEP_UNDER = 1 << 20  # elements of a weight in float64 at a time
_READ = 1 << 32  # elements that all rounds together may read, but for
_LEAST_ROUNDS = 3
_PROVEN_ON = 8
_TOLERANCE = 1e-4


@register
class Equalize(Pass):
    """Even out the ranges of channels for weights with one scale per tensor."""

    name = "equalize"
    needs = frozenset({Fact.CANONICAL})
    breaks = frozenset({Fact.STATS})
    keeps = Keeps.FLOAT_EQUAL

    class Options(PassOptions):
        """What may be scaled, and for how long."""

        clips: Literal["keep", "measured", "exact"] = "keep"
        """Channels behind a Clip: left alone, scaled where data shows the bound unused, or one bound each."""
        iterations: int = 100
        """Rounds over all groups at most; fewer for a model of more than 40 million weights, three at least."""
        tolerance: float = 1e-3
        """Stop when no channel moves by more than this share."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options_as(self.Options).clips == "measured":
            # On other inputs than the data a bound may be met that was not: proven on the data below instead.
            self.keeps = Keeps.NOTHING  # type: ignore[misc]

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrite `model` in place."""
        options = self.options_as(self.Options)
        groups = [g for g in symmetry.groups(model, ["scale"]) if g.legal and g.readers]
        # A table that is tied to the head would have to be copied: that costs more than it serves.
        groups = [g for g in groups if not symmetry.would_copy(g)]
        items = [_Item(g) for g in groups]
        bounded = [i for i in items if i.group.bounds]
        if options.clips == "keep":
            items = [i for i in items if not i.group.bounds]
        elif options.clips == "measured" and bounded:
            _measure(model, bounded, ctx)
        if not items:
            return False
        rounds = _even_out(items, options.iterations, options.tolerance)
        items = [i for i in items if i.largest > _LEAST]
        if not items:
            return False
        before = graph.clone(model)
        for item in items:
            symmetry.scale(
                model, item.group, item.s, spool=ctx.spool, keep_bounds=options.clips == "measured"
            )
        largest = max(i.largest for i in items)
        ctx.report(
            "note", "QG211", "equalize",
            f"scaled {len(items)} of {len(groups)} groups of channels, by factors up to {largest:.3g} "
            f"({rounds} rounds)",
        )  # fmt: skip
        if options.clips == "measured" and bounded:
            _prove(before, model, ctx)
        return True


@dataclass
class _Item:
    """A group and what becomes of its channels.

    Attributes:
        group: of channels.
        s: factors so far.
        is_fixed: channels that meet a bound: their factor is 1.
        upper: largest factor that keeps a channel below its bound.
    """

    group: Group
    s: Doubles
    is_fixed: npt.NDArray[np.bool_]
    upper: Doubles

    def __init__(self, group: Group) -> None:
        self.group = group
        self.s = np.ones(group.size)
        self.is_fixed = np.zeros(group.size, bool)
        self.upper = np.full(group.size, _LARGEST)

    @property
    def largest(self) -> float:
        """The factor, or its inverse, that is farthest from 1."""
        return float(np.maximum(self.s, 1 / self.s).max(initial=1.0))

    def move(self, made: Doubles, read: Doubles) -> float:
        """Even out what makes the channels and what reads them, [C] each; the largest change, as a factor."""
        has_both = (made > 0) & (read > 0)
        ideal = self.s * np.sqrt(np.divide(read, made, out=np.ones_like(made), where=has_both))
        held = self.is_fixed & has_both
        if held.any():
            ideal = ideal / np.exp(np.log(ideal[held]).mean())
        new = np.where(self.is_fixed | ~has_both, self.s, ideal)
        new = np.clip(new, 1 / _LARGEST, self.upper)
        change = np.maximum(new / self.s, self.s / new).max(initial=1.0)
        self.s = new
        return float(change)


class _Tensor:
    """Magnitudes of one weight with the factors that act on it, read part by part from where it is stored."""

    def __init__(self, value: ir.Value) -> None:
        self.factors: dict[tuple[int, bytes, bool], tuple[_Item, Member]] = {}
        self._array = graph.array(value)
        self._kept: Doubles | None = None

    def add(self, item: _Item, member: Member) -> None:
        """A group acts on it; uses by several nodes count once."""
        key = (id(item), member.labels.tobytes(), member.is_inverse)
        self.factors.setdefault(key, (item, member))

    def peaks(self, labels: npt.NDArray[np.int64]) -> Doubles:
        """Largest |W| with all factors for each position of `labels`, over the largest of all; shaped as `labels`."""
        rank = self._array.ndim
        rest = tuple(a for a in range(-rank, 0) if -a > labels.ndim or labels.shape[a] == 1)
        found: Doubles | None = None
        for part, start, stop in self._parts():
            for own in self._factors():
                shape = (1,) * (rank - own.ndim) + own.shape
                own = own.reshape(shape)
                part = part * (own[start:stop] if shape[0] > 1 else own)
            if 0 - rank in rest:  # the axis that is read in parts
                here = part.max(axis=rest, keepdims=True)
                found = here if found is None else np.maximum(found, here)
            else:
                here = part.max(axis=rest, keepdims=True) if rest else part
                found = here if found is None else np.concatenate([found, here])
        assert found is not None
        largest = float(found.max(initial=0.0))
        if largest:
            found = found / largest
        return found.reshape(found.shape[rank - labels.ndim :]) if labels.ndim < rank else found

    def _parts(self) -> Iterator[tuple[Doubles, int, int]]:
        """|W| in parts along its first axis; small tensors are kept, reduced to what factors tell apart."""
        if self._array.size <= _KEEP_UNDER:
            if self._kept is None:
                wide = np.broadcast_shapes(*(m.labels.shape for _, m in self.factors.values()))
                wide = (1,) * (self._array.ndim - len(wide)) + wide
                alike = tuple(a for a in range(self._array.ndim) if wide[a] == 1)
                self._kept = np.abs(self._array).max(axis=alike, keepdims=True).astype(np.float64)
            yield self._kept, 0, len(self._kept)
            return
        rows = max(1, _KEEP_UNDER * len(self._array) // self._array.size)
        for i in range(0, len(self._array), rows):
            held = self._array[i : i + rows]
            yield np.abs(held).astype(np.float64), i, i + len(held)

    def _factors(self) -> Iterator[Doubles]:
        for item, member in self.factors.values():
            at = item.group.positions(member)
            own = np.where(at >= 0, item.s[at], 1.0)
            yield 1 / own if member.is_inverse else own


def _even_out(items: list[_Item], rounds: int, tolerance: float) -> int:
    """Move every group in turn until nothing moves any more; how many rounds that took."""
    tensors: dict[ir.Value, _Tensor] = {}
    for item in items:
        for member in (*item.group.writers, *item.group.readers):
            tensors.setdefault(member.value, _Tensor(member.value)).add(item, member)
    elements = sum(graph.array(v).size for v in tensors)
    rounds = min(rounds, max(_LEAST_ROUNDS, _READ // max(elements, 1)))
    for count in range(1, rounds + 1):
        change = 1.0
        for item in items:
            made = _ranges(item, item.group.writers, tensors)
            read = _ranges(item, item.group.readers, tensors)
            change = max(change, item.move(made, read))
        if change < 1 + tolerance:
            return count
    return rounds


def _ranges(item: _Item, members: tuple[Member, ...], tensors: dict[ir.Value, _Tensor]) -> Doubles:
    """Largest magnitude of each channel [C] in these members, each over the largest of its tensor."""
    result = np.zeros(item.group.size)
    for member in members:
        at, now = np.broadcast_arrays(
            item.group.positions(member), tensors[member.value].peaks(member.labels)
        )
        np.maximum.at(result, at[at >= 0], now[at >= 0])
    return result


def _measure(model: ir.Model, items: list[_Item], ctx: Context) -> None:
    """Which channels meet their bound on the data, and how far below it the others stay."""
    dataset = samples.require(
        model, ctx, "equalize", "needs samples to see which bounds are met",
        f"{errors.GIVE_SAMPLES}; or --set options.equalize.clips=keep leaves them alone",
    )  # fmt: skip
    axes = {str(b.node.outputs[0].name): _axis(b) for i in items for b in i.group.bounds}
    wanted = {name: Wanted(channel_axis=axis) for name, axis in axes.items()}
    stats = calibrate.run(model, dataset, wanted, threads=ctx.threads, progress=ctx.progress)
    for item in items:
        for bound in item.group.bounds:
            limit = min(abs(b) for b in symmetry.bounds_of(bound.node) if b)
            seen = stats[str(bound.node.outputs[0].name)].channel_absmax
            assert seen is not None
            at = item.group.positions(bound).ravel()
            peak = np.zeros(item.group.size)
            peak[at[at >= 0]] = seen.astype(np.float64)[at >= 0]
            item.is_fixed |= peak >= limit * (1 - 1e-6)
            with np.errstate(divide="ignore"):
                item.upper = np.minimum(item.upper, np.maximum(limit / peak, 1.0))


def _axis(bound: Member) -> int:
    """The channel axis, counted from the end, where a Clip's output has it as well as the labels."""
    wide = [a for a in range(bound.labels.ndim) if bound.labels.shape[a] > 1]
    return (wide[0] if wide else 0) - bound.labels.ndim


def _prove(before: ir.Model, after: ir.Model, ctx: Context) -> None:
    """Law 6: the model computes on the data what it did before."""
    feeds = list(islice(iter(ctx.data), _PROVEN_ON))
    found = verify.equivalent(before, after, feeds, rtol=_TOLERANCE)
    if not found.ok:
        raise errors.VerificationError(
            errors.Diagnostic(
                "error", "QG201", "equalize",
                f"the model changed on its own data: {found.reason}",
                "--set options.equalize.clips=keep leaves Clip operators alone",
            )
        )  # fmt: skip
    ctx.report(
        "note", "QG212", "equalize",
        f"proven float-equal on {len(feeds)} samples of the data, largest relative error "
        f"{found.max_rel_error:.1e}",
    )  # fmt: skip
