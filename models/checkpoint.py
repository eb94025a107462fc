"""Weights on disk -> float32 arrays.

`weights/<name>.safetensors` holds float16 tensors. A ternary tensor W [K, N] in {-s, 0, +s} is three
entries: `<key>.codes`, uint8 [ceil(K N / 4)], four values c + 1 with c in {-1, 0, 1} per byte,
lowest two bits first, row-major; `<key>.scale`, float32 [1], so that W = s c exactly; `<key>.shape`.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WEIGHTS = Path(__file__).parent / "weights"
HELD_OUT_TOKENS = WEIGHTS / "held_out_tokens.npy"
METRICS = WEIGHTS / "metrics.json"

Array = npt.NDArray[Any]


def load(name: str) -> dict[str, Array]:
    """Return the weights of `name` as float32, ternary tensors unpacked, keys as in training."""
    from safetensors.numpy import load_file  # keeps `import qgraph.models` cheap

    stored = load_file(WEIGHTS / f"{name}.safetensors")
    weights: dict[str, Array] = {}
    for key, array in stored.items():
        if key.endswith(".codes"):
            base = key.removesuffix(".codes")
            weights[base] = unpack_ternary(
                array, tuple(stored[f"{base}.shape"]), stored[f"{base}.scale"]
            )
        elif not key.endswith((".scale", ".shape")):
            weights[key] = array.astype(np.float32)
    return weights


def pack_ternary(weight: Array) -> dict[str, Array]:
    """Return the `codes`, `scale` and `shape` entries of a ternary weight [K, N]."""
    scale = np.abs(weight).max().astype(np.float32)
    codes = np.rint(weight / scale).astype(np.int8).ravel()
    if not np.array_equal(codes.reshape(weight.shape) * scale, weight):
        raise ValueError("Not a ternary tensor: expected only -s, 0 and +s for one s.")
    fields = np.pad((codes + 1).astype(np.uint8), (0, -codes.size % 4)).reshape(-1, 4)
    packed = (fields << np.array([0, 2, 4, 6], np.uint8)).sum(1).astype(np.uint8)
    shape = np.array(weight.shape, np.int64)
    return {"codes": packed, "scale": scale.reshape(1), "shape": shape}


def unpack_ternary(codes: Array, shape: tuple[int, ...], scale: Array) -> Array:
    """codes: uint8 [ceil(K N / 4)], scale: [1] -> float32 [K, N]; undoes `pack_ternary`."""
    fields = (codes[:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    values = fields.ravel()[: np.prod(shape)].astype(np.int8) - 1
    return (values.reshape(shape) * scale.astype(np.float32)).astype(np.float32)


@cache
def metrics() -> Mapping[str, Mapping[str, float]]:
    """Return what each model reached when it was trained: {model: {metric: value}}."""
    recorded: dict[str, dict[str, float]] = json.loads(METRICS.read_text(encoding="utf-8"))
    return recorded
