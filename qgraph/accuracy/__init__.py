"""Accuracy control: when a floor is missed, find the fewest weights that must be given back, by measuring.

trials   the end of the pipeline under other rules
rungs    what a weight may be given back: more bits, wider activations, float
search   measured damage of each weight → an order → bisection

The result is a recipe with rules in front that pin what was given back, so it can be run again without a search.
"""

from __future__ import annotations

from qgraph.accuracy.rungs import RULE
from qgraph.accuracy.search import Outcome, Search, problem
from qgraph.accuracy.trials import Checkpoint, Trials

__all__ = ["RULE", "Checkpoint", "Outcome", "Search", "Trials", "problem"]
