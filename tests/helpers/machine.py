"""What tests need of the machine, and how much of each they do.

Where something is missing, a test is skipped; in CI (CI=true) it fails and names it.
"""

import importlib.util
import os
import shutil

import pytest

FULL = bool(os.environ.get("TORTURE"))


def count(few: int, many: int) -> int:
    """How often: few times in every run of the tests, many under `make torture`."""
    return many if FULL else few


def is_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def require(is_there: object, what: str, whole_file: bool = False) -> None:
    """Skip the running test, or the whole file from its top, where `what` is missing; in CI fail instead."""
    if is_there:
        return
    if is_ci():
        pytest.fail(f"CI lacks {what}, which this test needs; elsewhere it would be skipped", pytrace=False)
    pytest.skip(f"needs {what}", allow_module_level=whole_file)


def require_program(*names: str) -> str:
    """The path of the first of these programs that is there."""
    found = [path for name in names if (path := shutil.which(name))]
    require(found, " or ".join(names))
    return found[0]


def require_module(name: str, whole_file: bool = False) -> None:
    require(importlib.util.find_spec(name), f"the Python package {name}", whole_file)
