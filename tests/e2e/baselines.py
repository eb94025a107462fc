"""Real tasks on trained models: the figures that a quantized model is held against.

    python tests/e2e/baselines.py TASK MODEL [--float FLOAT_MODEL] [--limit N]      prints JSON

Models and data lie in the folder that the environment variable QGRAPH_TEST_DATA names (MANIFEST.md
there gives their sources and licences). Every figure is measured in ONNX Runtime on one CPU thread;
nothing is cached. With a float model, KL is KL(float || model) in nats per prediction and
`agreement` the share of equal top-1 predictions.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import heapq
import json
import os
import re
import struct
import sys
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qgraph import evaluate
from qgraph.evaluate import distributions, sessions, tensors

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]
Metrics = dict[str, Any]
Model = str | Path
Session = Any

CONTEXT = 512
# The pattern of Schwaller et al. (Molecular Transformer, 2019): bracket atoms, atoms, bonds, rings.
SMILES = re.compile(
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$"
    r"|%[0-9]{2}|[0-9]"
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data(name: str) -> Path:
    """A file of the test data.

    Raises:
        LookupError: QGRAPH_TEST_DATA is not set, or the file is not there.
    """
    folder = os.environ.get("QGRAPH_TEST_DATA")
    if not folder:
        raise LookupError("set QGRAPH_TEST_DATA to the folder that holds the test models and data")
    path = Path(folder, name)
    if not path.exists():
        raise LookupError(f"QGRAPH_TEST_DATA holds no {name}")
    return path


# Next tokens


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
                heapq.heappush(
                    waiting, (-self.scores[both], left, pieces[left], pieces[right], both)
                )

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


def story_tokens(tokenizer: str, count: int) -> list[Tokens]:
    """Stories 600 .. 600 + count - 1, each alone as [BOS] + tokens."""
    stories = json.loads(data("text/tinystories/tinystories_0_699.json").read_text("utf-8"))
    encoder = SentencePieces(data(tokenizer))
    return [encoder.encode(story) for story in stories[600 : 600 + count]]


def stories(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """stories260K on TinyStories 600..699, each cut at 512 tokens: perplexity."""
    texts = story_tokens("lm/stories260K/tok512.bin", limit or 100)
    return next_token(model, texts, float_model)


def bitllama(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """The same protocol for the ternary bitllama_3M."""
    texts = story_tokens("lm/bitllama_3M/tokenizer.bin", limit or 100)
    return next_token(model, texts, float_model)


def next_token(model: Model, texts: Sequence[Tokens], float_model: Model | None) -> Metrics:
    """Mean nll over every next token of every text, and its exponential."""
    if float_model is None:
        return evaluate.perplexity(model, texts, CONTEXT).to_json()
    found = evaluate.divergence(float_model, model, texts, CONTEXT)
    return found.quant_perplexity.to_json() | divergence_metrics(found.divergence)


def divergence_metrics(found: evaluate.Divergence) -> Metrics:
    """The figures that the tables of peers show."""
    return {
        "kl_mean": found.kl_mean.value,
        "kl_p99": found.kl_p99,
        "kl_max": found.kl_max,
        "agreement": found.agreement.value,
    }


# Masked reactions


def reaction_tokens(limit: int | None = None) -> Iterator[tuple[Tokens, Tokens]]:
    """For reaction j its ids [CLS] … [SEP] and the masked positions 1 + j % 7, step 7 (specials excluded)."""
    vocabulary = data("lm/rxnmapper_albert/vocab.txt").read_text().splitlines()
    ids = {token: index for index, token in enumerate(vocabulary)}
    lines = data("text/reactions/example_rxns_0_299.txt").read_text().split("\n")
    for j, reaction in enumerate(lines[: limit or 300]):
        pieces = ["[CLS]", *SMILES.findall(reaction), "[SEP]"]
        tokens = np.asarray([ids.get(piece, ids["[UNK]"]) for piece in pieces], np.int64)[:CONTEXT]
        yield tokens, np.arange(1 + j % 7, len(tokens) - 1, 7)


def rxnmapper(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """Top-1 and pseudo-perplexity of masked tokens in reactions 0..299."""
    mask = data("lm/rxnmapper_albert/vocab.txt").read_text().splitlines().index("[MASK]")
    run, reference = open_pair(model, float_model)
    nll, right, meter = [], [], distributions.DivergenceMeter(is_logits=True)
    for tokens, positions in reaction_tokens(limit):
        masked = tokens.copy()
        masked[positions] = mask
        feeds = {"input_ids": masked[None], "attention_mask": np.ones_like(masked)[None]}
        logits = run.run(None, feeds)[0][0][positions]
        log_p = evaluate.log_softmax(logits)
        nll.append(-log_p[np.arange(len(positions)), tokens[positions]])
        right.append(log_p.argmax(axis=-1) == tokens[positions])
        if reference is not None:
            meter.add(reference.run(None, feeds)[0][0][positions], logits)
    all_nll = np.concatenate(nll)
    metrics = {
        "top1": float(np.concatenate(right).mean()),
        "perplexity": float(np.exp(all_nll.mean())),
        "nll": float(all_nll.mean()),
        "masked": len(all_nll),
    }
    return metrics | (divergence_metrics(meter.result()) if reference is not None else {})


def open_pair(model: Model, float_model: Model | None) -> tuple[Session, Session | None]:
    """Sessions of the model and of the float model, if one is given."""
    other = None if float_model is None else sessions.open_session(float_model)
    return sessions.open_session(model), other


# Sentence embeddings


def sts_pairs(limit: int | None = None) -> tuple[list[str], list[str], Array]:
    """STS-B dev: first sentences, second sentences, scores 0..5."""
    with data("text/stsb/stsb-en-dev.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[:limit]
    scores = np.asarray([float(row[2]) for row in rows])
    return [row[0] for row in rows], [row[1] for row in rows], scores


def sentence_batches(
    sentences: Sequence[str], size: int = 64
) -> Iterator[tuple[list[int], dict[str, Tokens]]]:
    """Padded feeds of sentences sorted by length (at most 128 tokens); which sentences they are."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(data("encoder/minilm_l6_v2/tokenizer.json")))
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
        zeros = np.zeros_like(ids)
        yield rows, {"input_ids": ids, "attention_mask": mask, "token_type_ids": zeros}


def embeddings(model: Model, sentences: Sequence[str]) -> Array:
    """Unit vectors [sentences, d]: hidden states averaged over the attention mask."""
    run = sessions.open_session(model)
    known = {given.name for given in run.get_inputs()}
    result: list[Array] = [np.zeros(0)] * len(sentences)
    for rows, feeds in sentence_batches(sentences):
        hidden = run.run(None, {name: feeds[name] for name in feeds if name in known})[0]
        for row, vector in zip(
            rows, evaluate.mean_pool(hidden, feeds["attention_mask"]), strict=True
        ):
            result[row] = vector
    return np.stack(result)


def minilm(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """Spearman of cosine and score on STS-B dev; with a float model the cosine to its vectors."""
    first, second, scores = sts_pairs(limit)
    vectors = embeddings(model, first + second)
    cosine = evaluate.cosines(vectors[: len(first)], vectors[len(first) :])
    metrics: Metrics = {"spearman": evaluate.spearman(cosine, scores), "pairs": len(first)}
    if float_model is not None:
        same = evaluate.cosines(vectors, embeddings(float_model, first + second))
        metrics |= {"cosine_mean": float(same.mean()), "cosine_min": float(same.min())}
    return metrics


# Images


def classify(
    model: Model, float_model: Model | None, batches: Iterable[tuple[Array, Array]]
) -> Metrics:
    """Top-1 and top-5 over batches of images and labels; with a float model agreement and SQNR."""
    run, reference = open_pair(model, float_model)
    name = run.get_inputs()[0].name
    top1, top5, same = [], [], []
    error = tensors.ErrorMeter()
    for images, labels in batches:
        logits = run.run(None, {name: images})[0]
        ranked = np.argsort(-logits, axis=-1, kind="stable")
        top1.append(ranked[:, 0] == labels)
        top5.append((ranked[:, :5] == labels[:, None]).any(axis=1))
        if reference is not None:
            expected = reference.run(None, {name: images})[0]
            same.append(expected.argmax(axis=-1) == ranked[:, 0])
            error.add(expected, logits)
    metrics: Metrics = {
        "top1": float(np.concatenate(top1).mean()),
        "top5": float(np.concatenate(top5).mean()),
        "images": sum(map(len, top1)),
    }
    if reference is not None:
        agreement = float(np.concatenate(same).mean())
        metrics |= {"agreement": agreement, "sqnr_db": error.result().sqnr_db}
    return metrics


def normalized(images: Array) -> Array:
    """uint8 [n, height, width, 3] -> float32 [n, 3, height, width] with ImageNet mean and std."""
    scaled = (images.astype(np.float32) / 255 - np.float32(IMAGENET_MEAN)) / np.float32(
        IMAGENET_STD
    )
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def cifar(size: int | None, limit: int | None) -> Iterator[tuple[Array, Array]]:
    """CIFAR-10 test_a in batches of 50, resized (bicubic) where a size is given."""
    with np.load(data("images/cifar10/cifar10_test_a.npz")) as file:
        x, y = file["x"][:limit], file["y"][:limit]
    for start in range(0, len(x), 50):
        images = x[start : start + 50]
        if size is not None:
            from PIL import Image

            shape, bicubic = (size, size), Image.Resampling.BICUBIC
            images = np.stack(
                [np.asarray(Image.fromarray(i).resize(shape, bicubic)) for i in images]
            )
        yield normalized(images), y[start : start + 50]


def resnet(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """CIFAR ResNet-20 and -56 on test_a."""
    return classify(model, float_model, cifar(None, limit))


def cifar_probe(
    model: Model, limit: int | None = None, float_model: Model | None = None
) -> Metrics:
    """MobileNetV2 with a CIFAR-10 head, on test_a at 128 x 128."""
    return classify(model, float_model, cifar(128, limit))


def imagenet(
    prepare: Callable[[Array], Array], offset: int, limit: int | None
) -> Iterator[tuple[Array, Array]]:
    """The ImageNet sample, one image at a time: centre crop 224, label + offset."""
    from PIL import Image

    for entry in json.loads(data("images/imagenet_sample/labels.json").read_text())[:limit]:
        with Image.open(data("images/imagenet_sample") / entry["file"]) as image:
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            crop = np.asarray(image.convert("RGB").crop((left, top, left + 224, top + 224)))
        yield prepare(crop[None]), np.asarray([entry["label"] + offset])


def squeezenet(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """SqueezeNet 1.1 on the ImageNet sample."""
    return classify(model, float_model, imagenet(normalized, 0, limit))


def mobilenet(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """MobileNetV2 of TensorFlow, which has a background class 0, on the ImageNet sample."""

    def prepare(images: Array) -> Array:
        return ((images.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)

    return classify(model, float_model, imagenet(prepare, 1, limit))


def mnist(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """The MNIST CNN on t10k, pixels 0..255, one image at a time as its input demands."""
    images = gzip.decompress(data("images/mnist/t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress(data("images/mnist/t10k-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 1, 28, 28)[:limit]
    y = np.frombuffer(labels, np.uint8, offset=8).reshape(-1, 1)[:limit]
    return classify(model, float_model, zip(x.astype(np.float32), y, strict=True))


# Others


def silero(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """Speech probability over 30 s of test.wav: frames of 512 samples behind 64 of context."""
    with wave.open(str(data("other/silero_vad/test.wav"))) as file:
        samples = np.frombuffer(file.readframes(480_000), np.int16).astype(np.float32) / 32768

    def probabilities(session: Session) -> Array:
        state, result = np.zeros((2, 1, 128), np.float32), []
        padded = np.concatenate([np.zeros(64, np.float32), samples])
        for start in range(0, len(samples) - 511, 512)[:limit]:
            frame = padded[None, start : start + 576]
            feeds = {"input": frame, "state": state, "sr": np.asarray(16000, np.int64)}
            probability, state = session.run(None, feeds)
            result.append(probability[0, 0])
        return np.asarray(result, np.float64)

    run, reference = open_pair(model, float_model)
    p = probabilities(run)
    speech, silence = float((p > 0.5).mean()), float((p < 0.1).mean())
    metrics = {"mean": float(p.mean()), "speech": speech, "silence": silence, "frames": len(p)}
    if reference is not None:
        expected = probabilities(reference)
        difference = np.abs(p - expected)
        flips = float(((p > 0.5) != (expected > 0.5)).mean())
        distance = {"mean_abs": float(difference.mean()), "max_abs": float(difference.max())}
        metrics |= distance | {"decision_flips": flips}
    return metrics


def magika(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """Content type of the reference examples: first and last 1024 bytes, blanks stripped."""
    config = json.loads(data("other/magika/config.min.json").read_text())
    packed = data("other/magika/standard_v3_3-inference_examples_by_content.json.gz").read_bytes()
    examples = [e for e in json.loads(gzip.decompress(packed)) if e["status"] == "ok"]
    examples = [e for e in examples if e["prediction"]["dl"] != "undefined"][:limit]
    run, reference = open_pair(model, float_model)
    right, same, distance = [], [], []
    for example in examples:
        content = base64.b64decode(example["content_base64"])
        block, size = config["block_size"], config["beg_size"]
        head, tail = content[:block].lstrip()[:size], content[-block:].rstrip()[-size:]
        feeds = {"bytes": np.full((1, 2 * size), config["padding_token"], np.int32)}
        feeds["bytes"][0, : len(head)] = np.frombuffer(head, np.uint8)
        feeds["bytes"][0, 2 * size - len(tail) :] = np.frombuffer(tail, np.uint8)
        scores = run.run(None, feeds)[0][0]
        label = config["target_labels_space"][scores.argmax()]
        right.append(label == example["prediction"]["dl"])
        distance.append(abs(float(scores.max()) - example["prediction"]["score"]))
        if reference is not None:
            same.append(reference.run(None, feeds)[0][0].argmax() == scores.argmax())
    metrics = {"right": sum(right), "files": len(right), "score_max_abs": max(distance)}
    return metrics | ({"agreement": float(np.mean(same))} if same else {})


TASKS: dict[str, Callable[..., Metrics]] = {
    task.__name__: task
    for task in (
        stories,
        bitllama,
        rxnmapper,
        minilm,
        squeezenet,
        mobilenet,
        resnet,
        cifar_probe,
        mnist,
        silero,
        magika,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one model and print JSON."""
    parser = argparse.ArgumentParser(description="Measure a model on its real task.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", type=Path)
    parser.add_argument("--float", dest="float_model", type=Path, help="compare with it")
    parser.add_argument("--limit", type=int, help="use only the first N texts, pairs or images")
    given = parser.parse_args(arguments)
    metrics = TASKS[given.task](given.model, limit=given.limit, float_model=given.float_model)
    result = {"task": given.task, "model": str(given.model), **metrics}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
