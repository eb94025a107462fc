"""Reference models: small trained networks that build in a moment, without torch or a download.

Example:
    from qgraph import models
    model = models.build("tiny-llama")          # a fresh onnx_ir.Model
    tokens = models.eval_tokens("tiny-llama")   # held-out token ids, [T] int64
    images, labels = models.eval_data()         # held-out digits (needs the `test` extra)

Graphs for tests of odd shapes live in `qgraph.models.odd`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # onnx_ir and numpy take most of a second to import; naming a model needs neither
    import onnx_ir as ir

    from qgraph.models.data import Images, Integers

__all__ = ["ModelInfo", "build", "eval_data", "eval_tokens", "info", "names"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What one reference model is.

    `task` is "text" or "digits"; `metric` names what it is judged by on held-out data: "perplexity"
    (windows of 256 tokens that do not overlap, mean over all next-token predictions) or "accuracy".
    """

    name: str
    summary: str
    task: str
    metric: str
    build: Callable[[], ir.Model]

    @property
    def reached(self) -> float:
        """The metric that the float model reaches, as recorded when it was trained."""
        from qgraph.models import checkpoint

        return checkpoint.metrics()[self.name.removesuffix("-kv")][self.metric]


def names() -> list[str]:
    """Return the names of all reference models, sorted."""
    return sorted(_MODELS)


def info(name: str) -> ModelInfo:
    """Return what is known about `name`.

    Raises:
        ValueError: There is no such model; the message lists the nearest names.
    """
    if name in _MODELS:
        return _MODELS[name]
    near = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}."
    raise ValueError(f"No reference model is called {name!r}: {hint}")


def build(name: str) -> ir.Model:
    """Return a fresh float model; the same bytes each time it is saved."""
    return info(name).build()


def eval_tokens(name: str) -> Integers:
    """Return the held-out token ids for the decoder `name`, [T] int64."""
    found = info(name)
    if found.task != "text":
        raise ValueError(f"{name} reads {found.task}, not tokens: use eval_data().")
    from qgraph.models import data

    return data.eval_tokens()


def eval_data() -> tuple[Images, Integers]:
    """Return held-out digits for tiny-cnn: images [N, 1, 8, 8] float32 and labels [N]."""
    from qgraph.models import data

    return data.digits(held_out=True)


def _llama() -> ir.Model:
    from qgraph.models import llama

    return llama.build("tiny-llama")


def _llama_kv() -> ir.Model:
    from qgraph.models import llama

    return llama.build("tiny-llama", cache=True)


def _bitnet() -> ir.Model:
    from qgraph.models import llama

    return llama.build("tiny-bitnet")


def _gpt() -> ir.Model:
    from qgraph.models import gpt

    return gpt.build("tiny-gpt")


def _cnn() -> ir.Model:
    from qgraph.models import cnn

    return cnn.build("tiny-cnn")


_MODELS = {
    entry.name: entry
    for entry in (
        ModelInfo(
            "tiny-llama",
            "decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, untied head",
            "text",
            "perplexity",
            _llama,
        ),
        ModelInfo(
            "tiny-llama-kv",
            "tiny-llama with a key/value cache as inputs and outputs",
            "text",
            "perplexity",
            _llama_kv,
        ),
        ModelInfo(
            "tiny-bitnet",
            "tiny-llama trained with ternary weights (BitNet b1.58)",
            "text",
            "perplexity",
            _bitnet,
        ),
        ModelInfo(
            "tiny-gpt",
            "decoder: LayerNorm, learned positions, biases, Gelu, tied embeddings",
            "text",
            "perplexity",
            _gpt,
        ),
        ModelInfo(
            "tiny-cnn",
            "digits classifier: Conv + BatchNormalization, depthwise layers, a residual",
            "digits",
            "accuracy",
            _cnn,
        ),
    )
}
