"""The linear memory of strawberry/ops/memory.py, chunk by chunk: the gated delta rule (arXiv 2412.06464).

Notation, per row, head and chunk of C tokens: S (D, D) the state before the chunk, Γ_t the product of α from the
chunk's start to t, Γ_C that of the whole chunk, decay[t, s] = Γ_t / Γ_s for s ≤ t, else 0. With L = β decay (k kᵀ)
below the diagonal and X = (I + L)⁻¹, the rows n_t of the writes are N = X β v − (X β Γ k) S. Then
o = (decay q kᵀ) N + Γ q S, and the state after the chunk is Γ_C S + kᵀ (Γ_C / Γ) N.

Two kernels are sequential over the chunks, with BLOCK columns of the state per program: states_kernel computes writes
and states, states_and_grads_kernel, in the backward pass, both again and at the same time, from the last chunk to the
first, their gradients. The other kernels compute all chunks in parallel: prepare_kernel and grad_writes_kernel before
them, read_kernel and grad_inputs_kernel after them.
"""

import torch
from torch import Tensor

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.common import dot_dtype, fast_exp, jit, next_power_of_2, tl

BLOCK = 16  # columns of the state per program: few, because only columns, heads and rows are computed in parallel
STAGES = 3  # of the loops over the chunks: two are slower, four no faster
MAX_WIDTH = 128  # channels of a head in a half type, half as many in float32
MAX_TILE = 4096  # numbers in a chunk's tile in a half type, a quarter in float32: they fit 99 KiB of shared memory


def can_fuse_memory(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels support these inputs (B, T, H, d)."""
    width = MAX_WIDTH if v.dtype in kernels.HALF_DTYPES else MAX_WIDTH // 2
    return kernels.can_run(q, k, v) and k.size(-1) == v.size(-1) <= width


def fused_memory(q, k, v, log_decay, beta, size: int, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """o (B, T, H, d) in v's dtype and the last state (B, H, d, d) float32: q, k, v (B, T, H, d), channels contiguous;
    log α and β (B, T, H) float32; about `size` tokens in a chunk (`launch_shape`). Requires `can_fuse_memory`. o is
    differentiable if there is no first state; the last state is not. Backward recomputes writes and states.

    Bytes moved in bfloat16 per element of v, where d and the chunk are 64: forward 28, or 14 tensors of v's size;
    backward 66. The inputs read once and the outputs written once are 8 and 14."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return torch.ops.strawberry.memory(q, k, v, log_decay.contiguous(), beta.contiguous(), state, size)


@jit
def load_tokens(x, t, T, step, D: tl.constexpr, WIDE: tl.constexpr):
    """(C, WIDE): the channels of a head for tokens t, zero from token T and channel D on."""
    j = tl.arange(0, WIDE)
    return tl.load(x + t.to(tl.int64)[:, None] * step + j[None, :], mask=(t < T)[:, None] & (j < D)[None, :], other=0.0)


@jit
def store_tokens(x, value, t, T, step, D: tl.constexpr, WIDE: tl.constexpr):
    j = tl.arange(0, WIDE)
    mask = (t < T)[:, None] & (j < D)[None, :]
    tl.store(x + t.to(tl.int64)[:, None] * step + j[None, :], value.to(x.dtype.element_ty), mask=mask)


@jit
def tile(chunk, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of the chunk's contiguous matrix (ROWS, COLUMNS)."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return chunk.to(tl.int64) * ROWS * COLUMNS + i * COLUMNS + j


@jit
def load_gates(gates, row, head, t, T, H):
    """log α or β of a head, zero from token T on."""
    return tl.load(gates + (row * T + t) * H + head, mask=t < T, other=0.0)


@jit
def decay_of_pairs(log_gamma, C: tl.constexpr):
    """(C, C): Γ_t / Γ_s for s ≤ t, else 0."""
    i = tl.arange(0, C)
    return fast_exp(tl.where(i[:, None] >= i[None, :], log_gamma[:, None] - log_gamma[None, :], float("-inf")))


@jit
def lower_left_of_pairs(block):
    """Whether a row and a column are of the second and the first block of a pair: `block` is the number of an index's
    block."""
    return (block[:, None] == block[None, :] + 1) & (block[None, :] % 2 == 0)


@jit
def invert_unit_lower(lower, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)⁻¹. Blocks of 1, 2, 4 … rows are inverted in pairs: [[A, 0], [M, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ M A⁻¹, B⁻¹]]. Up
    to 16 rows, only the blocks of 16 rows on the diagonal are computed, (C / 16, 16, 16)."""
    N: tl.constexpr = C // 16
    b, i, j = tl.arange(0, N), tl.arange(0, C), tl.arange(0, 16)
    on_diagonal = b[:, None, None, None] == b[None, None, :, None]
    blocks = tl.sum(tl.where(on_diagonal, tl.reshape(lower, (N, 16, N, 16)), 0.0), axis=2)
    identity = tl.where(j[:, None] == j[None, :], 1.0, 0.0)
    x = identity[None, :, :] - tl.where(lower_left_of_pairs(j)[None, :, :], blocks, 0.0)
    for level in tl.static_range(1, 4):
        between = tl.where(lower_left_of_pairs(j // (1 << level))[None, :, :], blocks, 0.0)
        x -= tl.dot(tl.dot(x, between, input_precision=PRECISION), x, input_precision=PRECISION)
    x = tl.reshape(tl.where(on_diagonal, x[:, :, None, :], 0.0), (C, C))
    for level in tl.static_range(4, LEVELS):
        between = tl.where(lower_left_of_pairs(i // (1 << level)), lower, 0.0)
        x -= tl.dot(tl.dot(x, between, input_precision=PRECISION), x, input_precision=PRECISION)
    return x


@jit
def prepare_kernel(
    k, v, log_decay, beta, inverse, erases, writes, T, H, k_row, k_step, k_head, v_row, v_step, v_head,
    SAVE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DOT: tl.constexpr,
    INVERSE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a chunk of a head, stores X β Γ k and X β v, and X if SAVE."""
    n, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i = tl.arange(0, C)
    t, chunk = n * C + i, tl.program_id(1) * tl.num_programs(0) + n
    log_gamma = tl.cumsum(load_gates(log_decay, row, head, t, T, H), axis=0)
    b = load_gates(beta, row, head, t, T, H)
    key = load_tokens(k + row * k_row + head * k_head, t, T, k_step, D, WIDE).to(DOT)
    overlap = b[:, None] * decay_of_pairs(log_gamma, C) * tl.dot(key, tl.trans(key), input_precision=PRECISION)
    x = invert_unit_lower(tl.where(i[:, None] > i[None, :], overlap, 0.0), C, LEVELS, INVERSE_PRECISION)
    if SAVE:
        tl.store(inverse + tile(chunk, C, C), x.to(inverse.dtype.element_ty))
    x = x.to(DOT)
    erase = tl.dot(x, ((b * fast_exp(log_gamma))[:, None] * key).to(DOT), input_precision=PRECISION)
    tl.store(erases + tile(chunk, C, WIDE), erase.to(erases.dtype.element_ty))
    value = load_tokens(v + row * v_row + head * v_head, t, T, v_step, D, WIDE)
    write = tl.dot(x, (b[:, None] * value).to(DOT), input_precision=PRECISION)
    tl.store(writes + tile(chunk, C, WIDE), write.to(writes.dtype.element_ty))


@jit
def advance_states(
    part, line, k, log_decay, erases, writes, states, first, last, T, H, chunks, k_row, k_step, k_head,
    FIRST: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For PART columns of a head's state, chunk after chunk: stores the state before the chunk, and replaces X β v in
    `writes` by the chunk's writes; then stores the last state."""
    row, head = (line // H).to(tl.int64), line % H
    i, c, e = tl.arange(0, C), tl.arange(0, WIDE), part * PART + tl.arange(0, PART)
    k += row * k_row + head * k_head
    state_place = line.to(tl.int64) * D * D + c[:, None] * D + e[None, :]
    inside = (c < D)[:, None] & (e < D)[None, :]
    state = tl.zeros((WIDE, PART), tl.float32)
    if FIRST:
        state = tl.load(first + state_place, mask=inside, other=0.0).to(tl.float32)
    for n in range(chunks):
        t, chunk = n * C + i, (line * chunks + n).to(tl.int64)
        place = writes + chunk * C * WIDE + i[:, None] * WIDE + e[None, :]
        erase, write = tl.load(erases + tile(chunk, C, WIDE)).to(DOT), tl.load(place).to(tl.float32)
        key = load_tokens(k, t, T, k_step, D, WIDE).to(DOT)
        decay = load_gates(log_decay, row, head, t, T, H)
        log_gamma, end = tl.cumsum(decay, axis=0), tl.sum(decay, axis=0)
        before = state.to(DOT)
        tl.store(states + chunk * WIDE * WIDE + c[:, None] * WIDE + e[None, :], before.to(states.dtype.element_ty))
        write -= tl.dot(erase, before, input_precision=PRECISION)
        tl.store(place, write.to(writes.dtype.element_ty))
        write = (fast_exp(end - log_gamma)[:, None] * write).to(DOT)
        state = tl.exp(end) * state + tl.dot(tl.trans(key), write, input_precision=PRECISION)
    tl.store(last + state_place, state, mask=inside)


@jit
def states_kernel(
    k, log_decay, erases, writes, states, first, last, T, H, chunks, k_row, k_step, k_head,
    FIRST: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    advance_states(
        tl.program_id(0), tl.program_id(1), k, log_decay, erases, writes, states, first, last, T, H, chunks,
        k_row, k_step, k_head, FIRST, D, WIDE, C, PART, DOT, PRECISION,
    )  # fmt: skip


@jit
def read_kernel(
    q, k, log_decay, writes, states, o, T, H, q_row, q_step, q_head, k_row, k_step, k_head,
    D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of a chunk of a head."""
    n, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t, chunk = n * C + tl.arange(0, C), tl.program_id(1) * tl.num_programs(0) + n
    log_gamma = tl.cumsum(load_gates(log_decay, row, head, t, T, H), axis=0)
    query = load_tokens(q + row * q_row + head * q_head, t, T, q_step, D, WIDE).to(DOT)
    key = load_tokens(k + row * k_row + head * k_head, t, T, k_step, D, WIDE).to(DOT)
    state = tl.load(states + tile(chunk, WIDE, WIDE)).to(DOT)
    write = tl.load(writes + tile(chunk, C, WIDE)).to(DOT)
    score = decay_of_pairs(log_gamma, C) * tl.dot(query, tl.trans(key), input_precision=PRECISION)
    out = fast_exp(log_gamma)[:, None] * tl.dot(query, state, input_precision=PRECISION)
    out += tl.dot(score.to(DOT), write, input_precision=PRECISION)
    store_tokens(o + (row * T * H + head) * D, out, t, T, H * D, D, WIDE)


@jit
def grad_writes_kernel(
    q, k, grad, log_decay, d_writes, T, H,
    q_row, q_step, q_head, k_row, k_step, k_head, g_row, g_step, g_head,
    D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the writes through the reads of the same chunk."""
    n, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t, chunk = n * C + tl.arange(0, C), tl.program_id(1) * tl.num_programs(0) + n
    log_gamma = tl.cumsum(load_gates(log_decay, row, head, t, T, H), axis=0)
    query = load_tokens(q + row * q_row + head * q_head, t, T, q_step, D, WIDE).to(DOT)
    key = load_tokens(k + row * k_row + head * k_head, t, T, k_step, D, WIDE).to(DOT)
    d_out = load_tokens(grad + row * g_row + head * g_head, t, T, g_step, D, WIDE).to(DOT)
    score = decay_of_pairs(log_gamma, C) * tl.dot(query, tl.trans(key), input_precision=PRECISION)
    d_write = tl.dot(tl.trans(score.to(DOT)), d_out, input_precision=PRECISION)
    tl.store(d_writes + tile(chunk, C, WIDE), d_write.to(d_writes.dtype.element_ty))


@jit
def advance_grad_states(
    part, line, q, k, grad, log_decay, erases, d_writes, d_states, T, H, chunks,
    q_row, q_step, q_head, k_row, k_step, k_head, g_row, g_step, g_head,
    D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For PART columns of a head's state, from the last chunk to the first: stores the gradient of the state after the
    chunk, and adds the writes' gradient through that state to d_writes."""
    row, head = (line // H).to(tl.int64), line % H
    i, c, e = tl.arange(0, C), tl.arange(0, WIDE), part * PART + tl.arange(0, PART)
    q, k, grad = q + row * q_row + head * q_head, k + row * k_row + head * k_head, grad + row * g_row + head * g_head
    d_state = tl.zeros((WIDE, PART), tl.float32)
    for back in range(chunks):
        n = chunks - 1 - back
        t, chunk = n * C + i, (line * chunks + n).to(tl.int64)
        place = d_writes + chunk * C * WIDE + i[:, None] * WIDE + e[None, :]
        key, d_write = load_tokens(k, t, T, k_step, D, WIDE).to(DOT), tl.load(place).to(tl.float32)
        query = load_tokens(q, t, T, q_step, D, WIDE).to(DOT)
        erase = tl.load(erases + tile(chunk, C, WIDE)).to(DOT)
        mask = (t < T)[:, None] & (e < D)[None, :]
        d_out = tl.load(grad + t.to(tl.int64)[:, None] * g_step + e[None, :], mask=mask, other=0.0)
        decay = load_gates(log_decay, row, head, t, T, H)
        log_gamma, end = tl.cumsum(decay, axis=0), tl.sum(decay, axis=0)
        after = d_state.to(DOT)
        tl.store(d_states + chunk * WIDE * WIDE + c[:, None] * WIDE + e[None, :], after.to(d_states.dtype.element_ty))
        d_write += fast_exp(end - log_gamma)[:, None] * tl.dot(key, after, input_precision=PRECISION)
        tl.store(place, d_write.to(d_writes.dtype.element_ty))
        d_out = (fast_exp(log_gamma)[:, None] * d_out).to(DOT)
        d_state = tl.exp(end) * d_state + tl.dot(tl.trans(query), d_out, input_precision=PRECISION)
        d_state -= tl.dot(tl.trans(erase), d_write.to(DOT), input_precision=PRECISION)


@jit
def states_and_grads_kernel(
    q, k, grad, log_decay, erases, writes, states, d_writes, d_states, last, T, H, chunks,
    q_row, q_step, q_head, k_row, k_step, k_head, g_row, g_step, g_head,
    D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The states again, and their gradients, which do not depend on them: at the same time, since each alone leaves
    most of a GPU idle."""
    part, line = tl.program_id(0), tl.program_id(1)
    if tl.program_id(2) == 0:
        advance_states(
            part, line, k, log_decay, erases, writes, states, last, last, T, H, chunks, k_row, k_step, k_head,
            False, D, WIDE, C, PART, DOT, PRECISION,
        )  # fmt: skip
    else:
        advance_grad_states(
            part, line, q, k, grad, log_decay, erases, d_writes, d_states, T, H, chunks,
            q_row, q_step, q_head, k_row, k_step, k_head, g_row, g_step, g_head, D, WIDE, C, PART, DOT, PRECISION,
        )  # fmt: skip


@jit
def grad_reads(query, key, d_out, state, write, log_gamma, decay, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The gradients of q, k and log Γ through the reads."""
    d_score = decay * tl.dot(d_out, tl.trans(write), input_precision=PRECISION)
    d_decay = d_score * tl.dot(query, tl.trans(key), input_precision=PRECISION)
    dq = fast_exp(log_gamma)[:, None] * tl.dot(d_out, tl.trans(state), input_precision=PRECISION)
    d_log_gamma = tl.sum(d_decay, axis=1) - tl.sum(d_decay, axis=0) + tl.sum(dq * query, axis=1)
    d_score = d_score.to(DOT)
    dq += tl.dot(d_score, key, input_precision=PRECISION)
    return dq, tl.dot(tl.trans(d_score), query, input_precision=PRECISION), d_log_gamma


@jit
def grad_solution(
    key, value, b, state, write, d_write, x, log_gamma, decay,
    C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of k, v, β and log Γ through the writes N = X β (v − Γ k S). The gradient of β (v − Γ k S) is
    Xᵀ dN, and that of L is −(Xᵀ dN) Nᵀ, since X = (I + L)⁻¹."""
    i, gamma = tl.arange(0, C), fast_exp(log_gamma)
    d_scaled = tl.dot(tl.trans(x), d_write, input_precision=PRECISION)
    predicted = gamma[:, None] * tl.dot(key, state, input_precision=PRECISION)
    d_b = tl.sum(d_scaled * (value - predicted), axis=1)
    d_scaled_dot = d_scaled.to(DOT)
    dk = -(b * gamma)[:, None] * tl.dot(d_scaled_dot, tl.trans(state), input_precision=PRECISION)
    d_log_gamma = tl.sum(dk * key, axis=1)
    d_lower = -decay * tl.dot(d_scaled_dot, tl.trans(write), input_precision=PRECISION)
    d_lower = tl.where(i[:, None] > i[None, :], d_lower, 0.0)
    d_pairs = d_lower * tl.dot(key, tl.trans(key), input_precision=PRECISION)
    d_b += tl.sum(d_pairs, axis=1)
    d_decay = b[:, None] * d_pairs
    d_log_gamma += tl.sum(d_decay, axis=1) - tl.sum(d_decay, axis=0)
    d_lower = (b[:, None] * d_lower).to(DOT)
    dk += tl.dot(d_lower, key, input_precision=PRECISION)
    dk += tl.dot(tl.trans(d_lower), key, input_precision=PRECISION)
    return dk, b[:, None] * d_scaled, d_b, d_log_gamma


@jit
def grad_inputs_kernel(
    q, k, v, grad, log_decay, beta, inverse, writes, states, d_writes, d_states, dq, dk, dv, d_log_decay, d_beta, T, H,
    q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head, g_row, g_step, g_head,
    D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's inputs."""
    n, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t, chunk = n * C + tl.arange(0, C), tl.program_id(1) * tl.num_programs(0) + n
    log_alpha, b = load_gates(log_decay, row, head, t, T, H), load_gates(beta, row, head, t, T, H)
    log_gamma, end = tl.cumsum(log_alpha, axis=0), tl.sum(log_alpha, axis=0)
    decay = decay_of_pairs(log_gamma, C)
    query = load_tokens(q + row * q_row + head * q_head, t, T, q_step, D, WIDE).to(DOT)
    key = load_tokens(k + row * k_row + head * k_head, t, T, k_step, D, WIDE).to(DOT)
    d_out = load_tokens(grad + row * g_row + head * g_head, t, T, g_step, D, WIDE).to(DOT)
    state = tl.load(states + tile(chunk, WIDE, WIDE)).to(DOT)
    write = tl.load(writes + tile(chunk, C, WIDE)).to(DOT)
    out = (row * T * H + head) * D
    dq_tile, dk_tile, d_log_gamma = grad_reads(query, key, d_out, state, write, log_gamma, decay, DOT, PRECISION)
    store_tokens(dq + out, dq_tile, t, T, H * D, D, WIDE)

    d_state = tl.load(d_states + tile(chunk, WIDE, WIDE)).to(DOT)
    dk_state = fast_exp(end - log_gamma)[:, None] * tl.dot(write, tl.trans(d_state), input_precision=PRECISION)
    dk_tile += dk_state
    d_log_gamma_state = tl.sum(dk_state * key, axis=1)
    product = state.to(tl.float32) * d_state.to(tl.float32)
    d_end = tl.sum(d_log_gamma_state, axis=0) + tl.exp(end) * tl.sum(tl.sum(product, axis=1), axis=0)

    value = load_tokens(v + row * v_row + head * v_head, t, T, v_step, D, WIDE)
    d_write = tl.load(d_writes + tile(chunk, C, WIDE)).to(DOT)
    x = tl.load(inverse + tile(chunk, C, C)).to(DOT)
    dk_write, dv_tile, d_b, d_log_gamma_write = grad_solution(
        key, value, b, state, write, d_write, x, log_gamma, decay, C, DOT, PRECISION
    )
    store_tokens(dk + out, dk_tile + dk_write, t, T, H * D, D, WIDE)
    store_tokens(dv + out, dv_tile, t, T, H * D, D, WIDE)
    d_log_gamma += d_log_gamma_write - d_log_gamma_state
    d_log_alpha = d_end + tl.sum(d_log_gamma, axis=0) - tl.cumsum(d_log_gamma, axis=0) + d_log_gamma  # Σ over t ≥ s
    gate = (row * T + t) * H + head
    tl.store(d_log_decay + gate, d_log_alpha, mask=t < T)
    tl.store(d_beta + gate, d_b, mask=t < T)


def strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for x in tensors for axis in (0, 1, 2)]


def launch_shape(v: Tensor, size: int) -> dict:
    """The kernels' constants. A chunk has a power of two of tokens, at least 16, and fewer where heads are wide."""
    D, is_half = v.size(3), v.dtype in kernels.HALF_DTYPES
    wide = max(16, next_power_of_2(D))
    tokens = max(16, min(next_power_of_2(size + 1) // 2, (MAX_TILE if is_half else MAX_TILE // 4) // wide))
    return {"D": D, "WIDE": wide, "C": tokens, "DOT": dot_dtype(v), "PRECISION": "tf32" if is_half else "tf32x3",
            "num_warps": 8 if wide > 64 else 4}  # fmt: skip


def prepare_chunks(k, v, log_decay, beta, size: int, save: bool) -> tuple[Tensor, ...]:
    """X (J, C, C) if `save`, X β Γ k and X β v (J, C, WIDE), all for the J chunks of all rows and heads; and, not
    initialized, the states before the chunks (J, WIDE, WIDE), all in v's dtype, and the last state (B, H, d, d)."""
    (B, T, H, D), shape = v.shape, launch_shape(v, size)
    wide, size, lines, chunks = shape["WIDE"], shape["C"], B * H, -(-T // shape["C"])
    new = {"dtype": v.dtype, "device": v.device}
    J = lines * chunks
    inverse = torch.empty((J, size, size) if save else (0,), **new)
    erases, writes = (torch.empty(J, size, wide, **new) for _ in range(2))
    prepare_kernel[(chunks, lines)](
        k, v, log_decay, beta, inverse, erases, writes, T, H, *strides(k, v), **shape,
        SAVE=save, LEVELS=size.bit_length() - 1, INVERSE_PRECISION=shape["PRECISION"],
    )  # fmt: skip
    states = torch.empty(J, wide, wide, **new)
    return inverse, erases, writes, states, torch.empty(B, H, D, D, dtype=torch.float32, device=v.device)


@torch.library.custom_op("strawberry::memory", mutates_args=())
def memory_op(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    B, T, H, D = v.shape
    state = None if state is None else state.contiguous()
    _, erases, writes, states, last = prepare_chunks(k, v, log_decay, beta, size, False)
    shape = launch_shape(v, size)
    lines, chunks = B * H, -(-T // shape["C"])
    states_kernel[(shape["WIDE"] // BLOCK, lines)](
        k, log_decay, erases, writes, states, last if state is None else state, last, T, H, chunks, *strides(k),
        **shape, FIRST=state is not None, PART=BLOCK, num_stages=STAGES,
    )  # fmt: skip
    o = torch.empty(B, T, H, D, dtype=v.dtype, device=v.device)
    read_kernel[(chunks, lines)](q, k, log_decay, writes, states, o, T, H, *strides(q, k), **shape)
    return o, last


@memory_op.register_fake
def _(q, k, v, log_decay, beta, state, size):
    B, _, H, D = v.shape
    return v.new_empty(v.shape), v.new_empty(B, H, D, D, dtype=torch.float32)


@torch.library.custom_op("strawberry::memory_backward", mutates_args=())
def memory_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, H, _), shape = v.shape, launch_shape(v, size)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    inverse, erases, writes, states, last = prepare_chunks(k, v, log_decay, beta, size, True)
    chunks, lines, d_writes, d_states = -(-T // shape["C"]), B * H, torch.empty_like(writes), torch.empty_like(states)
    grad_writes_kernel[(chunks, lines)](q, k, grad, log_decay, d_writes, T, H, *strides(q, k, grad), **shape)
    states_and_grads_kernel[(shape["WIDE"] // BLOCK, lines, 2)](
        q, k, grad, log_decay, erases, writes, states, d_writes, d_states, last, T, H, chunks, *strides(q, k, grad),
        **shape, PART=BLOCK, num_stages=STAGES,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_gates = [torch.empty(B, T, H, dtype=torch.float32, device=v.device) for _ in range(2)]
    grad_inputs_kernel[(chunks, lines)](
        q, k, v, grad, log_decay, beta, inverse, writes, states, d_writes, d_states, dq, dk, dv, *d_gates, T, H,
        *strides(q, k, v, grad), **shape,
    )  # fmt: skip
    return dq, dk, dv, *d_gates


@memory_backward_op.register_fake
def _(grad, q, k, v, log_decay, beta, size):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_decay, beta))


def setup_context(ctx, inputs, output) -> None:
    *tensors, _, ctx.size = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, grad: Tensor, _) -> tuple:
    return *torch.ops.strawberry.memory_backward(grad, *ctx.saved_tensors, ctx.size), None, None


memory_op.register_autograd(backward, setup_context=setup_context)
