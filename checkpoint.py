"""What training leaves on disk: checkpoints to resume from, and model files to sample from. Nothing is unpickled.

    save_checkpoint, newest, Checkpoint    a directory per step, whole or not there at all
    set_aside                              moves an earlier run's checkpoints out of the way
    Lock                                   one process at a time writes to such a directory
    write_state, write_model               the two files of a checkpoint
    rng_state, set_rng_state               torch's, CUDA's, Python's and numpy's random numbers
    save_model, load_model                 one safetensors file with weights, configuration, encoder and record

A checkpoint directory:

    bin/ck/step_00002000/model.safetensors    a model file, as save_model writes it
                         state.pt             optimizer, random numbers, position: read with weights_only=True
                         manifest.json        size and SHA-256 of each file, its own SHA-256, the step and what it is of
    bin/ck/latest                             "step_00002000"
    bin/ck/lock                               the process that writes here, while it does
"""

import contextlib
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import socket
import sys
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from options import UserError, atomic_write, to_dict
from strawberry.initialization import SkipInit
from strawberry.sharding import copy_to_shard

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Writer = Callable[[BinaryIO], Any]  # writes one file of a checkpoint

MODEL, STATE, MANIFEST, LATEST, LOCK = "model.safetensors", "state.pt", "manifest.json", "latest", "lock"
FORMAT = 1  # of a checkpoint
MAX_MANIFEST = 16 << 20  # bytes
UNFINISHED = ".tmp_"  # what a killed run may leave: never read, removed by the next save
REPLACED = ".old_"  # a checkpoint that another of the same step is about to replace: read if that one never came

# ---- saving a checkpoint ---------------------------------------------------------------------------------------------


def save_checkpoint(root, step: int, parts: dict[str, Writer], val_loss=None, keep: int = 3, meta=None) -> Path:
    """Writes the directory `root`/step_… and returns its path; then removes what is no longer to be kept.

    `parts`: file name → function that writes the file. `val_loss`: a number, or None where there is none. `meta`: more
    plain data for the manifest (fingerprints, configuration). Kept are the newest `keep` and the best by `val_loss`.

    The files are written to a directory of another name and brought to disk; one rename makes them a checkpoint.
    Whatever happens before that, a kill or a full disk, the older checkpoints are as they were. Raises UserError,
    naming the path, where it cannot be written.
    """
    root = Path(root)
    final = root / f"step_{step:08d}"
    temporary = root / f"{UNFINISHED}{final.name}_{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        temporary.mkdir()
        files = {name: _write(temporary / name, writer) for name, writer in parts.items()}
        loss = float(val_loss) if val_loss is not None and math.isfinite(val_loss) else None
        manifest = {"format": FORMAT, "step": step, "val_loss": loss, "meta": meta or {}, "files": files}
        _write(temporary / MANIFEST, lambda file: file.write(_render(manifest)))
        _fsync_directory(temporary)
        _publish(temporary, final)
    except OSError as error:
        problem = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        raise UserError(f"cannot save the checkpoint {final}: {problem}; the older ones are as they were") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        atomic_write(root / LATEST, f"{final.name}\n".encode())
    except UserError as error:  # it helps people, and `newest` in one case: the checkpoint is good without it
        print(f"warning: {error}; the checkpoint {final} is saved all the same", file=sys.stderr)
    finally:
        _prune(root, step, keep)
    return final


def write_state(state: dict) -> Writer:
    """The writer of STATE: tensors, numbers, strings, and lists, tuples and dicts of them."""
    return lambda file: torch.save(state, file)


def write_model(model: nn.Module, encoder, record: dict, tensors: dict[str, Tensor] | None = None) -> Writer:
    """The writer of MODEL, a file that load_model reads too. `tensors`: the model's, where it has them in parts."""
    tensors = own_tensors(model) if tensors is None else tensors
    metadata = {
        "format": MODEL_FORMAT,
        "version": MODEL_VERSION,
        "model_hyperparams": json.dumps(to_dict(model.config)),
        "encoder": encoder.to_bytes().decode(),
        "encoder_fingerprint": encoder.fingerprint,
        "record": json.dumps(record),
    }
    return lambda file: write_tensors(file, tensors, metadata)


class _Hashing:
    """A file that keeps the SHA-256 and size of what is written to it, and the first error."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.size, self.error = file, hashlib.sha256(), 0, None

    def write(self, data) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save goes on and reports something else
            raise
        self.hash.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()


def _write(path: Path, writer: Writer) -> dict:
    """Writes one file through to the disk and returns what the manifest says of it."""
    with open(path, "xb") as file:
        hashing = _Hashing(file)
        try:
            writer(hashing)
        except Exception as error:
            if hashing.error is None:
                raise
            raise OSError(hashing.error.errno, hashing.error.strerror, str(path)) from error
        file.flush()
        os.fsync(file.fileno())
    return {"size": hashing.size, "sha256": hashing.hash.hexdigest()}


def _render(manifest: dict) -> bytes:
    """The bytes of a manifest, its own hash included. There is one rendering, so that any changed byte shows."""
    body = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
    return json.dumps(manifest | {"sha256": _sha256(body)}, indent=1, sort_keys=True, allow_nan=False).encode()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _publish(temporary: Path, final: Path) -> None:
    """Gives a complete directory its name, in the place of another one if need be."""
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        os.rename(final, aside)  # from here to the next rename `newest` finds it under this name
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


def _tidy(root: Path) -> None:
    """Removes what killed runs left unfinished, and finishes what they were replacing."""
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


def _prune(root: Path, step: int, keep: int) -> None:
    """Of the checkpoints up to `step`, removes all but the newest `keep` and the best. Broken ones stay, uncounted."""
    good = []
    for number, path in _candidates(root):
        try:
            if number <= step:
                good.append((path, _manifest(path)["val_loss"]))
        except _Broken:
            continue  # it may only be out of reach for a moment
    kept = {path for path, _ in good[: max(1, keep)]}
    if losses := [(loss, path) for path, loss in good if loss is not None]:
        kept.add(min(losses, key=lambda pair: pair[0])[1])
    for path, _ in good:
        if path not in kept:
            doomed = path.with_name(f"{UNFINISHED}remove_{path.name}")
            try:
                os.rename(path, doomed)  # so that half a checkpoint never bears a checkpoint's name
                shutil.rmtree(doomed)
            except OSError as error:
                print(f"warning: cannot remove the old checkpoint {path}: {error.strerror}", file=sys.stderr)


def set_aside(root) -> Path | None:
    """Moves the checkpoints of an earlier run to `root`/earlier_1 (or _2, …), for a run that starts from scratch.

    Returns that directory, or None where there was nothing to move. Without it the older run's higher steps would be
    taken for the newest.
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


# ---- one process at a time -------------------------------------------------------------------------------------------


class Lock:
    """Keeps a directory for this process until release(), or until the process ends, however it ends.

    Raises UserError, naming the process that has the directory, where another one does. The file `lock` says who that
    is. What keeps it is flock on the directory, which the system undoes when a process dies; where there is none
    (Windows, some network file systems) it is the file, and one that a dead process of this machine left is taken over.
    """

    def __init__(self, root, key: str = "checkpoints.path"):
        self.path, self.key = Path(root) / LOCK, key
        me = {"pid": os.getpid(), "born": _born(os.getpid()), "host": socket.gethostname()}
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
                raise self._refusal(_holder(self.path)) from None
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
            holder = _holder(self.path)
            if not _is_dead(holder):
                raise self._refusal(holder)
            aside = self.path.with_name(f".{LOCK}.{os.getpid()}")
            try:
                os.rename(self.path, aside)  # of several that take it over, one succeeds
            except FileNotFoundError:
                continue
            if _holder(aside) != holder:  # and another one has it already
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


def _holder(path: Path) -> dict:
    """What a lock says of its process; empty where it is damaged, or not yet written."""
    try:
        holder = json.loads(path.read_bytes()[:65536])
        return {key: holder[key] for key in ("pid", "born", "host", "command", "since")}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}


def _is_dead(holder: dict) -> bool:
    """Whether the process that a lock names is known to have ended: one of another machine never is."""
    pid = holder.get("pid")
    if type(pid) is not int or pid < 1 or holder["host"] != socket.gethostname():
        return False
    if os.name == "nt":
        return _is_dead_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's
        pass
    return holder["born"] != _born(pid)  # its number was given to another process


def _is_dead_on_windows(pid: int) -> bool:
    import ctypes

    handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if handle:
        ctypes.windll.kernel32.CloseHandle(handle)
    return not handle


def _born(pid: int) -> str:
    """When a process started, in ticks since the system did, so that no clock matters; empty where that is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


# ---- finding and reading a checkpoint --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are those that its manifest lists. `meta` is what save_checkpoint was given."""

    path: Path
    step: int
    val_loss: float | None
    meta: dict

    def load_weights(self, model: nn.Module) -> None:
        """Copies the saved parameters and buffers into `model`. Raises UserError where they are another model's."""
        with _open_tensors(self.path / MODEL) as file:
            _copy_into(model, file, self.path / MODEL)

    def load_state(self) -> dict:
        """What write_state was given, with tensors on the CPU. Raises UserError, and runs nothing, on anything else."""
        path = self.path / STATE
        try:
            with zipfile.ZipFile(path) as parts:  # torch.save compresses nothing: what would grow is no state of ours
                if sum(part.file_size for part in parts.infolist()) > os.path.getsize(path):
                    raise ValueError("it would unpack to more than its size")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file of unknown content makes the reader say
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"cannot read {path}: it is not a plain training state ({reason})") from error


def newest(root) -> Checkpoint:
    """The newest checkpoint under `root` whose files are all as they were written.

    A broken one is named on stderr, file and reason, and the one before it is taken. Raises UserError where there is
    none, or none that is good.
    """
    root = Path(root)
    candidates = _candidates(root)
    if not candidates:
        mend = 'start with "init_from": "scratch" or name another checkpoints.path'
        raise UserError(f"no checkpoint to resume from in {root}: {mend}")
    _miss_latest(root)
    reasons = []
    for _, path in candidates:
        try:
            manifest = _verified(path)
        except _Broken as reason:
            reasons.append(f"{path.name}: {reason}")
            print(f"warning: the checkpoint {path} is broken ({reason}); trying an older one", file=sys.stderr)
        else:
            return Checkpoint(path, manifest["step"], manifest["val_loss"], manifest["meta"])
    mend = 'bring one back from a copy or start with "init_from": "scratch"'
    raise UserError(f"every checkpoint in {root} is broken ({'; '.join(reasons)}): {mend}")


def listed(root) -> list[Checkpoint]:
    """Every checkpoint under `root`, the newest first; left out are those whose manifest or files' sizes are wrong.
    What is in the files is not looked at: `newest` does that."""
    found = []
    for _, path in _candidates(Path(root)):
        with contextlib.suppress(_Broken):
            manifest = _manifest(path)
            found.append(Checkpoint(path, manifest["step"], manifest["val_loss"], manifest["meta"]))
    return found


class _Broken(Exception):
    """Why a directory is no good checkpoint: the file and what is wrong with it."""


def _candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, directory), the newest first."""
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


def _miss_latest(root: Path) -> None:
    """Warns where the checkpoint written last is gone altogether."""
    try:
        name = (root / LATEST).read_bytes()[:100].decode(errors="replace").strip()
    except OSError:
        return
    if re.fullmatch(r"step_\d{8,18}", name) and not any((root / f"{kind}{name}").is_dir() for kind in ("", REPLACED)):
        print(f"warning: the checkpoint {root / name}, written last, is missing; using an older one", file=sys.stderr)


def _manifest(path: Path) -> dict:
    """The manifest of the checkpoint at `path`, with the files' sizes checked but not yet their content."""
    file = path / MANIFEST
    if _size(file) > MAX_MANIFEST:
        raise _Broken(f"{MANIFEST} has {_size(file)} bytes, more than {MAX_MANIFEST}")
    try:
        data = file.read_bytes()
        manifest = json.loads(data)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if _render(body) != data:
            raise _Broken(f"{MANIFEST} does not match its own SHA-256")
        if manifest["format"] != FORMAT:
            raise _Broken(f"{MANIFEST} has format {manifest['format']}, and this program reads {FORMAT}")
        if not isinstance(manifest["meta"], dict) or not isinstance(manifest["val_loss"], (float, int, type(None))):
            raise _Broken(f"{MANIFEST} is damaged")
        if path.name.removeprefix(REPLACED) != f"step_{manifest['step']:08d}":
            raise _Broken(f"{MANIFEST} is that of step {manifest['step']}")
        for name, about in manifest["files"].items():
            if Path(name).name != name:
                raise _Broken(f"{MANIFEST} lists {name!r}, which is no file name")
            if (size := _size(path / name)) != about["size"]:
                raise _Broken(f"{name} has {size} bytes instead of {about['size']}")
    except OSError as error:
        raise _Broken(f"{MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise _Broken(f"{MANIFEST} is damaged") from error
    return manifest


def _size(path: Path) -> int:
    if not path.is_file():
        raise _Broken(f"{path.name} is missing")
    return path.stat().st_size


def _verified(path: Path) -> dict:
    """The manifest of the checkpoint at `path`, every file of which has been read and found as it was written."""
    manifest = _manifest(path)
    for name, about in manifest["files"].items():
        try:
            with open(path / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _Broken(f"{name}: {error.strerror}") from error
        if digest != about["sha256"]:
            raise _Broken(f"{name} does not match its SHA-256")
    return manifest


# ---- random numbers --------------------------------------------------------------------------------------------------


def rng_state() -> dict:
    """Every random number generator's state of this process, as plain data: torch (CPU and its GPU), Python, numpy."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Restores what rng_state gave; a device that this machine hasn't got is left out."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


# ---- model files -----------------------------------------------------------------------------------------------------

MODEL_FORMAT, MODEL_VERSION = "text-model", "1"
DTYPES = {  # as safetensors spells them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
MAX_HEADER = 8 << 20  # bytes; an encoder of 200,000 tokens takes about 5 MB, and tensors in it at most 140 MB of memory


def save_model(path, model: nn.Module, encoder, record: dict, tensors: dict[str, Tensor] | None = None) -> None:
    """Writes weights, buffers, hyperparameters, encoder and training record to one safetensors file, atomically.

    `record`: plain data about the training. Raises UserError, naming the path, where it cannot be written.
    """
    atomic_write(path, write_model(model, encoder, record, tensors))


def load_model(path, device: str = "cpu") -> tuple[nn.Module, Any, dict]:
    """(model in eval mode on `device`, encoder, training record) from a file that save_model wrote.

    Raises UserError where the file is something else, is damaged, or holds other tensors than its configuration says.
    """
    from encoder import Encoder
    from model import build

    with _open_tensors(path) as file:
        meta = _model_metadata(file, path)
        hyperparams, record = (_plain(meta, key, path) for key in ("model_hyperparams", "record"))
        try:
            encoder = Encoder.from_bytes(meta["encoder"].encode())
            _check_depth(hyperparams, file)
            with SkipInit():
                model = build(hyperparams)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (RuntimeError, MemoryError, OverflowError) as error:  # shapes beyond any memory
            reason = str(error).partition("\n")[0].rpartition("] ")[2]
            raise UserError(f"{path}: no model can be made of its hyperparameters ({reason})") from error
        _check_encoder(encoder, model, meta["encoder_fingerprint"], path)
        _copy_into(model, file, path)
    return model.to(device).eval(), encoder, record


def find_model(path, option: str) -> Path:
    """`path` itself where it is no directory, else the model file of that checkpoint, or of the newest good checkpoint
    in it. Raises UserError, naming the option that the path was given by, where the directory has none."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / MODEL).is_file():
        return path / MODEL
    if not any(path.glob("*step_*")):
        mend = "name a model file or a run's checkpoints"
        raise UserError(f"{option}: {path} is a directory without checkpoints; {mend}")
    return newest(path).path / MODEL


def read_about(path) -> tuple[dict, dict]:
    """(hyperparameters, training record) of a model file, whose tensors are left unread. Raises UserError."""
    with _open_tensors(path) as file:
        meta = _model_metadata(file, path)
        return _plain(meta, "model_hyperparams", path), _plain(meta, "record", path)


def read_encoder(path) -> Any:
    """The encoder of a model file, whose tensors are left unread. Raises UserError."""
    from encoder import Encoder

    with _open_tensors(path) as file:
        meta = _model_metadata(file, path)
    try:
        return Encoder.from_bytes(meta["encoder"].encode())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def model_bytes(model: nn.Module, encoder, record: dict) -> bytes:
    """The content of a model file."""
    file = io.BytesIO()
    write_model(model, encoder, record)(file)
    return file.getvalue()


def write_tensors(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, tensor by tensor: no second copy of them is ever in memory, as in safetensors' own `save`.

    8 bytes with the header's length, the header as JSON (for each tensor its dtype, its shape, where its bytes begin
    and end), and the bytes: the larger dtypes first, then by name. https://github.com/huggingface/safetensors#format
    """
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {"__metadata__": metadata}, 0
    for name, t in order:
        start, end = end, end + t.nbytes
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, t in order:
        if t.numel():
            file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name → parameter or buffer as the state dict has them, a tied one under its first name only."""
    first = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def _open_tensors(path) -> safe_open:
    """The safetensors file at `path`, with a header that fits it. Raises UserError, and reads no further, otherwise."""
    if not Path(path).is_file():
        raise UserError(f"there is no model file {path}")
    try:
        with open(path, "rb") as file:
            start, size = file.read(9), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read the model file {path}: {error.strerror}") from error
    header = int.from_bytes(start[:8], "little")
    if start[8:] != b"{":
        if start[:1] == b"\x80" or start[:2] == b"PK":  # bytes that a header's size may begin with too
            raise UserError(f"{path} is a pickle, which can run code and is not read; model files are safetensors")
        raise UserError(f"{path} is not a model file: safetensors was expected")
    if header > min(size - 8, MAX_HEADER):
        limit = f"the file has {size}, and {MAX_HEADER} is the most"
        raise UserError(f"{path} is damaged: its header claims {header} bytes; {limit}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _model_metadata(file, path) -> dict[str, str]:
    meta = file.metadata() or {}
    if (meta.get("format"), meta.get("version")) != (MODEL_FORMAT, MODEL_VERSION):
        found = f"format {meta.get('format')!r}, version {meta.get('version')!r}"
        raise UserError(f"{path} has {found}; this program reads {MODEL_FORMAT!r}, version {MODEL_VERSION!r}")
    for key in ("model_hyperparams", "encoder", "encoder_fingerprint", "record"):
        if key not in meta:
            raise UserError(f"{path} is damaged: its metadata has no {key}")
    return meta


def _plain(meta: dict[str, str], key: str, path) -> dict:
    try:
        value = json.loads(meta[key])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {key} is no JSON") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: {key} is no JSON object")
    return value


def _check_depth(hyperparams: dict, file) -> None:
    """A layer has at least one tensor: what claims more layers than tensors would take for ever to build."""
    layers, tensors = hyperparams.get("n_layer"), len(file.keys())
    if isinstance(layers, int) and layers > tensors:
        raise UserError(f"its n_layer is {layers}, and it holds {tensors} tensors")


def _check_encoder(encoder, model: nn.Module, stated: str, path) -> None:
    if encoder.fingerprint != stated:
        found = f"{stated[:12]}, the encoder in it has {encoder.fingerprint[:12]}"
        raise UserError(f"{path} is damaged: it states the encoder fingerprint {found}")
    if encoder.vocab_size > model.config.vocab_size:
        counts = f"encoder has {encoder.vocab_size} tokens, its model's vocab_size is {model.config.vocab_size}"
        raise UserError(f"{path} is damaged: its {counts}")


def _check_tensors(model: nn.Module, file, path) -> dict[str, Tensor]:
    """The model's tensors, once each has its like in the file by name and shape, and the file has no others."""
    own, there = own_tensors(model), set(file.keys())
    for name, tensor in own.items():
        if name not in there:
            raise UserError(f"{path} does not fit its model: the tensor {name} is missing")
        if (shape := tuple(file.get_slice(name).get_shape())) != tuple(tensor.shape):
            raise UserError(f"{path} does not fit its model: {name} has shape {shape}, not {tuple(tensor.shape)}")
    if extra := sorted(there - own.keys()):
        raise UserError(f"{path} does not fit its model: it holds a tensor {extra[0]}, which the model hasn't got")
    return own


@torch.no_grad()
def _copy_into(model: nn.Module, file, path) -> None:
    """Copies the file's tensors into the model's, of the same dtype or of a wider one."""
    for name, tensor, saved in _read(_check_tensors(model, file, path), file, path):
        if torch.promote_types(saved.dtype, tensor.dtype) != tensor.dtype:
            raise UserError(f"{path} does not fit its model: {name} is {saved.dtype}, and the model has {tensor.dtype}")
        copy_to_shard(tensor, saved)


def _read(own: dict[str, Tensor], file, path) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, tensor in own.items():
        try:
            yield name, tensor, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged: {name}: {error}") from error
