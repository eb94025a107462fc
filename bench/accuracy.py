"""Static INT8 side by side with other tools, on real models and their own tasks.

    python bench/accuracy.py --peers PYTHON --work FOLDER [--models resnet20,minilm] [--tools qgraph,nncf]
                             [--target openvino]
    python bench/accuracy.py --work FOLDER --race
    python bench/accuracy.py --models mobilenetv2-cifar --tools tensor,tensor-no-equalize,tensor-neither

Models and data lie in the folder that QGRAPH_TEST_DATA names. Every tool gets the same calibration samples, which are
disjoint from the measured ones (bench/accuracy_models.py), and runs in a process of its own; peers run in the
interpreter PYTHON (onnxruntime, nncf). What is in FOLDER is not made or measured again. Figures: agreement with the
float model or the task's own, SQNR of the outputs, latency over that of the float model (interleaved, one thread).
With --target openvino qgraph writes for OpenVINO, and every tool's model is measured there, against the float model in
OpenVINO.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e"), str(ROOT / "bench")]

PEERS = ("ort-minmax", "ort-entropy", "ort-percentile", "ort-default", "nncf", "nncf-accurate")
# Recipes of ours, and the passes that are taken out of them.
OURS: dict[str, tuple[str, tuple[str, ...]]] = {
    "qgraph": ("int8-static", ()),
    "smooth": ("int8-smooth", ()),
    "tensor": ("int8-tensor", ()),
    "tensor-no-equalize": ("int8-tensor", ("equalize",)),
    "tensor-no-correct": ("int8-tensor", ("correct-bias",)),
    "tensor-neither": ("int8-tensor", ("equalize", "correct-bias")),
}
FIGURES = ("agreement", "top1", "spearman", "cosine_mean", "recall", "precision", "f1", "mean_abs")


def main() -> None:
    """The command line."""
    from accuracy_models import MODELS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tools", default=",".join(["qgraph", *PEERS]))
    parser.add_argument("--peers", help="interpreter that has onnxruntime and nncf")
    parser.add_argument("--target", default="ort", choices=("ort", "openvino"))
    parser.add_argument("--work", type=Path, help="keeps models and figures between runs")
    parser.add_argument("--again", action="store_true", help="make qgraph's models again")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--race", action="store_true", help="time the models that lie in --work")
    given = parser.parse_args()
    if given.race:
        for name in given.models.split(","):
            race(name, given.work / name, given.tools.split(","))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        result = {}
        for name in given.models.split(","):
            rows = {}
            for tool in given.tools.split(","):
                rows[tool] = row = figures(name, tool, given, work / name)
                print(f"{name:18s} {tool:15s} {line(row)}", flush=True)
            result[name] = {"tools": rows, "verdict": verdict(MODELS[name], rows)}
            print(f"{name:18s} {result[name]['verdict']}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def figures(name: str, tool: str, given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What a tool's model reaches, from `work` where it is known."""
    work.mkdir(parents=True, exist_ok=True)
    suffix = "" if given.target == "ort" else f".{given.target}"
    known = work / f"{tool}{suffix}.json"
    if known.exists() and not (given.again and tool in OURS):
        return json.loads(known.read_text())
    from accuracy_models import MODELS

    model = MODELS[name]
    output = work / f"{tool}{suffix if tool in OURS else ''}.onnx"
    output.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", tool, name, str(work), given.target, str(output)]
    if tool not in OURS:
        if not given.peers:
            return {"failed": "needs --peers PYTHON"}
        script = Path(__file__).with_name("accuracy_peers.py")
        folder = save_samples(model, work / "samples")
        command = [given.peers, str(script), tool, str(model.file), folder, str(output), model.kind]
    else:
        save_samples(model, work / "samples")
    start = time.perf_counter()
    failed, said = run(command)
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    if not failed and tool in OURS:
        row |= json.loads(said)
    if not failed:
        # A file that another tool made may not load or run: that is a result too.
        measuring = ["--measure", name, str(output), str(work), given.target]
        failed, said = run([sys.executable, __file__, *measuring])
    row |= {"failed": failed} if failed else json.loads(said)
    known.write_text(json.dumps(row))
    return row


def run(command: list[str]) -> tuple[str, str]:
    """Why a process failed ("" where it did not), and the last line that it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    failed = lines[-1][:200] if done.returncode else ""
    return failed, (done.stdout.strip().splitlines() or [""])[-1]


def save_samples(model: Any, folder: Path) -> str:
    """The calibration samples as a folder of .npz files, made once."""
    if not folder.exists():
        folder.mkdir()
        for index, feeds in enumerate(model.samples()):
            np.savez(folder / f"{index:04d}.npz", **feeds)
    return str(folder)


def measure(name: str, output: str, folder: str, target: str) -> None:
    """Task figures, latency ratio and size of a quantized model, as JSON."""
    import baselines
    from accuracy_models import MODELS
    from openvino_session import OpenVINOSession

    from qgraph.evaluate import cost, sessions

    model = MODELS[name]
    open_it = OpenVINOSession if target == "openvino" else sessions.open_session
    quantized, reference = (functools.partial(open_it, p) for p in (output, model.file))
    found = baselines.TASKS[model.task](quantized, limit=model.limit, float_model=reference)
    with np.load(sorted(Path(folder, "samples").glob("*.npz"))[0]) as file:
        feeds = {key: file[key] for key in file.files}
    ratio = cost.interleave(reference(), quantized(), feeds, 15)
    if "recall" in found:  # what the float model finds is found, and nothing else
        found["f1"] = 2 / (1 / max(found["recall"], 1e-9) + 1 / max(found["precision"], 1e-9))
    row = {key: round(float(found[key]), 5) for key in FIGURES if key in found}
    if "sqnr_db" in found:
        row["sqnr_db"] = round(float(found["sqnr_db"]), 2)
    row |= {"latency": round(ratio.ratio, 3), "bytes": Path(output).stat().st_size}
    print(json.dumps(row))


def one(tool: str, name: str, folder: str, target: str, output: str) -> None:
    """qgraph's side, in a process of its own."""
    from accuracy_models import MODELS

    import qgraph
    from qgraph.recipe import load

    work = Path(folder)
    named, out = OURS[tool]
    recipe = load(named)
    kept = {
        "pipeline": tuple(p for p in recipe.pipeline if p not in out),
        "options": {k: v for k, v in recipe.options.items() if k not in out},
    }
    result = qgraph.optimize(
        str(MODELS[name].file),
        recipe.model_copy(update=kept),
        target=target,
        data=str(work / "samples"),
        output=output,
        force=True,
    )
    report = json.loads(result.report.to_json())
    print(json.dumps({"integer_macs": report["integer_macs"]}))


def race(name: str, folder: Path, tools: list[str]) -> None:
    """Print the time of the first tool's model over that of the float model and of every other tool's, in turns."""
    from accuracy_models import MODELS

    from qgraph import errors
    from qgraph.evaluate import cost, sessions

    with np.load(sorted(Path(folder, "samples").glob("*.npz"))[0]) as file:
        feeds = {key: file[key] for key in file.files}
    ours = sessions.open_session(folder / f"{tools[0]}.onnx")
    rivals = {"float": MODELS[name].file} | {t: folder / f"{t}.onnx" for t in tools[1:]}
    found = []
    for tool, path in rivals.items():
        if not path.exists():
            continue
        try:
            rival = sessions.open_session(path)
        except errors.RuntimeFailure as e:  # another tool made it: that is a result too
            found.append(f"{tool} does not load ({str(e)[:60]})")
            continue
        ratio = cost.interleave(rival, ours, feeds, 60)
        found.append(
            f"{tool} {ratio.ratio:.3f} [{ratio.lower_quartile:.2f}, {ratio.upper_quartile:.2f}]"
        )
    print(f"{name:18s} {tools[0]} over: {', '.join(found)}", flush=True)


def verdict(model: Any, rows: dict[str, dict[str, Any]]) -> str:
    """Whether qgraph is best, or how far behind the best it is."""
    scores = {t: r[model.figure] * model.better for t, r in rows.items() if model.figure in r}
    ours = [t for t in scores if t in OURS]
    if not ours:
        return f"{model.figure}: no figure for qgraph"
    best = max(scores, key=lambda t: scores[t])
    behind = (scores[best] - scores[ours[0]]) / model.scale
    if behind <= 0.3:
        return f"{model.figure}: qgraph is best or within 0.3 points (best: {best})"
    return f"{model.figure}: qgraph is {behind:.2f} points behind {best}"


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    return " ".join(f"{k} {v}" for k, v in row.items() if v is not None)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    elif sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main()
