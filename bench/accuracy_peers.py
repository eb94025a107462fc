"""Static INT8 by another tool, in a process of its own: python accuracy_peers.py TOOL MODEL SAMPLES OUTPUT KIND

TOOL: ort-minmax, ort-entropy, ort-percentile (onnxruntime.quantization.quantize_static after quant_pre_process, QDQ,
uint8 activations, int8 weights per channel), ort-default (the same without options), nncf (nncf.quantize with its
defaults, the TRANSFORMER model type with its SmoothQuant where KIND says so), nncf-accurate (accurate bias correction).
SAMPLES is a folder of .npz files.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np


def samples(folder: str) -> list[dict[str, np.ndarray]]:
    found = []
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path) as file:
            found.append({name: file[name] for name in file.files})
    return found


def onnxruntime_static(
    method: str, model: str, folder: str, output: str, kind: str, *, default: bool
) -> None:
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples(folder))

        def get_next(self):
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as scratch:
        prepared = str(Path(scratch, "prepared.onnx"))
        # Its symbolic shape inference fails on graphs that the quantizer itself takes.
        quant_pre_process(model, prepared, skip_symbolic_shape=kind != "conv")
        options = {} if default else {"per_channel": True}
        q.quantize_static(
            prepared,
            output,
            Reader(),
            calibrate_method=q.CalibrationMethod[method],
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            **options,
        )


def nncf_static(model: str, folder: str, output: str, kind: str, *, accurate: bool) -> None:
    import nncf
    import onnx

    feeds = samples(folder)
    made = nncf.quantize(
        onnx.load(model),
        nncf.Dataset(feeds, lambda sample: sample),
        subset_size=len(feeds),
        fast_bias_correction=not accurate,
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
    )
    onnx.save(made, output)


def main() -> None:
    tool, model, folder, output, kind = sys.argv[1:]
    if tool.startswith("ort-"):
        methods = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
        name = tool.removeprefix("ort-")
        onnxruntime_static(
            methods.get(name, "MinMax"), model, folder, output, kind, default=name == "default"
        )
    else:
        nncf_static(model, folder, output, kind, accurate=tool == "nncf-accurate")


if __name__ == "__main__":
    main()
