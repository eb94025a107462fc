"""Channel symmetries: which transforms of a tensor's channels leave the function unchanged, and how to apply them.

Smoothing, cross-layer equalization, channel permutation and rotation are one move: transform the channels of an
activation, and undo that in what reads them. ONNX has no reliable names, so the places are derived from dataflow:

    for group in symmetry.groups(model, ["scale"]):
        if group.legal:
            symmetry.scale(model, group, factors)      # factors [group.size]

Files: `channels` has the algebra, `elementwise`, `linear`, `attention`, `norms` and `shapes` have one rule per kind of
operator, `groups` collects what belongs together, `folds` changes the constants.
"""

from __future__ import annotations

from qgraph.symmetry.channels import Gain, Kind, Member
from qgraph.symmetry.folds import (
    Folded,
    absorb_gains,
    bounds_of,
    keep_mean,
    permute,
    rotate,
    scale,
    would_copy,
)
from qgraph.symmetry.groups import KINDS, Group, groups

__all__ = [
    "KINDS",
    "Folded",
    "Gain",
    "Group",
    "Kind",
    "Member",
    "absorb_gains",
    "bounds_of",
    "groups",
    "keep_mean",
    "permute",
    "rotate",
    "scale",
    "would_copy",
]
