"""The entries of .json and .jsonl files, one at a time.

    for line in read_lines(stream, "a.jsonl"):              # of a .jsonl: each line is an entry
        entry = parse_json(line.data.decode())
    for entry in read_json_list(stream, "a.json"):          # of a .json, which must be a list
        ...

Memory is constant except for an entry, whose size is limited (MAX_ENTRY). What json and ijson accept silently is an
error here: a key that appears twice in an object, and an escape of half a surrogate pair.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from strawberry.common import UserError, show

JSON_PIECE = 1 << 22  # bytes per read of a .json: yajl takes O(n²) time for a string that spans n pieces
MAX_ENTRY = 1 << 26  # largest number of bytes of an entry of a .json or .jsonl
MAX_DEPTH = 500  # largest nesting of brackets in an entry
MEND = "mend it or leave it out"


class ByteStream(Protocol):
    """What is read here: an open file, or a HashedStream."""

    def read(self, size: int) -> bytes: ...

    def readline(self, size: int) -> bytes: ...


class NoTextError(UserError):
    """A JSON file whose entries do not have the required form."""


class RepeatedKeyError(ValueError):
    """A key appears twice in an object."""

    def __init__(self, key: str):
        super().__init__(f"has the key {show(key)} twice: keep one of them")


def build_object(pairs: list[tuple[str, Any]]) -> dict:
    """A dict of keys and values, for json's object_pairs_hook. Raises RepeatedKeyError."""
    built = dict(pairs)
    if len(built) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for key in built if keys.count(key) > 1))
    return built


def parse_json(text: str, mend: str = MEND) -> Any:
    """The value of a JSON text. Raises ValueError; its message continues a prefix such as "line 3"."""
    try:
        return json.loads(text, object_pairs_hook=build_object)
    except RepeatedKeyError:
        raise
    except RecursionError:
        raise ValueError(f"is not JSON (its brackets are nested too deeply): {mend}") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}): {mend}") from None


class Line(NamedTuple):
    """A line of a file. Numbers count from 1, offsets count bytes from 0."""

    number: int
    offset: int
    data: bytes


def read_lines(stream: ByteStream, label: str) -> Iterator[Line]:
    """Yield the lines that are not blank, without a byte order mark. Raises UserError for a line longer than MAX_ENTRY
    bytes.
    """
    number, offset = 1, 0
    while data := stream.readline(MAX_ENTRY + 1):
        if len(data) > MAX_ENTRY:
            raise UserError(f"{label}:{number} {explain_limit()}")
        start = len(codecs.BOM_UTF8) if number == 1 and data.startswith(codecs.BOM_UTF8) else 0
        if data[start:].strip():
            yield Line(number, offset + start, data[start:])
        number, offset = number + 1, offset + len(data)


def explain_limit() -> str:
    limit = f"{MAX_ENTRY / (1 << 20):g} MiB"
    return f"is longer than {limit}, the limit of an entry: cut it up, or make it a .txt, which has none"


class SurrogateCheck:
    """Finds an escape of an unpaired surrogate, such as \\ud800, which yajl would replace by "?" without an error."""

    PAIR = rb"u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}"
    ESCAPE = re.compile(rb"\\(?:" + PAIR + rb"|(u[dD][89a-fA-F][\da-fA-F]{2})|.)", re.DOTALL)
    LONGEST = 12  # bytes of the longest escape: a surrogate pair

    def __init__(self):
        self.rest, self.offset = b"", 0  # a possible start of an escape, and its offset

    def check(self, data: bytes) -> bytes:
        """Add bytes (b"" at the end). Returns those that are checked now. Raises ValueError for an unpaired surrogate.
        """
        text = self.rest + data
        kept = len(text) - self.LONGEST if data else len(text)
        end = 0
        if b"\\ud" in text or b"\\uD" in text:
            for match in self.ESCAPE.finditer(text):
                if match.start() > kept:
                    break
                if match[1]:
                    where = f"byte {self.offset + match.start()}"
                    raise ValueError(f"{where}: \\{match[1].decode()} is half of a surrogate pair, and no character")
                end = match.end()
        start = max(end, kept, 0)
        while start > end and text[start - 1 : start] == b"\\":  # the first of several backslashes begins the escape
            start -= 1
        self.rest, self.offset = text[start:], self.offset + start
        return text[:start]


class JsonSource:
    """The bytes of a .json file for ijson, without a byte order mark. Raises ValueError if an entry is too long.

    The caller calls end_entry() after each entry; .n_entries counts them.
    """

    def __init__(self, stream: ByteStream, label: str, errors: str):
        self.stream, self.label, self.n_read, self.start, self.n_entries = stream, label, 0, 0, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace") if errors == "replace" else None
        self.surrogates, self.has_begun = SurrogateCheck(), False

    def end_entry(self) -> None:
        self.start, self.n_entries = self.n_read, self.n_entries + 1

    def read(self, size: int) -> bytes:
        """The next bytes; b"" at the end."""
        checked, data = b"", b"x"
        while data and not checked:
            if self.n_read - self.start > MAX_ENTRY:
                raise ValueError(explain_limit())
            data = self._read_some(max(size, SurrogateCheck.LONGEST + 3))
            self.n_read += len(data)
            try:
                checked = self.surrogates.check(data)
            except ValueError as error:
                raise UserError(f"{self.label}: {error}: {MEND}") from None
            if checked and not self.has_begun:
                self.has_begun, checked = True, checked.removeprefix(codecs.BOM_UTF8)
        return checked

    def _read_some(self, size: int) -> bytes:
        while data := self.stream.read(size):
            data = data if self.decoder is None else self.decoder.decode(data).encode()
            if data:
                return data
        return b"" if self.decoder is None else self.decoder.decode(b"", final=True).encode()


def read_json_list(stream: ByteStream, label: str, errors: str = "strict") -> Iterator[Any]:
    """Yield the entries of a .json file, which must be a list, one at a time. Raises UserError that names the entry."""
    source = JsonSource(stream, label, errors)
    events = _parse_events(source)
    if not _begins_list(events):
        message = f'{label} is no JSON list: write ["…", {{"text": "…"}}, …], or name it .txt if it is one text'
        raise NoTextError(message)
    try:
        for entry in build_entries(events):
            source.end_entry()
            yield entry
    except ValueError as error:
        raise UserError(f"{label}: entry {source.n_entries + 1} {error}") from None


def _begins_list(events: Iterator[tuple[str, Any]]) -> bool:
    try:
        return next(events)[0] == "start_array"
    except ValueError:  # not JSON, or empty
        return False


def _parse_events(source: JsonSource) -> Iterator[tuple[str, Any]]:
    """Yield ijson's events of a JSON text. Raises ValueError if it is not valid JSON."""
    try:
        import ijson  # needed only for a .json list
    except ImportError:
        raise UserError("reading .json needs ijson: pip install -r requirements.txt") from None
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events)
    try:
        while data := source.read(JSON_PIECE):
            parser.send(data)
            yield from events
            events.clear()
        parser.close()
        yield from events
    except ijson.JSONError as error:
        yield from events  # the events before the error
        raise ValueError(f"is not JSON ({str(error).splitlines()[0]}): {MEND}") from None
    finally:
        with contextlib.suppress(Exception):  # close raises an error for an incomplete text
            parser.close()


def build_entries(events: Iterator[tuple[str, Any]]) -> Iterator[Any]:
    """Yield the entries of a list from ijson's events after its opening bracket. Raises RepeatedKeyError."""
    containers: list[dict | list] = []  # the open containers, outermost first
    keys: list[str | None] = []  # for each open object, the key of the next value
    for event, value in events:
        if event == "map_key":
            if value in containers[-1]:
                raise RepeatedKeyError(value)
            keys[-1] = value
            continue
        if event in ("start_map", "start_array"):
            if len(containers) == MAX_DEPTH:
                raise ValueError("is not read (its brackets are nested too deeply)")
            containers.append({} if event == "start_map" else [])
            keys.append(None)
            continue
        if event in ("end_map", "end_array"):
            if not containers:  # the list's own end; ijson raises an error for anything after it
                continue
            value = containers.pop()
            keys.pop()
        if not containers:
            yield value
        elif isinstance(containers[-1], dict):
            containers[-1][keys[-1]] = value
        else:
            containers[-1].append(value)
