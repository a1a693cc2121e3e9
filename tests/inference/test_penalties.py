"""Penalties, logit bias and minimum length: against definitions written out token by token, and transformers."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from decoding import WISHES, by_generate, collect, requests_for, small_model, wishful_requests

import encoder as encoders
import sample as sampling_command
from strawberry.common import UserError
from strawberry.inference.engine import Decoder
from strawberry.inference.penalties import LogitsProcessor, apply_penalties
from strawberry.inference.sampling import Request
from strawberry.inference.text import StopStringFilter, TextStream, make_request
from strawberry.ops.sampling import sample


def naive_process(logits: np.ndarray, r: Request, generated: list[int]) -> np.ndarray:
    """The logits (V,) from which a request's next token is drawn, by the definitions of OpenAI and vLLM."""
    out = logits.astype(np.float64)
    for token in range(len(out)):
        out[token] += r.logit_bias.get(token, 0)
        if token in r.stop and len(generated) < r.min_tokens:
            out[token] = -np.inf
        if token in r.prompt or token in generated:
            out[token] = out[token] / r.repetition_penalty if out[token] > 0 else out[token] * r.repetition_penalty
        count = generated.count(token)
        out[token] = out[token] - count * r.frequency_penalty - float(count > 0) * r.presence_penalty
    return out


def by_definition(model, r: Request) -> list[int]:
    """One forward of the whole text for each token."""
    uniforms, generated = torch.rand(1024, generator=torch.Generator().manual_seed(r.seed)), []
    while len(generated) < r.max_new_tokens and not (generated and generated[-1] in r.stop):
        source = None if r.source is None else torch.tensor([r.source])
        with torch.no_grad():
            logits = model(torch.tensor([r.prompt + generated]), source=source)[0][0, -1].numpy()
        u = uniforms[len(generated)].double().view(1)
        given = torch.from_numpy(naive_process(logits, r, generated)).unsqueeze(0)
        generated.append(sample(given, u, r.temperature, r.top_k, r.top_p, r.min_p).item())
    return generated


@functools.cache
def texts_by_definition(name: str) -> list[list[int]]:
    """The texts of wishful_requests(small_model(name)), most of which the penalties, bias and minimum length change."""
    model = small_model(name)
    requests = wishful_requests(model)
    expected = [by_definition(model, request) for request in requests]
    plain = [replace(r, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias={},
                     min_tokens=0) for r in requests]  # fmt: skip
    changed = sum(by_generate(model, r) != tokens for r, tokens in zip(plain, expected, strict=True))
    assert changed >= len(WISHES)
    return expected


@pytest.mark.parametrize(("name", "rows", "options"), [
    ("tinystar", 8, {}), ("tinystar", 3, {"batch_invariant": True}),
    pytest.param("strawberry", 1, {}, marks=pytest.mark.slow),
    pytest.param("encoder-decoder", 3, {}, marks=pytest.mark.slow),
    pytest.param("strawberry", 8, {"batch_invariant": True}, marks=pytest.mark.slow),
    pytest.param("batch scope", 3, {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_texts_are_those_of_the_definitions(name, rows, options):
    """Rows of different settings, joined and moved in one batch; a row's counts start anew with each text."""
    model, expected = small_model(name), texts_by_definition(name)
    requests = wishful_requests(model)
    decoder = Decoder(model, rows, 64, **options)
    assert [tokens for tokens, _ in collect(decoder, requests)] == expected
    decoder.lookahead = 1 if model.causal else 0  # as on a GPU; in rows that other texts have used
    assert [tokens for tokens, _ in collect(decoder, requests[::-1])] == expected[::-1]


def random_rows(n: int = 5, vocab_size: int = 40) -> tuple[torch.Tensor, list[list[int]], list[list[int]]]:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(n, vocab_size, generator=random, dtype=torch.float64) * 3
    prompts = [torch.randint(vocab_size, (7,), generator=random).tolist() for _ in range(n)]
    generated = [torch.randint(vocab_size, (12,), generator=random).tolist() for _ in range(n)]
    return logits, prompts, generated


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.8])
def test_repetition_is_what_transformers_computes(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, prompts, generated = random_rows()
    texts = torch.tensor([p + g for p, g in zip(prompts, generated, strict=True)])
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(texts, logits)
    in_prompt = torch.nn.functional.one_hot(torch.tensor(prompts), 40).sum(1).bool()
    counts = torch.nn.functional.one_hot(torch.tensor(generated), 40).sum(1)
    columns = (torch.full((5, 1), value, dtype=torch.float64) for value in (penalty, 0, 0))
    torch.testing.assert_close(apply_penalties(logits, in_prompt, counts, *columns), theirs)


@pytest.mark.parametrize("n", [0, 2, 3])
def test_minimum_length_is_what_transformers_computes(n):
    from transformers import MinNewTokensLengthLogitsProcessor

    logits, prompts, generated = random_rows(1)
    processor = LogitsProcessor(1, 40, "cpu")
    request = Request(prompts[0], 20, stop=frozenset({3, 17}), min_tokens=3)
    processor.set_row(0, request)
    theirs = MinNewTokensLengthLogitsProcessor(7, 3, [3, 17])(torch.tensor([prompts[0] + generated[0][:n]]), logits)
    ours = processor.process(logits, slice(0, 1), torch.tensor([n]))
    assert torch.equal(ours, theirs) and ours.isinf().any() == (n < 3)


def test_rows_without_penalties_keep_their_logits_bit_for_bit():
    """Beside rows that ask for all, and after one that did in the same row; NaN and infinities too."""
    processor = LogitsProcessor(3, 31, "cpu")
    for row, wish in ((0, WISHES[6]), (1, WISHES[6]), (2, WISHES[4]), (1, {})):
        processor.set_row(row, Request([1, 2], 5, **wish))
    processor.move_row(1, 2)
    logits = torch.randn(3, 31)
    logits[1:, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for _ in range(2):
        out = processor.process(logits, slice(0, 3), torch.zeros(3, dtype=torch.int64))
        assert torch.equal(out[1:].view(torch.int32), logits[1:].view(torch.int32))
        assert not torch.equal(out[0], logits[0])
        processor.count(slice(0, 3), torch.tensor([5, 5, 5]), torch.ones(3, dtype=torch.int64))


def test_without_penalties_nothing_is_computed_or_allocated(monkeypatch):
    monkeypatch.setattr(LogitsProcessor, "process", None)
    monkeypatch.setattr(LogitsProcessor, "count", None)
    decoder = Decoder(small_model("tinystar"), 2, 64)
    collect(decoder, [*requests_for(decoder.model, 4), Request([1], 3, min_tokens=2)])  # no token could end it
    assert not decoder.sampler.processor.tensors


def test_a_warm_up_before_a_capture_changes_no_text():
    """What a GPU does between two steps; the tensors that a graph reads stay where they are."""
    model = small_model("tinystar")
    requests = [replace(r, top_logprobs=2, logprobs=[]) for r in wishful_requests(model)[8:]]
    expected = collect(Decoder(model, 2, 64), requests)
    decoder = Decoder(model, 2, 64)
    step, launch, places = decoder.device_step, decoder.device_step.launch, set()

    def warm_up_and_launch(n, max_cached, filters):
        tensors = (*decoder.sampler.processor.tensors, *decoder.sampler.logprobs.tensors)
        places.add(tuple(tensor.data_ptr() for tensor in tensors))
        step.warm_up_sampling(n, max_cached, filters)
        launch(n, max_cached, filters)

    step.launch = warm_up_and_launch
    assert collect(decoder, requests) == expected and len(places) == 1 and len(places.pop()) == 11


@pytest.mark.parametrize(("wish", "message"), [
    ({"logit_bias": {31: 1}}, "logit_bias: token 31 is none of the 31"),
    ({"stop": frozenset({40})}, "stop_token_ids: token 40 is none of the 31"),
    ({"stop": frozenset(range(31)), "min_tokens": 1}, "every token"),
])  # fmt: skip
def test_token_ids_outside_the_vocabulary_are_refused(wish, message):
    decoder = Decoder(small_model("tinystar"), 1, 64)
    with pytest.raises(UserError, match=message):
        decoder.admit(Request([1], 5, **wish))
    assert decoder.free == 1


# ---- text ----------------------------------------------------------------------------------------------------------


def vllm_stop(pieces: list[str], stops: list[str], min_tokens: int) -> str:
    """vLLM's IncrementalDetokenizer, in a line for each of its rules: what has been generated before min_tokens is not
    searched, but a stop string may begin there."""
    text = ""
    for i, piece in enumerate(pieces, 1):
        checked_from = len(text)
        text += piece
        if i <= min_tokens:
            continue
        for stop in stops:
            if (at := text.find(stop, max(checked_from - len(stop) + 1, 0))) >= 0:
                return text[:at]
    return text


@pytest.mark.parametrize("min_tokens", range(9))
def test_stop_strings_count_only_after_min_tokens(min_tokens):
    for pieces in (list("abcabcab"), ["ab", "cab", "c", "abca", "bc"], list("aabbccaa")):
        for stops in (["bc"], ["abc"], ["ca", "bb"]):
            stop_filter, printed = StopStringFilter(stops), ""
            for i, piece in enumerate(pieces, 1):
                printed += stop_filter.push(piece, i == len(pieces), i > min_tokens)
                if stop_filter.found:
                    break
            assert printed == vllm_stop(pieces, stops, min_tokens)


def decode_request(tokens: list[int], **wish) -> tuple[str, str | None]:
    """(text, finish reason) of tokens that a request gets one by one."""
    encoder = encoders.train(["x"], 258)
    settings = sampling_command.Settings(length=len(tokens), **wish)
    request = make_request(settings, encoder, [1], None, 0)
    stream, printed = TextStream(encoder, request, settings.stop), ""
    for i, token in enumerate(tokens, 1):
        reason = "stop" if token in request.stop else "length" if i == len(tokens) else None
        printed += stream.push(token, reason)
        if stream.finish_reason:
            break
    return printed, stream.finish_reason


def test_eot_stop_tokens_and_stop_strings_end_a_text():
    eot, pad, letters = 256, 257, [97, 98, 99]
    assert decode_request([*letters, eot, 100]) == ("abc", "stop") == decode_request([*letters, pad, 100])
    assert decode_request([*letters, eot, pad, 100], ignore_eos=True) == ("abcd", "length")
    assert decode_request([*letters, eot, 100], stop_token_ids=[98]) == ("a", "stop")
    assert decode_request([*letters, eot, 98, 100], stop_token_ids=[100], ignore_eos=True) == ("abcb", "stop")
    assert decode_request([*letters, 97, 98], stop=["b"]) == ("a", "stop")
    assert decode_request([*letters, 97, 98], stop=["b"], min_tokens=2) == ("abca", "stop")


# ---- log probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows", "options"), [
    ("tinystar", 3, {}), ("strawberry", 8, {"batch_invariant": True}),
    pytest.param("batch scope", 2, {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_logprobs_are_those_of_the_models_own_distribution(name, rows, options):
    """Whatever the penalties, temperature and filters; of the rows that ask, and beside them the texts stay."""
    model = small_model(name)
    requests = [r for i, r in enumerate(wishful_requests(model)) if i % 3 != 2]
    asked = [replace(r, top_logprobs=i % 4 if i % 4 < 3 else None, logprobs=[]) for i, r in enumerate(requests)]
    texts = collect(Decoder(model, rows, 64, **options), asked)
    assert texts == collect(Decoder(model, rows, 64, **options), requests)
    for request, (tokens, _) in zip(asked, texts, strict=True):
        if request.top_logprobs is None:
            assert request.logprobs == []
            continue
        assert len(request.logprobs) == len(tokens)
        text = torch.tensor([request.prompt + tokens[:-1]])
        with torch.no_grad():
            logits = model(text)[0][0, len(request.prompt) - 1 :] if model.causal else torch.stack(
                [model(text[:, : len(request.prompt) + i])[0][0, -1] for i in range(len(tokens))])  # fmt: skip
        expected = logits.exp() / logits.exp().sum(-1, keepdim=True)
        for p, token, (logprob, top) in zip(expected, tokens, request.logprobs, strict=True):
            assert np.exp(logprob) == pytest.approx(p[token].item(), rel=1e-4)
            best = p.argsort(descending=True)[: request.top_logprobs].tolist()
            assert [place for place, _ in top] == best
            assert [np.exp(value) for _, value in top] == pytest.approx(p[best].tolist(), rel=1e-4)
