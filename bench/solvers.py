"""Weight solvers side by side with other tools': the same models, samples, bits and group size.

    python bench/solvers.py --work FOLDER [--peers PYTHON] [--torch PYTHON] [--models stories260K,minilm] [--bits 4,2]
    python bench/solvers.py --speed [--size 4096]

Models and data lie in the folder that QGRAPH_TEST_DATA names; tiny-llama and tiny-gpt are qgraph's own. Every tool gets
the same calibration samples, which are disjoint from what is measured, and quantizes every MatMul to groups of 32 (NNCF
holds the last one in 8 bits); embeddings stay float. ONNX Runtime's HQQ and GPTQ run in the interpreter of --torch
(onnxruntime, torch), NNCF in that of --peers. Figures are those of the weights alone: MatMulNBits computes in float.
What is in FOLDER is not made or measured again.

--speed: GPTQ of one matrix, group 128, by qgraph and by onnxruntime.quantization in turns, and the Gram-weighted errors
of both.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e"), str(ROOT / "bench")]

import int4_error  # noqa: E402
import real_data  # noqa: E402

Feeds = dict[str, npt.NDArray[Any]]
OURS = {  # solver, and the inputs that it sees
    "qgraph-rtn": ("rtn", "float"),
    "qgraph-gptq": ("gptq", "float"),
    "qgraph-descent": ("round-descent", "float"),
    "qgraph-sequential": ("round-descent", "quantized"),
    "qgraph-tuned": ("round-descent", "quantized"),  # and pass tune behind it
}
PEERS = (
    "ort-rtn-sym", "ort-rtn", "ort-k-quant", "ort-hqq", "ort-gptq", "ort-gptq-repaired", "nncf", "nncf-awq",
)  # fmt: skip
TORCH, NNCF = ("ort-hqq", "ort-gptq", "ort-gptq-repaired"), ("nncf", "nncf-awq")
CONTEXT = 256  # tokens of one sample of qgraph's own models
SPLIT = 8192  # held-out tokens before this calibrate, those after it are measured


def _stories() -> Iterator[Feeds]:
    """Stories 0..63; 600..699 are measured."""
    path = real_data.data("text/tinystories/tinystories_0_699.json")
    encoder = real_data.SentencePieces(real_data.data("lm/stories260K/tok512.bin"))
    for story in json.loads(path.read_text("utf-8"))[:64]:
        yield {"input_ids": encoder.encode(story)[: real_data.CONTEXT][None]}


def _sentences() -> Iterator[Feeds]:
    """128 sentences of STS-B's training part; the dev part is measured."""
    with real_data.data("text/stsb/stsb-en-train.csv").open(newline="", encoding="utf-8") as file:
        sentences = [row[0] for row in csv.reader(file)][:128]
    for _, feeds in real_data.sentence_batches(sentences, 8):
        yield dict(feeds)


def _reactions() -> Iterator[Feeds]:
    """Reactions 200..299, unmasked; 0..199 are measured."""
    for index, (tokens, _) in enumerate(real_data.reaction_tokens(300)):
        if index >= REACTIONS:
            yield {"input_ids": tokens[None], "attention_mask": np.ones_like(tokens)[None]}


def _held_out() -> Iterator[Feeds]:
    from qgraph.models import data

    tokens = data.eval_tokens()
    for start in range(0, SPLIT, CONTEXT):
        yield {"input_ids": tokens[start : start + CONTEXT][None]}


REACTIONS = 200


@dataclass(frozen=True)
class Model:
    """One model: where it lies, what measures it, the figure that ranks, what calibrates it, who needs it folded."""

    path: str
    task: str
    figure: str
    samples: Callable[[], Iterator[Feeds]]
    limit: int | None = None
    better: int = -1
    folded_for: tuple[str, ...] = ()


MODELS = {
    "tiny-llama": Model("zoo:tiny-llama", "", "kl_mean", _held_out, folded_for=("nncf",)),
    "tiny-gpt": Model("zoo:tiny-gpt", "", "kl_mean", _held_out, folded_for=("nncf",)),
    "stories260K": Model(
        "lm/stories260K/stories260K.onnx", "stories", "kl_mean", _stories, folded_for=("nncf",)
    ),
    "minilm": Model(
        "encoder/minilm_l6_v2/minilm_l6_v2.onnx", "minilm", "cosine_mean", _sentences, better=1
    ),
    "rxnmapper": Model(
        "lm/rxnmapper_albert/rxnmapper_albert.onnx",
        "rxnmapper",
        "kl_mean",
        _reactions,
        limit=REACTIONS,
        folded_for=("ort", "nncf"),
    ),
}


def compare(name: str, bits: int, given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All tools on one model at one width."""
    from qgraph import files

    model = MODELS[name]
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    plain, folded = folder / "float.onnx", folder / "folded.onnx"
    if not folded.exists():
        files.save(files.load(int4_error._located(model.path)), plain, force=True)
        int4_error._fold(plain, folded)
        (folder / "samples").mkdir(exist_ok=True)
        for index, feeds in enumerate(model.samples()):
            np.savez(folder / "samples" / f"{index:04d}.npz", **feeds)
    rows: dict[str, Any] = {}
    for tool in given.tools.split(","):
        source = folded if tool.split("-")[0] in model.folded_for else plain
        rows[tool] = _row(name, tool, bits, source, given)
        print(f"{name:12s} {bits} bits {tool:22s} {_line(rows[tool])}", flush=True)
    return {"tools": rows, "verdict": _verdict(model, rows)}


def _row(
    name: str, tool: str, bits: int, source: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """What one tool reaches; from the folder where it is known."""
    known = source.parent / f"{tool}.{bits}.json"
    if known.exists() and not (given.again and tool in OURS):
        return dict(json.loads(known.read_text()))
    output = source.parent / f"{tool}.{bits}.onnx"
    row: dict[str, Any] = {}
    try:
        start = time.perf_counter()
        _quantize(tool, bits, source, output, given)
        row["seconds"] = round(time.perf_counter() - start, 1)
        row["file_bytes"] = output.stat().st_size
        row["bits"] = _widths(output)
        if str(bits) not in row["bits"]:
            raise int4_error.Failed(f"it writes other widths: {row['bits']}")
        int4_error._use_float_activations(output)
        arguments = [name, str(output), str(source), *([str(given.limit)] if given.limit else [])]
        said = int4_error._call([sys.executable, __file__, "--measure", *arguments])
        row |= json.loads(said.splitlines()[-1])
    except int4_error.Failed as e:
        row["failed"] = str(e)
    output.unlink(missing_ok=True)
    known.write_text(json.dumps(row))
    return row


def _quantize(tool: str, bits: int, source: Path, output: Path, given: argparse.Namespace) -> None:
    """Quantize in another process, for a peer in its own Python."""
    folder = str(source.parent / "samples")
    arguments = [tool, str(source), folder, str(output), str(bits)]
    if tool in OURS:
        int4_error._call([sys.executable, __file__, "--one", *arguments])
        return
    python = sys.executable
    for option, tools in (("torch", TORCH), ("peers", NNCF)):
        if tool in tools:
            python = getattr(given, option)
            if not python:
                raise int4_error.Failed(f"needs --{option} PYTHON")
    int4_error._call([python, str(Path(__file__).with_name("solvers_peers.py")), *arguments])


def one(tool: str, source: str, folder: str, output: str, bits: str) -> None:
    """qgraph's side, in a process of its own."""
    import qgraph
    from qgraph.recipe import presets

    solver, inputs = OURS[tool]
    rules = [
        {"id": "tables", "ops": ["Gather", "Slice"], "weights": "float", "reason": "as the others do"},
        {"id": "linear", "weights": f"uint{bits}.g32.asym", "solver": solver},
    ]  # fmt: skip
    options = {"solve-weights": {"inputs": inputs}}
    recipe = {"name": "pure", "rules": rules, "options": options, "min_elements": 1}
    if tool == "qgraph-tuned":
        recipe["pipeline"] = list(presets.TUNED_PIPELINE)
        options["tune"] = {"written": 256, "length": CONTEXT}
    qgraph.optimize(
        source, recipe, target="ort", data=folder, output=output, force=True, inspect=False
    )


def _widths(path: Path) -> dict[str, int]:
    """How many operators have weights of how many bits: tools must not win by leaving some out."""
    import onnx_ir as ir

    from qgraph import graph

    found: dict[str, int] = {}
    for node in graph.nodes(ir.load(path)):
        width = ""
        if node.op_type == "MatMulNBits":
            width = str(graph.attribute(node, "bits", 4))
        elif node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            held = node.inputs[0].const_value
            width = str(held.dtype.bitwidth) if held is not None else ""
        if width:
            found[width] = found.get(width, 0) + 1
    return found


def measure(name: str, output: str, source: str, limit: str = "") -> None:
    """The end metrics of a quantized model, as JSON."""
    import baselines

    from qgraph import evaluate
    from qgraph.models import data

    model = MODELS[name]
    if model.task:
        count = int(limit) if limit else model.limit
        found = dict(baselines.TASKS[model.task](output, limit=count, float_model=source))
    else:
        compared = evaluate.divergence(source, output, data.eval_tokens()[SPLIT:], CONTEXT)
        found = compared.quant_perplexity.to_json()
        found |= baselines.divergence_metrics(compared.divergence)
    figures = {k: round(float(found[k]), 5) for k in int4_error.FIGURES if k in found}
    print(json.dumps(figures))


def _verdict(model: Model, rows: dict[str, dict[str, Any]]) -> str:
    scores = {t: r[model.figure] for t, r in rows.items() if model.figure in r}
    ours = {t: v for t, v in scores.items() if t in OURS}
    peers = {t: v for t, v in scores.items() if t not in OURS}
    if not ours or not peers:
        return "nothing to compare with"

    def best(held: dict[str, float]) -> str:
        return max(held, key=lambda t: held[t] * model.better)

    mine, theirs = best(ours), best(peers)
    won = scores[mine] * model.better > scores[theirs] * model.better
    text = f"{mine} {scores[mine]} against {theirs} {scores[theirs]}"
    return f"{model.figure}: {'qgraph is best' if won else 'qgraph is not best'}: {text}"


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    return " ".join(f"{k} {v}" for k, v in row.items())


def speed(size: int, rounds: int) -> dict[str, Any]:
    """Seconds and Gram-weighted errors of GPTQ on one matrix, tool by tool in turns."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "matrix.npz")
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2 * size, size), np.float32)
        x *= np.exp(0.8 * rng.standard_normal(size)).astype(np.float32)
        x[:, 1:] += 0.5 * x[:, :-1]
        w = (0.02 * rng.standard_normal((size, size))).astype(np.float32)
        np.savez(path, w=w, gram=(x.T @ x / len(x)).astype(np.float64))
        result: dict[str, list[dict[str, float]]] = {"qgraph": [], "onnxruntime": []}
        for _ in range(rounds):
            for tool in result:
                said = int4_error._call([sys.executable, __file__, "--time", tool, str(path)])
                row = json.loads(said.splitlines()[-1])
                result[tool].append(row)
                print(f"{tool:12s} {_line(row)}", flush=True)
    seconds, processor = (
        {t: statistics.median(r[clock] for r in rows) for t, rows in result.items()}
        for clock in ("seconds", "cpu_seconds")
    )
    errors = {t: rows[0]["error"] for t, rows in result.items()}
    return {
        "size": size,
        "runs": result,
        "times_as_fast": seconds["onnxruntime"] / seconds["qgraph"],
        "cpu_ratio": processor["onnxruntime"] / processor["qgraph"],
        "error_ratio": errors["qgraph"] / errors["onnxruntime"],
    }


def timed(tool: str, path: str) -> None:
    """GPTQ of one matrix by one tool: seconds, and Σ e H eᵀ over Σ w H wᵀ."""
    with np.load(path) as file:
        w, gram = file["w"], file["gram"]
    clocks = time.perf_counter, time.process_time
    if tool == "qgraph":
        from qgraph.passes.solvers.gptq import Gptq
        from qgraph.solver import WeightStats
        from qgraph.spec import QuantSpec

        spec, stats = QuantSpec.parse("uint4.g128.asym"), WeightStats(gram=gram)
        start = [clock() for clock in clocks]
        solved = Gptq().solve(w, spec, stats, np.random.default_rng(0))
        seconds = [clock() - s for clock, s in zip(clocks, start, strict=True)]
        quantized = solved.dequantize()
    else:
        from onnxruntime.quantization.neural_compressor import weight_only

        start = [clock() for clock in clocks]
        made = weight_only.gptq(w.T.copy(), gram.copy(), num_bits=4, group_size=128, scheme="asym")
        seconds = [clock() - s for clock, s in zip(clocks, start, strict=True)]
        quantized = np.asarray(made, np.float32).T
    e = w.astype(np.float64) - quantized
    cost = float(np.einsum("nk,nk->", e @ gram, e))
    whole = float(np.einsum("nk,nk->", w.astype(np.float64) @ gram, w))
    row = {"seconds": seconds[0], "cpu_seconds": seconds[1], "error": cost / whole}
    print(json.dumps(row))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tools", default=",".join([*OURS, *PEERS]))
    parser.add_argument("--bits", default="4,2")
    parser.add_argument("--limit", type=int, help="measure on so many texts, reactions or pairs")
    parser.add_argument("--peers", help="a Python that has nncf")
    parser.add_argument("--torch", help="a Python that has onnxruntime and torch")
    parser.add_argument("--work", type=Path, help="keeps figures between runs")
    parser.add_argument(
        "--again", action="store_true", help="make and measure qgraph's models again"
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--speed", action="store_true", help="time GPTQ on one matrix instead")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.speed:
        result: dict[str, Any] = speed(given.size, given.rounds)
        ratios = {k: round(v, 3) for k, v in result.items() if k not in ("size", "runs")}
        print(_line(ratios))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            work = given.work or Path(scratch)
            result = {
                f"{name} {bits}": compare(name, int(bits), given, work)
                for name in given.models.split(",")
                for bits in given.bits.split(",")
            }
        for title, found in result.items():
            print(f"{title}: {found['verdict']}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    hidden: dict[str, Callable[..., None]] = {"--one": one, "--measure": measure, "--time": timed}
    if sys.argv[1:2] and sys.argv[1] in hidden:
        hidden[sys.argv[1]](*sys.argv[2:])
    else:
        main()
