"""Orthogonal matrices: orthogonal at every size, and what each is for."""

import numpy as np
import pytest

from qgraph import rotations


def rng(seed=0):
    return np.random.default_rng(seed)


def outliers(m=200, n=48):
    """Rows with two channels thirty times as large, along axes that are none of the channels."""
    rows = rng(1).normal(size=(m, n))
    rows[:, [5, 17]] *= 30
    return rows


def is_orthogonal(t):
    return np.abs(t @ t.T - np.eye(len(t))).max() < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3, 12, 16, 43, 48, 64, 172, 300])
def test_any_size_is_orthogonal(n):
    for make in (rotations.spreading, rotations.random, rotations.randomized):
        assert is_orthogonal(make(n, rng()))


@pytest.mark.parametrize("n", [2, 12, 16, 48, 768])
def test_a_hadamard_matrix_spreads_each_channel_evenly(n):
    assert np.allclose(np.abs(rotations.spreading(n, rng())), n**-0.5)


def test_a_size_without_a_known_hadamard_matrix_still_spreads():
    # 172 = 43 * 4: a random factor of 43, so the largest entry is far under 1.
    assert np.abs(rotations.spreading(172, rng())).max() < 0.4


def test_kurtosis_of_known_rows():
    assert rotations.kurtosis(np.ones((3, 8))) == 1
    assert rotations.kurtosis(np.eye(8)) == 8
    assert rotations.kurtosis(np.zeros((3, 8))) == 1
    assert 2.5 < rotations.kurtosis(rng().normal(size=(500, 256))) < 3.1


def test_random_signs_keep_a_constant_from_one_channel():
    constant = np.ones((1, 64))
    plain = rotations.spreading(64, rng())
    assert rotations.kurtosis(constant @ plain.T) == pytest.approx(64)
    assert rotations.kurtosis(constant @ rotations.randomized(64, rng()).T) < 10


def test_principal_axes_then_hadamard_give_equal_variances():
    rows = outliers()
    t = rotations.principal(rows, rng())
    assert is_orthogonal(t)
    power = ((rows @ t.T) ** 2).mean(axis=0)
    assert power.max() / power.min() < 1 + 1e-9


def test_learning_lowers_kurtosis_and_stays_orthogonal():
    rows = outliers()
    start = rotations.random(48, rng())
    found = rotations.learned(rows, start)
    assert is_orthogonal(found)
    assert rotations.kurtosis(rows @ found.T) < 0.8 * rotations.kurtosis(rows @ start.T)


def test_learning_never_ends_worse_than_it_began():
    rows = np.sign(rng(3).normal(size=(64, 16)))  # as flat as can be: every turn is worse
    start = np.eye(16)
    assert rotations.kurtosis(rows @ rotations.learned(rows, start).T) == pytest.approx(1.0)
