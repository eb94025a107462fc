"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable


def decibels(value: float | None) -> str:
    """A ratio in dB; "exact" where nothing was lost.

    >>> decibels(21.04), decibels(math.inf), decibels(None)
    ('21.0 dB', 'exact', '')
    """
    if value is None or math.isnan(value):
        return ""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def short(value: float | None) -> str:
    """Three significant digits.

    >>> short(0.001386), short(12345.0), short(None)
    ('0.00139', '1.23e+04', '')
    """
    return "" if value is None else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share as per cent.

    >>> percent(0.9315), percent(1.0), percent(0.0004)
    ('93.2 %', '100 %', '<0.1 %')
    """
    if share is None:
        return ""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def count(number: int, what: str) -> str:
    """A number and its noun.

    >>> count(1, "weight"), count(2000, "weight")
    ('1 weight', '2,000 weights')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that cover low..high: 1, 2 or 5 times a power of ten apart.

    >>> ticks(0.0, 47.0)
    [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Levels of a logarithmic axis that cover low..high, both positive: 1, 2, 5 of up to two powers of ten, or powers.

    >>> decades(0.03, 500.0)
    [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]
    >>> decades(1.0, 4.6)
    [1.0, 2.0, 5.0]
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    if last - first > 2:
        return [10.0**e for e in range(first, last + 1)]
    levels = [m * 10.0**e for e in range(first, last) for m in (1, 2, 5)] + [10.0**last]
    low_end = max(i for i, v in enumerate(levels) if v <= low * (1 + 1e-9) or i == 0)
    high_end = next(i for i, v in enumerate(levels) if v >= high * (1 - 1e-9))
    return levels[low_end : max(high_end, low_end + 1) + 1]


def finite(values: Iterable[float | None]) -> list[float]:
    """Those that are numbers."""
    return [v for v in values if v is not None and math.isfinite(v)]
