"""`qgraph bisect`: the guilty pass, the guilty weights, and what it says of its search."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from qgraph import bisect, files, models, recipe, verify
from qgraph.bisect.search import _smallest
from qgraph.cli.bisect import explain
from qgraph.models.odd import ODD

KEYS = {"found", "check", "guilty", "trials", "is_spread", "remedy", "saved"}


def test_nothing_to_find(run, cnn):
    done = run("bisect", cnn, "-r", "int8-weights")
    assert (done.code, done.err) == (0, "")
    assert "Check: the model runs, and its SQNR is at least 10 dB" in done.out
    assert "The check holds with recipe int8-weights: nothing to find." in done.out


def test_the_pass_that_is_wrong(run, cnn, recipe_with, tmp_path):
    done = run("bisect", cnn, "-r", recipe_with("Silences"), "--dump-dir", tmp_path / "found")
    assert done.code == 0
    assert "FAILS  after silences" in done.out
    assert "The first bad pass is silences." in done.out
    for name in ("good", "bad"):
        onnx.checker.check_model(onnx.load(tmp_path / "found" / f"{name}.onnx"))


def test_json(run, cnn, recipe_with):
    found = run("bisect", cnn, "-r", recipe_with("Silences"), "--json").json
    assert found.keys() == KEYS
    assert found["found"] is True
    assert found["guilty"] == ["silences"]
    assert [t["what"] for t in found["trials"]] == [
        "the float model",
        "after canonicalize",
        "after silences",
    ]
    assert [t["ok"] for t in found["trials"]] == [True, True, False]


def test_a_pass_that_raises(run, cnn, poisoned):
    # NaN is no float model that could be compared with: only whether it loads can be asked.
    done = run("bisect", poisoned, "-r", "int8-weights", "--check", "load")
    assert "The first bad pass is solve-weights." in done.out
    assert "QG401" in done.out


@pytest.mark.parametrize("check", ["verify", "load", "run"])
def test_checks(run, cnn, recipe_with, check):
    found = run("bisect", cnn, "-r", recipe_with("Flattens"), "--check", check, "--json").json
    assert found["guilty"] == ["flattens"]
    assert "Convolve" in found["trials"][-1]["detail"]
    fine = run("bisect", cnn, "-r", "int8-weights", "--check", check, "--json").json
    assert fine["found"] is False


def test_floors(run, cnn, images):
    args = ("-r", "int8-weights", "--data", images)
    assert run("bisect", cnn, *args, "--min-sqnr", 10, "--json").json["found"] is False
    assert run("bisect", cnn, *args, "--min-sqnr", 99, "--json").json["guilty"] == ["insert-qdq"]
    assert run("bisect", cnn, *args, "--max-kl", 1e-9, "--json").json["guilty"] == ["insert-qdq"]


def test_tokens(run, tmp_path):
    np.save(tmp_path / "tokens.npy", models.eval_tokens("tiny-llama")[:1024])
    args = ("--tokens", tmp_path / "tokens.npy", "--context", 256, "-r", "int4")
    found = run("bisect", "zoo:tiny-llama", *args, "--max-kl", "1e-9", "--json").json
    assert found["guilty"] == ["insert-qdq"]
    assert found["check"] == "KL divergence on tokens is at most 1e-09 nats"


def test_a_float_model_that_fails_already(run, tmp_path):
    """No output of this model holds predictions, so that there is no KL divergence."""
    path = files.save(ODD["shared_weight"](), tmp_path / "odd.onnx")
    done = run("bisect", path, "--max-kl", "0.1", "--json")
    assert done.code == 1
    assert done.codes() == ["QG710"]
    assert "no output looks like predictions" in done.err


def test_the_weight_that_is_wrong(run, cnn, images, tmp_path):
    """One convolution alone in 2 bits per tensor: it does the damage, and a rule that keeps it float repairs it."""
    (tmp_path / "mine.toml").write_text(
        'extends = "int8-weights"\n[[rules]]\nnames = "residual1.conv.weight"\nweights = "int2.tensor"\n'
    )
    args = ("bisect", cnn, "-r", tmp_path / "mine.toml", "--target", "onnx", "--data", images)
    args = (*args, "--min-sqnr", 20, "--weights")
    found = run(*args, "--json").json
    assert found["guilty"] == ["residual1.conv.weight"]
    assert found["is_spread"] is False
    assert found["remedy"]["ok"] is True
    done = run(*args)
    assert "only residual1.conv.weight quantized" in done.out
    assert 'names = ["residual1.conv.weight"]\n  weights = "float"' in done.out


def test_no_weight_is_wrong(run, cnn, images):
    args = ("-r", "int8-weights", "--data", images, "--weights", "--min-sqnr", 10)
    assert "nothing to find" in run("bisect", cnn, *args).out


def test_a_pass_is_wrong_and_no_weight(run, cnn, recipe_with):
    done = run("bisect", cnn, "-r", recipe_with("Silences"), "--weights")
    assert done.code == 1
    assert "error QG711" in done.err
    assert "without --weights finds it" in done.err


def test_weights_that_only_fail_together(run, cnn, images, tmp_path):
    """The floor lies between what one of the two does and what both do."""
    two = ["residual1.conv.weight", "residual2.conv.weight"]
    (tmp_path / "mine.toml").write_text(
        f'extends = "auto"\n[[rules]]\nnames = {json.dumps(two)}\nweights = "int4.tensor"\n'
    )
    args = ("bisect", cnn, "-r", tmp_path / "mine.toml", "--target", "onnx", "--data", images)
    args = (*args, "--weights", "--json", "--min-sqnr")
    worst = [t["detail"] for t in run(*args, 99).json["trials"]]
    decibels = [float(re.search("logits ([0-9.]+) dB", text)[1]) for text in worst if " dB" in text]
    floor = (min(decibels) + sorted(decibels)[1]) / 2
    found = run(*args, floor).json
    assert sorted(found["guilty"]) == two
    assert found["remedy"]["ok"] is True


def test_an_error_that_is_spread(capsys):
    trials = [bisect.Trial("all 40 weights quantized", False, "y 9.1 dB")]
    found = bisect.Found("the model runs", tuple("abcdefgh"), trials, is_spread=True)
    explain(found, "int4", is_of_weights=True)
    out = capsys.readouterr().out
    assert "Even the 8 weights below do not fail alone: the error is spread" in out
    assert "[[rules]]" not in out


@pytest.mark.parametrize("size", range(1, 5))
def test_a_smallest_set_is_found_with_few_trials(size):
    names = [f"w{i}" for i in range(32)]
    for guilty in itertools.islice(itertools.combinations(names, size), 0, 40000, 997):
        tried = []

        def fails(some, guilty=guilty, tried=tried):
            tried.append(some)
            return set(guilty) <= set(some)

        found, is_spread = _smallest(names, fails)
        assert sorted(found) == sorted(guilty)
        assert not is_spread
        assert len(tried) <= size * 6 + size + 1


def test_too_large_a_set_is_given_up():
    found, is_spread = _smallest([str(i) for i in range(40)], lambda some: len(some) >= 30)
    assert is_spread
    assert len(found) == 8


def test_from_python(cnn, tmp_path, snapshot):
    before = snapshot(tmp_path)
    check = bisect.Accuracy(cnn, verify.sample_feeds(cnn), min_sqnr=10)
    found = bisect.bad_pass(cnn, recipe.load("int8-weights"), check)
    assert found.guilty == ()
    assert all(trial.ok for trial in found.trials)
    assert snapshot(tmp_path) == before


def test_a_check_of_your_own(cnn):
    class Small:
        name = "the file is small"

        def __call__(self, path: Path) -> bisect.Outcome:
            size = path.stat().st_size
            return bisect.Outcome(size > 200_000, f"{size} bytes")

    found = bisect.bad_pass(cnn, recipe.load("int8-weights"), Small())
    assert found.guilty == ("insert-qdq",)
