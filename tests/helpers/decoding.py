"""One small model of each family that generates text, requests to it, and the tokens that it generates."""

import functools
from dataclasses import replace

import pytest
import torch

from model import build
from strawberry.inference.engine import generate
from strawberry.inference.sampling import Request

SMALL = {"vocab_size": 31, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
MODELS = {
    "strawberry": {"n_qkv": 32, "retention_chunk": 16},
    "strawberry, experts, two passes": {"n_qkv": 32, "retention_chunk": 16, "n_experts": 2, "recursions": 2},
    "strawberry, adaptive": {"n_qkv": 32, "retention": "none", "recursions": 2, "adaptive": True},
    "strawberry, memory": {"n_qkv": 32, "retention_rule": "delta", "retention_chunk": 8, "memory_head": 8},
    "strawberry-v0": {"arch": "strawberry-v0", "n_qkv": 32, "compaction": True, "retention_chunk": 16, "aft": "conv"},
    "strawberry-silia": {"arch": "strawberry-silia", "n_qkv": 32},
    "palm": {"arch": "palm", "n_qkv": 32, "d_rank": 8},
    "palm, lam": {"arch": "palm", "n_qkv": 32, "attention_type": "lam"},
    "tinystar": {"arch": "tinystar"},
    "tinystar, learned": {"arch": "tinystar", "pos_encoding": "Learned", "attention_type": "MHA"},
    "tinystar, window": {"arch": "tinystar", "attention_type": "MQA-SWA", "window": 9},
    "tinystar, latent": {"arch": "tinystar", "attention_type": "MHLA"},
    "tinystar, speedrun": {"arch": "tinystar", "qk_norm": True, "ffn_type": "ReLU2", "logit_softcap": 15.0,
                           "skip_scalars": True, "value_embeddings": True},
    "transformer": {"arch": "transformer", "kind": "decoder", "sparse": "bigbird", "sparse_block": 4},
    "encoder-decoder": {"arch": "transformer", "pad_id": 0},
    "batch scope": {"n_qkv": 32, "retention_scope": "batch"},
}
every_model = pytest.mark.parametrize("name", MODELS)


def small_model(name: str, **more):
    """A model whose logits differ between positions and tokens; float64, so that rounding decides no sample."""
    torch.manual_seed(3)
    model = build(SMALL | MODELS[name] | more).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def requests_for(model, n: int) -> list[Request]:
    """Requests that differ in every parameter of a request."""
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 31, (1 + 5 * i % 23,), generator=random).tolist() for i in range(n)]
    wishes = [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.5}]
    sources = [torch.randint(0, 31, (2 + i,), generator=random).tolist() for i in range(n)]
    lengths = [32 if i == 4 else 4 + 7 * i % 20 for i in range(n)]  # the long one ends three chunks of 16 tokens
    return [
        Request(prompts[i], lengths[i], seed=i, source=sources[i] if model.takes_source else None,
                stop=frozenset({3} if i % 3 == 1 else ()), **wishes[i % len(wishes)])
        for i in range(n)
    ]  # fmt: skip


WISHES = [
    {"repetition_penalty": 1.7}, {"presence_penalty": 1.5}, {"frequency_penalty": -0.9}, {},
    {"logit_bias": {4: 3.5, 9: -100, 30: 1}}, {"min_tokens": 9, "stop": frozenset({3, 5})},
    {"repetition_penalty": 0.6, "presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {3: 5.0},
     "min_tokens": 3, "stop": frozenset({3})},
]  # fmt: skip


def wishful_requests(model) -> list[Request]:
    """Requests that differ in prompts, lengths, filters and seeds too; the even ones are greedy."""
    plain = requests_for(model, len(WISHES) * 2)
    return [replace(r, **{"stop": frozenset(), "temperature": i % 2, **WISHES[i // 2]}) for i, r in enumerate(plain)]


def by_generate(model, r: Request) -> list[int]:
    source = None if r.source is None else torch.tensor([r.source])
    new = model.generate(torch.tensor([r.prompt]), r.max_new_tokens, r.temperature, r.top_k, r.top_p, r.min_p, r.stop,
                         torch.Generator().manual_seed(r.seed), source)  # fmt: skip
    return new[0, len(r.prompt) :].tolist()


@functools.cache
def texts_by_generate(name: str, n: int) -> list[list[int]]:
    """The tokens that `generate` gives for requests_for(small_model(name), n)."""
    model = small_model(name)
    return [by_generate(model, request) for request in requests_for(model, n)]


def collect(decoder, requests) -> list[tuple[list[int], str]]:
    """(tokens, finish reason) of each request."""
    tokens, reasons = [[] for _ in requests], [None] * len(requests)
    for i, token, reason in generate(decoder, requests):
        assert reasons[i] is None
        tokens[i].append(token)
        reasons[i] = reason
    assert decoder.busy == 0
    return list(zip(tokens, reasons, strict=True))
