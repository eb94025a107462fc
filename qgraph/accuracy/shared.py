"""Many models with the same weights on disk: what they share is written once, and they point at it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qgraph import files, graph

DATA = "weights.bin"
ALIGNMENT = 4096
SMALL = 1024  # bytes; smaller tensors are written into each model
_MOST = 1 << 30  # bytes in one model file, which ends at 2 GB


class Shared:
    """A folder with the weights of a model, for variants of it that share its tensors.

    Args:
        model: its tensors must outlive this.
        folder: exists, and holds nothing else.
    """

    def __init__(self, model: ir.Model, folder: Path) -> None:
        self._model, self._folder, self._count = model, folder, 0
        self._places: dict[int, tuple[int, int]] = {}
        with (folder / DATA).open("wb") as file:
            for _, value in graph.initializers(model):
                tensor = value.const_value
                if tensor is None or not _can_lie_outside(tensor) or id(tensor) in self._places:
                    continue
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                offset = file.tell()
                file.write(tensor.tobytes())
                self._places[id(tensor)] = (offset, file.tell() - offset)

    def save(self, model: ir.Model) -> Path:
        """Write a variant, whose shared tensors point at the folder's file afterwards; returns its path."""
        own = 0
        for _, value in graph.initializers(model):
            tensor = value.const_value
            if tensor is None:
                continue
            if id(tensor) not in self._places:
                own += tensor.nbytes
                continue
            offset, length = self._places[id(tensor)]
            value.const_value = ir.ExternalTensor(
                DATA, offset, length, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=str(value.name), base_dir=self._folder,
            )  # fmt: skip
        self._count += 1
        path = self._folder / f"{self._count}.onnx"
        if own > _MOST:
            return files.save(model, path)
        path.write_bytes(ir.to_proto(model).SerializeToString())
        return path


def _can_lie_outside(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype == ir.DataType.STRING:
        return False
    return isinstance(tensor, ir.ExternalTensor) or tensor.nbytes >= SMALL
