"""prepare.py: every kind of input, shuffled exactly, in constant memory, the same bytes each time."""

import ast
import codecs
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import encoder
import prepare
from strawberry.common import UserError
from strawberry.data import documents, encoding, inputs, json_entries
from strawberry.data.dataset import Corpus
from strawberry.data.docstrings import find_docstring_pairs
from strawberry.data.documents import Documents
from strawberry.data.inputs import expand_inputs
from strawberry.data.token_file import DEFAULTS, TokenFile

ROOT = Path(prepare.__file__).parent
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "the", "rat", "ran", "to", "the", "hat"]
TEXTS = [f"{i} " + " ".join(WORDS[i % 5 : i % 5 + 8]) + "\n" * (i % 3) for i in range(40)] + ["é中文🙂<|eot|>x"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "small.bin"
    encoder.train([" ".join(WORDS) * 9], 284).save(path)
    return str(path)


def run(*arguments):
    prepare.main([str(argument) for argument in arguments])


def read_back(path, spec):
    """The texts in a token file, in its order."""
    tokenizer, file = encoder.load(str(spec)), TokenFile(path)
    file.verify()
    tokens = file.tokens.tolist()
    texts, start = [], 0
    for place, token in enumerate(tokens):
        if token == tokenizer.eot:
            texts.append(tokenizer.decode(tokens[start:place]))
            start = place + 1
    assert start == len(tokens)
    assert len(texts) == file.header.n_documents
    assert file.header.encoder == tokenizer.fingerprint
    return texts


def write_texts(folder, texts, suffix=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}{suffix}").write_text(text, "utf-8", newline="")
    return folder


def write_as(kind, folder):
    """TEXTS as one input of this kind; returns what --input is given."""
    folder.mkdir()
    path = folder / kind
    entries = [{"text": text, "id": i} if i % 2 else text for i, text in enumerate(TEXTS)]
    if kind == "folder":
        write_texts(path / "deeper", TEXTS[:20])
        write_texts(path / "other", TEXTS[20:], ".md")
        (path / ".hidden.txt").write_text("hidden")
        (path / ".git").mkdir()
        (path / ".git" / "config.txt").write_text("hidden")
    elif kind == "*.py":
        write_texts(folder, TEXTS, ".py")
        (folder / "other.txt").write_text("not matched")
    elif ".jsonl" in kind:
        text = "\n".join(json.dumps(entry, ensure_ascii=i % 3 == 0) for i, entry in enumerate(entries)) + "\n\n"
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    else:
        text = json.dumps(entries, indent=1)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    return path


# ---- kinds of input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "*.py", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "A.JSON"])
def test_every_kind_of_input_gives_every_document_once(tmp_path, bpe, kind):
    given_path = write_as(kind, tmp_path / "in")
    run("--input", given_path, "--output", tmp_path / "out.bin", "--encoder", bpe)
    texts = read_back(tmp_path / "out.bin", bpe)
    assert sorted(texts) == sorted(TEXTS)
    assert texts != TEXTS


def test_several_inputs_and_no_file_twice(tmp_path, bpe):
    folder = write_texts(tmp_path / "in", TEXTS[:5])
    packed = tmp_path / "more.txt.gz"
    packed.write_bytes(gzip.compress(TEXTS[5].encode()))
    run("--input", folder, folder / "001.txt", "--input", packed, "--output", tmp_path / "out.bin", "--encoder", bpe)
    assert sorted(read_back(tmp_path / "out.bin", bpe)) == sorted(TEXTS[:6])


def test_what_is_not_utf8_is_left_out_and_counted(tmp_path, bpe, capsys):
    folder = write_texts(tmp_path / "in", TEXTS[:3])
    (folder / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "late.txt").write_bytes(b"good " * 1000 + b"\xc3")
    (folder / "latin.json").write_bytes('["one", "caf\xe9"]'.encode("latin-1"))
    (folder / "packed.gz").write_bytes(gzip.compress(b"\xff"))
    (folder / "mixed.jsonl").write_bytes(b'"first"\n"caf\xe9"\n{"text": "last"}\n')
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (folder / "empty.txt").write_bytes(b"")
    run("--input", folder, "--output", tmp_path / "out.bin", "--encoder", bpe)
    assert sorted(read_back(tmp_path / "out.bin", bpe)) == sorted([*TEXTS[:3], "first", "last", "marked"])
    out = capsys.readouterr().out
    for note in (f"left out 1 file of other kinds: {folder / 'image.png'} (a PNG image)\n",
                 "left out 3 files not in UTF-8: ", f"{folder / 'late.txt'}:1, byte 5000 (0xC3)",
                 "latin.json:1, byte 12 (0xE9)", "packed.gz:1, byte 0 (0xFF)",
                 f"left out 1 line not in UTF-8: {folder / 'mixed.jsonl'}:2, byte 12 (0xE9)",
                 "left out 1 empty"):  # fmt: skip
        assert note in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '"good"\n{"text": 3}\n', r"a\.jsonl:2 is .*must be a string"),
        ("a.jsonl", '"good"\n\nnot json\n', r"a\.jsonl:3 is not JSON"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", '"good"\n{"text": "a", "text": "b"}\n', r'a\.jsonl:2 has the key "text" twice'),
        ("a.json", '["good", {"body": "x"}]', "entry 2 is .*must be a string"),
        ("a.json", '["good", {"text": "a", "id": {"b": 1, "b": 2}}]', r'entry 2 has the key "b" twice'),
        ("a.json", '["a" "b"]', "entry 2 is not JSON"),
        ("a.json", '["a", ]', "entry 2 is not JSON"),
        ("a.json", '["a", "b', "entry 2 is not JSON"),
        ("a.json", '["a"', "entry 2 is not JSON"),
        ("a.json", '["a"] more', "entry 2 is not JSON"),
        ("a.json", '["a", ' + "[" * 100_000, "entry 2 .*nested too deeply"),
        ("a.json", '{"text": "x"}', "there is no text .*left out 1 file of JSON without texts"),
        ("a.json", "", "there is no text .*left out 1 file of JSON without texts"),
        ("a.txt.gz", "not gzip", "not a whole gzip file"),
        ("a.txt", "", "there is no text"),
    ],
)
def test_invalid_input_is_refused_and_nothing_is_written(tmp_path, bpe, name, content, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message):
        run("--input", tmp_path / "in", "--output", tmp_path / "out" / "a.bin", "--encoder", bpe)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_gzip_cut_short_is_refused(tmp_path, bpe):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(999).hex().encode())[:-20])
    with pytest.raises(UserError, match="not a whole gzip file"):
        run("--input", tmp_path / "a.txt.gz", "--output", tmp_path / "out.bin", "--encoder", bpe)


def test_an_entry_over_the_limit_is_refused(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(json_entries, "MAX_ENTRY", 1 << 10)
    monkeypatch.setattr(json_entries, "JSON_PIECE", 100)
    for name, text in [("a.jsonl", '"ok"\n"%s"'), ("a.json", '["ok", "%s"]')]:
        (tmp_path / name).write_text(text % ("x" * 3000))
        with pytest.raises(UserError, match=r"a\.jsonl?:( entry )?2 is longer than 0\.000976562 MiB.*\.txt"):
            run("--input", tmp_path / name, "--output", tmp_path / "out.bin", "--encoder", bpe)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, bpe):
    folder, scandir = write_texts(tmp_path / "in", TEXTS[:2]), os.scandir
    write_texts(folder / "locked", TEXTS[2:3])

    def refuse(path):
        if Path(path) == folder / "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read .*locked: Permission denied; change its rights"):
        run("--input", folder, "--output", tmp_path / "out.bin", "--encoder", bpe)
    assert not (tmp_path / "out.bin").exists()


def test_a_path_in_a_folder_without_rights_is_not_called_missing(monkeypatch):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match=r"^--input locked/a\.txt: cannot be read \(Permission denied\)"):
        expand_inputs(["locked/a.txt"])


def test_a_misspelled_input_gets_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("größe.txt").touch()
    with pytest.raises(UserError, match="matches nothing .did you mean 'größe.txt'"):
        run("--input", "grösse.txt")


@pytest.mark.parametrize("given_path", ["nowhere", "*.nothing"])
def test_missing_input_is_refused(tmp_path, monkeypatch, given_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--input {re.escape(given_path)}"):
        run("--input", given_path)
    assert list(tmp_path.iterdir()) == []


JSON_TEXT = st.text(st.sampled_from('ab"\\\n[],{}é🙂 '), max_size=12)
PARTS = st.sampled_from([*WORDS, "it's", "42", "é🙂", "...", " ", "\n", "\n\n  ", "\t", "<|eot|>"])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(JSON_TEXT, max_size=8), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
def test_a_json_list_is_read_in_parts_as_in_whole(texts, indent, plain, piece):
    entries = [text if i % 2 else {"id": [i], "text": text} for i, text in enumerate(texts)]
    data = json.dumps(entries, indent=indent, ensure_ascii=plain).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_entries, "JSON_PIECE", piece)
        assert list(json_entries.read_json_list(io.BytesIO(data), "a.json")) == entries


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(PARTS), st.integers(12, 40))
def test_pieces_have_the_tokens_of_the_whole(bpe, parts, piece):
    text = "".join(f"{part} rat" for part in parts)  # a place to cut in any 12 characters
    tokenizer = encoder.load(bpe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", piece)
        pieces = list(encoder.cut_pieces(documents.decode_parts(io.BytesIO(text.encode())), piece))
    assert "".join(part for part, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(part) <= piece for part, _ in pieces[:-1])
    assert sum((tokenizer.encode(part) for part, _ in pieces), []) == tokenizer.encode(text)


# ---- order and bytes -------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(tmp_path, bpe, monkeypatch):
    for name in ("one", "two"):
        write_texts(tmp_path / name, TEXTS)
        os.utime(tmp_path / name / "003.txt", (1, 1) if name == "two" else None)
    outputs = []
    for name, threads, batch in [("one", 1, 1 << 22), ("two", 4, 1)]:
        monkeypatch.setattr(prepare.os, "cpu_count", lambda n=threads: n)
        monkeypatch.setattr(encoding, "BATCH", batch)
        run("--input", tmp_path / name, "--output", tmp_path / f"{name}.bin", "--encoder", bpe)
        outputs.append((tmp_path / f"{name}.bin").read_bytes())
    assert outputs[0] == outputs[1]


def test_long_documents_stay_whole_when_shuffled(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 16)
    texts = [" ".join([str(i), *WORDS * (i + 1)]) for i in range(6)]
    write_texts(tmp_path / "in", texts)
    run("--input", tmp_path / "in", "--output", tmp_path / "out.bin", "--encoder", bpe)
    got = read_back(tmp_path / "out.bin", bpe)
    assert sorted(got) == sorted(texts)
    assert got != texts


def test_documents_of_one_file_are_spread_over_all_of_it(tmp_path, bpe):
    """Sorted lines must not leave the last of them alone in the validation split."""
    (tmp_path / "a.jsonl").write_text("".join(f'"{i}"\n' for i in range(1000)))
    run("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.bin", "--encoder", bpe)
    places = np.array([int(text) for text in read_back(tmp_path / "out.bin", bpe)])
    assert sorted(places.tolist()) == list(range(1000))
    assert abs(places[-200:].mean() - 500) < 80  # 4 standard deviations
    assert abs(np.corrcoef(places, np.arange(1000))[0, 1]) < 0.12


def test_the_end_of_text_string_is_ordinary_text(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("one<|eot|>two")
    run("--input", tmp_path / "a.txt", "--output", tmp_path / "out.bin", "--encoder", bpe)
    assert read_back(tmp_path / "out.bin", bpe) == ["one<|eot|>two"]


# ---- up to date ------------------------------------------------------------------------------------------------------


def test_what_is_up_to_date_is_left_alone_and_nothing_else_is(tmp_path, bpe, capsys):
    folder, output = write_texts(tmp_path / "in", TEXTS[:9]), tmp_path / "in" / "out.bin"
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    common = ["--output", output, "--encoder", bpe]

    def written(*arguments):
        before = output.stat().st_ino, output.stat().st_mtime_ns
        run(*arguments)
        is_new = (output.stat().st_ino, output.stat().st_mtime_ns) != before
        assert ("is up to date" in capsys.readouterr().out) != is_new
        return is_new

    run("--input", folder, *common)
    capsys.readouterr()
    assert not written("--input", folder, *common)  # its own output, in the folder, is no input
    assert written("--input", folder, *common, "--force")
    assert written("--input", folder / "001.txt", *common)  # other files, older than the output
    assert written("--input", folder, *common)
    now = output.stat().st_mtime + 5
    os.utime(folder / "002.txt", (now, now))
    assert not written("--input", folder, *common)  # the same content, though newer
    (folder / "002.txt").rename(folder / "0020.txt")
    assert not written("--input", folder, *common)  # in the same order, though of another name
    text = (folder / "0020.txt").read_bytes()
    (folder / "0020.txt").write_bytes(text[:-1] + b"!")
    os.utime(folder / "0020.txt", (1e9, 1e9))
    assert written("--input", folder, *common)  # other content, though as long and older
    assert written("--input", folder, *common, "--errors", "replace")
    assert written("--input", folder, *common)
    encoder.train([" ".join(WORDS) * 9], 280).save(tmp_path / "other.enc")
    assert written("--input", folder, "--output", output, "--encoder", tmp_path / "other.enc")
    output.write_bytes(output.read_bytes()[:-1])
    assert written("--input", folder, "--output", output, "--encoder", tmp_path / "other.enc")


def test_other_peoples_files_are_not_overwritten(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "mine.md").write_text("precious")
    for force in ([], ["--force"]):
        with pytest.raises(UserError, match=r"mine\.md is there and is not a token file"):
            run("--input", tmp_path / "a.txt", "--output", tmp_path / "mine.md", "--encoder", bpe, *force)
        assert (tmp_path / "mine.md").read_text() == "precious"
    (tmp_path / "mine.md").unlink()
    run("--input", tmp_path / "a.txt", "--output", tmp_path / "mine.md", "--encoder", bpe)
    assert read_back(tmp_path / "mine.md", bpe) == ["text"]


def test_an_interruption_leaves_nothing_behind(tmp_path, bpe, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(encoder.Encoder, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--input", tmp_path / "a.txt", "--output", tmp_path / "out" / "a.bin", "--encoder", bpe)
    assert list((tmp_path / "out").iterdir()) == []


# ---- pairs -----------------------------------------------------------------------------------------------------------

PAIRS = [(f"{i} " + " ".join(WORDS[: 1 + i % 6]), "\n".join(WORDS[i % 3 : 4 + i % 7])) for i in range(30)]


def pair_texts(path, spec):
    """The pairs of texts in a pair file, in its order."""
    texts = read_back(path, spec)
    assert TokenFile(path).header.kind == "pairs"
    return list(zip(texts[::2], texts[1::2], strict=True))


def write_pairs(path, pairs):
    entries = [{"source": source, "id": 5, "target": target} for source, target in pairs]
    data = "\n".join(map(json.dumps, entries)) if ".jsonl" in path.name else json.dumps(entries)
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.jsonl.gz"])
def test_every_pair_once_in_a_shuffled_order(tmp_path, bpe, name, capsys):
    common = ["--pairs", write_pairs(tmp_path / name, PAIRS), "--encoder", bpe]
    run(*common, "--output", tmp_path / "a.bin")
    assert "a.bin: 30 pairs, " in capsys.readouterr().out
    found = pair_texts(tmp_path / "a.bin", bpe)
    assert sorted(found) == sorted(PAIRS) and found != PAIRS
    run(*common, "--output", tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    run("--verify", tmp_path / "a.bin")
    assert "60 sources and targets" in capsys.readouterr().out


def test_pairs_that_are_long_or_empty_are_cut_or_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "abc").write_text("abc")
    pairs = [("aaaa", "b"), ("aaaaa", "b"), ("c" * 60, "ab"), ("a", "bbbb"), ("a", "bbbbb"), ("", "b"), ("a", "")]
    spec, path = f"chars:{tmp_path / 'abc'}", write_pairs(tmp_path / "p.jsonl", pairs)
    run("--pairs", path, "--output", tmp_path / "p.bin", "--encoder", spec, "--max_tokens", 5)
    assert sorted(pair_texts(tmp_path / "p.bin", spec)) == [("a", "bbbb"), ("aaaa", "b"), ("aaaa", "b"), ("cccc", "ab")]
    out = capsys.readouterr().out
    for note in ("4 pairs, ", "left out 2 empty pairs", "cut 2 sources to 5 tokens",
                 "left out 1 pairs with a target of more than 5 tokens"):  # fmt: skip
        assert note in out
    write_pairs(path, [("a", "bb"), ("a", "ccc")])
    with pytest.raises(UserError, match="there is no text in .*every pair is empty .*left out 2 pairs with a target"):
        run("--pairs", path, "--output", tmp_path / "q.bin", "--encoder", spec, "--max_tokens", 2)
    assert not (tmp_path / "q.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "text.jsonl"], r'text\.jsonl:1 is "text", and must be {"source": a string, "target": a string}'),
        (["--pairs", "half.jsonl"], r"half\.jsonl:2 is "),
        (["--pairs", "number.json"], r"number\.json: entry 1 is "),
        (["--pairs", "bad.jsonl"], r"bad\.jsonl:1 is not JSON"),
        (["--pairs", "a.txt"], r"a\.txt is text: pairs are read from \.jsonl"),
        (["--pairs", "nowhere.jsonl"], r"--pairs nowhere\.jsonl: there is no such file"),
        (["--pairs", "text.jsonl", "--input", "a.txt"], "exclude each other"),
        (["--pairs", "--input", "a.txt"], "exclude each other"),
        (["--pairs", "text.jsonl", "--max_tokens", "1"], "--max_tokens 1: allowed is 2 to 65,536"),
        (["--pairs", "text.jsonl", "--max_tokens", "65537"], "--max_tokens 65537: allowed"),
    ],
)
def test_invalid_pairs_are_refused_and_nothing_is_written(tmp_path, bpe, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    files = {"text.jsonl": '"text"', "half.jsonl": '{"source": "a", "target": "b"}\n{"source": "a"}', "a.txt": "text",
             "number.json": '[{"source": "a", "target": 5}]', "bad.jsonl": '{"source": '}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        run(*arguments, "--encoder", bpe, "--output", "out.bin")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_pairs_and_text_are_not_taken_for_each_other(tmp_path, bpe, capsys):
    """The same file of entries that are both, to the same output."""
    entries = [{"text": "the cat sat", "source": source, "target": target} for source, target in PAIRS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    os.utime(tmp_path / "a.jsonl", (1e9, 1e9))
    common = [tmp_path / "a.jsonl", "--encoder", bpe, "--output", tmp_path / "out.bin"]
    kinds = []
    for given_option in ("--input", "--pairs", "--pairs", "--input"):
        run(given_option, *common)
        kinds.append((TokenFile(tmp_path / "out.bin").header.kind, "up to date" in capsys.readouterr().out))
    assert kinds == [("tokens", False), ("pairs", False), ("pairs", True), ("tokens", False)]
    run("--pairs", *common, "--max_tokens", 50)
    run("--pairs", *common, "--max_tokens", 60)
    assert "up to date" not in capsys.readouterr().out  # what is cut, is cut elsewhere


def test_a_missing_encoder_is_trained_on_both_sides(tmp_path):
    path = write_pairs(tmp_path / "p.jsonl", [("xyxyxyxy", "zwzwzwzw")] * 20)
    run("--pairs", path, "--output", tmp_path / "p.bin", "--encoder", tmp_path / "e.bin", "--vocab_size", 262)
    tokenizer = encoder.load(str(tmp_path / "e.bin"))
    assert len(tokenizer.encode("xyxyxyxy")) < 8 and len(tokenizer.encode("zwzwzwzw")) < 8


SOURCE = '''
# A file.
class Dog:
    "A class's docstring is none."

    @property
    def bark(self, *, loud=False):
        """How it barks.

        Twice if loud.
        """

        def echo(sound): # twice
            'Sound, and sound.'
            return sound + """
  margin"""
        return echo("woof") if loud else "woof"

    def only(self):
        "Nothing else is here."

    def joined(self): "One line, with code."; return 1

    def after(self):
        "Code follows the docstring."; return 1

    def plain(self):
        return "no docstring here"

    def word(self):
        "Word."
        return 1

async def fetch(url: str) -> bytes:
\t"Fetch an é."  # as it is
\tawait url
\treturn b""
'''
BARK = '''def bark(self, *, loud=False):

    def echo(sound): # twice
        'Sound, and sound.'
        return sound + """
  margin"""
    return echo("woof") if loud else "woof"
'''
ECHO = '''def echo(sound): # twice
    return sound + """
  margin"""
'''
FETCH = '''async def fetch(url: str) -> bytes:
\tawait url
\treturn b""
'''


def test_docstrings_and_the_code_without_them():
    wanted = [("How it barks.\n\nTwice if loud.", BARK.replace("\n\n", "\n", 1)), ("Sound, and sound.", ECHO),
              ("Fetch an é.", FETCH)]  # fmt: skip
    assert list(find_docstring_pairs(SOURCE)) == wanted
    assert list(find_docstring_pairs(SOURCE.replace("\n", "\r\n"))) == wanted


def test_code_without_its_docstring_is_the_same_code():
    """On modules of the standard library: parsed again, it is the function less its first statement."""
    found = 0
    for module in (ast, gzip, io, json, subprocess, codecs):
        text = Path(module.__file__).read_text(encoding="utf-8")
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        for docstring, code in find_docstring_pairs(text):
            (again,) = ast.parse(code).body
            same = [n for n in nodes if n.name == again.name and ast.get_docstring(n) == docstring]
            bodies = [[ast.dump(statement) for statement in n.body[1:]] for n in same]
            assert [ast.dump(statement) for statement in again.body] in bodies, code
            found += 1
    assert found > 100


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """A standard library of four files."""
    folder = tmp_path / "lib"
    folder.mkdir()
    files = {"dog.py": SOURCE, "a.py": "def add(a, b):\n    'Sum of two.'\n    return a + b\n", "old.py": "print 'x'\n"}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9")
    source = prepare.Source("four files", prepare.make_documents(inputs.walk_folder(folder)), ["a topic"],
                            is_corpus=True)
    monkeypatch.setattr(prepare, "find_stdlib", lambda: source)
    monkeypatch.chdir(tmp_path)


def test_no_pairs_given_are_those_of_the_corpus(small_corpus, capsys):
    run("--pairs", "--encoder", "e.bin", "--vocab_size", 270)
    assert sorted(source for source, _ in pair_texts("data/pairs.bin", "e.bin")) == [
        "Fetch an é.", "How it barks.\n\nTwice if loud.", "Sound, and sound.", "Sum of two."]  # fmt: skip
    assert ("Sum of two.", "def add(a, b):\n    return a + b\n") in pair_texts("data/pairs.bin", "e.bin")
    out = capsys.readouterr().out
    assert "data/pairs.bin: 4 pairs" in out
    assert "left out 1 that Python cannot parse: " in out and "old.py" in out
    assert "left out 1 file not in UTF-8: " in out and "latin.py:2, byte 28 (0xE9)" in out
    run("--pairs", "--encoder", "e.bin")
    assert "data/pairs.bin is up to date: the SHA-256 of 3 files (0.0 MB)" in capsys.readouterr().out


# ---- encoders --------------------------------------------------------------------------------------------------------


def test_a_missing_encoder_is_trained_and_then_kept(tmp_path):
    folder, spec = write_texts(tmp_path / "in", TEXTS), tmp_path / "bin" / "e.bin"
    common = ["--input", folder, "--output", tmp_path / "out.bin", "--encoder", spec]
    run(*common, "--vocab_size", 280)
    tokenizer = encoder.load(str(spec))
    assert tokenizer.vocab_size == 280
    assert tokenizer.fingerprint == encoder.train(TEXTS, 280).fingerprint
    before = spec.read_bytes()
    run(*common, "--force")
    assert spec.read_bytes() == before
    with pytest.raises(UserError, match="--vocab_size 300: the encoder .* has 280 tokens"):
        run(*common, "--vocab_size", 300)


def test_training_stops_at_its_limit_and_refuses_nothing(tmp_path, monkeypatch):
    source = prepare.Source("x", Documents(expand_inputs([str(write_texts(tmp_path / "in", TEXTS))])))
    source.documents.scan()
    everything = list(prepare.read_training_text(source))
    assert sorted(everything) == sorted(TEXTS)
    monkeypatch.setattr(encoding, "MAX_TRAINING_CHARS", 100)
    assert "".join(prepare.read_training_text(source)) == "".join(everything)[:100]
    with pytest.raises(UserError, match="no text in x"):
        list(prepare.read_training_text(prepare.Source("x", Documents([]), [""])))


def test_one_token_per_character(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("To be, or not to be")
    run("--input", path, "--encoder", f"chars:{path}", "--output", tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin", f"chars:{path}") == ["To be, or not to be"]
    assert TokenFile(tmp_path / "out.bin").header.n_tokens == 20
    assert Corpus(tmp_path / "out.bin", None, 1, 0.9).val.n_tokens == 2


# ---- corpora ---------------------------------------------------------------------------------------------------------


def test_no_arguments_prepare_the_standard_library(tmp_path, monkeypatch, capsys):
    small = prepare.find_stdlib()
    small.documents.inputs, small.texts = small.documents.inputs[:8], ["a topic"]
    monkeypatch.setattr(prepare, "find_stdlib", lambda: small)
    monkeypatch.chdir(tmp_path)
    run("--vocab_size", 500)
    texts = read_back("data/webtext.bin", "bin/cl8k.bin")
    expected = [file.path.read_bytes().decode() for file in small.documents.inputs]
    assert sorted(texts) == sorted(text for text in [*expected, "a topic"] if text)
    capsys.readouterr()
    run()
    assert capsys.readouterr().out.startswith("data/webtext.bin is up to date: the SHA-256 of 8 files (")
    small.texts = ["another topic"]
    run()
    assert "written anew: it was made from other text" in capsys.readouterr().out


def test_the_standard_library_without_its_tests():
    source = prepare.find_stdlib()
    names = [file.name for file in source.documents.inputs]
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert "pydoc_data/topics.py" not in names
    assert len(source.texts) > 50
    assert 6e6 < sum(file.size for file in source.documents.inputs) + sum(map(len, source.texts)) < 20e6


def test_a_python_without_sources_says_so(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "python311.zip"):
        monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name, path=path: str(path))
        with pytest.raises(UserError, match="no sources of its standard library in .*zip.*--input"):
            prepare.find_stdlib()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package as pip installs one, and the requirements that pin it."""
    site = tmp_path / "site"
    files = {
        "berry/__init__.py": "x = 1\n",
        "berry/core.py": "def core(): ...\n",
        "berry/tests/test_core.py": "assert True\n",
        "berry/test_more.py": "assert True\n",
        "berry/version.py": "version = '1.2'\n",
        "berry/generated/table.py": "t = [1]\n",
        "berry/parser.py": "# Autogenerated by a tool; do not edit\n",
        "berry/data.json": "[]",
        "../../bin/berry.py": "script\n",
    }
    info = site / "berry_jam-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: berry-jam\nVersion: 1.2+local\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*files, "berry/gone.py"]))
    for name, text in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(site))
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# pins\nBerry_Jam == 1.2  # jam\nwine==3.0 ; sys_platform == 'win32'\n--index-url x\n")
    return requirements


def test_packages_are_their_sources_without_tests_and_generated_files(installed):
    source = prepare.find_packages(installed)
    assert [file.name for file in source.documents.inputs] == ["berry/__init__.py", "berry/core.py"]
    assert source.name == "the sources of 1 packages"


@pytest.mark.parametrize(
    ("line", "message"), [("berry-jam==1.3", r"pins berry-jam 1\.3, and 1\.2\+local is"), ("no-such-jam==1", "missing")]
)
def test_packages_must_be_those_that_are_pinned(installed, line, message):
    installed.write_text(line)
    with pytest.raises(UserError, match=message):
        prepare.find_packages(installed)


def test_packages_have_a_default_output_of_their_own(installed, tmp_path, monkeypatch, bpe):
    source = prepare.find_packages(installed)
    monkeypatch.setattr(prepare, "find_packages", lambda requirements: source)
    monkeypatch.chdir(tmp_path)
    run("--corpus", "packages", "--encoder", bpe)
    assert sorted(read_back("data/packages.bin", bpe)) == ["def core(): ...\n", "x = 1\n"]


# ---- the default output ----------------------------------------------------------------------------------------------


def test_a_default_output_replaces_only_what_the_same_command_wrote(tmp_path, monkeypatch, bpe, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--encoder", bpe]
    for folder in ("texts", "other/texts"):
        write_texts(tmp_path / folder, [folder])
    run("--input", "texts", *common)
    out = capsys.readouterr().out
    assert out.startswith("data/texts.bin: 1 document") and "--dataset.path=data/texts.bin" in out
    before = Path("data/texts.bin").read_bytes()
    encoder.train([" ".join(WORDS) * 9], 280).save("other.enc")
    for command in (["--input", "other/texts", *common], ["--input", "other/texts", *common, "--force"],
                    ["--input", "texts", "--encoder", "other.enc"]):  # fmt: skip
        with pytest.raises(UserError, match=r"^--output: data/texts\.bin is there.*--output data/texts\.bin$"):
            run(*command)
        assert Path("data/texts.bin").read_bytes() == before
    write_texts(tmp_path / "texts", ["edited"])
    run("--input", "./texts/", *common)  # the same command
    assert read_back("data/texts.bin", bpe) == ["edited"]
    run("--input", "other/texts", *common, "--output", "data/texts.bin")  # asked for
    assert read_back("data/texts.bin", bpe) == ["other/texts"]
    with pytest.raises(UserError, match="is there"):
        run("--input", "texts", *common)
    run("--input", "other/texts", *common)  # up to date
    Path("data/texts.bin").write_bytes(Path("data/texts.bin").read_bytes()[:-1])
    run("--input", "texts", *common)  # a damaged file is no loss
    assert read_back("data/texts.bin", bpe) == ["edited"]


def test_the_standard_library_does_not_replace_text_of_ones_own(small_corpus, bpe):
    write_texts(Path("mine"), ["mine"])
    run("--input", "mine", "--output", "data/webtext.bin", "--encoder", bpe)
    with pytest.raises(UserError, match=r"data/webtext\.bin is there"):
        run("--encoder", bpe)
    assert read_back("data/webtext.bin", bpe) == ["mine"]


@pytest.mark.parametrize(
    ("inputs", "name"),
    [(["book.txt"], "book"), (["book.jsonl.gz", "texts"], "book"), (["texts/"], "texts"), (["v1.2"], "v1.2"),
     (["texts/*.txt"], "texts"), (["t*s/0*.txt"], "here"), (["*.txt"], "here"), (["."], "here"),
     (["Bücher.md"], "Bücher")],
)  # fmt: skip
def test_the_default_output_has_the_name_of_the_first_input(tmp_path, monkeypatch, bpe, inputs, name):
    here = tmp_path / "here"
    write_texts(here / "texts", TEXTS[:2])
    write_texts(here / "v1.2", TEXTS[:2])
    monkeypatch.chdir(here)
    for file in ("book.txt", "Bücher.md"):
        Path(file).write_text("text")
    Path("book.jsonl.gz").write_bytes(gzip.compress(b'"text"\n'))
    run("--input", *inputs, "--encoder", bpe)
    assert TokenFile(f"data/{name}.bin").header.n_documents


def test_each_corpus_has_a_default_output_of_its_own(monkeypatch):
    paths = [prepare.choose_output(prepare.parse_arguments(words.split()))
             for words in ("", "--corpus packages", "--pairs", "--corpus packages --pairs")]  # fmt: skip
    assert paths == list(DEFAULTS) and len(set(paths)) == 4


@pytest.mark.skipif(os.name == "nt", reason="there is no /dev/fd")
def test_a_pipe_needs_an_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    for name in ("-", "/dev/stdin", "fifo"):
        with pytest.raises(UserError, match="^--output: standard input and pipes have no name"):
            run("--input", name)


# ---- the program -----------------------------------------------------------------------------------------------------


def program(*arguments, cwd=ROOT):
    command = [sys.executable, ROOT / "prepare.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_verify_from_the_command_line(tmp_path, bpe):
    run("--input", write_texts(tmp_path / "in", TEXTS), "--output", tmp_path / "a.bin", "--encoder", bpe)
    good = program("--verify", tmp_path / "a.bin")
    assert (good.returncode, good.stderr) == (0, "")
    assert f"is sound: {len(TEXTS)} documents" in good.stdout
    data = bytearray((tmp_path / "a.bin").read_bytes())
    data[300] ^= 1
    (tmp_path / "a.bin").write_bytes(data)
    bad = program("--verify", tmp_path / "a.bin")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


def measure_peak(*arguments):
    """What Python allocates at most, in one thread: no other process and no other test has a part in it."""
    run(*arguments, "--force")  # imports what is imported late
    tracemalloc.start()
    try:
        run(*arguments, "--force")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 1 << 15)
    monkeypatch.setattr(encoding, "PIECE", 1 << 14)
    monkeypatch.setattr(documents, "PIECE", 1 << 14)
    monkeypatch.setattr(json_entries, "JSON_PIECE", 1 << 14)
    monkeypatch.setattr(encoder, "MAX_FILE", 1 << 16)  # of an encoder file: a buffer of that size is allocated
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "txt.gz"])
def test_memory_is_constant_whatever_the_inputs_size(tmp_path, bpe, small_parts, kind):
    line = " ".join(WORDS * 40)
    peaks = []
    for n in (50, 600):  # 0.1 and 1.4 MB
        lines = {"jsonl": f'"{line}"\n' * n, "json": "[" + ",".join([f'"{line}"'] * n) + "]"}
        data = lines.get(kind, f"{line}\n" * n).encode()
        (tmp_path / f"{n}.{kind}").write_bytes(gzip.compress(data, 1) if kind == "txt.gz" else data)
        common = ["--output", tmp_path / "out.bin", "--encoder", bpe]
        peaks.append(measure_peak("--input", tmp_path / f"{n}.{kind}", *common))
    assert peaks[1] - peaks[0] < 300_000, peaks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_long_entry_takes_a_few_times_its_size(tmp_path, bpe, small_parts, kind):
    """It is encoded in pieces, as a text is: its tokens as Python's integers would take some twenty times its size."""
    text = " ".join(WORDS * 15_000)  # 0.9 MB
    (tmp_path / f"a.{kind}").write_text(json.dumps(text if kind == "jsonl" else [text]))
    peak = measure_peak("--input", tmp_path / f"a.{kind}", "--output", tmp_path / "out.bin", "--encoder", bpe)
    assert peak < 6 * len(text), peak / len(text)
    assert read_back(tmp_path / "out.bin", bpe) == [text]
