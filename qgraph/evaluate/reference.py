"""A float model's outputs on a few samples, kept, so that many models can be compared with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qgraph import files
from qgraph.data import Array, Feeds
from qgraph.evaluate import sessions
from qgraph.evaluate.comparison import OutputError, OutputMeter


class Reference:
    """Runs the float model once per sample.

    Args:
        model: the float model.
        samples: feeds; they and the outputs for them stay in memory.
        logits: outputs that hold predictions, as for `evaluate.compare`.
        config: entries for its sessions.

    Raises:
        errors.InputError: QG121 where a named output does not exist.
    """

    def __init__(
        self,
        model: files.Source,
        samples: Sequence[Feeds],
        logits: str | Sequence[str] = (),
        config: Mapping[str, str] | None = None,
    ) -> None:
        self._model, self._config = model, config
        session = sessions.open_session(model, config=config)
        wanted = [logits] if isinstance(logits, str) else list(logits)
        self.names = [o.name for o in session.get_outputs()]
        self.predictions = sessions.logit_outputs(session, wanted)
        self.samples = list(samples)
        self._outputs: list[list[Array]] = [session.run(self.names, f) for f in self.samples]

    def against(self, model: files.Source) -> tuple[OutputError, ...]:
        """What the outputs of another model lose, output by output; without intervals."""
        return self.judge(sessions.open_session(model))

    def judge(self, session: Any, start: int = 0, step: int = 1) -> tuple[OutputError, ...]:
        """The same for a model that is open already; on every `step`-th sample from number `start` on."""
        meters = [OutputMeter(n, n in self.predictions) for n in self.names]
        held = list(zip(self.samples, self._outputs, strict=True))
        for feeds, kept in held[start::step]:
            got = session.run(self.names, feeds)
            for meter, x, y in zip(meters, kept, got, strict=True):
                meter.add(x, y)
        return tuple(meter.result(None) for meter in meters)

    def over(self, dataset: Iterable[Feeds], model: files.Source) -> tuple[OutputError, ...]:
        """The same over any number of samples, for which the float model runs too and nothing is kept."""
        first = sessions.open_session(self._model, config=self._config)
        pair = first, sessions.open_session(model)
        meters = [OutputMeter(n, n in self.predictions) for n in self.names]
        for feeds in dataset:
            results = (session.run(self.names, feeds) for session in pair)
            for meter, x, y in zip(meters, *results, strict=True):
                meter.add(x, y)
        return tuple(meter.result(None) for meter in meters)
