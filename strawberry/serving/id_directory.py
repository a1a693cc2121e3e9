"""Directories named by ids, and the names of the files in them.

The server generates every id and checks its form before it is used in a path. Links are not followed. So no name from a
client reaches the file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from strawberry.common import UserError, atomic_write, show

ABOUT, LOG, EVENTS, PID, STATUS = "about.json", "log.txt", "events.jsonl", "pid.json", "status.json"


class RequestError(UserError):
    """A client's request that cannot be fulfilled: the HTTP status, the message, and the field that caused it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def new_id(kind: str) -> str:
    """A new random id, such as `file-` and 24 hexadecimal digits."""
    return f"{kind}-{secrets.token_hex(12)}"


class IdDirectory:
    """The directories of one kind of object, each named by its id."""

    def __init__(self, root: Path, kind: str, what: str):
        self.root, self.kind, self.what = root, kind, what
        root.mkdir(parents=True, exist_ok=True)
        for path in root.glob(".tmp_*"):  # left by a server that was killed
            if re.fullmatch(r"\.tmp_[0-9a-f]+", path.name):
                shutil.rmtree(path, ignore_errors=True)

    def folder(self, name: str, param: str | None = None) -> Path:
        """The directory of an id. Raises RequestError (404) if the id has another form or no directory."""
        path = self.root / name if re.fullmatch(rf"{self.kind}-[0-9a-f]{{24}}", name, re.ASCII) else None
        if path is None or path.is_symlink() or not path.is_dir():
            raise RequestError(404, f"there is no {self.what} {show(name)}", param or "id", "not_found")
        return path

    def names(self) -> Iterator[str]:
        for path in self.root.iterdir():
            with contextlib.suppress(RequestError):
                yield self.folder(path.name).name

    def make_temporary(self) -> Path:
        """Make a temporary directory, which publish() renames."""
        path = self.root / f".tmp_{secrets.token_hex(8)}"
        path.mkdir()
        return path

    def publish(self, temporary: Path, name: str) -> Path:
        os.rename(temporary, self.root / name)
        return self.root / name

    def rename_for_removal(self, name: str) -> Path:
        """Rename a directory to a temporary name, which is atomic. If the caller is killed before it removes the
        directory, the next start does.
        """
        doomed = self.root / f".tmp_{secrets.token_hex(8)}"
        try:
            os.rename(self.folder(name), doomed)
        except OSError as error:
            raise RequestError(
                507, f"the {self.what} {name} cannot be deleted: {error.strerror or error}", "id"
            ) from error
        return doomed

    def remove(self, name: str) -> None:
        shutil.rmtree(self.rename_for_removal(name), ignore_errors=True)


def disk_use(folder: Path) -> int:
    """Bytes of all files in a folder. Files that disappear meanwhile are not counted."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def paginate(items: list[dict], after: str | None, limit: int) -> dict:
    """A list object with up to `limit` of the sorted items, from the one after the id `after`. Raises RequestError
    (404).
    """
    if after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            raise RequestError(404, f"after = {show(after)}: nothing in this list has that id", "after", "not_found")
        items = items[places[0] + 1 :]
    data = items[:limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": len(items) > limit, **ends}


def read_job_file(folder: Path) -> dict:
    return json.loads((folder / ABOUT).read_bytes())


def write_job_file(folder: Path, about: dict) -> None:
    """Raises OSError where it cannot be written."""
    try:
        atomic_write(folder / ABOUT, json.dumps(about, indent=1).encode())
    except UserError as error:  # its message names the path
        raise error.__cause__ or OSError("it is no file") from error
