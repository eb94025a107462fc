"""INT4 in groups of 32: weight error and end metrics of qgraph and its peers on real models.

    python bench/int4_error.py [--models stories260K,minilm] [--peers PYTHON] [--limit N] [--json FILE]

Models and data lie in the folder that QGRAPH_TEST_DATA names; tiny-llama is qgraph's own. PYTHON is an interpreter that
has the peers (onnxruntime, nncf and for HQQ torch); without it only ONNX Runtime's methods without torch run.

All MatMulNBits are written with accuracy_level 4 (int8 activations inside the kernel) and measured a second time
without. A peer that does not see through the constant arithmetic before a model's weights, or fails on it, gets the
model folded by ONNX Runtime's basic optimization; NNCF gets opset 21. Weight error is compared over the matrices that
every tool holds in 4 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

Method = Callable[[str, str], None]
OPSET = 21


# The tools: each turns a float file into a quantized one. Imports are inside, for each may live in another Python.


def _qgraph(recipe: str, *overrides: str) -> Method:
    def quantize(source: str, output: str) -> None:
        import qgraph

        qgraph.optimize(source, recipe, target="ort", output=output, overrides=overrides)

    return quantize


def _ort(algorithm: str, *, symmetric: bool = False) -> Method:
    def quantize(source: str, output: str) -> None:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        configs = {
            "DEFAULT": lambda: None,
            "k_quant": nbits.KQuantWeightOnlyQuantConfig,
            "HQQ": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=32, bits=4),
        }
        quantizer = nbits.MatMulNBitsQuantizer(
            source,
            bits=4,
            block_size=32,
            is_symmetric=symmetric,
            accuracy_level=4,
            algo_config=configs[algorithm](),
        )
        quantizer.process()
        quantizer.model.save_model_to_file(output, use_external_data_format=False)

    return quantize


def _nncf(mode: str) -> Method:
    def quantize(source: str, output: str) -> None:
        import nncf
        import onnx
        from onnx import version_converter

        model = onnx.load(source)
        if next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) < OPSET:
            model = version_converter.convert_version(model, OPSET)
        fallback = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        )
        made = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode[mode], group_size=32, advanced_parameters=fallback
        )
        onnx.save(made, output)

    return quantize


_PURE = "linear.sensitive_share=0.0"
METHODS: dict[str, Method] = {
    "qgraph int4": _qgraph("int4"),
    "qgraph pure asym": _qgraph("int4", _PURE),
    "qgraph pure sym": _qgraph("int4", _PURE, "linear.weights=int4.g32"),
    "qgraph int4-g128": _qgraph("int4-g128"),
    "qgraph auto (int8)": _qgraph("auto"),
    "ORT sym": _ort("DEFAULT", symmetric=True),
    "ORT asym": _ort("DEFAULT"),
    "ORT k_quant": _ort("k_quant"),
    "ORT HQQ": _ort("HQQ"),
    "NNCF sym": _nncf("INT4_SYM"),
    "NNCF asym": _nncf("INT4_ASYM"),
}
HELD = "qgraph held "


def _method(name: str) -> Method:
    """A method by name; "qgraph held GLOB|GLOB" is pure 4 bits with those weights in 8."""
    if not name.startswith(HELD):
        return METHODS[name]
    held = {"id": "held", "names": name[len(HELD) :].split("|"), "weights": ["int8.g32"]}

    def quantize(source: str, output: str) -> None:
        import qgraph

        recipe = {"extends": "int4", "name": "held", "rules": [held]}
        qgraph.optimize(source, recipe, target="ort", output=output, overrides=[_PURE])

    return quantize


# Those that hold all they quantize to 4 bits in groups of 32, so that their errors compare.
SAME_BITS = [
    m for m in METHODS if m not in ("qgraph int4", "qgraph int4-g128", "qgraph auto (int8)")
]
FIGURES = ("kl_mean", "agreement", "perplexity", "top1", "cosine_mean", "cosine_min", "spearman")


@dataclass(frozen=True)
class Model:
    """Where a model lies (below QGRAPH_TEST_DATA, or zoo:NAME), what measures it, and who needs it folded."""

    path: str
    task: str
    folded_for: tuple[str, ...] = ()


MODELS = {
    "stories260K": Model("lm/stories260K/stories260K.onnx", "stories", ("NNCF",)),
    "minilm": Model("encoder/minilm_l6_v2/minilm_l6_v2.onnx", "minilm"),
    "rxnmapper": Model("lm/rxnmapper_albert/rxnmapper_albert.onnx", "rxnmapper", ("ORT", "NNCF")),
    "bitllama": Model("lm/bitllama_3M/bitllama_3M.onnx", "bitllama", ("ORT", "NNCF")),
    "tiny-llama": Model("zoo:tiny-llama", "tiny-llama"),
}


def measure(name: str, methods: list[str], peers: str, limit: int | None) -> dict[str, Any]:
    """All methods on one model."""
    import weight_error

    from qgraph import files

    model, found = MODELS[name], {}
    with tempfile.TemporaryDirectory(prefix="qgraph-bench-") as folder:
        plain, folded = Path(folder, "float.onnx"), Path(folder, "folded.onnx")
        files.save(files.load(_located(model.path)), plain)
        _fold(plain, folded)
        errors: dict[str, Any] = {}
        for method in methods:
            source = folded if method.split()[0] in model.folded_for else plain
            output = Path(folder, "quantized.onnx")
            row: dict[str, Any] = {}
            try:
                start = time.perf_counter()
                _quantize(method, source, output, peers)
                row["seconds"] = round(time.perf_counter() - start, 2)
                row["file_bytes"] = output.stat().st_size
                errors[method] = weight_error.of(source, output)
                row["weights"] = weight_error.total(errors[method])
                row["matrices"] = [e.to_json() for e in errors[method]]
                row["metrics"] = _metrics(model.task, output, source, limit)
                if _use_float_activations(output):
                    row["float_activations"] = _metrics(model.task, output, source, limit)
            except (Failed, LookupError) as e:
                row["failed"] = str(e)
            output.unlink(missing_ok=True)
            found[method] = row
            print(f"{name:12s} {method:20s} {_line(row)}", file=sys.stderr, flush=True)
        compared = _compare(errors)
        result = {"float_bytes": plain.stat().st_size, "methods": found, "same_matrices": compared}
    for method, mse in compared["mse"].items():
        print(f"{name:12s} {method:20s} the same matrices: mse {mse:.4g}", file=sys.stderr)
    return result


def _located(path: str) -> str:
    return path if path.startswith("zoo:") else str(Path(os.environ["QGRAPH_TEST_DATA"], path))


def _fold(source: Path, output: Path) -> None:
    """Fold constants; MatMul and Add stay apart."""
    import onnxruntime

    from qgraph import files

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(output)
    onnxruntime.InferenceSession(str(source), options, disabled_optimizers=["MatMulAddFusion"])
    # ONNX Runtime imports every domain that it knows; peers stumble over some of them.
    files.save(files.load(output), output, force=True)


def _quantize(method: str, source: Path, output: Path, peers: str) -> None:
    """Quantize in another process, for a peer in its own Python."""
    python = sys.executable if method.startswith("qgraph") else peers
    _call([python, __file__, "--worker", method, str(source), str(output)])


def _metrics(name: str, model: Path, source: Path, limit: int | None) -> dict[str, float]:
    """Measure in another process: files of peers may not run."""
    command = [sys.executable, __file__, "--measure", name, str(model), str(source)]
    said = _call([*command, *([] if limit is None else ["--limit", str(limit)])])
    found = json.loads(said.splitlines()[-1])
    return {k: round(float(found[k]), 5) for k in FIGURES if k in found}


def _use_float_activations(path: Path) -> bool:
    """Let MatMulNBits and ai.qgraph's products compute in float: what is left is the error of the weights alone."""
    import onnx_ir as ir

    model, changed = ir.load(path), False
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits" and node.attributes.pop("accuracy_level", None):
            changed = True
        if node.domain == "ai.qgraph" and "activation_bits" in node.attributes:
            for name in ("activation_bits", "activation_block"):
                node.attributes[name] = ir.AttrInt64(name, 0)
            changed = True
    if changed:
        ir.save(model, path)
    return changed


class Failed(Exception):
    """A process failed; the text is the last line that it said."""


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no output"])[-1][:300])
    return done.stdout


def _figures(name: str, model: str, source: str, limit: int | None) -> dict[str, Any]:
    """The end metrics of a quantized model."""
    sys.path.insert(0, str(ROOT / "tests" / "e2e"))
    import baselines

    if name in baselines.TASKS:
        return dict(baselines.TASKS[name](model, limit=limit, float_model=source))
    from qgraph import evaluate
    from qgraph.models import data

    compared = evaluate.divergence(source, model, data.eval_tokens(), 256)
    figures = compared.quant_perplexity.to_json()
    return figures | baselines.divergence_metrics(compared.divergence)


def _compare(errors: dict[str, Any]) -> dict[str, Any]:
    """Mean squared error over the matrices that every tool of SAME_BITS holds in 4 bits."""
    tools = {m: {e.output: e for e in found} for m, found in errors.items() if m in SAME_BITS}
    names = [
        name
        for name in next(iter(tools.values()), {})
        if all(name in held and held[name].bits == 4 for held in tools.values())
    ]
    mse = {}
    for method, held in tools.items():
        chosen = [held[n] for n in names]
        if chosen:
            mse[method] = sum(e.noise for e in chosen) / sum(e.elements for e in chosen)
    return {"matrices": len(names), "mse": mse}


def _line(row: dict[str, Any]) -> str:
    said = f"FAILED {row['failed']}" if "failed" in row else f"({row['seconds']:.1f} s)"
    if "metrics" in row:
        said = " ".join(f"{k} {v:.4f}" for k, v in row["metrics"].items()) + f" {said}"
    if "float_activations" in row:
        figure, value = next(iter(row["float_activations"].items()))
        said = f"[float activations: {figure} {value:.4f}] {said}"
    if "weights" in row:
        w = row["weights"]
        said = f"{w['bits_per_weight']:5.2f} bits {w['sqnr_db']:6.2f} dB {said}"
    return f"{row.get('file_bytes', 0) / 1e6:7.3f} MB {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--peers", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--limit", type=int, help="texts, reactions or pairs")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "SOURCE", "OUTPUT"))
    parser.add_argument("--measure", nargs=3, metavar=("TASK", "MODEL", "FLOAT"))
    given = parser.parse_args()
    if given.worker:
        method, source, output = given.worker
        _method(method)(source, output)
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    if given.measure:
        print(json.dumps(_figures(*given.measure, given.limit)))
        return
    methods = given.methods.split(",")
    result = {n: measure(n, methods, given.peers, given.limit) for n in given.models.split(",")}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
