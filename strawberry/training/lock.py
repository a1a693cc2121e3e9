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
    """Keeps a directory for this process until release(), or until the process ends, however it ends.

    Raises UserError, naming the process that has the directory, where another one does. The file `lock` says who that
    is. What keeps it is flock on the directory, which the system undoes when a process dies; where there is none
    (Windows, some network file systems) it is the file, and one that a dead process of this machine left is taken over.
    filelock locks the file instead of the directory: after a user has removed it, a second process gets in.
    """

    def __init__(self, root, key: str = "checkpoints.path"):
        self.path, self.key = Path(root) / LOCK, key
        me = {"pid": os.getpid(), "born": machine.start_time(os.getpid()), "host": socket.gethostname()}
        me |= {"command": shlex.join(sys.argv), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            files = self._take()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; name another directory") from error
        with contextlib.suppress(OSError):  # on a full disk it is locked without a name
            os.write(files[0], json.dumps(me).encode())
        self.release = weakref.finalize(self, _release, self.path, files, os.getpid())

    def _take(self) -> list[int]:
        """The open files that keep it; the first is `lock`, empty."""
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
                os.rename(self.path, aside)  # of several that take it over, one succeeds
            except FileNotFoundError:
                continue
            if read_holder(aside) != holder:  # and another one has it already
                os.rename(aside, self.path)
            else:
                os.unlink(aside)

    def _refusal(self, holder: dict) -> UserError:
        who = "another process, which has left no name"
        if holder:
            who = "process {pid} on {host} since {since} ({command})".format_map(holder)
        mend = f"wait for it, stop it, or name another {self.key}; if it is gone, remove {self.path}"
        return UserError(f"{self.key} = {self.path.parent}: is written to by {who}; {mend}")


def _release(path: Path, files: list[int], pid: int) -> None:
    """Removes `lock`, while flock still keeps the directory."""
    if os.getpid() != pid:  # a fork of the holder ends
        return
    for i, file in enumerate(files):
        os.close(file)
        if not i:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def read_holder(path: Path) -> dict:
    """What a lock says of its process; empty where it is damaged, or not yet written."""
    try:
        holder = json.loads(path.read_bytes()[:65536])
        return {key: holder[key] for key in ("pid", "born", "host", "command", "since")}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}


def is_dead(holder: dict) -> bool:
    """Whether the process that a lock names is known to have ended: one of another machine never is."""
    pid = holder.get("pid")
    if type(pid) is not int or pid < 1 or holder["host"] != socket.gethostname():
        return False
    return not machine.is_running(pid, holder["born"])
