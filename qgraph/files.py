"""Models in and out: load with clear refusals, save atomically, keep big arrays out of memory.

Weights stay memory-mapped from load to save. Nothing half-written is ever visible under the name that was asked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

from qgraph import errors, graph, mapped

Source: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model"

EXTERNAL_OVER = (
    256 << 20
)  # larger models put their weights in a file beside the model, so that runtimes can map it
MAPPED_OVER = 1 << 20  # weights of larger files are not read with them
INLINE_UNDER = (
    1024  # shape and scale constants stay in the model: ORT's shape inference reads them there
)
ALIGNMENT = 4096
RELEASED = 256 << 20  # bytes of mapped weights that are read before their pages are given back
IN_FLIGHT = 64 << 20  # bytes of lazy tensors that wait to be written
MAX_IR_VERSION = 13

Progress = Callable[[str, float], None]


def load(source: Source) -> ir.Model:
    """A private copy of a model, sorted and with every node named; the source is never modified.

    Args:
        source: path, "zoo:NAME" for a reference model, ModelProto or onnx_ir.Model.

    Raises:
        errors.InputError: QG101 missing, QG102 not ONNX or truncated, QG103 external data, QG104 invalid graph.
    """
    if isinstance(source, ir.Model):
        model = graph.clone(source) if _is_sorted(source) else _sorted_copy(source)
    elif isinstance(source, onnx.ModelProto):
        model = _deserialize(lambda: ir.from_proto(source), "ModelProto")
    elif str(source).startswith("zoo:"):
        model = _zoo(str(source)[4:])
    else:
        model = _read(Path(os.fspath(source)))
    for each in graph.graphs(model):
        with _invalid_graph():
            each.sort()
    graph.require_unique_names(model)
    return model


def _is_sorted(model: ir.Model) -> bool:
    seen: set[ir.Node] = set()
    for node in model.graph:
        if any(
            (p := v.producer()) is not None and p.graph is model.graph and p not in seen
            for v in node.inputs
            if v
        ):
            return False
        seen.add(node)
    return True


def _sorted_copy(model: ir.Model) -> ir.Model:
    # onnx_ir refuses to clone an unsorted graph, and sorting the caller's model would modify it.
    return ir.from_proto(ir.to_proto(model))


def _zoo(name: str) -> ir.Model:
    from qgraph import models

    try:
        return models.build(name)
    except ValueError as e:
        raise errors.InputError(
            errors.Diagnostic("error", "QG101", f"zoo:{name}", str(e), "see: qgraph models")
        ) from e


def _read(path: Path) -> ir.Model:
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        near = (
            errors.nearest(path.name, [p.name for p in path.parent.glob("*.onnx")])
            if path.parent.is_dir()
            else ""
        )
        hint = (
            f"in {path.parent}: {near}"
            if near.startswith("did")
            else "give the path of an .onnx file or zoo:NAME"
        )
        raise errors.InputError(errors.Diagnostic("error", "QG101", str(path), what, hint))
    if not os.access(path, os.R_OK):
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG101", str(path), "cannot be read", "check its permissions"
            )
        )
    is_mapped = path.suffix == ".onnx" and path.stat().st_size >= MAPPED_OVER
    model = _deserialize(lambda: mapped.load(path) if is_mapped else ir.load(path), str(path))
    _check_external(model, path)
    return model


def _deserialize(read: Callable[[], ir.Model], where: str) -> ir.Model:
    try:
        model = read()
    except (
        Exception
    ) as e:  # protobuf, onnx_ir and the OS each raise their own kinds; all mean "cannot be read"
        root: BaseException = e
        while root.__cause__ is not None:
            root = root.__cause__
        reason = (str(root).strip().splitlines() or [type(root).__name__])[0][:300]
        raise errors.InputError(
            errors.Diagnostic(
                "error",
                "QG102",
                where,
                f"is not a readable ONNX model: {reason}",
                "is the file complete? export or copy it again",
            )
        ) from e
    if not model.graph.outputs:
        raise errors.InputError(
            errors.Diagnostic(
                "error",
                "QG102",
                where,
                "holds no graph with outputs, so it is not an ONNX model",
                "is the file complete?",
            )
        )
    return model


def _check_external(model: ir.Model, path: Path) -> None:
    """Refuse external data that is missing, too short or outside the model's folder, before anything maps it."""
    folder = path.parent.resolve()
    tensors = [v.const_value for g in graph.graphs(model) for v in g.initializers.values()]
    tensors += [
        a.as_tensor()
        for n in graph.nodes(model)
        for a in n.attributes.values()
        if a.type == ir.AttributeType.TENSOR and not a.is_ref()
    ]
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = str(tensor.location)
        problem = hint = ""
        target = (folder / location).resolve()
        if os.path.isabs(location) or not target.is_relative_to(folder):
            problem, hint = (
                "points outside the model's folder; refused",
                "external data must lie beside the model",
            )
        elif not target.is_file():
            problem, hint = (
                "does not exist",
                "copy the data file to the model's folder, under this name",
            )
        else:
            size = sizes.setdefault(location, target.stat().st_size)
            end = (tensor.offset or 0) + tensor.nbytes
            declared = tensor.length
            if end > size:
                problem, hint = (
                    f"has {size} bytes, tensor {tensor.name!r} needs up to byte {end}",
                    "the file is truncated: copy it again",
                )
            elif declared is not None and declared != tensor.nbytes:
                problem = (
                    f"declares {declared} bytes for tensor {tensor.name!r} of {tensor.nbytes} bytes"
                )
                hint = "shape, type and length disagree: export the model again"
        if problem:
            raise errors.InputError(
                errors.Diagnostic(
                    "error", "QG103", f"external data {location!r} of {path.name}", problem, hint
                )
            )


@contextlib.contextmanager
def _invalid_graph() -> Iterator[None]:
    try:
        yield
    except ValueError as e:
        raise errors.InputError(
            errors.Diagnostic(
                "error",
                "QG104",
                "",
                f"the graph is invalid: {e}",
                "onnx.checker.check_model tells more",
            )
        ) from e


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Refuse an output path before any work is done on it.

    Raises:
        errors.InputError: QG105 where it exists (and not `force`), is a folder, or its folder cannot be written.
    """
    target = Path(os.fspath(path))
    problem = hint = ""
    if target.is_dir():
        problem, hint = "is a directory", "give a file name, e.g. model.q.onnx"
    elif target.exists() and not force:
        problem, hint = (
            "exists already",
            "pass --force (force=True) to replace it, or give another name",
        )
    elif not force and (data := target.with_name(target.name + ".data")).exists():
        problem = f"would be saved beside {data.name}, which exists already"
        hint = "pass --force (force=True) to replace both, or give another name"
    elif not target.parent.is_dir():
        problem, hint = (
            f"cannot be written: there is no folder {str(target.parent)!r}",
            "create the folder first",
        )
    elif not os.access(target.parent, os.W_OK):
        problem, hint = (
            f"cannot be written: folder {str(target.parent)!r} is read-only",
            "choose another folder",
        )
    if problem:
        raise errors.InputError(errors.Diagnostic("error", "QG105", str(target), problem, hint))
    return target


def check_apart(output: Path | None, source: Source, model: ir.Model) -> None:
    """Refuse, even with `force`, an output that would replace files of the model that is read."""
    tensors = (v.const_value for _, v in graph.initializers(model))
    held = {Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}
    if isinstance(source, (str, os.PathLike)):
        held.add(Path(os.fspath(source)).resolve())
    for written in (output, output.with_name(output.name + ".data")) if output else ():
        if written.resolve() in held:
            text = "belongs to the float model, which is never overwritten"
            raise errors.InputError(
                errors.Diagnostic("error", "QG105", str(written), text, "give another name")
            )


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    external_data: bool | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a model, atomically: under a temporary name in the same folder, then renamed.

    Args:
        model: left unchanged; lazy tensors are computed while writing, a few at a time.
        path: where to; weights go to PATH.data beside it if external.
        force: replace an existing file.
        external_data: put weights in PATH.data, 4096-byte aligned; default: only over 256 MB.
        progress: called with a tensor's name and the share that is done, 0..1.

    Raises:
        errors.InputError: QG105 for a path that cannot be written.
    """
    target = check_output(path, force=force)
    total = weight_bytes(model)
    if external_data is None:
        external_data = total > EXTERNAL_OVER
    done = 0

    def report(tensor: ir.TensorProtocol, _: Any) -> None:
        nonlocal done
        if done % RELEASED + tensor.nbytes >= RELEASED:
            mapped.release(model)
        done += tensor.nbytes
        if progress is not None:
            progress(tensor.name or "", min(1.0, done / max(total, 1)))

    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        data_name = target.name + ".data"
        if external_data:
            ir.save(
                model,
                scratch / target.name,
                external_data=data_name,
                size_threshold_bytes=INLINE_UNDER,
                callback=report,
                max_workers=os.cpu_count(),
                max_in_flight_bytes=IN_FLIGHT,
                alignment=ALIGNMENT,
                align_threshold=0,
            )
        else:
            # Tensors that were external must come inside, or the file would point at the old model's data.
            (scratch / target.name).write_bytes(
                _embedded(model).SerializeToString(deterministic=True)
            )
        # The data first: a model must never be visible without it.
        for name in (data_name, target.name):
            if (scratch / name).exists():
                os.replace(scratch / name, target.parent / name)
        if not external_data:
            with contextlib.suppress(FileNotFoundError):
                (target.parent / data_name).unlink()
    except OSError as e:
        raise errors.InputError(
            errors.Diagnostic(
                "error",
                "QG105",
                str(target),
                f"could not be written: {e.strerror or e}",
                "is the disk full?",
            )
        ) from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def publish(staged: Path, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Move a saved model (and its data file) to its place, by renaming within one file system."""
    target = check_output(path, force=force)
    data, beside = staged.with_name(staged.name + ".data"), target.with_name(staged.name + ".data")
    try:
        # The data first: a model must never be visible without it.
        if data.exists():
            os.replace(data, beside)
        else:
            beside.unlink(missing_ok=True)
        os.replace(staged, target)
    except OSError as e:
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG105", str(target), f"could not be written: {e.strerror or e}"
            )
        ) from e
    return target


def _embedded(model: ir.Model) -> onnx.ModelProto:
    held = [v for _, v in graph.initializers(model) if isinstance(v.const_value, ir.ExternalTensor)]
    kept = [v.const_value for v in held]
    for v in held:
        tensor = v.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        v.const_value = graph.lazy(tensor.numpy, tensor.dtype, tensor.shape.numpy(), str(v.name))
    try:
        proto = ir.to_proto(model)
        _drop_redundant_types(proto.graph)
        return proto
    finally:
        for v, tensor_ in zip(held, kept, strict=True):
            v.const_value = tensor_


def _drop_redundant_types(proto: onnx.GraphProto) -> None:
    """Remove the types that onnx_ir writes beside each initializer: it carries its own, and files must not grow."""
    held = {t.name for t in proto.initializer}
    for index in reversed(range(len(proto.value_info))):
        if proto.value_info[index].name in held:
            del proto.value_info[index]
    for node in proto.node:
        for attribute in node.attribute:
            for body in (
                [attribute.g, *attribute.graphs]
                if attribute.HasField("g") or attribute.graphs
                else []
            ):
                _drop_redundant_types(body)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as one self-contained ModelProto (under 2 GB)."""
    return _embedded(model)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, as stored."""
    return sum(
        v.const_value.nbytes for _, v in graph.initializers(model) if v.const_value is not None
    )


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a model file and of the external data that it points to."""
    path = Path(os.fspath(path))
    model = ir.load(path)
    tensors = (v.const_value for _, v in graph.initializers(model))
    names = {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
    return path.stat().st_size + sum((path.parent / n).stat().st_size for n in names)
