"""What the real tasks feed: stories, reactions, sentences, images, sound and files.

Every function reads below the folder that the environment variable QGRAPH_TEST_DATA names; the
protocols are those of MANIFEST.md there. Images need Pillow, sentences need tokenizers.
"""

from __future__ import annotations

import base64
import csv
import gzip
import heapq
import json
import os
import re
import struct
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]

CONTEXT = 512
# The pattern of Schwaller et al. (Molecular Transformer, 2019): bracket atoms, atoms, bonds, rings.
SMILES = re.compile(
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$"
    r"|%[0-9]{2}|[0-9]"
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MissingData(Exception):
    """The test data are not there."""


def data(name: str) -> Path:
    """A file of the test data.

    Raises:
        MissingData: QGRAPH_TEST_DATA is not set, or the file is not there.
    """
    folder = os.environ.get("QGRAPH_TEST_DATA")
    if not folder:
        raise MissingData("set QGRAPH_TEST_DATA to the folder that holds the test models and data")
    path = Path(folder, name)
    if not path.exists():
        raise MissingData(f"QGRAPH_TEST_DATA holds no {name}")
    return path


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


def reaction_tokens(limit: int | None = None) -> Iterator[tuple[Tokens, Tokens]]:
    """For reaction j its ids [CLS] … [SEP] and the masked positions 1 + j % 7, step 7 (specials excluded)."""
    vocabulary = data("lm/rxnmapper_albert/vocab.txt").read_text().splitlines()
    ids = {token: index for index, token in enumerate(vocabulary)}
    lines = data("text/reactions/example_rxns_0_299.txt").read_text().split("\n")
    for j, reaction in enumerate(lines[: limit or 300]):
        pieces = ["[CLS]", *SMILES.findall(reaction), "[SEP]"]
        tokens = np.asarray([ids.get(piece, ids["[UNK]"]) for piece in pieces], np.int64)[:CONTEXT]
        yield tokens, np.arange(1 + j % 7, len(tokens) - 1, 7)


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


def digits(limit: int | None) -> Iterator[tuple[Array, Array]]:
    """MNIST t10k, pixels 0..255, one image [1, 1, 28, 28] at a time."""
    images = gzip.decompress(data("images/mnist/t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress(data("images/mnist/t10k-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 1, 28, 28)[:limit]
    y = np.frombuffer(labels, np.uint8, offset=8).reshape(-1, 1)[:limit]
    yield from zip(x.astype(np.float32), y, strict=True)


def photographs(limit: int | None) -> Iterator[Array]:
    """The face detector's photographs in the order of their names, [1, 3, 240, 320]."""
    from PIL import Image

    for path in sorted(data("vision/ultraface/imgs").glob("*.jpg"))[:limit]:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((320, 240), Image.Resampling.BICUBIC)
        yield ((np.asarray(small, np.float32) - 127) / 128).transpose(2, 0, 1)[None]


def speech_frames(limit: int | None) -> Iterator[Array]:
    """30 s of speech at 16 kHz: frames of 512 samples behind 64 of context, [1, 576]."""
    with wave.open(str(data("other/silero_vad/test.wav"))) as file:
        samples = np.frombuffer(file.readframes(480_000), np.int16).astype(np.float32) / 32768
    padded = np.concatenate([np.zeros(64, np.float32), samples])
    for start in range(0, len(samples) - 511, 512)[:limit]:
        yield padded[None, start : start + 576]


def file_examples(limit: int | None) -> Iterator[tuple[Array, str, float]]:
    """Magika's features [1, 2048], expected label and score of its reference examples.

    The features are the first and last 1024 bytes, without blanks at the ends, padded with 256.
    """
    config = json.loads(data("other/magika/config.min.json").read_text())
    packed = data("other/magika/standard_v3_3-inference_examples_by_content.json.gz").read_bytes()
    examples = [e for e in json.loads(gzip.decompress(packed)) if e["status"] == "ok"]
    block, size = config["block_size"], config["beg_size"]
    for example in [e for e in examples if e["prediction"]["dl"] != "undefined"][:limit]:
        content = base64.b64decode(example["content_base64"])
        head, tail = content[:block].lstrip()[:size], content[-block:].rstrip()[-size:]
        features = np.full((1, 2 * size), config["padding_token"], np.int32)
        features[0, : len(head)] = np.frombuffer(head, np.uint8)
        features[0, 2 * size - len(tail) :] = np.frombuffer(tail, np.uint8)
        yield features, example["prediction"]["dl"], example["prediction"]["score"]


def file_labels() -> list[str]:
    """The names of Magika's classes."""
    config = json.loads(data("other/magika/config.min.json").read_text())
    labels: list[str] = config["target_labels_space"]
    return labels
