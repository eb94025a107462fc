"""Sessions over a model whose values are brought out or counted in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qgraph import errors, files, graph, mapped, runtime
from qgraph.calibrate import batches, instrument, types
from qgraph.observers import Wanted, tables

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")
_COUNTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
# Weights are mapped from the file; threads that spin between runs would take the observers' processor.
_CONFIG = {"session.intra_op.allow_spinning": "0"}
_NOTHING = np.array([[np.inf, -np.inf, 0, 0]], np.float32)  # what a node gives of no values


class Bench:
    """The model on disk once, its weights in one file that every instrumented graph shares and maps."""

    def __init__(self, model: ir.Model, folder: Path, threads: int, origin: str) -> None:
        self.threads = threads
        self._origin = origin
        self._folder = folder
        self._count = 0
        saved = files.save(model, folder / "model.onnx", external_data=True)
        self._base = files.load(saved)
        self._config = _CONFIG | runtime.mapped_weights(files.file_bytes(saved))
        mapped.release(model)
        known = types.infer(self._base)
        for each in graph.graphs(self._base):
            for v in (v for node in each for v in node.outputs):
                if v.type is None and v.name in known:
                    v.type = ir.TensorType(known[v.name])

    def digest(self) -> str:
        """SHA-256 of graph and weights."""
        sha = hashlib.sha256()
        for path in sorted(self._folder.glob("model.onnx*")):
            with path.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    sha.update(chunk)
        return sha.hexdigest()

    def countable(self, wanted: Mapping[str, Wanted]) -> list[str]:
        """The values that the native library can count where they are produced."""
        if tables.library() is None:
            return []
        found = instrument.find(self._base, wanted)
        return [n for n, w in wanted.items() if w == Wanted() and found[n].dtype in _COUNTED]

    def copies(self, wanted: Mapping[str, Wanted]) -> dict[str, str]:
        """The values that only rearrange another one, by the name of that: a histogram does not tell them apart."""
        return instrument.rearranged(self._base, [n for n, w in wanted.items() if w == Wanted()])

    def session(self, names: Sequence[str], keys: Mapping[str, int]) -> Instrumented:
        """A session whose outputs are the values, and which counts others under their tables' keys."""
        model = graph.clone(self._base)
        seen = instrument.count(model, keys, self.threads) if keys else []
        tapped = instrument.tap(model, names)
        # What nodes of the main graph give travels as one output; that of bodies comes in any number.
        inner = [t for t in seen if t.is_lifted]
        outer = [t for t in seen if not t.is_lifted]
        outputs = [t.value for t in (*inner, *tapped)]
        if outer:
            rows = graph.value(graph.Names(model)("seen"), ir.DataType.FLOAT, [None, 4])
            axis = ir.AttrInt64("axis", 0)
            held = [t.value for t in outer]
            model.graph.append(ir.Node("", "Concat", held, [axis], outputs=[rows]))
            outputs.insert(0, rows)
        session = self._start(model, outputs, custom_ops=bool(keys))
        _require_floats(session, names)
        return Instrumented(
            session, self._origin, [t.name for t in outer], [t.name for t in inner],
            {t.name: t.new_axes for t in tapped},
        )  # fmt: skip

    def sizes(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[int]:
        """How many elements each value has when the model runs on a sample."""
        model = graph.clone(self._base)
        fresh = graph.Names(model)
        outputs = []
        for each in instrument.tap(model, names):
            out = graph.value(fresh(f"{each.name}.size"), ir.DataType.INT64, [])
            model.graph.append(ir.Node("", "Size", [each.value], outputs=[out]))
            outputs.append(out)
        session = self._start(model, outputs, custom_ops=False)
        found = Instrumented(session, self._origin, (), (), dict.fromkeys(names, 0)).run(feeds, 0)
        return [int(size) for size in found[1].values()]

    def is_batchable(self) -> bool:
        """Whether samples may run together at all."""
        return batches.is_possible(self._base)

    def _start(self, model: ir.Model, outputs: Sequence[ir.Value], *, custom_ops: bool) -> Any:
        # A name may be asked for that is an output already: outputs are only what was asked for, each once.
        model.graph.outputs[:] = outputs
        self._count += 1
        path = self._folder / f"tapped{self._count}.onnx"
        # The weights stay where they are: only their places are written.
        ir.save(model, path)
        return runtime.session(
            path,
            threads=self.threads,
            accuracy_level=1,
            config=self._config,
            custom_ops=custom_ops or None,
            # A value is counted as soon as it is there, and its memory is free after its last use.
            in_file_order=True,
        )


class Instrumented:
    """A session and what its outputs mean.

    Attributes:
        counted: values that are counted, in the order of the rows that nodes give of them.
        brought: values that are an output each.
        new_axes: how many axes each of `brought` gained.
    """

    def __init__(
        self,
        session: Any,
        origin: str,
        outer: Sequence[str],
        inner: Sequence[str],
        brought: Mapping[str, int],
    ) -> None:
        self._session = session
        self._origin = origin
        self._outer = bool(outer)
        self._inner = len(inner)
        self.counted = (*outer, *inner)
        self.brought = tuple(brought)
        self.new_axes = brought
        self._shapes: list[tuple[int, ...]] = []

    def run(
        self, feeds: Mapping[str, Any], number: int, control: npt.NDArray[np.int64] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """What nodes give, [sum of parts, 4], and the values that are brought out, by name.

        Args:
            feeds: of one sample, or several.
            number: of the (first) sample, for messages.
            control: how each value is counted [counted, 3]; once and whole by default.

        Raises:
            errors.RuntimeFailure: QG608 where ONNX Runtime fails.
        """
        if self.counted:
            whole = np.tile(np.array([1, 1, 0], np.int64), (len(self.counted), 1))
            feeds = {**feeds, instrument.CONTROL: whole if control is None else control}
        shapes = [np.shape(each) for each in feeds.values()]
        options = None if shapes == self._shapes else _shrinking()
        self._shapes = shapes
        try:
            outputs = self._session.run(None, feeds, options)
        except Exception as e:
            raise errors.RuntimeFailure(
                errors.Diagnostic(
                    "error", "QG608", f"{self._origin} sample {number}",
                    f"ONNX Runtime cannot run the model on it: {e}",
                    "does the float model run on this sample?",
                )
            ) from e  # fmt: skip
        rows = [outputs[0]] if self._outer else []
        first = len(rows)
        # A body runs any number of times.
        for each in outputs[first : first + self._inner]:
            turns = np.concatenate([each.reshape(-1, 4), _NOTHING])
            rows.append(np.stack([turns[:, 0].min(), turns[:, 1].max(), *_NOTHING[0, 2:]])[None])
        brought = outputs[first + self._inner :]
        return (
            np.concatenate(rows) if rows else _NOTHING[:0],
            dict(zip(self.brought, brought, strict=True)),
        )


def _shrinking() -> Any:
    """Options for a run whose shapes are not those of the last: memory for the largest of each would add up."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _require_floats(session: Any, names: Sequence[str]) -> None:
    outputs = session.get_outputs()
    wrong = [
        errors.Diagnostic("error", "QG142", name, f"is {out.type}", "observe float values only")
        for name, out in zip(names, outputs[len(outputs) - len(names) :], strict=True)
        if out.type not in _FLOATS
    ]
    if wrong:
        raise errors.InputError(*wrong)
