"""Mixed precision: a format for every weight, such that a budget is kept and the outputs lose least.

items     weights that share a format, and the formats that the target takes for them
costs     the error of each weight in each format, under the second moments of its inputs
stretches running a large model with few of its weights in memory
mixtures  what a mixture of formats costs at the outputs, measured
losses    costs times measured gains
knapsack  the choice within a budget, exactly
swaps     the choice made better by measuring
choosing  all of them, until the written file fits and the floors hold
"""

from __future__ import annotations

from qgraph.mixed.asked import budgeted, is_mixed, require_data
from qgraph.mixed.choosing import BudgetMissed, Chooser
from qgraph.mixed.telling import RULE, Choice

__all__ = [
    "RULE",
    "BudgetMissed",
    "Choice",
    "Chooser",
    "budgeted",
    "is_mixed",
    "require_data",
]
