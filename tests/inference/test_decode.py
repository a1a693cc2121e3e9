"""engine.py: the texts of batched decoding, against model.generate and against each request alone."""

import math
from dataclasses import replace

import pytest
import torch
from decoding import MODELS, SMALL, by_generate, collect, every_model, requests_for, small_model, texts_by_generate

from model import build
from strawberry.cache import iter_layer_caches
from strawberry.common import UserError
from strawberry.inference.engine import Decoder
from strawberry.inference.loading import quantize_model
from strawberry.inference.sampling import Request
from strawberry.ops.sampling import sample


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("rows", [1, 3])
def test_batched_texts_equal_generate(name, rows):
    """Whatever the number of rows, the other requests and the earlier ones of a row; rows join at any position."""
    model = small_model(name)
    requests, expected = requests_for(model, 9), texts_by_generate(name, 9)
    got = collect(Decoder(model, rows, 64), requests)
    for request, one, (tokens, why) in zip(requests, expected, got, strict=True):
        assert tokens == one
        assert why == ("stop" if tokens[-1] in request.stop else "length")


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("rows", [2, 8])
def test_lookahead_texts_equal_generate(name, rows):
    """As a GPU does: the next step is under way before the tokens of the last are read."""
    model = small_model(name)
    requests, expected = requests_for(model, 9), texts_by_generate(name, 9)
    decoder = Decoder(model, rows, 64)
    decoder.lookahead = 1 if model.causal else 0
    for request, one, (tokens, why) in zip(requests, expected, collect(decoder, requests), strict=True):
        assert tokens == one
        assert why == ("stop" if tokens[-1] in request.stop else "length")


@pytest.mark.slow
@every_model
def test_texts_are_batch_invariant_in_float32(name):
    model = small_model(name).float()
    requests = requests_for(model, 5)
    together = collect(Decoder(model, 2, 64, batch_invariant=True), requests)
    alone = [collect(Decoder(model, 2, 64, batch_invariant=True), [request])[0] for request in requests]
    assert together == alone


@every_model
def test_batched_prefill_gives_the_texts_of_each_prompt_alone(name, monkeypatch):
    """Prompts of different lengths, some of them equal, into rows of which one in the middle is occupied."""
    model = small_model(name)
    requests = [replace(request, max_new_tokens=5, stop=frozenset()) for request in requests_for(model, 7)]
    requests[5] = replace(requests[4], seed=50)
    alone = [collect(Decoder(model, 1, 64), [request])[0][0] for request in requests]
    decoder, batch_sizes = Decoder(model, 8, 64), []
    forward = type(model).forward_cached
    monkeypatch.setattr(type(model), "forward_cached", lambda self, idx, cache, lengths=None:
                        batch_sizes.append(len(idx)) or forward(self, idx, cache, lengths))  # fmt: skip
    occupied = [decoder.admit(Request([1], 60, source=[1] if model.takes_source else None)) for _ in range(3)]
    decoder.release(occupied[0])
    decoder.release(occupied[2])
    handles, texts = decoder.admit_all(requests[:6]), {}
    while len(texts) < 6 or any(len(text) < 5 for text in texts.values()):
        for handle, token, _ in decoder.step():
            if handle in handles:
                texts.setdefault(handle, []).append(token)
    assert [texts[handle] for handle in handles] == alone[:6]
    together = model.causal and not model.takes_source
    assert (max(batch_sizes, default=0) > 1) == together


def test_a_batch_invariant_decoder_prefills_each_prompt_alone(monkeypatch):
    """A product of other rows may round otherwise."""
    model = small_model("tinystar")
    decoder, read = Decoder(model, 4, 64, batch_invariant=True), []
    prefill = decoder.logits.prefill
    monkeypatch.setattr(decoder.logits, "prefill", lambda *args: read.append(args[1]) or prefill(*args))
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    decoder.admit_all([Request(prompt, 3) for prompt in prompts])
    assert sorted(read) == sorted(prompts)


# ---- batch invariance ----------------------------------------------------------------------------------------------


def record_logits(decoder, requests, which: int) -> list[torch.Tensor]:
    """The logits of every step of one of the requests, all of which are admitted at once."""
    seen, decode_step, handles = [], decoder.logits.decode_step, []

    def watched(token, max_cached):
        logits = decode_step(token, max_cached)
        rows = [i for i, s in enumerate(decoder.sequences) if s is not None and s.handle == handles[which]]
        seen.extend(logits[row].clone() for row in rows)
        return logits

    decoder.logits.decode_step = watched
    handles += [decoder.admit(request) for request in requests]
    while decoder.busy:
        decoder.step()
    return seen


def mixed_requests(model) -> list[Request]:
    """Seven requests of all lengths and options; one exceeds the smallest bucket, where positions allow it."""
    *some, last = (replace(request, max_new_tokens=3 + 2 * i) for i, request in enumerate(requests_for(model, 7)))
    last.prompt = [1 + i % 30 for i in range(270 if model.max_positions is None else 30)]
    return [*some, last]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "batch scope"])  # which has no cache
@pytest.mark.parametrize("min_bucket", [256, 512])
def test_logits_are_batch_invariant_bit_for_bit(name, min_bucket):
    """In any row, with any other requests; 40 channels, so that rows of the cache begin at odd addresses."""
    width = {"n_embd": 40} | ({"n_qkv": 40} if "n_qkv" in MODELS[name] else {})
    model = small_model(name, **width).float()
    source = [3, 4, 5] if model.takes_source else None
    request = Request([5, 6, 7], 20, seed=3, top_k=7, top_p=0.9, source=source)

    def decoder():
        return Decoder(model, 8, 512, batch_invariant=True, min_bucket=min_bucket)

    alone = record_logits(decoder(), [request], 0)
    assert len(alone) == 19
    for company in ([request, *mixed_requests(model)], [*mixed_requests(model), request]):
        together = record_logits(decoder(), company, company.index(request))
        assert len(together) == 19 and all(map(torch.equal, alone, together))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["strawberry-silia", "tinystar"])
def test_logits_at_the_end_of_a_bucket_are_batch_invariant_bit_for_bit(name):
    """The last slot of 256 is summed as any slot of 512 is, whether a sink has one of them or not."""
    model = small_model(name).float()
    request, longer = Request([1 + i % 30 for i in range(250)], 12), Request([1 + i % 29 for i in range(300)], 20)
    alone, together = (record_logits(Decoder(model, 8, 512, batch_invariant=True), [request, *company], 0)
                       for company in ([], [longer]))  # fmt: skip
    assert len(alone) == len(together) == 11 and all(map(torch.equal, alone, together))


@pytest.mark.parametrize("name", ["strawberry", "tinystar"])
def test_every_batch_invariant_decode_step_has_one_shape(name, monkeypatch):
    """All rows, whole buckets of the cache, a chunk's weights for one row at a time, each row's own filters."""
    model, shapes, chunk_rows, filters = small_model(name), set(), [], []
    step, begin_chunks = model.decode_step, model.begin_chunks
    monkeypatch.setattr(model, "decode_step", lambda token, cache, max_cached:
                        shapes.add((len(token), max_cached + 1)) or step(token, cache, max_cached))  # fmt: skip
    decoder = Decoder(model, 8, 512, batch_invariant=True, min_bucket=512)
    whole = decoder.logits.cache
    monkeypatch.setattr(model, "begin_chunks", lambda cache, rows:
                        chunk_rows.extend([rows] if cache is whole else []) or begin_chunks(cache, rows))  # fmt: skip
    draw = decoder.sampler.draw
    monkeypatch.setattr(decoder.sampler, "draw", lambda *args: filters.append(args[2]) or draw(*args))
    requests = [Request([1 + i], 17, seed=i, **wish) for i, wish in enumerate(({}, {"top_k": 5}, {"top_p": 0.5}, {}))]
    own = {decoder.sampler.select_filters([request]) for request in requests}
    collect(decoder, requests)
    assert shapes == {(8, 512)}
    assert all(len(rows) == 1 for rows in chunk_rows) and bool(chunk_rows) == (name == "strawberry")
    assert set(filters) == own and len(own) == 3


@pytest.mark.parametrize(("window", "slots"), [(9, {256, 512}), (320, {256, 512}), (300, {512}), (600, {1024})])
def test_ring_buffers_that_no_bucket_fits_are_read_whole_from_the_first_step(window, slots, monkeypatch):
    """Sums over 256 slots and over 300 may round differently, so no text may read both."""
    model, seen = small_model("tinystar, window", window=window, block_size=1024), set()
    step = model.decode_step
    monkeypatch.setattr(model, "decode_step", lambda token, cache, max_cached:
                        seen.add(max_cached + 1) or step(token, cache, max_cached))  # fmt: skip
    collect(Decoder(model, 2, 1024, batch_invariant=True), [Request([1] * 250, 10), Request([1] * 260, 3)])
    assert seen == slots


# ---- where positions end -------------------------------------------------------------------------------------------


def test_texts_end_where_learned_positions_end():
    model = small_model("tinystar, learned")
    (tokens, why), (short, _) = collect(Decoder(model, 2, 500), [Request([1] * 60, 100, seed=1), Request([1], 3)])
    assert (len(tokens), why, len(short)) == (5, "full", 3)  # the fifth follows the 64th position
    assert tokens == by_generate(model, Request([1] * 60, 4, seed=1)) + tokens[4:]


@pytest.mark.slow
def test_slide_prefills_the_newest_half_again_when_positions_end():
    """After each time that positions end, the newest 32 tokens are read anew."""
    model = small_model("tinystar, learned")
    request = Request([1] * 60, 90, seed=1)
    for rows in (1, 2):
        (tokens, why), *_ = collect(Decoder(model, rows, 500, on_full="slide"), [request, Request([2], 50)][:rows])
        generator, text, expected = torch.Generator().manual_seed(1), list(request.prompt), []
        context = list(text)
        for _ in range(90):
            if len(context) > 64:
                context = text[-32:]
            new = model.generate(torch.tensor([context]), 1, generator=generator)[0, -1].item()
            for mine in (text, context, expected):
                mine.append(new)
        assert (tokens, why) == (expected, "length")


def test_a_prompt_longer_than_positions_is_refused_or_its_newest_half_read():
    model = small_model("tinystar, learned")
    with pytest.raises(UserError, match="70 tokens exceed 64, the number of positions.*slide"):
        Decoder(model, 1, 500).admit(Request([1] * 70, 5))
    prompt = torch.randint(31, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    ((tokens, _),) = collect(Decoder(model, 1, 500, on_full="slide"), [Request(prompt, 5, seed=4)])
    assert tokens == by_generate(model, Request(prompt[-32:], 5, seed=4))


# ---- what may go wrong, and early ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("request_, message", [
    (Request([], 5), "at least one token"),
    (Request([1], 0), "at least one new token"),
    (Request([31], 5), "token 31 is none of the 31"),
    (Request([1] * 10, 60), "10 tokens and 60 new ones exceed max_length 64"),
])  # fmt: skip
def test_invalid_requests_are_refused_and_leave_the_row_free(request_, message):
    decoder = Decoder(small_model("tinystar"), 1, 64)
    with pytest.raises(UserError, match=message):
        decoder.admit(request_)
    assert decoder.free == 1


def test_an_encoder_decoder_without_a_source_is_refused():
    with pytest.raises(UserError, match="needs a source"):
        Decoder(small_model("encoder-decoder"), 1, 64).admit(Request([1], 5))


def test_a_source_too_long_is_refused_and_leaves_the_row_free():
    decoder = Decoder(small_model("encoder-decoder"), 1, 64, max_source=8)
    with pytest.raises(UserError, match="a source of 9 tokens exceeds the 8"):
        decoder.admit(Request([1], 5, source=[1] * 9))
    assert decoder.free == 1


def test_an_encoder_is_refused():
    with pytest.raises(UserError, match="masked tokens"):
        Decoder(build(SMALL | {"arch": "transformer", "kind": "encoder"}), 1, 64)


@pytest.mark.parametrize("temperature", [0, 1])
def test_nan_weights_are_reported(temperature):
    model = small_model("tinystar")
    model.blocks[1].ffn.w2.weight.data[0, 0] = float("nan")
    decoder = Decoder(model, 1, 64)
    with pytest.raises(UserError, match="NaN"):
        decoder.admit(Request([1], 5, temperature=temperature))
        decoder.step()


def test_a_released_row_is_free_immediately_and_changes_no_other_text():
    model = small_model("strawberry")
    first, second, third = requests_for(model, 3)
    decoder = Decoder(model, 2, 64)
    handle, other, got = decoder.admit(first), decoder.admit(third), {}
    for _ in range(3):
        for owner, token, _ in decoder.step():
            got.setdefault(owner, []).append(token)
    decoder.release(handle)
    assert decoder.free == 1
    last = decoder.admit(second)
    while decoder.busy:
        for owner, token, _ in decoder.step():
            got.setdefault(owner, []).append(token)
    assert got[handle] == by_generate(model, first)[:3]
    assert got[last] == by_generate(model, second) and got[other] == by_generate(model, third)


@pytest.mark.slow
def test_the_batch_shrinks_to_the_busy_rows(monkeypatch):
    """Eight texts, seven of which end soon: the last is computed alone."""
    model = small_model("strawberry, experts, two passes")
    decoder, sizes = Decoder(model, 8, 64), []
    launch = decoder.device_step.launch
    monkeypatch.setattr(decoder.device_step, "launch", lambda rows, *key: sizes.append(rows) or launch(rows, *key))
    requests = [Request([1 + i], 40 if i == 6 else 3, seed=i) for i in range(8)]
    results = collect(decoder, requests)
    assert sizes == [8] * 2 + [1] * 37
    assert results[6][0] == by_generate(model, requests[6])


@pytest.mark.slow
def test_the_cache_is_allocated_once():
    """No tensor of the cache moves or grows while requests join, move to other rows and end."""
    model = small_model("strawberry")
    decoder = Decoder(model, 4, 64)

    def addresses() -> list[int]:
        return [getattr(s, n).data_ptr() for s in iter_layer_caches(decoder.logits.cache.layers) for n in s.initial]

    before = addresses()
    collect(decoder, requests_for(model, 9))
    assert addresses() == before


# ---- draws ---------------------------------------------------------------------------------------------------------


def naive_probabilities(logits: list[float], temperature=1.0, top_k=None, top_p=1.0, min_p=0.0) -> list[float]:
    """By the definitions, token by token."""
    p = [math.exp(logit / temperature) for logit in logits]
    total = sum(p)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    top = order[:top_k]
    share, nucleus = sum(p[i] for i in top), []
    for i in top:
        if sum(p[j] for j in nucleus) >= top_p * share:
            break
        nucleus.append(i)
    p = [p[i] / total if i in nucleus and p[i] >= min_p * p[order[0]] else 0.0 for i in range(len(p))]
    return [x / sum(p) for x in p]


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.15},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [5, 300, 129])
def test_samples_follow_the_filtered_probabilities(options, size):
    """Over u in even steps, each token comes as often as it is likely; over all of [0, 1), never one left out."""
    logits = 2 * torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    n = 5_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    options = {"temperature": 1.0} | options
    expected = torch.tensor(naive_probabilities(logits.tolist(), **options), dtype=torch.float64)
    for rows in (options, {name: torch.full((n,), value) for name, value in options.items()}):
        tokens = sample(logits.expand(n, -1), u, **rows)
        counts = torch.bincount(tokens, minlength=size).double() / n
        torch.testing.assert_close(counts, expected, rtol=0, atol=2 / n)
        assert (expected[sample(logits.expand(3, -1).float(), torch.tensor([0.0, 0.5, 1.0]), **options)] > 0).all()


@pytest.mark.slow
@every_model
def test_a_shared_prompt_is_prefilled_once(name, monkeypatch):
    model = small_model(name)
    first, other, *_ = requests_for(model, 3)
    requests = [Request(other.prompt, 9 + i, seed=i, source=other.source) for i in range(3)]
    decoder, read = Decoder(model, 5, 64), []
    prefill, together = decoder.logits.prefill, getattr(decoder.logits, "prefill_together", None)
    monkeypatch.setattr(decoder.logits, "prefill", lambda *args: read.append(args) or prefill(*args))
    both = lambda row, prompts: read.extend(prompts) or together(row, prompts)  # noqa: E731
    monkeypatch.setattr(decoder.logits, "prefill_together", both, raising=False)
    results = collect(decoder, [first, *requests, Request(other.prompt + [1], 5, source=other.source)])
    assert len(read) == 3
    assert collect(decoder, requests) == results[1:4]  # a prompt prefilled before a step is not reused after it
    assert len(read) == 4
    for request, (tokens, _) in zip([first, *requests], results, strict=False):
        assert tokens == by_generate(model, request)


# ---- 8-bit weights -------------------------------------------------------------------------------------------------


def train_small_model(name: str):
    """A model trained on a Markov chain, and validation texts."""
    torch.manual_seed(0)
    model = build(SMALL | {"n_qkv": 32} | MODELS[name])
    follows = torch.randn(31, 31).mul(2).softmax(-1)
    texts = torch.zeros(41 * 16, 34, dtype=torch.int64)
    for t in range(1, 34):
        texts[:, t] = torch.multinomial(follows[texts[:, t - 1]], 1).squeeze(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for step in range(40):  # no text twice
        batch = texts[16 * step :][:16]
        model(batch[:, :-1], batch[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), texts[-16:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["strawberry", "strawberry, memory", "strawberry-silia", "strawberry-v0", "palm",
                                  "tinystar, latent", "transformer"])  # fmt: skip
def test_int8_weights_keep_the_loss(name):
    """The loss stays within 0.5 %, weights are smaller, and texts are generated."""
    model, validation = train_small_model(name)
    with torch.no_grad():
        exact = model(validation[:, :-1], validation[:, 1:])[1].item()
        before = {n for n, _ in model.named_parameters()}
        quantize_model(model)
        loss = model(validation[:, :-1], validation[:, 1:])[1].item()
    assert exact < 2.9 < math.log(31)  # it has learned something
    assert loss != exact and loss == pytest.approx(exact, rel=0.005)
    assert len(before) > len(list(model.parameters()))
    collect(Decoder(model, 2, 64), requests_for(model, 3))


def test_only_int8_is_known():
    with pytest.raises(UserError, match="--quantize int4.*int8"):
        quantize_model(small_model("tinystar"), "int4")
