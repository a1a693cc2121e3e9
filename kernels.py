"""Triton kernels, for where plain PyTorch moves more bytes than the work needs. Each has a plain PyTorch path beside
it, which is the reference, and what runs where Triton or a GPU is missing.

    usable            whether kernels can take these tensors
    decode_attention  one new token for each row against a ring of keys and values
    quantize_int8     a matrix as int8 with a scale for each output channel
    int8_linear       a linear map by such a matrix

The kernels are registered with torch.library, so torch.compile keeps them whole and a CUDA graph may record them:
nothing on the host depends on what is in a tensor. With TRITON_INTERPRET=1 in the environment they run on the CPU,
slowly, for tests.

`python kernels.py` on a GPU holds each against float64 and times it against its floor: the bytes that it must move over
the bandwidth at which the machine copies.
"""

import math
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS, Windows: the plain paths alone
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(function):
        return function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = math.log2(math.e)
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


# ---- decoding: attention of one token for each row -------------------------------------------------------------------


def decode_attention(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, size: int, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v for one new token in each row, its keys in a ring.

    q (B, H, d); k, v (B, size + 1, Hkv·d), slot s holding the newest position p ≤ pos with p % size == s; the slot
    after them is never read. pos (B,) int64, on the device: the query's position, whose own k and v are in the ring. It
    sees the slots 0 … min(pos + 1, size) − 1; with −1 a row is idle, its result zero. H is a multiple of Hkv
    (arXiv 2305.13245). Returns (B, H, d) in q's dtype; sums are float32.

    Bytes moved: k and v of the tokens that are there, once, and 4·S·d·H·B twice for S splits of a long context
    (flash-decoding, arXiv 2311.01282). Floor: those of k and v over the copy bandwidth.
    """
    if not usable(q, k, v):
        return decode_plain(q, k, v, pos, size, scale)
    return torch.ops.strawberry.decode_attention(q, k, v, pos, size, scale, decode_splits(q, k, size))


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
    if size <= 4 * decode_block(d):
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
    q, k, v, pos, out, parts, size, heads, splits, scale, q_row, q_head, k_row, k_slot, v_row, v_slot,
    D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
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
    top = tl.full((BLOCK,), -1e30, tl.float32)  # finite, so that lanes without a slot make no NaN
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, PAD), tl.float32)
    for start in range(first, last, BLOCK):
        slot = (start + lane).to(tl.int64)
        here = slot < last
        mask = here[:, None] & (c < D)[None, :]
        keys = tl.load(k + slot[:, None] * k_slot + c[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.load(v + slot[:, None] * v_slot + c[None, :], mask=mask, other=0.0).to(tl.float32)
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
    q, k, v, pos, out, parts, size, heads, splits, scale, q_row, q_head, k_row, k_slot, v_row, v_slot,
    D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
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
    top = tl.full((GROUP_PAD,), -1e30, tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    mixed = tl.zeros((GROUP_PAD, PAD), tl.float32)
    for start in range(first, last, BLOCK):
        slot = (start + lane).to(tl.int64)
        here = slot < last
        mask = here[:, None] & (c < D)[None, :]
        keys = tl.load(k + slot[:, None] * k_slot + c[None, :], mask=mask, other=0.0).to(DOT)
        values = tl.load(v + slot[:, None] * v_slot + c[None, :], mask=mask, other=0.0).to(DOT)
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
    B, H, D = q.shape
    shared = k.size(-1) // D
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    parts = torch.empty(B, H, splits, D + 4, dtype=torch.float32, device=q.device) if splits > 1 else out
    shape = {"D": D, "PAD": power_of_2(max(D, 16)), "BLOCK": decode_block(D)}
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    args = (q, k, v, pos, out, parts, size, H, splits, scale * LOG2E, *strides)
    if shared == H:
        decode_single[(H, splits, B)](*args, **shape, SPLIT=splits > 1, num_warps=4)
    else:
        group = {"GROUP": H // shared, "GROUP_PAD": power_of_2(max(H // shared, 16)), "DOT": dot_type(k, v)}
        decode_group[(shared, splits, B)](*args, **shape, SPLIT=splits > 1, **group, num_warps=4)
    if splits > 1:
        decode_merge[(H, B)](parts, pos, out, size, H, splits, **shape, SPLITS_PAD=power_of_2(splits), num_warps=4)
    return out


@decode_op.register_fake
def _(q, k, v, pos, size, scale, splits):
    return q.new_empty(q.shape)


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


def main() -> None:
    if triton is None or not torch.cuda.is_available():
        raise SystemExit("python kernels.py times the kernels on a GPU; there is no GPU with Triton here")
    bandwidth = copy_bandwidth()
    name, versions = torch.cuda.get_device_name(), f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{name}, {versions}: copies at {bandwidth / 1e12:.2f} TB/s")
    print(f"{'bfloat16':46} {'error':>8} {'µs':>9} {'floor µs':>9} {'floor':>6}")
    if not all([measure_decode(bandwidth), measure_int8(bandwidth)]):
        raise SystemExit("a kernel is wrong: its error is above its bound")


if __name__ == "__main__":
    main()
