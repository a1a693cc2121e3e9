"""Token files and batches: every window once, the order a formula, hostile files refused, memory flat."""

import dataclasses
import gc
import hashlib
import itertools
import math
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from machine import require

from strawberry.common import UserError
from strawberry.data import token_file
from strawberry.data.dataset import Corpus, Split
from strawberry.data.loader import Loader
from strawberry.data.objectives import OBJECTIVES
from strawberry.data.order import derive_keys, permute
from strawberry.data.token_file import HEADER_SIZE, Header, TokenFile, TokenFileWriter, dtype_for

ROOT = Path(__file__).parents[2]
EOT = 99_999
ENCODER = SimpleNamespace(vocab_size=100_000, eot=EOT, fingerprint="ab" * 32)  # ids as large as positions: uint32
SMALL = SimpleNamespace(vocab_size=500, eot=499, fingerprint="cd" * 32)  # uint16


def examples(count):
    """Hypothesis with one folder for all examples, each of which writes its own file over the last."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_file(path, lengths, encoder=ENCODER):
    """Documents of these lengths (the eot not counted), whose tokens are their own positions in the file."""
    with TokenFileWriter(path, encoder) as writer:
        for length in lengths:
            start = writer.n_tokens
            writer.add(np.arange(start, start + length) % (encoder.vocab_size - 1))
    return path


def whole(path, block_size):
    return Split("training", [(TokenFile(path), 0, TokenFile(path).header.n_tokens)], block_size)


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 99, 100, 1000, 10_007])
def test_permutation_has_every_place_once(n):
    for epoch in range(3):
        assert sorted(permute(np.arange(n), n, derive_keys(7, np.full(n, epoch))).tolist()) == list(range(n))


def test_permutation_stays_the_same_for_ever():
    """A checkpoint stores no order, so a change of the formula would change the data of runs that resume."""
    assert permute(np.arange(12), 12, derive_keys(1, np.zeros(12))).tolist() == PINNED_ORDER
    assert permute(np.array([0, 10**12]), 10**12 + 1, derive_keys(-1, np.full(2, 5))).tolist() == PINNED_FAR


PINNED_ORDER = [4, 1, 8, 6, 2, 10, 5, 9, 11, 7, 3, 0]
PINNED_FAR = [727131371084, 805784727994]


def test_permutations_of_four_are_equally_likely():
    key = derive_keys(0, np.arange(24_000))
    seen = Counter(zip(*[permute(np.full(24_000, i), 4, key).tolist() for i in range(4)]))
    assert len(seen) == 24
    assert all(850 < count < 1150 for count in seen.values())  # 1000 ± 4.8 standard deviations


# ---- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_tokens", "block_size"), [(100, 8), (103, 8), (9, 8), (15, 8), (16, 8), (17, 8), (64, 1)])
def test_every_window_of_an_epoch_exactly_once(tmp_path, n_tokens, block_size):
    split = whole(write_file(tmp_path / "a.bin", [n_tokens - 1]), block_size)
    tokens = [*range(n_tokens - 1), EOT]
    n = split.n_windows
    assert n == max(1, (n_tokens - block_size) // block_size)
    for epoch in range(4):
        got = sorted(split.read_windows(3, epoch * n, n).tolist())
        cuts = []
        for phase in range(n_tokens - n * block_size):
            window = [tokens[phase + i * block_size :][: block_size + 1] for i in range(n)]
            cuts.append(sorted(window))
        assert cuts.count(got) == 1


def test_epochs_differ_in_order_and_in_cuts_and_reach_every_target(tmp_path):
    split = whole(write_file(tmp_path / "a.bin", [102]), 8)
    n, seed = split.n_windows, 5
    epochs = [split.read_windows(seed, epoch * n, n) for epoch in range(200)]
    assert len({tuple(np.argsort(epoch[:, 0])) for epoch in epochs}) > 190
    assert len({int(epoch.min()) for epoch in epochs}) == 103 - n * 8
    assert set(np.concatenate(epochs)[:, 1:].ravel().tolist()) == {*range(1, 102), EOT}
    assert not np.array_equal(epochs[0], split.read_windows(seed + 1, 0, n))


@pytest.mark.slow
def test_samples_depend_on_their_number_alone(tmp_path):
    paths = [write_file(tmp_path / f"{i}.bin", lengths) for i, lengths in enumerate([[50, 30], [9], [200]])]
    split = Split("training", [(TokenFile(p), 0, TokenFile(p).header.n_tokens) for p in paths], 8)
    at_once = split.read_windows(11, 0, 150)
    assert 3 * split.n_windows < 150  # several epochs
    for first, count in [(0, 1), (1, 7), (split.n_windows - 1, 2), (40, 64), (149, 1)]:
        assert np.array_equal(split.read_windows(11, first, count), at_once[first : first + count])
    one_by_one = [split.read_windows(11, number, 1)[0].tolist() for number in range(150)]
    assert one_by_one == at_once.tolist()


def test_no_window_straddles_two_files(tmp_path):
    lengths = [[20, 30], [9], [7, 7, 60]]
    paths = [write_file(tmp_path / f"{i}.bin", each) for i, each in enumerate(lengths)]
    files = [TokenFile(path) for path in paths]
    split = Split("training", [(file, 0, file.header.n_tokens) for file in files], 8)
    whole_files = [file.tokens.tolist() for file in files]
    piece, starts = split.locate(2, np.arange(5 * split.n_windows))
    for number, (p, start) in enumerate(zip(piece.tolist(), starts.tolist())):
        window = whole_files[p][start : start + 9]
        assert len(window) == 9
        assert split.read_windows(2, number, 1)[0].tolist() == window
    assert set(piece.tolist()) == {0, 1, 2}


# ---- splits ----------------------------------------------------------------------------------------------------------


def naive_boundary(lengths, division):
    ends, end = [], 0
    for length in lengths:
        end += length + 1
        ends.append(end)
    inner = ends[:-1]
    later = [b for b in inner if b >= division * end]
    if later:
        return later[0]
    return inner[-1] if inner else min(max(round(division * end), 1), end)


@pytest.mark.slow
@examples(150)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.sampled_from([0.01, 0.25, 0.5, 0.8, 0.9, 0.99]))
def test_split_is_at_a_document_boundary(tmp_path, lengths, division):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_file, "CHUNK", 3)  # boundaries beyond the first chunk, both ways
        file = TokenFile(write_file(tmp_path / "a.bin", lengths))
        assert file.find_boundary(division) == naive_boundary(lengths, division)
        assert file.find_boundary(1.0) == file.header.n_tokens


def test_a_single_document_is_split_at_the_nearest_token(tmp_path):
    path = write_file(tmp_path / "a.bin", [999])
    corpus = Corpus(path, ENCODER.fingerprint, 16, 0.9)
    assert (corpus.train.n_tokens, corpus.val.n_tokens) == (900, 100)


def test_training_and_validation_share_no_target(tmp_path):
    for name in "ab":
        write_file(tmp_path / f"{name}.bin", [30, 80, 41, 17, 60] if name == "a" else [300])
    corpus = Corpus(directory(tmp_path, 0.6), ENCODER.fingerprint, 8)
    targets = []
    for split in (corpus.train, corpus.val):
        piece, start = split.locate(0, np.arange(split.n_windows * 60))
        path = [split.pieces[p][0].path for p in piece]
        targets.append({(str(p), s + i) for p, s in zip(path, start.tolist()) for i in range(1, 9)})
    assert not targets[0] & targets[1]
    assert len(targets[0]) == corpus.train.n_tokens - 2  # all but the first token of each piece
    assert len(targets[1]) == corpus.val.n_tokens - 2


def directory(path, division):
    return SimpleNamespace(path=str(path), load_from_file=False, data_division=division)


def test_data_division_one_leaves_no_validation(tmp_path):
    corpus = Corpus(write_file(tmp_path / "a.bin", [50, 50]), None, 8, 1.0)
    assert corpus.train.n_tokens == 102
    assert corpus.val.n_windows == 0
    with pytest.raises(UserError, match="validation split has no window of 9 tokens.*data_division"):
        corpus.val.read_windows(0, 0, 1)
    with pytest.raises(UserError, match="validation split"):
        Loader(corpus.val, 0, 1)


@pytest.mark.parametrize(("division", "split"), [(0.9, "validation"), (0.02, "training")])
def test_a_split_shorter_than_a_window_is_refused(tmp_path, division, split):
    path = write_file(tmp_path / "a.bin", [3, 90, 3])
    with pytest.raises(UserError, match=f"{split} split has 4 tokens.*window of 9.*data_division"):
        Corpus(path, None, 8, division)


@pytest.mark.parametrize("division", [0.0, -1.0, 1.5, math.nan])
def test_impossible_division_is_refused(tmp_path, division):
    with pytest.raises(UserError, match="data_division"):
        Corpus(write_file(tmp_path / "a.bin", [50, 50]), None, 8, division)


# ---- the corpus ------------------------------------------------------------------------------------------------------


def test_directory_is_every_token_file_in_it(tmp_path):
    write_file(tmp_path / "b.bin", [40])
    write_file(tmp_path / "a.tokens", [60])
    (tmp_path / "notes.txt").write_text("not a token file")
    (tmp_path / ".hidden.bin").write_bytes(b"")
    corpus = Corpus(directory(tmp_path, 0.5), ENCODER.fingerprint, 8)
    assert [file.path.name for file in corpus.files] == ["a.tokens", "b.bin"]
    assert corpus.train.n_tokens + corpus.val.n_tokens == 61 + 41
    alone = Corpus([tmp_path / "a.tokens"], None, 8, 0.5)
    assert corpus.fingerprint != alone.fingerprint
    assert corpus.fingerprint == Corpus([tmp_path / "a.tokens", tmp_path / "b.bin"], None, 8, 0.8).fingerprint
    (tmp_path / "bad.bin").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"bad\.bin is not a token file"):
        Corpus(directory(tmp_path, 0.5), None, 8)


def test_path_and_load_from_file_must_agree(tmp_path):
    path = write_file(tmp_path / "a.bin", [100])
    one = SimpleNamespace(path=str(path), load_from_file=True, data_division=0.5)
    assert Corpus(one, None, 8).train.n_tokens == 50
    with pytest.raises(UserError, match="is a directory: set dataset.load_from_file to false"):
        Corpus(SimpleNamespace(path=str(tmp_path), load_from_file=True, data_division=0.5), None, 8)
    with pytest.raises(UserError, match="not a directory"):
        Corpus(directory(path, 0.5), None, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no token files"):
        Corpus(directory(tmp_path / "empty", 0.5), None, 8)


def test_another_encoders_file_is_refused_by_name(tmp_path):
    write_file(tmp_path / "a.bin", [100])
    write_file(tmp_path / "b.bin", [100], SMALL)
    with pytest.raises(UserError, match=r"b\.bin was made with encoder cdcdcdcdcdcd….* abababababab…"):
        Corpus(tmp_path / "b.bin", ENCODER.fingerprint, 8, 0.5)
    with pytest.raises(UserError, match=r"b\.bin was made with encoder"):
        Corpus(directory(tmp_path, 0.5), None, 8)


def test_a_file_shorter_than_a_window_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.bin has 8 tokens, fewer than one window of 9"):
        Corpus(write_file(tmp_path / "a.bin", [7]), None, 8, 1.0)
    assert Corpus(write_file(tmp_path / "a.bin", [8]), None, 8, 1.0).train.n_windows == 1


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "width"), [(SMALL, 2), (ENCODER, 4)])
def test_layout_read_by_hand(tmp_path, encoder, width):
    path = write_file(tmp_path / "a.bin", [3, 0, 2], encoder)
    data = path.read_bytes()
    eot = encoder.eot
    ids = [int.from_bytes(data[i : i + width], "little") for i in range(HEADER_SIZE, len(data), width)]
    assert ids == [0, 1, 2, eot, eot, 5, 6, eot]
    assert data[:8] == b"\x89TOKENS\n"
    assert [int.from_bytes(data[i : i + 4], "little") for i in (8, 12)] == [1, 256]
    assert data[16:32].rstrip(b"\0") == b"tokens"
    assert data[32:40].rstrip(b"\0") == b"uint%d" % (8 * width)
    numbers = [int.from_bytes(data[i : i + 8], "little") for i in (40, 48, 56, 64)]
    assert numbers == [encoder.vocab_size, eot, 8, 3]
    assert data[72:104].hex() == encoder.fingerprint
    assert data[104:136] == hashlib.sha256(data[256:]).digest()
    assert data[224:256] == hashlib.sha256(data[:224]).digest()
    header = TokenFile(path).header
    assert (header.n_tokens, header.n_documents, header.encoder) == (8, 3, encoder.fingerprint)
    assert header.to_bytes() == data[:256]
    TokenFile(path).verify()


def test_dtype_follows_the_vocabulary():
    assert [dtype_for(n) for n in (1, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


def test_parts_make_the_same_file_as_a_whole(tmp_path):
    with TokenFileWriter(tmp_path / "parts.bin", SMALL) as writer:
        for part in ([1, 2], [], [3]):
            writer.add(np.array(part, np.uint32), last=part == [3])
    with TokenFileWriter(tmp_path / "whole.bin", SMALL) as writer:
        writer.add(np.array([1, 2, 3]))
    assert (tmp_path / "parts.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_failed_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    before = write_file(tmp_path / "a.bin", [5]).read_bytes()
    for bad in ([1, EOT, 2], [ENCODER.vocab_size], [-1]):
        with pytest.raises(ValueError, match="token"), TokenFileWriter(tmp_path / "a.bin", ENCODER) as writer:
            writer.add(np.array(bad))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: it is there and is not a regular file"):
        TokenFileWriter(tmp_path / "folder", ENCODER)


def test_a_file_replaced_while_in_use_is_refused(tmp_path):
    split = whole(write_file(tmp_path / "a.bin", [100]), 8)
    split.read_windows(0, 0, 1)
    write_file(tmp_path / "a.bin", [30, 69])  # the same size
    with pytest.raises(UserError, match="replaced while it was in use"):
        split.read_windows(0, 0, 1)


# ---- hostile files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a file of two documents, 31 tokens."""
    return write_file(tmp_path_factory.mktemp("sound") / "a.bin", [10, 19]).read_bytes()


def sign(head):
    return bytes(head[:224]) + hashlib.sha256(head[:224]).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"", "is not a token file"),
        (lambda d: b"Some text, and no tokens", "is not a token file"),
        (lambda d: d[:100], "is cut short: 100 bytes, and the header alone has 256"),
        (lambda d: d[:256], "is cut short"),
        (lambda d: d[:-1], "is cut short: 31 tokens make 380 bytes, and it has 379"),
        (lambda d: d + b"\0", "is too long"),
        (lambda d: d[:200] + b"\1" + d[201:], "damaged header"),
        (lambda d: sign(d[:8] + struct.pack("<I", 2) + d[12:]) + d[256:], "version 2, and 1 is read"),
        (lambda d: sign(d[:12] + struct.pack("<I", 512) + d[16:]) + d[256:], "version"),
        (lambda d: sign(d[:16] + b"triple" + d[22:]) + d[256:], "it holds 'triple'"),
        (lambda d: sign(d[:16] + b"\xff\xfe\0\0\0\0" + d[22:]) + d[256:], "it holds '\ufffd\ufffd'"),
        (lambda d: sign(d[:32] + b"uint16" + d[38:]) + d[256:], "a vocabulary of 100000 needs 'uint32'"),
        (lambda d: sign(d[:40] + struct.pack("<Q", 0) + d[48:]) + d[256:], "vocab_size is 0"),
        (lambda d: sign(d[:40] + struct.pack("<Q", 1 << 63) + d[48:]) + d[256:], "vocab_size is 9223372036854775808"),
        (lambda d: sign(d[:48] + struct.pack("<Q", 100_000) + d[56:]) + d[256:], "token 100000 is not under vocab"),
        (lambda d: sign(d[:56] + struct.pack("<Q", 1 << 63) + d[64:]) + d[256:], "9223372036854775808 tokens make"),
        (lambda d: sign(d[:56] + struct.pack("<Q", 2**64 - 1) + d[64:]) + d[256:], "cut short"),
        (lambda d: sign(d[:64] + struct.pack("<Q", 32) + d[72:]) + d[256:], "32 documents in 31 tokens"),
        (lambda d: sign(d[:56] + bytes(16) + d[72:]), "holds no tokens"),
    ],
)
def test_hostile_file_is_refused_in_one_line_and_little_memory(tmp_path, sound, change, message):
    path = tmp_path / "a.bin"
    path.write_bytes(change(sound))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            Corpus(path, None, 4, 0.5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert "a.bin" in str(caught.value)
    assert peak < 1 << 20


@pytest.mark.slow
@examples(300)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_change_of_a_header_is_refused(tmp_path, sound, changes):
    data = bytearray(sound)
    for place, value in changes:
        data[place] = value
    assume(data != sound)
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(UserError):
        TokenFile(tmp_path / "a.bin")


@pytest.mark.slow
@examples(300)
@given(
    st.lists(st.tuples(st.integers(8, 223), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.tuples(st.sampled_from([40, 48, 56, 64]), st.integers(0, 2**64 - 1))),
    st.integers(-5, 5),
)
def test_a_signed_lie_is_refused_or_harmless(tmp_path, sound, changes, number, longer):
    path = tmp_path / "a.bin"
    data = bytearray(sound)
    for place, value in changes:
        data[place] = value
    if number:
        data[number[0] : number[0] + 8] = number[1].to_bytes(8, "little")
    payload = sound[256:] + bytes(longer) if longer > 0 else sound[256 : len(sound) + longer]
    path.write_bytes(sign(data) + payload)
    try:
        corpus = Corpus(path, None, 4, 0.5)
        windows = corpus.train.read_windows(0, 0, 9)
    except UserError:
        return
    assert corpus.files[0].header.n_tokens * 4 == len(payload)
    assert windows.shape == (9, 5)
    assert windows.max() < corpus.vocab_size


def test_missing_and_unreadable_paths(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no token file .*nowhere\.bin: run python prepare\.py"):
        Corpus(tmp_path / "nowhere.bin", None, 8, 0.5)
    monkeypatch.chdir(tmp_path)
    for path, command in (("data/pairs.bin", "prepare.py --pairs"), ("data/webtext.bin", "prepare.py")):
        with pytest.raises(UserError, match=f"there is no token file {path}: run python {command}$"):
            Corpus(path, None, 8, 0.5)
    (tmp_path / "text.bin").touch()
    with pytest.raises(UserError, match=r"--output txt\.bin \(did you mean 'text\.bin'\?\)"):
        Corpus("txt.bin", None, 8, 0.5)
    with pytest.raises(UserError, match="cannot read|is a directory"):
        TokenFile(tmp_path)


def with_token(path, position, token):
    data = bytearray(path.read_bytes())
    data[256 + 2 * position : 258 + 2 * position] = token.to_bytes(2, "little")
    return data


def test_ids_beyond_the_vocabulary_are_found_when_read_and_when_verified(tmp_path):
    path = write_file(tmp_path / "a.bin", [100], SMALL)
    path.write_bytes(with_token(path, 50, 500))
    for read in (lambda: whole(path, 8).read_windows(0, 0, 50), TokenFile(path).verify):
        with pytest.raises(UserError, match=r"a\.bin is damaged: it holds token 500, and its vocab_size is 500"):
            read()


def test_verify_finds_one_wrong_bit_in_any_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "CHUNK", 16)
    path = write_file(tmp_path / "a.bin", [40, 59], SMALL)
    counted = []
    TokenFile(path).verify(counted.append)
    assert sum(counted) == 101
    good = path.read_bytes()
    for position in (0, 17, 99):
        path.write_bytes(with_token(path, position, int.from_bytes(good[256 + 2 * position :][:2], "little") ^ 1))
        with pytest.raises(UserError, match="SHA-256"):
            TokenFile(path).verify()


def test_verify_counts_documents(tmp_path):
    path = write_file(tmp_path / "a.bin", [40, 59], SMALL)
    data = path.read_bytes()
    lie = dataclasses.replace(TokenFile(path).header, n_documents=1)
    path.write_bytes(lie.to_bytes() + data[256:])
    with pytest.raises(UserError, match="2 end-of-text tokens for 1 documents"):
        TokenFile(path).verify()
    unended = dataclasses.replace(lie, n_tokens=100, sha256=hashlib.sha256(data[256:-2]).hexdigest())
    path.write_bytes(unended.to_bytes() + data[256:-2])
    with pytest.raises(UserError, match="the last token 99"):
        TokenFile(path).verify()


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path):
    return whole(write_file(tmp_path / "a.bin", [60, 70, 80]), 8)


def take(loader, steps):
    with loader:
        return [next(loader) for _ in range(steps)]


def rows(steps):
    return [[batch.x.tolist() for batch in step] for step in steps]


def test_batches_are_the_numbered_samples(split):
    steps = take(Loader(split, 4, batch_size=3, accumulation=2), 12)
    expected = split.read_windows(4, 0, 72).reshape(12, 2, 3, 9)
    for step, wanted in zip(steps, expected):
        assert len(step) == 2
        for (x, y, source, n_targets), windows in zip(step, wanted):
            assert source is None
            assert n_targets == 24
            assert x.is_contiguous()
            assert y.is_contiguous()
            assert x.dtype == torch.int64
            assert x.tolist() == windows[:, :-1].tolist()
            assert y.tolist() == windows[:, 1:].tolist()


@pytest.mark.cuda
def test_batches_on_a_gpu_are_those_on_the_cpu(split):
    """Held until the end, and compared last: a pinned block used again too early would show in the first ones."""
    on_gpu = take(Loader(split, 4, 4, 2, device="cuda"), 300)
    assert all(b.x.is_cuda and b.y.is_cuda and b.x.is_contiguous() for step in on_gpu for b in step)
    assert rows(on_gpu) == rows(take(Loader(split, 4, 4, 2), 300))


def test_any_start_gives_the_same_batches(split):
    all_steps = rows(take(Loader(split, 4, 4, 2), 9))
    for start in (1, 5):
        assert rows(take(Loader(split, 4, 4, 2, start_step=start), 9 - start)) == all_steps[start:]


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_sees_the_same_samples(split, world):
    alone = rows(take(Loader(split, 4, 4, 2), 8))
    ranks = [rows(take(Loader(split, 4, 4, 2, rank=rank, world=world), 8)) for rank in range(world)]
    joined = [[sum((rank[step][micro] for rank in ranks), []) for micro in range(2)] for step in range(8)]
    assert joined == alone


def test_batch_size_must_divide_among_processes(split):
    with pytest.raises(UserError, match="batch_size = 6: .* cannot be divided among 4 processes"):
        Loader(split, 0, 6, world=4)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["next", "spans", "masked"])
def test_batches_do_not_depend_on_how_many_are_made_at_once(split, monkeypatch, objective):
    encoder = SimpleNamespace(eot=0, vocab_size=100, specials={"<|eot|>": 0})
    asked = (split, 3, 2, 3, "cpu", 5)  # 2 rows, 3 micro-batches, from step 5 on
    steps = []
    for tokens in (1, 100, 1 << 16):
        monkeypatch.setattr(Loader, "AT_ONCE", tokens)
        steps.append(take(Loader(*asked, objective=OBJECTIVES[objective](encoder, 8)), 7))
    for other in steps[1:]:
        for a, b in zip(itertools.chain(*steps[0]), itertools.chain(*other), strict=True):
            assert a.n_targets == b.n_targets
            assert all(x is y is None or torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_an_error_on_the_thread_reaches_the_consumer(split, monkeypatch):
    monkeypatch.setattr(Loader, "AT_ONCE", 1)

    class Broken:
        locate, block_size = split.locate, split.block_size

        def read_windows(self, seed, first, count):
            if first >= 6:
                raise UserError("the disk is gone")
            return split.read_windows(seed, first, count)

    with Loader(Broken(), 0, 2) as loader:
        assert rows([next(loader) for _ in range(3)]) == rows(take(Loader(split, 0, 2), 3))
        for _ in range(3):  # and again, rather than a wait for ever
            with pytest.raises(UserError, match="the disk is gone"):
                next(loader)
    assert not loader_threads()


def test_close_ends_the_thread_and_the_batches(split):
    loader = Loader(split, 0, 2)
    next(loader)
    assert len(loader_threads()) == 1
    loader.close()
    loader.close()
    assert not loader_threads()
    assert list(loader) == []


@pytest.mark.slow
def test_an_abandoned_loader_ends_its_thread(split):
    loader = Loader(split, 0, 2)
    next(loader)
    del loader
    gc.collect()
    assert not loader_threads()


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends(split):
    code = (
        "import threading\n"
        "from strawberry.data import dataset, loader, token_file\n"
        f"file = token_file.TokenFile({str(split.pieces[0][0].path)!r})\n"
        "loader = loader.Loader(dataset.Split('training', [(file, 0, 200)], 8), 0, 2)\n"
        "next(loader)\n"
        "print('done', threading.active_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done 2\n", "")


def test_preparing_needs_no_torch():
    code = "import sys, prepare, strawberry.data.assemble, strawberry.data.loader; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# ---- memory ----------------------------------------------------------------------------------------------------------

MEMORY = """
import sys, numpy as np
from strawberry.data.dataset import Corpus
from strawberry.data.loader import resident_memory
from strawberry.data.token_file import TokenFile
split = Corpus(sys.argv[1], None, 256, 1.0).train
split.read_windows(0, 0, 64)
start = resident_memory()["resident"]
for step in range(100):
    split.read_windows(0, step * 64, 64)
print(resident_memory()["resident"] - start)
tokens = TokenFile(sys.argv[1]).tokens
for step in range(100):
    for row in np.random.default_rng(step).integers(0, len(tokens) - 257, 64):
        tokens[row:row + 257].astype(np.int64)
print(resident_memory()["resident"] - start)
"""


@pytest.mark.slow
def test_resident_memory_stays_flat(tmp_path):
    require(Path("/proc/self/status").exists(), "/proc, from which resident memory is read")
    with TokenFileWriter(tmp_path / "a.bin", SMALL) as writer:
        for _ in range(32):
            writer.add(np.arange(1 << 20) % 499)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "a.bin")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    ours, one_memory_map = map(float, done.stdout.split())
    assert one_memory_map > 50  # MB: most of the file's 67, so that the test would see them
    assert ours < 6


@pytest.mark.slow
def test_measure_prints_memory_and_speed(tmp_path):
    path = write_file(tmp_path / "a.bin", [500])
    sizes = ["--steps", "20", "--batch_size", "2", "--block_size", "8"]
    command = [sys.executable, "-m", "strawberry.data.loader", "--measure", path, *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 12
    assert "501 tokens" in done.stdout
    failed = subprocess.run([*command[:4], "nowhere.bin"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: there is no token file nowhere.bin")


def test_header_is_a_value():
    header = Header(500, 499, 7, 1, "ab" * 32, "cd" * 32, "ef" * 32, "uint16", origin="01" * 32)
    assert Header.from_bytes(header.to_bytes(), "x") == header
