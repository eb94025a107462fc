"""tune: codes, scales and zero points of all weights move together until the model's outputs are closest to float.

Solvers see one layer at a time. What errors of different layers do together, and what a later layer could make up for,
only gradients through the whole model say: at 4 bits that is little, at 2 bits it is most of the loss
(docs/notes/tune.md). No label is needed: the float model says what is right, of given samples and of samples that it
writes itself. Whether it helps is judged on given samples that are held out; where it does not, weights stay as they
were solved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import numpy as np
import onnx_ir as ir
from pydantic import Field

from qgraph import errors, graph, numerics, opset, samples, weights
from qgraph.calibrate.simulate import Simulated, simulate
from qgraph.data import Feeds
from qgraph.pipeline import Context, Fact, Keeps, Pass, PassOptions
from qgraph.registry import register
from qgraph.spool import Packed
from qgraph.tuning.descent import Schedule, Tuned, Tuner
from qgraph.tuning.latent import Latent
from qgraph.tuning.written import Writer
from qgraph.weights import Weight

_OPSET = 13  # before it, Softmax and the axes of others are other operators
_LEAST = 2


@register
class Tune(Pass):
    """Move quantized weights by gradients of what the outputs lose."""

    name = "tune"
    needs = frozenset({Fact.CANONICAL, Fact.PLAN, Fact.SOLVED})
    keeps = Keeps.BIT_EXACT

    class Options(PassOptions):
        """How long, how fast, on which samples."""

        epochs: int = Field(12, ge=1)
        """How often each sample is seen."""
        batch: int = Field(4, ge=1)
        """Samples per step."""
        code_rate: float = Field(0.01, gt=0)
        """The largest step of a code or zero point, in codes; it falls to 0 in the course of the epochs."""
        scale_rate: float = Field(0.002, gt=0)
        """The largest step of a scale, relative to it; it falls likewise."""
        samples: int = Field(256, ge=_LEAST)
        """How many of the given samples are used, the first ones; they stay in memory."""
        written: int = Field(0, ge=0)
        """How many more samples the float model writes itself, where it is a language model (a decoder)."""
        length: int = Field(128, ge=2)
        """How many tokens of each sample it writes; one run of the model for each token."""
        held_out: int = Field(8, ge=1)
        """One of so many given samples judges and does not teach."""
        outputs: tuple[str, ...] = ()
        """Outputs that hold logits or probabilities; by default those with such names."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Replace what `ctx.plan.solved` holds."""
        options = self.options_as(Tune.Options)
        solved = [w for w in weights.find(model) if w.name in ctx.plan.solved]
        found = [w for w in solved if _can_move(w, model)]
        if not found:
            if solved:
                _tell_left(solved, [], ctx)
            return False
        held, taught = _samples(model, options, ctx)
        simulated = _simulated(model, ctx)
        latents = {w.name: Latent(w, ctx.plan.solved[w.name]) for w in found}
        _fix(simulated.model, [w for w in solved if w not in found], ctx)
        tuner = Tuner(simulated, latents, options.outputs, ctx.threads)
        moved = [w for w in found if w.name in tuner.tape.reached]
        if len(moved) < len(solved):
            _tell_left([w for w in solved if w not in moved], tuner.tape.stops, ctx)
        if not moved:
            return False
        rng = np.random.default_rng(ctx.recipe.seed)
        if options.written:
            taught = [*taught, *_written(tuner, [*held, *taught], options, rng, ctx)]
        schedule = Schedule(options.epochs, options.batch, options.code_rate, options.scale_rate)
        tuned = tuner.tune(taught, held, schedule, rng, ctx.progress)
        _tell(tuned, len(held), tuner, ctx)
        if tuned.kept:
            for weight in moved:
                _keep(weight, latents[weight.name], ctx)
        return False


def _samples(
    model: ir.Model, options: Tune.Options, ctx: Context
) -> tuple[list[Feeds], list[Feeds]]:
    """Those that judge, and those that teach."""
    dataset = samples.require(
        model, ctx, "pass tune", "needs samples on which outputs are compared"
    )
    given = list(islice(iter(dataset), options.samples))
    if len(given) < _LEAST:
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG411", "pass tune", "has a single sample: one has to teach, another to judge",
                "give 2 at least; 64 and more are usual",
            )
        )  # fmt: skip
    held = given[:: options.held_out]
    taught = [each for i, each in enumerate(given) if i % options.held_out]
    # Where each would judge, the last one teaches.
    return (held, taught) if taught else (held[:-1], held[-1:])


def _simulated(model: ir.Model, ctx: Context) -> Simulated:
    """The model with the roundings of activations, in an opset whose operators have rules."""
    if graph.opset(model) < _OPSET:
        raised = graph.clone(model)
        opset.raise_opset(raised, _OPSET)
        model = raised
    return simulate(model, ctx.plan, ctx.target)


def _written(
    tuner: Tuner,
    given: Sequence[Feeds],
    options: Tune.Options,
    rng: np.random.Generator,
    ctx: Context,
) -> list[Feeds]:
    """Samples that the float model writes, if it can."""
    if len(tuner.predictions) != 1:
        obstacle = f"it has {len(tuner.predictions) or 'no'} outputs with predictions"
    else:
        writer = Writer(tuner.teacher, tuner.predictions[0], given, options.length)
        obstacle = writer.obstacle()
    if obstacle:
        message = f"the float model cannot write samples: {obstacle}"
        hint = "only the given ones are used; give more, or options.tune.written = 0"
        ctx.report("warning", "QG412", "pass tune", message, hint)
        return []
    return writer.write(options.written, rng, ctx.progress)


def _tell(tuned: Tuned, held: int, tuner: Tuner, ctx: Context) -> None:
    """What it came to."""
    kind = "KL divergence" if tuner.predictions else "share of noise"
    begin, end = tuned.losses[0], tuned.losses[tuned.kept]
    if tuned.kept:
        message = f"{kind} of {held} held-out samples from {begin:.4g} to {end:.4g}"
        ctx.report("note", "QG413", "pass tune", message)
    else:
        message = f"no epoch made {held} held-out samples better than {kind} {begin:.4g}: weights stay as solved"
        hint = "more samples, or a smaller options.tune.code_rate"
        ctx.report("warning", "QG413", "pass tune", message, hint)


def _keep(weight: Weight, latent: Latent, ctx: Context) -> None:
    q = latent.result()
    w = np.asarray(weight.read(), np.float32)
    error = numerics.squared_error(w, q)
    power = float(np.square(w, dtype=np.float64).sum())
    sqnr = 10 * math.log10(power / error) if power and error else math.inf
    ctx.records.setdefault(weight.name, {}).update(squared_error=error, sqnr_db=sqnr)
    ctx.plan.solved[weight.name] = Packed(q, ctx.spool)


def _can_move(weight: Weight, model: ir.Model) -> bool:
    """It is of float32, and in the main graph: gradients of float16 would underflow, and bodies have no rules."""
    held = weight.value.const_value
    is_outside = model.graph.initializers.get(weight.name) is weight.value
    return held is not None and held.dtype == ir.DataType.FLOAT and is_outside


def _fix(model: ir.Model, fixed: Sequence[Weight], ctx: Context) -> None:
    """Give weights that do not move the values that their codes mean."""
    values = {str(v.name): v for _, v in graph.initializers(model)}
    for weight in fixed:
        array = weight.matrix.back(ctx.plan.solved[weight.name].dequantize(), weight.dims)
        value = values[weight.name]
        assert value.const_value is not None
        value.const_value = ir.tensor(
            array.astype(value.const_value.dtype.numpy()), name=value.name
        )


def _tell_left(left: Sequence[Weight], stops: Sequence[ir.Node], ctx: Context) -> None:
    """Which weights stay as they were solved, and why."""
    kinds = sorted({n.op_type for n in stops})
    reason = f"no gradient passes {', '.join(kinds)}" if kinds else "not float32, or in a body"
    names = ", ".join(w.label for w in left[:3]) + (", ..." if len(left) > 3 else "")
    message = f"{len(left)} weights stay as they were solved ({names}): {reason}"
    ctx.report("note", "QG410", "pass tune", message)
