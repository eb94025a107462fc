"""What calibration remembers of a tensor, and how a grid is chosen from it.

Every observer is a few sums that are exact to merge, so shards of the data, in any order, give the same grids:

    histogram          floats counted by the upper 16 bits of their pattern: serves every range method
    minimum, maximum   of everything, and their averages over samples (moving average without an order)
    channel_absmax     largest magnitude of each channel
    channel_mean       mean of each channel
    gram               Σ xᵀx over rows, what GPTQ and its kin call the Hessian
"""

from __future__ import annotations

from qgraph.observers.histogram import FloatHistogram
from qgraph.observers.ranges import METHODS, Grid, NoGrid, choose
from qgraph.observers.stats import Choice, Stats, TensorStats, Wanted

__all__ = [
    "METHODS",
    "Choice",
    "FloatHistogram",
    "Grid",
    "NoGrid",
    "Stats",
    "TensorStats",
    "Wanted",
    "choose",
]
