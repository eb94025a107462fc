"""LSTM as ONNX defines it, in float64 and as plainly as possible: the reference that kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Sigmoid": sigmoid,
    "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, 0),
    "Softsign": lambda x: x / (1 + np.abs(x)),
}


def lstm(
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    lengths: Sequence[int] | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    p: Array | None = None,
    *,
    direction: str = "forward",
    clip: float = np.inf,
    input_forget: int = 0,
    activations: Sequence[str] = (),
) -> list[Array]:
    """Y [T, D, N, H], Y_h [D, N, H] and Y_c [D, N, H]; gates in the order i, o, f, c; peepholes i, o, f."""
    steps, rows = x.shape[:2]
    count, hidden = w.shape[0], r.shape[2]
    y = np.zeros((steps, count, rows, hidden))
    last = np.zeros((2, count, rows, hidden))
    names = list(activations) or ["Sigmoid", "Tanh", "Tanh"] * count
    for d in range(count):
        f, g, out = (ACTIVATIONS[n] for n in names[3 * d : 3 * d + 3])
        bias = np.zeros(8 * hidden) if b is None else b[d].astype(np.float64)
        pi, po, pf = np.zeros((3, hidden)) if p is None else np.split(p[d].astype(np.float64), 3)
        for n in range(rows):
            h = np.zeros(hidden) if h0 is None else h0[d, n].astype(np.float64)
            c = np.zeros(hidden) if c0 is None else c0[d, n].astype(np.float64)
            order = range(steps if lengths is None else lengths[n])
            for t in reversed(order) if d == 1 or direction == "reverse" else order:
                gates = w[d].astype(np.float64) @ x[t, n] + r[d].astype(np.float64) @ h
                gates += bias[: 4 * hidden] + bias[4 * hidden :]
                i, o, forget, cell = np.split(gates, 4)

                def cut(v: Array) -> Array:
                    return np.clip(v, -clip, clip)

                i = f(cut(i + pi * c))
                forget = 1 - i if input_forget else f(cut(forget + pf * c))
                c = forget * c + i * g(cut(cell))
                o = f(cut(o + po * c))
                h = o * out(c)  # ONNX clips c too; ONNX Runtime does not, in float either
                y[t, d, n] = h
            last[:, d, n] = h, c
    return [y, last[0], last[1]]
