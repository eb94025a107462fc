"""Every Python block of the guides runs, in the order of the page; every recipe in them loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qgraph import recipe

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/authors.md", "docs/guide.md"]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    if not code:
        pytest.skip("the page has no Python")
    script = tmp_path / "page.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_recipes_load(page: str, tmp_path: Path) -> None:
    for index, text in enumerate(b for b in blocks(page, "toml") if "rules" in b or "extends" in b):
        path = tmp_path / f"recipe{index}.toml"
        path.write_text(text, encoding="utf-8")
        assert recipe.load(path).rules


def test_the_pass_of_the_author_guide_is_short() -> None:
    first = blocks("docs/authors.md", "python")[0]
    body = first[first.index("class DropDropout") :]
    assert len(body.strip().splitlines()) <= 20


def test_the_reference_is_current() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import runpy, sys; sys.stdout.write(runpy.run_path(sys.argv[1])['text']())",
            str(ROOT / "docs/make_reference.py"),
        ],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs/reference.md").read_text(encoding="utf-8") == done.stdout, (
        "run python docs/make_reference.py"
    )
