"""Work that is interrupted, by SIGKILL too, goes on from its last finished block and ends in the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph import cuts, errors, files, workdir
from qgraph.models.builder import FLOAT, Builder

LAYERS, SIZE = 4, 64
SOLVER = """
import os, pathlib, time
from qgraph.passes.solvers.gptq import Gptq
from qgraph.passes.solvers.rtn import Rtn

class Counting(BASE):
    "A solver that counts, and stalls where it is told to."
    name = "counting"

    def solve(self, w, spec, stats, rng):
        with open("calls", "a") as stream:
            stream.write(".")
        if os.path.getsize("calls") == int(os.environ.get("STALL_AT", "0")):
            pathlib.Path("stalled").touch()
            time.sleep(120)
        return super().solve(w, spec, stats, rng)
"""


def network():
    """Residual blocks of two matrices: narrow between blocks, two values wide inside."""
    rng = np.random.default_rng(0)
    b = Builder("network")
    h = b.input("x", FLOAT, ["batch", SIZE])
    for i in range(LAYERS):
        up, down = (
            b.initializer(
                f"layer{i}.{name}", (rng.standard_normal((SIZE, SIZE)) / 8).astype(np.float32)
            )
            for name in ("up", "down")
        )
        h = b.op("Add", h, b.op("MatMul", b.op("Relu", b.op("MatMul", h, up)), down))
    b.output("y", h, FLOAT, ["batch", SIZE])
    return b.model()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model, samples, a recipe and a solver that counts its calls."""
    monkeypatch.chdir(tmp_path)
    files.save(network(), "model.onnx")
    rng = np.random.default_rng(1)
    np.savez("data.npz", x=rng.standard_normal((96, SIZE)).astype(np.float32))
    Path("solver.py").write_text(SOLVER.replace("BASE", "Gptq"))
    rule = {"id": "all", "weights": "int4.g32", "solver": "solver.py:Counting"}
    Path("recipe.json").write_text(json.dumps({"rules": [rule], "min_elements": 1}))
    return tmp_path


def optimize(output, work=None, **more):
    given = {"data": "data.npz", "inspect": False, "verify": "off", "work_dir": work, **more}
    return qgraph.optimize("model.onnx", "recipe.json", output=output, **given)


def calls():
    return Path("calls").stat().st_size


def kill_at_call(number, *more):
    """Run the command line until a call of the solver, and kill it there."""
    package = Path(qgraph.__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(package), "STALL_AT": str(number)}
    args = [
        "optimize",
        "model.onnx",
        "-o",
        "out.onnx",
        "-r",
        "recipe.json",
        "--data",
        "data.npz",
        "--work-dir",
        "work",
    ]
    child = subprocess.Popen([sys.executable, "-m", "qgraph", *args, *more], env=env)
    try:
        until = time.monotonic() + 100
        while not Path("stalled").exists() and time.monotonic() < until:
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def test_killed_work_goes_on_to_the_same_bytes(place):
    optimize("whole.onnx")
    Path("calls").unlink()
    kill_at_call(6)
    assert Path("stalled").exists() and not Path("out.onnx").exists()
    finished = sorted(p.name for p in Path("work").glob("block-*"))
    assert finished == ["block-0000.npz", "block-0001.npz"]
    Path("work/mine.txt").write_text("a note")
    before, told = calls(), []
    optimize("out.onnx", "work", progress=lambda what, share: told.append(what))
    assert calls() - before == 2 * LAYERS - 4  # of two blocks nothing is solved again
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()
    assert any(f"block 3 of {LAYERS}" in each for each in told)
    # Done: nothing is left to go on with, and what is not ours stays.
    assert [p.name for p in Path("work").iterdir()] == ["mine.txt"]


def test_a_killed_choice_of_formats_goes_on_to_the_same_bytes(place):
    Path("solver.py").write_text(
        SOLVER.replace("BASE", "Rtn")
    )  # weighed by itself: it asks for no data
    choices = ["int4.g32", "int8.g32"]
    rule = {"id": "all", "weights": "int4.g32", "choices": choices, "solver": "solver.py:Counting"}
    Path("recipe.json").write_text(json.dumps({"rules": [rule], "min_elements": 1}))
    optimize("whole.onnx", avg_bits=6.5)
    whole = calls()
    assert whole == 2 * LAYERS * (len(choices) + 1)  # each format is weighed, and one is solved
    Path("calls").unlink()
    kill_at_call(9, "--avg-bits", "6.5")
    assert Path("stalled").exists() and not Path("out.onnx").exists()
    finished = sorted(p.name for p in Path("work/choosing").glob("block-*"))
    assert finished == ["block-0000.npz", "block-0001.npz"]
    Path("calls").unlink()
    optimize("out.onnx", "work", avg_bits=6.5)
    assert calls() == whole - 2 * 2 * len(choices)
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()
    assert not list(Path("work").iterdir())


def interrupted(after):
    """Raise as Ctrl-C does, when a block begins."""

    def progress(what, share):
        if what.startswith(f"block {after + 1} of"):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("after", [1, LAYERS - 1])
def test_after_ctrl_c_report_and_bytes_are_those_of_a_whole_run(place, after, inputs):
    more = {"overrides": [f"options.solve-weights.inputs={inputs}"]}
    whole = optimize("whole.onnx", **more)
    with pytest.raises(KeyboardInterrupt):
        optimize("out.onnx", "work", progress=interrupted(after), **more)
    again = optimize("out.onnx", "work", **more)
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()
    assert [e.sqnr_db for e in again.ledger] == [e.sqnr_db for e in whole.ledger]
    assert again.report.diagnostics == whole.report.diagnostics


def test_work_for_something_else_is_refused_and_left_alone(place):
    with pytest.raises(KeyboardInterrupt):
        optimize("out.onnx", "work", progress=interrupted(1))
    held = {str(p): p.read_bytes() for p in Path("work").rglob("*.*")}
    other = files.load("model.onnx")
    value = other.graph.initializers["layer1.up"]
    value.const_value = ir.tensor(1.5 * value.const_value.numpy(), name=value.name)
    files.save(other, "other.onnx")
    np.savez("other.npz", x=np.ones((8, SIZE), np.float32))
    for change, named in (
        ({"overrides": ["seed=7"]}, "recipe.seed was 0, is 7"),
        ({"data": "other.npz"}, "data was"),
    ):
        with pytest.raises(errors.InputError) as caught:
            optimize("out.onnx", "work", **change)
        (found,) = caught.value.diagnostics
        assert found.code == "QG106" and named in found.message and "delete" in found.hint
    with pytest.raises(errors.InputError, match="model was"):
        qgraph.optimize("other.onnx", "recipe.json", data="data.npz", work_dir="work")
    assert {str(p): p.read_bytes() for p in Path("work").rglob("*.*")} == held
    assert any("inputs-0001-twin" in name for name in held)


def test_another_plan_is_refused(place):
    with pytest.raises(KeyboardInterrupt):
        optimize("out.onnx", "work", progress=interrupted(1))
    key = json.loads(Path("work/work.json").read_text())
    key["key"]["plan"] = "that of another day"
    Path("work/work.json").write_text(json.dumps(key))
    with pytest.raises(errors.InputError, match="plan was that of another day") as caught:
        optimize("out.onnx", "work")
    assert "measured" in caught.value.diagnostics[0].hint


def test_a_folder_of_other_files_is_refused(place):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    with pytest.raises(errors.InputError, match="thesis.txt") as caught:
        optimize("out.onnx", "mine")
    assert caught.value.diagnostics[0].code == "QG106"
    assert Path("mine/thesis.txt").read_text() == "years of work"


def test_recipes_without_data_resume_too(place):
    recipe = {"rules": [{"id": "all", "weights": "int4.g32"}], "min_elements": 1}
    given = {"inspect": False, "verify": "off"}
    qgraph.optimize("model.onnx", recipe, output="whole.onnx", **given)
    stop = interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        qgraph.optimize("model.onnx", recipe, work_dir="work", progress=stop, **given)
    qgraph.optimize("model.onnx", recipe, output="out.onnx", work_dir="work", **given)
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()


def test_what_was_half_written_is_swept_away_and_what_is_damaged_is_named(tmp_path):
    work = workdir.WorkDir(tmp_path / "w", {"a": 1})
    work.store("block-0000", {"x": np.arange(5)}, {"n": 2})
    (work.folder / ".half.part").write_bytes(b"half")
    again = workdir.WorkDir(work.folder, {"a": 1})
    assert not (work.folder / ".half.part").exists()
    arrays, facts = again.load("block-0000")
    np.testing.assert_array_equal(arrays["x"], np.arange(5))
    assert facts == {"n": 2} and again.load("block-0001") is None
    path = work.folder / "block-0000.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(errors.InputError, match="block-0000.npz cannot be read"):
        again.load("block-0000")
    (work.folder / "work.json").write_text("{")
    with pytest.raises(errors.InputError, match="work.json cannot be read"):
        workdir.WorkDir(work.folder, {"a": 1})


def test_differences_are_told_entry_by_entry(tmp_path):
    work = workdir.WorkDir(tmp_path / "w", {"recipe": {"a": 1, "b": {"c": ""}}, "model": "m" * 64})
    with pytest.raises(errors.InputError) as caught:
        work.require({"recipe": {"a": 1, "b": {"c": "x"}, "d": None}, "model": "n" * 64})
    text = caught.value.diagnostics[0].message
    assert 'recipe.b.c was "", is x' in text and "recipe.d was absent, is null" in text
    assert f"model was {'m' * 16}…, is {'n' * 16}…" in text and "recipe.a" not in text


def test_digests_tell_models_apart():
    model = network()
    whole = workdir.digest(model)
    assert workdir.digest(network()) == whole
    value = model.graph.initializers["layer3.down"]
    changed = value.const_value.numpy().copy()
    changed[5, 7] += 1e-3
    value.const_value = ir.tensor(changed, name=value.name)
    assert workdir.digest(model) != whole
    renamed = network()
    next(n for n in renamed.graph if n.op_type == "Relu").op_type = "Sigmoid"
    assert workdir.digest(renamed) != whole


def test_blocks_end_where_only_the_residual_stream_is_alive():
    model = network()
    order = cuts.Order(model)
    places = [i for i, n in enumerate(order.nodes) if n.op_type == "MatMul"]
    found = list(cuts.blocks(order, places))
    assert [held for _, held in found] == [places[i : i + 2] for i in range(0, len(places), 2)]
    for start, _ in found:
        assert order.width(start) == len(order.alive(start)) == 1
    for place in range(len(order.nodes) + 1):
        assert order.width(place) == len(order.alive(place))
