# mypy: ignore-errors
# The `train` extra (torch) is not part of the type-checked environment.
"""Train one decoder: `python -m qgraph.models.train.language_models tiny-llama`.

About a quarter of an hour each on one core.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import nn

from qgraph.models.shapes import Gpt, Llama
from qgraph.models.train import fit, store, text
from qgraph.models.train.decoders import BitLinear, GptModel, LlamaModel

RECIPES: dict[str, tuple[Callable[[], nn.Module], fit.Schedule]] = {
    "tiny-llama": (lambda: LlamaModel(Llama(), nn.Linear, 0.2), fit.Schedule(1500)),
    "tiny-bitnet": (lambda: LlamaModel(Llama(), BitLinear, 0.05), fit.Schedule(1000, rate=4e-3)),
    # Learned positions take longer to learn, and overfit sooner.
    "tiny-gpt": (lambda: GptModel(Gpt(), 0.25), fit.Schedule(1800, rate=2e-3, decay=0.3)),
}


def main(name: str) -> None:
    """Train `name`, store its weights and record what they reach."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    corpus = text.load()
    make, plan = RECIPES[name]
    model = make()
    parameters = sum(p.numel() for p in model.parameters())
    trivial = text.unigram_perplexity(corpus)
    print(f"{parameters} parameters, {len(corpus.train)} + {len(corpus.held_out)} tokens")
    print(f"unigram perplexity {trivial:.1f}; {asdict(plan)}", flush=True)
    best = fit.fit(model, corpus.train, corpus.held_out, plan)
    store.freeze(model)
    stored = fit.perplexity(model, corpus.held_out)
    store.save(name, model)
    store.record(
        name,
        perplexity=stored,
        perplexity_while_training=best,
        unigram_perplexity=trivial,
        parameters=parameters,
        **corpus.source,
    )
    print(f"{name}: perplexity {best:.3f}, stored {stored:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
