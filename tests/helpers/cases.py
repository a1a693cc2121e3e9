"""One small model for each choice that an architecture's config declares: what the tests of models run over.

The cases come from the registry: for each architecture a small base, and one case for each choice, switch and
expert count that its config declares. A new architecture or option is tested without a line here, unless it is idle
without another (IDLE_ALONE) or needs companions (COMPANIONS).
"""

import functools

import pytest
import torch

from model import CONFIGS, LanguageModel, build
from strawberry.config import declared

SMALL = {"vocab_size": 29, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 16, "n_qkv": 32}
BASES = {
    "strawberry": {"r_layer": 2, "aft_ratio": 1, "retention_chunk": 16, "window": 7},
    "strawberry-silia": {},
    "strawberry-v0": {"window": 7, "retention_chunk": 16},
    "palm": {"d_rank": 8, "r_layer": 2, "window": 7},
    "tinystar": {"window": 7, "n_qkv": 16, "rope_dim": 2},
    "transformer": {"window": 7, "n_qkv": 16, "rope_dim": 2, "pad_id": 28, "sparse_block": 8},
}
COUNTS = {"n_experts": 4, "n_ffn_experts": 4, "recursions": 2, "logit_softcap": 5.0, "d_rank": None}
LONGROPE = {"type": "longrope", "original_max_position": 32, "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.5]}
# options that change nothing unless another is set too
IDLE_ALONE = {
    ("strawberry-v0", "compaction_scope"): {"compaction": True},
    ("transformer", "aft"): {"attention_type": "aft"},
    ("transformer", "n_experts"): {"attention_type": "expert"},
}
# cases that an option alone does not make
COMPANIONS = {
    "strawberry": [
        {"adaptive": True, "recursions": 3},
        {"adaptive": True, "recursions": 2, "retention": "none", "n_experts": 2},
        {"n_experts": 4, "a_experts": 2, "n_ffn_experts": 4, "a_ffn_experts": 2},
        {"n_experts": 2, "windows": [3, 40]},
        {"retention_scale": 1.0, "r_layer": 3},
        {"r_layer": 0},
        {"retention_chunk": 64},
        {"recursions": 2, "n_experts": 2},
        {"retention_rule": "delta", "memory_head": 8, "adaptive": True, "recursions": 2, "n_ffn_experts": 4},
        {"retention_rule": "delta", "memory_width": 24},
    ],
    "strawberry-silia": [
        {"attention_sink": False, "exclusive": False, "gated": False, "n_layer": 3},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position": 16}},
    ],
    "strawberry-v0": [
        {"compaction": True, "n_experts": 4, "a_experts": 2},
        {"aft": "conv", "compaction": True},
    ],
    "palm": [{"attention_type": "aft", "aft": "conv", "d_rank": None}],
    "tinystar": [
        {"norm_type": "LayerNorm", "ffn_type": "GELU", "attention_type": "MHA", "pos_encoding": "Learned"},
        {"norm_type": "LayerNorm", "ffn_type": "GELU_tanh", "attention_type": "MHLA"},
        {"qk_norm": True, "pos_encoding": "Learned"},
        {"value_embeddings": True, "n_layer": 3, "attention_type": "MHA"},
        {"qk_norm": True, "ffn_type": "ReLU2", "logit_softcap": 5.0, "tie_embeddings": False, "skip_scalars": True,
         "value_embeddings": True, "attention_type": "MQA-SWA"},
        {"attention_type": "MHLA", "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position": 32}},
        *({"rope_scaling": r} for r in (
            {"type": "linear", "factor": 2.0}, {"type": "ntk", "factor": 2.0},
            {"type": "yarn", "factor": 4.0, "original_max_position": 16}, LONGROPE,
            {**LONGROPE, "original_max_position": 128})),
    ],
    "transformer": [
        {"kind": "decoder", "norm_position": "pre", "norm_type": "RMSNorm", "attention_type": "GQA", "bias": False,
         "ffn_type": "swiglu", "pos_encoding": "RoPE",
         "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position": 32}},
        {"kind": "decoder", "adaptive": True, "recursions": 3, "norm_position": "pre"},
        {"adaptive": True, "recursions": 2},
        {"kind": "decoder", "attention_type": "expert", "n_experts": 2, "pos_encoding": "RoPE"},
        *({"kind": "encoder", "attention_type": a} for a in ("aft", "lam", "kv-SWA", "MHLA-SWA", "MHA-SWA")),
        *({"kind": "encoder", "attention_type": "aft", "aft": a} for a in ("full", "local", "conv")),
        *({"kind": k, "sparse": s, "n_global": 2, "n_random": 2} for k in ("decoder", "encoder")
          for s in ("longformer", "bigbird")),
    ],
}  # fmt: skip
def cases() -> dict[str, dict]:
    """Name → model_hyperparams."""
    found = {}
    for arch, config in CONFIGS.items():
        small = {key: value for key, value in SMALL.items() if key in declared(config)}
        base = {"arch": arch, **small, **BASES.get(arch, {})}
        variants = [{}, *COMPANIONS.get(arch, [])]
        for name, key in declared(config).items():
            if name == "arch":
                continue
            values = [value for value in key.choices if value != key.default]
            values += [not key.default] if isinstance(key.default, bool) else []
            values += [COUNTS[name]] if name in COUNTS else []
            needed = IDLE_ALONE.get((arch, name), {})
            variants += [{**needed, name: value} for value in values if (name, value) != ("adaptive", True)]
        for variant in variants:
            name = ",".join(f"{k}={v['type'] if isinstance(v, dict) else v}" for k, v in variant.items())
            found[f"{arch}({name})"] = {**base, **variant}
    return found


CASES = cases()
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def perturbed_model(case: str, dtype=torch.float64) -> LanguageModel:
    """The model in eval mode, every parameter perturbed, those that start at zero or one too, and routers' biases."""
    torch.manual_seed(0)
    model = build(CASES[case]).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for router in model.routers().values():
            router.bias.add_(0.1 * torch.randn_like(router.bias))
    return model.requires_grad_(False)


NOT_CAUSAL = {"retention_scope": "batch", "compaction_scope": "batch", "kind": "encoder"}
CAUSAL_CASES = [case for case, options in CASES.items() if not NOT_CAUSAL.items() & options.items()]
causal_cases = pytest.mark.parametrize("case", CAUSAL_CASES)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(28, (rows, length), generator=torch.Generator().manual_seed(seed))


def source_for(model: LanguageModel, rows: int) -> torch.Tensor | None:
    """Some source, its last row all padding and the one before ending in some."""
    if not model.takes_source:
        return None
    source = tokens(rows, 11, seed=9)
    source[-1] = model.config.pad_id
    source[-2, 6:] = model.config.pad_id
    return source


T = 3 * 16 + 5  # three chunks and a ragged end, beyond every window
