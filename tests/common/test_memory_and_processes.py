"""What the machine has: its memory within a container's limit, and which process a number still names."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from machine import require

from strawberry import machine


@pytest.mark.parametrize("limit,used,expected", [
    ("1000\n", "300\n", (700, 1000)),
    ("1000\n", "1300\n", (0, 1000)),  # a container may be over its limit for a moment
    ("max\n", "300\n", None),
    (str(1 << 60), "300\n", None),
    ("1000\n", None, None),
    (None, None, None),
])  # fmt: skip
def test_memory_is_within_the_containers_limit(tmp_path, monkeypatch, limit, used, expected):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    for name, text in (("memory.max", limit), ("memory.current", used)):
        if text is not None:
            (tmp_path / name).write_text(text)
    free, total = machine.memory()
    if expected:
        assert (free, total) == expected
    else:
        assert 0 < free < total == psutil.virtual_memory().total


def test_memory_is_what_the_system_says():
    require(hasattr(os, "sysconf"), "sysconf")
    pages = os.sysconf("SC_PHYS_PAGES")
    assert psutil.virtual_memory().total == pages * os.sysconf("SC_PAGE_SIZE")


def test_a_start_is_the_systems_own_figure():
    require(Path("/proc/self/stat").exists(), "/proc")
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert int(machine.start_time(os.getpid())) == int(ticks) * 100 // os.sysconf("SC_CLK_TCK")


def test_a_corrected_clock_moves_no_start(monkeypatch):
    """Linux counts from the system's start, which moves with the clock; both figures of psutil move with it."""
    require(psutil.LINUX, "Linux")
    before, boot = machine.start_time(os.getpid()), psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + 3600)
    assert abs(psutil.Process().create_time() - time.time()) > 1000  # the clock has changed for psutil
    assert machine.start_time(os.getpid()) == before


def test_a_process_runs_until_it_ends():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = machine.start_time(child.pid)
    assert machine.is_running(child.pid, started)
    assert not machine.is_running(child.pid, started + "0")  # its number, but another process
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet waited for
    assert not machine.is_running(child.pid, started)
    child.wait()
    assert not machine.is_running(child.pid, started)


@pytest.mark.parametrize("pid", [-1, 2**30, 2**70])
def test_a_number_that_no_process_has(pid):
    assert not machine.is_running(pid, "1")
