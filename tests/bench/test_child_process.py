"""Which GPU each child of bench.py is given, as the children report it. The GPUs are simulated."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from strawberry.bench import child_process
from strawberry.bench.child_process import GpuPool

# A child: reports what it sees and when, waits for its turn where it has one, and ends when the file "end" is there.
CHILD = """
import json, os, sys, time
name, mode, *partner = sys.argv[1:]
if mode == "measures":
    print("ready", flush=True)
    sys.stdin.readline()
began = time.time()
open(f"begun_{name}", "w").close()
while partner and not os.path.exists(f"begun_{partner[0]}"):
    time.sleep(0.01)
while mode == "waits" and not os.path.exists("end"):
    time.sleep(0.01)
time.sleep(0.05 if mode == "measures" else 0)
if mode == "fails":
    sys.exit("error: no memory")
print(json.dumps({"name": name, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": began, "ended": time.time()}))
"""


@pytest.fixture
def simulate_gpus(tmp_path, monkeypatch):
    """Sets the number of GPUs that torch finds, and the user's CUDA_VISIBLE_DEVICES."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(child_process, "make_command", lambda role, *words: [sys.executable, "-c", CHILD, *words])
    monkeypatch.setattr(child_process, "POLL_SECONDS", 0.01)

    def set_gpus(count: int, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return set_gpus


def run_children(count, jobs, mode="ends", device="auto"):
    rows = dict(child_process.run_at_once("_x", [[str(i), mode] for i in range(count)], jobs, device))
    assert [rows[i]["name"] for i in range(count)] == [str(i) for i in range(count)]
    return [rows[i]["gpu"] for i in range(count)]


def test_eight_children_are_two_on_each_of_four_gpus(simulate_gpus, tmp_path):
    simulate_gpus(4)
    gpus, log = GpuPool(), tmp_path / "log.txt"
    start = lambda name: child_process.start(  # noqa: E731
        child_process.make_command("_x", name, "waits"), log, 8, gpus, stdout=-1
    )
    children = [start(str(i)) for i in range(8)]
    (tmp_path / "end").touch()
    output = [json.loads(child.communicate()[0])["gpu"] for child in children]
    assert Counter(output) == {"0": 2, "1": 2, "2": 2, "3": 2}


def test_a_gpu_whose_child_ended_goes_to_the_next_child(simulate_gpus, tmp_path):
    simulate_gpus(3)
    gpus, log = GpuPool(), tmp_path / "log.txt"
    start = lambda mode: child_process.start(  # noqa: E731
        child_process.make_command("_x", "a", mode), log, 3, gpus, stdout=-1
    )
    children = [start("waits"), start("ends"), start("waits")]
    children[1].wait()
    children.append(start("waits"))
    (tmp_path / "end").touch()
    assert [json.loads(child.communicate()[0])["gpu"] for child in children] == ["0", "1", "2", "1"]


@pytest.mark.parametrize("count, visible, expected", [
    (2, "2,3", {"2", "3"}),
    (2, "GPU-8932f937-d72c, GPU-11aa22bb-0000", {"GPU-8932f937-d72c", "GPU-11aa22bb-0000"}),
    (2, "4,6,-1,7", {"4", "6"}),  # CUDA sees what is before the first entry that is no GPU
    (2, None, {"0", "1"}),
    (1, None, {None}),  # nothing to choose: the environment is the user's
    (1, "3", {"3"}),
    (0, None, {None}),
])  # fmt: skip
def test_cuda_visible_devices_of_the_user_is_respected(simulate_gpus, count, visible, expected):
    simulate_gpus(count, visible)
    assert set(run_children(2, 2, "ends")) == expected


def test_a_run_on_the_cpu_is_given_no_gpu(simulate_gpus):
    simulate_gpus(4)
    assert run_children(2, 2, device="cpu") == [None, None]


def test_at_most_jobs_children_run_at_once_and_a_failure_ends_no_other(simulate_gpus):
    simulate_gpus(2)
    words = [["a", "measures"], ["b", "fails"], ["c", "measures"], ["d", "measures"]]
    rows = dict(child_process.run_at_once("_x", words, 1))
    assert rows.pop(1) == {"why": "no memory"}
    assert all(rows[a]["ended"] <= rows[b]["began"] for a, b in ((0, 2), (2, 3)))
    assert {row["gpu"] for row in rows.values()} == {"0"}  # one at a time: the first GPU is always free


def test_speeds_are_measured_one_at_a_time_on_each_gpu(simulate_gpus):
    simulate_gpus(2)
    partners = {"a": "b", "b": "a", "c": "d", "d": "c"}  # each ends only when its partner has begun
    rows = child_process.run_in_turns("_x", [[name, "measures", partner] for name, partner in partners.items()])
    assert [(row["name"], row["gpu"]) for row in rows] == [("a", "0"), ("b", "1"), ("c", "0"), ("d", "1")]
    assert max(row["ended"] for row in rows[:2]) <= min(row["began"] for row in rows[2:])
    simulate_gpus(1)
    rows = child_process.run_in_turns("_x", [[name, "measures"] for name in "ab"])
    assert rows[0]["ended"] <= rows[1]["began"]


def test_children_are_killed_when_the_caller_stops(simulate_gpus):
    simulate_gpus(0)
    rows = child_process.run_at_once("_x", [["a", "ends"], ["b", "waits"]], 2)
    assert next(rows)[0] == 0
    began = time.time()
    rows.close()
    assert time.time() - began < 30 and not Path("end").exists()
