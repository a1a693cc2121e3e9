"""Attention-free mixing without positions (arXiv 2105.14103): a scan over time."""

import math

import torch
from torch import Tensor

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.common import fast_exp, fast_reciprocal, jit, next_power_of_2, tl

AFT_ROWS = 16  # tokens in a tile, which a program keeps in registers
AFT_CHAINED_ROWS = 8  # tokens in a tile of a chained program, so that more programs fit on a multiprocessor
AFT_CHANNELS = 32  # channels of a program, one warp
AFT_SEGMENT = 128  # maximum tokens in a chained program's segment
AFT_MIN_SEGMENT = 32  # minimum tokens in a segment, for small models
AFT_GROUP = 16  # segments whose sums are read at once
AFT_MIN_PROGRAMS = 4  # programs per multiprocessor below which segments are chained


def fused_aft_simple(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """y_t = σ(q_t) ⊙ Σ_{s ≤ t} exp(k_s) v_s / Σ_{s ≤ t} exp(k_s), channel by channel (arXiv 2105.14103).

    q, k, v (B, T, D): channels are contiguous, other strides are arbitrary, as in slices of a projection. Returns
    (B, T, D) in v's dtype. Sums are float32 relative to the running maximum, so keys of any size, such as ±80, and T of
    65,536 lose no precision. Differentiable in q, k and v. Requires `can_run(q, k, v)`.

    One warp processes 32 channels of a row in order of time, loading the next 16 tokens while it sums the current ones.
    It stores its sums every 16 tokens. Backward runs from the end and recomputes the other intermediate values from
    these sums.

    If B·D is too small to fill the GPU, time is divided into segments of 128 tokens, one program each, which are
    chained ("Single-pass parallel prefix scan with decoupled look-back", NVIDIA 2016): a program sums its segment,
    publishes the sums, waits for those of earlier segments, and processes its segment again, whose tokens are still in
    the cache. The order of additions is fixed, so results are bitwise deterministic.

    Bytes moved in bfloat16 per element of (B, T, D): forward 8 (q, k, v read, y written) and 0.75 for the sums,
    backward 14 (q, k, v and the gradient read, three gradients written) and 0.75. 8 and 14 are the lower bounds.
    Segments take 1.5 for the sums, stored every 8 tokens, and read 4 and 8 more from the cache.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    save = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return torch.ops.strawberry.aft_simple(q, k, v, save)[0]


@jit
def load_tile(x, t, step: tl.constexpr, T, here, fill: tl.constexpr, ROWS: tl.constexpr):
    """Tokens t … t + ROWS − 1, as a tuple. Because the stride `step` is constant, all loads share one address."""
    rows = ()
    x += t * step
    left = (T - t).to(tl.int32)
    for i in tl.static_range(ROWS):
        rows = rows + (tl.load(x + i * step, mask=here & (i < left), other=fill),)
    return rows


@jit
def empty_tile(fill: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    """The value of `load_tile` before the first token. Loops start one tile early, where they only load, because
    Triton's compile time is cubic in the number of loads in a kernel's source."""
    rows = ()
    for _ in tl.static_range(ROWS):
        rows = rows + (tl.full((BLOCK,), fill, tl.float32).to(TYPE),)
    return rows


@jit
def accumulate_token(top, above, below, k, v):
    """Add a token to the sums, which are divided by exp(top). Also returns the factor by which the sums were
    multiplied, and the token's weight."""
    newer = k > top
    gap = fast_exp(-tl.abs(top - k))
    fade, weight = tl.where(newer, gap, 1.0), tl.where(newer, 1.0, gap)
    return tl.maximum(top, k), above * fade + weight * v, below * fade + weight, fade, weight


@jit
def kahan_accumulate(total, low, fade, more):
    """total · fade + more, and its rounding error (Kahan summation): a long sequence takes thousands of additions."""
    old, new = total * fade, more + low * fade
    total = old + new
    return total, new - (total - old)


@jit
def publish(x, value, here):
    """Store a value for waiting programs. NaN means "not yet published", so NaN is stored as infinity."""
    tl.store(x, tl.where(value == value, value, float("inf")), mask=here)


@jit
def wait_for(x, there, COUNT: tl.constexpr, D: tl.constexpr):
    """Spin until other programs, which started earlier, have published COUNT numbers, with stride D, at each address of
    x (GROUP, channels) in the mask `there`."""
    missing = 1
    while missing > 0:
        first = tl.load(x, mask=there, other=0.0, volatile=True)
        middle = tl.load(x + D, mask=there, other=0.0, volatile=True)
        last = tl.load(x + (COUNT - 1) * D, mask=there, other=0.0, volatile=True)
        some = (first != first) | (middle != middle) | (last != last)
        missing = tl.sum(tl.sum(some.to(tl.int32), axis=0), axis=0)


@jit
def sums_before(totals, prefixes, segment, here, D: tl.constexpr, GROUP: tl.constexpr):
    """The largest key, Σ exp(k) v and Σ exp(k) over all segments before `segment`: from the totals of the segments in
    its group, and the prefix that the last segment of the previous group has published."""
    group, other = segment // GROUP, tl.arange(0, GROUP)[:, None]
    first = group * GROUP
    its, there = totals + (first + other) * 3 * D, (first + other < segment) & here[None, :]
    wait_for(its, there, 3, D)
    tops = tl.load(its, mask=there, other=-1e30, volatile=True)
    top = tl.max(tops, axis=0)
    fade = fast_exp(tops - top[None, :])
    above = tl.sum(fade * tl.load(its + D, mask=there, other=0.0, volatile=True), axis=0)
    below = tl.sum(fade * tl.load(its + 2 * D, mask=there, other=0.0, volatile=True), axis=0)
    its, there = prefixes + (group - 1 + other * 0) * 3 * D, (other == 0) & (group > 0) & here[None, :]
    wait_for(its, there, 3, D)
    its_top = tl.max(tl.load(its, mask=there, other=-1e30, volatile=True), axis=0)
    higher = tl.maximum(top, its_top)
    fade, its_fade = fast_exp(top - higher), fast_exp(its_top - higher)
    above = above * fade + its_fade * tl.sum(tl.load(its + D, mask=there, other=0.0, volatile=True), axis=0)
    below = below * fade + its_fade * tl.sum(tl.load(its + 2 * D, mask=there, other=0.0, volatile=True), axis=0)
    return higher, above, below


@jit
def segment_sums(
    k, v, start, count, T, here, k_step: tl.constexpr, v_step: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest key, Σ exp(k) v and Σ exp(k) over a segment of `count` tiles."""
    top = tl.full((BLOCK,), -1e30, tl.float32)  # finite: −∞ − −∞ would be NaN
    above, below, t = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), start - ROWS
    ks = empty_tile(float("-inf"), ROWS, BLOCK, k.dtype.element_ty)
    vs = empty_tile(0.0, ROWS, BLOCK, v.dtype.element_ty)
    for tile in range(-1, count):
        limit = tl.where(tile < count - 1, T, 0)  # no loads after the segment
        next_ks = load_tile(k, t + ROWS, k_step, limit, here, float("-inf"), ROWS)
        next_vs = load_tile(v, t + ROWS, v_step, limit, here, 0.0, ROWS)
        now = top
        for i in tl.static_range(ROWS):
            now = tl.maximum(now, ks[i].to(tl.float32))
        fade = fast_exp(top - now)
        above, below = above * fade, below * fade
        for i in tl.static_range(ROWS):
            weight = fast_exp(ks[i].to(tl.float32) - now)
            above, below = above + weight * vs[i].to(tl.float32), below + weight
        top, t, ks, vs = now, t + ROWS, next_ks, next_vs
    return top, above, below


@jit
def publish_sums(x, top, above, below, here, D: tl.constexpr):
    publish(x, top, here)
    publish(x + D, above, here)
    publish(x + 2 * D, below, here)


@jit
def forward_tile(
    y, top, above, below, qs, ks, vs, left, here, D: tl.constexpr, ROWS: tl.constexpr, WRITE: tl.constexpr
):
    """The largest key up to a tile's end and the tile's own sums. If WRITE, stores y, which includes the sums before
    the tile."""
    now, over, under = top, tl.zeros_like(above), tl.zeros_like(above)
    kept = tl.full(above.shape, 1.0, tl.float32)
    for i in tl.static_range(ROWS):
        now, over, under, fade, weight = accumulate_token(now, over, under, ks[i].to(tl.float32), vs[i].to(tl.float32))
        if WRITE:
            kept *= fade
            open_by = 1.0 + fast_exp(-qs[i].to(tl.float32))  # σ(q) = 1 / (1 + e^−q)
            gated = (above * kept + over) * fast_reciprocal((below * kept + under) * open_by)
            tl.store(y + i * D, gated.to(y.dtype.element_ty), mask=here & (i < left))
    return now, over, under


@jit
def store_state(states, top, above, below, D: tl.constexpr, mask):
    tl.store(states, top, mask=mask)
    tl.store(states + D, above, mask=mask)
    tl.store(states + 2 * D, below, mask=mask)


@jit
def aft_forward_kernel(
    q, k, v, y, states, totals, prefixes, T, tiles, q_row, k_row, v_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    SAVE: tl.constexpr, WRITE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """A segment of 32 channels of a row. Stores y if WRITE, and if SAVE the sums before each ROWS tokens and after the
    last token. Programs of later segments start later, so a program never waits for one that is not yet resident."""
    c, row, segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64), tl.program_id(2)
    here, segments = c < D, tl.num_programs(2)
    q, k, v, y = q + row * q_row + c, k + row * k_row + c, v + row * v_row + c, y + row * T * D + c
    top = tl.full((BLOCK,), -1e30, tl.float32)
    above, below = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    above_low, below_low = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    start = segment.to(tl.int64) * tiles * ROWS
    count, t = tl.minimum(tiles, tl.cdiv(T - start, ROWS).to(tl.int32)), start - ROWS
    if CHAIN:
        its_top, its_above, its_below = segment_sums(k, v, start, count, T, here, k_step, v_step, ROWS, BLOCK)
        totals += row * segments * 3 * D + c
        prefixes += row * tl.cdiv(segments, GROUP) * 3 * D + c
        publish_sums(totals + segment * 3 * D, its_top, its_above, its_below, here, D)
        zeros = tl.zeros((GROUP, BLOCK), tl.int32)
        top, above, below = sums_before(totals + zeros, prefixes + zeros, segment, here, D, GROUP)
        if segment % GROUP == GROUP - 1:
            end = tl.maximum(top, its_top)
            fade, its_fade = fast_exp(top - end), fast_exp(its_top - end)
            over, under = above * fade + its_above * its_fade, below * fade + its_below * its_fade
            publish_sums(prefixes + (segment // GROUP) * 3 * D, end, over, under, here, D)
    ks = empty_tile(float("-inf"), ROWS, BLOCK, k.dtype.element_ty)
    vs = empty_tile(0.0, ROWS, BLOCK, v.dtype.element_ty)
    qs = empty_tile(0.0, ROWS, BLOCK, q.dtype.element_ty)
    states += (row * (tl.cdiv(T, ROWS) + 1) + segment * tiles - 1) * 3 * D + c
    for tile in range(-1, count):
        left, limit = tl.where(tile >= 0, T - t, 0).to(tl.int32), tl.where(tile < count - 1, T, 0)
        next_ks = load_tile(k, t + ROWS, k_step, limit, here, float("-inf"), ROWS)
        next_vs = load_tile(v, t + ROWS, v_step, limit, here, 0.0, ROWS)
        next_qs = qs
        if WRITE:
            next_qs = load_tile(q, t + ROWS, q_step, limit, here, 0.0, ROWS)
        if SAVE:
            store_state(states, top, above + above_low, below + below_low, D, here & (tile >= 0))
            states += 3 * D
        now, over, under = forward_tile(y + t * D, top, above, below, qs, ks, vs, left, here, D, ROWS, WRITE)
        kept = fast_exp(top - now)
        above, above_low = kahan_accumulate(above, above_low, kept, over)
        below, below_low = kahan_accumulate(below, below_low, kept, under)
        top, t, ks, vs, qs = now, t + ROWS, next_ks, next_vs, next_qs
    if SAVE:
        store_state(states, top, above + above_low, below + below_low, D, here & (segment == segments - 1))


@jit
def sums_after(
    totals, prefixes, states, back, segments, tiles, end, here, D: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Σ r_t and Σ r_t o_t over all segments after the `back`-th from the last, multiplied by exp(end), computed as in
    `sums_before`. Each segment's sums are multiplied by exp(the largest key before it), which `states` has."""
    group, other = back // GROUP, tl.arange(0, GROUP)[:, None]
    first = group * GROUP
    its, there = totals + (first + other) * 2 * D, (first + other < back) & here[None, :]
    tops = states + (segments - 1 - first - other).to(tl.int64) * tiles * 3 * D
    its_top = tl.load(tops, mask=there, other=float("inf"))
    wait_for(its, there, 2, D)
    fade = fast_exp(end[None, :] - its_top)
    after = tl.sum(fade * tl.load(its, mask=there, other=0.0, volatile=True), axis=0)
    weighted = tl.sum(fade * tl.load(its + D, mask=there, other=0.0, volatile=True), axis=0)
    its, there = prefixes + (group - 1 + other * 0) * 2 * D, (other == 0) & (group > 0) & here[None, :]
    tops = states + (segments - first + other * 0).to(tl.int64) * tiles * 3 * D
    its_top = tl.load(tops, mask=there, other=float("inf"))
    wait_for(its, there, 2, D)
    fade = fast_exp(end[None, :] - its_top)
    after += tl.sum(fade * tl.load(its, mask=there, other=0.0, volatile=True), axis=0)
    weighted += tl.sum(fade * tl.load(its + D, mask=there, other=0.0, volatile=True), axis=0)
    return after, weighted


@jit
def recompute_tile(
    dq, state, qs, ks, vs, gs, left, here, D: tl.constexpr, ROWS: tl.constexpr, WRITE: tl.constexpr
):  # fmt: skip
    """Recompute a tile's intermediate values of the forward pass. Returns for each token r, r o, the factor of the sums
    before it and its weight, and the factor of the sums after the tile. Stores the gradient of q if WRITE."""
    top = tl.load(state, mask=here, other=0.0)
    above = tl.load(state + D, mask=here, other=0.0)
    below = tl.load(state + 2 * D, mask=here, other=1.0)
    now, over, under, kept = top, tl.zeros_like(top), tl.zeros_like(top), tl.full(top.shape, 1.0, tl.float32)
    rs, ros, fades, weights = (), (), (), ()
    for i in tl.static_range(ROWS):
        now, over, under, fade, weight = accumulate_token(now, over, under, ks[i].to(tl.float32), vs[i].to(tl.float32))
        kept *= fade
        per_z = fast_reciprocal(below * kept + under)
        o = (above * kept + over) * per_z
        gate = fast_reciprocal(1.0 + fast_exp(-qs[i].to(tl.float32)))
        gated = gs[i].to(tl.float32) * gate
        if WRITE:
            tl.store(dq + i * D, (gated * o * (1.0 - gate)).to(dq.dtype.element_ty), mask=here & (i < left))
        r = gated * per_z
        rs, ros, fades, weights = rs + (r,), ros + (r * o,), fades + (fade,), weights + (weight,)
    return rs, ros, fades, weights, fast_exp(top - now)


@jit
def backward_tile(
    dk, dv, after, weighted, rs, ros, fades, weights, vs, left, here,
    D: tl.constexpr, ROWS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """A tile's own Σ r and Σ r o, scaled to before its first token. If WRITE, stores the gradients of k and v, which
    include the sums after the tile."""
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
def aft_backward_kernel(
    q, k, v, grad, dq, dk, dv, states, totals, prefixes, T, tiles, q_row, k_row, v_row, grad_row,
    D: tl.constexpr, q_step: tl.constexpr, k_step: tl.constexpr, v_step: tl.constexpr, grad_step: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """The gradients of a segment, computed from its end; the last segment is the first program. If CHAIN, the segment
    is processed twice: for its sums, then for its gradients.

    With o_t the mean, Z_t = Σ_{s ≤ t} exp(k_s) and r_t = σ(q_t) ∂L/∂y_t / Z_t, the gradients are sums over t ≥ s:
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
        after, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)  # Σ r and Σ r o of later tiles
        after_low, weighted_low = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        t = last.to(tl.int64) * ROWS
        ks = empty_tile(float("-inf"), ROWS, BLOCK, k.dtype.element_ty)
        vs = empty_tile(0.0, ROWS, BLOCK, v.dtype.element_ty)
        qs = empty_tile(0.0, ROWS, BLOCK, q.dtype.element_ty)
        gs = empty_tile(0.0, ROWS, BLOCK, grad.dtype.element_ty)
        if CHAIN and write == 1:
            end = tl.load(states + last.to(tl.int64) * 3 * D, mask=here, other=0.0)
            zeros = tl.zeros((GROUP, BLOCK), tl.int32)
            after, weighted = sums_after(
                totals + zeros, prefixes + zeros, states + zeros, back, segments, tiles, end, here, D, GROUP
            )
            if back % GROUP == GROUP - 1:
                fade = fast_exp(tl.load(states + first.to(tl.int64) * 3 * D, mask=here, other=0.0) - end)
                publish(prefixes + (back // GROUP) * 2 * D, own_after + fade * after, here)
                publish(prefixes + (back // GROUP) * 2 * D + D, own_weighted + fade * weighted, here)
        for done in range(-1, last - first):
            tile = last - 1 - done
            left = tl.where(done >= 0, T - t, 0).to(tl.int32)
            limit = tl.where(tile > first, T, -ROWS)  # no loads before the segment
            next_ks = load_tile(k, t - ROWS, k_step, limit, here, float("-inf"), ROWS)
            next_vs = load_tile(v, t - ROWS, v_step, limit, here, 0.0, ROWS)
            next_qs = load_tile(q, t - ROWS, q_step, limit, here, 0.0, ROWS)
            next_gs = load_tile(grad, t - ROWS, grad_step, limit, here, 0.0, ROWS)
            state, out = states + tile.to(tl.int64) * 3 * D, t * D
            rs, ros, fades, weights, kept = recompute_tile(
                dq + out, state, qs, ks, vs, gs, left, here, D, ROWS, write == 1
            )
            over, under = backward_tile(
                dk + out, dv + out, after, weighted, rs, ros, fades, weights, vs, left, here, D, ROWS, write == 1
            )
            after, after_low = kahan_accumulate(after, after_low, kept, over)
            weighted, weighted_low = kahan_accumulate(weighted, weighted_low, kept, under)
            t, ks, vs, qs, gs = t - ROWS, next_ks, next_vs, next_qs, next_gs
        if CHAIN and write == 0:
            own_after, own_weighted = after, weighted
            totals += row * segments * 2 * D + c
            prefixes += row * tl.cdiv(segments, GROUP) * 2 * D + c
            publish(totals + back * 2 * D, after, here)
            publish(totals + back * 2 * D + D, weighted, here)


def segment_size(v: Tensor) -> int:
    """Tokens in a segment if channels and rows give too few programs to fill the GPU; 0: time is not divided."""
    B, T, D = v.shape
    lines, wanted, segment = B * -(-D // AFT_CHANNELS), AFT_MIN_PROGRAMS * kernels.multiprocessors(v), AFT_SEGMENT
    while segment > AFT_MIN_SEGMENT and lines * -(-T // segment) < wanted:
        segment //= 2
    return segment if segment < T and lines < wanted else 0


def is_chained(v: Tensor) -> bool:
    return segment_size(v) > 0


def tile_rows(v: Tensor) -> int:
    return AFT_CHAINED_ROWS if is_chained(v) else AFT_ROWS


def launch_config(v: Tensor, numbers: int) -> tuple[tuple[int, int, int], list[Tensor], int, dict]:
    """The grid over channels, rows and segments; the buffers in which segments and groups publish sums; tiles per
    segment, such that no segment is empty; the kernel's constants."""
    (B, T, D), chained, rows = v.shape, is_chained(v), tile_rows(v)
    block, tiles = min(AFT_CHANNELS, next_power_of_2(D)), segment_size(v) // rows if chained else -(-T // rows)
    segments = -(-T // (tiles * rows))
    counts = (segments, -(-segments // AFT_GROUP)) if chained else (0, 0)
    published = [torch.full((B, n, numbers, D), math.nan, dtype=torch.float32, device=v.device) for n in counts]
    shape = {"ROWS": rows, "BLOCK": block, "GROUP": AFT_GROUP, "CHAIN": int(chained), "num_warps": 1}
    return (-(-D // block), B, segments), published, tiles, shape


def state_shape(v: Tensor) -> tuple[int, int, int, int]:
    """The shape of the sums that `launch_aft_forward` saves."""
    B, T, D = v.shape
    return B, -(-T // tile_rows(v)) + 1, 3, D


def launch_aft_forward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, save: bool, write: bool) -> Tensor:
    """Returns the sums before each `tile_rows` tokens and after the last, (B, ⌈T / rows⌉ + 1, 3, D): the largest key,
    and Σ exp(k) v and Σ exp(k) divided by its exponential; empty unless `save`. Stores y if `write`."""
    (_, T, D), (grid, published, tiles, shape) = v.shape, launch_config(v, 3)
    states = torch.empty(state_shape(v) if save else (0,), dtype=torch.float32, device=v.device)
    strides = [x.stride(axis) for axis in (0, 1) for x in (q, k, v)]
    args = (q, k, v, y, states, *published, T, tiles, *strides[:3], D, *strides[3:])
    aft_forward_kernel[grid](*args, **shape, SAVE=save, WRITE=write)
    return states


@torch.library.custom_op("strawberry::aft_simple", mutates_args=())
def aft_simple_op(q: Tensor, k: Tensor, v: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return y, launch_aft_forward(q, k, v, y, save, True)


@aft_simple_op.register_fake
def _(q, k, v, save):
    return v.new_empty(v.shape), v.new_empty(state_shape(v) if save else (0,), dtype=torch.float32)


@torch.library.custom_op("strawberry::aft_simple_backward", mutates_args=())
def aft_simple_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, D), (grid, published, tiles, shape) = v.shape, launch_config(v, 2)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (torch.empty(B, T, D, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides = [x.stride(axis) for axis in (0, 1) for x in (q, k, v, grad)]
    args = (q, k, v, grad, dq, dk, dv, states, *published, T, tiles, *strides[:4], D, *strides[4:])
    aft_backward_kernel[grid](*args, **shape)
    return dq, dk, dv


@aft_simple_backward_op.register_fake
def _(grad, q, k, v, states):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def backward(ctx, grad: Tensor, _) -> tuple:
    return *torch.ops.strawberry.aft_simple_backward(grad, *ctx.saved_tensors), None


aft_simple_op.register_autograd(backward, setup_context=setup_context)
