# mypy: ignore-errors
# The `train` extra (torch) is not part of the type-checked environment.
"""Trained module -> `weights/<name>.safetensors` and its line in `metrics.json`."""

import json

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from qgraph.models import checkpoint
from qgraph.models.train.decoders import BitLinear


def freeze(model: nn.Module) -> None:
    """Round the weights, in place, to what the file can hold: float16, or ternary."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BitLinear):
                module.weight.copy_(module.ternary())
                module.frozen = True
            else:
                for tensor in _floats(module).values():
                    tensor.copy_(tensor.half().float())


def save(name: str, model: nn.Module) -> None:
    """Write the frozen model; linear weights are transposed to [K, N]."""
    tensors = {}
    for prefix, module in model.named_modules():
        for key, value in _floats(module).items():
            array = value.detach().numpy()
            if isinstance(module, nn.Linear) and key == "weight":
                array = np.ascontiguousarray(array.T)
            full = f"{prefix}.{key}"
            if isinstance(module, BitLinear):
                packed = checkpoint.pack_ternary(array)
                tensors |= {f"{full}.{part}": values for part, values in packed.items()}
            else:
                tensors[full] = array.astype(np.float16)
    save_file(tensors, checkpoint.WEIGHTS / f"{name}.safetensors")


def _floats(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's own float parameters and buffers (batch statistics)."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {key: value for key, value in own if value.is_floating_point()}


def record(name: str, **metrics: float | str) -> None:
    """Replace the metrics of `name` in `metrics.json`."""
    path = checkpoint.METRICS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in metrics.items()}
    known[name] = rounded
    text = json.dumps(dict(sorted(known.items())), indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
