"""Rotary position embeddings (RoPE) and their scaling to longer contexts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.common import UserError
from strawberry.config import option
from strawberry.ops.common import to_accum_dtype
from strawberry.ops.triton.rope import NORM_EPS


def qk_rope_norm_plain(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_q: int, n_k: int, normed: bool
) -> tuple[Tensor, Tensor]:
    """`fused_qk_rope_norm`'s q and k in plain PyTorch."""
    results = []
    for x in qkv.split((n_q, n_k, n_k), dim=-1)[:2]:
        a, b = to_accum_dtype(x).unflatten(-1, (-1, 2 * cos.size(-1))).chunk(2, dim=-1)
        x = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
        results.append((F.rms_norm(x, x.shape[-1:], eps=NORM_EPS) if normed else x).flatten(2).to(qkv.dtype))
    return tuple(results)


def qk_rope_norm_backward_plain(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, *tables_normed) -> Tensor:
    """The gradient of qkv."""
    *tables, normed = tables_normed
    n_q, n_k = dq.size(-1), dk.size(-1)
    _, back = torch.func.vjp(lambda x: (*qk_rope_norm_plain(x, *tables, n_q, n_k, normed), x[..., n_q + n_k :]), qkv)
    return back((dq, dk, dv))[0]


@dataclass
class RopeScaling:
    """Rotary positions beyond the length that a model was trained for. The frequencies are fixed when the model is
    built."""

    type: str = option("none", "the method", choices=("none", "linear", "ntk", "yarn", "longrope"))
    factor: float | None = option(None, "new length / old; longrope: default block_size / original", low=1)
    original_max_position: int | None = option(None, "length trained for (yarn, longrope)", low=2)
    beta_fast: float = option(32.0, "yarn: pairs that turn more often than this in the old length stay", above=0)
    beta_slow: float = option(1.0, "yarn: pairs that turn less often than this are interpolated", above=0)
    attention_factor: float | None = option(None, "yarn, longrope: default as in the papers", above=0)
    short_factor: list[float] | None = option(None, "longrope: a divisor per pair, up to the old length", above=0)
    long_factor: list[float] | None = option(None, "longrope: a divisor per pair, beyond the old length", above=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        needed = {
            "linear": ["factor"],
            "ntk": ["factor"],
            "yarn": ["factor", "original_max_position"],
            "longrope": ["original_max_position", "short_factor", "long_factor"],
        }
        for name in needed.get(self.type, []):
            if getattr(self, name) is None:
                yield name, f"is needed by type {self.type!r}"


def rope_frequencies(dim: int, scaling: RopeScaling, block_size: int, base: float = 10000.0) -> tuple[Tensor, float]:
    """Radians per position of each rotary pair, (dim/2,) float64, and the attention factor, whose square multiplies the
    softmax scale."""
    pair = torch.arange(0, dim, 2, dtype=torch.float64)
    plain = base ** (-pair / dim)
    return ROPE_SCALINGS[scaling.type](plain, scaling, block_size, base)


def rope_unscaled(plain: Tensor, c: RopeScaling, block_size: int, base: float) -> tuple[Tensor, float]:
    return plain, 1.0


def rope_linear(plain: Tensor, c: RopeScaling, block_size: int, base: float) -> tuple[Tensor, float]:
    return plain / c.factor, 1.0  # position interpolation, arXiv 2306.15595


def rope_ntk(plain: Tensor, c: RopeScaling, block_size: int, base: float) -> tuple[Tensor, float]:
    dim = 2 * len(plain)
    wider = base * c.factor ** (dim / max(dim - 2, 1))  # arXiv 2309.00071, eq. 16
    return wider ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0


def rope_yarn(plain: Tensor, c: RopeScaling, block_size: int, base: float) -> tuple[Tensor, float]:
    """arXiv 2309.00071: a ramp, linear in the pair's index, between the pairs that are unchanged and the pairs that are
    interpolated. Its ends are rounded outwards, as in the authors' code and all published checkpoints."""
    dim = 2 * len(plain)

    def pair_that_turns(times: float) -> float:  # base^(−2i/dim) · length = 2π · times, solved for i
        return dim * math.log(c.original_max_position / (2 * math.pi * times)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(c.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(c.beta_slow)), dim - 1)
    index = torch.arange(len(plain), dtype=torch.float64)
    ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    default = 0.1 * math.log(c.factor) + 1  # eq. 22
    return plain * (1 - ramp) + plain / c.factor * ramp, c.attention_factor or default


def rope_longrope(plain: Tensor, c: RopeScaling, block_size: int, base: float) -> tuple[Tensor, float]:
    """arXiv 2402.13753: a divisor for each pair, from long_factor if block_size exceeds the original length, otherwise
    from short_factor. Raises UserError if the list's length is not the number of pairs."""
    divisors = c.long_factor if block_size > c.original_max_position else c.short_factor
    if len(divisors) != len(plain):
        raise UserError(f"rope_scaling has {len(divisors)} factors, heads have {len(plain)} rotary pairs; give as many")
    factor = c.factor or block_size / c.original_max_position
    default = math.sqrt(1 + math.log(factor) / math.log(c.original_max_position)) if factor > 1 else 1.0
    return plain / torch.tensor(divisors, dtype=torch.float64), c.attention_factor or default


ROPE_SCALINGS = {
    "none": rope_unscaled,
    "linear": rope_linear,
    "ntk": rope_ntk,
    "yarn": rope_yarn,
    "longrope": rope_longrope,
}


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs of x (B, T, H, d); a pair is channel i and channel i + d/2."""
    cos, sin = rope
    x1, x2 = to_accum_dtype(x).chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)
