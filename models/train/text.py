# mypy: ignore-errors
# The `train` extra (torch, tokenizers) is not part of the type-checked environment.
"""Python's own reference manual -> tokenizer, training tokens, held-out tokens.

The corpus is `pydoc_data.topics`, every topic in sorted order: text that each Python installation
carries, under the PSF licence. Its last tenth is held out. The topics quote one another, so every
training paragraph that also stands in the held-out part is dropped; otherwise the held-out
perplexity would partly measure memory. The tokenizer sees the training part only.
"""

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qgraph.models import checkpoint

VOCABULARY = 1024
HELD_OUT = 0.1
TOKENIZER = Path(__file__).parent.parent / "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids: `train` [T] and `held_out` [H], and where they came from."""

    train: np.ndarray
    held_out: np.ndarray
    source: dict[str, str]


def load() -> Corpus:
    """Read the corpus with the committed tokenizer and held-out tokens; write them when missing."""
    text = "".join(topics[name] for name in sorted(topics))
    cut = text.index("\n\n", int(len(text) * (1 - HELD_OUT))) + 2
    train, held_out = _without_quotes(text[:cut], text[cut:]), text[cut:]
    if not TOKENIZER.exists():
        _train_tokenizer(train).save(str(TOKENIZER), pretty=False)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    ids = np.array(tokenizer.encode(held_out).ids, np.uint16)
    if not checkpoint.HELD_OUT_TOKENS.exists():
        np.save(checkpoint.HELD_OUT_TOKENS, ids)
    if not np.array_equal(ids, np.load(checkpoint.HELD_OUT_TOKENS)):
        raise RuntimeError(
            f"This Python ({sys.version.split()[0]}) carries another text than the one behind "
            f"{checkpoint.HELD_OUT_TOKENS.name}; delete it and tokenizer.json to start afresh."
        )
    source = {
        "text": "pydoc_data.topics",
        "python": sys.version.split()[0],
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return Corpus(np.array(tokenizer.encode(train).ids, np.int64), ids.astype(np.int64), source)


def unigram_perplexity(corpus: Corpus) -> float:
    """Perplexity of the trivial model: token frequencies of the training part, add-one smoothed."""
    counts = np.bincount(corpus.train, minlength=VOCABULARY) + 1.0
    nll = -np.log(counts / counts.sum())
    return float(np.exp(nll[corpus.held_out].mean()))


def _without_quotes(train: str, held_out: str) -> str:
    known = {_squeeze(paragraph) for paragraph in held_out.split("\n\n")}
    kept = [part for part in train.split("\n\n") if _squeeze(part) not in known]
    return "\n\n".join(kept)


def _squeeze(paragraph: str) -> str:
    return re.sub(r"\s+", " ", paragraph).strip()


def _train_tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer
