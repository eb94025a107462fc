"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

import qgraph

PACKAGE = Path(qgraph.__path__[0])
WITH_EXAMPLES = sorted(
    ".".join(("qgraph", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_were_found() -> None:
    assert "qgraph.spec" in WITH_EXAMPLES
