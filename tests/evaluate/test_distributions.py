"""KL divergence and agreement against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qgraph.evaluate import distributions as d

HALF = np.log([[0.5, 0.5]])
QUARTER = np.log([[0.75, 0.25]])
# 1/2 ln(1/2 : 3/4) + 1/2 ln(1/2 : 1/4) = 1/2 ln(2/3 * 2)
KL = 0.5 * math.log(4 / 3)


def test_log_softmax_of_large_logits() -> None:
    np.testing.assert_allclose(d.log_softmax([1000.0, 1000 + math.log(3)]), np.log([0.25, 0.75]))
    assert d.log_softmax(np.zeros((2, 8), np.float32)).dtype == np.float64


def test_kl_by_hand() -> None:
    assert d.kl_divergence(HALF, QUARTER)[0] == pytest.approx(KL, abs=1e-15)
    assert d.kl_divergence(HALF, HALF)[0] == 0


def test_kl_where_a_class_is_impossible() -> None:
    sure = d.log_softmax([[0.0, -np.inf]])
    assert d.kl_divergence(sure, HALF)[0] == pytest.approx(math.log(2))
    assert d.kl_divergence(sure, sure)[0] == 0
    assert d.kl_divergence(HALF, sure)[0] == np.inf


@pytest.mark.parametrize("shift", [0, 7])
def test_meter_on_logits(shift: float) -> None:
    meter = d.DivergenceMeter()
    meter.add(np.float32(HALF) + shift, np.float32(QUARTER))
    meter.add(np.float32(QUARTER) + shift, np.float32(QUARTER[:, ::-1]))
    other = 0.5 * math.log(3)  # (3/4 - 1/4) ln 3
    found = meter.result()
    assert meter.is_logits
    assert found.predictions == 2
    assert found.kl_mean.value == pytest.approx((KL + other) / 2, rel=1e-6)
    assert found.kl_max == pytest.approx(other, rel=1e-6)
    assert found.kl_p99 == pytest.approx(KL + 0.99 * (other - KL), rel=1e-6)
    assert found.agreement.value == 0.5


def test_meter_on_probabilities() -> None:
    meter = d.DivergenceMeter()
    meter.add(np.array([0.5, 0.5]), np.array([0.75, 0.25]))
    assert not meter.is_logits
    assert meter.result().kl_mean.value == pytest.approx(KL)


def test_probabilities_that_are_quantized_to_zero_stay_finite() -> None:
    meter = d.DivergenceMeter()
    meter.add(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    # 1/2 ln(1/2) + 1/2 (ln(1/2) + 24 ln 2)
    assert meter.result().kl_max == pytest.approx(11 * math.log(2), rel=1e-6)


def test_the_first_float_sample_decides_for_all() -> None:
    meter = d.DivergenceMeter()
    meter.add(np.array([3.0, -1.0]), np.array([3.0, -1.0]))
    meter.add(np.array([0.5, 0.5]), np.array([0.5, 0.5]))
    assert meter.is_logits


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[0.2, 0.8]], True), ([[0.2, 0.7]], False), ([[-0.5, 1.5]], False), ([], False)],
)
def test_is_probability(values: list[float], expected: bool) -> None:
    assert d.is_probability(np.array(values)) is expected


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 3, 17, 5))
    whole, cut = d.DivergenceMeter(), d.DivergenceMeter()
    whole.add(p, q)
    monkeypatch.setattr(d, "CHUNK", 20)
    cut.add(p, q)
    assert len(list(d.row_chunks(51, 5))) == 13
    assert whole.result() == cut.result()


def test_nothing_is_nan() -> None:
    assert math.isnan(d.DivergenceMeter().result().kl_mean.value)
