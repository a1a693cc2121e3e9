# ruff: noqa: F401
"""One module per operation: its signature, a plain PyTorch version that reads like the formula, and the choice of
implementation.

model.py calls operations as `ops.name` and does not depend on the implementation that they select. The fast versions
compute the same function as the plain ones, which run for float64, on the CPU and for small inputs.
"""

from strawberry.ops.activations import ACTIVATIONS, relu2, swiglu
from strawberry.ops.aft import aft_simple, new_state_cache
from strawberry.ops.aft_positional import ConvBias, LowRankBias, aft_positional, new_positional_cache
from strawberry.ops.attention import (
    attention,
    attention_with_sink,
    grouped_attention,
    prefill_attention,
    sdpa,
    sdpa_with_empty_rows,
)
from strawberry.ops.attention_residual import attention_residual, exclude_value
from strawberry.ops.chunks import build_per_chunk, chunked_linear
from strawberry.ops.cross_entropy import linear_cross_entropy, plain_cross_entropy
from strawberry.ops.flops import count_flops
from strawberry.ops.linear import embedding, linear, prepare_weights
from strawberry.ops.memory import MEMORY_CHUNK, delta_memory
from strawberry.ops.mlp import mlp, swiglu_mlp
from strawberry.ops.qkv import (
    fused_qkv_projection,
    no_transform,
    norm_channels,
    norm_heads,
    qkv_projection,
    rotary,
    rotary_qk_norm,
    split_qkv_apply_rope,
)
from strawberry.ops.retention import (
    BlockWeights,
    batch_retention_update,
    causal_retention_update,
    retention_update,
)
from strawberry.ops.rope import RopeScaling, apply_rope, rope_frequencies
from strawberry.ops.sampling import sample, uniform_numbers
