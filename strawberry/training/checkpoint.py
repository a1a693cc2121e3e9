"""Checkpoints to resume from: one directory per step, written atomically. Nothing is unpickled.

    save_checkpoint, find_latest, Checkpoint    write a checkpoint, find the newest valid one, read it
    list_checkpoints                            lists all checkpoints
    archive_run                                 moves an earlier run's checkpoints to another directory
    find_model                                  the model file of a path, which may be a file or a checkpoint
    write_state                                 returns a writer of state.pt

A checkpoint directory:

    bin/ck/step_00002000/model.safetensors    a model file, as save_model writes it
                         state.pt             optimizer and progress: read with weights_only=True
                         manifest.json        size and SHA-256 of each file, its own SHA-256, step, metadata
    bin/ck/latest                             "step_00002000"
    bin/ck/lock                               the process that is writing here: see lock.py
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from strawberry.common import UserError, atomic_write, first_line
from strawberry.model_file import Writer, copy_weights, open_tensors

MODEL, STATE, MANIFEST, LATEST = "model.safetensors", "state.pt", "manifest.json", "latest"
FORMAT = 1  # of a checkpoint
MAX_MANIFEST = 16 << 20  # bytes
UNFINISHED = ".tmp_"  # prefix of a partial checkpoint of a killed run: never read, removed by the next save
REPLACED = ".old_"  # prefix of a checkpoint being replaced by one of the same step: read if that one is missing


def save_checkpoint(root, step: int, parts: dict[str, Writer], val_loss=None, keep: int = 3, meta=None) -> Path:
    """Write the directory `root`/step_… and return its path; then remove old checkpoints, except the newest `keep` and
    the one with the lowest `val_loss`.

    `parts`: file name → function that writes the file. `val_loss`: a number, or None if it was not measured. `meta`:
    other JSON data for the manifest (fingerprints, configuration).

    The files are written to a directory with a temporary name and synced; one rename makes it a checkpoint. If the
    process is killed or the disk is full before that, the older checkpoints are unchanged. Raises UserError, which
    names the path, if the checkpoint cannot be written.
    """
    root = Path(root)
    final = root / f"step_{step:08d}"
    temporary = root / f"{UNFINISHED}{final.name}_{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        temporary.mkdir()
        files = {name: _write_file(temporary / name, writer) for name, writer in parts.items()}
        loss = float(val_loss) if val_loss is not None and math.isfinite(val_loss) else None
        manifest = {"format": FORMAT, "step": step, "val_loss": loss, "meta": meta or {}, "files": files}
        _write_file(temporary / MANIFEST, lambda file: file.write(_render_manifest(manifest)))
        _fsync_directory(temporary)
        _publish(temporary, final)
    except OSError as error:
        problem = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        raise UserError(f"cannot save the checkpoint {final}: {problem}; the older ones are as they were") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        atomic_write(root / LATEST, f"{final.name}\n".encode())
    except UserError as error:  # informs users, and lets `find_latest` warn; the checkpoint is valid without it
        print(f"warning: {error}; the checkpoint {final} is saved all the same", file=sys.stderr)
    finally:
        _remove_old_checkpoints(root, step, keep)
    return final


def write_state(state: dict) -> Writer:
    """Returns a function that writes STATE: tensors, numbers, strings, and lists, tuples and dicts of them."""
    return lambda file: torch.save(state, file)


class _HashingFile:
    """A file that computes the SHA-256 and size of the bytes written to it, and stores a write error."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.size, self.error = file, hashlib.sha256(), 0, None

    def write(self, data) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save reports another error instead of this one
            raise
        self.hash.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()


def _write_file(path: Path, writer: Writer) -> dict:
    """Write and sync one file, and return its manifest entry: size and SHA-256."""
    with open(path, "xb") as file:
        hashing = _HashingFile(file)
        try:
            writer(hashing)
        except Exception as error:
            if hashing.error is None:
                raise
            raise OSError(hashing.error.errno, hashing.error.strerror, str(path)) from error
        file.flush()
        os.fsync(file.fileno())
    return {"size": hashing.size, "sha256": hashing.hash.hexdigest()}


def _render_manifest(manifest: dict) -> bytes:
    """The bytes of a manifest, including its own hash. The rendering is unique, so any changed byte is detected."""
    body = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
    return json.dumps(manifest | {"sha256": _sha256(body)}, indent=1, sort_keys=True, allow_nan=False).encode()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _publish(temporary: Path, final: Path) -> None:
    """Rename a complete directory to its final name, and replace an existing one."""
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        os.rename(final, aside)  # until the next rename, `find_latest` finds it under this name
    os.rename(temporary, final)
    _fsync_directory(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _fsync_directory(path: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _remove_leftovers(root: Path) -> None:
    """Remove the partial files of killed runs. A checkpoint whose replacement was not finished gets its name back."""
    for path in root.glob(f"{REPLACED}step_*"):
        successor = path.with_name(path.name.removeprefix(REPLACED))
        if successor.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, successor)
    for name in ("step_*", "remove_step_*"):
        for path in root.glob(UNFINISHED + name):
            shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(f".{LATEST}.*.tmp"):
        path.unlink(missing_ok=True)


def _remove_old_checkpoints(root: Path, step: int, keep: int) -> None:
    """Remove all checkpoints up to `step` except the newest `keep` and the best. Broken ones are neither removed nor
    counted."""
    good = []
    for number, path in _candidates(root):
        try:
            if number <= step:
                good.append((path, _read_manifest(path)["val_loss"]))
        except _BrokenCheckpoint:
            continue  # it may be temporarily unreadable
    kept = {path for path, _ in good[: max(1, keep)]}
    if losses := [(loss, path) for path, loss in good if loss is not None]:
        kept.add(min(losses, key=lambda pair: pair[0])[1])
    for path, _ in good:
        if path not in kept:
            doomed = path.with_name(f"{UNFINISHED}remove_{path.name}")
            try:
                os.rename(path, doomed)  # so that a partial checkpoint never has a checkpoint's name
                shutil.rmtree(doomed)
            except OSError as error:
                print(f"warning: cannot remove the old checkpoint {path}: {error.strerror}", file=sys.stderr)


def archive_run(root) -> Path | None:
    """Move the checkpoints of an earlier run to `root`/earlier_1 (or _2, …), before a run from scratch.

    Returns that directory, or None if there is no checkpoint. Otherwise the earlier run's higher steps would count as
    the newest. Raises UserError if they cannot be moved.
    """
    root = Path(root)
    found = [path for _, path in _candidates(root)]
    if not found:
        return None
    number = 1
    while (root / f"earlier_{number}").exists():
        number += 1
    target = root / f"earlier_{number}"
    try:
        target.mkdir()
        for path in [*found, root / LATEST]:
            if path.exists():
                os.rename(path, target / path.name)
        _fsync_directory(target)
        _fsync_directory(root)
    except OSError as error:
        raise UserError(f"cannot move the earlier checkpoints of {root} to {target}: {error.strerror}") from error
    return target


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files match its manifest. `meta` is the argument of save_checkpoint."""

    path: Path
    step: int
    val_loss: float | None
    meta: dict
    saved_at: float  # seconds since 1970

    def load_weights(self, model: nn.Module) -> None:
        """Copy the saved parameters and buffers into `model`. Raises UserError if they belong to another model."""
        with open_tensors(self.path / MODEL) as file:
            copy_weights(model, file, self.path / MODEL)

    def load_state(self) -> dict:
        """The argument of write_state, with tensors on the CPU. Raises UserError for any other content, and never
        executes code in the file."""
        path = self.path / STATE
        try:
            with zipfile.ZipFile(path) as parts:  # torch.save does not compress, so our files never unpack to more
                if sum(part.file_size for part in parts.infolist()) > os.path.getsize(path):
                    raise ValueError("it would unpack to more than its size")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a file of unknown content may raise any exception
            reason = first_line(error)
            raise UserError(f"cannot read {path}: it is not a plain training state ({reason})") from error


def find_latest(root) -> Checkpoint:
    """The newest checkpoint under `root` whose files all match their SHA-256.

    A broken checkpoint is reported on stderr with the file and the reason, and the next older one is tried. Raises
    UserError if there is no checkpoint, or no valid one.
    """
    root = Path(root)
    candidates = _candidates(root)
    if not candidates:
        mend = 'start with "init_from": "scratch" or name another checkpoints.path'
        raise UserError(f"no checkpoint to resume from in {root}: {mend}")
    _warn_if_latest_is_missing(root)
    reasons = []
    for _, path in candidates:
        try:
            manifest = _verify(path)
        except _BrokenCheckpoint as reason:
            reasons.append(f"{path.name}: {reason}")
            print(f"warning: the checkpoint {path} is broken ({reason}); trying an older one", file=sys.stderr)
        else:
            return _describe(path, manifest)
    mend = 'bring one back from a copy or start with "init_from": "scratch"'
    raise UserError(f"every checkpoint in {root} is broken ({'; '.join(reasons)}): {mend}")


def list_checkpoints(root) -> list[Checkpoint]:
    """Every checkpoint under `root`, newest first, except those whose manifest or file sizes are wrong. The files'
    content is not verified; `find_latest` does that."""
    found = []
    for _, path in _candidates(Path(root)):
        with contextlib.suppress(_BrokenCheckpoint, OSError):  # the run may move or remove it at the same time
            found.append(_describe(path, _read_manifest(path)))
    return found


def _describe(path: Path, manifest: dict) -> Checkpoint:
    return Checkpoint(path, manifest["step"], manifest["val_loss"], manifest["meta"], path.stat().st_mtime)


class _BrokenCheckpoint(Exception):
    """A directory is not a valid checkpoint; the message names the file and the problem."""


def _candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of each checkpoint, newest first."""
    found = []
    try:
        for path in root.iterdir():
            match = re.fullmatch(rf"({re.escape(REPLACED)})?step_(\d{{8,18}})", path.name)
            if match and path.is_dir():
                found.append((int(match[2]), match[1] is None, path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read the checkpoints in {root}: {error.strerror}") from error
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _warn_if_latest_is_missing(root: Path) -> None:
    """Print a warning if the last checkpoint written, named in LATEST, no longer exists."""
    try:
        name = (root / LATEST).read_bytes()[:100].decode(errors="replace").strip()
    except OSError:
        return
    if re.fullmatch(r"step_\d{8,18}", name) and not any((root / f"{kind}{name}").is_dir() for kind in ("", REPLACED)):
        print(f"warning: the checkpoint {root / name}, written last, is missing; using an older one", file=sys.stderr)


def _read_manifest(path: Path) -> dict:
    """The manifest of the checkpoint at `path`. Checks the files' sizes, but not their content. Raises
    _BrokenCheckpoint."""
    file = path / MANIFEST
    if _file_size(file) > MAX_MANIFEST:
        raise _BrokenCheckpoint(f"{MANIFEST} has {_file_size(file)} bytes, more than {MAX_MANIFEST}")
    try:
        data = file.read_bytes()
        manifest = json.loads(data)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if _render_manifest(body) != data:
            raise _BrokenCheckpoint(f"{MANIFEST} does not match its own SHA-256")
        if manifest["format"] != FORMAT:
            raise _BrokenCheckpoint(f"{MANIFEST} has format {manifest['format']}, and this program reads {FORMAT}")
        if not isinstance(manifest["meta"], dict) or not isinstance(manifest["val_loss"], (float, int, type(None))):
            raise _BrokenCheckpoint(f"{MANIFEST} is damaged")
        if path.name.removeprefix(REPLACED) != f"step_{manifest['step']:08d}":
            raise _BrokenCheckpoint(f"{MANIFEST} is that of step {manifest['step']}")
        for name, about in manifest["files"].items():
            if Path(name).name != name:
                raise _BrokenCheckpoint(f"{MANIFEST} lists {name!r}, which is no file name")
            if (size := _file_size(path / name)) != about["size"]:
                raise _BrokenCheckpoint(f"{name} has {size} bytes instead of {about['size']}")
    except OSError as error:
        raise _BrokenCheckpoint(f"{MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise _BrokenCheckpoint(f"{MANIFEST} is damaged") from error
    return manifest


def _file_size(path: Path) -> int:
    if not path.is_file():
        raise _BrokenCheckpoint(f"{path.name} is missing")
    return path.stat().st_size


def _verify(path: Path) -> dict:
    """The manifest of the checkpoint at `path`, after comparing every file with its SHA-256. Raises
    _BrokenCheckpoint."""
    manifest = _read_manifest(path)
    for name, about in manifest["files"].items():
        try:
            with open(path / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _BrokenCheckpoint(f"{name}: {error.strerror}") from error
        if digest != about["sha256"]:
            raise _BrokenCheckpoint(f"{name} does not match its SHA-256")
    return manifest


def find_model(path, option: str) -> Path:
    """`path` itself if it is not a directory; otherwise the model file of that checkpoint, or of the newest valid
    checkpoint in the directory. Raises UserError, which names `option`, if the directory has no checkpoint."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / MODEL).is_file():
        return path / MODEL
    if not any(path.glob("*step_*")):
        mend = "name a model file or a run's checkpoints"
        raise UserError(f"{option}: {path} is a directory without checkpoints; {mend}")
    return find_latest(path).path / MODEL
