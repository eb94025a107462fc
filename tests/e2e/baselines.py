"""Real tasks on trained models: the figures that a quantized model is held against.

    python tests/e2e/baselines.py TASK MODEL [--float FLOAT_MODEL] [--limit N]      prints JSON

Models and data lie in the folder that the environment variable QGRAPH_TEST_DATA names (MANIFEST.md
there gives their sources and licences). Every figure is measured in ONNX Runtime on one CPU thread;
nothing is cached. With a float model, KL is KL(float || model) in nats per prediction and
`agreement` the share of equal top-1 predictions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent))
if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import real_data

from qgraph import errors, evaluate
from qgraph.evaluate import distributions, sessions, tensors

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]
Metrics = dict[str, Any]
Session = Any
Model = str | Path | Callable[[], Session]


# Next tokens


def stories(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """stories260K on TinyStories 600..699, each cut at 512 tokens: perplexity."""
    texts = real_data.story_tokens("lm/stories260K/tok512.bin", limit or 100)
    return next_token(model, texts, float_model)


def bitllama(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """The same protocol for the ternary bitllama_3M."""
    texts = real_data.story_tokens("lm/bitllama_3M/tokenizer.bin", limit or 100)
    return next_token(model, texts, float_model)


def next_token(model: Model, texts: Sequence[Tokens], float_model: Model | None) -> Metrics:
    """Mean nll over every next token of every text, and its exponential."""
    if float_model is None:
        return evaluate.perplexity(model, texts, real_data.CONTEXT).to_json()
    found = evaluate.divergence(float_model, model, texts, real_data.CONTEXT)
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


def rxnmapper(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """Top-1 and pseudo-perplexity of masked tokens in reactions 0..299."""
    mask = real_data.data("lm/rxnmapper_albert/vocab.txt").read_text().splitlines().index("[MASK]")
    run, reference = open_pair(model, float_model)
    nll, right, meter = [], [], distributions.DivergenceMeter(is_logits=True)
    for tokens, positions in real_data.reaction_tokens(limit):
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
    return open_model(model), None if float_model is None else open_model(float_model)


def open_model(model: Model) -> Session:
    """A session of a file in ONNX Runtime; another runtime's sessions come from a function that opens one."""
    return model() if callable(model) else sessions.open_session(model)


# Sentence embeddings


def embeddings(model: Model, sentences: Sequence[str]) -> Array:
    """Unit vectors [sentences, d]: hidden states averaged over the attention mask."""
    run = open_model(model)
    known = {given.name for given in run.get_inputs()}
    result: list[Array] = [np.zeros(0)] * len(sentences)
    for rows, feeds in real_data.sentence_batches(sentences):
        hidden = run.run(None, {name: feeds[name] for name in feeds if name in known})[0]
        for row, vector in zip(
            rows, evaluate.mean_pool(hidden, feeds["attention_mask"]), strict=True
        ):
            result[row] = vector
    return np.stack(result)


def minilm(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """Spearman of cosine and score on STS-B dev; with a float model the cosine to its vectors."""
    first, second, scores = real_data.sts_pairs(limit)
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


def resnet(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """CIFAR ResNet-20 and -56 on test_a."""
    return classify(model, float_model, real_data.cifar(None, limit))


def cifar_probe(
    model: Model, limit: int | None = None, float_model: Model | None = None
) -> Metrics:
    """MobileNetV2 with a CIFAR-10 head, on test_a at 128 x 128."""
    return classify(model, float_model, real_data.cifar(128, limit))


def squeezenet(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """SqueezeNet 1.1 on the ImageNet sample."""
    return classify(model, float_model, real_data.imagenet(real_data.normalized, 0, limit))


def mobilenet(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """MobileNetV2 of TensorFlow, which has a background class 0, on the ImageNet sample."""

    def prepare(images: Array) -> Array:
        return ((images.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)

    return classify(model, float_model, real_data.imagenet(prepare, 1, limit))


def mnist(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """The MNIST CNN on t10k."""
    return classify(model, float_model, real_data.digits(limit))


def ultraface(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """Faces per photograph; with a float model the share of its faces that are found (IoU > 0.5)."""
    run, reference = open_pair(model, float_model)
    faces: list[int] = []
    found = expected = 0
    for image in real_data.photographs(limit):
        boxes = detect(run, image)
        faces.append(len(boxes))
        if reference is not None:
            truth = detect(reference, image)
            expected += len(truth)
            found += sum(len(boxes) > 0 and bool(overlap(box, boxes).max() > 0.5) for box in truth)
    metrics: Metrics = {"faces": faces}
    if reference is not None:
        metrics |= {"recall": found / expected, "precision": found / max(1, sum(faces))}
    return metrics


def detect(session: Session, image: Array) -> Array:
    """Boxes [n, 4] with a score over 0.7 that overlap no better one by more than 0.3."""
    scores, boxes = (output[0] for output in session.run(["scores", "boxes"], {"input": image}))
    sure = scores[:, 1] > 0.7
    left = boxes[sure][np.argsort(-scores[sure, 1], kind="stable")]
    kept: list[Array] = []
    while len(left):
        kept.append(left[0])
        left = left[1:][overlap(left[0], left[1:]) <= 0.3]
    return np.asarray(kept).reshape(-1, 4)


def overlap(box: Array, others: Array) -> Array:
    """Intersection over union of a box [4] with others [n, 4]; corners x0 y0 x1 y1."""
    size = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = np.clip(size, 0, None).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return np.asarray(common / (areas - common))


# Others


def silero(model: Model, limit: int | None = None, float_model: Model | None = None) -> Metrics:
    """Speech probability over 30 s of speech, frame by frame with the state carried on."""

    def probabilities(session: Session) -> Array:
        state, result = np.zeros((2, 1, 128), np.float32), []
        for frame in real_data.speech_frames(limit):
            feeds = {"input": frame, "state": state, "sr": np.asarray(16000, np.int64)}
            probability, state = session.run(["output", "stateN"], feeds)
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
    """Content types of the reference examples."""
    run, reference = open_pair(model, float_model)
    labels = real_data.file_labels()
    right, same, distance = [], [], []
    for features, label, score in real_data.file_examples(limit):
        scores = run.run(None, {"bytes": features})[0][0]
        right.append(labels[scores.argmax()] == label)
        distance.append(abs(float(scores.max()) - score))
        if reference is not None:
            expected = reference.run(None, {"bytes": features})[0][0]
            same.append(bool(expected.argmax() == scores.argmax()))
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
        ultraface,
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
    try:
        metrics = TASKS[given.task](given.model, limit=given.limit, float_model=given.float_model)
    except (real_data.MissingData, errors.QGraphError) as e:
        parser.error(str(e))
    result = {"task": given.task, "model": str(given.model), **metrics}
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
