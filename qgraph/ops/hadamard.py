"""Hadamard matrices as the operator takes them: a small dense factor times Sylvester's 2^p.

    H = F ⊗ S(2^p)        S(1) = [1],  S(2n) = [[S, S], [S, -S]]

Factors come from Paley's constructions over the primes, which serve rows of 768, 5120, 14336 and the like.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

FACTOR_SIZES = (1, 12, 20, 28, 36, 44, 60)


def sylvester(order: int) -> Floats:
    """S(order), a power of two."""
    if order < 1 or order & (order - 1):
        raise ValueError(f"{order} is no power of two")
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]).astype(np.float32)
    return matrix


@functools.cache
def factor(size: int) -> Floats:
    """A Hadamard matrix of one of FACTOR_SIZES; read-only."""
    if size not in FACTOR_SIZES:
        raise ValueError(f"{size} is none of {FACTOR_SIZES}")
    if size == 1:
        made = np.ones((1, 1))
    elif _is_prime(size - 1):
        core = _bordered(size - 1, -1)
        made = core + np.eye(size)
    else:
        core = _bordered(size // 2 - 1, 1)
        ones = np.array([[1, 1], [1, -1]])
        made = np.kron(core, ones) + np.kron(np.eye(size // 2), np.array([[1, -1], [-1, -1]]))
    matrix: Floats = made.astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _bordered(q: int, sign: int) -> npt.NDArray[np.float64]:
    """Quadratic residues modulo the prime q, with a border of ones: skew for sign -1, symmetric for 1."""
    residues = {i * i % q for i in range(1, q)}
    character = np.array([0.0 if i == 0 else 1.0 if i in residues else -1.0 for i in range(q)])
    made = np.zeros((q + 1, q + 1))
    made[0, 1:], made[1:, 0] = 1, sign
    index = np.arange(q)
    made[1:, 1:] = character[(index[None, :] - index[:, None]) % q]
    return made


def split(size: int) -> tuple[int, int]:
    """(f, p) with size = f * 2^p and f the smallest factor size that fits.

    >>> split(768), split(4096)
    ((12, 6), (1, 12))

    Raises:
        ValueError: no factor fits.
    """
    for f in FACTOR_SIZES:
        order, rest = divmod(size, f)
        if size > 0 and not rest and order and not order & (order - 1):
            return f, order.bit_length() - 1
    raise ValueError(f"{size} is not a power of two times one of {FACTOR_SIZES}")
