"""Weight-only quantization by another tool, alone in a process: python solvers_peers.py TOOL MODEL DATA OUTPUT BITS

TOOL: ort-rtn-sym, ort-rtn, ort-k-quant, ort-hqq (needs torch), ort-gptq, ort-gptq-repaired, nncf, nncf-awq (AWQ and
scale estimation). All in groups of 32. DATA is a folder of .npz files. ort-gptq-repaired is ort-gptq with the two index
expressions of its error propagation set right in memory: as shipped they read the empty half of a triangular matrix,
so that nothing is propagated.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import numpy as np

GROUP = 32
OPSET = 21


def samples(folder: str) -> list[dict[str, np.ndarray]]:
    found = []
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path) as file:
            found.append({name: file[name] for name in file.files})
    return found


def onnxruntime_nbits(tool: str, model: str, folder: str, output: str, bits: int) -> None:
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples(folder))

        def get_next(self):
            return next(self.left, None)

    if tool == "ort-gptq-repaired":
        repair()
    config = {
        "ort-k-quant": lambda: nbits.KQuantWeightOnlyQuantConfig(),
        "ort-hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=GROUP, bits=bits),
        "ort-gptq": lambda: nbits.GPTQWeightOnlyQuantConfig(Reader()),
        "ort-gptq-repaired": lambda: nbits.GPTQWeightOnlyQuantConfig(Reader()),
    }.get(tool)
    quantizer = nbits.MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=GROUP,
        is_symmetric=tool == "ort-rtn-sym",
        algo_config=config() if config else None,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(output, use_external_data_format=False)


def repaired(function):
    """onnxruntime's `gptq` with the triangular factor read where it is not empty."""
    text = inspect.getsource(function)
    for wrong, right in (
        ("Hinv1[i:, i]", "Hinv1[i, i:]"),
        ("np.matmul(Hinv[i2:, i1:i2], Err1)", "np.matmul(Hinv[i1:i2, i2:].T, Err1)"),
    ):
        if text.count(wrong) != 1:
            raise SystemExit("this onnxruntime's GPTQ is not the one that the repair was made for")
        text = text.replace(wrong, right)
    scope = dict(function.__globals__)
    exec(compile(text, "gptq", "exec"), scope)
    return scope["gptq"]


def repair() -> None:
    from onnxruntime.quantization.neural_compressor import weight_only

    weight_only.gptq = repaired(weight_only.gptq)


def nncf_weights(tool: str, model: str, folder: str, output: str, bits: int) -> None:
    import nncf
    import onnx
    from onnx import version_converter

    given = onnx.load(model)
    if next(o.version for o in given.opset_import if o.domain in ("", "ai.onnx")) < OPSET:
        given = version_converter.convert_version(given, OPSET)
    mode = {4: "INT4_ASYM", 2: "INT2_SYM"}[bits]
    feeds = samples(folder)
    adjust = nncf.AdvancedCompressionParameters(
        group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
    )
    options = {}
    if tool == "nncf-awq":
        options = {
            "dataset": nncf.Dataset(feeds, lambda sample: sample),
            "awq": True,
            "scale_estimation": True,
            "subset_size": len(feeds),
        }
    made = nncf.compress_weights(
        given,
        mode=nncf.CompressWeightsMode[mode],
        group_size=GROUP,
        advanced_parameters=adjust,
        **options,
    )
    onnx.save(made, output)


def main() -> None:
    tool, model, folder, output, bits = sys.argv[1:]
    quantize = nncf_weights if tool.startswith("nncf") else onnxruntime_nbits
    quantize(tool, model, folder, output, int(bits))


if __name__ == "__main__":
    main()
