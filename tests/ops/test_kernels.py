"""The kernels in Triton's interpreter, each group in a process of its own; without Triton; with --cuda, on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machine import require_module

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.common import INTERPRETED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROJECTIONS = "rope or float8 or quantize or linear"
# a partition of tests/ops/kernels_in_interpreter.py into parts of about 40 s, as expressions for pytest's -k
GROUPS = ["aft", f"not aft and ({PROJECTIONS})", f"not aft and not ({PROJECTIONS})"]


def run_python(*args: str, **variables: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("group", GROUPS, ids=["aft", "projections", "others"])
def test_kernels_in_the_interpreter(group):
    require_module("triton")
    file = "tests/ops/kernels_in_interpreter.py"
    run = run_python("-m", "pytest", "-q", "-x", file, "-k", group, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout


def test_the_interpreter_is_off_in_other_tests():
    assert not INTERPRETED and not kernels.can_run(torch.zeros(1))


def test_plain_paths_run_without_triton():
    run = run_python(
        "-c",
        """
import sys
sys.modules["triton"] = None
import torch
from strawberry.ops.attention import decode_attention
from strawberry.ops.linear import int8_linear
from strawberry.ops.triton.common import can_run
x, w = torch.eye(3), torch.tensor([[3, 4, 5]], dtype=torch.int8)
assert not can_run(x)
assert int8_linear(x, w, torch.tensor([2.0])).flatten().tolist() == [6, 8, 10]
k = torch.ones(1, 5, 3)
assert decode_attention(x[None], k, k * 7, torch.tensor([1]), 4, 1.0).flatten().tolist() == [7.0] * 9
""",
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.cuda
@pytest.mark.whole_gpu
def test_kernels_on_a_gpu():
    """Each against float64; what it prints of times is not judged."""
    run = run_python("bench.py", "kernels")
    assert run.returncode == 0, run.stdout + run.stderr
