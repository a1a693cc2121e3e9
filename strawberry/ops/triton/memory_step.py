"""One token of the linear memory of strawberry/ops/memory.py: all that a decode step computes between the products that
read its input and the product that reads its output."""

import torch
from torch import Tensor

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.common import jit, next_power_of_2, tl
from strawberry.ops.triton.fused_linear import sigmoid
from strawberry.ops.triton.memory import MAX_WIDTH


def can_fuse_step(z: Tensor, v: Tensor, gates: Tensor, taps: Tensor, tail: Tensor, state: Tensor) -> bool:
    """Whether the kernel supports these inputs: one token of each row, without gradients, heads of up to 128
    channels."""
    fits = z.size(1) == 1 and state.size(-1) <= MAX_WIDTH and tail.is_contiguous() and state.is_contiguous()
    return fits and not torch.is_grad_enabled() and kernels.can_run(z, v, gates, taps, tail, state)


def fused_step(
    z: Tensor, v: Tensor, gates: Tensor, gate_bias: Tensor, taps: Tensor, tail: Tensor, state: Tensor,
    lengths: Tensor | None, active: Tensor | None, eps: float, offsets: tuple[float, float],
) -> Tensor:  # fmt: skip
    """o (B, 1, M) in v's dtype: z, v (B, 1, M), gates (B, 1, 3H), gate_bias (3H,), taps (n, M). The cache's tail (B, n,
    M) and state (B, H, d, d) float32, both contiguous, become in place those after the token. Where lengths (B,) is 0,
    both stay; where active (B, 1) is False, the state stays. `eps` is that of `unit` and `soft_norm`; `offsets` are
    those of the first and the last head's decay. Requires `can_fuse_step`.

    A row's result does not depend on the other rows. Bytes moved: the state, read and written. Lower bound on the time:
    these bytes divided by the copy bandwidth; a few rows have too few programs to reach it."""
    z, v, gates = (x if x.stride(-1) == 1 else x.contiguous() for x in (z, v, gates))
    return torch.ops.strawberry.memory_step(
        z, v, gates, gate_bias.contiguous(), taps.contiguous(), tail, state, lengths, active, eps, list(offsets)
    )


@jit
def load_gate(gates, gate_bias, n):
    return tl.load(gates + n).to(tl.float32) + tl.load(gate_bias + n).to(tl.float32)


@jit
def memory_step_kernel(
    z, v, gates, gate_bias, taps, tail, state, lengths, active, o, z_row, v_row, gates_row, active_row,
    H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, EPS: tl.constexpr,
    OFFSET: tl.constexpr, OFFSET_STEP: tl.constexpr, LENGTHS: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    """A head of a row, in float32. Nothing is stored before everything is loaded: several threads may load a number
    that one of them replaces."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    M: tl.constexpr = H * D
    c, first = tl.arange(0, WIDE), head * D
    inside = c < D
    square = inside[:, None] & inside[None, :]
    state += (row * H + head) * D * D + c[:, None] * D + c[None, :]
    tail += row * TAIL * M + first
    S = tl.load(state, mask=square, other=0.0)
    token = tl.load(z + row * z_row + first + c, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(v + row * v_row + first + c, mask=inside, other=0.0).to(tl.float32)
    earlier = ()
    for i in tl.static_range(0, TAIL):
        earlier += (tl.load(tail + i * M + c, mask=inside, other=0.0),)
    gates += row * gates_row
    a, b = load_gate(gates, gate_bias, head), load_gate(gates, gate_bias, H + head)
    read_gate = sigmoid(load_gate(gates, gate_bias, 2 * H + head))
    is_token = row >= 0
    if LENGTHS:
        is_token = tl.load(lengths + row) > 0
    writes = is_token
    if ACTIVE:
        writes = is_token & (tl.load(active + row * active_row) != 0)

    own = 1.0 + tl.load(taps + first + c, mask=inside, other=0.0).to(tl.float32)
    query, key = own * token, own * earlier[TAIL - 1].to(tl.float32)
    for j in tl.static_range(1, TAIL):
        tap = tl.load(taps + j * M + first + c, mask=inside, other=0.0).to(tl.float32)
        query += tap * earlier[TAIL - j].to(tl.float32)
        key += tap * earlier[TAIL - 1 - j].to(tl.float32)
    query *= tl.rsqrt(tl.sum(query * query, axis=0) + EPS)
    key *= tl.rsqrt(tl.sum(key * key, axis=0) + EPS)
    decay = tl.where(writes, sigmoid(-(a + OFFSET + head.to(tl.float32) * OFFSET_STEP)), 1.0)
    beta = tl.where(writes, sigmoid(b), 0.0)
    S = decay * S
    error = value - tl.sum(key[:, None] * S, axis=0)
    S += (beta * key)[:, None] * error[None, :]
    out = tl.sum(query[:, None] * S, axis=0)
    out *= tl.rsqrt(tl.sum(out * out, axis=0) / D + EPS) * read_gate

    tl.debug_barrier()
    tl.store(o + row * M + first + c, out.to(o.dtype.element_ty), mask=inside)
    tl.store(state, S, mask=square & writes)
    for i in tl.static_range(1, TAIL):
        tl.store(tail + (i - 1) * M + c, earlier[i], mask=inside & is_token)
    tl.store(tail + (TAIL - 1) * M + c, token.to(tail.dtype.element_ty), mask=inside & is_token)


@torch.library.custom_op("strawberry::memory_step", mutates_args=("tail", "state"))
def memory_step_op(
    z: Tensor, v: Tensor, gates: Tensor, gate_bias: Tensor, taps: Tensor, tail: Tensor, state: Tensor,
    lengths: Tensor | None, active: Tensor | None, eps: float, offsets: list[float],
) -> Tensor:  # fmt: skip
    B, H, D, _ = state.shape
    wide = max(16, next_power_of_2(D))
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    memory_step_kernel[(H, B)](
        z, v, gates, gate_bias, taps, tail, state, tail if lengths is None else lengths.contiguous(),
        tail if active is None else active.view(torch.uint8), o, z.stride(0), v.stride(0), gates.stride(0),
        0 if active is None else active.stride(0), H=H, D=D, WIDE=wide, TAIL=tail.size(1), EPS=eps, OFFSET=offsets[0],
        OFFSET_STEP=(offsets[1] - offsets[0]) / max(1, H - 1), LENGTHS=lengths is not None, ACTIVE=active is not None,
        num_warps=8 if wide > 64 else 4,
    )  # fmt: skip
    return o


@memory_step_op.register_fake
def _(z, v, gates, gate_bias, taps, tail, state, lengths, active, eps, offsets):
    return v.new_empty(v.shape)
