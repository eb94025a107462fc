"""How good, how small and how fast a quantized model is, measured against its float model.

    compare           outputs of two models on data: SQNR, KL divergence, agreement, bytes, latency
    perplexity        a language model on tokens; `divergence` compares two on the same tokens
    sqnr_per_tensor   where inside the graph the error arrives; `tensor_losses` also where it arises
    accuracies        two classifiers on labelled data
    embeddings        two models that give vectors: cosines and rank correlation
    latency_ratio     interleaved, so that a busy machine slows both
    agreement, accuracy, spearman, mean_pool, cosines        pieces of real tasks

Models are paths, ModelProto or onnx_ir.Model and run in ONNX Runtime. Codes: QG120 the two models
differ in inputs or outputs, QG121 no such output, QG122 inputs that cannot be fed with tokens,
QG123 tokens, QG124 named values, QG125 labels.
"""

from __future__ import annotations

from qgraph.evaluate.comparison import Comparison, OutputError, compare
from qgraph.evaluate.cost import Latency, bits_per_weight, latency_ratio, model_bytes
from qgraph.evaluate.distributions import Divergence, log_softmax
from qgraph.evaluate.embeddings import EmbeddingComparison, embeddings
from qgraph.evaluate.isolated import TensorLoss, TensorLosses, tensor_losses
from qgraph.evaluate.language import LanguageComparison, Perplexity, divergence, perplexity
from qgraph.evaluate.statistics import Estimate
from qgraph.evaluate.tasks import (
    AccuracyComparison,
    accuracies,
    accuracy,
    agreement,
    cosines,
    mean_pool,
    spearman,
)
from qgraph.evaluate.tensors import TensorError, sqnr_per_tensor

__all__ = [
    "AccuracyComparison",
    "Comparison",
    "Divergence",
    "EmbeddingComparison",
    "Estimate",
    "LanguageComparison",
    "Latency",
    "OutputError",
    "Perplexity",
    "TensorError",
    "TensorLoss",
    "TensorLosses",
    "accuracies",
    "accuracy",
    "agreement",
    "bits_per_weight",
    "compare",
    "cosines",
    "divergence",
    "embeddings",
    "latency_ratio",
    "log_softmax",
    "mean_pool",
    "model_bytes",
    "perplexity",
    "spearman",
    "sqnr_per_tensor",
    "tensor_losses",
]
