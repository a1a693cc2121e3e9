"""Decode attention: one new query per row over a ring buffer of keys and values (flash-decoding, arXiv 2311.01282)."""

import torch
from torch import Tensor

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.common import LOG2E, dot_dtype, jit, next_power_of_2, tl


def block_tokens(d: int) -> int:
    """Tokens that a program processes per iteration: 4096 numbers of k."""
    return max(16, min(128, 4096 // next_power_of_2(d)))


def num_splits(q: Tensor, k: Tensor, size: int) -> int:
    """The number of splits of the context: enough programs for every multiprocessor, at most 8192 numbers to merge per
    head, and one split, which needs no second kernel, for a short context."""
    d = q.size(-1)
    if size <= 8 * block_tokens(d):
        return 1
    wanted = 8 * kernels.multiprocessors(q) // (q.size(0) * (k.size(-1) // d))
    return max(1, min(wanted, -(-size // block_tokens(d)), 8192 // next_power_of_2(d)))


@jit
def split_size(pos, size, splits, BLOCK: tl.constexpr):
    """The number of slots to which a row attends, and the number of slots per split."""
    seen = tl.minimum(pos + 1, size).to(tl.int32)
    return seen, tl.cdiv(tl.cdiv(seen, splits), BLOCK) * BLOCK


@jit
def decode_mha_kernel(
    q, k, v, new_k, new_v, pos, out, parts, size, heads, splits, scale, q_row, q_head, k_row, k_slot, v_row, v_slot,
    new_k_row, new_v_row,
    NEW: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A head with its own keys. Each of BLOCK lanes computes its own online softmax over every BLOCK-th slot, and the
    lanes are merged at the end: in the loop only the dot product reduces across lanes. The keys and values of
    STAGES − 1 iterations are loaded to shared memory at once, so that a short context waits for one load only."""
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    seen, share = split_size(tl.load(pos + row), size, splits, BLOCK)
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
    top = tl.full((BLOCK,), -1e30, tl.float32)  # finite, so that lanes without a slot do not give NaN
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, PAD), tl.float32)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        slot = (start + lane).to(tl.int64)
        here = slot < last
        mask = here[:, None] & (c < D)[None, :]
        keys = tl.load(k + slot[:, None] * k_slot + c[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.load(v + slot[:, None] * v_slot + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEW:  # stored at the end, so that no load waits for it
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
    if NEW:
        is_newest = (c < D) & (first <= newest) & (newest < last)
        tl.store(k + newest * k_slot + c, fresh_k, mask=is_newest)
        tl.store(v + newest * v_slot + c, fresh_v, mask=is_newest)
    if SPLIT:
        part = parts + ((row * heads + head) * splits + split) * (D + 4)  # sums, highest, weight, and two for alignment
        tl.store(part + c, mixed_all, mask=(c < D) & (first < last))
        tl.store(part + D, highest, mask=first < last)
        tl.store(part + D + 1, weight, mask=first < last)
    else:
        mean = mixed_all / tl.where(weight > 0, weight, 1.0)
        tl.store(out + (row * heads + head) * D + c, mean.to(out.dtype.element_ty), mask=c < D)


@jit
def decode_gqa_kernel(
    q, k, v, new_k, new_v, pos, out, parts, size, heads, splits, scale, q_row, q_head, k_row, k_slot, v_row, v_slot,
    new_k_row, new_v_row,
    NEW: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """GROUP heads that share their keys, which are read once and multiplied on tensor cores (arXiv 2205.14135)."""
    shared, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    seen, share = split_size(tl.load(pos + row), size, splits, BLOCK)
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
    if NEW:
        is_newest = (c < D) & (first <= newest) & (newest < last)
        tl.store(k + newest * k_slot + c, fresh_k, mask=is_newest)
        tl.store(v + newest * v_slot + c, fresh_v, mask=is_newest)
    if SPLIT:
        part = parts + ((row * heads + head) * splits + split) * (D + 4)  # sums, highest, weight, and two for alignment
        tl.store(part[:, None] + c[None, :], mixed, mask=inside & (first < last))
        tl.store(part + D, top, mask=(g < GROUP) & (first < last))
        tl.store(part + D + 1, total, mask=(g < GROUP) & (first < last))
    else:
        mean = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + (row * heads + head)[:, None] * D + c[None, :], mean.to(out.dtype.element_ty), mask=inside)


@jit
def merge_splits_kernel(
    parts, pos, out, size, heads, splits,
    D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a head, whose sums are relative to their own highest scores (arXiv 2311.01282)."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seen, share = split_size(tl.load(pos + row), size, splits, BLOCK)
    s, c = tl.arange(0, SPLITS_PAD), tl.arange(0, PAD)
    nonempty = (s < splits) & (s * share < seen)
    part = parts + ((row * heads + head) * splits + s) * (D + 4)
    top = tl.load(part + D, mask=nonempty, other=-1e30)
    fade = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(fade * tl.load(part + D + 1, mask=nonempty, other=0.0), axis=0)
    mixed = tl.load(part[:, None] + c[None, :], mask=nonempty[:, None] & (c < D)[None, :], other=0.0)
    mean = tl.sum(fade[:, None] * mixed, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + (row * heads + head) * D + c, mean.to(out.dtype.element_ty), mask=c < D)


@torch.library.custom_op("strawberry::decode_attention", mutates_args=())
def decode_attention_op(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, size: int, scale: float, splits: int) -> Tensor:
    return launch_decode_attention(q, k, v, None, None, pos, size, scale, splits)


@decode_attention_op.register_fake
def _(q, k, v, pos, size, scale, splits):
    return q.new_empty(q.shape)


@torch.library.custom_op("strawberry::decode_attention_writing", mutates_args=("k", "v"))
def decode_attention_writing_op(
    q: Tensor, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, pos: Tensor, size: int, scale: float, splits: int
) -> Tensor:
    return launch_decode_attention(q, k, v, new_k, new_v, pos, size, scale, splits)


@decode_attention_writing_op.register_fake
def _(q, k, v, new_k, new_v, pos, size, scale, splits):
    return q.new_empty(q.shape)


def launch_decode_attention(q, k, v, new_k, new_v, pos, size: int, scale: float, splits: int) -> Tensor:
    B, H, D = q.shape
    shared = k.size(-1) // D
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    parts = torch.empty(B, H, splits, D + 4, dtype=torch.float32, device=q.device) if splits > 1 else out
    shape = {"D": D, "PAD": next_power_of_2(max(D, 16)), "BLOCK": block_tokens(D)}
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    fresh = new_k is not None
    new_k, new_v = (new_k, new_v) if fresh else (k, v)
    shape["NEW"] = fresh
    strides += (new_k.stride(0), new_v.stride(0))
    args = (q, k, v, new_k, new_v, pos, out, parts, size, H, splits, scale * LOG2E, *strides)
    if shared == H:
        stages = 4 if k.element_size() <= 2 else 3  # 48 or 64 KB of shared memory
        decode_mha_kernel[(H, splits, B)](*args, **shape, SPLIT=splits > 1, STAGES=stages, num_warps=4)
    else:
        group = {"GROUP": H // shared, "GROUP_PAD": next_power_of_2(max(H // shared, 16)), "DOT": dot_dtype(k, v)}
        decode_gqa_kernel[(shared, splits, B)](*args, **shape, SPLIT=splits > 1, **group, num_warps=4)
    if splits > 1:
        del shape["NEW"]
        merge_splits_kernel[(H, B)](
            parts, pos, out, size, H, splits, **shape, SPLITS_PAD=next_power_of_2(splits), num_warps=4
        )
    return out
