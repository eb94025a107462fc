"""What outputs lose, and its gradient by the outputs of the quantized model."""

from __future__ import annotations

import numpy as np

from qgraph.evaluate import distributions
from qgraph.gradients.rules import Array


def divergence(wanted: Array, found: Array, *, is_logits: bool) -> tuple[float, Array]:
    """KL(wanted || found) per prediction in nats, and its gradient by `found` [..., classes]."""
    rows = found.size // found.shape[-1]
    log_p = distributions.log_probabilities(wanted, is_logits=is_logits)
    log_q = distributions.log_probabilities(found, is_logits=is_logits)
    loss = float(distributions.kl_divergence(log_p, log_q).sum()) / rows
    p, q = np.exp(log_p), np.exp(log_q)
    slope = q - p if is_logits else np.where(found > distributions.FLOOR, 1 - p / q, 0)
    return loss, (slope / rows).astype(found.dtype)


def noise(wanted: Array, found: Array) -> tuple[float, Array]:
    """|found - wanted|² / |wanted|², and its gradient by `found`."""
    power = float(np.square(wanted, dtype=np.float64).sum()) or 1.0
    off = found.astype(np.float64) - wanted
    return float((off * off).sum()) / power, (2 / power * off).astype(found.dtype)
