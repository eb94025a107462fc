"""Names to passes, solvers, targets and recipes.

What ships with qgraph is found by scanning its packages, what others ship through entry points of the group
"qgraph.plugins" (each names a module that registers on import), what a user writes in a file by "path.py:Name".
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from qgraph import errors

Kind = Literal["pass", "solver", "target", "form"]
T = TypeVar("T")

_PACKAGES = ("qgraph.passes", "qgraph.passes.solvers", "qgraph.targets")
_known: dict[str, dict[str, Any]] = {"pass": {}, "solver": {}, "target": {}}
_scanned = False


@overload
def register(thing: T) -> T: ...
@overload
def register(thing: None = None, *, replace: bool = False) -> Any: ...
def register(thing: Any = None, *, replace: bool = False) -> Any:
    """Make a pass class, a solver class or a target value known under its `name`.

    Usable as `@register`, `@register(replace=True)` or `register(target)`.

    Raises:
        errors.RecipeError: QG301 where the name is taken (and not `replace`) or missing.
    """
    if thing is None:
        return lambda later: _add(later, replace=replace)
    return _add(thing, replace=replace)


def _add(thing: Any, *, replace: bool) -> Any:
    kind = kind_of(thing)
    name = getattr(thing, "name", "")
    if not name:
        raise errors.RecipeError(
            errors.Diagnostic(
                "error",
                "QG301",
                repr(thing),
                f"a {kind} needs a name",
                'set the class attribute name = "my-name"',
            )
        )
    other = _known[kind].get(name)
    if other is not None and not replace and _origin(other) != _origin(thing):
        raise errors.RecipeError(
            errors.Diagnostic(
                "error",
                "QG301",
                name,
                f"there is a {kind} of that name in {_origin(other)}",
                "choose another name, or register(replace=True)",
            )
        )
    _known[kind][name] = thing
    return thing


def kind_of(thing: Any) -> Kind:
    """Which registry a thing belongs to."""
    from qgraph.pipeline import Pass
    from qgraph.solver import Solver
    from qgraph.target import Target

    if isinstance(thing, Target):
        return "target"
    if isinstance(thing, type) and issubclass(thing, Pass):
        return "pass"
    if isinstance(thing, type) and issubclass(thing, Solver):
        return "solver"
    raise errors.RecipeError(
        errors.Diagnostic(
            "error",
            "QG301",
            repr(thing),
            "is neither a Pass class, nor a Solver class, nor a Target",
            "derive from qgraph.Pass or qgraph.Solver",
        )
    )


def _origin(thing: Any) -> str:
    return f"{getattr(thing, '__module__', type(thing).__module__)}.{getattr(thing, '__qualname__', thing.name)}"


def names(kind: Kind) -> list[str]:
    """All registered names of a kind, sorted."""
    _scan()
    return sorted(_known[kind])


def get(kind: Kind, name: str) -> Any:
    """The pass class, solver class or target of that name; "file.py:Name" and "module:Name" are imported.

    Raises:
        errors.RecipeError: QG303 for an unknown name, with the nearest known ones.
    """
    _scan()
    found = _known[kind].get(name)
    if found is not None:
        return found
    if ":" in name:
        return _import(kind, name)
    raise errors.RecipeError(
        errors.Diagnostic(
            "error", "QG303", name, f"is no {kind}", errors.nearest(name, _known[kind])
        )
    )


def _import(kind: Kind, reference: str) -> Any:
    where, _, attribute = reference.rpartition(":")
    try:
        module = (
            _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        )
        found = getattr(module, attribute)
    except (ImportError, FileNotFoundError, AttributeError, SyntaxError) as e:
        raise errors.RecipeError(
            errors.Diagnostic(
                "error",
                "QG303",
                reference,
                f"cannot be imported: {e}",
                f"write FILE.py:CLASS or MODULE:CLASS of a {kind}",
            )
        ) from e
    if kind_of(found) != kind:
        raise errors.RecipeError(
            errors.Diagnostic("error", "QG303", reference, f"is a {kind_of(found)}, not a {kind}")
        )
    return found


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    name = f"qgraph_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _scan() -> None:
    global _scanned
    if _scanned:
        return
    _scanned = True
    for package_name in _PACKAGES:
        package = importlib.import_module(package_name)
        for info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{info.name}")
    for entry in importlib.metadata.entry_points(group="qgraph.plugins"):
        try:
            entry.load()
        except Exception as e:
            raise errors.RecipeError(
                errors.Diagnostic(
                    "error",
                    "QG304",
                    entry.value,
                    f"plugin {entry.name!r} does not import: {e}",
                    "repair or uninstall it",
                )
            ) from e
