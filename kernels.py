"""Triton kernels, for where plain PyTorch moves more bytes than the work needs. Each has a plain PyTorch path beside
it, which is the reference, and what runs where Triton or a GPU is missing.

    usable            whether kernels can take these tensors
    decode_attention  one new token for each row against a ring of keys and values
    quantize_int8     a matrix as int8 with a scale for each output channel
    int8_linear       a linear map by such a matrix
    aft_simple        attention-free mixing without positions, differentiable
    aft_conv          the same with positions by distance
    aft_local         the same with positions a_t · b_s within a window
    head_slopes       cross entropy and its gradient by the logits
    transposed        a matrix of numbers of one byte, its columns as rows
    joined            gradients side by side in 8 bits, as they lie and transposed
    bent, bent_back   what is between two products in 8 bits: gelu and the like, and their gradients
    grow              retention's update of a matrix for each chunk of each row; grow_backward
    turn              queries and keys of a joint projection, turned and normed, differentiable
    turn_bytes        the gradient of that projection in 8 bits, as it lies and transposed

The kernels are registered with torch.library, so torch.compile keeps them whole and a CUDA graph may record them:
nothing on the host depends on what is in a tensor. With TRITON_INTERPRET=1 in the environment they run on the CPU,
slowly, for tests.

`python kernels.py` on a GPU holds each against float64 and times it against its floor: the bytes that it must move over
the bandwidth at which the machine copies.
"""

import math
import os
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = math.log2(math.e)

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    NATIVE, PER_LOG2 = tl.constexpr(not INTERPRETED), tl.constexpr(LOG2E)
except ImportError:  # macOS, Windows: the plain paths alone
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

    def jit(function):
        return function


HALVES = (torch.bfloat16, torch.float16)


def usable(*tensors: Tensor) -> bool:
    """Whether kernels can take these tensors: on a GPU, or on the CPU where Triton interprets; no float64."""
    if triton is None:
        return False
    return all((t.is_cuda or INTERPRETED) and t.dtype != torch.float64 for t in tensors)


def processors(x: Tensor) -> int:
    """Multiprocessors of the device that x is on."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def power_of_2(n: int) -> int:
    """The smallest power of two that is not under n."""
    return 1 << (n - 1).bit_length()


def dot_type(*tensors: Tensor):
    """What tl.dot multiplies: the half type that all are in, or float32, also where the interpreter knows no half."""
    if INTERPRETED or any(t.dtype != tensors[0].dtype for t in tensors):
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(tensors[0].dtype, tl.float32)


@jit
def exp(x):
    """exp(x) in three instructions where Triton's takes six, which guard results that are under 1e-38, here zero."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * PER_LOG2], dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    return tl.exp(x)


@jit
def inverse(x):
    """1 / x, zero where that is under 1e-38."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    return 1.0 / x


# ---- decoding: attention of one token for each row -------------------------------------------------------------------


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    size: int,
    scale: float,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v for one new token in each row, its keys in a ring.

    q (B, H, d); k, v (B, size + 1, Hkv·d), slot s holding the newest position p ≤ pos with p % size == s; the slot
    after them is never read. pos (B,) int64, on the device: the query's position, whose own k and v are in the ring. It
    sees the slots 0 … min(pos + 1, size) − 1; with −1 a row is idle, its result zero. H is a multiple of Hkv
    (arXiv 2305.13245). Where new_k, new_v (B, Hkv·d) are given, they are written into the ring on the way. Returns
    (B, H, d) in q's dtype; sums are float32.

    Bytes moved: k and v of the tokens that are there, once, and 4·S·d·H·B twice for S splits of a long context
    (flash-decoding, arXiv 2311.01282). Floor: those of k and v over the copy bandwidth.
    """
    if not usable(q, k, v):
        if new_k is not None:
            rows = torch.arange(len(pos), device=pos.device)[pos >= 0]
            k[rows, pos[rows] % size], v[rows, pos[rows] % size] = new_k[rows].to(k.dtype), new_v[rows].to(v.dtype)
        return decode_plain(q, k, v, pos, size, scale)
    splits = decode_splits(q, k, size)
    if new_k is None:
        return torch.ops.strawberry.decode_attention(q, k, v, pos, size, scale, splits)
    return torch.ops.strawberry.decode_attention_writing(q, k, v, new_k, new_v, pos, size, scale, splits)


def decode_plain(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, size: int, scale: float) -> Tensor:
    """`decode_attention` in plain PyTorch, by a mask over all slots; at least float32."""
    d = q.size(-1)
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    k, v = (x[:, :size].unflatten(-1, (-1, d)).to(wide) for x in (k, v))  # (B, size, Hkv, d)
    grouped = q.to(wide).unflatten(1, (k.size(2), -1))  # (B, Hkv, H / Hkv, d)
    seen = torch.arange(size, device=q.device) <= pos.unsqueeze(1)  # (B, size)
    score = torch.einsum("bhgd,bshd->bhgs", grouped, k) * scale
    weight = score.masked_fill(~seen[:, None, None], -1e30).softmax(-1) * (pos >= 0)[:, None, None, None]
    v = v.masked_fill(~seen[:, :, None, None], 0.0)  # what an unwritten slot holds may be anything
    return torch.einsum("bhgs,bshd->bhgd", weight, v).flatten(1, 2).to(q.dtype)


def decode_block(d: int) -> int:
    """Tokens that a program takes at a time: 4096 numbers of k."""
    return max(16, min(128, 4096 // power_of_2(d)))


def decode_splits(q: Tensor, k: Tensor, size: int) -> int:
    """Into how many parts the context is cut: enough programs for every multiprocessor, at most 8192 numbers to merge
    for a head, and one (no second kernel) where a context is short."""
    d = q.size(-1)
    if size <= 8 * decode_block(d):
        return 1
    wanted = 8 * processors(q) // (q.size(0) * (k.size(-1) // d))
    return max(1, min(wanted, -(-size // decode_block(d)), 8192 // power_of_2(d)))


@jit
def decode_share(pos, size, splits, BLOCK: tl.constexpr):
    """How many slots a row sees, and how many of them each split takes."""
    seen = tl.minimum(pos + 1, size).to(tl.int32)
    return seen, tl.cdiv(tl.cdiv(seen, splits), BLOCK) * BLOCK


@jit
def decode_single(
    q, k, v, new_k, new_v, pos, out, parts, size, heads, splits, scale, q_row, q_head, k_row, k_slot, v_row, v_slot,
    new_k_row, new_v_row,
    NEW: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A head that shares its keys with none. Each of BLOCK lanes keeps a softmax of its own over every BLOCK-th slot,
    and they are merged at the end: nothing in the loop crosses lanes but the dot product."""
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    seen, share = decode_share(tl.load(pos + row), size, splits, BLOCK)
    first = split * share
    last = tl.minimum(first + share, seen)
    lane, c = tl.arange(0, BLOCK), tl.arange(0, PAD)
    query = tl.load(q + row * q_row + head * q_head + c, mask=c < D, other=0.0).to(tl.float32) * scale
    k += row * k_row + head * D
    v += row * v_row + head * D
    newest = tl.load(pos + row) % size
    if NEW:
        fresh_k = tl.load(new_k + row * new_k_row + head * D + c, mask=c < D, other=0.0).to(k.dtype.element_ty)
        fresh_v = tl.load(new_v + row * new_v_row + head * D + c, mask=c < D, other=0.0).to(v.dtype.element_ty)
        mine = (c < D) & (first <= newest) & (newest < last)
        tl.store(k + newest * k_slot + c, fresh_k, mask=mine)
        tl.store(v + newest * v_slot + c, fresh_v, mask=mine)
    top = tl.full((BLOCK,), -1e30, tl.float32)  # finite, so that lanes without a slot make no NaN
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, PAD), tl.float32)
    for start in range(first, last, BLOCK):
        slot = (start + lane).to(tl.int64)
        here = slot < last
        mask = here[:, None] & (c < D)[None, :]
        keys = tl.load(k + slot[:, None] * k_slot + c[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.load(v + slot[:, None] * v_slot + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEW:  # what has just been stored need not have arrived
            keys = tl.where((slot == newest)[:, None], fresh_k[None, :].to(tl.float32), keys)
            values = tl.where((slot == newest)[:, None], fresh_v[None, :].to(tl.float32), values)
        score = tl.where(here, tl.sum(keys * query[None, :], axis=1), float("-inf"))
        higher = tl.maximum(top, score)
        fade, weight = tl.exp2(top - higher), tl.exp2(score - higher)
        total = total * fade + weight
        mixed = mixed * fade[:, None] + weight[:, None] * values
        top = higher
    highest = tl.max(top, axis=0)
    fade = tl.exp2(top - highest)
    weight = tl.sum(total * fade, axis=0)
    mixed_all = tl.sum(mixed * fade[:, None], axis=0)
    if SPLIT:
        part = parts + ((row * heads + head) * splits + split) * (D + 4)  # sums, highest, weight, and two to align it
        tl.store(part + c, mixed_all, mask=(c < D) & (first < last))
        tl.store(part + D, highest, mask=first < last)
        tl.store(part + D + 1, weight, mask=first < last)
    else:
        mean = mixed_all / tl.where(weight > 0, weight, 1.0)
        tl.store(out + (row * heads + head) * D + c, mean.to(out.dtype.element_ty), mask=c < D)


@jit
def decode_group(
    q, k, v, new_k, new_v, pos, out, parts, size, heads, splits, scale, q_row, q_head, k_row, k_slot, v_row, v_slot,
    new_k_row, new_v_row,
    NEW: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """GROUP heads that share their keys, which are read once: the matrix units multiply them (arXiv 2205.14135)."""
    shared, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    seen, share = decode_share(tl.load(pos + row), size, splits, BLOCK)
    first = split * share
    last = tl.minimum(first + share, seen)
    lane, c, g = tl.arange(0, BLOCK), tl.arange(0, PAD), tl.arange(0, GROUP_PAD)
    head = shared * GROUP + g
    inside = (g < GROUP)[:, None] & (c < D)[None, :]
    query = tl.load(q + row * q_row + head[:, None] * q_head + c[None, :], mask=inside, other=0.0).to(DOT)
    k += row * k_row + shared * D
    v += row * v_row + shared * D
    newest = tl.load(pos + row) % size
    if NEW:
        fresh_k = tl.load(new_k + row * new_k_row + shared * D + c, mask=c < D, other=0.0).to(k.dtype.element_ty)
        fresh_v = tl.load(new_v + row * new_v_row + shared * D + c, mask=c < D, other=0.0).to(v.dtype.element_ty)
        mine = (c < D) & (first <= newest) & (newest < last)
        tl.store(k + newest * k_slot + c, fresh_k, mask=mine)
        tl.store(v + newest * v_slot + c, fresh_v, mask=mine)
    top = tl.full((GROUP_PAD,), -1e30, tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    mixed = tl.zeros((GROUP_PAD, PAD), tl.float32)
    for start in range(first, last, BLOCK):
        slot = (start + lane).to(tl.int64)
        here = slot < last
        mask = here[:, None] & (c < D)[None, :]
        keys = tl.load(k + slot[:, None] * k_slot + c[None, :], mask=mask, other=0.0).to(DOT)
        values = tl.load(v + slot[:, None] * v_slot + c[None, :], mask=mask, other=0.0).to(DOT)
        if NEW:
            keys = tl.where((slot == newest)[:, None], fresh_k[None, :].to(DOT), keys)
            values = tl.where((slot == newest)[:, None], fresh_v[None, :].to(DOT), values)
        score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        score = tl.where(here[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        fade, weight = tl.exp2(top - higher), tl.exp2(score - higher[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(DOT), values, input_precision="ieee")
        top = higher
    if SPLIT:
        part = parts + ((row * heads + head) * splits + split) * (D + 4)  # sums, highest, weight, and two to align it
        tl.store(part[:, None] + c[None, :], mixed, mask=inside & (first < last))
        tl.store(part + D, top, mask=(g < GROUP) & (first < last))
        tl.store(part + D + 1, total, mask=(g < GROUP) & (first < last))
    else:
        mean = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + (row * heads + head)[:, None] * D + c[None, :], mean.to(out.dtype.element_ty), mask=inside)


@jit
def decode_merge(
    parts, pos, out, size, heads, splits,
    D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """The splits of a head, each with its sums about its own highest score, made one."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seen, share = decode_share(tl.load(pos + row), size, splits, BLOCK)
    s, c = tl.arange(0, SPLITS_PAD), tl.arange(0, PAD)
    made = (s < splits) & (s * share < seen)
    part = parts + ((row * heads + head) * splits + s) * (D + 4)
    top = tl.load(part + D, mask=made, other=-1e30)
    fade = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(fade * tl.load(part + D + 1, mask=made, other=0.0), axis=0)
    mixed = tl.load(part[:, None] + c[None, :], mask=made[:, None] & (c < D)[None, :], other=0.0)
    mean = tl.sum(fade[:, None] * mixed, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + (row * heads + head) * D + c, mean.to(out.dtype.element_ty), mask=c < D)


@torch.library.custom_op("strawberry::decode_attention", mutates_args=())
def decode_op(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, size: int, scale: float, splits: int) -> Tensor:
    return decode_launch(q, k, v, None, None, pos, size, scale, splits)


@decode_op.register_fake
def _(q, k, v, pos, size, scale, splits):
    return q.new_empty(q.shape)


@torch.library.custom_op("strawberry::decode_attention_writing", mutates_args=("k", "v"))
def decode_writing_op(
    q: Tensor, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, pos: Tensor, size: int, scale: float, splits: int
) -> Tensor:
    return decode_launch(q, k, v, new_k, new_v, pos, size, scale, splits)


@decode_writing_op.register_fake
def _(q, k, v, new_k, new_v, pos, size, scale, splits):
    return q.new_empty(q.shape)


def decode_launch(q, k, v, new_k, new_v, pos, size: int, scale: float, splits: int) -> Tensor:
    B, H, D = q.shape
    shared = k.size(-1) // D
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    parts = torch.empty(B, H, splits, D + 4, dtype=torch.float32, device=q.device) if splits > 1 else out
    shape = {"D": D, "PAD": power_of_2(max(D, 16)), "BLOCK": decode_block(D)}
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    fresh = new_k is not None
    new_k, new_v = (new_k, new_v) if fresh else (k, v)
    shape |= {"NEW": fresh}
    strides += (new_k.stride(0), new_v.stride(0))
    args = (q, k, v, new_k, new_v, pos, out, parts, size, H, splits, scale * LOG2E, *strides)
    if shared == H:
        decode_single[(H, splits, B)](*args, **shape, SPLIT=splits > 1, num_warps=4)
    else:
        group = {"GROUP": H // shared, "GROUP_PAD": power_of_2(max(H // shared, 16)), "DOT": dot_type(k, v)}
        decode_group[(shared, splits, B)](*args, **shape, SPLIT=splits > 1, **group, num_warps=4)
    if splits > 1:
        del shape["NEW"]
        decode_merge[(H, B)](parts, pos, out, size, H, splits, **shape, SPLITS_PAD=power_of_2(splits), num_warps=4)
    return out


# ---- linear maps by int8 weights -------------------------------------------------------------------------------------


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (N, K) as int8 with a float32 scale (N,) for each output channel, symmetric, rounded to nearest: the error of a
    weight is at most half a scale. A row of zeros has scale 1.

    >>> quantize_int8(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))
    (tensor([[127, -64], [0, 0]], dtype=torch.int8), tensor([0.0079, 1.0000]))
    """
    w = w.detach().float()
    largest = w.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (w / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def int8_linear(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x @ wᵀ) · scale + bias for x (…, K), w (N, K) int8, scale (N,) float32, bias (N,). Returns (…, N) in x's dtype.

    int8 is exact in bfloat16, sums are float32. Up to 64 rows of x a kernel reads w once: N·K bytes, the floor. More
    rows are limited by arithmetic, and go through PyTorch's matrix product.
    """
    rows = x.numel() // x.size(-1)
    if rows > 64 or not usable(x, w):
        y = F.linear(x, w.to(x.dtype)) * scale
        return (y if bias is None else y + bias).to(x.dtype)
    return torch.ops.strawberry.int8_linear(x.reshape(rows, -1), w, scale, bias).view(*x.shape[:-1], -1)


@jit
def int8_few(
    x, w, scale, bias, y, M, N, K, x_row,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Up to four rows: products are summed in place along k, and across lanes once at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, at = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    start_w = w + n.to(tl.int64) * K
    total = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + at
        weight = tl.load(start_w[:, None] + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
        value = tl.load(x + m[:, None] * x_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        total += value.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
    result = tl.sum(total, axis=2) * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    here = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], result.to(y.dtype.element_ty), mask=here)


@jit
def int8_many(
    x, w, scale, bias, y, M, N, K, x_row,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Up to 64 rows: the matrix units multiply all of them by a few rows of w."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, at = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    start_w = w + n.to(tl.int64) * K
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + at
        weight = tl.load(start_w[:, None] + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
        value = tl.load(x + m[:, None] * x_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(value.to(DOT), tl.trans(weight.to(DOT)), total, input_precision="ieee")
    result = total * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    here = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], result.to(y.dtype.element_ty), mask=here)


@torch.library.custom_op("strawberry::int8_linear", mutates_args=())
def int8_op(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    (M, K), N = x.shape, w.size(0)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    args = (x, w, scale, scale if bias is None else bias, y, M, N, K, x.stride(0))
    if M <= 4:
        rows = power_of_2(M)
        block = {"ROWS": rows, "BLOCK_N": 4 if N < 16384 else 8, "BLOCK_K": min(1024 // rows, power_of_2(K))}
        int8_few[(-(-N // block["BLOCK_N"]),)](*args, **block, BIAS=bias is not None, num_warps=4)
    else:
        block = {"ROWS": power_of_2(max(M, 16)), "BLOCK_N": 16 if N < 16384 else 64}
        block["BLOCK_K"] = 128 if x.dtype in HALVES else 32
        types = {"BIAS": bias is not None, "DOT": dot_type(x)}
        int8_many[(-(-N // block["BLOCK_N"]),)](*args, **block, **types, num_warps=4, num_stages=4)
    return y


@int8_op.register_fake
def _(x, w, scale, bias):
    return x.new_empty(x.size(0), w.size(0))


# ---- the head's loss -------------------------------------------------------------------------------------------------

FAR = tl.constexpr(60.0)
HEAD_WIDEST = 1 << 14  # logits of a token that fit a program's registers: at 50,304 it took twice as long as two passes


def head_slopes(logits: Tensor, targets: Tensor, V: int, cap: float | None, scale: float = 1.0,
                dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropies (N,) float32 and scale · their gradients by the logits (N, ≥ V), of which the first V count, in
    the logits' type or another; targets (N,) int64, what is negative costs nothing. See `loss_and_slope` in model.py,
    which is the reference. Only where `usable(logits)`.

    Up to HEAD_WIDEST logits a program holds all of a token: they are read once and their gradients written once, which
    is the floor. Of more it reads them twice, the second time out of the cache, since few tokens are worked on at once;
    and once more where the first of them are smaller than the largest by more than exp has room for.
    """
    return torch.ops.strawberry.head_slopes(logits, targets, V, cap, scale, dtype or logits.dtype)


@jit
def head_logits(logits, c, V, WIDTH, cap, CAPPED: tl.constexpr, EVICT: tl.constexpr):
    """WIDTH, unlike V, is known to be a multiple of 16, so that loads may be wide."""
    z = tl.load(logits + c, mask=c < WIDTH, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if CAPPED:
        z = cap * (2.0 / (1.0 + tl.exp(-2.0 * z / cap)) - 1.0)  # cap · tanh(z / cap)
    return tl.where(c < V, z, float("-inf"))


@jit
def head_slope(p, z, c, wanted, cap, scale, CAPPED: tl.constexpr):
    slope = (p - (c == wanted).to(tl.float32)) * scale
    if CAPPED:
        slope = tl.where(p > 0, slope * (1.0 - (z / cap) * (z / cap)), 0.0)
    return tl.where(wanted >= 0, slope, 0.0)


@jit
def head_kernel(logits, targets, slopes, nats, V, WIDTH, cap, scale, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wanted = tl.load(targets + row)
    z = head_logits(logits + row * WIDTH, c, V, WIDTH, cap, CAPPED, "evict_first")
    top = tl.max(z, axis=0)
    e = exp(z - top)
    total = tl.sum(e, axis=0)
    slope = head_slope(e / total, z, c, wanted, cap, scale, CAPPED)
    tl.store(slopes + row * WIDTH + c, slope.to(slopes.dtype.element_ty), mask=c < WIDTH)
    found = top + tl.log(total) - tl.sum(tl.where(c == wanted, z, 0.0), axis=0)
    tl.store(nats + row, tl.where(wanted >= 0, found, 0.0))


@jit
def head_wide_kernel(logits, targets, slopes, nats, V, WIDTH, cap, scale, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wanted = tl.load(targets + row)
    logits += row * WIDTH
    top = head_logits(logits, lanes, V, WIDTH, cap, CAPPED, "evict_last")  # V ≥ BLOCK: each lane has a number
    middle = tl.max(top, axis=0)
    total = exp(top - middle)
    for start in range(BLOCK, V, BLOCK):
        z = head_logits(logits, start + lanes, V, WIDTH, cap, CAPPED, "evict_last")
        total += exp(z - middle)
        top = tl.maximum(top, z)
    highest = tl.max(top, axis=0)
    if highest > middle + FAR:  # the first lanes told too little of the others: exp overflows at 88
        middle = highest
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            total += exp(head_logits(logits, start + lanes, V, WIDTH, cap, CAPPED, "evict_last") - middle)
    log_sum = middle + tl.log(tl.sum(total, axis=0))
    for start in range(0, WIDTH, BLOCK):
        c = start + lanes
        z = head_logits(logits, c, V, WIDTH, cap, CAPPED, "evict_first")
        slope = head_slope(exp(z - log_sum), z, c, wanted, cap, scale, CAPPED)
        tl.store(slopes + row * WIDTH + c, slope.to(slopes.dtype.element_ty), mask=c < WIDTH)
    one = tl.maximum(wanted, 0) + tl.arange(0, 1)
    found = log_sum - tl.sum(head_logits(logits, one, V, WIDTH, cap, CAPPED, "evict_first"), axis=0)
    tl.store(nats + row, tl.where(wanted >= 0, found, 0.0))


@torch.library.custom_op("strawberry::head_slopes", mutates_args=())
def head_op(
    logits: Tensor, targets: Tensor, V: int, cap: float | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    N, width = logits.shape
    slopes = torch.empty_like(logits, dtype=dtype)
    nats = torch.empty(N, dtype=torch.float32, device=logits.device)
    block = power_of_2(width)
    shape = {"BLOCK": block, "num_warps": min(max(block // 2048, 4), 32)}
    if width > HEAD_WIDEST:
        shape = {"BLOCK": 8192, "num_warps": 16}
    kernel = head_wide_kernel if width > HEAD_WIDEST else head_kernel
    kernel[(N,)](logits, targets, slopes, nats, V, width, cap or 1.0, scale, CAPPED=cap is not None, **shape)
    return nats, slopes


@head_op.register_fake
def _(logits, targets, V, cap, scale, dtype):
    return logits.new_empty(logits.size(0), dtype=torch.float32), torch.empty_like(logits, dtype=dtype)


# ---- matrices of bytes -----------------------------------------------------------------------------------------------


def transposed(x: Tensor) -> Tensor:
    """x (n, m), one byte a number, as (m, n), contiguous."""
    if not usable(x):
        return x.t().contiguous()
    return torch.ops.strawberry.transposed(x.view(torch.uint8)).view(x.dtype)


@jit
def transpose_kernel(x, y, ROWS, COLUMNS, TALL: tl.constexpr, WIDE: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    here = (r < ROWS)[:, None] & (c < COLUMNS)[None, :]
    tile = tl.load(x + r[:, None] * COLUMNS + c[None, :], mask=here, other=0)
    tl.store(y + c[:, None] * ROWS + r[None, :], tl.trans(tile), mask=tl.trans(here))


@torch.library.custom_op("strawberry::transposed", mutates_args=())
def transposed_op(x: Tensor) -> Tensor:
    x = x.contiguous()
    y, (grid, shape) = x.new_empty(x.size(1), x.size(0)), byte_tiles(*x.shape, 64, 128)
    transpose_kernel[grid](x, y, *x.shape, **shape)
    return y


@transposed_op.register_fake
def _(x):
    return x.new_empty(x.size(1), x.size(0))


def byte_tiles(rows: int, columns: int, tall: int = 128, wide: int = 64) -> tuple[tuple[int, int], dict]:
    """A grid of tiles, and what a kernel over them is told. The larger side is what memory takes at once."""
    return (-(-rows // tall), -(-columns // wide)), {"TALL": tall, "WIDE": wide, "num_warps": 8}


# What is between two products of a feed-forward: its values are wanted in 8 bits only, once as they lie, for the next
# product, and once transposed, for the gradient of its matrix; the gradients too. A kernel reads what there is once.


def bent(h: Tensor, kind: str, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale · f(h), the same transposed) in 8 bits, f as in BENT: h (n, m), or (n, 2m) for "swiglu"."""
    if not usable(h):
        y = to_8_bits(BENT[kind][1](h.float()), scale, dtype)
        return y, y.t().contiguous()
    return tuple(y.view(dtype) for y in torch.ops.strawberry.bent(h, kind, scale, dtype))


def bent_back(
    h: Tensor, grad: Tensor, kind: str, scale: float, dtype: torch.dtype, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale · the gradient of h, the same transposed) in 8 bits, `grad` (n, m) being that of f(h); `more`, shaped as
    h, is the gradient that h has from elsewhere."""
    if not usable(h, grad):
        slope = BENT[kind][2](h.float(), grad.float())
        y = to_8_bits(slope if more is None else slope + more, scale, dtype)
        return y, y.t().contiguous()
    return tuple(y.view(dtype) for y in torch.ops.strawberry.bent_back(h, grad, more, kind, scale, dtype))


def joined(parts: Sequence[Tensor], scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale · the parts side by side, the same transposed) in 8 bits: three (n, ·), of widths that are multiples of
    64."""
    if not usable(*parts):
        y = to_8_bits(torch.cat(parts, dim=1).float(), scale, dtype)
        return y, y.t().contiguous()
    return tuple(y.view(dtype) for y in torch.ops.strawberry.joined(*parts, scale, dtype))


def to_8_bits(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """scale · x, the scale a power of 2, which changes no digit; what is beyond the type's numbers is cut."""
    most = torch.finfo(dtype).max
    return (x * scale).clamp(-most, most).to(dtype)


def swiglu(h: Tensor) -> Tensor:
    u, g = h.chunk(2, dim=-1)
    return u * F.silu(g)


def swiglu_back(h: Tensor, grad: Tensor) -> Tensor:
    (u, g), s = h.chunk(2, dim=-1), h.chunk(2, dim=-1)[1].sigmoid()
    return torch.cat((grad * g * s, grad * u * s * (1 + g * (1 - s))), dim=-1)


def gelu_back(h: Tensor, grad: Tensor) -> Tensor:
    return grad * (torch.special.ndtr(h) + h * (-h * h / 2).exp() / math.sqrt(2 * math.pi))


BENT = {  # name: number that kernels know it by, plain paths of the values and of the gradient
    "gelu": (0, F.gelu, gelu_back),
    "relu": (1, F.relu, lambda h, grad: grad * (h > 0)),
    "relu2": (2, lambda h: F.relu(h).square(), lambda h, grad: grad * 2 * F.relu(h)),
    "swiglu": (3, swiglu, swiglu_back),
    "as is": (4, lambda h: h, lambda h, grad: grad),
}


@jit
def normal(x):
    """Φ(x) within 1e-7 (Abramowitz and Stegun 7.1.26) and φ(x), of the normal distribution."""
    z = tl.abs(x) * 0.7071067811865476
    t, e = inverse(1.0 + 0.3275911 * z), exp(-z * z)
    p = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    tail = 0.5 * p * t * e
    return tl.where(x >= 0, 1.0 - tail, tail), 0.3989422804014327 * e


@jit
def bent_value(x, g, KIND: tl.constexpr):
    if KIND == 0:
        return x * normal(x)[0]
    if KIND == 3:
        return x * g * inverse(1.0 + exp(-g))
    if KIND == 4:
        return x
    x = tl.maximum(x, 0.0)
    return x * x if KIND == 2 else x


@jit
def as_words(byte):
    """The same bytes, four to a register. Left in the halves of registers that the conversion gives, ptxas 12.8 loses
    some of them where they are transposed."""
    if NATIVE:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)
    return byte


@jit
def store_both(y, flipped, value, r, c, ROWS, COLUMNS, here, most):
    """A tile of `value`, cut at ± most, in 8 bits, into y (ROWS, COLUMNS) and into its transpose."""
    byte = as_words(tl.minimum(tl.maximum(value, -most), most).to(y.dtype.element_ty).to(tl.int8, bitcast=True))
    y, flipped = y.to(tl.pointer_type(tl.int8)), flipped.to(tl.pointer_type(tl.int8))
    tl.store(y + r[:, None] * COLUMNS + c[None, :], byte, mask=here)
    tl.store(flipped + c[:, None] * ROWS + r[None, :], tl.trans(byte), mask=tl.trans(here))


@jit
def bent_kernel(h, y, flipped, scale, most, ROWS, COLUMNS, KIND: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    here = (r < ROWS)[:, None] & (c < COLUMNS)[None, :]
    at = h + r[:, None] * ((2 if KIND == 3 else 1) * COLUMNS) + c[None, :]
    x = tl.load(at, mask=here, other=0.0).to(tl.float32)
    g = tl.load(at + COLUMNS, mask=here, other=0.0).to(tl.float32) if KIND == 3 else x
    store_both(y, flipped, bent_value(x, g, KIND) * scale, r, c, ROWS, COLUMNS, here, most)


@jit
def bent_back_kernel(
    h, grad, more, y, flipped, scale, most, ROWS, COLUMNS, KIND: tl.constexpr, MORE: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    here = (r < ROWS)[:, None] & (c < COLUMNS)[None, :]
    WIDTH = (2 if KIND == 3 else 1) * COLUMNS
    at = h + r[:, None] * WIDTH + c[None, :]
    x = tl.load(at, mask=here, other=0.0).to(tl.float32)
    slope = tl.load(grad + r[:, None] * COLUMNS + c[None, :], mask=here, other=0.0).to(tl.float32) * scale
    if KIND == 0:
        below, density = normal(x)
        slope *= below + x * density
    elif KIND == 3:
        g = tl.load(at + COLUMNS, mask=here, other=0.0).to(tl.float32)
        s = inverse(1.0 + exp(-g))
        other = slope * x * s * (1.0 + g * (1.0 - s))
        if MORE:
            at = more + r[:, None] * WIDTH + COLUMNS + c[None, :]
            other += scale * tl.load(at, mask=here, other=0.0).to(tl.float32)
        store_both(y, flipped, other, r, COLUMNS + c, ROWS, WIDTH, here, most)
        slope *= g * s
    elif KIND == 2:
        slope *= 2.0 * tl.maximum(x, 0.0)
    elif KIND == 1:
        slope = tl.where(x > 0, slope, 0.0)
    if MORE:
        slope += scale * tl.load(more + r[:, None] * WIDTH + c[None, :], mask=here, other=0.0).to(tl.float32)
    store_both(y, flipped, slope, r, c, ROWS, WIDTH, here, most)


@jit
def joined_kernel(
    first, second, third, y, flipped, scale, most, ROWS, A, B, C, a_row, b_row, c_row, TALL: tl.constexpr,
    WIDE: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    begin = tl.program_id(1) * WIDE  # within one of the three
    c = begin.to(tl.int64) + tl.arange(0, WIDE)
    here = (r < ROWS)[:, None] & (c < A + B + C)[None, :]
    if begin < A:
        value = tl.load(first + r[:, None] * a_row + c[None, :], mask=here, other=0.0)
    elif begin < A + B:
        value = tl.load(second + r[:, None] * b_row + (c - A)[None, :], mask=here, other=0.0)
    else:
        value = tl.load(third + r[:, None] * c_row + (c - A - B)[None, :], mask=here, other=0.0)
    store_both(y, flipped, value.to(tl.float32) * scale, r, c, ROWS, A + B + C, here, most)


@torch.library.custom_op("strawberry::bent", mutates_args=())
def bent_op(h: Tensor, kind: str, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    h, number = h.contiguous(), BENT[kind][0]
    y, flipped = bent_empty(h, h.size(1) // (2 if kind == "swiglu" else 1), dtype)
    grid, shape = byte_tiles(*y.shape)
    bent_kernel[grid](h, y, flipped, scale, torch.finfo(dtype).max, *y.shape, KIND=number, **shape)
    return y.view(torch.uint8), flipped.view(torch.uint8)


@torch.library.custom_op("strawberry::bent_back", mutates_args=())
def bent_back_op(
    h: Tensor, grad: Tensor, more: Tensor | None, kind: str, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    h, grad, other = h.contiguous(), grad.contiguous(), h if more is None else more.contiguous()
    y, flipped = bent_empty(h, h.size(1), dtype)
    grid, shape = byte_tiles(*grad.shape)
    shape |= {"KIND": BENT[kind][0], "MORE": more is not None}
    bent_back_kernel[grid](h, grad, other, y, flipped, scale, torch.finfo(dtype).max, *grad.shape, **shape)
    return y.view(torch.uint8), flipped.view(torch.uint8)


@torch.library.custom_op("strawberry::joined", mutates_args=())
def joined_op(
    first: Tensor, second: Tensor, third: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in (first, second, third)]
    widths = [part.size(1) for part in parts]
    if any(n % 64 for n in widths):  # a tile would lie in two parts
        raise ValueError(f"widths {widths}: each must be a multiple of 64")
    y, flipped = bent_empty(first, sum(widths), dtype)
    grid, shape = byte_tiles(*y.shape)
    rows = [part.stride(0) for part in parts]
    joined_kernel[grid](*parts, y, flipped, scale, torch.finfo(dtype).max, y.size(0), *widths, *rows, **shape)
    return y.view(torch.uint8), flipped.view(torch.uint8)


@joined_op.register_fake
def _(first, second, third, scale, dtype):
    return bent_empty(first, first.size(1) + second.size(1) + third.size(1), torch.uint8)


def bent_empty(h: Tensor, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.size(0), columns, dtype=dtype), h.new_empty(columns, h.size(0), dtype=dtype)


@bent_op.register_fake
def _(h, kind, scale, dtype):
    return bent_empty(h, h.size(1) // (2 if kind == "swiglu" else 1), torch.uint8)


@bent_back_op.register_fake
def _(h, grad, more, kind, scale, dtype):
    return bent_empty(h, h.size(1), torch.uint8)


# ---- AFT simple ------------------------------------------------------------------------------------------------------

AFT_ROWS = 16  # tokens that a program holds in registers at a time
AFT_CHAINED_ROWS = 8  # that a chained one holds, more of which then fit
AFT_CHANNELS = 32  # channels of a program, one warp
AFT_SEGMENT = 128  # tokens of a chained program; of a small model's, fewer
AFT_SHORTEST = 32
AFT_GROUP = 16  # segments whose sums are read at once
AFT_FILL = 4  # programs for each multiprocessor, from which on they need not be chained


def aft_simple(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """y_t = σ(q_t) ⊙ Σ_{s ≤ t} exp(k_s) v_s / Σ_{s ≤ t} exp(k_s), channel by channel (arXiv 2105.14103).

    q, k, v (B, T, D), channels side by side, otherwise strided as they come out of a projection. Returns (B, T, D) in
    v's dtype; sums are float32 against the running maximum, so that keys of ±80, or of any size, and T of 65,536 lose
    nothing. Differentiable in q, k and v. Only where `usable(q, k, v)`.

    One warp walks down 32 channels of a row, reading the next 16 tokens while it sums the last ones. It leaves its sums
    every 16 tokens, from which the way back, which walks from the end, makes anew what the forward pass knew.

    Where B·D is too small to fill the GPU, time is cut into segments of 128 tokens, a program each, which are chained
    ("Single-pass parallel prefix scan with decoupled look-back", NVIDIA 2016): a program sums its segment, publishes
    the sums, waits for those of the segments before it, and walks down its segment again, whose tokens the cache still
    has. What is added to what does not depend on who comes first: results are the same bits each time.

    Bytes moved in bfloat16, for each of B·T·D: forward 8 (q, k, v read, y written) and 0.75 for the sums, backward 14
    (q, k, v and the gradient read, three gradients written) and 0.75. Those 8 and 14 are the floor. Segments have 1.5
    for the sums, every 8 tokens, and read 4 and 8 more from the cache.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    save = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return torch.ops.strawberry.aft_simple(q, k, v, save)[0]


@jit
def aft_load(x, t, step: tl.constexpr, T, here, fill: tl.constexpr, ROWS: tl.constexpr):
    """Tokens t … t + ROWS − 1, as a tuple. With a constant step they need one address."""
    rows = ()
    x += t * step
    left = (T - t).to(tl.int32)
    for i in tl.static_range(ROWS):
        rows = rows + (tl.load(x + i * step, mask=here & (i < left), other=fill),)
    return rows


@jit
def aft_none(fill: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    """What `aft_load` returns before the first token: loops begin one tile early, with loads alone, since Triton takes
    time by the cube of the loads that a kernel is written with."""
    rows = ()
    for _ in tl.static_range(ROWS):
        rows = rows + (tl.full((BLOCK,), fill, tl.float32).to(TYPE),)
    return rows


@jit
def aft_token(top, above, below, k, v):
    """One more token in the sums, which are divided by exp(top). Also by what they were multiplied, and its weight."""
    newer = k > top
    gap = exp(-tl.abs(top - k))
    fade, weight = tl.where(newer, gap, 1.0), tl.where(newer, 1.0, gap)
    return tl.maximum(top, k), above * fade + weight * v, below * fade + weight, fade, weight


@jit
def aft_carry(total, low, fade, more):
    """total · fade + more, and what rounding took from it (Kahan): a long text adds thousands of times."""
    old, new = total * fade, more + low * fade
    total = old + new
    return total, new - (total - old)


@jit
def aft_publish(x, value, here):
    """For programs that wait: never NaN, which is what they take for missing."""
    tl.store(x, tl.where(value == value, value, float("inf")), mask=here)


@jit
def aft_wait(x, there, COUNT: tl.constexpr, D: tl.constexpr):
    """Until other programs, which started earlier, have written COUNT numbers, D apart, at each of x (GROUP, channels)
    that is `there`. Then these numbers can be read."""
    missing = 1
    while missing > 0:
        first = tl.load(x, mask=there, other=0.0, volatile=True)
        middle = tl.load(x + D, mask=there, other=0.0, volatile=True)
        last = tl.load(x + (COUNT - 1) * D, mask=there, other=0.0, volatile=True)
        some = (first != first) | (middle != middle) | (last != last)
        missing = tl.sum(tl.sum(some.to(tl.int32), axis=0), axis=0)


@jit
def aft_sums_before(totals, prefixes, segment, here, D: tl.constexpr, GROUP: tl.constexpr):
    """The largest key, Σ exp(k) v and Σ exp(k) of all segments before one: those of its group one by one, and what the
    last segment of the group before has made of all that went before."""
    group, other = segment // GROUP, tl.arange(0, GROUP)[:, None]
    first = group * GROUP
    its, there = totals + (first + other) * 3 * D, (first + other < segment) & here[None, :]
    aft_wait(its, there, 3, D)
    tops = tl.load(its, mask=there, other=-1e30, volatile=True)
    top = tl.max(tops, axis=0)
    fade = exp(tops - top[None, :])
    above = tl.sum(fade * tl.load(its + D, mask=there, other=0.0, volatile=True), axis=0)
    below = tl.sum(fade * tl.load(its + 2 * D, mask=there, other=0.0, volatile=True), axis=0)
    its, there = prefixes + (group - 1 + other * 0) * 3 * D, (other == 0) & (group > 0) & here[None, :]
    aft_wait(its, there, 3, D)
    its_top = tl.max(tl.load(its, mask=there, other=-1e30, volatile=True), axis=0)
    higher = tl.maximum(top, its_top)
    fade, its_fade = exp(top - higher), exp(its_top - higher)
    above = above * fade + its_fade * tl.sum(tl.load(its + D, mask=there, other=0.0, volatile=True), axis=0)
    below = below * fade + its_fade * tl.sum(tl.load(its + 2 * D, mask=there, other=0.0, volatile=True), axis=0)
    return higher, above, below


@jit
def aft_total(
    k, v, start, count, T, here, k_step: tl.constexpr, v_step: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest key, Σ exp(k) v and Σ exp(k) of a segment of `count` tiles."""
    top = tl.full((BLOCK,), -1e30, tl.float32)  # finite: −∞ − −∞ would be NaN
    above, below, t = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), start - ROWS
    ks = aft_none(float("-inf"), ROWS, BLOCK, k.dtype.element_ty)
    vs = aft_none(0.0, ROWS, BLOCK, v.dtype.element_ty)
    for tile in range(-1, count):
        limit = tl.where(tile < count - 1, T, 0)  # nothing is read after the segment
        next_ks = aft_load(k, t + ROWS, k_step, limit, here, float("-inf"), ROWS)
        next_vs = aft_load(v, t + ROWS, v_step, limit, here, 0.0, ROWS)
        now = top
        for i in tl.static_range(ROWS):
            now = tl.maximum(now, ks[i].to(tl.float32))
        fade = exp(top - now)
        above, below = above * fade, below * fade
        for i in tl.static_range(ROWS):
            weight = exp(ks[i].to(tl.float32) - now)
            above, below = above + weight * vs[i].to(tl.float32), below + weight
        top, t, ks, vs = now, t + ROWS, next_ks, next_vs
    return top, above, below


@jit
def aft_publish_sums(x, top, above, below, here, D: tl.constexpr):
    aft_publish(x, top, here)
    aft_publish(x + D, above, here)
    aft_publish(x + 2 * D, below, here)


@jit
def aft_tile(y, top, above, below, qs, ks, vs, left, here, D: tl.constexpr, ROWS: tl.constexpr, WRITE: tl.constexpr):
    """A tile's largest key and its own sums; y if WRITE, with the sums before the tile."""
    now, over, under = top, tl.zeros_like(above), tl.zeros_like(above)
    kept = tl.full(above.shape, 1.0, tl.float32)
    for i in tl.static_range(ROWS):
        now, over, under, fade, weight = aft_token(now, over, under, ks[i].to(tl.float32), vs[i].to(tl.float32))
        if WRITE:
            kept *= fade
            open_by = 1.0 + exp(-qs[i].to(tl.float32))  # σ(q) = 1 / (1 + e^−q)
            gated = (above * kept + over) * inverse((below * kept + under) * open_by)
            tl.store(y + i * D, gated.to(y.dtype.element_ty), mask=here & (i < left))
    return now, over, under


@jit
def aft_keep(states, top, above, below, D: tl.constexpr, mask):
    tl.store(states, top, mask=mask)
    tl.store(states + D, above, mask=mask)
    tl.store(states + 2 * D, below, mask=mask)


@jit
def aft_forward(
    q, k, v, y, states, totals, prefixes, T, tiles, q_row, k_row, v_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    SAVE: tl.constexpr, WRITE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """A segment of 32 channels of a row: y if WRITE; if SAVE the sums before each ROWS tokens and after the last.
    Later segments' programs start later, so that none waits for one that finds no place."""
    c, row, segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64), tl.program_id(2)
    here, segments = c < D, tl.num_programs(2)
    q, k, v, y = q + row * q_row + c, k + row * k_row + c, v + row * v_row + c, y + row * T * D + c
    top = tl.full((BLOCK,), -1e30, tl.float32)
    above, below = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    above_low, below_low = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    start = segment.to(tl.int64) * tiles * ROWS
    count, t = tl.minimum(tiles, tl.cdiv(T - start, ROWS).to(tl.int32)), start - ROWS
    if CHAIN:
        its_top, its_above, its_below = aft_total(k, v, start, count, T, here, k_step, v_step, ROWS, BLOCK)
        totals += row * segments * 3 * D + c
        prefixes += row * tl.cdiv(segments, GROUP) * 3 * D + c
        aft_publish_sums(totals + segment * 3 * D, its_top, its_above, its_below, here, D)
        zeros = tl.zeros((GROUP, BLOCK), tl.int32)
        top, above, below = aft_sums_before(totals + zeros, prefixes + zeros, segment, here, D, GROUP)
        if segment % GROUP == GROUP - 1:
            end = tl.maximum(top, its_top)
            fade, its_fade = exp(top - end), exp(its_top - end)
            over, under = above * fade + its_above * its_fade, below * fade + its_below * its_fade
            aft_publish_sums(prefixes + (segment // GROUP) * 3 * D, end, over, under, here, D)
    ks = aft_none(float("-inf"), ROWS, BLOCK, k.dtype.element_ty)
    vs = aft_none(0.0, ROWS, BLOCK, v.dtype.element_ty)
    qs = aft_none(0.0, ROWS, BLOCK, q.dtype.element_ty)
    states += (row * (tl.cdiv(T, ROWS) + 1) + segment * tiles - 1) * 3 * D + c
    for tile in range(-1, count):
        left, limit = tl.where(tile >= 0, T - t, 0).to(tl.int32), tl.where(tile < count - 1, T, 0)
        next_ks = aft_load(k, t + ROWS, k_step, limit, here, float("-inf"), ROWS)
        next_vs = aft_load(v, t + ROWS, v_step, limit, here, 0.0, ROWS)
        next_qs = qs
        if WRITE:
            next_qs = aft_load(q, t + ROWS, q_step, limit, here, 0.0, ROWS)
        if SAVE:
            aft_keep(states, top, above + above_low, below + below_low, D, here & (tile >= 0))
            states += 3 * D
        now, over, under = aft_tile(y + t * D, top, above, below, qs, ks, vs, left, here, D, ROWS, WRITE)
        kept = exp(top - now)
        above, above_low = aft_carry(above, above_low, kept, over)
        below, below_low = aft_carry(below, below_low, kept, under)
        top, t, ks, vs, qs = now, t + ROWS, next_ks, next_vs, next_qs
    if SAVE:
        aft_keep(states, top, above + above_low, below + below_low, D, here & (segment == segments - 1))


@jit
def aft_sums_after(
    totals, prefixes, states, back, segments, tiles, end, here, D: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Σ r_t and Σ r_t o_t of all segments after one, the `back`-th from the last, times exp(end), as `aft_sums_before`.
    Each segment's are times the exponential of the largest key before it, which `states` has."""
    group, other = back // GROUP, tl.arange(0, GROUP)[:, None]
    first = group * GROUP
    its, there = totals + (first + other) * 2 * D, (first + other < back) & here[None, :]
    tops = states + (segments - 1 - first - other).to(tl.int64) * tiles * 3 * D
    its_top = tl.load(tops, mask=there, other=float("inf"))
    aft_wait(its, there, 2, D)
    fade = exp(end[None, :] - its_top)
    after = tl.sum(fade * tl.load(its, mask=there, other=0.0, volatile=True), axis=0)
    weighted = tl.sum(fade * tl.load(its + D, mask=there, other=0.0, volatile=True), axis=0)
    its, there = prefixes + (group - 1 + other * 0) * 2 * D, (other == 0) & (group > 0) & here[None, :]
    tops = states + (segments - first + other * 0).to(tl.int64) * tiles * 3 * D
    its_top = tl.load(tops, mask=there, other=float("inf"))
    aft_wait(its, there, 2, D)
    fade = exp(end[None, :] - its_top)
    after += tl.sum(fade * tl.load(its, mask=there, other=0.0, volatile=True), axis=0)
    weighted += tl.sum(fade * tl.load(its + D, mask=there, other=0.0, volatile=True), axis=0)
    return after, weighted


@jit
def aft_again(
    dq, state, qs, ks, vs, gs, left, here, D: tl.constexpr, ROWS: tl.constexpr, WRITE: tl.constexpr
):  # fmt: skip
    """What the forward pass knew in a tile: of its tokens r, r o, by what the sums before were multiplied, and their
    weights; by what the sums after the tile are. The gradient of q if WRITE."""
    top = tl.load(state, mask=here, other=0.0)
    above = tl.load(state + D, mask=here, other=0.0)
    below = tl.load(state + 2 * D, mask=here, other=1.0)
    now, over, under, kept = top, tl.zeros_like(top), tl.zeros_like(top), tl.full(top.shape, 1.0, tl.float32)
    rs, ros, fades, weights = (), (), (), ()
    for i in tl.static_range(ROWS):
        now, over, under, fade, weight = aft_token(now, over, under, ks[i].to(tl.float32), vs[i].to(tl.float32))
        kept *= fade
        per_z = inverse(below * kept + under)
        o = (above * kept + over) * per_z
        gate = inverse(1.0 + exp(-qs[i].to(tl.float32)))
        gated = gs[i].to(tl.float32) * gate
        if WRITE:
            tl.store(dq + i * D, (gated * o * (1.0 - gate)).to(dq.dtype.element_ty), mask=here & (i < left))
        r = gated * per_z
        rs, ros, fades, weights = rs + (r,), ros + (r * o,), fades + (fade,), weights + (weight,)
    return rs, ros, fades, weights, exp(top - now)


@jit
def aft_tile_back(
    dk, dv, after, weighted, rs, ros, fades, weights, vs, left, here,
    D: tl.constexpr, ROWS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """A tile's own Σ r and Σ r o, times what lies before its first token; the gradients of k and v if WRITE, with the
    sums after the tile."""
    over, under = tl.zeros_like(after), tl.zeros_like(after)
    fade, kept = tl.full(after.shape, 1.0, tl.float32), tl.full(after.shape, 1.0, tl.float32)
    for i in tl.static_range(ROWS - 1, -1, -1):
        over, under, kept = over * fade + rs[i], under * fade + ros[i], kept * fade
        fade = fades[i]
        if WRITE:
            dv_now = weights[i] * (over + after * kept)
            dk_now = dv_now * vs[i].to(tl.float32) - weights[i] * (under + weighted * kept)
            tl.store(dv + i * D, dv_now.to(dv.dtype.element_ty), mask=here & (i < left))
            tl.store(dk + i * D, dk_now.to(dk.dtype.element_ty), mask=here & (i < left))
    return over * fade, under * fade


@jit
def aft_backward(
    q, k, v, grad, dq, dk, dv, states, totals, prefixes, T, tiles, q_row, k_row, v_row, grad_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, grad_step: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """The gradients of a segment, from its end; the last segment is the first program. If CHAIN it is walked twice, for
    its sums alone and for its gradients.

    With o_t the mean, Z_t = Σ_{s ≤ t} exp(k_s) and r_t = σ(q_t) ∂L/∂y_t / Z_t, the gradients are sums over the future:
    ∂L/∂v_s = exp(k_s) Σ_{t ≥ s} r_t and ∂L/∂k_s = exp(k_s) (v_s Σ_{t ≥ s} r_t − Σ_{t ≥ s} r_t o_t).
    Z_t is divided by exp(top_t), top_t the running maximum, so the sums over t ≥ s are multiplied by exp(top_s).
    """
    c, row, back = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64), tl.program_id(2)
    here, segments, all_tiles = c < D, tl.num_programs(2), tl.cdiv(T, ROWS)
    segment = segments - 1 - back
    q, k, v, grad = q + row * q_row + c, k + row * k_row + c, v + row * v_row + c, grad + row * grad_row + c
    dq, dk, dv = dq + row * T * D + c, dk + row * T * D + c, dv + row * T * D + c
    states += row * (all_tiles + 1) * 3 * D + c
    first, last = segment * tiles, tl.minimum(segment * tiles + tiles, all_tiles)
    own_after, own_weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for write in tl.static_range(1 - CHAIN, 2):
        after, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)  # Σ r and Σ r o, later tiles'
        after_low, weighted_low = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        t = last.to(tl.int64) * ROWS
        ks = aft_none(float("-inf"), ROWS, BLOCK, k.dtype.element_ty)
        vs = aft_none(0.0, ROWS, BLOCK, v.dtype.element_ty)
        qs = aft_none(0.0, ROWS, BLOCK, q.dtype.element_ty)
        gs = aft_none(0.0, ROWS, BLOCK, grad.dtype.element_ty)
        if CHAIN and write == 1:
            end = tl.load(states + last.to(tl.int64) * 3 * D, mask=here, other=0.0)
            zeros = tl.zeros((GROUP, BLOCK), tl.int32)
            after, weighted = aft_sums_after(
                totals + zeros, prefixes + zeros, states + zeros, back, segments, tiles, end, here, D, GROUP
            )
            if back % GROUP == GROUP - 1:
                fade = exp(tl.load(states + first.to(tl.int64) * 3 * D, mask=here, other=0.0) - end)
                aft_publish(prefixes + (back // GROUP) * 2 * D, own_after + fade * after, here)
                aft_publish(prefixes + (back // GROUP) * 2 * D + D, own_weighted + fade * weighted, here)
        for done in range(-1, last - first):
            tile = last - 1 - done
            left = tl.where(done >= 0, T - t, 0).to(tl.int32)
            limit = tl.where(tile > first, T, -ROWS)  # nothing is read before the segment
            next_ks = aft_load(k, t - ROWS, k_step, limit, here, float("-inf"), ROWS)
            next_vs = aft_load(v, t - ROWS, v_step, limit, here, 0.0, ROWS)
            next_qs = aft_load(q, t - ROWS, q_step, limit, here, 0.0, ROWS)
            next_gs = aft_load(grad, t - ROWS, grad_step, limit, here, 0.0, ROWS)
            state, out = states + tile.to(tl.int64) * 3 * D, t * D
            rs, ros, fades, weights, kept = aft_again(dq + out, state, qs, ks, vs, gs, left, here, D, ROWS, write == 1)
            over, under = aft_tile_back(
                dk + out, dv + out, after, weighted, rs, ros, fades, weights, vs, left, here, D, ROWS, write == 1)
            after, after_low = aft_carry(after, after_low, kept, over)
            weighted, weighted_low = aft_carry(weighted, weighted_low, kept, under)
            t, ks, vs, qs, gs = t - ROWS, next_ks, next_vs, next_qs, next_gs
        if CHAIN and write == 0:
            own_after, own_weighted = after, weighted
            totals += row * segments * 2 * D + c
            prefixes += row * tl.cdiv(segments, GROUP) * 2 * D + c
            aft_publish(totals + back * 2 * D, after, here)
            aft_publish(totals + back * 2 * D + D, weighted, here)


def aft_segment(v: Tensor) -> int:
    """Tokens of the segments into which time is cut where channels and rows make too few programs; 0: it is not cut."""
    B, T, D = v.shape
    lines, wanted, segment = B * -(-D // AFT_CHANNELS), AFT_FILL * processors(v), AFT_SEGMENT
    while segment > AFT_SHORTEST and lines * -(-T // segment) < wanted:
        segment //= 2
    return segment if segment < T and lines < wanted else 0


def aft_chained(v: Tensor) -> bool:
    return aft_segment(v) > 0


def aft_rows(v: Tensor) -> int:
    return AFT_CHAINED_ROWS if aft_chained(v) else AFT_ROWS


def aft_launch(v: Tensor, numbers: int) -> tuple[tuple[int, int, int], list[Tensor], int, dict]:
    """Programs over channels, rows and segments; what segments and groups of them publish; tiles in a segment, none of
    which is empty; constants."""
    (B, T, D), chained, rows = v.shape, aft_chained(v), aft_rows(v)
    block, tiles = min(AFT_CHANNELS, power_of_2(D)), aft_segment(v) // rows if chained else -(-T // rows)
    segments = -(-T // (tiles * rows))
    counts = (segments, -(-segments // AFT_GROUP)) if chained else (0, 0)
    published = [torch.full((B, n, numbers, D), math.nan, dtype=torch.float32, device=v.device) for n in counts]
    shape = {"ROWS": rows, "BLOCK": block, "GROUP": AFT_GROUP, "CHAIN": int(chained), "num_warps": 1}
    return (-(-D // block), B, segments), published, tiles, shape


def aft_states(v: Tensor) -> tuple[int, int, int, int]:
    """The shape of what `aft_sums` keeps."""
    B, T, D = v.shape
    return B, -(-T // aft_rows(v)) + 1, 3, D


def aft_sums(q: Tensor, k: Tensor, v: Tensor, y: Tensor, save: bool, write: bool) -> Tensor:
    """The sums before each `aft_rows` tokens and after the last, (B, ⌈T / rows⌉ + 1, 3, D): the largest key, and
    Σ exp(k) v and Σ exp(k) divided by its exponential; empty unless `save`. On the way, y is written if `write`."""
    (_, T, D), (grid, published, tiles, shape) = v.shape, aft_launch(v, 3)
    states = torch.empty(aft_states(v) if save else (0,), dtype=torch.float32, device=v.device)
    strides = [x.stride(axis) for axis in (0, 1) for x in (q, k, v)]
    args = (q, k, v, y, states, *published, T, tiles, *strides[:3], D, *strides[3:])
    aft_forward[grid](*args, **shape, SAVE=save, WRITE=write)
    return states


@torch.library.custom_op("strawberry::aft_simple", mutates_args=())
def aft_op(q: Tensor, k: Tensor, v: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return y, aft_sums(q, k, v, y, save, True)


@aft_op.register_fake
def _(q, k, v, save):
    return v.new_empty(v.shape), v.new_empty(aft_states(v) if save else (0,), dtype=torch.float32)


@torch.library.custom_op("strawberry::aft_simple_backward", mutates_args=())
def aft_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, D), (grid, published, tiles, shape) = v.shape, aft_launch(v, 2)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (torch.empty(B, T, D, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides = [x.stride(axis) for axis in (0, 1) for x in (q, k, v, grad)]
    args = (q, k, v, grad, dq, dk, dv, states, *published, T, tiles, *strides[:4], D, *strides[4:])
    aft_backward[grid](*args, **shape)
    return dq, dk, dv


@aft_backward_op.register_fake
def _(grad, q, k, v, states):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def aft_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def aft_gradients(ctx, grad: Tensor, _) -> tuple:
    return *torch.ops.strawberry.aft_simple_backward(grad, *ctx.saved_tensors), None


aft_op.register_autograd(aft_gradients, setup_context=aft_setup)


# ---- AFT with positions ----------------------------------------------------------------------------------------------

AFT_BLOCK = 64  # tokens in a block
AFT_LAUNCH = {  # channels of a program, warps and stages: by registers, of which none spill
    "forward": {"BLOCK": 64, "num_warps": 8, "num_stages": 1},
    "backward": {"BLOCK": 64, "num_warps": 8, "num_stages": 1},
    "weights": {"BLOCK": 64, "num_warps": 8, "num_stages": 3},
}


def aft_conv(q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> Tensor:
    """AFT with p_{t,s} = taps[g, t − s] for the g-th of G groups of channels, 0 from a distance of `window` on; taps
    (G, window). The rest as in `aft_positional`."""
    with torch.autocast(v.device.type, enabled=False):
        apart, window = aft_apart(v, taps.size(1)), taps.size(1)
        p = taps.float().index_select(1, apart.clamp(0, window - 1).flatten()).unflatten(1, apart.shape)  # (G, R, N, N)
        p = torch.where(apart < window, p, 0.0)
        return aft_positional(q, k, v, p.movedim(0, 1).unsqueeze(0), apart)


def aft_local(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, window: int) -> Tensor:
    """AFT with p_{t,s} = a_t · b_s, 0 from a distance of `window` on (window T: full); a, b (at least T, m). The rest
    as in `aft_positional`."""
    with torch.autocast(v.device.type, enabled=False):
        T, N, apart = v.size(1), AFT_BLOCK, aft_apart(v, window)
        a, b = (F.pad(x[:T].float(), (0, 0, 0, -T % N)).unflatten(0, (-1, N)) for x in (a, b))  # (J, N, m)
        blocks = torch.arange(len(a), device=v.device)
        earlier = (blocks[:, None] - torch.arange(len(apart), device=v.device)).clamp(min=0)  # (J, R)
        b = b.index_select(0, earlier.flatten()).unflatten(0, earlier.shape)  # (J, R, N, m)
        p = torch.where(apart < window, a.unsqueeze(1) @ b.mT, 0.0)  # (J, R, N, N)
        return aft_positional(q, k, v, p.unsqueeze(2), apart)


def aft_apart(v: Tensor, window: int) -> Tensor:
    """t − s for the tokens t and s of two blocks that are 0 … R − 1 blocks apart, (R, N, N); R − 1 blocks reach as far
    as the window does."""
    N, T = AFT_BLOCK, v.size(1)
    R = 1 + min(-(-(window - 1) // N), -(-T // N) - 1)
    i = torch.arange(N, device=v.device)
    return N * torch.arange(R, device=v.device)[:, None, None] + i[:, None] - i


def aft_positional(q: Tensor, k: Tensor, v: Tensor, p: Tensor, apart: Tensor) -> Tensor:
    """y_t = σ(q_t) ⊙ Σ_{s ≤ t} exp(k_s + p_{t,s}) v_s / Σ_{s ≤ t} exp(k_s + p_{t,s}) (arXiv 2105.14103).

    q, k, v (B, T, D), channels side by side; p (J, R, G, N, N): of the tokens t in each of J blocks, s in the block
    0 … R − 1 before it, for G groups of channels, 0 farther off; J is 1 where p depends on the distance alone. Returns
    (B, T, D) in v's dtype; differentiable in q, k, v and p. Only where `usable(q, k, v, p)`.

    What lies before the R blocks comes as a running sum; the blocks as matrix products exp(p) @ (exp(k) v, exp(k)), the
    keys about the largest so far. In a token's own block, of which it sees a part, they are about the middle of that
    block's keys: as far as 160 apart, ±80, they lose nothing. Nor do positions that lie under 80 apart.

    Bytes moved for each of B·T·D in bfloat16: forward 8, 4.75 for the running sums, 4 for the logarithms; backward 14,
    8 for sums over the future and 14 for p; what is read again by neighbouring blocks comes from the cache. Operations:
    4 (window + 64) forward, 8 (window + 64) backward, on the matrix units, in bfloat16 where v is. The floor is the
    larger of 8 or 14 bytes and these operations.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    most = p.detach().amax(dim=(1, 4)).clamp(min=0)  # (J, G, N), of each t; 0 is what lies before
    weight = torch.where((apart >= 0).unsqueeze(1), (p - most[:, None, :, :, None]).exp(), 0.0)
    return torch.ops.strawberry.aft_positional(q, k, v, weight, most)[0]


@jit
def aft_keys(
    k, v, states, block, T, here,
    D: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """k, −∞ after the last token, and v of a block; (1, channels) each, the largest key up to its end, and the middle
    between that and the largest up to its first token, which all of the block see."""
    s = (block * N + tl.arange(0, N)).to(tl.int64)[:, None]
    mask, here = (s < T) & here[None, :], here[None, :]
    key = tl.where(s < T, tl.load(k + s * k_step, mask=mask, other=0.0).to(tl.float32), float("-inf"))
    value = tl.load(v + s * v_step, mask=mask, other=0.0).to(tl.float32)
    start = tl.load(states + block * (N // ROWS) * 3 * D, mask=here, other=0.0)
    end = tl.load(states + tl.minimum((block + 1) * (N // ROWS), tl.cdiv(T, ROWS)) * 3 * D, mask=here, other=0.0)
    start = tl.maximum(start, tl.load(k + block * N * k_step, mask=here, other=0.0).to(tl.float32))
    return key, value, end, (start + end) * 0.5


@jit
def aft_positional_forward(
    q, k, v, weight, most, y, logs, states, T, J, R, q_row, k_row, v_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of tokens, of channels of one group: y, and log Σ exp(k_s + p_{t,s})."""
    block, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    groups: tl.constexpr = D // WIDTH
    group, inside = part // parts, (part % parts) * BLOCK + tl.arange(0, BLOCK)
    here, c = inside < WIDTH, group * WIDTH + inside
    q, k, v = q + row * q_row + c[None, :], k + row * k_row + c[None, :], v + row * v_row + c[None, :]
    i, mine, first = tl.arange(0, N), block % J, tl.maximum(block + 1 - R, 0)
    weight += (mine * R * groups + group).to(tl.int64) * N * N + i[:, None] * N + i[None, :]
    its_most = tl.load(most + (mine * groups + group) * N + i)
    states = states + row * (tl.cdiv(T, ROWS) + 1) * 3 * D + c[None, :]
    far, before = states + first * (N // ROWS) * 3 * D, exp(-its_most)[:, None]
    top = tl.load(far, mask=here[None, :], other=0.0)
    above = before * tl.load(far + D, mask=here[None, :], other=0.0)
    below = before * tl.load(far + 2 * D, mask=here[None, :], other=0.0)
    for other in range(first, block + 1):
        key, value, end, middle = aft_keys(k, v, states, other, T, here, D, k_step, v_step, N, ROWS)
        higher = tl.where(other == block, middle, end)
        fade, e = exp(top - higher), exp(key - higher)
        w = tl.load(weight + (block - other) * groups * N * N)
        above = tl.dot(w, (e * value).to(DOT), above * fade, input_precision="tf32x3")
        below = tl.dot(w, e.to(DOT), below * fade, input_precision="tf32x3")
        top = higher
    t = (block * N + i).to(tl.int64)
    mask = (t < T)[:, None] & here[None, :]
    below = tl.where(below > 0, below, 1.0)
    query = tl.load(q + t[:, None] * q_step, mask=mask, other=0.0).to(tl.float32)
    out = (row * T + t)[:, None] * D + c[None, :]
    tl.store(y + out, (above / (below * (1.0 + exp(-query)))).to(y.dtype.element_ty), mask=mask)
    tl.store(logs + out, top + its_most[:, None] + tl.log(below), mask=mask)


@jit
def aft_after(
    q, grad, y, logs, states, dq, after, T, q_row, grad_row,
    D: tl.constexpr, q_step: tl.constexpr, grad_step: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the end, block by block: Σ r_t and Σ r_t o_t over t in this block and later ones, times exp(the largest key
    before this block), with r_t = σ(q_t) ∂L/∂y_t / Z_t; and q's gradient."""
    c, row, i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64), tl.arange(0, N)
    here, blocks = c < D, tl.cdiv(T, N)
    q, grad = q + row * q_row + c[None, :], grad + row * grad_row + c[None, :]
    states += row * (tl.cdiv(T, ROWS) + 1) * 3 * D + c
    after += row * blocks * 2 * D + c
    total, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    last_top = tl.full((BLOCK,), 1e30, tl.float32)  # nothing comes after the last block
    for done in range(0, blocks):
        block = blocks - 1 - done
        t = (block * N + i).to(tl.int64)
        mask = (t < T)[:, None] & here[None, :]
        out = (row * T + t)[:, None] * D + c[None, :]
        query = tl.load(q + t[:, None] * q_step, mask=mask, other=0.0).to(tl.float32)
        slope = tl.load(grad + t[:, None] * grad_step, mask=mask, other=0.0).to(tl.float32)
        result = tl.load(y + out, mask=mask, other=0.0).to(tl.float32)
        log = tl.load(logs + out, mask=mask, other=float("inf"))
        gate = inverse(1.0 + exp(-query))
        tl.store(dq + out, (slope * result * (1.0 - gate)).to(dq.dtype.element_ty), mask=mask)
        top = tl.load(states + block.to(tl.int64) * (N // ROWS) * 3 * D, mask=here, other=0.0)
        per_z, fade = slope * exp(top[None, :] - log), exp(top - last_top)
        total = tl.sum(gate * per_z, axis=0) + total * fade
        weighted = tl.sum(result * per_z, axis=0) + weighted * fade  # σ(q) o is y
        last_top = top
        tl.store(after + block.to(tl.int64) * 2 * D, total, mask=here)
        tl.store(after + (block.to(tl.int64) * 2 + 1) * D, weighted, mask=here)


@jit
def aft_shares(
    q, grad, y, logs, t, T, about, most, here, out, q_step: tl.constexpr, grad_step: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """r_t and r_t o_t, multiplied by exp(about) of each channel and exp(most) of each t."""
    t = t.to(tl.int64)
    mask = (t < T)[:, None] & here[None, :]
    query = tl.load(q + t[:, None] * q_step, mask=mask, other=0.0).to(tl.float32)
    slope = tl.load(grad + t[:, None] * grad_step, mask=mask, other=0.0).to(tl.float32)
    result = tl.load(y + out + t[:, None] * D, mask=mask, other=0.0).to(tl.float32)
    log = tl.load(logs + out + t[:, None] * D, mask=mask, other=float("inf"))
    per_z = slope * exp(about + most[:, None] - log)
    return per_z * inverse(1.0 + exp(-query)), per_z * result


@jit
def aft_positional_backward(
    q, k, v, weight, most, grad, y, logs, states, after, dk, dv, T, J, R, q_row, k_row, v_row, grad_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, grad_step: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v in a block of tokens, of channels of one group, from all later tokens."""
    block, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    groups: tl.constexpr = D // WIDTH
    group, inside = part // parts, (part % parts) * BLOCK + tl.arange(0, BLOCK)
    here, c = inside < WIDTH, group * WIDTH + inside
    q, k, v = q + row * q_row + c[None, :], k + row * k_row + c[None, :], v + row * v_row + c[None, :]
    grad += row * grad_row + c[None, :]
    i, blocks = tl.arange(0, N), tl.cdiv(T, N)
    s, far = block * N + i, tl.minimum(block + R, blocks)
    states = states + row * (tl.cdiv(T, ROWS) + 1) * 3 * D + c[None, :]
    key, value, _, about = aft_keys(k, v, states, block, T, here, D, k_step, v_step, N, ROWS)
    over, under = tl.zeros((N, BLOCK), tl.float32), tl.zeros((N, BLOCK), tl.float32)
    for other in range(block, far):
        its_most = tl.load(most + (other % J * groups + group) * N + i)
        tile = (other % J * R + other - block) * groups + group
        w = tl.load(weight + tile * N * N + i[None, :] * N + i[:, None])  # (s, t)
        share, weighted = aft_shares(q, grad, y, logs, other * N + i, T, about, its_most, here,
                                     row * T * D + c[None, :], q_step, grad_step, D)  # fmt: skip
        over = tl.dot(w, share.to(DOT), over, input_precision="tf32x3")
        under = tl.dot(w, weighted.to(DOT), under, input_precision="tf32x3")
    e, there = exp(key - about), (here & (far < blocks))[None, :]
    top = tl.load(states + far * (N // ROWS) * 3 * D, mask=there, other=float("inf"))
    after += (row * blocks + far) * 2 * D + c[None, :]
    e_far = exp(key - top)  # none where there is nothing far
    over = over * e + e_far * tl.load(after, mask=there, other=0.0)
    under = under * e + e_far * tl.load(after + D, mask=there, other=0.0)
    mask = (s < T)[:, None] & here[None, :]
    out = (row * T + s.to(tl.int64))[:, None] * D + c[None, :]
    tl.store(dv + out, over.to(dv.dtype.element_ty), mask=mask)
    tl.store(dk + out, (value * over - under).to(dk.dtype.element_ty), mask=mask)


@jit
def aft_weights_backward(
    q, k, v, most, grad, y, logs, states, dw, B, T, J, R, rows, q_row, k_row, v_row, grad_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, grad_step: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of weights: the sum over some of the rows, over the channels of its group and over the
    pairs of blocks that it is for."""
    mine, apart = tl.program_id(0), tl.program_id(1)
    groups: tl.constexpr = D // WIDTH
    group, share_of = tl.program_id(2) % groups, tl.program_id(2) // groups
    i, blocks = tl.arange(0, N), tl.cdiv(T, N)
    its_most = tl.load(most + (mine * groups + group) * N + i)
    total = tl.zeros((N, N), tl.float32)
    skipped = tl.cdiv(tl.maximum(apart - mine, 0), J)  # pairs that begin before the first block
    for pair in range(skipped, tl.cdiv(blocks - mine, J)):
        block = mine + pair * J
        for step in range(0, tl.minimum(rows, B - share_of * rows)):
            row = (share_of * rows).to(tl.int64) + step
            for start in range(0, WIDTH, BLOCK):
                inside = start + tl.arange(0, BLOCK)
                here, c = inside < WIDTH, group * WIDTH + inside[None, :]
                its_states = states + row * (tl.cdiv(T, ROWS) + 1) * 3 * D + c
                key, value, _, about = aft_keys(k + row * k_row + c, v + row * v_row + c, its_states,
                                                block - apart, T, here, D, k_step, v_step, N, ROWS)  # fmt: skip
                e = exp(key - about)
                share, weighted = aft_shares(q + row * q_row + c, grad + row * grad_row + c, y, logs, block * N + i, T,
                                             about, its_most, here, row * T * D + c, q_step, grad_step, D)  # fmt: skip
                total = tl.dot(share.to(DOT), tl.trans((e * value).to(DOT)), total, input_precision="tf32x3")
                total = tl.dot((-weighted).to(DOT), tl.trans(e.to(DOT)), total, input_precision="tf32x3")
    seen = apart * N + i[:, None] - i[None, :] >= 0  # the rest may be anything
    tile = ((share_of * J + mine) * R + apart) * groups + group
    tl.store(dw + tile.to(tl.int64) * N * N + i[:, None] * N + i[None, :], tl.where(seen, total, 0.0))


def aft_shape(v: Tensor, weight: Tensor, kernel: str) -> tuple[dict, tuple[int, int]]:
    """Constants of a launch; programs over blocks of tokens and channels."""
    groups = weight.size(2)
    width = v.size(-1) // groups
    shape = AFT_LAUNCH[kernel] | {"WIDTH": width, "N": AFT_BLOCK, "ROWS": aft_rows(v), "DOT": dot_type(v)}
    shape["BLOCK"] = max(16, min(shape["BLOCK"], power_of_2(width)))
    return shape, (-(-v.size(1) // AFT_BLOCK), groups * -(-width // shape["BLOCK"]))


def aft_factor(weight: Tensor, v: Tensor) -> Tensor:
    """The weights as the matrix units take them."""
    return (weight if INTERPRETED else weight.to(v.dtype)).contiguous()


@torch.library.custom_op("strawberry::aft_positional", mutates_args=())
def aft_positional_op(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, most: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = v.shape
    y = torch.empty(B, T, D, dtype=v.dtype, device=v.device)
    logs = torch.empty(B, T, D, dtype=torch.float32, device=v.device)
    states = aft_sums(q, k, v, y, True, False)
    rows, steps = ([x.stride(axis) for x in (q, k, v)] for axis in (0, 1))
    shape, grid = aft_shape(v, weight, "forward")
    tiles = aft_factor(weight, v), most.contiguous()
    args = (q, k, v, *tiles, y, logs, states, T, *weight.shape[:2], *rows, D, *steps)
    aft_positional_forward[(*grid, B)](*args, **shape)
    return y, logs, states


@aft_positional_op.register_fake
def _(q, k, v, weight, most):
    B, T, D = v.shape
    return v.new_empty(v.shape), *(v.new_empty(shape, dtype=torch.float32) for shape in (v.shape, aft_states(v)))


@torch.library.custom_op("strawberry::aft_positional_backward", mutates_args=())
def aft_positional_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    most: Tensor,
    y: Tensor,
    logs: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, T, D), (J, R, G, N, _), most = v.shape, weight.shape, most.contiguous()
    shape, grid = aft_shape(v, weight, "backward")
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (torch.empty(B, T, D, dtype=x.dtype, device=x.device) for x in (q, k, v))
    after = torch.empty(B, grid[0], 2, D, dtype=torch.float32, device=v.device)
    rows, steps = ([x.stride(axis) for x in (q, k, v, grad)] for axis in (0, 1))
    sums = (q, grad, y, logs, states, dq, after, T, rows[0], rows[3], D, steps[0], steps[3])
    aft_after[(-(-D // 32), B)](*sums, BLOCK=32, N=N, ROWS=aft_rows(v), num_warps=4)
    known = grad, y, logs, states
    args = (q, k, v, aft_factor(weight, v), most, *known, after, dk, dv, T, J, R, *rows, D, *steps)
    aft_positional_backward[(*grid, B)](*args, **shape)
    share = -(-B // max(1, min(B, -(-4 * processors(v) // (J * R * G)))))  # rows of B to a program
    dw = torch.empty(-(-B // share), J, R, G, N, N, dtype=torch.float32, device=v.device)
    args = (q, k, v, most, *known, dw, B, T, J, R, share, *rows, D, *steps)
    aft_weights_backward[(J, R, G * len(dw))](*args, **aft_shape(v, weight, "weights")[0])
    return dq, dk, dv, dw.sum(0)


@aft_positional_backward_op.register_fake
def _(grad, q, k, v, weight, most, y, logs, states):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, weight))


def aft_positional_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def aft_positional_gradients(ctx, grad: Tensor, *_) -> tuple:
    return *torch.ops.strawberry.aft_positional_backward(grad, *ctx.saved_tensors), None


aft_positional_op.register_autograd(aft_positional_gradients, setup_context=aft_positional_setup)


# ---- retention's weights ---------------------------------------------------------------------------------------------

GROW_TILE = {"ROWS": 128, "COLS": 128, "STEP": 64}
GROW_LAUNCH = {"num_warps": 8, "num_stages": 3}


def grow(raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, viewed: bool) -> tuple[Tensor, ...]:
    """raw + h outᵀ with z = raw oa and h = z ⊙ σ(scale · z), for each of n chunks of each row.

    raw (B, n, M, N), or (M, N) for all; scale (B, n, 1, 1), float32; oa (B, n, C, C); out (C, C). N = C; matrices that
    are `viewed` are kept transposed, M = C: z = oaᵀ raw and raw + out h. Returns the sum and z, (B, n, M, N) in raw's
    dtype; mean and variance of each matrix of the sum, (B, n, 1, 1), float32 or wider.

    Operations: 4·M·N·C a chunk. Bytes moved for each number in half types: 6 to make z and h of raw, 6 to make the sum
    of h and raw, with the moments on the way; plain PyTorch moves 8 more.
    """
    if not growable(raw, oa):
        return grow_plain(raw, scale, oa, out, viewed)
    new, z, moments = torch.ops.strawberry.grow(raw, scale, oa, out, viewed)
    count = new[0, 0].numel()
    total, squares = (x[..., None, None] for x in moments.sum(dim=2).unbind(-1))
    mean = total / count
    return new, z, mean, (squares - total * mean).clamp(min=0) / (count - 1)


def growable(raw: Tensor, oa: Tensor) -> bool:
    """Whether the kernels take it: half types, whose products have their own units, and more than one matrix, since
    what is saved by fewer passes over one is less than what compiling the kernels takes; nor small ones, of which no
    pass takes longer than its launch (at C 64, air.json's step took 1.41 ms with the kernels and 1.33 ms without)."""
    taken = INTERPRETED or (raw.dtype == oa.dtype in HALVES and oa.size(-1) >= 128)
    return usable(raw, oa) and taken and oa.shape[:2].numel() > 1


def grow_plain(raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, viewed: bool) -> tuple[Tensor, ...]:
    """`grow` in plain PyTorch."""
    z = times(raw, oa, viewed)
    h = (at_least_float(z) * torch.sigmoid(scale * z)).to(z.dtype)
    new = raw + times(h, out.mT, viewed)
    variance, mean = torch.var_mean(at_least_float(new), dim=(-2, -1), keepdim=True)
    return new, z, mean, variance


def grow_backward(
    grad: Tensor, raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, z: Tensor, viewed: bool
) -> tuple[Tensor, ...]:
    """Gradients of raw, for each chunk, (B, n, M, N), of scale, oa and out from that of `grow`'s sum.

    Operations: 8·M·N·C a chunk. Bytes moved for each number in half types: 8 to make dz and h of grad and z, 6 for
    raw's gradient of dz and grad, 4 each for those of oa and out; plain PyTorch moves 8 more.
    """
    way = torch.ops.strawberry.grow_backward if growable(raw, oa) else grow_backward_plain
    d_raw, d_scale, dz, h = way(grad, scale, oa, out, z, viewed)
    if viewed:
        d_out = at_least_float(between(grad, h, viewed)).sum(dim=(0, 1)).to(out.dtype)
    else:  # all chunks' rows lie one after another
        d_out = grad.flatten(0, 2).mT @ h.flatten(0, 2)
    return d_raw, d_scale, between(raw, dz, viewed), d_out


def grow_backward_plain(
    grad: Tensor, scale: Tensor, oa: Tensor, out: Tensor, z: Tensor, viewed: bool
) -> tuple[Tensor, ...]:
    """Gradients of raw, scale and z, and h once more."""
    dh, wide = at_least_float(times(grad, out, viewed)), at_least_float(z)
    gate = torch.sigmoid(scale * wide)
    turn = wide * gate * (1 - gate)
    dz = (dh * (gate + scale * turn)).to(z.dtype)
    d_scale = (dh * turn * wide).sum(dim=(-2, -1), keepdim=True)
    return grad + times(dz, oa.mT, viewed), d_scale, dz, (wide * gate).to(z.dtype)


def at_least_float(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALVES else x


def times(a: Tensor, b: Tensor, viewed: bool) -> Tensor:
    """a b; of those that are kept transposed, aᵀ b, transposed."""
    if viewed:  # not left to broadcasting, which would transpose and copy the larger one
        return b.mT.expand(*(a.shape[:-2] if a.dim() == 4 else b.shape[:-2]), -1, -1) @ a
    return a @ b


def between(a: Tensor, b: Tensor, viewed: bool) -> Tensor:
    """aᵀ b, of those that are kept transposed too."""
    a = a.expand(*b.shape[:-2], -1, -1)
    return a @ b.mT if viewed else a.mT @ b


@jit
def grow_product(
    a, square, tile, M, N, C, s_row, s_col,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of `times(a, square)` in float32, a (M, N) and square (C, C) with these strides; where it lies, and which
    of it is there."""
    across = tl.cdiv(N, COLS)
    i = tile // across * ROWS + tl.arange(0, ROWS)[:, None]
    c = tile % across * COLS + tl.arange(0, COLS)[None, :]
    down, along = tl.arange(0, STEP)[:, None], tl.arange(0, STEP)[None, :]
    if VIEWED:
        left, left_step = square + i * s_col + along * s_row, STEP * s_row
        right, right_step = a + down * N + c, STEP * N
    else:
        left, left_step = a + i * C + along, STEP
        right, right_step = square + down * s_row + c * s_col, STEP * s_row
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, C, STEP):
        if EVEN:
            x, y = tl.load(left), tl.load(right)
        else:
            x = tl.load(left, mask=(i < M) & (along < C - k), other=0.0)
            y = tl.load(right, mask=(down < C - k) & (c < N), other=0.0)
        total = tl.dot(x.to(DOT), y.to(DOT), total)
        left += left_step
        right += right_step
    return total, i * N + c, (i < M) & (c < N)


@jit
def grow_gate(
    raw, oa, scale, z, h, M, N, C, apart,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """z and h, a tile of a matrix in a program."""
    tile, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    product, at, here = grow_product(
        raw + each * apart, oa + each * C * C, tile, M, N, C, C, 1, VIEWED, EVEN, DOT, ROWS, COLS, STEP)
    at += each * M * N
    product = product.to(z.dtype.element_ty)
    tl.store(z + at, product, mask=here)
    product = product.to(tl.float32)
    gate = inverse(1.0 + exp(-product * tl.load(scale + each)))
    tl.store(h + at, (product * gate).to(h.dtype.element_ty), mask=here)


@jit
def grow_add(
    raw, out, h, new, moments, M, N, C, apart,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """raw + h outᵀ, a tile of a matrix in a program, and the sums of its numbers and of their squares."""
    tile, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    product, at, here = grow_product(
        h + each * M * N, out, tile, M, N, C, 1, C, VIEWED, EVEN, DOT, ROWS, COLS, STEP)
    x = (product + tl.load(raw + each * apart + at, mask=here, other=0.0)).to(new.dtype.element_ty)
    tl.store(new + each * M * N + at, x, mask=here)
    x = tl.where(here, x.to(tl.float32), 0.0)
    mine = moments + (each * tl.num_programs(0) + tile) * 2
    tl.store(mine, tl.sum(x))
    tl.store(mine + 1, tl.sum(x * x))


@jit
def grow_turn(
    grad, out, scale, z, h, dz, turned, M, N, C,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """From dh = grad out: h once more, dz, and a share of the gradient of scale."""
    tile, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dh, at, here = grow_product(
        grad + each * M * N, out, tile, M, N, C, C, 1, VIEWED, EVEN, DOT, ROWS, COLS, STEP)
    s, at = tl.load(scale + each), each * M * N + at
    x = tl.load(z + at, mask=here, other=0.0).to(tl.float32)
    gate = inverse(1.0 + exp(-x * s))
    turn = x * gate * (1.0 - gate)
    tl.store(h + at, (x * gate).to(h.dtype.element_ty), mask=here)
    tl.store(dz + at, (dh * (gate + s * turn)).to(dz.dtype.element_ty), mask=here)
    tl.store(turned + each * tl.num_programs(0) + tile, tl.sum(dh * turn * x))


@jit
def grow_back(
    grad, oa, dz, d_raw, M, N, C,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """grad + dz oaᵀ, a tile of a matrix in a program."""
    tile, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    product, at, here = grow_product(
        dz + each * M * N, oa + each * C * C, tile, M, N, C, 1, C, VIEWED, EVEN, DOT, ROWS, COLS, STEP)
    at += each * M * N
    x = product + tl.load(grad + at, mask=here, other=0.0)
    tl.store(d_raw + at, x.to(d_raw.dtype.element_ty), mask=here)


def grow_shape(raw: Tensor, C: int, viewed: bool) -> tuple[int, dict]:
    """Tiles of a matrix, and the constants of a launch."""
    M, N = raw.shape[-2:]
    rows, cols, step = GROW_TILE.values()
    even = M % rows == 0 and N % cols == 0 and C % step == 0
    return -(-M // rows) * -(-N // cols), {"VIEWED": viewed, "EVEN": even, "DOT": dot_type(raw)} | GROW_TILE


@torch.library.custom_op("strawberry::grow", mutates_args=())
def grow_op(raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, viewed: bool) -> tuple[Tensor, Tensor, Tensor]:
    (B, n, C, _), (M, N) = oa.shape, raw.shape[-2:]
    raw, oa, out, scale = (x.contiguous() for x in (raw, oa, out, scale))
    tiles, shape = grow_shape(raw, C, viewed)
    new, z, h = (torch.empty(B, n, M, N, dtype=raw.dtype, device=raw.device) for _ in range(3))
    moments = torch.empty(B, n, tiles, 2, dtype=torch.float32, device=raw.device)
    sizes = (M, N, C, 0 if raw.dim() == 2 else M * N)
    grow_gate[(tiles, B * n)](raw, oa, scale, z, h, *sizes, **shape, **GROW_LAUNCH)
    grow_add[(tiles, B * n)](raw, out, h, new, moments, *sizes, **shape, **GROW_LAUNCH)
    return new, z, moments


@grow_op.register_fake
def _(raw, scale, oa, out, viewed):
    (B, n, C, _), (M, N) = oa.shape, raw.shape[-2:]
    moments = raw.new_empty(B, n, grow_shape(raw, C, viewed)[0], 2, dtype=torch.float32)
    return raw.new_empty(B, n, M, N), raw.new_empty(B, n, M, N), moments


@torch.library.custom_op("strawberry::grow_backward", mutates_args=())
def grow_backward_op(
    grad: Tensor, scale: Tensor, oa: Tensor, out: Tensor, z: Tensor, viewed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, n, M, N), C = grad.shape, oa.size(-1)
    grad, oa, out, z, scale = (x.contiguous() for x in (grad, oa, out, z, scale))
    tiles, shape = grow_shape(grad, C, viewed)
    h, dz, d_raw = (torch.empty(B, n, M, N, dtype=z.dtype, device=z.device) for _ in range(3))
    turned = torch.empty(B, n, tiles, dtype=torch.float32, device=z.device)
    grow_turn[(tiles, B * n)](grad, out, scale, z, h, dz, turned, M, N, C, **shape, **GROW_LAUNCH)
    grow_back[(tiles, B * n)](grad, oa, dz, d_raw, M, N, C, **shape, **GROW_LAUNCH)
    return d_raw, turned.sum(-1)[..., None, None], dz, h


@grow_backward_op.register_fake
def _(grad, scale, oa, out, z, viewed):
    like = [z.new_empty(z.shape) for _ in range(3)]
    return like[0], scale.new_empty(scale.shape), *like[1:]


# ---- queries and keys, normed and turned -----------------------------------------------------------------------------

TURN_TILE = 2048  # numbers of a program: for each thread 16 bytes of either half of a row in the half types
TURN_EPS = 1e-6  # of the RMS norm


def turn(qkv: Tensor, widths: tuple[int, ...], cos: Tensor, sin: Tensor, normed: bool) -> tuple[Tensor, ...]:
    """Queries and keys as attention reads them: the pairs of each head turned by rotary positions, and the head, if
    `normed`, divided by its root mean square.

    qkv (B, T, Dq + 2·Dk), what a joint projection makes, and widths (Dq, Dk, Dk); cos and sin (B or 1, T, 1, d/2), for
    heads of d. Returns q and k, (B, T, Dq) and (B, T, Dk) in qkv's dtype, and v, a view of qkv. Differentiable in qkv.
    Only where `turnable`.

    One pass each way. The gradient of qkv is written where it belongs, once, where plain PyTorch makes those of q, k
    and v and then joins them; what the norm was is computed again from qkv, which attention keeps for v's sake.

    Bytes moved in half types, D = Dq = Dk: forward 8 for each of B·T·D, backward 12, and 4 more if normed.
    """
    return Turn.apply(qkv, widths, cos, sin, normed)


def turnable(qkv: Tensor, widths: tuple[int, ...], cos: Tensor) -> bool:
    """Whether the kernels take it: in training, q, k and v of one product, the whole of each head turned."""
    d = 2 * cos.size(-1)
    fits = 16 <= d <= 256 and d & (d - 1) == 0 and len(widths) == 3 and widths[1] == widths[2]
    taken = fits and usable(qkv, cos) and qkv.dtype.is_floating_point and cos.size(1) == qkv.size(1)
    return taken and qkv.numel() > 0 and torch.is_grad_enabled() and qkv.requires_grad


class Turn(torch.autograd.Function):
    """`turn`. A function of its own, since what an operator of torch.library returns may not be a view, as v is."""

    @staticmethod
    def forward(ctx, qkv: Tensor, widths: tuple[int, ...], cos: Tensor, sin: Tensor, normed: bool) -> tuple:
        ctx.save_for_backward(qkv if normed else None, cos, sin)
        ctx.normed = normed
        q, k = torch.ops.strawberry.turn(qkv, cos, sin, widths[0], widths[1], normed)
        return q, k, qkv[..., widths[0] + widths[1] :]

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:
        qkv, cos, sin = ctx.saved_tensors
        return torch.ops.strawberry.turn_backward(dq, dk, dv, qkv, cos, sin), None, None, None, None


@jit
def turn_place(heads, tokens, HALF: tl.constexpr, ROWS: tl.constexpr):
    """The program's rows, each a head of a token: its token; where it lies among the token's; which are there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    return row // heads, row % heads * (2 * HALF) + tl.arange(0, HALF)[None, :], row < tokens * heads


@jit
def turn_load(x, at, here, HALF: tl.constexpr):
    """Both halves of rows."""
    first = tl.load(x + at, mask=here, other=0.0)
    return first.to(tl.float32), tl.load(x + at + HALF, mask=here, other=0.0).to(tl.float32)


@jit
def turn_store(x, at, here, first, second, HALF: tl.constexpr):
    tl.store(x + at, first.to(x.dtype.element_ty), mask=here)
    tl.store(x + at + HALF, second.to(x.dtype.element_ty), mask=here)


@jit
def turn_angle(cos, sin, token, places, here, HALF: tl.constexpr):
    """Cosines and sines of the rows' tokens; `places` of them are in the tables, T or B · T."""
    at = token % places * HALF + tl.arange(0, HALF)[None, :]
    c, s = tl.load(cos + at, mask=here, other=0.0), tl.load(sin + at, mask=here, other=0.0)
    return c.to(tl.float32), s.to(tl.float32)


@jit
def turn_root(first, second, HALF: tl.constexpr, EPS: tl.constexpr):
    """One over the root mean square of each row; turned or not, it is the same."""
    return tl.rsqrt(tl.sum(first * first + second * second, axis=1)[:, None] * (0.5 / HALF) + EPS)


@jit
def turn_part(
    qkv, cos, sin, y, heads, tokens, places, width,
    NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token, column, here = turn_place(heads, tokens, HALF, ROWS)
    a, b = turn_load(qkv, token.to(tl.int64) * width + column, here, HALF)
    c, s = turn_angle(cos, sin, token, places, here, HALF)
    if NORMED:
        root = turn_root(a, b, HALF, EPS)
        a, b = a * root, b * root
    at = token.to(tl.int64) * (heads * 2 * HALF) + column
    turn_store(y, at, here, a * c + b * s, b * c - a * s, HALF)


@jit
def turn_forward(
    qkv, cos, sin, q, k, heads, kv_heads, tokens, places, width,
    NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of q, or of k: some heads of some tokens, which lie one after another."""
    if tl.program_id(1) == 0:
        turn_part(qkv, cos, sin, q, heads, tokens, places, width, NORMED, EPS, HALF, ROWS)
    else:
        k_part = qkv + heads * (2 * HALF)
        turn_part(k_part, cos, sin, k, kv_heads, tokens, places, width, NORMED, EPS, HALF, ROWS)


@jit
def turn_gradient(
    grad, its, qkv, at, cos, sin, token, places, here,
    TURNED: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of rows of the gradient of qkv, at `at` in it, from that of what was made of them, at `its`."""
    a, b = turn_load(grad, its, here, HALF)
    if TURNED:
        c, s = turn_angle(cos, sin, token, places, here, HALF)
        a, b = a * c - b * s, b * c + a * s
        if NORMED:
            x, y = turn_load(qkv, at, here, HALF)
            root = turn_root(x, y, HALF, EPS)
            share = tl.sum(a * x + b * y, axis=1)[:, None] * root * root * (0.5 / HALF)
            a, b = root * (a - x * share), root * (b - y * share)
    return a, b


@jit
def turn_part_back(
    grad, s_row, s_token, qkv, cos, sin, d_qkv, heads, tokens, T, places, width,
    TURNED: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token, column, here = turn_place(heads, tokens, HALF, ROWS)
    at = token.to(tl.int64) * width + column
    its = (token // T).to(tl.int64) * s_row + (token % T).to(tl.int64) * s_token + column
    a, b = turn_gradient(grad, its, qkv, at, cos, sin, token, places, here, TURNED, NORMED, EPS, HALF)
    turn_store(d_qkv, at, here, a, b, HALF)


@jit
def turn_back(
    dq, dk, dv, qkv, cos, sin, d_qkv, heads, kv_heads, tokens, T, places, width,
    sq_row, sk_row, sv_row, sq_token, sk_token, sv_token,
    NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of rows of q, of k, or of v, whose own is copied."""
    part = tl.program_id(1)
    k = heads * (2 * HALF)
    if part == 0:
        turn_part_back(
            dq, sq_row, sq_token, qkv, cos, sin, d_qkv, heads, tokens, T, places, width,
            True, NORMED, EPS, HALF, ROWS)  # fmt: skip
    elif part == 1:
        turn_part_back(
            dk, sk_row, sk_token, qkv + k, cos, sin, d_qkv + k, kv_heads, tokens, T, places, width,
            True, NORMED, EPS, HALF, ROWS)  # fmt: skip
    else:
        turn_part_back(
            dv, sv_row, sv_token, qkv, cos, sin, d_qkv + k + kv_heads * (2 * HALF), kv_heads, tokens, T, places, width,
            False, NORMED, EPS, HALF, ROWS)  # fmt: skip


@jit
def turn_bytes_kernel(
    dq, dk, dv, qkv, cos, sin, y, flipped, scale, most, heads, kv_heads, tokens, T, places, width,
    sq_row, sk_row, sv_row, sq_token, sk_token, sv_token,
    NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """One head of q, of k, or of v of some tokens: what `turn_back` writes, in 8 bits."""
    head, k = tl.program_id(1), heads * (2 * HALF)
    token = (tl.program_id(0) * TALL + tl.arange(0, TALL))[:, None]
    column = head * (2 * HALF) + tl.arange(0, HALF)[None, :]
    here, row, t = token < tokens, (token // T).to(tl.int64), (token % T).to(tl.int64)
    at = token.to(tl.int64) * width + column
    if head < heads:
        its = row * sq_row + t * sq_token + column
        a, b = turn_gradient(dq, its, qkv, at, cos, sin, token, places, here, True, NORMED, EPS, HALF)
    elif head < heads + kv_heads:
        its = row * sk_row + t * sk_token + column - k
        a, b = turn_gradient(dk, its, qkv, at, cos, sin, token, places, here, True, NORMED, EPS, HALF)
    else:
        its = row * sv_row + t * sv_token + column - k - kv_heads * (2 * HALF)
        a, b = turn_gradient(dv, its, qkv, at, cos, sin, token, places, here, False, NORMED, EPS, HALF)
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    c = head.to(tl.int64) * (2 * HALF) + tl.arange(0, HALF)
    there = (r < tokens)[:, None] & (c < width)[None, :]
    store_both(y, flipped, a * scale, r, c, tokens, width, there, most)
    store_both(y, flipped, b * scale, r, HALF + c, tokens, width, there, most)


def turn_launch(tokens: int, heads: int, cos: Tensor, parts: int, normed: bool) -> tuple[tuple[int, int], dict]:
    """Programs over rows and parts; constants."""
    half = cos.size(-1)
    rows = TURN_TILE // (2 * half)
    shape = {"NORMED": normed, "EPS": TURN_EPS, "HALF": half, "ROWS": rows, "num_warps": 4}
    return (-(-tokens * heads // rows), parts), shape


@torch.library.custom_op("strawberry::turn", mutates_args=())
def turn_op(qkv: Tensor, cos: Tensor, sin: Tensor, n_q: int, n_k: int, normed: bool) -> tuple[Tensor, Tensor]:
    qkv, cos, sin = (x.contiguous() for x in (qkv, cos, sin))
    (B, T, width), d = qkv.shape, 2 * cos.size(-1)
    q, k = (torch.empty(B, T, n, dtype=qkv.dtype, device=qkv.device) for n in (n_q, n_k))
    grid, shape = turn_launch(B * T, max(n_q, n_k) // d, cos, 2, normed)
    turn_forward[grid](qkv, cos, sin, q, k, n_q // d, n_k // d, B * T, cos.size(0) * T, width, **shape)
    return q, k


@turn_op.register_fake
def _(qkv, cos, sin, n_q, n_k, normed):
    return tuple(qkv.new_empty(*qkv.shape[:2], n) for n in (n_q, n_k))


@torch.library.custom_op("strawberry::turn_backward", mutates_args=())
def turn_backward_op(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient of qkv, (B, T, Dq + 2·Dk), from those of q, k and v; qkv where q and k were normed."""
    normed = qkv is not None
    grads = [x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv)]
    qkv, cos, sin = (x if x is None else x.contiguous() for x in (qkv, cos, sin))
    (B, T, n_q), n_k, d = dq.shape, dk.size(-1), 2 * cos.size(-1)
    d_qkv = torch.empty(B, T, n_q + 2 * n_k, dtype=dq.dtype, device=dq.device)
    grid, shape = turn_launch(B * T, max(n_q, n_k) // d, cos, 3, normed)
    sizes = (n_q // d, n_k // d, B * T, T, cos.size(0) * T, d_qkv.size(-1))
    strides = [x.stride(axis) for axis in (0, 1) for x in grads]
    turn_back[grid](*grads, qkv if normed else d_qkv, cos, sin, d_qkv, *sizes, *strides, **shape)
    return d_qkv


@turn_backward_op.register_fake
def _(dq, dk, dv, qkv, cos, sin):
    return dq.new_empty(*dq.shape[:2], dq.size(-1) + 2 * dk.size(-1))


def turn_bytes(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor, scale: float,
               dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `turn_backward` gives, (B · T, Dq + 2·Dk), times `scale` in 8 bits, and the same transposed."""
    found = torch.ops.strawberry.turn_bytes(dq, dk, dv, qkv, cos, sin, scale, dtype)
    return tuple(y.view(dtype) for y in found)


@torch.library.custom_op("strawberry::turn_bytes", mutates_args=())
def turn_bytes_op(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grads = [x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv)]
    read, cos, sin = dq if qkv is None else qkv.contiguous(), cos.contiguous(), sin.contiguous()
    (B, T, n_q), n_k, d = dq.shape, dk.size(-1), 2 * cos.size(-1)
    width = n_q + 2 * n_k
    y, flipped = dq.new_empty(B * T, width, dtype=dtype), dq.new_empty(width, B * T, dtype=dtype)
    sizes = (n_q // d, n_k // d, B * T, T, cos.size(0) * T, width)
    strides = [x.stride(axis) for axis in (0, 1) for x in grads]
    shape = {"NORMED": qkv is not None, "EPS": TURN_EPS, "HALF": d // 2, "TALL": 128, "num_warps": 8}
    turn_bytes_kernel[(-(-B * T // 128), width // d)](
        *grads, read, cos, sin, y, flipped, scale, torch.finfo(dtype).max, *sizes, *strides, **shape)  # fmt: skip
    return y.view(torch.uint8), flipped.view(torch.uint8)


@turn_bytes_op.register_fake
def _(dq, dk, dv, qkv, cos, sin, scale, dtype):
    tokens, width = dq.size(0) * dq.size(1), dq.size(-1) + 2 * dk.size(-1)
    return dq.new_empty(tokens, width, dtype=torch.uint8), dq.new_empty(width, tokens, dtype=torch.uint8)


# ---- checks and times on a GPU ---------------------------------------------------------------------------------------


def timed(call, sets: list[tuple]) -> float:
    """Seconds of one call(*set), the median of seven replays of a CUDA graph that takes every set in turn: more sets
    than the cache holds, so that each reads its inputs from memory."""
    call(*sets[0])  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in sets:
            call(*one)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(sets))
    return sorted(times[3:])[3]


def copy_bandwidth() -> float:
    """Bytes read and written each second by a large copy on the device."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / timed(lambda a, b: b.copy_(a), [(x, y)] * 3)


def error_of(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def line(name: str, error: float, bound: float, seconds: float, floor: float) -> bool:
    """Prints a row of the table; whether the error is within its bound."""
    right = error < bound
    print(
        f"{name:46} {error:8.1e} {seconds * 1e6:9.1f} {floor * 1e6:9.1f} {floor / seconds:6.0%}",
        "" if right else "WRONG",
    )
    return right


def enough(nbytes: float) -> int:
    """How many sets of inputs are more than the cache holds."""
    return max(2, min(64, int(3e8 / nbytes) + 1))


def measure_decode(bandwidth: float) -> bool:
    right = True
    for B, H, Hkv, d, context, size in [
        (1, 12, 12, 64, 128, 256), (1, 12, 12, 64, 1000, 1024), (1, 12, 12, 64, 1000, 32768),
        (1, 12, 12, 64, 8192, 32768), (1, 12, 12, 64, 32768, 32768), (64, 12, 12, 64, 1024, 1024),
        (64, 12, 4, 64, 1024, 1024), (8, 32, 8, 128, 8192, 8192), (1, 12, 6, 64, 8192, 8192), (4, 8, 1, 80, 4096, 4096),
    ]:  # fmt: skip
        nbytes = 4 * B * context * Hkv * d
        pos = torch.full((B,), context - 1, device="cuda")
        rest = pos, size, d**-0.5
        sets = [(random(B, H, d), *(random(B, size + 1, Hkv * d) for _ in "kv"), *rest) for _ in range(enough(nbytes))]
        error = error_of(decode_attention(*sets[0]), decode_plain(*(x.double() for x in sets[0][:3]), *rest))
        seconds = timed(decode_attention, sets)
        name = f"decode B {B} heads {H}/{Hkv} of {d}, {context} of {size}"
        right &= line(name, error, 6e-3, seconds, nbytes / bandwidth)
    return right


def measure_int8(bandwidth: float) -> bool:
    right = True
    for M, N, K in [
        (1, 2304, 768), (1, 768, 3072), (1, 50304, 768), (1, 4096, 4096), (4, 2304, 768), (8, 2304, 768),
        (64, 2304, 768), (64, 50304, 768),
    ]:  # fmt: skip
        sets = [(random(M, K), *quantize_int8(random(N, K))) for _ in range(enough(N * K))]
        x, w, scale = sets[0]
        error = error_of(int8_linear(x, w, scale), x.double() @ (w.double() * scale.double().unsqueeze(1)).T)
        right &= line(f"int8_linear {M} x {K} to {N}", error, 6e-3, timed(int8_linear, sets), N * K / bandwidth)
    return right


def measure_head(bandwidth: float) -> bool:
    """Gradients by the logits of some tokens, in their type and in 8 bits; floor: logits read and gradients written."""
    right = True
    for N, V in ((8192, 50304), (32768, 8192)):
        sets = [(2 * random(N, V), torch.randint(0, V, (N,), device="cuda"), V, None) for _ in range(2)]
        exact = sets[0][0][:64].double().softmax(dim=-1)
        exact[torch.arange(64), sets[0][1][:64]] -= 1
        for scale, dtype, bound in ((1.0, torch.bfloat16, 1e-2), (2.0**15, torch.float8_e5m2, 8e-2)):
            calls = [(*one, scale, dtype) for one in sets]
            got = torch.ops.strawberry.head_slopes(*calls[0])[1][:64].double() / scale
            seconds = timed(torch.ops.strawberry.head_slopes, calls)
            name = f"head {N} x {V}, {str(dtype).removeprefix('torch.')}"
            right &= line(name, error_of(got, exact), bound, seconds, N * V * (2 + dtype.itemsize) / bandwidth)
    return right


def measure_bytes(bandwidth: float) -> bool:
    """What is between products in 8 bits; floor: each number read and written once."""
    n, m, right, ops = 32768, 3072, True, torch.ops.strawberry
    sets = [(random(n, m).to(torch.float8_e4m3fn).view(torch.uint8),) for _ in range(2)]
    error = error_of(ops.transposed(*sets[0]), sets[0][0].t().double())
    right &= line(f"transposed {n} x {m}", error, 1e-9, timed(ops.transposed, sets), 2 * n * m / bandwidth)
    thirds = [(*(random(n, m // 3) for _ in range(3)), 4.0, torch.float8_e5m2) for _ in range(2)]
    got, transposed_too = ops.joined(*thirds[0])
    error = error_of(got.view(torch.float8_e5m2).double() / 4, torch.cat(thirds[0][:3], dim=1).double())
    right &= line(f"joined {n} x {m}", error, 8e-2, timed(ops.joined, thirds), 4 * n * m / bandwidth)
    right &= torch.equal(got.t(), transposed_too)
    for kind in ("gelu", "swiglu"):
        parts, dtypes = 2 if kind == "swiglu" else 1, (torch.float8_e4m3fn, torch.float8_e5m2)
        sets = [(random(n, parts * m), random(n, m)) for _ in range(2)]
        h, grad = (x[:256].double() for x in sets[0])
        exact = BENT[kind][1](h), BENT[kind][2](h, grad)
        calls = [(h, kind, 4.0, dtypes[0]) for h, _ in sets], [(h, g, None, kind, 4.0, dtypes[1]) for h, g in sets]
        least = (2 * parts + 2) * n * m / bandwidth, (4 * parts + 2) * n * m / bandwidth
        for i, (name, op) in enumerate(((f"bent {kind} {n} x {m}", ops.bent), ("  backward", ops.bent_back))):
            got, transposed_too = op(*calls[i][0])
            error = error_of(got.view(dtypes[i])[:256].double() / 4, exact[i])
            right &= line(name, error, 8e-2, timed(op, calls[i]), least[i]) and torch.equal(got.t(), transposed_too)
    return right


def measure_grow(bandwidth: float) -> bool:
    """Each way's four products with (C, C), two and two; floor: the larger of bytes and operations, these at the speed
    of a large product. Plain: the same in PyTorch, compiled."""
    a, right = random(8192, 8192), True
    ceiling = 2 * 8192**3 / timed(torch.mm, [(a, a)] * 2)
    for n, M, N, C, viewed in [
        (32, 2304, 768, 768, False), (32, 768, 1536, 768, True), (24, 768, 256, 256, False), (24, 256, 512, 256, True),
    ]:  # fmt: skip
        sets = []
        for _ in range(enough(8 * n * M * N)):
            raw, grad, oa, out = random(n, 1, M, N), random(n, 1, M, N), random(n, 1, C, C), random(C, C)
            sets.append((raw, torch.ones(n, 1, 1, 1, device="cuda"), oa * C**-0.5, out * C**-0.5, viewed, grad))
        forward = [one[:5] for one in sets]
        z = [torch.ops.strawberry.grow(*one)[1] for one in forward]
        backward = [(one[5], *one[1:4], its, viewed) for one, its in zip(sets, z)]
        floor = 4 * n * M * N * C / ceiling
        for name, op, plain, calls, passes, checked in [
            (f"grow {n} x {M} x {N}, C {C}", torch.ops.strawberry.grow, grow_plain, forward, 12, (0, 1)),
            ("  backward", torch.ops.strawberry.grow_backward, grow_backward_plain, backward, 14, (0, 2, 3)),
        ]:
            double = [x[:1].double() if x.dim() == 4 else x.double() for x in calls[0][:-1]]
            exact, least = plain(*double, viewed), max(floor, passes * n * M * N / bandwidth)
            for label, way in ((name, op), ("    plain, compiled", torch.compile(plain, dynamic=False))):
                got = way(*calls[0])
                error = max(error_of(got[i][:1], exact[i]) for i in checked)
                right &= line(label, error, 1e-2, timed(way, calls), least)
    return right


def turn_plain(qkv: Tensor, cos: Tensor, sin: Tensor, n_q: int, n_k: int, normed: bool) -> tuple[Tensor, Tensor]:
    """`turn`'s q and k in plain PyTorch."""
    made = []
    for x in qkv.split((n_q, n_k, n_k), dim=-1)[:2]:
        a, b = at_least_float(x).unflatten(-1, (-1, 2 * cos.size(-1))).chunk(2, dim=-1)
        x = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
        made.append((F.rms_norm(x, x.shape[-1:], eps=TURN_EPS) if normed else x).flatten(2).to(qkv.dtype))
    return tuple(made)


def turn_backward_plain(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, *tables_normed) -> Tensor:
    """The gradient of qkv."""
    *tables, normed = tables_normed
    n_q, n_k = dq.size(-1), dk.size(-1)
    _, back = torch.func.vjp(lambda x: (*turn_plain(x, *tables, n_q, n_k, normed), x[..., n_q + n_k :]), qkv)
    return back((dq, dk, dv))[0]


def measure_turn(bandwidth: float) -> bool:
    """q and k of a training step, with and without the norm; heads that share keys; heads of 128. Plain: the same in
    PyTorch, compiled."""
    right = True
    for B, T, H, Hkv, d, normed in [
        (32, 1024, 12, 12, 64, True), (32, 1024, 12, 12, 64, False), (8, 4096, 32, 8, 128, True),
    ]:  # fmt: skip
        n_q, n_k = H * d, Hkv * d
        angle = torch.arange(T)[None, :, None, None] * 1e4 ** -torch.linspace(0, 1, d // 2)
        tables = (angle.cos().cuda(), angle.sin().cuda())
        sets = range(enough(4 * B * T * (n_q + n_k)))
        forward = [(random(B, T, n_q + 2 * n_k), *tables, n_q, n_k, normed) for _ in sets]
        slopes = [[random(B, T, n) for n in (n_q, n_k, n_k)] for _ in sets]
        backward = [(*its, one[0], *tables) for its, one in zip(slopes, forward)]
        double = [x[:1].double() for x in (*slopes[0], forward[0][0])], [x.double() for x in tables]
        exact = turn_plain(double[0][-1], *double[1], n_q, n_k, normed), (
            turn_backward_plain(*double[0], *double[1], normed),
        )

        def op_back(dq, dk, dv, qkv, cos, sin, normed=normed):
            return torch.ops.strawberry.turn_backward(dq, dk, dv, qkv if normed else None, cos, sin)

        def plain_back(*args, normed=normed):
            return turn_backward_plain(*args, normed)

        there, back = 4 * B * T * (n_q + n_k), 4 * B * T * (n_q + 2 * n_k) + 2 * B * T * (n_q + n_k) * normed
        for name, op, plain, calls, its, nbytes in [
            (f"turn {B} x {T} x {H}/{Hkv} of {d}{', normed' * normed}", torch.ops.strawberry.turn, turn_plain,
             forward, exact[0], there),
            ("  backward", op_back, plain_back, backward, exact[1], back),
        ]:  # fmt: skip
            for label, way in ((name, op), ("    plain, compiled", torch.compile(plain, dynamic=False))):
                got = way(*calls[0])
                got = (got,) if isinstance(got, Tensor) else got
                error = max(error_of(x[:1], y) for x, y in zip(got, its, strict=True))
                right &= line(label, error, 6e-3, timed(way, calls), nbytes / bandwidth)
        eight = [(*its, one[0] if normed else None, *tables, 4.0, torch.float8_e5m2)
                 for its, one in zip(slopes, forward)]  # fmt: skip
        got, flipped = turn_bytes(*eight[0])
        error = error_of(got[:T].double() / 4, exact[1][0].flatten(0, 1))
        right &= line("  backward in 8 bits", error, 8e-2, timed(turn_bytes, eight), back / bandwidth)
        right &= torch.equal(got.view(torch.uint8).t(), flipped.view(torch.uint8))
    return right


def aft_exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """AFT simple in float64, which carries e^±80."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.sigmoid(q) * (k.exp() * v).cumsum(1) / k.exp().cumsum(1)


def measure_aft(bandwidth: float) -> bool:
    """Forward with what the way back needs, then backward; each error the largest of result and gradients."""
    right = True
    for B, T, D, spread in [(32, 1024, 768, 1), (8, 4096, 768, 1), (1, 65536, 768, 80), (4, 256, 256, 1)]:
        sets = [[random(B, T, D) for _ in range(4)] for _ in range(enough(8 * B * T * D))]
        for one in sets:
            one[1] = one[1].sign() * spread if spread > 1 else one[1]  # keys of ±80
        forward = [(*one[:3], True) for one in sets]
        states = [torch.ops.strawberry.aft_simple(*args)[1] for args in forward]
        backward = [(one[3], *one[:3], its) for one, its in zip(sets, states)]
        exact = [x[:1, :, :64].double().requires_grad_() for x in sets[0][:3]]
        y = aft_exact(*exact)
        y.backward(sets[0][3][:1, :, :64].double())
        error = error_of(torch.ops.strawberry.aft_simple(*forward[0])[0][:1, :, :64], y.detach())
        floor = 8 * B * T * D / bandwidth
        seconds = timed(torch.ops.strawberry.aft_simple, forward)
        right &= line(f"aft_simple {B} x {T} x {D}", error, 6e-3, seconds, floor)
        got = torch.ops.strawberry.aft_simple_backward(*backward[0])
        error = max(error_of(g[:1, :, :64], x.grad) for g, x in zip(got, exact))
        seconds = timed(torch.ops.strawberry.aft_simple_backward, backward)
        right &= line("  backward", error, 1e-2, seconds, floor * 14 / 8)
    return right


def measure_positions(bandwidth: float) -> bool:
    """Forward and backward of a module's call, result and gradients of one group of channels against float64."""
    right = True
    product = (random(8192, 8192), random(8192, 8192))
    arithmetic = 2 * 8192**3 / timed(torch.matmul, [product] * 3)
    for kind, window in [("conv", 256), ("conv", 1024), ("local", 256)]:
        B, T, D, G = 32, 1024, 768, 12
        qkv = [random(B, T, D).requires_grad_() for _ in range(3)]
        p = [torch.randn(*shape, device="cuda").mul(0.1).requires_grad_()
             for shape in ([(G, window)] if kind == "conv" else [(T, 128)] * 2)]  # fmt: skip
        slope = random(B, T, D)

        def forward(*args, kind=kind, window=window):
            return aft_conv(*args) if kind == "conv" else aft_local(*args, window)

        def both(*args, forward=forward, slope=slope):
            return torch.autograd.grad(forward(*args), args, slope)

        small = [x.detach()[:2, :, :64].requires_grad_() for x in qkv] + [
            x.detach()[:1] if kind == "conv" else x for x in p
        ]
        small = [x.detach().requires_grad_() for x in small]
        exact = [x.detach().double().requires_grad_() for x in small]
        y = aft_positional_exact(*exact, window)
        expected = [y, *torch.autograd.grad(y, exact, slope[:2, :, :64].double())]
        got = forward(*small)
        got = [got, *torch.autograd.grad(got, small, slope[:2, :, :64])]
        error = max(error_of(g, e) for g, e in zip(got, expected))
        operations = 4 * B * T * D * (min(window, T // 2) + AFT_BLOCK)
        floor = max(8 * B * T * D / bandwidth, operations / arithmetic)
        seconds = timed(forward, [(*qkv, *p)] * 2)
        right &= line(f"aft_{kind} {B} x {T} x {D}, window {window}", error, 2e-2, seconds, floor)
        floor = max(22 * B * T * D / bandwidth, 3 * operations / arithmetic)
        right &= line("  forward and backward", error, 2e-2, timed(both, [(*qkv, *p)] * 2), floor)
    return right


def aft_positional_exact(q: Tensor, k: Tensor, v: Tensor, *p_window) -> Tensor:
    """AFT by all pairs, for one group of channels, in what types the tensors have."""
    *p, window = p_window
    i = torch.arange(v.size(1), device=v.device)
    away = i[:, None] - i
    p = p[0][0, away.clamp(0, window - 1)] if len(p) == 1 else p[0] @ p[1].T
    weight = torch.where(away < window, p, 0.0).exp() * (away >= 0)
    return torch.sigmoid(q) * (weight @ (k.exp() * v)) / (weight @ k.exp())


def main() -> None:
    if triton is None or not torch.cuda.is_available():
        raise SystemExit("python kernels.py times the kernels on a GPU; there is no GPU with Triton here")
    bandwidth = copy_bandwidth()
    name, versions = torch.cuda.get_device_name(), f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{name}, {versions}: copies at {bandwidth / 1e12:.2f} TB/s")
    print(f"{'bfloat16':46} {'error':>8} {'µs':>9} {'floor µs':>9} {'floor':>6}")
    measures = (measure_decode, measure_int8, measure_aft, measure_positions, measure_head, measure_bytes, measure_grow,
                measure_turn)  # fmt: skip
    right = [measure(bandwidth) for measure in measures]
    if not all(right):
        raise SystemExit("a kernel is wrong: its error is above its bound")


if __name__ == "__main__":
    main()
