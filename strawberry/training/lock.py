"""A lock on a directory: one process at a time writes to a run's checkpoints."""

import contextlib
import json
import os
import shlex
import socket
import sys
import time
import weakref
from pathlib import Path

from strawberry import machine
from strawberry.common import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
LOCK = "lock"


class Lock:
    """Locks a directory for this process until release(), or until the process ends in any way.

    Raises UserError if another process has the lock, and names it; the file `lock` stores that process. The lock is
    flock on the directory, which the system releases when a process dies. Without flock (Windows, some network file
    systems) it is the existence of the file, and the file of a dead process of this machine is replaced. filelock is
    not used, since it locks the file instead of the directory: after a user removes the file, a second process could
    lock it.
    """

    def __init__(self, root, key: str = "checkpoints.path"):
        self.path, self.key = Path(root) / LOCK, key
        me = {"pid": os.getpid(), "born": machine.start_time(os.getpid()), "host": socket.gethostname()}
        me |= {"command": shlex.join(sys.argv), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            files = self._take()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; name another directory") from error
        with contextlib.suppress(OSError):  # on a full disk the file stays empty
            os.write(files[0], json.dumps(me).encode())
        self.release = weakref.finalize(self, _release, self.path, files, os.getpid())

    def _take(self) -> list[int]:
        """The open files of the lock; the first is `lock`, empty."""
        if fcntl:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return [os.open(self.path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644), folder]
            except BlockingIOError:
                os.close(folder)
                raise self._refusal(read_holder(self.path)) from None
            except PermissionError:
                os.close(folder)
                raise
            except OSError:
                os.close(folder)  # there is no flock in this file system
        return [self._take_by_name()]

    def _take_by_name(self) -> int:
        while True:
            with contextlib.suppress(FileExistsError):
                return os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            holder = read_holder(self.path)
            if not is_dead(holder):
                raise self._refusal(holder)
            aside = self.path.with_name(f".{LOCK}.{os.getpid()}")
            try:
                os.rename(self.path, aside)  # if several processes do this, one succeeds
            except FileNotFoundError:
                continue
            if read_holder(aside) != holder:  # another process has already locked it
                os.rename(aside, self.path)
            else:
                os.unlink(aside)

    def _refusal(self, holder: dict) -> UserError:
        who = "another process, which has not written its name"
        if holder:
            who = "process {pid} on {host} since {since} ({command})".format_map(holder)
        fix = f"wait for it, stop it, or name another {self.key}; if it has ended, remove {self.path}"
        return UserError(f"{self.key} = {self.path.parent}: is written to by {who}; {fix}")


def _release(path: Path, files: list[int], pid: int) -> None:
    """Remove `lock` while the directory is still locked, then unlock it."""
    if os.getpid() != pid:  # a fork of the holder ends
        return
    for i, file in enumerate(files):
        os.close(file)
        if not i:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def read_holder(path: Path) -> dict:
    """The process that the file `lock` names; {} if the file is damaged or not yet written."""
    try:
        holder = json.loads(path.read_bytes()[:65536])
        return {key: holder[key] for key in ("pid", "born", "host", "command", "since")}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}


def is_dead(holder: dict) -> bool:
    """Whether the process that a lock names has ended. False for a process of another machine, which cannot be
    checked."""
    pid = holder.get("pid")
    if type(pid) is not int or pid < 1 or holder["host"] != socket.gethostname():
        return False
    return not machine.is_running(pid, holder["born"])
