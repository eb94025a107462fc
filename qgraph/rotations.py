"""Orthogonal matrices that spread outliers over channels.

All are float64 [n, n] and act as y = T x. A Hadamard matrix sends every single channel to all channels with equal
weight; signs drawn at random before it keep a constant from gathering in one channel (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qgraph.ops import hadamard

Floats = npt.NDArray[np.float64]


def spreading(n: int, rng: np.random.Generator) -> Floats:
    """A Hadamard matrix of any order, divided by √n: Sylvester's, Paley's, or with a random odd factor.

    Where no Hadamard matrix of order n is known here, n = r 2^p gives Q ⊗ S(2^p) with Q a random orthogonal [r, r].
    """
    try:
        size, power = hadamard.split(n)
        small = hadamard.factor(size).astype(np.float64)
    except ValueError:
        power = (n & -n).bit_length() - 1
        size = n >> power
        small = random(size, rng) * np.sqrt(size)
    made: Floats = np.kron(small, hadamard.sylvester(1 << power)) / np.sqrt(n)
    return made


def random(n: int, rng: np.random.Generator) -> Floats:
    """An orthogonal matrix from the uniform (Haar) distribution."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    made: Floats = q * np.sign(np.diag(r))
    return made


def randomized(n: int, rng: np.random.Generator) -> Floats:
    """H diag(±1) with signs at random."""
    made: Floats = spreading(n, rng) * rng.choice([-1.0, 1.0], n)
    return made


def principal(rows: Floats, rng: np.random.Generator) -> Floats:
    """H diag(±1) V', with V the principal axes of the rows: all channels get the same variance.

    Args:
        rows: samples [m, n] of the activation.
        rng: for the signs.
    """
    _, axes = np.linalg.eigh(rows.T @ rows)
    made: Floats = randomized(len(axes), rng) @ axes.T
    return made


def kurtosis(rows: Floats) -> float:
    """Mean over the rows of n Σx⁴ / (Σx²)²: 1 where channels are equally large, 3 for a Gaussian, n for one outlier."""
    squares = rows * rows
    power = squares.sum(axis=1)
    held = power > 0
    fourth = (squares[held] ** 2).sum(axis=1)
    return float((rows.shape[1] * fourth / power[held] ** 2).mean()) if held.any() else 1.0


def learned(rows: Floats, start: Floats, steps: int = 60, rate: float = 0.5) -> Floats:
    """Improve a rotation on samples, without gradients through the model.

    Minimises the whip loss Σ exp(-|y|) of rows normalised to unit variance, which pushes values out of zero and so
    makes rows uniform (DartQuant, arXiv 2511.04063), along the Cayley curve T ← (1 + A)⁻¹ (1 - A) T. The best matrix by
    `kurtosis` is kept, so the result is never worse than the start.

    Args:
        rows: samples [m, n].
        start: orthogonal [n, n].
        steps: at most; each costs one solution of n equations.
        rate: length of a step, relative to the norm of the gradient; halved where the loss rises, and a
            little longer where it falls.
    """
    scale = np.sqrt((rows * rows).mean(axis=1, keepdims=True))
    x = rows[scale[:, 0] > 0] / scale[scale[:, 0] > 0]
    best, least = start, kurtosis(x @ start.T)
    t, loss, one = start, _whip(x @ start.T), np.eye(len(start))
    for _ in range(steps):
        y = x @ t.T
        slope = (-np.sign(y) * np.exp(-np.abs(y))).T @ x / len(x)
        turn = slope @ t.T
        turn -= turn.T
        norm = np.linalg.norm(turn)
        if norm == 0:
            break
        a = turn * (rate / norm)
        moved = np.linalg.solve(one + a, (one - a) @ t)
        new = _whip(x @ moved.T)
        if new >= loss:
            rate /= 2
            continue
        t, loss, rate = moved, new, rate * 1.2
        found = kurtosis(x @ t.T)
        if found < least:
            best, least = t, found
    return _orthogonal(best)


def _whip(y: Floats) -> float:
    return float(np.exp(-np.abs(y)).mean())


def _orthogonal(t: Floats) -> Floats:
    """The nearest orthogonal matrix: takes rounding errors of many steps back."""
    u, _, v = np.linalg.svd(t)
    made: Floats = u @ v
    return made
