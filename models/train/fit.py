# mypy: ignore-errors
# The `train` extra (torch) is not part of the type-checked environment.
"""One training loop for the decoders: AdamW, warm-up, cosine, best held-out checkpoint."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

WINDOW = 256


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast."""

    steps: int
    batch: int = 8
    rate: float = 2e-3
    warm_up: int = 100
    decay: float = 0.1
    every: int = 50


def perplexity(model: nn.Module, tokens: np.ndarray) -> float:
    """exp(mean nll) over non-overlapping windows of 256 tokens, 255 predictions in each."""
    windows = torch.from_numpy(tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW))
    model.eval()
    with torch.no_grad():
        parts = [_loss(model, part).item() * len(part) for part in windows.split(8)]
    model.train()
    return math.exp(sum(parts) / len(windows))


def fit(model: nn.Module, train: np.ndarray, held_out: np.ndarray, plan: Schedule) -> float:
    """Train `model` in place, leave it at its best held-out perplexity and return that."""
    random = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(_groups(model, plan.decay), lr=plan.rate, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(plan))
    best, best_state = math.inf, None
    for step in range(1, plan.steps + 1):
        starts = random.integers(0, len(train) - WINDOW, plan.batch)
        batch = torch.from_numpy(np.stack([train[i : i + WINDOW + 1] for i in starts]))
        loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % plan.every == 0 or step == plan.steps:
            reached = perplexity(model, held_out)
            print(f"step {step} train loss {loss.item():.3f} held out {reached:.2f}", flush=True)
            if reached < best:
                best, best_state = reached, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return best


def _loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _groups(model: nn.Module, decay: float) -> list[dict]:
    """Decay matrices, not gains and biases."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _cosine(plan: Schedule) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < plan.warm_up:
            return (step + 1) / plan.warm_up
        progress = (step - plan.warm_up) / max(1, plan.steps - plan.warm_up)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
