"""What importing the package does to the environment, and when."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def environment_after(code: str, **given: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    code += f"; import os; print(*(os.environ.get(name, '-') for name in {NAMES}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["1000", "-"]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", "-"]),
        ({"OMP_WAIT_POLICY": "active"}, ["-", "active"]),
    ],
)
def test_idle_threads_spin_briefly_unless_the_user_says_otherwise(given, expected):
    assert environment_after("import strawberry", **given) == expected


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "sample", "serve", "bench"])
def test_scripts_set_it_before_torch_is_loaded(script):
    """libgomp reads the environment once, when torch loads it."""
    code = (
        "import sys, builtins; seen = []; load = builtins.__import__\n"
        "def watch(name, *rest):\n"
        "    if name == 'torch' and not seen: seen.append(__import__('os').environ.get('GOMP_SPINCOUNT'))\n"
        "    return load(name, *rest)\n"
        f"builtins.__import__ = watch\nimport {script}\nassert seen == ['1000'], seen\nNone"
    )
    assert environment_after(code)[0] == "1000"
