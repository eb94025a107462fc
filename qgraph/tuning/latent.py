"""Quantized weights as something that can be moved in small steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qgraph import numerics
from qgraph.gradients.rules import Array
from qgraph.spec import QTensor
from qgraph.weights import Weight

_BEGIN = 0.25  # how far from its code a weight may begin: farther, and the first steps change most codes at once
_INSIDE = 0.49  # how far out of its range a code may go
_LARGEST = 1e18  # of a gradient: its square is finite in float32


class Latent:
    """Codes that have fractions, scales and zero points of one weight.

        w = s (round(u) - round(z))     u: code and fraction [N, K], s = s0 exp(a), z: per block

    Gradients go through rounding as if it were not there (the straight-through estimator), and a code at the end of
    its range has none that would lead farther out. Scales move by factors, so that none changes sign. As in LSQ (Esser
    et al., ICLR 2020, arXiv:1902.08153) and EfficientQAT (Chen et al., ACL 2025, arXiv:2407.11062), without their
    scaling of gradients: Adam divides it out.

    Attributes:
        moved: the arrays that an optimizer changes in place: u, a and, if the spec has zero points, z.
    """

    def __init__(self, weight: Weight, solved: QTensor) -> None:
        self._weight, self._start = weight, solved
        spec = solved.spec
        codes = solved.codes.astype(np.float32)
        zero = (
            numerics.midpoint(spec)
            if solved.zero_point is None
            else self._spread(solved.zero_point)
        )
        # Where the float weight lies beside its code says which way it is easily moved.
        wanted = np.asarray(weight.read(), np.float32) / self._spread(solved.scale) + zero
        code = np.clip(wanted, codes - _BEGIN, codes + _BEGIN)
        self.moved: list[Array] = [code, np.zeros(solved.scale.shape, np.float32)]
        if solved.zero_point is not None:
            self.moved.append(solved.zero_point.astype(np.float32))

    def _spread(self, per_block: Array) -> Array:
        return numerics.expand(per_block.astype(np.float32), self._start.spec, *self._start.shape)

    def _codes(self) -> Array:
        qtype = self._start.spec.qtype
        return np.clip(np.rint(self.moved[0]), qtype.qmin, qtype.qmax)

    def _zero(self) -> Array | int:
        if len(self.moved) < 3:
            return numerics.midpoint(self._start.spec)
        return np.rint(self.moved[2])

    def _scale(self) -> Array:
        scale = self._start.scale * np.exp(self.moved[1])
        return numerics.to_scale(scale, self._start.spec)

    def _steps(self) -> Array:
        """Codes less zero points [N, K]."""
        zero = self._zero()
        return self._codes() - (zero if isinstance(zero, int) else self._spread(zero))

    def values(self) -> Array:
        """The weight tensor that the codes mean, float32, in the layout of the model."""
        matrix = self._steps() * self._spread(self._scale())
        return self._weight.matrix.back(matrix, self._weight.dims)

    def gradients(self, tensor: Array) -> list[Array]:
        """dL/d of what is moved, from dL/dw in the layout of the model."""
        g = self._weight.matrix.of(tensor)
        scaled = g * self._spread(self._scale())
        found = [scaled, self._blocks(scaled * self._steps())]
        if len(self.moved) > 2:
            found.append(-self._blocks(scaled))
        return found

    def _blocks(self, matrix: Array) -> Array:
        """Sums over the blocks."""
        spec = self._start.spec
        if spec.is_per_tensor:
            return np.asarray(matrix.sum(keepdims=True))
        starts = [0] if spec.group == 0 else np.arange(0, matrix.shape[1], spec.group)
        return np.asarray(np.add.reduceat(matrix, starts, axis=1))

    def confine(self) -> None:
        """Bring back what left its range."""
        qtype = self._start.spec.qtype
        np.clip(self.moved[0], qtype.qmin - _INSIDE, qtype.qmax + _INSIDE, out=self.moved[0])
        if len(self.moved) > 2:
            np.clip(self.moved[2], qtype.qmin, qtype.qmax, out=self.moved[2])

    def result(self) -> QTensor:
        """Codes, scales and zero points as they are now."""
        container = self._start.spec.qtype.container
        zero = self._zero()
        return QTensor(
            self._start.spec,
            self._codes().astype(container),
            self._scale(),
            None if isinstance(zero, int) else zero.astype(container),
        )


class Adam:
    """Adam (Kingma and Ba, ICLR 2015, arXiv:1412.6980) on arrays that are changed in place.

    Args:
        moved: the arrays.
        rates: the largest step of each array's elements.
    """

    def __init__(self, moved: Sequence[Array], rates: Sequence[float]) -> None:
        self._moved, self._rates = list(moved), list(rates)
        self._means = [np.zeros_like(m) for m in moved]
        self._powers = [np.zeros_like(m) for m in moved]
        self._count = 0

    def step(self, gradients: Sequence[Array], share: float) -> None:
        """Move by gradients, with `share` of the rates."""
        self._count += 1
        first, second = 0.9, 0.95
        for x, rate, mean, power, g in zip(
            self._moved, self._rates, self._means, self._powers, gradients, strict=True
        ):
            g = np.clip(g, -_LARGEST, _LARGEST)
            mean += (1 - first) * (g - mean)
            power += (1 - second) * (g * g - power)
            unbiased = mean / (1 - first**self._count)
            root = np.sqrt(power / (1 - second**self._count))
            x -= rate * share * unbiased / (root + 1e-12)
