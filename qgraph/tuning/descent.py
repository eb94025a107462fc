"""Moving quantized weights so that the model's outputs come closer to those of the float model.

    L = KL(float || quantized), averaged over predictions;     |y - ŷ|² / |y|² of outputs that are no predictions

Knowledge distillation from the model's own float form (Liu et al., LLM-QAT, ACL 2024, arXiv:2305.17888), all
quantized weights of the model at once: what layer by layer nobody sees, errors that meet, is seen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qgraph import runtime
from qgraph.calibrate.simulate import Simulated
from qgraph.data import Feeds
from qgraph.evaluate import distributions, sessions
from qgraph.gradients import Tape
from qgraph.gradients.rules import Array
from qgraph.tuning import losses
from qgraph.tuning.latent import Adam, Latent

_CONFIG = {"session.intra_op.allow_spinning": "0"}


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: times that each sample is seen.
        batch: samples whose gradients are averaged for a step.
        code_rate: the largest step of a code, in codes; falls to 0 as a half cosine.
        scale_rate: that of a scale, relative to it.
    """

    epochs: int
    batch: int
    code_rate: float
    scale_rate: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """What came of it: the loss on held-out samples at the start and after each epoch, and the epoch that is kept.

    Epoch 0 is the start.
    """

    losses: tuple[float, ...]
    kept: int


class Tuner:
    """All of a model's quantized weights, and the model on tape.

    Attributes:
        tape: the model on tape.
        predictions: outputs that hold predictions.
        teacher: a session of the float model.

    Args:
        simulated: the float model, and as its operators round activations when it is quantized.
        latents: the weights that are moved, by name; all that are quantized.
        outputs: that hold predictions, as for `evaluate.compare`.
        threads: of ONNX Runtime; 0 is one per core.

    Raises:
        errors.InputError: QG121 where a named output does not exist.
    """

    def __init__(
        self, simulated: Simulated, latents: dict[str, Latent], outputs: Sequence[str], threads: int
    ) -> None:
        self.tape = Tape(simulated.model, list(latents), simulated.origins, threads)
        self.teacher = runtime.session(
            simulated.plain(), threads=threads or None, optimize="basic", config=_CONFIG
        )
        self._latents = latents
        self.predictions = sessions.logit_outputs(self.teacher, outputs)
        floats = [o.name for o in self.teacher.get_outputs() if o.type in sessions.FLOAT_TYPES]
        self._outputs = self.predictions or floats

    def tune(
        self,
        samples: Sequence[Feeds],
        held_out: Sequence[Feeds],
        schedule: Schedule,
        rng: np.random.Generator,
        progress: Callable[[str, float], None],
    ) -> Tuned:
        """Move the weights; afterwards they stand where held-out samples lost least, which may be the start."""
        parts = [
            Adam(each.moved, [schedule.code_rate, schedule.scale_rate, schedule.code_rate][: len(each.moved)])
            for each in self._latents.values()
        ]  # fmt: skip
        best = self._state()
        found = [self.loss(held_out)]
        kept = 0
        steps = schedule.epochs * math.ceil(len(samples) / schedule.batch)
        done = 0
        for epoch in range(1, schedule.epochs + 1):
            for batch in _batches(rng.permutation(len(samples)), schedule.batch):
                gradients = self._gradients([samples[i] for i in batch])
                share = 0.5 * (1 + math.cos(math.pi * done / steps))
                for (name, latent), adam in zip(self._latents.items(), parts, strict=True):
                    if name in gradients:
                        adam.step(latent.gradients(gradients[name]), share)
                        latent.confine()
                done += 1
                progress(f"tuning, epoch {epoch} of {schedule.epochs}", done / steps)
            found.append(self.loss(held_out))
            if found[-1] < found[kept]:
                kept, best = epoch, self._state()
        for latent, state in zip(self._latents.values(), best, strict=True):
            for x, then in zip(latent.moved, state, strict=True):
                x[:] = then
        return Tuned(tuple(found), kept)

    def loss(self, samples: Sequence[Feeds]) -> float:
        """Mean over samples."""
        weights = self._values()
        return float(np.mean([self._total(f, weights) for f in samples]))

    def _state(self) -> list[list[Array]]:
        return [[x.copy() for x in latent.moved] for latent in self._latents.values()]

    def _values(self) -> dict[str, Array]:
        return {name: latent.values() for name, latent in self._latents.items()}

    def _judge(
        self, feeds: Feeds, weights: dict[str, Array]
    ) -> tuple[Any, dict[str, tuple[float, Array]]]:
        run = self.tape.run(feeds, weights)
        wanted = self.teacher.run(self._outputs, feeds)
        found = {}
        for name, y in zip(self._outputs, wanted, strict=True):
            if name in self.predictions:
                is_logits = not distributions.is_probability(y)
                found[name] = losses.divergence(y, run.values[name], is_logits=is_logits)
            else:
                found[name] = losses.noise(y, run.values[name])
        return run, found

    def _total(self, feeds: Feeds, weights: dict[str, Array]) -> float:
        return sum(loss for loss, _ in self._judge(feeds, weights)[1].values())

    def _gradients(self, batch: Sequence[Feeds]) -> dict[str, Array]:
        weights = self._values()
        total: dict[str, Array] = {}
        for feeds in batch:
            run, found = self._judge(feeds, weights)
            seeds = {name: slope for name, (_, slope) in found.items()}
            for name, g in run.gradients(seeds).items():
                total[name] = g if name not in total else total[name] + g
        return total


def _batches(order: Array, size: int) -> Iterator[Array]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
