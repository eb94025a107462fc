"""Reading a model file whose weights lie inside it, without reading the weights: they become views of the mapped file.

A protobuf message must otherwise be in memory twice while it is read, and once for as long as the model lives.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from qgraph import graph

LEAST = 1 << 16  # bytes; smaller weights are read
# Types whose elements lie in the file as numpy has them.
_PLAIN = frozenset(
    {
        ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT8, ir.DataType.UINT8,
        ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32, ir.DataType.UINT32, ir.DataType.INT64,
        ir.DataType.UINT64,
    }
)  # fmt: skip
# Numbers of protobuf fields in onnx.proto3.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_NAME, _TENSOR_RAW_DATA = 7, 5, 8, 9
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


Span: TypeAlias = tuple[int, int]  # from, to, in bytes of the file


@dataclass(frozen=True, slots=True)
class _Field:
    number: int
    kind: int
    start: int  # of the key
    body: int  # of the value
    end: int


def load(path: Path) -> ir.Model:
    """The model of a file. Where weights are mapped, the file may be replaced or removed but not overwritten.

    Raises:
        ValueError, google.protobuf.message.DecodeError: it is no ONNX model, or not all of it.
    """
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    places: dict[str, Span] = {}
    rest = b"".join(_without_weights(data, places))
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(rest))
    ir.external_data.set_base_dir(model.graph, path.parent)
    for name, (start, end) in places.items():
        value = model.graph.initializers[name]
        held = value.const_value
        if held is None or held.dtype not in _PLAIN or held.nbytes != end - start:
            raise ValueError(f"tensor {name!r} has {end - start} bytes, shape and type need others")
        flat = np.frombuffer(data, held.dtype.numpy(), held.size, start)
        view = flat.reshape(held.shape.numpy())
        value.const_value = ir.Tensor(view, dtype=held.dtype, name=name, doc_string=held.doc_string)
    return model


def release(model: ir.Model) -> None:
    """Give the pages of mapped weights back; they are read again when they are needed."""
    for _, value in graph.initializers(model):
        if isinstance(value.const_value, (ir.Tensor, ir.ExternalTensor)):
            drop(value.const_value.raw)


def drop(held: object) -> None:
    """Give back the pages of an array or buffer, where they are those of a mapped file."""
    while isinstance(held, (np.ndarray, memoryview)):
        held = held.base if isinstance(held, np.ndarray) else held.obj
    if isinstance(held, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        held.madvise(mmap.MADV_DONTNEED)


def _without_weights(data: mmap.mmap, places: dict[str, Span]) -> Iterator[bytes]:
    """The file without the bytes of large weights, whose places are added to `places`."""
    for field in _fields(data, 0, len(data)):
        if (field.number, field.kind) != (_MODEL_GRAPH, _LENGTH):
            yield data[field.start : field.end]
            continue
        pieces = []
        for inner in _fields(data, field.body, field.end):
            piece = None
            if (inner.number, inner.kind) == (_GRAPH_INITIALIZER, _LENGTH):
                piece = _without_data(data, inner, places)
            pieces.append(data[inner.start : inner.end] if piece is None else piece)
        body = b"".join(pieces)
        yield _key(_MODEL_GRAPH) + _varint(len(body)) + body


def _without_data(data: mmap.mmap, tensor: _Field, places: dict[str, Span]) -> bytes | None:
    """The tensor without its data, or None where it stays as it is."""
    if tensor.end - tensor.body < LEAST:
        return None
    fields = list(_fields(data, tensor.body, tensor.end))
    raw = [f for f in fields if f.number == _TENSOR_RAW_DATA and f.end - f.body >= LEAST]
    names = [f for f in fields if f.number == _TENSOR_NAME]
    if len(raw) != 1 or len(names) != 1 or not _is_plain(data, fields):
        return None
    name = data[names[0].body : names[0].end].decode()
    if name in places:
        return None
    places[name] = raw[0].body, raw[0].end
    body = b"".join(data[f.start : f.end] for f in fields if f is not raw[0])
    return _key(_GRAPH_INITIALIZER) + _varint(len(body)) + body


def _is_plain(data: mmap.mmap, fields: list[_Field]) -> bool:
    """Its elements are bytes of its own that numpy can read in place."""
    data_type, data_location = 2, 14
    given = {f.number: _read_varint(data, f.body, f.end)[0] for f in fields if f.kind == _VARINT}
    return given.get(data_type) in _PLAIN and not given.get(data_location)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    """The fields of a message, without looking into them."""
    at = start
    while at < end:
        key, body = _read_varint(data, at, end)
        kind = key & 7
        if kind == _LENGTH:
            length, body = _read_varint(data, body, end)
            stop = body + length
        elif kind == _VARINT:
            stop = _read_varint(data, body, end)[1]
        elif kind in (_FIXED64, _FIXED32):
            stop = body + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"byte {at} is no field of a protobuf message")
        if stop > end:
            raise ValueError(f"the field at byte {at} ends at byte {stop}, its message at {end}")
        yield _Field(key >> 3, kind, at, body, stop)
        at = stop


def _read_varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError(f"the message ends at byte {end}, within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"byte {at} is no field of a protobuf message")


def _key(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
