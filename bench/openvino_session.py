"""OpenVINO behind the calls of an ONNX Runtime session that the tasks use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output, as far as the tasks ask for it."""

    name: str


class OpenVINOSession:
    """One model on the CPU in float32 and one thread, without activations that OpenVINO quantizes by itself."""

    def __init__(self, path: str | Path) -> None:
        import openvino

        from qgraph.executed.openvino import PARITY

        core = openvino.Core()
        settings = {**PARITY, "INFERENCE_NUM_THREADS": 1}
        self._compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
        self._request = self._compiled.create_infer_request()

    def get_inputs(self) -> list[Port]:
        """The inputs in order."""
        return [Port(v.get_any_name()) for v in self._compiled.inputs]

    def run(
        self, outputs: Sequence[str] | None, feeds: Mapping[str, Any]
    ) -> list[npt.NDArray[Any]]:
        """The outputs of one inference, all of them in order or those that are named."""
        answer = self._request.infer({k: np.asarray(v) for k, v in feeds.items()})
        found = [(port.get_names(), np.array(value)) for port, value in answer.items()]
        if outputs is None:
            return [value for _, value in found]
        return [next(value for names, value in found if name in names) for name in outputs]
