"""The check that every command makes before it writes: no file of the user may be lost.

    check_outputs([Output("--output", "bin/cl8k.bin", "encoder")], [Input("--input", path) for path in paths])

A file's kind is recognized by its content, never by its name.

Index:  kinds of files · places · the check
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from strawberry.common import UserError, temporary_path

# ---- kinds of files ------------------------------------------------------------------------------------------------

HEAD = 1 << 16  # bytes read to recognize a file's kind
LONG_HEAD = 8 << 20  # bytes read of JSON, which is parsed whole, and of a model file, whose header is no longer
LINES = 1000  # lines read to recognize a JSON lines file


def _parse_object(data: bytes) -> dict:
    """The JSON object in `data`; {} if it is not one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _has_line(head: bytes, first_key: str, is_wanted: Callable[[dict], bool]) -> bool:
    """Whether a line is a JSON object for which `is_wanted` is true. If the file is one incomplete line, left by a
    killed process, its start is compared instead."""
    lines = [line for line in head.split(b"\n", LINES) if line.strip()]
    start = f'{{"{first_key}": '.encode()
    torn = len(lines) == 1 and b"\n" not in head and (lines[0].startswith(start) or start.startswith(lines[0]))
    return torn or any(is_wanted(_parse_object(line)) for line in lines[:LINES])


def _is_model(head: bytes) -> bool:
    """safetensors: 8 bytes with the header's length, then the header, whose metadata has our format's name."""
    header = head[8 : 8 + int.from_bytes(head[:8], "little")]
    return header.startswith(b"{") and re.search(rb'"format"\s*:\s*"text-model"', header) is not None


def _is_metrics(head: bytes) -> bool:
    return _has_line(head, "step", lambda line: type(line.get("step")) is int)


def _is_texts(head: bytes) -> bool:
    return _has_line(head, "index", lambda line: type(line.get("index")) is int and isinstance(line.get("text"), str))


def _is_picture(head: bytes) -> bool:
    is_svg = re.match(rb"\s*(<\?xml[^>]*>\s*)?(<!DOCTYPE[^>]*>\s*)?<svg", head) is not None
    return is_svg or head.startswith((b"\x89PNG\r\n\x1a\n", b"%PDF-"))


def _is_benchmark(head: bytes) -> bool:
    """The JSON of a bench.py command: rows and the command that measured them, a list of rows, or a comparison of
    nanogpt and strawberry."""
    found = _parse_object(head)
    if isinstance(found.get("rows"), list):
        return bool({"command", "config"} & found.keys())
    if {"nanogpt", "strawberry"} <= found.keys():
        return True
    rows = _parse_object(b'{"rows": ' + head + b"}").get("rows") if head.lstrip().startswith(b"[") else None
    return isinstance(rows, list) and all(isinstance(row, dict) and "config" in row for row in rows)


def _is_report(head: bytes) -> bool:
    """The Markdown of a bench.py command: starts with a table and ends with the command in a code fence."""
    return head.startswith(b"|") and b"bench.py" in head and head.rstrip().endswith(b"```")


EXPORT_MARK = {"exported_by": "strawberry"}  # in the JSON files and the safetensors metadata of an export


def _is_export(head: bytes) -> bool:
    """A file of export.py: JSON or safetensors with its mark, or a tokenizer.json, which cannot have one, with the keys
    in its order."""
    text = head[8:] if head[8:9] == b"{" else head
    return re.match(rb'\s*{\s*("__metadata__"\s*:\s*{\s*("format"\s*:\s*"pt"\s*,\s*)?)?"exported_by"\s*:\s*"strawberry"'
                    rb'|\s*{\s*"added_tokens"\s*:\s*\[', text) is not None  # fmt: skip


def _has_keys(*keys: str) -> Callable[[bytes], bool]:
    return lambda head: set(keys) <= _parse_object(head).keys()


class Kind(NamedTuple):
    """A kind of file that a command writes: its name in messages, and a function that recognizes its first bytes."""

    name: str
    matches: Callable[[bytes], bool]


KINDS = {
    "encoder": Kind("an encoder file", re.compile(rb'\s*\{\s*"format"\s*:\s*"encoder"').match),
    "tokens": Kind("a token file", lambda head: head.startswith(b"\x89TOKENS\n")),
    "model": Kind("a model file", _is_model),
    "metrics": Kind("the metrics of a training run", _is_metrics),
    "record": Kind("the record of a training run", _has_keys("run", "command", "started")),
    "lock": Kind("the lock of a run", lambda head: head.startswith(b'{"pid": ')),
    "latest": Kind("the name of a checkpoint", re.compile(rb"step_\d{8,18}\s*\Z").match),
    "texts": Kind("a file of texts that sample.py wrote", _is_texts),
    "texts origin": Kind("what sample.py writes beside its texts", _has_keys("prompts_file", "model", "seed")),
    "export": Kind("a file of export.py", _is_export),
    "picture": Kind("a picture", _is_picture),
    "benchmark": Kind("a result of bench.py", _is_benchmark),
    "report": Kind("a table of bench.py", _is_report),
    "dataset result": Kind("a result of strawberry.data.assemble", _has_keys("data_division", "encoder")),
    "progress": Kind("the progress of strawberry.data.assemble", _has_keys("phase", "done")),
}
CHECKPOINTS = "checkpoints"  # a directory in which a run creates, moves and removes directories named step_…


class Output(NamedTuple):
    """A file that a command may write: the option that names it, its path, and its kind, a key of KINDS or
    CHECKPOINTS."""

    option: str
    path: str | os.PathLike
    kind: str


class Input(NamedTuple):
    """A file that a command reads, and the option that names it."""

    option: str
    path: str | os.PathLike


def has_kind(path: str | os.PathLike, kind: str) -> bool:
    """Whether the file exists and is of that kind. Raises UserError if it cannot be read."""
    head = _read_head(path)
    return head is not None and bool(KINDS[kind].matches(head))


def _read_head(path: str | os.PathLike) -> bytes | None:
    """The first bytes of a regular file; None if it does not exist."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            is_long = head.lstrip()[:1] in (b"{", b"[") or head[8:9] == b"{"
            size = min(LONG_HEAD, os.fstat(file.fileno()).st_size)  # read() allocates its whole argument
            return head + file.read(max(size - len(head), 0)) if is_long else head
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def find_previous(outputs: Iterable[Output]) -> list[str | os.PathLike]:
    """The outputs that an earlier call of the same command wrote; the command must not read them as documents."""
    return [output.path for output in outputs if has_kind(output.path, output.kind)]


# ---- places --------------------------------------------------------------------------------------------------------


def is_same_file(a: str | os.PathLike, b: str | os.PathLike) -> bool:
    """Whether two paths name one file, also through symbolic and hard links; for a missing file, whether they would."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.normcase(os.path.realpath(a)) == os.path.normcase(os.path.realpath(b))


def encoder_inputs(option: str, spec: str) -> list[Input]:
    """The file that an encoder's name refers to: an encoder file, or the text after chars:; none for tiktoken:NAME."""
    scheme, _, rest = spec.partition(":")
    return [] if scheme == "tiktoken" else [Input(option, rest if scheme == "chars" else spec)]


def _check_place(output: Output) -> None:
    """Raises UserError if the output cannot be written at its path."""
    path = os.fspath(output.path)
    if problem := _place_problem(path, is_folder=output.kind == CHECKPOINTS):
        raise UserError(f"{output.option}: {problem}")


def _place_problem(path: str, is_folder: bool) -> str | None:
    try:
        mode = os.stat(path or os.curdir).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _parent_problem(path) or (None if is_folder else _name_problem(path))
    except OSError as error:  # for example a name that is too long, or a cycle of symbolic links
        return f"cannot write {path}: {error.strerror or error}; name another file"
    if is_folder:
        return None if stat.S_ISDIR(mode) else f"{path} is a file; name a directory"
    if stat.S_ISDIR(mode):
        return f"{path} is a directory; name a file"
    return None if stat.S_ISREG(mode) else f"{path} is not a regular file; name another path"


def _name_problem(path: str) -> str | None:
    return f"{path} ends as a directory does; name a file" if path.endswith((os.sep, "/")) else None


def _parent_problem(path: str) -> str | None:
    folder = os.path.dirname(os.path.realpath(path))
    while not os.path.exists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        return f"cannot write {path}: {folder} is a file, not a directory; name another path"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"cannot write {path}: {folder} cannot be written to; name another path, or change the rights"
    return None


# ---- the check -----------------------------------------------------------------------------------------------------


def check_outputs(outputs: Iterable[Output], inputs: Iterable[Input] = ()) -> None:
    """Raises UserError, and writes nothing, if an output would replace an input, another output, or a file of another
    kind.

    Files are compared, not the spelling of their paths: a path may be relative, contain "..", or pass through symbolic
    or hard links. An output may replace an empty file, or a file of its own kind from an earlier call.
    """
    outputs, inputs = list(outputs), list(inputs)
    for output in outputs:
        _check_place(output)
    _check_distinct(outputs)
    _check_inputs(outputs, inputs)
    for output in outputs:
        if output.kind == CHECKPOINTS:
            _check_checkpoints(output, [*outputs, *inputs])
        else:
            _check_kind(output)


def _check_distinct(outputs: list[Output]) -> None:
    for i, second in enumerate(outputs):
        for first in outputs[:i]:
            if is_same_file(first.path, second.path):
                raise UserError(
                    f"{second.option}: {second.path} is the same file as {first.path} of {first.option}, "
                    "and both would be written; name another file"
                )


def _check_inputs(outputs: list[Output], inputs: list[Input]) -> None:
    """Raises UserError if an output, or the temporary file of an output, is an input. Only existing outputs can be
    inputs; each input, of which there may be a million, needs one os.stat."""
    found: dict[tuple[int, int], Output] = {}
    for output in outputs:
        for path in (output.path, temporary_path(Path(os.path.realpath(output.path)))):
            if status := _stat(path):
                found[status.st_dev, status.st_ino] = output
    for given in inputs if found else ():
        status = _stat(given.path)
        if status and (output := found.get((status.st_dev, status.st_ino))):
            raise UserError(
                f"{output.option}: {output.path} is the same file as {given.path} of {given.option}, "
                "which it would replace; name another file"
            )


def _stat(path: str | os.PathLike) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _check_checkpoints(folder: Output, others: Iterable[Output | Input]) -> None:
    """Raises UserError if another file of the run lies in a checkpoint directory, because a run moves, replaces and
    removes checkpoints."""
    root = Path(os.path.realpath(folder.path))
    for other in others:
        path = Path(os.path.realpath(other.path))
        inside = path.relative_to(root).parts if path.is_relative_to(root) else ()
        if len(inside) > 1 and re.fullmatch(r"step_\d{8,18}", inside[0]):
            raise UserError(
                f"{other.option}: {other.path} lies in a checkpoint of {folder.path} ({folder.option}), "
                "which the run may replace or remove; name another file"
            )


def _check_kind(output: Output) -> None:
    head = _read_head(output.path)
    is_blank = not head or len(head) < HEAD and not head.strip(b"\0")  # a power failure may leave zeros
    if is_blank or KINDS[output.kind].matches(head):
        return
    found = next((f" but {kind.name}" for kind in KINDS.values() if kind.matches(head)), "")
    raise UserError(
        f"{output.option}: {output.path} is there and is not {KINDS[output.kind].name}{found}; "
        "name another file, or remove that one"
    )
