"""Real tasks on trained models: the figures that a quantized model is held against.

    python tests/e2e/baselines.py TASK MODEL [--float FLOAT_MODEL] [--limit N]      prints JSON

Models and texts lie in the folder that the environment variable QGRAPH_TEST_DATA names (MANIFEST.md there gives
their sources and licences). Every figure is measured in ONNX Runtime on one CPU thread; nothing is cached.
KL is KL(float || model) in nats per prediction, `agreement` the share of equal top-1 predictions.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import importlib.util
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Metrics = dict[str, Any]

CONTEXT = 512
# The pattern of Schwaller et al. (Molecular Transformer, 2019): atoms in brackets, halogens, atoms, bonds, rings.
SMILES = re.compile(
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
)


def data() -> Path:
    """The folder of test data.

    Raises:
        LookupError: QGRAPH_TEST_DATA is not set, or is no folder.
    """
    folder = Path(os.environ.get("QGRAPH_TEST_DATA", ""))
    if not os.environ.get("QGRAPH_TEST_DATA") or not folder.is_dir():
        raise LookupError("set QGRAPH_TEST_DATA to the folder that holds the test models and data")
    return folder


def session(model: str | Path) -> onnxruntime.InferenceSession:
    """One-thread session, with the native library where the installed qgraph knows one."""
    if importlib.util.find_spec("qgraph.runtime") is not None:
        from qgraph import runtime

        return runtime.session(str(model), threads=1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def log_softmax(logits: npt.ArrayLike) -> Floats:
    """Log-probabilities over the last axis, in float64."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


# language models: next tokens


class SentencePieces:
    """The BPE encoder of llama2.c's run.c for a tokenizer.bin: merge the best-scored neighbours until none is known."""

    BOS, BYTE_0 = 1, 3

    def __init__(self, path: Path, size: int = 512) -> None:
        raw, offset = path.read_bytes(), 4
        self.scores: list[float] = []
        self.ids: dict[bytes, int] = {}
        for index in range(size):
            score, length = struct.unpack_from("<fi", raw, offset)
            offset += 8 + length
            self.scores.append(score)
            self.ids[raw[offset - length : offset]] = index

    def encode(self, text: str) -> Tokens:
        """[BOS] and the ids of text, which gets one space in front. O(n log n)."""
        pieces: list[int] = []
        for character in (" " + text) if text else "":
            encoded = character.encode()
            known = self.ids.get(encoded)
            pieces += [known] if known is not None else [byte + self.BYTE_0 for byte in encoded]
        return np.asarray([self.BOS, *self._merge(pieces)], np.int64)

    def _merge(self, pieces: list[int]) -> list[int]:
        names = {index: name for name, index in self.ids.items()}
        after = [*range(1, len(pieces)), -1]
        before = [*range(-1, len(pieces) - 1)]
        waiting: list[tuple[float, int, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            both = self.ids.get(names[pieces[left]] + names[pieces[right]])
            if both is not None:
                heapq.heappush(waiting, (-self.scores[both], left, pieces[left], pieces[right], both))

        for left in range(len(pieces) - 1):
            offer(left, left + 1)
        while waiting:
            _, left, first, second, both = heapq.heappop(waiting)
            right = after[left]
            if pieces[left] != first or right < 0 or pieces[right] != second:
                continue
            pieces[left], pieces[right], after[left] = both, -1, after[right]
            if after[left] >= 0:
                before[after[left]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        return [piece for piece in pieces if piece >= 0]


def story_tokens(tokenizer: Path, first: int = 600, count: int = 100) -> list[Tokens]:
    """Stories first .. first + count - 1, each alone as [BOS] + tokens, cut at 512."""
    stories = json.loads((data() / "text/tinystories/tinystories_0_699.json").read_text())
    encoder = SentencePieces(tokenizer)
    return [encoder.encode(story)[:CONTEXT] for story in stories[first : first + count]]


def stories(model: str | Path, limit: int | None = None, float_model: str | Path | None = None) -> Metrics:
    """Perplexity of stories260K on TinyStories 600..699; with a float model KL and agreement."""
    tokens = story_tokens(data() / "lm/stories260K/tok512.bin", count=limit or 100)
    return next_token(model, tokens, float_model)


def bitllama(model: str | Path, limit: int | None = None, float_model: str | Path | None = None) -> Metrics:
    """The same protocol for the ternary bitllama_3M."""
    tokens = story_tokens(data() / "lm/bitllama_3M/tokenizer.bin", count=limit or 100)
    return next_token(model, tokens, float_model)


def next_token(model: str | Path, texts: Sequence[Tokens], float_model: str | Path | None) -> Metrics:
    """Mean nll over every next token of every text, and its exponential."""
    run = session(model)
    reference = session(float_model) if float_model else None
    nll, pairs = [], Divergence()
    for text in texts:
        feeds = {run.get_inputs()[0].name: text[None]}
        log_p = log_softmax(run.run(None, feeds)[0][0])[:-1]
        nll.append(-log_p[np.arange(len(text) - 1), text[1:]])
        if reference is not None:
            feeds = {reference.get_inputs()[0].name: text[None]}
            pairs.add(log_softmax(reference.run(None, feeds)[0][0])[:-1], log_p)
    mean = float(np.concatenate(nll).mean())
    total = sum(map(len, nll))
    return {"perplexity": float(np.exp(mean)), "nll": mean, "tokens": total, "texts": len(texts), **pairs.metrics()}


class Divergence:
    """KL(p || q) and top-1 agreement over predictions that arrive in pieces of log-probabilities [n, classes]."""

    def __init__(self) -> None:
        self.kl: list[Floats] = []
        self.same: list[npt.NDArray[np.bool_]] = []

    def add(self, log_p: Floats, log_q: Floats) -> None:
        self.kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        self.same.append(log_p.argmax(axis=-1) == log_q.argmax(axis=-1))

    def metrics(self) -> Metrics:
        if not self.kl:
            return {}
        kl = np.concatenate(self.kl)
        return {
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "agreement": float(np.concatenate(self.same).mean()),
        }


# masked reactions


def reaction_tokens(limit: int | None = None) -> Iterator[tuple[Tokens, Tokens]]:
    """For reaction j its ids [CLS] … [SEP] and the masked positions 1 + j % 7, step 7 (specials excluded)."""
    vocabulary = (data() / "lm/rxnmapper_albert/vocab.txt").read_text().splitlines()
    ids = {token: index for index, token in enumerate(vocabulary)}
    lines = (data() / "text/reactions/example_rxns_0_299.txt").read_text().split("\n")
    for j, reaction in enumerate(lines[: limit or 300]):
        pieces = ["[CLS]", *SMILES.findall(reaction), "[SEP]"]
        tokens = np.asarray([ids.get(piece, ids["[UNK]"]) for piece in pieces], np.int64)[:CONTEXT]
        yield tokens, np.arange(1 + j % 7, len(tokens) - 1, 7)


def rxnmapper(model: str | Path, limit: int | None = None, float_model: str | Path | None = None) -> Metrics:
    """Top-1 and pseudo-perplexity of masked tokens in reactions 0..299."""
    mask = (data() / "lm/rxnmapper_albert/vocab.txt").read_text().splitlines().index("[MASK]")
    run, reference = session(model), session(float_model) if float_model else None
    nll, right, pairs = [], [], Divergence()
    for tokens, positions in reaction_tokens(limit):
        masked = tokens.copy()
        masked[positions] = mask
        feeds = {"input_ids": masked[None], "attention_mask": np.ones_like(masked)[None]}
        log_p = log_softmax(run.run(None, feeds)[0][0][positions])
        nll.append(-log_p[np.arange(len(positions)), tokens[positions]])
        right.append(log_p.argmax(axis=-1) == tokens[positions])
        if reference is not None:
            pairs.add(log_softmax(reference.run(None, feeds)[0][0][positions]), log_p)
    mean = float(np.concatenate(nll).mean())
    masked_count = sum(map(len, nll))
    top1 = float(np.concatenate(right).mean())
    return {"top1": top1, "perplexity": float(np.exp(mean)), "nll": mean, "masked": masked_count, **pairs.metrics()}


# sentence embeddings


def sts_pairs(limit: int | None = None) -> tuple[list[str], list[str], Floats]:
    """STS-B dev: first sentences, second sentences, scores 0..5."""
    with (data() / "text/stsb/stsb-en-dev.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[:limit]
    return [row[0] for row in rows], [row[1] for row in rows], np.asarray([float(row[2]) for row in rows])


def sentence_batches(sentences: Sequence[str], size: int = 64) -> Iterable[tuple[list[int], dict[str, Tokens]]]:
    """Padded feeds of sentences sorted by length (at most 128 tokens), and which sentences each batch holds."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(data() / "encoder/minilm_l6_v2/tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.no_padding()
    codes = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
    order = sorted(range(len(codes)), key=lambda index: (len(codes[index]), index))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        ids = np.zeros((len(rows), max(len(codes[row]) for row in rows)), np.int64)
        mask = np.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, : len(codes[row])] = codes[row]
            mask[line, : len(codes[row])] = 1
        yield rows, {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def embeddings(model: str | Path, sentences: Sequence[str]) -> Floats:
    """Unit vectors [sentences, 384]: hidden states averaged over the attention mask."""
    run = session(model)
    known = {given.name for given in run.get_inputs()}
    result = np.zeros((len(sentences), 0))
    for rows, feeds in sentence_batches(sentences):
        hidden = run.run(None, {name: value for name, value in feeds.items() if name in known})[0].astype(np.float64)
        mask = feeds["attention_mask"][..., None]
        pooled = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
        if not result.shape[1]:
            result = np.zeros((len(sentences), pooled.shape[1]))
        result[rows] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return result


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Rank correlation, ties sharing their mean rank."""

    def ranks(values: npt.ArrayLike) -> Floats:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], np.float64)

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def minilm(model: str | Path, limit: int | None = None, float_model: str | Path | None = None) -> Metrics:
    """Spearman of cosine and score on STS-B dev; with a float model the cosine between both, per sentence."""
    first, second, scores = sts_pairs(limit)
    vectors = embeddings(model, first + second)
    cosine = (vectors[: len(first)] * vectors[len(first) :]).sum(axis=1)
    metrics: Metrics = {"spearman": spearman(cosine, scores), "pairs": len(first)}
    if float_model:
        same = (vectors * embeddings(float_model, first + second)).sum(axis=1)
        metrics |= {"cosine_mean": float(same.mean()), "cosine_min": float(same.min())}
    return metrics


TASKS: dict[str, Callable[..., Metrics]] = {
    "stories": stories,
    "bitllama": bitllama,
    "rxnmapper": rxnmapper,
    "minilm": minilm,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one model and print JSON."""
    parser = argparse.ArgumentParser(description="Measure a model on its real task.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--float", dest="float_model", type=Path, help="also compare with this float model")
    parser.add_argument("--limit", type=int, help="use only the first N texts or pairs")
    given = parser.parse_args(arguments)
    metrics = TASKS[given.task](given.model, limit=given.limit, float_model=given.float_model)
    sys.stdout.write(json.dumps({"task": given.task, "model": str(given.model), **metrics}, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
