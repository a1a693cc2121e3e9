"""What importing the package does to the environment, and when."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THREADS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def environment_after(code: str, names: tuple[str, ...] = THREADS, **given: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if name not in names} | given
    code += f"; import os; print(*(os.environ.get(name, '-') for name in {names}))"
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


def test_compiled_code_is_cached_where_the_next_run_finds_it(tmp_path):
    folders = [str(tmp_path / "strawberry" / name) for name in ("torchinductor", "triton")]
    assert environment_after("import strawberry", CACHES, XDG_CACHE_HOME=str(tmp_path)) == folders
    given = {"XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": "mine"}
    assert environment_after("import strawberry", CACHES, **given) == [folders[0], "mine"]
    assert not list(tmp_path.iterdir())


def test_the_cache_is_torchs_own_where_no_other_directory_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    for home in ("file", "file/below"):
        assert environment_after("import strawberry", CACHES, XDG_CACHE_HOME=str(tmp_path / home)) == ["-", "-"]


@pytest.mark.slow
def test_torch_reads_the_cache_s_directory_and_flag(tmp_path):
    code = ("import strawberry, torch, torch._functorch.config as config\n"
            "assert config.autograd_cache_allow_custom_autograd_functions\n"
            "import os, runpy\n"  # the file alone: its package takes seconds to import
            "path = os.path.join(os.path.dirname(torch.__file__), '_inductor', 'runtime', 'cache_dir_utils.py')\n"
            "utils = runpy.run_path(path)\n"
            "assert [utils['cache_dir'](), utils['triton_cache_dir'](0)] == [os.environ[name] for name in "
            f"{CACHES}]\nNone")  # fmt: skip
    environment_after(code, CACHES, XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "sample", "serve", "bench"])
def test_scripts_set_the_environment_before_torch_is_imported(script):
    """libgomp reads the environment once, when torch loads it. Nothing is loaded here: the first import of torch ends
    the process."""
    code = (
        "import os, sys, builtins; load = builtins.__import__\n"
        "def watch(name, *rest):\n"
        "    if name.partition('.')[0] == 'torch': print(os.environ.get('GOMP_SPINCOUNT')), sys.exit()\n"
        "    return load(name, *rest)\n"
        f"builtins.__import__ = watch\nimport {script}\nNone"
    )
    assert environment_after(code) == ["1000"]
