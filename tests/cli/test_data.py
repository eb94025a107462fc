"""`--data`, `--preprocess` and `--samples` in every command that takes them."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def options(photos, count=3):
    return ["--data", photos, "--preprocess", "values=0..1", "--samples", count]


def test_compare_on_images(run, cnn, photos):
    done = run("compare", cnn, cnn, *options(photos), "--rounds", 1, "--json")
    assert done.code == 0
    assert done.json["samples"] == 3
    assert "note QG152" in done.err and "8x8" in done.err
    assert "3 of 6 samples are used (spread)" in done.err


def test_optimize_holds_a_floor_on_images(run, cnn, photos, tmp_path):
    args = ("optimize", cnn, "-r", "int8-weights", "--no-inspect", *options(photos))
    assert run(*args, "-o", tmp_path / "good.onnx", "--min-sqnr", 5).code == 0
    assert run(*args, "-o", tmp_path / "bad.onnx", "--min-sqnr", 300).code == 3


def test_bisect_on_images(run, cnn, photos):
    done = run("bisect", cnn, "-r", "int8-weights", *options(photos), "--min-sqnr", 5, "--json")
    assert done.code == 0
    assert done.json["guilty"] == []


@pytest.mark.parametrize("command", [("compare",), ("bisect",)])
def test_a_wrong_key_is_told(run, cnn, photos, command):
    models = [cnn, cnn] if command == ("compare",) else [cnn]
    done = run(*command, *models, "--data", photos, "--preprocess", "valeus=0..1", "--json")
    assert (done.code, done.codes()) == (1, ["QG150"])


def test_preprocess_without_data(run, cnn):
    done = run("bisect", cnn, "--preprocess", "values=0..1", "--json")
    assert done.codes() == ["QG131"]
