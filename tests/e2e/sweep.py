"""Every ONNX file of the test data through every recipe and target: what comes out, and is it right?

    python tests/e2e/sweep.py [--recipes auto,int4] [--targets onnx,ort,openvino,ort-qgraph] [--only GLOB] [--json FILE]

Recipes with static activations (int8-static) are calibrated, and judged, on the samples that bench/accuracy_models.py
knows for a model, on random ones otherwise.
Each model runs in a process of its own, so that a crash or a hang ends one line of the table and not the sweep.
Where QGRAPH_OLD_ORT_PYTHON names a Python with the oldest ONNX Runtime, results run there too.
Outcomes: `ok`, `refused CODE`, `CRASH` (an exception that is no refusal, a dead process, a timeout) and `WRONG`: the
result does not load, changes the interface, is dead weight, is silent about what it left out, or computes nonsense.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "forms"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import accuracy_models
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from old_runtime import OldRuntime, Refused, is_available

import qgraph
from qgraph import compiler, errors, graph, numerics, runtime, verify
from qgraph.recipe import load
from qgraph.verify import equivalence

Array = npt.NDArray[Any]
Outputs = list[dict[str, Any]]

OLD = OldRuntime()

RECIPES = ("auto", "int4", "int8-dynamic", "int8-weights", "int4-g128")
TARGETS = ("onnx", "ort", "openvino")

# What 8 bits may cost. Below this the result has nothing to do with the model. Models with random weights have no
# redundancy, so 4 bits may cost anything there: their figure is shown, not judged.
FLOOR_DB = 5.0
SAMPLES = 8  # real ones that calibrate a model, the first of many
GROWTH = 4096  # bytes that names and metadata may add to a file
STEPS = 512  # bytes of a pair of QuantizeLinear and DequantizeLinear and its grid


@dataclass
class Row:
    """One line of the table.

    Attributes:
        model: path below the data folder.
        recipe: name of the recipe.
        target: name of the target.
        outcome: "ok", "refused", "CRASH" or "WRONG".
        code: diagnostic code of a refusal.
        problems: what is wrong, or the refusal's text.
        notes: what could not be checked and why.
        quantized: weights that were quantized.
        total: weights that could have been.
        float_bytes: size of the file.
        output_bytes: size of the result.
        sqnr_db: worst float output against the float model, None where there is nothing to compare.
        integer_macs: share of the multiplications of one sample in integer kernels, None where nobody counted.
        reasons: code of every weight that stayed float, with counts.
        other_bytes: float initializers of 1024 elements or more in the result that no operator known to qgraph uses.
        seconds: for optimize alone.
    """

    model: str
    recipe: str
    target: str
    outcome: str = "ok"
    code: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quantized: int = 0
    total: int = 0
    float_bytes: int = 0
    output_bytes: int = 0
    sqnr_db: float | None = None
    integer_macs: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    other_bytes: int = 0
    seconds: float = 0.0

    def text(self) -> str:
        """The line as it is printed."""
        outcome = f"refused {self.code}" if self.outcome == "refused" else self.outcome
        sqnr = "" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
        size = f"{self.float_bytes}>{self.output_bytes}" if self.output_bytes else ""
        if self.integer_macs is not None:
            sqnr += f" {self.integer_macs:4.0%}"
        cells = f"{outcome:14} {self.recipe:12} {self.target:8} {self.quantized:3}/{self.total:<3}"
        line = f"{cells} {size:>18} {sqnr:>9}  {self.model}"
        return "\n".join([line, *(f"    {p}" for p in [*self.problems, *self.notes])])


@dataclass
class Reference:
    """The float model as ONNX Runtime runs it; `problem` says why it does not."""

    interface: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]] | None = None
    feeds: list[dict[str, Any]] = field(default_factory=list)
    outputs: Outputs = field(default_factory=list)
    problem: str = ""
    unstable: set[str] = field(default_factory=set)

    def on(self, path: Path, feeds: list[dict[str, Any]]) -> Reference:
        """The same model on other feeds."""
        if self.problem:
            return self
        session = runtime.session(path, threads=1)
        outputs = [run(session, feed) for feed in feeds]
        return Reference(self.interface, feeds, outputs, "", self.unstable)


def find(folder: Path, pattern: str = "*") -> list[Path]:
    """The models below a folder whose relative path matches a glob, in order."""
    return [
        path
        for path in sorted(folder.rglob("*.onnx"))
        if fnmatch.fnmatch(str(path.relative_to(folder)), pattern)
    ]


def sweep(
    folder: Path,
    models: Sequence[Path],
    recipes: Sequence[str] = RECIPES,
    targets: Sequence[str] = TARGETS,
    timeout: float = 600.0,
) -> Iterator[Row]:
    """Rows in order, each as soon as it is known. `timeout` in seconds is for one row."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qgraph.compiler", "qgraph.evaluate", "onnxruntime"])
    todo = [(recipe, target) for target in targets for recipe in recipes]
    for path in models:
        name = str(path.relative_to(folder))
        left = list(todo)
        while left:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(path, name, left, theirs), daemon=True)
            process.start()
            theirs.close()
            died = ""
            try:
                while left and ours.poll(timeout):
                    yield ours.recv()
                    left.pop(0)
                died = f"no answer in {timeout:g} seconds" if left else ""
            except EOFError:
                process.join(10)
                died = f"the process died with {process.exitcode}"
            process.kill()
            process.join()
            if left and died:
                yield Row(name, *left.pop(0), outcome="CRASH", problems=[died])


def work(path: Path, name: str, todo: list[tuple[str, str]], answer: Connection) -> None:
    """The worker: one row after the other."""
    reference = run_reference(path)
    seen: Reference | None = None
    for recipe, target in todo:
        row = Row(name, recipe, target)
        try:
            with tempfile.TemporaryDirectory(prefix="qgraph-sweep-") as scratch:
                is_static = any(rule.is_static for rule in load(recipe).rules)
                if is_static and seen is None:
                    seen = reference.on(path, calibration(path, name, reference))
                chosen = seen if is_static and seen is not None else reference
                examine(path, row, chosen, Path(scratch), chosen.feeds if is_static else None)
        except Exception:  # noqa: BLE001  whatever it is, it is a line of the table
            row.outcome, row.problems = "CRASH", [traceback.format_exc(limit=-6).strip()]
        answer.send(row)
    answer.close()


def run_reference(path: Path) -> Reference:
    """Load and run the float model; what goes wrong is kept as text."""
    reference = Reference()
    try:
        session = runtime.session(path, threads=1)
        reference.interface = interface(session)
        reference.feeds = verify.sample_feeds(path)
        reference.outputs = [run(session, feed) for feed in reference.feeds]
        again = run(session, reference.feeds[0])
    except errors.QGraphError as e:
        reference.problem = str(e).splitlines()[0][:300]
        return reference
    first = reference.outputs[0]
    reference.unstable = {k for k in first if not same(first[k], again[k])}
    return reference


def interface(session: Any) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Names, types and shapes of inputs and outputs, as a caller sees them."""
    return tuple(
        [(v.name, v.type, tuple(v.shape)) for v in held]
        for held in (session.get_inputs(), session.get_outputs())
    )


def run(session: Any, feed: dict[str, Any]) -> dict[str, Any]:
    """Outputs by name."""
    return equivalence.run_once(session, feed)


def same(a: Any, b: Any) -> bool:
    """True for equal arrays, NaNs included; True for what is no array."""
    if not isinstance(a, np.ndarray) or a.dtype.kind not in "biuf":
        return True
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def calibration(path: Path, name: str, reference: Reference) -> list[dict[str, Any]]:
    """Samples: real ones where they are known, else random ones."""
    known = next((m for m in accuracy_models.MODELS.values() if m.path == name), None)
    if known is not None:
        return list(islice(known.samples(), SAMPLES))
    return [] if reference.problem else verify.sample_feeds(path, 4)


def examine(
    path: Path, row: Row, reference: Reference, scratch: Path, data: list[dict[str, Any]] | None
) -> None:
    """Optimize one model and fill its row; `data` calibrates it."""
    output = scratch / "model.onnx"
    started = time.perf_counter()
    # Asking OpenVINO takes a process and seconds each time; what it compiles is checked below anyway.
    is_asked = row.target != "openvino" or row.recipe == "auto" or data is not None
    try:
        result = qgraph.optimize(
            path, row.recipe, target=row.target, output=output, inspect=is_asked, data=data
        )
    except errors.QGraphError as e:
        row.outcome, row.code = "refused", e.diagnostics[0].code
        row.problems = [str(d) for d in e.diagnostics[:3]]
        if isinstance(e, (errors.VerificationError, errors.PipelineError)):
            row.outcome = (
                "WRONG"  # a pass broke the model or its promise: our fault, not the model's
            )
        if not reference.problem:
            row.notes.append("the float model runs")
        return
    finally:
        row.seconds = time.perf_counter() - started
    report = result.report
    row.quantized, row.total = len(report.quantized), len(report.ledger)
    row.float_bytes, row.output_bytes = report.float_bytes, report.output_bytes
    row.integer_macs = report.integer_macs
    # Static grids: a pair for each activation, and constants for each weight and its bias.
    steps = len(report.activations) + 2 * len(report.quantized) if report.activations else 0
    row.reasons = dict(collections.Counter(e.code for e in report.ledger if not e.spec))
    row.problems += [*ledger_problems(result), *file_problems(row, output, steps)]
    row.other_bytes = unseen_bytes(output, result)
    unseen = [str(d) for d in report.diagnostics if "could not be checked" in d.message]
    if reference.interface is not None:
        CHECKS[row.target](path, output, row, reference)
    else:
        row.notes.append(f"float model: {reference.problem}")
    is_our_fault = not any("float model" in note for note in row.notes)
    (row.problems if is_our_fault else row.notes).extend(unseen)
    if row.problems:
        row.outcome = "WRONG"


def ledger_problems(result: compiler.Result) -> Iterator[str]:
    """Silence: a weight without a reason, or nothing done and nobody told."""
    report = result.report
    for entry in report.ledger:
        if not entry.spec and not (entry.code and entry.reason):
            yield f"{entry.label} stays float without a reason (code {entry.code!r})"
        if entry.spec and not (entry.reason and entry.forms):
            yield f"{entry.label} is quantized without a reason or a form"
    for operator in report.operators:
        if not operator.integer and not (operator.code or operator.reason):
            yield f"{operator.op} {operator.output} runs as {operator.runs!r} without a reason"
    codes = {d.code for d in report.diagnostics if d.severity == "warning"}
    if not report.quantized and not codes & {"QG320", "QG321"}:
        yield "nothing was quantized and no warning says so"


def file_problems(row: Row, output: Path, steps: int) -> Iterator[str]:
    """What is wrong with the file itself; `steps` is how many pairs of Q and DQ it holds."""
    if row.output_bytes > row.float_bytes + GROWTH + STEPS * steps:
        yield f"the file grew by {row.output_bytes - row.float_bytes} bytes"
    model = ir.load(output)
    for found in verify.verify(model):
        if found.severity == "error" or found.code == "V10":
            yield str(found)


def unseen_bytes(output: Path, result: compiler.Result) -> int:
    """Bytes of the large float constants that are not in the ledger."""
    known = {e.weight for e in result.report.ledger}
    held = [
        v.const_value
        for _, v in graph.initializers(ir.load(output))
        if v.name not in known and v.const_value is not None
    ]
    return sum(t.nbytes for t in held if t.dtype in graph.FLOATS and t.size >= 1024)


def check_ort(path: Path, output: Path, row: Row, reference: Reference) -> None:
    """The result runs in ONNX Runtime behind the same interface."""
    try:
        session = runtime.session(output, threads=1)
    except errors.RuntimeFailure as e:
        row.problems.append(f"does not load: {str(e)[:600]}")
        return
    if interface(session) != reference.interface:
        row.problems.append(f"the interface changed: {interface(session)}")
    try:
        found = [run(session, feed) for feed in reference.feeds]
    except errors.RuntimeFailure as e:
        row.problems.append(f"does not run: {str(e)[:600]}")
        return
    compare(row, reference, found)
    if is_available():
        check_old_ort(path, output, row, reference)


def check_old_ort(path: Path, output: Path, row: Row, reference: Reference) -> None:
    """The oldest ONNX Runtime takes the result if it takes the float model, and computes the same with it."""
    try:
        found = OLD.run(output.read_bytes(), reference.feeds)
    except Refused as e:
        try:
            OLD.run(path.read_bytes(), reference.feeds)
            row.problems.append(f"the oldest ONNX Runtime refuses it: {str(e)[:600]}")
        except Refused as other:
            row.notes.append(f"the oldest ONNX Runtime refuses the float model: {str(other)[:300]}")
        return
    known = len(row.problems)
    compare(row, reference, found)
    row.problems[known:] = [f"in the oldest ONNX Runtime: {p}" for p in row.problems[known:]]


def check_onnx(path: Path, output: Path, row: Row, reference: Reference) -> None:
    """As in ONNX Runtime, and the ONNX checker has nothing to say that it does not say of the float model."""
    check_ort(path, output, row, reference)
    problem = checker_says(output)
    if problem and not checker_says(path):
        row.problems.append(f"onnx.checker: {problem[:600]}")


def checker_says(path: Path) -> str:
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as e:
        return str(e)
    return ""


def check_openvino(path: Path, output: Path, row: Row, reference: Reference) -> None:
    """OpenVINO takes the result if it takes the float model, and computes the same with it."""
    found = run_openvino(output, reference)
    if isinstance(found, str):
        before = run_openvino(path, reference)
        if isinstance(before, str):
            row.notes.append(f"OpenVINO does not run the float model: {before[:300]}")
        else:
            row.problems.append(f"OpenVINO: {found[:600]}")
        return
    # Against OpenVINO's own float result where it differs from ONNX Runtime's; random outputs are left out.
    compare(row, reference, found)
    if not row.problems:
        return
    before, again = run_openvino(path, reference), run_openvino(path, reference)
    if isinstance(before, str) or isinstance(again, str):
        return
    unstable = {k for k in before[0] if not same(before[0][k], again[0][k])}
    row.notes += row.problems
    row.problems, row.sqnr_db = [], None
    compare(row, Reference(None, [], before, "", unstable | reference.unstable), found)


def run_openvino(path: Path, reference: Reference) -> Outputs | str:
    """Outputs by name for every feed, or why there are none."""
    import openvino

    try:
        core = openvino.Core()
        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
        compiled = core.compile_model(core.read_model(path), "CPU", config)
        known = {name for i in compiled.inputs for name in i.get_names()}
        results = []
        for feed in reference.feeds:
            answer = compiled({k: v for k, v in feed.items() if k in known})
            results.append({n: v for o, v in answer.items() for n in o.get_names()})
    except Exception as e:  # noqa: BLE001  OpenVINO's failures have no common base
        return str(e)
    return results


CHECKS: dict[str, Callable[[Path, Path, Row, Reference], None]] = {
    "ort": check_ort,
    "ort-qgraph": check_ort,  # the oldest runtime, without our library, runs the function bodies
    "onnx": check_onnx,
    "openvino": check_openvino,
}


def compare(row: Row, reference: Reference, found: Outputs) -> None:
    """Fill the SQNR of the worst float output; add a problem where the result has nothing to do with the model."""
    worst: float | None = None
    for name in reference.outputs[0] if reference.outputs else ():
        if name in reference.unstable or name not in found[0]:
            continue
        pairs = [(a[name], b[name]) for a, b in zip(reference.outputs, found, strict=True)]
        if not all(isinstance(a, np.ndarray) and a.dtype.kind == "f" for a, _ in pairs):
            continue
        if any(a.shape != b.shape for a, b in pairs):
            row.problems.append(
                f"output {name} has shape {pairs[0][1].shape}, not {pairs[0][0].shape}"
            )
            continue
        want, got = (np.concatenate([np.ravel(p[i]) for p in pairs]) for i in (0, 1))
        finite = np.isfinite(want)
        if not np.isfinite(got[finite]).all():
            row.problems.append(f"output {name} has NaN or Inf where the float model has none")
            continue
        if not finite.any() or not np.any(want[finite]):
            continue
        sqnr = numerics.sqnr_db(want[finite], got[finite])
        worst = sqnr if worst is None else min(worst, sqnr)
    if worst is None:
        return
    row.sqnr_db = min(worst, 999.0 if row.sqnr_db is None else row.sqnr_db)
    floor = FLOOR_DB if "int4" not in row.recipe else float("-inf")
    if not row.quantized:
        floor = 60.0
    if worst < floor:
        row.problems.append(f"SQNR is {worst:.1f} dB, below {floor:g}")


def summary(rows: Sequence[Row]) -> str:
    """Counts by target, recipe and outcome."""
    counts = collections.Counter(
        (r.target, r.recipe, f"refused {r.code}" if r.outcome == "refused" else r.outcome)
        for r in rows
    )
    lines = [f"{t:9} {r:13} {o:16} {n}" for (t, r, o), n in sorted(counts.items())]
    kept: collections.Counter[str] = collections.Counter()
    for row in rows:
        kept.update(row.reasons)
    kept_text = ", ".join(f"{code} x{n}" for code, n in sorted(kept.items()))
    return "\n".join([*lines, f"weights that stay float: {kept_text}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit status is 1 where anything crashed or came out wrong."""
    parser = argparse.ArgumentParser(description="Quantize every model of the test data.")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--only", default="*", help="glob over the path below QGRAPH_TEST_DATA")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one row")
    parser.add_argument("--json", type=Path, help="write the rows there")
    given = parser.parse_args(arguments)
    folder = os.environ.get("QGRAPH_TEST_DATA")
    if not folder:
        parser.error("set QGRAPH_TEST_DATA to the folder that holds the test models")
    models = find(Path(folder), given.only)
    if not models:
        parser.error(f"no model matches {given.only!r}")
    rows = []
    for row in sweep(
        Path(folder), models, given.recipes.split(","), given.targets.split(","), given.timeout
    ):
        rows.append(row)
        print(row.text(), flush=True)
    print(summary(rows))
    if given.json:
        given.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return int(any(r.outcome in ("CRASH", "WRONG") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
