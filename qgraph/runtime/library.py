"""Where the native library is."""

from __future__ import annotations

import os
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from qgraph import errors

_FILE_NAMES = ("libqgraph_ops.so", "libqgraph_ops.dylib")


def library_path() -> str:
    """The native library: $QGRAPH_OPS_LIBRARY, else `_lib` in the package, else in site-packages.

    The last place serves `python -m pytest` in a source checkout, where the current folder hides the
    installed package.

    Raises:
        errors.RuntimeFailure: QG603 if there is none.
    """
    chosen = os.environ.get("QGRAPH_OPS_LIBRARY")
    if chosen:
        if not os.path.isfile(chosen):
            message = "QGRAPH_OPS_LIBRARY names a file that does not exist"
            raise failure("QG603", chosen, message, "unset it to use the installed library")
        return chosen
    found = next(_installed_libraries(), None)
    if found is None:
        message = "qgraph's native library is not installed"
        hint = "pip install qgraph, or pip install . in a source checkout (needs a C++17 compiler)"
        raise failure("QG603", "", message, hint)
    return found


def failure(code: str, where: str, message: str, hint: str) -> errors.RuntimeFailure:
    """One diagnostic as an exception."""
    return errors.RuntimeFailure(errors.Diagnostic("error", code, where, message, hint))


def _installed_libraries() -> Iterator[str]:
    import qgraph

    folders = [Path(p) / "_lib" for p in qgraph.__path__]
    installed = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    installed += [*site.getsitepackages(), site.getusersitepackages()]
    folders += [Path(p) / "qgraph" / "_lib" for p in installed]
    for folder in folders:
        for name in _FILE_NAMES:
            if (folder / name).is_file():
                yield str(folder / name)
