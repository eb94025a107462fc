"""`qgraph recipes`, `targets`, `passes`, `solvers`, `models`, `doctor`."""

import onnx
import pytest

from qgraph import models, recipe, registry, runtime
from qgraph.pipeline import PassOptions
from qgraph.runtime import Check

KINDS = {
    "recipes": lambda: list(recipe.PRESETS),
    "targets": lambda: registry.names("target"),
    "passes": lambda: registry.names("pass"),
    "solvers": lambda: registry.names("solver"),
    "models": models.names,
}
ALL = [(kind, name) for kind, names in KINDS.items() for name in names()]


@pytest.mark.parametrize("kind", KINDS)
def test_lists(run, kind):
    done = run(kind)
    assert (done.code, done.err) == (0, "")
    listed = run(kind, "--json").json[kind]
    assert [each["name"] for each in listed] == KINDS[kind]()
    for each in listed:
        assert each["name"] in done.out
        assert each["summary"]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_one_in_full(run, kind, name):
    done = run(kind, name)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(name)
    assert len(done.out.splitlines()) >= 3
    assert run(kind, name, "--json").json["name"] == name


def test_a_recipe_shows_the_passes_that_run(run):
    out = run("recipes", "int4").out
    places = [out.index(f" {name} ") for name in recipe.PRESETS["int4"].pipeline]
    assert places == sorted(places)
    assert "uint4.g32.asym" in out


def test_a_recipe_as_json_can_be_given_back(run, tmp_path):
    (tmp_path / "copy.json").write_text(run("recipes", "int4", "--json").out)
    assert (
        run("recipes", tmp_path / "copy.json", "--json").out == run("recipes", "int4", "--json").out
    )


def test_a_recipe_file(run, tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "int4"\n[[rules]]\nnames = "*.weight"\n')
    assert "named *.weight" in run("recipes", tmp_path / "mine.toml").out


def test_every_field_of_a_rule_is_shown(run, tmp_path):
    fields = "id='r'\nops='MatMul'\nnames='a*'\nmin_elements=77\nweights='int8'\nsolver='rtn'\nreason='why'\n"
    (tmp_path / "mine.toml").write_text(f"[[rules]]\n{fields}tied=true\n")
    out = run("recipes", tmp_path / "mine.toml").out
    for text in ("MatMul", "named a*", "77 elements", "int8", "rtn", "why", "tied = True"):
        assert text in out


def test_a_pass_with_options(run):
    found = run("passes", "canonicalize", "--json").json
    assert found.keys() == {
        "name",
        "summary",
        "keeps",
        "needs",
        "gives",
        "breaks",
        "options",
        "text",
    }
    by_key = {each["key"]: each for each in found["options"]}
    assert by_key["fold_batch_norm"]["default"] is True
    assert "callers can no longer override" in by_key["freeze_inputs"]["help"]
    assert "--set options.canonicalize.KEY=VALUE" in run("passes", "canonicalize").out


def test_help_of_options_is_the_text_below_them():
    from qgraph.cli import catalogue

    class Options(PassOptions):
        """Options."""

        first: int = 1
        """The first
        of them."""
        second: float
        third: str = "x"
        """The third."""

    fields = catalogue.option_fields(Options)
    assert [f["help"] for f in fields] == ["The first of them.", "", "The third."]
    assert [f["default"] for f in fields] == [1, "(required)", "x"]
    assert [f["type"] for f in fields] == ["int", "float", "str"]


def test_a_target_of_a_file(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from qgraph import Target\nMINE = Target(name='mine', summary='a target', forms={})\n"
    )
    assert "mine: a target" in run("targets", f"{tmp_path / 'mine.py'}:MINE").out


def test_a_model_is_written(run, tmp_path, snapshot):
    out = tmp_path / "m.onnx"
    assert run("models", "tiny-cnn", "-o", out).code == 0
    onnx.checker.check_model(onnx.load(out), full_check=True)
    assert "exists already" in run("models", "tiny-cnn", "-o", out).err
    assert run("models", "tiny-cnn", "-o", out, "--force").code == 0
    assert snapshot(tmp_path).keys() == {"m.onnx"}


def test_doctor(run):
    done = run("doctor")
    assert done.code == 0, done.out
    assert "native library" in done.out
    found = run("doctor", "--json").json
    assert found["ok"] is True
    assert found["checks"][0].keys() == {"name", "ok", "detail", "hint", "required"}


def test_doctor_fails_where_something_needed_is_missing(run, monkeypatch):
    checks = [Check("native library", False, "is missing", "pip install qgraph")]
    monkeypatch.setattr(runtime, "doctor", lambda: checks)
    done = run("doctor")
    assert done.code == 1
    assert "MISSING" in done.out
    assert "native library: pip install qgraph" in done.out
    failed = run("doctor", "--json")
    assert (failed.code, failed.json["ok"]) == (1, False)


def test_doctor_only_advises_what_is_not_needed(run, monkeypatch):
    checks = [Check("huge pages", False, "never", "echo madvise")]
    monkeypatch.setattr(runtime, "doctor", lambda: checks)
    done = run("doctor")
    assert done.code == 0
    assert "huge pages: echo madvise" in done.out
