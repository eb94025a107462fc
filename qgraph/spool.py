"""Where large arrays wait without using memory: an unnamed file, mapped."""

from __future__ import annotations

import os
import tempfile
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

ALIGNMENT = 4096


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
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115  it lives as long as what maps it
                    dir=self._folder, prefix="qgraph-"
                )
            offset = self._file.seek(0, os.SEEK_END)
            offset += -offset % ALIGNMENT
            self._file.seek(offset)
            self._file.write(data)
            self._file.flush()
            return np.memmap(
                self._file, dtype=data.dtype, mode="r", offset=offset, shape=data.shape
            )
        data = data.copy() if data.base is not None else data
        data.flags.writeable = False
        return data
