"""Ways to deal with outliers, each at each width: KL divergence to float, top-1 agreement and perplexity.

    python bench/outliers.py [--models tiny-llama,norm30] [--ways 'none;awq'] [--widths 'w4a4;w8a8'] [--work FOLDER]

stories260K and its stress models lie in the folder that QGRAPH_TEST_DATA names. What calibrates is not what is
measured: 40 windows of 128 held-out tokens of tiny-llama, stories 600..699 of stories260K. Divergence is that to the
float model without stress, of which stress models are the same function. What is in FOLDER is not measured again.
Tables are printed as in docs/notes/outliers.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e"), str(ROOT / "bench")]

import real_data  # noqa: E402
from queries_keys import large_keys, round_products  # noqa: E402

Recipe = dict[str, Any]
Texts = list[npt.NDArray[np.int64]]
STORIES, TOKENIZER = "lm/stories260K/stories260K.onnx", "lm/stories260K/tok512.bin"
MODELS = {
    "tiny-llama": "zoo:tiny-llama",
    "keys30": "zoo:tiny-llama",
    "stories260K": STORIES,
    "norm30": "stress/stories_norm30.onnx",
    "norm100": "stress/stories_norm100.onnx",
    "vo30": "stress/stories_vo30.onnx",
}
# Passes behind canonicalize, and options of rotate.
WAYS: dict[str, tuple[tuple[str, ...], Recipe]] = {
    "none": ((), {}),
    "equalize": (("equalize",), {}),
    "smooth": (("smooth",), {}),
    "awq": (("awq",), {}),
    "equalize, awq": (("equalize", "awq"), {}),
    "R1": (("equalize", "rotate"), {"heads": False}),
    "R1, R2": (("equalize", "rotate"), {}),
    "R1, R2, R4": (("equalize", "rotate"), {"online": 128}),
    "R1, R2, R3": (("equalize", "rotate"), {"scores": 128}),
    "R1, R2, R3, R4": (("equalize", "rotate"), {"online": 128, "scores": 128}),
}
# The recipe whose rules hold, and what is set in its products of 4-bit weights afterwards.
WIDTHS: dict[str, tuple[str, dict[str, int]]] = {
    "w8a8": ("int8-dynamic", {}),
    "w8a8 static": ("int8-static", {}),
    "w4a16": ("w4a8-rotated", {"activation_bits": 0}),
    "w4a8": ("w4a8-rotated", {}),
    "w4a4": ("w4a4", {}),
    "w4a4 token": ("w4a4", {"activation_block": 0}),
    "w8a8 static, qk8": ("int8-static", {}),
    "w8a8 static, qk4": ("int8-static", {}),
}
# Bits of queries and keys, which no target quantizes: simulated, on one static grid for each input of each product.
SIMULATED = {"w8a8 static, qk8": 8, "w8a8 static, qk4": 4}
HELD_OUT, WINDOW = (
    8192,
    128,
)  # tokens that calibrate tiny-llama; tokens of a window that is measured


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by ;")
    parser.add_argument("--widths", default=";".join(WIDTHS), help="separated by ;")
    parser.add_argument("--work", type=Path, help="keeps figures between runs")
    parser.add_argument("--json", type=Path, help="write the result there")
    given = parser.parse_args()
    ways, widths = given.ways.split(";"), given.widths.split(";")
    result: dict[str, Any] = {}
    for model in given.models.split(","):
        cells = result[model] = {
            way: {width: cell(model, way, width, given.work) for width in widths} for way in ways
        }
        print("\n".join(table(model, cells)), flush=True)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


def cell(model: str, way: str, width: str, work: Path | None) -> dict[str, float]:
    """The figures of one combination; from the folder where they are known."""
    known = None if work is None else work / f"{model}-{way}-{width}.json".replace(", ", "")
    if known is not None and known.exists():
        return dict(json.loads(known.read_text()))
    found = measure(model, way, width)
    print(f"{model:12s} {way:12s} {width:12s} {figures(found)}", file=sys.stderr, flush=True)
    if known is not None:
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(found))
    return found


def measure(model: str, way: str, width: str) -> dict[str, float]:
    """Quantize and compare with float."""
    import qgraph
    from qgraph import evaluate

    drawn, texts, context = _data(model)
    samples = list(drawn)
    made = qgraph.optimize(
        _source(model), recipe(way, width), data=samples, inspect=False, verify="off"
    )
    if width in SIMULATED:
        round_products(_source(model), made.model, samples, SIMULATED[width])
    for node in made.model.graph.all_nodes():
        if node.op_type == "MatMulInt4":
            for name, value in WIDTHS[width][1].items():
                node.attributes[name] = _integer(name, value)
    reference = _located(MODELS[model] if MODELS[model].startswith("zoo:") else STORIES)
    found = evaluate.divergence(reference, made.model, texts, context)
    return {
        "kl": found.divergence.kl_mean.value,
        "top1": found.divergence.agreement.value,
        "perplexity": found.quant_perplexity.perplexity,
        "float_perplexity": found.float_perplexity.perplexity,
    }


def recipe(way: str, width: str) -> Recipe:
    """The rules of a width behind the passes of a way, for qgraph's operators."""
    from qgraph.recipe import load

    base = load(WIDTHS[width][0]).model_dump()
    passes, rotate = WAYS[way]
    kept = [p for p in base["pipeline"] if p not in ("canonicalize", "equalize", "rotate")]
    options = {k: v for k, v in base["options"].items() if k != "rotate"}
    if "rotate" in passes:
        options["rotate"] = rotate
    pipeline = ["canonicalize", *passes, *kept]
    return base | {"target": "ort-qgraph", "pipeline": pipeline, "options": options}


def table(model: str, cells: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    """Lines of Markdown."""
    widths = list(next(iter(cells.values())))
    plain = next(iter(next(iter(cells.values())).values()))["float_perplexity"]
    yield f"\n**{model}** (float {plain:.3f})\n"
    yield f"| | {' | '.join(widths)} |"
    yield "|---" * (len(widths) + 1) + "|"
    for way, row in cells.items():
        yield f"| {way} | {' | '.join(figures(row[width]) for width in widths)} |"


def figures(found: dict[str, float]) -> str:
    """KL divergence, agreement, perplexity."""
    kl, perplexity = found["kl"], found["perplexity"]
    shown = [f"{kl:.2g}", f"{found['top1']:.3f}"]
    shown += [f"{perplexity:.3f}" if perplexity < 100 else f"{perplexity:.0f}"]
    return ", ".join(text.removeprefix("0") if "." in text else text for text in shown)


def _data(model: str) -> tuple[Iterator[dict[str, Any]], Texts, int]:
    """What calibrates, what is measured, and the context."""
    from qgraph.models import data

    if MODELS[model].startswith("zoo:"):
        tokens = data.eval_tokens().astype(np.int64)
        rows = tokens[:HELD_OUT].reshape(-1, WINDOW)
        end = HELD_OUT + 40 * WINDOW
        texts = list(tokens[HELD_OUT:end].reshape(-1, WINDOW))
        return ({"input_ids": row[None]} for row in rows), texts, WINDOW
    stories = json.loads(real_data.data("text/tinystories/tinystories_0_699.json").read_text())
    encoder = real_data.SentencePieces(real_data.data(TOKENIZER))
    samples = (encoder.encode(story)[None, : real_data.CONTEXT] for story in stories[:64])
    texts = real_data.story_tokens(TOKENIZER, 100)
    return ({"input_ids": s} for s in samples), texts, real_data.CONTEXT


def _located(path: str) -> str:
    return path if path.startswith("zoo:") else str(real_data.data(path))


def _source(model: str) -> Any:
    """What is quantized: a path or a model."""
    from qgraph import files
    from qgraph.models import shapes

    if model != "keys30":
        return _located(MODELS[model])
    made = files.load(MODELS[model])
    large_keys(made, shapes.Llama().head_dim)
    return made


def _integer(name: str, value: int) -> Any:
    import onnx_ir as ir

    return ir.AttrInt64(name, value)


if __name__ == "__main__":
    main()
