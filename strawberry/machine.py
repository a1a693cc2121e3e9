"""What this machine has: its memory, and the processes that run on it."""

import contextlib
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # a container's limits; psutil tells only what the whole machine has


def memory() -> tuple[int, int]:
    """(bytes of memory that are still available, bytes that there are), within a container's limit."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return free, total


def start_time(pid: int) -> str:
    """When a process started, in hundredths of a second: with its number it names one process, since numbers are given
    again. Raises psutil.NoSuchProcess or psutil.AccessDenied."""
    seconds = psutil.Process(pid).create_time()
    if psutil.LINUX:  # which adds the start of the system as the clock has it now: a corrected clock would move it
        seconds -= psutil.boot_time()
    return str(round(100 * seconds))


def is_running(pid: int, started: str) -> bool:
    """Whether the process of that number and start_time() runs. One that ended and was not yet waited for does not."""
    try:
        ended = psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return not ended and start_time(pid) == started
    except psutil.AccessDenied:  # another user's, on some systems
        return True
    except (psutil.NoSuchProcess, ValueError):  # a negative number
        return False
