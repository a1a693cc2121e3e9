"""A tinystar as a class of transformers: its config.json and its tensors, under that class's names.

    layout = make_layout(model)        # raises UserError if no class computes the same

Our rotary positions turn (x1, x2) by −θ, transformers' by θ, and q·k is the same if both x2 change their sign: so the
rows of q and k that make the second half of a head are negated. DeepSeek-V2 pairs neighbours, not halves: its rows are
reordered too.

Index:  classes · which of them fits · configs · tensors
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import TinyStarConfig, default_ffn_width
from strawberry.common import UserError, show
from strawberry.config import join_problems
from strawberry.ops import rope_frequencies

Tensors = dict[str, Tensor]

# ---- classes ---------------------------------------------------------------------------------------------------------

FULL = ("MHA", "GQA", "MQA")
WINDOWED = ("MHA-SWA", "GQA-SWA", "MQA-SWA")
GELUS = ("GELU", "GELU_tanh")
ROPE_SCALINGS = ("none", "linear", "ntk", "yarn", "longrope")


class PublicClass(NamedTuple):
    """A class of transformers, and the options of tinystar that it can compute."""

    architecture: str
    model_type: str
    norm_type: str
    ffn_type: tuple[str, ...]
    attention_type: tuple[str, ...]
    pos_encoding: str = "RoPE"
    qk_norm: bool = False
    rope_scaling: tuple[str, ...] = ROPE_SCALINGS
    has_head_dim: bool = True  # otherwise heads have n_embd / n_head channels
    mlp: tuple[str, ...] = ("up_proj", "down_proj")  # names of u and the output's matrix
    extra: dict = {}  # noqa: RUF012 (read only)

    def mismatches(self, c: TinyStarConfig) -> Iterator[tuple[str, object, tuple]]:
        """(key, value, values that this class has) for each option that it cannot compute."""
        allowed = {
            "pos_encoding": (self.pos_encoding,), "norm_type": (self.norm_type,), "ffn_type": self.ffn_type,
            "attention_type": self.attention_type, "qk_norm": (self.qk_norm,),
            "n_qkv": (c.n_qkv if self.has_head_dim else c.n_embd,),
        }  # fmt: skip
        yield from ((key, getattr(c, key), values) for key, values in allowed.items() if getattr(c, key) not in values)
        if self.pos_encoding == "RoPE" and c.rope_scaling.type not in self.rope_scaling:
            yield "rope_scaling.type", c.rope_scaling.type, self.rope_scaling


CLASSES = (  # of two that are equally near, the first is named
    PublicClass("DeepseekV2ForCausalLM", "deepseek_v2", "RMSNorm", ("SwiGLU",), ("MHLA",),
                rope_scaling=("none", "linear", "ntk")),
    PublicClass("GPT2LMHeadModel", "gpt2", "LayerNorm", GELUS, FULL, "Learned", has_head_dim=False),
    PublicClass("LlamaForCausalLM", "llama", "RMSNorm", ("SwiGLU",), FULL),
    PublicClass("MistralForCausalLM", "mistral", "RMSNorm", ("SwiGLU",), WINDOWED),
    PublicClass("Qwen3ForCausalLM", "qwen3", "RMSNorm", ("SwiGLU",), FULL + WINDOWED, qk_norm=True),
    PublicClass("ArceeForCausalLM", "arcee", "RMSNorm", (*GELUS, "ReLU2"), FULL),
    PublicClass("Starcoder2ForCausalLM", "starcoder2", "LayerNorm", GELUS, FULL + WINDOWED, mlp=("c_fc", "c_proj"),
                has_head_dim=False, extra={"use_bias": True, "norm_epsilon": 1e-5}),
    PublicClass("StableLmForCausalLM", "stablelm", "LayerNorm", ("SwiGLU",), FULL, has_head_dim=False,
                extra={"partial_rotary_factor": 1.0, "layer_norm_eps": 1e-5, "use_qkv_bias": False}),
)  # fmt: skip
ACTIVATIONS = {"SwiGLU": "silu", "GELU": "gelu", "GELU_tanh": "gelu_pytorch_tanh", "ReLU2": "relu2"}

# ---- which of them fits ----------------------------------------------------------------------------------------------


def choose_class(c) -> PublicClass:
    """The class that computes what a model of this config computes. Raises UserError, which names every option in the
    way, if there is none."""
    if c.arch != "tinystar":
        raise UserError(f"arch = {show(c.arch)}: transformers has no class that computes it; export a tinystar")
    nearest = min(CLASSES, key=lambda public: len(list(public.mismatches(c))))
    problems = list(find_unknown_parts(c))
    for key, value, values in nearest.mismatches(c):
        mend = " or ".join(show(v) for v in values)
        problems.append(f"{key} = {show(value)}: transformers has no such class, and the nearest, "
                        f"{nearest.architecture}, has {mend}; train a model with that")  # fmt: skip
    if problems:
        raise UserError(join_problems(problems))
    return nearest


def find_unknown_parts(c: TinyStarConfig) -> Iterator[str]:
    """Parts that no class has, whatever the rest."""
    parts = {
        "logit_softcap": (None, "caps the logits of such a block"),
        "skip_scalars": (False, "mixes the embedding into the blocks"),
        "value_embeddings": (False, "adds a table to the values"),
        "n_ffn_experts": (1, "normalizes the router's input and its weights so"),
    }
    for key, (plain, what) in parts.items():
        if getattr(c, key) != plain:
            yield f"{key} = {show(getattr(c, key))}: no class of transformers {what}; train a model with {show(plain)}"
    if c.n_embd % c.n_head:
        yield (f"n_embd = {c.n_embd}: transformers wants a multiple of n_head, which is {c.n_head}; train a model with "
               f"{-(-c.n_embd // c.n_head) * c.n_head}")  # fmt: skip


# ---- configs ---------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """config.json, without the special tokens' ids, and the tensors."""

    config: dict
    tensors: Tensors


def make_layout(model: nn.Module) -> Layout:
    """The layout of a tinystar. Raises UserError as `choose_class`."""
    c = model.config
    public = choose_class(c)
    general = {
        "architectures": [public.architecture], "model_type": public.model_type, "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings, "torch_dtype": "float32",
    }  # fmt: skip
    if public.model_type == "gpt2":
        return Layout(general | gpt2_config(c), gpt2_tensors(model))
    config = general | rotary_config(c, public) | public.extra
    return Layout(config, rotary_tensors(model, public))


def ffn_width(c: TinyStarConfig) -> int:
    return c.n_ffn or default_ffn_width(c.ffn_type.lower(), c.n_embd)


def gpt2_config(c: TinyStarConfig) -> dict:
    return {
        "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head, "n_positions": c.block_size,
        "n_ctx": c.block_size, "n_inner": ffn_width(c), "layer_norm_epsilon": 1e-5, "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
        "activation_function": {"GELU": "gelu", "GELU_tanh": "gelu_new"}[c.ffn_type],
    }  # fmt: skip


def rotary_config(c: TinyStarConfig, public: PublicClass) -> dict:
    d = c.n_qkv // c.n_head
    config = {
        "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "num_key_value_heads": count_kv_heads(c), "intermediate_size": ffn_width(c),
        "hidden_act": ACTIVATIONS[c.ffn_type], "max_position_embeddings": c.block_size,
        "attention_dropout": c.dropout, "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    if public.model_type == "deepseek_v2":  # every layer is dense; the experts' sizes are those of none
        config |= {
            "kv_lora_rank": c.kv_rank, "q_lora_rank": None, "qk_nope_head_dim": d, "qk_rope_head_dim": c.rope_dim,
            "v_head_dim": d, "first_k_dense_replace": c.n_layer, "n_routed_experts": 1, "n_shared_experts": 1,
            "num_experts_per_tok": 1, "moe_intermediate_size": ffn_width(c),
        }  # fmt: skip
    elif public.has_head_dim:
        config["head_dim"] = d
    windowed = c.attention_type.endswith("-SWA")
    if windowed or public.model_type in ("mistral", "starcoder2"):
        config["sliding_window"] = c.window if windowed else None
    if public.model_type == "qwen3":
        config |= {"use_sliding_window": windowed, "max_window_layers": 0 if windowed else c.n_layer}
    return config | rope_config(c, c.rope_dim if public.model_type == "deepseek_v2" else d)


def count_kv_heads(c: TinyStarConfig) -> int:
    return {"GQA": c.n_kv_head, "MQA": 1}.get(c.attention_type.partition("-")[0], c.n_head)


def rope_config(c: TinyStarConfig, dim: int) -> dict:
    """rope_theta and rope_scaling, which transformers 4 reads and transformers 5 translates."""
    s, theta = c.rope_scaling, 10000.0
    if s.type == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    if s.type == "ntk":  # a larger base (arXiv 2309.00071, eq. 16)
        return {"rope_theta": theta * s.factor ** (dim / max(dim - 2, 1)), "rope_scaling": None}
    scaling = {"rope_type": s.type, "factor": s.factor}
    if s.type != "linear":
        scaling["original_max_position_embeddings"] = s.original_max_position
        scaling["attention_factor"] = rope_frequencies(dim, s, c.block_size)[1]
    if s.type == "yarn":
        scaling |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
    if s.type == "longrope":  # transformers chooses a list at each call; ours is fixed, so that both are the same
        divisors = s.long_factor if c.block_size > s.original_max_position else s.short_factor
        scaling |= {"short_factor": divisors, "long_factor": divisors}
        scaling["factor"] = s.factor or max(1.0, c.block_size / s.original_max_position)
    return {"rope_theta": theta, "rope_scaling": scaling}


# ---- tensors ---------------------------------------------------------------------------------------------------------


def gpt2_tensors(model: nn.Module) -> Tensors:
    """GPT-2's matrices are (in, out), and q, k and v are one of them; k and v of fewer heads are repeated."""
    c, found = model.config, {}
    group = c.n_head // count_kv_heads(c)
    for i, block in enumerate(model.blocks):
        attn, ffn = block.attn, block.ffn
        parts = [(attn.wq.weight, attn.wq.bias)]
        parts += [repeat_heads(part, c.n_qkv // c.n_head, group) for part in (attn.wk, attn.wv)]
        layers = {"ln_1": block.norm1, "ln_2": block.norm2, "attn.c_proj": attn.wo, "mlp.c_fc": ffn.w1,
                  "mlp.c_proj": ffn.w2}  # fmt: skip
        pairs = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
        pairs["attn.c_attn"] = tuple(torch.cat(tensors) for tensors in zip(*parts))
        for name, (weight, bias) in pairs.items():
            found[f"transformer.h.{i}.{name}.weight"] = weight.t() if weight.dim() == 2 else weight
            found[f"transformer.h.{i}.{name}.bias"] = bias
    found |= {"transformer.wte.weight": model.embed.weight, "transformer.wpe.weight": model.positions.weight}
    found |= {f"transformer.ln_f.{name}": p for name, p in model.norm.named_parameters()}
    return found | head_tensors(model)


def repeat_heads(layer: nn.Module, d: int, times: int) -> tuple[Tensor, Tensor]:
    return tuple(p.unflatten(0, (-1, d)).repeat_interleave(times, dim=0).flatten(0, 1)
                 for p in (layer.weight, layer.bias))  # fmt: skip


def head_tensors(model: nn.Module) -> Tensors:
    return {} if model.unembed is None else {"lm_head.weight": model.unembed.weight}


def rotary_tensors(model: nn.Module, public: PublicClass) -> Tensors:
    found = {"model.embed_tokens.weight": model.embed.weight}
    for i, block in enumerate(model.blocks):
        attention = latent_tensors if public.model_type == "deepseek_v2" else attention_tensors
        parts = {f"self_attn.{name}": t for name, t in attention(block.attn, model.config).items()}
        parts |= {f"mlp.{name}": t for name, t in mlp_tensors(block.ffn, public.mlp).items()}
        parts |= {f"input_layernorm.{name}": p for name, p in block.norm1.named_parameters()}
        parts |= {f"post_attention_layernorm.{name}": p for name, p in block.norm2.named_parameters()}
        found |= {f"model.layers.{i}.{name}": t for name, t in parts.items()}
    return found | {f"model.norm.{name}": p for name, p in model.norm.named_parameters()} | head_tensors(model)


def attention_tensors(attn: nn.Module, c: TinyStarConfig) -> Tensors:
    d, found = c.n_qkv // c.n_head, {}
    for name, layer in {"q": attn.wq, "k": attn.wk, "v": attn.wv, "o": attn.wo}.items():
        for kind, p in layer.named_parameters():
            found[f"{name}_proj.{kind}"] = negate_second_halves(p, d) if name in "qk" else p
    if c.qk_norm:  # without a scale, the norm of a head is the same before and after its rotation
        found |= {"q_norm.weight": torch.ones(d), "k_norm.weight": torch.ones(d)}
    return found


def negate_second_halves(p: Tensor, d: int) -> Tensor:
    first, second = p.unflatten(0, (-1, 2, d // 2)).unbind(dim=1)
    return torch.stack((first, -second), dim=1).flatten(0, 2)


def latent_tensors(attn: nn.Module, c: TinyStarConfig) -> Tensors:
    d, q, down = c.n_qkv // c.n_head, attn.wq.weight, attn.wkv_a.weight
    plain, rotary = q.unflatten(0, (c.n_head, -1)).split((d, c.rope_dim), dim=1)
    q = torch.cat((plain, torch.stack([interleave_halves(head) for head in rotary])), dim=1).flatten(0, 1)
    latent, k_rope = down.split((c.kv_rank, c.rope_dim))
    return {
        "q_proj.weight": q, "kv_a_proj_with_mqa.weight": torch.cat((latent, interleave_halves(k_rope))),
        "kv_a_layernorm.weight": attn.kv_norm.weight, "kv_b_proj.weight": attn.wkv_b.weight,
        "o_proj.weight": attn.wo.weight,
    }  # fmt: skip


def interleave_halves(p: Tensor) -> Tensor:
    """Rows x1 … xn, y1 … yn as x1, −y1, x2, −y2, …"""
    first, second = p.chunk(2)
    return torch.stack((first, -second), dim=1).flatten(0, 1)


def mlp_tensors(ffn: nn.Module, names: tuple[str, ...]) -> Tensors:
    up, down = names
    if ffn.activation == "swiglu":
        u, g = ffn.w1.weight.chunk(2)
        return {f"{up}.weight": u, "gate_proj.weight": g, f"{down}.weight": ffn.w2.weight}
    return {f"{name}.{kind}": p for name, layer in ((up, ffn.w1), (down, ffn.w2))
            for kind, p in layer.named_parameters()}  # fmt: skip
