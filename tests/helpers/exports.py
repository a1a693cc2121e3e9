"""Models of every class of transformers that export.py writes, encoders of every kind, and strings for them."""

import base64
import json
import random
from pathlib import Path

import torch
from tiktoken_ext.openai_public import r50k_pat_str

import encoder as encoders
from model import build

ROOT = Path(__file__).parents[2]
SIZES = {"arch": "tinystar", "vocab_size": 410, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
GPT2 = {"norm_type": "LayerNorm", "ffn_type": "GELU", "attention_type": "MHA", "pos_encoding": "Learned"}
YARN = {"type": "yarn", "factor": 2, "original_max_position": 16}
LONGROPE = {"type": "longrope", "original_max_position": 16, "short_factor": [1.0] * 4, "long_factor": [1, 2, 3, 4]}
EXPORTS = {  # name → (class in transformers, options)
    "v0.1": ("GPT2LMHeadModel", GPT2),
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"ffn_type": "GELU_tanh", "attention_type": "GQA", "n_ffn": 40,
                                        "tie_embeddings": False}),
    "v0.2": ("LlamaForCausalLM", {}),
    "v0.3": ("LlamaForCausalLM", {"attention_type": "MHA", "n_qkv": 64, "tie_embeddings": False}),
    "v0.4": ("LlamaForCausalLM", {"attention_type": "MQA"}),
    "linear": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 3}}),
    "longrope": ("LlamaForCausalLM", {"rope_scaling": LONGROPE}),
    "v0.5": ("DeepseekV2ForCausalLM", {"attention_type": "MHLA"}),
    "latent": ("DeepseekV2ForCausalLM", {"attention_type": "MHLA", "rope_dim": 6, "n_qkv": 64,
                                         "rope_scaling": {"type": "ntk", "factor": 4}}),
    "v0.6": ("ArceeForCausalLM", {"ffn_type": "GELU"}),
    "relu2": ("ArceeForCausalLM", {"ffn_type": "ReLU2"}),
    "v0.7": ("MistralForCausalLM", {"attention_type": "GQA-SWA"}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "rope_scaling": YARN}),
    "qwen3 window": ("Qwen3ForCausalLM", {"qk_norm": True, "attention_type": "MHA-SWA", "window": 5}),
    "starcoder2": ("Starcoder2ForCausalLM", {"norm_type": "LayerNorm", "ffn_type": "GELU_tanh",
                                             "attention_type": "MQA-SWA"}),
    "stablelm": ("StableLmForCausalLM", {"norm_type": "LayerNorm"}),
}  # fmt: skip


def perturbed(options, seed=0):
    """A model with every parameter random: none at a value, like one or zero, that hides a mistake."""
    torch.manual_seed(seed)
    model = build(SIZES | options).eval()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model


@torch.no_grad()
def greedy(model, idx, n):
    for _ in range(n):
        idx = torch.cat((idx, model(idx)[0][:, -1:].argmax(dim=-1)), dim=1)
    return idx


# ---- tokenizers ------------------------------------------------------------------------------------------------------

O200K = "|".join([  # tiktoken's, without the network
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
CHARACTERS = "abc XYZ\n\t\r09.é中🙂\u0301"


def make_encoders():
    """Trained here; of every pair of bytes, which shows each end of a piece; as p50k_base, a special among the ranks;
    as o200k_base, with unused ids below its specials; characters."""
    text = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "encoder.py"))
    trained = encoders.train([text], 400, ["<|x|>"])
    ranks = json.loads(trained.to_bytes())["ranks"]
    pairs = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    end = "<|endoftext|>"

    def published(pattern, ranks, **specials):
        return encoders.Encoder({"kind": "tiktoken", "name": "x", "pattern": pattern, "ranks": ranks,
                                 "specials": specials})  # fmt: skip

    return {
        "trained": trained,
        "pairs": published(encoders.GPT4_PATTERN, [base64.b64encode(pair).decode() for pair in pairs],
                           **{encoders.EOT: len(pairs), encoders.PAD: len(pairs) + 1}),
        "p50k": published(r50k_pat_str, [*ranks[:300], "", *ranks[300:]],
                          **{end: 300, encoders.EOT: 300, encoders.PAD: 402}),
        "o200k": published(O200K, ranks, **{end: 400, encoders.EOT: 400, encoders.PAD: 403}),
        "characters": encoders.from_characters(set(CHARACTERS)),
    }  # fmt: skip


def random_strings(seed, n):
    draw = random.Random(seed)
    kinds = ["abcXYZ 'sStTlLreVEdm", "0123456789 ", " \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000", "éàüßſK中文🙂e\u0301٣Ⅷ²",
             "<|eot|>{}[]()_-+*/\\\"'`#@!?.,;:"]  # fmt: skip
    words = ["hello", " world", "'s", "'LL", "\r\n", "   ", "<|eot|>", "<|x|>", "1234567", "\n\n \n"]

    def character():
        code = draw.randrange(0x110000)
        return chr(code) if not 0xD800 <= code < 0xE000 else "x"

    def piece():
        kind = draw.random()
        return draw.choice(draw.choice(kinds)) if kind < 0.7 else draw.choice(words) if kind < 0.9 else character()

    return ["", " ", "\n", *("".join(piece() for _ in range(draw.choice([1, 2, 5, 20, 100]))) for _ in range(n - 3))]


def strings_of(name):
    if name != "characters":
        return random_strings(name, 1000)
    draw = random.Random(0)
    return ["", *("".join(draw.choices(CHARACTERS, k=draw.randrange(40))) for _ in range(999))]
