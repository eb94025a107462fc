"""What an installed qgraph consists of. Only meaningful where the tests run against a wheel (.ci/run)."""

import importlib.metadata
import os
from pathlib import Path

import pytest

import qgraph
from qgraph.runtime import library

INSTALLED = pytest.mark.skipif(
    os.environ.get("QGRAPH_TEST_INSTALLED") != "1",
    reason="QGRAPH_TEST_INSTALLED=1 says that a wheel is under test",
)


@INSTALLED
def test_the_tests_see_the_installed_package():
    checkout = Path(__file__).resolve().parents[2]
    for folder in qgraph.__path__:
        assert checkout not in Path(folder).resolve().parents
    assert Path(library.library_path()).parents[1] == Path(qgraph.__path__[0])


@INSTALLED
def test_the_wheel_holds_everything_and_no_stranger():
    files = [str(f) for f in importlib.metadata.files("qgraph")]
    own = [f for f in files if not f.startswith(("qgraph-", ".."))]
    assert all(f.startswith("qgraph/") for f in own)
    for wanted in ("qgraph/py.typed", "qgraph/passes/__init__.py", "qgraph/models/__init__.py"):
        assert wanted in own
    assert len([f for f in own if f.startswith("qgraph/_lib/libqgraph_ops.")]) == 1
    assert not [f for f in own if f.endswith((".cc", ".h", ".pyc.tmp"))]


@INSTALLED
def test_the_wheel_serves_every_python_3():
    wheel = importlib.metadata.distribution("qgraph").read_text("WHEEL")
    tags = [line.partition(": ")[2] for line in wheel.splitlines() if line.startswith("Tag:")]
    assert tags
    assert all(tag.startswith("py3-none-") and not tag.endswith("-any") for tag in tags)
