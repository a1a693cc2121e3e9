"""The examples (>>>) in docstrings print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEED_A_MODEL = {"strawberry/cache.py", "strawberry/inference/engine.py"}  # sketches of use, without output
FILES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *ROOT.glob("strawberry/**/*.py")]
               if ">>> " in path.read_text("utf-8"))  # fmt: skip


@pytest.mark.parametrize("file", [file for file in FILES if file not in NEED_A_MODEL])
def test_examples_of_docstrings(file: str):
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


def test_exceptions_have_examples():
    assert set(FILES) > NEED_A_MODEL
