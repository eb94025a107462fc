"""Ranges: what each method promises, against references on the raw values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from qgraph import errors
from qgraph.observers import (
    METHODS,
    Choice,
    Grid,
    NoGrid,
    Stats,
    TensorStats,
    Wanted,
    choose,
    mse,
)
from qgraph.spec import QuantSpec

Floats = npt.NDArray[np.float32]
ASYMMETRIC, SYMMETRIC = (QuantSpec.parse(s) for s in ("uint8.tensor.asym", "int8.tensor.sym"))
RNG = np.random.default_rng(7)
VALUES = {
    "normal": RNG.normal(size=40_000),
    "laplace": RNG.laplace(2.0, 3.0, size=40_000),
    "relu": np.maximum(RNG.normal(size=40_000), 0),
    "relu6": np.clip(RNG.normal(3, 3, size=40_000), 0, 6),
    "tails": RNG.standard_t(3, size=40_000),
    "negative": -np.abs(RNG.normal(size=40_000)) * 1e-3,
}


def seen(*values: npt.ArrayLike) -> TensorStats:
    stats = TensorStats()
    for each in values:
        stats.update(np.asarray(each, np.float32))
    return stats


def grid(stats: TensorStats, spec: QuantSpec, method: str, **options: float) -> Grid:
    found = choose(stats, spec, method, **options)  # type: ignore[arg-type]
    assert isinstance(found, Grid), found
    return found


def error(x: npt.ArrayLike, g: Grid, clipped: float = 1.0) -> float:
    """Mean squared error; `clipped` weighs that of clipped values, beyond what rounding would do."""
    t = np.asarray(x, np.float32).astype(np.float64) / g.scale
    n = np.clip(np.rint(t) + g.zero_point, g.spec.qtype.qmin, g.spec.qtype.qmax) - g.zero_point
    weights = np.where(np.abs(t - n) > 0.5, clipped, 1.0)
    return float((weights * np.square(t - n)).mean() * g.scale**2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=str)
@pytest.mark.parametrize("kind", VALUES)
def test_zero_is_exact_and_the_range_is_sane(method: str, spec: QuantSpec, kind: str) -> None:
    x = VALUES[kind]
    g = grid(seen(x), spec, method)
    assert g.low <= 0 <= g.high
    assert spec.qtype.qmin <= g.zero_point <= spec.qtype.qmax
    assert g.zero_point == 0 or not spec.symmetric
    # Half a step for rounding the zero point, one for the code that symmetric grids have more.
    assert g.high <= np.abs(x).max() + g.scale
    assert g.low >= -np.abs(x).max() - 1.01 * g.scale
    assert np.float32(g.scale) == g.scale


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_mse_is_as_good_as_brute_force_on_the_values(kind: str, spec: QuantSpec) -> None:
    x = VALUES[kind].astype(np.float32)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    shares = np.linspace(0.3, 1.0, 36)
    best = np.inf
    for a in shares if low else [1.0]:
        for b in shares if high else [1.0]:
            ends = np.array([[low * a], [high * b]], np.float32)
            best = min(best, error(x, grid(seen(ends), spec, "min-max"), mse.CLIPPED))
    found = error(x, grid(seen(x), spec, "mse"), mse.CLIPPED)
    assert found <= 1.01 * best
    assert found <= 1.001 * error(x, grid(seen(x), spec, "min-max"), mse.CLIPPED)


def test_percentile_is_that_of_the_values() -> None:
    x = np.abs(VALUES["laplace"])
    g = grid(seen(x), ASYMMETRIC, "percentile", percentile=99.0)
    assert g.high == pytest.approx(np.percentile(x, 99.0), rel=1 / 128)
    signed = VALUES["normal"]
    g = grid(seen(signed), SYMMETRIC, "percentile", percentile=98.0)
    assert g.scale * 127 == pytest.approx(np.percentile(np.abs(signed), 98.0), rel=1 / 128)


def test_moving_average_is_the_mean_of_the_samples_extremes() -> None:
    g = grid(seen([0.0, 1.0], [-1.0, 3.0], [-2.0, 2.0]), ASYMMETRIC, "moving-average")
    assert g.scale == pytest.approx(3.0 / 255)
    assert g.zero_point == round(255 / 3)


@pytest.mark.parametrize("far", [-1e9, -3.4028235e38, -10_000.0])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
def test_masked_logits_get_no_grid(far: float, share: float) -> None:
    scores = RNG.normal(size=20_000) * 3
    masked = scores + np.where(RNG.random(scores.size) < share, far, 0)
    found = choose(seen(masked), ASYMMETRIC)
    assert isinstance(found, NoGrid)
    assert "sentinel" in found.reason
    clipped = choose(seen(masked), ASYMMETRIC, "min-max", clip_sentinels=True)
    assert isinstance(clipped, Grid)
    assert -20 < clipped.low < -1


def test_infinities_get_no_grid() -> None:
    found = choose(seen([1.0, -np.inf, np.nan]), ASYMMETRIC)
    assert isinstance(found, NoGrid)
    assert found.reason.startswith("2 of its values")
    assert isinstance(choose(seen([1.0, -np.inf]), ASYMMETRIC, clip_sentinels=True), Grid)
    assert isinstance(choose(seen([np.inf]), ASYMMETRIC, clip_sentinels=True), NoGrid)


@pytest.mark.parametrize("kind", VALUES)
def test_ordinary_tensors_hold_no_sentinels(kind: str) -> None:
    grid(seen(VALUES[kind] * 1e4), ASYMMETRIC, "mse")
    massive = 100 * np.abs(VALUES[kind]).max()
    grid(seen(np.append(VALUES[kind], massive) * 1e6), ASYMMETRIC, "mse")


def test_constant_and_unseen_tensors() -> None:
    assert grid(seen([0.0, 0.0]), ASYMMETRIC, "mse").scale == 1
    g = grid(seen([5.0, 5.0]), ASYMMETRIC, "mse")
    assert error([5.0], g) == pytest.approx(0, abs=1e-12)
    assert isinstance(choose(TensorStats(), ASYMMETRIC), NoGrid)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(errors.RecipeError, match="entropi"):
        choose(seen([1.0]), ASYMMETRIC, "entropi")
    with pytest.raises(errors.RecipeError, match="percentile"):
        choose(seen([1.0]), ASYMMETRIC, Choice("percentile", 10))


@pytest.mark.parametrize("method", METHODS)
def test_order_of_shards_means_nothing(method: str) -> None:
    shards = np.array_split(RNG.permutation(np.concatenate(list(VALUES.values()))), 13)
    forward, backward, whole = Stats(), Stats(), Stats()
    for each in shards:
        forward.merge(Stats({"x": seen(each)}))
    for each in shards[::-1]:
        backward.merge(Stats({"x": seen(each)}))
    whole = Stats({"x": seen(*shards)})
    grids = {choose(s["x"], ASYMMETRIC, method) for s in (forward, backward, whole)}
    assert len(grids) == 1


def test_saved_statistics_come_back(tmp_path: object) -> None:
    stats = TensorStats(Wanted(channel_axis=1, gram=True))
    stats.update(RNG.normal(size=(2, 3, 4)).astype(np.float32))
    stats.update(RNG.normal(size=(5, 3, 4)).astype(np.float32))
    path = f"{tmp_path}/s.npz"
    Stats({"a": stats}).save(path)
    back = Stats.load(path)["a"]
    assert {k: v.tobytes() for k, v in back.to_arrays().items()} == {
        k: v.tobytes() for k, v in stats.to_arrays().items()
    }
    assert back.wanted == stats.wanted


def test_channels_and_gram() -> None:
    stats = TensorStats(Wanted(channel_axis=1, gram=True))
    parts = [RNG.normal(size=(n, 3, 4)).astype(np.float32) for n in (2, 5)]
    for part in parts:
        stats.update(part)
    x = np.concatenate(parts)
    assert stats.channel_absmax is not None and stats.gram is not None
    assert np.array_equal(stats.channel_absmax, np.abs(x).max(axis=(0, 2)))
    np.testing.assert_allclose(stats.channel_mean, x.mean(axis=(0, 2), dtype=np.float64))
    rows = x.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(stats.gram, rows.T @ rows)
    assert stats.gram_rows == 21
