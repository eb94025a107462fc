"""The recipe `auto` with data: every class of operators gets the form that measured best on this machine.

    classes   operators of one kind and shape, the forms they may have, and the rules that say so
    timing    times of models that take turns, in processor seconds
    choosing  uniform variants → class by class → accuracy
    speed     the finished model against the float model, and where its time goes

What was chosen is an ordinary recipe: the report holds it, and `--recipe report.json` makes the same file without
measuring.
"""

from __future__ import annotations

from qgraph.auto.choosing import TIMED_UNDER, Choice, choose
from qgraph.auto.classes import calibrated, is_measured, observing
from qgraph.auto.speed import Speed, measure

__all__ = [
    "TIMED_UNDER",
    "Choice",
    "Speed",
    "calibrated",
    "choose",
    "is_measured",
    "measure",
    "observing",
]
