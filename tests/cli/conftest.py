"""A command line in this process, and models on disk."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from qgraph import files
from qgraph.cli import app


class Done:
    """What a command line did."""

    def __init__(self, result):
        self.code = result.exit_code
        self.out = result.stdout
        self.err = result.stderr

    @property
    def json(self):
        return json.loads(self.out)

    def codes(self):
        return [e["code"] for e in self.json["errors"]]


@pytest.fixture
def run():
    try:
        runner = CliRunner(mix_stderr=False)  # before click 8.2
    except TypeError:
        runner = CliRunner()

    def call(*args, **kwargs):
        return Done(runner.invoke(app.app, [str(a) for a in args], prog_name="qgraph", **kwargs))

    return call


@pytest.fixture(scope="session")
def cnn_file(tmp_path_factory):
    return files.save(
        files.load("zoo:tiny-cnn"), tmp_path_factory.mktemp("models") / "tiny-cnn.onnx"
    )


@pytest.fixture
def cnn(cnn_file, tmp_path):
    """A copy of tiny-cnn in a folder of its own."""
    return Path(shutil.copy(cnn_file, tmp_path / "cnn.onnx"))


@pytest.fixture
def external(tmp_path):
    """tiny-cnn with its weights in cnn.onnx.data."""
    return files.save(files.load("zoo:tiny-cnn"), tmp_path / "cnn.onnx", external_data=True)


@pytest.fixture
def images(tmp_path_factory):
    """Four samples that tiny-cnn takes."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    image = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    np.savez(path, image=image)
    return path


@pytest.fixture
def poisoned(cnn):
    """tiny-cnn with a NaN in one weight."""
    model = onnx.load(cnn)
    tensor = next(t for t in model.graph.initializer if t.name == "residual1.conv.weight")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3, 0, 0, 0] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, cnn)
    return cnn


def listing(folder):
    """Every file of a folder with its bytes, hidden ones too."""
    return {
        os.path.relpath(Path(root) / name, folder): (Path(root) / name).read_bytes()
        for root, _, names in os.walk(folder)
        for name in names
    }


@pytest.fixture
def snapshot():
    return listing


USER_PASSES = """
import numpy as np
import qgraph
from qgraph import graph

class Breaks(qgraph.Pass):
    "Scales a weight, and claims that nothing changes."
    name = "breaks"
    keeps = qgraph.Keeps.BIT_EXACT
    def run(self, model, ctx):
        weight = max((v for _, v in graph.initializers(model)), key=lambda v: v.const_value.nbytes)
        weight.const_value = graph.ir.tensor(graph.array(weight) * 0.5, name=weight.name)
        return True

class Raises(qgraph.Pass):
    "Has a fault."
    name = "raises"
    def run(self, model, ctx):
        return 1 / 0

class Flattens(qgraph.Pass):
    "Leaves a model that no runtime loads."
    name = "flattens"
    def run(self, model, ctx):
        node = next(n for n in model.graph if n.op_type == "Conv")
        node.op_type = "Convolve"
        return True

class Silences(qgraph.Pass):
    "Makes a weight zero, without a claim."
    name = "silences"
    def run(self, model, ctx):
        weight = max((v for _, v in graph.initializers(model)), key=lambda v: v.const_value.nbytes)
        weight.const_value = graph.ir.tensor(np.zeros_like(graph.array(weight)), name=weight.name)
        return True
"""


@pytest.fixture
def recipe_with(tmp_path_factory):
    """A recipe file whose pipeline is canonicalize and one pass of USER_PASSES."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "mine.py").write_text(USER_PASSES)

    def write(name):
        path = folder / f"{name}.json"
        pipeline = ["canonicalize", f"{folder / 'mine.py'}:{name}", "cleanup"]
        path.write_text(json.dumps({"pipeline": pipeline}))
        return path

    return write
