"""How good, how small and how fast a quantized model is, measured against its float model.

    compare           outputs of two models on data: SQNR, KL divergence, agreement, bytes, latency
    perplexity        a language model on tokens; `divergence` compares two on the same tokens
    sqnr_per_tensor   where inside the graph the error arises
    latency_ratio     interleaved, so that a busy machine slows both
    agreement, accuracy, spearman, mean_pool, cosines        pieces of real tasks

Models are paths, ModelProto or onnx_ir.Model and run in ONNX Runtime. Codes: QG120 the two models
differ in inputs or outputs, QG121 no such output, QG122 inputs that cannot be fed with tokens,
QG123 tokens, QG124 named values, QG125 labels.
"""

from __future__ import annotations

from qgraph.evaluate.comparison import Comparison, OutputError, compare
from qgraph.evaluate.cost import Latency, latency_ratio, model_bytes
from qgraph.evaluate.distributions import Divergence, log_softmax
from qgraph.evaluate.language import LanguageComparison, Perplexity, divergence, perplexity
from qgraph.evaluate.statistics import Estimate
from qgraph.evaluate.tasks import accuracy, agreement, cosines, mean_pool, spearman
from qgraph.evaluate.tensors import TensorError, sqnr_per_tensor

__all__ = [
    "Comparison",
    "Divergence",
    "Estimate",
    "LanguageComparison",
    "Latency",
    "OutputError",
    "Perplexity",
    "TensorError",
    "accuracy",
    "agreement",
    "compare",
    "cosines",
    "divergence",
    "latency_ratio",
    "log_softmax",
    "mean_pool",
    "model_bytes",
    "perplexity",
    "spearman",
    "sqnr_per_tensor",
]
