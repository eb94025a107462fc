"""Means, intervals and JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qgraph.evaluate import statistics


def meter(sums: list[float], counts: list[int]) -> statistics.MeanMeter:
    result = statistics.MeanMeter()
    for total, count in zip(sums, counts, strict=True):
        result.add(total, count)
    return result


def test_mean_weighs_predictions_not_samples() -> None:
    assert meter([2, 30], [2, 10]).estimate().value == 32 / 12
    assert meter([2, 0], [2, 0]).counts == [2]


def test_interval_matches_theory() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = meter(list(values), [1] * 400).estimate()
    error = values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_interval_counts_whole_samples() -> None:
    # Ten samples of 100 equal predictions say no more than ten predictions.
    values = [float(v) for v in range(10)]
    grouped = meter([100 * v for v in values], [100] * 10).estimate()
    assert grouped == meter(values, [1] * 10).estimate()


def test_seed_decides() -> None:
    one = meter([0.1, 0.27, 3.3, 4.4, 5.123], [1, 2, 3, 2, 1])
    assert one.estimate(3) == one.estimate(3)
    assert one.estimate(3) != one.estimate(4)


def test_no_interval_without_two_finite_samples() -> None:
    assert meter([3], [2]).estimate() == statistics.Estimate(1.5, None, None)
    assert meter([1, math.inf], [1, 1]).estimate() == statistics.Estimate(math.inf, None, None)
    assert math.isnan(meter([], []).estimate().value)


def test_plain_is_strict_json() -> None:
    value = {"a": (math.inf, -math.inf, math.nan, 1.5), "b": statistics.Estimate(1, None, 2)}
    found = statistics.plain(value)
    expected = {"a": ["inf", "-inf", "nan", 1.5], "b": {"value": 1, "low": None, "high": 2}}
    assert found == expected
    json.dumps(found, allow_nan=False)
