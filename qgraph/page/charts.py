"""Plots as small SVG: they take the page's colours, scale with it, and have a text for each mark.

A plot is a figure: what it shows, the drawing with a description for screen readers, and a line that tells of the mark
under the pointer. The tables of the page hold the same numbers.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.page import numbers
from qgraph.page.elements import el
from qgraph.report import megabytes

WIDTH, HEIGHT = 1000.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 8.0, 10.0, 30.0
COLOURS = 8


@dataclass(frozen=True, slots=True)
class Mark:
    """One thing in a plot.

    Attributes:
        told: what stands there, in words.
        value: what is drawn.
        before: what it was, where the plot shows both.
        kind: which entry of the legend it belongs to.
        row: id of its row in the ledger, "" for none.
    """

    told: str
    value: float
    before: float = 0.0
    kind: int = 0
    row: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """One choice on a Pareto plot: what it costs (x), what it loses (y), and its name."""

    x: float
    y: float
    told: str
    is_chosen: bool = False
    is_front: bool = True


def figure(
    title: str, explanation: str, drawing: ET.Element, *, legend: ET.Element | None = None
) -> ET.Element:
    """A plot with its caption, legend and the line that tells of single marks."""
    is_pointed = "pointed" in str(drawing.get("class")).split()
    return el(
        "figure",
        el("figcaption", title, el("span", explanation, class_="soft")),
        legend,
        el("div", drawing, class_="plot"),
        el("output", "\u00a0", class_="readout") if is_pointed else None,
    )


def legend(entries: Sequence[tuple[str, str]]) -> ET.Element:
    """Colours and what they stand for: (class of the swatch, text)."""
    return el(
        "ul",
        [el("li", _swatch(colour), text) for colour, text in entries],
        class_="legend",
    )


def _swatch(colour: str) -> ET.Element:
    square = el("rect", width=10, height=10, rx=2, class_=colour)
    return el("svg", square, viewBox="0 0 10 10", class_="swatch", aria_hidden="true")


def colour(kind: int) -> str:
    """The class of a kind's colour."""
    return f"f{min(kind, COLOURS - 1)}"


def _plot(
    description: str, parts: Sequence[ET.Element], *, classes: str, height: float
) -> ET.Element:
    return el(
        "svg",
        parts,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_label=description,
        tabindex="0" if "pointed" in classes else None,
        class_=f"chart {classes}".strip(),
    )


def _across(index: float, total: int) -> tuple[float, float]:
    """Left edge and width of a mark among `total`."""
    pitch = (WIDTH - LEFT - RIGHT) / max(total, 1)
    return LEFT + index * pitch, pitch


def _bar(x: float, pitch: float, y: float, height: float, class_: str) -> ET.Element:
    gap = min(0.22 * pitch, 3.0) if pitch > 2 else 0.0
    width = min(pitch - gap, 26.0)
    left = x + (pitch - width) / 2
    radius = 1.5 if width > 6 else None
    return el(
        "rect",
        x=_px(left),
        y=_px(y),
        width=_px(width),
        height=_px(height),
        rx=radius,
        class_=class_,
    )


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _mark(mark: Mark, x: float, pitch: float, shapes: Sequence[ET.Element]) -> ET.Element:
    hit = el(
        "rect", x=_px(x), y=_px(TOP), width=_px(pitch), height=_px(HEIGHT - TOP - BOTTOM),
        class_="hit",
    )  # fmt: skip
    return el("g", el("title", mark.told), hit, shapes, class_="mark", data_row=mark.row or None)


def _level(y: float, text: str, class_: str = "grid") -> list[ET.Element]:
    return [
        el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_px(y), y2=_px(y), class_=class_),
        el("text", text, x=LEFT - 8, y=_px(y + 4), text_anchor="end"),
    ]


def _order(total: int, what: str) -> list[ET.Element]:
    """The axis of things in the order of the model."""
    y = HEIGHT - 8
    return [
        el("text", f"{what} in the order of the model", x=LEFT, y=y),
        el("text", numbers.count(total, what[:-1]), x=WIDTH - RIGHT, y=y, text_anchor="end"),
    ]


def errors(marks: Sequence[Mark], description: str, *, what: str = "weights") -> ET.Element:
    """Bars from 0 dB up: signal to noise of each weight or value; inf reaches the top."""
    finite = numbers.finite(m.value for m in marks)
    levels = numbers.ticks(0.0, max([*finite, 10.0]))
    top = levels[-1]

    def height(value: float) -> float:
        share = min(max(value / top, 0.0), 1.0) if not math.isnan(value) else 0.0
        return share * (HEIGHT - TOP - BOTTOM)

    parts: list[ET.Element] = []
    for level in levels:
        class_ = "axis" if level == 0 else "grid"
        parts += _level(HEIGHT - BOTTOM - height(level), f"{level:g} dB", class_)
    for index, mark in enumerate(marks):
        x, pitch = _across(index, len(marks))
        tall = max(height(mark.value), 1.0)
        shape = _bar(x, pitch, HEIGHT - BOTTOM - tall, tall, colour(mark.kind))
        parts.append(_mark(mark, x, pitch, [shape]))
    parts += _order(len(marks), what)
    classes = "pointed jump" if any(m.row for m in marks) else "pointed"
    return _plot(description, parts, classes=classes, height=HEIGHT)


def sizes(marks: Sequence[Mark], description: str) -> ET.Element:
    """Bars of bytes: what each weight took before, and in front of it what it takes now."""
    levels = numbers.ticks(
        0.0, max([m.before for m in marks] + [m.value for m in marks] + [1.0]), 5
    )

    def height(value: float) -> float:
        return value / levels[-1] * (HEIGHT - TOP - BOTTOM)

    parts: list[ET.Element] = []
    for level in levels:
        class_ = "axis" if level == 0 else "grid"
        parts += _level(HEIGHT - BOTTOM - height(level), megabytes(int(level)), class_)
    for index, mark in enumerate(marks):
        x, pitch = _across(index, len(marks))
        shapes = [
            _bar(x, pitch, HEIGHT - BOTTOM - tall, tall, class_)
            for tall, class_ in (
                (height(mark.before), "before"),
                (height(mark.value), colour(mark.kind)),
            )
        ]
        parts.append(_mark(mark, x, pitch, shapes))
    parts += _order(len(marks), "weights")
    return _plot(description, parts, classes="pointed jump", height=HEIGHT)


def stacked(
    rows: Sequence[tuple[str, Sequence[tuple[str, int, str]]]], description: str
) -> ET.Element:
    """Rows of bytes end to end, all to one scale: (name, [(what, bytes, class of its colour)])."""
    longest = max(sum(size for _, size, _ in pieces) for _, pieces in rows) or 1
    room, tall, pitch = WIDTH - LEFT - 90.0, 30.0, 44.0
    parts: list[ET.Element] = []
    for index, (name, pieces) in enumerate(rows):
        y, x = index * pitch + 4, LEFT
        parts.append(el("text", name, x=LEFT - 8, y=_px(y + 19), text_anchor="end", class_="label"))
        for what, size, class_ in pieces:
            width = size / longest * room
            told = f"{what}: {megabytes(size)}"
            box = el(
                "rect",
                el("title", told),
                x=_px(x),
                y=_px(y),
                width=_px(width),
                height=tall,
                class_=class_,
            )
            parts.append(box)
            if width > 8.0 * len(what) + 8 and class_ != "before":
                parts.append(el("text", what, x=_px(x + 8), y=_px(y + 19), class_="inside"))
            x += width
        total = sum(size for _, size, _ in pieces)
        parts.append(el("text", megabytes(total), x=_px(x + 8), y=_px(y + 19), class_="label"))
    return _plot(description, parts, classes="", height=pitch * len(rows))


def shifts(marks: Sequence[Mark], description: str) -> ET.Element:
    """What each was (ring) and is (dot), on a logarithmic axis of ratios; every value at least 1."""
    ends = [v for m in marks for v in (m.before, m.value) if math.isfinite(v) and v > 0]
    levels = numbers.decades(min([*ends, 1.0]), max([*ends, 10.0]))
    low, span = math.log10(levels[0]), math.log10(levels[-1] / levels[0])

    def at(value: float) -> float:
        share = (math.log10(value) - low) / span if 0 < value < math.inf else float(value > 0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts: list[ET.Element] = []
    for level in levels:
        parts += _level(at(level), f"{level:g}x", "axis" if level == levels[0] else "grid")
    for index, mark in enumerate(marks):
        x, pitch = _across(index, len(marks))
        centre, radius = _px(x + pitch / 2), min(max(pitch / 2.6, 1.2), 5.0)
        shapes = [
            el("line", x1=centre, x2=centre, y1=_px(at(mark.before)), y2=_px(at(mark.value)), class_="link"),
            el("circle", cx=centre, cy=_px(at(mark.before)), r=_px(radius), class_="ring"),
            el("circle", cx=centre, cy=_px(at(mark.value)), r=_px(radius), class_=colour(mark.kind)),
        ]  # fmt: skip
        parts.append(_mark(mark, x, pitch, shapes))
    parts += _order(len(marks), "activations")
    return _plot(description, parts, classes="pointed", height=HEIGHT)


def pareto(points: Sequence[Point], x_name: str, y_name: str, description: str) -> ET.Element:
    """Choices by cost (x, linear) and loss (y, logarithmic); the front as a line, the chosen one ringed."""
    tall = 320.0
    xs = numbers.ticks(min(p.x for p in points), max(p.x for p in points), 7)
    positive = [p.y for p in points if 0 < p.y < math.inf] or [1.0]
    ys = numbers.decades(min(positive), max(positive))
    low, span = math.log10(ys[0]), math.log10(ys[-1] / ys[0])

    def across(value: float) -> float:
        return LEFT + 14 + (value - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT - 40)

    def up(value: float) -> float:
        share = (math.log10(value) - low) / span if value > 0 else 0.0
        return tall - 48 - min(share, 1.0) * (tall - 48 - TOP)

    parts: list[ET.Element] = []
    for level in ys:
        parts += _level(up(level), numbers.short(level), "axis" if level == ys[0] else "grid")
    for tick in xs:
        parts.append(
            el("text", f"{tick:g}", x=_px(across(tick)), y=tall - 28, text_anchor="middle")
        )
    parts.append(el("text", f"{x_name} →", x=WIDTH - RIGHT, y=tall - 8, text_anchor="end"))
    parts.append(el("text", f"vertical: {y_name}, less is better", x=LEFT, y=tall - 8))
    front = sorted((p for p in points if p.is_front), key=lambda p: p.x)
    line = " ".join(f"{_px(across(p.x))},{_px(up(p.y))}" for p in front)
    parts.append(el("polyline", points=line, class_="front"))
    for point in points:
        cx, cy = _px(across(point.x)), _px(up(point.y))
        shapes = [
            el("circle", cx=cx, cy=cy, r=11, class_="hit"),
            el("circle", cx=cx, cy=cy, r=4.5, class_=colour(0) if point.is_front else colour(7)),
        ]
        if point.is_chosen:
            shapes.append(el("circle", cx=cx, cy=cy, r=9, class_="chosen"))
            x, y = _px(across(point.x) + 13), _px(up(point.y) - 8)
            shapes.append(el("text", "chosen", x=x, y=y, class_="label"))
        parts.append(el("g", el("title", point.told), shapes, class_="mark"))
    return _plot(description, parts, classes="pointed", height=tall)
