"""Examine the installation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qgraph import errors
from qgraph.runtime import sessions

# As in pyproject.toml.
_REQUIRED = {"numpy": "1.26", "onnx": "1.19", "onnx-ir": "1.1", "onnxruntime": "1.23"}
_OPTIONAL = {"openvino": "openvino", "onnxruntime-extensions": "extensions"}

_PROBE = (
    '<ir_version: 10, opset_import: ["": 21]> probe (float[1] x) => (float[1] y) { y = Neg(x) }'
)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding of `doctor`; `hint` says what to do where `ok` is False."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def doctor() -> list[Check]:
    """Examine the installation; nothing is changed and nothing raises."""
    return [
        _check_python(),
        *(_check_package(name, minimum) for name, minimum in _REQUIRED.items()),
        *_check_library(),
        *(_check_optional(name, extra) for name, extra in _OPTIONAL.items()),
        _check_threads(),
        _check_huge_pages(),
    ]


def _check_python() -> Check:
    is_new_enough = sys.version_info >= (3, 10)
    hint = "" if is_new_enough else "qgraph needs Python 3.10 or newer"
    return Check("Python", is_new_enough, f"{platform.python_version()} {platform.machine()}", hint)


def _check_package(name: str, minimum: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, False, "not installed", f'pip install "{name}>={minimum}"')
    ok = _numbers(version) >= _numbers(minimum)
    return Check(name, ok, version, "" if ok else f'pip install -U "{name}>={minimum}"')


def _check_optional(name: str, extra: str) -> Check:
    version = _version(name)
    missing = f'not installed (optional: pip install "qgraph[{extra}]")'
    return Check(name, True, missing if version is None else version)


def _check_library() -> Iterator[Check]:
    from qgraph import native

    try:
        loaded = native.load()
    except errors.RuntimeFailure as e:
        problem = e.diagnostics[0]
        yield Check("native library", False, problem.message, problem.hint)
        return
    yield Check("native library", True, f"{loaded.path}, interface {native.ABI_VERSION}")
    from qgraph.observers import counting

    is_native = counting.native_function() is not None
    how = "in the native library" if is_native else "in numpy (the library is older), slower"
    yield Check(
        "calibration", is_native, f"counts {how}", "" if is_native else "pip install -U qgraph"
    )
    others = ", ".join(name for name in loaded.isas if name != loaded.isa)
    yield Check("instruction set", True, f"{loaded.isa} (also: {others})" if others else loaded.isa)
    try:
        import onnx.parser

        sessions.session(onnx.parser.parse_model(_PROBE), custom_ops=True, threads=1)
    except (ImportError, errors.RuntimeFailure) as e:
        yield Check("native operators", False, str(e), "pip install -U qgraph onnxruntime")
    else:
        yield Check("native operators", True, "registered in ONNX Runtime")


def _check_threads() -> Check:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Check("threads", True, f"{usable} usable CPUs")


def _check_huge_pages() -> Check:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file():
        return Check("huge pages", True, "not a setting of this system")
    chosen = setting.read_text().partition("[")[2].partition("]")[0]
    ok = chosen in ("always", "madvise")
    hint = "" if ok else f"echo madvise > {setting}: large weights are read faster"
    return Check("huge pages", ok, chosen, hint)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version.

    >>> _numbers("1.23.2rc1")
    (1, 23, 2)
    """
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
