"""What OpenVINO executes: the runtime model of the CPU plugin, read in a child process.

One model per process: OpenVINO 2026.4 crashes on some models, and on the model that follows some others. The child is
`python -m qgraph.executed.openvino PATH` and writes JSON; a crash, a refusal or a hang of it becomes a
`RuntimeFailure` with the text of OpenVINO.

Bodies of If and Loop are one node in the runtime model; what runs inside them cannot be seen.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraph import errors
from qgraph.executed import ConstantInput, ExecutedGraph, ExecutedNode

PARITY: Mapping[str, str] = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
"""Settings under which OpenVINO computes in float32, without quantizing activations by itself."""

_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "boolean": "bool"}
_CARRIERS = ("Transpose", "Reorder", "Reshape", "Convert")
_LAYOUT = ("Input", "Output", "Const")


def is_available() -> bool:
    """True where the openvino package is installed."""
    return importlib.util.find_spec("openvino") is not None


def executed_graph(
    path: str | Path, config: Mapping[str, str] | None = None, timeout: float = 600.0
) -> ExecutedGraph:
    """The graph that OpenVINO's CPU plugin executes for a model.

    Args:
        path: the model file.
        config: plugin properties, by default `PARITY`.
        timeout: seconds after which the child process is given up.

    Raises:
        errors.RuntimeFailure: QG620 not installed, QG621 the model was not converted, QG622 it was not compiled,
            QG623 the process crashed, QG624 it took longer than `timeout`.
    """
    if not is_available():
        hint = "pip install 'qgraph[openvino]'"
        raise _failure("QG620", path, "the openvino package is not installed", hint)
    settings = json.dumps(dict(PARITY if config is None else config))
    command = [sys.executable, "-m", "qgraph.executed.openvino", os.fspath(path), settings]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=_environment()
        )
    except subprocess.TimeoutExpired as e:
        text = f"OpenVINO did not compile the model in {timeout:g} seconds"
        raise _failure("QG624", path, text, "raise the timeout") from e
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise _failure("QG623", path, f"OpenVINO crashed ({name})\n{_tail(done.stderr)}".rstrip())
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        text = f"the OpenVINO process failed ({done.returncode})\n{_tail(done.stderr)}".rstrip()
        raise _failure("QG623", path, text)
    answer = json.loads(lines[-1])
    if "error" in answer:
        code, verb = ("QG621", "read") if answer["stage"] == "read" else ("QG622", "compile")
        raise _failure(code, path, f"OpenVINO does not {verb} the model: {answer['error']}")
    nodes = tuple(_node(n) for n in answer["nodes"])
    return ExecutedGraph("openvino", answer["version"], nodes)


def inspect(path: str | Path, outputs: Sequence[str]) -> dict[str, Any]:
    """What OpenVINO makes of the values `outputs` of a model (see `match.what_runs`)."""
    import onnx_ir as ir

    from qgraph.executed import match

    return dict(match.what_runs(executed_graph(path), outputs, ir.load(path)))


def _environment() -> dict[str, str]:
    """The child finds the same qgraph as this process, however this one found it."""
    root = os.fspath(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, before] if before else [root])}


def _failure(code: str, path: str | Path, text: str, hint: str = "") -> errors.RuntimeFailure:
    return errors.RuntimeFailure(errors.Diagnostic("error", code, os.fspath(path), text, hint))


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _node(raw: dict[str, Any]) -> ExecutedNode:
    return ExecutedNode(
        op=raw["op"],
        name=raw["name"],
        inputs=tuple(raw["inputs"]),
        outputs=tuple(raw["outputs"]),
        constants=tuple(ConstantInput(c[0], c[1], tuple(c[2])) for c in raw["constants"]),
        detail=raw["detail"],
        input_dtypes=tuple(raw["input_dtypes"]),
    )


# The child process: nothing below is called by the parent.


def _describe(path: str, config: dict[str, str]) -> dict[str, Any]:
    """Compile one model and describe its runtime model as plain data."""
    import openvino

    version = importlib.metadata.version("openvino")
    stage = "read"
    try:
        core = openvino.Core()
        model = core.read_model(path)
        stage = "compile"
        compiled = core.compile_model(model, "CPU", config)
        ops = compiled.get_runtime_model().get_ordered_ops()
    except Exception as e:  # noqa: BLE001  OpenVINO's failures have no common base; text is kept
        return {"error": _reason(str(e)), "stage": stage}
    nodes = [_op(op) for op in ops if _info(op)["layerType"] not in _LAYOUT]
    return {"version": version, "nodes": nodes}


def _op(op: Any) -> dict[str, Any]:
    info = _info(op)
    sources = [i.get_source_output() for i in op.inputs()]
    constants = []
    for source in sources:
        dtype, origin = _dtype(source), _constant(source.get_node())
        if origin is not None and dtype:
            shape = [int(d) for d in origin.output(0).get_shape()]
            constants.append([source.get_node().get_friendly_name(), dtype, shape])
    return {
        "op": info["layerType"],
        "name": op.get_friendly_name(),
        "inputs": [s.get_node().get_friendly_name() for s in sources],
        "outputs": [n for n in info["originalLayersNames"].split(",") if n],
        "constants": constants,
        "detail": f"{info['runtimePrecision']} {info['primitiveType']}",
        "input_dtypes": [_dtype(s) for s in sources],
    }


def _info(op: Any) -> dict[str, str]:
    """The runtime information as text; values are wrapped or plain strings by version."""
    keys = ("layerType", "originalLayersNames", "runtimePrecision", "primitiveType")
    raw = op.get_rt_info()
    found = dict.fromkeys(keys, "") | {key: raw[key] for key in keys if key in raw}
    return {key: str(getattr(value, "value", value)) for key, value in found.items()}


def _dtype(output: Any) -> str:
    """Element type as `ConstantInput` writes it; "" for the placeholder of an absent input."""
    name = str(output.get_element_type().get_type_name())
    if name == "dynamic":
        return ""
    if name[0] in "iu" and name[1:].isdigit():
        return ("int" if name[0] == "i" else "uint") + name[1:]
    return _DTYPES.get(name, name)


def _constant(op: Any) -> Any:
    """The Const that an operand is, looking through layout changes done at load; None if it is computed."""
    kind = _info(op)["layerType"]
    while kind in _CARRIERS:
        op = op.input(0).get_source_output().get_node()
        kind = _info(op)["layerType"]
    return op if kind == "Const" else None


def _reason(text: str) -> str:
    """OpenVINO's message without the C++ source places that precede it."""
    places = ("Exception from ", "Check ", "FrontEnd API failed with ")
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    plain = [line for line in kept if not line.startswith(places)]
    return "\n".join(plain or kept)


def _main(arguments: Sequence[str]) -> None:
    config = json.loads(arguments[1]) if len(arguments) > 1 else dict(PARITY)
    sys.stdout.write(json.dumps(_describe(arguments[0], config)) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
