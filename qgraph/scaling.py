"""Where channels may be scaled so that what reads them is easier to quantize.

A site is a group of channels that `qgraph.symmetry` lets scale, all of whose readers are products with one channel
along one axis of their weight, or constant factors, where nothing is rounded: then the error of the products' outputs
can be measured on a few rows of their inputs. `smooth` and `awq` search such sites; they differ in the factors that
they try and in what they quantize to judge them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import graph, symmetry
from qgraph.symmetry import Group, Member

Doubles: TypeAlias = npt.NDArray[np.float64]

OUTPUTS = 1024  # output channels that an error is measured on
_FACTORS = ("Mul", "Div")  # by a constant per channel: takes a factor without error
_CHANNEL_AXIS = {"MatMul": -1, "Gemm": -1, "Conv": 1, "ConvTranspose": 1}


@dataclass
class Reader:
    """One weight that reads a group, and what it reads.

    Attributes:
        member: of the group.
        name: of the activation.
        axis: channel axis of the activation.
        at: for each of its channels which one of the group it is, [K]; -1 for channels of other groups.
    """

    member: Member
    name: str
    axis: int
    at: npt.NDArray[np.int64]

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel is convolved alone."""
        return _is_depthwise(self.member)

    def matrix(self) -> Doubles:
        """The weight as [N, P, K]: output channels, pixels of a kernel, input channels.

        That of a depthwise convolution is a diagonal with the norm of each channel's kernel: its errors count as much
        as those of the kernel, and rounded with one scale for each output channel it stays as it is.
        """
        array = np.asarray(graph.array(self.member.value), np.float64)
        if self.is_depthwise:
            norms = np.sqrt(np.square(array).reshape(len(self.at), -1).sum(axis=1))
            return np.diag(norms)[:, None, :]
        wide = int(np.argmax(self.member.labels.shape))
        moved = np.moveaxis(array, wide, -1)
        if self.member.node.op_type == "Conv":
            return moved.reshape(moved.shape[0], -1, moved.shape[-1])
        return moved.reshape(-1, 1, moved.shape[-1])


@dataclass
class Site:
    """A group of channels that may be scaled, with readers whose error can be measured."""

    group: Group
    readers: list[Reader] = field(default_factory=list)


def sites(model: ir.Model) -> list[Site]:
    """The sites of a canonical model, in graph order. Groups whose scale would copy a weight are none."""
    found = []
    for group in symmetry.groups(model, ["scale"]):
        if not group.legal or group.bounds or symmetry.would_copy(group):
            continue
        products = [m for m in group.readers if m.node.op_type not in _FACTORS]
        readers = [r for m in products if (r := _reader(group, m)) is not None]
        if readers and len(readers) == len(products):
            found.append(Site(group, readers))
    return found


def axes(found: list[Site]) -> dict[str, int]:
    """The channel axis of every activation that the sites' readers take, by name."""
    return {r.name: r.axis for s in found for r in s.readers}


def spread(factors: Doubles, at: npt.NDArray[np.int64]) -> Doubles:
    """Factors [C] of a group for all channels that a reader takes, [K]: 1 for those of other groups."""
    return np.where(at >= 0, factors[at], 1.0)


def largest(into: Doubles, at: npt.NDArray[np.int64], values: Doubles) -> None:
    """Raise `into` [C] to values [K] of a reader's channels, in place."""
    np.maximum.at(into, at[at >= 0], values[at >= 0])


def follow(taken: dict[str, Doubles], site: Site, factors: Doubles) -> None:
    """Scale the rows that were taken as the model was: other groups may be read with this one."""
    for reader in {r.name: r for r in site.readers}.values():
        taken[reader.name] = taken[reader.name] * spread(factors, reader.at)


def even(raw: Doubles, used: npt.NDArray[np.bool_]) -> Doubles:
    """Factors [C] with a geometric mean of 1 where `used`, 1 elsewhere."""
    factors = np.ones_like(raw)
    if used.any():
        factors[used] = raw[used] / np.exp(np.log(raw[used]).mean())
    return factors


def row_powers(y: Doubles) -> Doubles:
    """|y|² of each row of y [R, N]; 1 for rows of zeros: what errors of rows are relative to."""
    power = np.square(y).sum(axis=1)
    return np.where(power > 0, power, 1.0)


def _is_depthwise(member: Member) -> bool:
    is_conv = member.node.op_type == "Conv"
    return is_conv and int(graph.attribute(member.node, "group", 1)) > 1


def _reader(group: Group, member: Member) -> Reader | None:
    """A reader whose error can be judged; None for others (depthwise and grouped convolutions, gains)."""
    node = member.node
    axis = _CHANNEL_AXIS.get(node.op_type)
    at = group.positions(member)
    if axis is None or sum(n > 1 for n in at.shape) != 1:
        return None
    x = node.inputs[0]
    if x is None or not x.name or graph.is_constant(x) or member.index != 1:
        return None
    return Reader(member, str(x.name), axis, at.ravel())
