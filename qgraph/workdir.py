"""A folder of finished work: what was interrupted goes on from there, to the same bytes.

    work.json            what the work is for: digests of model, recipe, data, plan; versions
    block-0000.npz       results, one file for each finished block; written under another name and renamed
    inputs-0001-float/   the values that the block after the last finished one needs, for each sample
    mixed.npz            formats that were chosen by measuring
    choosing/            for that choice: block-0000.npz, inputs-..., and measured.npz with the losses of mixtures

What is there counts only for exactly the same work. A folder of other work is refused, not overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors, graph, mapped

FORMAT = 1
REPLANNED = (
    "the passes before this one came to another result, as they may where they go by measured times; "
    "delete the folder, or begin anew in another one"
)
"""What to do where the same command leads to other weights or another plan."""
_KEY, _FACTS = "work.json", "facts"
_HASHED_BYTES = 1 << 10  # smaller constants are hashed with the graph
_PART = 16 << 20
_OURS = re.compile(r"work\.json|block-\d+\.npz|inputs-\d+-\w+|choosing|mixed\.npz|\..*\.part")

Arrays = Mapping[str, npt.NDArray[Any]]


class WorkDir:
    """Results by name, for one piece of work.

    Args:
        folder: made if it is missing; one that holds something else is refused.
        key: what the work is for, each entry a text or something that JSON holds.

    Raises:
        errors.InputError: QG106 where the folder holds other work, other files, or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], key: Mapping[str, Any]) -> None:
        self.folder = Path(os.fspath(folder))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = sorted(p.name for p in self.folder.iterdir() if not _is_scrap(p.name))
        except OSError as e:
            raise self._failure(
                f"cannot be made or read: {e.strerror}", "give another folder"
            ) from e
        self._key: dict[str, Any] = {}
        if held and _KEY not in held:
            hint = "give a new or empty folder"
            raise self._failure(f"holds {held[0]!r}, which is no work of qgraph's", hint)
        if held:
            self._key = self._read_key()
        for scrap in self.folder.iterdir():  # what was being written when the work was interrupted
            if _is_scrap(scrap.name):
                shutil.rmtree(scrap) if scrap.is_dir() else scrap.unlink()
        self.require(key)

    def require(self, key: Mapping[str, Any], hint: str = "") -> None:
        """Say more about what the work is for; what was said before must be the same.

        Args:
            key: further entries, or the same again.
            hint: what to do where something differs, if there is more to say.

        Raises:
            errors.InputError: QG106 with what differs.
        """
        plain = json.loads(json.dumps(key))
        known = {name: value for name, value in plain.items() if name in self._key}
        differences = list(_differences({n: self._key[n] for n in known}, known, ""))
        if differences:
            more = "" if len(differences) <= 3 else f" (and {len(differences) - 3} more)"
            raise self._failure(
                f"holds work that was for something else: {'; '.join(differences[:3])}{more}",
                hint
                or "repeat the command that it was begun with, or give another folder, or delete this one",
            )
        if len(known) < len(plain):
            self._key.update(plain)
            text = json.dumps({"format": FORMAT, "key": self._key}, indent=1, sort_keys=True)
            self._write(_KEY, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    def store(self, name: str, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Keep arrays and what JSON holds under a name; it is there whole or not at all."""
        kept: dict[str, Any] = {_FACTS: np.array(json.dumps(facts)), **arrays}

        def write(path: Path) -> None:
            with path.open("wb") as stream:
                np.savez(stream, **kept)

        self._write(f"{name}.npz", write)

    def load(self, name: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]] | None:
        """What was kept under a name; None where nothing was."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as held:
                arrays = {key: held[key] for key in held.files}
            return arrays, json.loads(str(arrays.pop(_FACTS)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            raise self._failure(f"{path.name} cannot be read: {e}", "delete that file") from e

    def part(self, name: str) -> WorkDir:
        """A folder inside for a piece of this work, with its own key."""
        return WorkDir(self.folder / name, {})

    def clear(self) -> None:
        """Delete all that was kept, and nothing else: the work is done."""
        for path in self.folder.iterdir():
            if not _OURS.fullmatch(path.name):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=self.folder)
        os.close(handle)
        path = Path(temporary)
        try:
            write(path)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(path, self.folder / name)
        except OSError as e:
            raise self._failure(
                f"{name} could not be written: {e.strerror}", "is the disk full?"
            ) from e
        finally:
            path.unlink(missing_ok=True)

    def _read_key(self) -> dict[str, Any]:
        try:
            held = json.loads((self.folder / _KEY).read_text(encoding="utf-8"))
            version, key = held["format"], dict(held["key"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise self._failure(f"{_KEY} cannot be read: {e}", "give another folder") from e
        if version != FORMAT:
            hint = (
                "finish with the version of qgraph that it was begun with, or give another folder"
            )
            raise self._failure(f"has format {version}, not {FORMAT}", hint)
        return key

    def _failure(self, message: str, hint: str) -> errors.InputError:
        where = f"work folder {str(self.folder)!r}"
        return errors.InputError(errors.Diagnostic("error", "QG106", where, message, hint))


def digest(model: ir.Model) -> str:
    """SHA-256 of graph and weights; weights are read piece by piece."""
    copy = graph.clone(model)
    for _, value in graph.initializers(copy):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _HASHED_BYTES or tensor.dtype == ir.DataType.STRING:
            continue
        sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape.numpy())}\n".encode())
        for part in _bytes(tensor):
            sha.update(part)
        value.const_value = ir.tensor(np.frombuffer(sha.digest(), np.uint8), name=value.name)
    mapped.release(model)
    found = ir.to_proto(copy).SerializeToString(deterministic=True)
    return hashlib.sha256(found).hexdigest()


def _bytes(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    if isinstance(tensor, ir.ExternalTensor):  # read and not mapped: mapped pages count as memory
        with open(tensor.path, "rb") as stream:
            stream.seek(tensor.offset or 0)
            left = tensor.nbytes
            while left and (part := stream.read(min(left, _PART))):
                left -= len(part)
                yield part
        return
    array: Any = np.ascontiguousarray(tensor.numpy())
    whole = memoryview(array.reshape(-1).view(np.uint8))
    for start in range(0, len(whole), _PART):
        yield whole[start : start + _PART]


def _is_scrap(name: str) -> bool:
    return name.startswith(".") and name.endswith(".part")


def _differences(was: Any, now: Any, where: str) -> Iterator[str]:
    """What differs between two pieces of plain data, entry by entry."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            inner = f"{where}.{key}" if where else key
            yield from _differences(was.get(key, "absent"), now.get(key, "absent"), inner)
    elif was != now:
        yield f"{where} was {_short(was)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}…"
