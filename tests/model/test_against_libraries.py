"""model.py and the naive implementation against torch.nn and Hugging Face transformers.

Each test builds the library's module with random weights, renames those weights to ours, and compares outputs.
torch.nn works in float64 and must agree to 1e-9. transformers computes norms, softmax and rotary tables in float32
whatever the weights are, so there the bound is that of float32.
"""

import math
from dataclasses import replace

import pytest
import torch
from naive_others import (
    aft_attention,
    cross_attention,
    expert_attention,
    lam_mixer,
    latent_attention,
    naive_palm,
    naive_tinystar,
    naive_transformer,
    rope_frequencies,
    softmax_attention,
    visibility,
)
from torch import nn

import model as model_file
from strawberry.context import ForwardContext, Mode
from strawberry.ops.rope import RopeScaling
from strawberry.ops.rope import rope_frequencies as our_frequencies

pytestmark = pytest.mark.filterwarnings("ignore:.*nested.tensor:UserWarning")
EXACT = {"rtol": 1e-9, "atol": 1e-9}
FLOAT32 = {"rtol": 1e-5, "atol": 5e-5}


@pytest.fixture(autouse=True)
def set_seed():
    """The libraries initialize their weights at random."""
    torch.manual_seed(0)


def perturb(module, seed=0, scale=0.3):
    """Every parameter random, so that none of them is at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return module.double().eval()


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_tensor(vectors):
    return torch.stack([torch.from_numpy(v) for v in vectors])


def as_numpy(params):
    return {name: tensor.detach().double().numpy() for name, tensor in params.items()}


# ---- Rotary frequencies ----------------------------------------------------------------------------------------------


def library_frequencies(rope, max_position=256, head_dim=32, seq_len=None):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=max_position,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=None, seq_len=seq_len)
    return inv_freq.double(), factor


def check_frequencies(theirs, dim, scaling, block_size=256):
    naive, factor = rope_frequencies(dim, scaling, block_size)
    for ours in ((torch.from_numpy(naive), factor), model_frequencies(dim, scaling, block_size)):
        torch.testing.assert_close(ours[0], theirs[0], rtol=2e-6, atol=0)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-12)


def model_frequencies(dim, scaling, block_size):
    return our_frequencies(dim, RopeScaling(**scaling), block_size)


def test_linear_frequencies():
    theirs = library_frequencies({"rope_type": "linear", "factor": 4.0})
    check_frequencies(theirs, 32, {"type": "linear", "factor": 4.0})


def test_ntk_frequencies():
    # The library has the dynamic form only; at factor 1 it stretches the base by seq_len / max_position.
    theirs = library_frequencies({"rope_type": "dynamic", "factor": 1.0}, max_position=64, seq_len=256)
    check_frequencies(theirs, 32, {"type": "ntk", "factor": 4.0})


@pytest.mark.parametrize("head_dim", [8, 32, 128])
@pytest.mark.parametrize("extra", [{}, {"beta_fast": 16, "beta_slow": 2}, {"attention_factor": 1.5}])
@pytest.mark.parametrize("original", [64, 4096])
def test_yarn_frequencies(head_dim, extra, original):
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": original, **extra}
    theirs = library_frequencies(rope, 8 * original, head_dim)
    ours = {"type": "yarn", "factor": 8.0, "original_max_position": original, **extra}
    check_frequencies(theirs, head_dim, ours)


@pytest.mark.parametrize("block_size", [64, 65, 512])
def test_longrope_frequencies(block_size):
    short, long = [1 + i / 16 for i in range(16)], [1 + i for i in range(16)]
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    theirs = library_frequencies({**rope, "original_max_position_embeddings": 64}, block_size, seq_len=block_size)
    ours = {"type": "longrope", "short_factor": short, "long_factor": long, "original_max_position": 64}
    check_frequencies(theirs, 32, ours, block_size)


# ---- Llama: grouped-query attention, SwiGLU, RMS norm, rotary --------------------------------------------------------


def reverse_rotation(weight, d):
    """Rows of q or k for rotation by the negative angle: the second half of each head changes its sign."""
    sign = torch.ones(d, dtype=weight.dtype)
    sign[d // 2 :] = -1
    return weight * sign.repeat(weight.shape[0] // d)[:, None]


def llama_as_tinystar(n_kv_head, rope):
    """(library's model, our configuration, our parameters)"""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=n_kv_head,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    model = perturb(LlamaForCausalLM(config))
    cfg = {"n_layer": 2, "n_head": 4, "n_kv_head": n_kv_head, "n_embd": 32, "block_size": 64, "vocab_size": 50}
    cfg |= {"attention_type": "GQA", "norm_type": "RMSNorm", "ffn_type": "SwiGLU", "pos_encoding": "RoPE"}
    theirs = model.state_dict()
    ours = {"embed.weight": theirs["model.embed_tokens.weight"], "head.weight": theirs["lm_head.weight"]}
    ours["norm.weight"] = theirs["model.norm.weight"]
    for layer in range(2):
        a, b = f"blocks.{layer}.", f"model.layers.{layer}."
        for x, y in [("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"), ("ffn.w2", "mlp.down_proj")]:
            ours[f"{a}{x}.weight"] = theirs[f"{b}{y}.weight"]
        for x in "qkvo":
            weight = theirs[f"{b}self_attn.{x}_proj.weight"]
            ours[f"{a}attn.w{x}.weight"] = reverse_rotation(weight, 8) if x in "qk" else weight
        u_and_g = [theirs[f"{b}mlp.up_proj.weight"], theirs[f"{b}mlp.gate_proj.weight"]]
        ours[f"{a}ffn.w1.weight"] = torch.cat(u_and_g)
    return model, cfg, ours


def build_with_params(arch, cfg, params):
    """model.py's, in float64, with these parameters."""
    model = model_file.build({"arch": arch, **{k: v for k, v in cfg.items() if v is not None}}).double().eval()
    model.load_state_dict({k.replace("head.", "unembed."): v for k, v in params.items()})
    return model.requires_grad_(False)


YARN = {"factor": 4.0, "original_max_position": 16}
LONGROPE = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 5.0, 9.0], "original_max_position": 16}
SCALINGS = [None, {"type": "linear", "factor": 4.0}, {"type": "yarn", **YARN}, {"type": "longrope", **LONGROPE}]


@pytest.mark.slow
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_llama(n_kv_head, scaling):
    rope = {"rope_type": "default"}
    if scaling:  # with yarn and longrope the library multiplies cos and sin, we the softmax scale
        rope = {k.replace("position", "position_embeddings"): v for k, v in scaling.items() if k != "type"}
        rope["rope_type"] = scaling["type"]
    theirs, cfg, params = llama_as_tinystar(n_kv_head, rope)
    cfg["rope_scaling"] = scaling
    idx = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(idx).logits.double()
    torch.testing.assert_close(naive_tinystar(cfg, params, idx), expected, **FLOAT32)
    ours = build_with_params("tinystar", {**cfg, "n_ffn": 24, "tie_embeddings": False}, params)
    torch.testing.assert_close(ours(idx)[0], expected, **FLOAT32)


# ---- DeepSeek-V2: multi-head latent attention ------------------------------------------------------------------------


def interleaved_to_half_split(weight, start, width):
    """Rows start … start+width for RoPE of interleaved pairs (2i, 2i+1) -> ours, half-split, by the negative angle."""
    rows = weight[start : start + width]
    return torch.cat([weight[:start], rows[0::2], -rows[1::2], weight[start + width :]])


@pytest.mark.parametrize("yarn", [False, True])
def test_deepseek_latent_attention(yarn):
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

    d, rope_dim, kv_rank, n_head, T = 8, 4, 12, 4, 20
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn:  # mscale = mscale_all_dim: nothing in cos and sin, all of it in the softmax scale, as in the paper's code
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    config = DeepseekV2Config(
        hidden_size=32,
        num_attention_heads=n_head,
        q_lora_rank=None,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=d,
        qk_rope_head_dim=rope_dim,
        v_head_dim=d,
        max_position_embeddings=64,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    theirs = perturb(DeepseekV2Attention(config, layer_idx=0))
    w = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    wq = w["q_proj.weight"]
    for head in range(n_head):
        wq = interleaved_to_half_split(wq, head * (d + rope_dim) + d, rope_dim)
    ours = {
        "attn.wq.weight": wq,
        "attn.wkv_a.weight": interleaved_to_half_split(w["kv_a_proj_with_mqa.weight"], kv_rank, rope_dim),
        "attn.kv_norm.weight": w["kv_a_layernorm.weight"],
        "attn.wkv_b.weight": w["kv_b_proj.weight"],
        "attn.wo.weight": w["o_proj.weight"],
    }
    cfg = {"n_head": n_head, "n_embd": 32, "rope_dim": rope_dim, "kv_rank": kv_rank, "block_size": 64}
    cfg |= {"attention_type": "MHLA", "bias": False}
    cfg["rope_scaling"] = {"type": "yarn", **YARN} if yarn else None
    x = randn(T, 32)
    table = DeepseekV2RotaryEmbedding(config)(x[None], torch.arange(T)[None])
    mask = torch.full((1, 1, T, T), -math.inf, dtype=torch.float64).triu(1)
    with torch.no_grad():
        expected = theirs(x[None], attention_mask=mask, position_embeddings=table)[0][0]
    got = latent_attention(as_numpy(ours), "attn", cfg, list(x.numpy()), layer=0, causal=True)
    torch.testing.assert_close(as_tensor(got), expected, **FLOAT32)
    layer, ctx = attention_layer(cfg, ours, T)
    torch.testing.assert_close(layer(x[None], ctx, None)[0], expected, **FLOAT32)
    cache = layer.new_cache(1, T, "cpu", torch.float64)  # with a cache, attention is computed from the latents
    torch.testing.assert_close(layer(x[None], ctx, cache)[0], expected, **FLOAT32)


def attention_layer(cfg, params, T):
    """(model.py's attention with these parameters, the context of T tokens)"""
    cfg = {"arch": "transformer", "kind": "decoder", "pos_encoding": "None", "n_layer": 1, **cfg}
    model = model_file.build({k: v for k, v in cfg.items() if v is not None}).double().eval().requires_grad_(False)
    layer, pos = model.decoder.blocks[0].attn, torch.arange(T)[None]
    layer.load_state_dict({name.removeprefix("attn."): tensor for name, tensor in params.items()})
    return layer, ForwardContext(pos, rope=model.rope(pos))


# ---- torch.nn.MultiheadAttention and torch.nn.Transformer ------------------------------------------------------------


def attention_params(theirs, name, prefix=""):
    """nn.MultiheadAttention's parameters under our names."""
    ours = {}
    for kind in ("weight", "bias"):
        thirds = theirs[f"{prefix}in_proj_{kind}"].chunk(3)
        ours |= {f"{name}.w{x}.{kind}": third for x, third in zip("qkv", thirds, strict=True)}
        ours[f"{name}.wo.{kind}"] = theirs[f"{prefix}out_proj.{kind}"]
    return ours


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_padding", [0, 3])
def test_multihead_attention(causal, n_padding):
    T = 12
    theirs, x = perturb(nn.MultiheadAttention(32, 4, batch_first=True)), randn(T, 32)
    padding = torch.arange(T) >= T - n_padding
    mask = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    with torch.no_grad():
        expected = theirs(x[None], x[None], x[None], key_padding_mask=padding[None], attn_mask=mask)[0][0]
    cfg = {"n_head": 4, "n_embd": 32, "attention_type": "MHA", "block_size": T}
    params = attention_params(theirs.state_dict(), "attn")
    got = softmax_attention(as_numpy(params), "attn", cfg, list(x.numpy()), 0, causal, padding.tolist())
    torch.testing.assert_close(as_tensor(got), expected, **EXACT)
    layer, ctx = attention_layer(cfg, params, T)
    if not causal:  # a decoder needs no padding mask: padding comes last, and no earlier token attends to it
        ctx = replace(ctx, mode=Mode.ENCODE, padding_mask=padding[None])
    real = T - n_padding if causal else T
    torch.testing.assert_close(layer(x[None], ctx, None)[0, :real], expected[:real], **EXACT)


def test_cross_attention():
    theirs, x, memory = perturb(nn.MultiheadAttention(32, 4, batch_first=True)), randn(7, 32), randn(12, 32, seed=3)
    padding = torch.arange(12) >= 9
    with torch.no_grad():
        expected = theirs(x[None], memory[None], memory[None], key_padding_mask=padding[None])[0][0]
    params = as_numpy(attention_params(theirs.state_dict(), "cross"))
    cfg = {"n_head": 4, "n_embd": 32}
    got = cross_attention(params, "cross", cfg, list(x.numpy()), list(memory.numpy()), padding.tolist())
    torch.testing.assert_close(as_tensor(got), expected, **EXACT)


def transformer_as_ours(norm_position, activation):
    """(nn.Transformer, embedding, our configuration, our parameters)"""
    theirs = nn.Transformer(
        32, 4, 2, 2, 48, activation=activation, batch_first=True, norm_first=norm_position == "pre"
    )
    if norm_position == "post":  # the paper has no norm after the last block
        theirs.encoder.norm = theirs.decoder.norm = None
    theirs, embed = perturb(theirs), randn(50, 32, seed=5)
    w, ours = theirs.state_dict(), {"embed.weight": embed}
    for stack, attentions in [("encoder", ["attn"]), ("decoder", ["attn", "cross"])]:
        for layer in range(2):
            a, b = f"{stack}.blocks.{layer}.", f"{stack}.layers.{layer}."
            for x, y in zip(attentions, ["self_attn.", "multihead_attn."], strict=False):
                ours |= attention_params(w, a + x, b + y)
            for kind in ("weight", "bias"):
                for number in range(1, len(attentions) + 2):
                    ours[f"{a}norm{number}.{kind}"] = w[f"{b}norm{number}.{kind}"]
                for number in (1, 2):
                    ours[f"{a}ffn.w{number}.{kind}"] = w[f"{b}linear{number}.{kind}"]
        if norm_position == "pre":
            ours |= {f"{stack}.norm.{kind}": w[f"{stack}.norm.{kind}"] for kind in ("weight", "bias")}
    cfg = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "pad_id": 0}
    return theirs, embed, {**cfg, "norm_position": norm_position, "ffn_type": activation}, ours


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_transformer(norm_position, activation):
    theirs, embed, cfg, params = transformer_as_ours(norm_position, activation)
    generator = torch.Generator().manual_seed(6)
    idx, source = torch.randint(1, 50, (2, 9), generator=generator), torch.randint(1, 50, (2, 11), generator=generator)
    source[1, 8:] = 0  # padding
    angles = torch.arange(11)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32).double()
    positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

    def embedded(tokens):
        return math.sqrt(32) * embed[tokens] + positions[: tokens.shape[1]]

    padding = source == 0
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    masks = {"tgt_mask": mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    with torch.no_grad():
        expected = theirs(embedded(source), embedded(idx), **masks) @ embed.T
    torch.testing.assert_close(naive_transformer(cfg, params, idx, source), expected, **EXACT)
    ours = build_with_params("transformer", {**cfg, "vocab_size": 50, "n_ffn": 48}, params)
    torch.testing.assert_close(ours(idx, source=source)[0], expected, **EXACT)


# ---- The rest of the naive implementation, which no library has ------------------------------------------------------

C, V, T = 16, 20, 24
SIZES = {"n_layer": 2, "n_head": 4, "n_embd": C, "vocab_size": V, "block_size": T, "window": 5}
SHARED = {"attn.wq": (C, C), "attn.wo": (C, C), "norm1": (C,), "norm2": (C,)}
SHARED |= {"ffn.w1": (2 * C, C), "ffn.w2": (C, C)}
AFT = {"attn.aft.a": (T, 3), "attn.aft.b": (T, 3), "attn.aft.kernel": (4, 5)}
LATENT = {"attn.wq": (4 * 6, C), "attn.wkv_a": (6 + 2, C), "attn.kv_norm": (6,), "attn.wkv_b": (4 * 8, 6)}


def random_params(parts, prefix, whole):
    shapes = {f"{prefix}{layer}.{part}": shape for layer in range(2) for part, shape in parts.items()} | whole
    named = {name + ("" if ".aft." in name else ".weight"): shape for name, shape in shapes.items()}
    return {name: 0.5 * randn(*shape, seed=seed) for seed, (name, shape) in enumerate(named.items())}


def kv_shapes(n_kv_head):
    return {"attn.wk": (4 * n_kv_head, C), "attn.wv": (4 * n_kv_head, C)}


TINY = [
    ({"attention_type": "MHA", "pos_encoding": "Learned"}, SHARED | kv_shapes(4)),
    ({"attention_type": "GQA-SWA"}, SHARED | kv_shapes(2)),
    ({"attention_type": "MQA", "pos_encoding": "Sinusoidal"}, SHARED | kv_shapes(1)),
    ({"attention_type": "MHLA-SWA", "kv_rank": 6, "rope_dim": 2}, SHARED | LATENT),
    *[({"attention_type": "aft", "aft": kind}, SHARED | kv_shapes(4) | AFT) for kind in ("simple", "full")],
    *[({"attention_type": "aft", "aft": kind}, SHARED | kv_shapes(4) | AFT) for kind in ("local", "conv")],
    ({"attention_type": "lam"}, SHARED | kv_shapes(4)),
    ({"attention_type": "kv", "sparse": "longformer", "n_global": 2}, SHARED | kv_shapes(4)),
    ({"attention_type": "MHA", "sparse": "bigbird", "sparse_block": 4, "n_random": 2}, SHARED | kv_shapes(4)),
    (
        {"attention_type": "expert", "n_experts": 4, "a_experts": 2},
        SHARED | kv_shapes(4) | {"attn.router": (4, C)},
    ),
    (
        {"attention_type": "GQA", "a_ffn_experts": 2},
        SHARED | kv_shapes(2) | {"ffn.w1": (3, 8, C), "ffn.w2": (3, C, 4), "ffn.router": (3, C)},
    ),
]
WHOLE = {"embed": (V, C), "norm": (C,), "positions": (T, C)}
IDX = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(7))


def check_causal_and_batch_independent(run):
    """A prefix alone and a row alone have the same logits as in the whole batch."""
    logits = run(IDX)
    assert logits.shape == (2, T, V) and logits.isfinite().all() and logits.std() > 0.01
    torch.testing.assert_close(run(IDX[:, :13]), logits[:, :13], **EXACT)
    torch.testing.assert_close(run(IDX[1:]), logits[1:], **EXACT)
    changed = IDX.clone()
    changed[:, 9] = (changed[:, 9] + 1) % V
    assert (run(changed) - logits)[:, 10].abs().max() > 1e-6  # the past matters


@pytest.mark.slow
@pytest.mark.parametrize("options, parts", TINY)
def test_tinystar_is_causal(options, parts):
    params = random_params(parts, "blocks.", WHOLE)
    check_causal_and_batch_independent(lambda idx: naive_tinystar({**SIZES, **options}, params, idx))


PALM_PARTS = {"attn.w1": (24, C), "attn.w2.down": (3, 24), "attn.w2.up": (3 * C, 3), "attn.out": (2 * C, C)}
PALM_PARTS |= {"ffn.w1": (2 * C, C), "ffn.w2": (C, C)} | AFT
PALM_WHOLE = {"embed": (V, 3), "embed.up": (C, 3), "head.down": (3, C), "head.up": (V, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aft", "lam", "kv", "mha"])
@pytest.mark.parametrize("more", [{}, {"parallel": False, "r_layer": 2}, {"aft": "conv"}])
def test_palm_is_causal(kind, more):
    up = {"attn.w2.up": ((2 if kind == "kv" else 3) * C, 3)}
    params = random_params(PALM_PARTS | up, "blocks.", PALM_WHOLE)
    cfg = {**SIZES, "attention_type": kind, **more}
    check_causal_and_batch_independent(lambda idx: naive_palm(cfg, params, idx))


@pytest.mark.slow
@pytest.mark.parametrize("options, parts", TINY)
@pytest.mark.parametrize("adaptive", [False, True])
def test_transformer_decoder_is_causal(options, parts, adaptive):
    depth = {"decoder.depth": (3, C), "decoder.norm": (C,), "decoder.positions": (T, C), "embed": (V, C)}
    params = random_params(parts, "decoder.blocks.", depth)
    cfg = {"kind": "decoder", "norm_position": "pre", "norm_type": "RMSNorm", "ffn_type": "SwiGLU"}
    cfg |= {**SIZES, **options, "adaptive": adaptive, "recursions": 3 if adaptive else 1}
    check_causal_and_batch_independent(lambda idx: naive_transformer(cfg, params, idx))


def test_adaptive_depth_freezes_after_its_pass():
    """Depth forced to one pass for every token: one pass, stretched by N · q_1."""
    parts, whole = SHARED | kv_shapes(4), {"decoder.depth": (2, C), "embed": (V, C)}
    params = random_params(parts, "decoder.blocks.", whole)
    params["decoder.depth.weight"] *= 0  # q = 1/2: N · q_n = 1
    cfg = {**SIZES, "kind": "decoder", "norm_type": "RMSNorm", "ffn_type": "SwiGLU"}
    plain = naive_transformer(cfg, params, IDX)
    adaptive = {**cfg, "adaptive": True, "recursions": 2}
    torch.testing.assert_close(naive_transformer(adaptive, params, IDX), plain, **EXACT)
    params["decoder.depth.bias"] = torch.tensor([0.0, 1.0])
    twice = naive_transformer({**cfg, "recursions": 2}, params, IDX)
    torch.testing.assert_close(naive_transformer(adaptive, params, IDX), twice, **EXACT)
    assert (twice - plain).abs().max() > 1e-3


def test_a_source_of_padding_adds_nothing():
    _, _, cfg, params = transformer_as_ours("pre", "relu")
    idx = torch.arange(1, 8)[None]
    nothing = naive_transformer(cfg, params, idx, torch.zeros(1, 5, dtype=torch.int64))
    silent = {k: 0 * v if ".cross.wo." in k else v for k, v in params.items()}
    torch.testing.assert_close(nothing, naive_transformer(cfg, silent, idx, torch.ones(1, 5).long()), **EXACT)


def test_visibility_of_windows_and_sparse_patterns():
    sees = visibility({"block_size": 64}, 0, causal=True, window=3)
    assert [s for s in range(10) if sees(5, s, 0)] == [3, 4, 5]
    sees = visibility({"block_size": 64}, 0, causal=False, window=3)
    assert [s for s in range(10) if sees(5, s, 0)] == [3, 4, 5, 6, 7]
    cfg = {"block_size": 64, "sparse": "longformer", "window": 2, "n_global": 1}
    assert [s for s in range(10) if visibility(cfg, 0, causal=True)(5, s, 0)] == [0, 4, 5]
    cfg |= {"sparse": "bigbird", "sparse_block": 2, "drawn_blocks": lambda layer, head, block: [head] if block else []}
    assert [s for s in range(10) if visibility(cfg, 0, causal=True)(7, s, 1)] == [0, 2, 3, 6, 7]


def test_expert_attention_with_equal_weights_is_sliding_window_attention():
    """Router at zero: each weight n_experts · 1/n_experts = 1, so two experts of one window are one attention."""
    params = {f"attn.w{x}.weight": randn(C, C, seed=i).numpy() for i, x in enumerate("qkvo")}
    params["attn.router.weight"] = torch.zeros(2, C, dtype=torch.float64).numpy()
    cfg = {"n_head": 4, "n_embd": C, "block_size": 64, "n_experts": 2, "a_experts": 2, "windows": [5, 5]}
    h = list(randn(T, C).numpy())
    got = expert_attention(params, "attn", cfg, h, 0, causal=True)
    plain = softmax_attention(params, "attn", {**cfg, "attention_type": "MHA-SWA", "window": 5}, h, 0, causal=True)
    torch.testing.assert_close(as_tensor(got), as_tensor(plain), **EXACT)


def test_aft_simple_equals_its_cumulative_sums():
    """Against the two cumulative sums of the paper, written with torch."""
    params = {f"attn.w{x}.weight": randn(C, C, seed=i).numpy() for i, x in enumerate("qkvo")}
    cfg = {"n_head": 4, "n_embd": C, "block_size": 64, "attention_type": "aft"}
    x = randn(T, C)
    q, k, v, o = (torch.from_numpy(params[f"attn.w{n}.weight"]) for n in "qkvo")
    weights = (x @ k.T).exp()
    mean = (weights * (x @ v.T)).cumsum(0) / weights.cumsum(0)
    got = aft_attention(params, "attn", cfg, list(x.numpy()), 0, causal=True)
    torch.testing.assert_close(as_tensor(got), ((x @ q.T).sigmoid() * mean) @ o.T, **EXACT)


def test_lam_equals_its_cumulative_sums():
    """The formula with cumulative sums of v, k̂ and k̂ᵀ v."""
    q, k, v = (randn(T, 2, 8, seed=seed) for seed in range(3))
    got = lam_mixer(list(q.numpy()), list(k.numpy()), list(v.numpy()), visibility({}, 0, causal=True))
    qn, kn = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
    kv = torch.einsum("thi,thj->thij", kn, v).cumsum(0)
    above = v.cumsum(0) + torch.einsum("thi,thij->thj", qn, kv)
    below = torch.arange(1, T + 1)[:, None] + (qn * kn.cumsum(0)).sum(-1)
    torch.testing.assert_close(as_tensor(got), (above / below.clamp(min=1e-6)[..., None]).flatten(1), **EXACT)
