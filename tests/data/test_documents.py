"""inputs.py, json_entries.py and documents.py of strawberry/data: every kind of input gives the same documents, and
what is no text is named."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import encoder
import prepare
from strawberry.common import UserError
from strawberry.data import assemble, documents, json_entries, token_file
from strawberry.data.documents import Documents
from strawberry.data.inputs import InputFile, expand_inputs
from strawberry.data.token_file import TokenFile

ROOT = Path(prepare.__file__).parent
TEXTS = ["first\r\nline", "", "second é中🙂", '"quoted" \\ [1, 2] {"a": 3}', "last\n"]


def read(*names, **options):
    """(documents, notes) of some inputs."""
    found = Documents(expand_inputs([str(name) for name in names]), **options)
    found.scan()
    return join(found.read()), found.notes()


def join(parts):
    texts, begun = [], ""
    for part, is_last in parts:
        begun += part
        if is_last:
            texts.append(begun)
            begun = ""
    assert begun == ""
    return texts


def as_lines(texts):
    entries = [text if i % 2 else {"id": [i], "text": text} for i, text in enumerate(texts)]
    return "\n\n".join(json.dumps(entry, ensure_ascii=i % 3 == 0) for i, entry in enumerate(entries)).encode()


def as_list(texts):
    return json.dumps([{"text": text, "id": {"a": None}} if i % 2 else text for i, text in enumerate(texts)]).encode()


SPELLINGS = {"plain": lambda data: data, "bom": lambda data: b"\xef\xbb\xbf" + data, "gzip": gzip.compress,
             "two gzips": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])}  # fmt: skip
NAMES = {"a.txt": None, "A.MD": None, "noname": None, "a.json": as_list, "a.jsonl": as_lines, "a.ndjson": as_lines,
         "a.JSONLines": as_lines}  # fmt: skip

# ---- kinds that are read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_gives_the_same_documents(tmp_path, name, spelling):
    write = NAMES[name]
    texts = TEXTS if write else [TEXTS[2]]
    data = SPELLINGS[spelling](write(texts) if write else texts[0].encode())
    for path in (tmp_path / name, tmp_path / f"{name}.gz" if "gzip" in spelling else tmp_path / f"b{name}"):
        path.write_bytes(data)  # a packed file is known by its first bytes, whatever its name
        assert read(path) == (texts, [])


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_pieces_change_nothing(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(documents, "PIECE", piece)
    monkeypatch.setattr(json_entries, "JSON_PIECE", piece)
    for name, write in NAMES.items():
        texts = TEXTS if write else [TEXTS[2]]
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (write(texts) if write else texts[0].encode()))
        assert read(tmp_path / name) == (texts, [])


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=9)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=9)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(JSON, max_size=4), st.booleans(), st.none() | st.integers(0, 99), st.integers(1, 30))
def test_a_json_list_is_what_pythons_json_reads(entries, is_ascii, cut, piece):
    """A character taken out may make it something else, or nothing, but never what Python does not read."""
    text = json.dumps(entries, ensure_ascii=is_ascii)
    text = text if cut is None else text[: cut % len(text)] + text[cut % len(text) + 1 :]
    data = text.encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_entries, "JSON_PIECE", piece)
        try:
            found = list(json_entries.read_json_list(io.BytesIO(data), "a.json"))
        except UserError:
            assert cut is not None
        else:
            assert found == json.loads(data)


PARTS = ["a", "\\\\", "\\n", '\\"', "\\ud83d", "\\uDE00", "\\u00d8", "ud83d", "\\u0041", "é"]
ESCAPES = st.lists(st.sampled_from(PARTS))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(ESCAPES, st.integers(1, 20))
def test_half_a_surrogate_pair_is_refused_and_a_whole_one_read(escapes, piece):
    data = f'["{"".join(escapes)}"]'.encode()
    (text,) = json.loads(data)
    is_whole = not any("\ud800" <= char <= "\udfff" for char in text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_entries, "JSON_PIECE", piece)
        if is_whole:
            assert list(json_entries.read_json_list(io.BytesIO(data), "a.json")) == [text]
        else:
            with pytest.raises(UserError, match=r"a\.json: byte \d+: \\u[dD].* is half of a surrogate pair"):
                list(json_entries.read_json_list(io.BytesIO(data), "a.json"))


def test_a_format_is_what_the_user_says(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "a.json").write_text('{"text": "x"}\n"y"\n')
    assert read(tmp_path / "a.csv", format="text")[0] == ["a,b\n1,2\n"]
    assert read(tmp_path / "a.json", format="jsonl")[0] == ["x", "y"]
    assert read(tmp_path / "a.json", format="text")[0] == ['{"text": "x"}\n"y"\n']


# ---- kinds that are not read -----------------------------------------------------------------------------------------

OTHERS = {
    "a.csv": (b"a,b\n1,2\n", r"a table \(CSV\)"), "a.tsv.gz": (gzip.compress(b"a\tb\n"), r"a table \(TSV\)"),
    "a.ipynb": (b'{"cells": []}', "a notebook"), "a.pdf": (b"%PDF-1.7\nx", "a PDF"),
    "a.docx": (b"PK\x03\x04x", "a ZIP archive"), "a.parquet": (b"PAR1x", "a Parquet table"),
    "a.png": (b"\x89PNG\r\n\x1a\n", "a PNG image"), "a.jpg": (b"\xff\xd8\xff\xe0", "a JPEG image"),
    "a.mp4": (b"\0\0\0\x18ftypmp42", "a film"), "a.tar": (b"a" * 257 + b"ustar\x0000", "a tar archive"),
    "a.xz": (b"\xfd7zXZ\0", "an xz archive"), "packed.txt": (b"BZh91AY", "a bzip2 archive"),
    "bom.txt": ("some text".encode("utf-16"), "UTF-16 text"), "bom32.txt": ("text".encode("utf-32"), "UTF-32 text"),
    "le.txt": ("some text".encode("utf-16-le"), "9 of its 18 bytes are NUL"),
    "log.txt": (b"line\n" * 900 + bytes(200), "200 of its 4,700 bytes are NUL"),
    "data.bin": (token_file.MAGIC + bytes(300), "a token file"),
    "e.enc": (encoder.train(["x"], 258).to_bytes(), "an encoder file"),
    "m.strawberry": (b"\x40\0\0\0\0\0\0\0" + b'{"__metadata__": {}}', "a model file"),
    "package.json": (b'{"name": "x", "version": "1.0"}', "no JSON list"),
    "tsconfig.json": (b"// x\n{}", "no JSON list"),
    "numbers.json": (b"[1, 2]", "entry 1 is 1, and must be"), "empty.json": (b"", "no JSON list"),
    "metrics.jsonl": (b'{"step": 1}\n', r"metrics.jsonl:1 is .*, and must be"),
}  # fmt: skip


@pytest.mark.parametrize("errors", documents.ERRORS)
@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_is_refused_by_name_and_left_out_of_a_folder(tmp_path, name, errors):
    data, message = OTHERS[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name, errors=errors)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    for given_input in (tmp_path, tmp_path / "*"):
        texts, notes = read(given_input, errors=errors)
        assert texts == ["good"]
        assert len(notes) == 1 and notes[0].startswith("left out 1 file ") and str(tmp_path / name) in notes[0]


def test_notes_count_all_and_name_some(tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "a.txt").write_text("a")
    (note,) = read(tmp_path)[1]
    assert note.startswith("left out 25 files of other kinds: ") and note.endswith("09.png (a PNG image) …")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '"x"\n\n{"text": "a", "text": "b"}\n', r'a\.jsonl:3 has the key "text" twice: keep one of them'),
    ("a.jsonl", '{"text": "a", "m": [{"b": 1, "b": 1}]}\n', r'a\.jsonl:1 has the key "b" twice'),
    ("a.json", '["x", {"text": "a", "text": "b"}]', r'a\.json: entry 2 has the key "text" twice'),
])  # fmt: skip
def test_a_repeated_key_is_refused_in_a_folder_too(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    for given_input in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=message):
            read(given_input)


# ---- bytes that are not UTF-8 ----------------------------------------------------------------------------------------

BAD = st.sampled_from([b"\xe9", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f"])


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab\né🙂"), BAD, st.text(alphabet="ab\n🙂"), st.integers(1, 9), st.booleans())
def test_the_first_bad_byte_is_named_with_its_line_and_offset(before, bad, after, piece, is_packed):
    data = before.encode() + bad + b"-" + after.encode()
    line, offset = before.count("\n") + 1, len(before.encode())
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", piece)
        patch.setattr(documents, "HEAD", piece)
        path = Path(folder, "a.txt")
        path.write_bytes(gzip.compress(data) if is_packed else data)
        message = rf"a\.txt:{line}: byte {offset} \(0x{bad[0]:02X}\) is not UTF-8"
        with pytest.raises(UserError, match=message):
            read(path)
        Path(folder, "b.txt").write_text("good")
        where = f"{path}:{line}, byte {offset} (0x{bad[0]:02X})"
        assert read(folder) == (["good"], [f"left out 1 file not in UTF-8: {where}"])
        patch.setattr(documents, "HEAD", 1 << 16)
        assert read(path, errors="replace")[0] == [data.decode("utf-8", "replace")]


def test_a_bad_line_of_a_found_jsonl_is_left_out_and_of_a_named_one_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"one"\n"caf\xe9"\n"three"\n')
    assert read(tmp_path) == (["one", "three"], [f"left out 1 line not in UTF-8: {path}:2, byte 13 (0xE9)"])
    with pytest.raises(UserError, match=r"a\.jsonl:2: byte 13 \(0xE9\) is not UTF-8"):
        read(path)
    assert read(path, errors="replace") == (["one", "caf\ufffd", "three"], [])
    (tmp_path / "a.json").write_bytes(b'["one", "caf\xe9"]')
    assert read(tmp_path / "a.json", errors="replace") == (["one", "caf\ufffd"], [])


def test_replacing_makes_no_text_of_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("Кто там живёт? Никто не знает.".encode("cp1251"))
    with pytest.raises(UserError, match="of its first characters are not, as in another encoding"):
        read(tmp_path / "a.txt", errors="replace")


# ---- pipes -----------------------------------------------------------------------------------------------------------

CONTENTS = {"text": (b"[not JSON]\nprose\n", ["[not JSON]\nprose\n"]), "json": (as_list(TEXTS[2:]), TEXTS[2:]),
            "jsonl": (as_lines(TEXTS[1:]), TEXTS[1:]), "packed": (gzip.compress(as_lines(TEXTS[1:])), TEXTS[1:]),
            "long": (b"0123456789abcde\n" * 20_000, ["0123456789abcde\n" * 20_000])}  # fmt: skip


@pytest.fixture
def no_hang():
    """What waits for a writer that does not come fails."""
    def give_up(*_):
        raise TimeoutError("opened a FIFO a second time")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def feed(path, data):
    """Write to a FIFO once, as `cat file > fifo &` does."""
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: Path(path).write_bytes(data), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("content", CONTENTS)
def test_a_fifo_is_read_once_and_leaves_no_file(tmp_path, monkeypatch, no_hang, content):
    data, texts = CONTENTS[content]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    writer = feed(tmp_path / "pipe", data)
    found = Documents(expand_inputs([str(tmp_path / "pipe")]))
    found.scan()
    for _ in range(2):  # an encoder is trained on it, then it is encoded
        assert join(found.read()) == texts
    assert list((tmp_path / "temporary").iterdir()) == []
    writer.join(5)
    assert not writer.is_alive()


def run_script(script, *arguments, cwd, stdin=b"", **options):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=60, **options)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def text(tmp_path):
    """A text in a file, and an encoder."""
    encoder.train(["the cat sat on the mat " * 9], 270).save(tmp_path / "e.bin")
    (tmp_path / "a.txt").write_text("the cat sat on the mat, and the rat " * 40)
    return tmp_path / "a.txt"


PREPARE = ["--encoder", "e.bin", "--output", "out.bin"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["-", "/dev/stdin", "fifo", "/dev/fd/N"])
def test_prepare_reads_a_pipe_as_the_file_behind_it(tmp_path, text, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data = text.read_bytes()
    prepare.main(["--input", str(text), "--encoder", "e.bin", "--output", "expected.bin"])
    options = {}
    if name == "fifo":
        feed(tmp_path / "fifo", data)
    elif name == "/dev/fd/N":  # what bash makes of <(cat a.txt)
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        name, options = f"/dev/fd/{reader}", {"pass_fds": [reader]}
    code, out, err = run_script("prepare.py", "--input", name, *PREPARE, cwd=tmp_path, stdin=data, **options)
    assert (code, err) == (0, ""), err
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()
    code, out, _ = run_script("prepare.py", "--input", "-", *PREPARE, cwd=tmp_path, stdin=data)
    assert code == 0 and out.startswith("out.bin is up to date: the SHA-256 of 1 file ")


@pytest.mark.slow
def test_an_encoder_is_trained_on_a_pipe_and_on_texts_not_on_json(tmp_path):
    words = [f"{a} sat on {b}" for a in ("cats", "rats", "dogs") for b in ("mats", "hats", "logs")] * 9
    expected = encoder.train(words, 270).fingerprint
    arguments = ["--vocab_size", "270", "--output", "out.bin"]
    lines = "".join(json.dumps({"text": word}) + "\n" for word in words).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    feed(tmp_path / "pipe.jsonl", lines)
    for name in ("a.jsonl", "-", "pipe.jsonl"):
        code, out, err = run_script("encoder.py", "--input", name, *arguments, cwd=tmp_path, stdin=lines)
        assert code == 0, err
        assert ("standard input is read as jsonl" in out) == (name == "-")
        assert encoder.load(tmp_path / "out.bin").fingerprint == expected


@pytest.mark.slow
def test_a_folder_without_texts_says_what_was_left_out(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "latin.txt").write_bytes(b"caf\xe9")
    for script in ("encoder.py", "prepare.py"):
        code, _, err = run_script(script, "--input", "in", "--output", "out.bin", cwd=tmp_path)
        assert code == 2 and "left out 1 file not in UTF-8: in/latin.txt:1, byte 3 (0xE9)" in err
        assert err.count("\n") == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_prepare_trains_its_encoder_on_a_pipe_that_it_then_encodes(tmp_path):
    data = b"the cat sat on the mat, and the rat " * 40
    code, out, err = run_script("prepare.py", "--input", "-", *PREPARE, "--vocab_size", "270", cwd=tmp_path, stdin=data)
    assert code == 0, err
    file, found = TokenFile(tmp_path / "out.bin"), encoder.load(tmp_path / "e.bin")
    assert found.decode(file.tokens[:-1]).encode() == data


def test_a_recipe_reads_a_fifo(tmp_path, no_hang):
    feed(tmp_path / "fifo.jsonl.gz", gzip.compress(b'"one"\n"two"\n"three"\n'))
    recipe = assemble.Recipe(files=[str(tmp_path / "fifo.jsonl.gz")], encoder="chars")
    assert assemble.assemble(recipe, tmp_path)["documents"] == 3


def test_chars_are_those_of_the_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "bca"}\n"d"\n')
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfdcab"))
    for name in ("a.jsonl", "a.txt.gz"):
        assert encoder.load(f"chars:{tmp_path / name}").vocab_size == 6
    (tmp_path / "bad.txt").write_bytes(b"ab\nc\xe9")
    with pytest.raises(UserError, match=r"chars:.*bad\.txt:2: byte 4 \(0xE9\) is not UTF-8"):
        encoder.load(f"chars:{tmp_path / 'bad.txt'}")


def test_a_pipe_is_prose_unless_it_begins_as_json_does(tmp_path):
    for data, found in ((b'["a', "json"), (b'\xef\xbb\xbf [ {"text"', "json"), (b'{"text": 1', "jsonl"),
                        (b'{\n "a": 1}', "jsonl"), (b'"Yes," she', "text"), (b"", "text"), (b"{x", "text"),
                        (b"[1] ", "text")):  # fmt: skip
        assert documents.find_format(InputFile("-"), data) == found
        assert documents.find_format(InputFile("-"), data, "text") == "text"


# ---- what is up to date ----------------------------------------------------------------------------------------------


def digest(*names, **options):
    found = Documents(expand_inputs([str(name) for name in names]), **options)
    found.scan()
    return found.digest


def test_a_digest_is_of_what_is_read_and_of_nothing_else(tmp_path):
    (tmp_path / "in").mkdir()
    for name, content in (("a.txt", "one"), ("b.txt", "two")):
        (tmp_path / "in" / name).write_text(content)
    before = digest(tmp_path / "in")
    os.utime(tmp_path / "in" / "a.txt", (1, 1))
    (tmp_path / "in" / "a.txt").rename(tmp_path / "in" / "a2.md")
    (tmp_path / "in" / "image.png").write_bytes(b"\x89PNG")  # left out
    assert digest(tmp_path / "in") == digest(tmp_path / "in" / "a2.md", tmp_path / "in" / "b.txt") == before
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    assert digest(tmp_path / "in" / "a2.md", tmp_path / "in" / "b.txt.gz") == before
    others = [digest(tmp_path / "in" / "b.txt", tmp_path / "in" / "a2.md"), digest(tmp_path / "in" / "b.txt"),
              digest(tmp_path / "in", errors="replace")]  # fmt: skip
    (tmp_path / "in" / "b.txt").write_text("tow")
    others.append(digest(tmp_path / "in"))
    (tmp_path / "c.jsonl").write_text('"a"')
    others += [digest(tmp_path / "c.jsonl"), digest(tmp_path / "c.jsonl", format="text")]
    assert len({before, *others}) == 7


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    for name, data in (("a.txt", b"one"), ("a.jsonl", b'"one"'), ("a.json", b'["one"]')):
        path = tmp_path / name
        path.write_bytes(data)
        found = Documents([InputFile(path)])
        found.scan()
        path.write_bytes(data.replace(b"o", b"u"))
        with pytest.raises(UserError, match=f"{name} changed while it was read: start again"):
            list(found.read())


# ---- what is imported ------------------------------------------------------------------------------------------------


def test_only_a_json_list_needs_the_json_library(tmp_path):
    (tmp_path / "a.jsonl").write_text('"x"\n')
    (tmp_path / "a.json").write_text('["x"]')
    code = ("import sys, encoder, strawberry.data.documents as d\n"
            "for name in sys.argv[1:]:\n"
            "    found = d.Documents([d.InputFile(name)]); found.scan(); list(found.read())\n"
            "    print('ijson' in sys.modules, 'torch' in sys.modules)\n")  # fmt: skip
    command = [sys.executable, "-c", code, tmp_path / "a.jsonl", tmp_path / "a.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "False"]
