"""A float model's outputs on a few samples, kept, so that many models can be compared with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qgraph import files
from qgraph.data import Array, Feeds
from qgraph.evaluate import sessions
from qgraph.evaluate.comparison import OutputError, OutputMeter


class Expected:
    """Outputs for some samples, in memory.

    Attributes:
        names: of the outputs.
        predictions: those of them that hold predictions over classes.

    Args:
        declared: the outputs as an ONNX Runtime session declares them.
        outputs: for each sample what `names` are.
        logits: outputs that hold predictions, as for `evaluate.compare`.

    Raises:
        errors.InputError: QG121 where a named output does not exist.
    """

    def __init__(
        self,
        declared: Sequence[Any],
        outputs: Iterable[Sequence[Array]],
        logits: str | Sequence[str] = (),
    ) -> None:
        self.names = [o.name for o in declared]
        self.predictions = sessions.predictions(
            declared, [logits] if isinstance(logits, str) else logits
        )
        self._outputs = [list(each) for each in outputs]

    def judge(
        self, outputs: Iterable[Sequence[Array]], parts: int = 1
    ) -> list[tuple[OutputError, ...]]:
        """What other outputs lose, output by output, without intervals: for each of `parts` shares of the samples."""
        meters = [[OutputMeter(n, n in self.predictions) for n in self.names] for _ in range(parts)]
        for number, (kept, got) in enumerate(zip(self._outputs, outputs, strict=True)):
            for meter, x, y in zip(meters[number % parts], kept, got, strict=True):
                meter.add(x, y)
        return [tuple(meter.result(None) for meter in each) for each in meters]


class Reference:
    """Runs the float model once per sample.

    Args:
        model: the float model.
        samples: feeds; they and the outputs for them stay in memory.
        logits: outputs that hold predictions, as for `evaluate.compare`.

    Raises:
        errors.InputError: QG121 where a named output does not exist.
    """

    def __init__(
        self, model: files.Source, samples: Sequence[Feeds], logits: str | Sequence[str] = ()
    ) -> None:
        self._model = model
        session = sessions.open_session(model)
        names = [o.name for o in session.get_outputs()]
        self._samples = list(samples)
        outputs = (session.run(names, feeds) for feeds in self._samples)
        self._expected = Expected(session.get_outputs(), outputs, logits)

    def against(self, model: files.Source) -> tuple[OutputError, ...]:
        """What the outputs of another model lose, output by output; without intervals."""
        return self.judge(sessions.open_session(model))

    def judge(self, session: Any) -> tuple[OutputError, ...]:
        """The same for a model that is open already."""
        outputs = (session.run(self._expected.names, feeds) for feeds in self._samples)
        return self._expected.judge(outputs)[0]

    def over(self, dataset: Iterable[Feeds], model: files.Source) -> tuple[OutputError, ...]:
        """The same over any number of samples, for which the float model runs too and nothing is kept."""
        pair = sessions.open_session(self._model), sessions.open_session(model)
        known = self._expected
        meters = [OutputMeter(n, n in known.predictions) for n in known.names]
        for feeds in dataset:
            results = (session.run(known.names, feeds) for session in pair)
            for meter, x, y in zip(meters, *results, strict=True):
                meter.add(x, y)
        return tuple(meter.result(None) for meter in meters)
