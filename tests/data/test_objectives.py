"""Objectives: what they hide against slow references, the same for ever, whatever the process or the start."""

import hashlib
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strawberry.common import UserError
from strawberry.data.dataset import SPLITS, Corpus
from strawberry.data.loader import Loader
from strawberry.data.objectives import (
    OBJECTIVES,
    MaskedTokens,
    NextToken,
    Pairs,
    SpanCorruption,
    count_extra_ids,
    decode_with_sentinels,
    draw_uint64,
    encode_with_sentinels,
    make_objective,
    segment_randomly,
)
from strawberry.data.token_file import TokenFile, TokenFileWriter

MASK64 = 2**64 - 1
N = 300  # ids of the encoder; 298 is <|eot|>, 299 <|pad|>
ENCODER = SimpleNamespace(
    vocab_size=N, eot=298, pad=299, specials={"<|eot|>": 298, "<|pad|>": 299}, fingerprint="ab" * 32,
    encode=lambda text: [ord(c) for c in text], decode=lambda ids: "".join(map(chr, ids)),
)  # fmt: skip


def examples(count):
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_text(path, lengths=(50, 7, 90, 1, 60, 33), encoder=ENCODER):
    with TokenFileWriter(path, encoder) as writer:
        for number, length in enumerate(lengths):
            writer.add((np.arange(length) * 7 + number) % 290)
    return path


def write_pairs(path, pairs, encoder=ENCODER):
    with TokenFileWriter(path, encoder, kind="pairs") as writer:
        for source, target in pairs:
            writer.add(np.array(source, dtype=np.int64))
            writer.add(np.array(target, dtype=np.int64))
    return path


def whole(path, block_size):
    file = TokenFile(path)
    return SPLITS[file.header.kind]("training", [(file, 0, file.header.n_tokens)], block_size)


def random_pairs(n, longest=12, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.integers(0, 290, rng.integers(1, longest)).tolist() for _ in range(2)] for _ in range(n)]


# ---- slow references -------------------------------------------------------------------------------------------------


def slow_mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def slow_draws(seed, sample, n):
    """SplitMix64, as published, from a key that is a hash of (seed, sample)."""
    golden = 0x9E3779B97F4A7C15
    key = slow_mix(slow_mix((seed + golden) & MASK64) ^ slow_mix((sample * golden + golden) & MASK64))
    state = slow_mix(key ^ 0x5AB1E5)
    out = []
    for _ in range(n):
        state = (state + golden) & MASK64
        out.append(slow_mix(state))
    return out


def slow_segments(items, parts, draw):
    """Lengths of `parts` pieces of `items`: a piece ends before each of the parts − 1 places with the lowest draws."""
    ends = sorted(sorted(range(items - 1), key=lambda place: draw[place])[: parts - 1])
    lengths, start = [], 0
    for end in [*ends, items - 1]:
        lengths.append(end + 1 - start)
        start = end + 1
    return lengths


def slow_spans(text, seed, sample):
    """(source, target) by appending tokens one after the other."""
    n = len(text)
    n_noise = min(max(round(n * 0.15), 1), n - 1)
    n_spans = min(max(round(n_noise / 3), 1), n - n_noise)
    draw = slow_draws(seed, sample, n - 2)
    spans = slow_segments(n_noise, n_spans, draw[: n_noise - 1])
    gaps = slow_segments(n - n_noise, n_spans, draw[n_noise - 1 :])
    source, target, rest = [], [], list(text)
    for number, (gap, span) in enumerate(zip(gaps, spans, strict=True)):
        source += rest[:gap] + [N + number]
        target += [N + number] + rest[gap : gap + span]
        rest = rest[gap + span :]
    assert rest == []
    return [*source, 298], [*target, 298]


def slow_masked(text, seed, sample):
    n = len(text)
    draw = slow_draws(seed, sample, 3 * n)
    candidates = sorted((i for i in range(n) if text[i] != 298), key=lambda i: draw[i])
    x, y = list(text), [-1] * n
    for i in candidates[: max(round(0.15 * n), 1)]:
        y[i] = text[i]
        share = draw[n + i] / 2**64
        if share < 0.8:
            x[i] = N
        elif share < 0.9:
            x[i] = draw[2 * n + i] % 298  # any id but the two specials
    return x, y


# ---- what is hidden --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, 3, 7, 16, 40])
def test_spans_are_those_of_the_slow_reference(tmp_path, block_size):
    split = whole(write_text(tmp_path / "a.bin"), block_size)
    batch = SpanCorruption(ENCODER, block_size).make_batch(split, 5, 3, 60)
    for row, window in enumerate(split.read_windows(5, 3, 60)):
        source, target = slow_spans(window[1:].tolist(), 5, 3 + row)
        assert batch.source[row].tolist() == source
        assert batch.y[row].tolist() == target
        assert batch.x[row].tolist() == [298, *target[:-1]]
    assert batch.n_targets == batch.y.size


@examples(60)
@given(st.integers(2, 80), st.integers(0, 2**63), st.integers(0, 2**40))
def test_source_and_target_together_are_the_text(block_size, seed, sample):
    text = np.arange(block_size)
    split = SimpleNamespace(read_windows=lambda *_: np.concatenate(([0], text))[None])
    objective = SpanCorruption(ENCODER, block_size)
    batch = objective.make_batch(split, seed, sample, 1)
    answers, number = {}, None
    for token in batch.y[0, :-1].tolist():
        if token >= N:
            number = token
            answers[number] = []
        else:
            answers[number].append(token)
    assert list(answers) == list(range(N, N + objective.extra_ids)) and all(answers.values())
    filled = sum((answers.get(token, [token]) for token in batch.source[0, :-1].tolist()), [])
    assert filled == text.tolist()
    assert sum(map(len, answers.values())) == min(max(round(0.15 * block_size), 1), block_size - 1)


def test_t5s_numbers():
    """512 tokens of which 15 % are hidden, as T5's preprocessing counts them: 77 tokens in 26 spans."""
    objective = SpanCorruption(ENCODER, 512)
    assert (objective.n_noise, objective.n_spans) == (77, 26)
    split = SimpleNamespace(read_windows=lambda *_: np.zeros((4, 513), np.int64))
    batch = objective.make_batch(split, 0, 0, 4)
    assert batch.source.shape == (4, 512 - 77 + 26 + 1)
    assert batch.y.shape == batch.x.shape == (4, 77 + 26 + 1)


def test_every_way_to_cut_is_equally_likely():
    ways = segment_randomly(5, 3, draw_uint64(1, 0, 12_000, 4))
    found, counts = np.unique(ways, axis=0, return_counts=True)
    assert found.tolist() == [[1, 1, 3], [1, 2, 2], [1, 3, 1], [2, 1, 2], [2, 2, 1], [3, 1, 1]]
    assert abs(counts - 2000).max() < 200  # five standard deviations


@pytest.mark.parametrize("block_size", [1, 5, 16, 40])
def test_masks_are_those_of_the_slow_reference(tmp_path, block_size):
    split = whole(write_text(tmp_path / "a.bin"), block_size)
    batch = MaskedTokens(ENCODER, block_size).make_batch(split, 5, 3, 60)
    targets = 0
    for row, window in enumerate(split.read_windows(5, 3, 60)):
        x, y = slow_masked(window[1:].tolist(), 5, 3 + row)
        assert batch.x[row].tolist() == x
        assert batch.y[row].tolist() == y
        targets += sum(token >= 0 for token in y)
    assert batch.n_targets == targets
    assert batch.source is None


def test_fifteen_percent_of_which_eighty_are_masked_and_ten_replaced():
    split = SimpleNamespace(read_windows=lambda *_: np.full((400, 101), 7))
    batch = MaskedTokens(ENCODER, 100).make_batch(split, 1, 0, 400)
    chosen = batch.y >= 0
    assert (chosen.sum(axis=1) == 15).all() and (batch.y[chosen] == 7).all() and (batch.x[~chosen] == 7).all()
    shown = batch.x[chosen]  # 6,000 tokens
    assert abs((shown == N).mean() - 0.8) < 0.03
    replaced = shown[(shown != N) & (shown != 7)]
    assert abs(len(replaced) / 6000 - 0.1) < 0.02
    assert len(np.unique(replaced)) > 200 and replaced.max() < 298  # no special token


def test_an_end_of_text_is_never_masked():
    split = SimpleNamespace(read_windows=lambda *_: np.array([[298] * 21, [298] * 20 + [5]]))
    batch = MaskedTokens(ENCODER, 20).make_batch(split, 1, 0, 2)
    assert (batch.y >= 0).sum(axis=1).tolist() == [0, 1]
    assert batch.n_targets == 1


def test_pairs_are_padded_and_cut():
    wanted = [([1, 2], [3]), ([4], []), (list(range(9)), list(range(10, 19))), ([5, 6, 7], [7, 6, 5, 4])]
    rows = [(np.array([*s, 298][:5]), np.array([*t, 298][:5])) for s, t in wanted]
    batch = Pairs(ENCODER, 5).make_batch(SimpleNamespace(read_pairs=lambda *_: rows), 0, 0, 4)
    P, E = 299, 298
    assert batch.source.tolist() == [[1, 2, E, P, P], [4, E, P, P, P], [0, 1, 2, 3, E], [5, 6, 7, E, P]]
    assert batch.x.tolist() == [[E, 3, P, P, P], [E, P, P, P, P], [E, 10, 11, 12, 13], [E, 7, 6, 5, 4]]
    assert batch.y.tolist() == [[3, E, -1, -1, -1], [E, -1, -1, -1, -1], [10, 11, 12, 13, 14], [7, 6, 5, 4, E]]
    assert batch.n_targets == 2 + 1 + 5 + 5


def test_next_token_is_the_window_and_itself_one_on(tmp_path):
    split = whole(write_text(tmp_path / "a.bin"), 9)
    batch = NextToken().make_batch(split, 5, 3, 8)
    windows = split.read_windows(5, 3, 8)
    assert batch.x.tolist() == windows[:, :-1].tolist()
    assert batch.y.tolist() == windows[:, 1:].tolist()
    assert (batch.source, batch.n_targets) == (None, 72)


# ---- the same for ever -----------------------------------------------------------------------------------------------

CASES = {"next": 16, "spans": 16, "pairs": 8, "masked": 16}


def a_split(folder, name):
    if name == "pairs":
        return whole(write_pairs(folder / "p.bin", random_pairs(23)), CASES[name])
    return whole(write_text(folder / "t.bin"), CASES[name])


def listed(batch):
    return [None if part is None else part.tolist() for part in batch[:3]]


@pytest.mark.parametrize("name", CASES)
def test_a_sample_depends_on_seed_and_number_alone(tmp_path, name):
    split, objective = a_split(tmp_path, name), OBJECTIVES[name](ENCODER, CASES[name])
    together = objective.make_batch(split, 3, 40, 30)
    for i in range(30):
        alone = objective.make_batch(split, 3, 40 + i, 1)
        assert listed(alone) == [None if part is None else part[i : i + 1].tolist() for part in together[:3]]
    assert listed(together) == listed(objective.make_batch(split, 3, 40, 30))
    assert listed(together) != listed(objective.make_batch(split, 4, 40, 30))


@pytest.mark.parametrize("name", ["spans", "masked"])
def test_each_epoch_hides_something_else(name):
    split = SimpleNamespace(read_windows=lambda *_: np.arange(41)[None])  # the same window whenever it comes
    objective = OBJECTIVES[name](ENCODER, 40)
    assert len({str(listed(objective.make_batch(split, 0, sample, 1))) for sample in range(20)}) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_any_start_and_any_number_of_processes_give_the_same_batches(tmp_path, name):
    split, objective = a_split(tmp_path, name), OBJECTIVES[name](ENCODER, CASES[name])

    def steps(count, **where):
        with Loader(split, 6, 4, 2, objective=objective, **where) as loader:
            return [[listed(batch) for batch in next(loader)] for _ in range(count)]

    alone = steps(7)
    assert steps(4, start_step=3) == alone[3:]
    ranks = [steps(7, rank=rank, world=2) for rank in range(2)]
    joined = [[[None if a is None else a + b for a, b in zip(*two)] for two in zip(*step)] for step in zip(*ranks)]
    assert joined == alone


# ---- pair files ------------------------------------------------------------------------------------------------------


def as_lists(pairs):
    return sorted((source.tolist(), target.tolist()) for source, target in pairs)


def test_every_pair_of_an_epoch_exactly_once(tmp_path):
    wanted = random_pairs(23)
    split = whole(write_pairs(tmp_path / "p.bin", wanted), 100)
    epochs = [split.read_pairs(5, 23 * epoch, 23) for epoch in range(3)]
    for pairs in epochs:
        assert as_lists(pairs) == sorted(([*s, 298], [*t, 298]) for s, t in wanted)
    assert len({str(pairs) for pairs in epochs}) == 3
    assert split.n_windows == 23 and split.n_cut == 0
    assert whole(tmp_path / "p.bin", 6).n_cut == sum(max(len(s), len(t)) + 1 > 6 for s, t in wanted)


@pytest.mark.slow
@examples(60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9), st.floats(0.01, 0.99))
def test_validation_begins_at_a_pair(tmp_path, lengths, division):
    pairs = [([1] * a, [2] * b) for a, b in lengths]
    corpus = Corpus(write_pairs(tmp_path / "p.bin", pairs), None, 16, division)
    total = sum(a + b + 2 for a, b in lengths)
    ends = np.cumsum([a + b + 2 for a, b in lengths]).tolist()
    cut = next((end for end in ends[:-1] if end >= division * total), ends[-2])
    assert (corpus.train.n_tokens, corpus.val.n_tokens) == (cut, total - cut)
    train, val = corpus.train, corpus.val
    found = as_lists(train.read_pairs(0, 0, train.n_windows) + val.read_pairs(0, 0, val.n_windows))
    assert found == sorted(([*s, 298], [*t, 298]) for s, t in pairs)


def test_several_pair_files_are_one_corpus(tmp_path):
    paths = [write_pairs(tmp_path / f"{i}.bin", random_pairs(5 + i, seed=i)) for i in range(3)]
    corpus = Corpus(paths, None, 50, 0.7)
    n = corpus.train.n_windows + corpus.val.n_windows
    assert n == 5 + 6 + 7
    found = corpus.train.read_pairs(1, 0, corpus.train.n_windows) + corpus.val.read_pairs(1, 0, corpus.val.n_windows)
    wanted = [pair for i in range(3) for pair in random_pairs(5 + i, seed=i)]
    assert as_lists(found) == sorted(([*s, 298], [*t, 298]) for s, t in wanted)


def test_one_pair_cannot_be_divided(tmp_path):
    path = write_pairs(tmp_path / "p.bin", [([1], [2])])
    with pytest.raises(UserError, match="the validation split has 0 tokens in 1 file.*too few for a pair"):
        Corpus(path, None, 8, 0.5)
    corpus = Corpus(path, None, 8, 1.0)
    assert corpus.train.n_windows == 1
    with pytest.raises(UserError, match="the validation split has no pair"):
        corpus.val.read_pairs(0, 0, 1)


def test_one_kind_at_a_time(tmp_path):
    text, pairs = write_text(tmp_path / "t.bin"), write_pairs(tmp_path / "p.bin", random_pairs(9))
    with pytest.raises(UserError, match=r"p\.bin holds pairs, and .*t\.bin holds tokens: train on one kind at a time"):
        Corpus([text, pairs], None, 8, 0.5)


def signed(data, place, number):
    """The file with another number in its header, and the header's checksum made anew."""
    head = bytearray(data[:224])
    head[place : place + 8] = struct.pack("<Q", number)
    return bytes(head) + hashlib.sha256(head).digest() + data[256:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: signed(d, 64, 5), "5 documents are no pairs"),
        (lambda d: signed(d, 64, 0), "0 documents are no pairs"),
        (lambda d: d[:-2], "is cut short"),
        (lambda d: d + d[-2:], "is too long"),
        (lambda d: d[:256] + d[258:] + d[256:258], "which make no pairs"),  # its last token is no eot
        (lambda d: d[:256] + struct.pack("<H", 298) + d[258:], "which make no pairs"),  # one eot more
        (lambda d: signed(d, 48, 7), "which make no pairs"),  # another eot
        (lambda d: d[:256] + struct.pack("<H", 500) + d[258:], "holds token 500, and its vocab_size is 300"),
    ],
)
def test_a_hostile_pair_file_is_refused_by_name(tmp_path, change, message):
    path = write_pairs(tmp_path / "p.bin", [([1, 2], [3, 4]), ([5], [6]), ([7, 8], [9])])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        corpus = Corpus(path, None, 8, 0.5)
        corpus.train.read_pairs(0, 0, corpus.train.n_windows)
    assert "p.bin" in str(caught.value) and "\n" not in str(caught.value)


# ---- what fits what --------------------------------------------------------------------------------------------------


@pytest.fixture
def corpora(tmp_path):
    return {
        "tokens": Corpus(write_text(tmp_path / "t.bin"), None, 16, 0.5),
        "pairs": Corpus(write_pairs(tmp_path / "p.bin", random_pairs(9)), None, 16, 0.5),
    }


def make(name, model, corpus, vocab_size=400, block_size=16):
    return make_objective(name, model, vocab_size, block_size, ENCODER, corpus)


@pytest.mark.parametrize(
    ("model", "kind", "chosen"),
    [
        ("decoder", "tokens", "next"),
        ("encoder", "tokens", "masked"),
        ("encoder-decoder", "tokens", "spans"),
        ("encoder-decoder", "pairs", "pairs"),
    ],
)
def test_auto_is_what_fits(corpora, model, kind, chosen):
    for name in ("auto", chosen):
        found, objective = make(name, model, corpora[kind])
        assert found == chosen and type(objective) is OBJECTIVES[chosen]


@pytest.mark.parametrize("model", ["decoder", "encoder", "encoder-decoder"])
def test_spare_ids_are_just_enough(corpora, model):
    need = ENCODER.vocab_size + count_extra_ids("auto", model, 16, ENCODER)
    make("auto", model, corpora["tokens"], need)
    if model != "decoder":
        with pytest.raises(UserError, match=f"set it to {need} or more"):
            make("auto", model, corpora["tokens"], need - 1)


@pytest.mark.parametrize(
    ("name", "model", "kind", "message"),
    [
        ("spans", "decoder", "tokens", 'objective = "spans": is for a model of kind encoder-decoder, and this one is '
         'of kind decoder, for which there is next; set it to "auto"'),
        ("next", "encoder-decoder", "tokens", "for which there is spans and pairs"),
        ("masked", "encoder-decoder", "tokens", "is for a model of kind encoder,"),
        ("pairs", "encoder-decoder", "tokens", r"learns from pairs, and .*t\.bin holds tokens; .* made with --pairs"),
        ("spans", "encoder-decoder", "pairs", r"learns from tokens, and .*p\.bin holds pairs; .* made without --pairs"),
        ("auto", "decoder", "pairs", r'objective = "next": learns from tokens, and .*p\.bin holds pairs'),
    ],
)
def test_what_does_not_fit_is_refused_by_name(corpora, name, model, kind, message):
    with pytest.raises(UserError, match=message):
        make(name, model, corpora[kind])


def test_vocab_size_must_leave_room(corpora):
    needed = {"masked": N + 1, "spans": N + 1}  # 2 of 16 tokens, in one span
    for name, model in (("masked", "encoder"), ("spans", "encoder-decoder")):
        make(name, model, corpora["tokens"], needed[name])
        message = f'vocab_size = 300: objective "{name}" needs 1 more ids than the encoder\'s 300; set it to 301 or'
        with pytest.raises(UserError, match=message):
            make(name, model, corpora["tokens"], needed[name] - 1)
    with pytest.raises(UserError, match="needs 13 more ids .* set it to 313 or more"):
        make("spans", "encoder-decoder", corpora["tokens"], 312, block_size=256)
    with pytest.raises(UserError, match="block_size = 1: span corruption needs 2 or more"):
        make("spans", "encoder-decoder", corpora["tokens"], block_size=1)
    assert make("pairs", "encoder-decoder", corpora["pairs"], N)[1].extra_ids == 0


def test_every_id_is_under_the_vocab_size_that_is_asked_for(tmp_path):
    for block_size in (2, 5, 16, 40):
        split = whole(write_text(tmp_path / "t.bin"), block_size)
        for cls in (SpanCorruption, MaskedTokens):
            objective = cls(ENCODER, block_size)
            batch = objective.make_batch(split, 0, 0, 40)
            assert max(part.max() for part in batch[:3] if part is not None) == N + objective.extra_ids - 1


def test_sentinels_are_spelled_and_read():
    ids = [*b"ab", N, *b"c", N + 1, N + 12]
    assert decode_with_sentinels(ENCODER, ids) == "ab<|0|>c<|1|><|12|>"
    assert encode_with_sentinels(ENCODER, "ab<|0|>c<|1|><|12|>") == ids
    assert encode_with_sentinels(ENCODER, "<|eot|>") == list(b"<|eot|>")
    assert decode_with_sentinels(ENCODER, []) == "" and encode_with_sentinels(ENCODER, "") == []
