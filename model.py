"""Every architecture, in one file, read top to bottom. What each computes stands in its class; what a user may ask of
it stands in its Config.

Notation:  B rows · T tokens · S keys · V vocab_size · C n_embd · D n_qkv · H n_head · d = D / H · J chunks

Index:  helpers · products in 8 bits · rotary positions · where tokens stand, and what layers carry · who sees whom ·
        sums over chunks · mixers: softmax, AFT, LAM, expert attention · projections and feed-forward · attention ·
        positions · a stack · the head's loss · the language model · strawberry · strawberry-v0 · palm ·
        tinystar · transformer · registry, initialisation · the stack as text (python model.py --config x.json)

How it fits together: mixers mix q, k, v over time, projections make them, blocks wire, models stack. A mixer is a
module with

    prepare                                  how q and k must be readied before: see `ready`
    forward(q, k, v, x, at, state) -> y      all (B, T, ·); x is the normed input, which routers read; `at` says where
                                             the tokens stand; `state` is what was carried from earlier calls, None
                                             where the whole sequence is given at once
    new_state(batch, max_length, device, dtype) -> State | list | None
    flops(T) -> operations of its matrix products per token, windows and causality not discounted
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from options import UserError, check, load_run, nearest, option, run_cli
from strawberry.ops import float8
from strawberry.ops.attention import decode_attention
from strawberry.ops.float8 import quantize_fp8, transpose_fp8
from strawberry.ops.linear import int8_linear
from strawberry.ops.retention import gated_update, gated_update_backward
from strawberry.ops.triton import aft as aft_kernels
from strawberry.ops.triton import aft_positional as aft_positional_kernels
from strawberry.ops.triton import common as kernels
from strawberry.ops.triton import rope as rope_kernels
from strawberry.ops.triton.common import HALF_DTYPES
from strawberry.ops.triton.cross_entropy import fused_cross_entropy
from strawberry.ops.triton.retention import can_fuse_update

# ---- helpers -------------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without a learned scale."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def wide(x: Tensor) -> Tensor:
    """Float32 for the half types: sums, softmax and deviations are accumulated in it. float64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def full_precision(x: Tensor):
    """A context in which matrix products are not cast down by autocast."""
    return torch.autocast(x.device.type, enabled=False)


def std(w: Tensor, n: int, gain: Tensor | float = 1.0) -> Tensor:
    """Rescale each matrix (…, rows, columns) to standard deviation gain·n^(−1/2), unbiased, one number per matrix."""
    return w * (gain * n**-0.5 / (wide(w).std(dim=(-2, -1), keepdim=True) + 1e-8)).to(w.dtype)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def activation(x: Tensor) -> Tensor:
    """Under autocast, x in autocast's type: what flows from block to block then takes half the bytes, too."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Int8(NamedTuple):
    """A matrix (out, in) in 8 bits, with a float32 scale for each row; see `quantize`."""

    w: Tensor  # int8
    scale: Tensor  # (out,)

    def size(self, axis: int) -> int:
        return self.w.size(axis)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.w[index] * self.scale[index].unsqueeze(-1)).to(dtype)


def linear(x: Tensor, w: Tensor | Int8, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ b), W (out, in)."""
    if bias is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return linear(x, w) + bias  # the compiler joins the sum to what follows, and a product of one row, too
    if Float8.takes(x, w):
        y = Float8Product.apply(activation(x).flatten(0, -2), w).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias.to(y.dtype)
    return int8_linear(x, w.w, w.scale, bias) if isinstance(w, Int8) else F.linear(x, w, bias)


def linear_scan(decay: Tensor, x: Tensor) -> Tensor:
    """h_t = decay_t · h_{t−1} + x_t over axis 1, from h = 0. Work O(T), depth O(log T); no step sees a later one.

    Neighbours are folded into pairs, the half-length problem gives the odd steps, and those give the even ones.
    (B, T, ·) twice to (B, T, ·).
    """
    if x.size(1) == 1:
        return x
    even = x.size(1) // 2 * 2
    d0, d1, x0, x1 = decay[:, 0:even:2], decay[:, 1:even:2], x[:, 0:even:2], x[:, 1:even:2]
    odd = linear_scan(d1 * d0, d1 * x0 + x1)
    before = F.pad(odd, (0, 0, 1, -1))  # h just before each even step
    h = torch.stack((d0 * before + x0, odd), dim=2).flatten(1, 2)
    if even == x.size(1):
        return h
    return torch.cat((h, decay[:, even:] * h[:, -1:] + x[:, even:]), dim=1)


# ---- products in 8 bits --------------------------------------------------------------------------------------------


class Float8:
    """Whether training multiplies large matrices in 8 bits, which GPUs since Hopper and Ada do at twice the speed
    (arXiv 2209.05433). Weights, what flows between products, sums and updates keep their types.

    A number is scaled into the range of its 8-bit type, rounded, and what overflows is cut. What goes forward has 3
    bits of mantissa and numbers from 2⁻⁹ to 448, gradients 2 bits and 2⁻¹⁶ to 57,344, so that one scale does for all
    activations, which norms keep near 1, and one for all gradients of a mean over a batch's tokens: no pass is made
    to measure them. Matrices are few beside tokens and are measured.
    """

    FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
    X, GRADIENT, SLOPE = 2.0**2, 2.0**20, 2.0**15  # activations are cut at ± 112, gradients of the loss at ± 0.055
    WORTH = 512  # half the harmonic mean of rows and columns from which a product gains more than rounding costs

    on = False
    undo: dict[float, Tensor] = {}  # scale to 1 / scale, on the device

    @classmethod
    def use(cls, on: bool, device: torch.device) -> None:
        """Set it, for this process. A tensor that is there before a step needs no launch in it."""
        cls.on = on
        cls.undo = {scale: torch.tensor(1 / scale, device=device) for scale in (cls.X, cls.GRADIENT, cls.SLOPE)}

    @classmethod
    def takes(cls, x: Tensor, *matrices) -> bool:
        """Whether x Wᵀ is such a product: x (…, in), W (out, in); or f(x Wᵀ) W₂ᵀ such a pair. Not by Int8, nor by a
        matrix for each chunk."""
        if not (cls.on and torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type)):
            return False
        if not all(isinstance(w, Tensor) and w.dim() == 2 for w in matrices):
            return False
        sizes = [x.numel() // x.size(-1), *(n for w in matrices for n in w.shape)]
        return cls.large(*matrices[0].shape) and not any(n % 16 for n in sizes)

    @classmethod
    def large(cls, m: int, n: int) -> bool:
        return m * n >= cls.WORTH * (m + n)

    @classmethod
    def helps(cls, model: nn.Module) -> bool:
        """Whether a model has a matrix that is large enough, alone or as one of q's, k's and v's three."""
        return any(p.ndim == 2 and cls.large(3 * p.size(0), p.size(1)) for p in model.parameters())


def measured(w: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bits, its largest number near the end of their range, and the float32 scale that undoes it."""
    most = w.abs().amax().float().clamp(min=1e-12) / torch.finfo(Float8.FORWARD).max
    undo = torch.exp2(torch.log2(most).ceil())
    return quantize_fp8(w, (1 / undo).to(w.dtype), Float8.FORWARD), undo


def product_8(a: Tensor, b: Tensor, undo_a: Tensor, undo_b: Tensor, dtype: torch.dtype, quick: bool = False) -> Tensor:
    """a Bᵀ, (n, k) and (m, k) in 8 bits, both contiguous, since the units take no other order. `quick`: sums are kept
    in fewer bits than float32, which is enough for what goes forward."""
    return torch._scaled_mm(a, b.t(), scale_a=undo_a, scale_b=undo_b, out_dtype=dtype, use_fast_accum=quick)


class Float8Product(torch.autograd.Function):
    """x Wᵀ with both gradients, all three products in 8 bits: x (n, in) in a half type, W (out, in)."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        y, kept = Float8Product.made(x, w)
        ctx.save_for_backward(*kept)
        ctx.types = x.dtype, w.dtype
        return y

    @staticmethod
    def made(x: Tensor, w: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x Wᵀ, and what `back` wants of it. Both are transposed here and not on the way back: a compiler would make
        their bytes there once more, out of what they are made of."""
        x8, (w8, undo) = quantize_fp8(x, Float8.X, Float8.FORWARD), measured(w)
        y = product_8(x8, w8, Float8.undo[Float8.X], undo, x.dtype, quick=True)
        return y, (transpose_fp8(x8), transpose_fp8(w8), undo)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        g8 = quantize_fp8(grad, Float8.GRADIENT, Float8.BACKWARD)
        return Float8Product.back(g8, transpose_fp8(g8), *ctx.saved_tensors, ctx.types)

    @staticmethod
    def back(g8: Tensor, g_t: Tensor, x_t: Tensor, w_t: Tensor, undo: Tensor, types: tuple) -> tuple[Tensor, Tensor]:
        """Both gradients from that of x Wᵀ, in 8 bits, and the same transposed."""
        undo_g, undo_x = Float8.undo[Float8.GRADIENT], Float8.undo[Float8.X]
        dx = product_8(g8, w_t, undo_g, undo, types[0])
        return dx, product_8(g_t, x_t, undo_g, undo_x, types[1])


class Float8Joint(torch.autograd.Function):
    """x Wᵀ in three parts of these widths. Their gradients are joined on the way into 8 bits, without a pass for it."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, *widths: int) -> tuple[Tensor, ...]:
        y, kept = Float8Product.made(x, w)
        ctx.save_for_backward(*kept)
        ctx.types = x.dtype, w.dtype
        return y.split(widths, dim=1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        g8, g_t = float8.concat_quantize(grads, Float8.GRADIENT, Float8.BACKWARD)
        return *Float8Product.back(g8, g_t, *ctx.saved_tensors, ctx.types), None, None, None


class Float8Turned(torch.autograd.Function):
    """q, k and v of x Wᵀ, of these widths, q and k turned by `kernels.turn`: x (B, T, in). The gradients go through the
    turn on their way into 8 bits."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, widths: tuple, cos: Tensor, sin: Tensor, normed: bool) -> tuple:
        y, kept = Float8Product.made(x.flatten(0, 1), w)
        qkv = y.unflatten(0, x.shape[:2])
        ctx.save_for_backward(*kept, qkv if normed else None, cos, sin)
        ctx.types = x.dtype, w.dtype
        q, k = torch.ops.strawberry.qk_rope_norm(qkv, cos, sin, widths[0], widths[1], normed)
        return q, k, qkv[..., widths[0] + widths[1] :]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        *kept, qkv, cos, sin = ctx.saved_tensors
        g8, g_t = rope_kernels.qkv_grad_quantize(*grads, qkv, cos, sin, Float8.GRADIENT, Float8.BACKWARD)
        dx, dw = Float8Product.back(g8, g_t, *kept, ctx.types)
        return dx.unflatten(0, grads[0].shape[:2]), dw, None, None, None, None


class Float8FeedForward(torch.autograd.Function):
    """(f(h) W₂ᵀ, h), h = x W₁ᵀ, all six products in 8 bits; f(h) is not wanted otherwise and is made in 8 bits at once:
    x (n, in) in a half type, W₁ (hidden, in), W₂ (out, ·), f as `kernels.BENT` names it. `apart`: h is wanted, too;
    `alone`: x comes out of a kernel that a compiler adds nothing to, so that its bytes take a pass of their own."""

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w2: Tensor, kind: str, apart: bool, alone: bool) -> tuple[Tensor, Tensor]:
        if alone:
            x8, x_t = float8.act_quantize(x, "identity", Float8.X, Float8.FORWARD)
        else:
            x8 = quantize_fp8(x, Float8.X, Float8.FORWARD)
            x_t = transpose_fp8(x8)
        (first, undo_1), (second, undo_2) = measured(w1), measured(w2)
        h = product_8(x8, first, Float8.undo[Float8.X], undo_1, x.dtype, quick=True)
        y8, y_t = float8.act_quantize(h, kind, Float8.X, Float8.FORWARD)
        turned = transpose_fp8(first), transpose_fp8(second)
        ctx.save_for_backward(x_t, h, y_t, *turned, undo_1, undo_2)
        ctx.kind, ctx.types = kind, (x.dtype, w1.dtype, w2.dtype)
        if not apart:  # else a gradient of zeros would be made for it
            ctx.mark_non_differentiable(h)
        ctx.apart = apart
        return product_8(y8, second, Float8.undo[Float8.X], undo_2, x.dtype, quick=True), h

    @staticmethod
    def backward(ctx, grad: Tensor, more: Tensor | None) -> tuple:
        x_t, h, y_t, first_t, second_t, undo_1, undo_2 = ctx.saved_tensors
        undo_g, undo_x = Float8.undo[Float8.GRADIENT], Float8.undo[Float8.X]
        g8, g_t = float8.act_quantize(grad, "identity", Float8.GRADIENT, Float8.BACKWARD)
        dy = product_8(g8, second_t, undo_g, undo_2, ctx.types[0])
        dw2 = product_8(g_t, y_t, undo_g, undo_x, ctx.types[2])
        more = more if ctx.apart else None
        h8, h_t = float8.act_quantize_backward(h, dy, ctx.kind, Float8.GRADIENT, Float8.BACKWARD, more)
        dx = product_8(h8, first_t, undo_g, undo_1, ctx.types[0])
        return dx, product_8(h_t, x_t, undo_g, undo_x, ctx.types[1]), dw2, None, None, None


def feed_8(x: Tensor, w1: Tensor, w2: Tensor, kind: str, apart: bool = False, alone: bool = False) -> tuple:
    """(f(h) W₂ᵀ, h), h = x W₁ᵀ, where `Float8.takes(x, w1, w2)`: x (B, T, in)."""
    made = Float8FeedForward.apply(activation(x).flatten(0, -2), w1, w2, kind, apart, alone)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in made)


# ---- rotary positions ----------------------------------------------------------------------------------------------


@dataclass
class RopeScaling:
    """Rotary positions beyond the length that a model was trained for. What applies is fixed at build."""

    type: str = option("none", "the method", choices=("none", "linear", "ntk", "yarn", "longrope"))
    factor: float | None = option(None, "new length / old; longrope: default block_size / original", low=1)
    original_max_position: int | None = option(None, "length trained for (yarn, longrope)", low=2)
    beta_fast: float = option(32.0, "yarn: pairs that turn more often than this in the old length stay", above=0)
    beta_slow: float = option(1.0, "yarn: pairs that turn less often than this are interpolated", above=0)
    attention_factor: float | None = option(None, "yarn, longrope: default as in the papers", above=0)
    short_factor: list[float] | None = option(None, "longrope: a divisor per pair, up to the old length", above=0)
    long_factor: list[float] | None = option(None, "longrope: a divisor per pair, beyond the old length", above=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        needed = {"linear": ["factor"], "ntk": ["factor"], "yarn": ["factor", "original_max_position"],
                  "longrope": ["original_max_position", "short_factor", "long_factor"]}
        for name in needed.get(self.type, []):
            if getattr(self, name) is None:
                yield name, f"is needed by type {self.type!r}"


def rope_frequencies(dim: int, scaling: RopeScaling, block_size: int, base: float = 10000.0) -> tuple[Tensor, float]:
    """Radians per position of each rotary pair, (dim/2,) float64, and the attention factor, whose square multiplies the
    softmax scale."""
    pair = torch.arange(0, dim, 2, dtype=torch.float64)
    plain = base ** (-pair / dim)
    return ROPE_SCALINGS[scaling.type](plain, scaling, block_size, base)


def rope_plain(plain: Tensor, c: RopeScaling, block_size: int, base: float) -> tuple[Tensor, float]:
    return plain, 1.0


def rope_linear(plain: Tensor, c: RopeScaling, block_size: int, base: float) -> tuple[Tensor, float]:
    return plain / c.factor, 1.0  # position interpolation, arXiv 2306.15595


def rope_ntk(plain: Tensor, c: RopeScaling, block_size: int, base: float) -> tuple[Tensor, float]:
    dim = 2 * len(plain)
    wider = base * c.factor ** (dim / max(dim - 2, 1))  # arXiv 2309.00071, eq. 16
    return wider ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0


def rope_yarn(plain: Tensor, c: RopeScaling, block_size: int, base: float) -> tuple[Tensor, float]:
    """arXiv 2309.00071: between pairs that stay and pairs that are interpolated a ramp, linear in the pair's index, its
    ends rounded outwards, as the authors' code and all published checkpoints have it."""
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
    """arXiv 2402.13753: a divisor for each pair, from the long list where block_size exceeds the old length."""
    divisors = c.long_factor if block_size > c.original_max_position else c.short_factor
    if len(divisors) != len(plain):
        raise UserError(f"rope_scaling has {len(divisors)} factors, heads have {len(plain)} rotary pairs; give as many")
    factor = c.factor or block_size / c.original_max_position
    default = math.sqrt(1 + math.log(factor) / math.log(c.original_max_position)) if factor > 1 else 1.0
    return plain / torch.tensor(divisors, dtype=torch.float64), c.attention_factor or default


ROPE_SCALINGS = {
    "none": rope_plain,
    "linear": rope_linear,
    "ntk": rope_ntk,
    "yarn": rope_yarn,
    "longrope": rope_longrope,
}


class Rope(nn.Module):
    """Rotary positions (arXiv 2104.09864): the cosines and sines of given positions."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.exact = frequencies  # (d/2,) float64
        self.register_buffer("frequency", frequencies.float(), persistent=False)

    def _apply(self, fn, recurse=True):
        # bfloat16 frequencies would turn far positions by the wrong angle, and float64 ones made from float32 too:
        # whatever the model is cast to, they are made anew from the exact ones
        super()._apply(fn, recurse)
        dtype = torch.float64 if self.frequency.dtype == torch.float64 else torch.float32
        self.frequency = self.exact.to(self.frequency.device, dtype)
        return self

    def forward(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        angle = (pos.unsqueeze(-1) * self.frequency).unsqueeze(2)  # (B, T, 1, d/2)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the half-split pairs of x (B, T, H, d)."""
    cos, sin = rope
    x1, x2 = wide(x).chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)


# ---- where tokens stand, and what layers carry ---------------------------------------------------------------------


@dataclass
class At:
    """Where the tokens of one call stand: all that a layer may know besides q, k, v and x."""

    pos: Tensor  # (1, T) or (B, T), counted from each row's start
    rope: tuple[Tensor, Tensor] | None = None
    slot: int = 0  # tokens in each chunk of this call, where weights change from chunk to chunk
    count: Tensor | None = None  # (B,) how many of the tokens are real, the others being padding; None: all
    opened: bool = False  # whether all tokens lie in chunks that are open already
    start: int | None = None  # tokens that each row had before, where all have as many
    held: int = 2**62  # slots of a ring that may hold something from earlier calls, at most
    stepping: bool = False  # one token of each row, as `step` takes them
    active: Tensor | None = None  # (B, T) tokens whose depth reaches this pass; None: all
    causal: bool = True  # False in an encoder, where every token sees every other
    padding: Tensor | None = None  # (B, T) padding that nobody sees, in an encoder
    memory: Memory | None = None  # what the encoder made of the source
    masks: dict = field(default_factory=dict)

    def real(self) -> Tensor | None:
        """(B, T), False for padding after a row's last token; None when there is none."""
        if self.count is None:
            return None
        return torch.arange(self.pos.size(1), device=self.pos.device) < self.count.unsqueeze(1)

    def one(self, t: int) -> At:
        """Where the call's t-th token stands, for what goes on token by token."""
        count = None if self.count is None else (self.count > t).long()
        return At(self.pos[:, t : t + 1], count=count, held=self.held + t)

    def mask(self, view: View) -> Tensor | None:
        """Who sees whom in this call, (B, H or 1, T, T), made once for all layers; None for plain causal attention."""
        if self.causal and view.covers(self.pos.size(1)):
            return None
        if view.key not in self.masks:
            mask = view.sees(self.pos, self.pos, self.causal)
            if self.padding is not None:
                mask = mask & ~self.padding[:, None, None, :]
            self.masks[view.key] = mask
        return self.masks[view.key]

    def ring_mask(self, view: View, ring: Ring) -> Tensor | None:
        """Who sees whom of what `ring.extend` returns, made once for all layers; None where that is plain: causal among
        the first tokens, or one token that sees all."""
        if self.start == 0 or (self.start is not None and self.pos.size(1) == 1 and type(view) is View):
            return self.mask(view) if self.start == 0 else None
        key = (*view.key, ring.size)
        if key not in self.masks:
            self.masks[key] = view.sees(self.pos, ring.positions(self))
        return self.masks[key]

    def counted(self, u: Tensor) -> Tensor:
        """u (B, T, ·) for a sum over tokens: padding and frozen tokens stay out."""
        for mask in (self.real(), self.active):
            u = u if mask is None else u * mask.unsqueeze(-1)
        return u

    def moved(self, old: Tensor, new: Tensor) -> Tensor:
        """x after a step: frozen tokens keep theirs."""
        return new if self.active is None else torch.where(self.active.unsqueeze(-1), new, old)


class State:
    """What one layer carries from call to call: named tensors (B, …) and the values that they start from."""

    def __init__(self, batch: int, device, **tensors: tuple[tuple[int, ...], float, torch.dtype]):
        self.start = {name: value for name, (_, value, _) in tensors.items()}
        for name, (shape, value, dtype) in tensors.items():
            setattr(self, name, torch.full((batch, *shape), value, dtype=dtype, device=device))

    def reset(self, rows) -> None:
        for name, value in self.start.items():
            getattr(self, name)[rows] = value

    def part(self, rows: slice) -> State:
        """These rows alone, in the same memory."""
        mine = copy.copy(self)
        for name in self.start:
            setattr(mine, name, getattr(self, name)[rows])
        return mine

    def move(self, source: int, target: int) -> None:
        for name in self.start:
            getattr(self, name)[target] = getattr(self, name)[source]

    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.start)


class Ring(State):
    """The newest `size` tensors of each row, at slot `position % size`; one slot more takes what is dropped."""

    def __init__(self, batch: int, device, dtype, size: int, **widths: int):
        self.size, self.names = size, tuple(widths)
        super().__init__(batch, device, **{name: ((size + 1, width), 0.0, dtype) for name, width in widths.items()})

    def held(self, n: int) -> tuple[Tensor, ...]:
        """The first n slots, (B, n, ·) each."""
        return tuple(getattr(self, name)[:, : min(n, self.size)] for name in self.names)

    def positions(self, at: At) -> Tensor:
        """Positions of what `extend` returns, (B or 1, S), negative where a slot is empty."""
        if at.pos.size(1) == 1:
            newest = at.pos if at.count is None else at.pos + at.count.unsqueeze(1) - 1
            return self.in_slots(newest, at.held + 1)
        return torch.cat((self.in_slots(at.pos[:, :1] - 1, at.held), at.pos), dim=1)

    def in_slots(self, newest: Tensor, n: int) -> Tensor:
        """The position in each of the first n slots, where a row's newest is `newest` (B, 1)."""
        slot = torch.arange(min(n, self.size), device=newest.device)
        return newest - (newest - slot) % self.size

    def extend(self, at: At, *new: Tensor) -> tuple[Tensor, ...]:
        """Add the call's tensors (B, T, ·). Returns each with what was kept before it, (B, S, ·)."""
        if at.pos.size(1) == 1:  # the slot written to held the one that just left the window: the ring is what is seen
            self.write(at, new)
            return self.held(at.held + 1)
        if at.start == 0:
            self.write(at, new)
            return new
        both = tuple(torch.cat((o, n.to(o.dtype)), dim=1) for o, n in zip(self.held(at.held), new, strict=True))
        self.write(at, new)
        return both

    def write(self, at: At, new: tuple[Tensor, ...]) -> None:
        B, T = new[0].shape[:2]
        slot = at.pos % self.size
        if T > 1 or at.count is not None:  # what is padding, or pushed out by the call itself, goes to the last slot
            count = T if at.count is None else at.count.unsqueeze(1)
            index = torch.arange(T, device=slot.device)
            slot = torch.where((index < count) & (index >= count - self.size), slot, self.size)
        for name, tensor in zip(self.names, new, strict=True):
            mine = getattr(self, name)
            if slot.size(1) == 1:
                mine.index_put_((torch.arange(B, device=slot.device), slot.expand(B, 1).squeeze(1)),
                                tensor.squeeze(1).to(mine.dtype))  # fmt: skip
                continue
            mine.scatter_(1, slot.expand(B, T).unsqueeze(-1).expand_as(tensor), tensor.to(mine.dtype))


def states_in(tree) -> Iterator[State]:
    """Every State of a nested list."""
    if isinstance(tree, State):
        yield tree
    elif tree is not None:
        for branch in tree:
            yield from states_in(branch)


class Cache:
    """The states of all layers, and how many tokens each row has. Allocated once; its tensors never move.

    >>> cache = model.new_cache(batch_size=2, max_length=512)
    >>> logits, _ = model(prompt, cache=cache)      # the whole prompt, (2, T, V)
    >>> logits, _ = model(token, cache=cache)       # (2, 1): continues where it stands
    >>> cache.reset([1])                            # row 1 starts anew, row 0 goes on
    """

    def __init__(self, layers: list, batch_size: int, max_length: int, device, memory: Memory | None = None):
        self.layers, self.max_length, self.memory = layers, max_length, memory
        self.length = [0] * batch_size  # on the host too, so that no decision waits for the device
        self.pos = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def reset(self, rows) -> None:
        rows = [rows] if isinstance(rows, int) else [int(row) for row in rows]
        for row in rows:
            self.length[row] = 0
        self.pos[rows] = 0
        for state in states_in(self.layers):
            state.reset(rows)

    def part(self, rows: slice) -> Cache:
        """A cache of these rows alone, which shares this one's memory, but not `length`."""
        mine = Cache(part_of(self.layers, rows), 0, self.max_length, self.pos.device)
        mine.memory = None if self.memory is None else Memory(None, self.memory.padding[rows])
        mine.pos, mine.length = self.pos[rows], self.length[rows]
        return mine

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        for state in states_in(self.layers):
            state.move(source, target)
        for mine in (self.pos, self.length, *(() if self.memory is None else (self.memory.padding,))):
            mine[target] = mine[source]

    def advance(self, counts: list[int]) -> None:
        self.length = [n + c for n, c in zip(self.length, counts, strict=True)]
        self.pos += counts[0] if len(set(counts)) == 1 else torch.tensor(counts, device=self.pos.device)

    def nbytes(self) -> int:
        return sum(state.nbytes() for state in states_in(self.layers))


def part_of(tree, rows: slice):
    """The nested list with these rows of every State in it."""
    if tree is None or isinstance(tree, State):
        return tree and tree.part(rows)
    return type(tree)(part_of(branch, rows) for branch in tree)


# ---- who sees whom -------------------------------------------------------------------------------------------------


def pairs(q_pos: Tensor, k_pos: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (B, T) and (B, S), −1 where a slot is empty: shaped to compare, and whether s may be seen at all."""
    q_pos, k_pos = q_pos[:, None, :, None], k_pos[:, None, None, :]  # (B, 1, T, 1) and (B, 1, 1, S)
    return q_pos, k_pos, (k_pos >= 0) & (k_pos <= q_pos) if causal else k_pos >= 0


class View:
    """Attention to all, or to the newest `size` tokens, the token itself among them; in an encoder, to both sides."""

    def __init__(self, size: int | None = None):
        self.size = size
        self.key = ("window", size)

    def covers(self, T: int) -> bool:
        """Whether, for T tokens, it is plain causal attention."""
        return self.size is None or self.size >= T

    def kept(self, max_length: int) -> int:
        """How many of the newest keys a cache must hold."""
        return max_length if self.size is None else min(self.size, max_length)

    def sees(self, q_pos: Tensor, k_pos: Tensor, causal: bool = True) -> Tensor:
        """(B, T) and (B, S) positions to (B, H or 1, T, S)."""
        q_pos, k_pos, allowed = pairs(q_pos, k_pos, causal)
        return allowed if self.size is None else allowed & ((q_pos - k_pos).abs() < self.size)


class LongformerView(View):
    """A window, and the first n_global tokens as globals (arXiv 2004.05150), which see s ≤ t like all."""

    def __init__(self, size: int, n_global: int):
        super().__init__(size)
        self.n_global = n_global
        self.key = ("longformer", size, n_global)

    def kept(self, max_length: int) -> int:
        return max_length

    def sees(self, q_pos: Tensor, k_pos: Tensor, causal: bool = True) -> Tensor:
        q_pos, k_pos, allowed = pairs(q_pos, k_pos, causal)
        near = (q_pos - k_pos).abs() < self.size
        return allowed & (near | (k_pos < self.n_global) | (q_pos < self.n_global))


class BigBirdView(View):
    """Longformer's, and n_random blocks of tokens, drawn for each head and block of queries from the blocks before it
    (arXiv 2007.14062). The draw goes by (seed, layer, head, block) alone: a longer text changes nothing."""

    def __init__(self, c, layer: int):
        super().__init__(c.window)
        self.base, self.block, self.n_random = LongformerView(c.window, c.n_global), c.sparse_block, c.n_random
        self.seed, self.layer, self.n_head = c.sparse_seed, layer, c.n_head
        self.key = ("bigbird", layer)
        self.table = self.draw(-(-c.block_size // c.sparse_block))

    def draw(self, n: int) -> Tensor:
        """(H, n, n): whether a block of queries sees a block of keys by lot."""
        table = torch.zeros(self.n_head, n, n, dtype=torch.bool)
        for head in range(self.n_head):
            for b in range(n):
                lots = random.Random(f"{self.seed},{self.layer},{head},{b}")
                table[head, b, lots.sample(range(b), min(self.n_random, b))] = True
        return table

    def kept(self, max_length: int) -> int:
        return max_length

    def sees(self, q_pos: Tensor, k_pos: Tensor, causal: bool = True) -> Tensor:
        blocks = -(-max(q_pos.size(1), k_pos.size(1)) // self.block)
        if blocks > self.table.size(1):  # a text longer than block_size
            self.table = self.draw(blocks)
        self.table = table = self.table.to(q_pos.device)
        q, k = ((p.clamp(min=0) // self.block).clamp(max=table.size(1) - 1) for p in (q_pos, k_pos))
        lot = table[:, q.unsqueeze(-1), k.unsqueeze(-2)].transpose(0, 1)  # (B, H, T, S)
        return self.base.sees(q_pos, k_pos, causal) | (lot & (k_pos >= 0)[:, None, None, :])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ · scale + mask) v. q (B, T, H, d), k and v (B, S, Hkv, ·) to (B, T, H, ·); no mask: causal, T = S,
    or one query that sees all.

    SDPA's own causal mask is only right where queries and keys begin together, so a cache brings a mask.
    """
    B, T, H, kv = *q.shape[:3], k.size(2)
    if kv != H and T == 1 and (mask is None or mask.size(1) == 1):  # heads that share keys, as queries in a row
        q = q.reshape(B, kv, H // kv, -1).transpose(1, 2)
    elif kv != H:
        k, v = (x.repeat_interleave(H // kv, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, is_causal=mask is None and T > 1, scale=scale,
        dropout_p=dropout)  # fmt: skip
    return y.transpose(1, 2) if kv == H or T > 1 else y.reshape(B, T, H, -1)


def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, dropout: float = 0.0) -> Tensor:
    """`attend` where padding may leave a token nobody to see: it mixes to zero, where softmax alone would give NaN."""
    blind = ~mask.any(dim=-1, keepdim=True)  # (B, H or 1, T or 1, 1)
    y = attend(q, k, v, mask | blind, scale=scale, dropout=dropout)
    return y.masked_fill(blind.transpose(1, 2), 0.0)


def attend_whole(q: Tensor, k: Tensor, v: Tensor, view: View, at: At, *, scale: float, dropout: float) -> Tensor:
    """`attend` over a whole text by a view. The work of a window is by the window, not by T, where one of two ways
    serves: blocks that the compiler makes a kernel of, or bands."""
    T = q.size(1)
    if not at.causal:
        return attend_all(q, k, v, at.mask(view), scale=scale, dropout=dropout)
    if type(view) is View and not view.covers(T):
        if flexes(q, dropout):
            return attend_blocks(q, k, v, (view.size,), at, scale=scale)
        if 4 * max(view.size, BAND) <= T:
            return attend_bands(q, k, v, view.size, scale=scale, dropout=dropout)
    return attend(q, k, v, at.mask(view), scale=scale, dropout=dropout)


BAND = 64  # queries in a band, at least


def attend_bands(q: Tensor, k: Tensor, v: Tensor, window: int, *, scale: float, dropout: float = 0.0) -> Tensor:
    """Queries in bands of n ≥ window tokens, each of which attends to its own band of keys and the one before.

    q (B, T, H, d), k and v (B, T, Hkv, ·) to (B, T, H, ·). Work and memory are T · 2n.
    """
    T, n = q.size(1), max(window, BAND)
    first = attend(*(x[:, :n] for x in (q, k, v)), near_mask(n, 0, window, q.device), scale=scale, dropout=dropout)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -T % n)).unflatten(1, (-1, n)) for x in (q, k, v))  # (B, J, n, heads, ·)
    J = q.size(1)
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1) for x in (k, v))  # (B · (J − 1), 2n, heads, ·)
    rest = attend(q[:, 1:].flatten(0, 1), k, v, near_mask(n, n, window, q.device), scale=scale, dropout=dropout)
    return torch.cat((first, rest.unflatten(0, (-1, J - 1)).flatten(1, 2)), dim=1)[:, :T]


def near_mask(n: int, before: int, window: int, device) -> Tensor:
    """(1, 1, n, before + n): which of `before` earlier tokens and n own ones each of n tokens sees."""
    t, s = torch.arange(before, before + n, device=device), torch.arange(before + n, device=device)
    return View(window).sees(t[None], s[None])


def flexes(q: Tensor, dropout: float) -> bool:
    """Whether attention may go by blocks. Only under torch.compile, which makes one kernel of it: called as it is,
    FlexAttention takes T² work."""
    return (torch.compiler.is_compiling() and q.is_cuda and q.dtype != torch.float64 and dropout == 0
            and q.size(1) >= 256 and q.size(-1) >= 16)  # fmt: skip


# of heads of 64 numbers in half types, whose windows are some blocks long; FlexAttention's own are made for long ones
TILES = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64,
         "bwd_BLOCK_N2": 32, "num_warps": 4, "num_stages": 3}  # fmt: skip


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, windows: tuple[int, ...], at: At, *, scale: float) -> Tensor:
    """FlexAttention (arXiv 2412.05496) where each head sees the newest `windows[h]` tokens; one number is for all.

    q (B, T, H, d), k and v (B, T, Hkv, ·) to (B, T, H, ·). Blocks of 128 keys that no query of a block sees are not
    read; which they are is made once for all layers.
    """
    T, grouped = q.size(1), k.size(2) != q.size(2)
    key = ("blocks", windows)
    if key not in at.masks:
        at.masks[key] = blocks_near(T, windows, q.device)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # cast first: the other way round it would be a copy
    mask = BlockMask((T, T), *at.masks[key][1:], (128, 128), near(at.masks[key][0]))
    tiles = TILES if q.size(-1) == v.size(-1) == 64 and dtype.itemsize == 2 else None
    y = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=tiles)
    return y.transpose(1, 2)


def near(window: Tensor) -> Callable:
    """FlexAttention's mask for windows (H,), or (1,) for all heads."""
    if len(window) == 1:
        return lambda b, h, t, s: (s <= t) & (t - s < window[0])
    return lambda b, h, t, s: (s <= t) & (t - s < window[h])


def blocks_near(T: int, windows: tuple[int, ...], device, n: int = 128) -> tuple[Tensor, ...]:
    """Windows (H,) and BlockMask's tables: for each block of n queries how many blocks of keys it sees in part, which,
    how many whole, which; and the same for each block of keys. (1, H, J) and (1, H, J, J), by arithmetic alone."""
    J = -(-T // n)
    runs = itertools.groupby(windows)
    window = torch.cat([torch.full((len(list(run)),), w, dtype=torch.int32, device=device) for w, run in runs])
    w, i = window[:, None], torch.arange(J, dtype=torch.int32, device=device)
    ragged = 1 if T % n else 0  # the last block of queries has tokens that are not there: it sees no block whole
    first, whole = (i * n - w + 1).clamp(min=0) // n, ((i * n + 2 * n - 1 - w).clamp(min=0) // n).minimum(i)
    whole = torch.where(i < J - ragged, whole, i)  # first … whole − 1 and i in part, whole … i − 1 whole
    last, end = ((i * n + n + w - 2) // n).clamp(max=J - 1), (i + w // n - 1).clamp(max=J - 1 - ragged).maximum(i)
    tables = (
        *table(whole - first + 1, torch.where(i < (whole - first)[..., None], first[..., None] + i, i[:, None])),
        *table(i - whole, whole[..., None] + i),
        *table(last - end + 1, torch.where(i > 0, end[..., None] + i, i[:, None])),  # its own, end + 1 … last
        *table(end - i, (i[:, None] + 1 + i).expand(len(window), J, J)),
    )
    return window, *tables


def table(count: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(H, J) and (H, J, J) as BlockMask has them; what lies behind `count` is not read, but must be a block."""
    return count[None].contiguous(), index.clamp(max=index.size(-1) - 1)[None].contiguous()


# How a family readies q and k (B, T, ·) for its mixers: (q, k, at) -> (q, k)


def ready(qkv: Tensor | Sequence[Tensor], widths: Sequence[int], mixer: nn.Module, at: At) -> tuple[Tensor, ...]:
    """q, k and v as the mixer reads them. qkv is their joint product (B, T, Σ widths), or one tensor for each width;
    with two widths, k's and v's, q is k."""
    prepare = mixer.prepare
    if isinstance(qkv, Tensor):
        if prepare in TURNED and rope_kernels.can_fuse_rope(qkv, tuple(widths), at.rope[0]):
            return rope_kernels.fused_qk_rope_norm(qkv, tuple(widths), *at.rope, normed=TURNED[prepare])
        qkv = qkv.split(widths, dim=-1)
    *q, k, v = qkv
    return *prepare(q[0] if q else k, k, at), v


def joint(x: Tensor, w: Tensor | Int8 | Scaled | ByChunk, widths: Sequence[int], mixer: nn.Module, at: At) -> Sequence:
    """q, k and v as the mixer reads them, out of one product x Wᵀ, W (Σ widths, in); in 8 bits the gradients, too, are
    made one in them."""
    whole = matrix(w) if Float8.on else w
    if len(widths) == 3 and Float8.takes(x, whole):
        x = activation(x)
        if mixer.prepare in TURNED and rope_kernels.can_fuse_rope(x, tuple(widths), at.rope[0]):
            return Float8Turned.apply(x, whole, tuple(widths), *at.rope, TURNED[mixer.prepare])
        if not any(n % 64 for n in widths):
            parts = Float8Joint.apply(x.flatten(0, -2), whole, *widths)
            return ready([part.unflatten(0, x.shape[:-1]) for part in parts], widths, mixer, at)
    return ready(project(x, whole, at), widths, mixer, at)


def as_is(q: Tensor, k: Tensor, at: At) -> tuple[Tensor, Tensor]:
    return q, k


def channel_norm(q: Tensor, k: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """`norm` over all D channels, for AFT, in the types that q and k come in: autocast on a GPU would widen them, and
    AFT, which is limited by the bytes it reads, would read twice as many."""
    return norm(q).to(q.dtype), norm(k).to(k.dtype)


def rotary(q: Tensor, k: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """Rotary positions per head."""
    q, k = turned(q, k, at)
    return q.flatten(2), k.flatten(2)


def rotary_qk_norm(q: Tensor, k: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """Rotary positions, then `norm`, per head."""
    q, k = turned(q, k, at)
    return norm(q).flatten(2), norm(k).flatten(2)


def turned(q: Tensor, k: Tensor, at: At) -> Sequence[Tensor]:
    """q and k turned, (B, T, H, d); in a step both at once, whose launches cost more than the copy."""
    q, k = (x.unflatten(-1, (-1, 2 * at.rope[0].size(-1))) for x in (q, k))
    if at.stepping and q.shape == k.shape:
        return rotate(torch.stack((q, k)), at.rope).unbind()
    return rotate(q, at.rope), rotate(k, at.rope)


TURNED = {rotary: False, rotary_qk_norm: True}  # what kernels.turn makes, too: whether with the norm


# ---- sums over chunks ----------------------------------------------------------------------------------------------


def to_chunks(x: Tensor, slot: int) -> Tensor:
    """(B, T, ·) to (B, J, slot, ·), zeros after the last token."""
    if x.size(1) % slot:  # else a view: to pad by nothing would be a copy
        x = F.pad(x, (0, 0, 0, -x.size(1) % slot))
    return x.unflatten(1, (-1, slot))


class Scaled(NamedTuple):
    """scale · raw: a matrix whose rescaling is left to what it is used by, so that no pass is made for it."""

    raw: Tensor  # (out, in), or one for each of some chunks of each row, (B, n, out, in)
    scale: Tensor  # (), or (B, n, 1, 1); float32 or wider


class ByChunk(NamedTuple):
    """A matrix for each chunk of each row of a whole text. The first chunk's is the same in all rows."""

    first: Scaled
    later: Scaled


def project(x: Tensor, w: Tensor | Int8 | Scaled | ByChunk, at: At) -> Tensor:
    """x (B, T, in) through w (out, in), or through the w of each token's chunk: (B, J, out, in), or ByChunk."""
    if isinstance(w, ByChunk):
        (first, one), (later, scale) = w
        scale = torch.cat((one.expand(len(x), 1, 1, 1), scale), dim=1)
        x = (to_chunks(x, at.slot) * scale).flatten(1, 2)[:, : x.size(1)].to(later.dtype)
        return ChunkProduct.apply(x, first.to(later.dtype), later, at.slot)
    w = matrix(w)
    if isinstance(w, Int8) or w.dim() == 2:
        return linear(x, w)
    y = to_chunks(x, at.slot) @ w.mT.to(x.dtype)  # (B, J, slot, out)
    return y.flatten(1, 2)[:, : x.size(1)]


def matrix(w: Tensor | Int8 | Scaled | ByChunk) -> Tensor | Int8 | ByChunk:
    """What is scaled, multiplied: for many tokens, the gradient of the scale is cheaper from it than from them."""
    return w.raw * w.scale if isinstance(w, Scaled) else w


class ChunkProduct(torch.autograd.Function):
    """x (B, T, in) through first (out, in) in the first chunk, later (B, J − 1, out, in) in the others. Where to copy
    tokens costs more than to launch several products, the products read and write parts of the whole."""

    @staticmethod
    def forward(ctx, x: Tensor, first: Tensor, later: Tensor, slot: int) -> Tensor:
        ctx.save_for_backward(x, first, later)
        ctx.slot = slot
        with full_precision(x):
            return (chunk_product if in_parts(x) else chunk_product_plain)(x, first, later, slot)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, first, later = ctx.saved_tensors
        gradients = chunk_gradients if in_parts(x) else chunk_gradients_plain
        with full_precision(x):
            return *gradients(grad, x, first, later, ctx.slot), None


def in_parts(x: Tensor) -> bool:
    return x.is_cuda and x.numel() >= 2**21


def chunk_product_plain(x: Tensor, first: Tensor, later: Tensor, slot: int) -> Tensor:
    y = to_chunks(x, slot) @ side_by_side(first, later).mT
    return y.flatten(1, 2)[:, : x.size(1)]


def chunk_gradients_plain(grad: Tensor, x: Tensor, first: Tensor, later: Tensor, slot: int) -> tuple[Tensor, ...]:
    dx = chunk_product_plain(grad, first.mT, later.mT, slot)
    dw = to_chunks(grad, slot).mT @ to_chunks(x, slot)
    return dx, wide(dw[:, 0]).sum(dim=0).to(first.dtype), dw[:, 1:]


def side_by_side(first: Tensor, later: Tensor) -> Tensor:
    """(B, J, ·, ·)"""
    return torch.cat((first.expand(len(later), 1, -1, -1), later), dim=1)


def chunk_batches(slot: int, T: int, tokens: Sequence[Tensor], matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The chunks after the first, as few batches as can be taken without a copy: tokens (B, T, ·) to (n, slot, ·) and
    matrices (B, J − 1, ·, ·) to (n, ·, ·), of one chunk in all rows or of one row's whole chunks."""
    B, later = matrices[0].shape[:2]
    whole = T // slot - 1 if later > B else 0  # chunks that are taken row by row
    for b in range(B if whole else 0):
        rows = [x[b, slot : (whole + 1) * slot].unflatten(0, (whole, slot)) for x in tokens]
        yield [*rows, *(w[b, :whole] for w in matrices)]
    for j in range(whole, later):
        yield [*(x[:, (j + 1) * slot : (j + 2) * slot] for x in tokens), *(w[:, j] for w in matrices)]


@torch.library.custom_op("strawberry::chunk_product", mutates_args=())
def chunk_product(x: Tensor, first: Tensor, later: Tensor, slot: int) -> Tensor:
    y = x.new_empty(*x.shape[:2], len(first))
    torch.bmm(x[:, :slot], first.mT.expand(len(x), -1, -1), out=y[:, :slot])
    for part, result, w in chunk_batches(slot, x.size(1), (x, y), (later,)):
        torch.bmm(part, w.mT, out=result)
    return y


@chunk_product.register_fake
def _(x, first, later, slot):
    return x.new_empty(*x.shape[:2], len(first))


@torch.library.custom_op("strawberry::chunk_gradients", mutates_args=())
def chunk_gradients(
    grad: Tensor, x: Tensor, first: Tensor, later: Tensor, slot: int
) -> tuple[Tensor, Tensor, Tensor]:
    dx = chunk_product(grad, first.mT, later.mT, slot)
    d_first = torch.bmm(grad[:, :slot].mT, x[:, :slot])
    d_first = d_first.sum(dim=0, dtype=wide(d_first[:0]).dtype).to(first.dtype)
    d_later = later.new_empty(later.shape)
    for g, part, result in chunk_batches(slot, x.size(1), (grad, x), (d_later,)):
        torch.bmm(g.mT, part, out=result)
    return dx, d_first, d_later


@chunk_gradients.register_fake
def _(grad, x, first, later, slot):
    return x.new_empty(x.shape), first.new_empty(first.shape), later.new_empty(later.shape)


class ChunkState(State):
    """For one use of `by_chunks`: Σ uᵀ v over finished chunks and over the open one, and what was made for that one."""

    def __init__(self, batch: int, device, dtype, C: int, shapes: list[tuple[int, ...]]):
        self.names = [f"made{i}" for i in range(len(shapes))]
        tensors = {name: (shape, 0.0, dtype) for name, shape in zip(self.names, shapes, strict=True)}
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        square = ((C, C), 0.0, dtype)
        super().__init__(batch, device, finished=square, partial=square, **tensors)

    def open(self, rows, make: Callable) -> list[Tensor]:
        """These rows stand at a border: their open chunk is finished, the next one's tensors are made and kept. A
        second call changes nothing."""
        self.finished[rows] += self.partial[rows]
        self.partial[rows] = 0.0
        made = make(self.finished[rows].unsqueeze(1))
        for name, new in zip(self.names, made, strict=True):
            getattr(self, name)[rows] = new.squeeze(1).to(getattr(self, name).dtype)
        return self.made(rows)

    def made(self, rows=slice(None)) -> list[Tensor]:
        return [getattr(self, name)[rows].unsqueeze(1) for name in self.names]

    def keep(self, at: At, before: Tensor, sums: Tensor, made: Sequence[Tensor]) -> None:
        """Carry what belongs to the chunk of each row's last real token."""
        rows = torch.arange(before.size(0), device=before.device)
        last = -1 if at.count is None else (at.count - 1).clamp(min=0) // at.slot
        for mine, new in zip((self.finished, self.partial), (before, sums), strict=True):
            mine.copy_(new[rows, last])
        for name, new in zip(self.names, made, strict=True):
            getattr(self, name).copy_(new.expand(len(rows), *new.shape[1:])[rows, last])


def by_chunks(u: Tensor, v: Tensor, at: At, state: ChunkState | None, make: Callable) -> Sequence[Tensor]:
    """What each chunk of each row is given, from the chunks before it alone.

    u, v (B, T, C), zero where a token does not count. make(before), before (B, J, C, C) = Σ uᵀ v over the chunks before
    each, returns tensors (B, J, ·, ·). A chunk that is open already keeps what was made for it.
    """
    if at.opened:
        with full_precision(u):
            state.partial += wide(u).mT @ wide(v)
        return state.made()
    sums = chunk_sums(u, v, at.slot)
    if state is None:
        return make(shifted(sums))
    before = (state.finished + state.partial).unsqueeze(1) + shifted(sums)
    made = make(before)
    state.keep(at, before, sums, made)
    return made


def chunk_sums(u: Tensor, v: Tensor, slot: int) -> Tensor:
    """Σ uᵀ v over each chunk, (B, J, C, C), float32 or wider."""
    return ChunkSums.apply(u, v.to(u.dtype), slot)


class ChunkSums(torch.autograd.Function):
    """`chunk_sums`. Half types are multiplied as they are and summed in float32: on a GPU ten times as fast."""

    @staticmethod
    def forward(ctx, u: Tensor, v: Tensor, slot: int) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.slot = slot
        return wide_product(to_chunks(u, slot).mT, to_chunks(v, slot))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u, v = ctx.saved_tensors
        grad = grad.to(u.dtype)
        with full_precision(u):
            du, dv = to_chunks(v, ctx.slot) @ grad.mT, to_chunks(u, ctx.slot) @ grad
        return du.flatten(1, 2)[:, : u.size(1)], dv.flatten(1, 2)[:, : u.size(1)], None


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b, (B, J, ·, ·) each, in float32 or wider."""
    with full_precision(a):
        if a.is_cuda and a.dtype in HALF_DTYPES:
            y = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
            return y.unflatten(0, a.shape[:2])
        return wide(a) @ wide(b)


def shifted(sums: Tensor) -> Tensor:
    """Σ over the chunks before each, (B, J, C, C)."""
    return F.pad(sums, (0, 0, 0, 0, 1, -1)).cumsum(dim=1)


# ---- mixers --------------------------------------------------------------------------------------------------------


class Softmax(nn.Module):
    """Softmax attention, H heads of d channels; k and v may have fewer heads than q (arXiv 2305.13245)."""

    def __init__(self, c, *, n_head: int | None = None, n_kv_head: int | None = None, view: View | None = None,
                 prepare: Callable = as_is):
        super().__init__()
        self.n_head, self.d = n_head or c.n_head, c.n_qkv // c.n_head
        self.n_kv_head = n_kv_head or self.n_head
        self.view, self.prepare, self.dropout = view or View(), prepare, c.dropout
        self.scale = self.d**-0.5 * rope_attention(c, prepare)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At, state: Ring | None) -> Tensor:
        if state is not None and at.stepping and type(self.view) is View and kernels.can_run(q):
            return self.one(q, k, v, at, state)
        if state is not None:
            k, v = state.extend(at, k, v)
        q, k, v = (x.unflatten(-1, (-1, self.d)) for x in (q, k, v))
        options = {"scale": self.scale, "dropout": self.dropout if self.training else 0.0}
        if state is None or at.start == 0:
            return attend_whole(q, k, v, self.view, at, **options).flatten(2)
        return attend(q, k, v, at.ring_mask(self.view, state), **options).flatten(2)

    def one(self, q: Tensor, k: Tensor, v: Tensor, at: At, state: Ring) -> Tensor:
        """One token of each row, by a kernel that reads of the ring what is there."""
        (q, k, v), pos = (x.squeeze(1) for x in (q, k, v)), at.pos.squeeze(1)
        q = q.unflatten(-1, (-1, self.d))
        y = decode_attention(q, state.k, state.v, pos, state.size, self.scale, new_k=k, new_v=v)
        return y.flatten(1).unsqueeze(1).to(v.dtype)

    def new_state(self, batch: int, max_length: int, device, dtype) -> Ring:
        width = self.n_kv_head * self.d
        return Ring(batch, device, dtype, self.view.kept(max_length), k=width, v=width)

    def flops(self, T: int) -> float:
        return 4 * T * self.n_head * self.d


def rope_attention(c, prepare: Callable) -> float:
    """What the softmax scale is multiplied by where rotary positions are scaled: the attention factor, squared."""
    if prepare not in (rotary, rotary_qk_norm):
        return 1.0
    return rope_frequencies(c.n_qkv // c.n_head, c.rope_scaling, c.block_size)[1] ** 2


class Sums(NamedTuple):
    """Σ exp(k)·v and Σ exp(k) over some tokens, (…, D), both divided by exp(top), about their largest k."""

    top: Tensor
    numerator: Tensor
    denominator: Tensor

    def mean(self) -> Tensor:
        return self.numerator / torch.where(self.denominator > 0, self.denominator, 1.0)


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over two disjoint sets of tokens. An empty set has top −∞ and zero sums."""
    top = torch.maximum(a.top, b.top)
    finite = torch.where(top == -torch.inf, 0.0, top)  # −∞ − −∞ would be NaN where both are empty
    fa, fb = (a.top - finite).exp(), (b.top - finite).exp()
    return Sums(top, a.numerator * fa + b.numerator * fb, a.denominator * fa + b.denominator * fb)


def running(each: Sums) -> Sums:
    """The sums over all s ≤ t, for every t (axis 1), against the running maximum: no overflow, and no early token is
    lost to a later one's maximum."""
    if each.top.size(1) == 1:
        return each
    top = each.top.cummax(dim=1).values
    decay = F.pad((top[:, :-1] - top[:, 1:]).exp(), (0, 0, 1, 0))
    e = (each.top - top).exp()
    both = linear_scan(torch.cat((decay, decay), -1), torch.cat((e * each.numerator, e * each.denominator), -1))
    return Sums(top, *both.chunk(2, dim=-1))


class AFTSimpleFunction(torch.autograd.Function):
    """o_t = Σ_{s ≤ t} exp(k_s) v_s / Σ_{s ≤ t} exp(k_s), keeping five (B, T, D) tensors for the way back.

    With r_t = ∂L/∂o_t / Σ_{s ≤ t} exp(k_s), the gradients are sums over the future, a scan again, backwards:
    ∂L/∂v_s = exp(k_s) Σ_{t ≥ s} r_t and ∂L/∂k_s = exp(k_s) (v_s Σ_{t ≥ s} r_t − Σ_{t ≥ s} r_t o_t).
    """

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor) -> Tensor:
        sums = running(Sums(k, v, torch.ones_like(v)))
        o = sums.numerator / sums.denominator
        ctx.save_for_backward(k, v, o, sums.top, sums.denominator)
        return o

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        k, v, o, top, denominator = ctx.saved_tensors
        r = grad / denominator
        decay = F.pad((top[:, :-1] - top[:, 1:]).exp(), (0, 0, 0, 1)).flip(1)
        both = linear_scan(torch.cat((decay, decay), -1), torch.cat((r, r * o), -1).flip(1)).flip(1)
        after, weighted = both.chunk(2, dim=-1)
        e = (k - top).exp()
        return e * (v * after - weighted), e * after


def aft_simple(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """σ(q_t) ⊙ o_t, (B, T, D) in v's dtype: by the kernel where there is one for these tensors, else in plain
    PyTorch."""
    if kernels.can_run(q, k, v):
        return aft_kernels.fused_aft_simple(q, k, v)
    return (torch.sigmoid(wide(q)) * AFTSimpleFunction.apply(wide(k), wide(v))).to(v.dtype)


class AFTSimple(nn.Module):
    """Attention-free mixing (arXiv 2105.14103) without positions: y_t = σ(q_t) ⊙ Σ exp(k_s) v_s / Σ exp(k_s)."""

    def __init__(self, c, prepare: Callable):
        super().__init__()
        self.width, self.prepare = c.n_qkv, prepare

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At, state: State | None) -> Tensor:
        if at.causal and state is None:
            return aft_simple(q, k, v)
        o = self.go_on(wide(k), wide(v), at, state) if at.causal else self.of_all(wide(k), wide(v), at)
        return (torch.sigmoid(wide(q)) * o).to(v.dtype)

    def of_all(self, k: Tensor, v: Tensor, at: At) -> Tensor:
        if at.padding is not None:
            k = k.masked_fill(at.padding.unsqueeze(-1), -1e30)
            v = v.masked_fill(at.padding.all(dim=1)[:, None, None], 0.0)  # nobody to see: zero
        return (k.softmax(dim=1) * v).sum(dim=1, keepdim=True).expand_as(v)

    def go_on(self, k: Tensor, v: Tensor, at: At, state: State) -> Tensor:
        real = at.real()
        if real is not None:
            k = k.masked_fill(~real.unsqueeze(-1), -1e30)  # not −∞: padding must not make NaN of its own row
        earlier = Sums(*(t.unsqueeze(1) for t in sums_of(state)))
        sums = merge(earlier, running(Sums(k, v, torch.ones_like(v))))
        for kept, new in zip(sums_of(state), sums, strict=True):
            new = new[:, -1]
            kept.copy_(new if at.count is None else torch.where((at.count > 0).unsqueeze(-1), new, kept))
        return sums.mean()

    def new_state(self, batch: int, max_length: int, device, dtype) -> State:
        return sums_state(batch, device, dtype, self.width)

    def flops(self, T: int) -> float:
        return 0


def sums_over(k: Tensor, v: Tensor, mask: Tensor) -> Sums:
    """Of the tokens (B, S, D) where mask (B, S) is true, (B, D); none of them is an empty set."""
    k = k.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    top = k.amax(dim=1)
    e = (k - top.clamp(min=-1e30).unsqueeze(1)).exp()
    return Sums(top, (e * v).sum(dim=1), e.sum(dim=1))


def sums_of(state: State) -> Sums:
    return Sums(state.top, state.numerator, state.denominator)


def set_sums(state: State, sums: Sums) -> None:
    for kept, new in zip(sums_of(state), sums, strict=True):
        kept.copy_(new)


def sums_state(batch: int, device, dtype, width: int) -> State:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    zero = ((width,), 0.0, dtype)
    return State(batch, device, top=((width,), -torch.inf, dtype), numerator=zero, denominator=zero)


class AFTPositional(nn.Module):
    """Attention-free mixing with learned positions: y_t = σ(q_t) ⊙ Σ exp(k_s + p_{t,s}) v_s / Σ exp(k_s + p_{t,s}).

    A kind gives `positions(t, s)`: p for index tensors t (…, T, 1) and s (…, 1, S), as (G, …, T, S) for G groups of
    channels. Where `window` is set, p is 0 from t − s = window on, but the sum still runs over every s.

    The tokens are cut into blocks: pairs within a block are computed exactly, block pairs within the window as matrix
    products against each block's largest key, and what lies before the window as running sums. On a GPU a kind's
    `fused(q, k, v)` does the same in one kernel.
    """

    block = 32
    groups = 1

    def __init__(self, c, prepare: Callable, window: int | None):
        super().__init__()
        self.width, self.window, self.prepare = c.n_qkv, window, prepare

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At, state: list | None) -> Tensor:
        if at.causal and state is None and kernels.can_run(q, k, v, *self.parameters()):
            return self.fused(q, k, v)
        with full_precision(x):
            if not at.causal:
                o = self.of_all(wide(k), wide(v), at)
            elif state is None:
                o = self.whole(wide(k), wide(v))
            else:
                o = self.go_on(wide(k), wide(v), at, state)
        return (torch.sigmoid(wide(q)) * o).to(v.dtype)

    def whole(self, k: Tensor, v: Tensor) -> Tensor:
        return self.sums(k, v, first=0).mean()

    def sums(self, k: Tensor, v: Tensor, first: int) -> Sums:
        """Of each token over itself and those before it, (B, T, D); k and v begin at position `first`."""
        T, c = k.size(1), self.block
        k, v = to_chunks(k, c), to_chunks(v, c)  # (B, J, c, D)
        J = k.size(1)
        sums = self.within(k, v, first)
        top = k.amax(dim=2, keepdim=True).detach()
        e = (k - top).exp()
        blocks = Sums(top, e * v, e)
        near = J - 1 if self.window is None else min(J - 1, -(-(self.window - 1) // c))
        for r in range(1, near + 1):
            sums = merge(sums, delayed(self.across(blocks, r, first), r))
        if near < J - 1:
            before = running(Sums(top[:, :, 0], blocks.numerator.sum(2), blocks.denominator.sum(2)))
            far = Sums(*(t[:, : J - near - 1].unsqueeze(2) for t in before))
            sums = merge(sums, delayed(far, near + 1))
        return Sums(*(x.flatten(1, 2)[:, :T] for x in sums))

    def within(self, k: Tensor, v: Tensor, first: int) -> Sums:
        """Of each token over its own block, pair by pair."""
        J, c = k.size(1), k.size(2)
        i = torch.arange(c, device=k.device)
        start = first + c * torch.arange(J, device=k.device)[:, None, None]
        p = self.per_channel(self.positions(start + i[:, None], start + i))  # (J, c, c, D or 1)
        p = p.masked_fill((i > i[:, None])[..., None], -torch.inf)
        score = k.unsqueeze(2) + p  # (B, J, t, s, D)
        top = score.amax(dim=3).detach()
        e = (score - top.unsqueeze(3)).exp()
        return Sums(top, (e * v.unsqueeze(2)).sum(dim=3), e.sum(dim=3))

    def across(self, blocks: Sums, r: int, first: int) -> Sums:
        """Of each token over the block r before its own, for blocks r …, (B, J − r, c, D)."""
        J, c = blocks.top.size(1) - r, blocks.numerator.size(2)
        i = torch.arange(c, device=blocks.top.device)
        start = first + c * torch.arange(J, device=i.device)[:, None, None]
        p = self.positions(start + r * c + i[:, None], start + i)  # (G, J, c, c)
        highest = p.amax(dim=-1, keepdim=True).detach()
        weight = (p - highest).exp()

        def mixed(x: Tensor) -> Tensor:
            x = x[:, :J].unflatten(-1, (self.groups, -1))  # (B, J, s, G, D / G)
            return torch.einsum("gjts,bjsgd->bjtgd", weight, x).flatten(3)

        top = blocks.top[:, :J] + self.per_channel(highest)[..., 0, :]
        return Sums(top.expand(-1, -1, c, self.width), mixed(blocks.numerator), mixed(blocks.denominator))

    def per_channel(self, p: Tensor) -> Tensor:
        """(G, …) to (…, D), or (…, 1) where all channels share p."""
        p = p.movedim(0, -1)
        return p if self.groups == 1 else p.repeat_interleave(self.width // self.groups, dim=-1)

    def of_all(self, k: Tensor, v: Tensor, at: At) -> Tensor:
        """In an encoder: every token sees all, p by the distance where there is a window."""
        if at.padding is not None:
            k = k.masked_fill(at.padding.unsqueeze(-1), -torch.inf)
        top = k.amax(dim=1, keepdim=True).clamp(min=-1e30).detach()
        e = (k - top).exp()
        i = torch.arange(k.size(1), device=k.device)
        p = self.positions(i[:, None], i[None, :])  # (G, T, S)
        weight = (p - p.amax(dim=-1, keepdim=True).detach()).exp()
        total, share = (
            torch.einsum("gts,bsgd->btgd", weight, x.unflatten(-1, (self.groups, -1))).flatten(2) for x in (e * v, e)
        )
        return Sums(top, total, share).mean()

    def go_on(self, k: Tensor, v: Tensor, at: At, state: list) -> Tensor:
        if k.size(1) > 1 and at.start is not None:
            return self.piece(k, v, at, *state)
        steps = [self.one(k[:, t : t + 1], v[:, t : t + 1], at.one(t), *state) for t in range(k.size(1))]
        return torch.cat(steps, dim=1)

    def piece(self, k: Tensor, v: Tensor, at: At, ring: Ring, far: State | None) -> Tensor:
        """Many tokens at once, behind those of the ring, where all rows have as many."""
        n = min(at.start, ring.size)
        slots = torch.arange(at.start - n, at.start, device=k.device) % ring.size  # the oldest first
        k, v = (torch.cat((old[:, slots], new), dim=1) for old, new in zip((ring.k, ring.v), (k, v), strict=True))
        sums = Sums(*(x[:, n:] for x in self.sums(k, v, first=at.start - n)))
        if far is not None:
            before = sums_of(far)
            sums = merge(sums, Sums(*(x.unsqueeze(1) for x in before)))
            count = k.size(1) - n if at.count is None else at.count.unsqueeze(1)
            leaves = torch.arange(k.size(1), device=k.device) < n + count - ring.size  # (S) or (B, S)
            set_sums(far, merge(before, sums_over(k, v, leaves.expand(k.shape[:2]))))
        ring.write(at, (k[:, n:], v[:, n:]))
        return sums.mean()

    def one(self, k: Tensor, v: Tensor, at: At, ring: Ring, far: State | None) -> Tensor:
        """One token: it joins the ring, and what it pushes out of the window joins the sums before it."""
        if far is not None:
            self.push_out(at, ring, far)
        (keys, values), s = ring.extend(at, k, v), ring.positions(at)
        p = self.per_channel(self.positions(at.pos.unsqueeze(-1), s.clamp(min=0).unsqueeze(1)))[:, 0]  # (B, S, D or 1)
        score = (keys + p).masked_fill((s < 0).unsqueeze(-1), -torch.inf)
        top = score.amax(dim=1, keepdim=True)
        e = (score - top.clamp(min=-1e30)).exp()
        sums = Sums(top, (e * values).sum(1, keepdim=True), e.sum(1, keepdim=True))
        if far is not None:
            sums = merge(sums, Sums(*(x.unsqueeze(1) for x in sums_of(far))))
        return sums.mean()

    def push_out(self, at: At, ring: Ring, far: State) -> None:
        slot = (at.pos % ring.size).expand(len(ring.k), 1)
        k, v = (x.gather(1, slot.unsqueeze(-1).expand(-1, -1, self.width)) for x in (ring.k, ring.v))
        leaves = at.pos >= ring.size if at.count is None else (at.pos >= ring.size) & (at.count > 0).unsqueeze(1)
        set_sums(far, merge(sums_of(far), sums_over(k, v, leaves.expand(k.shape[:2]))))

    def new_state(self, batch: int, max_length: int, device, dtype) -> list:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        size = max_length if self.window is None else min(self.window, max_length)
        far = None if self.window is None else sums_state(batch, device, dtype, self.width)
        return [Ring(batch, device, dtype, size, k=self.width, v=self.width), far]

    def flops(self, T: int) -> float:
        return 4 * T * self.width


def delayed(sums: Sums, r: int) -> Sums:
    """Sums of J blocks (axis 1) as those of the J blocks that come r later; the first r have none."""
    return Sums(*(F.pad(x, (0, 0, 0, 0, r, 0), value=e) for x, e in zip(sums, (-torch.inf, 0.0, 0.0), strict=True)))


class AFTFull(AFTPositional):
    """p = a bᵀ, a and b (block_size, 128)."""

    roles = {"a": "position", "b": "position"}

    def __init__(self, c, prepare: Callable, window: int | None = None):
        super().__init__(c, prepare, window)
        self.a, self.b = nn.Parameter(torch.empty(c.block_size, 128)), nn.Parameter(torch.empty(c.block_size, 128))

    def positions(self, t: Tensor, s: Tensor) -> Tensor:
        last = len(self.a) - 1  # what pads the last block lies beyond
        a, b = wide(self.a)[t.clamp(0, last).squeeze(-1)], wide(self.b)[s.clamp(0, last).squeeze(-2)]
        p = (a @ b.mT).unsqueeze(0)
        return p if self.window is None else torch.where((t - s).abs() < self.window, p, 0.0)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aft_positional_kernels.fused_aft_local(q, k, v, self.a, self.b, self.window or k.size(1))

    def flops(self, T: int) -> float:
        return 4 * T * self.width + 2 * T * self.a.size(1)


class AFTConv(AFTPositional):
    """p by the distance t − s: `window` taps for each of n_head groups of channels, 0 beyond."""

    roles = {"kernel": "position"}

    def __init__(self, c, prepare: Callable):
        super().__init__(c, prepare, c.window)
        self.groups = c.n_head
        self.kernel = nn.Parameter(torch.empty(c.n_head, c.window))

    def positions(self, t: Tensor, s: Tensor) -> Tensor:
        distance = (t - s).abs()
        return torch.where(distance < self.window, wide(self.kernel)[:, distance.clamp(max=self.window - 1)], 0.0)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aft_positional_kernels.fused_aft_conv(q, k, v, self.kernel)


def aft_local(c, prepare: Callable) -> AFTFull:
    """As full, but p = 0 from a distance of `window` on."""
    return AFTFull(c, prepare, window=c.window)


AFTS = {"simple": AFTSimple, "full": AFTFull, "local": aft_local, "conv": AFTConv}
ENDS = {"full", "local"}  # kinds of AFT that end at block_size


class LAM(nn.Module):
    """Linear attention (arXiv 2007.14902): the similarity of q and k is 1 + their cosine, so that three sums per head
    carry the past. y_t = (Σ v_s + q̂_t Σ k̂_sᵀ v_s) / max(t + q̂_t · Σ k̂_s, 1e-6), t from 1."""

    segment = 256  # tokens whose pairs are computed one by one; earlier ones come through the sums

    def __init__(self, c, prepare: Callable):
        super().__init__()
        self.n_head, self.d, self.prepare = c.n_head, c.n_qkv // c.n_head, prepare

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At, state: State | None) -> Tensor:
        real = ~at.padding if at.padding is not None else at.real()
        with full_precision(x):
            q, k, v_wide = (wide(t).unflatten(-1, (-1, self.d)).transpose(1, 2) for t in (q, k, v))  # (B, H, T, d)
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            ones = torch.ones_like(v_wide[..., :1])
            if real is not None:
                k, v_wide, ones = (t * real[:, None, :, None] for t in (k, v_wide, ones))
            mix = self.running if at.causal else self.of_all
            y, count = mix(q, k, torch.cat((v_wide, ones), dim=-1), state)
        return (y / count.clamp(min=1e-6)).transpose(1, 2).flatten(2).to(v.dtype)

    def of_all(self, q: Tensor, k: Tensor, v: Tensor, state: None) -> tuple[Tensor, Tensor]:
        y = v.sum(dim=2, keepdim=True) + q @ (k.mT @ v)
        return y[..., :-1], y[..., -1:]

    def running(self, q: Tensor, k: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
        """v has a column of ones, so that the denominator is one more channel of the numerator."""
        total, outer = (0.0, 0.0) if state is None else (state.total.unsqueeze(2), state.outer)
        parts = []
        for q_now, k_now, v_now in zip(*(t.split(self.segment, dim=2) for t in (q, k, v)), strict=True):
            similar = (1 + q_now @ k_now.mT).tril()
            parts.append(similar @ v_now + total + (0.0 if isinstance(outer, float) else q_now @ outer))
            total, outer = total + v_now.sum(dim=2, keepdim=True), outer + k_now.mT @ v_now
        if state is not None:
            state.total.copy_(total.squeeze(2))
            state.outer.copy_(outer)
        y = torch.cat(parts, dim=2)
        return y[..., :-1], y[..., -1:]

    def new_state(self, batch: int, max_length: int, device, dtype) -> State:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (self.n_head, self.d, self.d + 1)
        return State(batch, device, total=((self.n_head, self.d + 1), 0.0, dtype), outer=(shape, 0.0, dtype))

    def flops(self, T: int) -> float:
        return 4 * T * self.n_head * self.d


class Router(nn.Module):
    """Chooses `active` of n for each token: p = softmax(x W), the largest p + bias kept, each weighted n·p.

    Balance without a loss (arXiv 2408.15664): after each optimizer step `bias += 0.01·sign(mean load − load)`. The bias
    touches the choice only.
    """

    roles = {"weight": "router"}

    def __init__(self, n_embd: int, n: int, active: int):
        super().__init__()
        self.n, self.active = n, active
        self.weight = nn.Parameter(torch.empty(n, n_embd))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("load", torch.zeros(n), persistent=False)  # tokens since the last optimizer step

    def choose(self, x: Tensor, at: At) -> tuple[Tensor, Tensor]:
        """Probabilities (B, T, n) for x (B, T, C), and which are kept."""
        with full_precision(x):
            p = F.linear(wide(norm(x)), wide(self.weight)).softmax(dim=-1)
        score = p.detach() + self.bias
        mine, other = score.unsqueeze(-1), score.unsqueeze(-2)
        first = torch.ones(self.n, self.n, dtype=torch.bool, device=x.device).tril(-1)  # ties: the lower index
        rank = ((other > mine) | ((other == mine) & first)).sum(dim=-1)
        kept = rank < self.active
        if self.training:
            counted = kept if at.active is None else kept & at.active.unsqueeze(-1)
            self.load += counted.sum(dim=(0, 1))
        return p, kept

    def forward(self, x: Tensor, at: At) -> Tensor:
        """The weight of each of the n for each token, (B, T, n), zero for those not chosen."""
        p, kept = self.choose(x, at)
        return (self.n * p * kept).to(x.dtype)

    @torch.no_grad()
    def balance(self, taken: Tensor | float = 1.0) -> None:
        self.bias += 0.01 * taken * torch.sign(self.load.mean() - self.load)
        self.load.zero_()

    def flops(self, T: int) -> float:
        return 2 * self.weight.numel()


class ExpertAttention(nn.Module):
    """Token-level mixture of local-context attention (The Expert Abundance): groups of heads, each with a window of its
    own, weighted token by token by a router. Keys and values are never routed. See MoH (arXiv 2410.11842)."""

    def __init__(self, c, prepare: Callable):
        super().__init__()
        self.prepare = prepare
        heads = c.n_head // c.n_experts
        self.groups = nn.ModuleList(Softmax(c, n_head=heads, view=View(window)) for window in expert_windows(c))
        self.router = Router(c.n_embd, c.n_experts, c.a_experts) if c.n_experts > 1 else None
        for group in self.groups:
            group.scale *= rope_attention(c, prepare)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At, state: list | None) -> Tensor:
        y = self.by_groups(q, k, v, x, at, state) if state is not None else self.whole(q, k, v, x, at)
        if self.router is None:
            return y
        weight = self.router(x, at).unsqueeze(-1)  # (B, T, n_experts, 1)
        return (y.unflatten(2, (len(self.groups), -1)) * weight).flatten(2)

    def whole(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At) -> Tensor:
        """A whole text: all heads in one kernel, each with its own window, where there is one."""
        one, T = self.groups[0], q.size(1)
        q4, k4, v4 = (t.unflatten(-1, (-1, one.d)) for t in (q, k, v))
        sizes = [group.view.size for group in self.groups]
        if at.causal and min(sizes) < T and flexes(q4, one.dropout if self.training else 0.0):
            windows = tuple(size for size in sizes for _ in range(one.n_head))
            return attend_blocks(q4, k4, v4, windows, at, scale=one.scale).flatten(2)
        return self.by_groups(q, k, v, x, at, None)

    def by_groups(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At, state: list | None) -> Tensor:
        shares = (t.chunk(len(self.groups), dim=-1) for t in (q, k, v))
        states = state or [None] * len(self.groups)
        return torch.cat([g(*qkv, x, at, s) for g, *qkv, s in zip(self.groups, *shares, states, strict=True)], dim=-1)

    def new_state(self, batch: int, max_length: int, device, dtype) -> list:
        return [group.new_state(batch, max_length, device, dtype) for group in self.groups]

    def flops(self, T: int) -> float:
        return sum(group.flops(T) for group in self.groups) + (self.router.flops(T) if self.router else 0)


def expert_windows(c) -> list[int]:
    """The window of each expert: as listed, or window, window/2, window/4, … not under 16.

    >>> expert_windows(StrawberryConfig(window=48, n_experts=4))
    [48, 24, 16, 16]
    """
    return c.windows or [max(c.window >> e, min(16, c.window)) for e in range(c.n_experts)]


# ---- projections and feed-forward ----------------------------------------------------------------------------------


class Linear(nn.Module):
    """y = x Wᵀ (+ b), W (out, in). `role` says how it starts and who optimizes it: see `init_weights`."""

    products = ("weight",)

    def __init__(self, n_in: int, n_out: int, *, bias: bool = False, role: str = "matrix"):
        super().__init__()
        self.roles = {"weight": role, "bias": "bias"}
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def last(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last product, not done yet: its x and W."""
        return x, self.weight

    def flops(self, T: int) -> float:
        return 2 * self.weight.numel()


class LowRank(nn.Module):
    """A linear map through `rank` numbers: in → rank → out."""

    def __init__(self, n_in: int, n_out: int, rank: int, role: str = "matrix"):
        super().__init__()
        self.down, self.up = Linear(n_in, rank, role=role), Linear(rank, n_out, role=role)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def last(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.up.last(self.down(x))

    def flops(self, T: int) -> float:
        return self.down.flops(T) + self.up.flops(T)


class Embedding(nn.Module):
    """Rows of a table, (B, T) int64 to (B, T, C)."""

    products = ("weight",)

    def __init__(self, n: int, width: int, role: str = "embedding"):
        super().__init__()
        self.roles = {"weight": role}
        self.weight = nn.Parameter(torch.empty(n, width))
        self.register_buffer("here", torch.empty(0), persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        if isinstance(self.weight, Int8):
            return self.weight.rows(idx, self.here.dtype)
        return F.embedding(idx, self.weight)


class RMSNorm(nn.Module):
    """`norm` with a learned scale (arXiv 1910.07467)."""

    roles = {"weight": "norm"}

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # the scale keeps its digits; a compiler makes one pass of it all the same
            return (norm(wide(x)) * self.weight).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


class LayerNorm(nn.Module):
    """Mean and deviation removed, with a learned scale and shift (arXiv 1607.06450)."""

    roles = {"weight": "norm", "bias": "bias"}

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x) if x.dtype != self.weight.dtype else x
        return F.layer_norm(y, self.weight.shape, self.weight, self.bias, eps=1e-5).to(x.dtype)


class SwiGLU(nn.Module):
    """u, g = split(x W₁); (u ⊙ silu(g)) W₂ (arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        n_ffn = c.n_ffn or -(-8 * c.n_embd // 3 // 64) * 64  # 8C/3, rounded up to 64
        self.w1 = Linear(c.n_embd, 2 * n_ffn, bias=c.bias)
        self.w2 = Linear(n_ffn, c.n_embd, bias=c.bias, role=c.writes)

    def forward(self, x: Tensor, at: At) -> Tensor:
        if self.w1.bias is None and Float8.takes(x, self.w1.weight, self.w2.weight):
            return feed_8(x, self.w1.weight, self.w2.weight, "swiglu")[0]
        u, g = self.w1(x).chunk(2, dim=-1)
        return self.w2(u * F.silu(g))

    def flops(self, T: int) -> float:
        return self.w1.flops(T) + self.w2.flops(T)


class FeedForward(nn.Module):
    """activation(x W₁) W₂."""

    def __init__(self, kind: str, c):
        super().__init__()
        n_ffn = c.n_ffn or 4 * c.n_embd
        self.kind, self.activation = kind, ACTIVATIONS[kind]
        self.w1 = Linear(c.n_embd, n_ffn, bias=c.bias)
        self.w2 = Linear(n_ffn, c.n_embd, bias=c.bias, role=c.writes)

    def forward(self, x: Tensor, at: At) -> Tensor:
        if self.w1.bias is None and Float8.takes(x, self.w1.weight, self.w2.weight):
            return feed_8(x, self.w1.weight, self.w2.weight, self.kind)[0]
        return self.w2(self.activation(self.w1(x)))

    def flops(self, T: int) -> float:
        return self.w1.flops(T) + self.w2.flops(T)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "relu2": relu2}


class MoE(nn.Module):
    """n_ffn_experts feed-forwards, a_ffn_experts of which count for a token (arXiv 1701.06538). All of them are
    computed for every token: shapes stay fixed, and no token depends on where its neighbours went."""

    def __init__(self, c):
        super().__init__()
        self.router = Router(c.n_embd, c.n_ffn_experts, c.a_ffn_experts)
        self.experts = nn.ModuleList(FEED_FORWARDS[c.ffn_type.lower()](c) for _ in range(c.n_ffn_experts))

    def forward(self, x: Tensor, at: At) -> Tensor:
        weight = self.router(x, at)
        return sum(weight[..., e : e + 1] * expert(x, at) for e, expert in enumerate(self.experts))

    def flops(self, T: int) -> float:
        return self.router.flops(T) + sum(expert.flops(T) for expert in self.experts)


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
FEED_FORWARDS = {
    "swiglu": SwiGLU,
    **{kind: partial(FeedForward, kind) for kind in ACTIVATIONS},
}


def feed_forward(c) -> nn.Module:
    """What `ffn_type` names, or a mixture of several."""
    return MoE(c) if c.n_ffn_experts > 1 else FEED_FORWARDS[c.ffn_type.lower()](c)


# ---- attention layers: projections around a mixer, (x, at, state) -> y ---------------------------------------------


class SelfAttention(nn.Module):
    """Projections around any mixer. Without wq, q is k (KV attention, arXiv 2305.19129)."""

    def __init__(self, c, mixer: nn.Module, *, n_kv_head: int | None = None, has_q: bool = True):
        super().__init__()
        kv_width = (n_kv_head or c.n_head) * (c.n_qkv // c.n_head)
        self.wq = Linear(c.n_embd, c.n_qkv, bias=c.bias) if has_q else None
        self.wk, self.wv = Linear(c.n_embd, kv_width, bias=c.bias), Linear(c.n_embd, kv_width, bias=c.bias)
        self.wo = Linear(c.n_qkv, c.n_embd, bias=c.bias, role=c.writes)
        self.mixer = mixer

    def forward(self, x: Tensor, at: At, state) -> Tensor:
        layers = [w for w in (self.wq, self.wk, self.wv) if w is not None]
        q, k, v = self.joined(x, layers, [layer.weight.size(0) for layer in layers], at)
        return self.wo(self.mixer(q, k, v, x, at, state))

    def joined(self, x: Tensor, layers: list[Linear], widths: list[int], at: At) -> Sequence[Tensor]:
        """q, k and v. In training they are one product, so that x's gradient is one product, too."""
        if not torch.is_grad_enabled():
            return ready([layer(x) for layer in layers], widths, self.mixer, at)
        w = torch.cat([layer.weight for layer in layers])
        if layers[0].bias is None:
            return joint(x, w, widths, self.mixer, at)
        return ready(linear(x, w, torch.cat([layer.bias for layer in layers])), widths, self.mixer, at)

    def new_state(self, batch: int, max_length: int, device, dtype):
        return self.mixer.new_state(batch, max_length, device, dtype)

    def flops(self, T: int) -> float:
        return sum(w.flops(T) for w in (self.wq, self.wk, self.wv, self.wo) if w is not None) + self.mixer.flops(T)


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads are read out of one latent of
    kv_rank numbers, positions go through a rotary key of rope_dim numbers that all heads share. It caches these two."""

    def __init__(self, c, view: View):
        super().__init__()
        self.n_head, self.d, self.rank, self.rope_dim = c.n_head, c.n_qkv // c.n_head, c.kv_rank, c.rope_dim
        self.wq = Linear(c.n_embd, c.n_head * (self.d + self.rope_dim), bias=c.bias)
        self.wkv_a = Linear(c.n_embd, self.rank + self.rope_dim, bias=c.bias)
        self.kv_norm = RMSNorm(self.rank)
        self.wkv_b = Linear(self.rank, c.n_head * 2 * self.d)  # per head: k, then v
        self.wkv_b.products = ()  # `absorbed` reads it too
        self.wo = Linear(c.n_qkv, c.n_embd, bias=c.bias, role=c.writes)
        self.view, self.dropout = view, c.dropout
        factor = rope_frequencies(c.rope_dim, c.rope_scaling, c.block_size)[1]
        self.scale = (self.d + self.rope_dim) ** -0.5 * factor**2

    def forward(self, x: Tensor, at: At, state: Ring | None) -> Tensor:
        q, q_rope = self.wq(x).unflatten(-1, (self.n_head, -1)).split((self.d, self.rope_dim), dim=-1)
        latent, k_rope = self.wkv_a(x).split((self.rank, self.rope_dim), dim=-1)
        latent, k_rope = self.kv_norm(latent), rotate(k_rope.unsqueeze(2), at.rope)
        q_rope = rotate(q_rope, at.rope)
        kept = None if state is None else state.extend(at, latent, k_rope.flatten(2))
        if state is None or at.start == 0:
            y = self.expanded(q, q_rope, latent, k_rope, at)
        else:
            y = self.absorbed(q, q_rope, *kept, at.ring_mask(self.view, state))
        return self.wo(y.flatten(2))

    def expanded(self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, at: At) -> Tensor:
        """Keys and values written out per head: the fewest products where all tokens are given at once."""
        k, v = self.wkv_b(latent).unflatten(-1, (self.n_head, -1)).chunk(2, dim=-1)
        k = torch.cat((k, k_rope.expand(-1, -1, self.n_head, -1).to(k.dtype)), dim=-1)
        q = torch.cat((q, q_rope), dim=-1)
        dropout = self.dropout if self.training else 0.0
        return attend_whole(q, k, v, self.view, at, scale=self.scale, dropout=dropout)

    def absorbed(self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """The same with the up-projections moved to q and to the result: one latent head serves all heads of q."""
        wk, wv = self.wkv_b.weight.unflatten(0, (self.n_head, 2, self.d)).unbind(dim=1)  # (H, d, rank) each
        q = torch.cat((torch.einsum("bthd,hdr->bthr", q, wk), q_rope), dim=-1)
        k = torch.cat((latent, k_rope), dim=-1).unsqueeze(2)
        y = attend(q, k, latent.unsqueeze(2), mask, scale=self.scale)
        return torch.einsum("bthr,hdr->bthd", y, wv)

    def new_state(self, batch: int, max_length: int, device, dtype) -> Ring:
        return Ring(batch, device, dtype, self.view.kept(max_length), latent=self.rank, k_rope=self.rope_dim)

    def flops(self, T: int) -> float:
        projections = sum(w.flops(T) for w in (self.wq, self.wkv_a, self.wkv_b, self.wo))
        return projections + 2 * T * self.n_head * (2 * self.d + self.rope_dim)


class Memory(NamedTuple):
    """What the encoder made of the source, and where it is padding. A cache holds its keys and values instead of it."""

    x: Tensor | None  # (B, S, C)
    padding: Tensor  # (B, S)


class CrossState(State):
    """The source's keys and values, for as long as the cache lives: a row that starts anew reads the same source."""

    def __init__(self):
        self.start, self.k, self.v = {}, None, None

    def allocate(self, batch: int, size: int, width: int, device, dtype) -> None:
        self.k, self.v = (torch.zeros(batch, size, width, device=device, dtype=dtype) for _ in range(2))

    def part(self, rows: slice) -> CrossState:
        mine = CrossState()
        mine.k, mine.v = self.k[rows], self.v[rows]
        return mine

    def move(self, source: int, target: int) -> None:
        for mine in (self.k, self.v):
            mine[target] = mine[source]

    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class CrossAttention(nn.Module):
    """Softmax attention from each token to the whole source; a source of padding alone contributes zero."""

    def __init__(self, c):
        super().__init__()
        self.n_head, self.d, self.dropout = c.n_head, c.n_qkv // c.n_head, c.dropout
        kv_width = {"GQA": c.n_kv_head, "MQA": 1}.get(c.attention_type.partition("-")[0], c.n_head) * self.d
        self.wq, self.wo = Linear(c.n_embd, c.n_qkv, bias=c.bias), Linear(c.n_qkv, c.n_embd, bias=c.bias)
        self.wk, self.wv = Linear(c.n_embd, kv_width, bias=c.bias), Linear(c.n_embd, kv_width, bias=c.bias)

    def forward(self, x: Tensor, at: At, state: CrossState | None) -> Tensor:
        k, v = self.of(at.memory) if state is None else (state.k, state.v)
        q, k, v = (t.unflatten(-1, (-1, self.d)) for t in (self.wq(x), k, v))
        mask = ~at.memory.padding[:, None, None, :].expand(-1, 1, x.size(1), -1)
        y = attend_all(q, k, v, mask, scale=self.d**-0.5, dropout=self.dropout if self.training else 0.0)
        empty = at.memory.padding.all(dim=1)[:, None, None]
        return self.wo(y.flatten(2)).masked_fill(empty, 0.0)

    def of(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """The source's keys and values."""
        return self.wk(memory.x), self.wv(memory.x)

    def flops(self, T: int) -> float:
        return sum(w.flops(T) for w in (self.wq, self.wk, self.wv, self.wo)) + 4 * T * self.n_head * self.d


def attention_view(c, layer: int) -> View:
    """Who sees whom in one layer: all, a window where attention_type ends in -SWA, or a sparse pattern."""
    if c.sparse != "none":
        return SPARSE[c.sparse](c, layer)
    return View(c.window if c.attention_type.endswith("-SWA") else None)


SPARSE = {"longformer": lambda c, layer: LongformerView(c.window, c.n_global), "bigbird": BigBirdView}


def grouped(kv_heads: Callable) -> Callable:
    """An attention whose number of key heads is `kv_heads(c)`."""

    def make(c, layer: int, prepare: Callable) -> SelfAttention:
        n = kv_heads(c)
        return SelfAttention(c, Softmax(c, n_kv_head=n, view=attention_view(c, layer), prepare=prepare), n_kv_head=n)

    return make


# attention_type, less its -SWA, to what makes the layer: (config, layer's number, how q and k are readied) -> module
ATTENTIONS = {
    "MHA": grouped(lambda c: c.n_head),
    "GQA": grouped(lambda c: c.n_kv_head),
    "MQA": grouped(lambda c: 1),
    "MHLA": lambda c, layer, prepare: LatentAttention(c, attention_view(c, layer)),
    "kv": lambda c, layer, prepare: SelfAttention(
        c, Softmax(c, view=attention_view(c, layer), prepare=prepare), has_q=False),
    "aft": lambda c, layer, prepare: SelfAttention(c, AFTS[c.aft](c, prepare)),
    "lam": lambda c, layer, prepare: SelfAttention(c, LAM(c, prepare)),
    "expert": lambda c, layer, prepare: SelfAttention(c, ExpertAttention(c, prepare)),
}


def make_attention(c, layer: int) -> nn.Module:
    return ATTENTIONS[c.attention_type.partition("-")[0]](c, layer, POSITIONS[c.pos_encoding].prepare)


# ---- positions that a model adds to its embedding ------------------------------------------------------------------


class LearnedPositions(nn.Module):
    """A learned vector for each of block_size places."""

    roles = {"weight": "position"}
    prepare = staticmethod(as_is)

    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.block_size, c.n_embd))

    def forward(self, x: Tensor, at: At) -> Tensor:
        pos = at.pos.clamp(0, len(self.weight) - 1)  # padding may stand beyond, an idle row before
        return x + F.embedding(pos, self.weight)


class SinusoidalPositions(nn.Module):
    """sin(pos / 10000^(2i/C)) in even channels, cos in odd ones (arXiv 1706.03762)."""

    prepare = staticmethod(as_is)

    def __init__(self, c):
        super().__init__()
        self.rope = Rope(rope_frequencies(c.n_embd, RopeScaling(), c.block_size)[0])

    def forward(self, x: Tensor, at: At) -> Tensor:
        cos, sin = self.rope(at.pos)
        both = torch.stack((sin, cos), dim=-1).flatten(-2).squeeze(2)  # (B, T, C), sin and cos in turn
        return x + both[..., : x.size(-1)].to(x.dtype)


class RotaryPositions(nn.Module):
    """q and k are turned in each attention; nothing is added."""

    prepare = staticmethod(rotary)

    def __init__(self, c):
        super().__init__()

    def forward(self, x: Tensor, at: At) -> Tensor:
        return x


class NoPositions(nn.Module):
    """Only the causal mask tells where a token stands (arXiv 2305.19466)."""

    prepare = staticmethod(as_is)

    def __init__(self, c):
        super().__init__()

    def forward(self, x: Tensor, at: At) -> Tensor:
        return x


POSITIONS = {
    "Learned": LearnedPositions,
    "RoPE": RotaryPositions,
    "Sinusoidal": SinusoidalPositions,
    "None": NoPositions,
}


def positions_end(c) -> int | None:
    """block_size where positions are learned, so that no text can be longer."""
    learned = c.pos_encoding == "Learned" or (c.attention_type == "aft" and c.aft in ENDS)
    return c.block_size if learned else None


def rope_of(c) -> Rope:
    """The rotary positions of a model whose attention is chosen by attention_type."""
    dim = c.rope_dim if c.attention_type.startswith("MHLA") else c.n_qkv // c.n_head
    return Rope(rope_frequencies(dim, c.rope_scaling, c.block_size)[0])


# ---- a stack -------------------------------------------------------------------------------------------------------


def through(blocks: Sequence[nn.Module], x: Tensor, at: At, states: list | None) -> Tensor:
    """x (B, T, C) through all blocks."""
    for i, block in enumerate(blocks):
        x = block(x, at, None if states is None else states[i])
    return x


@torch.compiler.disable(recursive=False)
def in_pieces(blocks: nn.ModuleList, x: Tensor, at: At, n: int) -> Tensor:
    """The same, torch.compile taking each n-th of the blocks for itself."""
    blocks = list(blocks)
    size = -(-len(blocks) // n)
    for i in range(0, len(blocks), size):  # each with masks of its own, as in one_by_one
        x = through(blocks[i : i + size], x, replace(at, masks={}), None)
    return x


def repeat(run: Callable, x: Tensor, at: At, states: list | None, n: int, depth: Router | None) -> Tensor:
    """n passes of run(x, at, state), or, with a depth router, as many for each token as it chooses (arXiv 2507.10524).

    After its last pass a token's x is frozen; its keys and values are still made. x₀ + n·q·(x − x₀) lets the router
    learn, q being the chosen depth's probability.
    """
    states = states or [None] * n
    if depth is None:
        for state in states:
            x = run(x, at, state)
        return x
    p, kept = depth.choose(x, at)
    reaches = kept.flip(-1).cumsum(dim=-1).flip(-1).bool()  # (B, T, n): whether a token takes pass i
    start = x
    for i, state in enumerate(states):
        at.active = reaches[..., i]
        x = run(x, at, state)
    at.active = None
    share = (depth.n * p * kept).sum(dim=-1, keepdim=True).to(x.dtype)
    return start + share * (x - start)


# ---- the head's loss -----------------------------------------------------------------------------------------------

LOGITS_BYTES = 1 << 30  # of logits that exist at once, at most
FEW_BYTES = 1 << 26  # of logits that are not worth dividing; more, up to LOGITS_BYTES, are divided into eight at most


def fuses_head(x: Tensor) -> bool:
    """Whether training takes loss and gradients of the head at once. On a CPU torch's own cross entropy is quicker."""
    return x.is_cuda


class HeadProducts:
    """The head's three products, for a part of the tokens: x (n, C) in a type, W (V, C)."""

    slope = 1.0, None  # times what the gradient of the logits is given, and in which type, if not theirs

    def __init__(self, w: Tensor, dtype: torch.dtype):
        V = w.size(0)  # a product whose rows do not begin at multiples of 16 bytes is slow
        self.table = F.pad(w.to(dtype), (0, 0, 0, -V % 64 if V % 8 else 0))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.table.mT

    def back(self, slope: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and W from that of the logits."""
        return slope @ self.table, slope.mT @ x


class HeadProducts8(HeadProducts):
    """The same in 8 bits. What the logits' gradient has below 2⁻³¹ is lost."""

    slope = Float8.SLOPE, Float8.BACKWARD

    def __init__(self, w: Tensor, dtype: torch.dtype):
        super().__init__(w, dtype)
        self.table, self.undo = measured(self.table)
        self.turned = transpose_fp8(self.table)

    def logits(self, x: Tensor) -> Tensor:
        x8 = quantize_fp8(x, Float8.X, Float8.FORWARD)
        return product_8(x8, self.table, Float8.undo[Float8.X], self.undo, x.dtype, quick=True)

    def back(self, slope: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x_t = transpose_fp8(quantize_fp8(x, Float8.X, Float8.FORWARD))
        undo, undo_x = Float8.undo[Float8.SLOPE], Float8.undo[Float8.X]
        dx = product_8(slope, self.turned, undo, self.undo, x.dtype)
        return dx, product_8(transpose_fp8(slope), x_t, undo, undo_x, x.dtype)


class HeadLoss(torch.autograd.Function):
    """The sum of the cross entropies, in nats, of logits softcap(x Wᵀ) with targets: x (N, C), W (V, C), targets (N,)
    int64, negative ones ignored.

    The logits are never stored. They are made for a part of the tokens, and both gradients from them at once, so that
    the backward pass has nothing left to do (as in Liger, arXiv 2410.10989): with z = softcap(l),
    ∂/∂l = (softmax(z) − onehot(target)) · (1 − (z / cap)²). The sums over the vocabulary are float32 or wider.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, targets: Tensor, cap: float | None, in_8_bits: bool = False) -> Tensor:
        with full_precision(x):
            products = (HeadProducts8 if in_8_bits else HeadProducts)(w, x.dtype)
            size = x.size(0) * len(products.table) * x.element_size()
            parts = max(1, min(8, size // FEW_BYTES)) if size <= LOGITS_BYTES else -(-size // LOGITS_BYTES)
            rows = -(-x.size(0) // (16 * parts)) * 16
            total, dx, dw = 0.0, [], 0.0
            for some, wanted in zip(x.split(rows), targets.split(rows), strict=True):
                nats, slope = HeadLoss.of(products.logits(some), wanted, w.size(0), cap, *products.slope)
                total = total + nats
                back = products.back(slope, some)
                dx.append(back[0])
                dw = dw + wide(back[1][: w.size(0)])
        ctx.save_for_backward(torch.cat(dx), dw)
        ctx.dtype = w.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), (dw * grad).to(ctx.dtype), None, None, None


def loss_and_slope(logits: Tensor, targets: Tensor, V: int, cap: float | None, scale: float = 1.0,
                   dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Σ cross entropy over the targets ≥ 0, and scale · its gradient by the logits (N, ≥ V), of which the first V
    count, in the logits' type or another."""
    if kernels.can_run(logits):
        nats, slope = fused_cross_entropy(logits, targets, V, cap, scale, dtype)
        return nats.sum(), slope
    wanted, real = targets.clamp(min=0).unsqueeze(-1), (targets >= 0).unsqueeze(-1)
    place = torch.arange(logits.size(1), device=logits.device)
    z = softcap(wide(logits), cap)
    if logits.size(1) > V:
        z = torch.where(place < V, z, -math.inf)
    top = z.amax(dim=-1, keepdim=True)
    log_sum = top + (z - top).exp().sum(dim=-1, keepdim=True).log()
    nats = log_sum - softcap(wide(logits.gather(1, wanted)), cap)
    slope = (z - log_sum).exp() - (place == wanted).to(z.dtype)
    if cap is not None:
        slope = slope * (1 - (softcap(wide(logits), cap) / cap).square())
    return torch.where(real, nats, 0.0).sum(), (torch.where(real, slope, 0.0) * scale).to(dtype or logits.dtype)


HeadLoss.of = staticmethod(loss_and_slope)


# ---- the language model --------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """What every architecture is asked for."""

    arch: str = option("strawberry", "the family of architectures")
    vocab_size: int = option(8192, "entries of the vocabulary, at least as many as the encoder has", low=1)
    block_size: int = option(256, "tokens in a training window", low=1)
    n_layer: int = option(2, "blocks", low=1, high=4096)
    n_head: int = option(4, "heads", low=1)
    n_embd: int = option(64, "channels of the residual stream", low=1)
    dropout: float = option(0.0, "on embeddings, attention probabilities and residual branches", low=0, below=1)
    rope_scaling: RopeScaling = option(RopeScaling(), "rotary positions beyond the length trained for")

    # what some families offer and the parts ask of all
    bias = False
    writes = "matrix"  # the role of matrices that write into the residual stream
    sparse = "none"
    windows = None
    n_experts = 1
    n_ffn_experts = 1


def default_window(c) -> None:
    c.window = c.window or max(1, c.block_size // 4)


def default_experts(c) -> None:
    c.a_experts = c.a_experts or max(1, c.n_experts // 2)
    if hasattr(c, "a_ffn_experts"):
        c.a_ffn_experts = c.a_ffn_experts or max(1, c.n_ffn_experts // 2)


def half_of(n: int) -> int:
    """n / 2, or the largest divisor of n below it.

    >>> half_of(12), half_of(25), half_of(1)
    (6, 5, 1)
    """
    return next((m for m in range(n // 2, 0, -1) if n % m == 0), 1)


def default_attention(c) -> None:
    """What attention_type's kinds need, from the width."""
    default_window(c)
    c.n_qkv = c.n_qkv or c.n_embd
    c.n_kv_head = c.n_kv_head or half_of(c.n_head)
    c.kv_rank = c.kv_rank or max(1, c.n_embd // 4)
    c.rope_dim = c.rope_dim or max(2, c.n_qkv // c.n_head // 4 * 2)


def chunk_size(c) -> int:
    """The default of retention_chunk: n_embd rounded up to a power of two, at most block_size / 2, at least 16."""
    return max(16, min(1 << (c.n_embd - 1).bit_length(), c.block_size // 2))


def attention_problems(c) -> Iterator[tuple[str, str]]:
    if c.n_head % c.n_kv_head:
        yield "n_kv_head", f"must divide n_head {c.n_head}"
    if c.rope_dim % 2:
        yield "rope_dim", "must be even, since rotary positions turn pairs"
    if c.pos_encoding == "Sinusoidal" and c.n_embd % 2:
        yield "n_embd", "must be even for sinusoidal positions"


def heads_divide(name: str, width: int, n_head: int) -> Iterator[tuple[str, str]]:
    if width % n_head:
        yield name, f"must be a multiple of n_head {n_head}; try {-(-width // n_head) * n_head}"
    elif width // n_head % 2:
        yield name, f"gives heads of {width // n_head} channels, but rotary positions turn pairs: an even number"


def expert_problems(c) -> Iterator[tuple[str, str]]:
    """What is wrong with groups of heads and of channels that do not come out even."""
    if c.n_head % c.n_experts:
        yield "n_experts", f"must divide n_head {c.n_head}"
    if c.windows is not None and len(c.windows) != c.n_experts:
        yield "windows", f"must have one window for each of n_experts {c.n_experts}"
    for active, n in (("a_experts", "n_experts"), ("a_ffn_experts", "n_ffn_experts")):
        if getattr(c, active, 1) > getattr(c, n):
            yield active, f"must be at most {n} {getattr(c, n)}"


class LanguageModel(nn.Module):
    """What all families share: the call, the loss, the cache, generation.

    A family gives `embed_tokens(idx, at)`, `trunk(x, at, states)`, `last(x)`, `new_states(…)` and `flops(T)`, and sets
    the attributes below where it differs. `last` is what is left before logits: its result (x, W) stands for x Wᵀ.
    """

    Config = ModelConfig
    causal = True  # whether the three promises hold: no token sees a later one, rows are apart, cache equals full pass
    generates = True  # whether it predicts the next token
    takes_source = False  # whether it needs source=, as encoder-decoders do
    chunk: int | None = None  # tokens that share weights, where weights change along the row
    max_positions: int | None = None  # where learned positions end
    cap: float | None = None  # of `softcap`, for the logits
    pieces = 1  # graphs that torch.compile makes of the blocks: see `divide`
    part = 2048  # tokens that a cache takes at once: masks stay small however long the prompt is

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope = None
        self.gives_last = type(self).head is LanguageModel.head  # a head of a family's own may be of any kind
        self.drop = nn.Dropout(config.dropout)
        self.register_buffer("here", torch.empty(0), persistent=False)  # tells the device and the activations' dtype

    def divide(self, n: int) -> bool:
        """Have torch.compile make about n graphs of the blocks where it would make one of all: on the way back the last
        one's gradients are there, and can travel, before the others'. Whether it does; most families cannot."""
        return self.pieces > 1

    # -- one call

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, lengths=None,
                source: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) and, given targets, the mean loss in nats. In training the logits of a loss may be None.

        idx (B, T) int64; targets (B, T), −1 ignored, all −1 gives loss 0. With a cache the call continues where it
        stands; lengths (B,) says how many of each row's tokens are real, when rows are ragged. Encoder-decoders take
        source (B, S), which a cache already holds.
        """
        self.check_length(idx)
        x = self.whole(idx, source) if cache is None else self.go_on(idx, cache, lengths)
        if targets is None:
            return self.head(x), None
        flat = targets.flatten()
        if self.training and torch.is_grad_enabled() and self.gives_last and fuses_head(x):
            x, w = self.last(x)
            x = activation(x).flatten(0, 1)
            logits, loss = None, HeadLoss.apply(x, w, flat, self.cap, Float8.takes(x, w))
        else:
            logits = self.head(x)
            loss = F.cross_entropy(wide(logits).flatten(0, 1), flat, ignore_index=-1, reduction="sum")
        return logits, loss / (flat >= 0).sum().clamp(min=1)

    def head(self, x: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return softcap(linear(*self.last(x)), self.cap)

    def check_length(self, idx: Tensor) -> None:
        if self.max_positions is not None and idx.size(1) > self.max_positions:
            raise UserError(f"{idx.size(1)} tokens exceed block_size {self.max_positions}, where positions end; "
                            "give fewer, or train with a larger block_size")

    def whole(self, idx: Tensor, source: Tensor | None) -> Tensor:
        at = self.stand(idx)
        at.memory = self.remember(source)
        return self.hidden(idx, at, None)

    def stand(self, idx: Tensor) -> At:
        """Where the tokens of a whole text stand."""
        pos = torch.arange(idx.size(1), device=idx.device).unsqueeze(0)
        return At(pos, slot=min(self.chunk or idx.size(1), idx.size(1)))

    def remember(self, source: Tensor | None) -> Memory | None:
        """What the decoder may read of the source."""
        if source is not None:
            raise UserError(f"a {self.config.arch} of this kind reads no source; give it to an encoder-decoder")

    def hidden(self, idx: Tensor, at: At, states) -> Tensor:
        at.rope = None if self.rope is None else self.rope(at.pos)
        return self.trunk(activation(self.drop(self.embed_tokens(idx, at))), at, states)

    @torch.no_grad()
    def go_on(self, idx: Tensor, cache: Cache, lengths) -> Tensor:
        """Continue each row of the cache, in parts: retention's weights change at chunk borders."""
        B, T = idx.shape
        counts = [T] * B if lengths is None else [int(n) for n in lengths]
        self.check_call(idx, cache, counts)
        outputs, begin = [], 0
        for end in self.cuts(cache, T):
            part = [min(max(n - begin, 0), end - begin) for n in counts]
            outputs.append(self.hidden(idx[:, begin:end], self.stand_on(cache, end - begin, part), cache.layers))
            cache.advance(part)
            begin = end
        return torch.cat(outputs, dim=1)

    @torch.no_grad()
    def step(self, token: Tensor, cache: Cache, held: int = At.held) -> Tensor:
        """Logits (B, V), float32 or wider, after one more token (B,) of every row. The same launches whatever the rows'
        lengths are, and nothing that the host must know, so that a GPU can record it once: see decode.py. The caller
        first opens the chunks of rows at a border, and afterwards moves cache.pos and cache.length on. A row that has
        more than `held` tokens would be cut short."""
        at = At(cache.pos.unsqueeze(1), slot=1, opened=True, held=held, stepping=True, memory=cache.memory)
        return wide(self.head(self.hidden(token.unsqueeze(1), at, cache.layers))[:, -1])

    def open_chunks(self, cache: Cache, rows) -> None:
        """Make what the next chunk of these rows (a list or slice), which stand at a border, goes by."""

    def check_call(self, idx: Tensor, cache: Cache, counts: list[int]) -> None:
        if not self.causal:
            raise UserError(f"this {self.config.arch} sees the future and has no cache; call it on the whole text")
        if len(counts) != len(cache.length) or idx.size(0) != len(counts):
            raise UserError(f"{idx.size(0)} rows, {len(counts)} lengths, a cache for {len(cache.length)}: give as many")
        if min(counts) < 0 or max(counts) > idx.size(1):
            raise UserError(f"lengths {counts} must lie between 0 and the call's {idx.size(1)} tokens")
        longest = max(n + c for n, c in zip(cache.length, counts, strict=True))
        if longest > cache.max_length:
            raise UserError(f"{longest} tokens exceed the cache's max_length {cache.max_length}; make a longer one")

    def cuts(self, cache: Cache, T: int) -> list[int]:
        """Where the parts of a call of T tokens end: at the first chunk border, then whenever there are more than fit a
        mask of reasonable size; token by token where rows differ."""
        if T == 1 or (self.chunk and len(set(cache.length)) > 1):
            return list(range(1, T + 1))
        chunk = self.chunk or 1
        first, most = -max(cache.length) % chunk, -(-self.part // chunk) * chunk
        return sorted({min(first, T), *range(first + most, T, most), T} - {0})

    def stand_on(self, cache: Cache, T: int, counts: list[int]) -> At:
        """Where a part's tokens stand; on the way, chunks are opened where not the part itself does it."""
        device, lengths = cache.pos.device, set(cache.length)
        start = lengths.pop() if len(lengths) == 1 else None
        opened = self.chunk is not None and (T == 1 or start is None or start % self.chunk != 0)
        if opened and (rows := [i for i, n in enumerate(cache.length) if n % self.chunk == 0]):
            self.open_chunks(cache, slice(None) if len(rows) == len(counts) else rows)
        i = torch.arange(T, device=device)
        return At(
            pos=cache.pos.unsqueeze(1) + i if start is None else (start + i).unsqueeze(0),
            slot=min(self.chunk or T, T),
            count=None if min(counts) == T else torch.tensor(counts, device=device),
            opened=opened,
            start=start,
            held=max(cache.length),
            memory=cache.memory,
        )

    def new_cache(self, batch_size: int, max_length: int, source: Tensor | None = None,
                  max_source: int | None = None) -> Cache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens, on the model's device. That of an
        encoder-decoder holds the source (B, S), encoded, or has room for sources of up to `max_source` tokens: see
        `read`."""
        if self.max_positions is not None and max_length > self.max_positions:
            raise UserError(f"max_length {max_length} exceeds block_size {self.max_positions}, where positions end")
        device, dtype = self.here.device, self.here.dtype
        cache = Cache(self.new_states(batch_size, max_length, device, dtype), batch_size, max_length, device)
        self.attach(cache, source, max_source)
        return cache

    def attach(self, cache: Cache, source: Tensor | None, max_source: int | None) -> None:
        """Make room for the source in a new cache."""
        self.remember(source)

    def read(self, source: Tensor, cache: Cache) -> None:
        """Give the cache's rows another source (B, S) to read."""
        self.remember(source)

    # -- text

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, min_p: float | None = None, stop=(), generator=None,
               source: Tensor | None = None) -> Iterator[Tensor]:
        """Continue idx (B, T), one token (B,) int64 at a time.

        temperature 0 takes the likeliest. `stop` holds token ids that end a row: it repeats its stop token until all
        rows have ended. `generator` is a torch.Generator, or one for each row. Plain and slow on a GPU: decode.py is
        how the scripts make text.
        """
        if not self.generates:
            raise UserError(f"a {self.config.arch} of kind encoder predicts masked tokens; it does not continue text")
        stop = torch.tensor(sorted(stop), dtype=torch.int64, device=idx.device)
        top_k = None if not top_k or top_k >= self.config.vocab_size else top_k
        top_p = None if top_p is None or top_p >= 1 else top_p
        ended, last = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device), None
        total = idx.size(1) + max_new_tokens
        fits = self.causal and (self.max_positions is None or total <= self.max_positions)
        cache = self.new_cache(idx.size(0), total, source) if fits else None
        logits = self.last_logits(idx, cache, source)
        for i in range(max_new_tokens):
            u = uniform_numbers(len(idx), generator, idx.device)
            token = sample(logits, u, temperature, top_k, top_p, min_p, width=top_k)
            if bool((token < 0).any()):
                raise UserError("the model predicts NaN: its weights are ruined; use an earlier checkpoint")
            token = token if last is None else torch.where(ended, last, token)
            yield token
            last, ended = token, ended | torch.isin(token, stop)
            if i + 1 == max_new_tokens or (len(stop) and bool(ended.all())):
                return
            idx = torch.cat((idx, token.unsqueeze(1)), dim=1)
            logits = self.last_logits(idx if cache is None else token.unsqueeze(1), cache, source)

    @torch.no_grad()
    def after(self, idx: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V), float32 or wider, after the last of idx (B, T) alone."""
        self.check_length(idx)
        return wide(self.head(self.go_on(idx, cache, None)[:, -1:])[:, -1])

    def last_logits(self, idx: Tensor, cache: Cache | None, source: Tensor | None) -> Tensor:
        """(B, V) in float32 after the last token: through the cache, or computed anew from the last block_size tokens,
        row by row, since rows may see each other where there is no cache to be had."""
        if cache is not None:
            return self.after(idx, cache)
        sources = [None] * len(idx) if source is None else source.split(1)
        rows = zip(idx[:, -self.config.block_size :].split(1), sources, strict=True)
        return wide(torch.cat([self(row, source=its)[0][:, -1] for row, its in rows]))

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, min_p: float | None = None, stop=(), generator=None,
                 source: Tensor | None = None) -> Tensor:
        """idx (B, T) and what follows it, (B, T + new). Arguments as `stream`."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, min_p, stop, generator, source)
        return torch.cat((idx, *(token.unsqueeze(1) for token in tokens)), dim=1)

    # -- about the model

    def roles(self) -> dict[str, str]:
        """Parameter name to role: what `init_weights` and the optimizer go by."""
        return {
            f"{prefix}.{name}" if prefix else name: module.roles[name]
            for prefix, module in self.named_modules()
            for name, p in module.named_parameters(recurse=False)
            if p is not None
        }

    def num_params(self, non_embedding: bool = True) -> int:
        """How many numbers are learned; without those of embeddings and learned positions unless asked otherwise."""
        left_out = ("embedding", "input", "position", "head") if non_embedding else ()
        roles = self.roles()
        return sum(p.numel() for name, p in self.named_parameters() if roles[name] not in left_out)

    def flops_per_token(self, T: int, rows: int = 1) -> float:
        """Floating-point operations of the matrix products in one training step over `rows` windows of T tokens, per
        token: forward 1, backward 2. Attention is counted full, T² without a causal or window discount."""
        return 3 * (self.flops(T) - (1 - 1 / rows) * self.flops_at_once() / T)

    def flops_at_once(self) -> float:
        """The part of T · flops(T) that all rows have in common."""
        return 0.0

    def routers(self) -> dict[str, Router]:
        return {name: m for name, m in self.named_modules() if isinstance(m, Router)}

    def after_step(self, taken: Tensor | float = 1.0) -> None:
        """To be called after each optimizer step in training: balances the routers, unless `taken` is 0."""
        for router in self.routers().values():
            router.balance(taken)


def uniform_numbers(n: int, generator, device) -> Tensor:
    """(n,) numbers in [0, 1), from one torch.Generator, or one for each, or torch's own."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([torch.rand(1, generator=g, device=g.device) for g in generator]).to(device)
    return torch.rand(n, generator=generator, device=device if generator is None else generator.device).to(device)


def sample(logits: Tensor, u: Tensor, temperature, top_k=None, top_p=None, min_p=None, width: int | None = None,
           greedy: bool = True) -> Tensor:  # fmt: skip
    """Draw a token (B,) from logits (B, V): the one at which the running sum of probabilities passes u (B,) in [0, 1).

    Left out are, one after the other, all but the top_k likeliest, all but the likeliest that make up top_p together,
    and those less than min_p times as likely as the likeliest; ties stay together. Each is a number or (B,), None is
    off; temperature 0 takes the likeliest token, unless `greedy` says that no row has it. `width`: how many tokens
    top_k leaves at most. A row whose logits are NaN gets token −1. What a row draws does not depend on the other rows,
    nor on what is asked for them.
    """
    numbers = (temperature, top_k, top_p, min_p)
    temperature, top_k, top_p, min_p = (
        f if f is None else torch.as_tensor(f, device=logits.device).view(-1, 1) for f in numbers)
    heat = temperature + (temperature == 0)
    p = ((logits - logits.amax(dim=-1, keepdim=True)) / heat).exp()  # as a share of the likeliest one's
    if top_k is not None or top_p is not None:
        ordered = p.topk(width).values if width else p.sort(descending=True).values
        if top_k is not None:
            ordered = ordered.masked_fill(torch.arange(ordered.size(1), device=p.device) >= top_k, 0.0)
        if top_p is not None:  # what stands before a token already makes up top_p
            beyond = ordered.cumsum(dim=-1) - ordered >= top_p * ordered.sum(dim=-1, keepdim=True)
            ordered = ordered.masked_fill(beyond & (top_p < 1), 0.0)
        p = p.masked_fill(p < ordered.masked_fill(ordered == 0, torch.inf).amin(dim=-1, keepdim=True), 0.0)
    if min_p is not None:
        p = p.masked_fill(p < min_p, 0.0)
    token = pick(p, u)
    return torch.where(temperature.squeeze(1) == 0, logits.argmax(dim=-1), token) if greedy else token


def pick(p: Tensor, u: Tensor) -> Tensor:
    """The place (B,) at which the running sum of p (B, V), at least zero, passes its share u (B,), −1 where p is NaN.

    First among some 128 groups of neighbours, then within one of them: short sums, made side by side.
    """
    size = -(-p.size(1) // 128)
    groups = F.pad(p, (0, -p.size(1) % size)).unflatten(1, (-1, size))  # (B, G, size)
    total = groups.sum(dim=-1).cumsum(dim=-1)
    u = u.clamp(max=1 - 2**-20).unsqueeze(1)  # so that rounding never passes the last
    goal = u * total[:, -1:]
    group = (total <= goal).sum(dim=-1, keepdim=True).clamp(max=total.size(1) - 1)
    inner = groups.gather(1, group.unsqueeze(2).expand(-1, -1, size)).squeeze(1).cumsum(dim=-1)
    goal = (goal - F.pad(total, (1, -1)).gather(1, group)).clamp(min=0)
    goal = torch.minimum(goal, inner[:, -1:] * (1 - 2**-20))
    place = group * size + (inner <= goal).sum(dim=-1, keepdim=True)
    return torch.where(total[:, -1].isnan(), -1, place.clamp(max=p.size(1) - 1).squeeze(1))


# ---- strawberry ----------------------------------------------------------------------------------------------------


@dataclass
class StrawberryConfig(ModelConfig):
    arch: str = option("strawberry", "the family of architectures", choices=("strawberry",))
    n_qkv: int = option(256, "D, channels of q, of k and of v", low=1)
    r_layer: int = option(2, "retention steps of each block before its last step; 0: none", low=0, high=1024)
    aft_ratio: int = option(3, "attention-free steps for each step of expert attention", low=0)
    aft: str = option("simple", "positions of attention-free mixing", choices=tuple(AFTS))
    window: int | None = option(None, "tokens that attention sees; default block_size / 4", low=1)
    n_experts: int = option(1, "groups of heads that a router chooses from, token by token", low=1)
    a_experts: int | None = option(None, "groups active for a token; default half", low=1)
    windows: list[int] | None = option(None, "each expert's; default window, window / 2, … not under 16", low=1)
    n_ffn_experts: int = option(1, "groups of SwiGLU channels that a router chooses from", low=1)
    a_ffn_experts: int | None = option(None, "groups active for a token; default half", low=1)
    recursions: int = option(1, "times that the whole stack is run", low=1, high=1024)
    adaptive: bool = option(False, "each token chooses its number of recursions")
    retention: str = option("on", "'none': the same steps with weights that stay as they are", choices=("on", "none"))
    retention_scope: str = option(
        "causal", "what the update sums over: earlier chunks of the row, or ('batch', not causal) everything",
        choices=("causal", "batch"))
    retention_chunk: int | None = option(
        None, "tokens that share weights; default n_embd rounded up to a power of two, at most block_size / 2, "
        "at least 16", low=1)
    retention_scale: float | None = option(None, "size of the update; default n_embd ** -0.5", above=0)
    logit_softcap: float | None = option(None, "c: logits become c·tanh(logits / c)", above=0)

    def __post_init__(self):
        default_window(self)
        default_experts(self)
        self.retention_chunk = self.retention_chunk or chunk_size(self)
        self.retention_scale = self.retention_scale or self.n_embd**-0.5

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)
        yield from expert_problems(self)
        if self.n_embd % self.n_ffn_experts:
            yield "n_ffn_experts", f"must divide n_embd {self.n_embd}"
        if self.adaptive and self.recursions < 2:
            yield "adaptive", "needs recursions of at least 2, to have depths to choose from"


class Weights(NamedTuple):
    """The three matrices of a block that retention changes: each shared, (rows, columns), or one for each chunk of each
    row, (B, J, rows, columns); where a whole text is read, as Scaled or ByChunk."""

    qkv: Tensor | Scaled | ByChunk  # (3D, C)
    swiglu: Tensor | Scaled | ByChunk  # (2C, D)
    out: Tensor | Scaled | ByChunk  # (C, C)


def rescale(w: Weights, tao: Tensor) -> Weights:
    """Each matrix at its usual deviation, times |tao|: what the update rule comes to where oa = 0."""
    C, D = w.qkv.size(-1), w.swiglu.size(-1)
    alpha, beta, gamma = tao.abs().unbind(dim=-1)
    return Weights(std(w.qkv, C, alpha), std(w.swiglu, D, beta), std(w.out, C, gamma))


def reweigh(w: Weights, oa: Tensor, out: Tensor, tao: Tensor) -> Weights:
    """The update rule: w + f(w), f(w) = silu(w @ oa) @ outᵀ, rescaled."""

    def f(m: Tensor) -> Tensor:
        return F.silu(m @ oa.to(m.dtype)) @ out.mT

    C, D = w.qkv.size(-1), w.swiglu.size(-1)
    view = w.swiglu.unflatten(-2, (C, 2)).flatten(-2).mT  # (…, 2C, D) → (…, C, 2D) → (…, 2D, C)
    swiglu = w.swiglu + f(view).mT.unflatten(-1, (2, D)).flatten(-3, -2)  # and back
    return rescale(Weights(w.qkv + f(w.qkv), swiglu, w.out + f(w.out)), tao)


def grown(w: Weights, oa: Tensor | None, block: StrawberryBlock) -> Weights:
    """`reweigh` for whole texts and Scaled weights: the same function, in as few passes over the weights, or as few
    launches, as there can be. oa (B, n, C, C), of n chunks of each row; None: the weights are rescaled alone.

    It leaves the rescaling to what is multiplied by the weights: w = scale · raw gives
    w + silu(w oa) outᵀ = scale · (raw + h outᵀ) with z = raw oa and h = z ⊙ σ(scale · z).
    """
    raws, scales = zip(*w, strict=True)
    if oa is None:
        deviations = [wide(raw).std(dim=(-2, -1)) for raw in raws]
    else:
        raws, scales = [raw.to(oa.dtype) for raw in raws], [scale.expand(*oa.shape[:2], 1, 1) for scale in scales]
        grow = grow_each if can_fuse_update(raws[0], oa) else grow_together
        raws, deviations = grow(Weights(*raws), scales, oa, block.out.to(oa.dtype))
    sizes = (w.qkv.raw.size(-1), w.swiglu.raw.size(-1), w.out.raw.size(-1))
    gains = [gain * n**-0.5 for gain, n in zip(block.tao[0].abs(), sizes, strict=True)]
    changed = zip(raws, scales, gains, deviations, strict=True)
    return Weights(*(Scaled(raw, s * gain / (s * deviation + 1e-8)) for raw, s, gain, deviation in changed))


def grow_together(raws: Weights, scales: list[Tensor], oa: Tensor, out: Tensor) -> tuple[Weights, list[Tensor]]:
    """raw + h outᵀ and its deviations, all rows of the three matrices as one: few launches, for small ones."""
    C, D = raws.qkv.size(-1), raws.swiglu.size(-1)
    view = raws.swiglu.unflatten(-2, (C, 2)).flatten(-2).mT  # (…, 2C, D) → (…, C, 2D) → (…, 2D, C)
    rows = (3 * D, 2 * D, C)
    raw = torch.cat((raws.qkv, view, raws.out), dim=-2)
    scale = torch.cat([scale.expand(-1, -1, n, 1) for scale, n in zip(scales, rows, strict=True)], dim=2)
    z = raw.expand(*oa.shape[:2], -1, -1) @ oa
    h = (z * torch.sigmoid(scale * z)).to(z.dtype)
    qkv, view, w_out = (raw + h @ out.mT).split(rows, dim=-2)
    deviations = [wide(m).std(dim=(-2, -1), keepdim=True) for m in (qkv, view, w_out)]
    return Weights(qkv, view.mT.unflatten(-1, (2, D)).flatten(-3, -2), w_out), deviations


def grow_each(raws: Weights, scales: list[Tensor], oa: Tensor, out: Tensor) -> tuple[Weights, list[Tensor]]:
    """The same matrix by matrix, for large ones: nothing is transposed, and passes are parts of the products."""
    C = len(out)
    views = (raws.qkv, raws.swiglu.unflatten(-2, (C, 2)).flatten(-2), raws.out)  # (…, 2C, D) → (…, C, 2D)
    kinds = zip(views, scales, (False, True, False), strict=True)
    made, deviations = zip(*(Grow.apply(m, scale, oa, out, viewed) for m, scale, viewed in kinds), strict=True)
    return Weights(made[0], made[1].view(*oa.shape[:2], *raws.swiglu.shape[-2:]), made[2]), list(deviations)


class Grow(torch.autograd.Function):
    """raw + h outᵀ with z = raw oa and h = z ⊙ σ(scale · z), and the deviation of each matrix. One that the rule reads
    as its view is kept as the view's transpose, so that nothing is transposed: z = oaᵀ raw, raw + out h.

    In half types 2 bytes of `raw` and 2 of `z` are kept for the way back for each of a matrix's numbers. What moves and
    what is computed stands in kernels.grow and grow_backward; besides, the gradient of the deviation and what comes
    from the other uses are added in one pass.
    """

    @staticmethod
    def forward(ctx, raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, viewed: bool) -> tuple[Tensor, Tensor]:
        with full_precision(raw):
            new, z, mean, variance = gated_update(raw, scale, oa, out, viewed)
        ctx.save_for_backward(raw, scale, oa, out, z, new, mean, variance)
        ctx.viewed = viewed
        return new, variance.sqrt()

    @staticmethod
    def backward(ctx, grad: Tensor, grad_deviation: Tensor) -> tuple:
        raw, scale, oa, out, z, new, mean, variance = ctx.saved_tensors
        slope = torch.where(variance > 0, grad_deviation * variance.rsqrt(), 0.0) / (new[0, 0].numel() - 1)
        grad = (wide(grad) + slope * (wide(new) - mean)).to(new.dtype)
        with full_precision(raw):
            d_raw, *others = gated_update_backward(grad, raw, scale, oa, out, z, ctx.viewed)
        if raw.dim() == 2:
            d_raw = wide(d_raw).sum(dim=(0, 1)).to(raw.dtype)
        return d_raw, *others, None


def unscaled(w: Weights, u: Tensor) -> Weights:
    """Matrices that nothing has rescaled yet, as Scaled; others as they are."""
    one = wide(u).new_ones(())
    return Weights(*(Scaled(m, one) if isinstance(m, Tensor) else m for m in w))


class NoRetention:
    """The same steps with weights that stay as they are."""

    chunk = None
    causal = True
    apart = False  # whether torch.compile takes steps and updates each for themselves
    sums = False  # whether it reads u and g

    def update(self, w: Weights, ug: Tensor, block: StrawberryBlock, at: At, state: None) -> Weights:
        return w

    def new_state(self, batch: int, device, dtype, w: Weights) -> None:
        return None

    def flops(self, w: Weights, T: int) -> float:
        return 0

    def flops_at_once(self, w: Weights) -> float:
        """The part of T · flops that all rows have in common."""
        return 0


class BatchRetention(NoRetention):
    """The rule read literally: oa from all tokens of all rows. It sees the future and the other rows."""

    causal = False
    sums = True
    apart = True  # its weights are few, so that what a pass over them costs is nothing beside what compiling takes
    shares = 8  # of the tokens, summed one beside the other

    def __init__(self, c):
        self.scale = c.retention_scale

    def update(self, w: Weights, ug: Tensor, block: StrawberryBlock, at: At, state: None) -> Weights:
        u, g = ug.flatten(0, 1).unsqueeze(0).chunk(2, dim=-1)  # (1, B·T, C)
        sums = chunk_sums(u, g, -(-u.size(1) // self.shares))
        oa = self.scale * norm(sums.sum(dim=1, keepdim=True) / len(ug))  # (1, 1, C, C)
        made = grown(unscaled(w, u), oa.to(g.dtype), block)
        return Weights(*(Scaled(raw[0, 0], scale.view(())) for raw, scale in made))

    def flops(self, w: Weights, T: int) -> float:
        C = w.out.size(-1)
        return 2 * C * C + self.flops_at_once(w) / T

    def flops_at_once(self, w: Weights) -> float:
        return reweigh_flops(w)


class CausalRetention:
    """oa of chunk j from chunks 0 … j − 1 of its own row. What is carried: the two sums, and the open chunk's weights,
    which the next step's update starts from."""

    causal = True
    apart = False
    sums = True

    def __init__(self, c):
        self.scale, self.chunk = c.retention_scale, c.retention_chunk

    def update(self, w: Weights, ug: Tensor, block: StrawberryBlock, at: At, state: ChunkState) -> Weights:
        u, g = ug.chunk(2, dim=-1)
        if state is None:
            return self.whole(w, u, g, block, at)
        return Weights(*by_chunks(u, g, at, state, lambda before: self.make(w, before, block)))

    def make(self, w: Weights, before: Tensor, block: StrawberryBlock) -> Weights:
        return reweigh(w, self.scale * norm(before), block.out, block.tao)

    def whole(self, w: Weights, u: Tensor, g: Tensor, block: StrawberryBlock, at: At) -> Weights:
        """The same for a whole text, without the products that chunk 0, whose oa is zero, does not need."""
        J, summed, w = -(-u.size(1) // at.slot), self.summed(u.size(1), at.slot), unscaled(w, u)
        first, later = zip(*((m, m) if isinstance(m, Scaled) else m for m in w), strict=True)
        first = grown(Weights(*first), None, block)
        if J == 1:
            return first
        sums = chunk_sums(*(x[:, : summed * at.slot] for x in (u, g)), at.slot)
        before = sums.cumsum(dim=1)[:, : J - 1] if J > 2 else sums
        later = grown(Weights(*later), (self.scale * norm(before)).to(g.dtype), block)
        return Weights(*map(ByChunk, first, later))

    def new_state(self, batch: int, device, dtype, w: Weights) -> ChunkState:
        return ChunkState(batch, device, dtype, w.out.size(-1), [tuple(m.shape) for m in w])

    def flops(self, w: Weights, T: int) -> float:
        C, later = w.out.size(-1), -(-T // self.chunk) - 1  # chunk 0 needs no products
        return (self.summed(T, self.chunk) * 2 * C * C * self.chunk + later * reweigh_flops(w)) / T

    def flops_at_once(self, w: Weights) -> float:
        return 0

    @staticmethod
    def summed(T: int, slot: int) -> int:
        """Chunks of T tokens that are summed. The last one's sum has no use, but to leave it out of several whole ones
        would take a copy of them."""
        J = -(-T // slot)
        return J if J > 2 and T % slot == 0 else J - 1


def reweigh_flops(w: Weights) -> float:
    """Two products with a (C, C) matrix for each row of the three matrices, as f sees them."""
    C = w.out.size(-1)
    return 2 * 2 * C * (w.qkv.numel() + w.swiglu.numel() + w.out.numel())


RETENTION = {"causal": CausalRetention, "batch": BatchRetention}


def strawberry_steps(c: StrawberryConfig) -> list[str]:
    """Which mixer each step of a block uses: retention steps 1 … R, attention every (aft_ratio + 1)-th, then attention.

    >>> strawberry_steps(StrawberryConfig(r_layer=5, aft_ratio=3))
    ['aft', 'aft', 'aft', 'tea', 'aft', 'tea']
    """
    steps = ["tea" if i % (c.aft_ratio + 1) == 0 else "aft" for i in range(1, c.r_layer + 1)]
    return [*steps, "tea"]


class StrawberryBlock(nn.Module):
    """R retention steps and a last one, all with the same weights, which retention changes from step to step."""

    roles = {"w_attn_qkv": "matrix", "w_attn_swiglu": "matrix", "w_attn_out": "matrix", "out": "residual", "tao": "tao"}

    def __init__(self, c: StrawberryConfig):
        super().__init__()
        C, D = c.n_embd, c.n_qkv
        self.widths = [D] * 3  # of q, then k, then v
        self.w_attn_qkv = nn.Parameter(torch.empty(3 * D, C))
        self.w_attn_swiglu = nn.Parameter(torch.empty(2 * C, D))
        self.w_attn_out = nn.Parameter(torch.empty(C, C))
        self.retention = NoRetention()
        if c.r_layer and c.retention == "on":
            self.out, self.tao = nn.Parameter(torch.empty(C, C)), nn.Parameter(torch.empty(1, 3))
            self.retention = RETENTION[c.retention_scope](c)
        else:  # the weights are read by products alone
            self.products = ("w_attn_qkv", "w_attn_swiglu", "w_attn_out")
        self.steps = strawberry_steps(c)
        self.tea = ExpertAttention(c, rotary_qk_norm)
        self.aft = AFTS[c.aft](c, channel_norm) if "aft" in self.steps else None
        self.ffn_router = Router(C, c.n_ffn_experts, c.a_ffn_experts) if c.n_ffn_experts > 1 else None
        self.drop = nn.Dropout(c.dropout)

    def base(self) -> Weights:
        return Weights(self.w_attn_qkv, self.w_attn_swiglu, self.w_attn_out)

    def forward(self, x: Tensor, at: At, states: list | None) -> Tensor:
        w = self.base()
        for i, kind in enumerate(self.steps):
            mixed, retained = (None, None) if states is None else states[i]
            x, ug = self.step(getattr(self, kind), x, w, at, mixed, i + 1 < len(self.steps))
            if i + 1 < len(self.steps):
                w = self.retention.update(w, ug, self, at, retained)
        return x

    def step(self, mixer: nn.Module, x: Tensor, w: Weights, at: At, state, retain: bool) -> tuple[Tensor, Tensor]:
        """Mix and SwiGLU with the weights w; also its u and g side by side (B, T, 2C), which retention sums if it is to
        `retain`."""
        q, k, v = joint(norm(x), w.qkv, self.widths, mixer, at)
        out, ug = self.feed(mixer(q, k, v, x, at, state), x, w, at, retain and self.retention.sums)
        return at.moved(x, x + self.drop(out)), ug

    def feed(self, y: Tensor, x: Tensor, w: Weights, at: At, apart: bool) -> tuple[Tensor, Tensor]:
        """SwiGLU of what was mixed; also its u and g side by side, which have gradients of their own if `apart`."""
        pair = matrix(w.swiglu), matrix(w.out)
        if self.ffn_router is None and at.count is None and at.active is None and Float8.takes(y, *pair):
            return feed_8(y, *pair, "swiglu", apart, alone=True)
        ug = project(y, pair[0], at)
        u, g = ug.chunk(2, dim=-1)
        if self.ffn_router is not None:  # groups of channels, those not chosen at zero
            u = u * self.ffn_router(x, at).repeat_interleave(u.size(-1) // self.ffn_router.n, dim=-1)
        out = project(u * F.silu(g), pair[1], at)
        if self.ffn_router is not None or at.count is not None or at.active is not None:
            ug = torch.cat((at.counted(u), g), dim=-1)
        return out, ug

    def open_chunks(self, states: list, rows) -> None:
        w = self.base()
        for _, retained in states[:-1]:
            w = Weights(*retained.open(rows, lambda before, w=w: self.retention.make(w, before, self)))

    def new_states(self, batch: int, max_length: int, device, dtype) -> list:
        return [
            (getattr(self, kind).new_state(batch, max_length, device, dtype),
             self.retention.new_state(batch, device, dtype, self.base()) if i + 1 < len(self.steps) else None)
            for i, kind in enumerate(self.steps)
        ]

    def flops(self, T: int) -> float:
        w = self.base()
        steps = sum(2 * sum(m.numel() for m in w) + getattr(self, kind).flops(T) for kind in self.steps)
        routed = len(self.steps) * self.ffn_router.flops(T) if self.ffn_router else 0
        return steps + routed + (len(self.steps) - 1) * self.retention.flops(w, T)

    def flops_at_once(self) -> float:
        return (len(self.steps) - 1) * self.retention.flops_at_once(self.base())


@torch.compiler.disable(recursive=False)
def one_by_one(blocks: Sequence[StrawberryBlock], x: Tensor, at: At) -> Tensor:
    """x (B, T, C) through all blocks. torch.compile takes each block for itself, or each step of one, so that what it
    compiled for the first serves them all, where a stack as one graph would take as many times as long."""
    for block in blocks:  # with masks of its own: what one adds to `at` would make the next one's call another
        at = replace(at, masks={})
        x = step_by_step(block, x, at) if block.retention.apart else block(x, at, None)
    return x


@torch.compiler.disable(recursive=False)
def step_by_step(block: StrawberryBlock, x: Tensor, at: At) -> Tensor:
    """A block's forward."""
    w = block.base()
    for i, kind in enumerate(block.steps):
        x, ug = block.step(getattr(block, kind), x, w, replace(at, masks={}), None, i + 1 < len(block.steps))
        if i + 1 < len(block.steps):
            w = block.retention.update(w, ug, block, at, None)
    return x


class Strawberry(LanguageModel):
    """Strawberry (2026): attention-free mixing, local attention, and weights that the text read so far rewrites."""

    Config = StrawberryConfig

    def __init__(self, config: StrawberryConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(StrawberryBlock(c) for _ in range(c.n_layer))
        self.depth = Router(c.n_embd, c.recursions, 1) if c.adaptive else None
        self.rope = Rope(rope_frequencies(c.n_qkv // c.n_head, c.rope_scaling, c.block_size)[0])
        self.pieces = len(self.blocks)
        retention = self.blocks[0].retention
        self.causal, self.chunk, self.cap = retention.causal, retention.chunk, c.logit_softcap
        self.max_positions = c.block_size if c.aft in ENDS and self.blocks[0].aft is not None else None

    def embed_tokens(self, idx: Tensor, at: At) -> Tensor:
        return norm(self.embed(idx))

    def trunk(self, x: Tensor, at: At, states: list | None) -> Tensor:
        return repeat(self.once, x, at, states, self.config.recursions, self.depth)

    def once(self, x: Tensor, at: At, states: list | None) -> Tensor:
        if states is None and self.pieces > 1 and torch.compiler.is_compiling():
            return one_by_one(self.blocks, x, at)
        return through(self.blocks, x, at, states)

    def last(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x), self.embed.weight

    def new_states(self, batch: int, max_length: int, device, dtype) -> list:
        passes = range(self.config.recursions)
        return [[block.new_states(batch, max_length, device, dtype) for block in self.blocks] for _ in passes]

    def open_chunks(self, cache: Cache, rows) -> None:
        for states in cache.layers:
            for block, mine in zip(self.blocks, states, strict=True):
                block.open_chunks(mine, rows)

    def flops(self, T: int) -> float:
        once = sum(block.flops(T) for block in self.blocks)
        depth = self.depth.flops(T) if self.depth else 0
        return self.config.recursions * once + depth + 2 * self.embed.weight.numel()

    def flops_at_once(self) -> float:
        return self.config.recursions * sum(block.flops_at_once() for block in self.blocks)


# ---- strawberry-v0 -------------------------------------------------------------------------------------------------


@dataclass
class StrawberryV0Config(ModelConfig):
    arch: str = option("strawberry-v0", "the family of architectures", choices=("strawberry-v0",))
    n_qkv: int = option(256, "D, channels of q, of k and of v", low=1)
    r_layer: int = option(2, "times that each block is run", low=1, high=1024)
    aft: str = option("full", "positions of attention-free mixing", choices=tuple(AFTS))
    window: int | None = option(None, "tokens that attention sees; default block_size / 4", low=1)
    n_experts: int = option(1, "groups of heads that a router chooses from, token by token", low=1)
    a_experts: int | None = option(None, "groups active for a token; default half", low=1)
    windows: list[int] | None = option(None, "each expert's; default window, window / 2, … not under 16", low=1)
    compaction: bool = option(False, "Compaction Compute: before its attention a block adds norm(x) @ Y to x")
    compaction_scope: str = option(
        "causal", "what Y sums over: earlier chunks of the row, or ('batch', not causal) everything",
        choices=("causal", "batch"))
    retention_chunk: int | None = option(
        None, "tokens that share Y; default n_embd rounded up to a power of two, at most block_size / 2, at least 16",
        low=1)

    def __post_init__(self):
        default_window(self)
        default_experts(self)
        self.retention_chunk = self.retention_chunk or chunk_size(self)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)
        yield from expert_problems(self)


def compact(x: Tensor, wo: Tensor, wa: Tensor, wt: Tensor) -> Tensor:
    """Compaction Compute: Y = π·tanh((Oᵀ A) / √C) @ WT, (C, C) whatever the number of tokens in x (…, C), from
    O = norm(x) WO and A = norm(x) WA."""
    h = norm(x).flatten(0, -2)
    o, a = h @ wo, h @ wa
    with full_precision(x):
        total = wide(o).mT @ wide(a)
    return compacted(total, wt)


def compacted(total: Tensor, wt: Tensor) -> Tensor:
    return math.pi * torch.tanh(total * total.size(-1) ** -0.5) @ wt.to(total.dtype)


class BatchCompaction(nn.Module):
    """Y from all tokens of all rows. It sees the future and the other rows."""

    roles = {"wo": "matrix", "wa": "matrix", "wt": "residual"}
    causal = False
    chunk = None

    def __init__(self, c: StrawberryV0Config):
        super().__init__()
        self.wo, self.wa, self.wt = (nn.Parameter(torch.empty(c.n_embd, c.n_embd)) for _ in range(3))

    def forward(self, x: Tensor, at: At, state: None) -> Tensor:
        return x + norm(x) @ compact(x, self.wo, self.wa, self.wt).to(x.dtype)

    def new_state(self, batch: int, device, dtype) -> None:
        return None

    def flops(self, T: int) -> float:
        return 2 * 4 * self.wo.numel() + self.flops_at_once() / T

    def flops_at_once(self) -> float:
        return 2 * self.wo.numel() * len(self.wo)


class CausalCompaction(nn.Module):
    """Y of each chunk from the mean over the earlier chunks of its row."""

    roles = {"wo": "matrix", "wa": "matrix", "wt": "residual"}
    causal = True

    def __init__(self, c: StrawberryV0Config):
        super().__init__()
        self.chunk = c.retention_chunk
        self.wo, self.wa, self.wt = (nn.Parameter(torch.empty(c.n_embd, c.n_embd)) for _ in range(3))

    def forward(self, x: Tensor, at: At, state: ChunkState | None) -> Tensor:
        h = norm(x)
        tokens = at.pos[:, :: at.slot]  # before each chunk
        (y,) = by_chunks(at.counted(h @ self.wo), h @ self.wa, at, state, lambda before: self.make(before, tokens))
        return x + project(h, y.mT, at)

    def make(self, before: Tensor, tokens: Tensor) -> list[Tensor]:
        """Y from the sums (B, J, C, C) over `tokens` (B, J) tokens."""
        return [compacted(before / tokens.clamp(min=1)[..., None, None], self.wt)]

    def new_state(self, batch: int, device, dtype) -> ChunkState:
        return ChunkState(batch, device, dtype, len(self.wo), [tuple(self.wt.shape)])

    def flops(self, T: int) -> float:
        return 2 * 4 * self.wo.numel() + 2 * self.wo.numel() * len(self.wo) * -(-T // self.chunk) / T


COMPACTION = {"causal": CausalCompaction, "batch": BatchCompaction}


class StrawberryV0Block(nn.Module):
    """AFT mixes v, expert attention mixes the result, SwiGLU writes it back. Run r_layer times, weights shared."""

    roles = {"w_qkv": "matrix", "w_swiglu": "matrix", "w_out": "residual"}
    products = ("w_qkv", "w_swiglu", "w_out")

    def __init__(self, c: StrawberryV0Config):
        super().__init__()
        C, D = c.n_embd, c.n_qkv
        self.w_qkv = nn.Parameter(torch.empty(3 * D, C))
        self.w_swiglu = nn.Parameter(torch.empty(2 * C, D))
        self.w_out = nn.Parameter(torch.empty(C, C))
        self.aft, self.tea = AFTS[c.aft](c, rotary_qk_norm), ExpertAttention(c, rotary_qk_norm)
        self.compaction = COMPACTION[c.compaction_scope](c) if c.compaction else None
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, at: At, states: tuple | None) -> Tensor:
        aft, tea, compaction = states or (None, None, None)
        if self.compaction is not None:
            x = self.compaction(x, at, compaction)
        q, k, v = linear(norm(x), self.w_qkv).chunk(3, dim=-1)
        v = self.aft(*self.aft.prepare(q, k, at), v, x, at, aft)
        y = self.tea(*self.tea.prepare(q, k, at), v, x, at, tea)
        u, g = linear(y, self.w_swiglu).chunk(2, dim=-1)
        return x + self.drop(linear(u * F.silu(g), self.w_out))

    def new_states(self, batch: int, max_length: int, device, dtype) -> tuple:
        compaction = self.compaction.new_state(batch, device, dtype) if self.compaction is not None else None
        return (*(m.new_state(batch, max_length, device, dtype) for m in (self.aft, self.tea)), compaction)

    def flops(self, T: int) -> float:
        matrices = 2 * (self.w_qkv.numel() + self.w_swiglu.numel() + self.w_out.numel())
        return matrices + sum(m.flops(T) for m in (self.aft, self.tea, self.compaction) if m is not None)


class StrawberryV0(LanguageModel):
    """Strawberry (2025): attention-free mixing inside attention, blocks that repeat."""

    Config = StrawberryV0Config

    def __init__(self, config: StrawberryV0Config):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(StrawberryV0Block(c) for _ in range(c.n_layer))
        self.rope = Rope(rope_frequencies(c.n_qkv // c.n_head, c.rope_scaling, c.block_size)[0])
        self.max_positions = c.block_size if c.aft in ENDS else None
        compaction = self.blocks[0].compaction
        if compaction is not None:
            self.causal, self.chunk = compaction.causal, compaction.chunk

    def embed_tokens(self, idx: Tensor, at: At) -> Tensor:
        return norm(self.embed(idx))

    def trunk(self, x: Tensor, at: At, states: list | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = repeat(block, x, at, None if states is None else states[i], self.config.r_layer, None)
        return x

    def last(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x), self.embed.weight

    def new_states(self, batch: int, max_length: int, device, dtype) -> list:
        return repeated_states(self.blocks, self.config.r_layer, batch, max_length, device, dtype)

    def open_chunks(self, cache: Cache, rows) -> None:
        tokens = cache.pos[rows].unsqueeze(1)
        for block, repeats in zip(self.blocks, cache.layers, strict=True):
            for *_, state in repeats:
                state.open(rows, lambda before, block=block: block.compaction.make(before, tokens))

    def flops(self, T: int) -> float:
        return self.config.r_layer * sum(b.flops(T) for b in self.blocks) + 2 * self.embed.weight.numel()

    def flops_at_once(self) -> float:
        shared = (b.compaction.flops_at_once() for b in self.blocks if b.compaction is not None and not self.causal)
        return self.config.r_layer * sum(shared)


def repeated_states(blocks: nn.ModuleList, repeats: int, *args) -> list:
    """For each block, the states of each of its repeats."""
    return [[block.new_states(*args) for _ in range(repeats)] for block in blocks]


# ---- palm ----------------------------------------------------------------------------------------------------------


@dataclass
class PalmConfig(ModelConfig):
    arch: str = option("palm", "the family of architectures", choices=("palm",))
    n_qkv: int = option(256, "D, channels of q, of k and of v", low=1)
    r_layer: int = option(1, "times that each block is run", low=1, high=1024)
    d_rank: int | None = option(64, "numbers that every linear map goes through; null: full rank", low=1)
    attention_type: str = option("aft", "mixer", choices=("aft", "lam", "kv", "mha"))
    aft: str = option("simple", "positions of attention-free mixing", choices=tuple(AFTS))
    window: int | None = option(None, "tokens within AFT's local and conv positions; default block_size / 4", low=1)
    n_ffn: int | None = option(None, "hidden channels of the feed-forward; default 8C/3 rounded up to 64", low=1)
    parallel: bool = option(True, "a SwiGLU feed-forward beside the attention")

    def __post_init__(self):
        default_window(self)
        self.n_ffn = self.n_ffn or -(-8 * self.n_embd // 3 // 64) * 64

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)


PALM_MIXERS = {
    "aft": lambda c: AFTS[c.aft](c, rotary_qk_norm),
    "lam": lambda c: LAM(c, rotary_qk_norm),
    "kv": lambda c: Softmax(c, prepare=rotary_qk_norm),
    "mha": lambda c: Softmax(c, prepare=rotary_qk_norm),
}


def palm_linear(c: PalmConfig, n_in: int, n_out: int, role: str = "matrix") -> nn.Module:
    return Linear(n_in, n_out, role=role) if c.d_rank is None else LowRank(n_in, n_out, c.d_rank, role)


class AttentionOnDetail(nn.Module):
    """q, k, v = w₂(relu²(w₁ x)) (neural attention, arXiv 2310.11398), any mixer, and a gated way out."""

    def __init__(self, c: PalmConfig):
        super().__init__()
        self.widths = [c.n_qkv] * (2 if c.attention_type == "kv" else 3)  # in KV attention q is k
        self.w1, self.w2 = palm_linear(c, c.n_embd, c.n_qkv), palm_linear(c, c.n_qkv, sum(self.widths))
        self.mixer = PALM_MIXERS[c.attention_type](c)
        self.out = palm_linear(c, c.n_qkv, 2 * c.n_embd)

    def forward(self, x: Tensor, at: At, state) -> Tensor:
        q, k, v = ready(self.w2(relu2(self.w1(x))), self.widths, self.mixer, at)
        u, g = self.out(self.mixer(q, k, v, x, at, state)).chunk(2, dim=-1)
        return u * F.silu(g)

    def flops(self, T: int) -> float:
        return sum(m.flops(T) for m in (self.w1, self.w2, self.mixer, self.out))


class PalmFeedForward(nn.Module):
    """SwiGLU through low-rank maps."""

    def __init__(self, c: PalmConfig):
        super().__init__()
        self.w1, self.w2 = palm_linear(c, c.n_embd, 2 * c.n_ffn), palm_linear(c, c.n_ffn, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.w1(x).chunk(2, dim=-1)
        return self.w2(u * F.silu(g))

    def flops(self, T: int) -> float:
        return self.w1.flops(T) + self.w2.flops(T)


class PalmBlock(nn.Module):
    """x + attention(norm(x)), and beside it + ffn(norm(x)) (arXiv 2204.02311)."""

    def __init__(self, c: PalmConfig):
        super().__init__()
        self.attn, self.ffn = AttentionOnDetail(c), PalmFeedForward(c) if c.parallel else None
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, at: At, state) -> Tensor:
        h = norm(x)
        y = self.attn(h, at, state)
        return x + self.drop(y if self.ffn is None else y + self.ffn(h))

    def new_states(self, *args):
        return self.attn.mixer.new_state(*args)

    def flops(self, T: int) -> float:
        return self.attn.flops(T) + (self.ffn.flops(T) if self.ffn is not None else 0)


class Palm(LanguageModel):
    """Palm: everything through low rank, an untied head, queries, keys and values out of a network."""

    Config = PalmConfig

    def __init__(self, config: PalmConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.d_rank or c.n_embd, "input")
        self.embed_up = None if c.d_rank is None else Linear(c.d_rank, c.n_embd)
        self.blocks = nn.ModuleList(PalmBlock(c) for _ in range(c.n_layer))
        self.unembed = palm_linear(c, c.n_embd, c.vocab_size, "head")
        self.rope = Rope(rope_frequencies(c.n_qkv // c.n_head, c.rope_scaling, c.block_size)[0])
        self.max_positions = c.block_size if c.attention_type == "aft" and c.aft in ENDS else None

    def embed_tokens(self, idx: Tensor, at: At) -> Tensor:
        x = self.embed(idx)
        return x if self.embed_up is None else self.embed_up(x)

    def trunk(self, x: Tensor, at: At, states: list | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = repeat(block, x, at, None if states is None else states[i], self.config.r_layer, None)
        return x

    def last(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.unembed.last(norm(x))

    def new_states(self, batch: int, max_length: int, device, dtype) -> list:
        return repeated_states(self.blocks, self.config.r_layer, batch, max_length, device, dtype)

    def flops(self, T: int) -> float:
        ends = self.unembed.flops(T) + (self.embed_up.flops(T) if self.embed_up is not None else 0)
        return self.config.r_layer * sum(block.flops(T) for block in self.blocks) + ends


# ---- tinystar ------------------------------------------------------------------------------------------------------


@dataclass
class TinyStarConfig(ModelConfig):
    arch: str = option("tinystar", "the family of architectures", choices=("tinystar",))
    n_qkv: int | None = option(None, "channels of q; default n_embd", low=1)
    n_kv_head: int | None = option(
        None, "heads of k and v in GQA; default n_head / 2, or what divides n_head below it", low=1)
    n_ffn: int | None = option(None, "hidden channels of the feed-forward; default 8C/3 (SwiGLU) or 4C", low=1)
    window: int | None = option(None, "tokens that -SWA attention sees; default block_size / 4", low=1)
    kv_rank: int | None = option(None, "MHLA's latent; default n_embd / 4", low=1)
    rope_dim: int | None = option(None, "MHLA's rotary channels; default half a head's", low=2)
    n_ffn_experts: int = option(1, "feed-forwards that a router chooses from, token by token", low=1)
    a_ffn_experts: int | None = option(None, "feed-forwards active for a token; default half", low=1)
    norm_type: str = option("RMSNorm", "norms, with learned scales", choices=tuple(NORMS))
    attention_type: str = option(
        "GQA", "heads of k and v: as q, grouped, one, or a latent; -SWA: over a sliding window",
        choices=("MHA", "GQA", "MQA", "MHLA", "MHA-SWA", "GQA-SWA", "MQA-SWA", "MHLA-SWA"))
    ffn_type: str = option("SwiGLU", "feed-forward", choices=("SwiGLU", "GELU"))
    pos_encoding: str = option(
        "RoPE", "how tokens know where they stand", choices=("Learned", "RoPE", "Sinusoidal", "None"))
    tie_embeddings: bool = option(True, "one table for input and output")

    writes = "residual"  # an embedding of deviation 0.02 would be lost under what matrices of unit gain write

    def __post_init__(self):
        default_attention(self)
        self.a_ffn_experts = self.a_ffn_experts or max(1, self.n_ffn_experts // 2)

    @property
    def bias(self) -> bool:
        """GPT-2's biases, in the LayerNorm + GELU baseline only."""
        return self.norm_type == "LayerNorm" and self.ffn_type == "GELU"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)
        yield from attention_problems(self)
        yield from expert_problems(self)


class TinyStarBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, c: TinyStarConfig, layer: int):
        super().__init__()
        self.norm1, self.norm2 = NORMS[c.norm_type](c.n_embd), NORMS[c.norm_type](c.n_embd)
        self.attn, self.ffn = make_attention(c, layer), feed_forward(c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, at: At, state: Ring | None) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x), at, state))
        return x + self.drop(self.ffn(self.norm2(x), at))

    def new_states(self, batch: int, max_length: int, device, dtype) -> State:
        return self.attn.new_state(batch, max_length, device, dtype)

    def flops(self, T: int) -> float:
        return self.attn.flops(T) + self.ffn.flops(T)


class TinyStar(LanguageModel):
    """One block, three slots: GPT-2's descendants side by side."""

    Config = TinyStarConfig

    def __init__(self, config: TinyStarConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd, "embedding" if c.tie_embeddings else "input")
        self.positions = POSITIONS[c.pos_encoding](c)
        self.blocks = nn.ModuleList(TinyStarBlock(c, layer) for layer in range(c.n_layer))
        self.norm = NORMS[c.norm_type](c.n_embd)
        self.unembed = None if c.tie_embeddings else Linear(c.n_embd, c.vocab_size, role="head")
        self.rope, self.max_positions = rope_of(c), positions_end(c)

    def embed_tokens(self, idx: Tensor, at: At) -> Tensor:
        return self.positions(self.embed(idx), at)

    def divide(self, n: int) -> bool:
        self.pieces = min(n, len(self.blocks))
        return self.pieces > 1

    def trunk(self, x: Tensor, at: At, states: list | None) -> Tensor:
        if states is None and self.pieces > 1 and torch.compiler.is_compiling():
            return in_pieces(self.blocks, x, at, self.pieces)
        return through(self.blocks, x, at, states)

    def last(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x), (self.unembed or self.embed).weight

    def new_states(self, batch: int, max_length: int, device, dtype) -> list:
        return [block.new_states(batch, max_length, device, dtype) for block in self.blocks]

    def flops(self, T: int) -> float:
        return sum(block.flops(T) for block in self.blocks) + 2 * self.embed.weight.numel()


# ---- transformer ---------------------------------------------------------------------------------------------------


@dataclass
class TransformerConfig(ModelConfig):
    arch: str = option("transformer", "the family of architectures", choices=("transformer",))
    kind: str = option("encoder-decoder", "which stacks", choices=("encoder-decoder", "decoder", "encoder"))
    n_encoder_layer: int | None = option(None, "blocks of the encoder; default n_layer", low=1, high=4096)
    n_qkv: int | None = option(None, "channels of q; default n_embd", low=1)
    n_kv_head: int | None = option(
        None, "heads of k and v in GQA; default n_head / 2, or what divides n_head below it", low=1)
    n_ffn: int | None = option(None, "hidden channels of the feed-forward; default 4C, for swiglu 8C/3", low=1)
    n_ffn_experts: int = option(1, "feed-forwards that a router chooses from, token by token", low=1)
    a_ffn_experts: int | None = option(None, "feed-forwards active for a token; default half", low=1)
    norm_position: str = option("post", "norm after each residual sum, or before each part", choices=("post", "pre"))
    norm_type: str = option("LayerNorm", "norms, with learned scales", choices=tuple(NORMS))
    attention_type: str = option(
        "MHA", "mixer of self-attention; -SWA: over a sliding window",
        choices=(*ATTENTIONS, "MHA-SWA", "GQA-SWA", "MQA-SWA", "MHLA-SWA", "kv-SWA"))
    ffn_type: str = option("relu", "feed-forward", choices=tuple(FEED_FORWARDS))
    pos_encoding: str = option("Sinusoidal", "how tokens know where they stand", choices=tuple(POSITIONS))
    bias: bool = option(True, "biases in linear maps")
    tie_embeddings: bool = option(True, "one table for input and output")
    pad_id: int | None = option(None, "token that is padding, in the source and in an encoder", low=0)
    window: int | None = option(None, "tokens that -SWA and sparse attention see nearby; default block_size / 4", low=1)
    kv_rank: int | None = option(None, "MHLA's latent; default n_embd / 4", low=1)
    rope_dim: int | None = option(None, "MHLA's rotary channels; default half a head's", low=2)
    aft: str = option("simple", "positions of attention-free mixing", choices=tuple(AFTS))
    n_experts: int = option(1, "expert attention: groups of heads that a router chooses from", low=1)
    a_experts: int | None = option(None, "groups active for a token; default half", low=1)
    windows: list[int] | None = option(None, "each expert's; default window, window / 2, … not under 16", low=1)
    sparse: str = option("none", "pattern of softmax attention", choices=("none", *SPARSE))
    n_global: int = option(0, "sparse: first tokens that everyone sees", low=0)
    n_random: int = option(3, "bigbird: blocks drawn for each block of queries", low=0)
    sparse_block: int = option(64, "bigbird: tokens in a block", low=1)
    sparse_seed: int = option(0, "bigbird: seed of the draw", low=0)
    recursions: int = option(1, "times that each stack is run", low=1, high=1024)
    adaptive: bool = option(False, "each token chooses its number of recursions")

    def __post_init__(self):
        default_attention(self)
        default_experts(self)
        self.n_encoder_layer = self.n_encoder_layer or self.n_layer

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)
        yield from attention_problems(self)
        yield from expert_problems(self)
        if self.adaptive and self.recursions < 2:
            yield "adaptive", "needs recursions of at least 2, to have depths to choose from"
        if self.sparse != "none" and self.attention_type in ("aft", "lam", "expert"):
            yield "sparse", f"is for softmax attention, which attention_type {self.attention_type!r} is not"
        if self.sparse != "none" and self.attention_type.endswith("-SWA"):
            yield "sparse", "has a window of its own; take an attention_type without -SWA"


def post_norm(x: Tensor, norm: nn.Module, part: Callable, drop: nn.Module) -> Tensor:
    """As published: the residual stream itself is normed."""
    return norm(x + drop(part(x)))


def pre_norm(x: Tensor, norm: nn.Module, part: Callable, drop: nn.Module) -> Tensor:
    """What a part reads is normed, the residual stream is not (arXiv 2002.04745)."""
    return x + drop(part(norm(x)))


NORM_POSITIONS = {"post": post_norm, "pre": pre_norm}


class TransformerBlock(nn.Module):
    """Self-attention, attention to the source where there is one, feed-forward."""

    def __init__(self, c: TransformerConfig, layer: int, crosses: bool):
        super().__init__()
        self.wire, self.drop = NORM_POSITIONS[c.norm_position], nn.Dropout(c.dropout)
        self.norm1, self.attn = NORMS[c.norm_type](c.n_embd), make_attention(c, layer)
        self.norm2, self.cross = NORMS[c.norm_type](c.n_embd), CrossAttention(c) if crosses else None
        self.norm3, self.ffn = NORMS[c.norm_type](c.n_embd) if crosses else None, feed_forward(c)

    def forward(self, x: Tensor, at: At, states: tuple | None) -> Tensor:
        mine, crossed = states or (None, None)
        y = self.wire(x, self.norm1, lambda h: self.attn(h, at, mine), self.drop)
        if self.cross is not None:
            y = self.wire(y, self.norm2, lambda h: self.cross(h, at, crossed), self.drop)
        y = self.wire(y, self.norm3 or self.norm2, lambda h: self.ffn(h, at), self.drop)
        return at.moved(x, y)

    def new_states(self, *args) -> tuple:
        return self.attn.new_state(*args), CrossState() if self.cross is not None else None

    def flops(self, T: int) -> float:
        return sum(m.flops(T) for m in (self.attn, self.cross, self.ffn) if m is not None)


class TransformerStack(nn.Module):
    """Positions, blocks, and with pre-norm a last norm. The encoder is one, the decoder another."""

    def __init__(self, c: TransformerConfig, n_layer: int, crosses: bool):
        super().__init__()
        self.recursions = c.recursions
        self.positions = POSITIONS[c.pos_encoding](c)
        self.blocks = nn.ModuleList(TransformerBlock(c, layer, crosses) for layer in range(n_layer))
        self.depth = Router(c.n_embd, c.recursions, 1) if c.adaptive else None
        self.norm = NORMS[c.norm_type](c.n_embd) if c.norm_position == "pre" else nn.Identity()

    def forward(self, x: Tensor, at: At, states: list | None) -> Tensor:
        return self.norm(repeat(self.once, x, at, states, self.recursions, self.depth))

    def once(self, x: Tensor, at: At, states: list | None) -> Tensor:
        return through(self.blocks, x, at, states)

    def new_states(self, *args) -> list:
        return [[block.new_states(*args) for block in self.blocks] for _ in range(self.recursions)]

    def flops(self, T: int) -> float:
        depth = self.depth.flops(T) if self.depth else 0
        return depth + self.recursions * sum(block.flops(T) for block in self.blocks)


class Transformer(LanguageModel):
    """The original (arXiv 1706.03762) and what became of it: encoder, decoder or both, every part swappable."""

    Config = TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd, "embedding" if c.tie_embeddings else "input")
        self.takes_source = c.kind == "encoder-decoder"
        self.causal = self.generates = c.kind != "encoder"
        self.encoder = TransformerStack(c, c.n_encoder_layer, False) if c.kind != "decoder" else None
        self.decoder = TransformerStack(c, c.n_layer, self.takes_source) if c.kind != "encoder" else None
        self.unembed = None if c.tie_embeddings else Linear(c.n_embd, c.vocab_size, role="head")
        self.rope, self.max_positions = rope_of(c), positions_end(c)

    def embedded(self, idx: Tensor, at: At, stack: TransformerStack) -> Tensor:
        return stack.positions(self.embed(idx) * self.config.n_embd**0.5, at)  # arXiv 1706.03762, section 3.4

    def embed_tokens(self, idx: Tensor, at: At) -> Tensor:
        return self.embedded(idx, at, self.decoder or self.encoder)

    def trunk(self, x: Tensor, at: At, states: list | None) -> Tensor:
        return (self.decoder or self.encoder)(x, at, states)

    def last(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, (self.unembed or self.embed).weight

    def stand(self, idx: Tensor) -> At:
        return super().stand(idx) if self.causal else self.stand_apart(idx)

    def stand_apart(self, idx: Tensor) -> At:
        """In an encoder: all see all, but nobody sees padding."""
        pos = torch.arange(idx.size(1), device=idx.device).unsqueeze(0)
        return At(pos, causal=False, padding=self.padding(idx))

    def padding(self, idx: Tensor) -> Tensor:
        pad = -1 if self.config.pad_id is None else self.config.pad_id
        return idx == pad

    def remember(self, source: Tensor | None) -> Memory | None:
        if not self.takes_source:
            return super().remember(source)
        if source is None:
            raise UserError("an encoder-decoder needs a source (B, S); give source=")
        self.check_length(source)
        at = self.stand_apart(source)
        at.rope = self.rope(at.pos)
        x = self.encoder(activation(self.drop(self.embedded(source, at, self.encoder))), at, None)
        return Memory(x, at.padding)

    def new_states(self, *args) -> list:
        return self.decoder.new_states(*args)

    def crossings(self, cache: Cache) -> Iterator[tuple[CrossAttention, CrossState]]:
        for states in cache.layers:
            for block, (_, state) in zip(self.decoder.blocks, states, strict=True):
                yield block.cross, state

    def attach(self, cache: Cache, source: Tensor | None, max_source: int | None) -> None:
        if not self.takes_source or (source is None and max_source is None):
            self.remember(source)
            return
        B, size, device = len(cache.length), max_source or source.size(1), self.here.device
        cache.memory = Memory(None, torch.ones(B, size, dtype=torch.bool, device=device))
        for cross, state in self.crossings(cache):
            state.allocate(B, size, cross.wk.weight.size(0), device, self.here.dtype)
        if source is not None:
            self.read(source, cache)

    @torch.no_grad()
    def read(self, source: Tensor, cache: Cache) -> None:
        memory, S, padding = self.remember(source), source.size(1), cache.memory.padding
        if padding.size(1) < S:
            raise UserError(f"a source of {S} tokens exceeds the {padding.size(1)} that the cache was made for; "
                            "give new_cache a larger max_source")
        padding.copy_(F.pad(memory.padding, (0, padding.size(1) - S), value=True))
        for cross, state in self.crossings(cache):
            state.k[:, :S], state.v[:, :S] = cross.of(memory)

    def flops(self, T: int) -> float:
        return sum(stack.flops(T) for stack in (self.encoder, self.decoder) if stack is not None) + (
            2 * self.embed.weight.numel())


# ---- registry, initialisation --------------------------------------------------------------------------------------

MODELS: dict[str, type[LanguageModel]] = {
    "strawberry": Strawberry,
    "strawberry-v0": StrawberryV0,
    "palm": Palm,
    "tinystar": TinyStar,
    "transformer": Transformer,
}
CONFIGS: dict[str, type[ModelConfig]] = {name: model.Config for name, model in MODELS.items()}


def build(hyperparams: dict | ModelConfig) -> LanguageModel:
    """The model that a JSON file's "model_hyperparams" describe, its weights as `init_weights` draws them.

    >>> build({"arch": "tinystar", "n_layer": 4, "n_embd": 128}).num_params()
    """
    config = hyperparams
    if isinstance(hyperparams, dict):
        arch = hyperparams.get("arch", "strawberry")
        if arch not in MODELS:
            raise UserError(f"arch {arch!r} is not known; there are: {', '.join(MODELS)}{nearest(str(arch), MODELS)}")
        config, problems = check(CONFIGS[arch], hyperparams, "model_hyperparams")
        if problems:
            raise UserError("\n".join(problems))
    model = MODELS[config.arch](config)
    init_weights(model)
    return model


@torch.no_grad()
def init_weights(model: LanguageModel) -> None:
    """Every parameter's start, by its role.

    role       start                          optimized by               decay
    matrix     uniform, std fan_in^(−1/2)     Muon where asked, or AdamW yes
    residual   zero                           Muon where asked, or AdamW yes
    embedding  normal, std 0.02               AdamW                      yes
    input      normal, std 1                  AdamW                      yes
    head       uniform, std fan_in^(−1/2)     AdamW                      no
    router     uniform, std fan_in^(−1/2)     AdamW                      no
    position   normal, std 0.02               AdamW                      no
    norm       one                            AdamW                      no
    tao        one                            AdamW                      no
    bias       zero                           AdamW                      no

    `embedding` is a table that is also the head (tied), `input` one that is not.
    """
    roles = model.roles()
    for name, p in model.named_parameters():
        START[roles[name]](p)


def uniform(p: Tensor) -> None:
    bound = math.sqrt(3 / p.size(1))  # a uniform distribution over ±b has standard deviation b / √3
    p.uniform_(-bound, bound)


START = {
    "matrix": uniform,
    "residual": nn.init.zeros_,
    "embedding": lambda p: p.normal_(std=0.02),
    "input": lambda p: p.normal_(std=1.0),
    "head": uniform,
    "router": uniform,
    "position": lambda p: p.normal_(std=0.02),
    "norm": nn.init.ones_,
    "tao": nn.init.ones_,
    "bias": nn.init.zeros_,
}

# ---- the stack as text ---------------------------------------------------------------------------------------------


def draw(model: LanguageModel) -> str:
    """The model as a tree: modules, shapes, parameters, forward FLOPs per token; then what its cache holds."""
    T = model.config.block_size
    total, inner = model.num_params(non_embedding=False), model.num_params()
    lines = [
        f"{model.config.arch}: {total:,} parameters, {inner:,} without embeddings; "
        f"{model.flops_per_token(T) / 1e6:,.2f} MFLOP per token in a training step at T = {T}",
        *branches(model, T, ""),
    ]
    if model.causal:
        lines.append(cache_size(model))
    return "\n".join(lines)


def branches(module: nn.Module, T: int, indent: str) -> Iterator[str]:
    """A line for each child, its parameters' shapes on it; children that are alike are drawn once."""
    if hasattr(module, "steps"):
        yield f"{indent}  steps: {' → '.join(module.steps)}"
    children = [(name, child) for name, child in module.named_children() if drawn(child)]
    groups = [[pair] for pair in children]
    if isinstance(module, nn.ModuleList):
        groups = [list(group) for _, group in itertools.groupby(children, key=lambda pair: about(pair[1], T))]
    for group in groups:
        (name, child), last = group[0], group[-1][0]
        yield f"{indent}  {name if len(group) == 1 else f'{name} … {last}'}: {about(child, T)}"
        yield from branches(child, T, indent + "    ")


def drawn(module: nn.Module) -> bool:
    return not isinstance(module, (nn.Dropout, nn.Identity, Rope))


def about(module: nn.Module, T: int) -> str:
    """One line: what it is, how large, how much work for a token."""
    if isinstance(module, nn.ModuleList):
        return f"{len(module)}, one after the other"
    words = [type(module).__name__]
    if isinstance(module, (Softmax, LatentAttention, LAM)):
        words.append(f"{module.n_head} heads of {module.d}")
    view = getattr(module, "view", None)
    if view is not None and view.size:
        words.append(f"window {view.size}")
    words += [f"{name} {tuple(p.shape)}" for name, p in module.named_parameters(recurse=False)]
    if hasattr(module, "flops"):
        words.append(f"{module.flops(T) / 1e3:,.1f} kFLOP")
    return ", ".join(words)


def cache_size(model: LanguageModel) -> str:
    """Bytes for each row: what does not depend on the text's length, and what each token of context adds."""
    T = model.config.block_size
    source = torch.zeros(1, 1, dtype=torch.int64) if model.takes_source else None
    half, whole = (model.new_cache(1, n, source).nbytes() for n in (T // 2, T))
    each = (whole - half) / (T - T // 2)
    return f"cache of a row in float32: {whole - each * T:,.0f} bytes, and {each:,.0f} for each token up to {T}"


def main(argv: list[str]) -> None:
    print(draw(build(load_run(argv, CONFIGS).model_hyperparams)))


if __name__ == "__main__":
    run_cli(main)
