"""Where samples come from: files, folders, functions, iterables; read one sample at a time."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn, TypeAlias

import numpy as np

from qgraph import errors
from qgraph.data import images, infos, specs, states
from qgraph.data import samples as checks
from qgraph.data.images import Images, open_images
from qgraph.data.infos import Array, InputInfo
from qgraph.data.opened import Located, Opened, Progress
from qgraph.data.specs import Spec
from qgraph.data.text import Text, open_text

Iterables: TypeAlias = Iterable[Mapping[str, Any]]
Source: TypeAlias = "str | os.PathLike[str] | Images | Text | Iterables | Callable[[], Iterables]"

SUFFIXES = (".npy", ".npz")


KINDS: dict[str, type[Spec]] = {"images": Images, "text": Text}


def open_source(
    source: Any,
    inputs: tuple[InputInfo, ...],
    samples: int | None,
    preprocess: str | None,
    progress: Progress,
) -> Opened:
    """Find out what the source is, and how it is read from the front."""
    if isinstance(source, str | os.PathLike):
        source = _specified(os.fspath(source), preprocess)
    elif preprocess is not None:
        infos.fail("QG150", "--preprocess", "is for folders of images and for text", "leave it out")
    if isinstance(source, Images):
        _require(source.path)
        return open_images(source, inputs, samples, progress)
    if isinstance(source, Text):
        _require(source.path)
        return open_text(source, inputs, samples, progress)
    if isinstance(source, str):
        return Opened(source, _open_path(source, inputs))
    if callable(source):
        name = getattr(source, "__name__", "feeds")
        return Opened(name, lambda: _numbered(name, source()))
    if isinstance(source, Mapping):
        _refuse("data", "is one sample, not a sequence of samples", "put it in a list: [feeds]")
    if not isinstance(source, Iterable) or isinstance(source, bytes | np.ndarray):
        hint = "give a .npz, .npy, folder, module:function or an iterable of feeds dicts"
        _refuse("data", f"cannot be read from {type(source).__name__}", hint)
    kept = list(islice(source, samples)) if isinstance(source, Iterator) else source
    return Opened("feeds", lambda: _numbered("feeds", kept))


def _specified(text: str, preprocess: str | None) -> str | Spec:
    """Images or text where the path is of that kind, else the path."""
    path = Path(text)
    if path.is_file() and path.suffix == ".toml":
        if preprocess is not None:
            infos.fail("QG150", "--preprocess", f"{text} says it already", "leave it out")
        return specs.from_toml(path, KINDS)
    if path.suffix in SUFFIXES or (path.is_dir() and _arrays(path)):
        kind: type[Spec] | None = None
    elif path.is_file():
        is_text = path.suffix == ".txt" or (preprocess is not None and path.suffix != ".py")
        kind = Text if is_text else None
        kind = Images if path.suffix.lower() in images.SUFFIXES else kind
    else:
        kind = Images if path.is_dir() and images.paths(path) else None
    if kind is not None:
        return specs.from_text(kind, text, preprocess or "")
    if preprocess is not None and path.exists():
        hint = "leave it out, or give a folder of images or a text file"
        infos.fail("QG150", "--preprocess", f"{text} holds neither images nor text", hint)
    return text


def _arrays(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES]


def _open_path(text: str, inputs: tuple[InputInfo, ...]) -> Callable[[], Located]:
    path = Path(text)
    if path.is_dir():
        files = _arrays(path)
        if not files:
            hint = "one file per sample is expected there, or images"
            _refuse(text, "holds no .npz or .npy files", hint)
        return lambda: ((str(p), _one_file(p, inputs)) for p in files)
    if path.is_file():
        if path.suffix == ".py":
            _refuse(text, "is a module", f"name the function: {text}:function")
        if path.suffix not in SUFFIXES:
            hint = "give a .npz, .npy or folder, images or a .txt"
            _refuse(text, "is not a kind of data that is known", hint)
        return lambda: _stacked(path, inputs)
    place, colon, name = text.rpartition(":")
    if colon and name.isidentifier() and (place.endswith(".py") or not path.suffix):
        function = _function(text, place, name)
        return lambda: _numbered(text, function())
    _require(text)
    hint = "give a .npz, .npy, folder or module:function"
    return _refuse(text, "is neither a file nor a folder", hint)


def _require(text: str) -> None:
    """Refuse a path that does not exist."""
    path = Path(text)
    if path.exists():
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = errors.nearest(path.name, siblings)
    hint = near if near.startswith("did") else "give a .npz, .npy, folder or module:function"
    raise errors.InputError(infos.error("QG111", text, "does not exist", hint))


def _function(text: str, place: str, name: str) -> Callable[[], Iterables]:
    try:
        module = _module(place)
    except Exception as e:  # noqa: BLE001 - a user's module can fail in any way
        hint = "a module that is not installed is found by its path: folder/file.py:function"
        _refuse(text, f"cannot be imported: {type(e).__name__}: {e}", hint, e)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        _refuse(text, f"there is no function {name!r} in {place}", errors.nearest(name, known))
    found: Callable[[], Iterables] = function
    return found


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _numbered(name: str, feeds: Iterable[Any]) -> Located:
    if not isinstance(feeds, Iterable):
        _refuse(name, f"gives {type(feeds).__name__}, nothing to iterate", "yield feeds dicts")
    yield from ((f"{name} sample {index}", each) for index, each in enumerate(feeds))


def _one_file(path: Path, inputs: tuple[InputInfo, ...]) -> Mapping[str, Array]:
    """A whole file as one sample."""
    with _reading(path):
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {_only(path, inputs): loaded}
        with loaded:
            return dict(loaded)


def _stacked(path: Path, inputs: tuple[InputInfo, ...]) -> Located:
    """The samples of one file whose arrays have a sample axis, read one by one."""
    by_name = {i.name: i for i in inputs}
    with contextlib.ExitStack() as stack:
        with _reading(path):
            arrays = _open_arrays(path, inputs, stack)
        wrong = checks.names(arrays, inputs, str(path))
        for name, rows in arrays.items():
            if name in by_name:
                wrong += rows.check(by_name[name], f"{path}[{name}]")
        counts = {name: rows.shape[0] for name, rows in arrays.items() if rows.shape}
        if not wrong and len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            found = f"arrays differ in the number of samples: {shown}"
            wrong.append(infos.error("QG119", str(path), found, "axis 0 counts samples"))
        if wrong:
            raise errors.InputError(*wrong)
        for index in range(min(counts.values(), default=0)):
            with _reading(path):
                sample = {name: rows.next(by_name[name]) for name, rows in arrays.items()}
            yield f"{path} sample {index}", sample


def _open_arrays(
    path: Path, inputs: tuple[InputInfo, ...], stack: contextlib.ExitStack
) -> dict[str, _Rows]:
    if path.suffix == ".npy":
        return {_only(path, inputs): _Rows.of_array(np.load(path, mmap_mode="r"))}
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = archive.namelist()
    return {n.removesuffix(".npy"): _Rows.of_member(archive, n, stack) for n in members}


@dataclass(slots=True)
class _Rows:
    """One array with a sample axis in front, row by row: mapped memory (.npy), a stream (.npz)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]

    @classmethod
    def of_array(cls, array: Array) -> _Rows:
        return cls(array.shape, array.dtype, iter(np.atleast_1d(array)).__next__)

    @classmethod
    def of_member(cls, archive: zipfile.ZipFile, name: str, stack: contextlib.ExitStack) -> _Rows:
        stream: IO[bytes] = stack.enter_context(archive.open(name))
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        if is_fortran or not shape or dtype.hasobject:
            # Rows do not lie one after the other there, or there are none.
            with archive.open(name) as whole:
                return cls.of_array(np.lib.format.read_array(whole, allow_pickle=False))
        nbytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize

        def read() -> Array:
            raw = stream.read(nbytes)
            return np.frombuffer(raw, dtype).reshape(shape[1:])

        return cls(shape, dtype, read)

    def check(self, info: InputInfo, where: str) -> list[errors.Diagnostic]:
        """The rank, which decides whether a row is a sample or a batch of one."""
        rank = None if info.shape is None else len(info.shape)
        if self.shape and (rank is None or len(self.shape) - rank in (0, 1)):
            return []
        dims = "any" if rank is None else f"{rank} or {rank + 1}" if rank else "1"
        found = f"input {info}: found shape {list(self.shape)}, expected rank {dims}"
        hint = "put the sample axis in front: np.stack of the samples"
        return [infos.error("QG115", where, found, hint)]

    def next(self, info: InputInfo) -> Array:
        row = self.read()
        is_batch = info.shape is None or len(info.shape) == len(self.shape)
        return row[None] if is_batch else row


def _only(path: Path, inputs: tuple[InputInfo, ...]) -> str:
    needed = states.required(inputs)
    if len(needed) != 1:
        names = ", ".join(i.name for i in needed)
        hint = f"use a .npz with arrays named {names}"
        infos.fail("QG113", str(path), f"one array for {len(needed)} model inputs", hint)
    return needed[0].name


@contextlib.contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        reason = str(e)
        if "allow_pickle" in reason:  # NumPy takes any file without its own magic for a pickle
            is_object = "Object arrays" in reason
            reason = "it holds Python objects, not numbers" if is_object else "it is no NumPy file"
        hint = "save it with np.savez(path, input=array) or np.save"
        infos.fail("QG112", str(path), f"cannot be read: {reason}", hint, e)


def _refuse(source: str, message: str, hint: str, cause: Exception | None = None) -> NoReturn:
    infos.fail("QG111", source, message, hint, cause)
