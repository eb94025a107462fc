"""ONNX Runtime sessions, with the operator libraries that a model needs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from qgraph import errors
from qgraph.runtime import library

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import onnxruntime

    Model: TypeAlias = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

DOMAIN = "ai.qgraph"
EXTENSION_DOMAINS = ("ai.onnx.contrib", "com.microsoft.extensions")

_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "off": "ORT_DISABLE_ALL",
}
LARGE = 512 << 20  # bytes of weights
# A part of what ONNX Runtime says, and what a person can do about it.
_HINTS = (
    ("Domain already set", "the session registers qgraph's operators itself; register them once"),
    ("is not a registered function/op", "pip install -U onnxruntime, or lower the model's opset"),
    ("Unsupported model IR version", "pip install -U onnxruntime, or save with a lower IR version"),
    ("till opset", "pip install -U onnxruntime, or convert the model to a lower opset"),
)


def session(
    model: Model,
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int | None = None,
    optimize: str = "all",
    accuracy_level: int | None = None,
    custom_ops: bool | None = None,
    optimized_model_path: str | os.PathLike[str] | None = None,
    config: Mapping[str, str] | None = None,
    in_file_order: bool = False,
    profile: str | os.PathLike[str] | None = None,
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session, with the operator libraries that the model needs.

    Args:
        model: a path, the bytes of a model, a ModelProto or an onnx_ir model; over 2 GB only a path.
        providers: execution providers, first choice first.
        threads: threads within an operator; None lets ONNX Runtime choose.
        optimize: "all", "extended", "basic" or "off".
        accuracy_level: for weights that ONNX Runtime turns into MatMulNBits by itself: 1 keeps float
            activations, 4 (its default) makes them int8.
        custom_ops: register qgraph's native operators; None does so if the model imports ai.qgraph.
            With False, such a model runs the ONNX function bodies that it carries.
        optimized_model_path: where ONNX Runtime writes the graph that it executes.
        config: further session configuration entries, e.g. {"session.disable_quant_qdq": "1"}.
        in_file_order: run nodes in the order of the file, as far as their inputs allow.
        profile: how the names of profile files begin, which `end_profiling` of the session writes; None for none.

    Raises:
        errors.RuntimeFailure: QG601 where ONNX Runtime refuses the model, QG603 to QG605 for the native
            library, QG606 without onnxruntime-extensions, QG607 for an unknown provider.
    """
    import onnxruntime

    if optimize not in _LEVELS:
        raise ValueError(f"optimize is {optimize!r}; {errors.nearest(optimize, _LEVELS)}")
    _require_providers(providers)
    given, where = _as_ort_input(model)
    domains = _imported_domains(given)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, _LEVELS[optimize]
    )
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized_model_path is not None:
        options.optimized_model_filepath = os.fspath(optimized_model_path)
    if in_file_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    entries = dict(config or {})
    if accuracy_level is not None:
        entries["session.qdq_matmulnbits_accuracy_level"] = str(accuracy_level)
    with _ort_errors(where):
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if custom_ops or (custom_ops is None and DOMAIN in domains):
            options.register_custom_ops_library(library.library_path())
        if domains & set(EXTENSION_DOMAINS):
            options.register_custom_ops_library(_extensions_path(where))
        return onnxruntime.InferenceSession(given, options, providers=list(providers))


def mapped_weights(nbytes: int) -> dict[str, str]:
    """Entries for sessions over a float model with so many bytes of weights in a file beside it.

    Kernels of large models read the mapped file: copies packed for them would be as large again, and no page of them
    could be given back. Not for quantized models: an unpacked MatMulNBits computes in float.
    """
    return {"session.disable_prepacking": "1"} if nbytes > LARGE else {}


def _require_providers(providers: Sequence[str]) -> None:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for name in providers:
        if name not in available:
            message = f"ONNX Runtime has no execution provider {name!r}"
            raise library.failure("QG607", "", message, errors.nearest(name, available))


def _as_ort_input(model: Model) -> tuple[str | bytes, str]:
    """What InferenceSession takes, and how messages call it."""
    import onnx

    if isinstance(model, bytes):
        return model, "the model"
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        if not path.startswith("zoo:"):
            return path, path
    elif isinstance(model, onnx.ModelProto):
        return _serialized(model), model.graph.name or "the model"
    from qgraph import files

    proto = files.to_proto(files.load(model))
    return _serialized(proto), proto.graph.name or "the model"


def _serialized(proto: onnx.ModelProto) -> bytes:
    if proto.ByteSize() >= 2**31:
        message = "the model is larger than 2 GB, which only a file with external data can hold"
        raise library.failure("QG601", proto.graph.name, message, "save it and pass the path")
    serialized: bytes = proto.SerializeToString()
    return serialized


def _imported_domains(model: str | bytes) -> set[str]:
    """Domains that a model imports, read from the outermost fields of the file; empty if unreadable."""
    try:
        with io.BytesIO(model) if isinstance(model, bytes) else open(model, "rb") as stream:
            return set(_opset_domains(stream))
    except (OSError, EOFError, ValueError):
        return set()  # ONNX Runtime reads the same file next and says what is wrong with it


def _opset_domains(stream: BinaryIO) -> Iterator[str]:
    """ModelProto.opset_import[*].domain, without reading the graph: a file may hold gigabytes."""
    opset_import, domain, varint, chunk = 8, 1, 0, 2
    while (field := _read_field(stream)) is not None:
        number, kind, length = field
        if kind == chunk and number == opset_import:
            inner = io.BytesIO(stream.read(length))
            while (entry := _read_field(inner)) is not None:
                if entry[:2] == (domain, chunk):
                    yield inner.read(entry[2]).decode()
                elif entry[1] != varint:
                    inner.seek(entry[2], io.SEEK_CUR)
        elif kind != varint:
            stream.seek(length, io.SEEK_CUR)


def _read_field(stream: BinaryIO) -> tuple[int, int, int] | None:
    """Number, wire type and length of the next protobuf field (a varint is consumed); None at the end."""
    if (key := _read_varint(stream)) is None:
        return None
    fixed = {1: 8, 5: 4}
    kind = key & 7
    if kind in (0, 2):
        length = _read_varint(stream)
        if length is None:
            raise EOFError
        return key >> 3, kind, length
    if kind not in fixed:
        raise ValueError("not a protobuf message")
    return key >> 3, kind, fixed[kind]


def _read_varint(stream: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("not a protobuf message")


def _extensions_path(where: str) -> str:
    try:
        extensions = importlib.import_module("onnxruntime_extensions")
    except ImportError as e:
        message = "the model uses operators of onnxruntime-extensions, which is not installed"
        raise library.failure("QG606", where, message, 'pip install "qgraph[extensions]"') from e
    return str(extensions.get_library_path())


@contextlib.contextmanager
def _ort_errors(where: str) -> Iterator[None]:
    try:
        yield
    except _ort_exceptions() as e:
        text = str(e)
        hint = next((advice for part, advice in _HINTS if part in text), "")
        raise library.failure("QG601", where, f"ONNX Runtime refuses it: {text}", hint) from e


@functools.cache
def _ort_exceptions() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = [value for value in vars(state).values() if isinstance(value, type)]
    return (*(c for c in found if issubclass(c, Exception)), RuntimeError)
