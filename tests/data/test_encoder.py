"""The promises of encoder.py, against a naive byte-level BPE: a trainer and an encoder as slow loops."""

import base64
import itertools
import json
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import regex  # tiktoken's own dependency: the split pattern, run by another engine
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import count

import encoder as encoders
from encoder import EOT, PAD, SEGMENT, Encoder, load, segments, train
from strawberry.common import UserError

ROOT = Path(encoders.__file__).parent
CORPUS = [(ROOT / name).read_text(encoding="utf-8") for name in ("encoder.py", "strawberry/config.py")]
CORPUS += ["中文分词。也可以。 中文分词! Ünïcödé ёлка ёлки 🙂🙂 don't DON'T we'll 'tis\n\n  \t x = 12345\r\n\r\n"] * 3
BPE = train(CORPUS, 600, ["<|user|>", "<|user|>s"])
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
O200K = "|".join(  # tiktoken's o200k_base
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PATTERNS = {"gpt4": encoders.GPT4_PATTERN, "gpt2": GPT2, "o200k": O200K}

anything = st.text(st.characters(exclude_categories=()))  # lone surrogates too
assigned = st.characters(exclude_categories=("Cs", "Cn", "Co"))  # the two engines' Unicode versions agree on these
tricky = st.sampled_from("aaabtTsSlL''  \n\n\r\t1239.,!/(_é\u0301中🙂\x1c\u00a0²")
wordy = st.text(tricky | assigned, max_size=60) | st.lists(st.sampled_from(" ".join(CORPUS).split(" "))).map(" ".join)


# ---- the naive references ----------------------------------------------------------------------------------------


def merge(tokens, pair, new):
    """tokens with each `pair` of neighbours, from the left, replaced by `new`."""
    out, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out


def naive_encode(text, pattern, ranks):
    """Byte-level BPE: while some neighbours together are a token, join the first pair of the lowest rank."""
    ids = []
    for piece in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            ranked = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not ranked:
                break
            i = min(ranked)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def naive_train(texts, n_merges):
    """The tokens in the order in which they are found: the most frequent pair, of equals the one of lower ids."""
    pieces = [list(piece.encode()) for text in texts for piece in regex.findall(encoders.GPT4_PATTERN, text)]
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(n_merges):
        counts = {}
        for piece in pieces:
            for pair in itertools.pairwise(piece):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        pieces = [merge(piece, best, len(tokens)) for piece in pieces]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def ranks_of(encoder):
    special = set(encoder.specials.values())
    return {encoder.token_bytes(i): i for i in range(encoder.vocab_size) if i not in special}


def with_pattern(pattern):
    """BPE's tokens under another split pattern."""
    return Encoder({**BPE._data, "pattern": pattern})


# ---- the round trip ----------------------------------------------------------------------------------------------


@given(anything)
@settings(max_examples=count(200, 20_000), deadline=None)
def test_round_trip_of_any_string(text):
    assert BPE.decode(BPE.encode(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("char", ["a", " ", "\n", "!", "1", "é", "\u0301", "\ud800", "' ", "\x1c!"])
def test_round_trip_of_a_megabyte_of_one_thing(pattern, char):
    size = 1_000_000 if pattern == encoders.GPT4_PATTERN else 4 * SEGMENT  # cut into segments, which are all alike
    text = char * (size // len(char.encode("utf-8", "surrogatepass")))
    encoder = with_pattern(pattern)
    assert encoder.decode(encoder.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud83d\ude00", "a\udc80b\ud800", "\ufffd", "\x00", "", "🙂", "\r\n\r\n", "\u2028"])
def test_round_trip_of_odd_strings(text):
    assert BPE.decode(BPE.encode(text)) == text


@given(st.binary(max_size=40))
def test_decoding_invalid_utf8_replaces(data):
    text = BPE.decode([BPE._coder.byte_ids[byte] for byte in data])
    try:
        assert text == data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        assert "\ufffd" in text


def measure(function, *args):
    """Processor seconds of the shorter of two runs: a busy machine only ever adds."""
    times = []
    for _ in range(2):
        start = time.process_time()
        function(*args)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.slow
@pytest.mark.parametrize("char", ["a", " ", "!", "\ud800", "a\x1c"])
def test_time_is_linear(char):
    short, long = (char * (size // len(char)) for size in (2 * SEGMENT, 16 * SEGMENT))
    # Eight times the text: about 8 when linear, 64 when quadratic.
    assert measure(BPE.encode, long) < 32 * measure(BPE.encode, short) + 0.02
    short, long = BPE.encode(short), BPE.encode(long)
    assert measure(BPE.decode, long) < 32 * measure(BPE.decode, short) + 0.02


# ---- the tokens --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(wordy)
@settings(max_examples=200, deadline=None)
def test_agrees_with_a_naive_encoder(text):
    assert BPE.encode(text) == naive_encode(text, encoders.GPT4_PATTERN, ranks_of_bpe)


ranks_of_bpe = ranks_of(BPE)


@pytest.mark.slow
@given(st.lists(st.text("aab c", min_size=4, max_size=30), min_size=2, max_size=6), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_training_agrees_with_a_naive_trainer(texts, n_merges):
    try:
        encoder = train(texts, 258 + n_merges)
    except UserError as error:
        assert "merges found" in str(error)
        return
    assert list(ranks_of(encoder)) == naive_train(texts, n_merges)


def test_training_agrees_with_a_naive_trainer_on_prose():
    texts = [CORPUS[1][:3000], CORPUS[2]]
    assert list(ranks_of(train(texts, 258 + 40))) == naive_train(texts, 40)


def test_inexact_training_ends_with_as_many_tokens_as_the_texts_allow():
    text = ["abab cdcd abab"]
    with pytest.raises(UserError, match="a vocab_size of at most (\\d+)") as caught:
        train(text, 5000)
    most = int(str(caught.value).rsplit(" ", 1)[1])
    assert train(text, 5000, exact=False).to_bytes() == train(text, most).to_bytes()
    assert train(text, most - 1, exact=False).vocab_size == most - 1


def test_training_is_deterministic():
    assert train(CORPUS, 600, ["<|user|>", "<|user|>s"]).to_bytes() == BPE.to_bytes()


def test_split_pattern_is_gpt4s():
    assert regex.findall(encoders.GPT4_PATTERN, "We'LL see  1234 (now)!\n\n  x") == [
        "We", "'LL", " see", " ", " ", "123", "4", " (", "now", ")!\n\n", " ", " x",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("text", [*CORPUS[::2], "1,2,33\n" * 9, "don't e\u0301te\u0301 " * 9, "deadbeef0123" * 99])
def test_long_ordinary_text_keeps_bare_tiktokens_tokens(pattern, text):
    text *= 2 * SEGMENT // len(text) + 2
    encoder = with_pattern(pattern)
    assert len(list(segments(text))) > 1
    bare = tiktoken.Encoding("bare", pat_str=pattern, mergeable_ranks=ranks_of_bpe, special_tokens={})
    assert encoder.encode(text) == bare.encode_ordinary(text)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@given(text=st.text(tricky | assigned, min_size=2, max_size=40))
@settings(max_examples=200, deadline=None)
def test_cuts_fall_between_pieces(pattern, text):
    pieces = regex.findall(pattern, text)
    ends = set(itertools.accumulate(len(piece) for piece in pieces))
    for i in range(1, len(text)):
        if encoders._is_boundary(text[i - 1], text[i]):
            assert i in ends, (text[:i], text[i:])
            assert regex.findall(pattern, text[:i]) + regex.findall(pattern, text[i:]) == pieces


@given(st.text(st.sampled_from("ab ,1\n"), max_size=60), st.integers(1, 9))
def test_segments_are_the_text_in_bounded_parts(text, size):
    parts = list(segments(text, size))
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)
    assert all(len(a) + len(b) > size for a, b in itertools.pairwise(parts[:-1]))


def test_batch_equals_one_by_one():
    texts = [*CORPUS, "", "a" * 40_000, "\ud800x", "hello", "world"] * 3
    for threads in (1, 2, 3):
        batch = BPE.encode_batch(iter(texts), num_threads=threads)
        assert all(ids.dtype == np.uint32 for ids in batch)
        assert [ids.tolist() for ids in batch] == [BPE.encode(text) for text in texts]
    assert BPE.encode_batch([]) == []


# ---- specials ----------------------------------------------------------------------------------------------------


def test_vocabulary_includes_the_specials():
    assert BPE.vocab_size == 600
    assert BPE.specials == {EOT: 596, PAD: 597, "<|user|>": 598, "<|user|>s": 599}
    assert (BPE.eot, BPE.pad) == (596, 597)
    assert sorted(ranks_of_bpe.values()) == list(range(596))


@pytest.mark.slow
@given(st.lists(st.sampled_from([EOT, PAD, "<|user|>", "<|user|>s", "<|", "eot", "|>", " ", "a"])).map("".join))
def test_special_strings_are_ordinary_text(text):
    ids = BPE.encode(text)
    assert max(ids, default=0) < 596
    assert max((int(i) for row in BPE.encode_batch([text]) for i in row), default=0) < 596
    assert BPE.decode(ids) == text


def test_only_the_allowed_specials_are_taken():
    assert BPE.encode(f"a{EOT}{PAD}b", {EOT}) == [*BPE.encode("a"), 596, *BPE.encode(f"{PAD}b")]
    assert BPE.encode(EOT + EOT, {EOT}) == [596, 596]


def test_the_longest_special_wins():
    assert BPE.encode("<|user|>s<|user|>", {"<|user|>", "<|user|>s"}) == [599, 598]


@given(st.lists(st.sampled_from([EOT, PAD, "a", " x", "\ud800"])).map("".join))
def test_round_trip_with_specials_allowed(text):
    assert BPE.decode(BPE.encode(text, {EOT, PAD})) == text


def test_unknown_special_is_refused():
    with pytest.raises(UserError, match=r"<\|eof\|>.*eot"):
        BPE.encode("x", {"<|eof|>"})


# ---- decoding ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 599) | st.integers(128, 255), max_size=60))
@settings(max_examples=200, deadline=None)
def test_stream_equals_decode(tokens):
    stream = BPE.stream()
    assert "".join([stream.push(token) for token in tokens]) + stream.flush() == BPE.decode(tokens)


@given(anything)
@settings(deadline=None)
def test_stream_never_splits_a_character(text):
    stream, said = BPE.stream(), ""
    for byte in text.encode("utf-8", "surrogatepass"):  # the worst tokens: one byte each
        said += stream.push(BPE._coder.byte_ids[byte])
        assert text.startswith(said)
    assert said == text
    assert stream.flush() == ""


def test_flush_shows_a_broken_character_and_starts_anew():
    stream = BPE.stream()
    assert stream.push(BPE._coder.byte_ids[0xE4]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(ord("a")) == "a"


@pytest.mark.parametrize("tokens", [[600], [-1], [5, 10**9], [2**70], [1.5], [[1, 2]], [None], np.array([600])])
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(UserError, match="0 to 599"):
        BPE.decode(tokens)


def test_decode_takes_lists_arrays_and_iterators():
    ids = BPE.encode("hello")
    forms = [ids, tuple(ids), np.array(ids, dtype=np.uint16), iter(ids)]
    assert {BPE.decode(form) for form in forms} == {"hello"}
    assert BPE.decode([]) == "" and BPE.decode(np.array([], dtype=np.int64)) == ""
    assert BPE.token_bytes(97) == b"a" and BPE.token_bytes(BPE.eot) == EOT.encode()
    assert BPE.decode_bytes([97, BPE.eot]) == b"a" + EOT.encode()


# ---- the file ----------------------------------------------------------------------------------------------------


def repacked(encoder=BPE, **changes):
    """The encoder's file with some keys changed, and a fingerprint that matches."""
    data = {**encoder._data, **changes}
    return encoders.pack(data, encoders._fingerprint(data))


def test_save_and_load(tmp_path):
    BPE.save(tmp_path / "e.bin")
    again = load(str(tmp_path / "e.bin"))
    assert again.fingerprint == BPE.fingerprint and len(BPE.fingerprint) == 64
    assert again.specials == BPE.specials
    assert again.encode(CORPUS[0]) == BPE.encode(CORPUS[0])
    assert again.to_bytes() == BPE.to_bytes() == (tmp_path / "e.bin").read_bytes()
    data = json.loads((tmp_path / "e.bin").read_text(encoding="utf-8"))
    assert {"version", "kind", "pattern", "ranks", "specials", "fingerprint"} <= data.keys()
    assert base64.b64decode(data["ranks"][300]) == BPE.token_bytes(300)


def test_fingerprints_tell_encoders_apart():
    others = [train(CORPUS, 600), train(CORPUS, 599), with_pattern(GPT2), Encoder.from_bytes(repacked(name="x"))]
    assert len({encoder.fingerprint for encoder in [BPE, *others]}) == 5


def test_every_truncation_is_refused():
    raw = BPE.to_bytes()
    for size in range(0, len(raw) - 2, 97):
        with pytest.raises(UserError, match="not an encoder"):
            Encoder.from_bytes(raw[:size])


@pytest.mark.parametrize("key", ["format", "version", "kind", "pattern", "ranks", "specials", "fingerprint"])
def test_a_missing_key_is_refused(key):
    data = json.loads(BPE.to_bytes())
    del data[key]
    with pytest.raises(UserError, match=key):
        Encoder.from_bytes(json.dumps(data).encode())


def test_a_changed_file_is_refused():
    data = json.loads(BPE.to_bytes())
    data["ranks"][300], data["ranks"][301] = data["ranks"][301], data["ranks"][300]
    with pytest.raises(UserError, match="fingerprint"):
        Encoder.from_bytes(json.dumps(data).encode())


RANKS = BPE._data["ranks"]
CRAFTED = {
    "a missing byte": ({"ranks": RANKS[1:]}, "256 bytes"),
    "a token twice": ({"ranks": [*RANKS[:-1], RANKS[300]]}, "twice"),
    "no base64": ({"ranks": ["?", *RANKS]}, "base64"),
    "numbers for tokens": ({"ranks": [1, *RANKS]}, "base64"),
    "no list": ({"ranks": 7}, "list"),
    "no regular expression": ({"pattern": "("}, "pattern"),
    "a pattern that loses text": ({"pattern": "a"}, "loses text"),
    "an empty pattern": ({"pattern": ""}, "loses text"),
    "no string": ({"pattern": None}, "pattern"),
    "no specials": ({"specials": {}}, "specials"),
    "a list of specials": ({"specials": [EOT, PAD]}, "specials"),
    "a special on a token": ({"specials": {EOT: 300, PAD: 597}}, "ordinary token"),
    "a negative id": ({"specials": {EOT: -1, PAD: 597}}, "id of special"),
    "an enormous id": ({"specials": {EOT: 10**15, PAD: 597}}, "id of special"),
    "true for an id": ({"specials": {EOT: True, PAD: 597}}, "id of special"),
    "another version": ({"version": 2}, "version 2"),
    "another kind": ({"kind": ["bpe"]}, "kind"),
    "no characters": ({"kind": "chars", "chars": []}, "chars"),
    "long characters": ({"kind": "chars", "chars": ["ab"]}, "chars"),
    "a character twice": ({"kind": "chars", "chars": ["a", "a"]}, "twice"),
}


@pytest.mark.parametrize(("changes", "message"), CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_file_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Encoder.from_bytes(repacked(**changes))


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


FOREIGN = [pickle.dumps(Boom()), b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff" * 99, b"NaN"]


@pytest.mark.parametrize("raw", FOREIGN)
def test_other_files_are_refused_and_named(tmp_path, raw):
    path = tmp_path / "cl8k.bin"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"cl8k\.bin: not an encoder"):
        load(str(path))


def test_a_huge_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "MAX_FILE", 1 << 20)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match="larger than 1 MiB"):
        load(str(tmp_path / "huge"))


@pytest.mark.parametrize("bracket", [b"[],", b'{},'])
def test_many_small_things_in_a_small_file_are_refused_unparsed(bracket, monkeypatch):
    """Each takes 64 bytes of memory and more."""
    monkeypatch.setattr(encoders.json, "loads", lambda text: pytest.fail("parsed"))
    with pytest.raises(UserError, match="not an encoder: it has more than 100,000 brackets"):
        Encoder.from_bytes(b"[" + bracket * 100_000 + b"0]")


@pytest.mark.parametrize("spec", ["missing.bin", ".", "a\0b", ""])
def test_an_unreadable_path_is_a_user_error(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        load(spec)


# ---- chars -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hamlet(tmp_path):
    (tmp_path / "hamlet.txt").write_bytes("To be,\r\nor not — 🙂".encode())
    return load(f"chars:{tmp_path / 'hamlet.txt'}")


def test_chars_are_sorted_then_specials(hamlet):
    chars = sorted(set("To be,\r\nor not — 🙂"))
    assert [hamlet.decode([i]) for i in range(len(chars))] == chars
    assert hamlet.vocab_size == len(chars) + 2
    assert (hamlet.eot, hamlet.pad) == (len(chars), len(chars) + 1)


def test_chars_round_trip(hamlet):
    text = "🙂—\r\nTrent on toes, been or bent"
    text = "".join(char for char in text if char in "To be,\r\nor not — 🙂")
    ids = hamlet.encode(text)
    assert len(ids) == len(text) and hamlet.decode(ids) == text
    again = Encoder.from_bytes(hamlet.to_bytes())
    assert again.fingerprint == hamlet.fingerprint and again.encode(text) == ids
    assert [row.tolist() for row in hamlet.encode_batch([text, ""])] == [ids, []]
    assert hamlet.encode(f"To{EOT}", {EOT}) == [*hamlet.encode("To"), hamlet.eot]


@pytest.mark.parametrize(("text", "at"), [("Tox", 2), ("\x00", 0), ("To \U0010ffff", 3), ("T\ud800", 1)])
def test_an_unknown_character_is_named_with_its_position(hamlet, text, at):
    with pytest.raises(UserError) as error:
        hamlet.encode(text)
    assert f"{text[at]!r}" in str(error.value) and f"position {at} " in str(error.value)


def test_an_unknown_characters_position_counts_specials(hamlet):
    with pytest.raises(UserError, match="position 9 "):
        hamlet.encode(f"To{EOT}x", {EOT})


def test_chars_of_lone_surrogates_survive_the_file():
    encoder = Encoder({"kind": "chars", "chars": ["\ud83d", "\ude00"], "specials": {EOT: 2, PAD: 3}})
    again = Encoder.from_bytes(encoder.to_bytes())
    assert again.decode(again.encode("\ud83d\ude00")) == "\ud83d\ude00"


@pytest.mark.parametrize("raw", [None, b"", b"\xff\xfe"])
def test_chars_of_a_bad_file_are_refused(tmp_path, raw):
    if raw is not None:
        (tmp_path / "x.txt").write_bytes(raw)
    with pytest.raises(UserError, match=r"x\.txt"):
        load(f"chars:{tmp_path / 'x.txt'}")


# ---- tiktoken ----------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch):
    """A small stand-in for tiktoken's gpt2, with a gap in its ids as p50k_base has."""
    ranks = {token: i + (i >= 500) for token, i in ranks_of_bpe.items()}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 610})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


def test_tiktokens_endoftext_is_eot_and_pad_is_one_more(published):
    encoder = load("tiktoken:gpt2")
    assert (encoder.eot, encoder.pad, encoder.vocab_size) == (610, 611, 612)
    assert encoder.specials == {"<|endoftext|>": 610, EOT: 610, PAD: 611}
    assert encoder.decode([610]) == "<|endoftext|>"
    assert encoder.encode(EOT, {EOT}) == encoder.encode("<|endoftext|>", {"<|endoftext|>"}) == [610]
    assert encoder.decode([500, 605]) == ""  # ids that nothing uses
    assert encoder.encode(CORPUS[2]) == published.encode_ordinary(CORPUS[2])
    again = Encoder.from_bytes(encoder.to_bytes())
    assert again.fingerprint == encoder.fingerprint and again.decode([610]) == "<|endoftext|>"


def test_an_encoding_that_cannot_be_fetched_is_a_user_error(monkeypatch):
    def refuse(name):
        raise ConnectionError("no net\nand more")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match=r"cannot fetch tiktoken:gpt2 \(ConnectionError: no net\).*TIKTOKEN_CACHE_DIR"):
        load("tiktoken:gpt2")


def test_a_net_that_never_answers_is_given_up(monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: answer.wait())
    monkeypatch.setattr(encoders, "FETCH_SECONDS", 0.05)
    start = time.perf_counter()
    with pytest.raises(UserError, match="no answer"):
        load("tiktoken:gpt2")
    assert time.perf_counter() - start < 10  # the answer never comes
    answer.set()


def test_an_unknown_encoding_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"gtp2.*did you mean 'gpt2'"):
        load("tiktoken:gtp2")


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [0, -1, 255, 258, 10**12])
def test_a_vocab_size_out_of_range_is_refused(vocab_size):
    with pytest.raises(UserError, match=f"vocab_size {vocab_size} .*from 259"):
        train(CORPUS, vocab_size, ["<|a|>"])


def test_bytes_alone_are_a_vocabulary():
    encoder = train(["x"], 258)
    assert encoder.vocab_size == 258 and encoder.encode("hé") == list("hé".encode())


def test_too_little_text_names_the_largest_vocabulary():
    with pytest.raises(UserError, match=r"only 4 merges found, 742 needed.*at most 262"):
        train(["hello"], 1000)
    assert train(["hello"], 262).vocab_size == 262


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_refused(texts):
    with pytest.raises(UserError, match="no text"):
        train(texts, 300)


def test_specials_are_kept_once_and_in_order():
    assert list(train(["hello"], 260, ["<|b|>", EOT, "<|a|>", "<|b|>"]).specials) == [EOT, PAD, "<|b|>", "<|a|>"]
    with pytest.raises(UserError, match="empty"):
        train(["hello"], 260, [""])


def test_one_string_is_not_several_texts():
    with pytest.raises(TypeError):
        train("hello", 260)
    with pytest.raises(TypeError):
        train(["hello"], 260, "<|a|>")


def test_training_survives_surrogates_and_megabytes_of_one_letter():
    assert train(["a\ud800b", "a" * 1_000_000, " " * 1_000_000, *CORPUS], 300).vocab_size == 300


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.py").write_text(CORPUS[0], encoding="utf-8")
    (tmp_path / "in" / "deep" / "b.txt").write_text(CORPUS[2], encoding="utf-8")
    (tmp_path / "in" / "image.png").write_bytes(b"\x89PNG\xff")
    return tmp_path / "in"


def test_command_trains_on_files_folders_and_globs(tmp_path, corpus, capsys):
    inputs = {"folder": [corpus], "glob": [f"{corpus}/**/*.*"], "files": [corpus / "a.py", corpus / "deep" / "b.txt"]}
    for name, paths in inputs.items():
        argv = ["--input", *map(str, paths), "--vocab_size", "400", "--output", str(tmp_path / name)]
        encoders.main([*argv, "--special", "<|user|>"])
        out = capsys.readouterr()
        assert "400 tokens" in out.out and "bytes per token" in out.out and "2 files" in out.out
        assert ("left out 1 file of other kinds: " in out.out) == (name != "files")
        assert out.err.startswith("training an encoder of 400 tokens on ")
    expected = train([CORPUS[0], CORPUS[2]], 400, ["<|user|>"]).fingerprint
    assert {load(str(tmp_path / name)).fingerprint for name in inputs} == {expected}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--input": "nothing-here/*.txt"}, r"--input nothing-here/\*\.txt: there is no such file"),
        ({"--vocab_size": "100"}, r"--vocab_size: '100' is no whole number from 258 "),
        ({"--vocab_size": "1e9"}, r"'1e9' is no whole number from 258 .* to 4,194,304"),
        ({"--vocab_size": "100000"}, "too little text"),
        ({"--output": "."}, "--output: . is a directory; name a file"),
    ],
)
def test_command_refuses_and_creates_nothing(tmp_path, corpus, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {"--input": str(corpus), "--vocab_size": "400", "--output": "out.bin", **changes}
    with pytest.raises(UserError, match=message):
        encoders.main([word for pair in options.items() for word in pair])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_default_output_is_not_replaced_unasked(tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--input", str(corpus), "--vocab_size"]
    encoders.main([*words, "400"])
    before = Path(encoders.DEFAULT_OUTPUT).read_bytes()
    with pytest.raises(UserError, match="bin/cl8k.bin is there, and .* replace it with --output bin/cl8k.bin"):
        encoders.main([*words, "300"])
    assert Path(encoders.DEFAULT_OUTPUT).read_bytes() == before
    encoders.main([*words, "300", "--output", encoders.DEFAULT_OUTPUT])
    assert load(encoders.DEFAULT_OUTPUT).vocab_size == 300


def test_a_misspelt_encoder_is_compared_with_the_files_beside_it(tmp_path):
    (tmp_path / "cl8k.bin").touch()
    with pytest.raises(UserError, match=re.escape("cl8.bin' (did you mean 'cl8k.bin'?); `python prepare.py`")):
        load(tmp_path / "cl8.bin")
    with pytest.raises(UserError, match="names no file; write chars:FILE"):
        load("chars:")


def test_command_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, ROOT / "encoder.py", "--input", "missing", "--output", "out.bin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --input missing: there is no such file") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_applying_an_encoder_imports_no_trainer(tmp_path, hamlet):
    BPE.save(tmp_path / "bpe")
    hamlet.save(tmp_path / "chars")
    code = "import sys, encoder; encoder.load(sys.argv[1]).encode('To'); print(*sys.modules)"
    for kind, foreign in {"bpe": {"rustbpe", "torch"}, "chars": {"rustbpe", "torch", "tiktoken"}}.items():
        command = [sys.executable, "-c", code, tmp_path / kind]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert not foreign & set(done.stdout.split())
