"""Preprocessing as strict typed data: from `--preprocess`, a TOML file or Python.

A text is `key=value,key=value`; a part without `=` continues the list before it: `mean=0.5,0.4,0.4,size=224`.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from qgraph import errors
from qgraph.data.infos import error, fail

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Spec(BaseModel):
    """What every kind of preprocessing has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    """The file or folder."""
    choose: Literal["spread", "first", "random"] = "spread"
    """Which ones, where fewer are asked for than there are: evenly spaced, the first, or drawn with `seed`."""
    seed: int = 0
    """Of the random choice."""

    @field_validator("path", "tokenizer", mode="before", check_fields=False)
    @classmethod
    def _path(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    def __init__(self, **values: Any) -> None:
        """Raises errors.InputError (QG150) that lists every wrong key and value."""
        try:
            super().__init__(**values)
        except ValidationError as e:
            raise errors.InputError(*_problems(type(self), e)) from e

    def chosen(self, count: int, wanted: int | None) -> list[int]:
        """The indices to use of `count` items, in order."""
        if wanted is None or wanted >= count:
            return list(range(count))
        if self.choose == "first":
            return list(range(wanted))
        if self.choose == "random":
            return sorted(random.Random(self.seed).sample(range(count), wanted))
        return [index * count // wanted for index in range(wanted)]


Kind = TypeVar("Kind", bound=Spec)


def from_text(kind: type[Kind], path: str, text: str) -> Kind:
    """What `--preprocess` says of the data at `path`."""
    values: dict[str, Any] = {}
    key = ""
    for part in filter(None, map(str.strip, text.split(","))):
        name, is_pair, value = part.partition("=")
        if is_pair:
            key = name.strip()
            if key in values:
                fail("QG150", f"--preprocess {key}", "is given twice", "give it once")
            values[key] = value.strip()
        elif key:
            values[key] += f",{part}"
        else:
            fail("QG150", f"--preprocess {part}", "is no key=value", _keys(kind))
    if "path" in values:
        fail("QG150", "--preprocess path", "is what --data says", "leave it out")
    return kind(path=path, **values)


def from_toml(path: Path, kinds: dict[str, type[Spec]]) -> Spec:
    """A file with one table, named like the kind; paths in it are relative to the file."""
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        fail("QG112", str(path), f"cannot be read: {e}", "see docs/guide.md for the format", e)
    unknown = [name for name in held if name not in kinds]
    if unknown or len(held) != 1 or not isinstance(next(iter(held.values())), dict):
        name = unknown[0] if unknown else ""
        hint = errors.nearest(name, kinds) if name else f"write one of [{'], ['.join(kinds)}]"
        message = f"is no kind of data: {name!r}" if name else "needs exactly one table"
        fail("QG150", str(path), message, hint)
    ((name, values),) = held.items()
    for key in ("path", "tokenizer"):
        if isinstance(values.get(key), str):
            values[key] = str(path.parent / values[key])
    return kinds[name](**values)


def number(value: Any) -> Any:
    """A text as a number: `0.5`, `1/255`. What is no number stays as it is, for the type check to refuse."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        return value
    above, is_ratio, below = value.partition("/")
    try:
        return float(above) / float(below) if is_ratio else float(above)
    except (ValueError, ZeroDivisionError):
        return value


def whole(value: Any) -> Any:
    """A text as a whole number, or as it is."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def flag(value: Any) -> Any:
    """A text as true or false, or as it is."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return known.get(value.lower(), value) if isinstance(value, str) else value


def _problems(kind: type[Spec], e: ValidationError) -> list[errors.Diagnostic]:
    found: list[errors.Diagnostic] = []
    for problem in e.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        where = f"{kind.__name__}.{key}" if key else kind.__name__
        if problem["type"] == "extra_forbidden":
            message, hint = "is no key of the preprocessing", errors.nearest(key, kind.model_fields)
        elif problem["type"] == "missing":
            message, hint = "is missing", f"give {key}=..."
        else:
            shown = f", found {problem['input']!r}" if key else ""
            message, hint = f"{problem['msg'].removeprefix('Value error, ')}{shown}", _keys(kind)
        if found and found[-1].where == where:
            continue  # one value can fail several of the types that its key takes
        found.append(error("QG150", where, message, hint))
    return found


def _keys(kind: type[Spec]) -> str:
    return f"keys: {', '.join(k for k in kind.model_fields if k != 'path')}"
