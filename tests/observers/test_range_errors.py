"""Errors of grids over a histogram: the native function on every instruction set, numpy, and the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph import native
from qgraph.observers import FloatHistogram, choose, mse, range_errors, stats
from qgraph.spec import QuantSpec

RNG = np.random.default_rng(3)
AREA = range_errors.Area(4 / 3, 1.0, 1 / 12)
ASYMMETRIC = QuantSpec.parse("uint8.tensor.asym")


def problem(edges: int, grids: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    at = np.sort(RNG.normal(size=edges) * 10.0 ** RNG.integers(-6, 6, edges))
    zero_points = RNG.integers(0, 256, grids)
    inverse = 10.0 ** RNG.uniform(-3, 6, grids)
    return at, RNG.normal(size=edges), np.stack([inverse, -zero_points, 255.0 - zero_points])


@pytest.mark.parametrize("isa", native.load().isas)
@pytest.mark.parametrize(("edges", "grids"), [(0, 3), (8, 1), (1000, 1), (4096, 17), (2048, 48)])
def test_native_and_numpy_give_the_same_bits(isa: str, edges: int, grids: int) -> None:
    function = range_errors.native_function()
    assert function is not None, "the native library is absent or too old"
    given = (*problem(edges, grids), AREA)
    found = range_errors.by_native(function, *given, isa=native.load().isas[isa])
    assert np.array_equal(found, range_errors.by_numpy(*given))


def test_halves_round_to_even_as_codes_do() -> None:
    at = np.arange(-4, 4) + 0.5
    grids = np.array([[1.0], [-2.0], [3.0]])
    single = np.zeros(8)
    expected = []
    for index in range(8):
        single[:] = np.arange(8) == index
        n = float(np.clip(np.rint(at[index]), -2, 3))
        t = at[index] - n
        expected.append(4 / 3 * t**3 - np.clip(t, -0.5, 0.5) ** 3 + n / 12)
        found = range_errors.sums(at, single.copy(), grids, AREA)
        assert found[0] == pytest.approx(expected[-1])
    assert len(set(expected)) > 4


@pytest.mark.parametrize("ends", [(-3.0, 3.0), (-0.5, 4.0), (-5.0, 0.1)])
def test_density_has_the_error_of_the_values(ends: tuple[float, float]) -> None:
    x = RNG.normal(size=200_000).astype(np.float32)
    histogram = FloatHistogram()
    histogram.update(x)
    low, high = ends
    scale = np.float32((high - low) / 255)
    zero_point = round(-low / scale)
    t = x.astype(np.float64) / scale
    n = np.clip(np.rint(t), -zero_point, 255 - zero_point)
    # Beyond half a step errors weigh four times; up to there they are those of rounding.
    far = np.abs(t - n) > 0.5
    errors = np.where(far, 4, 1) * (t - n) ** 2
    found = mse.Density.of(histogram).squared_errors(np.array([ends]), ASYMMETRIC)
    assert found[0] == pytest.approx(errors.sum() * scale**2, rel=0.02)


def test_ranges_are_the_same_with_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for values in (RNG.normal(size=9999), np.maximum(RNG.laplace(size=9999), 0), -RNG.random(777)):
        seen.append(stats.TensorStats())
        seen[-1].update(values.astype(np.float32))
    found = [choose(s, ASYMMETRIC, "mse") for s in seen]
    monkeypatch.setattr(range_errors, "native_function", lambda: None)
    assert found == [choose(s, ASYMMETRIC, "mse") for s in seen]


def test_edges_that_do_not_fill_the_sums_are_refused() -> None:
    function = range_errors.native_function()
    assert function is not None
    with pytest.raises(AssertionError, match="refuses 7 edges"):
        range_errors.by_native(function, np.zeros(7), np.zeros(7), np.ones((3, 1)), AREA)
