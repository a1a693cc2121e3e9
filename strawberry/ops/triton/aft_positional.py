"""Attention-free mixing with positions (arXiv 2105.14103): matrix products between blocks of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.aft import launch_aft_forward, state_shape, tile_rows
from strawberry.ops.triton.common import (
    INTERPRETED,
    dot_dtype,
    fast_exp,
    fast_reciprocal,
    jit,
    next_power_of_2,
    tl,
)

AFT_BLOCK = 64  # tokens in a block


AFT_LAUNCH = {  # channels of a program, warps and stages, chosen so that no registers spill
    "forward": {"BLOCK": 64, "num_warps": 8, "num_stages": 1},
    "backward": {"BLOCK": 64, "num_warps": 8, "num_stages": 1},
    "weights": {"BLOCK": 64, "num_warps": 8, "num_stages": 3},
}


def fused_aft_conv(q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> Tensor:
    """AFT with p_{t,s} = taps[g, t − s] for group g of G groups of channels, and 0 where t − s ≥ window; taps
    (G, window). Otherwise as `fused_aft_positional`."""
    with torch.autocast(v.device.type, enabled=False):
        apart, window = block_distances(v, taps.size(1)), taps.size(1)
        p = taps.float().index_select(1, apart.clamp(0, window - 1).flatten()).unflatten(1, apart.shape)  # (G, R, N, N)
        p = torch.where(apart < window, p, 0.0)
        return fused_aft_positional(q, k, v, p.movedim(0, 1).unsqueeze(0), apart)


def fused_aft_local(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, window: int) -> Tensor:
    """AFT with p_{t,s} = a_t · b_s, and 0 where t − s ≥ window (window T: full); a, b (at least T, m). Otherwise as
    `fused_aft_positional`."""
    with torch.autocast(v.device.type, enabled=False):
        T, N, apart = v.size(1), AFT_BLOCK, block_distances(v, window)
        a, b = (F.pad(x[:T].float(), (0, 0, 0, -T % N)).unflatten(0, (-1, N)) for x in (a, b))  # (J, N, m)
        blocks = torch.arange(len(a), device=v.device)
        earlier = (blocks[:, None] - torch.arange(len(apart), device=v.device)).clamp(min=0)  # (J, R)
        b = b.index_select(0, earlier.flatten()).unflatten(0, earlier.shape)  # (J, R, N, m)
        p = torch.where(apart < window, a.unsqueeze(1) @ b.mT, 0.0)  # (J, R, N, N)
        return fused_aft_positional(q, k, v, p.unsqueeze(2), apart)


def block_distances(v: Tensor, window: int) -> Tensor:
    """t − s for the tokens t and s of two blocks that are 0 … R − 1 blocks apart, (R, N, N); R − 1 blocks cover the
    window."""
    N, T = AFT_BLOCK, v.size(1)
    R = 1 + min(-(-(window - 1) // N), -(-T // N) - 1)
    i = torch.arange(N, device=v.device)
    return N * torch.arange(R, device=v.device)[:, None, None] + i[:, None] - i


def fused_aft_positional(q: Tensor, k: Tensor, v: Tensor, p: Tensor, apart: Tensor) -> Tensor:
    """y_t = σ(q_t) ⊙ Σ_{s ≤ t} exp(k_s + p_{t,s}) v_s / Σ_{s ≤ t} exp(k_s + p_{t,s}) (arXiv 2105.14103).

    q, k, v (B, T, D), channels contiguous. p (J, R, G, N, N): for tokens t in each of J blocks and s in the block that
    is 0 … R − 1 blocks before it, for G groups of channels; p is 0 at larger distances. J is 1 if p depends only on the
    distance. Returns (B, T, D) in v's dtype; differentiable in q, k, v and p. Requires `can_run(q, k, v, p)`.

    Tokens before the R blocks enter as a running sum; the R blocks enter as matrix products
    exp(p) @ (exp(k) v, exp(k)), with keys relative to the largest so far. In a token's own block, of which it attends
    to a part, keys are relative to the middle of that block's range: keys up to 160 apart (±80) lose no precision, nor
    do values of p up to 80 apart.

    Bytes moved per element of (B, T, D) in bfloat16: forward 8, 4.75 for the running sums, 4 for the logarithms;
    backward 14, 8 for the sums over later tokens and 14 for p. Neighbouring blocks reread data from the cache. FLOPs:
    4 (window + 64) forward, 8 (window + 64) backward, on the tensor cores, in bfloat16 if v is. The lower bound on the
    time is the larger of 8 or 14 bytes and these FLOPs.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    most = p.detach().amax(dim=(1, 4)).clamp(min=0)  # (J, G, N), per t; at least 0, the p of farther tokens
    weight = torch.where((apart >= 0).unsqueeze(1), (p - most[:, None, :, :, None]).exp(), 0.0)
    return torch.ops.strawberry.aft_positional(q, k, v, weight, most)[0]


@jit
def load_block(
    k, v, states, block, T, here,
    D: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """k (−∞ after the last token) and v of a block; the largest key up to its end, and the mean of that and the largest
    key up to its first token, to which all of the block's tokens attend, (1, channels) each."""
    s = (block * N + tl.arange(0, N)).to(tl.int64)[:, None]
    mask, here = (s < T) & here[None, :], here[None, :]
    key = tl.where(s < T, tl.load(k + s * k_step, mask=mask, other=0.0).to(tl.float32), float("-inf"))
    value = tl.load(v + s * v_step, mask=mask, other=0.0).to(tl.float32)
    start = tl.load(states + block * (N // ROWS) * 3 * D, mask=here, other=0.0)
    end = tl.load(states + tl.minimum((block + 1) * (N // ROWS), tl.cdiv(T, ROWS)) * 3 * D, mask=here, other=0.0)
    start = tl.maximum(start, tl.load(k + block * N * k_step, mask=here, other=0.0).to(tl.float32))
    return key, value, end, (start + end) * 0.5


@jit
def forward_kernel(
    q, k, v, weight, most, y, logs, states, T, J, R, q_row, k_row, v_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """For a block of tokens and channels of one group, stores y and log Σ exp(k_s + p_{t,s})."""
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
    far, before = states + first * (N // ROWS) * 3 * D, fast_exp(-its_most)[:, None]
    top = tl.load(far, mask=here[None, :], other=0.0)
    above = before * tl.load(far + D, mask=here[None, :], other=0.0)
    below = before * tl.load(far + 2 * D, mask=here[None, :], other=0.0)
    for other in range(first, block + 1):
        key, value, end, middle = load_block(k, v, states, other, T, here, D, k_step, v_step, N, ROWS)
        higher = tl.where(other == block, middle, end)
        fade, e = fast_exp(top - higher), fast_exp(key - higher)
        w = tl.load(weight + (block - other) * groups * N * N)
        above = tl.dot(w, (e * value).to(DOT), above * fade, input_precision="tf32x3")
        below = tl.dot(w, e.to(DOT), below * fade, input_precision="tf32x3")
        top = higher
    t = (block * N + i).to(tl.int64)
    mask = (t < T)[:, None] & here[None, :]
    below = tl.where(below > 0, below, 1.0)
    query = tl.load(q + t[:, None] * q_step, mask=mask, other=0.0).to(tl.float32)
    out = (row * T + t)[:, None] * D + c[None, :]
    tl.store(y + out, (above / (below * (1.0 + fast_exp(-query)))).to(y.dtype.element_ty), mask=mask)
    tl.store(logs + out, top + its_most[:, None] + tl.log(below), mask=mask)


@jit
def sums_after_kernel(
    q, grad, y, logs, states, dq, after, T, q_row, grad_row,
    D: tl.constexpr, q_step: tl.constexpr, grad_step: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Block by block from the end, stores Σ r_t and Σ r_t o_t over t in this block and later ones, multiplied by
    exp(the largest key before this block), with r_t = σ(q_t) ∂L/∂y_t / Z_t; and q's gradient."""
    c, row, i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64), tl.arange(0, N)
    here, blocks = c < D, tl.cdiv(T, N)
    q, grad = q + row * q_row + c[None, :], grad + row * grad_row + c[None, :]
    states += row * (tl.cdiv(T, ROWS) + 1) * 3 * D + c
    after += row * blocks * 2 * D + c
    total, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    last_top = tl.full((BLOCK,), 1e30, tl.float32)  # no block follows the last one
    for done in range(0, blocks):
        block = blocks - 1 - done
        t = (block * N + i).to(tl.int64)
        mask = (t < T)[:, None] & here[None, :]
        out = (row * T + t)[:, None] * D + c[None, :]
        query = tl.load(q + t[:, None] * q_step, mask=mask, other=0.0).to(tl.float32)
        slope = tl.load(grad + t[:, None] * grad_step, mask=mask, other=0.0).to(tl.float32)
        result = tl.load(y + out, mask=mask, other=0.0).to(tl.float32)
        log = tl.load(logs + out, mask=mask, other=float("inf"))
        gate = fast_reciprocal(1.0 + fast_exp(-query))
        tl.store(dq + out, (slope * result * (1.0 - gate)).to(dq.dtype.element_ty), mask=mask)
        top = tl.load(states + block.to(tl.int64) * (N // ROWS) * 3 * D, mask=here, other=0.0)
        per_z, fade = slope * fast_exp(top[None, :] - log), fast_exp(top - last_top)
        total = tl.sum(gate * per_z, axis=0) + total * fade
        weighted = tl.sum(result * per_z, axis=0) + weighted * fade  # σ(q) o is y
        last_top = top
        tl.store(after + block.to(tl.int64) * 2 * D, total, mask=here)
        tl.store(after + (block.to(tl.int64) * 2 + 1) * D, weighted, mask=here)


@jit
def output_gradients(
    q, grad, y, logs, t, T, about, most, here, out, q_step: tl.constexpr, grad_step: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """r_t and r_t o_t, multiplied by exp(about), one value per channel, and exp(most), one value per t."""
    t = t.to(tl.int64)
    mask = (t < T)[:, None] & here[None, :]
    query = tl.load(q + t[:, None] * q_step, mask=mask, other=0.0).to(tl.float32)
    slope = tl.load(grad + t[:, None] * grad_step, mask=mask, other=0.0).to(tl.float32)
    result = tl.load(y + out + t[:, None] * D, mask=mask, other=0.0).to(tl.float32)
    log = tl.load(logs + out + t[:, None] * D, mask=mask, other=float("inf"))
    per_z = slope * fast_exp(about + most[:, None] - log)
    return per_z * fast_reciprocal(1.0 + fast_exp(-query)), per_z * result


@jit
def backward_kernel(
    q, k, v, weight, most, grad, y, logs, states, after, dk, dv, T, J, R, q_row, k_row, v_row, grad_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, grad_step: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v for a block of tokens and channels of one group, from this block and all later ones."""
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
    key, value, _, about = load_block(k, v, states, block, T, here, D, k_step, v_step, N, ROWS)
    over, under = tl.zeros((N, BLOCK), tl.float32), tl.zeros((N, BLOCK), tl.float32)
    for other in range(block, far):
        its_most = tl.load(most + (other % J * groups + group) * N + i)
        tile = (other % J * R + other - block) * groups + group
        w = tl.load(weight + tile * N * N + i[None, :] * N + i[:, None])  # (s, t)
        share, weighted = output_gradients(q, grad, y, logs, other * N + i, T, about, its_most, here,
                                     row * T * D + c[None, :], q_step, grad_step, D)  # fmt: skip
        over = tl.dot(w, share.to(DOT), over, input_precision="tf32x3")
        under = tl.dot(w, weighted.to(DOT), under, input_precision="tf32x3")
    e, there = fast_exp(key - about), (here & (far < blocks))[None, :]
    top = tl.load(states + far * (N // ROWS) * 3 * D, mask=there, other=float("inf"))
    after += (row * blocks + far) * 2 * D + c[None, :]
    e_far = fast_exp(key - top)  # zero if there are no far blocks
    over = over * e + e_far * tl.load(after, mask=there, other=0.0)
    under = under * e + e_far * tl.load(after + D, mask=there, other=0.0)
    mask = (s < T)[:, None] & here[None, :]
    out = (row * T + s.to(tl.int64))[:, None] * D + c[None, :]
    tl.store(dv + out, over.to(dv.dtype.element_ty), mask=mask)
    tl.store(dk + out, (value * over - under).to(dk.dtype.element_ty), mask=mask)


@jit
def weights_backward_kernel(
    q, k, v, most, grad, y, logs, states, dw, B, T, J, R, rows, q_row, k_row, v_row, grad_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, grad_step: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of weights, summed over some of the rows, over the channels of its group and over the
    pairs of blocks that share the tile."""
    mine, apart = tl.program_id(0), tl.program_id(1)
    groups: tl.constexpr = D // WIDTH
    group, share_of = tl.program_id(2) % groups, tl.program_id(2) // groups
    i, blocks = tl.arange(0, N), tl.cdiv(T, N)
    its_most = tl.load(most + (mine * groups + group) * N + i)
    total = tl.zeros((N, N), tl.float32)
    skipped = tl.cdiv(tl.maximum(apart - mine, 0), J)  # pairs whose earlier block would be before the first block
    for pair in range(skipped, tl.cdiv(blocks - mine, J)):
        block = mine + pair * J
        for step in range(0, tl.minimum(rows, B - share_of * rows)):
            row = (share_of * rows).to(tl.int64) + step
            for start in range(0, WIDTH, BLOCK):
                inside = start + tl.arange(0, BLOCK)
                here, c = inside < WIDTH, group * WIDTH + inside[None, :]
                its_states = states + row * (tl.cdiv(T, ROWS) + 1) * 3 * D + c
                key, value, _, about = load_block(k + row * k_row + c, v + row * v_row + c, its_states,
                                                block - apart, T, here, D, k_step, v_step, N, ROWS)  # fmt: skip
                e = fast_exp(key - about)
                share, weighted = output_gradients(
                    q + row * q_row + c, grad + row * grad_row + c, y, logs, block * N + i, T,
                    about, its_most, here, row * T * D + c, q_step, grad_step, D)  # fmt: skip
                total = tl.dot(share.to(DOT), tl.trans((e * value).to(DOT)), total, input_precision="tf32x3")
                total = tl.dot((-weighted).to(DOT), tl.trans(e.to(DOT)), total, input_precision="tf32x3")
    seen = apart * N + i[:, None] - i[None, :] >= 0  # other values are undefined
    tile = ((share_of * J + mine) * R + apart) * groups + group
    tl.store(dw + tile.to(tl.int64) * N * N + i[:, None] * N + i[None, :], tl.where(seen, total, 0.0))


def positional_launch_config(v: Tensor, weight: Tensor, kernel: str) -> tuple[dict, tuple[int, int]]:
    """The kernel's constants, and the grid over blocks of tokens and channels."""
    groups = weight.size(2)
    width = v.size(-1) // groups
    shape = AFT_LAUNCH[kernel] | {"WIDTH": width, "N": AFT_BLOCK, "ROWS": tile_rows(v), "DOT": dot_dtype(v)}
    shape["BLOCK"] = max(16, min(shape["BLOCK"], next_power_of_2(width)))
    return shape, (-(-v.size(1) // AFT_BLOCK), groups * -(-width // shape["BLOCK"]))


def to_dot_dtype(weight: Tensor, v: Tensor) -> Tensor:
    """The weights, contiguous and in the dtype of tl.dot's operands."""
    return (weight if INTERPRETED else weight.to(v.dtype)).contiguous()


@torch.library.custom_op("strawberry::aft_positional", mutates_args=())
def aft_positional_op(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = v.shape
    y = torch.empty(B, T, D, dtype=v.dtype, device=v.device)
    logs = torch.empty(B, T, D, dtype=torch.float32, device=v.device)
    states = launch_aft_forward(q, k, v, y, True, False)
    rows, steps = ([x.stride(axis) for x in (q, k, v)] for axis in (0, 1))
    shape, grid = positional_launch_config(v, weight, "forward")
    tiles = to_dot_dtype(weight, v), most.contiguous()
    args = (q, k, v, *tiles, y, logs, states, T, *weight.shape[:2], *rows, D, *steps)
    forward_kernel[(*grid, B)](*args, **shape)
    return y, logs, states


@aft_positional_op.register_fake
def _(q, k, v, weight, most):
    B, T, D = v.shape
    return v.new_empty(v.shape), *(v.new_empty(shape, dtype=torch.float32) for shape in (v.shape, state_shape(v)))


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
    shape, grid = positional_launch_config(v, weight, "backward")
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (torch.empty(B, T, D, dtype=x.dtype, device=x.device) for x in (q, k, v))
    after = torch.empty(B, grid[0], 2, D, dtype=torch.float32, device=v.device)
    rows, steps = ([x.stride(axis) for x in (q, k, v, grad)] for axis in (0, 1))
    sums = (q, grad, y, logs, states, dq, after, T, rows[0], rows[3], D, steps[0], steps[3])
    sums_after_kernel[(-(-D // 32), B)](*sums, BLOCK=32, N=N, ROWS=tile_rows(v), num_warps=4)
    known = grad, y, logs, states
    args = (q, k, v, to_dot_dtype(weight, v), most, *known, after, dk, dv, T, J, R, *rows, D, *steps)
    backward_kernel[(*grid, B)](*args, **shape)
    share = -(-B // max(1, min(B, -(-4 * kernels.multiprocessors(v) // (J * R * G)))))  # rows per program
    dw = torch.empty(-(-B // share), J, R, G, N, N, dtype=torch.float32, device=v.device)
    args = (q, k, v, most, *known, dw, B, T, J, R, share, *rows, D, *steps)
    weights_backward_kernel[(J, R, G * len(dw))](*args, **positional_launch_config(v, weight, "weights")[0])
    return dq, dk, dv, dw.sum(0)


@aft_positional_backward_op.register_fake
def _(grad, q, k, v, weight, most, y, logs, states):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, weight))


def setup_positional_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def positional_backward(ctx, grad: Tensor, *_) -> tuple:
    return *torch.ops.strawberry.aft_positional_backward(grad, *ctx.saved_tensors), None


aft_positional_op.register_autograd(positional_backward, setup_context=setup_positional_context)
