"""Where large arrays wait without using memory: an unnamed file, mapped."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qgraph import mapped, numerics
from qgraph.spec import Codes, QTensor, QuantSpec

ALIGNMENT = 4096

_PART = 1 << 20  # codes packed at a time


class Packed(QTensor):
    """A solved weight on a spool, as many bits per code as its type has.

    Attributes:
        packed: the codes of all rows as `numerics.pack` writes them, uint8, read-only.
    """

    packed: npt.NDArray[np.uint8]

    def __init__(self, q: QTensor, spool: Spool) -> None:
        zero_point = None if q.zero_point is None else spool.keep(q.zero_point)
        self._set(
            spec=q.spec,
            packed=spool.keep_codes(q.codes, q.spec.qtype.packed_bits),
            scale=spool.keep(q.scale),
            zero_point=zero_point,
            error=q.error,
            _shape=q.shape,
        )

    @staticmethod
    def restored(facts: Mapping[str, Any], arrays: Mapping[str, Any], spool: Spool) -> Packed:
        """What `facts` and `arrays` of another one tell, on a spool."""
        made = object.__new__(Packed)
        made._set(
            spec=QuantSpec.parse(facts["spec"]),
            error=float(facts["error"]),
            _shape=tuple(facts["shape"]),
            **{"zero_point": None, **{name: spool.keep(array) for name, array in arrays.items()}},
        )
        return made

    def _set(self, **values: Any) -> None:
        for name, value in values.items():  # frozen: nothing else may set them
            object.__setattr__(self, name, value)

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Codes as they are packed, scales and zero points, by name."""
        found: dict[str, npt.NDArray[Any]] = {"packed": self.packed, "scale": self.scale}
        return found if self.zero_point is None else {**found, "zero_point": self.zero_point}

    @property
    def facts(self) -> dict[str, Any]:
        """What is no array, as JSON can hold it."""
        return {"spec": str(self.spec), "error": self.error, "shape": list(self.shape)}

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        shape: tuple[int, int] = self.__dict__["_shape"]
        return shape

    @property
    def codes(self) -> Codes:
        """The codes [N, K], unpacked anew each time: hold them no longer than needed."""
        n, k = self.shape
        qtype = self.spec.qtype
        flat = numerics.unpack(self.packed, qtype.packed_bits, n * k, signed=qtype.is_signed)
        return flat.reshape(n, k)

    def stored_as(self, *, signed: bool) -> QTensor:
        """The same numbers with codes shifted into the signed or unsigned type of the same width, in memory."""
        if self.spec.qtype.is_signed == signed:
            return self
        plain = QTensor(self.spec, self.codes, self.scale, self.zero_point, self.error)
        return plain.stored_as(signed=signed)


def drop(q: QTensor) -> None:
    """Give back the pages of a weight on a spool; they are read again when they are needed."""
    for array in getattr(q, "arrays", {}).values():
        mapped.drop(array)


def gathered(found: Iterable[Packed]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of several weights under names of their own, for a work folder."""
    return {f"{i}.{name}": a for i, q in enumerate(found) for name, a in q.arrays.items()}


def restored(
    facts: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any], spool: Spool
) -> list[Packed]:
    """The weights that `gathered` gave the arrays of, from the facts of each."""
    found = []
    for index, each in enumerate(facts):
        prefix = f"{index}."
        own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        found.append(Packed.restored(each, own, spool))
    return found


class Spool:
    """Keeps solved weights in an unnamed file instead of memory; arrays come back memory-mapped and read-only.

    The file has no name in any folder, so it disappears with the last array that maps it, even after a crash.
    """

    KEEP_UNDER: ClassVar[int] = 1 << 20

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = folder
        self._file: Any = None

    def keep(self, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The same data, read-only; from the file if it is large."""
        data = np.asarray(data, order="C")  # ascontiguousarray would make a scalar a vector
        if data.nbytes >= self.KEEP_UNDER:
            offset = self._start()
            self._file.write(data)
            return self._mapped(offset, data.dtype, data.shape)
        data = data.copy() if data.base is not None else data
        data.flags.writeable = False
        return data

    def keep_codes(self, codes: Codes, bits: int) -> npt.NDArray[np.uint8]:
        """`numerics.pack` of codes [N, K], read-only; from the file if it is large, and packed part by part."""
        flat: Any = np.ascontiguousarray(codes).reshape(-1)
        nbytes = -(-flat.size * bits // 8)
        if nbytes < self.KEEP_UNDER:
            return self.keep(numerics.pack(flat, bits))
        offset = self._start()
        for start in range(0, flat.size, _PART):
            self._file.write(numerics.pack(flat[start : start + _PART], bits))
        return self._mapped(offset, np.uint8, (nbytes,))

    def _start(self) -> int:
        """The aligned end of the file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115  it lives as long as what maps it
                dir=self._folder, prefix="qgraph-"
            )
        offset = int(self._file.seek(0, os.SEEK_END))
        return int(self._file.seek(offset + -offset % ALIGNMENT))

    def _mapped(self, offset: int, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        self._file.flush()
        return np.memmap(self._file, dtype=dtype, mode="r", offset=offset, shape=shape)
