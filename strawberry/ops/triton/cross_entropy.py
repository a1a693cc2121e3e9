"""Cross entropy and its gradient with respect to the logits, in one kernel."""

import torch
from torch import Tensor

from strawberry.ops.triton.common import fast_exp, jit, next_power_of_2, tl

MAX_EXPONENT_GAP = tl.constexpr(60.0)
MAX_SINGLE_PASS = (
    1 << 14
)  # maximum logits per token in a program's registers: with 50,304, one pass took twice as long as two


def fused_cross_entropy(
    logits: Tensor, targets: Tensor, V: int, cap: float | None, scale: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropies (N,) in float32, and scale · their gradients with respect to the logits (N, ≥ V), in `dtype` or
    else the logits' dtype. Columns from V on are padding. targets (N,) int64; a negative target has loss 0.
    `cross_entropy_fwd_bwd` in strawberry/ops/cross_entropy.py is the reference. Requires `can_run(logits)`.

    Up to MAX_SINGLE_PASS logits per token, a program keeps all of a token's logits: it reads them once and writes their
    gradients once, which is the minimum. For more logits it reads them twice, the second time from the cache, since few
    tokens are processed at once; and a third time if the largest logit exceeds the first ones by more than the range of
    exp.
    """
    return torch.ops.strawberry.cross_entropy_fwd_bwd(logits, targets, V, cap, scale, dtype or logits.dtype)


@jit
def load_logits(logits, c, V, WIDTH, cap, CAPPED: tl.constexpr, EVICT: tl.constexpr):
    """Load capped logits; −∞ from column V on. WIDTH, unlike V, is known to be a multiple of 16, which allows
    vectorized loads."""
    z = tl.load(logits + c, mask=c < WIDTH, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if CAPPED:
        z = cap * (2.0 / (1.0 + tl.exp(-2.0 * z / cap)) - 1.0)  # cap · tanh(z / cap)
    return tl.where(c < V, z, float("-inf"))


@jit
def grad_logit(p, z, c, wanted, cap, scale, CAPPED: tl.constexpr):
    slope = (p - (c == wanted).to(tl.float32)) * scale
    if CAPPED:
        slope = tl.where(p > 0, slope * (1.0 - (z / cap) * (z / cap)), 0.0)
    return tl.where(wanted >= 0, slope, 0.0)


@jit
def cross_entropy_kernel(
    logits, targets, slopes, nats, V, WIDTH, cap, scale, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wanted = tl.load(targets + row)
    z = load_logits(logits + row * WIDTH, c, V, WIDTH, cap, CAPPED, "evict_first")
    top = tl.max(z, axis=0)
    e = fast_exp(z - top)
    total = tl.sum(e, axis=0)
    slope = grad_logit(e / total, z, c, wanted, cap, scale, CAPPED)
    tl.store(slopes + row * WIDTH + c, slope.to(slopes.dtype.element_ty), mask=c < WIDTH)
    found = top + tl.log(total) - tl.sum(tl.where(c == wanted, z, 0.0), axis=0)
    tl.store(nats + row, tl.where(wanted >= 0, found, 0.0))


@jit
def cross_entropy_two_pass_kernel(
    logits, targets, slopes, nats, V, WIDTH, cap, scale, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wanted = tl.load(targets + row)
    logits += row * WIDTH
    top = load_logits(logits, lanes, V, WIDTH, cap, CAPPED, "evict_last")  # V ≥ BLOCK: each lane has a logit
    middle = tl.max(top, axis=0)
    total = fast_exp(top - middle)
    for start in range(BLOCK, V, BLOCK):
        z = load_logits(logits, start + lanes, V, WIDTH, cap, CAPPED, "evict_last")
        total += fast_exp(z - middle)
        top = tl.maximum(top, z)
    highest = tl.max(top, axis=0)
    if highest > middle + MAX_EXPONENT_GAP:  # later logits are much larger than the first block's: exp overflows at 88
        middle = highest
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            total += fast_exp(load_logits(logits, start + lanes, V, WIDTH, cap, CAPPED, "evict_last") - middle)
    log_sum = middle + tl.log(tl.sum(total, axis=0))
    for start in range(0, WIDTH, BLOCK):
        c = start + lanes
        z = load_logits(logits, c, V, WIDTH, cap, CAPPED, "evict_first")
        slope = grad_logit(fast_exp(z - log_sum), z, c, wanted, cap, scale, CAPPED)
        tl.store(slopes + row * WIDTH + c, slope.to(slopes.dtype.element_ty), mask=c < WIDTH)
    one = tl.maximum(wanted, 0) + tl.arange(0, 1)
    found = log_sum - tl.sum(load_logits(logits, one, V, WIDTH, cap, CAPPED, "evict_first"), axis=0)
    tl.store(nats + row, tl.where(wanted >= 0, found, 0.0))


@torch.library.custom_op("strawberry::cross_entropy_fwd_bwd", mutates_args=())
def cross_entropy_op(
    logits: Tensor, targets: Tensor, V: int, cap: float | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    N, width = logits.shape
    slopes = torch.empty_like(logits, dtype=dtype)
    nats = torch.empty(N, dtype=torch.float32, device=logits.device)
    block = next_power_of_2(width)
    shape = {"BLOCK": block, "num_warps": min(max(block // 2048, 4), 32)}
    if width > MAX_SINGLE_PASS:
        shape = {"BLOCK": 8192, "num_warps": 16}
    kernel = cross_entropy_two_pass_kernel if width > MAX_SINGLE_PASS else cross_entropy_kernel
    kernel[(N,)](logits, targets, slopes, nats, V, width, cap or 1.0, scale, CAPPED=cap is not None, **shape)
    return nats, slopes


@cross_entropy_op.register_fake
def _(logits, targets, V, cap, scale, dtype):
    return logits.new_empty(logits.size(0), dtype=torch.float32), torch.empty_like(logits, dtype=dtype)
