"""Text to tokens and back: byte-level BPE, trained here, or one token per character.

    python encoder.py --input book.txt --vocab_size 8192 --output bin/cl8k.bin

    encoder = load("bin/cl8k.bin")                  # or "tiktoken:gpt2", or "chars:book.txt"
    encoder.decode(encoder.encode("any string"))    # the same string, whatever it holds

Index
    1. Cutting long text     segments: so that time is linear and no regular expression overflows
    2. Two ways to encode    BytePairs (tiktoken applies the merges), Characters (a lookup table)
    3. Encoder               encode, encode_batch, decode, stream, save
    4. The plain-data file   pack, unpack: JSON with a fingerprint, never a pickle
    5. Making encoders       load, train
    6. The command           python encoder.py --help

Byte-level BPE: Sennrich et al., arXiv 1508.07909; GPT-2 (Radford et al., 2019). A text is split by a regular
expression, GPT-4's here, and inside each piece the pair of neighbours with the lowest rank is merged until none is
left. rustbpe finds the merges: against Hugging Face's tokenizers it measured twice as fast on a third of the memory,
and it understands GPT-4's possessive quantifiers as tiktoken does. It is imported by `train` alone.
"""

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import argparse
import base64
import codecs
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from strawberry.argument_parser import ArgumentParser
from strawberry.common import (
    UserError,
    atomic_write,
    check_path_arguments,
    format_count,
    nearest,
    nearest_file,
    run_cli,
)
from strawberry.data.documents import Documents, add_reading_options
from strawberry.data.inputs import InputFile, expand_inputs
from strawberry.outputs import Input, Output, check_outputs, find_previous

EOT, PAD = "<|eot|>", "<|pad|>"  # the end of a text, and what fills ragged rows; every encoder has both
GPT4_PATTERN = (  # tiktoken's cl100k_base: contractions, words, up to 3 digits, punctuation, four cases of whitespace
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
VERSION = 1
MAX_FILE = 6 << 20  # bytes; the largest published vocabulary, 200,000 tokens, takes 4 MB
MAX_BRACKETS = 100_000  # in such a file: an empty list of two bytes takes 64 in memory
MAX_VOCAB = 1 << 22  # ids, so that a damaged file cannot ask for a table that fills the memory
MAX_TEMPLATE = 1 << 16  # characters of a chat template
FETCH_SECONDS = 30


# ---- 1. Cutting long text ----------------------------------------------------------------------------------------

SEGMENT = 1 << 15  # characters. tiktoken's regular expression overflows at about a million spaces


def _kind(char: str) -> str:
    return "letter" if char.isalpha() else "digit" if char.isalnum() else "other"


def _is_boundary(left: str, right: str) -> bool:
    """Whether every published split pattern ends a piece between these two neighbours.

    A space never stands behind anything else in a piece; letters and digits end with their run. Left out: apostrophes
    and combining marks, which o200k_base joins to the word before them.
    """
    if right == " ":
        return not left.isspace()
    if not left.isalnum() or _kind(left) == _kind(right):
        return False
    return right != "'" and not unicodedata.category(right).startswith("M")


def segments(text: str, size: int = SEGMENT) -> Iterator[str]:
    """Cut a text into parts of at most `size` characters, where a piece ends anyway: its tokens stay the same.

    Only where `size` characters hold no such place (a megabyte of one letter) is a piece itself cut. Any two
    neighbouring parts have more than `size` characters together, so the time is linear.

    >>> list(segments("one two three", 8)), list(segments("aaaaaaaaaa", 4))
    (['one two', ' three'], ['aaaa', 'aaaa', 'aa'])
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        cuts = (i for i in range(end, start, -1) if _is_boundary(text[i - 1], text[i]))
        end = next(cuts, end)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def cut_pieces(parts: Iterable[tuple[str, bool]], size: int) -> Iterator[tuple[str, bool]]:
    """Documents in parts (text, whether it ends its document) as parts of at most `size` characters, cut as `segments`
    cuts: the tokens of the parts are the tokens of the whole.

    >>> list(cut_pieces([("one tw", False), ("o three", True), ("four", True)], 8))
    [('one two', False), (' three', True), ('four', True)]
    """
    rest = ""
    for text, is_last in parts:
        pieces = segments(rest + text, size)
        rest = next(pieces)
        for piece in pieces:
            yield rest, False
            rest = piece
        if is_last:
            yield rest, True
            rest = ""


# ---- 2. Two ways to encode ---------------------------------------------------------------------------------------

_SURROGATES = re.compile("([\ud800-\udfff]+)")
_PROBE = "Hello, world's 1234567 !?\r\n\t  \x00_é中文🙂e\u0301\u2028 \x1c "


class BytePairs:
    """Byte-level BPE from a split pattern and a list of tokens in the order of their ranks."""

    keys = ("pattern", "ranks")

    def __init__(self, data: dict):
        self.tokens = _unpack_ranks(data["ranks"])
        ranks = {token: i for i, token in enumerate(self.tokens) if token}
        self.byte_ids = [ranks[bytes([byte])] for byte in range(256)]
        self.tiktoken = _tiktoken(data["pattern"], ranks)
        self._check_pattern(data["pattern"])

    def _check_pattern(self, pattern: str) -> None:
        """Refuse a pattern that loses text, or at which tiktoken gives up (one that matches the empty string)."""
        try:
            whole = b"".join(self.tokens[i] for i in self.encode(_PROBE)) == _PROBE.encode()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in Rust is no Exception, and its class cannot be imported
            whole = False
        if not whole:
            raise UserError(f"pattern {pattern!r} loses text; a split pattern must match every character, and never ''")

    def encode(self, text: str, offset: int = 0) -> list[int]:
        ids = []
        for part in segments(text):
            ids += self.tiktoken.encode_ordinary(part) if _is_unicode(part) else self._encode_surrogates(part)
        return ids

    def _encode_surrogates(self, text: str) -> list[int]:
        """Lone surrogates have no UTF-8, and tiktoken would replace them: they become the three bytes of WTF-8."""
        ids = []
        for i, part in enumerate(_SURROGATES.split(text)):  # text, surrogates, text, …
            if i % 2:
                ids += [self.byte_ids[byte] for byte in part.encode("utf-8", "surrogatepass")]
            else:
                ids += self.tiktoken.encode_ordinary(part)
        return ids


def _is_unicode(text: str) -> bool:
    """Whether a text holds no lone surrogate. Encoding and forgetting it is the fastest way to know."""
    if text.isascii():
        return True
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _tiktoken(pattern: str, ranks: dict[bytes, int]):
    import tiktoken  # not needed by Characters

    try:
        return tiktoken.Encoding("encoder", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        reason = str(error).strip().splitlines()[-1:]
        raise UserError(f"pattern {pattern!r} is not a regular expression of tiktoken's: {''.join(reason)}") from error


class Characters:
    """One token per character, in sorted order: nanoGPT's shakespeare_char."""

    keys = ("chars",)

    def __init__(self, data: dict):
        chars = data["chars"]
        if not isinstance(chars, list) or not all(isinstance(c, str) and len(c) == 1 for c in chars):
            raise UserError("'chars' must be a list of single characters")
        if not chars or len(set(chars)) < len(chars):
            raise UserError("'chars' must hold at least one character, and none twice")
        self.tokens = [char.encode("utf-8", "surrogatepass") for char in chars]
        codes = [ord(char) for char in chars]
        self.ids = np.full(max(codes) + 2, -1, dtype=np.int64)  # code point → id; the last entry stands for all above
        self.ids[codes] = np.arange(len(codes))

    def encode(self, text: str, offset: int = 0) -> list[int]:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        if len(ids) and ids.min() < 0:
            at = int(ids.argmin())
            raise UserError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {offset + at} is not among the encoder's "
                f"{len(self.tokens)} characters; remove it, or make the encoder from a text that has it"
            )
        return ids.tolist()


KINDS = {"bpe": BytePairs, "tiktoken": BytePairs, "chars": Characters}


# ---- 3. Encoder --------------------------------------------------------------------------------------------------


class Encoder:
    """Text to tokens and back; made by `load`, `train` or `from_bytes`.

    vocab_size   number of ids, specials included
    eot, pad     the ids of <|eot|> and <|pad|>
    specials     dict of special string → id; two names may share an id, which spells the first in sorted order
    fingerprint  SHA-256, in hexadecimal, of the plain data; equal encoders have equal fingerprints
    chat_template  {"template": Jinja text, "end_of_turn": special string}, or None; strawberry/data/chat.py applies it

    >>> encoder = train(["the cat, the hat"], vocab_size=261)  # 256 bytes, "at", "he", "the"
    >>> encoder.encode("the")
    [258]
    >>> encoder.encode("the<|eot|>", allowed_special={"<|eot|>"})
    [258, 259]
    """

    def __init__(self, data: dict):
        self._data = {**data, "version": VERSION}
        self._coder = KINDS[data["kind"]](data)
        self.specials: dict[str, int] = dict(data["specials"])
        self._table = _table(self._coder.tokens, self.specials)
        self.vocab_size = len(self._table)
        self.eot, self.pad = self.specials[EOT], self.specials[PAD]
        self.fingerprint = _fingerprint(self._data)
        self.chat_template: dict[str, str] | None = data.get("chat_template")

    def __repr__(self) -> str:
        return f"Encoder({self._data['kind']}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:8]})"

    def encode(self, text: str, allowed_special: Collection[str] = frozenset()) -> list[int]:
        """The ids of a text. Special strings in it are ordinary text, except those that are allowed.

        Raises UserError for a special that the encoder lacks, and for a character unknown to a `chars` encoder.
        """
        if not allowed_special:
            return self._coder.encode(text)
        for name in allowed_special:
            if name not in self.specials:
                raise UserError(f"no special token {name!r}{nearest(name, self.specials)}; has {list(self.specials)}")
        longest_first = sorted(allowed_special, key=len, reverse=True)
        ids, position = [], 0
        for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, longest_first))})", text)):
            if i % 2:  # text, special, text, …
                ids.append(self.specials[part])
            elif part:
                ids += self._coder.encode(part, position)
            position += len(part)
        return ids

    def encode_batch(self, texts: Iterable[str], num_threads: int = 2) -> list[np.ndarray]:
        """One uint32 array of ids for each text, in order; tiktoken runs outside Python's lock."""
        texts = list(texts)
        size = max(1, len(texts) // (16 * num_threads))  # some groups per thread, for balance without much overhead
        groups = [texts[i : i + size] for i in range(0, len(texts), size)]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(itertools.chain.from_iterable(pool.map(self._encode_group, groups)))

    def _encode_group(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self._coder.encode(text), dtype=np.uint32) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some ids (list, array or tensor of one axis). Bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", _ERRORS)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of some ids; specials spell their names. Raises UserError for an id out of range."""
        ids = np.asarray(tokens if hasattr(tokens, "__len__") else list(tokens))
        if not ids.size:
            return b""
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise UserError(f"tokens must be whole numbers from 0 to {self.vocab_size - 1}, in one row")
        wrong = (ids < 0) | (ids >= self.vocab_size)
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(f"token {ids[at]} at position {at} is out of range: the ids are 0 to {self.vocab_size - 1}")
        return b"".join([self._table[i] for i in ids.tolist()])

    def token_bytes(self, token: int) -> bytes:
        token = int(token)
        return self._table[token] if 0 <= token < self.vocab_size else self.decode_bytes([token])  # which says why not

    def stream(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def to_bytes(self) -> bytes:
        """The encoder as plain data (JSON, UTF-8), for a file of its own or inside a model's."""
        return pack(self._data, self.fingerprint)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Encoder":
        """The encoder that `to_bytes` wrote. Raises UserError when the data is damaged or of another kind."""
        return cls(unpack(data))

    def save(self, path: str | os.PathLike) -> None:
        atomic_write(path, self.to_bytes())


def _table(tokens: list[bytes], specials: dict[str, int]) -> list[bytes]:
    """id → bytes; an id that nothing uses, as some published vocabularies have, spells nothing."""
    table = tokens + [b""] * (max(max(specials.values()) + 1, len(tokens)) - len(tokens))
    for name, i in sorted(specials.items(), reverse=True):  # of two names with one id, the first spells it
        if i < len(tokens) and tokens[i]:
            raise UserError(f"special token {name!r} has the id {i}, which is an ordinary token's")
        table[i] = name.encode("utf-8", "surrogatepass")
    return table


def _surrogate_or_replacement(error: UnicodeError) -> tuple[str, int]:
    """A lone surrogate's three bytes become that surrogate again; anything else that is no UTF-8 becomes U+FFFD."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    try:
        return error.object[error.start : error.start + 3].decode("utf-8", "surrogatepass"), error.start + 3
    except UnicodeDecodeError:
        return "\ufffd", error.end


_ERRORS = "surrogate-or-replacement"
codecs.register_error(_ERRORS, _surrogate_or_replacement)


class StreamDecoder:
    """Decodes token by token and holds back a character until its last byte is there.

    What it returns, joined and with `flush()` at the end, is what `decode` makes of all the tokens at once.
    """

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.decoder = codecs.getincrementaldecoder("utf-8")(_ERRORS)

    def push(self, token: int) -> str:
        return self.decoder.decode(self.encoder.token_bytes(token))

    def flush(self) -> str:
        """What is held back, as U+FFFD; the decoder is then as new."""
        return self.decoder.decode(b"", final=True)


# ---- 4. The plain-data file --------------------------------------------------------------------------------------
#
# {"format": "encoder", "version": 1, "kind": "bpe", "pattern": "…", "ranks": ["AA==", "AQ==", …],
#  "specials": {"<|eot|>": 8190, "<|pad|>": 8191}, "fingerprint": "…"}
# ranks are tokens in base64, by id, "" where an id is unused; the kind "chars" has "chars": ["\n", " ", …] instead.
# An encoder for chats also has "chat_template": {"template": "…", "end_of_turn": "<|im_end|>"}.


def _fingerprint(data: dict) -> str:
    plain = {key: value for key, value in data.items() if key not in ("format", "fingerprint")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def pack(data: dict, fingerprint: str) -> bytes:
    return json.dumps({"format": "encoder", **data, "fingerprint": fingerprint}, indent=0).encode() + b"\n"


def unpack(raw: bytes) -> dict:
    """Check the bytes of an encoder file and return its plain data. Raises UserError naming what is wrong."""
    if len(raw) > MAX_FILE:
        raise UserError(f"not an encoder: larger than {MAX_FILE >> 20} MiB")
    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        raise UserError(f"not an encoder: it has more than {MAX_BRACKETS:,} brackets")
    try:
        data = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # a pickle, a truncated file, any binary file
        raise UserError("not an encoder, or a damaged one: no valid JSON; make it again with encoder.py") from error
    if not isinstance(data, dict) or data.pop("format", None) != "encoder":
        raise UserError('not an encoder: its JSON lacks "format": "encoder"')
    if data.get("version") != VERSION:
        raise UserError(f"encoder version {data.get('version')!r}; this program reads version {VERSION}")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"encoder kind {kind!r}; the kinds are {', '.join(KINDS)}")
    missing = [key for key in (*KINDS[kind].keys, "specials", "fingerprint") if key not in data]
    if missing:
        raise UserError(f"damaged encoder: {', '.join(missing)} missing; make it again with encoder.py")
    if data.pop("fingerprint") != _fingerprint(data):
        raise UserError("damaged encoder: its fingerprint does not match its data; make it again with encoder.py")
    if not isinstance(data.get("pattern", ""), str):
        raise UserError("damaged encoder: pattern must be a string")
    _check_specials(data["specials"])
    if "chat_template" in data:
        _check_chat_template(data["chat_template"], data["specials"])
    return data


def _check_specials(specials: dict) -> None:
    if not isinstance(specials, dict) or not {EOT, PAD} <= specials.keys() or "" in specials:
        raise UserError(f"damaged encoder: specials must be names with ids, {EOT} and {PAD} among them")
    for name, i in specials.items():
        if type(i) is not int or not 0 <= i < MAX_VOCAB:
            raise UserError(f"damaged encoder: the id of special token {name!r} is {i!r}, not 0 to {MAX_VOCAB - 1}")


def _check_chat_template(template: dict, specials: dict) -> None:
    texts = isinstance(template, dict) and [template.get(key) for key in ("template", "end_of_turn")]
    if not texts or not all(isinstance(text, str) for text in texts) or len(texts[0]) > MAX_TEMPLATE:
        raise UserError(f"damaged encoder: chat_template must have a template of at most {MAX_TEMPLATE:,} characters, "
                        "and an end_of_turn")  # fmt: skip
    if texts[1] not in specials:
        raise UserError(f"damaged encoder: end_of_turn {texts[1]!r} is none of its special tokens")


def _unpack_ranks(ranks: list[str]) -> list[bytes]:
    if not isinstance(ranks, list) or len(ranks) > MAX_VOCAB:
        raise UserError(f"damaged encoder: ranks must be a list of at most {MAX_VOCAB} tokens")
    try:
        tokens = [base64.b64decode(token, validate=True) for token in ranks]
    except (ValueError, TypeError) as error:
        raise UserError("damaged encoder: ranks must be tokens in base64") from error
    used = [token for token in tokens if token]
    if len(set(used)) < len(used) or not {bytes([byte]) for byte in range(256)} <= set(used):
        raise UserError("damaged encoder: ranks must hold all 256 bytes, and no token twice")
    return tokens


# ---- 5. Making encoders ------------------------------------------------------------------------------------------


def load(spec: str | os.PathLike) -> Encoder:
    """The encoder that a JSON file's "encoder_path" names.

    "bin/cl8k.bin"      a file written by encoder.py or prepare.py
    "tiktoken:gpt2"     a published one, fetched once and then cached by tiktoken. Its <|endoftext|> is <|eot|> too;
                        <|pad|> is one more id, so that padding is never taken for an end: 50,258 ids for gpt2
    "chars:book.txt"    one token per character of that text, in sorted order, then <|eot|> and <|pad|>; any file
                        that prepare.py reads

    Raises UserError when it is not there, not to be fetched, or damaged.
    """
    spec = os.fspath(spec)
    scheme, _, name = spec.partition(":")
    if scheme in ("tiktoken", "chars"):
        return _from_tiktoken(name) if scheme == "tiktoken" else _from_characters(name)
    try:
        with open(spec, "rb") as file:
            raw = file.read(MAX_FILE + 1)
    except FileNotFoundError as error:
        make = "`python prepare.py` or `python encoder.py` makes one"
        raise UserError(f"no encoder at {spec!r}{nearest_file(spec)}; {make}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the encoder {spec!r}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return Encoder.from_bytes(raw)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error


def _from_characters(path: str) -> Encoder:
    chars: set[str] = set()
    if not path:
        raise UserError("chars: names no file; write chars:FILE, a text that holds every character of the corpus")
    try:
        documents = Documents([InputFile(path)])
        documents.scan()
        for text, _ in documents.read():
            chars.update(text)
    except UserError as error:
        raise UserError(f"chars:{path}: {error}") from error
    if not chars:
        raise UserError(f"chars:{path} is empty; name a text file that holds every character of the corpus")
    return from_characters(chars)


def from_characters(chars: set[str]) -> Encoder:
    n = len(chars)
    return Encoder({"kind": "chars", "chars": sorted(chars), "specials": {EOT: n, PAD: n + 1}})


def _from_tiktoken(name: str) -> Encoder:
    published = _fetch(name)
    # The underscored names are those by which tiktoken's README extends an encoding.
    ranks = [""] * (max(published._mergeable_ranks.values()) + 1)
    for token, i in published._mergeable_ranks.items():
        ranks[i] = base64.b64encode(token).decode()
    specials = dict(published._special_tokens)
    for special, twin in ((EOT, "<|endoftext|>"), (PAD, None)):
        free = max(len(ranks), *(i + 1 for i in specials.values()), 0)
        specials.setdefault(special, specials.get(twin, free))
    pattern = published._pat_str
    return Encoder({"kind": "tiktoken", "name": name, "pattern": pattern, "ranks": ranks, "specials": specials})


def _fetch(name: str):
    """tiktoken's encoding of that name, from its cache or the net; tiktoken itself would wait without end."""
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(f"no encoding tiktoken:{name}{nearest(name, known)}; there are {', '.join(sorted(known))}")
    result = []

    def fetch() -> None:
        try:
            result.append(tiktoken.get_encoding(name))
        except Exception as error:  # whatever the network, the cache folder or the hash check raises
            result.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    outcome = result[0] if result else TimeoutError(f"no answer in {FETCH_SECONDS} s")
    if isinstance(outcome, Exception):
        reason = f"{type(outcome).__name__}: {outcome}".splitlines()[0][:200]
        raise UserError(
            f"cannot fetch tiktoken:{name} ({reason}); connect to the net, set TIKTOKEN_CACHE_DIR to a folder "
            "that has it, or train an encoder with encoder.py"
        ) from outcome
    return outcome


def _clean_parts(texts: Iterable[str]) -> Iterator[str]:
    """The texts in segments, without the lone surrogates that rustbpe cannot read."""
    for text in texts:
        for part in segments(text):
            if part:
                yield part if _is_unicode(part) else part.encode("utf-8", "replace").decode()


def train(texts: Iterable[str], vocab_size: int, specials: Iterable[str] = (), exact: bool = True,
          chat_template: dict[str, str] | None = None) -> Encoder:  # fmt: skip
    """Learn a byte-level BPE of exactly `vocab_size` ids: 256 bytes, the merges, <|eot|>, <|pad|>, then `specials`.

    Texts are streamed: memory grows with the number of different words, not with the text. The result depends on the
    texts alone; of equally frequent pairs the one with the lower ids wins.

    Raises UserError when vocab_size is too small, and when the texts are too few to fill it: ids that no text can
    ever use would waste a model's parameters, so the largest possible size is named instead, or where `exact` is False
    taken.
    """
    import rustbpe  # only training an encoder needs it

    if isinstance(texts, str) or isinstance(specials, str):
        raise TypeError("texts and specials are collections of strings, not one string")
    names = list(dict.fromkeys((EOT, PAD, *specials)))
    if "" in names:
        raise UserError("a special token must not be empty")
    least = 256 + len(names)
    if not least <= vocab_size <= MAX_VOCAB:
        raise UserError(
            f"vocab_size {vocab_size} is out of range: from {least} (256 bytes and {len(names)} special tokens) "
            f"to {MAX_VOCAB}"
        )
    parts = _clean_parts(texts)
    first = next(parts, None)
    if first is None:
        raise UserError("no text to train on: the input is empty")
    trainer = rustbpe.Tokenizer()
    n_ranks = vocab_size - len(names)
    trainer.train_from_iterator(itertools.chain([first], parts), n_ranks, buffer_size=256, pattern=GPT4_PATTERN)
    ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if not exact:
        n_ranks = len(ranks)
    if len(ranks) < n_ranks:
        found, most = len(ranks) - 256, len(ranks) + len(names)
        raise UserError(
            f"too little text for vocab_size {vocab_size}: only {found} merges found, {n_ranks - 256} needed; "
            f"give more text, or a vocab_size of at most {most}"
        )
    data = {"kind": "bpe", "pattern": GPT4_PATTERN, "ranks": [base64.b64encode(token).decode() for token in ranks]}
    if chat_template is not None:
        data["chat_template"] = chat_template
    return Encoder({**data, "specials": {name: n_ranks + i for i, name in enumerate(names)}})


# ---- 6. The command ----------------------------------------------------------------------------------------------


class TrainingText:
    """The documents in pieces of about a megabyte; counts their bytes and keeps a sample."""

    sample_bytes = 16 << 20

    def __init__(self, documents: Documents):
        self.documents, self.n_bytes = documents, 0
        self.sample: list[str] = []  # the first 16 MiB, to measure bytes per token

    def __iter__(self) -> Iterator[str]:
        size = sum(scanned.file.size for scanned in self.documents.files)
        with tqdm(total=size, desc="reading", unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for text, _ in cut_pieces(self.documents.read(progress=bar.update), 1 << 20):
                if self.n_bytes < self.sample_bytes:
                    self.sample.append(text)
                self.n_bytes += len(text.encode("utf-8", "surrogatepass"))
                yield text


DEFAULT_OUTPUT = "bin/cl8k.bin"


def parse_vocab_size(text: str) -> int:
    """The value of --vocab_size, refused before any text is read where no encoder has that many tokens."""
    least = 256 + len((EOT, PAD))
    try:
        size = int(text)
    except ValueError:
        size = 0
    if not least <= size <= MAX_VOCAB:
        raise UserError(f"{text!r} is no whole number from {least:,} (256 bytes and 2 special tokens) to {MAX_VOCAB:,}")
    return size


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser("encoder.py", "Train a byte-level BPE encoder on text files.")
    parser.add_argument("--input", nargs="+", action="extend", required=True, help="what prepare.py reads: files, "
                        "folders or globs of text, .json or .jsonl, packed with gzip or not; - is standard input")
    parser.add_argument("--vocab_size", type=parse_vocab_size, default=8192,
                        help="special tokens included (default 8192)")
    parser.add_argument("--output", help=f"the encoder file (default {DEFAULT_OUTPUT}, if there is none)")
    parser.add_argument("--special", nargs="+", action="extend", default=[], help=f"more specials than {EOT} and {PAD}")
    add_reading_options(parser)
    args = parser.parse_args(argv)
    if args.output is None and os.path.exists(DEFAULT_OUTPUT):
        raise UserError(f"--output: {DEFAULT_OUTPUT} is there, and token files and runs may need it; name a new file, "
                        f"or replace it with --output {DEFAULT_OUTPUT}")  # fmt: skip
    args.output = args.output or DEFAULT_OUTPUT
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    check_path_arguments(args, "input", "output")
    start, outputs = time.perf_counter(), [Output("--output", args.output, "encoder")]
    inputs = expand_inputs(args.input, leave_out=find_previous(outputs))
    check_outputs(outputs, [Input("--input", file.path) for file in inputs])
    documents = Documents(inputs, format=args.format, errors=args.errors, mend="--errors replace")
    documents.scan()
    if not documents.files:
        raise UserError(f"no text to train on: {'; '.join(documents.notes())}")
    files = format_count(len(documents.files), "file")
    print(f"training an encoder of {args.vocab_size:,} tokens on {files} …", file=sys.stderr, flush=True)
    text = TrainingText(documents)
    encoder = train(text, args.vocab_size, args.special)
    encoder.save(args.output)
    seconds = time.perf_counter() - start
    n_tokens = sum(len(ids) for ids in encoder.encode_batch(text.sample))
    n_bytes = sum(len(piece.encode("utf-8", "surrogatepass")) for piece in text.sample)
    print(f"{args.output}: {encoder.vocab_size:,} tokens from {text.n_bytes / 1e6:.1f} MB in {files}; "
          f"{n_bytes / n_tokens:.2f} bytes per token, {seconds:.1f} s")
    for note in documents.notes():
        print(note)


if __name__ == "__main__":
    run_cli(main)
