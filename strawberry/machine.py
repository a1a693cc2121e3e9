"""This machine's memory and processes."""

import contextlib
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # a container's limits; psutil reports the whole machine only


def memory() -> tuple[int, int]:
    """(available memory, total memory) in bytes, within a container's limit."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    with contextlib.suppress(OSError, ValueError):  # "max" means no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return free, total


def capacity() -> int:
    """Bytes that all processes together can have, swap included: a system that is asked for more kills one."""
    return memory()[1] + psutil.swap_memory().total


def start_time(pid: int) -> str:
    """The time at which a process started, in hundredths of a second. Process ids are reused, but id and start time
    together identify a process. Raises psutil.NoSuchProcess or psutil.AccessDenied."""
    seconds = psutil.Process(pid).create_time()
    if psutil.LINUX:  # psutil adds the boot time by the current clock, which changes when the clock is corrected
        seconds -= psutil.boot_time()
    return str(round(100 * seconds))


def is_running(pid: int, started: str) -> bool:
    """Whether the process with this id and start_time() is running. A zombie process is not."""
    try:
        ended = psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return not ended and start_time(pid) == started
    except psutil.AccessDenied:  # another user's process, on some systems
        return True
    except (psutil.NoSuchProcess, ValueError):  # a negative id
        return False
